"""Rules of userspace mode as `iptables-save` lists them: whom they serve, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from netlab.datapath.services.iptables_reading import IptablesReading, listings
from netlab.datapath.services.iptables_save import comment_of, target_of, tokens
from netlab.datapath.services.names import address_port
from netlab.datapath.services.reading import Block, Key, Line, Owner, Stage
from netlab.datapath.services.userspace import (
    CONTAINER,
    HOST,
    KUBELETS,
    NODE_PORT_CONTAINER,
    NODE_PORT_HOST,
    NON_LOCAL,
    proxied,
)
from netlab.topology.model import Lab, Node

_FRAME = {CONTAINER, HOST, NODE_PORT_CONTAINER, NODE_PORT_HOST, NON_LOCAL, KUBELETS}
_PROGRAMS = {"tcp": "HAProxy", "udp": "nginx"}
_PORT_NAME = re.compile(r"[a-z0-9.-]+/[a-z0-9.-]+(?::[a-z0-9-]+)?")
_SHOWN = 3  # endpoints in one sentence
_HOOKS = {
    CONTAINER: "a new connection from a pod or from outside is looked up among Services",
    HOST: "a new connection of the node itself is looked up among Services",
    NODE_PORT_CONTAINER: "what is for the node itself may be for a NodePort",
    NODE_PORT_HOST: "what the node sends to itself may be for a NodePort",
    NON_LOCAL: "what is for the node itself may be for a proxy of a NodePort",
}


class UserspaceReading(IptablesReading):
    """See `Reading`."""

    stages: Sequence[Stage] = (
        Stage("where it goes", (("nat", "PREROUTING"), ("nat", "OUTPUT")), translates=True),
        Stage("what is let through", (("filter", "INPUT"),)),
    )

    def __init__(self, lab: Lab, node: Node, *, whole: bool = True) -> None:
        super().__init__(lab, node, whole=whole)
        self._ports = {
            (family, each.info.protocol, each.info.name): each
            for family, version in (("ip", 4), ("ip6", 6))
            for each in proxied(lab, node, version)
        }

    @staticmethod
    def recognise(text: str) -> Mapping[str, str] | None:
        """What `iptables-save`, `ip6tables-save` or one after the other have printed."""
        return listings(text) if f":{CONTAINER} " in text else None

    def _is_own(self, chain: str) -> bool:
        return chain in _FRAME

    def _learn(self, chain: str, lines: list[Line]) -> None:
        """All chains are there whatever Services there are."""

    def is_shared(self, key: Key) -> bool:
        """Each has rules of all Services."""
        return key.name in _FRAME

    def owners(self, key: Key, line: str) -> tuple[Owner, ...]:
        """By the comment."""
        named = _PORT_NAME.fullmatch(comment_of(line))
        return (Owner(named[0]),) if named and key.name in _FRAME else ()

    def endpoints(self, key: Key, line: str) -> Iterable[str]:
        """None: they are the proxy's business."""
        return ()

    def is_met(self, key: Key, line: str) -> bool:
        """All but the protection of loopback."""
        return key.name != KUBELETS

    def sentence(self, block: Block, line: Line) -> str:
        """What a rule does."""
        chain, target, given = block.key.name, target_of(line.text), tokens(line.text)
        if chain == KUBELETS:
            return "packets to loopback that came from outside are dropped"
        if chain not in _FRAME:
            return f"{_HOOKS.get(target, 'what the node itself gets and sends')}: on to {target}"
        protocol = given.get("-p", "")
        port = f"{given.get('--dport', '')}/{protocol.upper()}"
        if chain == NON_LOCAL:
            return f"to port {port} of the node, where a proxy listens: let in"
        address = given.get("-d", "").removesuffix("/32").removesuffix("/128")
        address = f"[{address}]" if ":" in address else address
        to = f"to {address}:{port}" if address else f"to the NodePort {port}"
        if "! --physdev-is-in" in given:
            to += " that does not come in by a bridge"
        elif "--dst-type" in given:
            to += ", if that is the node's own address"
        own = given.get("--to-ports") or given.get("--to-destination", "").rpartition(":")[2]
        return f"{to}: to port {own} of this node, {self._behind(block.key, protocol, line.text)}"

    def _behind(self, key: Key, protocol: str, line: str) -> str:
        program = _PROGRAMS.get(protocol, "a proxy")
        port = self._ports.get((key.family, protocol, comment_of(line)))
        if port is None:
            return "where no proxy of ours listens"
        ends = [self._known.endpoint(address_port(each)) for each in port.endpoints]
        if not ends:
            return f"where {program} has no endpoint to pass it on to"
        shown = "; ".join(ends[:_SHOWN])
        more = f" and {len(ends) - _SHOWN} more" if len(ends) > _SHOWN else ""
        return f"where {program} passes it on to one of {len(ends)}, in turn: {shown}{more}"
