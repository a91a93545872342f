"""model_card.md: the evidence of verdict.json for people."""

from collections.abc import Mapping
from typing import Any

from bdjax.reporting.evidence.verdict import SUBJECT
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.text import printable

_SPECIAL = "`*_[]>#!"
"""What Markdown may take for more than a letter, beside what ends a cell or begins HTML."""
_MOST_ROWS = 200
"""Most metrics in the table; verdict.json has all."""


def build(verdict: Mapping[str, Any]) -> str:
    """The content of model_card.md.

    Args:
        verdict: from `verdict.build`.
    """
    run, tool, word = verdict["run"], verdict["tool"], verdict["verdict"]
    seeds = ", ".join(map(str, run["seeds"]))
    parts = [
        f"# {_text(run['title'])}",
        _text(verdict["statement"]),
        f"**Evidence for: {_text(word['headline'])}**",
        *(_text(paragraph) for paragraph in word["text"].split("\n\n") if paragraph.strip()),
        _list(
            f"Verdict: {word['word']} (exit code {verdict['exit_code']})",
            f"Kind of run: {run['kind']}, `{run['experiment']}`",
            f"Time: {verdict['time']}",
            f"bdjax {tool['version'] or '(version unknown)'}, revision {tool['git_revision'] or 'unknown'}",
            f"SHA-256 of the settings: `{run['settings_sha256']}`",
            f"Seeds: {seeds}",
        ),
        "## Data and models",
        _list(*map(_data, verdict["data"]), *map(_suspect, verdict["suspect_models"])),
        "## Numbers",
        to_markdown(_table(verdict), _SPECIAL),
        "## What the numbers mean",
        _list(*(f"`{name}`: {_text(text)}" for name, text in verdict["definitions"].items())),
        "## Thresholds",
        _list(*(f"`{name}` = {entry['value']:g}: {entry['meaning']}" for name, entry in verdict["thresholds"].items())),
        "## Limits",
        _list(*map(_text, verdict["limits"])) or "None are recorded beyond those in the text above.",
        "## The same run again",
        f"```sh\n{printable(run['command'])}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _text(text: str) -> str:
    """Text from data and models as one line in which Markdown and HTML have no meaning."""
    return "".join(f"\\{letter}" if letter in f"\\<|{_SPECIAL}" else letter for letter in printable(text))


def _list(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _data(entry: Mapping[str, Any]) -> str:
    shape = "×".join(map(str, entry["image_shape"]))
    return (
        f"{entry['part'].capitalize()}: {_text(entry['name'])}, {entry['rows']:,} images of {shape}, "
        f"{len(entry['classes'])} classes, from {_text(entry['source'])}; SHA-256 of the rows `{entry['sha256']}`"
    )


def _suspect(entry: Mapping[str, Any]) -> str:
    return f"Third-party model {_text(entry['name'])}; SHA-256 `{entry['sha256']}`"


def _table(verdict: Mapping[str, Any]) -> Table:
    entries = sorted(verdict["metrics"], key=lambda entry: entry["role"] != SUBJECT)
    rows = tuple(
        (
            entry["of"],
            entry["role"],
            entry["metric"],
            *(entry[name] for name in ("value", "control", "standard_deviation")),
            None if entry["rows"] is None else f"{entry['rows']:,}",
            entry["why"],
        )
        for entry in entries[:_MOST_ROWS]
    )
    notes = "Control: the same measurement where no backdoor can be. Rows: what the value is a share of."
    if len(entries) > _MOST_ROWS:
        notes += f" {len(entries) - _MOST_ROWS:,} more are in verdict.json."
    header = ("of", "role", "metric", "value", "control", "standard deviation", "rows", "why unknown")
    return Table("", header, rows, notes)
