"""A trial of detectors of poisoned rows as something to look at: the verdict in words, F1 beside the paper's, found triggers.

No network is trained without the flagged rows here: what is reported is how well the flags fit. Suspects come without their
images, of which a grid has too many to keep; the flagged rows to look at are those beside the found triggers.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import auc, roc_curve

from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.patterns import FoundPattern
from bdjax.evaluation.published import BLENDED, DETECTION_DATASETS, FULL, TRIGGERS
from bdjax.reporting import defenses as numbers
from bdjax.reporting import detection_plots, plots, report, tables
from bdjax.reporting import detection_results as detected
from bdjax.reporting import results as schema
from bdjax.reporting.detection_plots import Curve, Line
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.reporting.sections import (
    MOST_SETS,
    ORACLES,
    facts_table,
    file_name,
    score_figures,
    seconds_of,
    time_table,
)
from bdjax.reporting.tables import Table
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.settings import read_variant
from bdjax.types import Dataset, Detection

FAILS = 50.0
"""Mean F1 in percent below which a detector is said to fail."""
WORKS = 90.0
"""Mean F1 in percent from which on, if it fails nowhere, it is said to find the poisoned rows."""
MOST_TRIGGERS, TRIGGERS_OF_ONE = 24, 6
"""How many found triggers are shown, and how many in one figure."""
MOST_NAMES = 12
"""How many training sets the verdict names."""


def verdict(results: Mapping[str, Any], about: Sequence[str] = ()) -> Verdict:
    """Say in words what the numbers say.

    Means are over the settings of the paper's grid if the run has any, else over all training sets with poisoned rows.

    Args:
        results: of `defenses.summarise`.
        about: names of the defenses that the headline is about; by default all that flag rows.
    """
    every = detected.detectors(results)
    shown = [one for one in every if one["method"] in about] or every
    others = [one for one in every if one not in shown]
    sets = detected.grid(results)
    where = "the paper's settings" if sets else "the training sets with poisoned rows"
    told = [(one, _of_detector(results, one, sets or results["attacks"])) for one in shown]
    told = [(one, measured) for one, measured in told if measured]
    paragraphs = [_found(one, measured, where) for one, measured in told]
    paragraphs += [f"{one['title']} is given: {_given(one)}." for one in shown]
    paragraphs += _false_alarms(results, shown)
    paragraphs += [text for one in others if (text := _beside(results, one, shown[0], sets or results["attacks"]))]
    if len(results["seeds"]) == 1:
        paragraphs.append("One seed only: small differences mean nothing.")
    text = "\n\n".join(paragraphs)
    if not every:
        return Verdict("info", "No defense of this run flags rows.", text)
    if not told:
        return Verdict("info", "Nothing is known to be poisoned here: what is flagged has no F1.", text)
    worst = min(_mean(measured) for _, measured in told)
    failed = any(_failed(measured) for _, measured in told)
    level = "attacked" if worst < FAILS else "warning" if failed or worst < WORKS else "clean"
    said = [
        f"{one['title']} finds the poisoned rows with a mean F1 of {_mean(measured):.1f} %" for one, measured in told
    ]
    count = len(told[0][1])
    headline = "; ".join(said) + f" on {count} training set{'s' if count > 1 else ''}."
    if len(told) == 1 and failed:
        lost = len(_failed(told[0][1]))
        headline = f"{said[0]}, and fails on {lost} of {count} training set{'s' if count > 1 else ''}."
    return Verdict(level, headline, text)


def _of_detector(results: Mapping[str, Any], one: Mapping[str, Any], attacks: Sequence) -> list[tuple[str, float]]:
    """(title, mean F1 in percent) of each training set that F1 is known of."""
    found = ((each["title"], detected.f1_of(results, [each], one["method"])) for each in attacks)
    return [(title, f1.mean) for title, f1 in found if f1 is not None]


def _mean(measured: Sequence[tuple[str, float]]) -> float:
    return float(np.mean([f1 for _, f1 in measured]))


def _failed(measured: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(title, f1) for title, f1 in measured if f1 < FAILS]


def _found(one: Mapping[str, Any], measured: Sequence[tuple[str, float]], where: str) -> str:
    failed = _failed(measured)
    worst, best = (end(f1 for _, f1 in measured) for end in (min, max))
    text = f"{one['title']}: mean F1 {_mean(measured):.1f} % over {len(measured)} of {where}, from {worst:.1f} to {best:.1f} %."
    if not failed:
        return f"{text} On none of them is F1 below {FAILS:g} %."
    names = ", ".join(f"{title} ({f1:.1f} %)" for title, f1 in failed[:MOST_NAMES])
    names += f", and {len(failed) - MOST_NAMES} more" if len(failed) > MOST_NAMES else ""
    return f"{text} It fails (F1 below {FAILS:g} %) on {len(failed)}: {names}."


def _false_alarms(results: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is flagged where nothing is poisoned; a sentence if the run has no such set."""
    told = []
    for attack in filter(schema.is_clean, results["attacks"]):
        for one in shown:
            flagged = schema.mean_of(schema.find(results, attack["attack"], one["method"]), "flagged")
            if flagged is not None:
                name = attack["title"].replace("no attack", "the clean training set", 1)
                told.append(f"{one['title']} flags {100 * flagged:.2f} % of the rows of {name}")
    if not told:
        return ["No clean training set was tried, so nothing is known of false alarms on one."]
    return [f"False alarms: {'; '.join(told)}."]


