"""Tables, printed as Markdown for files, by rich on the terminal, or as HTML by the report's template."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rich.table
from rich.cells import cell_len
from rich.text import Text

from bdjax.run.text import printable, shortened

Cell = str | int | float | None

UNKNOWN = "–"
ROW_STYLES = ("", "paper", "ours")
_NUMBER = re.compile(r"[<>≤≥≈~]? ?[+\-−]?\d[\d,.]*(e[+-]?\d+)?( ?± ?[\d.]+)?( ?[%a-zA-Zµ×/]{1,5})?|nan|-?inf")
_PADDING, _LEAST_TEXT, _USUAL_TEXT = 2.5, 12, 20
_RICH_STYLES = {"": "", "paper": "italic dim", "ours": "bold"}
_MARKDOWN_MARKS = {"": "", "paper": "*", "ours": "**"}


@dataclass(frozen=True)
class Table:
    """A table, independent of how it is printed."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """None is printed as "–" """
    notes: str = ""
    """printed below: definitions, units, n"""
    row_styles: tuple[str, ...] = ()
    """one of ROW_STYLES for each row, or empty"""
    decimals: int = 3
    """decimals of every float"""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r}: row {index} has {len(row)} cells, the header has {len(self.header)}"
                )
        if self.row_styles and len(self.row_styles) != len(self.rows):
            raise ValueError(
                f"table {self.title!r}: {len(self.row_styles)} row styles for {len(self.rows)} rows; give one for each"
            )
        unknown = set(self.row_styles) - set(ROW_STYLES)
        if unknown:
            raise ValueError(f"table {self.title!r}: row styles {sorted(unknown)} are not among {list(ROW_STYLES)}")


def format_cell(cell: Cell, decimals: int = 3) -> str:
    """Returns the printed text of a cell: 0.953 for a float, 21,282,122 for an int, "–" for None."""
    if cell is None:
        return UNKNOWN
    if isinstance(cell, str):
        return printable(cell)
    if isinstance(cell, (bool, np.bool_)):
        return "yes" if cell else "no"
    if isinstance(cell, (int, np.integer)):
        return f"{int(cell):,}"
    return f"{float(cell):.{decimals}f}"


def mean_and_spread(values: Iterable[float | None] | None, decimals: int = 3) -> str:
    """Returns the mean and the sample standard deviation over repetitions, "0.953 ± 0.004".

    Args:
        values: one number for each repetition. If it is None or empty or contains a None, the result is unknown: "–". A NaN
            is a failed result and is shown.
        decimals: digits after the point.

    Returns:
        The text; for a single value without a spread.
    """
    known = [] if values is None else list(values)
    if not known or any(value is None for value in known):
        return UNKNOWN
    numbers = np.asarray(known, np.float64)
    mean = f"{numbers.mean():.{decimals}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {numbers.std(ddof=1):.{decimals}f}"


def cells(table: Table) -> tuple[tuple[str, ...], ...]:
    """Returns the table's rows as they are printed."""
    return tuple(tuple(format_cell(cell, table.decimals) for cell in row) for row in table.rows)


def styles(table: Table) -> tuple[str, ...]:
    """Returns the style of each row."""
    return table.row_styles or ("",) * len(table.rows)


def number_columns(table: Table) -> tuple[bool, ...]:
    """Returns for each column whether it holds numbers, which are right-aligned."""

    def is_number(column: tuple[str, ...]) -> bool:
        known = [text for text in column if text and text != UNKNOWN]
        return bool(known) and all(
            _NUMBER.fullmatch(part) for text in known for part in text.split(" / ") if part != UNKNOWN
        )

    columns = list(zip(*cells(table), strict=True)) or [()] * len(table.header)
    return tuple(is_number(column) for column in columns)


class Widths(NamedTuple):
    """How wide a table is as HTML, in letters; its cells have 2.5 letters of padding each."""

    least: float
    """if lines may break at every space"""
    comfortable: float
    """if no number breaks, and a text only after some words"""


def widths(table: Table) -> Widths:
    """The room that a table needs in HTML, about: letters differ in width."""
    columns = list(zip(*cells(table), strict=True)) or [()] * len(table.header)
    least, comfortable = 0.0, 0.0
    for name, column, is_number in zip(table.header, columns, number_columns(table), strict=True):
        words = max(_longest_word(text) for text in (printable(name), *column))
        longest = max(map(cell_len, column), default=0)
        least += max(words, 0 if is_number else min(longest, _LEAST_TEXT)) + _PADDING
        comfortable += max(words, longest if is_number else min(longest, _USUAL_TEXT)) + _PADDING
    return Widths(least, comfortable)


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in re.split(r"\s|(?<=[-/])", text)), default=0)


def to_markdown(table: Table) -> str:
    """Returns the table in Markdown, with aligned columns so that the source is readable, too."""

    def escape(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    def mark(text: str, style: str) -> str:
        return f"{_MARKDOWN_MARKS[style]}{escape(text)}{_MARKDOWN_MARKS[style]}" if text else ""

    body = [[mark(text, style) for text in row] for row, style in zip(cells(table), styles(table), strict=True)]
    lines = [[escape(printable(name)) for name in table.header], *body]
    widths = [max(3, *(cell_len(line[index]) for line in lines)) for index in range(len(table.header))]
    right = number_columns(table)

    def join(line: list[str]) -> str:
        fills = [" " * (width - cell_len(text)) for text, width in zip(line, widths, strict=True)]
        padded = [fill + text if side else text + fill for text, fill, side in zip(line, fills, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if side else "-" * width for width, side in zip(widths, right, strict=True)]
    parts = [
        f"**{escape(printable(table.title))}**" if table.title else "",
        "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])]),
        escape(printable(table.notes)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_rich(table: Table) -> rich.table.Table:
    """Returns the table for a rich console; long cells are shortened."""
    result = rich.table.Table(
        title=Text(shortened(printable(table.title)), "bold") if table.title else None,
        caption=Text(shortened(printable(table.notes), 4000), "dim") if table.notes else None,
        title_justify="left",
        caption_justify="left",
    )
    for name, right in zip(table.header, number_columns(table), strict=True):
        result.add_column(Text(printable(name)), justify="right" if right else "left")
    for row, style in zip(cells(table), styles(table), strict=True):
        result.add_row(*(Text(shortened(text, 200, 60)) for text in row), style=_RICH_STYLES[style])
    return result
