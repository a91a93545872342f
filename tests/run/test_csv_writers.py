"""No table that bdjax writes has a cell that a spreadsheet would run."""

import csv
import io
import re

import numpy as np
import pytest

from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant
from bdjax.reporting.sections import scores_csv
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, Unread
from bdjax.workflows import base
from bdjax.workflows.cleaned_copy import write_rows

HOSTILE = ("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "a;=1", "a,=1", "\uff1d1", " =1")
ROWS = len(HOSTILE)


def hostile() -> Dataset:
    """Rows whose files, classes and unread files all have names that are formulas."""
    images, labels = np.zeros((ROWS, 4, 4, 3), np.uint8), np.arange(ROWS, dtype=np.int32)
    files, unread = tuple(f"{name}/{name}.png" for name in HOSTILE), tuple(Unread(name, name) for name in HOSTILE)
    return Dataset(images, labels, ROWS, "own", "own/", HOSTILE, files=files, unread=unread)


def rows_lists(folder: RunFolder) -> None:
    flags, scores = np.arange(ROWS) % 2 == 0, np.linspace(-1, 1, ROWS)
    write_rows(folder, hostile(), flags, scores, likely=np.arange(ROWS)[::-1])


def unread_list(folder: RunFolder) -> None:
    base.write_results(folder, {"verdict_free": True, "left_out": {}, "attacks": []}, hostile())


def scores_list(folder: RunFolder) -> None:
    suspect = Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), 0, hostile(), (), None)
    folder.write_text("scores.csv", scores_csv(suspect, np.ones(ROWS, bool), np.linspace(-1, 1, ROWS)))


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (rows_lists, {"flagged.csv", "rows.csv", "kept.csv"}),
        (unread_list, {"not_read.csv"}),
        (scores_list, {"scores.csv"}),
    ],
)
def test_every_writer_neutralises_every_text(tmp_path, write, names):
    write(RunFolder(tmp_path, is_new=True))
    files = {path.name: path.read_bytes().decode() for path in tmp_path.glob("*.csv")}
    assert files.keys() == names
    for text in files.values():
        for separator in (",", ";"):  # as a spreadsheet of any country may read the file
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
            cells = [cell.strip() for row in rows for cell in row]
            assert len(cells) > 3
            harmful = [cell for cell in cells if re.match("[=+\\-@\uff1d]", cell) and not is_number(cell)]
            assert not harmful


def is_number(cell: str) -> bool:
    try:
        float(cell.split(",")[0])
    except ValueError:
        return False
    return True
