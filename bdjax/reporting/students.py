"""The report on methods that start from suspect models, such as distillation: numbers, tables, verdict and page.

The ASR of a trigger is compared with that of the same trigger where there is no backdoor (`control_asr`): on the clean network
of the same seed, or on the student that the same method makes from it. Two words follow from the numbers:

- a backdoor *passes* through a method if the student has it, by `metrics.has_backdoor`;
- a backdoor that passes through plain distillation is then *removed*, *weakened* or *kept* by another method, by
  `metrics.defense_word`. If it does not pass, there is nothing to remove, whatever its ASR after the method.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.evaluation.measure import Comparison
from bdjax.evaluation.student_curves import ALLOWED_DROP, CurvePoint, best_point
from bdjax.metrics import DEFINITIONS, DefenseWord, has_backdoor
from bdjax.models import count_parameters
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.defenses import WORDS
from bdjax.reporting.report import Figure, Report, Section, Verdict, level_of
from bdjax.reporting.results import find, mean_of
from bdjax.reporting.sections import ORACLES, Entry
from bdjax.reporting.tables import UNKNOWN, Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.types import Model, TrainTest

PLAIN = "fkd"
"""Plain distillation, which passes backdoors on: the baseline."""
_NAMES = ("cda", "asr", "control_asr", "r_acc")


class Networks(NamedTuple):
    """The architecture of the teachers."""

    model: Model
    image_shape: tuple[int, int, int]


def summarise(
    comparisons: Sequence[Comparison],
    controls: Sequence[Sequence[float | None]],
    teachers: Networks,
    test_rows: int,
    seed: int,
    left_out: Mapping[str, str] = {},
    curves: Mapping[str, Sequence[CurvePoint]] = {},
) -> dict[str, Any]:
    """Numbers of all methods on all teachers: the content of results.json, as `bdjax.reporting.results` has it.

    Args:
        comparisons: each method on all teachers; the one called "none" is the teacher itself.
        controls: the control ASR of each comparison and each teacher, or None.
        teachers: their architecture.
        test_rows: number of test rows.
        seed: number of the first seed.
        left_out: a method -> why it is not in the run.
        curves: a method -> its students during their training.
    """
    measured = [measurement for comparison in comparisons for measurement in comparison.measured]
    values = (value for of_method in controls for value in of_method)
    keys = (
        (measurement.suspect.attack.name, measurement.variant.name, measurement.suspect.seed)
        for measurement in measured
    )
    of_teacher, facts = count_parameters(teachers.model, teachers.image_shape), {}
    for variant, result, _ in comparisons:
        parameters = count_parameters(result.model, teachers.image_shape)
        size = {"parameters": parameters, "share_of_teacher": parameters / of_teacher}
        facts[variant.name] = {"model": result.model.description, **size}
    return schema.summarise(
        measured,
        _NAMES,
        (*_NAMES, "passes", *WORDS, "parameters"),
        test_rows,
        seed,
        left_out,
        dict(zip(keys, values, strict=True)),
        method_facts=facts,
        teacher={"model": teachers.model.description, "parameters": of_teacher},
        **({"curves": found} if (found := _curves(comparisons, seed, curves)) else {}),
    )


def _curves(
    comparisons: Sequence[Comparison], seed: int, curves: Mapping[str, Sequence[CurvePoint]]
) -> list[dict[str, Any]]:
    """An entry for each method and each teacher with a trigger: its students' numbers by epoch, and those of the best epoch."""
    of_teachers = next((of.measured for of in comparisons if of.variant.defense.name == schema.NO_DEFENSE), None)
    found = []
    for variant, _, measured in comparisons:
        points = curves.get(variant.name, ())
        for number, student in enumerate(measured):
            if not points or not student.metrics:
                continue
            of_student = [
                {"epoch": point.epoch} | {name: getattr(point, name)[number] for name in ("cda", "asr", "control_asr")}
                for point in points
            ]
            best = best_point(points, number, of_teachers[number].cda) if of_teachers else None
            names = {"attack": student.suspect.attack.name, "method": variant.name}
            found.append(
                {
                    **names,
                    "seed": seed + student.suspect.seed,
                    "points": of_student,
                    "best": next((point for point in of_student if best and point["epoch"] == best.epoch), None),
                }
            )
    return found


