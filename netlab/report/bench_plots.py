"""Plots of benchmark reports as SVG, drawn by matplotlib; every text in them stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from netlab.bench.model import Figure, Fit

# Narrow enough to be read on a phone; inches.
_WIDTH, _HEIGHT = 4.6, 3.6
# One colour and one sign for each mode, in every plot; distinguishable also without colour
# (Okabe and Ito, Color Universal Design, 2008).
_STYLES = {
    "none": ("#666666", "s"),
    "iptables:legacy": ("#D55E00", "o"),
    "iptables:nft": ("#E69F00", "^"),
    "iptables": ("#E69F00", "^"),
    "nftables": ("#0072B2", "D"),
    "nftables-flat": ("#009E73", "v"),
    "ipvs": ("#CC79A7", "P"),
    "userspace": ("#56B4E9", "X"),
}
_OTHER = ("#000000", "*")
_FAR = 4  # times apart; what is nearer is told from zero on
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "netlab",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def over_services(name: str, curves: Mapping[str, Sequence[Figure]], unit: str) -> str:
    """Curves over the number of Services on logarithmic axes, with their intervals as bands."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes()
        for mode, figures in curves.items():
            colour, sign = _STYLES.get(mode, _OTHER)
            sizes = [each.services for each in figures]
            if sizes == [0]:  # the same for any number
                (each,) = figures
                axes.axhspan(each.low, each.high, color=colour, alpha=0.2, linewidth=0)
                line = axes.axhline(each.value, color=colour, label=mode, linewidth=1.4)
                line.set_gid(f"curve-{_word(name)}-{_word(mode)}")
                continue
            axes.fill_between(
                sizes,
                [each.low for each in figures],
                [each.high for each in figures],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
            values = [each.value for each in figures]
            (line,) = axes.plot(
                sizes, values, sign + "-", color=colour, label=mode, markersize=4, linewidth=1.4
            )
            line.set_gid(f"curve-{_word(name)}-{_word(mode)}")
        axes.set_xscale("log")
        values = [each.value for figures in curves.values() for each in figures]
        if min(values) > 0 and max(values) / min(values) > _FAR:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("Services")
        axes.set_ylabel(unit)
        _plain_ticks(axes)
        axes.legend(loc="best")
        return _svg(figure, name)


def by_position(name: str, fits: Sequence[Fit]) -> str:
    """Medians over the position in the list, and the line through them; linear axes."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes()
        for fit in fits:
            colour, sign = _STYLES.get(fit.mode, _OTHER)
            xs, ys = [x for x, _ in fit.points], [y for _, y in fit.points]
            (line,) = axes.plot(xs, ys, sign, color=colour, label=fit.mode, markersize=4)
            line.set_gid(f"curve-{_word(name)}-{_word(fit.mode)}")
            ends = (0.0, fit.last)
            drawn = [fit.intercept_us + fit.slope_ns * x / 1000 for x in ends]
            axes.plot(ends, drawn, color=colour, linewidth=1)
        axes.set_xlabel("position in the list")
        axes.set_ylabel("µs")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
        return _svg(figure, name)


def bars(name: str, figures: Mapping[str, Figure], unit: str) -> str:
    """A bar for each thing, with its interval; from zero."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes()
        for place, (label, each) in enumerate(figures.items()):
            (bar,) = axes.barh(
                label,
                each.value,
                xerr=[[each.value - each.low], [each.high - each.value]],
                color=_STYLES.get(each.mode, _STYLES["nftables"])[0],
                height=0.6,
            )
            bar.set_gid(f"curve-{_word(name)}-{place}")
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        return _svg(figure, name)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    return figure, figure.add_subplot()


def _plain_ticks(axes: Any) -> None:
    """1,000 and not 10^3."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.7g}"))
            axis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    # Hardly a power of ten in it: what lies between is named too.
    if axes.get_yscale() == "log" and high / low < 20:
        axes.yaxis.set_minor_formatter(FuncFormatter(_some_minor))


def _some_minor(value: float, place: int) -> str:
    digit = f"{value:e}"[0]
    return f"{value:,.7g}" if digit in "235" else ""


def _svg(figure: Any, name: str) -> str:
    """The drawing as an element of HTML: as wide as there is room, named for who cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Identifiers are of one page, and several drawings have the same ones.
    prefix = _word(name)
    drawn = re.sub(r'\bid="(?!curve-)', f'id="{prefix}-', drawn)
    drawn = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", drawn)
    head = re.match(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', drawn)
    assert head
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{head[1]}" role="img" aria-label="{name}">' + drawn[head.end() :]
    )


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
