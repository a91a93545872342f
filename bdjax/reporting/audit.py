"""The report on an audit: what a detector finds in the user's own rows, as numbers, tables, verdict, pictures and page.

The ground truth is usually unknown here. So the numbers are the evidence for each class, and the verdict is careful: a class
"carries a trigger" if the detector extracted a pattern for it and there is no evidence against that pattern. A detector that
extracts no patterns only flags rows, and the verdict claims no more than that. The evidence behind the flags is shown for VBD
(p-values); the page does not know how to read that of other detectors.

Below the run folder, `page` writes the pictures, some of which are in the report, and for each class with a pattern:

    triggers/class-3-trigger.png          the pattern, transparent outside its mask; -mask.png; -example-1.png
"""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from bdjax import types
from bdjax.evaluation.measure import measure_by_class, not_tested_of, score_detection
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NOT_TESTED, DefenseVariant
from bdjax.inspection.extracted_triggers import LEAST_SIDE, enlarge, on_grey, outlined, pattern_pictures
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.report import Figure, Report, Section, Verdict
from bdjax.reporting.sections import Entry, most_suspicious, section
from bdjax.reporting.tables import Cell, Table
from bdjax.run.folder import RunFolder
from bdjax.run.text import printable
from bdjax.types import Dataset, Detection, ExtractedPattern, PoisonedDataset

WEAK_SUCCESS, WEAK_SHARE = 0.5, 0.005
"""A pattern is weak evidence if it turns less than the first share of other rows into its class (stricter than the paper's
least success), or if less than the second share of its class's rows is flagged; ours."""
ALMOST_ALL, CROWDED = 0.9, 2.0
"""It is also weak evidence if more than the first share of the class's rows is flagged, unless the class has more rows than the
second times the median class; ours. Mislabelled poisoned rows come in addition to a class's own rows. So if a class of ordinary
size is flagged almost entirely, the pattern is more likely a common feature of its images, which happens on clean digits."""
MOST_OF_A_CLASS = 0.5
"""A class with more than this share of its rows flagged is mentioned in the caveats."""
MOST_NAMED, MOST_LISTED = 4, 40
"""Most classes that a sentence names, and that a table lists."""
TRIGGER, WEAK, NONE = "trigger", "weak", "none"
"""The possible findings for a class."""
MEASURED = ("flagged", "precision", "recall", "f1", "auc")
"""The numbers on the flags; all but the first need the ground truth."""
VBD_NOT_FOUND = (
    "This method cannot find triggers that move or change from row to row (dynamic and sample-specific triggers), triggers on "
    "rows that keep their own label (clean-label attacks), or rare triggers."
)
NOT_FOUND = (
    "A detector finds the kind of attack that it was designed for; rows that it does not flag may be poisoned, too."
)
"""The same for every other detector."""
EXAMPLES, MOST_CLASSES = 3, 8
"""Flagged rows of each class that are shown with the trigger outlined, and most classes whose triggers, examples and histograms
are in the report; the folder triggers/ has all."""
PICTURES, PER_LINE = 24, 6
"""Suspicious rows shown in the report, and in one line of it."""
MOST_REASONS = 5
"""Most files that the report names as not copied."""


def class_title(number: int, name: str = "") -> str:
    """ "class 3 (cat)", or "class 3" where the class has no name but its number."""
    return f"class {types.class_title(number, name)}"


