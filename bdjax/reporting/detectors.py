"""The report on detectors of poisoned rows: F1 beside the VBD paper's, false alarms, found triggers, verdict and page.

All tables are made from the numbers of `summarise`. The *grid* is the VBD paper's: its triggers, one at a time, at the paper's
poisoning rate and four opacities, all-to-one and all-to-all. Everything else in a run (clean sets, other rates, other attacks)
is in a separate table. F1 is in percent, as in the paper; a run that flags nothing counts as 0. In every function `results` is
from `summarise`, and `dataset` is bdjax's name of the dataset: if the paper has it, the paper's columns stand beside ours.

No network is trained without the flagged rows: the report is on how well the flags fit the ground truth. Suspects come without
their images, since a grid has too many to keep; flagged rows are shown only beside the found triggers.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.evaluation import published
from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.patterns import FoundPattern
from bdjax.evaluation.variants import NOT_TESTED
from bdjax.metrics import DEFINITIONS, DETECTION_FAILS, DetectionWord, detection_word
from bdjax.reporting import defenses, detector_plots, found_patterns, plots
from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.detector_plots import Curve, Line
from bdjax.reporting.report import Figure, Report, Section, Verdict
from bdjax.reporting.results import find, mean_of
from bdjax.reporting.sections import Entry
from bdjax.reporting.tables import Cell, Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.settings import read_variant
from bdjax.types import Dataset, Detection

RULES = (published.ALL_TO_ONE, published.ALL_TO_ALL)
OPACITIES = (*published.FULL, *published.BLENDED)
PAPER_TITLES = {"vbd": "VBD", "abl": "ABL", "agpd": "AGPD", "scan": "SCAn"}
"""The detectors with numbers in the paper."""
FOUND = "classes with a pattern"
EVIDENCE = (
    FOUND,
    "poisoned classes",
    "poisoned classes found",
    "clean classes taken for poisoned",
    "mean accuracy of the simple networks",
    "best success of a pattern",
)
"""Facts on the evidence behind a detector's flags."""

WHOLE_GRID = 40
"""Number of settings in the paper for one dataset."""
_DECIMALS = 1
"""Of F1 in percent: the paper prints two, more than five seeds support."""
MOST_NAMES = 12
"""Most training sets that the verdict names."""


class MeanF1(NamedTuple):
    """F1 over several training sets, in percent."""

    by_seed: tuple[float, ...]
    """mean over the training sets for each seed; a single overall mean if they have different seeds"""
    count: int
    """number of training sets"""

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for a single mean."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


class _Column(NamedTuple):
    title: str
    method: str | None
    """a variant's name; None for the paper's numbers"""
    base: str
    """base name of the detector"""


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(measured: Iterable[Measured], seed: int, left_out: Mapping[str, str] = {}) -> dict[str, Any]:
    """`defenses.summarise` for detectors, which use no test rows.

    Args:
        measured: a measurement for every suspect and every detector.
        seed: number of the first seed.
        left_out: a detector -> why it is not in the run.
    """
    return defenses.summarise(measured, 0, seed, left_out)


def word_of(results: Entry, attack: str, detector: str) -> DetectionWord | None:
    """The word for how well a detector finds the poisoned rows of an attack; None if that is unknown."""
    f1 = mean_of(schema.find(results, attack, detector), "f1")
    return None if f1 is None else detection_word(f1)


def rule_of(attack: Entry) -> str | None:
    """The label rule of an entry of results["attacks"], all-to-one or all-to-all; None for other rules."""
    rules = {rule for part in attack["parts"] for rule in RULES if part["label_rule"].startswith(rule)}
    return rules.pop() if len(rules) == len(attack["parts"]) == 1 else None


def opacity_of(attack: Entry) -> float | None:
    """The opacity of a training set's only trigger; None if it has no trigger, several, or one without this setting."""
    settings = [part["settings"] for part in attack["parts"]]
    return settings[0].get("opacity") if len(settings) == 1 else None


def is_in_grid(attack: Entry) -> bool:
    """Whether an entry of results["attacks"] is a setting of the paper's grid: see the module's docstring."""
    base, changes = read_variant(attack["attack"])
    rate = changes.pop("poison_rate", None)
    return (
        base in published.TRIGGERS.get(rule_of(attack), ())
        and opacity_of(attack) in OPACITIES
        and set(changes) <= {"opacity", "target"}
        and rate in (None, published.POISON_RATE)
    )


