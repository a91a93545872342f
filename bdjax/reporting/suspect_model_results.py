"""What methods make of suspect models, as numbers (results.json) and as tables.

A trigger's success is held against what the same trigger achieves where there is no backdoor: on the clean network of the same
seed, and on the student that the same method makes of that (`control_asr`). Two words follow from the numbers:

- a backdoor *passes* through a method if its student's mean ASR is at least 0.3, and at least 0.2 above the control;
- a method *removes* a backdoor that passes through plain distillation if little is left of what it adds to the control. Where
  none passes, there is nothing to remove, whatever the method leaves.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.evaluation.measure import Comparison
from bdjax.evaluation.published import find_published
from bdjax.models import count_parameters
from bdjax.reporting import defense_results
from bdjax.reporting.defense_results import CDA_LOSS, LOW_ASR, LOW_SHARE, ORACLES, find, has_spread, mean_of, seeds_text
from bdjax.reporting.tables import UNKNOWN, Cell, Table, mean_and_spread
from bdjax.types import Model

PASSES, ABOVE_CONTROL = 0.3, 0.2
"""What `DEFINITIONS["passes"]` says."""
DEFINITIONS: Mapping[str, str] = {
    "cda": defense_results.DEFINITIONS["cda"],
    "asr": defense_results.DEFINITIONS["asr"],
    "control_asr": (
        "ASR of the same trigger where no backdoor can be: for the teacher itself, on the clean network of the same seed and "
        "architecture; for a student, on the student that the same method makes of that network"
    ),
    "r_acc": defense_results.DEFINITIONS["r_acc"],
    "passes": f"mean ASR at least {PASSES:g}, and at least {ABOVE_CONTROL:g} above the mean control ASR",
    "removes": (
        "of a backdoor that passes through plain feature distillation (FKD): mean ASR above the control's at most "
        f"{LOW_ASR:g} or at most {LOW_SHARE:g} of what it is for FKD's student, and mean CDA at most {CDA_LOSS:g} below that "
        "student's"
    ),
    "parameters": "trainable numbers of a network; running statistics are not counted",
}


class Networks(NamedTuple):
    """What the teachers are."""

    model: Model
    image_shape: tuple[int, int, int]


def summarise(
    comparisons: Sequence[Comparison],
    controls: Sequence[Sequence[float | None]],
    teachers: Networks,
    test_rows: int,
    seed: int,
    left_out: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Numbers of all methods on all teachers.

    Args:
        comparisons: each method on all teachers; the one called "none" is the teacher itself.
        controls: for each of them and each teacher, the control ASR, or None.
        teachers: their architecture.
        test_rows: how many there are.
        seed: the number of the first.
        left_out: a method -> why the run could not have it.

    Returns:
        A tree of plain numbers, the same for the same inputs; the content of results.json. As
        `defense_results.summarise`, with the architectures and the controls, and without what is of training sets.
    """
    tried = [one for comparison in comparisons for one in comparison.tried]
    results = defense_results.summarise(tried, test_rows, seed, left_out)
    by_suspect = {
        (comparison.variant.name, one.suspect.attack.name, seed + one.suspect.seed): value
        for comparison, values in zip(comparisons, controls, strict=True)
        for one, value in zip(comparison.tried, values, strict=True)
    }
    for attack in results["attacks"]:
        attack["is_clean"] = defense_results.is_clean(attack)
        for name in ("num_rows", "num_poisoned", "num_covers"):  # of training sets; there are none here
            del attack[name]
    of_training_sets = ("flagged", "precision", "recall", "f1", "auc")
    for cell in results["measured"]:
        for row in cell["by_seed"]:
            row["control_asr"] = by_suspect[cell["defense"], cell["attack"], row["seed"]]
            for name in of_training_sets:
                del row[name]
        cell["summary"]["control_asr"] = _spread([row["control_asr"] for row in cell["by_seed"]])
        for name in of_training_sets:
            del cell["summary"][name]
    of_teacher = count_parameters(teachers.model, teachers.image_shape)
    for one, comparison in zip(results["defenses"], comparisons, strict=True):
        model = comparison.result.model
        one["model"] = model.description
        one["parameters"] = count_parameters(model, teachers.image_shape)
        one["share_of_teacher"] = one["parameters"] / of_teacher
    results["definitions"] = dict(DEFINITIONS)
    results["teacher"] = {"model": teachers.model.description, "parameters": of_teacher}
    return results


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    if any(value is None for value in values):
        return {"mean": None, "standard_deviation": None}
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": spread}


