"""`netlab capture`: the words it is given, the lines it tells, packets of many devices merged."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs import dual_stack_lab, small_lab
from netlab.capture.headers import carried, packet
from netlab.capture.merging import MARGIN_NS, Merging
from netlab.capture.targets import Target, require_device, understand
from netlab.kernel import pcap_filter
from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import Frame
from netlab.kernel.pcap_filter import Filter
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.report.packet_words import words
from netlab.topology.model import Lab
from netlab.trace.dissect import load
from test_cli import NETLAB, netlab
from test_pcapng import VXLAN, tshark
from trace_labs import lab, namespace

__all__ = ["lab"]

PORT = 8472

# -- which words mean what -------------------------------------------------------------------------


def places(*text: str) -> list[str]:
    return [
        "/".join([target.place.name, *sorted(target.devices)])
        for target in understand(small_lab("capture"), text).targets
    ]


def test_targets_come_first_and_the_rest_is_the_filter() -> None:
    understood = understand(small_lab("capture"), ("p0", "node/n1:eth0", "tcp", "port", "80"))
    assert [target.place.name for target in understood.targets] == ["demo/p0", "n1"]
    assert understood.targets[1].devices == {"eth0"}
    assert (understood.filter, understood.doubt) == ("tcp port 80", None)


def test_without_a_target_it_is_all_of_the_lab() -> None:
    everything = ["n1", "n2", "_switch", "demo/p0", "demo/p1", "demo/p2", "demo/p3"]
    assert places() == everything
    assert places("icmp", "or", "arp") == everything


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (("switch:br0", "switch:n1"), ["_switch/br0/n1"]),
        (("p0:eth0", "demo/p0"), ["demo/p0"]),  # all devices, if it was named without one
        (("10.244.1.2", "10.244.2.2:eth0"), ["demo/p0", "demo/p1/eth0"]),
        (("svc/web",), ["demo/p1", "demo/p2", "demo/p3"]),
        (("n2", "node/n2"), ["n2"]),
    ],
)
def test_targets(text: tuple[str, ...], meant: list[str]) -> None:
    assert places(*text) == meant


def test_an_address_of_ipv6_is_a_target_with_and_without_a_device() -> None:
    made = dual_stack_lab(small_lab("capture"))
    address = made.pods[0].other_addresses[0]
    found = understand(made, (address, f"[{address}]:eth0")).targets
    assert [target.place.name for target in found] == ["demo/p0"]


def test_a_word_that_is_no_target_and_begins_no_filter_is_doubted() -> None:
    doubted = understand(small_lab("capture"), ("p0", "emty", "tcp"))
    assert doubted.filter == "emty tcp"
    assert doubted.doubt
    assert 'did you mean "empty"' in str(doubted.doubt)
    assert understand(small_lab("capture"), ("(tcp or udp) and not port 22",)).doubt is None
    assert understand(small_lab("capture"), ("10.9.9.9",)).filter == "10.9.9.9"


def test_a_device_that_is_not_there_is_an_error_with_a_suggestion() -> None:
    target = understand(small_lab("capture"), ("p0:eth1",)).targets[0]
    with pytest.raises(
        NetlabError, match=r'has no device "eth1"[^?]*did you mean "eth0"'
    ) as caught:
        require_device(target, ["lo", "eth0"])
    assert caught.value.exit_code is Exit.USAGE
    require_device(Target(target.place), ["lo"])


def test_a_filter_is_libpcaps_and_so_are_its_errors() -> None:
    with pytest.raises(NetlabError, match="syntax error"):
        Filter("tcp prt 80", 100)
    inet, l2 = load().inet, load().l2
    frame = bytes(l2.Ether() / inet.IP(dst="10.0.0.1") / inet.TCP(dport=80))
    assert Filter("tcp port 80", 100).matches(frame)
    assert not Filter("tcp port 81", 100).matches(frame)


def test_without_libpcap_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcap_filter, "_LIBRARIES", ("libnowhere.so.1",))
    pcap_filter._libpcap.cache_clear()
    try:
        with pytest.raises(NetlabError, match=r"apt-get install libpcap0\.8") as caught:
            Filter("tcp", 100)
    finally:
        pcap_filter._libpcap.cache_clear()
    assert caught.value.exit_code is Exit.MACHINE


# -- one order from many sources -------------------------------------------------------------------


class Queue:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def read(self) -> Frame | None:
        return self.frames.pop(0) if self.frames else None


def frame_at(t_ns: int) -> Frame:
    return Frame(b"", 0, "eth0", 0, t_ns)


# For each source: when frames are stamped, and how much later they can be read.
_arrivals = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1)), max_size=30), max_size=4
)


@given(_arrivals, st.lists(st.integers(1, 20), min_size=1))
def test_frames_are_told_in_order_and_none_is_lost(
    arrivals: list[list[tuple[int, int]]], pauses: list[int]
) -> None:
    coming = {
        Queue(): sorted((t * MARGIN_NS // 2, late * MARGIN_NS // 2) for t, late in source)
        for source in arrivals
    }
    merging = Merging(list(coming))
    told: list[int] = []
    now = 0
    for pause in [*pauses, 200]:
        now += pause * MARGIN_NS // 2
        for queue, frames in coming.items():
            while frames and sum(frames[0]) <= now:
                queue.frames.append(frame_at(frames.pop(0)[0]))
        ready = [queue for queue in coming if queue.frames]
        told += [frame.t_ns for _, frame in merging.collect(ready, now)]
    told += [frame.t_ns for _, frame in merging.finish(list(coming), now)]
    assert told == sorted(told)
    assert len(told) == sum(map(len, arrivals))


def test_who_is_behind_holds_the_others_back_and_memory_is_bounded() -> None:
    slow, fast = Queue(), Queue()
    slow.frames = [frame_at(number) for number in range(10_000)]
    merging = Merging([slow, fast])
    told: list[int] = []
    for _ in range(200):
        fast.frames += [frame_at(5_000_000) for _ in range(500)]
        ready = [queue for queue in (slow, fast) if queue.frames]
        told += [frame.t_ns for _, frame in merging.collect(ready, 10_000_000)]
        if not slow.frames:
            break
        # What is not read on waits in the kernel's buffer.
        assert len(merging._heap) <= 2 * 1024
    assert told[:10_000] == list(range(10_000))


def test_what_comes_after_the_end_is_not_told() -> None:
    queue = Queue()
    queue.frames = [frame_at(number) for number in range(5_000)]
    merging = Merging([queue])
    assert len(list(merging.finish([queue], 2_999))) == 3_000


# -- lines -----------------------------------------------------------------------------------------


@functools.cache
def frames() -> dict[str, bytes]:
    """Frames by what their lines should be."""
    layers = load()
    inet, inet6, l2, vxlan = layers.inet, layers.inet6, layers.l2, layers.vxlan
    ether = l2.Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    ip = inet.IP(src="10.0.0.1", dst="10.0.0.2")
    ip6 = inet6.IPv6(src="fd00::1", dst="fd00::2")
    options = [("MSS", 1410), ("SAckOK", b""), ("Timestamp", (7, 0)), ("NOP", None), ("WScale", 10)]
    syn = inet.TCP(sport=1234, dport=80, seq=9, flags="S", window=64860, options=options)
    data = inet.TCP(sport=80, dport=1234, seq=5, ack=10, flags="PA", window=63) / b"hello"
    carried_syn = ether / ip / syn
    shown_syn = (
        "IP 10.0.0.1.1234 > 10.0.0.2.80: Flags [S], seq 9, win 64860, "
        "options [mss 1410,sackOK,TS val 7 ecr 0,nop,wscale 10], length 0"
    )
    outer = inet.IP(src="172.21.32.11", dst="172.21.32.9") / inet.UDP(sport=999, dport=PORT)
    quoted = inet.IPerror(bytes(ip / inet.UDP(sport=53, dport=5353) / b"?"))
    asked = inet6.ICMPv6ND_NS(tgt="fd00::9")
    made = {
        shown_syn: carried_syn,
        f"IP 172.21.32.11.999 > 172.21.32.9.{PORT}: VXLAN, vni 1: {shown_syn}": (
            ether / outer / vxlan.VXLAN(vni=1, flags="Instance") / carried_syn
        ),
        "IP6 fd00::1.80 > fd00::2.1234: Flags [P.], seq 5:10, ack 10, win 63, length 5": (
            ether / ip6 / data
        ),
        "IP 10.0.0.1.53 > 10.0.0.2.5353: UDP, length 1": (
            ether / ip / inet.UDP(sport=53, dport=5353) / b"!"
        ),
        "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 3, seq 4, length 12": (
            ether / ip / inet.ICMP(id=3, seq=4) / b"ping"
        ),
        "IP 10.0.0.1 > 10.0.0.2: ICMP port unreachable "
        "for 10.0.0.1.53 > 10.0.0.2.5353, length 37": (
            ether / ip / inet.ICMP(type=3, code=3) / quoted
        ),
        "IP6 fd00::1 > fd00::2: ICMP6 neighbor solicitation, who has fd00::9, length 24": (
            ether / ip6 / asked
        ),
        "IP 10.0.0.1 > 10.0.0.2: fragment of 77 at 1480, length 4": (
            ether / inet.IP(src="10.0.0.1", dst="10.0.0.2", id=77, frag=185, proto=17) / b"rest"
        ),
        "IP6 fd00::1 > fd00::2: fragment of 0 at 1448, length 4": (
            ether / ip6 / inet6.IPv6ExtHdrFragment(offset=181, nh=17) / b"rest"
        ),
        "ARP, Request who-has 10.0.0.2 tell 10.0.0.1": (
            ether / l2.ARP(op=1, psrc="10.0.0.1", pdst="10.0.0.2")
        ),
        "ARP, Reply 10.0.0.1 is-at 02:00:00:00:00:01": (
            ether / l2.ARP(op=2, hwsrc="02:00:00:00:00:01", psrc="10.0.0.1", pdst="10.0.0.2")
        ),
        "IP 10.0.0.1 > 10.0.0.2: protocol 132, length 4": (
            ether / inet.IP(src="10.0.0.1", dst="10.0.0.2", proto=132) / b"sctp"
        ),
        "02:00:00:00:00:01 > 02:00:00:00:00:02, ethertype 0x88cc, length 2": (
            l2.Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02", type=0x88CC) / b"hi"
        ),
    }
    return {line: bytes(frame) for line, frame in made.items()}


def test_a_packet_in_a_line() -> None:
    for line, frame in frames().items():
        assert words(frame, PORT) == line


@settings(deadline=None)  # the first one imports scapy
@given(st.data())
def test_what_was_cut_off_or_is_garbage_is_told_as_far_as_it_goes(data: Any) -> None:
    frame = data.draw(st.sampled_from(list(frames().values())))
    frame = frame[: data.draw(st.integers(0, len(frame)))]
    for place, byte in data.draw(
        st.dictionaries(st.integers(12, 90), st.binary(max_size=1))
    ).items():
        frame = frame[:place] + byte + frame[place + 1 :]
    assert words(frame, PORT)
    packet(frame, PORT)
    carried(frame, PORT)


def test_headers_are_as_in_traces() -> None:
    tunnelled = next(frame for line, frame in frames().items() if "VXLAN" in line)
    found = packet(tunnelled, PORT)
    assert found
    assert found.outer
    assert str(found.outer) == "172.21.32.11 → 172.21.32.9 VNI 1"
    assert str(found.flow) == "10.0.0.1:1234 → 10.0.0.2:80"
    assert (found.protocol, found.flags, found.ttl, found.length) == ("tcp", "S", 64, 60)


# -- on the kernel ---------------------------------------------------------------------------------


class Capturing:
    """A capture that runs beside the test and sees what comes from now on."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [NETLAB, "capture", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr
        self.said = self.process.stderr.readline().decode()

    def end(self, sent: signal.Signals | None = signal.SIGINT) -> tuple[bytes, str]:
        """What stdout has, and the end of stderr, of a capture that ends as it should."""
        if sent:
            self.process.send_signal(sent)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, (self.said, err)
        return out, err.decode().strip()


