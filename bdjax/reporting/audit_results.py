"""What VBD says about rows of one's own, as numbers (results.json), as tables, and as a sentence.

Nobody knows here which rows are poisoned. So the numbers are the evidence for each class, and the sentence is careful: a class
"carries a trigger" if VBD extracted a pattern of it and nothing speaks against that pattern.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bdjax.defenses.vbd import Analysis
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.metrics import measure_detection
from bdjax.reporting.report import Verdict
from bdjax.reporting.tables import Cell, Table
from bdjax.run.folder import to_plain
from bdjax.run.text import printable
from bdjax.types import Dataset, PoisonedDataset

WEAK_SUCCESS = 0.5
"""A pattern that turns a smaller share of other rows is weak evidence; ours, above the paper's least success."""
WEAK_SHARE = 0.005
"""So is one that fewer of its class's rows carry; ours."""
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
NOT_FOUND = (
    "This method cannot find triggers that move or change from row to row (dynamic and sample-specific ones), triggers on rows "
    "that keep their own label (clean-label attacks), or rare ones."
)


def class_title(number: int, name: str = "") -> str:
    """ "class 3 (cat)", or "class 3" where the class has no name but its number."""
    name = printable(name)
    return f"class {number} ({name})" if name and name != str(number) else f"class {number}"


def names_of(dataset: Dataset) -> tuple[str, ...]:
    """A name for each class: its own, or "class 3"."""
    return dataset.class_names or tuple(class_title(number) for number in range(dataset.num_classes))


def summarise(dataset: Dataset, analysis: Analysis, settings: VBDSettings) -> dict[str, Any]:
    """All numbers of one audit.

    Args:
        dataset: the rows; a `PoisonedDataset` adds what the flags are worth.
        analysis: of this one suspect: M = 1.
        settings: that it was made with.

    Returns:
        A tree of plain numbers, the same for the same inputs; the content of results.json. There is an entry under "classes"
        for each class, in order.
    """
    if len(analysis.flags) != 1:
        raise ValueError(f"the analysis is of {len(analysis.flags)} training sets; it must be of one")
    networks = settings.networks.split("+")
    flags = analysis.flags[0]
    classes = [_one_class(dataset, analysis, settings, networks, number) for number in range(dataset.num_classes)]
    results = {
        "dataset": dataset.name,
        "rows": len(dataset),
        "flagged": int(flags.sum()),
        "flagged_share": float(flags.mean()),
        "image_shape": list(dataset.image_shape),
        "networks": [
            {"network": name, "accuracy": float(accuracy)}
            for name, accuracy in zip(networks, analysis.accuracies[0], strict=True)
        ],
        "classes": classes,
        "detection": _detection(dataset, analysis),
        "settings": to_plain(settings),
    }
    told = verdict(results)
    said = {"level": told.level, "headline": told.headline, "text": told.text}
    return {"verdict": said, **results, "caveats": caveats(results)}


def _one_class(
    dataset: Dataset, analysis: Analysis, settings: VBDSettings, networks: Sequence[str], number: int
) -> dict[str, Any]:
    own = dataset.labels == number
    chosen = int(analysis.network[0, number])
    found = chosen >= 0
    p_values = {name: float(p) for name, p in zip(networks, analysis.p_values[0, :, number], strict=True)}
    success = {
        # Without a candidate there is nothing to try, which is no success of 0.
        name: float(rate) if p_values[name] < settings.p_value else None
        for name, rate in zip(networks, analysis.success[0, :, number], strict=True)
    }
    usual = float(np.median(np.bincount(dataset.labels, minlength=dataset.num_classes)))
    one = {
        "class": number,
        "name": dataset.class_names[number] if dataset.class_names else "",
        "rows": int(own.sum()),
        "flagged": int(analysis.flags[0, own].sum()),
        "p_values": p_values,
        "success": success,
        "network": networks[chosen] if found else None,
        "pattern_success": float(analysis.success[0, chosen, number]) if found else None,
        "mask_pixels": int(analysis.masks[0, number].sum()) if found else None,
        "detector_accuracy": float(analysis.detector_accuracies[0, number]) if found else None,
    }
    against = _against(one, settings, usual) if found else []
    return one | {"finding": (WEAK if against else TRIGGER) if found else NONE, "against": against}


def _against(one: Mapping[str, Any], settings: VBDSettings, usual: float) -> list[str]:
    """What makes the pattern of a class weak evidence, where classes usually have so many rows."""
    told = []
    if one["detector_accuracy"] < settings.least_accuracy:
        told.append(
            f"its detector has accuracy {one['detector_accuracy']:.2f}, below {settings.least_accuracy:g}, and is not used"
        )
    elif one["flagged"] < WEAK_SHARE * one["rows"] or not one["flagged"]:
        told.append(f"{one['flagged'] or 'none'} of its {one['rows']:,} rows {_are(one['flagged'])} flagged")
    elif one["flagged"] > ALMOST_ALL * one["rows"] and one["rows"] <= CROWDED * usual:
        told.append(
            f"{one['flagged']:,} of its {one['rows']:,} rows are flagged, as if the pattern were what the class looks like"
        )
    if one["pattern_success"] < WEAK_SUCCESS:
        told.append(f"its pattern turns {_percent(one['pattern_success'])} of other rows")
    return told


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f} %"


