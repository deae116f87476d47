"""A lab whose client's node alone has the rules of many Services.

The lab itself is up without a service proxy and without Services.  What a mode puts on a node is
then made true on the client's node: were it on the server's node too, each first packet would meet
the rules twice, and those of the second node are no part of what a client's node costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from netlab.bench import clusters
from netlab.compare import twins
from netlab.compare.model import Variant
from netlab.datapath.build import build
from netlab.datapath.plan import plan
from netlab.datapath.services.modes import MODES, mode_of
from netlab.datapath.state import Change, LabState, Rules, namespace_name
from netlab.kernel import converge, namespaces, observe
from netlab.lab import control, ready, rules
from netlab.lab.change import no_such_mode
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab

NO_PROXY = Variant("none")
_PATIENCE_S = 60.0  # for proxies with a port for each of many Services


class Stage:
    """A lab that is up; names of the namespaces that packets are sent and awaited in."""

    def __init__(self, lab: Lab, rules: Rules | None) -> None:
        self.lab = lab
        self.rules = rules  # of the client's node
        self.client = namespace_name(lab.name, clusters.NAMESPACE, "client")
        self.server = namespace_name(lab.name, clusters.NAMESPACE, "server")
        self.client_node = namespace_name(lab.name, clusters.CLIENT_NODE)
        self.server_node = namespace_name(lab.name, clusters.SERVER_NODE)


@contextlib.contextmanager
def staged(variant: Variant, services: int, endpoints: int, overlay: str) -> Iterator[Stage]:
    """Have such a lab up during the body; it is taken down whatever happens but `kill -9`.

    NetlabError (exit 3) if the machine lacks what the mode needs.
    """
    if variant.mode not in MODES:
        raise no_such_mode(variant.mode)
    lab = clusters.lab(clusters.name(str(variant)), variant, services, endpoints, overlay)
    rules.require(lab)
    bare = clusters.lab(lab.name, NO_PROXY, 0, 0, overlay)
    with twins.up(bare):
        yield Stage(lab, None if variant == NO_PROXY else _put_rules(lab))


def _put_rules(lab: Lab) -> Rules | None:
    """What the lab's mode gives the client's node beyond what is there; its rules."""
    state = build(lab, rules=False)
    client, server = state.nodes
    was = build(clusters.lab(lab.name, NO_PROXY, 0, 0, lab.overlay.type)).nodes[1]
    state = LabState(lab=state.lab, switch=state.switch, nodes=(client, was), servers=state.servers)
    marks = namespaces.mark(lab.name, "")
    found = {each.name: observe.observe(each.name, marks, each) for each in state.namespaces()}
    item = mode_of(lab).render(lab, lab.node(clusters.CLIENT_NODE))
    changes = plan(state, found)
    if item is not None:
        changes.append(Change(verb="add", namespace=client.namespace.name, item=item))
    loads = rules.Loads(changes, lab)
    links = [change for change in changes if not rules.concerns(change)]
    converge.carry_out(lab.name, links, state.namespaces(), found)
    loads.begin(client.namespace.name)
    if problems := loads.finish():
        raise NetlabError(problems, Exit.MACHINE)
    there = namespace_name(lab.name, server.name)
    servers = [each for each in state.servers if each.namespace != there]
    init = control.connect(lab.name)
    if init and (servers or client.processes):
        init.serve(servers, client.processes)
        # (a program listens on all of its ports, or on none)
        programs = [msgspec.structs.replace(p, listens=p.listens[-1:]) for p in client.processes]
        if lacking := ready.await_ready(programs, timeout_s=_PATIENCE_S):
            raise NetlabError(
                [Problem("not-ready", str(each)) for each in lacking],
                Exit.MACHINE,
            )
    return item
