import csv
import pathlib

import pytest

from bdjax.run import text
from bdjax.run.text import csv_text, printable, shortened


def test_printable_text_is_one_line_without_control_characters():
    assert printable("a\tb\nc") == "a b c"
    assert printable("a\x1b[31mb\u202ec") == "a\ufffd[31mb\ufffdc"


def test_a_shortened_text_keeps_its_beginning_and_its_end():
    text = "".join(map(str, range(1000)))
    short = shortened(text, 100, 30)
    assert len(short) == 100 and short.startswith(text[:60]) and short.endswith(text[-30:]) and " … " in short
    assert shortened(text[:100], 100, 30) == text[:100]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_text_that_a_spreadsheet_would_run_is_neutralised(start):
    name = f"{start}HYPERLINK(1)"
    assert csv_text(("a", "b"), [(name, -1.5)]) == f'"a","b"\n"\'{name}",-1.5\n'
    assert csv_text((name,), []).startswith(f'"\'{name}"')


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (" =1", " '=1"),
        ("a;=1.png", "a;'=1.png"),  # a second cell where cells are separated by semicolons
        ("a\n@x", "a\n'@x"),
        ("a-b=c+d@e", "a-b=c+d@e"),
        ("3,-4", "3,'-4"),
        (pathlib.PurePosixPath("=1"), "'=1"),
        ("-1.5", "'-1.5"),  # a class's name, not a number
    ],
)
def test_what_a_spreadsheet_may_take_for_a_cell_is_neutralised(name, written):
    assert csv_text(("a",), [(name,)]) == f'"a"\n"{written}"\n'


def test_commas_quotes_and_newlines_survive():
    cells = ["a,b", 'say "x"', "two\nlines", "lone\rreturn", "", "x=1", "é"]
    assert next(csv.reader([csv_text(cells, [])])) == cells
    rows = list(csv.reader(csv_text(["name"], [[cell] for cell in cells]).splitlines(keepends=True)))
    assert len(rows) >= len(cells)


def test_numbers_and_empty_cells_are_left_as_they_are():
    assert csv_text(("n",), [(-3,), (1e-05,), (None,)]) == '"n"\n-3\n1e-05\n""\n'


def test_nothing_else_writes_csv():
    root = pathlib.Path(text.__file__).parents[2]
    files = [*(root / "bdjax").rglob("*.py"), *(root / "experiments").glob("*.py")]
    writers = ("csv.writer", "DictWriter", "savetxt", "to_csv", "tofile")
    using = {path.name for path in files if any(word in path.read_text("utf-8") for word in writers)}
    assert using == {"text.py"}