def _detection(dataset: Dataset, analysis: Analysis) -> list[dict[str, Any]] | None:
    """What flags and scores are worth: of all rows, then of each class with poisoned or flagged ones; None if nobody knows."""
    if not isinstance(dataset, PoisonedDataset):
        return None
    flags, scores, is_poisoned = analysis.flags[0], analysis.scores[0], dataset.is_poisoned

    def measure(number: int | None, own: np.ndarray) -> dict[str, Any]:
        measured = measure_detection(flags[own], scores[own], is_poisoned[own])
        counts = {"poisoned": is_poisoned[own], "flagged": flags[own], "hits": flags[own] & is_poisoned[own]}
        return {
            "class": number,
            "rows": int(own.sum()),
            **{name: int(values.sum()) for name, values in counts.items()},
            **{name: getattr(measured, name) for name in ("precision", "recall", "f1", "auc")},
        }

    shown = np.unique(dataset.labels[flags | is_poisoned])
    everything = measure(None, np.ones(len(dataset), bool))
    return [everything, *(measure(int(number), dataset.labels == number) for number in shown)]


def found_classes(results: Mapping[str, Any], finding: str = "") -> list[Mapping[str, Any]]:
    """Classes with a pattern, those with the smallest p-value first.

    Args:
        results: of `summarise`.
        finding: `TRIGGER` or `WEAK`; by default both, triggers before weak ones.
    """
    wanted = [finding] if finding else [TRIGGER, WEAK]
    shown = [one for one in results["classes"] if one["finding"] in wanted]
    return sorted(shown, key=lambda one: (wanted.index(one["finding"]), min(one["p_values"].values())))


def title_of(one: Mapping[str, Any]) -> str:
    """`class_title` of an entry of "classes"."""
    return class_title(one["class"], one["name"])


