"""findings.sarif: what a run found, in SARIF 2.1.0, the Static Analysis Results Interchange Format of OASIS.

A flagged image file is a physical location relative to the data folder, whose base is "DATA" and has no address, so that
these locations are the same wherever the data is. Rows without a file, classes and models are logical locations.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from bdjax.evaluation.model_audit import RANDOM, REVERSED
from bdjax.reporting.audit_verdict import TRIGGER, WEAK, capital
from bdjax.reporting.evidence.subject import Facts, Flagged, Subject
from bdjax.reporting.model_verdict import random_text
from bdjax.reporting.sections import most_suspicious
from bdjax.run.text import printable

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
DATA = "DATA"
RULES: Mapping[str, tuple[str, str, str]] = {
    "flagged-row": (
        "warning",
        "A training row is flagged",
        "A detector names this row as one that may be poisoned. Clean rows can be flagged, and poisoned rows can be missed.",
    ),
    "class-with-pattern": (
        "error",
        "A class has a pattern that may be a trigger",
        "A detector extracted a pattern that turns rows of other classes into this class. Weak evidence has the level warning.",
    ),
    "model-with-trigger": (
        "error",
        "A model has a reversed trigger that control networks do not share",
        "A small mask and pattern turn held-out rows into a class on this model and not on clean networks of its architecture.",
    ),
    "backdoor-remains": (
        "error",
        "A backdoor remains after a defense",
        "The attack success rate after the defense is above the thresholds in verdict.json. Level warning: it is weakened.",
    ),
    "not-tested": (
        "none",
        "Something could not be tested",
        "No finding was possible here, so nothing follows from there being none.",
    ),
}
"""Rule -> default level, name, and description."""
_REMAINS = {"kept": "error", "weakened": "warning"}


def build(results: Mapping[str, Any], verdict: Mapping[str, Any], facts: Facts, subject: Subject) -> dict[str, Any]:
    """The content of findings.sarif.

    Args:
        results: of results.json.
        verdict: from `verdict.build`.
        facts: the run.
        subject: what it is about.
    """
    found = [*_rows(subject), *_classes(results), *_models(results), *_remaining(results, verdict), *_open(results)]
    run = {
        "tool": {"driver": _driver(verdict)},
        "invocations": [
            {
                "executionSuccessful": True,
                "exitCode": verdict["exit_code"],
                "commandLine": facts.command,
                "endTimeUtc": facts.time,
            }
        ],
        "originalUriBaseIds": {
            DATA: {"description": {"text": "The folder of the data: the path that was given as --dataset."}}
        },
        "results": found,
        "columnKind": "unicodeCodePoints",
        "properties": {
            "statement": verdict["statement"],
            "verdict": verdict["verdict"],
            "settings_sha256": verdict["run"]["settings_sha256"],
        },
    }
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def _driver(verdict: Mapping[str, Any]) -> dict[str, Any]:
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": f"{name}."},
            "fullDescription": {"text": text},
            "defaultConfiguration": {"level": level},
        }
        for rule, (level, name, text) in RULES.items()
    ]
    version = verdict["tool"]["version"]
    return {"name": "bdjax", **({"version": version} if version else {}), "rules": rules}


def _result(
    rule: str, text: str, locations: list[dict[str, Any]], level: str = "", fingerprint: str = "", **properties: Any
) -> dict[str, Any]:
    level = level or RULES[rule][0]
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        # A result of another kind than "fail" has no level.
        "kind": "open" if level == "none" else "fail",
        "level": level,
        "message": {"text": printable(text)},
        "locations": locations,
        **({"partialFingerprints": {"bdjax/v1": fingerprint}} if fingerprint else {}),
        **({"properties": properties} if properties else {}),
    }


def _logical(name: str, kind: str, *parents: str) -> dict[str, Any]:
    full = "/".join(map(printable, (*parents, name)))
    return {"logicalLocations": [{"name": printable(name), "fullyQualifiedName": full, "kind": kind}]}


def uri_of(name: str) -> str:
    """A file's name, relative to the data folder, as a relative URI; names need not be UTF-8."""
    return quote(os.fsencode(name))


