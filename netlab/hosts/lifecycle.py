"""The life of a lab whose nodes are machines: up, down, and how it is meanwhile.

Every step is done on all machines at once; what is asked of one that does not answer ends after a
time, and names it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from netlab.hosts import part, record
from netlab.hosts.addresses import on_machines
from netlab.hosts.condition import Condition
from netlab.hosts.gateways import CONNECT_S, Gateways, raise_all
from netlab.hosts.hosts_file import Machines
from netlab.hosts.machine import Facts, Held, Order
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab

Tell = Callable[[str], None]

# How long machines call each other before one counts as not heard.
_HEAR_S = 3.0
_CALL_S = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `up` did: on which machines what, and which could not be made a node."""

    lab: Lab
    held: Mapping[str, Held]
    failed: Mapping[str, NetlabError]
    elapsed_s: float


def up(
    lab: Lab,
    machines: Machines,
    *,
    allowed: bool = False,
    keep_going: bool = False,
    timeout_s: float = CONNECT_S,
    tell: Tell = lambda line: None,
) -> Outcome:
    """Make each machine hold its node, and return when everything answers.

    Where one fails, those that this call made nodes are given back, unless it is to keep going with
    the others.  Raises NetlabError.
    """
    part.check(lab)
    with record.locked(lab.name), Gateways(machines, timeout_s) as gateways:
        if not keep_going or not gateways.open:
            gateways.require_all()
        return up_through(gateways, lab, machines, allowed, keep_going, timeout_s, tell)


def up_through(
    gateways: Gateways,
    lab: Lab,
    machines: Machines,
    allowed: bool = False,
    keep_going: bool = False,
    timeout_s: float = CONNECT_S,
    tell: Tell = lambda line: None,
) -> Outcome:
    """The same, through gateways that are open and stay so."""
    start = time.perf_counter()
    part.check(lab)
    facts, failed = _examined(gateways, lab, machines, allowed, tell)
    failed = {**gateways.failed, **failed}
    if failed and not keep_going:
        raise_all(failed)
    lab, said = _with_addresses(lab, facts)
    for line in said:
        tell(line)
    failed |= _unheard(gateways, lab, facts)
    if failed and (not keep_going or len(failed) == len(machines)):
        raise_all(failed)
    wanted = [node for node in facts if node not in failed]
    # Before anything is made: whoever looks for what a killed `up` left finds where to look.
    os.makedirs(f"{record.DIRECTORY}/{lab.name}", mode=0o700, exist_ok=True)
    before = record.read(lab.name)
    record.write(record.Recorded(lab, dict(machines), timeout_s))

    def order(node: str) -> bytes:
        wish = Order(lab, node, machines[node].underlay, allowed)
        return msgspec.json.encode((wish, facts[node].interface))

    answers, errors = gateways.ask("hold", order, wanted)
    held = {node: msgspec.json.decode(data, type=Held) for node, data in answers.items()}
    if errors and not keep_going:
        made = [node for node, each in held.items() if each.created]
        _, left = gateways.ask("release", lab.name.encode(), made)
        if before is None and not left and len(made) == len(held):
            record.remove(lab.name)
        elif before is not None:
            record.write(before)
        raise_all({**errors, **left})
    return Outcome(lab, held, {**failed, **errors}, time.perf_counter() - start)


def down(name: str, machines: Machines | None = None, timeout_s: float | None = None) -> Down:
    """Give every machine back that can be reached.

    What cannot be is still noted, so that the next `down` finds it.
    """
    recorded = record.read(name)
    machines = machines or (recorded.machines if recorded else {})
    timeout_s = timeout_s or (recorded.timeout_s if recorded else CONNECT_S)
    with record.locked(name), Gateways(machines, timeout_s) as gateways:
        return down_through(gateways, name)


@dataclass(frozen=True, slots=True)
class Down:
    """How many namespaces went on each machine, and which could not be reached."""

    removed: Mapping[str, int]
    failed: Mapping[str, NetlabError]