def grid(results: Entry, rules: Sequence[str] = RULES, opacities: Sequence[float] = OPACITIES):
    """The entries of results["attacks"] in the paper's grid with one of these rules and opacities."""
    return [
        attack
        for attack in results["attacks"]
        if is_in_grid(attack) and rule_of(attack) in rules and opacity_of(attack) in opacities
    ]


def detectors(results: Entry) -> list[Entry]:
    """The entries of results["methods"] that flag rows."""
    flagging = {cell["method"] for cell in results["cells"] if mean_of(cell, "flagged") is not None}
    return [method for method in results["methods"] if method["method"] in flagging]


def find_f1(
    dataset: str, rule: str | None, attack: str | None, opacity: float | None, detector: str
) -> published.Published | None:
    """The paper's cell for these values, where None stands for an average; None if the paper has no such cell."""
    wanted = {"dataset": dataset, "rule": rule, "attack": attack, "opacity": opacity, "method": detector}
    return next(iter(published.find_published(measured="flags", **wanted)), None)


def common(results: Entry, attacks: Sequence[Entry], methods: Sequence[str]) -> list[Entry]:
    """The attacks with a known F1 for every one of the detectors, so that their means are comparable."""
    return [attack for attack in attacks if all(f1_of(results, [attack], name) is not None for name in methods)]


def f1_of(results: Entry, attacks: Sequence[Entry], method: str) -> MeanF1 | None:
    """The mean F1 of a detector over training sets.

    Args:
        results: from `summarise`.
        attacks: entries of results["attacks"].
        method: a variant's name.

    Returns:
        None if there is no training set, or if one of them was not evaluated or has no poisoned row.
    """
    cells = [find(results, attack["attack"], method) for attack in attacks]
    if not cells or any(mean_of(cell, "f1") is None for cell in cells):
        return None
    f1_by_seed = [{row["seed"]: 100 * row["f1"] for row in cell["by_seed"]} for cell in cells]
    if any(values.keys() != f1_by_seed[0].keys() for values in f1_by_seed):
        return MeanF1((float(np.mean([np.mean(list(values.values())) for values in f1_by_seed])),), len(f1_by_seed))
    return MeanF1(
        tuple(float(np.mean([values[seed] for values in f1_by_seed])) for seed in f1_by_seed[0]), len(f1_by_seed)
    )


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _columns(results: Entry, dataset: str) -> list[_Column]:
    """A column for each detector, and beside it the paper's column if there is one."""
    columns: list[_Column] = []
    for method in detectors(results):
        columns.append(_Column(method["title"], method["method"], method["base"]))
        printed = _Column(f"{PAPER_TITLES.get(method['base'])}, paper", None, method["base"])
        if dataset in published.DETECTION_DATASETS and method["base"] in PAPER_TITLES and printed not in columns:
            columns.append(printed)
    return columns


def _names(columns: Sequence[_Column]) -> list[str]:
    return [column.method for column in columns if column.method is not None]


def _has_paper(columns: Sequence[_Column]) -> bool:
    return any(column.method is None for column in columns)


class _Line(NamedTuple):
    """A line of a table of F1."""

    start: tuple[Cell, ...]
    """first cells of the row"""
    attacks: Sequence[Entry]
    """attacks that our means are over"""
    cell: tuple[str | None, str | None, float | None]
    """the paper's cell: rule, attack, opacity"""
    style: str = ""


def _f1_cell(results: Entry, dataset: str, line: _Line, column: _Column) -> Cell:
    """Our mean over the attacks, or the paper's number."""
    if column.method is not None:
        f1 = f1_of(results, line.attacks, column.method)
        return None if f1 is None else mean_and_spread(f1.by_seed, _DECIMALS)
    found = find_f1(dataset, *line.cell, column.base)
    return None if found is None else f"{found.f1:.{_DECIMALS}f} ± {found.standard_deviation:.{_DECIMALS}f}"


