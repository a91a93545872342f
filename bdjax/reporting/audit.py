"""What a detector says about rows of one's own: the numbers, the tables, a sentence, the pictures, and the page.

Nobody knows here which rows are poisoned. So the numbers are the evidence for each class, and the sentence is careful: a class
"carries a trigger" if the detector extracted a pattern of it and nothing speaks against that pattern. A detector that extracts
no patterns only names rows, and the sentence says no more than that. What its flags rest on is shown where the page knows how
to read it, which it does of VBD's p-values.

Below the run folder, `page` writes the pictures, of which the report has some, and for each class with a pattern:

    triggers/class-3-trigger.png          the pattern, transparent where there is none; -mask.png; -example-1.png
"""

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from bdjax.evaluation.measure import measure_by_class, score_detection
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import DefenseVariant
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
"""A pattern that turns a smaller share of other rows than the first, which is above the paper's least success, is weak
evidence, and so is one that fewer of its class's rows carry than the second; ours."""
ALMOST_ALL, CROWDED = 0.9, 2.0
"""So is one that more of its class's rows carry than the first, unless the class has more rows than the second times the median
class; ours. Poisoned rows with a wrong label come on top of the class's own. So where nothing would be left of a class of
ordinary size, the pattern is more likely what its pictures have in common: on clean digits that happens."""
MOST_OF_A_CLASS = 0.5
"""A class that loses more than this share of its rows is pointed out."""
MOST_NAMED, MOST_LISTED = 4, 40
"""How many classes a sentence names, and how many a table lists."""
TRIGGER, WEAK, NONE = "trigger", "weak", "none"
"""What is said of a class."""
MEASURED = ("flagged", "precision", "recall", "f1", "auc")
"""What is known of the flags; all but the first only where it is known which rows are poisoned."""
VBD_NOT_FOUND = (
    "This method cannot find triggers that move or change from row to row (dynamic and sample-specific ones), triggers on rows "
    "that keep their own label (clean-label attacks), or rare ones."
)
NOT_FOUND = "A detector finds the kind of attack that it was made for; rows that it does not flag may be poisoned, too."
"""The same of every other detector."""
EXAMPLES, MOST_CLASSES = 3, 8
"""Flagged rows of a class that are shown with their malicious pixels outlined, and classes that the report draws triggers,
examples and histograms of; the folder triggers/ has all."""
PICTURES, PER_LINE = 24, 6
"""Suspicious rows that the report shows."""
MOST_REASONS = 5
"""Files that were not copied, named in the report."""


def class_title(number: int, name: str = "") -> str:
    """ "class 3 (cat)", or "class 3" where the class has no name but its number."""
    name = printable(name)
    return f"class {number} ({name})" if name and name != str(number) else f"class {number}"


def names_of(dataset: Dataset) -> tuple[str, ...]:
    """A name for each class: its own, or "class 3"."""
    return dataset.class_names or tuple(class_title(number) for number in range(dataset.num_classes))


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(suspect: Suspect, detection: Detection, variant: DefenseVariant, seed: int = 0) -> dict[str, Any]:
    """All numbers of one audit.

    Args:
        suspect: the rows; where it is known which of them are poisoned, what the flags are worth is measured.
        detection: of this one suspect: M = 1.
        variant: the detector.
        seed: of the run.

    Returns:
        The schema of `bdjax.reporting.results` with one attack, that of the rows, and one method, the detector; and beside it
        the verdict and the numbers of each class, in order. The same for the same inputs.
    """
    if len(detection.flags) != 1:
        raise ValueError(f"the detection is of {len(detection.flags)} training sets; it must be of one")
    dataset, flags, settings = suspect.dataset, detection.flags[0], variant.settings
    networks = _networks(detection, settings)
    accuracies = detection.evidence["accuracies"][0].tolist() if networks else []
    tree = schema.summarise(
        score_detection(detection, [suspect], variant, 0.0),
        *(MEASURED, MEASURED, 0, seed, {}, {}),
        detector=variant.defense.title,
        dataset=dataset.name,
        rows=len(dataset),
        flagged=int(flags.sum()),
        flagged_share=float(flags.mean()),
        image_shape=list(dataset.image_shape),
        networks=[{"network": one, "accuracy": share} for one, share in zip(networks, accuracies, strict=True)],
        extracts_patterns=bool(detection.patterns),
        classes=[_class_numbers(dataset, detection, settings, number) for number in range(dataset.num_classes)],
        detection=measure_by_class(suspect, detection),
    )
    words = verdict(tree)
    said = {"level": words.level, "headline": words.headline, "text": words.text}
    return {"verdict": said, **tree, "caveats": caveats(tree)}


