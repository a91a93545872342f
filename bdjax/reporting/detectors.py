"""The report on detectors of poisoned rows: F1 beside the VBD paper's, false alarms, found triggers, the verdict, the page.

All tables are made of the numbers of `summarise`. The *grid* is the paper's: its triggers, one at a time, at the paper's rate
of poisoning and four opacities, all-to-one and all-to-all. Whatever else a run has (clean sets, other rates, other attacks)
has a table of its own. F1 is in percent, as in the paper. A run that flags nothing counts as 0. In every function `results` is
of `summarise`, and `dataset` is a name as bdjax has it: if the paper has it too, the paper's columns stand beside ours.

No network is trained without the flagged rows here: what is reported is how well the flags fit. Suspects come without their
images, of which a grid has too many to keep; the flagged rows to look at are those beside the found triggers.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import auc, roc_curve

from bdjax.evaluation import published
from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.patterns import FoundPattern
from bdjax.metrics import DEFINITIONS, DETECTION_FAILS, detection_word
from bdjax.reporting import defenses, detector_plots, plots
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
"""The detectors that the paper has numbers of."""
FOUND = "classes with a pattern"
EVIDENCE = (
    FOUND,
    "poisoned classes",
    "poisoned classes found",
    "clean classes taken for poisoned",
    "mean accuracy of the simple networks",
    "best success of a pattern",
)
"""Facts that tell what a detector's flags rest on."""

WHOLE_GRID = 40
"""Settings that the paper has of one dataset."""
_DECIMALS = 1
"""Of F1 in percent: the paper prints two, which five seeds do not bear."""
MOST_TRIGGERS, TRIGGERS_OF_ONE = 24, 6
"""How many found triggers are shown, and how many in one figure."""
MOST_NAMES = 12
"""How many training sets the verdict names."""


class MeanF1(NamedTuple):
    """F1 over several training sets, in percent."""

    by_seed: tuple[float, ...]
    """means over the training sets; their mean alone where these have different seeds"""
    count: int
    """of training sets"""

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def spread(self) -> float | None:
        """Over seeds."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


class _Column(NamedTuple):
    title: str
    method: str | None
    """a variant's name; None for the paper's numbers"""
    base: str
    """whose"""


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(measured: Iterable[Measured], seed: int, left_out: Mapping[str, str] = {}) -> dict[str, Any]:
    """`defenses.summarise` of detectors, which no test row is for.

    Args:
        measured: every suspect before every detector.
        seed: the number of the first.
        left_out: a detector -> why the run could not have it.
    """
    return defenses.summarise(measured, 0, seed, left_out)


def rule_of(attack: Entry) -> str | None:
    """Whether an entry of results["attacks"] sends all classes to one, or all to all; None if neither."""
    rules = {rule for part in attack["parts"] for rule in RULES if part["label_rule"].startswith(rule)}
    return rules.pop() if len(rules) == len(attack["parts"]) == 1 else None


def opacity_of(attack: Entry) -> float | None:
    """How opaque the one trigger of a training set is; None if it has none, several, or one without such a setting."""
    settings = [part["settings"] for part in attack["parts"]]
    return settings[0].get("opacity") if len(settings) == 1 else None


def is_in_grid(attack: Entry) -> bool:
    """Whether an entry of results["attacks"] is one of the paper's settings: see the module's text."""
    base, changes = read_variant(attack["attack"])
    rate = changes.pop("poison_rate", None)
    return (
        base in published.TRIGGERS.get(rule_of(attack), ())
        and opacity_of(attack) in OPACITIES
        and set(changes) <= {"opacity", "target"}
        and rate in (None, published.POISON_RATE)
    )


def grid(results: Entry, rules: Sequence[str] = RULES, opacities: Sequence[float] = OPACITIES):
    """The entries of results["attacks"] in the paper's grid that have one of these rules and opacities."""
    return [
        one for one in results["attacks"] if is_in_grid(one) and rule_of(one) in rules and opacity_of(one) in opacities
    ]


def detectors(results: Entry) -> list[Entry]:
    """The entries of results["methods"] that flag rows."""
    flagging = {cell["method"] for cell in results["cells"] if mean_of(cell, "flagged") is not None}
    return [one for one in results["methods"] if one["method"] in flagging]