def _rows(subject: Subject) -> Iterator[dict[str, Any]]:
    for found in subject.flagged:
        yield from _rows_of(found)


def _rows_of(found: Flagged) -> Iterator[dict[str, Any]]:
    rows, scores = found.dataset, found.scores
    order = most_suspicious(found.flags, scores, len(rows)) if scores is not None else range(len(rows))
    for row in (int(row) for row in order if found.flags[row]):
        label = rows.class_title(rows.labels[row])
        # Six digits: the rest is noise.
        score = None if scores is None else float(f"{scores[row]:.6g}")
        what = f"row {row}"
        location = _logical(what, "row", rows.name, f"class {label}")
        if rows.files:
            what += f", {rows.files[row]},"
        if rows.files and not rows.records:
            location["physicalLocation"] = {"artifactLocation": {"uri": uri_of(rows.files[row]), "uriBaseId": DATA}}
        text = f"{found.title} flags {what} of class {label}" + ("." if score is None else f" with score {score:g}.")
        fingerprint = f"{found.title}: {rows.files[row] if rows.files else row}"
        yield _result(
            "flagged-row",
            text,
            [location],
            fingerprint=printable(fingerprint),
            row=row,
            **{"class": int(rows.labels[row])},
            score=score,
        )


def _classes(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in results.get("classes", ()):
        if entry["finding"] not in (TRIGGER, WEAK):
            continue
        is_certain = entry["finding"] == TRIGGER
        text = f"A pattern of {entry['mask_pixels']} pixels turns {entry['pattern_success']:.1%} of other rows into "
        text += entry["title"] + ("." if is_certain else f"; the evidence is weak: {'; '.join(entry['against'])}.")
        location = _logical(entry["title"], "class", results["dataset"])
        level = "error" if is_certain else "warning"
        yield _result("class-with-pattern", text, [location], level, fingerprint=f"class {entry['class']}")


def _models(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for model in results.get("models", ()):
        for entry in (entry for entry in model["classes"] if entry["class"] in model["found"]):
            texts = []
            if REVERSED in entry["by"]:
                texts.append(
                    f"A mask of {entry['norm']:.1f} pixels turns {entry['success']:.1%} of held-out rows into "
                    f"{entry['title']}, and {entry['transfer']:.1%} on control networks; p = {entry['p_value']:.2g}."
                )
            if RANDOM in entry["by"]:
                texts.append(f"{capital(random_text(entry))}.")
            text = " ".join(texts)
            location = _logical(entry["title"], "class", model["title"])
            fingerprint = printable(f"{model['title']}: class {entry['class']}")
            yield _result("model-with-trigger", text, [location], fingerprint=fingerprint)


def _remaining(results: Mapping[str, Any], verdict: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    titles = {entry["attack"]: entry["title"] for entry in results["attacks"]}
    titles |= {entry["method"]: entry["title"] for entry in results["methods"]}
    for entry in verdict["outcomes"]:
        if level := _REMAINS.get(entry["word"]):
            method, attack = titles[entry["method"]], titles[entry["attack"]]
            text = f"{method} on {attack}: the backdoor is {entry['word']}."
            yield _result("backdoor-remains", text, [_logical(method, "method", attack)], level)


def _open(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What could not be tested."""
    for entry in results.get("not_tested", ()):
        reasons = (
            [entry["reason"]] if entry["reason"] else [f"class {name} {why}" for name, why in entry["classes"].items()]
        )
        for reason in reasons:
            yield _result("not-tested", f"{entry['title']}: {reason}.", [_logical(entry["title"], "method")])
    for model in results.get("models", ()):
        if model["outcome"] == "could not be tested":
            text = f"{model['title']}: {model['reason']}."
            yield _result("not-tested", text, [_logical(model["title"], "model")])