def _lines_table(
    results: Entry, dataset: str, title: str, first: Sequence[str], lines: Sequence[_Line], notes: str
) -> Table:
    columns = _columns(results, dataset)
    rows = tuple((*line.start, *(_f1_cell(results, dataset, line, column) for column in columns)) for line in lines)
    return Table(
        title, (*first, *(column.title for column in columns)), rows, notes, tuple(line.style for line in lines)
    )


def _notes(results: Entry, attacks: Sequence[Entry], columns: Sequence[_Column]) -> str:
    sizes = sorted({count for attack in attacks for count in attack["num_rows"]})
    rows = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    rates = sorted({part["settings"]["poison_rate"] for attack in attacks for part in attack["parts"]})
    seeds = schema.seeds_text({"attacks": attacks})
    spread = " ± standard deviation" if schema.has_spread({"attacks": attacks}) else ""
    text = (
        f"F1 of the flagged rows in %, mean{spread} over {seeds}; a run that flags nothing counts as 0. For a mean over "
        f"training sets, the deviation is that of each seed's mean. {rows} rows in a set, "
        f"{' or '.join(f'{100 * rate:g}' for rate in rates)} % of them poisoned."
    )
    if _has_paper(columns):
        text += (
            " Paper: 5 seeds, 10 % poisoned, all rows of the dataset, its own networks and schedules; runs without a result "
            "count as 0 there."
        )
    return text


def _trigger(results: Entry, attack: Entry) -> str:
    """The name of a trigger in a table of one label rule."""
    target = read_variant(attack["attack"])[1].get("target")
    title = attack["parts"][0]["title"].removesuffix(f", {rule_of(attack)}")
    return title + ("" if target is None else f", target {schema.class_title_of(results, target)}")


def f1_table(results: Entry, rule: str, dataset: str, opacity: float = 1.0) -> Table | None:
    """Triggers × detectors, as tables 1 and 2 of the paper; None if the run has none of these settings.

    The paper prints single triggers at full opacity only, otherwise their mean.
    """
    attacks, columns = grid(results, (rule,), (opacity,)), _columns(results, dataset)
    if not attacks or not columns:
        return None
    lines = [
        _Line((_trigger(results, attack),), [attack], (rule, read_variant(attack["attack"])[0], opacity))
        for attack in attacks
    ]
    compared = common(results, attacks, _names(columns))
    notes = _notes(results, attacks, columns)
    if len(compared) > 1:
        lines.append(_Line((f"mean of {len(compared)} triggers",), compared, (rule, None, opacity), "ours"))
        if len(compared) < len(attacks):
            notes += " Our mean is over the triggers that every detector was evaluated on."
        if len(compared) != len(published.TRIGGERS[rule]) and _has_paper(columns):
            notes += f" The paper's mean is over its {len(published.TRIGGERS[rule])} triggers."
    opacity_text = "full opacity" if opacity == 1 else f"opacity {100 * opacity:g} %"
    return _lines_table(results, dataset, f"F1, {rule}, {opacity_text}", ["trigger"], lines, notes)


def blended_table(results: Entry, rule: str, dataset: str) -> Table | None:
    """Opacities × detectors, means over the triggers, as tables 3 and 4 of the paper; None if the run has no such setting."""
    columns, lines = _columns(results, dataset), []
    for opacity in published.BLENDED:
        attacks = common(results, grid(results, (rule,), (opacity,)), _names(columns))
        if attacks and columns:
            lines.append(_Line((f"{100 * opacity:g} %", len(attacks)), attacks, (rule, None, opacity)))
    if not lines:
        return None
    all_attacks = [attack for line in lines for attack in line.attacks]
    if len(lines) > 1:
        lines.append(_Line(("mean", len(all_attacks)), all_attacks, (rule, None, None), "ours"))
    notes = (
        _notes(results, all_attacks, columns) + " The last row is the mean over all training sets of the rows above."
    )
    if _has_paper(columns):
        notes += f" The paper's means are over its {len(published.TRIGGERS[rule])} triggers."
    return _lines_table(results, dataset, f"F1, {rule}, blended", ["opacity", "sets"], lines, notes)