@pytest.fixture
def capturing(lab: Lab) -> Iterator[Callable[..., Capturing]]:
    started: list[Capturing] = []

    def start(*arguments: str) -> Capturing:
        started.append(Capturing(*arguments, "--lab", lab.name))
        assert started[-1].said.startswith("capturing on"), started[-1].said
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def send(
    lab: Lab, payload: bytes, to: str = "10.244.2.2", count: int = 1, port: int = 8002
) -> None:
    """Datagrams from p0 to p1, which sends them back."""
    with entered(namespace(lab, "demo", "p0")), socket.socket(type=socket.SOCK_DGRAM) as sending:
        sending.settimeout(10)
        sending.connect((to, port))
        for _ in range(count):
            sending.send(payload)
            assert sending.recv(2048).startswith(payload)


@pytest.mark.kernel
def test_tshark_reads_one_capture_of_all_devices(
    lab: Lab, capturing: Callable[..., Capturing], tmp_path: Path
) -> None:
    file = tmp_path / "all.pcapng"
    capture = capturing("-w", str(file), "udp")
    assert "7 namespaces" in capture.said
    send(lab, b"x" * 1000)
    out, told = capture.end()
    assert out == b""
    names = ("frame.interface_name", "frame.packet_flags_direction", "frame.time_epoch", "ip.dst")
    read = tshark(file, *names, "udp.length", "frame.protocols", options=VXLAN)
    assert told == f"{len(read)} packets, 0 dropped by the kernel"
    there = [f"{name} {int(way, 16)}" for name, way, *_ in read]
    veth = next(name.split("/")[1] for name, *_ in read if name.startswith("n1/veth"))
    # In the order of the kernel, across five namespaces.
    way = ["demo/p0/eth0 2", f"n1/{veth} 1", "n1/cbr0 1", "n1/flannel.1 2", "n1/eth0 2"]
    assert there[: len(way)] == way
    assert there[-1] == "demo/p0/eth0 1"
    order = ["n1/eth0 2", "switch/n1 1", "switch/n2 2", "n2/eth0 1", "n2/flannel.1 1"]
    assert [each for each in there if each in order][:5] == order
    times = [t for _, _, t, *_ in read]
    assert times == sorted(times)
    tunnelled = read[4]
    assert tunnelled[3] == "172.21.32.12,10.244.2.2"
    assert tunnelled[4].endswith(",1008")
    assert tunnelled[5] == "eth:ethertype:ip:udp:vxlan:eth:ethertype:ip:udp:data"


