"""Twins: labs like a running one but for the service proxy, there while somebody compares them.

A twin is an ordinary lab with a name of its own, marked in its record (`Lab.twin_of`).  Whoever
made it holds the abstract Unix address `netlab-twin:NAME` until it is taken down; the kernel frees
that address when the process ends, `kill -9` included.  So a twin whose address is free is an
orphan, and whoever makes twins next removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator

from msgspec.structs import replace

from netlab.compare.model import Variant
from netlab.datapath.faults import faulty
from netlab.kernel.namespaces import STATE_DIR
from netlab.lab import change, lifecycle, record
from netlab.lab.edits import Changed
from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.allocate import PROXY_MODES
from netlab.topology.model import IPTablesBackend, Lab
from netlab.topology.selection import for_path
from netlab.trace.aim import Aim

_BACKENDS: tuple[IPTablesBackend, ...] = ("nft", "legacy")
_LONGEST_NAME = 63  # as topology.load has it
# Up to here a whole lab takes no longer than its rules.
SMALL_LAB_PODS = 64


def variants(text: str) -> tuple[Variant, ...]:
    """`iptables:legacy,nftables`.  NetlabError (exit 2) for what is no mode."""
    words = [word for word in map(str.strip, text.split(",")) if word]
    if not words:
        message = "no mode of a service proxy is named"
        raise NetlabError(Problem("no-mode", message, hint=f"one or more of {_known()}"))
    found = tuple(map(_variant, words))
    for variant in found:
        if found.count(variant) > 1:
            message = f"{variant} is named twice: a mode is compared with others"
            raise NetlabError(Problem("mode-twice", message, hint=f"one or more of {_known()}"))
    return found


def _variant(word: str) -> Variant:
    mode, colon, backend = word.partition(":")
    if mode not in PROXY_MODES:
        raise change.no_such_mode(mode)
    if not colon:
        return Variant(mode)  # type: ignore[arg-type]
    if mode != "iptables":
        message = f'"{word}": mode {mode} has no backends'
        raise NetlabError(Problem("bad-mode", message, hint=f"one or more of {_known()}"))
    for known in _BACKENDS:
        if backend == known:
            return Variant("iptables", known)
    near = suggest(backend, list(_BACKENDS))
    hint = f'did you mean "{near}"?' if near else "iptables:nft or iptables:legacy"
    raise NetlabError(Problem("bad-mode", f'"{backend}" is no backend of iptables', hint=hint))


def _known() -> str:
    return ", ".join((*PROXY_MODES, *(f"iptables:{backend}" for backend in _BACKENDS)))


def twin(lab: Lab, variant: Variant, aim: Aim) -> Lab:
    """A lab as another one is declared, faults included, but for its name and its service proxy.

    Of a large lab it is what the way needs: all Services, and the nodes and pods of the request
    and of the faults.
    """
    mark = os.urandom(3).hex()
    ending = f"-compare-{str(variant).replace(':', '-')}-{mark}"
    changed: Changed = change.proxy(lab, variant.mode)
    part = _needed(changed.lab, aim) if len(lab.pods) > SMALL_LAB_PODS else changed.lab
    return replace(
        part,
        name=lab.name[: _LONGEST_NAME - len(ending)].rstrip("-") + ending,
        iptables_backend=variant.backend or lab.iptables_backend,
        declared=(),  # nobody changes it
        changed=(),
        twin_of=lab.name,
    )


def _needed(lab: Lab, aim: Aim) -> Lab:
    """What a request needs; the whole lab if that is not told by a Service or a place."""
    ends = [place for place in aim.places[1:] if place.kind == "pod"]
    ends += [place for place in aim.places if aim.destination in place.addresses]
    if not (aim.service or ends):
        return lab
    nodes = {place.node for place in aim.places}
    pods = {place.name for place in aim.places if place.kind == "pod"}
    for entry in faulty(lab).endpoints:
        if f"{entry.namespace}/{entry.service}" == aim.service:
            nodes |= {end.node for end in entry.endpoints}
            pods |= {end.pod for end in entry.endpoints if end.pod}
    for fault in lab.faults:
        nodes.add(fault.node)
        pods |= {fault.client, fault.server}
    pods |= {pod.key for pod in lab.pods if pod.host_network and pod.node in nodes}
    nodes |= {pod.node for pod in lab.pods if pod.key in pods}
    return for_path(lab, {node for node in nodes if node}, pods)


@contextlib.contextmanager
def up(lab: Lab) -> Iterator[lifecycle.Outcome]:
    """Have a twin up during the body; it is taken down whatever happens but `kill -9`."""
    with _held(lab.name):
        try:
            yield lifecycle.up(lab)
        finally:
            with _undisturbed():
                lifecycle.down(lab.name)


def remove_orphans() -> list[str]:
    """Take down twins whose maker was killed; their names."""
    orphans = [name for name in _recorded() if record.twin_of(name) and _is_orphan(name)]
    for name in orphans:
        lifecycle.down(name)
    return orphans


def _recorded() -> list[str]:
    """Labs of which anything exists, if it is only the record."""
    found = set(lifecycle.running())
    with contextlib.suppress(FileNotFoundError):
        found |= {entry.name for entry in os.scandir(STATE_DIR) if entry.is_dir()}
    return sorted(found)


@contextlib.contextmanager
def _held(name: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        mark.bind(_address(name))
        yield


def _is_orphan(name: str) -> bool:
    try:
        with _held(name):
            return True
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False


def _address(name: str) -> str:
    return f"\0netlab-twin:{name}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let what would interrupt the body wait for its end."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
