"""The schema of results.json, and functions to read it.

```
{"definitions": {name: text}, "test_rows": n, "seeds": [..],
 "attacks": [{"attack": name, "title": .., ...facts}],
 "methods": [{"method": name, "base": .., "title": .., "needs": [..], ...facts}],
 "cells": [{"attack": .., "method": .., "summary": {name: {"mean", "standard_deviation"}}, "facts": {..},
            "by_seed": [{"seed": .., numbers..}]}],
 "left_out": {name: reason}, "not_read": n, ...what only this kind of run has}
```

In addition, only where there is something to say: "class_names" [..]; "not_tested" [{"attack", "method", "title", "seed",
"reason", "classes": {title: reason}}]; "shared_rows" [{"of": "the suspect set", "count", "rows"}], clean rows that another set
has, too; "scaled" [{"of": dataset, "image_size": [h, w], "original_sizes": [{"size": [h, w], "images"}], "num_sizes", "text"}],
what was scaled, with the most frequent sizes; "warnings" [{"attack", "method", "title", "seed", "text"}], results that should
not be relied on; "limits" [sentence], what the run cannot show; "curves" [{"attack", "method", "seed", "points": [{"epoch",
numbers..}], "best": point}], students during their training.

A cell holds the numbers of one method on one attack. The method with the base `NO_DEFENSE` is the baseline: the undefended
network. Wall times are not in results.json, so that a repeated run writes the same file.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bdjax import metrics
from bdjax.attacks.label_rules import titled
from bdjax.datasets import scaling
from bdjax.evaluation.measure import Measured
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NOT_TESTED, DefenseVariant
from bdjax.reporting.tables import mean_and_spread
from bdjax.run.folder import to_plain
from bdjax.run.text import printable
from bdjax.settings import read_variant
from bdjax.types import Dataset, class_title

NO_DEFENSE = "none"
"""The base name of the baseline."""
MOST_CLASSES = 12
"""Most classes that a sentence names."""


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of one number over seeds: {"mean", "standard_deviation"}.

    The mean is None if there is no value or any value is None; a single seed has no deviation.
    """
    known = list(values)
    if not known or any(value is None for value in known):
        return {"mean": None, "standard_deviation": None}
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "standard_deviation": deviation}