def names_of(dataset: Dataset) -> tuple[str, ...]:
    """The name of each class, or "class 3" where it has none."""
    return dataset.class_names or tuple(class_title(number) for number in range(dataset.num_classes))


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(suspect: Suspect, detection: Detection, variant: DefenseVariant, seed: int = 0) -> dict[str, Any]:
    """All numbers of an audit.

    Args:
        suspect: the rows; if it is known which of them are poisoned, the flags are compared with that.
        detection: the detection for this suspect alone: M = 1.
        variant: the detector.
        seed: of the run.

    Returns:
        The schema of `bdjax.reporting.results` with one attack, that of the rows, and one method, the detector; in addition
        the verdict and the numbers of each class. The same for the same inputs.
    """
    if len(detection.flags) != 1:
        raise ValueError(f"the detection has {len(detection.flags)} training sets; it must have exactly 1")
    dataset, flags, settings = suspect.dataset, detection.flags[0], variant.settings
    limits = not_tested_of(detection, 0)
    is_tested = not limits.reason
    networks = _networks(detection, settings)
    accuracies = detection.evidence["accuracies"][0].tolist() if networks else []
    tree = schema.summarise(
        score_detection(detection, [suspect], variant, 0.0),
        *(MEASURED, MEASURED, 0, seed, {}, {}),
        detector=variant.defense.title,
        dataset=dataset.name,
        rows=len(dataset),
        flagged=int(flags.sum()) if is_tested else None,
        flagged_share=float(flags.mean()) if is_tested else None,
        image_shape=list(dataset.image_shape),
        networks=[{"network": network, "accuracy": share} for network, share in zip(networks, accuracies, strict=True)],
        extracts_patterns=bool(detection.patterns),
        classes=[_class_numbers(dataset, detection, settings, number) for number in range(dataset.num_classes)],
        detection=measure_by_class(suspect, detection) if is_tested else None,
    )
    return {"verdict": asdict(verdict(tree)), **tree, "caveats": caveats(tree)}


def _networks(detection: Detection, settings: Any) -> list[str]:
    """Names of VBD's simple networks; empty for other detectors."""
    return settings.layers if "p_values" in detection.evidence else []


def _class_numbers(dataset: Dataset, detection: Detection, settings: Any, number: int) -> dict[str, Any]:
    in_class = dataset.labels == number
    limits = not_tested_of(detection, 0)
    untested = in_class.any() and (limits.classes.get(number) or limits.reason)
    found, name = pattern_of(detection, number), dataset.class_names[number] if dataset.class_names else ""
    numbers: dict[str, Any] = {
        "class": number,
        "name": name,
        "title": class_title(number, name),
        "rows": int(in_class.sum()),
        "flagged": None if untested else int(detection.flags[0, in_class].sum()),
        "not_tested": untested or None,
    }
    if networks := _networks(detection, settings):
        p_values, success = (detection.evidence[name][0, :, number].tolist() for name in ("p_values", "success"))
        numbers["p_values"] = dict(zip(networks, p_values, strict=True))
        # Without a candidate pattern nothing is tested: the success is unknown, not 0.
        rates = [rate if p < settings.p_value else None for p, rate in zip(p_values, success, strict=True)]
        numbers["success"] = dict(zip(networks, rates, strict=True))
    if detection.patterns:
        numbers |= {
            "network": found.network if found else None,
            "pattern_success": found.success if found else None,
            "mask_pixels": int(found.mask.sum()) if found else None,
            "detector_accuracy": found.accuracy if found else None,
        }
    usual = float(np.median(np.bincount(dataset.labels, minlength=dataset.num_classes)))
    against = _reasons_against(numbers, getattr(settings, "least_accuracy", 0.0), usual) if found else []
    return numbers | {"finding": (WEAK if against else TRIGGER) if found else NONE, "against": against}


def pattern_of(detection: Detection, number: int) -> ExtractedPattern | None:
    """The pattern extracted for a class; None if there is none."""
    patterns = detection.patterns[0] if detection.patterns else ()
    return next((pattern for pattern in patterns if pattern.label == number), None)


def _reasons_against(entry: Entry, least_accuracy: float, usual: float) -> list[str]:
    """Reasons why the pattern of a class is weak evidence; `usual` is the median number of rows of a class."""
    texts = []
    if entry["detector_accuracy"] is not None and entry["detector_accuracy"] < least_accuracy:
        texts.append(
            f"its detector has accuracy {entry['detector_accuracy']:.2f}, below {least_accuracy:g}, and is not used"
        )
    elif entry["flagged"] < WEAK_SHARE * entry["rows"] or not entry["flagged"]:
        texts.append(f"{entry['flagged'] or 'none'} of its {entry['rows']:,} rows {_are(entry['flagged'])} flagged")
    elif entry["flagged"] > ALMOST_ALL * entry["rows"] and entry["rows"] <= CROWDED * usual:
        texts.append(
            f"{entry['flagged']:,} of its {entry['rows']:,} rows are flagged, as if the pattern were what the class looks like"
        )
    if entry["pattern_success"] < WEAK_SUCCESS:
        texts.append(f"its pattern turns {_percent(entry['pattern_success'])} of other rows")
    return texts


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f} %"