def passes(results: Entry, attack: str, method: str | None) -> bool | None:
    """Whether a backdoor passes through a method, as defined by `DEFINITIONS["passes"]`; None if the control is missing."""
    cell = find(results, attack, method)
    asr, control = mean_of(cell, "asr"), mean_of(cell, "control_asr")
    if asr is None or (control is None and has_backdoor(asr, 0.0)):
        return None
    return has_backdoor(asr, control or 0.0)


def word_of(results: Entry, attack: str, method: str, plain: str | None) -> DefenseWord | None:
    """How a method changes a backdoor, compared with plain distillation (the variant `plain`); None where that is unknown."""
    is_student = method not in (plain, schema.undefended(results))
    is_known = is_student and passes(results, attack, plain) is not None
    return schema.word_of(results, attack, method, plain) if is_known else None


def plain_method(results: Entry, plain: str = PLAIN) -> str | None:
    """The run's variant of the plain method: the one with default settings, else the first; None if there is none."""
    names = [method["method"] for method in results["methods"] if method["base"] == plain]
    return plain if plain in names else next(iter(names), None)


def main_table(results: Entry) -> Table:
    """Methods × teachers: CDA, ASR and control ASR."""
    notes = f" Control: {DEFINITIONS['control_asr']}. ASR that the control reaches, too, is not due to a backdoor."
    if any(not attack["parts"] for attack in results["attacks"]):
        notes += f" {UNKNOWN}: no trigger is known, or the run has no control for it."
    return shared.comparison_table(results, ("cda", "asr", "control_asr"), "method", notes, by_method=True)


def detail_table(results: Entry, plain: str | None) -> Table | None:
    """Every number with its spread: a row for each teacher and method; `plain` is the variant of plain distillation."""

    def passing(_: Entry, attack: Entry, method: Entry) -> str | None:
        return {None: None, True: "yes", False: "no"}[passes(results, attack["attack"], method["method"])]

    columns = {
        **shared.title_columns("teacher", "method"),
        **shared.number_columns(_NAMES),
        "passes": passing,
        "backdoor": lambda _, attack, method: word_of(results, attack["attack"], method["method"], plain),
    }
    notes = (
        f"{schema.mean_text(results).capitalize()}.{shared.explain('passes', *WORDS)} {UNKNOWN}: the teacher itself, plain "
        "distillation, or no known trigger."
    )
    return shared.cell_table("Every number", schema.cells(results), columns, notes)


def seed_table(results: Entry) -> Table:
    """Every number of every seed."""
    rows = tuple(
        (attack["title"], method["title"], str(row["seed"]), *(row[name] for name in _NAMES))
        for cell, attack, method in schema.cells(results)
        for row in cell["by_seed"]
    )
    return Table("Every seed", ("teacher", "method", "seed", *(shared.LABELS[name] for name in _NAMES)), rows)


def needs_table(results: Entry) -> Table:
    """What each method receives, and the network that it returns, with its size."""
    teacher = results["teacher"]
    notes = f"The teacher is a {teacher['model']} of {teacher['parameters']:,} parameters."
    needs = {"attacked model": "the teacher", "clean rows": "clean rows", **{name: name for name in ORACLES}}
    after = {
        "network": lambda method: method["model"],
        "parameters": lambda method: method["parameters"],
        "of the teacher's": lambda method: f"{100 * method['share_of_teacher']:.1f} %",
        "paper": lambda method: method["paper"],
    }
    notes += " No method receives a training set that an attacker touched."
    return shared.needs_table(results, {"method": lambda method: method["title"]}, needs, after, notes)