def down_through(gateways: Gateways, name: str) -> Down:
    """The same, through gateways that are open and stay so."""
    answers, errors = gateways.ask("release", name.encode())
    failed = {**gateways.failed, **errors}
    recorded = record.read(name)
    if not failed:
        record.remove(name)
    elif recorded:
        left = {node: each for node, each in recorded.machines.items() if node in failed}
        record.write(msgspec.structs.replace(recorded, machines=left))
    removed = {node: int(msgspec.json.decode(data)) for node, data in answers.items()}
    return Down(removed, failed)


def status(name: str) -> tuple[dict[str, Condition], dict[str, NetlabError]]:
    """How the lab is on each machine, and which does not answer.  NetlabError if there is none."""
    recorded = required(name)
    with Gateways(recorded.machines, recorded.timeout_s) as gateways:
        answers, errors = gateways.ask("status", name.encode())
    found = {node: msgspec.json.decode(data, type=Condition) for node, data in answers.items()}
    return found, {**gateways.failed, **errors}


def required(name: str) -> record.Recorded:
    """What is noted of a lab.  NetlabError (exit 2) if nothing is."""
    recorded = record.read(name)
    if recorded is None:
        raise NetlabError(Problem("unknown-lab", f'no lab "{name}" is up on machines'))
    return recorded


def gateways_of(name: str) -> Gateways:
    """Gateways to the machines of a lab, to be entered."""
    recorded = required(name)
    return Gateways(recorded.machines, recorded.timeout_s)


def _examined(
    gateways: Gateways, lab: Lab, machines: Machines, allowed: bool, tell: Tell
) -> tuple[dict[str, Facts], dict[str, NetlabError]]:
    """What each machine is, and which cannot be a node."""
    addresses = {node.name: node.address for node in lab.nodes}

    def order(node: str) -> bytes:
        underlay = machines[node].underlay or addresses[node]
        return msgspec.json.encode(Order(lab, node, underlay, allowed))

    answers, errors = gateways.ask("examine", order)
    facts: dict[str, Facts] = {}
    for node, data in answers.items():
        found = msgspec.json.decode(data, type=Facts)
        for note in found.notes:
            tell(f"{node}: {note}")
        if found.problems:
            problems = [
                Problem(each.code, f"{node}: {each.message}", hint=each.hint)
                for each in found.problems
            ]
            errors[node] = NetlabError(problems, Exit.MACHINE)
        else:
            facts[node] = found
    return facts, errors


def _with_addresses(lab: Lab, facts: Mapping[str, Facts]) -> tuple[Lab, list[str]]:
    known = {node.name: f"{node.address}/32" for node in lab.nodes}
    return on_machines(lab, known | {node: each.address for node, each in facts.items()})


def _unheard(gateways: Gateways, lab: Lab, facts: Mapping[str, Facts]) -> dict[str, NetlabError]:
    """Which machines do not hear others on the overlay's port, before anything is built on it.

    A machine whose port is taken has the overlay already.
    """
    port, cookie = lab.overlay.port, os.urandom(16)
    addresses = {node: each.address.partition("/")[0] for node, each in facts.items()}
    nodes = list(facts)
    answers, errors = gateways.ask(
        "listen", lambda node: msgspec.json.encode((addresses[node], port)), nodes
    )
    listening = [node for node, data in answers.items() if msgspec.json.decode(data)]
    missing = {
        node: {addresses[other] for other in listening if other != node} for node in listening
    }
    end = time.monotonic() + _HEAR_S
    try:
        while any(missing.values()) and time.monotonic() < end:
            gateways.ask(
                "call",
                lambda node: msgspec.json.encode(
                    (cookie, [addresses[other] for other in listening if other != node])
                ),
                listening,
            )
            time.sleep(_CALL_S / 10)
            heard, lost = gateways.ask("heard", msgspec.json.encode(cookie), listening)
            for node, data in heard.items():
                missing[node] -= set(msgspec.json.decode(data, type=list[str]))
            errors |= lost
    finally:
        gateways.ask("deaf", nodes=nodes)
    for node, silent in missing.items():
        if silent and node not in errors:
            problem = Problem(
                "not-heard",
                f"{node}: UDP to its port {port} does not come from {', '.join(sorted(silent))}",
                hint="a firewall, or the network between them: the overlay needs that port",
            )
            errors[node] = NetlabError(problem, Exit.MACHINE)
    return errors