def untested(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Classes with p-value 1 under every network: VBD says so of those with too few rows to compare."""
    return [one for one in results["classes"] if all(p == 1 for p in one["p_values"].values())]


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Say in words what the numbers of `summarise` say."""
    certain, weak = found_classes(results, TRIGGER), found_classes(results, WEAK)
    flagged = f"{results['flagged']:,} of {results['rows']:,} rows {_are(results['flagged'])} flagged"
    if certain:
        headline = f"{_listed(certain)} {'carries' if len(certain) == 1 else 'carry'} a trigger: {flagged}."
        return Verdict(
            "attacked", headline, "\n\n".join([*_evidence(results, certain), *_doubts(weak), *_rest(results)])
        )
    if weak:
        headline = f"{_listed(weak)} may carry a trigger, but the evidence is weak: {flagged}."
        return Verdict("warning", headline, "\n\n".join([*_evidence(results, weak), *_doubts(weak), *_rest(results)]))
    not_compared = untested(results)
    if len(not_compared) == len(results["classes"]):
        headline = "No class could be tested, so nothing is known about these rows."
        text = "Every class has too few rows, or too few that the simple networks predict as their label."
        return Verdict("warning", headline, text)
    return Verdict("clean", "No class has a trigger that this method can find.", "\n\n".join(_rest(results)))


def _listed(classes: Sequence[Mapping[str, Any]]) -> str:
    if len(classes) > MOST_NAMED:
        return f"{len(classes)} classes"
    names = [title_of(one).removeprefix("class ") for one in classes]
    if len(names) == 1:
        return f"Class {names[0]}"
    return f"Classes {', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _evidence(results: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> list[str]:
    height, width, _ = results["image_shape"]
    lines = []
    for one in classes[:MOST_NAMED]:
        smallest = min(one["p_values"].values())
        share = f" ({_percent(one['flagged'] / one['rows'])})" if one["flagged"] else ""
        lines.append(
            f"{_capital(title_of(one))}: a pattern of {one['mask_pixels']:,} of {height * width:,} pixels turns "
            f"{_percent(one['pattern_success'])} of other rows into this class; p-value {smallest:.2g}; {one['flagged']:,} of "
            f"its {one['rows']:,} rows are flagged{share}."
        )
    return lines


def _doubts(weak: Sequence[Mapping[str, Any]]) -> list[str]:
    if not weak:
        return []
    told = "; ".join(f"{title_of(one)} ({', '.join(one['against'])})" for one in weak[:MOST_NAMED])
    more = f"; and {len(weak) - MOST_NAMED} more" if len(weak) > MOST_NAMED else ""
    return [f"Weak evidence: {told}{more}."]


def _rest(results: Mapping[str, Any]) -> list[str]:
    """What the reader of any verdict has to know: truth, if there is one, and limits."""
    told = []
    if results["detection"]:
        every = results["detection"][0]
        if every["poisoned"]:
            told.append(
                f"Which rows are poisoned is known here: {every['hits']:,} of {every['poisoned']:,} poisoned rows are flagged, "
                f"and {every['flagged'] - every['hits']:,} of {every['rows'] - every['poisoned']:,} others."
            )
        else:
            told.append("Here it is known that no row is poisoned" + (": a false alarm." if every["flagged"] else "."))
    start = (
        "That is not to say that the rows are clean. "
        if not found_classes(results)
        else "Other rows may be poisoned, too. "
    )
    return [*told, start + NOT_FOUND]


def caveats(results: Mapping[str, Any]) -> list[str]:
    """What a reader should keep in mind, a sentence or two each."""
    told = [NOT_FOUND]
    if results["flagged"] and not results["detection"]:
        told.append(
            "Nobody knows the truth here: some of the flagged rows may be clean, and some poisoned rows unflagged."
        )
    large = [one for one in results["classes"] if one["flagged"] > MOST_OF_A_CLASS * one["rows"]]
    if large:
        told.append(
            f"{_listed(large)}: more than half of the rows are flagged. Look at them before leaving them out; what is left "
            "may be too few to learn the class from."
        )
    not_compared = untested(results)
    if not_compared:
        told.append(
            f"{_listed(not_compared)}: not tested, for want of rows that the simple networks predict as their label, or of "
            "others to compare them with. A trigger of such a class goes unnoticed."
        )
    if found_classes(results):
        told.append(
            "A feature that all rows of a class share, such as a watermark or a border, looks like a trigger to this method: "
            "compare the pattern with the pictures."
        )
    return told


def evidence_table(results: Mapping[str, Any]) -> Table:
    """What speaks for a trigger of each class: those with a pattern first, then by the smallest p-value."""
    networks = [one["network"] for one in results["networks"]]
    found = found_classes(results)
    others = [one for one in results["classes"] if one["finding"] == NONE]
    ordered = [*found, *sorted(others, key=lambda one: min(one["p_values"].values()))]
    shown = ordered[: max(MOST_LISTED, len(found))]
    words = {TRIGGER: "trigger", WEAK: "weak", NONE: "no"}
    rows = [
        (
            _capital(title_of(one)),
            words[one["finding"]],
            one["rows"],
            one["flagged"],
            " / ".join(f"{one['p_values'][name]:.2g}" for name in networks),
            " / ".join(_rate(one["success"][name]) for name in networks),
            one["network"],
            one["mask_pixels"],
            _rate(one["detector_accuracy"]),
        )
        for one in shown
    ]
    listed = " / ".join(networks)
    settings = results["settings"]
    notes = (
        f"Networks in this order: {listed}. p-value: below {settings['p_value']:g}, the class's surest and least sure rows use "
        "their most important pixel differently. Success: share of rows of other classes that the extracted pattern turns into "
        f"this class; it is kept from {settings['least_success']:g} on. Detector: accuracy on rows with the pattern and rows "
        f"without it; below {settings['least_accuracy']:g} it flags nothing."
    )
    if len(ordered) > len(shown):
        notes += f" {len(shown)} of {len(ordered)} classes; results.json has all."
    header = ("class", "trigger", "rows", "flagged", "p-value", "success", "kept of", "pixels", "detector")
    return Table("Evidence for each class", header, tuple(rows), notes)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def networks_table(results: Mapping[str, Any]) -> Table:
    """The simple networks, and how well they learnt."""
    rows = [
        (one["network"], one["accuracy"], sum(c["network"] == one["network"] for c in results["classes"]))
        for one in results["networks"]
    ]
    notes = "They must not learn the classes well: what they are sure of is then what is easy, and a trigger is."
    return Table("The simple networks", ("network", "training accuracy", "patterns kept"), tuple(rows), notes)


def truth_table(results: Mapping[str, Any]) -> Table | None:
    """Flags against the truth; None if nobody knows it."""
    if not results["detection"]:
        return None
    names = {one["class"]: _capital(title_of(one)) for one in results["classes"]}
    columns = ("rows", "poisoned", "flagged", "hits", "precision", "recall", "f1", "auc")
    rows: list[tuple[Cell, ...]] = [
        ("All rows" if one["class"] is None else names[one["class"]], *(one[column] for column in columns))
        for one in results["detection"]
    ]
    header = ("class", "rows", "poisoned", "flagged", "both", "precision", "recall", "F1", "AUC")
    return Table(
        "What the flags are worth", header, tuple(rows), "Rows with a trigger under their own label count as clean."
    )
