"""What is made of the samples of a benchmark: figures, verdicts, reports, comparisons."""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from scapy.layers.inet import IP

from bench_reports import lookup_report, report, rounds
from netlab.bench import clusters, lookup, options, sync
from netlab.bench.compare import Run, compare, read, regressions
from netlab.bench.conclusions import conclude
from netlab.bench.model import Report, encode
from netlab.bench.packets import syn
from netlab.bench.run import Progress, Recorder, run
from netlab.bench.schema import decode, schema, write
from netlab.bench.statistics import crossing, differs, figure, fit, interval, noise
from netlab.cli.main import netlab
from netlab.compare.model import Variant
from netlab.datapath.services import iptables
from netlab.problems import Exit, NetlabError
from netlab.report.bench_tables import as_csv, as_markdown, as_terminal
from netlab.vm import machine

samples = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)


@settings(deadline=None)
@given(samples)
def test_the_interval_of_a_median_holds_it_and_is_of_the_rounds(medians: list[float]) -> None:
    low, high = interval(medians)
    assert min(medians) <= low <= statistics.median(medians) <= high <= max(medians)


@pytest.mark.parametrize(
    ("count", "left_out"),
    [(1, 0), (3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5)],
)
def test_so_many_rounds_may_lie_outside_of_the_interval(count: int, left_out: int) -> None:
    """The table of order statistics for the median at 95 %, David and Nagaraja 7.1."""
    assert interval([float(number) for number in range(count)]) == (left_out, count - 1 - left_out)


@settings(deadline=None)
@given(st.lists(samples, min_size=2, max_size=12))
def test_figures_hold_all_samples(taken: list[list[float]]) -> None:
    found = figure("what", "mode", 1, taken)
    flat = [sample for each in taken for sample in each]
    assert found.count == len(flat)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(statistics.median(flat), rel=1e-4)
    if found.quantiles:
        q = found.quantiles
        assert q.min <= q.p01 <= q.p90 <= q.p99 <= q.max
        assert q.max == pytest.approx(max(flat), rel=1e-4), "outliers are kept"


def test_noise_is_what_odd_rounds_differ_from_even_ones_by() -> None:
    assert noise([[10.0], [10.0], [10.0], [10.0]]) == 0
    assert noise([[10.0], [11.0], [10.0], [11.0]]) == pytest.approx(0.1)
    assert noise([[10.0]]) is None


@settings(deadline=None)
@given(st.floats(0.1, 100), st.floats(0, 100))
def test_a_line_is_found_again(slope_ns: float, intercept: float) -> None:
    xs = (100, 1000, 5000, 30_000)
    found = fit("what", "mode", "Services", [(x, intercept + slope_ns * x / 1000) for x in xs])
    assert found
    assert found.slope_ns == pytest.approx(slope_ns, rel=1e-3)
    assert found.r2 == pytest.approx(1, abs=1e-3)
    assert fit("what", "mode", "Services", [(1, 1.0), (2, 2.0)]) is None, "two points are no line"


def test_curves_cross_where_their_lines_do() -> None:
    def curve(mode: str, values: dict[int, float]) -> list:  # type: ignore[type-arg]
        return [figure("w", mode, size, rounds(value)) for size, value in values.items()]

    steep = curve("a", {100: 5, 1000: 10, 10_000: 100})
    flat = curve("b", {100: 8, 1000: 8, 10_000: 8})
    found = crossing(steep, flat)
    assert found
    assert 100 < found[0] < 1000
    assert crossing(flat, steep) is None
    assert crossing(flat, curve("c", {100: 8.01, 1000: 7.99})) is None, "noise explains it"


def test_a_difference_that_noise_explains_is_none() -> None:
    one, same, other = (figure("w", "m", 1, rounds(value)) for value in (10, 10.05, 12))
    assert not differs(one, same)
    assert differs(one, other)
    assert not differs(one, other, least=0.5)


