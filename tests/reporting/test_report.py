import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bdjax.reporting import plots
from bdjax.reporting.report import (
    LEVELS,
    Figure,
    Report,
    Section,
    Verdict,
    level_of,
    publish,
    render,
    tables_of,
)
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.folder import open_run

EVIL = '<script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>'
VOID = {"meta", "img", "br", "link", "hr", "input"}
PNG = plots.to_png(plots.image_grid(np.zeros((1, 1, 8, 8, 1)), [], [], "a picture to be embedded"))


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_report(name: str = "student") -> Report:
    table = Table(
        f"Table of {name}",
        ("model", "CDA", "note"),
        ((name, 0.95, name), ("paper's", None, "quoted"), ("ours", 0.5, "measured")),
        notes=name,
        row_styles=("", "paper", "ours"),
    )
    return Report(
        title=f"TA-KD, {name}",
        verdict=Verdict("success", f"All is well with {name}.", f"First.\n\nSecond {name}."),
        key_numbers={name: "0.95"},
        facts=Table("What each method receives", ("defense", "needs"), ((name, "clean data"),)),
        sections=(
            Section(f"Results of {name}", f"One.\n\nTwo {name}.", (table,), (Figure(PNG, name, name),)),
            Section("Nothing more"),
        ),
        settings={"experiment": "ta_kd", "training": {"epochs": 30, name: (Path(name), None, True)}},
        timings=Table("Timings", ("stage", "seconds"), (("teachers", 14.2),)),
        reproduce=f"python experiments/ta_kd.py --dataset={name}",
        provenance={"versions": {"jax": "0.10.2"}, "git_revision": None, "data source": name},
    )


def test_the_page_is_well_formed_and_complete():
    source = render(make_report())
    page = Page(source)
    assert page.open == []
    assert source.startswith("<!DOCTYPE html>")
    assert page.text["title"] == page.text["h1"] == ["TA-KD, student"]
    contents = ["What each method receives", "Results of student", "Nothing more", "Reproduce this", "Timings"]
    assert [text for text in page.text["h2"] if text != "Contents"] == [*contents, "Settings", "Provenance"]
    assert page.text["figcaption"] == ["Table of student", "student"]
    assert page.text["code"] == ["python experiments/ta_kd.py --dataset=student"]
    assert {"0.950", "–", "0.500"} <= set(page.text["td"])
    assert [paragraph for paragraph in page.text["p"] if "Two" in paragraph] == ["Two student."]
    assert "student, –, yes" in page.text["dd"]
    assert len(page.all("details")) == 1


def test_the_verdict_comes_first():
    source = render(make_report())
    body = source[source.index("<body>") :]
    assert body.index("All is well") < body.index("Contents") < body.index("What each method receives")


def test_every_link_of_the_contents_leads_somewhere():
    page = Page(render(make_report()))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) == 7
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_page_needs_nothing_else():
    source = render(make_report())
    page = Page(source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "style", "background"):
            value = attributes.get(name) or ""
            assert not re.search(r"https?:|//|url\(|javascript:", value.split(",")[0]), value
    assert "@import" not in source
    assert "url(" not in source
    assert "http" not in "".join(page.text["style"])
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_figures_are_embedded_with_their_size_and_what_is_read_out(tmp_path):
    (tmp_path / "picture.png").write_bytes(PNG)
    sections = (Section("s", figures=(Figure(PNG, "c", "as bytes"), Figure(tmp_path / "picture.png", "", "a file"))),)
    page = Page(render(Report("t", Verdict("info", "h"), sections=sections)))
    first, second = page.all("img")
    assert base64.b64decode(first["src"].removeprefix("data:image/png;base64,")) == PNG
    assert first["src"] == second["src"]
    assert (first["alt"], second["alt"]) == ("as bytes", "a file")
    assert int(first["width"]) > 0
    assert int(first["height"]) > 0
    with pytest.raises(ValueError, match="the figure 'c' is not a PNG"):
        render(Report("t", Verdict("info", "h"), sections=(Section("s", figures=(Figure(b"GIF89a", "c", ""),)),)))


@pytest.mark.parametrize("columns", [2, 40])
def test_the_style_is_that_of_the_tables_on_the_page(columns):
    table = Table("Numbers", ("0.953 ± 0.004",) * columns, ())
    page = Page(render(dataclasses.replace(make_report(), timings=table)))
    used = {name for table in page.all("table") for name in table["class"].split()}
    (style,) = page.text["style"]
    styled = set(re.findall(r"table\.((?:grid|loose)-\w+)", style))
    assert styled | {"loose-more"} == (used - {"short"}) | {"loose-more"} and ("grid-more" in styled) == (columns == 40)