def passes(results: Mapping[str, Any], attack: str, method: str) -> bool | None:
    """Whether a backdoor passes through a method, as `DEFINITIONS["passes"]` has it; None where that cannot be said."""
    cell = find(results, attack, method)
    asr, control = mean_of(cell, "asr"), mean_of(cell, "control_asr")
    if asr is None:
        return None
    if asr < PASSES:
        return False
    return None if control is None else asr - control >= ABOVE_CONTROL


def removes(results: Mapping[str, Any], attack: str, method: str, plain: str | None) -> bool | None:
    """Whether a method removes a backdoor, as `DEFINITIONS["removes"]` has it.

    Args:
        results: of `summarise`.
        attack: on the teacher.
        method: the defense variant.
        plain: that of plain distillation; None if the run was without.

    Returns:
        None where there is nothing to remove, or where that cannot be said.
    """
    cell, before = find(results, attack, method), find(results, attack, plain or "")
    if cell is None or before is None or not passes(results, attack, plain):
        return None
    added, added_before = (mean_of(each, "asr") - mean_of(each, "control_asr") for each in (cell, before))
    is_gone = added <= LOW_ASR or added <= LOW_SHARE * added_before
    return is_gone and mean_of(cell, "cda") >= mean_of(before, "cda") - CDA_LOSS


def plain_method(results: Mapping[str, Any], plain: str) -> str | None:
    """The variant of the run that is the plain method: the one without settings of its own, else the first; None if none."""
    names = [one["defense"] for one in results["defenses"] if one["base"] == plain]
    return plain if plain in names else next(iter(names), None)


def is_student(method: Mapping[str, Any]) -> bool:
    """Whether a method is one, and not the teacher itself."""
    return method["base"] != defense_results.NO_DEFENSE


def _three(cell: Mapping[str, Any] | None) -> str | None:
    values = [mean_of(cell, name) for name in ("cda", "asr", "control_asr")]
    if values[0] is None:
        return None
    return " / ".join(UNKNOWN if value is None else f"{value:.3f}" for value in values)


def main_table(results: Mapping[str, Any]) -> Table:
    """Methods × teachers: CDA, ASR, and the same trigger's ASR where no backdoor can be."""
    attacks = results["attacks"]
    rows = [
        (method["title"], *(_three(find(results, one["attack"], method["defense"])) for one in attacks))
        for method in results["defenses"]
    ]
    notes = (
        f"CDA / ASR / control ASR, mean over {seeds_text(results)}, {results['test_rows']:,} test rows. Control: "
        f"{DEFINITIONS['control_asr']}. ASR that the control has as well is no backdoor's."
    )
    deviations = [
        (name, [cell["summary"][name]["standard_deviation"] for cell in results["measured"]]) for name in ("cda", "asr")
    ]
    told = [
        f"{name.upper()} {max(known):.3f}"
        for name, values in deviations
        if (known := [v for v in values if v is not None])
    ]
    if told:
        notes += f" Largest standard deviation over seeds in any cell: {', '.join(told)}."
    if not has_spread(results):
        notes += " A single seed has no spread: small differences mean nothing."
    if any(not attack["parts"] for attack in results["attacks"]):
        notes += f" {UNKNOWN}: no trigger is known, or the run has no such counterpart."
    left_out = "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items())
    notes += f" Left out: {left_out}." if left_out else ""
    header = ("method", *(one["title"] for one in attacks))
    return Table("CDA / ASR / control ASR", header, tuple(rows), notes)


def detail_table(results: Mapping[str, Any], plain: str | None) -> Table:
    """Every number with its spread: a row for each teacher under each method.

    Args:
        results: of `summarise`.
        plain: the variant of plain distillation; None if the run was without.
    """
    rows = []
    for cell, attack, method in _cells(results):
        numbers = (
            mean_and_spread([row[name] for row in cell["by_seed"]]) for name in ("cda", "asr", "control_asr", "r_acc")
        )
        words = passes(results, cell["attack"], cell["defense"]), None
        if is_student(method) and cell["defense"] != plain:
            words = words[0], removes(results, cell["attack"], cell["defense"], plain)
        told = (None if word is None else "yes" if word else "no" for word in words)
        rows.append((attack["title"], method["title"], *numbers, *told))
    notes = (
        f"Mean{' ± standard deviation' if has_spread(results) else ''} over {seeds_text(results)}. Passes: "
        f"{DEFINITIONS['passes']}. Removes: {DEFINITIONS['removes']}; {UNKNOWN} where there is nothing to remove."
    )
    header = ("teacher", "method", "CDA", "ASR", "control ASR", "R-ACC", "passes", "removes")
    return Table("Every number", header, tuple(rows), notes)