def attack_table(results: Entry) -> Table:
    """The teachers and their attacks."""
    columns = {
        "teacher": lambda attack: attack["title"],
        "labels": lambda attack: "; ".join(part["label_rule"] for part in attack["parts"]) or None,
        "paper": lambda attack: "; ".join(part["paper"] for part in attack["parts"]) or None,
        "seeds": lambda attack: ", ".join(map(str, attack["seeds"])),
    }
    return shared.entry_table("Teachers", results["attacks"], columns)


def verdict(results: Entry, about: str, plain: str = PLAIN) -> Verdict:
    """Put the numbers into words.

    Args:
        results: from `summarise`.
        about: the base name of the method that the headline is about.
        plain: the base name of plain distillation.
    """
    baseline = plain_method(results, plain)
    titles = {method["method"]: method["title"] for method in results["methods"]}
    methods = [
        method["method"] for method in results["methods"] if method["base"] == about and method["method"] != baseline
    ]
    attacked = [attack for attack in results["attacks"] if attack["parts"]]
    if not attacked:
        return _without_trigger(results)
    if baseline is None:
        headline = "Plain distillation is not among the methods, so it is unknown which backdoors would have passed."
        return Verdict("info", headline, schema.one_seed_text(results).strip())
    does_pass = {attack["attack"]: passes(results, attack["attack"], baseline) for attack in attacked}
    passing = [attack for attack in attacked if does_pass[attack["attack"]]]
    paragraphs = [_on_attack(results, attack, baseline, methods, titles) for attack in attacked]
    is_shown = {*methods, baseline, schema.undefended(results)}
    shown = [method for method in results["methods"] if method["method"] in is_shown]
    paragraphs += [
        shared.accuracy_text(results, attack, shown) for attack in results["attacks"] if schema.is_clean(attack)
    ]
    text = "\n\n".join([*paragraphs, shared.explain("passes", "removed").strip()]) + schema.one_seed_text(results)
    if not passing:
        headline = _nothing_passes(attacked, does_pass, titles[baseline], [titles[method] for method in methods])
        return Verdict("info", headline, text)
    several = len(passing) > 1
    if not methods:
        count = f"{len(passing)} backdoor{'s' * several} of {len(attacked)}"
        return Verdict("attacked", f"{count} pass{'es' * (not several)} through {titles[baseline]}.", text)
    words = [[word_of(results, attack["attack"], method, baseline) for attack in passing] for method in methods]
    clause = f" that pass{'es' * (not several)} through {titles[baseline]}"
    headline = shared.headline([titles[method] for method in methods], words, "variants", clause)
    return Verdict(level_of(word for outcomes in words for word in outcomes), headline, text)


def _nothing_passes(
    attacked: Sequence[Entry], does_pass: Mapping[str, bool | None], plain: str, methods: Sequence[str]
) -> str:
    without_control = [attack["title"] for attack in attacked if does_pass[attack["attack"]] is None]
    if without_control:
        return f"It is unknown whether a backdoor passes through {plain}: there is no control for {', '.join(without_control)}."
    about = f" for {methods[0]}" if len(methods) == 1 else ""
    return f"No backdoor passes through {plain} here, so there is nothing to remove{about}."


def _on_attack(results: Entry, attack: Entry, plain: str, methods: Sequence[str], titles: Mapping[str, str]) -> str:
    """A paragraph on one attacked teacher."""
    name, itself = attack["attack"], schema.undefended(results)
    teacher, student = find(results, name, itself), find(results, name, plain)
    controls = mean_of(teacher, "control_asr"), mean_of(student, "control_asr")
    text = f"{attack['title']}: the teacher has ASR {mean_of(teacher, 'asr'):.2f}"
    text += f" (the clean network {controls[0]:.2f})" if controls[0] is not None else ""
    control = "no clean-teacher control" if controls[1] is None else f"clean teacher's {controls[1]:.2f}"
    text += f", {titles[plain]}'s student {mean_of(student, 'asr'):.2f} ({control}): "
    does_pass = passes(results, name, plain)
    if does_pass is None:
        return f"{text}it is unknown whether a backdoor passes through {titles[plain]}."
    if passes(results, name, itself) is False:
        return f"{text}the teacher has no backdoor, so there is nothing to remove."
    if not does_pass:
        return f"{text}the backdoor does not pass through {titles[plain]}, so there is nothing to remove."
    text += f"the backdoor passes through {titles[plain]}."
    for method in methods:
        cell = find(results, name, method)
        outcome = shared.OUTCOMES[word_of(results, name, method, plain)].format("it")
        cda = f"CDA {mean_of(cell, 'cda'):.2f} against {mean_of(student, 'cda'):.2f}"
        asr = f"ASR {mean_of(cell, 'asr'):.2f} (clean teacher's {mean_of(cell, 'control_asr'):.2f})"
        text += f" {titles[method]} {outcome}: {asr}, {cda}."
    return text


