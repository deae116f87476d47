"""Labs for programs: tests, notebooks, scripts.  docs/python.md shows how."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

from netlab.doctor import preflight
from netlab.lab import change, lifecycle
from netlab.lab.named import declared_lab, running_lab
from netlab.topology import model
from netlab.topology.load import load
from netlab.trace import run, series
from netlab.trace.aim import Request, aim
from netlab.trace.model import Trace
from netlab.trace.tally import Series, Tally


class Running:
    """A lab that is up, by its name; the name may be left out if no other one is up.

    All methods raise :class:`netlab.NetlabError`, whose text says what to do.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = running_lab(name).name

    def down(self) -> None:
        """Remove it and everything in it."""
        lifecycle.down(self.name)

    @property
    def declared(self) -> model.Lab:
        """What is declared for it now: nodes, pods, Services, endpoints."""
        return running_lab(self.name)

    def trace(
        self, source: str, destination: str, *, endpoint: str | None = None, **options: Any
    ) -> Trace:
        """Send one probe and tell what happened to it, there and back.

        `source` and `destination` are those of `netlab trace`, and so is `endpoint`; `options` are
        further fields of :class:`netlab.trace.aim.Request`, such as `protocol="udp"`, `port=8002`.
        """
        request = Request(source, destination, **options)
        if endpoint is not None:
            return series.trace_to_endpoint(
                self.declared, request, endpoint, declared_lab(self.name)
            )
        return run.trace(self.declared, request, declared=declared_lab(self.name))

    def traces(self, source: str, destination: str, count: int, **options: Any) -> Iterator[Trace]:
        """The traces of `count` probes from new source ports, one after the other."""
        yield from series.traces(self.declared, Request(source, destination, **options), count)

    def series(self, source: str, destination: str, count: int, **options: Any) -> Series:
        """What became of `count` probes: who received how many, and what was lost."""
        declared, request = self.declared, Request(source, destination, **options)
        tally = Tally(declared, aim(declared, request), count)
        with closing(series.traces(declared, request, count)) as found:
            for each in found:
                tally.add(each)
        return tally.series()


class Lab(Running):
    """A lab of a topology: a file, or the name of one that comes with netlab.

    `name` is another name for it, `proxy` another mode of the service proxy; `only` and `nodes`
    choose a part of the topology, as the options of `netlab up` do.  Nothing is built before
    :meth:`up`.  As a context manager it is up in the body, and taken down at its end unless it was
    up before.
    """

    def __init__(
        self,
        topology: str | os.PathLike[str],
        name: str | None = None,
        *,
        proxy: str | None = None,
        only: Sequence[str] = (),
        nodes: Sequence[str] = (),
    ) -> None:
        lab = load(topology, name=name, only=only, nodes=nodes).lab
        self._topology = change.proxy(lab, proxy).lab if proxy else lab
        self.name = lab.name
        self._made = False

    def up(self) -> Lab:
        """Build it, or change what differs from its topology."""
        preflight(self._topology)
        self._made |= lifecycle.up(self._topology).created
        return self

    def __enter__(self) -> Lab:
        return self.up()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._made:
            self._made = False
            self.down()