def found_classes(results: Entry, finding: str = "") -> list[Entry]:
    """Classes with a pattern, in order of increasing p-values.

    Args:
        results: from `summarise`.
        finding: `TRIGGER` or `WEAK`; by default both, triggers before weak evidence.
    """
    wanted = [finding] if finding else [TRIGGER, WEAK]
    shown = [entry for entry in results["classes"] if entry["finding"] in wanted]
    return sorted(shown, key=lambda entry: (wanted.index(entry["finding"]), _smallest_p_value(entry)))


def _smallest_p_value(entry: Entry) -> float:
    """The smallest p-value of an entry of "classes"; 1 if the detector has none."""
    return min(entry["p_values"].values()) if "p_values" in entry else 1.0


def untested(results: Entry) -> list[Entry]:
    """Classes with rows that could not be tested."""
    return [entry for entry in results["classes"] if entry["not_tested"]]


def reason_of(results: Entry) -> str:
    """Why nothing could be tested; "" if something could be."""
    return next((entry["reason"] for entry in results.get("not_tested", ())), "")


FOUND, COULD_NOT_BE_TESTED = 3, 4
"""Exit statuses of an audit that flags rows or finds a pattern, and of one that could test nothing; 0 if nothing was found."""


def exit_status(results: Entry) -> int:
    """The exit status of a run of detectors: see `FOUND`. Always 0 for results that are not an audit's."""
    if "verdict" not in results:
        return 0
    if reason_of(results):
        return COULD_NOT_BE_TESTED
    return FOUND if results["flagged"] or found_classes(results) else 0


def verdict(results: Entry) -> Verdict:
    """Put the numbers of `summarise` into words."""
    if reason := reason_of(results):
        title = _capital(results["not_tested"][0]["title"])
        text = "Nothing is known about these rows: this is no sign that they are clean, nor that they are poisoned."
        return Verdict("info", f"{title} {NOT_TESTED}: {reason}.", text)
    if not results["extracts_patterns"]:
        return _verdict_on_flags(results)
    certain, weak = found_classes(results, TRIGGER), found_classes(results, WEAK)
    flagged = f"{results['flagged']:,} of {results['rows']:,} rows {_are(results['flagged'])} flagged"
    text = "\n\n".join([*_evidence(results, certain or weak), *_rest(results)])
    if certain:
        verb = "carries" if len(certain) == 1 else "carry"
        return Verdict("attacked", f"{_listed(certain)} {verb} a trigger: {flagged}.", text)
    if weak:
        headline = f"{_listed(weak)} may carry a trigger, but the evidence is weak: {flagged}."
        return Verdict("warning", headline, text)
    tested = " that could be tested" if untested(results) else ""
    return Verdict("info", f"No class{tested} has a trigger that this method can find.", text)


def _verdict_on_flags(results: Entry) -> Verdict:
    """The verdict of a detector without patterns: how many rows are flagged, and in which class most of them are."""
    name, rows, flagged = _capital(results["detector"]), results["rows"], results["flagged"]
    if not flagged:
        missing = untested(results)
        tested = " that could be tested" if missing else ""
        count = rows - sum(entry["rows"] for entry in missing)
        return Verdict("info", f"{name} flags none of the {count:,} rows{tested}.", "\n\n".join(_rest(results)))
    most = max(results["classes"], key=lambda entry: entry["flagged"] or 0)
    text = (
        f"{most['flagged']:,} of the flagged rows are in {most['title']}: {_percent(most['flagged'] / most['rows'])} of its "
        f"{most['rows']:,} rows. This detector extracts no trigger, so look at the rows to see whether it is right."
    )
    headline = f"{name} flags {flagged:,} of {rows:,} rows ({_percent(flagged / rows)})."
    return Verdict("warning", headline, "\n\n".join([text, *_rest(results)]))