def _without_trigger(results: Entry) -> Verdict:
    lines = [shared.accuracy_text(results, attack, results["methods"]) for attack in results["attacks"]]
    headline = "The teacher is clean: only the cost of the methods can be measured."
    if not all(map(schema.is_clean, results["attacks"])):
        headline = "Trigger unknown: only CDA can be measured."
        lines.append(
            "A student may have a backdoor that no number here shows. A run with --attacks on the same data shows what each "
            "method does to known backdoors."
        )
    return Verdict("info", headline, "\n\n".join(lines) + schema.one_seed_text(results))


def page(
    folder: RunFolder,
    results: Entry,
    comparisons: Sequence[Comparison],
    data: TrainTest,
    *,
    seconds: Mapping[str, float],
    title: str,
    about: str,
    plain: str = PLAIN,
    extra_sections: Sequence[Section] = (),
) -> Report:
    """Write the figures into the folder and assemble the page; `report.publish` completes it.

    Args:
        folder: the open run.
        results: from `summarise`.
        comparisons: the comparisons that `results` summarises.
        data: the clean training set, and the test set.
        seconds: from `sections.seconds_of`.
        title: of the report.
        about: the base name of the method that the headline is about.
        plain: the base name of plain distillation.
        extra_sections: sections of this experiment alone, after the results.
    """
    baseline = plain_method(results, plain)
    details = detail_table(results, baseline), seed_table(results), shared.facts_table(results, "teacher", "method")
    times = shared.time_table(results, seconds, folder.is_new, "teacher", "method")
    main = main_table(results), shared.published_table(results, data.train.name, "teacher", "method")
    return Report(
        title=title,
        verdict=verdict(results, about, plain),
        key_numbers=_key_numbers(results, about, baseline),
        facts=needs_table(results),
        sections=(
            *shared.section("Results", main, result_figures(folder, results)),
            *extra_sections,
            *shared.section("During distillation", [epoch_table(results)], curve_figures(folder, results)),
            *shared.section("Teachers", [attack_table(results)]),
            *shared.section("What the methods found", [], shared.picture_figures(folder, comparisons)),
            *shared.section("Details", details),
            *shared.section("Time for one teacher", [times]),
        ),
        settings=shared.settings_of(results, "method"),
    )


def _key_numbers(results: Entry, about: str, plain: str | None) -> dict[str, str]:
    """Sizes, and means over attacks of plain distillation and of the method that the report is about."""
    shown = [method for method in results["methods"] if method["method"] == plain]
    shown += [method for method in results["methods"] if method["base"] == about][:1]
    tiles = {"parameters of the teacher": f"{results['teacher']['parameters']:,}"}
    if shown:
        tiles["of the student"] = f"{shown[-1]['parameters']:,} ({100 * shown[-1]['share_of_teacher']:.1f} %)"
    attacks = [attack for attack in results["attacks"] if attack["parts"]]
    return tiles | shared.key_numbers(
        results, {method["method"]: method["title"] for method in shown}, ("asr", "cda"), attacks
    )


