"""A destination that is a name: asked for from the pod, as its C library would, before the probe.

A text is a name for DNS if the sender is a pod that has a name server and the text is no pod, node,
host or address: a Service by its bare name, anything with dots, or what nobody is called.  With
`-n NAMESPACE`, which says where names are looked for, it stays a reference.

The order of questions is that of glibc's resolver (resolv.conf(5)): a name with fewer dots than
`ndots` is first tried with each search suffix, then as it is; others the other way round.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from netlab.datapath.name_files import pod_view
from netlab.datapath.name_server import zone
from netlab.kernel import dns_message, namespaces
from netlab.problems import Exit, NetlabError, Problem, suggest
from netlab.topology.model import Lab, Pod
from netlab.topology.references import resolve
from netlab.trace.aim import Request
from netlab.trace.model import NameAsked

TIMEOUT_S = 1.0  # (resolv.conf has 5 s, and asks twice)
_NAME = re.compile(r"[A-Za-z0-9_]([-A-Za-z0-9_.]*[A-Za-z0-9_])?\.?")
_LONGEST_ALIAS = 8

Ask = Callable[[str, str, str], "dns_message.Answer | None"]
"""Asks a server for a name's records of a kind; None: no answer came."""


class Resolved(NamedTuple):
    """A request to an address in place of the name, and how it was found; or how it was not.

    `request` is None when no server answered; `unanswered` is then the question as a request.
    """

    request: Request | None
    questions: list[NameAsked]
    unanswered: Request | None = None


def is_name(lab: Lab, request: Request) -> bool:
    """Whether the destination is a name that the sender would ask a server for."""
    if request.namespace is not None or request.protocol == "dns":
        return False
    name, port = _split(request.destination)
    if not _NAME.fullmatch(name) or name.replace(".", "").isdigit() or name == "localhost":
        return False
    if port and not port.isdecimal():
        return False
    pod = _pod(lab, request)
    if pod is None or not _Resolver(pod_view(lab, pod).files[0].text).servers:
        return False
    try:
        meant = resolve(lab, name)
    except NetlabError:
        return True
    return meant.kind == "service"


def resolved(lab: Lab, request: Request, ask: Ask | None = None) -> Resolved:
    """Ask for the name, by `ask` or else really, from the pod.

    NetlabError (exit code 1) if there is no such name.
    """
    pod = _pod(lab, request)
    assert pod is not None
    view = pod_view(lab, pod)
    name, port = _split(request.destination)
    is_ipv6 = request.family == 6 or (request.family is None and lab.families[0] == "IPv6")
    kind = "AAAA" if is_ipv6 else "A"
    found = _of_hosts(view.files[1].text, name, is_ipv6)
    if found:
        told = NameAsked(name=name, type=kind, server="/etc/hosts", answer="NOERROR", data=[found])
        return Resolved(_to(request, found, port), [told])
    resolver = _Resolver(view.files[0].text)
    questions: list[NameAsked] = []
    for candidate in resolver.candidates(name):
        for server in resolver.servers:
            before = time.monotonic()
            answer = (ask or _asker(view.namespace))(server, candidate, kind)
            took = round((time.monotonic() - before) * 1e6)
            data = [each.data for each in answer.answers] if answer else []
            said = answer.code if answer else None
            questions.append(
                NameAsked(
                    name=candidate,
                    type=kind,
                    server=server,
                    answer=said,
                    data=data,
                    elapsed_us=None if ask else took,
                )
            )
            if answer:
                break
        else:
            return Resolved(None, questions, _question(request, resolver.servers[0], candidate))
        addresses = [each.data for each in answer.answers if each.kind == kind]
        if addresses:
            return Resolved(_to(request, addresses[0], port), questions)
    raise NetlabError(_unknown(lab, pod, name, kind, questions), Exit.NO)


def foretold(lab: Lab, request: Request) -> Request:
    """The request to the address that the name should have, by what is declared."""
    found = resolved(lab, request, _declared(lab)).request
    assert found is not None  # (what is declared always answers)
    return found


def question_to(lab: Lab, request: Request, asked: NameAsked) -> Request | None:
    """The last question as a request for a trace of its own; None if a file answered."""
    return None if asked.server == "/etc/hosts" else _question(request, asked.server, asked.name)


