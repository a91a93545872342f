"""How well detectors find poisoned rows, as tables: F1 beside the VBD paper's, false alarms, and what was found.

All tables are made of the numbers of `defenses.summarise`. The *grid* is the paper's: its triggers, one at a time, at
their own poisoning rate and four opacities, all-to-one and all-to-all. Whatever else a run has (clean sets, other rates, other
attacks) has a table of its own. F1 is in percent, as in the paper. A run that flags nothing counts as 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.evaluation.published import (
    ALL_TO_ALL,
    ALL_TO_ONE,
    BLENDED,
    DETECTION_DATASETS,
    FULL,
    POISON_RATE,
    TRIGGERS,
    Published,
    find_published,
)
from bdjax.metrics import DEFINITIONS
from bdjax.reporting import results as schema
from bdjax.reporting.tables import Cell, Table, mean_and_spread
from bdjax.settings import read_variant

RULES = (ALL_TO_ONE, ALL_TO_ALL)
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


class MeanF1(NamedTuple):
    """F1 over several training sets, in percent."""

    by_seed: tuple[float, ...]  # means over the training sets; their mean alone where these have different seeds
    count: int  # of training sets

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def spread(self) -> float | None:
        """Over seeds."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


class _Column(NamedTuple):
    title: str
    defense: str | None  # a variant's name; None for the paper's numbers
    base: str  # whose


def rule_of(attack: Mapping[str, Any]) -> str | None:
    """Whether an entry of results["attacks"] sends all classes to one, or all to all; None if neither."""
    rules = {rule for part in attack["parts"] for rule in RULES if part["label_rule"].startswith(rule)}
    return rules.pop() if len(rules) == len(attack["parts"]) == 1 else None


def opacity_of(attack: Mapping[str, Any]) -> float | None:
    """How opaque the one trigger of a training set is; None if it has none, several, or one without such a setting."""
    settings = [part["settings"] for part in attack["parts"]]
    return settings[0].get("opacity") if len(settings) == 1 else None


def is_in_grid(attack: Mapping[str, Any]) -> bool:
    """Whether an entry of results["attacks"] is one of the paper's settings: see the module's text."""
    base, changes = read_variant(attack["attack"])
    rate = changes.pop("poison_rate", None)
    return (
        base in TRIGGERS.get(rule_of(attack), ())
        and opacity_of(attack) in (*FULL, *BLENDED)
        and set(changes) <= {"opacity", "target"}
        and rate in (None, POISON_RATE)
    )


def grid(results: Mapping[str, Any], rules: Sequence[str] = RULES, opacities: Sequence[float] = (*FULL, *BLENDED)):
    """The entries of results["attacks"] in the paper's grid that have one of these rules and opacities."""
    return [
        one for one in results["attacks"] if is_in_grid(one) and rule_of(one) in rules and opacity_of(one) in opacities
    ]


def detectors(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of results["methods"] that flag rows."""
    flagging = {cell["method"] for cell in results["cells"] if schema.mean_of(cell, "flagged") is not None}
    return [one for one in results["methods"] if one["method"] in flagging]


def find_f1(
    dataset: str, rule: str | None, attack: str | None, opacity: float | None, detector: str
) -> Published | None:
    """The paper's cell with these entries, where None stands for an average; None if it prints none."""
    wanted = {"dataset": dataset, "rule": rule, "attack": attack, "opacity": opacity, "method": detector}
    return next(iter(find_published(measured="flags", **wanted)), None)


def common(results: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]], defenses: Sequence[str]) -> list:
    """Those of the attacks that F1 is known of with every one of the defenses, so that their means compare."""
    return [one for one in attacks if all(f1_of(results, [one], name) is not None for name in defenses)]


def f1_of(results: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]], defense: str) -> MeanF1 | None:
    """The mean F1 of a detector over training sets.

    Args:
        results: of `defenses.summarise`.
        attacks: entries of results["attacks"].
        defense: a variant's name.

    Returns:
        None if there is no training set, or one of them was not tried or has nothing poisoned.
    """
    cells = [schema.find(results, one["attack"], defense) for one in attacks]
    if not cells or any(schema.mean_of(cell, "f1") is None for cell in cells):
        return None
    each = [{row["seed"]: 100 * row["f1"] for row in cell["by_seed"]} for cell in cells]
    if any(one.keys() != each[0].keys() for one in each):
        return MeanF1((float(np.mean([np.mean(list(one.values())) for one in each])),), len(each))
    return MeanF1(tuple(float(np.mean([one[seed] for one in each])) for seed in each[0]), len(each))


def _columns(results: Mapping[str, Any], dataset: str) -> list[_Column]:
    """A column for each detector, and beside it the paper's if it has one."""
    columns: list[_Column] = []
    for one in detectors(results):
        base = one["base"]
        columns.append(_Column(one["title"], one["method"], base))
        if (
            dataset in DETECTION_DATASETS
            and base in PAPER_TITLES
            and (base, None) not in [(c.base, c.defense) for c in columns]
        ):
            columns.append(_Column(f"{PAPER_TITLES[base]}, paper", None, base))
    return columns