@pytest.mark.kernel
def test_lines_of_one_device_with_a_filter(lab: Lab, capturing: Callable[..., Capturing]) -> None:
    capture = capturing("p0:eth0", "udp", "dst", "port", "8002")
    assert capture.said == "capturing on pod demo/p0: udp dst port 8002\n"
    send(lab, b"hello", count=3)
    out, told = capture.end()
    lines = out.decode().splitlines()
    assert len(lines) == 3
    _, name, direction, line = lines[0].split(maxsplit=3)
    assert (name, direction) == ("demo/p0/eth0", "out")
    assert line.startswith("IP 10.244.1.2.")
    assert line.endswith(" > 10.244.2.2.8002: UDP, length 5")
    assert told == "3 packets, 0 dropped by the kernel"


@pytest.mark.kernel
def test_json_is_one_object_a_packet(lab: Lab, capturing: Callable[..., Capturing]) -> None:
    capture = capturing("-o", "json", "node/n1", "udp port 8472")
    send(lab, b"hello")
    out, _ = capture.end(signal.SIGTERM)
    found = [json.loads(line) for line in out.splitlines()]
    assert [(each["device"], each["direction"]) for each in found] == [
        ("eth0", "out"),
        ("eth0", "in"),
    ]
    first = found[0]
    assert (first["node"], first["namespace"]) == ("n1", namespace(lab, "n1"))
    assert first["packet"]["dst"] == "10.244.2.2"
    assert first["packet"]["outer"]["dst"] == "172.21.32.12"
    assert first["length"] == 14 + first["packet"]["outer"]["length"]
    assert "VXLAN, vni 1: IP 10.244.1.2" in first["summary"]


