"""The report on what methods make of suspect models: numbers, tables, the verdict in words, the page.

The ASR of a trigger is compared with that of the same trigger where there is no backdoor (`control_asr`): on the clean network
of the same seed, and on the student that the same method makes of that. Two words follow from the numbers:

- a backdoor *passes* through a method if its student has it, by `metrics.has_backdoor`;
- what a method makes of a backdoor that passes through plain distillation is the word of `metrics.defense_word`. Where none
  passes, there is nothing to remove, whatever the method leaves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bdjax.evaluation.measure import Comparison
from bdjax.metrics import DEFINITIONS, DefenseWord, has_backdoor
from bdjax.models import count_parameters
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.defenses import WORDS
from bdjax.reporting.report import Figure, Report, Section, Verdict, level_of
from bdjax.reporting.results import find, mean_of
from bdjax.reporting.sections import ORACLES, Entry
from bdjax.reporting.tables import UNKNOWN, Table
from bdjax.run.folder import RunFolder
from bdjax.types import Model, TrainTest

PLAIN = "fkd"
"""The method of plain distillation, which hands backdoors on: what other methods are compared with."""
_NAMES = ("cda", "asr", "control_asr", "r_acc")


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
    """Numbers of all methods on all teachers: the content of results.json, as `bdjax.reporting.results` has it.

    Args:
        comparisons: each method on all teachers; the one called "none" is the teacher itself.
        controls: for each of them and each teacher, the control ASR, or None.
        teachers: their architecture.
        test_rows: how many there are.
        seed: the number of the first.
        left_out: a method -> why the run could not have it.
    """
    measured = [one for comparison in comparisons for one in comparison.measured]
    values = (value for of_method in controls for value in of_method)
    keys = ((one.suspect.attack.name, one.variant.name, one.suspect.seed) for one in measured)
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
    )


def passes(results: Entry, attack: str, method: str | None) -> bool | None:
    """Whether a backdoor passes through a method, as `DEFINITIONS["passes"]` has it; None where the control is missing."""
    cell = find(results, attack, method)
    asr, control = mean_of(cell, "asr"), mean_of(cell, "control_asr")
    if asr is None or (control is None and has_backdoor(asr, 0.0)):
        return None
    return has_backdoor(asr, control or 0.0)


def word_of(results: Entry, attack: str, method: str, plain: str | None) -> DefenseWord | None:
    """What a method makes of a backdoor, compared with the variant of plain distillation; None where that cannot be said."""
    is_student = method not in (plain, schema.undefended(results))
    can_be_said = is_student and passes(results, attack, plain) is not None
    return schema.word_of(results, attack, method, plain) if can_be_said else None


def plain_method(results: Entry, plain: str = PLAIN) -> str | None:
    """The variant of the run that is the plain method: the one without settings of its own, else the first; None if none."""
    names = [one["method"] for one in results["methods"] if one["base"] == plain]
    return plain if plain in names else next(iter(names), None)


def main_table(results: Entry) -> Table:
    """Methods × teachers: CDA, ASR, and the same trigger's ASR where no backdoor can be."""
    notes = f" Control: {DEFINITIONS['control_asr']}. ASR that the control has as well is not due to a backdoor."
    if any(not attack["parts"] for attack in results["attacks"]):
        notes += f" {UNKNOWN}: no trigger is known, or the run has no such counterpart."
    return shared.comparison_table(results, ("cda", "asr", "control_asr"), "method", notes, by_method=True)


def detail_table(results: Entry, plain: str | None) -> Table | None:
    """Every number with its spread: a row for each teacher under each method; `plain` is the variant of plain distillation."""

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
    """Who was given what, and what comes out: the network and its size."""
    teacher = results["teacher"]
    notes = f"The teacher is a {teacher['model']} of {teacher['parameters']:,} parameters."
    needs = {"attacked model": "the teacher", "clean rows": "clean rows", **{name: name for name in ORACLES}}
    after = {
        "network": lambda one: one["model"],
        "parameters": lambda one: one["parameters"],
        "of the teacher's": lambda one: f"{100 * one['share_of_teacher']:.1f} %",
        "paper": lambda one: one["paper"],
    }
    notes += " No method was given a training set that an attacker touched."
    return shared.needs_table(results, {"method": lambda one: one["title"]}, needs, after, notes)


def attack_table(results: Entry) -> Table:
    """The teachers: how they were attacked."""
    columns = {
        "teacher": lambda one: one["title"],
        "labels": lambda one: "; ".join(part["label_rule"] for part in one["parts"]) or None,
        "paper": lambda one: "; ".join(part["paper"] for part in one["parts"]) or None,
        "seeds": lambda one: ", ".join(map(str, one["seeds"])),
    }
    return shared.entry_table("Teachers", results["attacks"], columns)


