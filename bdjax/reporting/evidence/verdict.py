"""verdict.json: the verdict of a run, with every number that it rests on. `verdict.schema.json` is its JSON schema.

A metric is an entry with its value, its control (the same measurement where no backdoor can be) and the number of rows that it
is a share of; null is unknown, and "why" says why. Other files of the evidence repeat what is here.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bdjax import metrics
from bdjax.reporting import results as schema
from bdjax.reporting.audit_verdict import exit_status
from bdjax.reporting.evidence.subject import Facts, Subject
from bdjax.reporting.evidence.thresholds import thresholds
from bdjax.reporting.results import mean_of
from bdjax.settings import read_variant
from bdjax.types import Dataset

NAME, VERSION = "bdjax-verdict", "1.0"
STATEMENT = (
    "Evidence for a reviewer: what one run measured, beside its controls, and what it cannot show. It certifies nothing, and "
    "it is no proof that there is no backdoor."
)
SUBJECT, BASELINE, REFERENCE, OTHER = "subject", "baseline", "reference", "other"
"""Roles of a metric: of what the run is about, of no defense, of a network without a backdoor, of a method for comparison."""
UNKNOWN = "not measured"
DEFENSE_WORDS = ("nothing to remove", "removed", "removed at a cost", UNKNOWN, "weakened", "kept")
DETECTION_WORDS = ("found", UNKNOWN, "partly", "missed")
"""From the best to the worst: what is unknown may be as bad as what is known to be bad."""
OUTCOMES = ("found", "nothing found", "could not be tested")
WORDS = tuple(dict.fromkeys((*OUTCOMES, *DEFENSE_WORDS, *DETECTION_WORDS)))
"""Every word that a verdict can have. Of several outcomes it is the worst."""
DEFINITIONS = {
    "rows_flagged_in_class": "share of the rows of a class that the detector flags",
    "pattern_success": "share of rows of other classes that the extracted pattern turns into the class",
    "planted_found": "share of the planted rows that the detector flags in a copy of the rows",
    "reversed_trigger_success": (
        "share of held-out rows of other classes that the reversed trigger turns into the class; its control is the mean of "
        "the same on the control networks. It is not the attacker's trigger"
    ),
    "reversed_trigger_p_value": (
        "share of networks, of the control networks and the model itself, with a class as outlying as this one"
    ),
    "random_trigger_success": (
        "share of held-out rows of other classes that the strongest tenth of a kind of random triggers turns into the class; "
        "its control is the mean of the same on the control networks"
    ),
    "random_trigger_p_value": (
        "p-value of a t-test of that difference beside the control networks, times the number of kinds and classes"
    ),
}
_SHARES_OF_TEST = ("cda", "asr", "r_acc")
_ALWAYS = ("cda", "asr")
_NO_TRIGGER = "the attacker's trigger, if there is one, is unknown"


def build(results: Mapping[str, Any], facts: Facts, subject: Subject) -> dict[str, Any]:
    """The content of verdict.json.

    Args:
        results: of results.json.
        facts: the run.
        subject: what it is about.
    """
    kind = kind_of(results)
    outcomes = _outcomes(results, subject)
    entries = list(_metrics(kind, results, subject))
    definitions = {**metrics.definitions("cda", "asr", "control_asr"), **results["definitions"], **DEFINITIONS}
    used = {"control_asr", *(entry["metric"] for entry in entries)}
    return {
        "schema": NAME,
        "schema_version": VERSION,
        "statement": STATEMENT,
        "time": facts.time,
        "tool": {
            "name": "bdjax",
            "version": facts.record.get("versions", {}).get("bdjax"),
            "git_revision": facts.record.get("git_revision"),
        },
        "run": {
            "experiment": facts.experiment,
            "kind": kind,
            "title": facts.title,
            "command": facts.command,
            "settings_sha256": _digest({"experiment": facts.experiment, "settings": facts.settings}),
            "seeds": list(results["seeds"]),
        },
        "verdict": {
            "word": _word(results, outcomes),
            "level": facts.verdict.level,
            "headline": facts.verdict.headline,
            "text": facts.verdict.text,
        },
        "exit_code": exit_status(results),
        "outcomes": outcomes,
        "metrics": entries,
        "thresholds": thresholds(kind),
        "definitions": {name: text for name, text in definitions.items() if name in used},
        "limits": schema.reservations(results),
        "data": [describe_rows(part, rows) for part, rows in subject.parts.items()],
        "suspect_models": [{"name": name, "sha256": digest} for name, digest in subject.suspects.items()],
        "files": dict(facts.files),
    }


def kind_of(results: Mapping[str, Any]) -> str:
    """What kind of run results.json is of: an audit of data or of models, detectors, or defenses."""
    if "outcome" in results:
        return "audit of models" if "models" in results else "audit of data"
    return "defenses" if schema.is_known(results, "cda") else "detectors"


def describe_rows(part: str, rows: Dataset) -> dict[str, Any]:
    """A dataset of the run. "sha256" is of its uint8 pixels [N, H, W, C] followed by its labels, int32, little-endian."""
    digest = hashlib.sha256(np.ascontiguousarray(rows.images))
    digest.update(np.ascontiguousarray(rows.labels.astype("<i4")))
    return {
        "part": part,
        "name": rows.name,
        "source": rows.source,
        "rows": len(rows),
        "image_shape": list(rows.image_shape),
        "classes": [rows.class_title(label) for label in range(rows.num_classes)],
        "sha256": digest.hexdigest(),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- Words ----------------------------------------------------------------------------------------------------------


def role_of(method: Mapping[str, Any], results: Mapping[str, Any], subject: Subject) -> str:
    """The role of a method of results.json."""
    if method["base"] == schema.NO_DEFENSE:
        return BASELINE
    if method["base"] == "clean":
        return REFERENCE
    bases = {entry["base"] for entry in results["methods"]}
    about = bases & set(subject.methods)
    # A method for comparison must not stand in for the one that could not be run.
    is_left_out = any(read_variant(name)[0] in subject.methods for name in results["left_out"])
    return SUBJECT if method["base"] in about or not (about or is_left_out) else OTHER


def _outcomes(results: Mapping[str, Any], subject: Subject) -> list[dict[str, Any]]:
    """The word for each cell of what the run is about, or for each model. An audit of data has only that of the verdict."""
    if "outcome" in results:
        return [{"model": model["title"], "word": model["outcome"]} for model in results.get("models", ())]
    found = []
    for cell, attack, method in schema.cells(results):
        if role_of(method, results, subject) != SUBJECT or method["method"] == subject.compared_with:
            continue
        word = subject.word_of(attack["attack"], method["method"])
        if word or not attack.get("is_clean", False):
            found.append({"attack": cell["attack"], "method": cell["method"], "word": word or UNKNOWN})
    return found


def _word(results: Mapping[str, Any], outcomes: Sequence[Mapping[str, Any]]) -> str:
    if "outcome" in results:
        return results["outcome"]
    order = DEFENSE_WORDS if kind_of(results) == "defenses" else DETECTION_WORDS
    return max((entry["word"] for entry in outcomes), key=order.index, default=UNKNOWN)


# ---- Metrics --------------------------------------------------------------------------------------------------------


def metric(
    name: str,
    of: str,
    value: float | None,
    *,
    method: str,
    attack: str = "",
    role: str = SUBJECT,
    control: float | None = None,
    rows: int | None = None,
    deviation: float | None = None,
    seeds: int = 1,
    why: str = "",
) -> dict[str, Any]:
    """An entry of "metrics".

    Args:
        name: a key of "definitions".
        of: what was measured, for people: "LfD on BadNets".
        value: a mean over seeds; None if it is unknown.
        method: the method or model, as results.json names it.
        attack: as results.json names it; "" for none.
        role: see `SUBJECT`.
        control: the same measurement where no backdoor can be; None if unknown.
        rows: the number of rows that the value is a share of; None if unknown.
        deviation: standard deviation over seeds; None for a single one.
        seeds: their number.
        why: why the value is unknown.
    """
    return {
        "metric": name,
        "of": of,
        "method": method,
        "attack": attack,
        "role": role,
        "value": value,
        "control": control,
        "rows": rows,
        "standard_deviation": deviation,
        "seeds": seeds,
        "why": (why or "not measured in this run") if value is None else "",
    }


def _metrics(kind: str, results: Mapping[str, Any], subject: Subject) -> Iterator[dict[str, Any]]:
    if kind == "audit of models":
        yield from _of_models(results, subject)
        return
    yield from _of_cells(kind, results, subject)
    if kind == "audit of data":
        yield from _of_classes(results)


def _of_cells(kind: str, results: Mapping[str, Any], subject: Subject) -> Iterator[dict[str, Any]]:
    for cell, attack, method in schema.cells(results):
        of = f"{method['title']} on {attack['title']}"
        common = {
            "method": cell["method"],
            "attack": cell["attack"],
            "role": role_of(method, results, subject),
            "seeds": len(cell["by_seed"]),
        }
        names = [name for name in cell["summary"] if name in metrics.DEFINITIONS and name != "control_asr"]
        for name in dict.fromkeys((*_ALWAYS, *names)):
            value = mean_of(cell, name)
            is_clean = attack.get("is_clean", False)
            if value is None and (name not in _ALWAYS or kind == "detectors" or (is_clean and name == "asr")):
                continue
            yield metric(
                name,
                of,
                value,
                control=_control(results, cell, name),
                rows=_rows(results, attack, cell, name, subject),
                deviation=(cell["summary"].get(name) or {}).get("standard_deviation"),
                why=_why(kind, name),
                **common,
            )


def _why(kind: str, name: str) -> str:
    if name == "asr":
        return _NO_TRIGGER
    return "an audit of data leaves no network" if kind == "audit of data" else ""


def _control(results: Mapping[str, Any], cell: Mapping[str, Any], name: str) -> float | None:
    """The same measurement where no backdoor can be: the control ASR; for other metrics the same method on a clean training
    set; for TA-KD, whose attack is on all teachers at once, the clean reference."""
    if name == "asr" and "control_asr" in cell["summary"]:
        return mean_of(cell, "control_asr")
    if cell["method"] != "clean" and (clean := schema.find(results, cell["attack"], "clean")):
        return mean_of(clean, name)
    for attack in results["attacks"]:
        if attack.get("is_clean") and attack["attack"] != cell["attack"]:
            return mean_of(schema.find(results, attack["attack"], cell["method"]), name)
    return None


def _rows(
    results: Mapping[str, Any], attack: Mapping[str, Any], cell: Mapping[str, Any], name: str, subject: Subject
) -> int | None:
    if name == "cda":
        return results["test_rows"] or None
    if name in _SHARES_OF_TEST or name.startswith("delta"):
        return subject.asr_rows.get(cell["attack"]) if name in _SHARES_OF_TEST else None
    counts = attack.get("num_poisoned" if name == "recall" else "num_rows") or [results.get("rows")]
    return counts[0] if name in ("flagged", "auc", "recall", "f1") else None


def _of_classes(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every class of an audit of data, and what became of planted triggers."""
    method = results["methods"][0]["method"]
    for entry in results["classes"]:
        if not entry["rows"]:
            continue
        share = None if entry["flagged"] is None else entry["flagged"] / entry["rows"]
        why = entry["not_tested"] or ""
        yield metric(
            "rows_flagged_in_class", entry["title"], share, method=method, rows=entry["rows"], why=f"the class {why}"
        )
        if entry.get("pattern_success") is not None:
            yield metric("pattern_success", entry["title"], entry["pattern_success"], method=method)
    for planted in results["sensitivity"]["sets"]:
        of = f"a {results['sensitivity']['trigger']} in {planted['planted']:,} rows of a copy"
        found = planted["hits"] / planted["planted"]
        yield metric("planted_found", of, found, method=method, rows=planted["planted"], role=REFERENCE)