@pytest.mark.parametrize(
    ("text", "exit_code", "words"),
    [
        ("x", Exit.USAGE, '"x" is no number of Services'),
        ("1000,-5", Exit.USAGE, '"-5" is no number'),
        ("1e3", Exit.USAGE, '"1e3"'),
        ("", Exit.USAGE, "nothing is no number"),
        ("0,100", Exit.USAGE, "0 Services"),
        ("1000000", Exit.MACHINE, "GiB of memory"),
        ("100000000", Exit.USAGE, "has addresses for 1,048,574"),
    ],
)
def test_sizes_that_cannot_be_meant(text: str, exit_code: Exit, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        options.sizes(text, 3, force=False)
    assert caught.value.exit_code == exit_code
    assert words in str(caught.value)


def test_sizes_and_modes() -> None:
    assert options.sizes("1000, 10,1000", 1, force=False) == (10, 1000)
    assert options.sizes("1000000", 1, force=True) == (1_000_000,)
    found = options.modes("iptables:legacy,nftables,ipvs,userspace,nftables")
    assert [str(mode) for mode in found] == ["iptables:legacy", "nftables", "ipvs", "userspace"]
    for wrong in ("", "none", "ipchains", "iptables:old"):
        with pytest.raises(NetlabError):
            options.modes(wrong)


def test_services_have_addresses_and_endpoints_of_their_own() -> None:
    many = range(0, 70_000, 7)
    assert len({clusters.cluster_ip(number) for number in many}) == len(many)
    ports = [port for number in range(20_000) for port in clusters.endpoint_ports(number, 3)]
    assert len(set(ports[:60_000])) == 60_000
    assert all(1024 <= port <= 65535 for port in ports)


def test_the_list_of_mode_iptables_is_read_in_its_order() -> None:
    made = clusters.lab("bench", Variant("iptables"), 30, 2)
    found = lookup.listed(iptables.render(made, made.nodes[0]))
    assert sorted(found) == sorted(clusters.cluster_ip(number) for number in range(30))


@settings(deadline=None)
@given(st.integers(1025, 65535), st.integers(1, 65535))
def test_checksums_of_syns_are_right(source: int, port: int) -> None:
    packet = IP(syn("10.128.0.2", source, "10.96.0.7", port))
    ends = packet["TCP"].sport, packet["TCP"].dport, packet["TCP"].flags
    assert ends == (source, port, "S")
    said = packet["TCP"].chksum
    del packet["TCP"].chksum
    assert IP(bytes(packet))["TCP"].chksum == said


def test_reports_are_valid_and_read_back() -> None:
    made = lookup_report()
    text = encode(made)
    jsonschema.validate(json.loads(text), schema())
    assert decode(text, "x") == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "says no schema"),
        ('{"schema": "netlab.bench/v0"}', 'is of schema "netlab.bench/v0"; this version reads'),
        ('{"schema": "netlab.bench/v1"}', "is no report"),
    ],
)
def test_what_is_no_report_is_refused(text: str, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        decode(text.encode(), "old.json")
    assert words in str(caught.value)
    assert "old.json" in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE


def test_a_report_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.write_text("old")
    with pytest.raises(NetlabError):
        write("/dev/full", "new")  # no space left on device
    write(str(file), "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"


def test_claims_are_held_against_the_figures() -> None:
    verdicts = {claim.text: claim.verdict for claim in lookup_report().claims}
    assert verdicts == {
        "iptables matches linearly, so it slows down as Services grow": "reproduced",
        "ipvs uses hashes, so it is ahead where there are many": "cannot be measured here",
        "iptables: p50 at 30,000 Services is 5.8 times that at 5,000": "reproduced",
        "nftables: p50 is the same at 5,000, 10,000 and 30,000": "reproduced",
        "the p99 of nftables is below the p50 of iptables from 5,000 on": "reproduced",
        "linear lists degrade, sets and verdict maps stay flat": "reproduced",
        "with connections that are kept the mode hardly matters": "reproduced",
    }
    turned = lookup_report(
        modes={
            "iptables:legacy": lambda services: 9.0,
            "nftables": lambda services: 7 + 0.01 * services,
            "nftables-flat": lambda services: 7 + 0.01 * services,
            "ipvs": lambda services: 7 + 0.01 * services,
        }
    )
    assert [claim.verdict for claim in turned.claims][:-1] == ["not reproduced"] * 6


def test_sentences_tell_slopes_crossings_and_what_noise_explains() -> None:
    said = "\n".join(lookup_report().sentences)
    assert (
        "iptables:legacy: from 1,000 to 30,000 Services the first packet takes 15 to 247 µs" in said
    )
    assert "8 ns for each Service (R² 1.0000)" in said
    assert "nftables: flat from 1,000 to 30,000 Services" in said
    assert "modes are 0.0 % apart, no more than labs of one mode" in said
    assert "Not measured: ipvs: no module ip_vs." in said
    cheap = lookup_report(
        modes={
            "iptables:legacy": lambda services: 1 + 0.008 * services,
            "nftables": lambda services: 20,
        }
    )
    said = "\n".join(cheap.sentences)
    assert "iptables:legacy is ahead of nftables up to about 2," in said


def test_a_partial_report_says_so() -> None:
    def interrupted(recorder: Recorder) -> None:
        recorder.figures.append(figure(lookup.FIRST, "nftables", 10, rounds(5)))
        raise KeyboardInterrupt

    found = run("lookup", {}, interrupted, conclude)
    assert not found.complete
    assert found.ended_by == "interrupted"
    assert len(found.figures) == 1
    assert "not completed" in found.sentences[0]
    assert "not completed" in as_markdown([found])

    def refused(recorder: Recorder) -> None:
        options.modes("none")

    with pytest.raises(NetlabError):
        run("lookup", {}, refused, conclude)


def test_tables_tell_the_numbers_of_the_report() -> None:
    made = lookup_report()
    lines = list(csv.DictReader(io.StringIO(as_csv([made]))))
    told = {(each["what"], each["mode"], int(each["services"])): each for each in lines}
    for each in made.figures:
        assert float(told[each.key]["value"]) == each.value
        assert each.quantiles
        assert float(told[each.key]["p99"]) == each.quantiles.p99
    markdown = as_markdown([made])
    first = made.figure(lookup.FIRST, "iptables:legacy", 1000)
    assert first
    assert f"| iptables:legacy | – | {first.value:.4g} (" in markdown
    assert "| ✓ reproduced | iptables matches linearly" in markdown
    assert "cannot be measured here: no module ip_vs" in as_terminal(made)


def test_progress_tells_the_rest() -> None:
    stream = io.StringIO()
    progress = Progress(10.0, stream)
    progress.step("one")
    progress._told = 0.0
    progress.step("two", 5.0)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("  0 %  one")
    assert second.startswith(" 50 %  two")
    assert "left" in second


def _run(made: Report) -> Run:
    return Run("run", made.figures, "here")


def test_comparisons_tell_worse_from_noise() -> None:
    old = lookup_report()
    rows = compare(_run(old), _run(lookup_report()))
    assert {row.verdict for row in rows} == {"no difference"}
    assert not regressions(rows)

    slower = {**_modes(), "nftables": lambda services: 9.0}
    rows = compare(_run(old), _run(lookup_report(modes=slower)))
    assert {(row.mode, row.verdict) for row in rows if row.verdict != "no difference"} == {
        ("nftables", "worse")
    }
    rows = compare(_run(lookup_report(modes=slower)), _run(old))
    assert {row.verdict for row in rows if row.mode == "nftables" and "first" in row.what} == {
        "better"
    }


def test_a_machine_that_is_slower_in_all_is_no_regression() -> None:
    rows = compare(_run(lookup_report()), _run(lookup_report(scale=1.6)))
    assert not regressions(rows)
    assert all(row.ratio == pytest.approx(1, abs=0.03) for row in rows if row.mode != "none"), rows


def test_figures_that_come_go_or_are_of_another_unit_are_told() -> None:
    old = lookup_report()
    less = replace(old, figures=old.figures[1:])
    assert compare(_run(old), _run(less))[0].verdict == "gone"
    assert compare(_run(less), _run(old))[-1].verdict == "new"
    other = replace(old, figures=[replace(old.figures[0], unit="ms")])
    (row, *_) = compare(_run(other), _run(old))
    assert row.verdict == "not comparable"


def test_more_is_better_where_it_is() -> None:
    def made(value: float) -> Run:
        return Run("r", [figure("rate", "m", 1, rounds(value), "a second", "more")], "here")

    assert compare(made(100), made(80))[0].verdict == "worse"
    assert compare(made(80), made(100))[0].verdict == "better"


def _modes() -> dict:  # type: ignore[type-arg]
    from bench_reports import MODES

    return dict(MODES)


def test_reports_of_pytest_benchmark_are_compared(tmp_path: Path) -> None:
    def file(name: str, seconds: float) -> str:
        data = [value / 1000 for each in rounds(seconds * 1000) for value in each]
        found = {
            "machine_info": {"node": "here", "cpu": {"brand_raw": "A processor"}},
            "benchmarks": [
                {
                    "name": "test_up",
                    "fullname": "benchmarks/test_up.py::test_up",
                    "stats": {"median": statistics.median(data), "rounds": len(data), "data": data},
                },
                {
                    "name": "without_data",
                    "stats": {"median": seconds, "iqr": seconds / 100, "rounds": 9},
                },
            ],
        }
        path = tmp_path / name
        path.write_text(json.dumps(found))
        return str(path)

    old, same, worse = file("old", 1.0), file("same", 1.001), file("worse", 1.5)
    assert not regressions(compare(read(old), read(same)))
    found = regressions(compare(read(old), read(worse)))
    assert [row.what for row in found] == ["benchmarks/test_up.py::test_up", "without_data"]
    (tmp_path / "bad").write_text('{"machine_info": {}, "benchmarks": [{}]}')
    with pytest.raises(NetlabError):
        read(str(tmp_path / "bad"))
    with pytest.raises(NetlabError):
        read(str(tmp_path / "none"))


def test_claims_of_sync() -> None:
    def lines(what: str, values: dict[int, float], unit: str = "lines") -> list:  # type: ignore[type-arg]
        return [
            figure(what, "iptables:nft", size, [[v], [v], [v]], unit) for size, v in values.items()
        ]

    made = report(
        "sync",
        [
            *lines(f"{sync.LOAD}: operations", {100: 1200, 1000: 11_000}),
            *lines(f"{sync.LOAD}: time", {100: 20, 1000: 200}, "ms"),
            *lines(f"{sync.CHANGES['replace']}: operations", {100: 11, 1000: 11}),
            *lines(f"{sync.CHANGES['replace']}: time", {100: 8, 1000: 20}, "ms"),
        ],
    )
    verdicts = [claim.verdict for claim in conclude(made).claims]
    assert verdicts == ["not reproduced", "reproduced", "cannot be measured here"]
    assert msgspec.json.decode(encode(made))["kind"] == "sync"


def test_a_report_without_a_place_is_printed(tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_bytes(encode(lookup_report()))
    full = tmp_path / "full.csv"
    full.symlink_to("/dev/full")
    command = [sys.executable, "-c", "from netlab.cli import main; main()", "bench", "report"]
    done = subprocess.run(
        [*command, str(source), "--report", str(full)], capture_output=True, text=True
    )
    assert done.returncode == Exit.MACHINE
    assert "No space left on device" in done.stderr
    assert done.stdout == as_csv([lookup_report()])


def test_others_are_told_against_netlab_and_against_nothing() -> None:
    up = [
        figure("a pod up, of 50", who, 0, rounds(value), "ms")
        for who, value in (("netlab", 4), ("CNI bridge", 18), ("Mininet", 4.01))
    ]
    said = conclude(report("lifecycle", up)).sentences
    assert said[0].startswith("a pod up, of 50: CNI bridge takes 18 ms, 4.50 times what netlab")
    assert said[1].endswith("which noise could explain.")
    rate = [
        figure("new connections over vxlan", mode, 1000, rounds(value), "a second", "more")
        for mode, value in (("none", 10_000), ("iptables:nft", 6_000), ("nftables", 9_990))
    ]
    said = conclude(report("throughput", rate)).sentences
    assert said[0].startswith("new connections over vxlan: iptables:nft with 1,000 Services 5,9")
    assert "60 % of the" in said[0]
    assert not any("nftables" in sentence for sentence in said)


def test_all_modes_are_measured_in_a_machine_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same command, where reports may be written to."""
    jobs: list[machine.Job] = []

    def run_there(job: machine.Job, hear: object, size: object) -> int:
        jobs.append(job)
        return 1

    words = ["bench", "lookup", "--vm", "--modes", "ipvs", "--report", f"{tmp_path}/a.json"]
    monkeypatch.setattr(machine, "run", run_there)
    monkeypatch.setattr(sys, "argv", ["/there/netlab", *words])
    monkeypatch.setenv("NETLAB_BENCH_LOOKUP_VM", "1")
    CliRunner().invoke(netlab, words)
    (job,) = jobs
    assert list(job.command) == ["/there/netlab", *(word for word in words if word != "--vm")]
    assert list(job.writable) == [str(tmp_path)]
    assert "NETLAB_BENCH_LOOKUP_VM" not in job.environment