def _names(columns: Sequence[_Column]) -> list[str]:
    return [one.defense for one in columns if one.defense is not None]


def _row(
    results: Mapping[str, Any],
    columns: Sequence[_Column],
    attacks: Sequence[Mapping[str, Any]],
    dataset: str,
    cell: tuple[str | None, str | None, float | None],
) -> tuple[Cell, ...]:
    """Our means over the attacks, and the paper's cell (rule, attack, opacity)."""
    texts: list[Cell] = []
    for column in columns:
        if column.defense is None:
            found = find_f1(dataset, *cell, column.base)
            texts.append(
                None if found is None else f"{found.f1:.{_DECIMALS}f} ± {found.standard_deviation:.{_DECIMALS}f}"
            )
        else:
            own = f1_of(results, attacks, column.defense)
            texts.append(None if own is None else mean_and_spread(own.by_seed, _DECIMALS))
    return tuple(texts)


def _notes(results: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]], columns: Sequence[_Column]) -> str:
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
    if any(one.defense is None for one in columns):
        text += (
            " Paper: 5 seeds, 10 % poisoned, all rows of the dataset, its own networks and schedules; runs that came to no "
            "answer count as 0 there."
        )
    return text


def _trigger(attack: Mapping[str, Any]) -> str:
    """What a trigger is called in a table of one label rule."""
    target = read_variant(attack["attack"])[1].get("target")
    title = attack["parts"][0]["title"].removesuffix(f", {rule_of(attack)}")
    return title + ("" if target is None else f", target {target}")


def f1_table(results: Mapping[str, Any], rule: str, dataset: str, opacity: float = 1.0) -> Table | None:
    """Triggers × detectors, as tables 1 and 2 of the paper; None if the run has none of these settings.

    Args:
        results: of `defenses.summarise`.
        rule: ALL_TO_ONE or ALL_TO_ALL.
        dataset: as bdjax names it; if the paper has it, its columns stand beside ours.
        opacity: of the triggers. The paper prints single triggers at full opacity only, else their mean.
    """
    attacks, columns = grid(results, (rule,), (opacity,)), _columns(results, dataset)
    if not attacks or not columns:
        return None
    rows = [
        (_trigger(one), *_row(results, columns, [one], dataset, (rule, read_variant(one["attack"])[0], opacity)))
        for one in attacks
    ]
    styles = [""] * len(rows)
    shared = common(results, attacks, _names(columns))
    notes = _notes(results, attacks, columns)
    if len(shared) > 1:
        rows.append(
            (f"mean of {len(shared)} triggers", *_row(results, columns, shared, dataset, (rule, None, opacity)))
        )
        styles.append("ours")
        notes += _other_triggers(rule, shared, attacks, columns)
    how = "full opacity" if opacity == 1 else f"opacity {100 * opacity:g} %"
    return Table(f"F1, {rule}, {how}", ("trigger", *(c.title for c in columns)), tuple(rows), notes, tuple(styles))


def _other_triggers(rule: str, shared: Sequence, attacks: Sequence, columns: Sequence[_Column]) -> str:
    text = "" if len(shared) == len(attacks) else " Our mean is over the triggers that every detector was tried on."
    if len(shared) != len(TRIGGERS[rule]) and any(one.defense is None for one in columns):
        text += f" The paper's mean is over its {len(TRIGGERS[rule])} triggers."
    return text


def blended_table(results: Mapping[str, Any], rule: str, dataset: str) -> Table | None:
    """Opacities × detectors, means over the triggers, as tables 3 and 4 of the paper; None if the run has no such setting.

    Args:
        results: of `defenses.summarise`.
        rule: ALL_TO_ONE or ALL_TO_ALL.
        dataset: as bdjax names it.
    """
    columns, every, rows = _columns(results, dataset), [], []
    for opacity in BLENDED:
        attacks = common(results, grid(results, (rule,), (opacity,)), _names(columns))
        if attacks and columns:
            numbers_of_one = _row(results, columns, attacks, dataset, (rule, None, opacity))
            rows.append((f"{100 * opacity:g} %", len(attacks), *numbers_of_one))
            every += attacks
    if not rows:
        return None
    styles = [""] * len(rows)
    if len(rows) > 1:
        rows.append(("mean", len(every), *_row(results, columns, every, dataset, (rule, None, None))))
        styles.append("ours")
    notes = _notes(results, every, columns) + " The last row is over all training sets of those above."
    if any(one.defense is None for one in columns):
        notes += f" The paper's means are over its {len(TRIGGERS[rule])} triggers."
    header = ("opacity", "sets", *(one.title for one in columns))
    return Table(f"F1, {rule}, blended", header, tuple(rows), notes, tuple(styles))