def find_f1(
    dataset: str, rule: str | None, attack: str | None, opacity: float | None, detector: str
) -> published.Published | None:
    """The paper's cell with these entries, where None stands for an average; None if it prints none."""
    wanted = {"dataset": dataset, "rule": rule, "attack": attack, "opacity": opacity, "method": detector}
    return next(iter(published.find_published(measured="flags", **wanted)), None)


def common(results: Entry, attacks: Sequence[Entry], methods: Sequence[str]) -> list[Entry]:
    """Those of the attacks that F1 is known of with every one of the detectors, so that their means compare."""
    return [one for one in attacks if all(f1_of(results, [one], name) is not None for name in methods)]


def f1_of(results: Entry, attacks: Sequence[Entry], method: str) -> MeanF1 | None:
    """The mean F1 of a detector over training sets.

    Args:
        results: of `summarise`.
        attacks: entries of results["attacks"].
        method: a variant's name.

    Returns:
        None if there is no training set, or one of them was not tried or has nothing poisoned.
    """
    cells = [find(results, one["attack"], method) for one in attacks]
    if not cells or any(mean_of(cell, "f1") is None for cell in cells):
        return None
    each = [{row["seed"]: 100 * row["f1"] for row in cell["by_seed"]} for cell in cells]
    if any(one.keys() != each[0].keys() for one in each):
        return MeanF1((float(np.mean([np.mean(list(one.values())) for one in each])),), len(each))
    return MeanF1(tuple(float(np.mean([one[seed] for one in each])) for seed in each[0]), len(each))


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _columns(results: Entry, dataset: str) -> list[_Column]:
    """A column for each detector, and beside it the paper's if it has one."""
    columns: list[_Column] = []
    for one in detectors(results):
        columns.append(_Column(one["title"], one["method"], one["base"]))
        printed = _Column(f"{PAPER_TITLES.get(one['base'])}, paper", None, one["base"])
        if dataset in published.DETECTION_DATASETS and one["base"] in PAPER_TITLES and printed not in columns:
            columns.append(printed)
    return columns


def _names(columns: Sequence[_Column]) -> list[str]:
    return [one.method for one in columns if one.method is not None]


def _has_paper(columns: Sequence[_Column]) -> bool:
    return any(one.method is None for one in columns)


class _Line(NamedTuple):
    """A line of a table of F1."""

    start: tuple[Cell, ...]
    """its first cells"""
    attacks: Sequence[Entry]
    """that our means are over"""
    cell: tuple[str | None, str | None, float | None]
    """the paper's: rule, attack, opacity"""
    style: str = ""


def _f1_cell(results: Entry, dataset: str, line: _Line, column: _Column) -> Cell:
    """Our mean over the attacks, or the paper's number."""
    if column.method is not None:
        own = f1_of(results, line.attacks, column.method)
        return None if own is None else mean_and_spread(own.by_seed, _DECIMALS)
    found = find_f1(dataset, *line.cell, column.base)
    return None if found is None else f"{found.f1:.{_DECIMALS}f} ± {found.standard_deviation:.{_DECIMALS}f}"


def _lines_table(
    results: Entry, dataset: str, title: str, first: Sequence[str], lines: Sequence[_Line], notes: str
) -> Table:
    columns = _columns(results, dataset)
    rows = tuple((*line.start, *(_f1_cell(results, dataset, line, one) for one in columns)) for line in lines)
    return Table(title, (*first, *(one.title for one in columns)), rows, notes, tuple(line.style for line in lines))


def _notes(results: Entry, attacks: Sequence[Entry], columns: Sequence[_Column]) -> str:
    sizes = sorted({count for one in attacks for count in one["num_rows"]})
    rows = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    rates = sorted({part["settings"]["poison_rate"] for one in attacks for part in one["parts"]})
    seeds = schema.seeds_text({"attacks": attacks})
    spread = " ± standard deviation" if schema.has_spread({"attacks": attacks}) else ""
    text = (
        f"F1 of the flagged rows in %, mean{spread} over {seeds}; a run that flags nothing counts as 0. Of a mean over "
        f"training sets the spread is that of each seed's mean. {rows} rows in a set, "
        f"{' or '.join(f'{100 * rate:g}' for rate in rates)} % of them poisoned."
    )
    if _has_paper(columns):
        text += (
            " Paper: 5 seeds, 10 % poisoned, all rows of the dataset, its own networks and schedules; runs that came to no "
            "answer count as 0 there."
        )
    return text