def assemble(
    definitions: Iterable[str],
    test_rows: int,
    seeds: Iterable[int],
    attacks: Iterable[Mapping[str, Any]],
    methods: Iterable[Mapping[str, Any]],
    cells: Iterable[Mapping[str, Any]],
    left_out: Mapping[str, str] = {},
    **extra: Any,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        definitions: names in `metrics.DEFINITIONS` of the numbers and words in the cells and tables.
        test_rows: number of test rows.
        seeds: their numbers.
        attacks: an entry for each attack, with "attack" and "title".
        methods: an entry for each method, with "method", "base", "title" and "needs".
        cells: from `make_cell`.
        left_out: an attack or a method -> why it is not in the run.
        extra: entries that only this kind of run has.
    """
    return {
        "definitions": metrics.definitions(*definitions),
        "test_rows": test_rows,
        "seeds": list(seeds),
        "attacks": list(attacks),
        "methods": list(methods),
        "cells": list(cells),
        "left_out": dict(left_out),
        **extra,
    }


def make_cell(attack: str, method: str, by_seed: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """One entry of results["cells"].

    Args:
        attack: its name.
        method: its name.
        by_seed: the numbers of each seed, "seed" first. Under "facts" are numbers that only this method reports.
        names: the numbers that are summarised.
    """
    facts = list(dict.fromkeys(name for row in by_seed for name in row.get("facts", {})))
    return {
        "attack": attack,
        "method": method,
        "summary": {name: spread(row[name] for row in by_seed) for name in names},
        "facts": {name: spread(row["facts"].get(name) for row in by_seed) for name in facts},
        "by_seed": [dict(row) for row in by_seed],
    }


def describe_attack(suspects: Sequence[Suspect], seed: int) -> dict[str, Any]:
    """The entry of results["attacks"] for the suspects of one attack, in order of seeds; `seed` is the number of the first."""
    attack, title = suspects[0].attack, suspects[0].dataset.class_title
    targets = list(dict.fromkeys(suspect.attack.target for suspect in suspects))
    other_targets = "" if len(targets) == 1 else f" of the first seed; then {', '.join(map(title, targets[1:]))}"
    parts = [
        {
            "attack": part.attack.name,
            "title": part.attack.title,
            "paper": part.attack.paper,
            "label_rule": titled(part.rule.name, title) + (other_targets if "target" in part.rule.name else ""),
            "settings": to_plain(part.settings),
        }
        for part in (attack.plan.parts if attack.plan else ())
    ]
    return {
        "attack": attack.name,
        "base": read_variant(attack.name)[0],
        "title": set_title(suspects[0]),
        "target": (targets[0] if len(targets) == 1 else targets) if parts else None,
        "is_clean": all(suspect.is_poisoned is not None and not suspect.is_poisoned.any() for suspect in suspects),
        "suppression": attack.suppression,
        "parts": parts,
        "seeds": [seed + suspect.seed for suspect in suspects],
    }


def set_title(suspect: Suspect) -> str:
    """The title of a suspect: its attack or its label, "no attack" if it is known to be clean, otherwise "user data"."""
    if suspect.attack.plan is not None or suspect.attack.label:
        # A target in a variant's settings: "BadNets (target 4)".
        title = suspect.dataset.class_title
        return re.sub(r"\btarget (\d+)\b", lambda found: f"target {title(int(found[1]))}", suspect.attack.title)
    is_clean = suspect.is_poisoned is not None and not suspect.is_poisoned.any()
    return suspect.attack.title if is_clean else "user data"


def describe_method(variant: DefenseVariant) -> dict[str, Any]:
    """The entry of results["methods"] for a defense."""
    defense = variant.defense
    return {
        "method": variant.name,
        "base": defense.name,
        "title": variant.title,
        "needs": list(defense.needs_with(variant.settings)),
        "paper": defense.paper,
        "stage": defense.stage,
        "settings": to_plain(variant.settings),
    }


def summarise(
    measured: Sequence[Measured],
    names: Sequence[str],
    definitions: Iterable[str],
    test_rows: int,
    seed: int,
    left_out: Mapping[str, str],
    controls: Mapping[tuple[str, str, int], float | None],
    attack_facts: Callable[[Sequence[Suspect]], Mapping[str, Any]] = lambda suspects: {},
    method_facts: Mapping[str, Mapping[str, Any]] = {},
    **extra: Any,
) -> dict[str, Any]:
    """The content of results.json for defenses on suspects; attacks and methods in order of first appearance.

    Args:
        measured: a measurement for every suspect and every defense.
        names: the numbers of a cell, from "cda", "asr", "r_acc", "control_asr" and the fields of `DetectionMetrics`.
        definitions, test_rows, left_out, extra: as `assemble` has them.
        seed: number of the first seed.
        controls: (attack, method, suspect's seed) -> control ASR, where it is known.
        attack_facts: the suspects of one attack, in order of seeds -> further facts for its entry.
        method_facts: a method's name -> further facts for its entry.
    """
    keys = [(measurement.suspect.attack.name, measurement.variant.name) for measurement in measured]
    suspects: dict[str, list[Suspect]] = {attack: [] for attack, _ in keys}
    variants = {measurement.variant.name: measurement.variant for measurement in measured}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {
        (attack, method): [] for attack in suspects for method in variants
    }
    for key, measurement in sorted(zip(keys, measured, strict=True), key=lambda pair: pair[1].suspect.seed):
        number = measurement.suspect.seed
        if all(suspect.seed != number for suspect in suspects[key[0]]):
            suspects[key[0]].append(measurement.suspect)
        known = {
            "cda": measurement.cda,
            "asr": measurement.asr,
            "r_acc": measurement.r_acc,
            "control_asr": controls.get((*key, number)),
        }
        known |= measurement.detection._asdict()
        row = {"seed": seed + number, **{name: known[name] for name in names}}
        rows[key].append(
            row | {"triggers": [trigger._asdict() for trigger in measurement.metrics], "facts": dict(measurement.facts)}
        )
    return assemble(
        definitions,
        test_rows,
        [seed + number for number in sorted({measurement.suspect.seed for measurement in measured})],
        [describe_attack(group, seed) | attack_facts(group) for group in suspects.values()],
        [describe_method(variant) | method_facts.get(name, {}) for name, variant in variants.items()],
        [make_cell(*key, by_seed, names) for key, by_seed in rows.items() if by_seed],
        left_out,
        **({"not_tested": limited} if (limited := _not_tested(measured, seed)) else {}),
        **({"warnings": warned} if (warned := _warnings(measured, seed)) else {}),
        **extra,
    )


def class_names(names: Sequence[str]) -> dict[str, list[str]]:
    """The classes' names for the tree, unless they are nothing but their numbers."""
    return {"class_names": list(names)} if any(name != str(label) for label, name in enumerate(names)) else {}


def _not_tested(measured: Sequence[Measured], seed: int) -> list[dict[str, Any]]:
    """An entry for each measurement that could not test everything."""
    return [
        {
            "attack": measurement.suspect.attack.name,
            "method": measurement.variant.name,
            "title": measurement.variant.title,
            "seed": seed + measurement.suspect.seed,
            "reason": measurement.not_tested.reason,
            "classes": {
                measurement.suspect.dataset.class_title(label): reason
                for label, reason in sorted(measurement.not_tested.classes.items())
            },
        }
        for measurement in measured
        if any(measurement.not_tested)
    ]


def _warnings(measured: Sequence[Measured], seed: int) -> list[dict[str, Any]]:
    """An entry for each measurement that should not be relied on."""
    return [
        {
            "attack": measurement.suspect.attack.name,
            "method": measurement.variant.name,
            "title": f"{measurement.variant.title} on {set_title(measurement.suspect)}",
            "seed": seed + measurement.suspect.seed,
            "text": measurement.warning,
        }
        for measurement in measured
        if measurement.warning
    ]


def class_title_of(results: Mapping[str, Any], number: int) -> str:
    """A class as reports name it: "3 (cat)"."""
    names = results.get("class_names", ())
    return class_title(number, names[number] if number < len(names) else "")


def word_of(results: Mapping[str, Any], attack: str, method: str, before: str | None) -> metrics.DefenseWord | None:
    """The word for how a method changes the backdoor that is there after the method `before`; None if a number is unknown."""
    cells = [find(results, attack, before), find(results, attack, method)]
    asr, cda, control = ([mean_of(cell, name) for cell in cells] for name in ("asr", "cda", "control_asr"))
    return None if None in (*asr, *cda) else metrics.defense_word(*asr, *cda, *control)


def find(results: Mapping[str, Any], attack: str, method: str | None) -> Mapping[str, Any] | None:
    """The cell of an attack and a method, by their names; None if the run has none."""
    for cell in results["cells"]:
        if cell["attack"] == attack and cell["method"] == method:
            return cell
    return None


def cells(results: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """(cell, its attack, its method) of every cell."""
    attacks = {attack["attack"]: attack for attack in results["attacks"]}
    methods = {method["method"]: method for method in results["methods"]}
    for cell in results["cells"]:
        yield cell, attacks[cell["attack"]], methods[cell["method"]]


def mean_of(cell: Mapping[str, Any] | None, name: str) -> float | None:
    """A cell's mean of a number over seeds; None if it is unknown."""
    return None if cell is None or name not in cell["summary"] else cell["summary"][name]["mean"]


def number_text(cell: Mapping[str, Any], name: str, decimals: int = 3) -> str:
    """A number of a cell as tables print it: "0.953 ± 0.004"."""
    return mean_and_spread([row.get(name) for row in cell["by_seed"]], decimals)


def means_and_deviations(
    results: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, list[float | None]], dict[str, list[float | None]]]:
    """Title -> the mean of every cell, and title -> its standard deviation; `names` is title -> number."""
    means, deviations = (
        {title: [cell["summary"][name][statistic] for cell in results["cells"]] for title, name in names.items()}
        for statistic in ("mean", "standard_deviation")
    )
    return means, deviations


def is_known(results: Mapping[str, Any], name: str) -> bool:
    """Whether any cell has this number."""
    return any(mean_of(cell, name) is not None for cell in results["cells"])


def undefended(results: Mapping[str, Any]) -> str | None:
    """The name of the baseline method, no defense; None if it is not in the run."""
    return next((method["method"] for method in results["methods"] if method["base"] == NO_DEFENSE), None)


def is_clean(attack: Mapping[str, Any]) -> bool:
    """Whether an entry of results["attacks"] is known to be clean: no poisoned row, or a teacher without a backdoor."""
    return attack["is_clean"]


def seeds_text(results: Mapping[str, Any]) -> str:
    """How many seeds the means are over: "3 seeds"."""
    counts = _seed_counts(results)
    if len(counts) == 1:
        return f"{counts[0]} seed{'s' if counts[0] > 1 else ''}"
    return f"{counts[0]} to {counts[-1]} seeds"


def has_spread(results: Mapping[str, Any]) -> bool:
    """Whether any attack has several seeds."""
    return _seed_counts(results)[-1] > 1


def _seed_counts(results: Mapping[str, Any]) -> list[int]:
    """An attack lists its seeds only in runs where attacks may have different ones."""
    return sorted({len(attack["seeds"] if "seeds" in attack else results["seeds"]) for attack in results["attacks"]})


def mean_text(results: Mapping[str, Any]) -> str:
    """Description of the printed numbers: "mean ± standard deviation over 3 seeds"."""
    return f"mean{' ± standard deviation' if has_spread(results) else ''} over {seeds_text(results)}"


def one_seed_text(results: Mapping[str, Any]) -> str:
    """A caveat for verdicts of runs with a single seed, with a leading space; otherwise empty."""
    return " One seed only: small differences mean nothing." if len(results["seeds"]) == 1 else ""


def left_out_text(results: Mapping[str, Any]) -> str:
    """What is not in the run and why, with a leading space; empty if nothing."""
    reasons = "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items())
    return f" Left out: {reasons}." if reasons else ""


def reservations(results: Mapping[str, Any]) -> list[str]:
    """What limits the conclusions of a run, as sentences for its verdict and the terminal; empty if nothing does."""
    texts = []
    if count := results.get("not_read", 0):
        files, lists = ("1 file", "it") if count == 1 else (f"{count:,} files", "them")
        was = "was" if count == 1 else "were"
        texts.append(f"{files} of the data {was} not read and so not examined: not_read.csv lists {lists}.")
    texts += [entry["text"] for entry in results.get("scaled", ())]
    for shared in results.get("shared_rows", ()):
        texts.append(f"{shared_text(shared)}. A method that trusts them may take what they carry for clean.")
    for name, reason in results["left_out"].items():
        if reason.startswith(NOT_TESTED):
            texts.append(f"{_capital(name)} {reason}.")
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in results.get("not_tested", ()):
        group = groups.setdefault(
            (entry["method"], entry["reason"]), {"title": entry["title"], "classes": {}, "sets": 0}
        )
        group["classes"] |= entry["classes"]
        group["sets"] += 1
    total = sum(len(attack.get("seeds", results["seeds"])) for attack in results["attacks"])
    for (_, reason), group in groups.items():
        title = _capital(group["title"])
        if reason:
            where = f" on {group['sets']} of {total} training sets" if total > 1 else ""
            texts.append(f"{title} {NOT_TESTED}{where}: {reason}.")
        else:
            names = list(group["classes"])
            more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
            noun = "class" if len(names) == 1 else "classes"
            where = f" on {group['sets']} of {total} training sets" if total > 1 else ""
            texts.append(
                f"{title}: {noun} {', '.join(names[:MOST_CLASSES])}{more} {NOT_TESTED}{where} (class {names[0]} "
                f"{group['classes'][names[0]]})."
            )
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in results.get("warnings", ()):
        alike.setdefault((entry["method"], entry["text"]), []).append(entry)
    for (_, text), (first, *others) in alike.items():
        more = f", and in {len(others)} more case{'s' if len(others) > 1 else ''}" if others else ""
        texts.append(f"{first['title']}, seed {first['seed']}{more}: {text}.")
    texts += results.get("limits", ())
    return texts


def scaled(parts: Iterable[Dataset]) -> list[dict[str, Any]]:
    """The entries of results["scaled"]: what was scaled, and what a small patch is in the originals.

    Args:
        parts: the run's datasets; those of the same name, such as training and test rows, count together.
    """
    of_name: dict[str, list[Dataset]] = {}
    for part in parts:
        if part.original_sizes:
            of_name.setdefault(part.name, []).append(part)
    entries = []
    for name, same in of_name.items():
        # Parts of one split array all have the sizes of the whole.
        sizes = scaling.count_sizes(*{id(part.original_sizes): part.original_sizes for part in same}.values())
        size = same[0].image_shape[:2]
        named = scaling.ranked(sizes)[: scaling.MOST_SIZES]
        entries.append(
            {
                "of": name,
                "image_size": list(size),
                "original_sizes": [{"size": list(original), "images": count} for original, count in named],
                "num_sizes": len(sizes),
                "text": scaling.scaling_text(printable(name), sizes, size),
            }
        )
    return entries


def shared_text(shared: Mapping[str, Any]) -> str:
    """ "12 of the 100 clean rows are rows of the suspect set"."""
    verb = "is a row" if shared["count"] == 1 else "are rows"
    return f"{shared['count']:,} of the {shared['rows']:,} clean rows {verb} of {shared['of']}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
