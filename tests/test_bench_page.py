"""The page of a benchmark in a browser: it stands by itself, its plots and numbers are right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from bench_reports import lookup_report, report, rounds
from netlab.bench.conclusions import conclude
from netlab.bench.model import Report
from netlab.bench.statistics import figure
from netlab.report.bench_html import as_html

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def reports() -> list[Report]:
    sync = [
        figure("full load: time", mode, size, rounds(value * size), "ms")
        for mode, value in (("iptables:nft", 0.2), ("nftables-flat", 0.05))
        for size in (100, 1000)
    ]
    pods = [figure("a pod up, of 50", who, 0, rounds(2), "ms") for who in ("netlab", "CNI bridge")]
    partial = conclude(report("lifecycle", pods))
    return [lookup_report(), conclude(report("sync", sync)), partial]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of three reports; what the browser complains of and asks for is collected."""
    program = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed: ./bootstrap.sh test")
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(as_html(reports()))
    # The browser's own sandbox does not run as root.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            made = browser.new_page(viewport={"width": 1200, "height": 900})
            made.complaints = []
            made.on("pageerror", lambda error: made.complaints.append(str(error)))
            made.on("console", lambda message: made.complaints.append(message.text))
            made.on("request", lambda request: made.complaints.append(request.url))
            made.goto(file.as_uri())
            assert made.complaints == [file.as_uri()], "nothing but the page itself is fetched"
            yield made
        finally:
            browser.close()


def test_plots_are_drawn(page: Page) -> None:
    made = reports()[0]
    sizes = page.eval_on_selector_all(
        "figure svg",
        "all => all.map(svg => { const box = svg.getBoundingClientRect();"
        " return [box.width, box.height] })",
    )
    assert len(sizes) >= 4
    assert all(width > 200 and height > 150 for width, height in sizes)
    for mode in {each.mode for each in made.figures} - {"none"}:
        word = mode.replace(":", "-")
        curve = page.locator(f"#curve-first-packet-0-{word} path").first
        box = curve.bounding_box()
        assert box
        assert box["width"] > 100
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids)), "drawings do not share identifiers"


def test_numbers_are_those_of_the_json(page: Page) -> None:
    inside = [
        json.loads(text)
        for text in page.eval_on_selector_all(
            "script[type='application/json']", "all => all.map(one => one.textContent)"
        )
    ]
    shown: Any = page.eval_on_selector_all(
        "td[data-value]",
        "all => all.map(one => [one.dataset.what, one.dataset.mode, Number(one.dataset.services),"
        " Number(one.dataset.value), one.firstChild.textContent])",
    )
    told = {(what, mode, services): (value, text) for what, mode, services, value, text in shown}
    wanted = {
        (each["what"], each["mode"], each["services"]): each["value"]
        for each_report in inside
        for each in each_report["figures"]
    }
    assert told.keys() == wanted.keys()
    for key, (value, text) in told.items():
        assert value == wanted[key]
        assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-3)
    assert [each["kind"] for each in inside] == ["lookup", "sync", "lifecycle"]


def test_claims_are_shown_with_their_verdicts(page: Page) -> None:
    shown = page.eval_on_selector_all(
        ".claims tbody tr", "all => all.map(row => row.cells[0].textContent.slice(2))"
    )
    assert shown == [claim.verdict for each in reports() for claim in each.claims]


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, "wide tables scroll by themselves"
    # Text of plots is at least 7 pixels high.
    heights = page.eval_on_selector_all(
        "figure svg text", "all => all.map(one => one.getBoundingClientRect().height)"
    )
    assert min(heights) >= 7


def test_it_can_be_printed(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.pdf"
    page.pdf(path=str(file), format="A4")
    assert file.stat().st_size > 10_000


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.found.append(value)


def test_the_page_refers_to_nothing_outside() -> None:
    parser = _Sources()
    parser.feed(as_html(reports()))
    assert parser.found == []


def test_text_is_never_taken_for_tags() -> None:
    made = lookup_report()
    other = report("lookup", made.figures)
    bad = '</script><img src=x onerror="alert(1)">'
    text = as_html(
        [conclude(Report(**{**other_fields(other), "ended_by": bad, "complete": False}))]
    )
    assert "<img" not in text
    assert text.count("</script>") == 1


def other_fields(made: Report) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__struct_fields__}
