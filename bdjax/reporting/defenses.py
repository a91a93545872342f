"""The report on defenses against poisoned training sets: numbers, tables, verdict and page.

Means are over seeds first, then over attacks, and only over attacks that every defense of the table was evaluated on: ABM's
printed averages leave out failures, so that its columns average different attacks. In addition to the page, a scores file is
written for each defense and training set of the first seed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NOT_TESTED
from bdjax.metrics import DEFINITIONS, DefenseWord, DetectionMetrics, has_backdoor
from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.report import Report, Section, Verdict, level_of
from bdjax.reporting.results import find, mean_of
from bdjax.reporting.sections import ORACLES, Entry
from bdjax.reporting.tables import UNKNOWN, Cell, Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.types import TrainTest

WORDS = ("removed", "removed at a cost", "weakened", "kept", "nothing to remove")
_NAMES = ("cda", "asr", "r_acc", *DetectionMetrics._fields)


def summarise(
    measured: Iterable[Measured],
    test_rows: int,
    seed: int,
    left_out: Mapping[str, str] = {},
    controls: Mapping[tuple[str, str, int], float | None] = {},
) -> dict[str, Any]:
    """Numbers of all defenses on all attacks: the content of results.json, as `bdjax.reporting.results` has it.

    Args:
        measured: a measurement for every suspect and every defense; tables keep the order of first appearance.
        test_rows: number of test rows.
        seed: number of the first seed.
        left_out: an attack or a defense -> why it is not in the run.
        controls: (attack, defense, suspect's seed) -> control ASR. If there are any, tables print it beside the ASR.
    """
    names = (*_NAMES[:2], *(["control_asr"] if controls else []), *_NAMES[2:])
    return schema.summarise(list(measured), names, (*names, *WORDS), test_rows, seed, left_out, controls, _counts)


def _counts(suspects: Sequence[Suspect]) -> dict[str, list[int] | None]:
    is_known = all(suspect.is_poisoned is not None for suspect in suspects)
    return {
        "num_rows": [len(suspect.dataset) for suspect in suspects],
        "num_poisoned": [int(suspect.is_poisoned.sum()) for suspect in suspects] if is_known else None,
        "num_covers": [suspect.num_covers for suspect in suspects] if is_known else None,
    }


def word_of(results: Entry, attack: str, defense: str) -> DefenseWord | None:
    """How a defense changes the backdoor of an attack; None if that is unknown, or for no defense."""
    baseline = schema.undefended(results)
    return None if defense == baseline else schema.word_of(results, attack, defense, baseline)


def _with_control(results: Entry, *names: str) -> tuple[str, ...]:
    return (*names, *(["control_asr"] if schema.is_known(results, "control_asr") else []))


def main_table(results: Entry, second: str = "asr") -> Table:
    """Attacks × defenses, and their means: CDA, and "asr" (with the control ASR, if known) or "r_acc"."""
    names, notes = ("cda", second) if second != "asr" else _with_control(results, "cda", "asr"), ""
    if "control_asr" in names:
        notes += (
            " Control ASR: of the same trigger on the network that the same defense trains from the clean training set of the "
            "same seed, which has no backdoor."
        )
    if any(method["stage"] == "at test time" for method in results["methods"]):
        notes += (
            " A test row that a defense rejects counts as wrong and not as a success: it lowers CDA, ASR and R-ACC."
        )
    label = shared.LABELS[second]
    if any(map(schema.is_clean, results["attacks"])):
        notes += f" A clean training set has no trigger and so no {label}."
    if any(not attack["parts"] and not schema.is_clean(attack) for attack in results["attacks"]):
        notes += f" The trigger of user data is unknown, and so is its {label}."
    return shared.comparison_table(results, names, "training set", notes, has_mean=True)


def detail_table(results: Entry) -> Table | None:
    """Every number with its spread: a row for each attack under each defense."""
    columns = {
        **shared.title_columns("training set", "defense"),
        **shared.number_columns((*_with_control(results, "cda", "asr"), "r_acc")),
        **shared.number_columns(name for name in ("precision", "recall", "auc") if schema.is_known(results, name)),
        "backdoor": lambda _, attack, method: word_of(results, attack["attack"], method["method"]),
    }
    notes = (
        f"{schema.mean_text(results).capitalize()}.{shared.explain(*WORDS)} {UNKNOWN}: no defense, or no known trigger. "
        "Precision, recall, AUC: of the rows that a defense flags or scores."
    )
    return shared.cell_table("Every number", schema.cells(results), columns, notes)


def trigger_table(results: Entry) -> Table | None:
    """ASR and R-ACC under each trigger of the hybrid attacks; None if there is no hybrid."""
    rows = []
    for attack in results["attacks"]:
        for number, part in enumerate(attack["parts"] if len(attack["parts"]) > 1 else ()):
            for cell, _, method in (row for row in schema.cells(results) if row[1] is attack):
                measured = [row["triggers"][number] for row in cell["by_seed"]]
                texts = (mean_and_spread([trigger[name] for trigger in measured]) for name in ("asr", "r_acc"))
                rows.append((attack["title"], part["title"], method["title"], *texts))
    notes = "Other tables have the mean over a training set's triggers. Each trigger is tested alone."
    header = ("training set", "trigger", "defense", "ASR", "R-ACC")
    return Table("Hybrid attacks", header, tuple(rows), notes) if rows else None


def detection_table(results: Entry) -> Table | None:
    """How well flags and scores fit the ground truth; None if no defense has any."""
    cells = schema.cells(results)
    shown = (row for row in cells if (mean_of(row[0], "flagged"), mean_of(row[0], "auc")) != (None, None))
    set_column, defense_column = shared.title_columns("training set", "defense").items()
    poisoned = "poisoned", lambda _, attack, __: poisoned_share(attack)
    columns = dict([set_column, poisoned, defense_column]) | shared.number_columns(DetectionMetrics._fields)
    notes = (
        f"Of training rows; {schema.mean_text(results)}. Poisoned, flagged: shares of all rows; cover rows count as clean. "
        f"AUC: {DEFINITIONS['auc']} (0.5 is chance). {UNKNOWN}: nothing poisoned, ground truth unknown, or a seed in which "
        "nothing is flagged. A defense may flag few rows on purpose (isolation): then recall is low by design."
    )
    return shared.cell_table("Detection of poisoned rows", shown, columns, notes)


def poisoned_share(attack: Entry) -> float | None:
    """The share of the rows of a training set that are poisoned, over all seeds; None if unknown."""
    if attack["num_poisoned"] is None:
        return None
    return float(np.sum(attack["num_poisoned"]) / np.sum(attack["num_rows"]))


def false_alarm_table(results: Entry) -> Table | None:
    """The cost of defenses on clean training sets; None if there is none."""
    baseline = schema.undefended(results)

    def gain(cell: Entry, attack: Entry, method: Entry) -> str | None:
        before = find(results, attack["attack"], baseline)
        if before is None or before is cell:
            return None
        pairs = zip(cell["by_seed"], before["by_seed"], strict=True)
        return mean_and_spread([after["cda"] - row["cda"] for after, row in pairs])

    columns = {
        "defense": lambda _, __, method: method["title"],
        **shared.number_columns(["cda"]),
        "difference": gain,
        **shared.number_columns(["flagged"]),
    }
    notes = (
        f"On the clean training set, {schema.mean_text(results)}. Difference: CDA minus that of no defense on the same seed. "
        f"Every flagged row is a false alarm; {UNKNOWN}: the defense flags no rows."
    )
    shown = (row for row in schema.cells(results) if schema.is_clean(row[1]))
    return shared.cell_table("False alarms", shown, columns, notes)


def needs_table(results: Entry) -> Table:
    """What each defense receives."""
    notes = "Attacked model: the network from plain training on the suspect rows."
    if any("clean rows" in method["needs"] for method in results["methods"]):
        notes += " Clean rows: rows that are known to be clean."
    before = {"defense": lambda method: method["title"], "when": lambda method: method["stage"]}
    needs = {name: name for name in ("training set", "attacked model", "clean rows", *ORACLES)}
    return shared.needs_table(results, before, needs, {"paper": lambda method: method["paper"]}, notes)


def rows_table(results: Entry) -> Table:
    """The training sets: label rule, number of rows, of poisoned and of cover rows."""

    def counts(name: str, attack: Entry) -> Cell:
        if attack[name] is None:
            return None
        least, most = min(attack[name]), max(attack[name])
        return least if least == most else f"{least:,} to {most:,}"

    columns = {
        "training set": lambda attack: attack["title"],
        "labels": lambda attack: "; ".join(part["label_rule"] for part in attack["parts"]) or None,
        "rows": lambda attack: counts("num_rows", attack),
        "poisoned": lambda attack: counts("num_poisoned", attack),
        "cover": lambda attack: counts("num_covers", attack),
        "suppression": lambda attack: f"{attack['suppression']:g}" if attack["suppression"] else None,
        "seeds": lambda attack: ", ".join(map(str, attack["seeds"])),
    }
    notes = (
        f"Poisoned, cover: numbers of rows; {UNKNOWN} where the ground truth is unknown. Cover rows carry a trigger, or "
        "something like it, under their own label. Suppression: how much an adaptive attacker weakens its backdoor."
    )
    return shared.entry_table("Training sets", results["attacks"], columns, notes)


def verdict(results: Entry, about: Sequence[str] = ()) -> Verdict:
    """Put the numbers into words.

    Args:
        results: from `summarise`.
        about: names of the defenses that the headline is about; by default all.
    """
    defenses = _shown(results, about)
    before = [(attack, find(results, attack["attack"], schema.undefended(results))) for attack in results["attacks"]]
    attacked = [(attack, mean_of(cell, "asr"), mean_of(cell, "control_asr")) for attack, cell in before]
    attacked = [entry for entry in attacked if entry[1] is not None]
    if not attacked or not defenses:
        return _without_comparison(
            results, defenses, ", ".join(f"{attack['title']} {asr:.3f}" for attack, asr, _ in attacked)
        )
    working = [attack for attack, asr, control in attacked if has_backdoor(asr, control)]
    idle = ", ".join(f"{attack['title']} ({asr:.2f})" for attack, asr, _ in attacked if attack not in working)
    if not working:
        headline = "No training set leads to a network with a backdoor, so there is nothing to remove."
        return Verdict("info", headline, f"Mean ASR without defense: {idle}.{shared.explain('nothing to remove')}")
    words = [[word_of(results, attack["attack"], defense["method"]) for attack in working] for defense in defenses]
    paragraphs = [
        _on_defense(results, defense, working, outcomes) for defense, outcomes in zip(defenses, words, strict=True)
    ]
    if idle:
        paragraphs.append(f"Left out, because there is no backdoor even without defense (mean ASR): {idle}.")
    shown = [method for method in results["methods"] if method in defenses or method["base"] == schema.NO_DEFENSE]
    paragraphs += [
        shared.accuracy_text(results, attack, shown) for attack in results["attacks"] if schema.is_clean(attack)
    ]
    paragraphs.append(shared.explain("removed").strip() + schema.one_seed_text(results))
    text = shared.headline([defense["title"] for defense in defenses], words, "defenses")
    return Verdict(level_of(word for outcomes in words for word in outcomes), text, "\n\n".join(paragraphs))


def _shown(results: Entry, about: Sequence[str]) -> list[Entry]:
    """The defenses that the report is about."""
    defenses = [defense for defense in results["methods"] if defense["base"] != schema.NO_DEFENSE]
    return [defense for defense in defenses if defense["method"] in about] or defenses


def _on_defense(results: Entry, defense: Entry, attacks: Sequence[Entry], words: Sequence[DefenseWord | None]) -> str:
    """A paragraph on how a defense changes the backdoors."""
    pairs, not_removed = [], []
    for attack, word in zip(attacks, words, strict=True):
        if word is None:
            not_removed.append(f"{attack['title']} (not evaluated)")
            continue
        cells = [find(results, attack["attack"], name) for name in (schema.undefended(results), defense["method"])]
        pairs.append([[mean_of(cell, name) for name in ("asr", "cda")] for cell in cells])
        if word != "removed":
            not_removed.append(f"{attack['title']} ({word}: ASR {pairs[-1][1][0]:.2f}, CDA {pairs[-1][1][1]:.2f})")
    if not pairs:
        return f"{defense['title']} was evaluated on none of these."
    (asr, cda), (asr_after, cda_after) = np.mean(pairs, axis=0)
    text = (
        f"{defense['title']}: mean ASR {asr:.3f} becomes {asr_after:.3f}, mean CDA {cda:.3f} becomes {cda_after:.3f}; removes "
        f"{words.count('removed')} of {len(attacks)}."
    )
    return text + (f" Not removed: {', '.join(not_removed)}." if not_removed else "")


def _without_comparison(results: Entry, defenses: Sequence[Entry], successes: str) -> Verdict:
    """Words on a run without a known trigger or without a defense; `successes` has the ASR of each network without defense."""
    shown = [method for method in results["methods"] if method in defenses or method["base"] == schema.NO_DEFENSE]
    lines = [shared.accuracy_text(results, attack, shown) for attack in results["attacks"]]
    if any(attack["num_poisoned"] is None for attack in results["attacks"]):
        headline = "Ground truth unknown: attack success cannot be measured."
        lines.append(
            "Look at the most suspicious rows below, and at the scores files. A defense flags rows of a clean training set, "
            "too: a run with --attacks=none on data that is known to be clean shows how many."
        )
    elif all(map(schema.is_clean, results["attacks"])):
        headline = "The training set is clean: every flagged row is a false alarm."
    elif successes:
        headline = "No defense was run, so nothing is compared."
        lines.insert(0, f"Mean ASR without defense: {successes}.")
    else:
        headline = "No trigger is known, so no attack success can be measured."
    if not defenses and any(reason.startswith(NOT_TESTED) for reason in results["left_out"].values()):
        headline = "None of the defenses could be tested."
    return Verdict("info", headline, "\n\n".join(lines) + schema.one_seed_text(results))


def page(
    folder: RunFolder,
    results: Entry,
    comparisons: Sequence[Comparison],
    data: TrainTest,
    *,
    seconds: Mapping[str, float],
    title: str = "",
    about: Sequence[str] = (),
    extra_sections: Sequence[Section] = (),
) -> Report:
    """Write figures and scores files into the folder and assemble the page; `report.publish` completes it.

    Args:
        folder: the open run.
        results: from `summarise`.
        comparisons: the comparisons that `results` summarises: each defense on each group of suspects trained in one call.
        data: the training set before poisoning, and the test set.
        seconds: from `sections.seconds_of`.
        title: of the report; by default "Defenses on" and the dataset.
        about: names of the defenses that the headline is about; by default all.
        extra_sections: sections of this experiment alone, after the results.
    """
    shared.write_scores(folder, comparisons)
    figures = [
        draw(folder, results) for draw in (shared.matrix_figure, shared.trade_off_figure) if shared.with_asr(results)
    ]
    details = detail_table(results), trigger_table(results), main_table(results, "r_acc"), shared.facts_table(results)
    scores, suspicious = (
        shared.score_figures(folder, comparisons),
        shared.suspicious_figures(folder, comparisons, data.train),
    )
    advice = "The rows to inspect first. The files under scores/ have every row."
    return Report(
        title=title or f"Defenses on {data.train.name}",
        verdict=verdict(results, about),
        key_numbers=_key_numbers(results, about),
        facts=needs_table(results),
        sections=(
            *shared.section(
                "Results", [main_table(results), shared.published_table(results, data.train.name)], figures
            ),
            *extra_sections,
            *shared.section("Training sets", [rows_table(results)]),
            *shared.section("Detection", [detection_table(results), false_alarm_table(results)], scores),
            *shared.section("The most suspicious rows", [], suspicious, advice),
            *shared.section("What the defenses found", [], shared.picture_figures(folder, comparisons)),
            *shared.section("Details", details),
            *shared.section("Time for one training set", [shared.time_table(results, seconds, folder.is_new)]),
        ),
        settings=shared.settings_of(results),
    )


def _key_numbers(results: Entry, about: Sequence[str]) -> dict[str, str]:
    shown = _shown(results, about)
    pair = {
        method["method"]: method["title"]
        for method in results["methods"]
        if method["base"] == schema.NO_DEFENSE or method in shown
    }
    attacks = [
        attack
        for attack in results["attacks"]
        if all(mean_of(find(results, attack["attack"], name), "asr") is not None for name in pair)
    ]
    numbers = (
        shared.key_numbers(results, pair, ("asr", "cda"), attacks or results["attacks"]) if len(shown) == 1 else {}
    )
    counts = {"training sets": str(len(results["attacks"])), "defenses": str(len(_shown(results, ())))}
    return numbers or counts