def detector_of(results: Entry) -> Entry:
    """The entry of the one method of an audit."""
    return results["methods"][0]


def _limits(results: Entry) -> str:
    return VBD_NOT_FOUND if results["networks"] else NOT_FOUND


def _listed(classes: Sequence[Entry]) -> str:
    if len(classes) > MOST_NAMED:
        return f"{len(classes)} classes"
    names = [entry["title"].removeprefix("class ") for entry in classes]
    if len(names) == 1:
        return f"Class {names[0]}"
    return f"Classes {', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _evidence(results: Entry, classes: Sequence[Entry]) -> list[str]:
    height, width, _ = results["image_shape"]
    lines = []
    for entry in classes[:MOST_NAMED]:
        p_value = f"p-value {_smallest_p_value(entry):.2g}; " if "p_values" in entry else ""
        share = f" ({_percent(entry['flagged'] / entry['rows'])})" if entry["flagged"] else ""
        lines.append(
            f"{_capital(entry['title'])}: a pattern of {entry['mask_pixels']:,} of {height * width:,} pixels turns "
            f"{_percent(entry['pattern_success'])} of other rows into this class; {p_value}{entry['flagged']:,} of "
            f"its {entry['rows']:,} rows are flagged{share}."
        )
    if weak := found_classes(results, WEAK):
        doubts = "; ".join(f"{entry['title']} ({', '.join(entry['against'])})" for entry in weak[:MOST_NAMED])
        more = f"; and {len(weak) - MOST_NAMED} more" if len(weak) > MOST_NAMED else ""
        lines.append(f"Weak evidence: {doubts}{more}.")
    return lines


def _rest(results: Entry) -> list[str]:
    """What belongs to every verdict: the ground truth, if known, and the limits of the method."""
    texts = []
    if results["detection"]:
        overall = results["detection"][0]
        if overall["poisoned"]:
            texts.append(
                f"The ground truth is known here: {overall['hits']:,} of {overall['poisoned']:,} poisoned rows are flagged, "
                f"and {overall['flagged'] - overall['hits']:,} of {overall['rows'] - overall['poisoned']:,} clean rows."
            )
        else:
            texts.append(
                "The ground truth is known here: no row is poisoned"
                + (", so this is a false alarm." if overall["flagged"] else ".")
            )
    is_silent = not (found_classes(results) or (results["flagged"] and not results["extracts_patterns"]))
    start = "This does not mean that the rows are clean. " if is_silent else "Other rows may be poisoned, too. "
    return [*texts, start + _limits(results)]


def caveats(results: Entry) -> list[str]:
    """Caveats for the reader, one or two sentences each."""
    if reason_of(results):
        return [_limits(results)]
    texts = [_limits(results)]
    if results["flagged"] and not results["detection"]:
        texts.append(
            "The ground truth is unknown: some of the flagged rows may be clean, and some poisoned rows may not be flagged."
        )
    if not results["extracts_patterns"]:
        texts.append(
            "A detector that flags a fixed share of the rows does so even if none is poisoned; see its settings."
        )
    large = [entry for entry in results["classes"] if (entry["flagged"] or 0) > MOST_OF_A_CLASS * entry["rows"]]
    if large:
        texts.append(
            f"{_listed(large)}: more than half of the rows are flagged. Look at them before removing them; the remaining rows "
            "may be too few to learn the class from."
        )
    not_compared = untested(results)
    if not_compared:
        texts.append(
            f"{_listed(not_compared)} {NOT_TESTED}; {not_compared[0]['title']} {not_compared[0]['not_tested']}. A trigger of "
            "such a class goes unnoticed."
        )
    if found_classes(results):
        texts.append(
            "A feature that all rows of a class share, such as a watermark or a border, looks like a trigger to this method: "
            "compare the pattern with the images."
        )
    return texts


