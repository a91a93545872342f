"""Writes the evidence of a run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdjax.exchange.saved_model import ABOUT
from bdjax.reporting.evidence import bom, model_card, sarif
from bdjax.reporting.evidence import verdict as verdicts
from bdjax.reporting.evidence.subject import Facts, Subject
from bdjax.reporting.report import Verdict
from bdjax.run.clock import now
from bdjax.run.folder import RunFolder, to_plain

FOLDER, SUMS = "evidence", "SHA256SUMS"
FILES_OF_THE_RUN = ("results.json", "flagged.csv", "kept.csv", "rows.csv", "not_read.csv")
"""What the same run writes to the byte, wherever and whenever; other files have times and places."""


def write(
    folder: RunFolder,
    results: Mapping[str, Any],
    subject: Subject,
    verdict: Verdict,
    *,
    experiment: str,
    title: str,
    command: str,
    settings: Mapping[str, Any],
) -> Path:
    """Write evidence/ of a run whose other files are written.

    Args:
        folder: the open run.
        results: of results.json.
        subject: what the run is about.
        verdict: of the report.
        experiment: its name.
        title: of the report.
        command: that repeats the run.
        settings: every setting that numbers depend on.

    Returns:
        The folder.

    Raises:
        InputError: SOURCE_DATE_EPOCH is not a number of seconds.
    """
    facts = Facts(
        experiment,
        title,
        command,
        to_plain(settings),
        folder.record,
        verdict,
        now(),
        {name: sha256(folder.path / name) for name in FILES_OF_THE_RUN if (folder.path / name).is_file()},
        _networks(folder),
    )
    content = verdicts.build(results, facts, subject)
    files = {
        "verdict.json": _as_json(content),
        "findings.sarif": _as_json(sarif.build(results, content, facts, subject)),
        "bom.cdx.json": _as_json(bom.build(content, facts)),
        "model_card.md": model_card.build(content).encode("utf-8", "backslashreplace"),
    }
    for name, data in files.items():
        folder.write_bytes(f"{FOLDER}/{name}", data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    return folder.write_text(f"{FOLDER}/{SUMS}", sums).parent


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _networks(folder: RunFolder) -> dict[str, Mapping[str, Any]]:
    """The networks that the run has left, which it has written itself."""
    found = {}
    for path in sorted(folder.path.glob(f"models/**/{ABOUT}")):
        found[path.parent.relative_to(folder.path).as_posix()] = json.loads(path.read_text("utf-8"))
    return found


def _as_json(value: Any) -> bytes:
    text = json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