def summary_table(results: Entry, dataset: str) -> Table | None:
    """Means over all settings of the paper's grid in the run, as table 5 of the paper; None if there are none."""
    columns, lines = _columns(results, dataset), []
    for rule in RULES:
        for name, opacities in (("full", published.FULL), ("blended", published.BLENDED)):
            attacks = common(results, grid(results, (rule,), opacities), _names(columns))
            if attacks and columns:
                cell = (rule, None, 1.0 if opacities == published.FULL else None)
                lines.append(_Line((f"{rule}, {name}", len(attacks)), attacks, cell))
    if not lines:
        return None
    all_attacks = common(results, grid(results), _names(columns))
    if len(lines) > 1:  # otherwise it would repeat the only line
        is_whole = len(all_attacks) >= WHOLE_GRID
        cell = (None if is_whole else "none: the paper has no mean over these", None, None)
        lines.append(_Line(("all", len(all_attacks)), all_attacks, cell, "ours"))
    notes = _notes(results, all_attacks, columns) + " Full: opacity 100 %; blended: less."
    if len(all_attacks) < len(grid(results)):
        notes += " Only settings that every detector was evaluated on."
    if _has_paper(columns):
        notes += (
            f" The paper's means are over all {WHOLE_GRID} settings of its grid: 6 + 18 all-to-one, 4 + 12 all-to-all."
        )
    return _lines_table(results, dataset, "F1, mean over the settings", ["settings", "sets"], lines, notes)


def calibration_table(results: Entry) -> Table | None:
    """Results outside the paper's grid: clean sets, other poisoning rates; None if the run has none."""
    shown = [row for row in schema.cells(results) if not is_in_grid(row[1]) and row[2] in detectors(results)]
    decimals = {"flagged": 4, "precision": 2, "recall": 2, "f1": 2, "auc": 3}
    measured = {
        shared.LABELS[name]: lambda cell, *_, name=name: schema.number_text(cell, name, decimals[name])
        for name in decimals
    }
    titles = shared.title_columns("training set", "defense")
    columns = {
        "training set": titles["training set"],
        "poisoned": lambda _, attack, __: defenses.poisoned_share(attack),
        "defense": titles["defense"],
        "flagged": measured.pop("flagged"),
        "rows flagged": lambda cell, attack, _: mean_and_spread(_rows_flagged(cell, attack), 0),
        **measured,
    }
    if any(FOUND in cell["facts"] for cell in results["cells"]):
        columns[FOUND] = lambda cell, *_: _fact_text(cell, FOUND)
    notes = (
        "Outside the paper's grid. Poisoned, flagged: shares of all rows; on a clean set every flagged row is a false "
        "alarm. Mean over seeds, ± standard deviation where there are several. Precision is unknown where a seed flags "
        f"nothing, and there is no F1 where nothing is poisoned; F1 here is from 0 to 1. AUC: {DEFINITIONS['auc']}."
    )
    return shared.cell_table("Clean sets and other settings", shown, columns, notes)


def _rows_flagged(cell: Entry, attack: Entry) -> list[float | None]:
    """The number of flagged rows in the training set of each of the cell's seeds."""
    sizes = dict(zip(attack["seeds"], attack["num_rows"], strict=True))
    return [None if row["flagged"] is None else row["flagged"] * sizes[row["seed"]] for row in cell["by_seed"]]


def _fact_text(cell: Entry, name: str) -> str:
    return mean_and_spread([row["facts"].get(name) for row in cell["by_seed"]], 1 if "classes" in name else 2)


def evidence_table(results: Entry) -> Table | None:
    """The evidence behind flags: classes with a found trigger, and how well it works; None if no detector reports that."""
    shown = [row for row in schema.cells(results) if FOUND in row[0]["facts"]]
    names = [name for name in EVIDENCE if any(name in cell["facts"] for cell, *_ in shown)]
    columns = shared.title_columns("training set", "defense")
    columns |= {name: lambda cell, *_, name=name: _fact_text(cell, name) for name in names}
    notes = (
        "Mean over seeds, ± standard deviation where there are several. Classes with a pattern: classes for which a trigger "
        "was extracted and kept."
    )
    if "poisoned classes" in names:
        notes += " Poisoned classes: the target classes of the attack."
    return shared.cell_table("Classes and triggers found", shown, columns, notes)


def main_table(results: Entry, dataset: str) -> Table | None:
    """The means over the paper's settings; if there are none, other settings or all detections."""
    return summary_table(results, dataset) or calibration_table(results) or defenses.detection_table(results)


