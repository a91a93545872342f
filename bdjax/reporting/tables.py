"""Tables, printed as Markdown for files, by rich on the terminal, or as HTML by the report's template."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rich.table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bdjax.run.text import printable, shortened

Cell = str | int | float | None

UNKNOWN = "–"
ROW_STYLES = ("", "paper", "ours")
_NUMBER = re.compile(r"[<>≤≥≈~]? ?[+\-−]?\d[\d,.]*(e[+-]?\d+)?( ?± ?[\d.]+)?( ?[%a-zA-Zµ×/]{1,5})?|nan|-?inf")
_PADDING, _LEAST_TEXT, _USUAL_TEXT = 2.5, 12, 20
_RICH_STYLES = {"": "", "paper": "italic dim", "ours": "bold"}
_LONGEST_WORD = 24
"""Letters of a word that is never broken on a terminal; file names and settings may be longer."""
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


def to_markdown(table: Table, more: str = "") -> str:
    """Returns the table in Markdown, with aligned columns so that the source is readable, too.

    Args:
        table: the table.
        more: letters that have no meaning in any text, beside those that end a cell or begin HTML: "*_[]" if texts come from
            data.
    """

    def escape(text: str) -> str:
        text = "".join(f"\\{letter}" if letter in f"\\|{more}" else letter for letter in text)
        return text.replace("<", "&lt;")

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


class Fitted(NamedTuple):
    """A table on a console of any width, without a word or a number cut off.

    Numbers stay on a line and text is wrapped between words. Columns that do not fit beside each other follow below, with the
    first column repeated. Only words of more than `_LONGEST_WORD` letters are broken.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        header = [printable(name) for name in self.table.header]
        body = [[shortened(text, 200, 60) for text in row] for row in cells(self.table)]
        numbers = number_columns(self.table)
        columns = list(zip(header, *body, strict=True))
        wanted = [max(map(cell_len, column)) for column in columns]
        least = [_least(column, is_number) for column, is_number in zip(columns, numbers, strict=True)]
        if self.table.title:
            yield Text(shortened(printable(self.table.title)), "bold")
        for block in _blocks(least, options.max_width):
            shown = rich.table.Table()
            widths = _spread([least[i] for i in block], [wanted[i] for i in block], options.max_width)
            for i, width in zip(block, widths, strict=True):
                justify = "right" if numbers[i] else "left"
                shown.add_column(Text(header[i]), justify=justify, width=width, overflow="fold")
            for row, style in zip(body, styles(self.table), strict=True):
                shown.add_row(*(Text(row[i]) for i in block), style=_RICH_STYLES[style])
            yield shown
        if self.table.notes:
            yield Text(shortened(printable(self.table.notes), 4000), "dim")


def _least(column: Sequence[str], is_number: bool) -> int:
    """Width of a column's longest number, or longest word; the header may be wrapped in either case."""
    name, *texts = column
    words = [*name.split(), *(texts if is_number else (word for text in texts for word in text.split()))]
    longest = max(map(cell_len, words), default=1)
    return longest if is_number else min(longest, _LONGEST_WORD)


def _frame(columns: int) -> int:
    """Width of the lines and the margins of a table."""
    return 3 * columns + 1


def _blocks(least: Sequence[int], width: int) -> list[list[int]]:
    """The columns that stand beside each other: every block begins with the first column and has at least one other.

    Args:
        least: smallest width of each column.
        width: of the console.
    """
    blocks = [[0]] if least else []
    for column in range(1, len(least)):
        block = blocks[-1]
        taken = sum(least[i] for i in block) + least[column] + _frame(len(block) + 1)
        if len(block) > 1 and taken > width:
            blocks.append([0, column])
        else:
            block.append(column)
    return blocks


def _spread(least: Sequence[int], wanted: Sequence[int], width: int) -> list[int]:
    """Widths of the columns of a block: what is left over goes to those that would have the most lines."""
    widths = list(least)
    for _ in range(width - _frame(len(widths)) - sum(widths)):
        needs = [want / has if want > has else 0.0 for want, has in zip(wanted, widths, strict=True)]
        if not any(needs):
            break
        widths[needs.index(max(needs))] += 1
    return widths


def to_rich(table: Table) -> Fitted:
    """Returns the table for a rich console; long cells are shortened."""
    return Fitted(table)


_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': "''",
    "±": r"$\pm$",
    "–": "--",
    "—": "---",
    "−": "$-$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "…": r"\dots{}",
    "→": r"$\rightarrow$",
}
"""What LaTeX takes for something else than a letter."""


def latex_text(text: str) -> str:
    """Returns a text as LaTeX in ASCII: other letters lose their accents or, if they have no command, become "?"."""
    found = []
    for letter in printable(text):
        if letter in _LATEX:
            found.append(_LATEX[letter])
        elif letter.isascii():
            found.append(letter)
        else:
            plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
            found.append("".join(_LATEX.get(part, part) for part in plain) or "?")
    return "".join(found)


def to_latex(table: Table) -> str:
    r"""Returns the table as a `table` environment, which needs \usepackage{booktabs}."""

    def line(texts: Iterable[str]) -> str:
        return " & ".join(map(latex_text, texts)) + r" \\"

    columns = "".join("r" if right else "l" for right in number_columns(table))
    parts = [
        r"\begin{table}[htbp]",
        r"\centering",
        *([rf"\caption{{{latex_text(table.title)}}}"] if table.title else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(table.header),
        r"\midrule",
        *map(line, cells(table)),
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\par\smallskip\footnotesize {latex_text(table.notes)}"] if table.notes else []),
        r"\end{table}",
    ]
    return "\n".join(parts) + "\n"