def _of_models(results: Mapping[str, Any], subject: Subject) -> Iterator[dict[str, Any]]:
    held_out = subject.parts.get("held-out rows")
    counts = None if held_out is None else np.bincount(held_out.labels, minlength=held_out.num_classes)
    accuracy = results["controls"]["accuracy"] if results["controls"] else None
    for model in results["models"]:
        title = model["title"]
        yield metric(
            "cda", title, model["accuracy"], method=title, control=accuracy, rows=results["held_out_rows"] or None
        )
        yield metric("asr", title, None, method=title, why=_NO_TRIGGER)
        for entry in model["classes"]:
            of = f"{entry['title']} of {title}"
            others = None if counts is None else int(counts.sum() - counts[entry["class"]])
            yield metric(
                "reversed_trigger_success", of, entry["success"], method=title, control=entry["transfer"], rows=others
            )
            yield metric("reversed_trigger_p_value", of, entry["p_value"], method=title)
            if (random := entry["random_triggers"]) is not None:
                yield metric("random_trigger_success", of, random["success"], method=title, control=random["controls"])
                yield metric("random_trigger_p_value", of, random["p_value"], method=title)


def of_subject(entries: Iterable[Mapping[str, Any]], method: str = "") -> list[Mapping[str, Any]]:
    """The metrics of what the run is about, or of one of its methods or models."""
    return [entry for entry in entries if (entry["method"] == method if method else entry["role"] == SUBJECT)]
