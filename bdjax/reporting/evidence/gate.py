"""Compares a verdict.json with limits. A number that is unknown never passes."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bdjax.datasets.files import read_file, read_json
from bdjax.errors import InputError
from bdjax.reporting.evidence.verdict import NAME, VERSION, WORDS, of_subject
from bdjax.reporting.evidence.writing import SUMS
from bdjax.run.text import printable
from bdjax.settings import check_choice

STATUSES = {"pass": 0, "fail": 3, "unknown": 4}
"""Exit status of each outcome; of several rules that of a failed one, then that of an unknown one."""
_MAXIMUM_BYTES = 1 << 28
_MAXIMUM_ROWS = 1 << 53
_NUMBERS = ("value", "control")
_SHARES = ("asr", "cda", "r_acc")
"""Metrics between 0 and 1."""


class Line(NamedTuple):
    """What became of a rule."""

    outcome: Literal["pass", "fail", "unknown"]
    text: str


def read(path: Path) -> dict[str, Any]:
    """Read a verdict.json, and compare it with the SHA256SUMS beside it if there are any.

    Raises:
        InputError: it is no verdict.json of this version, or is not the file that was written.
    """
    try:
        data, verdict = read_json(path, _MAXIMUM_BYTES, "files of evidence", strict=True)
        if wrong := _mistake(verdict):
            raise InputError(f"{path}: {wrong}")
    except InputError as error:
        raise InputError(f"{error}; a verdict.json that --evidence has written is needed") from error
    sums = path.parent / SUMS
    if sums.is_file():
        lines = read_file(sums, 1 << 20, "checksums").decode("utf-8", "replace").splitlines()
        of_file = [line.split(maxsplit=1)[0] for line in lines if line.endswith((f"  {path.name}", f" *{path.name}"))]
        if of_file and of_file != [hashlib.sha256(data).hexdigest()]:
            raise InputError(f"{path}: is not the file that {SUMS} beside it names; it was changed or is damaged")
    return verdict


def _mistake(verdict: Any) -> str:
    """What makes a document no verdict.json; "" for nothing."""
    if not isinstance(verdict, dict) or verdict.get("schema") != NAME:
        return "is no verdict"
    if verdict.get("schema_version") != VERSION:
        return f"has version {verdict.get('schema_version')!r} of the schema, not {VERSION}"
    word = verdict.get("verdict")
    if not isinstance(word, dict) or word.get("word") not in WORDS:
        return "has no verdict that is known"
    entries = verdict.get("metrics")
    if not isinstance(entries, list) or not all(map(_is_metric, entries)):
        return "has metrics of another form"
    return ""


def _is_metric(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    texts = all(isinstance(entry.get(name), str) for name in ("metric", "of", "method", "attack", "role", "why"))
    rows = entry.get("rows")
    counts = rows is None or (isinstance(rows, int) and not isinstance(rows, bool) and 0 <= rows < _MAXIMUM_ROWS)
    limit = 1.0 if entry.get("metric") in _SHARES else math.inf
    return texts and counts and all(_is_number(entry.get(name, math.nan), limit) for name in _NUMBERS)


def _is_number(value: Any, limit: float) -> bool:
    """Whether a value is null or a finite number: from 0 to the limit, if there is one."""
    if value is None:
        return True
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and (limit == math.inf or 0 <= value <= limit)
    except OverflowError:  # a whole number of many digits
        return False


def decide(
    verdict: Mapping[str, Any],
    *,
    max_asr: float | None = None,
    min_cda: float | None = None,
    words: Sequence[str] = (),
    method: str = "",
) -> list[Line]:
    """Compare a verdict with limits.

    Args:
        verdict: from `read`.
        max_asr: the highest ASR of what the run is about, under any attack, means over seeds.
        min_cda: the lowest CDA.
        words: the verdicts that pass; () for any.
        method: a method or model of the run instead of those that it is about.

    Returns:
        A line for each rule.

    Raises:
        InputError: no rule, a word that no verdict has, or a method that the run has not.
    """
    if max_asr is None and min_cda is None and not words:
        raise InputError("no rule; give --max-asr, --min-cda or --require-verdict")
    for word in words:
        check_choice("--require-verdict", word, WORDS)
    entries = of_subject(verdict["metrics"], method)
    if method and not entries:
        known = dict.fromkeys(entry["method"] for entry in verdict["metrics"])
        raise InputError(f"--method {method!r} is not in the verdict; it has {', '.join(known) or 'no metrics'}")
    lines = []
    if max_asr is not None:
        lines.append(_limit(f"--max-asr={max_asr:g}", "asr", entries, max_asr, 1))
    if min_cda is not None:
        lines.append(_limit(f"--min-cda={min_cda:g}", "cda", entries, min_cda, -1))
    if words:
        lines.append(_word(verdict, words))
    return lines


def _limit(rule: str, name: str, entries: Sequence[Mapping[str, Any]], limit: float, sign: int) -> Line:
    """A rule on the worst of the metrics of a name: the largest with sign 1, the smallest with -1."""
    found = [entry for entry in entries if entry["metric"] == name]
    known = [entry for entry in found if entry["value"] is not None]
    unknown = [entry for entry in found if entry["value"] is None]
    worst = max(known, key=lambda entry: sign * entry["value"], default=None)
    if worst is not None and sign * worst["value"] > sign * limit:
        return Line("fail", f"{rule}: {_text(worst)}")
    if unknown:
        text = f"{name} of {unknown[0]['of']} is unknown ({unknown[0]['why']})"
        more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return Line("unknown", printable(f"{rule}: {text}{more}; an unknown number never passes"))
    if worst is None:
        return Line("unknown", f"{rule}: the verdict has no {name} of what the run is about")
    of_all = f", the {'largest' if sign > 0 else 'smallest'} of {len(known)}" if len(known) > 1 else ""
    return Line("pass", f"{rule}: {_text(worst)}{of_all}")


def _text(entry: Mapping[str, Any]) -> str:
    control = "unknown" if entry["control"] is None else f"{entry['control']:.4g}"
    rows = entry.get("rows")
    count = "rows unknown" if rows is None else f"{rows} rows"
    return printable(f"{entry['metric']} of {entry['of']} is {entry['value']:.4g} (control {control}, {count})")


def _word(verdict: Mapping[str, Any], words: Sequence[str]) -> Line:
    word = verdict["verdict"]["word"]
    rule = f"--require-verdict={','.join(words)}"
    if word in words:
        return Line("pass", f"{rule}: the verdict is {word}")
    outcome = "unknown" if word in ("could not be tested", "not measured") else "fail"
    return Line(outcome, f"{rule}: the verdict is {word}")


def status_of(lines: Sequence[Line]) -> int:
    """The exit status of a gate, see `STATUSES`."""
    outcomes = {line.outcome for line in lines}
    return next(STATUSES[outcome] for outcome in ("fail", "unknown", "pass") if outcome in outcomes)
