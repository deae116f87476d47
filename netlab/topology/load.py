"""Topology files: found, read, checked, and made into a lab.

loaded = load("two-node-vxlan")
loaded.lab, loaded.warnings
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netlab.problems import NetlabError, Place, Problem, suggest
from netlab.topology.allocate import allocate
from netlab.topology.cluster import complete, tell_assumptions
from netlab.topology.documents import documents, read
from netlab.topology.model import Lab
from netlab.topology.objects import Objects, gather
from netlab.topology.places import Complaints, Document

# Where `pip install` puts them, below the prefix that the package is installed in (pyproject.toml,
# data-files); in a checkout they stand beside the package.
_INSTALLED = "share/netlab-datapath/topologies"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A lab, and what its author should know about the file."""

    lab: Lab
    warnings: tuple[Problem, ...] = ()


def load(
    source: str | os.PathLike[str],
    name: str | None = None,
    only: Sequence[str] = (),
    nodes: Sequence[str] = (),
    own_interfaces: bool = False,
) -> Loaded:
    """The lab of a topology: a file, "-" for standard input, or the name of a shipped topology.

    `name` becomes the lab's name, whatever the file says; `only` and `nodes` choose a part of it
    (see :func:`netlab.topology.selection.select`).  With `own_interfaces` the rules of a cluster's
    lab name the interfaces of its nodes, as kube-proxy has them there: good for comparing, not for
    building.  Raises NetlabError (exit code 2) with
    every problem found, each with its place.
    """
    path = _path(source)
    found = Complaints()
    objects = _gathered([path], found)
    if not objects.frame_is_whole():
        # What follows from a Lab or Node that could not be read is not worth telling.
        found.raise_errors()
    cluster = complete(objects, _name_of(path), found, own_interfaces)
    lab = allocate(objects, _name_of(path), found)
    if cluster is not None:
        tell_assumptions(cluster, objects, lab, found)
    if name is not None:
        lab = _renamed(lab, name)
    warnings = found.warnings()
    if only or nodes:
        from netlab.topology.selection import select

        lab, more = select(lab, only, nodes)
        warnings += more
    return Loaded(lab, warnings)


def read_objects(
    sources: Sequence[str | os.PathLike[str]],
) -> tuple[list[Document], tuple[Problem, ...]]:
    """The objects of files (named as for `load`), each good in itself, and the warnings.

    Raises NetlabError (exit code 2) with every problem found, each with its place.
    """
    found = Complaints()
    objects = _gathered([_path(source) for source in sources], found)
    found.raise_errors()
    return objects.declared, found.warnings()


def _path(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    return "-" if text == "-" else str(find(text))


def _gathered(paths: Sequence[str], found: Complaints) -> Objects:
    stated = {path: documents(read(path), path, found) for path in paths}
    for path, inside in stated.items():
        if not inside and not found.has_errors():
            found.placed(Problem("empty-file", f"{path} has no object in it", Place(path)))
    readable = not found.has_errors()
    objects = gather([document for inside in stated.values() for document in inside], found)
    if not readable:
        found.raise_errors()
    return objects


def find(name: str) -> Path:
    """The file that a topology argument means.

    A word without "/" and suffix is the name of a shipped topology if there is one; everything
    else is a path.  Raises NetlabError (unknown-topology) for a word that is neither.
    """
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if "/" in name or path.suffix in (".yaml", ".yml", ".json") or os.path.lexists(path):
        return path
    near = suggest(name, list(known))
    listing = "`netlab topology ls` lists them; a file of your own has a / or a suffix"
    raise NetlabError(
        Problem(
            "unknown-topology",
            f'no topology "{name}" comes with netlab, and there is no such file',
            hint=f'did you mean "{near}"? {listing}' if near else listing,
        )
    )


def shipped() -> dict[str, Path]:
    """The topologies that come with netlab, by name."""
    for parent in Path(__file__).resolve().parents:
        checkout = parent / "topologies"
        if (parent / "pyproject.toml").is_file() and checkout.is_dir():
            return _topologies_in(checkout)
        if (parent / _INSTALLED).is_dir():
            return _topologies_in(parent / _INSTALLED)
    return {}


def _topologies_in(directory: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(directory.glob("*.yaml"), key=lambda p: p.stem)}


def _name_of(path: str) -> str:
    """A lab's name from its file's: `My Lab.yaml` is my-lab."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower())[:63].strip("-")
    return name or "lab"


def _renamed(lab: Lab, name: str) -> Lab:
    import msgspec

    if len(name) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        raise NetlabError(
            Problem(
                "bad-name",
                f'"{name}" is not a name for a lab',
                hint="at most 63 lower-case letters, digits and hyphens, first and last no hyphen",
            )
        )
    return msgspec.structs.replace(lab, name=name)