def _trigger(attack: Entry) -> str:
    """What a trigger is called in a table of one label rule."""
    target = read_variant(attack["attack"])[1].get("target")
    title = attack["parts"][0]["title"].removesuffix(f", {rule_of(attack)}")
    return title + ("" if target is None else f", target {target}")


def f1_table(results: Entry, rule: str, dataset: str, opacity: float = 1.0) -> Table | None:
    """Triggers × detectors, as tables 1 and 2 of the paper; None if the run has none of these settings.

    The paper prints single triggers at full opacity only, else their mean.
    """
    attacks, columns = grid(results, (rule,), (opacity,)), _columns(results, dataset)
    if not attacks or not columns:
        return None
    lines = [_Line((_trigger(one),), [one], (rule, read_variant(one["attack"])[0], opacity)) for one in attacks]
    compared = common(results, attacks, _names(columns))
    notes = _notes(results, attacks, columns)
    if len(compared) > 1:
        lines.append(_Line((f"mean of {len(compared)} triggers",), compared, (rule, None, opacity), "ours"))
        if len(compared) < len(attacks):
            notes += " Our mean is over the triggers that every detector was tried on."
        if len(compared) != len(published.TRIGGERS[rule]) and _has_paper(columns):
            notes += f" The paper's mean is over its {len(published.TRIGGERS[rule])} triggers."
    how = "full opacity" if opacity == 1 else f"opacity {100 * opacity:g} %"
    return _lines_table(results, dataset, f"F1, {rule}, {how}", ["trigger"], lines, notes)


def blended_table(results: Entry, rule: str, dataset: str) -> Table | None:
    """Opacities × detectors, means over the triggers, as tables 3 and 4 of the paper; None if the run has no such setting."""
    columns, lines = _columns(results, dataset), []
    for opacity in published.BLENDED:
        attacks = common(results, grid(results, (rule,), (opacity,)), _names(columns))
        if attacks and columns:
            lines.append(_Line((f"{100 * opacity:g} %", len(attacks)), attacks, (rule, None, opacity)))
    if not lines:
        return None
    every = [attack for line in lines for attack in line.attacks]
    if len(lines) > 1:
        lines.append(_Line(("mean", len(every)), every, (rule, None, None), "ours"))
    notes = _notes(results, every, columns) + " The last row is over all training sets of those above."
    if _has_paper(columns):
        notes += f" The paper's means are over its {len(published.TRIGGERS[rule])} triggers."
    return _lines_table(results, dataset, f"F1, {rule}, blended", ["opacity", "sets"], lines, notes)


def summary_table(results: Entry, dataset: str) -> Table | None:
    """Means over all settings of the paper's grid that the run has, as its table 5; None if it has none."""
    columns, lines = _columns(results, dataset), []
    for rule in RULES:
        for name, opacities in (("full", published.FULL), ("blended", published.BLENDED)):
            attacks = common(results, grid(results, (rule,), opacities), _names(columns))
            if attacks and columns:
                cell = (rule, None, 1.0 if opacities == published.FULL else None)
                lines.append(_Line((f"{rule}, {name}", len(attacks)), attacks, cell))
    if not lines:
        return None
    every = common(results, grid(results), _names(columns))
    if len(lines) > 1:  # it would be the one line again
        is_whole = len(every) >= WHOLE_GRID
        cell = (None if is_whole else "none: the paper has no mean over these", None, None)
        lines.append(_Line(("all", len(every)), every, cell, "ours"))
    notes = _notes(results, every, columns) + " Full: opacity 100 %; blended: less."
    if len(every) < len(grid(results)):
        notes += " Only settings that every detector was tried on."
    if _has_paper(columns):
        notes += (
            f" The paper's means are over all {WHOLE_GRID} settings of its grid: 6 + 18 all-to-one, 4 + 12 all-to-all."
        )
    return _lines_table(results, dataset, "F1, mean over the settings", ["settings", "sets"], lines, notes)


