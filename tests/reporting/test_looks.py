"""Reports in a real browser: nothing overflows at the width of a phone, a tablet, a screen or a sheet of paper."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
from skimage.color import rgb2lab

from bdjax.metrics import DEFINITIONS
from bdjax.reporting import plots
from bdjax.reporting.report import Report, Section, Verdict, render
from bdjax.reporting.tables import Table
from tests.fixtures import browser, reports

WIDTHS = (380, 800, 1200, 1400)
PAPER = 717  # CSS pixels between the margins of A4
RUNS = ("ta_kd/cifar10-all-rows", "vbd/cifar10-calibration", "audit_model/digits-unseen-seed")


@contextlib.contextmanager
def looking() -> Iterator[browser.Browser]:
    """An open browser; the test is skipped without one that starts."""
    if browser.program() is None:
        pytest.skip(f"none of {', '.join(browser.PROGRAMS)} is installed: reports are not looked at")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(browser.opened())
        except (RuntimeError, OSError) as error:  # Ubuntu's chromium only names a package of snap
            pytest.skip(f"{browser.program()} does not start ({error}): reports are not looked at")
        yield opened


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with looking() as opened:
        yield opened


def test_a_browser_that_does_not_start_is_as_none(tmp_path, monkeypatch):
    (tmp_path / "chromium").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(pytest.skip.Exception, match="chromium does not start"), looking():
        pass


def shown(page: browser.Browser, report: Report, place: pathlib.Path) -> browser.Browser:
    (place / "report.html").write_text(render(report), "utf-8")
    page.open(place / "report.html")
    return page


def report_of(*tables: Table) -> Report:
    return Report(
        "A run", Verdict("success", "The mean ASR is 0.01 at a CDA of 0.95."), sections=(Section("All", "", tables),)
    )


@pytest.mark.slow  # a browser is several processes
@pytest.mark.parametrize("name", RUNS)
def test_nothing_overflows(page, name, tmp_path):
    shown(page, reports.report_of(reports.RESULTS / name), tmp_path)
    for width in WIDTHS:
        page.show(width)
        assert not page.overflows(), width
    page.show(PAPER, media="print")
    assert not page.overflows()
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.slow  # a browser is several processes
def test_what_overflows_is_noticed(page, tmp_path):
    shown(page, report_of(), tmp_path)
    page.show(800)
    assert not page.overflows()
    page.run(
        "document.querySelector('main').insertAdjacentHTML('beforeend', "
        "'<table><tr>' + '<td>0.953&nbsp;±&nbsp;0.004</td>'.repeat(40) + '</tr></table>')"
    )
    assert "the page" in page.overflows() and any(text.startswith("table") for text in page.overflows())
    page.run("document.querySelector('main > table').style = 'display: block; overflow-x: auto'")
    assert "table scrolls" in page.overflows() and "the page" not in page.overflows()


@pytest.mark.slow  # a browser is several processes
def test_a_table_that_is_too_wide_becomes_cards(page, tmp_path):
    many = tuple(f"column {number}" for number in range(40))
    wide = Table("Wide", ("defense", *many), (("undefended", *["0.953 ± 0.004"] * 40),) * 3)
    narrow = Table("Narrow", ("defense", "CDA"), (("undefended", 0.953),))
    shown(page, report_of(wide, narrow), tmp_path)
    for width in WIDTHS:
        page.show(width)
        assert not page.overflows(), width
        kinds = page.run("[...document.querySelectorAll('tbody')].map((body) => getComputedStyle(body).display)")
        assert kinds == ["block", "table-row-group"]
    assert page.run("getComputedStyle(document.querySelector('td:nth-child(3)'), '::before').content") == '"column 1"'


@pytest.mark.slow  # a browser is several processes
def test_key_numbers_stay_in_their_boxes(page, tmp_path):
    numbers = dict.fromkeys(("teachers' ASR", "TA ASR", "student ASR", "student CDA"), "0.951 ± 0.018")
    shown(page, dataclasses.replace(report_of(), key_numbers=numbers), tmp_path)
    for width in WIDTHS:
        page.show(width)
        assert page.run(
            "[...document.querySelectorAll('.numbers dd')].every((e) => e.scrollWidth <= e.clientWidth && e.clientHeight < 30)"
        ), width


@pytest.mark.slow  # a browser is several processes
def test_settings_that_are_longer_than_a_page_leave_none_empty(page, tmp_path):
    settings = {f"setting_{number}": number for number in range(66)}
    shown(page, dataclasses.replace(report_of(), settings=settings), tmp_path)
    page.show(PAPER, media="print")
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf())) == 2


@pytest.mark.slow  # a browser is several processes
def test_light_and_dark(page, tmp_path):
    shown(page, report_of(), tmp_path)
    inks = []
    for scheme in ("light", "dark"):
        page.show(800, scheme)
        inks.append(
            page.run("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
        )
    numbers = np.array([[[int(part) for part in text[4:-1].split(",")] for text in pair] for pair in inks])
    ink, paper = numbers.mean(axis=-1).T
    assert ink[0] < 64 and paper[0] > 240 and ink[1] > 200 and paper[1] < 40


def test_abbreviations_are_explained_where_they_first_stand():
    table = Table("Numbers", ("defense", "CDA", "R-ACC"), (("none", 0.9, 0.1),))
    text = render(report_of(table))
    header, main = text.split("<main>")
    assert header.count(f"<dd>{DEFINITIONS['asr']}</dd>") == header.count(f"<dd>{DEFINITIONS['cda']}</dd>") == 1
    assert DEFINITIONS["cda"] not in main and main.count(f"<dd>{DEFINITIONS['r_acc']}</dd>") == 1
    assert main.index(DEFINITIONS["r_acc"]) < main.index("<table")


# Machado, Oliveira and Fernandes 2009: what people without one kind of cone see, on linear RGB.
CONES = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("kind", [None, *CONES])
def test_colours_differ_for_the_colour_blind(kind):
    colours = np.array([[int(text[start : start + 2], 16) / 255 for start in (1, 3, 5)] for text in plots.COLOURS])
    if kind:
        linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
        seen = np.clip(linear @ np.array(CONES[kind]).T, 0, 1)
        colours = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(colours[None])[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
    assert distances.min() > 10  # about 2.3 is just noticeable
