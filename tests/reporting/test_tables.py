import io
import math
import re
import statistics

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from bdjax.reporting.tables import (
    Table,
    cells,
    format_cell,
    mean_and_spread,
    number_columns,
    to_markdown,
    to_rich,
    widths,
)
from bdjax.run.text import printable

TABLE = Table(
    "Results",
    ("model", "CDA", "ASR", "parameters", "needs"),
    (
        ("clean", "0.953 ± 0.004", 0.0061, 1_234_567, "nothing"),
        ("a|b <script>", 0.5, None, 10, "clean data"),
        ("student", "–", np.float32(0.25), np.int64(7), ""),
    ),
    notes="CDA: clean data accuracy.",
    row_styles=("", "paper", "ours"),
)


def columns_of(line: str) -> list[str]:
    return line.replace(r"\|", "¦").strip("|").split("|")


def test_spread_is_the_sample_standard_deviation():
    values = [0.948, 0.957, 0.951]
    assert mean_and_spread(values) == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert mean_and_spread([0.0, 1.0], decimals=2) == "0.50 ± 0.71"
    assert mean_and_spread(np.array([0.25, 0.25], np.float32)) == "0.250 ± 0.000"


def test_one_value_has_no_spread_and_no_value_is_unknown():
    assert mean_and_spread([0.953]) == "0.953"
    assert mean_and_spread([]) == mean_and_spread(None) == mean_and_spread([0.9, None]) == "–"
    assert mean_and_spread([0.9, math.nan]).startswith("nan")


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.95349, "0.953"), (21282122, "21,282,122"), (None, "–"), (True, "yes"), (math.nan, "nan"), ("a\nb", "a b")],
)
def test_cells(cell, text):
    assert format_cell(cell) == text


def test_names_from_outside_become_one_printable_line():
    assert printable("cat\x1b[2J\u202edog\r\n\tbird") == "cat\ufffd[2J\ufffddog bird"


def test_columns_of_numbers_are_found():
    assert number_columns(TABLE) == (False, True, True, True, False)
    units = Table("", ("a", "b", "c", "d"), (("14.2 s", "−3 %", "7 teachers", None), ("1e-05", "< 0.01", "3", None)))
    assert number_columns(units) == (True, True, False, False)
    assert number_columns(Table("", ("a", "b"), ())) == (False, False)
    pairs = Table("", ("a", "b"), (("0.953 / 0.012", "yes / no"), ("0.9 / –", "0.9 / no")))
    assert number_columns(pairs) == (True, False)


def test_markdown_has_aligned_columns():
    title, lines, notes = to_markdown(TABLE).strip().split("\n\n")
    lines = lines.split("\n")
    assert title == "**Results**"
    assert notes == "CDA: clean data accuracy."
    assert len(lines) == 2 + len(TABLE.rows)
    assert {len(columns_of(line)) for line in lines} == {len(TABLE.header)}
    assert len({cell_len(line) for line in lines}) == 1
    assert [column.strip().endswith(":") for column in columns_of(lines[1])] == list(number_columns(TABLE))
    assert columns_of(lines[2])[3].endswith(" 1,234,567 ")


def test_markdown_escapes_what_would_break_it_and_marks_rows():
    text = to_markdown(TABLE)
    assert "<script>" not in text
    assert r"*a\|b &lt;script>*" in text
    assert "**0.250**" in text
    assert "****" not in text  # an empty cell of a marked row stays empty


def test_rich_shows_every_cell_and_takes_nothing_for_markup():
    table = Table("[red]title", ("name", "value"), (("[bold]x[/nonsense]", 0.5), ("\x1b[31mred", 12.25)), "[dim]notes")
    stream = io.StringIO()
    Console(file=stream, width=100).print(to_rich(table))
    text = stream.getvalue()
    for part in ("[red]title", "[bold]x[/nonsense]", "0.500", "12.250", "[dim]notes"):
        assert part in text
    assert "\x1b" not in text


WIDE = Table(
    "Results",
    ("method", "attack", "CDA", "ASR", "ASR control", "reference model parameters", "needs", "verdict"),
    (
        (
            "teacher-aggregation student",
            "badnets",
            "0.953 ± 0.004",
            "0.953 ± 0.004",
            0.1,
            1_234_567,
            "clean rows",
            "kept",
        ),
        ("reference", "blended and sig", "0.950 ± 0.012", "0.003 ± 0.001", None, 12, "attacked model", "removed"),
    ),
    notes="CDA: clean data accuracy. " * 5,
)


@pytest.mark.parametrize("width", [60, 80, 100, 160, 400])
def test_no_word_and_no_number_is_cut_off_on_a_terminal(width):
    stream = io.StringIO()
    Console(file=stream, width=width).print(to_rich(WIDE), highlight=False)
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width and "…" not in stream.getvalue()
    words = " ".join(re.split(r"[\s│┃]+", stream.getvalue()))
    for name in WIDE.header:
        assert all(word in words.split() for word in name.split())
    for row, style in zip(cells(WIDE), WIDE.rows, strict=True):
        for text, cell in zip(row, style, strict=True):
            parts = [text] if not isinstance(cell, str) or "±" in cell else text.split()
            assert all(any(part in line for line in lines) for part in parts), text
    starts = [line for line in lines if line.startswith("│ reference ")]
    assert len(starts) == {60: 3, 80: 2, 100: 2, 160: 1, 400: 1}[width]  # columns that do not fit follow below


def test_only_a_very_long_word_is_broken():
    stream = io.StringIO()
    table = Table("", ("name", "a", "b"), (("x" * 100, 1, 2),))
    Console(file=stream, width=80).print(to_rich(table))
    assert stream.getvalue().count("x") == 100 and max(map(cell_len, stream.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": (("a",),)}, "row 0 has 1 cells, the header has 2"),
        ({"row_styles": ("paper",)}, "1 row styles for 0 rows"),
        ({"rows": (("a", 1),), "row_styles": ("bold",)}, r"row styles \['bold'\] are not among"),
    ],
)
def test_malformed_tables_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Table(**{"title": "t", "header": ("a", "b"), "rows": (), **fields})


def test_the_room_that_a_table_needs():
    numbers = Table("", ("a", "b"), (("x", "0.953 ± 0.004"), ("y", "0.9 ± 0.1")))
    assert widths(numbers) == (1 + 2.5 + 5 + 2.5, 1 + 2.5 + 13 + 2.5)
    texts = Table("", ("defense",), (("a text of several words in a line",),))
    assert widths(texts) == (12 + 2.5, 20 + 2.5)
    assert widths(Table("", ("nothing",), ())) == (7 + 2.5, 7 + 2.5)
    assert widths(Table("", (), ())) == (0, 0)