def _networks(detection: Detection, settings: Any) -> list[str]:
    """Names of the networks that VBD's evidence is of; none of other detectors."""
    return settings.networks.split("+") if "p_values" in detection.evidence else []


def _class_numbers(dataset: Dataset, detection: Detection, settings: Any, number: int) -> dict[str, Any]:
    own = dataset.labels == number
    found, name = pattern_of(detection, number), dataset.class_names[number] if dataset.class_names else ""
    numbers: dict[str, Any] = {
        "class": number,
        "name": name,
        "title": class_title(number, name),
        "rows": int(own.sum()),
        "flagged": int(detection.flags[0, own].sum()),
    }
    if networks := _networks(detection, settings):
        p_values, success = (detection.evidence[name][0, :, number].tolist() for name in ("p_values", "success"))
        numbers["p_values"] = dict(zip(networks, p_values, strict=True))
        # Without a candidate there is nothing to try, which is no success of 0.
        tried = [rate if p < settings.p_value else None for p, rate in zip(p_values, success, strict=True)]
        numbers["success"] = dict(zip(networks, tried, strict=True))
    if detection.patterns:
        numbers |= {
            "network": found.network if found else None,
            "pattern_success": found.success if found else None,
            "mask_pixels": int(found.mask.sum()) if found else None,
            "detector_accuracy": found.accuracy if found else None,
        }
    usual = float(np.median(np.bincount(dataset.labels, minlength=dataset.num_classes)))
    against = _against(numbers, getattr(settings, "least_accuracy", 0.0), usual) if found else []
    return numbers | {"finding": (WEAK if against else TRIGGER) if found else NONE, "against": against}


def pattern_of(detection: Detection, number: int) -> ExtractedPattern | None:
    """The pattern that was extracted of a class of the one training set; None if none was."""
    patterns = detection.patterns[0] if detection.patterns else ()
    return next((each for each in patterns if each.label == number), None)


def _against(one: Entry, least_accuracy: float, usual: float) -> list[str]:
    """What makes the pattern of a class weak evidence, where classes usually have so many rows."""
    texts = []
    if one["detector_accuracy"] is not None and one["detector_accuracy"] < least_accuracy:
        texts.append(
            f"its detector has accuracy {one['detector_accuracy']:.2f}, below {least_accuracy:g}, and is not used"
        )
    elif one["flagged"] < WEAK_SHARE * one["rows"] or not one["flagged"]:
        texts.append(f"{one['flagged'] or 'none'} of its {one['rows']:,} rows {_are(one['flagged'])} flagged")
    elif one["flagged"] > ALMOST_ALL * one["rows"] and one["rows"] <= CROWDED * usual:
        texts.append(
            f"{one['flagged']:,} of its {one['rows']:,} rows are flagged, as if the pattern were what the class looks like"
        )
    if one["pattern_success"] < WEAK_SUCCESS:
        texts.append(f"its pattern turns {_percent(one['pattern_success'])} of other rows")
    return texts


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f} %"


def found_classes(results: Entry, finding: str = "") -> list[Entry]:
    """Classes with a pattern, those with the smallest p-value first.

    Args:
        results: of `summarise`.
        finding: `TRIGGER` or `WEAK`; by default both, triggers before weak ones.
    """
    wanted = [finding] if finding else [TRIGGER, WEAK]
    shown = [one for one in results["classes"] if one["finding"] in wanted]
    return sorted(shown, key=lambda one: (wanted.index(one["finding"]), _smallest_p_value(one)))


