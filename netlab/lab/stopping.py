"""`netlab stop node/NAME` and `start node/NAME`: the machine that a node is goes off and on again.

Pure.  Endpoints on a node that is stopped are not ready, as the node
lifecycle controller makes them in a cluster; those of pods with probes are not until these pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from netlab.lab.edits import Changed, Edits, Result
from netlab.topology.earlier import Key
from netlab.topology.model import Lab


def stop(running: Lab, references: Sequence[str]) -> Changed:
    """Nodes go off."""
    edits = Edits(running)
    for key in _nodes(edits, references):
        done = "unchanged" if key[2] in edits.stopped else "stopped"
        edits.stopped |= {key[2]}
        edits.results.append(Result(*key, done))
    return edits.decided()


def start(running: Lab, references: Sequence[str]) -> Changed:
    """Nodes go on again; the probes of their pods have to pass anew."""
    edits = Edits(running)
    started = set()
    for key in _nodes(edits, references):
        if key[2] in edits.stopped:
            started.add(key[2])
        edits.results.append(Result(*key, "started" if key[2] in started else "unchanged"))
    edits.stopped -= started
    if started:
        beginning = {pod.key for pod in running.pods if pod.node in started and pod.is_probed}
        edits.passed = frozenset(
            {pod.key for pod in running.pods} - beginning - set(running.unready)
        )
    return edits.decided()


def _nodes(edits: Edits, references: Sequence[str]) -> list[Key]:
    found = edits.find(references, None, usual="Node")
    for kind, _, name in found:
        if kind != "Node":
            message = f"{kind} {name} is no node: it cannot be stopped or started"
            edits.found.error("not-a-node", message, hint="`netlab get nodes` lists them")
    return found
