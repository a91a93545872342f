"""What methods make of suspect models, as something to read: the verdict in words, the bars, the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.evaluation.measure import Comparison
from bdjax.reporting import defense_plots, defense_report, plots, report, tables
from bdjax.reporting import suspect_model_results as numbers
from bdjax.reporting.defense_results import facts_table, find, mean_of, undefended
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.types import TrainTest


def verdict(results: Mapping[str, Any], own: str, plain: str) -> Verdict:
    """Say in words what the numbers say.

    Args:
        results: of `suspect_model_results.summarise`.
        own: the base name of the method that the headline is about.
        plain: that of plain distillation.
    """
    of_plain = numbers.plain_method(results, plain)
    titles = {one["defense"]: one["title"] for one in results["defenses"]}
    methods = [one for one in results["defenses"] if one["base"] == own]
    attacked = [one for one in results["attacks"] if one["parts"]]
    if not attacked:
        return _without_trigger(results)
    if of_plain is None:
        return Verdict(
            "info",
            "Plain distillation is not among the methods, so nothing says which backdoors would have passed.",
            _one_seed(results),
        )
    words = {one["attack"]: numbers.passes(results, one["attack"], of_plain) for one in attacked}
    passing = [one for one in attacked if words[one["attack"]]]
    paragraphs = [_on_attack(results, one, of_plain, methods, titles, words[one["attack"]]) for one in attacked]
    paragraphs += _on_clean(results, [of_plain, *(one["defense"] for one in methods)], titles)
    paragraphs.append(f"Passes: {numbers.DEFINITIONS['passes']}. Removes: {numbers.DEFINITIONS['removes']}.")
    text = "\n\n".join(paragraphs) + _one_seed(results)
    count = f"{len(passing)} backdoor{'s' if len(passing) > 1 else ''}"
    name = titles[of_plain]
    if not passing:
        unsaid = [one["title"] for one in attacked if words[one["attack"]] is None]
        if unsaid:
            headline = (
                f"Whether a backdoor passes through {name} cannot be said of {', '.join(unsaid)}: there is no control."
            )
            return Verdict("info", headline, text)
        about = f" for {methods[0]['title']}" if len(methods) == 1 else ""
        return Verdict("info", f"No backdoor passes through {name} here, so there was nothing to remove{about}.", text)
    if not methods:
        return Verdict("attacked", f"{count} of {len(attacked)} pass{'es' * (len(passing) == 1)} through {name}.", text)
    wins = [
        sum(bool(numbers.removes(results, one["attack"], method["defense"], of_plain)) for one in passing)
        for method in methods
    ]
    every = len(passing)
    level = "clean" if all(won == every for won in wins) else "warning" if any(wins) else "attacked"
    through = f"that pass{'es' if every == 1 else ''} through {name}"
    if len(methods) == 1:
        said = (
            f"removes {wins[0]} of {count}"
            if every > 1
            else f"{'removes' if wins[0] else 'does not remove'} the one backdoor"
        )
        return Verdict(level, f"{methods[0]['title']} {said} {through}.", text)
    all_won = sum(won == every for won in wins)
    which = f"all {count}" if every > 1 else "the one backdoor"
    headline = f"{all_won} of {len(methods)} variants remove {which} {through}."
    return Verdict(level, headline, text)


def _on_attack(
    results: Mapping[str, Any],
    attack: Mapping[str, Any],
    plain: str,
    methods: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    word: bool | None,
) -> str:
    """A paragraph on one attacked teacher."""
    name = attack["attack"]
    cell, itself = find(results, name, plain), find(results, name, undefended(results))
    control = mean_of(cell, "control_asr")
    held_against = (
        "no clean teacher's student to hold that against" if control is None else f"clean teacher's {control:.2f}"
    )
    teacher = mean_of(itself, "control_asr")
    text = f"{attack['title']}: the teacher has ASR {mean_of(itself, 'asr'):.2f}"
    text += f" (the clean network {teacher:.2f})" if teacher is not None else ""
    text += f", {titles[plain]}'s student {mean_of(cell, 'asr'):.2f} ({held_against}): "
    if word is None:
        return text + f"whether a backdoor passes through {titles[plain]} cannot be said."
    if numbers.passes(results, name, undefended(results)) is False:
        return text + "the teacher has no backdoor to hand on, so there was nothing to remove."
    if not word:
        return text + f"the backdoor does not pass through {titles[plain]}, so there was nothing to remove."
    text += f"the backdoor passes through {titles[plain]}."
    for method in methods:
        own = find(results, name, method["defense"])
        does = "removes it" if numbers.removes(results, name, method["defense"], plain) else "does not remove it"
        cda = f"CDA {mean_of(own, 'cda'):.2f} against {mean_of(cell, 'cda'):.2f}"
        asr = f"ASR {mean_of(own, 'asr'):.2f} (clean teacher's {mean_of(own, 'control_asr'):.2f})"
        text += f" {method['title']} {does}: {asr}, {cda}."
    return text


def _on_clean(results: Mapping[str, Any], shown: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    """What the methods cost where there is no backdoor."""
    told = []
    for attack in (one for one in results["attacks"] if one["is_clean"]):
        base = mean_of(find(results, attack["attack"], undefended(results)), "cda")
        each = ", ".join(f"{titles[one]} {mean_of(find(results, attack['attack'], one), 'cda'):.3f}" for one in shown)
        told.append(f"CDA of the clean teacher: {base:.3f}; of its students: {each}.")
    return told


def _without_trigger(results: Mapping[str, Any]) -> Verdict:
    told = []
    for attack in results["attacks"]:
        cells = ((one, find(results, attack["attack"], one["defense"])) for one in results["defenses"])
        told.append(
            f"{attack['title']}: "
            + ", ".join(f"{one['title']} CDA {mean_of(cell, 'cda'):.3f}" for one, cell in cells)
            + "."
        )
    if all(one["is_clean"] for one in results["attacks"]):
        headline = "The teacher is clean: what the methods cost is all that there is to see."
    else:
        headline = "Nobody told this run the trigger, if there is one, so CDA is all that can be measured."
        told.append(
            "A student may have a backdoor that nobody sees here. What each method does to known backdoors, a run with "
            "--attacks on the same data says."
        )
    return Verdict("info", headline, "\n\n".join(told) + _one_seed(results))


def _one_seed(results: Mapping[str, Any]) -> str:
    return " One seed only: small differences mean nothing." if len(results["seeds"]) == 1 else ""


def write(
    folder: RunFolder,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    timings: Mapping[str, float],
    data: TrainTest,
    reproduce: str,
    *,
    title: str,
    own: str,
    plain: str,
    extra_sections: Sequence[Section] = (),
) -> None:
    """Write table.md, figures, timings.json and report.html.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        results: of `suspect_model_results.summarise`.
        comparisons: what they were made of.
        timings: seconds for each stage.
        data: the clean training set, and the test set.
        reproduce: the command.
        title: of the report.
        own: the base name of the method that the headline is about.
        plain: that of plain distillation.
        extra_sections: of the experiment's own, after the results.
    """
    of_plain = numbers.plain_method(results, plain)
    times = numbers.time_table(results, defense_report.seconds_of(comparisons, timings), folder.is_new)
    main = [numbers.main_table(results), numbers.published_table(results, data.train.name)]
    main = [one for one in main if one is not None]
    needs, teachers = numbers.needs_table(results), numbers.attack_table(results)
    details = [numbers.detail_table(results, of_plain), numbers.seed_table(results), facts_table(results, "teacher")]
    details = [one for one in details if one is not None]
    extra = [table for section in extra_sections for table in section.tables]
    every = [*main, needs, teachers, *extra, *details, *([times] if times else [])]
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, every)) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})
    found = defense_report.picture_figures(folder, comparisons)
    sections = [
        Section("Results", "", tuple(main), tuple(result_figures(folder, results))),
        *extra_sections,
        Section("Teachers", "", (teachers,)),
    ]
    if found:
        sections.append(Section("What the methods found", "", (), tuple(found)))
    sections.append(Section("Details", "", tuple(details)))
    if times:
        sections.append(Section("Time for one teacher", "", (times,)))
    page = report.Report(
        title=title,
        verdict=verdict(results, own, plain),
        key_numbers=key_numbers(results, own, of_plain),
        facts=needs,
        sections=tuple(sections),
        settings={**settings, **_settings(results)},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"training data": data.train.source, "test data": data.test.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))


def key_numbers(results: Mapping[str, Any], own: str, plain: str | None) -> dict[str, str]:
    """A few numbers for the top of the page: sizes, and the means over attacks of the plain and of the experiment's own method.

    Args:
        results: of `suspect_model_results.summarise`.
        own: the base name of the experiment's method.
        plain: the variant of plain distillation; None if the run was without.
    """
    result = {"parameters of the teacher": f"{results['teacher']['parameters']:,}"}
    shown = [one for one in results["defenses"] if one["defense"] == plain]
    shown += [one for one in results["defenses"] if one["base"] == own][:1]
    if shown:
        result["of the student"] = f"{shown[-1]['parameters']:,} ({100 * shown[-1]['share_of_teacher']:.1f} %)"
    for one in shown:
        cells = [find(results, attack["attack"], one["defense"]) for attack in results["attacks"] if attack["parts"]]
        for name in ("asr", "cda") if cells else ():
            result[f"mean {name.upper()}, {one['title']}"] = f"{np.mean([mean_of(cell, name) for cell in cells]):.3f}"
    return result


def result_figures(folder: RunFolder, results: Mapping[str, Any]) -> list[Figure]:
    """ASR of each teacher's trigger under each method, and against CDA; none if no trigger is known."""
    attacked = [one for one in results["attacks"] if one["parts"]]
    methods = results["defenses"]
    if not attacked:
        return []

    def summary(name: str, attack: Mapping[str, Any], method: Mapping[str, Any], what: str) -> float | None:
        return find(results, attack["attack"], method["defense"])["summary"][name][what]

    def bars(name: str, file: str) -> Path:
        # Methods are more than attacks, and bars of one colour are compared at a glance.
        values, spreads = (
            {each["title"]: [summary(name, each, one, what) for one in methods] for each in attacked}
            for what in ("mean", "standard_deviation")
        )
        return plots.save(plots.bars([one["title"] for one in methods], values, spreads), folder.file(file))

    figures = [
        Figure(
            bars("asr", "asr.png"),
            "ASR, mean over seeds with the standard deviation: the teacher's, and of what each method makes of it.",
            "Bars of attack success for each method and attack; the numbers are in the table above.",
        )
    ]
    if any(summary("control_asr", each, one, "mean") is not None for each in attacked for one in methods):
        figures.append(
            Figure(
                bars("control_asr", "control-asr.png"),
                "The same triggers where no backdoor can be: on the clean network, and on what each method makes of it.",
                "Bars of attack success without a backdoor; the numbers are in the table above.",
            )
        )
    cda, asr = (
        np.array([[summary(name, each, one, "mean") for each in attacked] for one in methods], np.float64)
        for name in ("cda", "asr")
    )
    scatter = defense_plots.trade_off([one["title"] for one in methods], cda, asr)
    figures.append(
        Figure(
            plots.save(scatter, folder.file("trade-off.png")),
            "What each method leaves of the attack and of the accuracy. Small marks: one attack each, mean over seeds. Large "
            "marks: their mean. Best is top left.",
            "Clean accuracy against attack success of each method; the numbers are in the table above.",
        )
    )
    return figures


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    attacks = {
        f"attack {one['attack']}" + (f": {part['attack']}" if len(one["parts"]) > 1 else ""): part["settings"]
        for one in results["attacks"]
        for part in one["parts"]
    }
    methods = {}
    for one in results["defenses"]:
        parts = one["settings"] if isinstance(one["settings"], list) else [one["settings"]]
        names = one["base"].split("+") if len(parts) > 1 else [""]
        for number, (name, own) in enumerate(zip(names, parts, strict=True), start=1):
            methods[f"method {one['defense']}" + (f": {number}. {name}" if name else "")] = own
    return attacks | methods