def result_figures(folder: RunFolder, results: Entry) -> list[Figure]:
    """Bars of ASR for each teacher and method, and ASR against CDA; none if no trigger is known."""
    if not shared.with_asr(results):
        return []
    about = "ASR of the teacher and of each method's student: mean over seeds, with the standard deviation."
    figures = [_bars(folder, results, "asr", "asr.png", about, "attack success for each method and attack")]
    if schema.is_known(results, "control_asr"):
        about = (
            "Control ASR: the same triggers on the clean network, and on the student that each method makes from it."
        )
        figures.append(
            _bars(folder, results, "control_asr", "control-asr.png", about, "attack success without a backdoor")
        )
    return [*figures, shared.trade_off_figure(folder, results, "method")]


def epoch_table(results: Entry) -> Table | None:
    """The last and the best epoch of each method's students; None if no student was measured during its training."""
    by_cell: dict[tuple[str, str], list[Entry]] = {}
    for curve in results.get("curves", ()):
        by_cell.setdefault((curve["attack"], curve["method"]), []).append(curve)
    if not by_cell:
        return None
    titles = [{entry[kind]: entry["title"] for entry in results[f"{kind}s"]} for kind in ("attack", "method")]
    rows = []
    for (attack, method), curves in by_cell.items():
        last = [curve["points"][-1] for curve in curves]
        best = [curve["best"] for curve in curves]
        rows.append(
            (
                titles[0][attack],
                titles[1][method],
                last[0]["epoch"],
                *(mean_and_spread([point[name] for point in last]) for name in ("asr", "control_asr")),
                *(mean_and_spread([point and point[name] for point in best]) for name in ("asr", "control_asr", "cda")),
            )
        )
    header = (
        "teacher",
        "method",
        "epochs",
        "ASR, last",
        "control, last",
        "ASR, best epoch",
        "control, then",
        "CDA, then",
    )
    notes = (
        f"{schema.mean_text(results).capitalize()}. Best epoch: the epoch with the highest ASR among those measured (about "
        f"20 of a training) in which the student's CDA is at most {ALLOWED_DROP:g} below its teacher's, as the public code of "
        f"CKD chooses it; {UNKNOWN} where a seed has no such epoch. It is chosen with the trigger, so it is the attacker's "
        "number; a user gets the last epoch."
    )
    return Table("The last and the best epoch", header, tuple(rows), notes)


def curve_figures(folder: RunFolder, results: Entry) -> list[Figure]:
    """ASR, control ASR and CDA of each method's students by epoch, with a panel for each teacher and method."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    epochs: dict[str, list[int]] = {}
    titles = [{entry[kind]: entry["title"] for entry in results[f"{kind}s"]} for kind in ("attack", "method")]
    for curve in results.get("curves", ()):
        name = f"{titles[1][curve['method']]}, {titles[0][curve['attack']]}"
        epochs[name] = [point["epoch"] for point in curve["points"]]
        for metric in ("asr", "control_asr", "cda"):
            values = [point[metric] for point in curve["points"]]
            if None not in values:
                panels.setdefault(name, {}).setdefault(shared.LABELS[metric], []).append(values)
    if not panels:
        return []
    lines = {name: {metric: np.array(values) for metric, values in panel.items()} for name, panel in panels.items()}
    figure = plots.training_curves(lines, value_label="rate", epochs=epochs)
    path = plots.save(figure, folder.file("students-by-epoch.png"))
    about = "The students during their distillation: mean over seeds, band from the lowest to the highest seed."
    return [Figure(path, about, "Lines of ASR, control ASR and CDA by epoch; the numbers are in results.json.")]


def _bars(folder: RunFolder, results: Entry, name: str, file: str, caption: str, content: str) -> Figure:
    """A group of bars for each method, and a colour for each attack, since there are more methods than attacks."""
    methods = results["methods"]
    values, spreads = (
        {
            attack["title"]: [
                find(results, attack["attack"], method["method"])["summary"][name][key] for method in methods
            ]
            for attack in shared.with_asr(results)
        }
        for key in ("mean", "standard_deviation")
    )
    path = plots.save(plots.bars([method["title"] for method in methods], values, spreads), folder.file(file))
    return Figure(path, caption, f"Bars of {content}; the numbers are in the table above.")
