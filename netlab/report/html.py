"""A trace as HTML that stands by itself: what the terminal shows, in its colours."""

from __future__ import annotations

import io

from netlab.report.terminal import print_trace
from netlab.trace.model import Trace

WIDTH = 110
# No foreground or background of its own: those of the page hold.
_FORMAT = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:1.25;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace\"><code>{code}</code></pre>"
)


def trace_html(trace: Trace) -> str:
    """The tree of a trace; its styles are inline, and it asks for nothing."""
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=WIDTH, highlight=False)
    print_trace(trace, console)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