# ---- Words ----------------------------------------------------------------------------------------------------------


def verdict(results: Entry, about: Sequence[str] = ()) -> Verdict:
    """Put the numbers into words.

    Means are over the settings of the paper's grid if the run has any, otherwise over all training sets with poisoned rows.

    Args:
        results: from `summarise`.
        about: names of the defenses that the headline is about; by default all that flag rows.
    """
    all_detectors = detectors(results)
    shown = _shown(results, about)
    competitors = [detector for detector in all_detectors if detector not in shown]
    sets = grid(results)
    where = "the paper's settings" if sets else "the training sets with poisoned rows"
    known = [(detector, _of_detector(results, detector, sets or results["attacks"])) for detector in shown]
    known = [(detector, measured) for detector, measured in known if measured]
    paragraphs = [_found(detector, measured, where) for detector, measured in known]
    paragraphs += [f"{detector['title']} receives: {_inputs(detector)}." for detector in shown]
    paragraphs += _false_alarms(results, shown)
    paragraphs += [
        text
        for competitor in competitors
        if (text := _beside(results, competitor, shown[0], sets or results["attacks"]))
    ]
    if caveat := schema.one_seed_text(results).strip():
        paragraphs.append(caveat)
    text = "\n\n".join(paragraphs)
    if not all_detectors:
        return Verdict("info", "No defense of this run flags rows.", text)
    if not known:
        return Verdict("info", "No row is known to be poisoned here, so the flags have no F1.", text)
    words = {detection_word(_mean(measured) / 100) for _, measured in known}
    failed = any(_failed(measured) for _, measured in known)
    level = "attacked" if "missed" in words else "warning" if failed or words != {"found"} else "success"
    sentences = [f"{detector['title']} has a mean F1 of {_mean(measured):.1f} %" for detector, measured in known]
    if doubted := _doubted(results, shown):
        text = "\n\n".join([f"Measured all the same: {'; '.join(sentences)}.", text])
        return Verdict(
            "not_tested", f"{doubted} {NOT_TESTED} on {where}: its premise fails on every one of them.", text
        )
    count = len(known[0][1])
    sets_text = f"{count} training set{'s' if count > 1 else ''}"
    headline = f"{'; '.join(sentences)} on {sets_text}."
    if len(known) == 1 and failed:
        headline = f"{sentences[0]}, and fails on {len(_failed(known[0][1]))} of {sets_text}."
    return Verdict(level, headline, text)


def _doubted(results: Entry, shown: Sequence[Entry]) -> str:
    """The titles of the detectors that the report is about, if each of them warns about every training set; otherwise empty."""
    sets = {(attack["attack"], seed) for attack in results["attacks"] for seed in attack["seeds"]}
    for detector in shown:
        warned = {
            (entry["attack"], entry["seed"])
            for entry in results.get("warnings", ())
            if entry["method"] == detector["method"]
        }
        if warned != sets:
            return ""
    return " and ".join(detector["title"] for detector in shown)


def _shown(results: Entry, about: Sequence[str]) -> list[Entry]:
    """The detectors that the report is about."""
    return [detector for detector in detectors(results) if detector["method"] in about] or detectors(results)


def _of_detector(results: Entry, detector: Entry, attacks: Sequence) -> list[tuple[str, float]]:
    """(title, mean F1 in percent) of each training set with a known F1."""
    found = ((attack["title"], f1_of(results, [attack], detector["method"])) for attack in attacks)
    return [(title, f1.mean) for title, f1 in found if f1 is not None]


def _mean(measured: Sequence[tuple[str, float]]) -> float:
    return float(np.mean([f1 for _, f1 in measured]))


def _failed(measured: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(title, f1) for title, f1 in measured if detection_word(f1 / 100) == "missed"]