def seed_table(results: Mapping[str, Any]) -> Table:
    """Every number of every seed."""
    rows = [
        (attack["title"], method["title"], str(row["seed"]), row["cda"], row["asr"], row["control_asr"], row["r_acc"])
        for cell, attack, method in _cells(results)
        for row in cell["by_seed"]
    ]
    return Table("Every seed", ("teacher", "method", "seed", "CDA", "ASR", "control ASR", "R-ACC"), tuple(rows))


def _cells(results: Mapping[str, Any]) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """(numbers, teacher, method) of every cell."""
    attacks = {one["attack"]: one for one in results["attacks"]}
    methods = {one["defense"]: one for one in results["defenses"]}
    for cell in results["measured"]:
        yield cell, attacks[cell["attack"]], methods[cell["defense"]]


def needs_table(results: Mapping[str, Any]) -> Table:
    """Who was given what, and what comes out: the network and its size."""
    names = [
        name
        for name in ("attacked model", "clean rows", *ORACLES)
        if any(name in one["needs"] for one in results["defenses"])
    ]
    rows = tuple(
        (
            one["title"],
            *("yes" if name in one["needs"] else None for name in names),
            one["model"],
            one["parameters"],
            f"{100 * one['share_of_teacher']:.1f} %",
            one["paper"],
        )
        for one in results["defenses"]
    )
    notes = f"The teacher is a {results['teacher']['model']} of {results['teacher']['parameters']:,} parameters."
    notes += " Nobody was given a training set that an attacker touched."
    if oracles := [name for name in names if name in ORACLES]:
        notes += f" {' and '.join(oracles).capitalize()}: no defender has that."
    shown = ("the teacher" if name == "attacked model" else name for name in names)
    return Table(
        "Who was given what", ("method", *shown, "network", "parameters", "of the teacher's", "paper"), rows, notes
    )


def attack_table(results: Mapping[str, Any]) -> Table:
    """The teachers: how they were attacked."""
    rows = tuple(
        (
            one["title"],
            "; ".join(part["label_rule"] for part in one["parts"]) or None,
            "; ".join(part["paper"] for part in one["parts"]) or None,
            ", ".join(map(str, one["seeds"])),
        )
        for one in results["attacks"]
    )
    return Table("Teachers", ("teacher", "labels", "paper", "seeds"), rows)


def published_table(results: Mapping[str, Any], dataset: str) -> Table | None:
    """Our numbers beside the paper's, in percent, where dataset, both networks, attack and method are the same.

    Args:
        results: of `summarise`.
        dataset: as bdjax names it.

    Returns:
        None if none is.
    """
    teacher = _network(results["teacher"]["model"])
    rows: list[tuple[Cell, ...]] = []
    for cell, attack, method in _cells(results):
        names = {"teacher": teacher, "student": _network(method["model"]), "method": method["base"]}
        itself = find(results, cell["attack"], defense_results.undefended(results) or "")
        for one in find_published(measured="student", dataset=dataset, attack=attack["base"], **names):
            ours = [_percent(mean_of(each, name)) for each in (itself, cell) for name in ("cda", "asr")]
            theirs = one.teacher_accuracy, one.teacher_success, one.clean_accuracy, one.success
            pairs = (value for pair in zip(ours, theirs, strict=True) for value in pair)
            rows.append((attack["title"], method["title"], f"{one.teacher} / {one.student}", *pairs, one.paper))
    if not rows:
        return None
    notes = (
        "In percent; ours are means over seeds. The paper's schedules differ, its tables print the same experiments with "
        "different numbers, and its success counts the target class's rows; its teacher's numbers are printed once for all "
        "attacks. See the settings for the width and the schedule of ours."
    )
    header = (
        "teacher",
        "method",
        "networks",
        *(text for name in ("teacher's CDA", "teacher's ASR", "CDA", "ASR") for text in (name, "the paper's")),
        "paper",
    )
    return Table("Beside the paper", header, tuple(rows), notes, decimals=2)


def _network(description: str) -> str:
    return description.partition(" width ")[0]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def time_table(results: Mapping[str, Any], seconds: Mapping[str, float], is_whole: bool) -> Table | None:
    """Seconds of each method for one teacher; None if none was timed.

    Args:
        results: of `summarise`.
        seconds: method -> seconds of its calls divided by the teachers that shared them.
        is_whole: whether the run was made in one go. If not, stages were read back.
    """
    rows = tuple(
        (one["title"], f"{seconds[one['defense']]:.2f}") for one in results["defenses"] if one["defense"] in seconds
    )
    if not rows:
        return None
    notes = (
        "Wall time of this very process, compiling included and shared by all teachers of a call. Stages that another method "
        "had already trained cost next to nothing here."
    )
    if not is_whole:
        notes += " This run was continued: what an earlier start had trained is not in these seconds."
    return Table("Time", ("method", "seconds per teacher"), rows, notes)