# ---- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Entry) -> Table:
    """The evidence for each class: classes with a pattern first, then by smallest p-value or number of flagged rows."""
    found = found_classes(results)
    without_pattern = [entry for entry in results["classes"] if entry["finding"] == NONE]
    by_flags = not results["networks"]
    ordered = [
        *found,
        *sorted(without_pattern, key=lambda entry: -(entry["flagged"] or 0) if by_flags else _smallest_p_value(entry)),
    ]
    shown = ordered[: max(MOST_LISTED, len(found))]
    columns: dict[str, list[Cell]] = {"class": [_capital(entry["title"]) for entry in shown]}
    notes = []
    if results["extracts_patterns"]:
        words = {TRIGGER: "trigger", WEAK: "weak", NONE: "no"}
        columns["trigger"] = ["not tested" if entry["not_tested"] else words[entry["finding"]] for entry in shown]
    flagged = ["not tested" if entry["not_tested"] else entry["flagged"] for entry in shown]
    columns |= {"rows": [entry["rows"] for entry in shown], "flagged": flagged}
    if networks := [network["network"] for network in results["networks"]]:
        settings = detector_of(results)["settings"]
        columns["p-value"] = [" / ".join(f"{entry['p_values'][name]:.2g}" for name in networks) for entry in shown]
        columns["success"] = [" / ".join(_rate(entry["success"][name]) for name in networks) for entry in shown]
        notes.append(
            f"Networks in this order: {' / '.join(networks)}. p-value: below {settings['p_value']:g}, the class's most and "
            "least confidently predicted rows use their most important pixel differently. Success: share of rows of other "
            "classes that the extracted pattern turns into this class; a pattern is kept if it is at least "
            f"{settings['least_success']:g}. Detector: accuracy on rows with and without the pattern; below "
            f"{settings['least_accuracy']:g} it flags nothing."
        )
    if results["extracts_patterns"]:
        columns["kept from" if networks else "network"] = [entry["network"] for entry in shown]
        columns["pixels"] = [entry["mask_pixels"] for entry in shown]
        columns["detector"] = [_rate(entry["detector_accuracy"]) for entry in shown]
    else:
        known = [entry["rows"] and entry["flagged"] is not None for entry in shown]
        columns["share flagged"] = [
            entry["flagged"] / entry["rows"] if is_known else None for entry, is_known in zip(shown, known, strict=True)
        ]
    if missing := untested(results):
        notes.append(f"{_listed(missing)}: {NOT_TESTED}.")
    if len(ordered) > len(shown):
        notes.append(f"{len(shown)} of {len(ordered)} classes; results.json has all.")
    return Table("Evidence for each class", tuple(columns), tuple(zip(*columns.values(), strict=True)), " ".join(notes))


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def detector_table(results: Entry) -> Table:
    """The detector, its inputs, and the facts that it reports, unless the page shows them elsewhere."""
    detector, (cell,) = detector_of(results), results["cells"]
    rows: list[tuple[Cell, ...]] = [
        ("detector", results["detector"]),
        ("paper", detector["paper"]),
        ("receives", ", ".join(detector["needs"])),
    ]
    if not results["networks"]:
        rows += [(name, f"{value['mean']:.4g}") for name, value in cell["facts"].items()]
    return Table("The detector", ("property", "value"), tuple(rows))


def networks_table(results: Entry) -> Table | None:
    """VBD's simple networks and their training accuracy; None for other detectors."""
    if not results["networks"]:
        return None
    kept = [entry["network"] for entry in results["classes"]]
    rows = [
        (network["network"], network["accuracy"], kept.count(network["network"])) for network in results["networks"]
    ]
    notes = (
        "Their accuracy should be low: a simple network is then confident only about easy features, such as a trigger."
    )
    return Table("The simple networks", ("network", "training accuracy", "patterns kept"), tuple(rows), notes)