def _found(detector: Entry, measured: Sequence[tuple[str, float]], where: str) -> str:
    failed = _failed(measured)
    worst, best = (end(f1 for _, f1 in measured) for end in (min, max))
    text = f"{detector['title']}: mean F1 {_mean(measured):.1f} % over {len(measured)} of {where}, "
    text += f"from {worst:.1f} to {best:.1f} %."
    if not failed:
        return f"{text} F1 is never below {100 * DETECTION_FAILS:g} %."
    names = ", ".join(f"{title} ({f1:.1f} %)" for title, f1 in failed[:MOST_NAMES])
    names += f", and {len(failed) - MOST_NAMES} more" if len(failed) > MOST_NAMES else ""
    return f"{text} It fails (F1 below {100 * DETECTION_FAILS:g} %) on {len(failed)}: {names}."


def _false_alarms(results: Entry, shown: Sequence[Entry]) -> list[str]:
    """False alarms on clean training sets, or a sentence that the run has none."""
    alarms = []
    for attack in filter(schema.is_clean, results["attacks"]):
        for detector in shown:
            flagged = mean_of(find(results, attack["attack"], detector["method"]), "flagged")
            if flagged is not None:
                name = attack["title"].replace("no attack", "the clean training set", 1)
                alarms.append(f"{detector['title']} flags {100 * flagged:.2f} % of the rows of {name}")
    if not alarms:
        return ["No clean training set was evaluated, so the rate of false alarms is unknown."]
    return [f"False alarms: {'; '.join(alarms)}."]


def _beside(results: Entry, competitor: Entry, shown: Entry, sets: Sequence) -> str | None:
    """A competitor's results on the training sets that both were evaluated on."""
    both = common(results, sets, (competitor["method"], shown["method"]))
    if not both:
        return None
    competitor_f1, shown_f1 = (_of_detector(results, method, both) for method in (competitor, shown))
    text = (
        f"{competitor['title']}: mean F1 {_mean(competitor_f1):.1f} % on {len(both)} training set{'s' if len(both) > 1 else ''}"
        f" where {shown['title']} has {_mean(shown_f1):.1f} %; fails on {len(_failed(competitor_f1))}. "
        f"It receives: {_inputs(competitor)}."
    )
    flagged = mean_of(find(results, schema.NO_DEFENSE, competitor["method"]), "flagged")
    return text + (f" On the clean set it flags {100 * flagged:.2f} %." if flagged is not None else "")


def _inputs(method: Entry) -> str:
    return ", ".join(
        f"{need} (not available to a real defender)" if need in shared.ORACLES else need for need in method["needs"]
    )


# ---- The page -------------------------------------------------------------------------------------------------------


def page(
    folder: RunFolder,
    results: Entry,
    comparisons: Sequence[Comparison],
    train: Dataset,
    found: Sequence[FoundPattern] = (),
    *,
    seconds: Mapping[str, float],
    title: str = "",
    about: Sequence[str] = (),
    extra_sections: Sequence[Section] = (),
) -> Report:
    """Write the figures into the folder and assemble the page; `report.publish` completes it.

    Args:
        folder: the open run.
        results: from `summarise`.
        comparisons: the comparisons that `results` summarises: each defense on each group of suspects trained in one call. A
            result may be a `Detection` or a `DefenseResult`.
        train: the training set before poisoning.
        found: extracted triggers, shown beside the true triggers.
        seconds: from `sections.seconds_of`.
        title: of the report; by default "Detectors of poisoned rows on" and the dataset.
        about: names of the defenses that the headline is about; by default all that flag rows.
        extra_sections: sections of this experiment alone, after the results.
    """
    name, chosen = train.name, spread_out(results, comparisons)
    main = [table(results, rule, name) for table in (f1_table, blended_table) for rule in RULES]
    faint = [f1_table(results, rule, name, opacity) for rule in RULES for opacity in reversed(published.BLENDED)]
    outside, rates = calibration_table(results), rate_figures(folder, results)
    count = len({measurement.suspect.attack.name for comparison in chosen for measurement in comparison.measured})
    sample = f"First seed; {count} of {len(results['attacks'])} training sets, spread evenly over the table of training sets."
    curves = [*roc_figures(folder, chosen), *shared.score_figures(folder, chosen)]
    settings = shared.settings_of(results)
    # One group for all attacks: there may be dozens.
    attacks = {
        name.removeprefix("attack "): settings.pop(name) for name in list(settings) if name.startswith("attack ")
    }
    return Report(
        title=title or f"Detectors of poisoned rows on {name}",
        verdict=verdict(results, about),
        key_numbers=_key_numbers(results, about),
        facts=defenses.needs_table(results),
        sections=(
            *shared.section("Results", [summary_table(results, name), *main], opacity_figures(folder, results, name)),
            *shared.section("Outside the paper's settings", [outside], rates if outside else []),
            *extra_sections,
            *shared.section(
                "Found triggers", [found_patterns.patterns_table(found)], found_patterns.trigger_figures(folder, found)
            ),
            *shared.section("Evidence behind the flags", [evidence_table(results)]),
            *shared.section("Scores", [], curves, sample),
            *shared.section("Training sets", [defenses.rows_table(results)]),
            *shared.section("Details", [defenses.detection_table(results), *faint, shared.facts_table(results)]),
            *shared.section("Time for one training set", [shared.time_table(results, seconds, folder.is_new)]),
        ),
        settings={"attacks": attacks} | settings,
    )