def summary_table(results: Mapping[str, Any], dataset: str) -> Table | None:
    """Means over all settings of the paper's grid that the run has, as its table 5; None if it has none.

    Args:
        results: of `defenses.summarise`.
        dataset: as bdjax names it.
    """
    columns = _columns(results, dataset)
    parts = [
        (f"{rule}, {name}", (rule,), opacities, (rule, None, 1.0 if opacities == FULL else None))
        for rule in RULES
        for name, opacities in (("full", FULL), ("blended", BLENDED))
    ]
    rows = []
    for name, rules, opacities, cell in [*parts, ("all", RULES, (*FULL, *BLENDED), (None, None, None))]:
        attacks = common(results, grid(results, rules, opacities), _names(columns))
        if name == "all" and len(rows) < 2:
            break  # it would be the one row again
        if name == "all" and len(attacks) < WHOLE_GRID:
            cell = ("none: the paper has no mean over these", None, None)
        if attacks and columns:
            rows.append((name, len(attacks), *_row(results, columns, attacks, dataset, cell)))
    if not rows:
        return None
    shared = common(results, grid(results), _names(columns))
    notes = _notes(results, shared, columns)
    notes += " Full: opacity 100 %; blended: less."
    if len(shared) < len(grid(results)):
        notes += " Only settings that every detector was tried on."
    if any(one.defense is None for one in columns):
        notes += (
            f" The paper's means are over all {WHOLE_GRID} settings of its grid: 6 + 18 all-to-one, 4 + 12 all-to-all."
        )
    styles = tuple("ours" if row[0] == "all" else "" for row in rows)
    header = ("settings", "sets", *(one.title for one in columns))
    return Table("F1, mean over the settings", header, tuple(rows), notes, styles)


def calibration_table(results: Mapping[str, Any]) -> Table | None:
    """What detectors do outside of the paper's grid: on clean sets, at other poisoning rates; None if the run stays within."""
    rows: list[tuple[Cell, ...]] = []
    has_patterns = any(FOUND in cell["facts"] for cell in results["cells"])
    for attack in results["attacks"]:
        if is_in_grid(attack):
            continue
        poisoned = attack["num_poisoned"]
        share = None if poisoned is None else float(np.sum(poisoned) / np.sum(attack["num_rows"]))
        for one in detectors(results):
            cell = schema.find(results, attack["attack"], one["method"])
            if cell is None:
                continue
            counts = [
                None if row["flagged"] is None else row["flagged"] * size
                for row, size in zip(cell["by_seed"], _sizes(attack, cell), strict=True)
            ]
            measured = [
                mean_and_spread([row[name] for row in cell["by_seed"]], decimals)
                for name, decimals in (("flagged", 4), ("precision", 2), ("recall", 2), ("f1", 2), ("auc", 3))
            ]
            found = (mean_and_spread([row["facts"].get(FOUND) for row in cell["by_seed"]], 1),) if has_patterns else ()
            name = attack["title"]
            rows.append((name, share, one["title"], measured[0], mean_and_spread(counts, 0), *measured[1:], *found))
    if not rows:
        return None
    header = ("training set", "poisoned", "defense", "flagged", "rows flagged", "precision", "recall", "F1", "AUC")
    notes = (
        "Outside of the paper's grid. Poisoned, flagged: shares of all rows; on a clean set every flagged row is a false "
        "alarm. Mean over seeds, ± standard deviation where there are several. Precision is unknown where a seed flags "
        f"nothing, and there is no F1 where nothing is poisoned; F1 here is from 0 to 1. AUC: {DEFINITIONS['auc']}."
    )
    header += ("classes with a pattern",) if has_patterns else ()
    return Table("Clean sets and other settings", header, tuple(rows), notes)


def _sizes(attack: Mapping[str, Any], cell: Mapping[str, Any]) -> list[int]:
    """Rows of the training set of each seed that the cell has."""
    of_seed = dict(zip(attack["seeds"], attack["num_rows"], strict=True))
    return [of_seed[row["seed"]] for row in cell["by_seed"]]


def evidence_table(results: Mapping[str, Any]) -> Table | None:
    """What flags rest on: the classes that a trigger was found of, and how well it works; None if no detector says so."""
    titles = {one["method"]: one["title"] for one in results["methods"]}
    cells = [
        (attack, cell)
        for attack in results["attacks"]
        for name in titles
        if (cell := schema.find(results, attack["attack"], name)) is not None and FOUND in cell["facts"]
    ]
    if not cells:
        return None
    names = [name for name in EVIDENCE if any(name in cell["facts"] for _, cell in cells)]
    rows = tuple(
        (
            attack["title"],
            titles[cell["method"]],
            *(
                mean_and_spread([row["facts"].get(name) for row in cell["by_seed"]], 1 if "classes" in name else 2)
                for name in names
            ),
        )
        for attack, cell in cells
    )
    notes = (
        "Mean over seeds, ± standard deviation where there are several. Classes with a pattern: those that a trigger was "
        "extracted of and kept."
    )
    if "poisoned classes" in names:
        notes += " Poisoned classes: those that the attack sends rows to."
    return Table("Classes and triggers found", ("training set", "defense", *names), rows, notes)
