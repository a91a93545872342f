"""A comparison of defenses as something to look at: the verdict in words, the most suspicious rows, the report.

Beside report.html and table.md there is a scores file for each defense and training set of the first seed, so that
whoever owns the rows can sort and remove them with any tool.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.suspects import Suspect
from bdjax.reporting import defense_plots, plots, report, tables
from bdjax.reporting import defense_results as numbers
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.types import Dataset, TrainTest

PLAIN_STAGE = "no defense"
"""The stage in which suspects are trained plainly, as `bdjax.evaluation.suspects.make_defense_input` calls it."""
PICTURES_OF_ONE, PICTURES_OF_EACH = 24, 12
"""How many suspicious rows are shown of a single training set, and of each of several."""
MOST_SETS = 12
"""Of how many training sets pictures and histograms are drawn."""
IMAGES_PER_LINE = 8
"""Of a single training set, and of what a defense found."""
LONGEST_NAME = 100
"""Bytes that a variant's name may have in that of a file, which may have 255."""


def verdict(results: Mapping[str, Any], about: Sequence[str] = ()) -> Verdict:
    """Say in words what the numbers say.

    Args:
        results: of `defense_results.summarise`.
        about: names of the defenses that the headline is about; by default all that are one.
    """
    defenses = [one for one in results["defenses"] if one["base"] != numbers.NO_DEFENSE]
    defenses = [one for one in defenses if not about or one["defense"] in about] or defenses
    plain = numbers.undefended(results)
    measured = [
        one
        for one in results["attacks"]
        if numbers.mean_of(numbers.find(results, one["attack"], plain), "asr") is not None
    ]
    if not measured or not defenses:
        return _without_attack(results, defenses)
    before = {one["attack"]: numbers.mean_of(numbers.find(results, one["attack"], plain), "asr") for one in measured}
    working = [one for one in measured if before[one["attack"]] >= numbers.ATTACK_WORKS]
    idle = ", ".join(f"{one['title']} ({before[one['attack']]:.2f})" for one in measured if one not in working)
    paragraphs = []
    if not working:
        return Verdict(
            "info",
            f"No attack reaches a mean ASR of {numbers.ATTACK_WORKS:g} without defense, so there is nothing to remove.",
            f"Mean ASR: {idle}.",
        )
    told = [_against(results, one, working) for one in defenses]
    paragraphs += [line for line, _ in told]
    if idle:
        paragraphs.append(
            f"Left out of this, because the attack does not work even without defense (mean ASR): {idle}."
        )
    paragraphs += _false_alarms(results, defenses)
    paragraphs.append(f"A defense works if it leaves: {numbers.DEFINITIONS['works']}." + _one_seed(results))
    wins = [won for _, won in told]
    every = len(working)
    level = "clean" if all(won == every for won in wins) else "warning" if any(wins) else "attacked"
    count = f"{every} backdoor{'s' if every > 1 else ''}"
    if len(defenses) == 1:
        said = f"works against {wins[0]} of {count}"
        if every == 1:
            said = "works against the backdoor" if wins[0] else "does not work against the backdoor"
        headline = f"{defenses[0]['title']} {said}."
    else:
        all_won = sum(won == every for won in wins)
        headline = f"{all_won} of {len(defenses)} defenses work against {'every one of ' if every > 1 else ''}{count}."
    return Verdict(level, headline, "\n\n".join(paragraphs))