def _key_numbers(results: Entry, about: Sequence[str]) -> dict[str, str]:
    counts = {"training sets": str(len(results["attacks"])), "detectors": str(len(detectors(results)))}
    means = {}
    for detector in _shown(results, about)[:3]:
        measured = _of_detector(results, detector, grid(results) or results["attacks"])
        if measured:
            means[f"mean F1, {detector['title']}"] = f"{_mean(measured):.1f} %"
        flagged = mean_of(find(results, schema.NO_DEFENSE, detector["method"]), "flagged")
        if flagged is not None:
            means[f"flagged on a clean set, {detector['title']}"] = f"{100 * flagged:.2f} %"
    return means | counts


def spread_out(results: Entry, comparisons: Sequence[Comparison], most: int = shared.MOST_SETS) -> list[Comparison]:
    """A sample of the training sets, spread over the run, first seed only; clean sets are kept first.

    Runs loop over opacities within triggers, or the other way round. A step that is coprime to the number of sets samples all
    values of both.

    Args:
        results: from `summarise`.
        comparisons: every defense on every group of suspects.
        most: largest number of training sets.
    """
    first = {
        measurement.suspect.attack.name
        for comparison in comparisons
        for measurement in comparison.measured
        if measurement.suspect.seed == 0
    }
    present = [attack for attack in results["attacks"] if attack["attack"] in first]
    clean = [attack["attack"] for attack in present if schema.is_clean(attack)][:most]
    rest = [attack["attack"] for attack in present if attack["attack"] not in clean]
    room = min(most - len(clean), len(rest))
    kept = set(clean)
    if room > 0:
        step = next(s for s in itertools.count(math.ceil(len(rest) / room)) if math.gcd(s, len(rest)) == 1)
        kept |= {rest[number * step % len(rest)] for number in range(room)}
    chosen = []
    for comparison in comparisons:
        indices = [
            i
            for i, measurement in enumerate(comparison.measured)
            if measurement.suspect.seed == 0 and measurement.suspect.attack.name in kept
        ]
        if indices:
            values = comparison.result.flags, comparison.result.scores
            flags, scores = (None if array is None else np.asarray(array)[indices] for array in values)
            chosen.append(
                Comparison(comparison.variant, Detection(flags, scores), [comparison.measured[i] for i in indices])
            )
    return chosen


def opacity_figures(folder: RunFolder, results: Entry, dataset: str) -> list[Figure]:
    """F1 against the opacity, with a panel for each label rule that has several opacities."""
    panels = {}
    all_detectors = detectors(results)
    for rule in RULES:
        names = [detector["method"] for detector in all_detectors]
        sets_of = {opacity: common(results, grid(results, (rule,), (opacity,)), names) for opacity in sorted(OPACITIES)}
        of_opacity = {opacity: sets for opacity, sets in sets_of.items() if sets}
        if len(of_opacity) < 2:
            continue
        lines, printed = [], set()
        for detector in all_detectors:
            means = [f1_of(results, sets, detector["method"]) for sets in of_opacity.values()]
            lines.append(_line(detector["title"], list(of_opacity), means))
            if (
                dataset in published.DETECTION_DATASETS
                and detector["base"] in PAPER_TITLES
                and detector["base"] not in printed
            ):
                printed.add(detector["base"])
                cells = [find_f1(dataset, rule, None, opacity, detector["base"]) for opacity in sorted(OPACITIES)]
                f1, deviations = zip(*((cell.f1, cell.standard_deviation) for cell in cells), strict=True)
                lines.append(Line(detector["title"], sorted(OPACITIES), f1, deviations, True))
        counts = sorted({len(sets) for sets in of_opacity.values()})
        count = f"{counts[0]} trigger{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else "triggers"
        panels[f"{rule}, {count}"] = lines
    caption = (
        "F1 against the opacity of the trigger: means over the triggers; bars: standard deviation over seeds of each seed's "
        "mean."
    )
    if any(line.is_paper for lines in panels.values() for line in lines):
        counts = " and ".join(str(len(triggers)) for triggers in published.TRIGGERS.values())
        caption += f" Dotted: the paper's, over {counts} triggers."
    return _f1_figures(folder, panels, "opacity", caption, "the numbers are in the tables above")