def calibration_table(results: Entry) -> Table | None:
    """What detectors do outside of the paper's grid: on clean sets, at other poisoning rates; None if the run stays within."""
    shown = [each for each in schema.cells(results) if not is_in_grid(each[1]) and each[2] in detectors(results)]
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
        "Outside of the paper's grid. Poisoned, flagged: shares of all rows; on a clean set every flagged row is a false "
        "alarm. Mean over seeds, ± standard deviation where there are several. Precision is unknown where a seed flags "
        f"nothing, and there is no F1 where nothing is poisoned; F1 here is from 0 to 1. AUC: {DEFINITIONS['auc']}."
    )
    return shared.cell_table("Clean sets and other settings", shown, columns, notes)


def _rows_flagged(cell: Entry, attack: Entry) -> list[float | None]:
    """How many rows are flagged of the training set of each seed that the cell has."""
    sizes = dict(zip(attack["seeds"], attack["num_rows"], strict=True))
    return [None if row["flagged"] is None else row["flagged"] * sizes[row["seed"]] for row in cell["by_seed"]]


def _fact_text(cell: Entry, name: str) -> str:
    return mean_and_spread([row["facts"].get(name) for row in cell["by_seed"]], 1 if "classes" in name else 2)


def evidence_table(results: Entry) -> Table | None:
    """What flags rest on: the classes that a trigger was found of, and how well it works; None if no detector says so."""
    shown = [each for each in schema.cells(results) if FOUND in each[0]["facts"]]
    names = [name for name in EVIDENCE if any(name in cell["facts"] for cell, *_ in shown)]
    columns = shared.title_columns("training set", "defense")
    columns |= {name: lambda cell, *_, name=name: _fact_text(cell, name) for name in names}
    notes = (
        "Mean over seeds, ± standard deviation where there are several. Classes with a pattern: those that a trigger was "
        "extracted of and kept."
    )
    if "poisoned classes" in names:
        notes += " Poisoned classes: those that the attack sends rows to."
    return shared.cell_table("Classes and triggers found", shown, columns, notes)


def main_table(results: Entry, dataset: str) -> Table | None:
    """The means over the paper's settings, or what the run has in their place."""
    return summary_table(results, dataset) or calibration_table(results) or defenses.detection_table(results)


# ---- Words ----------------------------------------------------------------------------------------------------------


def verdict(results: Entry, about: Sequence[str] = ()) -> Verdict:
    """Say in words what the numbers say.

    Means are over the settings of the paper's grid if the run has any, else over all training sets with poisoned rows.

    Args:
        results: of `summarise`.
        about: names of the defenses that the headline is about; by default all that flag rows.
    """
    every = detectors(results)
    shown = [one for one in every if one["method"] in about] or every
    others = [one for one in every if one not in shown]
    sets = grid(results)
    where = "the paper's settings" if sets else "the training sets with poisoned rows"
    known = [(one, _of_detector(results, one, sets or results["attacks"])) for one in shown]
    known = [(one, measured) for one, measured in known if measured]
    paragraphs = [_found(one, measured, where) for one, measured in known]
    paragraphs += [f"{one['title']} is given: {_given(one)}." for one in shown]
    paragraphs += _false_alarms(results, shown)
    paragraphs += [text for one in others if (text := _beside(results, one, shown[0], sets or results["attacks"]))]
    if len(results["seeds"]) == 1:
        paragraphs.append("One seed only: small differences mean nothing.")
    text = "\n\n".join(paragraphs)
    if not every:
        return Verdict("info", "No defense of this run flags rows.", text)
    if not known:
        return Verdict("info", "Nothing is known to be poisoned here: what is flagged has no F1.", text)
    words = {detection_word(_mean(measured) / 100) for _, measured in known}
    failed = any(_failed(measured) for _, measured in known)
    level = "attacked" if "missed" in words else "warning" if failed or words != {"found"} else "clean"
    said = [
        f"{one['title']} finds the poisoned rows with a mean F1 of {_mean(measured):.1f} %" for one, measured in known
    ]
    count = len(known[0][1])
    sets_text = f"{count} training set{'s' if count > 1 else ''}"
    headline = f"{'; '.join(said)} on {sets_text}."
    if len(known) == 1 and failed:
        headline = f"{said[0]}, and fails on {len(_failed(known[0][1]))} of {sets_text}."
    return Verdict(level, headline, text)


def _of_detector(results: Entry, one: Entry, attacks: Sequence) -> list[tuple[str, float]]:
    """(title, mean F1 in percent) of each training set that F1 is known of."""
    found = ((each["title"], f1_of(results, [each], one["method"])) for each in attacks)
    return [(title, f1.mean) for title, f1 in found if f1 is not None]