def _against(results: Mapping[str, Any], defense: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]]) -> tuple:
    """One paragraph on a defense, and against how many attacks it works."""
    plain = numbers.undefended(results)
    won, lost, pairs = 0, [], []
    for attack in attacks:
        name = attack["attack"]
        cell, base = numbers.find(results, name, defense["defense"]), numbers.find(results, name, plain)
        if cell is None:
            lost.append(f"{attack['title']} (not tried)")
            continue
        pairs.append([[numbers.mean_of(one, what) for what in ("asr", "cda")] for one in (base, cell)])
        if numbers.works(results, name, defense["defense"]):
            won += 1
        else:
            lost.append(f"{attack['title']} (ASR {pairs[-1][1][0]:.2f}, CDA {pairs[-1][1][1]:.2f})")
    if not pairs:
        return f"{defense['title']} was tried on none of these.", 0
    (asr, cda), (asr_after, cda_after) = np.mean(pairs, axis=0)
    text = (
        f"{defense['title']}: mean ASR {asr:.3f} becomes {asr_after:.3f}, mean CDA {cda:.3f} becomes {cda_after:.3f}; works "
        f"against {won} of {len(attacks)}."
    )
    return text + (f" Not against: {', '.join(lost)}." if lost else ""), won


def _false_alarms(results: Mapping[str, Any], defenses: Sequence[Mapping[str, Any]]) -> list[str]:
    """What defenses do to training sets that are clean."""
    told = []
    for attack in filter(numbers.is_clean, results["attacks"]):
        base = numbers.mean_of(numbers.find(results, attack["attack"], numbers.undefended(results)), "cda")
        for one in defenses:
            cell = numbers.find(results, attack["attack"], one["defense"])
            if cell is None:
                continue
            flagged = numbers.mean_of(cell, "flagged")
            text = f"{one['title']} has CDA {numbers.mean_of(cell, 'cda'):.3f}"
            told.append(text + (f" and flags {100 * flagged:.1f} % of the rows" if flagged is not None else ""))
        if told:
            start = "On the clean training set" + (f", where no defense has CDA {base:.3f}" if base is not None else "")
            return [f"{start}: {'; '.join(told)}."]
    return []


def _without_attack(results: Mapping[str, Any], defenses: Sequence[Mapping[str, Any]]) -> Verdict:
    told = []
    for attack in results["attacks"]:
        for one in defenses:
            cell = numbers.find(results, attack["attack"], one["defense"])
            base = numbers.mean_of(numbers.find(results, attack["attack"], numbers.undefended(results)), "cda")
            if cell is None:
                continue
            text = f"{one['title']}: CDA {numbers.mean_of(cell, 'cda'):.3f}"
            text += f" ({base:.3f} without defense)" if base is not None else ""
            flagged = numbers.mean_of(cell, "flagged")
            text += f", {100 * flagged:.1f} % of the rows flagged" if flagged is not None else ""
            told.append(text + ".")
    is_unknown = any(one["num_poisoned"] is None for one in results["attacks"])
    if is_unknown:
        headline = "Nobody told this run whether the rows are poisoned, so no attack success can be measured."
        told.append(
            "Look at the most suspicious rows below, and at the scores files. A defense flags rows of a clean training set, "
            "too: how many, a run with --attacks=none on data that is known to be clean says."
        )
    elif all(numbers.is_clean(one) for one in results["attacks"]):
        headline = "The training set is clean: every flagged row is a false alarm."
    else:
        headline = "No trigger is known, so no attack success can be measured."
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
    title: str = "",
    about: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    extra_sections: Sequence[Section] = (),
) -> None:
    """Write table.md, the scores files, figures, timings.json and report.html.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        results: of `defense_results.summarise`.
        comparisons: what they were made of: each defense on each group of suspects that were members of one call.
        timings: seconds for each stage.
        data: the training set before poisoning, and the test set.
        reproduce: the command.
        title: of the report; by default "Defenses on" the dataset.
        about: names of the defenses that the headline is about; by default all.
        seconds: defense variant -> seconds for one suspect; by default what `seconds_of` finds.
        extra_sections: of the experiment's own, after the results.
    """
    name = data.train.name
    seconds = seconds_of(comparisons, timings) if seconds is None else seconds
    times = numbers.time_table(results, seconds, is_whole=folder.is_new)
    main = [numbers.main_table(results), numbers.published_table(results, name)]
    detection = [numbers.detection_table(results), numbers.false_alarm_table(results)]
    details = [
        numbers.detail_table(results),
        numbers.trigger_table(results),
        numbers.main_table(results, "r_acc"),
        numbers.facts_table(results),
    ]
    needs = numbers.needs_table(results)
    sets = numbers.rows_table(results)
    main, detection, details = ([one for one in each if one is not None] for each in (main, detection, details))
    own = [table for section in extra_sections for table in section.tables]
    every = [*main, needs, sets, *detection, *own, *details, *([times] if times else [])]
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, every)) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})
    write_scores(folder, comparisons)
    flagged, found = suspicious_figures(folder, comparisons, data.train), picture_figures(folder, comparisons)
    sections = [
        Section("Results", "", tuple(main), tuple(result_figures(folder, results))),
        *extra_sections,
        Section("Training sets", "", (sets,)),
    ]
    if detection:
        sections.append(Section("Detection", "", tuple(detection), tuple(score_figures(folder, comparisons))))
    if flagged:
        text = "What to look at first if the rows were one's own. The files under scores/ have every row."
        sections.append(Section("The most suspicious rows", text, (), tuple(flagged)))
    if found:
        sections.append(Section("What the defenses found", "", (), tuple(found)))
    sections.append(Section("Details", "", tuple(details)))
    if times:
        sections.append(Section("Time for one training set", "", (times,)))
    page = report.Report(
        title=title or f"Defenses on {name}",
        verdict=verdict(results, about),
        key_numbers=_key_numbers(results, about),
        facts=needs,
        sections=tuple(sections),
        settings={**settings, **_settings(results)},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"training data": data.train.source, "test data": data.test.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))


