"""What the words of `netlab capture` mean: first where to capture, then a filter.

A target is a namespace of the lab, by the usual references or `switch`, and `:DEVICE` narrows it to
a device.  The first word that names nothing begins the filter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

import msgspec

from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.model import Lab, Pod, Service
from netlab.topology.references import resolve
from netlab.trace.place import (
    Place,
    place_of_balancer,
    place_of_gateway,
    place_of_host,
    place_of_internet,
    place_of_node,
    place_of_pod,
    place_of_switch,
)

# What a filter in pcap's language may begin with, see pcap-filter(7).
_FILTER = re.compile(
    r"[\s(!]*(?:ah|arp|broadcast|dst|esp|ether|gateway|geneve|greater|host|icmp6?|igmp|ip6?|len|less|"
    r"link|mpls|multicast|net|not|pim|port|portrange|proto|protochain|rarp|sctp|src|stp|tcp|udp|"
    r"vlan|vrrp|vxlan|\d.*)\b"
)


class Target(msgspec.Struct, frozen=True):
    """A namespace to capture in; without `devices` on all that it has and gets."""

    place: Place
    devices: frozenset[str] = frozenset()


class Words(msgspec.Struct, frozen=True):
    """Words, understood.  `doubt` says why the filter's first word is no target."""

    targets: tuple[Target, ...]
    filter: str
    doubt: NetlabError | None = None


def understand(lab: Lab, words: Sequence[str], namespace: str | None = None) -> Words:
    """Targets and filter; without a target all of the lab.

    NetlabError (exit 2) if a word names more than one thing, or nothing at all.
    """
    _require_words(words)
    targets: list[Target] = []
    rest, doubt = "", None
    for index, word in enumerate(words):
        try:
            targets += _named(lab, word, namespace)
        except NetlabError as error:
            if error.problems[0].code == "ambiguous-name":
                raise
            rest = " ".join(words[index:])
            doubt = None if _FILTER.match(rest) else error
            break
    return Words(_joined(targets) or everything(lab), rest, doubt)


def everything(lab: Lab) -> tuple[Target, ...]:
    """All namespaces of a lab."""
    nodes = [place_of_node(lab, node) for node in lab.nodes]
    pods = [place_of_pod(lab, pod) for pod in lab.pods if not pod.host_network]
    hosts = [place_of_host(lab, host) for host in lab.hosts]
    outside = [place_of_gateway(lab), place_of_internet(lab)] if lab.gateway else []
    hosts += [place_of_balancer(lab, box) for box in lab.balancers]
    return tuple(map(Target, [*nodes, place_of_switch(lab), *outside, *hosts, *pods]))


def require_device(target: Target, known: Sequence[str]) -> None:
    """NetlabError (exit 2) if a namespace that has the `known` devices lacks one of a target."""
    for device in sorted(target.devices - set(known)):
        near = suggest(device, known)
        has = f"it has {', '.join(sorted(known))}"
        raise NetlabError(
            Problem(
                "unknown-device",
                f'{target.place} has no device "{device}"',
                hint=f'did you mean "{near}"? {has}' if near else has,
            )
        )


def _require_words(words: Sequence[str]) -> None:
    """NetlabError (exit 2) for an empty word."""
    if not all(map(str.strip, words)):
        message = "an empty word is neither a target nor a filter"
        raise NetlabError(Problem("empty-word", message, hint="leave it out"))


def _named(lab: Lab, text: str, namespace: str | None) -> list[Target]:
    name, device = _split_device(text)
    devices = frozenset({device} if device else ())
    if text.endswith(":") and not text.endswith("::"):
        message = f'"{text}" names no device behind the colon'
        raise NetlabError(Problem("no-device", message, hint=f"{text}eth0, or {text[:-1]}"))
    if name == "switch":
        return [Target(place_of_switch(lab), devices)]
    found = resolve(lab, name, namespace)
    if found.pod:
        return [Target(place_of_pod(lab, found.pod), devices)]
    if found.node:
        return [Target(place_of_node(lab, found.node), devices)]
    if found.host:
        return [Target(place_of_host(lab, found.host), devices)]
    behind = list(_behind(lab, found.service)) if found.service else []
    if not behind:
        what = "a Service without a pod behind it" if found.service else "no pod and no node"
        raise NetlabError(
            Problem(
                "no-place",
                f'"{text}" is {what} in lab {lab.name}',
                hint="a target is a pod, a node, `switch`, or svc/NAME for the pods behind it",
            )
        )
    return [Target(place_of_pod(lab, pod), devices) for pod in behind]


def _split_device(text: str) -> tuple[str, str]:
    try:
        ip_address(text)
    except ValueError:
        name, colon, device = text.rpartition(":")
        return (name.strip("[]"), device) if colon else (text.strip("[]"), "")
    return text, ""


def _behind(lab: Lab, service: Service) -> Iterable[Pod]:
    ends = {end.pod for port in service.ports for end in lab.endpoints_of(service, port)}
    return (pod for pod in lab.pods if pod.key in ends)


def _joined(targets: Iterable[Target]) -> tuple[Target, ...]:
    """One target for each namespace; all devices of it, if it was once named without one."""
    devices: dict[Place, frozenset[str]] = {}
    for target in targets:
        known = devices.get(target.place, target.devices)
        both = known and target.devices and known | target.devices
        devices[target.place] = both or frozenset()
    return tuple(Target(place, names) for place, names in devices.items())
