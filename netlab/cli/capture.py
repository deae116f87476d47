"""`netlab capture`: packets on many devices at once, in time order."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from netlab.cli.common import (
    complete_reference,
    lab_option,
    namespace_option,
    output_option,
    running_lab,
)
from netlab.problems import Exit, NetlabError

if TYPE_CHECKING:
    from types import FrameType

    from netlab.capture.capture import Capture, Seen
    from netlab.capture.targets import Words
    from netlab.topology.model import Lab

_WIDEST_NAME = 40


@click.command()
@click.argument(
    "words", metavar="[TARGET]... [FILTER]", nargs=-1, shell_complete=complete_reference
)
@click.option(
    "-w",
    "--write",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write pcapng for Wireshark instead of lines; - is stdout.",
)
@click.option(
    "-c", "--count", type=click.IntRange(min=1), metavar="N", help="End after that many packets."
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=0.01),
    metavar="SECONDS",
    help="End after that time.",
)
@click.option(
    "-s",
    "--snaplen",
    type=click.IntRange(14, 65549),
    metavar="BYTES",
    default=65549,
    help="Keep that much of each packet.  [default: all]",
)
@click.option("--inside", is_flag=True, help="Hold FILTER to what VXLAN carries as well.")
@namespace_option
@lab_option
@output_option("json")
def capture(
    words: tuple[str, ...],
    path: str | None,
    count: int | None,
    duration_s: float | None,
    snaplen: int,
    inside: bool,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Show packets on many devices at once, in time order, until Ctrl-C.

    TARGET is a pod, node/NAME, switch, or svc/NAME for the pods behind it, and with :DEVICE one of
    its devices; without a target it is all of the lab.  FILTER is in tcpdump's language.

    \b
      netlab capture pod1 node/k8s-slave1:eth0 tcp port 80
      netlab capture svc/myblog -w - | wireshark -k -i -
      netlab capture --inside 'tcp port 8002' -c 10
    """
    if path == "-" and output:
        raise click.UsageError(f"-o {output} and -w - both write to stdout")
    lab = running_lab(lab_name)
    from netlab.capture.capture import Capture
    from netlab.capture.targets import understand

    understood = understand(lab, words, namespace)
    if inside and not understood.filter:
        raise click.UsageError("--inside holds a FILTER to what VXLAN carries, and there is none")
    program, wanted = _filters(lab, understood, snaplen, inside)
    with contextlib.ExitStack() as opened:
        capturing = opened.enter_context(Capture(understood.targets, program))
        tellers: list[tuple[Callable[[Seen], None], Callable[[], None]]] = []
        if path is not None:
            tellers.append(opened.enter_context(_pcapng(path, snaplen, understood.filter)))
        if path is None or output:
            tellers.append(_lines(lab, capturing, output))
        opened.enter_context(_stopped_by_signals(capturing))
        _announce(lab, understood)
        to_stdout = path in (None, "-") or output
        told = 0
        for batch in capturing.batches(duration_s, sys.stdout.fileno() if to_stdout else None):
            chosen = [seen for seen in batch if wanted is None or wanted(seen)]
            chosen = chosen[: None if count is None else count - told]
            for tell, flush in tellers:
                for seen in chosen:
                    tell(seen)
                flush()
            told += len(chosen)
            if told == count:
                break
        if capturing.is_down:
            click.echo(f"{lab.name} is down: nothing more will come", err=True)
        lost = capturing.lost
        packets = "packet" if told == 1 else "packets"
        click.echo(f"{told} {packets}, {lost} dropped by the kernel", err=True)
    return int(Exit.YES)


def _announce(lab: Lab, understood: Words) -> None:
    places = [str(target.place) for target in understood.targets]
    where = ", ".join(places) if len(places) <= 4 else f"{len(places)} namespaces of {lab.name}"
    what = f": {understood.filter}" if understood.filter else ""
    click.echo(f"capturing on {where}{what}", err=True)


def _filters(
    lab: Lab, understood: Words, snaplen: int, inside: bool
) -> tuple[bytes, Callable[[Seen], bool] | None]:
    """The sockets' program, and what still is to be asked of each packet that passes it."""
    from netlab.kernel.packet_sockets import WHOLE, keep_all
    from netlab.kernel.pcap_filter import Filter

    if not understood.filter:
        return keep_all(snaplen), None
    try:
        plain = Filter(understood.filter, snaplen)
    except NetlabError:
        if understood.doubt:
            raise understood.doubt from None
        raise
    if not inside:
        return plain.program, None
    from netlab.capture.headers import carried

    port = lab.overlay.port
    exact = Filter(understood.filter, WHOLE)

    def wanted(seen: Seen) -> bool:
        data = seen.frame.data
        frame = carried(data, port)
        return exact.matches(data) or (frame is not None and exact.matches(frame))

    return Filter(f"({understood.filter}) or udp dst port {port}", snaplen).program, wanted


def _lines(
    lab: Lab, capturing: Capture, output: str | None
) -> tuple[Callable[[Seen], None], Callable[[], None]]:
    """Lines on stdout: one a packet."""
    from netlab.capture.headers import packet
    from netlab.report.packet_words import words
    from netlab.report.pcapng import interface_of

    port = lab.overlay.port
    names = [len(interface_of(place, device).name) for place, device in capturing.devices]
    width = min(_WIDEST_NAME, max(names, default=0))

    def line(seen: Seen) -> None:
        frame = seen.frame
        name = interface_of(seen.place, frame.device).name
        said = words(frame.data, port)
        sys.stdout.write(f"{_clock(frame.t_ns)}  {name:<{width}}  {frame.direction:<3}  {said}\n")

    def json(seen: Seen) -> None:
        import msgspec

        frame = seen.frame
        told = {
            "t_ns": frame.t_ns,
            "node": seen.place.node,
            "namespace": seen.place.namespace,
            "device": frame.device,
            "direction": frame.direction,
            "length": frame.length,
            "packet": packet(frame.data, port),
            "summary": words(frame.data, port),
        }
        sys.stdout.write(msgspec.json.encode(told).decode() + "\n")

    return json if output == "json" else line, sys.stdout.flush


def _clock(t_ns: int) -> str:
    seconds, rest = divmod(t_ns, 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"


@contextlib.contextmanager
def _pcapng(
    path: str, snaplen: int, filter_: str
) -> Iterator[tuple[Callable[[Seen], None], Callable[[], None]]]:
    """Packets for Wireshark; all that were told are in the file whatever ends the capture."""
    from netlab.cli.pcapng import pcapng_stream
    from netlab.report.pcapng import Writer, interface_of

    with pcapng_stream(path) as stream:
        writer = Writer(stream, snaplen, filter_=filter_)
        writer.flush()

        def write(seen: Seen) -> None:
            frame = seen.frame
            device = interface_of(seen.place, frame.device)
            writer.write(device, frame.t_ns, frame.data, frame.length, frame.direction)

        yield write, writer.flush


@contextlib.contextmanager
def _stopped_by_signals(capturing: Capture) -> Iterator[None]:
    """Ctrl-C is the usual end of a capture; a second one interrupts whatever it still does."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        capturing.stop()

    handled: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in handled]
    try:
        yield
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