class _Resolver:
    """What a resolv.conf says."""

    def __init__(self, text: str) -> None:
        self.servers: list[str] = []
        self.searches: list[str] = []
        self.ndots = 1
        for line in text.splitlines():
            word, *values = line.split() or [""]
            if word == "nameserver":
                self.servers += values
            elif word == "search":
                self.searches = values
            elif word == "options":
                counts = [value[6:] for value in values if value.startswith("ndots:")]
                self.ndots = int(counts[-1]) if counts and counts[-1].isdecimal() else 1

    def candidates(self, name: str) -> Iterator[str]:
        """The names that are asked for, in order."""
        if name.endswith("."):
            yield name
            return
        suffixed = [f"{name}.{suffix.rstrip('.')}." for suffix in self.searches]
        if name.count(".") >= self.ndots:
            yield from (f"{name}.", *suffixed)
        else:
            yield from (*suffixed, f"{name}.")


def _pod(lab: Lab, request: Request) -> Pod | None:
    with contextlib.suppress(NetlabError):
        return resolve(lab, request.source).pod
    return None


def _split(text: str) -> tuple[str, str]:
    name, _, port = text.partition(":")
    return name, port


def _to(request: Request, address: str, port: str) -> Request:
    shown = f"[{address}]" if ":" in address else address
    return msgspec.structs.replace(request, destination=f"{shown}:{port}" if port else address)


def _question(request: Request, server: str, name: str) -> Request:
    return Request(
        source=request.source, destination=server, protocol="dns", query=name.rstrip(".")
    )


def _of_hosts(text: str, name: str, is_ipv6: bool) -> str | None:
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if name.rstrip(".") in names and (":" in address) == is_ipv6:
            return address
    return None


def _asker(namespace: str) -> Ask:
    def ask(server: str, name: str, kind: str) -> dns_message.Answer | None:
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with namespaces.entered(namespace):
            asking = socket.socket(family, socket.SOCK_DGRAM)
        number = time.monotonic_ns() & 0xFFFF
        with asking, contextlib.suppress(OSError, ValueError):
            asking.settimeout(TIMEOUT_S)
            asking.connect((server, 53))
            asking.send(dns_message.query(name, kind, number))
            return dns_message.decode(asking.recv(dns_message.LARGEST))
        return None

    return ask


def _declared(lab: Lab) -> Ask:
    """What the zone that is declared answers."""
    records: dict[tuple[str, str], list[str]] = {}
    for line in zone(lab)[0].splitlines()[2:]:
        owner, kind, data = line.split(maxsplit=2)
        records.setdefault((owner, kind), []).append(data)
    owners = {owner for owner, _ in records}

    def ask(server: str, name: str, kind: str) -> dns_message.Answer:
        found = []
        for _ in range(_LONGEST_ALIAS):
            if not (alias := records.get((name, "CNAME"))):
                break
            found.append(dns_message.Record(name, "CNAME", 0, alias[0]))
            name = alias[0]
        found += [dns_message.Record(name, kind, 0, data) for data in records.get((name, kind), ())]
        is_there = any(owner == name or owner.endswith(f".{name}") for owner in owners)
        return dns_message.Answer(0, "NOERROR" if is_there else "NXDOMAIN", False, tuple(found))

    return ask


def _unknown(lab: Lab, pod: Pod, name: str, kind: str, questions: list[NameAsked]) -> Problem:
    tried = ", ".join(f"{each.name} {each.answer}" for each in questions)
    message = f'Pod {pod.key} finds no address of "{name}": {questions[-1].server} said {tried}'
    if any(each.answer == "NOERROR" for each in questions):
        what = "IPv6" if kind == "AAAA" else "IPv4"
        hint = f"a name of them is there, without an {what} address: no endpoint of it is ready?"
        return Problem("no-address", message, hint=hint)
    first = name.split(".")[0]
    others = [each for each in lab.services if each.name == first]
    if others:
        names = ", ".join(f"{each.name}.{each.namespace}" for each in others)
        hint = f"Services of other namespaces have them in their names: {names}"
    else:
        known = [each.name for each in lab.services if each.namespace == pod.namespace]
        near = suggest(first, known)
        hint = (
            f'did you mean "{near}"?'
            if near
            else "`netlab get svc -A` lists the Services there are"
        )
    return Problem("name-not-known", message, hint=hint)