def truth_table(results: Entry) -> Table | None:
    """Flags against the ground truth; None if it is unknown."""
    if not results["detection"]:
        return None
    names = {entry["class"]: _capital(entry["title"]) for entry in results["classes"]}
    columns = ("rows", "poisoned", "flagged", "hits", "precision", "recall", "f1", "auc")
    rows: list[tuple[Cell, ...]] = [
        ("All rows" if entry["class"] is None else names[entry["class"]], *(entry[column] for column in columns))
        for entry in results["detection"]
    ]
    header = ("class", "rows", "poisoned", "flagged", "both", "precision", "recall", "F1", "AUC")
    return Table(
        "Flags against the ground truth",
        header,
        tuple(rows),
        "Rows with a trigger under their own label count as clean.",
    )


# ---- The page -------------------------------------------------------------------------------------------------------


def page(folder: RunFolder, results: Entry, suspect: Suspect, detection: Detection) -> Report:
    """Write the pictures into the folder and assemble the page.

    Args:
        folder: the open run.
        results: from `summarise`, with a description of the cleaned copy under "cleaned".
        suspect: the rows.
        detection: the detection that `results` summarises.
    """
    dataset = suspect.dataset
    write_triggers(folder, dataset, detection)
    tables = [main_table(results), networks_table(results), detector_table(results)]
    suspicious = [] if reason_of(results) else suspicious_figures(folder, dataset, detection)
    return Report(
        title=f"Audit of {printable(dataset.name)}",
        verdict=Verdict(**results["verdict"]),
        key_numbers=_key_numbers(results),
        sections=(
            Section("What to do next", "\n\n".join(next_steps(results))),
            *section("Evidence", tables),
            *section("Against the ground truth", [truth_table(results)]),
            *section("Triggers", [], trigger_figures(folder, dataset, detection, results)),
            *section("Examples", [], example_figures(folder, dataset, detection, results)),
            *section("Scores", [], score_figures(folder, dataset, detection, results)),
            *section("The most suspicious rows", [], suspicious),
            Section("Caveats", "\n\n".join(results["caveats"])),
        ),
        settings={results["detector"]: detector_of(results)["settings"]},
    )


def _key_numbers(results: Entry) -> dict[str, str]:
    shown = {
        "detector": results["detector"],
        "rows": f"{results['rows']:,}",
        "rows flagged": NOT_TESTED
        if reason_of(results)
        else f"{results['flagged']:,} ({100 * results['flagged_share']:.1f} %)",
    }
    if results["extracts_patterns"]:
        certain, weak = (len(found_classes(results, finding)) for finding in (TRIGGER, WEAK))
        shown["classes with a trigger"] = f"{certain:,} of {len(results['classes']):,}"
        if weak:
            shown["with weak evidence"] = f"{weak:,}"
    measured = results["detection"][0] if results["detection"] else {}
    return shown | {name: f"{measured[name]:.3f}" for name in ("precision", "recall") if measured.get(name) is not None}


