"""Packets for Wireshark: the bytes of the format, and what tshark reads of a trace."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.report.pcapng import Interface, Writer, packet
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.run import trace
from test_cli import netlab
from trace_labs import lab

__all__ = ["lab"]

# Wireshark knows the port of the standard, and flannel's is the one of Linux from before it.
VXLAN = ("-d", "udp.port==8472,vxlan")

GOLDEN = """
0a0d0d0a 38000000 4d3c2b1a 01000000 ffffffffffffffff
    0100 0500 68656c6c6f000000  0400 0600 6e65746c61620000  00000000 38000000
01000000 44000000 0100 0000 00010000
    0200 0500 6e312f6c6f000000  0300 0700 6c6f206f66206e00  0900 0100 09000000
    0b00 0500 0069636d70000000  00000000 44000000
06000000 44000000 00000000 ec552615 2acb0df5 05000000 3c000000 68656c6c6f000000
    0100 0300 6f6e6500  0100 0300 74776f00  0200 0400 02000000  00000000 44000000
06000000 2c000000 00000000 ec552615 2bcb0df5 00000000 00000000
    0200 0400 01000000  00000000 2c000000
"""


def test_the_bytes() -> None:
    stream = io.BytesIO()
    writer = Writer(stream, snaplen=256, comment="hello", filter_="icmp")
    device = Interface(name="n1/lo", description="lo of n")
    t_ns = 1_524_000_000_123_456_298
    writer.write(device, t_ns, b"hello", 60, "out", ["one", "two"])
    writer.write(device, t_ns + 1, b"", 0, "in")
    assert stream.getvalue().hex() == "".join(GOLDEN.split())


@given(st.binary(max_size=70), st.lists(st.text(max_size=9)), st.integers(0, 2**64 - 1))
def test_blocks_are_whole_words_and_tell_their_length_at_both_ends(
    data: bytes, comments: list[str], t_ns: int
) -> None:
    block = packet(3, t_ns, data, 1500, "in", comments)
    assert len(block) % 4 == 0
    assert block[4:8] == block[-4:] == len(block).to_bytes(4, "little")


def test_a_comment_that_is_too_long_is_cut_between_characters() -> None:
    block = packet(0, 0, b"", 0, "in", ["→" * 30_000])
    length = int.from_bytes(block[30:32], "little")
    text = block[32 : 32 + length].decode()
    assert set(text) == {"→"}
    assert 21_000 < len(text) < 22_000


def tshark(file: Path, *fields: str, options: tuple[str, ...] = ()) -> list[list[str]]:
    """What tshark reads of each packet."""
    named = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", str(file), *options, "-T", "fields", "-E", "separator=|", *named],
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.mark.kernel
def test_tshark_reads_the_way_of_a_trace_with_what_was_done(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "trace.pcapng"
    done = netlab("trace", "p0", "svc/remote", "--lab", lab.name, "--pcapng", str(file))
    assert done.returncode == 0, done.stderr
    assert "✓ delivered" in done.stdout
    fields = ("frame.interface_name", "frame.packet_flags_direction", "frame.comment")
    read = tshark(file, *fields, "frame.time_epoch", "ip.dst", "frame.protocols", options=VXLAN)
    devices = [f"{name} {int(way, 16)}" for name, way, *_ in read]
    n1, n2 = (
        next(d for d in devices if d.startswith(f"{n}/veth")).split()[0] for n in ("n1", "n2")
    )
    there = ["demo/p0/eth0 2", f"{n1} 1", "n1/cbr0 1", "n1/flannel.1 2", "n1/eth0 2"]
    assert devices[:5] == there
    assert devices[-2:] == [f"{n1} 2", "demo/p0/eth0 1"]
    assert {f"{n2} 2", "demo/p1/eth0 1", "n2/flannel.1 1"} <= set(devices)
    assert any(name.startswith("switch/") for name in devices)
    times = [time for *_, time, _, _ in read]
    assert times == sorted(times)
    assert all(len(time.partition(".")[2]) == 9 for time in times)
    comments = [comment for _, _, comment, *_ in read]
    assert "route: 10.99.0.1 matches 0.0.0.0/0 via 10.244.1.1 dev eth0" in comments[0]
    assert comments[1].startswith(f"there 2 {n1.partition('/')[2]} in: nat PREROUTING → ")
    assert "DNAT 10.99.0.1:80 → 10.244.2.2:8002" in comments[1]
    assert "encapsulates: VNI 1" in comments[3]
    assert comments[-1].endswith("✓ delivered to pod demo/p0")
    # Inside the tunnel Wireshark shows both addresses.
    assert (read[4][4], read[4][5]) == (
        "172.21.32.12,10.244.2.2",
        "eth:ethertype:ip:udp:vxlan:eth:ethertype:ip:tcp",
    )


@pytest.mark.kernel
def test_tshark_reads_where_a_probe_was_refused_and_why(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "trace.pcapng"
    done = netlab("trace", "p0", "svc/empty", "--lab", lab.name, "--pcapng", str(file))
    assert done.returncode == 1, done.stderr
    comments = [comment for (comment,) in tshark(file, "frame.comment")]
    assert any("stopped: no-endpoints; svc/demo/empty has no ready endpoint" in c for c in comments)
    assert any("; fix: " in comment for comment in comments)


@pytest.mark.kernel
def test_frames_of_a_trace_are_whole(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "trace.pcapng"
    arguments = ("--protocol", "udp", "--size", "1400", "--lab", lab.name, "--pcapng", str(file))
    done = netlab("trace", "p0", "p1:8002", *arguments)
    assert done.returncode == 0, done.stdout
    lengths = tshark(file, "frame.cap_len", "frame.len")
    assert all(kept == whole for kept, whole in lengths)
    assert lengths[0] == ["1414", "1414"]


@pytest.mark.kernel
def test_a_trace_to_a_pipe_is_nothing_but_packets(lab: Lab, tmp_path: Path) -> None:
    from test_cli import NETLAB

    piped = subprocess.run(
        [NETLAB, "trace", "p0", "svc/local", "--lab", lab.name, "--pcapng", "-"],
        check=True,
        capture_output=True,
    )
    file = tmp_path / "piped.pcapng"
    file.write_bytes(piped.stdout)
    assert tshark(file, "frame.interface_name")[0] == ["demo/p0/eth0"]
    assert "delivered: demo/p0 → svc/local" in piped.stderr.decode()
    both = netlab("trace", "p0", "p1", "--lab", lab.name, "--pcapng", "-", "-o", "json")
    assert both.returncode == 2
    assert "both write to stdout" in both.stderr


@pytest.mark.kernel
def test_a_file_that_cannot_be_written_is_an_error(lab: Lab) -> None:
    done = netlab("trace", "p0", "p1", "--lab", lab.name, "--pcapng", "/nowhere/trace.pcapng")
    assert done.returncode == 2
    assert 'error[pcapng-file]: "/nowhere/trace.pcapng" cannot be written' in done.stderr


@pytest.mark.kernel
def test_without_recording_a_trace_is_as_before(lab: Lab) -> None:
    assert trace(lab, Request("p0", "p1")).disposition == "delivered"