def _f1_figures(
    folder: RunFolder, panels: Mapping[str, Sequence[Line]], against: str, caption: str, where: str
) -> list[Figure]:
    """A figure of at most six panels of F1 against the quantity `against`; none if there is no panel."""
    if not panels:
        return []
    figure = detector_plots.f1_by(dict(list(panels.items())[:6]), against)
    path = plots.save(figure, folder.file(f"f1-by-{against.replace(' ', '-')}.png"))
    article = "the " if " " in against else ""
    return [Figure(path, caption, f"Lines of F1 against {article}{against}; {where}.")]


def _line(title: str, x: Sequence[float], means: Sequence[MeanF1]) -> Line:
    return Line(title, x, [f1.mean for f1 in means], [f1.spread for f1 in means])


def rate_figures(folder: RunFolder, results: Entry) -> list[Figure]:
    """F1 against the poisoning rate, with a panel for each attack that has several rates."""
    groups: dict[tuple, dict[float, Entry]] = {}
    for attack in results["attacks"]:
        name, changes = read_variant(attack["attack"])
        rates = [part["settings"].get("poison_rate") for part in attack["parts"]]
        if len(rates) == 1 and rates[0]:
            changes.pop("poison_rate", None)
            groups.setdefault((name, *sorted(changes.items())), {})[rates[0]] = attack
    panels: dict[str, list[Line]] = {}
    for key, of_rate in groups.items():
        if len(of_rate) < 2:
            continue
        lines = []
        for detector in detectors(results):
            means = {rate: f1_of(results, [of_rate[rate]], detector["method"]) for rate in sorted(of_rate)}
            known = {rate: mean for rate, mean in means.items() if mean is not None}
            if known:
                lines.append(_line(detector["title"], list(known), list(known.values())))
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in key[1:])
        part = next(iter(of_rate.values()))["parts"][0]
        panels[part["title"] + (f", {settings}" if settings else "")] = lines
    caption = "F1 against the poisoning rate; bars: standard deviation over seeds."
    return _f1_figures(folder, panels, "poisoning rate", caption, "the numbers are in the tables")


def roc_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """ROC curves, a figure for each defense that scores rows."""
    curves: dict[str, list[Curve]] = {}
    titles = {comparison.variant.name: comparison.variant.title for comparison in comparisons}
    for comparison in comparisons:
        if comparison.result.scores is None:
            continue
        for measurement, scores in zip(comparison.measured, comparison.result.scores, strict=False):
            truth = measurement.suspect.is_poisoned
            if truth is not None and truth.any() and not truth.all():
                from sklearn.metrics import auc, roc_curve  # slow to import

                fpr, tpr, _ = roc_curve(truth, scores)
                curve = Curve(schema.set_title(measurement.suspect), fpr, tpr, float(auc(fpr, tpr)))
                curves.setdefault(comparison.variant.name, []).append(curve)
    figures = []
    for name, group in curves.items():
        path = plots.save(detector_plots.roc(group, titles[name]), folder.file(f"roc-{shared.file_name(name)}.png"))
        caption = (
            f"{titles[name]}: share of poisoned rows found against share of clean rows flagged, for every threshold of its "
            "score; square-root scale on the horizontal axis. Its own flags are at most one point of the curve."
        )
        figures.append(Figure(path, caption, f"Receiver operating characteristics of {titles[name]}."))
    return figures