def next_steps(results: Entry) -> list[str]:
    """What the owner of the rows can do now, as paragraphs."""
    if reason_of(results):
        return [
            "Run the audit again with more rows, with other settings, or with a detector that needs fewer. Nothing is known "
            "about these rows."
        ]
    level, cleaned = results["verdict"]["level"], results["cleaned"]
    costs = "Removing clean rows costs a little accuracy; training on poisoned rows may give an attacker control of the model."
    if level == "attacked":
        first = (
            "Compare the triggers and the examples below with your own images. If they do not belong there, remove the rows in "
            "flagged.csv and train again from the start. Do not use a model that was trained on all of these rows, and find "
            "out where the flagged rows came from."
        )
    elif results["flagged"] and not results["extracts_patterns"]:
        first = f"Look at the rows in flagged.csv, and at the most suspicious rows below, before you decide. {costs}"
    elif found_classes(results) and results["flagged"]:
        first = f"Look at the triggers below and at the rows in flagged.csv before you decide. {costs}"
    elif found_classes(results):
        first = (
            "Look at the triggers below. If they do not belong on your images, look through the rows of these classes: "
            "rows.csv lists them by score, although none of them is flagged."
        )
    elif level == "warning":
        first = "Run the audit again with more rows of each class, or with other networks."
    else:
        first = "There are no rows to remove. A detector of another kind may find what this one does not."
    texts = [first]
    if cleaned["kind"] == "npz":
        texts.append(
            f"cleaned.npz has the {cleaned['rows']:,} rows that are not flagged: images, labels, and row, their original "
            "numbers."
        )
    elif cleaned["kind"] == "folder":
        texts.append(
            f"cleaned/ has copies of {cleaned['copied']:,} of the {cleaned['rows']:,} files that are not flagged."
        )
        texts += _not_copied(cleaned)
    emptied = [entry for entry in results["classes"] if entry["rows"] and entry["flagged"] == entry["rows"]]
    if emptied:
        names = ", ".join(entry["title"] for entry in emptied[:MOST_REASONS]) + (
            " ..." if emptied[MOST_REASONS:] else ""
        )
        texts.append(f"Every row of {names} is flagged: without these rows the class is gone. Look at them first.")
    if results["flagged"]:
        texts.append(
            "flagged.csv lists the flagged rows, most suspicious first; kept.csv the other rows; rows.csv every row."
        )
    return texts


def _not_copied(cleaned: Entry) -> list[str]:
    texts = []
    for names, text in (
        ([f"{entry['file']} ({entry['why']})" for entry in cleaned["left_out"]], "Not copied"),
        (cleaned["strangers"], "Files below cleaned/ that this run did not put there"),
    ):
        if names:
            shown = "; ".join(map(printable, names[:MOST_REASONS]))
            more = f"; and {len(names) - MOST_REASONS:,} more, in results.json" if len(names) > MOST_REASONS else ""
            texts.append(f"{text}: {shown}{more}.")
    return texts


# ---- Pictures -------------------------------------------------------------------------------------------------------


def write_triggers(folder: RunFolder, dataset: Dataset, detection: Detection) -> None:
    """Write the pictures in triggers/, for each class with a pattern."""
    scale = -(-LEAST_SIDE // max(dataset.image_shape[:2]))
    for pattern in detection.patterns[0] if detection.patterns else ():
        images = dataset.images[example_rows(dataset, detection, pattern.label)]
        for name, pixels in pattern_pictures(pattern, images, scale).items():
            folder.write_bytes(f"triggers/class-{pattern.label}-{name}.png", _png(pixels))


def example_rows(dataset: Dataset, detection: Detection, number: int) -> np.ndarray:
    """Flagged rows of a class by decreasing score: int [at most `EXAMPLES`]."""
    rows = np.flatnonzero(detection.flags[0] & (dataset.labels == number))
    return rows[np.argsort(-detection.scores[0, rows], kind="stable")][:EXAMPLES]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _cut(shown: Sequence[Any]) -> str:
    return f" {MOST_CLASSES} of {len(shown)} classes." if len(shown) > MOST_CLASSES else ""


def trigger_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """Pattern and mask of each class with a pattern, two classes to a line."""
    found = found_classes(results)
    if not found:
        return []
    scale = _drawn_scale(dataset, 256)
    images, captions = [], []
    for entry in found[:MOST_CLASSES]:
        extracted, weak = pattern_of(detection, entry["class"]), ", weak" if entry["finding"] == WEAK else ""
        drawn = on_grey(extracted.pattern, extracted.mask), extracted.mask[..., None]
        images += [enlarge(image, scale) for image in drawn]
        captions += [
            f"{entry['title']}: trigger{weak}",
            f"mask: {entry['mask_pixels']:,} of {extracted.mask.size:,}",
        ]
    images, captions = (
        [values[start : start + 4] for start in range(0, len(values), 4)] for values in (images, captions)
    )
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("triggers.png"))
    caption = (
        "The extracted triggers, grey where transparent, and their masks. Colours are means over the rows that the network "
        "predicts most confidently, so those of a blended trigger are washed out." + _cut(found)
    )
    return [Figure(path, caption, "The extracted trigger of each suspicious class and its mask.")]