def test_text_from_outside_stays_text():
    harmless, attacked = Page(render(make_report())), Page(render(make_report(EVIL)))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in harmless.elements]
    assert all(not name.startswith("on") for _, attributes in attacked.elements for name in attributes)
    assert attacked.text["h1"] == [f"TA-KD, {EVIL}"]
    assert EVIL in attacked.text["td"]
    assert attacked.all("img")[0]["alt"] == EVIL


def test_numbers_are_aligned_right_and_marked_rows_stand_out():
    page = Page(render(make_report()))
    header = [(attributes.get("class"), text) for attributes, text in zip(page.all("th"), page.text["th"], strict=True)]
    assert (None, "model") in header
    assert ("number", "CDA") in header
    assert [row["class"] for row in page.all("tr") if "class" in row] == ["paper", "ours"]
    # Every number but the paper's is ours, so only the paper's rows are tagged.
    assert [tag for tag in page.text["span"] if tag] == ["paper"]


@pytest.mark.parametrize("level", LEVELS)
def test_each_verdict_has_its_own_look(level):
    source = render(Report("t", Verdict(level, "headline")))
    assert f'class="verdict {level}"' in source
    assert f".verdict.{level} " in source
    assert f"--{level}-back:" in source


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="verdict level 'fine' is not among"):
        Verdict("fine", "headline")


def test_a_report_with_a_verdict_only_has_no_empty_parts():
    page = Page(render(Report("t", Verdict("warning", "headline"))))
    assert page.open == []
    assert "section" not in {tag for tag, _ in page.elements}
    assert page.text["h2"] == ["Contents"] if "h2" in page.text else True


def test_the_same_report_gives_the_same_page():
    assert render(make_report()) == render(make_report())
    assert render(make_report()) != render(dataclasses.replace(make_report(), title="other"))


def test_the_page_can_be_read_in_the_dark_and_on_paper():
    source = render(make_report())
    assert "@media (prefers-color-scheme: dark)" in source
    assert "@media print" in source
    assert 'name="viewport"' in source
    assert "pixelated" not in source


def table(name):
    return Table(name, ("a", "b"), ((name, 0.5),))


def test_the_tables_of_a_page_come_once_and_the_facts_after_the_first_section():
    first, second, third, facts = map(table, ("first", "second", "third", "facts"))
    sections = (Section("A", tables=(first, second)), Section("B", tables=(third, table("first"), facts)))
    page = Report("t", Verdict("info", "h"), facts=facts, sections=sections)
    assert tables_of(page) == [first, second, facts, third]
    assert tables_of(dataclasses.replace(page, facts=None)) == [first, second, third, facts]
    assert tables_of(Report("t", Verdict("info", "h"))) == []
    assert tables_of(Report("t", Verdict("info", "h"), facts=facts)) == [facts]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def test_a_published_run_has_its_tables_its_times_and_its_page(tmp_path):
    folder = open_run(tmp_path / "run", Config(), experiment="lfd")
    page = Report(
        "A page",
        Verdict("info", "A headline"),
        facts=table("facts"),
        sections=(Section("A", tables=(table("first"),)),),
        settings={"attack badnets": {"size": 3}},
    )
    publish(
        folder,
        page,
        settings={"seed": 7},
        timings={"defense abl": 3.0},
        reproduce="python experiments/lfd.py",
        sources={"training data": "a test"},
    )
    assert (folder.path / "table.md").read_text() == f"{to_markdown(table('first'))}\n\n{to_markdown(table('facts'))}\n"
    assert json.loads((folder.path / "timings.json").read_text())["seconds"] == {"defense abl": 3.0}
    text = (folder.path / "report.html").read_text()
    for shown in (
        "A headline",
        "attack badnets",
        "defense abl",
        "python experiments/lfd.py",
        "training data",
        "jaxlib",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["removed"], "success"),
        (["removed", "removed"], "success"),
        (["kept", "kept"], "attacked"),
        (["removed", "kept"], "warning"),
        (["weakened"], "warning"),
        (["removed at a cost", "removed"], "warning"),
    ],
)
def test_the_level_of_words_on_backdoors(words, level):
    assert level_of(words) == level
