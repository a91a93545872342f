"""Phrases that readers found odd stay out of the code, the reports and the docs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = [
    *(
        path
        for folder in ("bdjax", "experiments")
        for ending in ("py", "j2")
        for path in (ROOT / folder).rglob(f"*.{ending}")
    ),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
]
INSTEAD = {
    "told": "given, or the name of the thing",
    "held against": "compared with",
    "handed over": "third-party, supplied",
    "put to the test": "evaluated",
    "likewise": "repeat the noun",
    "broke off": "failed",
    "done before": "restored from checkpoint",
    "nothing to choose": "say why it is skipped",
    "spill": "ASR outside",
    "pupils?": "students, learners",
    "somebody": "someone, or who it is",
}


@pytest.mark.parametrize("phrase", INSTEAD)
def test_odd_phrases_are_not_used(phrase):
    pattern = re.compile(rf"\b{phrase}\b", re.IGNORECASE)
    lines = ((path, line) for path in FILES for line in path.read_text("utf-8").splitlines())
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path, line in lines if pattern.search(line)]
    assert not found, f"write {INSTEAD[phrase]!r} instead:\n" + "\n".join(found)