def _mean(measured: Sequence[tuple[str, float]]) -> float:
    return float(np.mean([f1 for _, f1 in measured]))


def _failed(measured: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(title, f1) for title, f1 in measured if detection_word(f1 / 100) == "missed"]


def _found(one: Entry, measured: Sequence[tuple[str, float]], where: str) -> str:
    failed = _failed(measured)
    worst, best = (end(f1 for _, f1 in measured) for end in (min, max))
    text = f"{one['title']}: mean F1 {_mean(measured):.1f} % over {len(measured)} of {where}, from {worst:.1f} to {best:.1f} %."
    if not failed:
        return f"{text} On none of them is F1 below {100 * DETECTION_FAILS:g} %."
    names = ", ".join(f"{title} ({f1:.1f} %)" for title, f1 in failed[:MOST_NAMES])
    names += f", and {len(failed) - MOST_NAMES} more" if len(failed) > MOST_NAMES else ""
    return f"{text} It fails (F1 below {100 * DETECTION_FAILS:g} %) on {len(failed)}: {names}."


def _false_alarms(results: Entry, shown: Sequence[Entry]) -> list[str]:
    """What is flagged where nothing is poisoned; a sentence if the run has no such set."""
    alarms = []
    for attack in filter(schema.is_clean, results["attacks"]):
        for one in shown:
            flagged = mean_of(find(results, attack["attack"], one["method"]), "flagged")
            if flagged is not None:
                name = attack["title"].replace("no attack", "the clean training set", 1)
                alarms.append(f"{one['title']} flags {100 * flagged:.2f} % of the rows of {name}")
    if not alarms:
        return ["No clean training set was tried, so nothing is known of false alarms on one."]
    return [f"False alarms: {'; '.join(alarms)}."]


def _beside(results: Entry, one: Entry, shown: Entry, sets: Sequence) -> str | None:
    """How a competitor does where both were tried."""
    both = common(results, sets, (one["method"], shown["method"]))
    if not both:
        return None
    theirs, ours = (_of_detector(results, each, both) for each in (one, shown))
    text = (
        f"{one['title']}: mean F1 {_mean(theirs):.1f} % on {len(both)} training set{'s' if len(both) > 1 else ''} where "
        f"{shown['title']} has {_mean(ours):.1f} %; fails on {len(_failed(theirs))}. It is given: {_given(one)}."
    )
    flagged = mean_of(find(results, schema.NO_DEFENSE, one["method"]), "flagged")
    return text + (f" On the clean set it flags {100 * flagged:.2f} %." if flagged is not None else "")


def _given(one: Entry) -> str:
    return ", ".join(f"{need} (no defender has that)" if need in shared.ORACLES else need for need in one["needs"])


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
    """Draw the figures into the folder, and put the page together; `report.publish` completes it.

    Args:
        folder: the open run.
        results: of `summarise`.
        comparisons: what they were made of: each defense on each group of suspects that were members of one call. A result
            may be a `Detection` as well as a `DefenseResult`.
        train: the training set before poisoning.
        found: triggers that were extracted, to be shown beside the true ones.
        seconds: of `sections.seconds_of`.
        title: of the report; by default "Detectors of poisoned rows on" the dataset.
        about: names of the defenses that the headline is about; by default all that flag rows.
        extra_sections: of the experiment's own, after the results.
    """
    name, chosen = train.name, spread_out(results, comparisons)
    main = [table(results, rule, name) for table in (f1_table, blended_table) for rule in RULES]
    faint = [f1_table(results, rule, name, opacity) for rule in RULES for opacity in reversed(published.BLENDED)]
    others, rates = calibration_table(results), rate_figures(folder, results)
    count = len({one.suspect.attack.name for each in chosen for one in each.measured})
    sample = (
        f"Of the first seed, {count} of {len(results['attacks'])} training sets, taken from all over the table of them."
    )
    curves = [*roc_figures(folder, chosen), *shared.score_figures(folder, chosen)]
    settings = shared.settings_of(results)
    # One group for all attacks, of which there may be dozens.
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
            *shared.section("Beside the paper's settings", [others], rates if others else []),
            *extra_sections,
            *shared.section("Found triggers", [], trigger_figures(folder, found)),
            *shared.section("What the flags rest on", [evidence_table(results)]),
            *shared.section("Scores", [], curves, sample),
            *shared.section("Training sets", [defenses.rows_table(results)]),
            *shared.section("Details", [defenses.detection_table(results), *faint, shared.facts_table(results)]),
            *shared.section("Time for one training set", [shared.time_table(results, seconds, folder.is_new)]),
        ),
        settings={"attacks": attacks} | settings,
    )


