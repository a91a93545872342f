"""What a comparison of defenses measured, as numbers (results.json) and as tables.

Wall times are in a table of their own and not among the numbers, which are the same whenever a run is repeated. Means are
over seeds first, then over attacks, and only over attacks that every defense of the table was tried on: ABM's printed
averages leave out what failed, so that its columns average different attacks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bdjax.evaluation.measure import Measured
from bdjax.evaluation.published import find_published
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import AttackVariant, DefenseVariant
from bdjax.reporting.tables import UNKNOWN, Cell, Table, mean_and_spread
from bdjax.run.folder import to_plain
from bdjax.settings import read_variant

DEFINITIONS: Mapping[str, str] = {
    "cda": "share of untouched test rows predicted as their label",
    "asr": "share of triggered victim rows predicted as what the attacker wants; the mean over the attack's triggers",
    "r_acc": "share of the same rows predicted as their true label",
    "flagged": "share of the training rows that the defense takes for poisoned, isolates or leaves out",
    "precision": "share of the flagged rows that are poisoned; unknown if none is flagged",
    "recall": "share of the poisoned rows that are flagged",
    "f1": "harmonic mean of precision and recall; 0 if nothing is flagged",
    "auc": "chance that a poisoned row's score is above a clean one's",
    "works": "mean ASR at most 0.1 or at most 0.3 of that without defense, and mean CDA at most 0.1 below that without",
}
ATTACK_WORKS = 0.5
"""Mean ASR without defense from which on there is a backdoor to remove."""
LOW_ASR, LOW_SHARE, CDA_LOSS = 0.1, 0.3, 0.1
"""What `DEFINITIONS["works"]` says."""
NO_DEFENSE = "none"
ORACLES = ("number of poisons", "attacker's trigger")
"""Needs that no defender can have."""
_MEASURED = ("cda", "asr", "r_acc")
_DETECTED = ("flagged", "precision", "recall", "f1", "auc")


def summarise(tried: Iterable[Measured], test_rows: int, seed: int, left_out: Mapping[str, str] = {}) -> dict[str, Any]:
    """Numbers of all defenses on all attacks.

    Args:
        tried: every suspect after every defense, in any order; tables keep the order in which names first come.
        test_rows: how many there are.
        seed: the number of the first.
        left_out: an attack or a defense -> why the run could not have it.

    Returns:
        A tree of plain numbers, the same for the same inputs; the content of results.json. Under "measured" there is an
        entry for each attack under each defense that it was tried with.
    """
    tried = list(tried)
    attacks = _grouped((one.suspect.attack.name, one) for one in tried)
    defenses = _grouped((one.variant.name, one) for one in tried)
    cells = _grouped(((one.suspect.attack.name, one.variant.name), one) for one in tried)
    measured = [
        _one_cell(*key, sorted(cells[key], key=lambda one: one.suspect.seed), seed)
        for key in ((attack, defense) for attack in attacks for defense in defenses)
        if key in cells
    ]
    return {
        "definitions": dict(DEFINITIONS),
        "test_rows": test_rows,
        "seeds": [seed + number for number in sorted({one.suspect.seed for one in tried})],
        "attacks": [_one_attack(ones, seed) for ones in attacks.values()],
        "defenses": [_one_defense(ones[0].variant) for ones in defenses.values()],
        "measured": measured,
        "left_out": dict(left_out),
    }


def _grouped(pairs: Iterable[tuple[Any, Measured]]) -> dict[Any, list[Measured]]:
    groups: dict[Any, list[Measured]] = {}
    for key, one in pairs:
        groups.setdefault(key, []).append(one)
    return groups


def _one_attack(ones: Sequence[Measured], seed: int) -> dict[str, Any]:
    attack: AttackVariant = ones[0].suspect.attack
    suspects: dict[int, Suspect] = {one.suspect.seed: one.suspect for one in ones}
    ordered = [suspects[number] for number in sorted(suspects)]
    is_known = all(one.is_poisoned is not None for one in ordered)
    parts = attack.plan.parts if attack.plan else ()
    targets = list(dict.fromkeys(one.attack.target for one in ordered))
    by_seed = "" if len(targets) == 1 else f" of the first seed; then {', '.join(map(str, targets[1:]))}"
    return {
        "attack": attack.name,
        "base": read_variant(attack.name)[0],
        "title": set_title(ordered[0]),
        "target": (targets[0] if len(targets) == 1 else targets) if parts else None,
        "suppression": attack.suppression,
        "parts": [
            {
                "attack": part.attack.name,
                "title": part.attack.title,
                "paper": part.attack.paper,
                "label_rule": part.rule.name + (by_seed if "target" in part.rule.name else ""),
                "settings": to_plain(part.settings),
            }
            for part in parts
        ],
        "seeds": [seed + number for number in sorted(suspects)],
        "num_rows": [len(one.dataset) for one in ordered],
        "num_poisoned": [int(one.is_poisoned.sum()) for one in ordered] if is_known else None,
        "num_covers": [one.num_covers for one in ordered] if is_known else None,
    }


def set_title(suspect: Suspect) -> str:
    """What a training set is called: its attack, "no attack" if it is known to be clean, and otherwise what it is. A model that
    somebody handed over has a label."""
    if suspect.attack.plan is not None or suspect.attack.label:
        return suspect.attack.title
    is_clean = suspect.is_poisoned is not None and not suspect.is_poisoned.any()
    return suspect.attack.title if is_clean else "rows as they came"


def _one_defense(variant: DefenseVariant) -> dict[str, Any]:
    defense = variant.defense
    return {
        "defense": variant.name,
        "base": defense.name,
        "title": variant.title,
        "paper": defense.paper,
        "stage": defense.stage,
        "needs": list(defense.needs_with(variant.settings)),
        "settings": to_plain(variant.settings),
    }


def _one_cell(attack: str, defense: str, ones: Sequence[Measured], seed: int) -> dict[str, Any]:
    by_seed = [
        {
            "seed": seed + one.suspect.seed,
            "cda": one.cda,
            "asr": one.asr,
            "r_acc": one.r_acc,
            **one.detection._asdict(),
            "triggers": [trigger._asdict() for trigger in one.metrics],
            "facts": dict(one.facts),
        }
        for one in ones
    ]
    facts = list(dict.fromkeys(name for row in by_seed for name in row["facts"]))
    return {
        "attack": attack,
        "defense": defense,
        "summary": {name: _spread([row[name] for row in by_seed]) for name in (*_MEASURED, *_DETECTED)},
        "facts": {name: _spread([row["facts"].get(name) for row in by_seed]) for name in facts},
        "by_seed": by_seed,
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    if any(value is None for value in values):
        return {"mean": None, "standard_deviation": None}
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": spread}


def find(results: Mapping[str, Any], attack: str, defense: str) -> Mapping[str, Any] | None:
    """The numbers of one attack under one defense, by their names; None if it was not tried."""
    for cell in results["measured"]:
        if cell["attack"] == attack and cell["defense"] == defense:
            return cell
    return None


def mean_of(cell: Mapping[str, Any] | None, name: str) -> float | None:
    """The mean over seeds of a number; None if it is not known."""
    return None if cell is None else cell["summary"][name]["mean"]


def undefended(results: Mapping[str, Any]) -> str | None:
    """The name of the defense that is none; None if the run was without it."""
    return next((one["defense"] for one in results["defenses"] if one["base"] == NO_DEFENSE), None)


def is_clean(attack: Mapping[str, Any]) -> bool:
    """Whether a training set is known to have no poisoned row."""
    return attack["num_poisoned"] is not None and not any(attack["num_poisoned"])


def works(results: Mapping[str, Any], attack: str, defense: str) -> bool | None:
    """Whether a defense works against an attack, as `DEFINITIONS["works"]` has it.

    Returns:
        None where there is nothing to remove: ASR without defense is unknown or below `ATTACK_WORKS`.
    """
    cell, before = find(results, attack, defense), find(results, attack, undefended(results) or "")
    asr, asr_before = mean_of(cell, "asr"), mean_of(before, "asr")
    if asr is None or asr_before is None or asr_before < ATTACK_WORKS:
        return None
    is_gone = asr <= LOW_ASR or asr <= LOW_SHARE * asr_before
    return is_gone and mean_of(cell, "cda") >= mean_of(before, "cda") - CDA_LOSS


def seeds_text(results: Mapping[str, Any]) -> str:
    """Over how many seeds the means are: "3 seeds"."""
    counts = sorted({len(one["seeds"]) for one in results["attacks"]})
    if len(counts) == 1:
        return f"{counts[0]} seed{'s' if counts[0] > 1 else ''}"
    return f"{counts[0]} to {counts[-1]} seeds"


def has_spread(results: Mapping[str, Any]) -> bool:
    """Whether any training set comes with several seeds."""
    return any(len(one["seeds"]) > 1 for one in results["attacks"])


def _left_out_text(results: Mapping[str, Any]) -> str:
    told = "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items())
    return f" Left out: {told}." if told else ""


def main_table(results: Mapping[str, Any], second: str = "asr") -> Table:
    """Attacks × defenses, two numbers in each cell, and their means over the attacks.

    Args:
        results: of `summarise`.
        second: what stands beside CDA: "asr" or "r_acc".
    """
    defenses, label = results["defenses"], {"asr": "ASR", "r_acc": "R-ACC"}[second]
    rows, common = [], []
    for attack in results["attacks"]:
        found = [find(results, attack["attack"], one["defense"]) for one in defenses]
        rows.append((attack["title"], *(_pair(mean_of(cell, "cda"), mean_of(cell, second)) for cell in found)))
        if all(mean_of(cell, second) is not None for cell in found):
            common.append(found)
    styles = [""] * len(rows)
    if len(common) > 1:
        means = [
            _pair(*(float(np.mean([mean_of(found[i], name) for found in common])) for name in ("cda", second)))
            for i in range(len(defenses))
        ]
        rows.append((f"mean of {len(common)} attacks", *means))
        styles.append("ours")
    spreads = {
        name: [
            cell["summary"][name]["standard_deviation"]
            for cell in results["measured"]
            if cell["summary"][name]["standard_deviation"] is not None
        ]
        for name in ("cda", second)
    }
    notes = f"CDA / {label}, mean over {seeds_text(results)}, {results['test_rows']:,} test rows."
    if spreads[second]:
        notes += (
            f" Largest standard deviation over seeds in any cell: CDA {max(spreads['cda']):.3f}, {label} "
            f"{max(spreads[second]):.3f}; each cell's own is in the table of every number."
        )
    if not has_spread(results):
        notes += " A single seed has no spread: small differences mean nothing."
    if len(common) > 1 and len(common) < len(results["attacks"]):
        notes += f" The last row is over those attacks that have {label} under every defense."
    if any(one["stage"] == "at test time" for one in defenses):
        notes += " A test row that a defense rejects is neither right nor a success: it lowers CDA, ASR and R-ACC."
    if any(is_clean(attack) for attack in results["attacks"]):
        notes += f" A clean training set has no trigger and so no {label}."
    if any(not attack["parts"] and not is_clean(attack) for attack in results["attacks"]):
        notes += f" Of rows as they came this run knows no trigger, so their {label} is unknown."
    return Table(
        f"CDA / {label}",
        ("training set", *(one["title"] for one in defenses)),
        tuple(rows),
        notes + _left_out_text(results),
        tuple(styles),
    )


def _pair(first: float | None, second: float | None) -> str | None:
    if first is None:
        return None
    return f"{first:.3f} / {UNKNOWN if second is None else f'{second:.3f}'}"


def _numbers(cell: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(mean_and_spread([row[name] for row in cell["by_seed"]]) for name in names)


def _titles(results: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    return (
        {one["attack"]: one["title"] for one in results["attacks"]},
        {one["defense"]: one["title"] for one in results["defenses"]},
    )


def detail_table(results: Mapping[str, Any]) -> Table:
    """Every number with its spread: a row for each attack under each defense."""
    attacks, defenses = _titles(results)
    rows = []
    for cell in results["measured"]:
        word = works(results, cell["attack"], cell["defense"])
        is_baseline = cell["defense"] == undefended(results)
        rows.append(
            (
                attacks[cell["attack"]],
                defenses[cell["defense"]],
                *_numbers(cell, _MEASURED),
                None if word is None or is_baseline else "yes" if word else "no",
            )
        )
    notes = (
        f"Mean{' ± standard deviation' if has_spread(results) else ''} over {seeds_text(results)}. Works: "
        f"{DEFINITIONS['works']}; {UNKNOWN} where there is no backdoor to remove (ASR without defense unknown or below "
        f"{ATTACK_WORKS:g})."
    )
    return Table("Every number", ("training set", "defense", "CDA", "ASR", "R-ACC", "works"), tuple(rows), notes)


def trigger_table(results: Mapping[str, Any]) -> Table | None:
    """ASR and R-ACC under each trigger of the hybrid attacks; None if there is no hybrid."""
    attacks, defenses = _titles(results)
    rows = []
    for attack in results["attacks"]:
        if len(attack["parts"]) < 2:
            continue
        for number, part in enumerate(attack["parts"]):
            for one in results["defenses"]:
                cell = find(results, attack["attack"], one["defense"])
                if cell is None:
                    continue
                each = [row["triggers"][number] for row in cell["by_seed"]]
                texts = (mean_and_spread([trigger[name] for trigger in each]) for name in ("asr", "r_acc"))
                rows.append((attacks[attack["attack"]], part["title"], defenses[one["defense"]], *texts))
    if not rows:
        return None
    notes = "Other tables have the mean over a training set's triggers. Each is tried alone."
    return Table("Hybrid attacks", ("training set", "trigger", "defense", "ASR", "R-ACC"), tuple(rows), notes)


def detection_table(results: Mapping[str, Any]) -> Table | None:
    """What flags and scores are worth; None if no defense has any."""
    attacks, defenses = _titles(results)
    rows = []
    for cell in results["measured"]:
        if mean_of(cell, "flagged") is None and mean_of(cell, "auc") is None:
            continue
        poisoned = next(one for one in results["attacks"] if one["attack"] == cell["attack"])
        share = None
        if poisoned["num_poisoned"] is not None:
            share = float(np.sum(poisoned["num_poisoned"]) / np.sum(poisoned["num_rows"]))
        numbers = (None if text == UNKNOWN else text for text in _numbers(cell, _DETECTED))
        rows.append((attacks[cell["attack"]], share, defenses[cell["defense"]], *numbers))
    if not rows:
        return None
    notes = (
        f"Of training rows; mean{' ± standard deviation' if has_spread(results) else ''} over {seeds_text(results)}. "
        f"Poisoned, flagged: shares of all rows; cover rows count as clean. AUC: {DEFINITIONS['auc']} (0.5 is chance). "
        f"{UNKNOWN}: nothing poisoned, nobody knows, or a seed in which nothing is flagged. A defense may flag few rows on "
        "purpose (isolation): then recall is low by design."
    )
    header = ("training set", "poisoned", "defense", "flagged", "precision", "recall", "F1", "AUC")
    return Table("Detection of poisoned rows", header, tuple(rows), notes)


def false_alarm_table(results: Mapping[str, Any]) -> Table | None:
    """What defenses cost on training sets that are clean; None if there is none."""
    rows = []
    for attack in filter(is_clean, results["attacks"]):
        before = find(results, attack["attack"], undefended(results) or "")
        for one in results["defenses"]:
            cell = find(results, attack["attack"], one["defense"])
            if cell is None:
                continue
            gain = None
            if before is not None and cell is not before:
                pairs = zip(cell["by_seed"], before["by_seed"], strict=True)
                gain = mean_and_spread([after["cda"] - plain["cda"] for after, plain in pairs])
            (flagged,) = _numbers(cell, ("flagged",))
            rows.append((one["title"], *_numbers(cell, ("cda",)), gain, flagged))
    if not rows:
        return None
    notes = (
        f"On the clean training set, mean{' ± standard deviation' if has_spread(results) else ''} over "
        f"{seeds_text(results)}. Difference: CDA minus that of no defense on the same seed. Every flagged row is a false "
        f"alarm; {UNKNOWN}: the defense flags no rows."
    )
    return Table("False alarms", ("defense", "CDA", "difference", "flagged"), tuple(rows), notes)


def needs_table(results: Mapping[str, Any]) -> Table:
    """Who was given what."""
    every = ("training set", "attacked model", "clean rows", *ORACLES)
    names = [name for name in every if any(name in one["needs"] for one in results["defenses"])]
    rows = tuple(
        (one["title"], one["stage"], *("yes" if name in one["needs"] else None for name in names), one["paper"])
        for one in results["defenses"]
    )
    notes = "Attacked model: the network that plain training on the suspect rows gave."
    if "clean rows" in names:
        notes += " Clean rows: some that are known to be clean."
    if any(name in ORACLES for name in names):
        notes += f" {' and '.join(name for name in names if name in ORACLES).capitalize()}: no defender has that."
    return Table("Who was given what", ("defense", "when", *names, "paper"), rows, notes)


def facts_table(results: Mapping[str, Any], suspect: str = "training set") -> Table | None:
    """Numbers of the defenses' own; None if there are none.

    Args:
        results: of `summarise`.
        suspect: what defenses are tried on.
    """
    attacks, defenses = _titles(results)
    rows: list[tuple[Cell, ...]] = []
    for one in results["defenses"]:
        for cell in results["measured"]:
            if cell["defense"] != one["defense"]:
                continue
            for name in cell["facts"]:
                text = mean_and_spread([row["facts"].get(name) for row in cell["by_seed"]], 3)
                rows.append((defenses[one["defense"]], attacks[cell["attack"]], name, text))
    if not rows:
        return None
    return Table("What the defenses say of themselves", ("defense", suspect, "what", "value"), tuple(rows))


def published_table(results: Mapping[str, Any], dataset: str) -> Table | None:
    """Our numbers beside the papers', in percent, where dataset, attack and defense are the same; None if none is.

    Args:
        results: of `summarise`.
        dataset: as bdjax names it.
    """
    attacks, defenses = _titles(results)
    bases = {one["attack"]: one["base"] for one in results["attacks"] if not one["suppression"]}
    methods = {one["defense"]: one["base"] for one in results["defenses"]}
    rows: list[tuple[Cell, ...]] = []
    for cell in results["measured"]:
        key = {"dataset": dataset, "attack": bases.get(cell["attack"]), "method": methods[cell["defense"]]}
        for one in find_published(measured="network", **key):
            ours = [None if value is None else 100 * value for value in (mean_of(cell, "cda"), mean_of(cell, "asr"))]
            theirs = ("fail", "fail") if one.clean_accuracy is None else (one.clean_accuracy, one.success)
            names = attacks[cell["attack"]], defenses[cell["defense"]]
            rows.append((*names, ours[0], theirs[0], ours[1], theirs[1], one.paper))
    if not rows:
        return None
    notes = (
        "In percent; ours are means over seeds. The papers' rows have networks, schedules and poison rates of their own, "
        "and success may count the target class's rows; see the settings for ours. Fail: the paper calls the defense very "
        "unstable there, or it leaves more than 80 %."
    )
    header = ("training set", "defense", "CDA", "the paper's", "ASR", "the paper's", "paper")
    return Table("Beside the papers", header, tuple(rows), notes, decimals=2)


def time_table(
    results: Mapping[str, Any], seconds: Mapping[str, float], notes: str = "", is_whole: bool = True
) -> Table | None:
    """Seconds of each defense for one suspect; None if none was timed.

    Args:
        results: of `summarise`.
        seconds: defense variant -> seconds of its calls divided by the suspects that shared them. For no defense: of the
            plain training.
        notes: what else a reader must know.
        is_whole: whether the run was made in one go. If not, stages were read back, and ratios would mean nothing.
    """
    plain = seconds.get(undefended(results) or "")
    rows: list[tuple[Cell, ...]] = []
    for one in results["defenses"]:
        own = seconds.get(one["defense"])
        if own is None:
            continue
        ratio = None if not plain or not is_whole or one["base"] == NO_DEFENSE else f"{own / plain:.2f} ×"
        rows.append((one["title"], f"{own:.2f}", ratio))
    if not rows:
        return None
    included = (
        "Wall time of this very process, compiling included and shared by all suspects of a call. No defense: the plain "
        "training, which a defense that starts from the attacked model needs on top. Stages that another defense had "
        "already trained cost next to nothing here."
    )
    if not is_whole:
        included += " This run was continued: what an earlier start had trained is not in these seconds."
    header = ("defense", "seconds per training set", "× no defense")
    return Table("Time", header, tuple(rows), included + (f" {notes}" if notes else ""))


def rows_table(results: Mapping[str, Any]) -> Table:
    """The training sets: how many rows, how many poisoned, whose target."""

    def text(numbers: Sequence[int] | None) -> Cell:
        if numbers is None:
            return None
        least, most = min(numbers), max(numbers)
        return least if least == most else f"{least:,} to {most:,}"

    rows = tuple(
        (
            one["title"],
            "; ".join(part["label_rule"] for part in one["parts"]) or None,
            text(one["num_rows"]),
            text(one["num_poisoned"]),
            text(one["num_covers"]),
            f"{one['suppression']:g}" if one["suppression"] else None,
            ", ".join(map(str, one["seeds"])),
        )
        for one in results["attacks"]
    )
    notes = (
        f"Poisoned, cover: numbers of rows; {UNKNOWN} where nobody knows. Cover rows carry a trigger, or what looks like it, "
        "under their own label. Suppression: how much an adaptive attacker weakens its backdoor."
    )
    header = ("training set", "labels", "rows", "poisoned", "cover", "suppression", "seeds")
    return Table("Training sets", header, rows, notes)