@pytest.mark.kernel
def test_inside_holds_the_filter_to_what_the_tunnel_carries(
    lab: Lab, capturing: Callable[..., Capturing]
) -> None:
    capture = capturing("--inside", "n1:eth0", "udp dst port 8002")
    send(lab, b"hello")
    out, told = capture.end()
    assert told == "1 packet, 0 dropped by the kernel"
    assert b"> 10.244.2.2.8002: UDP, length 5" in out


@pytest.mark.kernel
def test_it_ends_by_itself_after_a_count_or_a_time(
    lab: Lab, capturing: Callable[..., Capturing]
) -> None:
    capture = capturing("p0", "udp", "--count", "2")
    send(lab, b"hello", count=5)
    out, told = capture.end(None)
    assert len(out.splitlines()) == 2
    assert told.startswith("2 packets")
    done = netlab("capture", "p0", "udp", "--duration", "0.05", "--lab", lab.name)
    assert done.returncode == 0
    assert done.stderr.endswith("0 packets, 0 dropped by the kernel\n")


@pytest.mark.kernel
def test_a_snap_length_cuts_what_is_kept_and_not_what_is_told(
    lab: Lab, capturing: Callable[..., Capturing], tmp_path: Path
) -> None:
    file = tmp_path / "short.pcapng"
    capture = capturing("p0", "udp", "-s", "60", "-w", str(file))
    send(lab, b"x" * 500)
    capture.end()
    assert tshark(file, "frame.cap_len", "frame.len") == [["60", "542"]] * 2