def _key_numbers(results: Entry, about: Sequence[str]) -> dict[str, str]:
    every = detectors(results)
    shown = [one for one in every if one["method"] in about] or every
    counts = {"training sets": str(len(results["attacks"])), "detectors": str(len(every))}
    means = {}
    for one in shown[:3]:
        measured = _of_detector(results, one, grid(results) or results["attacks"])
        if measured:
            means[f"mean F1, {one['title']}"] = f"{_mean(measured):.1f} %"
        flagged = mean_of(find(results, schema.NO_DEFENSE, one["method"]), "flagged")
        if flagged is not None:
            means[f"flagged on a clean set, {one['title']}"] = f"{100 * flagged:.2f} %"
    return means | counts


def spread_out(results: Entry, comparisons: Sequence[Comparison], most: int = shared.MOST_SETS) -> list[Comparison]:
    """The first seed of some training sets alone, taken from all over the run; clean ones are last to be left out.

    Runs go through opacities within triggers, or the other way round. A step that has no divisor in common with the number of
    sets meets all of both.

    Args:
        results: of `summarise`.
        comparisons: every defense on every group of suspects.
        most: how many training sets.
    """
    first = {one.suspect.attack.name for each in comparisons for one in each.measured if one.suspect.seed == 0}
    clean = [one["attack"] for one in results["attacks"] if one["attack"] in first and schema.is_clean(one)][:most]
    others = [one["attack"] for one in results["attacks"] if one["attack"] in first and one["attack"] not in clean]
    room = min(most - len(clean), len(others))
    kept = set(clean)
    if room > 0:
        step = next(s for s in itertools.count(math.ceil(len(others) / room)) if math.gcd(s, len(others)) == 1)
        kept |= {others[number * step % len(others)] for number in range(room)}
    chosen = []
    for each in comparisons:
        which = [i for i, one in enumerate(each.measured) if one.suspect.seed == 0 and one.suspect.attack.name in kept]
        if which:
            values = each.result.flags, each.result.scores
            flags, scores = (None if one is None else np.asarray(one)[which] for one in values)
            chosen.append(Comparison(each.variant, Detection(flags, scores), [each.measured[i] for i in which]))
    return chosen


def opacity_figures(folder: RunFolder, results: Entry, dataset: str) -> list[Figure]:
    """F1 against the opacity, a panel for each label rule that the run has at several."""
    panels = {}
    every = detectors(results)
    for rule in RULES:
        names = [one["method"] for one in every]
        sets_of = {each: common(results, grid(results, (rule,), (each,)), names) for each in sorted(OPACITIES)}
        of_opacity = {opacity: sets for opacity, sets in sets_of.items() if sets}
        if len(of_opacity) < 2:
            continue
        lines, printed = [], set()
        for one in every:
            means = [f1_of(results, sets, one["method"]) for sets in of_opacity.values()]
            lines.append(_line(one["title"], list(of_opacity), means))
            if dataset in published.DETECTION_DATASETS and one["base"] in PAPER_TITLES and one["base"] not in printed:
                printed.add(one["base"])
                cells = [find_f1(dataset, rule, None, opacity, one["base"]) for opacity in sorted(OPACITIES)]
                f1, deviations = zip(*((cell.f1, cell.standard_deviation) for cell in cells), strict=True)
                lines.append(Line(one["title"], sorted(OPACITIES), f1, deviations, True))
        counts = sorted({len(sets) for sets in of_opacity.values()})
        count = f"{counts[0]} trigger{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else "triggers"
        panels[f"{rule}, {count}"] = lines
    caption = (
        "F1 against the opacity of the trigger: means over the triggers; bars: standard deviation over seeds of each seed's "
        "mean."
    )
    if any(line.is_paper for lines in panels.values() for line in lines):
        counts = " and ".join(str(len(each)) for each in published.TRIGGERS.values())
        caption += f" Dotted: the paper's, over {counts} triggers."
    return _f1_figures(folder, panels, "opacity", caption, "the numbers are in the tables above")