def _settings(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    attacks = {
        f"attack {one['attack']}" + (f": {part['attack']}" if len(one["parts"]) > 1 else ""): part["settings"]
        for one in results["attacks"]
        for part in one["parts"]
    }
    return attacks | {f"defense {one['defense']}": one["settings"] for one in results["defenses"]}


def _key_numbers(results: Mapping[str, Any], about: Sequence[str]) -> dict[str, str]:
    defenses = [one for one in results["defenses"] if one["base"] != numbers.NO_DEFENSE]
    shown = [one for one in defenses if one["defense"] in about] if about else defenses
    counts = {"training sets": str(len(results["attacks"])), "defenses": str(len(defenses))}
    if len(shown) != 1:
        return counts
    plain = numbers.undefended(results)
    names = [one["attack"] for one in results["attacks"]]
    cells = [[numbers.find(results, name, which) for which in (plain, shown[0]["defense"])] for name in names]
    known = [pair for pair in cells if None not in [numbers.mean_of(cell, "asr") for cell in pair]]
    result = {}
    for what, label in (("asr", "ASR"), ("cda", "CDA")):
        pairs = [[numbers.mean_of(cell, what) for cell in pair] for pair in known or cells]
        if pairs and not any(None in pair for pair in pairs):
            before, after = np.mean(pairs, axis=0)
            result |= {f"mean {label} without": f"{before:.3f}", f"mean {label} with": f"{after:.3f}"}
    return result or counts


def seconds_of(comparisons: Sequence[Comparison], timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each defense for one suspect; for no defense, of the plain training.

    Args:
        comparisons: every defense on every group of suspects.
        timings: seconds for each stage of the run.
    """
    seconds: dict[str, float] = {}
    for name, group in _by_variant(comparisons).items():
        tried = [one for comparison in group for one in comparison.tried]
        if group[0].variant.defense.name != numbers.NO_DEFENSE:
            seconds[name] = float(np.mean([one.seconds for one in tried]))
        elif PLAIN_STAGE in timings:
            seconds[name] = timings[PLAIN_STAGE] / len(tried)
    return seconds


def _by_variant(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault(one.variant.name, []).append(one)
    return groups


def _first_seed(comparisons: Sequence[Comparison]) -> Iterator[tuple[Comparison, int, Measured]]:
    """(comparison, which of its suspects, that suspect) for all of the first seed, attack after attack."""
    for comparison in comparisons:
        for number, one in enumerate(comparison.tried):
            if one.suspect.seed == 0:
                yield comparison, number, one


def _of(comparison: Comparison, number: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Flags and scores of one suspect."""
    result = comparison.result
    return tuple(None if each is None else np.asarray(each[number]) for each in (result.flags, result.scores))


def file_name(text: str) -> str:
    """A variant's name as a file may be called: "lfd:alpha=0.5" -> "lfd-alpha=0.5"; a long one is cut, and still its own."""
    name = re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "unnamed"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return (
        name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    )


def write_scores(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[str]:
    """Write scores/<defense>/<training set>.csv for the first seed of every defense that flags or scores rows.

    Returns:
        The names of the files.
    """
    written = []
    for comparison, number, one in _first_seed(comparisons):
        flags, scores = _of(comparison, number)
        if flags is None and scores is None:
            continue
        name = f"scores/{file_name(comparison.variant.name)}/{file_name(one.suspect.attack.name)}.csv"
        folder.write_text(name, scores_csv(one.suspect, flags, scores))
        written.append(name)
    return written


def scores_csv(suspect: Suspect, flags: np.ndarray | None, scores: np.ndarray | None) -> str:
    """A line for each training row: its number from 0, the label it came with, score, flag and truth (1 or 0).

    What is not known is left empty.

    Args:
        suspect: the training set.
        flags: bool [n], or None.
        scores: float [n], or None.
    """

    def column(values: np.ndarray | None, form: str) -> list[str]:
        return [""] * len(suspect.dataset) if values is None else [form % value for value in values]

    columns = (
        column(suspect.dataset.labels, "%d"),
        column(scores, "%.6g"),
        column(flags, "%d"),
        column(suspect.is_poisoned, "%d"),
    )
    lines = [f"{row},{','.join(cells)}" for row, cells in enumerate(zip(*columns, strict=True))]
    return "\n".join(["row,label,score,flagged,is_poisoned", *lines]) + "\n"


def result_figures(folder: RunFolder, results: Mapping[str, Any]) -> list[Figure]:
    """ASR of every attack under every defense, and ASR against CDA; none if no ASR is known."""
    defenses = results["defenses"]

    def values(what: str) -> np.ndarray:
        cells = [[numbers.find(results, a["attack"], d["defense"]) for d in defenses] for a in results["attacks"]]
        means = [[numbers.mean_of(cell, what) for cell in row] for row in cells]
        return np.array([[np.nan if value is None else value for value in row] for row in means], np.float64)

    success, accuracy = values("asr"), values("cda")
    shown = np.isfinite(success).any(axis=1)
    if not shown.any():
        return []
    names = [one["title"] for one in defenses]
    attacks = [one["title"] for one, is_shown in zip(results["attacks"], shown, strict=True) if is_shown]
    matrix = plots.matrix(success[shown], attacks, names, "", value_label="ASR")
    scatter = defense_plots.trade_off(names, accuracy[shown].T, success[shown].T)
    return [
        Figure(
            plots.save(matrix, folder.file("asr.png")),
            "ASR, mean over seeds: what is left of each attack under each defense.",
            "A matrix of attack success rates, attacks by defenses; the numbers are in the table above.",
        ),
        Figure(
            plots.save(scatter, folder.file("trade-off.png")),
            "What each defense leaves of the attack and of the accuracy. Small marks: one attack each, mean over seeds. "
            "Large marks: the mean over the attacks that all defenses have. Best is top left.",
            "Clean accuracy against attack success of each defense; the numbers are in the table above.",
        ),
    ]


def score_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """Histograms of the scores on the first seed's training sets, a figure for each defense that scores rows."""
    figures = []
    for name, group in _by_variant(comparisons).items():
        panels = []
        for comparison, number, one in _first_seed(group):
            _, scores = _of(comparison, number)
            if scores is not None:
                panels.append(defense_plots.Scores(numbers.set_title(one.suspect), scores, one.suspect.is_poisoned))
        if not panels:
            continue
        title = group[0].variant.title
        figure = defense_plots.score_histograms(panels[:MOST_SETS], title)
        caption = (
            f"{title}: scores of the first seed's training rows, as shares of the clean and of the poisoned ones. Cover rows "
            "count as clean. Outliers are in the outermost bars." + _cut(panels, MOST_SETS)
        )
        path = plots.save(figure, folder.file(f"scores-{file_name(name)}.png"))
        figures.append(Figure(path, caption, f"Histograms of the scores that {title} gives to training rows."))
    return figures


def _cut(shown: Sequence[Any], most: int) -> str:
    return f" The first {most} of {len(shown)} training sets." if len(shown) > most else ""


def suspicious_figures(folder: RunFolder, comparisons: Sequence[Comparison], train: Dataset) -> list[Figure]:
    """The rows of the first seed that each defense suspects most, with their labels and the truth where it is known."""
    figures = []
    for name, group in _by_variant(comparisons).items():
        ones = [(c, i, one) for c, i, one in _first_seed(group) if any(each is not None for each in _of(c, i))]
        if not ones:
            continue
        each = PICTURES_OF_ONE if len(ones) == 1 else PICTURES_OF_EACH
        images, captions, names = [], [], []
        for comparison, number, one in ones[:MOST_SETS]:
            rows = defense_plots.most_suspicious(*_of(comparison, number), each)
            per_line = IMAGES_PER_LINE if len(ones) == 1 else each
            for start in range(0, len(rows), per_line):
                line = rows[start : start + per_line]
                images.append([one.suspect.dataset.images[row].astype(np.float32) / 255 for row in line])
                captions.append([_caption(one.suspect, train, row) for row in line])
                names.append("" if start else numbers.set_title(one.suspect))
        if not images:
            continue
        title = group[0].variant.title
        flags, scores = _of(*ones[0][:2])
        how = (
            "flagged rows first, the highest scores before others" if flags is not None else "the highest scores first"
        )
        how = "some of the flagged rows" if scores is None else how
        caption = (
            f"{title}: {how}; first seed. Under each row the label it came with, and whether it is poisoned where that is "
            "known." + _cut(ones, MOST_SETS)
        )
        figure = plots.image_grid(images, names if len(ones) > 1 else (), (), title, captions=captions)
        path = plots.save(figure, folder.file(f"suspicious-{file_name(name)}.png"))
        figures.append(Figure(path, caption, f"The training rows that {title} suspects most."))
    return figures


def _caption(suspect: Suspect, train: Dataset, row: int) -> str:
    label = int(suspect.dataset.labels[row])
    named = train.class_names[label] if train.class_names else str(label)
    if suspect.is_poisoned is None:
        return named
    return f"{named}: {'poisoned' if suspect.is_poisoned[row] else 'clean'}"


def picture_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """What defenses found and hand over as pictures, of the first seed: a figure for each kind, a line for each set."""
    figures = []
    for name, group in _by_variant(comparisons).items():
        title = group[0].variant.title
        for kind in dict.fromkeys(kind for one in group for kind in one.result.pictures):
            images, names = [], []
            for comparison, number, one in _first_seed(group):
                own = comparison.result.pictures.get(kind)
                if own is not None and len(own[number]):
                    images.append(list(np.asarray(own[number])[:IMAGES_PER_LINE]))
                    names.append(numbers.set_title(one.suspect))
            if not images:
                continue
            figure = plots.image_grid(images[:MOST_SETS], names[:MOST_SETS], (), f"{title}: {kind}")
            path = plots.save(figure, folder.file(f"found-{file_name(name)}-{file_name(kind)}.png"))
            caption = f"{title}: {kind}. First seed." + _cut(images, MOST_SETS)
            figures.append(Figure(path, caption, f"Pictures that {title} found: {kind}."))
    return figures