@pytest.mark.kernel
def test_a_pipe_has_each_packet_at_once_and_may_be_closed(
    lab: Lab, capturing: Callable[..., Capturing]
) -> None:
    capture = capturing("-w", "-", "p0", "udp")
    reading = subprocess.Popen(
        ["tshark", "-l", "-r", "-", "-c", "2", "-T", "fields", "-e", "frame.interface_name"],
        stdin=capture.process.stdout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert capture.process.stdout
    capture.process.stdout.close()
    send(lab, b"hello")
    out, _ = reading.communicate(timeout=30)
    assert out == b"demo/p0/eth0\n" * 2
    # The reader is gone: so are we, without a word.
    assert capture.process.wait(timeout=30) == 128 + signal.SIGPIPE
    assert capture.process.stderr
    assert capture.process.stderr.read() == b""


@pytest.mark.kernel
def test_nothing_is_left_after_kill_9(lab: Lab, capturing: Callable[..., Capturing]) -> None:
    capture = capturing()
    assert sockets(lab) == 7
    capture.process.kill()
    capture.process.wait()
    assert sockets(lab) == 0


def sockets(lab: Lab) -> int:
    """Packet sockets in the namespaces of the lab."""
    found = 0
    for name in sorted(os.listdir("/run/netns")):
        if name.startswith(f"{lab.name}:"):
            with entered(name), open("/proc/thread-self/net/packet") as packets:
                found += len(packets.readlines()) - 1
    return found


@pytest.mark.kernel
def test_it_ends_with_the_lab(capturing: Callable[..., Capturing], lab: Lab) -> None:
    capture = capturing("p0", "udp")
    lifecycle.down(lab.name)
    _, told = capture.end(None)
    assert told.startswith(f"{lab.name} is down: nothing more will come")


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["p9"], 2, 'error[unknown-name]: "p9" is not in lab'),
        (["node/n9", "tcp"], 2, 'error[unknown-node]: node "n9"'),
        (["p0:eth7"], 2, 'error[unknown-device]: pod demo/p0 has no device "eth7"'),
        (["p0", "tcp prt 80"], 2, "can't parse filter expression: syntax error"),
        (["-o", "json", "-w", "-"], 2, "both write to stdout"),
        (["--inside", "p0"], 2, "--inside holds a FILTER"),
        (["-w", "/nowhere/x.pcapng"], 2, '"/nowhere/x.pcapng" cannot be written'),
    ],
)
def test_what_cannot_be_meant(lab: Lab, arguments: list[str], code: int, said: str) -> None:
    done = netlab("capture", *arguments, "--lab", lab.name)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


@pytest.mark.kernel
def test_a_missing_namespace_is_named(lab: Lab) -> None:
    from netlab.kernel import namespaces

    namespaces.remove(namespace(lab, "demo", "p0"))
    done = netlab("capture", "p0", "--lab", lab.name)
    assert done.returncode == 3
    assert "error[namespace-missing]: pod demo/p0" in done.stderr
