"""Makes untrusted text safe to print, and to open in a spreadsheet."""

import csv
import io
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

_FORMULA = re.compile(
    r"(^\s*|[;,|\t\r\n]\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])|^(?=[\t\r\n])"
)  # the last four: full width
"""Where a spreadsheet may see the beginning of a formula: at the beginning of a cell, and, since some countries' spreadsheets
separate cells by a semicolon and so do not see the quotes of a comma-separated file, after anything that may separate cells."""


def printable(text: str) -> str:
    """Returns the text as one line of printable characters.

    Names come from untrusted datasets and files: an escape sequence must not reach the terminal, nor a character that reverses
    the direction of writing the report.
    """
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def shortened(text: str, most: int = 500, end: int = 140) -> str:
    """Returns a text of at most `most` letters: if it is longer, its beginning and its last `end` letters.

    The end of an error message says what would be right.
    """
    return text if len(text) <= most else f"{text[: most - end - 3]} … {text[len(text) - end :]}"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a CSV table, the only way in which bdjax writes one.

    Text is always quoted. A spreadsheet would run text that starts with =, +, -, @ (in full width, too), a tab or the end of a
    line as a formula, so an apostrophe is put before it, with which spreadsheets show plain text; also within a text, after
    whatever may separate cells. Numbers are left as they are: -1.5 is no formula.

    Args:
        header: names of the columns.
        rows: cells: text, numbers, or None for an empty cell; anything else is written as its text.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([_inert(name) for name in header])
    writer.writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue()


def _inert(cell: Any) -> Any:
    if cell is None or isinstance(cell, numbers.Number):
        return cell
    return _FORMULA.sub(r"\1'", str(cell))
