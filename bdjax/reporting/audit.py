"""The report on an audit: what a detector finds in the user's own rows, as numbers, tables, pictures and page.

The ground truth is usually unknown here, so the numbers are the evidence for each class. `bdjax/reporting/audit_verdict.py` has
the words. The evidence behind the flags is shown for VBD (p-values); the page does not know how to read that of other
detectors.

Below the run folder, `page` writes the pictures, some of which are in the report, and for each class with a pattern:

    triggers/class-3-trigger.png          the pattern, transparent outside its mask; -mask.png; -example-1.png
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from bdjax import types
from bdjax.datasets import overlap
from bdjax.defenses.vbd_patterns import SURE, sure_share
from bdjax.defenses.vbd_premise import LEARNED
from bdjax.evaluation.measure import measure_by_class, not_tested_of, score_detection, warning_of
from bdjax.evaluation.sensitivity import FOUND_SHARE, least_found
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NOT_TESTED, DefenseVariant
from bdjax.inspection.extracted_triggers import LEAST_SIDE, enlarge, on_grey, outlined, pattern_pictures
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.audit_verdict import (
    NONE,
    TRIGGER,
    UNCONFIRMED,
    WEAK,
    bound_text,
    capital,
    caveats,
    found_classes,
    is_or_are,
    listed,
    next_steps,
    outcome_of,
    percent,
    reason_of,
    smallest_p_value,
    untested,
    verdict,
)
from bdjax.reporting.report import Figure, Report, Section, Verdict
from bdjax.reporting.sections import Entry, most_suspicious, section
from bdjax.reporting.tables import Cell, Table
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.text import printable
from bdjax.types import Dataset, Detection, ExtractedPattern, PoisonedDataset

WEAK_SUCCESS, WEAK_SHARE = 0.5, 0.005
"""A pattern is weak evidence if it turns less than the first share of other rows into its class (stricter than the paper's
least success), or if less than the second share of its class's rows is flagged; ours."""
ALMOST_ALL, CROWDED = 0.9, 2.0
"""It is also weak evidence if more than the first share of the class's rows is flagged, unless the class has more rows than the
second times the median class; ours. Mislabelled poisoned rows come in addition to a class's own rows. So if a class of ordinary
size is flagged almost entirely, the pattern is more likely a common feature of its images, which happens on clean digits."""
LEAST_AGREEING = 2
"""It is also weak evidence if fewer of several networks have a working pattern of the class; ours, stricter than the paper,
where one is enough. One of three networks once had a pattern of a clean class, whose detector then flagged 445 clean rows. If
no row is flagged either, it is no finding; docs/results/vbd.md has how often such patterns occur without poison."""
MOST_LISTED = 40
"""Most classes that a table lists."""
MEASURED = ("flagged", "precision", "recall", "f1", "auc")
"""The numbers on the flags; all but the first need the ground truth."""
LEAST_SURE = 0.5
"""Weak evidence if fewer of a class's flagged rows have a score of `SURE`, whose docstring says what was measured."""
SCORE_BANDS = (0.5, 0.9, 0.95)
"""Lower ends of the bands of scores in which flagged rows are counted; the last one ends at 1."""
EXAMPLES, MOST_CLASSES = 3, 8
"""Flagged rows of each class that are shown with the trigger outlined, and most classes whose triggers, examples and histograms
are in the report; the folder triggers/ has all."""
PICTURES, PER_LINE = 24, 6
"""Suspicious rows shown in the report, and in one line of it."""
NO_SENSITIVITY = {"trigger": "", "target": "", "sets": [], "why": ""}
"""results["sensitivity"] of an audit whose sensitivity was neither measured nor asked for."""


def class_title(number: int, name: str = "") -> str:
    """ "class 3 (cat)", or "class 3" where the class has no name but its number."""
    return f"class {types.class_title(number, name)}"


