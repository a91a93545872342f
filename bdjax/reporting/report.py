"""The report: one self-contained HTML file.

All text in it is treated as untrusted and escaped. The page has no script, and its content security policy allows no
requests.
"""

import base64
import importlib.resources
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from bdjax.metrics import ABBREVIATIONS, DEFINITIONS, DefenseWord
from bdjax.reporting import tables
from bdjax.reporting.plots import DPI
from bdjax.reporting.tables import Table
from bdjax.run.folder import RunFolder, describe_environment, to_plain

LEVELS = ("success", "warning", "attacked", "info", "found", "suspicious", "nothing_found", "not_tested")
"""The last four are of audits, whose ground truth is unknown: none of them is a success."""
TABLE_WIDTHS = tuple(range(30, 140, 8))
"""Widths in letters, of tables and of the room for them. A table is laid out as a grid where its width, rounded up to one of
these, fits, and otherwise as a card for each row; beyond the largest always as cards."""
LETTER = 8.6
"""Width of a letter in a table, in CSS pixels: that of a digit in a wide font."""
_SHRUNK = 0.87
"""Widths of a table in a smaller font, as a share of those in the usual one."""
_SHORT = 10
_ABBREVIATION = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, ABBREVIATIONS))})(?![\w-])")
_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Verdict:
    """The main result, for a reader who reads nothing else."""

    level: str
    """one of LEVELS: sets the banner's colour and word"""
    headline: str
    """one sentence"""
    text: str = ""
    """a few sentences; a blank line starts a paragraph"""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"verdict level {self.level!r} is not among {list(LEVELS)}")