def verdict(results: Entry, about: str, plain: str = PLAIN) -> Verdict:
    """Say in words what the numbers say.

    Args:
        results: of `summarise`.
        about: the base name of the method that the headline is about.
        plain: that of plain distillation.
    """
    baseline = plain_method(results, plain)
    titles = {one["method"]: one["title"] for one in results["methods"]}
    methods = [one["method"] for one in results["methods"] if one["base"] == about and one["method"] != baseline]
    attacked = [one for one in results["attacks"] if one["parts"]]
    if not attacked:
        return _without_trigger(results)
    if baseline is None:
        headline = "Plain distillation is not among the methods, so nothing says which backdoors would have passed."
        return Verdict("info", headline, schema.one_seed_text(results).strip())
    does_pass = {one["attack"]: passes(results, one["attack"], baseline) for one in attacked}
    passing = [one for one in attacked if does_pass[one["attack"]]]
    paragraphs = [_on_attack(results, one, baseline, methods, titles) for one in attacked]
    is_shown = {*methods, baseline, schema.undefended(results)}
    shown = [one for one in results["methods"] if one["method"] in is_shown]
    paragraphs += [shared.accuracy_text(results, one, shown) for one in results["attacks"] if schema.is_clean(one)]
    text = "\n\n".join([*paragraphs, shared.explain("passes", "removed").strip()]) + schema.one_seed_text(results)
    if not passing:
        headline = _nothing_passes(attacked, does_pass, titles[baseline], [titles[method] for method in methods])
        return Verdict("info", headline, text)
    several = len(passing) > 1
    if not methods:
        count = f"{len(passing)} backdoor{'s' * several} of {len(attacked)}"
        return Verdict("attacked", f"{count} pass{'es' * (not several)} through {titles[baseline]}.", text)
    words = [[word_of(results, one["attack"], method, baseline) for one in passing] for method in methods]
    which = f" that pass{'es' * (not several)} through {titles[baseline]}"
    headline = shared.headline([titles[method] for method in methods], words, "variants", which)
    return Verdict(level_of(word for each in words for word in each), headline, text)


def _nothing_passes(
    attacked: Sequence[Entry], does_pass: Mapping[str, bool | None], plain: str, methods: Sequence[str]
) -> str:
    unsaid = [one["title"] for one in attacked if does_pass[one["attack"]] is None]
    if unsaid:
        return f"Whether a backdoor passes through {plain} cannot be said of {', '.join(unsaid)}: there is no control."
    about = f" for {methods[0]}" if len(methods) == 1 else ""
    return f"No backdoor passes through {plain} here, so there was nothing to remove{about}."


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
        return f"{text}whether a backdoor passes through {titles[plain]} cannot be said."
    if passes(results, name, itself) is False:
        return f"{text}the teacher has no backdoor to hand on, so there was nothing to remove."
    if not does_pass:
        return f"{text}the backdoor does not pass through {titles[plain]}, so there was nothing to remove."
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
    headline = "The teacher is clean: what the methods cost is all that there is to see."
    if not all(map(schema.is_clean, results["attacks"])):
        headline = "Trigger unknown: CDA is all that can be measured."
        lines.append(
            "A student may have a backdoor that no number here shows. What each method does to known backdoors, a run with "
            "--attacks on the same data says."
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
    """Draw the figures into the folder and put the page together; `report.publish` completes it.

    Args:
        folder: the open run.
        results: of `summarise`.
        comparisons: what they were made of.
        data: the clean training set, and the test set.
        seconds: of `sections.seconds_of`.
        title: of the report.
        about: the base name of the method that the headline is about.
        plain: that of plain distillation.
        extra_sections: of the experiment, after the results.
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
            *shared.section("Teachers", [attack_table(results)]),
            *shared.section("What the methods found", [], shared.picture_figures(folder, comparisons)),
            *shared.section("Details", details),
            *shared.section("Time for one teacher", [times]),
        ),
        settings=shared.settings_of(results, "method"),
    )


def _key_numbers(results: Entry, about: str, plain: str | None) -> dict[str, str]:
    """Sizes, and the means over attacks of plain distillation and of the method that the report is about."""
    shown = [one for one in results["methods"] if one["method"] == plain]
    shown += [one for one in results["methods"] if one["base"] == about][:1]
    tiles = {"parameters of the teacher": f"{results['teacher']['parameters']:,}"}
    if shown:
        tiles["of the student"] = f"{shown[-1]['parameters']:,} ({100 * shown[-1]['share_of_teacher']:.1f} %)"
    attacks = [one for one in results["attacks"] if one["parts"]]
    return tiles | shared.key_numbers(results, {one["method"]: one["title"] for one in shown}, ("asr", "cda"), attacks)


def result_figures(folder: RunFolder, results: Entry) -> list[Figure]:
    """ASR of each teacher's trigger under each method, and against CDA; none if no trigger is known."""
    if not shared.with_asr(results):
        return []
    about = "ASR, mean over seeds with the standard deviation: the teacher's, and of what each method makes of it."
    figures = [_bars(folder, results, "asr", "asr.png", about, "attack success for each method and attack")]
    if schema.is_known(results, "control_asr"):
        about = "The same triggers where no backdoor can be: on the clean network, and on what each method makes of it."
        figures.append(
            _bars(folder, results, "control_asr", "control-asr.png", about, "attack success without a backdoor")
        )
    return [*figures, shared.trade_off_figure(folder, results, "method")]


def _bars(folder: RunFolder, results: Entry, name: str, file: str, caption: str, what: str) -> Figure:
    """Methods are more than attacks, and bars of one colour are compared at a glance: a colour for each attack."""
    methods = results["methods"]
    values, spreads = (
        {
            each["title"]: [find(results, each["attack"], one["method"])["summary"][name][key] for one in methods]
            for each in shared.with_asr(results)
        }
        for key in ("mean", "standard_deviation")
    )
    path = plots.save(plots.bars([one["title"] for one in methods], values, spreads), folder.file(file))
    return Figure(path, caption, f"Bars of {what}; the numbers are in the table above.")