def example_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """Flagged rows of each class, without and with the pixels of the trigger outlined."""
    found = [entry for entry in found_classes(results) if entry["flagged"]]
    if not found:
        return []
    scale = _drawn_scale(dataset, 192)
    images, captions = [], []
    for entry in found[:MOST_CLASSES]:
        rows, mask = example_rows(dataset, detection, entry["class"]), pattern_of(detection, entry["class"]).mask
        images.append([])
        captions.append([])
        for row in rows:
            image = dataset.images[row]
            images[-1] += [view / np.float32(255) for view in (enlarge(image, scale), outlined(image, mask, scale))]
            captions[-1] += [_row_name(dataset, row), f"score {detection.scores[0, row]:.2f}"]
    names = [entry["title"] for entry in found[:MOST_CLASSES]]
    path = plots.save(plots.image_grid(images, names, (), "", captions=captions), folder.file("examples.png"))
    caption = "Flagged rows, and the same rows with the pixels of the trigger outlined in red." + _cut(found)
    return [Figure(path, caption, "Flagged rows with the pixels of the trigger outlined.")]


def score_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """Histograms of the scores in each suspicious class; for a detector without patterns, in each class with flagged rows."""
    found = found_classes(results)
    if not results["extracts_patterns"]:
        found = sorted((entry for entry in results["classes"] if entry["flagged"]), key=lambda entry: -entry["flagged"])
    if not found:
        return []
    panels = []
    for entry in found[:MOST_CLASSES]:
        in_class = dataset.labels == entry["class"]
        truth = dataset.is_poisoned[in_class] if isinstance(dataset, PoisonedDataset) else None
        panels.append(plots.Scores(entry["title"], detection.scores[0, in_class], truth))
    path = plots.save(plots.score_histograms(panels), folder.file("scores.png"))
    if results["networks"]:
        caption = (
            "Scores of each class's rows by its detector, from 0 to 1. Rows with a score of at least 0.5 are flagged if the "
            "detector is used. Two separate peaks are clear evidence; a single peak is not."
        )
    else:
        caption = f"Scores that {results['detector']} gives the rows of each class; the higher, the more suspicious."
    return [Figure(path, caption + _cut(found), "Histograms of the scores of each suspicious class.")]


def suspicious_figures(folder: RunFolder, dataset: Dataset, detection: Detection) -> list[Figure]:
    """The most suspicious rows; no figure if no row is suspicious."""
    flags, scores = detection.flags[0], detection.scores[0]
    rows = most_suspicious(flags, scores, PICTURES)
    if detection.patterns:  # rows of a class without a pattern have score 0
        rows = rows[flags[rows] | (scores[rows] > 0)]
    if not len(rows):
        return []
    lines = [rows[start : start + PER_LINE] for start in range(0, len(rows), PER_LINE)]
    # The classes of digits are named 0 to 9.
    names = [class_title(i) if name == str(i) else name for i, name in enumerate(names_of(dataset))]
    scale = _drawn_scale(dataset, 176)
    images = [[enlarge(dataset.images[row], scale).astype(np.float32) / 255 for row in line] for line in lines]
    captions = [[f"{_row_name(dataset, row)}: {names[dataset.labels[row]]}" for row in line] for line in lines]
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("suspicious.png"))
    row_id = "file" if dataset.files else "number"
    caption = f"Flagged rows first, then other rows by score; below each its {row_id} and its class. rows.csv has all."
    return [Figure(path, caption, "The most suspicious rows.")]


def _drawn_scale(dataset: Dataset, side: int) -> int:
    """Factor by which images are enlarged before a grid draws them, so that small images stay large and lines sharp."""
    return max(1, side // max(dataset.image_shape[:2]))


def _row_name(dataset: Dataset, row: int) -> str:
    return PurePosixPath(dataset.files[row]).name if dataset.files else f"row {int(row)}"