def _f1_figures(
    folder: RunFolder, panels: Mapping[str, Sequence[Line]], against: str, caption: str, where: str
) -> list[Figure]:
    """At most six panels of F1 against something; none if there is no panel."""
    if not panels:
        return []
    figure = detector_plots.f1_by(dict(list(panels.items())[:6]), against)
    path = plots.save(figure, folder.file(f"f1-by-{against.replace(' ', '-')}.png"))
    article = "the " if " " in against else ""
    return [Figure(path, caption, f"Lines of F1 against {article}{against}; {where}.")]


def _line(title: str, x: Sequence[float], means: Sequence[MeanF1]) -> Line:
    return Line(title, x, [one.mean for one in means], [one.spread for one in means])


def rate_figures(folder: RunFolder, results: Entry) -> list[Figure]:
    """F1 against the poisoning rate, a panel for each attack that the run has at several rates."""
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
        for one in detectors(results):
            means = {rate: f1_of(results, [of_rate[rate]], one["method"]) for rate in sorted(of_rate)}
            known = {rate: mean for rate, mean in means.items() if mean is not None}
            if known:
                lines.append(_line(one["title"], list(known), list(known.values())))
        settings = ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in key[1:])
        part = next(iter(of_rate.values()))["parts"][0]
        panels[part["title"] + (f", {settings}" if settings else "")] = lines
    caption = "F1 against the poisoning rate; bars: standard deviation over seeds."
    return _f1_figures(folder, panels, "poisoning rate", caption, "the numbers are in the tables")


def roc_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """How many false alarms it costs to find how many poisoned rows, a figure for each defense that scores rows."""
    curves: dict[str, list[Curve]] = {}
    titles = {each.variant.name: each.variant.title for each in comparisons}
    for each in comparisons:
        for one, scores in zip(each.measured, () if each.result.scores is None else each.result.scores, strict=False):
            truth = one.suspect.is_poisoned
            if truth is not None and truth.any() and not truth.all():
                fpr, tpr, _ = roc_curve(truth, scores)
                curve = Curve(schema.set_title(one.suspect), fpr, tpr, float(auc(fpr, tpr)))
                curves.setdefault(each.variant.name, []).append(curve)
    figures = []
    for name, group in curves.items():
        path = plots.save(detector_plots.roc(group, titles[name]), folder.file(f"roc-{shared.file_name(name)}.png"))
        caption = (
            f"{titles[name]}: poisoned rows found against clean rows flagged, if the threshold of its score is moved; the "
            "horizontal axis is square-rooted. Its own flags are one point of the curve at most."
        )
        figures.append(Figure(path, caption, f"Receiver operating characteristics of {titles[name]}."))
    return figures


def choose_patterns(found: Sequence[FoundPattern], most: int = MOST_TRIGGERS) -> list[FoundPattern]:
    """Some of the found triggers, of as many attacks as possible: the first of each before any second, in their order."""
    attacks = [one.attack for one in found]
    ranks = [attacks[:number].count(attack) for number, attack in enumerate(attacks)]
    chosen = np.argsort(ranks, kind="stable")[:most]
    return [found[i] for i in sorted(chosen)]


def trigger_figures(folder: RunFolder, found: Sequence[FoundPattern]) -> list[Figure]:
    """The found triggers beside the true ones, and on rows that were flagged."""
    shown, figures = choose_patterns(found), []
    for start in range(0, len(shown), TRIGGERS_OF_ONE):
        some = shown[start : start + TRIGGERS_OF_ONE]
        figure = detector_plots.trigger_grid(some)
        path = plots.save(figure, folder.file(f"triggers-{start // TRIGGERS_OF_ONE + 1}.png"))
        caption = f"Triggers {start + 1} to {start + len(some)} of {len(shown)}."
        if not start:
            caption += (
                " Grey is transparent. A found trigger's colours are those of rows that carry the true one, so a faint one "
                "is mixed with what lies under it. Red outlines the found pixels."
            )
            caption += f" {len(found)} were found in all." if len(found) > len(shown) else ""
        figures.append(Figure(path, caption, "; ".join(map(detector_plots.pattern_caption, some))))
    return figures