def names_of(dataset: Dataset) -> tuple[str, ...]:
    """The name of each class, or "class 3" where it has none."""
    return dataset.class_names or tuple(class_title(number) for number in range(dataset.num_classes))


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(
    suspect: Suspect,
    detection: Detection,
    variant: DefenseVariant,
    seed: int = 0,
    *,
    preset: str = "paper",
    sensitivity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All numbers of an audit.

    Args:
        suspect: the rows; if it is known which of them are poisoned, the flags are compared with that.
        detection: the detection for this suspect alone: M = 1.
        variant: the detector.
        seed: of the run.
        preset: of the run.
        sensitivity: what became of a planted trigger: its name as "trigger", the title of the class that planted rows are
            labelled as ("target"), and the entries of `bdjax.evaluation.sensitivity.measure` as "sets"; without any, "why".

    Returns:
        The schema of `bdjax.reporting.results` with one attack, that of the rows, and one method, the detector; in addition
        the outcome, the verdict and the numbers of each class. The same for the same inputs.
    """
    if len(detection.flags) != 1:
        raise ValueError(f"the detection has {len(detection.flags)} training sets; it must have exactly 1")
    sensitivity = {**NO_SENSITIVITY, **(sensitivity or {})}
    dataset, settings, copies = suspect.dataset, variant.settings, overlap.copies(suspect.dataset)
    classes = _classes(dataset, detection, settings)
    findings = [entry for entry in classes if entry["finding"] in (TRIGGER, WEAK)]
    if (tested := judged(detection, sensitivity, has_findings=bool(findings))) is not detection:
        detection, classes = tested, _classes(dataset, tested, settings)
    flags = detection.flags[0]
    limits = not_tested_of(detection, 0)
    is_tested = not limits.reason
    smallest = variant.defense.smallest
    tree = schema.summarise(
        score_detection(detection, [suspect], variant, 0.0),
        *(MEASURED, MEASURED, 0, seed, {}, {}),
        detector=variant.defense.title,
        preset=preset,
        dataset=dataset.name,
        rows=len(dataset),
        copies=int(copies.is_copy.sum()),
        contradicted=int(copies.is_contradicted.sum()),
        unit="files" if dataset.files and not dataset.records else "rows",
        flagged=int(flags.sum()) if is_tested else None,
        flagged_share=float(flags.mean()) if is_tested else None,
        image_shape=list(dataset.image_shape),
        networks=_network_numbers(detection, settings),
        extracts_patterns=bool(detection.patterns),
        classes=classes,
        detection=measure_by_class(suspect, detection) if is_tested else None,
        score_bands=_score_bands(suspect, detection) if _networks(detection, settings) and is_tested else [],
        changed_settings=_changed_settings(variant),
        bound=smallest(settings) if smallest else None,
        sensitivity=sensitivity,
    )
    tree["outcome"] = outcome_of(tree)
    return {"verdict": asdict(verdict(tree)), **tree, "caveats": caveats(tree)}


def _classes(dataset: Dataset, detection: Detection, settings: Any) -> list[dict[str, Any]]:
    return [_class_numbers(dataset, detection, settings, number) for number in range(dataset.num_classes)]


def judged(detection: Detection, sensitivity: Mapping[str, Any], has_findings: bool) -> Detection:
    """The detection of one suspect, as a test that failed if nothing was found and nothing could be expected to be.

    That is so if the detector warns that its premise fails, or if it finds none of the planted triggers. Findings stay
    findings: a warning is then a caveat.
    """
    limits = not_tested_of(detection, 0)
    if limits.reason or detection.flags.any() or has_findings:
        return detection
    reason, sets = warning_of(detection, 0), sensitivity["sets"]
    if not reason and sets and not any(entry["found"] for entry in sets):
        most = max(entry["planted"] for entry in sets)
        reason = f"not even a {sensitivity['trigger']} that was planted in {most:,} rows of a copy was found"
    if not reason:
        return detection
    return detection._replace(not_tested=(limits._replace(reason=reason),), warnings=())


def _changed_settings(variant: DefenseVariant) -> list[dict[str, Any]]:
    """The detector's settings that are not the paper's."""
    settings, paper = to_plain(variant.settings), to_plain(variant.defense.settings)
    return [
        {"setting": name, "value": value, "paper": paper[name]}
        for name, value in settings.items()
        if value != paper[name]
    ]


def _network_numbers(detection: Detection, settings: Any) -> list[dict[str, Any]]:
    """Accuracy of each simple network on its training rows, and on the held-back rows where that is known."""
    networks = _networks(detection, settings)
    if not networks:
        return []
    accuracies = detection.evidence["accuracies"][0].tolist()
    held_back = detection.evidence.get("held_back_accuracies")
    known = [None] * len(networks) if held_back is None else np.asarray(held_back[0], float).tolist()
    return [
        {"network": network, "accuracy": accuracy, "held_back_accuracy": other}
        for network, accuracy, other in zip(networks, accuracies, known, strict=True)
    ]


def _score_bands(suspect: Suspect, detection: Detection) -> list[dict[str, Any]]:
    """How many flagged rows have a score in each of the `SCORE_BANDS`, and how many of these are poisoned, if known."""
    flags, scores, truth = detection.flags[0], detection.scores[0], suspect.is_poisoned
    bands = []
    for low, high in zip(SCORE_BANDS, (*SCORE_BANDS[1:], None), strict=True):
        rows = flags & (scores >= low) & (True if high is None else scores < high)
        bands.append(
            {
                "title": f"from {low:g} on" if high is None else f"from {low:g} to below {high:g}",
                "flagged": int(rows.sum()),
                "poisoned": None if truth is None else int((rows & truth).sum()),
            }
        )
    return bands


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
        works = [rate is not None and rate >= settings.least_success for rate in rates]
        numbers["pattern_p_value"] = min(compress(p_values, works), default=None)
        numbers["may_be_chance"] = bool(detection.evidence["may_be_chance"][0, number])
        numbers["agreeing"] = sum(works)
    if detection.patterns:
        scores = detection.scores[0, in_class]
        numbers |= {
            "network": found.network if found else None,
            "pattern_success": found.success if found else None,
            "mask_pixels": int(found.mask.sum()) if found else None,
            "detector_accuracy": found.accuracy if found else None,
            "sure": sure_share(scores) if found and networks and (scores >= 0.5).any() else None,
        }
    usual = float(np.median(np.bincount(dataset.labels, minlength=dataset.num_classes)))
    if not found or untested:
        return numbers | {"finding": NONE, "against": []}
    against = _reasons_against(numbers, getattr(settings, "least_accuracy", 0.0), usual)
    is_confirmed = numbers["flagged"] or not (numbers.get("may_be_chance") or _too_few_agree(numbers))
    return numbers | {"finding": UNCONFIRMED if not is_confirmed else WEAK if against else TRIGGER, "against": against}


def pattern_of(detection: Detection, number: int) -> ExtractedPattern | None:
    """The pattern extracted for a class; None if there is none."""
    patterns = detection.patterns[0] if detection.patterns else ()
    return next((pattern for pattern in patterns if pattern.label == number), None)


def _reasons_against(entry: Entry, least_accuracy: float, usual: float) -> list[str]:
    """Reasons why the pattern of a class is weak evidence; `usual` is the median number of rows of a class."""
    texts, is_unsure = [], entry["sure"] is not None and entry["sure"] < LEAST_SURE
    if entry["detector_accuracy"] is not None and entry["detector_accuracy"] < least_accuracy:
        texts.append(
            f"its detector has accuracy {entry['detector_accuracy']:.2f}, below {least_accuracy:g}, and is not used"
        )
    elif is_unsure and not entry["flagged"]:
        texts.append(
            f"its detector is unsure: {percent(entry['sure'])} of the rows that it recognises have a score of {SURE:g} or "
            "more, so none is flagged"
        )
    elif entry["flagged"] < WEAK_SHARE * entry["rows"] or not entry["flagged"]:
        texts.append(
            f"{entry['flagged'] or 'none'} of its {entry['rows']:,} rows {is_or_are(entry['flagged'])} flagged"
        )
    elif entry["flagged"] > ALMOST_ALL * entry["rows"] and entry["rows"] <= CROWDED * usual:
        texts.append(
            f"{entry['flagged']:,} of its {entry['rows']:,} rows are flagged, as if the pattern were what the class looks like"
        )
    if entry["pattern_success"] < WEAK_SUCCESS:
        texts.append(f"its pattern turns {percent(entry['pattern_success'])} of other rows")
    if entry["flagged"] and is_unsure:
        texts.append(f"{percent(entry['sure'])} of its flagged rows have a score of {SURE:g} or more")
    if entry.get("may_be_chance"):
        p_value = entry["pattern_p_value"]  # of networks whose pattern works; others may have a smaller one
        texts.append(f"its p-value of {p_value:.2g} may be chance among so many classes and networks")
    if _too_few_agree(entry):
        texts.append(f"only {entry['agreeing']} of {len(entry['success'])} networks has a working pattern")
    return texts


def _too_few_agree(entry: Entry) -> bool:
    networks = len(entry.get("success", ()))
    return networks >= LEAST_AGREEING > entry.get("agreeing", networks)


def method_of(results: Entry) -> Entry:
    """The entry of the one method of an audit."""
    return results["methods"][0]


# ---- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Entry) -> Table:
    """The evidence for each class: classes with a pattern first, then by smallest p-value or number of flagged rows."""
    found = found_classes(results)
    others = [entry for entry in results["classes"] if entry not in found]
    by_flags = not results["networks"]
    ordered = [
        *found,
        *sorted(others, key=lambda entry: -(entry["flagged"] or 0) if by_flags else smallest_p_value(entry)),
    ]
    shown = ordered[: max(MOST_LISTED, len(found))]
    columns: dict[str, list[Cell]] = {"class": [capital(entry["title"]) for entry in shown]}
    notes = []
    if results["extracts_patterns"]:
        words = {TRIGGER: "trigger", WEAK: "weak", UNCONFIRMED: "not confirmed", NONE: "none found"}
        columns["trigger"] = ["not tested" if entry["not_tested"] else words[entry["finding"]] for entry in shown]
    flagged = ["not tested" if entry["not_tested"] else entry["flagged"] for entry in shown]
    columns |= {"rows": [entry["rows"] for entry in shown], "flagged": flagged}
    if networks := [network["network"] for network in results["networks"]]:
        settings = method_of(results)["settings"]
        columns["p-value"] = [" / ".join(f"{entry['p_values'][name]:.2g}" for name in networks) for entry in shown]
        columns["success"] = [" / ".join(_rate(entry["success"][name]) for name in networks) for entry in shown]
        columns["agree"] = [f"{entry['agreeing']} of {len(networks)}" for entry in shown]
        notes.append(
            f"Networks in this order: {' / '.join(networks)}. p-value: below {settings['p_value']:g}, the class's most and "
            "least confidently predicted rows use their most important pixel differently. Success: share of rows of other "
            "classes that the extracted pattern turns into this class; a pattern is kept if it is at least "
            f"{settings['least_success']:g}. Agree: networks with such a pattern. Detector: accuracy on rows with and "
            f"without the pattern; below {settings['least_accuracy']:g} it flags nothing."
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
        notes.append(f"{listed(missing)}: {NOT_TESTED}.")
    if len(ordered) > len(shown):
        notes.append(f"{len(shown)} of {len(ordered)} classes; results.json has all.")
    return Table("Evidence for each class", tuple(columns), tuple(zip(*columns.values(), strict=True)), " ".join(notes))


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def detector_table(results: Entry) -> Table:
    """The detector, its inputs, and the facts that it reports, unless the page shows them elsewhere."""
    detector, (cell,) = method_of(results), results["cells"]
    rows: list[tuple[Cell, ...]] = [
        ("detector", results["detector"]),
        ("paper", detector["paper"]),
        ("receives", ", ".join(detector["needs"])),
    ]
    if not results["networks"]:
        rows += [(name, f"{value['mean']:.4g}") for name, value in cell["facts"].items()]
    return Table("The detector", ("property", "value"), tuple(rows))


def networks_table(results: Entry) -> Table | None:
    """VBD's simple networks and their accuracies; None for other detectors."""
    if not results["networks"]:
        return None
    kept = [entry["network"] for entry in results["classes"]]
    rows = [
        (network["network"], network["accuracy"], network["held_back_accuracy"], kept.count(network["network"]))
        for network in results["networks"]
    ]
    notes = (
        "Their accuracy should be low: a simple network is then confident only about easy features, such as a trigger. If "
        f"all of them reach {LEARNED:g} on held-back rows (on training rows where the former is unknown), the premise fails."
    )
    header = ("network", "accuracy, training rows", "accuracy, held-back rows", "patterns kept")
    return Table("The simple networks", header, tuple(rows), notes)


def sensitivity_table(results: Entry) -> Table | None:
    """What became of the planted trigger; None if none was planted."""
    sensitivity, unit = results["sensitivity"], results["unit"]
    if not sensitivity["sets"]:
        return None
    rows = [
        (
            entry["planted"],
            percent(entry["share"]),
            entry["hits"],
            entry["flagged"],
            entry["precision"],
            "yes" if entry["found"] else "no",
        )
        for entry in sensitivity["sets"]
    ]
    header = (f"planted {unit}", "share", "flagged of them", "flagged in all", "precision", "found")
    notes = (
        f"A {sensitivity['trigger']}, opaque, at the bottom right of rows of all other classes, labelled as "
        f"{sensitivity['target']}; the same detector and settings. Found: at least {percent(FOUND_SHARE)} of the planted "
        f"{unit} are flagged, and at least {percent(FOUND_SHARE)} of the flagged {unit} are planted. One choice of {unit} for "
        "each number."
    )
    return Table("A planted trigger", header, tuple(rows), notes)


def settings_table(results: Entry) -> Table | None:
    """The detector's settings that are not the paper's; None if all are."""
    rows = [tuple(map(str, entry.values())) for entry in results["changed_settings"]]
    return Table("Settings that are not the paper's", ("setting", "here", "paper"), tuple(rows)) if rows else None


def scores_table(results: Entry) -> Table | None:
    """Flagged rows by score; None for a detector whose scores are no probabilities, or if no row is flagged."""
    if not results["flagged"] or not results["score_bands"]:
        return None
    is_known = results["score_bands"][0]["poisoned"] is not None
    rows = [
        (capital(band["title"]), band["flagged"], *([band["poisoned"]] if is_known else []))
        for band in results["score_bands"]
    ]
    notes = (
        "The score is the probability that the detector of the row's class gives to the pattern being on the row. It was not "
        "compared with how often it is right. Look at the lowest scores first."
    )
    header = ("score", f"flagged {results['unit']}", *(["poisoned of them"] if is_known else []))
    return Table("Flagged rows by score", header, tuple(rows), notes)


def truth_table(results: Entry) -> Table | None:
    """Flags against the ground truth; None if it is unknown."""
    if not results["detection"]:
        return None
    names = {entry["class"]: capital(entry["title"]) for entry in results["classes"]}
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


def page(
    folder: RunFolder, results: Entry, suspect: Suspect, detection: Detection, planted: Suspect | None = None
) -> Report:
    """Write the pictures into the folder and assemble the page.

    Args:
        folder: the open run.
        results: from `summarise`, with a description of the cleaned copy under "cleaned".
        suspect: the rows.
        detection: the detection that `results` summarises.
        planted: a copy of the rows with a planted trigger, to be shown.
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
            *section(
                "What this run could find",
                [sensitivity_table(results), settings_table(results)],
                planted_figures(folder, dataset, planted, results) if planted else [],
                bound_text(results),
            ),
            *section("Evidence", tables),
            *section("Against the ground truth", [truth_table(results)]),
            *section("Triggers", [], trigger_figures(folder, dataset, detection, results)),
            *section("Examples", [], example_figures(folder, dataset, detection, results)),
            *section("Scores", [scores_table(results)], score_figures(folder, dataset, detection, results)),
            *section("The most suspicious rows", [], suspicious),
            Section("Caveats", "\n\n".join(results["caveats"])),
        ),
        settings={results["detector"]: method_of(results)["settings"]},
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
        shown["classes found with a trigger"] = f"{certain:,} of {len(results['classes']):,}"
        if weak:
            shown["with weak evidence"] = f"{weak:,}"
    if sets := results["sensitivity"]["sets"]:
        least = least_found(sets)
        shown["planted trigger found from"] = "–" if least is None else f"{least:,} {results['unit']}"
    measured = results["detection"][0] if results["detection"] else {}
    return shown | {name: f"{measured[name]:.3f}" for name in ("precision", "recall") if measured.get(name) is not None}


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


def planted_figures(folder: RunFolder, dataset: Dataset, planted: Suspect, results: Entry) -> list[Figure]:
    """Some rows with the planted trigger, each beside the unchanged row."""
    rows, versions = np.flatnonzero(planted.is_poisoned)[:EXAMPLES], (dataset.images, planted.dataset.images)
    scale = _drawn_scale(dataset, 176)
    images = [[enlarge(images[row], scale).astype(np.float32) / 255 for row in rows for images in versions]]
    captions = [[text for row in rows for text in (_row_name(dataset, row), "with the trigger")]]
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("planted.png"))
    caption = f"The {results['sensitivity']['trigger']} that was planted in copies of the rows. It is not in your data."
    return [Figure(path, caption, "Rows without and with the planted trigger.")]


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