def _beside(results: Mapping[str, Any], one: Mapping[str, Any], shown: Mapping[str, Any], sets: Sequence) -> str | None:
    """How a competitor does where both were tried."""
    both = detected.common(results, sets, (one["method"], shown["method"]))
    if not both:
        return None
    theirs, ours = (_of_detector(results, each, both) for each in (one, shown))
    text = (
        f"{one['title']}: mean F1 {_mean(theirs):.1f} % on {len(both)} training set{'s' if len(both) > 1 else ''} where "
        f"{shown['title']} has {_mean(ours):.1f} %; fails on {len(_failed(theirs))}. It is given: {_given(one)}."
    )
    flagged = [
        schema.mean_of(schema.find(results, attack["attack"], one["method"]), "flagged")
        for attack in results["attacks"]
        if schema.is_clean(attack) and attack["attack"] == schema.NO_DEFENSE
    ]
    known = [value for value in flagged if value is not None]
    return text + (f" On the clean set it flags {100 * known[0]:.2f} %." if known else "")


def _given(one: Mapping[str, Any]) -> str:
    return ", ".join(f"{need} (no defender has that)" if need in ORACLES else need for need in one["needs"])


def write(
    folder: RunFolder,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    timings: Mapping[str, float],
    train: Dataset,
    reproduce: str,
    found: Sequence[FoundPattern] = (),
    title: str = "",
    about: Sequence[str] = (),
    extra_sections: Sequence[Section] = (),
) -> None:
    """Write table.md, timings.json, figures and report.html.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        results: of `defenses.summarise`.
        comparisons: what they were made of: each defense on each group of suspects that were members of one call. A result
            may be a `Detection` as well as a `DefenseResult`.
        timings: seconds for each stage.
        train: the training set before poisoning.
        reproduce: the command.
        found: triggers that were extracted, to be shown beside the true ones.
        title: of the report; by default "Detectors of poisoned rows on" the dataset.
        about: names of the defenses that the headline is about; by default all that flag rows.
        extra_sections: of the experiment's own, after the results.
    """
    name = train.name
    times = time_table(results, seconds_of(comparisons, timings), is_whole=folder.is_new)
    needs = numbers.needs_table(results)
    main = _known(
        detected.summary_table(results, name),
        *(detected.f1_table(results, rule, name) for rule in detected.RULES),
        *(detected.blended_table(results, rule, name) for rule in detected.RULES),
    )
    others = _known(detected.calibration_table(results))
    evidence = _known(detected.evidence_table(results))
    sets = numbers.rows_table(results)
    details = _known(
        numbers.detection_table(results),
        *(detected.f1_table(results, rule, name, opacity) for rule in detected.RULES for opacity in reversed(BLENDED)),
        facts_table(results),
    )
    own = [table for section in extra_sections for table in section.tables]
    every = [*main, *others, needs, sets, *evidence, *own, *details, *_known(times)]
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, every)) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})

    chosen = spread_out(results, comparisons)
    triggers = trigger_figures(folder, found)
    sections = [Section("Results", "", tuple(main), tuple(f1_figures(folder, results, name)))]
    if others:
        sections.append(
            Section("Beside the paper's settings", "", tuple(others), tuple(_rate_figures(folder, results)))
        )
    sections += extra_sections
    if triggers:
        sections.append(Section("Found triggers", "", (), tuple(triggers)))
    if evidence:
        sections.append(Section("What the flags rest on", "", tuple(evidence)))
    curves = [*roc_figures(folder, chosen), *score_figures(folder, chosen)]
    if curves:
        count = len({one.suspect.attack.name for each in chosen for one in each.tried})
        text = f"Of the first seed, {count} of {len(results['attacks'])} training sets, taken from all over the table of them."
        sections.append(Section("Scores", text, (), tuple(curves)))
    sections.append(Section("Training sets", "", (sets,)))
    sections.append(Section("Details", "", tuple(details)))
    if times:
        sections.append(Section("Time for one training set", "", (times,)))
    page = report.Report(
        title=title or f"Detectors of poisoned rows on {name}",
        verdict=verdict(results, about),
        key_numbers=_key_numbers(results, about),
        facts=needs,
        sections=tuple(sections),
        settings={**settings, **_settings(results)},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"training data": train.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))


