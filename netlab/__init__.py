"""netlab: Kubernetes datapaths on a real Linux kernel, without a cluster.

    import netlab

    with netlab.Lab("two-node-vxlan") as lab:
        assert lab.trace("pod1", "svc/myblog").delivered

`Lab` is a lab of a topology, `Running` one that is up already; a `Trace` is what happened to a
packet.  docs/python.md tells more, docs/design.md is the map of everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netlab.labs import Lab as Lab
    from netlab.labs import Running as Running
    from netlab.problems import NetlabError as NetlabError
    from netlab.trace.model import Trace as Trace

__all__ = ["Lab", "NetlabError", "Running", "Trace"]

# Loaded when they are asked for: the command line imports this module, too, and starts fast.
_PUBLIC = {
    "Lab": "netlab.labs",
    "Running": "netlab.labs",
    "NetlabError": "netlab.problems",
    "Trace": "netlab.trace.model",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