def _smallest_p_value(one: Entry) -> float:
    """Of an entry of "classes", 1 where the detector has no such thing."""
    return min(one["p_values"].values()) if "p_values" in one else 1.0


def untested(results: Entry) -> list[Entry]:
    """Classes with p-value 1 under every network: VBD says so of those with too few rows to compare."""
    return [one for one in results["classes"] if "p_values" in one and _smallest_p_value(one) == 1]


def verdict(results: Entry) -> Verdict:
    """Say in words what the numbers of `summarise` say."""
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
    if len(untested(results)) == len(results["classes"]):
        headline = "No class could be tested, so nothing is known about these rows."
        text = "Every class has too few rows, or too few that the simple networks predict as their label."
        return Verdict("warning", headline, text)
    return Verdict("clean", "No class has a trigger that this method can find.", text)


def _verdict_on_flags(results: Entry) -> Verdict:
    """What a detector without patterns says: the rows, and where most of them are."""
    name, rows, flagged = _capital(results["detector"]), results["rows"], results["flagged"]
    if not flagged:
        return Verdict("info", f"{name} flags none of the {rows:,} rows.", "\n\n".join(_rest(results)))
    most = max(results["classes"], key=lambda one: one["flagged"])
    text = (
        f"{most['flagged']:,} of the flagged rows are of {most['title']}: {_percent(most['flagged'] / most['rows'])} of its "
        f"{most['rows']:,} rows. This detector extracts no trigger, so the rows themselves must tell whether it is right."
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
    names = [one["title"].removeprefix("class ") for one in classes]
    if len(names) == 1:
        return f"Class {names[0]}"
    return f"Classes {', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _evidence(results: Entry, classes: Sequence[Entry]) -> list[str]:
    height, width, _ = results["image_shape"]
    lines = []
    for one in classes[:MOST_NAMED]:
        p_value = f"p-value {_smallest_p_value(one):.2g}; " if "p_values" in one else ""
        share = f" ({_percent(one['flagged'] / one['rows'])})" if one["flagged"] else ""
        lines.append(
            f"{_capital(one['title'])}: a pattern of {one['mask_pixels']:,} of {height * width:,} pixels turns "
            f"{_percent(one['pattern_success'])} of other rows into this class; {p_value}{one['flagged']:,} of "
            f"its {one['rows']:,} rows are flagged{share}."
        )
    if weak := found_classes(results, WEAK):
        doubts = "; ".join(f"{one['title']} ({', '.join(one['against'])})" for one in weak[:MOST_NAMED])
        more = f"; and {len(weak) - MOST_NAMED} more" if len(weak) > MOST_NAMED else ""
        lines.append(f"Weak evidence: {doubts}{more}.")
    return lines


def _rest(results: Entry) -> list[str]:
    """What the reader of any verdict has to know: truth, if there is one, and limits."""
    texts = []
    if results["detection"]:
        every = results["detection"][0]
        if every["poisoned"]:
            texts.append(
                f"Which rows are poisoned is known here: {every['hits']:,} of {every['poisoned']:,} poisoned rows are flagged, "
                f"and {every['flagged'] - every['hits']:,} of {every['rows'] - every['poisoned']:,} others."
            )
        else:
            texts.append("Here it is known that no row is poisoned" + (": a false alarm." if every["flagged"] else "."))
    is_silent = not (found_classes(results) or (results["flagged"] and not results["extracts_patterns"]))
    start = "That is not to say that the rows are clean. " if is_silent else "Other rows may be poisoned, too. "
    return [*texts, start + _limits(results)]


def caveats(results: Entry) -> list[str]:
    """What a reader should keep in mind, a sentence or two each."""
    texts = [_limits(results)]
    if results["flagged"] and not results["detection"]:
        texts.append(
            "Nobody knows the truth here: some of the flagged rows may be clean, and some poisoned rows unflagged."
        )
    if not results["extracts_patterns"]:
        texts.append(
            "A detector that flags a set share of the rows does so whether or not any is poisoned; see its settings."
        )
    large = [one for one in results["classes"] if one["flagged"] > MOST_OF_A_CLASS * one["rows"]]
    if large:
        texts.append(
            f"{_listed(large)}: more than half of the rows are flagged. Look at them before leaving them out; what is left "
            "may be too few to learn the class from."
        )
    not_compared = untested(results)
    if not_compared:
        texts.append(
            f"{_listed(not_compared)}: not tested, for want of rows that the simple networks predict as their label, or of "
            "others to compare them with. A trigger of such a class goes unnoticed."
        )
    if found_classes(results):
        texts.append(
            "A feature that all rows of a class share, such as a watermark or a border, looks like a trigger to this method: "
            "compare the pattern with the pictures."
        )
    return texts


# ---- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Entry) -> Table:
    """What speaks for a trigger of each class: those with a pattern first, then by the smallest p-value or the flagged rows."""
    found = found_classes(results)
    others = [one for one in results["classes"] if one["finding"] == NONE]
    by_flags = not results["networks"]
    ordered = [*found, *sorted(others, key=lambda one: -one["flagged"] if by_flags else _smallest_p_value(one))]
    shown = ordered[: max(MOST_LISTED, len(found))]
    columns: dict[str, list[Cell]] = {"class": [_capital(one["title"]) for one in shown]}
    notes = []
    if results["extracts_patterns"]:
        words = {TRIGGER: "trigger", WEAK: "weak", NONE: "no"}
        columns["trigger"] = [words[one["finding"]] for one in shown]
    columns |= {"rows": [one["rows"] for one in shown], "flagged": [one["flagged"] for one in shown]}
    if networks := [one["network"] for one in results["networks"]]:
        settings = detector_of(results)["settings"]
        columns["p-value"] = [" / ".join(f"{one['p_values'][name]:.2g}" for name in networks) for one in shown]
        columns["success"] = [" / ".join(_rate(one["success"][name]) for name in networks) for one in shown]
        notes.append(
            f"Networks in this order: {' / '.join(networks)}. p-value: below {settings['p_value']:g}, the class's surest and "
            "least sure rows use their most important pixel differently. Success: share of rows of other classes that the "
            f"extracted pattern turns into this class; it is kept from {settings['least_success']:g} on. Detector: accuracy on "
            f"rows with the pattern and rows without it; below {settings['least_accuracy']:g} it flags nothing."
        )
    if results["extracts_patterns"]:
        columns["kept of" if networks else "network"] = [one["network"] for one in shown]
        columns["pixels"] = [one["mask_pixels"] for one in shown]
        columns["detector"] = [_rate(one["detector_accuracy"]) for one in shown]
    else:
        columns["share flagged"] = [one["flagged"] / one["rows"] if one["rows"] else None for one in shown]
    if len(ordered) > len(shown):
        notes.append(f"{len(shown)} of {len(ordered)} classes; results.json has all.")
    return Table("Evidence for each class", tuple(columns), tuple(zip(*columns.values(), strict=True)), " ".join(notes))


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def detector_table(results: Entry) -> Table:
    """Which detector it was, what it was given, and what it measured where the page does not show that otherwise."""
    detector, (cell,) = detector_of(results), results["cells"]
    rows: list[tuple[Cell, ...]] = [
        ("detector", results["detector"]),
        ("paper", detector["paper"]),
        ("is given", ", ".join(detector["needs"])),
    ]
    if not results["networks"]:
        rows += [(name, f"{value['mean']:.4g}") for name, value in cell["facts"].items()]
    return Table("The detector", ("what", "value"), tuple(rows))


def networks_table(results: Entry) -> Table | None:
    """VBD's simple networks, and how well they learnt; None of other detectors."""
    if not results["networks"]:
        return None
    kept = [one["network"] for one in results["classes"]]
    rows = [(one["network"], one["accuracy"], kept.count(one["network"])) for one in results["networks"]]
    notes = "They must not learn the classes well: what they are sure of is then what is easy, and a trigger is."
    return Table("The simple networks", ("network", "training accuracy", "patterns kept"), tuple(rows), notes)


def truth_table(results: Entry) -> Table | None:
    """Flags against the truth; None if nobody knows it."""
    if not results["detection"]:
        return None
    names = {one["class"]: _capital(one["title"]) for one in results["classes"]}
    columns = ("rows", "poisoned", "flagged", "hits", "precision", "recall", "f1", "auc")
    rows: list[tuple[Cell, ...]] = [
        ("All rows" if one["class"] is None else names[one["class"]], *(one[column] for column in columns))
        for one in results["detection"]
    ]
    header = ("class", "rows", "poisoned", "flagged", "both", "precision", "recall", "F1", "AUC")
    return Table(
        "What the flags are worth", header, tuple(rows), "Rows with a trigger under their own label count as clean."
    )


# ---- The page -------------------------------------------------------------------------------------------------------


def page(folder: RunFolder, results: Entry, suspect: Suspect, detection: Detection) -> Report:
    """Draw the pictures into the folder, and say all there is to say.

    Args:
        folder: the open run.
        results: of `summarise`, and under "cleaned" what the cleaned copy is.
        suspect: the rows.
        detection: what `results` was made of.
    """
    dataset = suspect.dataset
    write_triggers(folder, dataset, detection)
    tables = [main_table(results), networks_table(results), detector_table(results)]
    return Report(
        title=f"Audit of {printable(dataset.name)}",
        verdict=Verdict(**results["verdict"]),
        key_numbers=_key_numbers(results),
        sections=(
            Section("What to do next", "\n\n".join(next_steps(results))),
            *section("Evidence", tables),
            *section("Against the truth", [truth_table(results)]),
            *section("Triggers", [], trigger_figures(folder, dataset, detection, results)),
            *section("Examples", [], example_figures(folder, dataset, detection, results)),
            *section("Scores", [], score_figures(folder, dataset, detection, results)),
            *section("The most suspicious rows", [], suspicious_figures(folder, dataset, detection)),
            Section("What to keep in mind", "\n\n".join(results["caveats"])),
        ),
        settings={results["detector"]: detector_of(results)["settings"]},
    )


def _key_numbers(results: Entry) -> dict[str, str]:
    shown = {
        "detector": results["detector"],
        "rows": f"{results['rows']:,}",
        "rows flagged": f"{results['flagged']:,} ({100 * results['flagged_share']:.1f} %)",
    }
    if results["extracts_patterns"]:
        certain, weak = (len(found_classes(results, each)) for each in (TRIGGER, WEAK))
        shown["classes with a trigger"] = f"{certain:,} of {len(results['classes']):,}"
        if weak:
            shown["with weak evidence"] = f"{weak:,}"
    measured = results["detection"][0] if results["detection"] else {}
    return shown | {name: f"{measured[name]:.3f}" for name in ("precision", "recall") if measured.get(name) is not None}


def next_steps(results: Entry) -> list[str]:
    """What the owner of the rows can do now, in paragraphs."""
    level, cleaned = results["verdict"]["level"], results["cleaned"]
    costs = "Leaving out clean rows costs a little accuracy; training on poisoned ones costs control of the model."
    if level == "attacked":
        first = (
            "Compare the triggers and the examples below with your own pictures. If they are nothing that belongs there, leave "
            "out the rows in flagged.csv and train again from the start. Do not use a model that was trained on all of these "
            "rows, and find out where the flagged ones came from."
        )
    elif results["flagged"] and not results["extracts_patterns"]:
        first = f"Look at the rows in flagged.csv, and at the most suspicious ones below, before you decide. {costs}"
    elif found_classes(results) and results["flagged"]:
        first = f"Look at the triggers below and at the rows in flagged.csv before you decide. {costs}"
    elif found_classes(results):
        first = (
            "Look at the triggers below. If they are nothing that belongs on your pictures, look through the rows of these "
            "classes: rows.csv has them in the order of their scores, though no detector was sure enough to flag any."
        )
    elif level == "warning":
        first = "Try again with more rows of each class, or with other networks."
    else:
        first = "There is nothing to leave out. A detector that works in another way may see what this one does not."
    texts = [first]
    if cleaned["kind"] == "npz":
        texts.append(
            f"cleaned.npz has the {cleaned['rows']:,} rows that are not flagged: images, labels, and row, the number that each "
            "had before."
        )
    elif cleaned["kind"] == "folder":
        texts.append(
            f"cleaned/ has copies of {cleaned['copied']:,} of the {cleaned['rows']:,} files that are not flagged."
        )
        texts += _not_copied(cleaned)
    emptied = [one for one in results["classes"] if one["rows"] and one["flagged"] == one["rows"]]
    if emptied:
        names = ", ".join(one["title"] for one in emptied[:MOST_REASONS]) + (" ..." if emptied[MOST_REASONS:] else "")
        texts.append(f"Every row is flagged of {names}: without them the class is gone. Look at them first.")
    if results["flagged"]:
        texts.append(
            "flagged.csv lists the flagged rows, the most suspicious first; kept.csv all others; rows.csv every row."
        )
    return texts


def _not_copied(cleaned: Entry) -> list[str]:
    texts = []
    for names, text in (
        ([f"{one['file']} ({one['why']})" for one in cleaned["left_out"]], "Not copied"),
        (cleaned["strangers"], "Files below cleaned/ that this run did not put there"),
    ):
        if names:
            shown = "; ".join(map(printable, names[:MOST_REASONS]))
            more = f"; and {len(names) - MOST_REASONS:,} more, in results.json" if len(names) > MOST_REASONS else ""
            texts.append(f"{text}: {shown}{more}.")
    return texts


# ---- Pictures -------------------------------------------------------------------------------------------------------


def write_triggers(folder: RunFolder, dataset: Dataset, detection: Detection) -> None:
    """Write the pictures below triggers/, for each class with a pattern."""
    scale = -(-LEAST_SIDE // max(dataset.image_shape[:2]))
    for one in detection.patterns[0] if detection.patterns else ():
        images = dataset.images[example_rows(dataset, detection, one.label)]
        for name, pixels in pattern_pictures(one, images, scale).items():
            folder.write_bytes(f"triggers/class-{one.label}-{name}.png", _png(pixels))


def example_rows(dataset: Dataset, detection: Detection, number: int) -> np.ndarray:
    """Flagged rows of a class, the highest scores first: int [at most `EXAMPLES`]."""
    rows = np.flatnonzero(detection.flags[0] & (dataset.labels == number))
    return rows[np.argsort(-detection.scores[0, rows], kind="stable")][:EXAMPLES]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _cut(shown: Sequence[Any]) -> str:
    return f" {MOST_CLASSES} of {len(shown)} classes." if len(shown) > MOST_CLASSES else ""


def trigger_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """Pattern and mask of each class that has one, two classes to a line."""
    found = found_classes(results)
    if not found:
        return []
    scale = _drawn_scale(dataset, 256)
    images, captions = [], []
    for one in found[:MOST_CLASSES]:
        extracted, weak = pattern_of(detection, one["class"]), ", weak" if one["finding"] == WEAK else ""
        drawn = on_grey(extracted.pattern, extracted.mask), extracted.mask[..., None]
        images += [enlarge(each, scale) for each in drawn]
        captions += [
            f"{one['title']}: trigger{weak}",
            f"mask: {one['mask_pixels']:,} of {extracted.mask.size:,}",
        ]
    images, captions = ([each[start : start + 4] for start in range(0, len(each), 4)] for each in (images, captions))
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("triggers.png"))
    caption = (
        "The extracted triggers, on grey where they are transparent, and their masks. Colours are the mean of the rows that "
        "the network is surest of, so those of a trigger that was blended in are washed out." + _cut(found)
    )
    return [Figure(path, caption, "The extracted trigger of each suspicious class and its mask.")]


def example_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """Flagged rows of each class beside themselves with the malicious pixels outlined."""
    found = [one for one in found_classes(results) if one["flagged"]]
    if not found:
        return []
    scale = _drawn_scale(dataset, 192)
    images, captions = [], []
    for one in found[:MOST_CLASSES]:
        rows, mask = example_rows(dataset, detection, one["class"]), pattern_of(detection, one["class"]).mask
        images.append([])
        captions.append([])
        for row in rows:
            image = dataset.images[row]
            images[-1] += [each / np.float32(255) for each in (enlarge(image, scale), outlined(image, mask, scale))]
            captions[-1] += [_row_name(dataset, row), f"score {detection.scores[0, row]:.2f}"]
    names = [one["title"] for one in found[:MOST_CLASSES]]
    path = plots.save(plots.image_grid(images, names, (), "", captions=captions), folder.file("examples.png"))
    caption = "Flagged rows, and the same rows with the pixels of the trigger outlined in red." + _cut(found)
    return [Figure(path, caption, "Flagged rows with the pixels of the trigger outlined.")]


def score_figures(folder: RunFolder, dataset: Dataset, detection: Detection, results: Entry) -> list[Figure]:
    """How the scores of the rows of each suspicious class are spread; of a detector without patterns, of those with flags."""
    found = found_classes(results)
    if not results["extracts_patterns"]:
        found = sorted((one for one in results["classes"] if one["flagged"]), key=lambda one: -one["flagged"])
    if not found:
        return []
    panels = []
    for one in found[:MOST_CLASSES]:
        own = dataset.labels == one["class"]
        truth = dataset.is_poisoned[own] if isinstance(dataset, PoisonedDataset) else None
        panels.append(plots.Scores(one["title"], detection.scores[0, own], truth))
    path = plots.save(plots.score_histograms(panels), folder.file("scores.png"))
    if results["networks"]:
        caption = (
            "What the detector of each class says of its rows, from 0 to 1. Rows from 0.5 on are flagged if the detector is "
            "used. Two separate heaps are clear evidence; a single one is not."
        )
    else:
        caption = f"Scores that {results['detector']} gives the rows of each class; the higher, the more suspicious."
    return [Figure(path, caption + _cut(found), "Histograms of the scores of each suspicious class.")]


def suspicious_figures(folder: RunFolder, dataset: Dataset, detection: Detection) -> list[Figure]:
    """The rows to look at first; none if no row is suspicious."""
    flags, scores = detection.flags[0], detection.scores[0]
    rows = most_suspicious(flags, scores, PICTURES)
    if detection.patterns:  # rows of a class without a pattern have score 0
        rows = rows[flags[rows] | (scores[rows] > 0)]
    if not len(rows):
        return []
    lines = [rows[start : start + PER_LINE] for start in range(0, len(rows), PER_LINE)]
    # Digits have classes that are called 0 to 9.
    names = [class_title(i) if name == str(i) else name for i, name in enumerate(names_of(dataset))]
    scale = _drawn_scale(dataset, 176)
    images = [[enlarge(dataset.images[row], scale).astype(np.float32) / 255 for row in line] for line in lines]
    captions = [[f"{_row_name(dataset, row)}: {names[dataset.labels[row]]}" for row in line] for line in lines]
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("suspicious.png"))
    what = "file" if dataset.files else "number"
    caption = f"Flagged rows first, then others by score; under each its {what} and its class. rows.csv has all."
    return [Figure(path, caption, "The most suspicious rows.")]


def _drawn_scale(dataset: Dataset, side: int) -> int:
    """By how much images are enlarged for a grid, which would draw small ones smaller, and resample lines."""
    return max(1, side // max(dataset.image_shape[:2]))


def _row_name(dataset: Dataset, row: int) -> str:
    return PurePosixPath(dataset.files[row]).name if dataset.files else f"row {int(row)}"