@dataclass(frozen=True)
class Figure:
    """A picture with its caption and its alternative text for screen readers."""

    image: Path | bytes
    """a PNG file, or its bytes"""
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A section of the report, listed in its table of contents."""

    title: str
    text: str = ""
    """a blank line starts a paragraph"""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that is printed, in the order of the page."""

    title: str
    verdict: Verdict
    key_numbers: Mapping[str, str] = field(default_factory=dict)
    """a few, such as "ASR of the student" -> "0.5 %" """
    facts: Table | None = None
    """what each method receives"""
    sections: tuple[Section, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """a value that is a mapping becomes a group"""
    timings: Table | None = None
    reproduce: str = ""
    """the command line"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """versions, revision, hardware, source of the data"""


class _Image(NamedTuple):
    source: str
    """a data URI"""
    width: int
    """in CSS pixels"""
    height: int


class _Group(NamedTuple):
    name: str
    entries: list[tuple[str, str]]


def render(report: Report) -> str:
    """Returns the report as one self-contained HTML page; the same report gives the same page."""
    drawn = [report.facts, *(table for section in report.sections for table in section.tables), report.timings]
    layouts = {id(table): _layout(table) for table in drawn if table}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        cells=tables.cells,
        groups=_groups,
        image=_embed,
        number_columns=tables.number_columns,
        paragraphs=_paragraphs,
        styles=tables.styles,
        layout=lambda table: layouts[id(table)],
    )
    source = importlib.resources.files("bdjax.reporting").joinpath("report.html.j2").read_text("utf-8")
    sizes = {"widths": TABLE_WIDTHS, "letter": LETTER, "shrunk": _SHRUNK, "layouts": " ".join(layouts.values()).split()}
    return environment.from_string(source).render(report=report, words=_first_words(report), **sizes)


def publish(
    folder: RunFolder,
    page: Report,
    *,
    settings: Mapping[str, Any],
    timings: Mapping[str, float],
    reproduce: str,
    sources: Mapping[str, str],
) -> None:
    """Write table.md, timings.json and report.html, as the last step of every run.

    Args:
        folder: the open run; the page's figures are already in it.
        page: the report without the fields below. Its settings come after those of the run.
        settings: every field of the configuration.
        timings: seconds of each stage.
        reproduce: the command line.
        sources: where the data came from, such as "training data" -> text.
    """
    complete = replace(
        page,
        settings={**settings, **page.settings},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={**sources, **describe_environment()},
    )
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, tables_of(page))) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})
    folder.write_text("report.html", render(complete))


def tables_of(page: Report) -> list[Table]:
    """The tables of a page without duplicates: those of its first section, its facts, and those of the other sections."""
    groups = [section.tables for section in page.sections]
    groups.insert(1, (page.facts,) if page.facts else ())
    found: list[Table] = []
    for table in (table for group in groups for table in group):
        if table not in found:
            found.append(table)
    return found


def level_of(words: Iterable[DefenseWord]) -> str:
    """The level of a verdict on backdoors: success if all are removed, attacked if all are kept, otherwise a warning.

    Args:
        words: from `metrics.defense_word`, for all backdoors that there are to remove; at least one.
    """
    found = set(words)
    return "success" if found == {"removed"} else "attacked" if found == {"kept"} else "warning"


def timings_table(timings: Mapping[str, float], title: str = "Time per stage") -> Table:
    """Returns the seconds of each stage, and their share of the total."""
    total = sum(timings.values())
    rows = [(name, f"{seconds:.1f}", f"{seconds / total:.0%}" if total else None) for name, seconds in timings.items()]
    return Table(title, ("stage", "seconds", "share"), (*rows, ("all", f"{total:.1f}", "100%")))


def _first_words(report: Report) -> list[list[tuple[str, str]]]:
    """Abbreviation and meaning, where each is first used: in the header, among the facts, then in each section."""
    header = (
        report.title,
        report.verdict.headline,
        report.verdict.text,
        *report.key_numbers,
        *report.key_numbers.values(),
    )
    places = [header, _words_of(report.facts) if report.facts else ()]
    for section in report.sections:
        captions = (figure.caption for figure in section.figures)
        of_tables = (text for table in section.tables for text in _words_of(table))
        places.append((section.title, section.text, *of_tables, *captions))
    seen: set[str] = set()
    found = []
    for texts in places:
        new = dict.fromkeys(word for text in texts for word in _ABBREVIATION.findall(text) if word not in seen)
        seen |= new.keys()
        found.append([(word, DEFINITIONS[ABBREVIATIONS[word]]) for word in new])
    return found


def _words_of(table: Table) -> Iterable[str]:
    return (table.title, *map(str, table.header), *(text for row in tables.cells(table) for text in row), table.notes)


def _layout(table: Table) -> str:
    """The classes of a table that say how much room it needs: as a grid at all, without numbers in two lines, and as cards."""
    found = [
        f"{name}-{next((width for width in TABLE_WIDTHS if width >= needed), 'more')}"
        for name, needed in zip(("grid", "loose"), tables.widths(table), strict=True)
    ]
    is_short = all(len(text) <= _SHORT for row in tables.cells(table) for text in row[1:])
    return " ".join(found + ["short"] * is_short)


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _embed(figure: Figure) -> _Image:
    data = figure.image if isinstance(figure.image, bytes) else Path(figure.image).read_bytes()
    if not data.startswith(_PNG_START) or len(data) < 24:
        raise ValueError(f"the figure {figure.caption!r} is not a PNG")
    # Width and height reserve the space while the page loads; the plots are drawn at print resolution, hence the ratio.
    width, height = (round(pixels * 96 / DPI) for pixels in struct.unpack(">II", data[16:24]))
    return _Image(f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}", max(width, 1), max(height, 1))


def _groups(mapping: Mapping[str, Any]) -> list[_Group]:
    """Splits settings into single ones, which come first, and groups."""
    alone = [(name, _setting(value)) for name, value in mapping.items() if not isinstance(value, Mapping)]
    groups = [
        _Group(name, [(entry, _setting(value)) for entry, value in group.items()])
        for name, group in mapping.items()
        if isinstance(group, Mapping) and group
    ]
    return [*([_Group("", alone)] if alone else []), *groups]


def _setting(value: Any) -> str:
    plain = to_plain(value)
    if plain is None:
        return tables.UNKNOWN
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, list):
        return ", ".join(_setting(entry) for entry in plain)
    if isinstance(plain, dict):
        return ", ".join(f"{name}: {_setting(entry)}" for name, entry in plain.items())
    return tables.printable(str(plain))