def _settings(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A group of its own for each defense, but one for all attacks, of which there may be dozens."""
    attacks = {
        one["attack"] + (f": {part['attack']}" if len(one["parts"]) > 1 else ""): part["settings"]
        for one in results["attacks"]
        for part in one["parts"]
    }
    return {"attacks": attacks} | {f"defense {one['method']}": one["settings"] for one in results["methods"]}


def _known(*each: Table | None) -> list[Table]:
    return [one for one in each if one is not None]


def _key_numbers(results: Mapping[str, Any], about: Sequence[str]) -> dict[str, str]:
    every = detected.detectors(results)
    shown = [one for one in every if one["method"] in about] or every
    counts = {"training sets": str(len(results["attacks"])), "detectors": str(len(every))}
    means = {}
    for one in shown[:3]:
        measured = _of_detector(results, one, detected.grid(results) or results["attacks"])
        if measured:
            means[f"mean F1, {one['title']}"] = f"{_mean(measured):.1f} %"
        flagged = schema.mean_of(schema.find(results, schema.NO_DEFENSE, one["method"]), "flagged")
        if flagged is not None:
            means[f"flagged on a clean set, {one['title']}"] = f"{100 * flagged:.2f} %"
    return means | counts


def spread_out(
    results: Mapping[str, Any], comparisons: Sequence[Comparison], most: int = MOST_SETS
) -> list[Comparison]:
    """The first seed of some training sets alone, taken from all over the run; clean ones are last to be left out.

    Runs go through opacities within triggers, or the other way round. A step that has no divisor in common with the number of
    sets meets all of both.

    Args:
        results: of `defenses.summarise`.
        comparisons: every defense on every group of suspects.
        most: how many training sets.
    """
    first = {one.suspect.attack.name for each in comparisons for one in each.tried if one.suspect.seed == 0}
    clean = [one["attack"] for one in results["attacks"] if one["attack"] in first and schema.is_clean(one)][:most]
    others = [one["attack"] for one in results["attacks"] if one["attack"] in first and one["attack"] not in clean]
    room = min(most - len(clean), len(others))
    kept = set(clean)
    if room > 0:
        step = next(s for s in itertools.count(math.ceil(len(others) / room)) if math.gcd(s, len(others)) == 1)
        kept |= {others[number * step % len(others)] for number in range(room)}
    chosen = []
    for each in comparisons:
        which = [
            number for number, one in enumerate(each.tried) if one.suspect.seed == 0 and one.suspect.attack.name in kept
        ]
        if which:
            flags, scores = (
                None if values is None else np.asarray(values)[which]
                for values in (each.result.flags, each.result.scores)
            )
            chosen.append(Comparison(each.variant, Detection(flags, scores), [each.tried[number] for number in which]))
    return chosen


def f1_figures(folder: RunFolder, results: Mapping[str, Any], dataset: str) -> list[Figure]:
    """F1 against the opacity, a panel for each label rule that the run has at several."""
    panels = {}
    every = detected.detectors(results)
    for rule in detected.RULES:
        of_opacity = {
            opacity: sets
            for opacity in (*BLENDED, *FULL)
            if (
                sets := detected.common(
                    results, detected.grid(results, (rule,), (opacity,)), [o["method"] for o in every]
                )
            )
        }
        if len(of_opacity) < 2:
            continue
        lines, printed = [], set()
        for one in every:
            means = [detected.f1_of(results, sets, one["method"]) for sets in of_opacity.values()]
            lines.append(_line(one["title"], list(of_opacity), means))
            if dataset in DETECTION_DATASETS and one["base"] in detected.PAPER_TITLES and one["base"] not in printed:
                printed.add(one["base"])
                cells = [detected.find_f1(dataset, rule, None, opacity, one["base"]) for opacity in (*BLENDED, *FULL)]
                f1 = [cell.f1 for cell in cells]
                lines.append(
                    Line(one["title"], (*BLENDED, *FULL), f1, [cell.standard_deviation for cell in cells], True)
                )
        counts = sorted({len(sets) for sets in of_opacity.values()})
        count = f"{counts[0]} trigger{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else "triggers"
        panels[f"{rule}, {count}"] = lines
    if not panels:
        return []
    caption = (
        "F1 against the opacity of the trigger: means over the triggers; bars: standard deviation over seeds of each seed's "
        "mean."
    )
    if any(line.is_paper for lines in panels.values() for line in lines):
        caption += f" Dotted: the paper's, over {' and '.join(str(len(each)) for each in TRIGGERS.values())} triggers."
    path = plots.save(detection_plots.f1_by(panels, "opacity"), folder.file("f1-by-opacity.png"))
    return [Figure(path, caption, "Lines of F1 against opacity; the numbers are in the tables above.")]


def _line(title: str, x: Sequence[float], means: Sequence[detected.MeanF1]) -> Line:
    return Line(title, x, [one.mean for one in means], [one.spread for one in means])


def _rate_figures(folder: RunFolder, results: Mapping[str, Any]) -> list[Figure]:
    """F1 against the poisoning rate, a panel for each attack that the run has at several rates."""
    groups: dict[tuple, dict[float, Mapping[str, Any]]] = {}
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
        for one in detected.detectors(results):
            means = {rate: detected.f1_of(results, [of_rate[rate]], one["method"]) for rate in sorted(of_rate)}
            known = {rate: mean for rate, mean in means.items() if mean is not None}
            if known:
                lines.append(_line(one["title"], list(known), list(known.values())))
        told = ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in key[1:])
        part = next(iter(of_rate.values()))["parts"][0]
        panels[part["title"] + (f", {told}" if told else "")] = lines
    if not panels:
        return []
    shown = dict(list(panels.items())[:6])
    path = plots.save(detection_plots.f1_by(shown, "poisoning rate"), folder.file("f1-by-poisoning-rate.png"))
    caption = "F1 against the poisoning rate; bars: standard deviation over seeds."
    return [Figure(path, caption, "Lines of F1 against the poisoning rate; the numbers are in the tables.")]


def _each(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, Measured, np.ndarray]]:
    """(defense, suspect, scores) of all that have scores and something poisoned."""
    for each in comparisons:
        if each.result.scores is None:
            continue
        for one, scores in zip(each.tried, each.result.scores, strict=True):
            truth = one.suspect.is_poisoned
            if truth is not None and truth.any() and not truth.all():
                yield each.variant.name, one, scores


def roc_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """How many false alarms it costs to find how many poisoned rows, a figure for each defense that scores rows."""
    curves: dict[str, list[Curve]] = {}
    titles = {each.variant.name: each.variant.title for each in comparisons}
    for name, one, scores in _each(comparisons):
        fpr, tpr, _ = roc_curve(one.suspect.is_poisoned, scores)
        curves.setdefault(name, []).append(Curve(schema.set_title(one.suspect), fpr, tpr, float(auc(fpr, tpr))))
    figures = []
    for name, group in curves.items():
        path = plots.save(detection_plots.roc(group, titles[name]), folder.file(f"roc-{file_name(name)}.png"))
        caption = (
            f"{titles[name]}: poisoned rows found against clean rows flagged, if the threshold of its score is moved; the "
            "horizontal axis is square-rooted. Its own flags are one point of the curve at most."
        )
        figures.append(Figure(path, caption, f"Receiver operating characteristics of {titles[name]}."))
    return figures


def choose_patterns(found: Sequence[FoundPattern], most: int = MOST_TRIGGERS) -> list[FoundPattern]:
    """Some of the found triggers, of as many attacks as possible: the first of each before any second, in their order."""
    seen: dict[str, int] = {}
    ranks = []
    for one in found:
        ranks.append(seen.get(one.attack, 0))
        seen[one.attack] = ranks[-1] + 1
    chosen = np.argsort(ranks, kind="stable")[:most]
    return [found[i] for i in sorted(chosen)]


def trigger_figures(folder: RunFolder, found: Sequence[FoundPattern]) -> list[Figure]:
    """The found triggers beside the true ones, and on rows that were flagged."""
    shown, figures = choose_patterns(found), []
    for start in range(0, len(shown), TRIGGERS_OF_ONE):
        some = shown[start : start + TRIGGERS_OF_ONE]
        figure = detection_plots.trigger_grid(some)
        path = plots.save(figure, folder.file(f"triggers-{start // TRIGGERS_OF_ONE + 1}.png"))
        caption = f"Triggers {start + 1} to {start + len(some)} of {len(shown)}."
        if not start:
            caption += (
                " Grey is transparent. A found trigger's colours are those of rows that carry the true one, so a faint one "
                "is mixed with what lies under it. Red outlines the found pixels."
            )
            caption += f" {len(found)} were found in all." if len(found) > len(shown) else ""
        figures.append(Figure(path, caption, "; ".join(one.caption for one in some)))
    return figures
