"""What an attack run measured, as numbers (results.json) and as tables beside the papers'."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bdjax.attacks.victims import Trial
from bdjax.inspection.similarity import psnr, ssim
from bdjax.reporting.tables import Cell, Table, mean_and_spread
from bdjax.run.folder import to_plain

DEFINITIONS: Mapping[str, str] = {
    "cda": "share of untouched test rows predicted as their label",
    "asr": "share of triggered victim rows predicted as what the attacker wants; rows of the target class are no victims",
    "r_acc": "share of the same rows predicted as their true label",
    "asr_with_target": "share of triggered rows, victims and those of the target class, predicted as the target class",
    "r_acc_with_target": "share of those predicted as their true label",
    "spill": "share of all other triggered rows predicted as the target class: those that the attack is not after",
    "clean_asr": "ASR of the clean network of the same seed under the same trigger",
    "clean_cda": "CDA of the clean network of the same seed",
    "cover_accuracy": "share of victim rows predicted as their true label under what cover rows carry in training",
    "psnr": "peak signal-to-noise ratio of the triggered test images, in dB, the mean over victim rows",
    "ssim": "structural similarity of the triggered test images, the mean over victim rows",
}
WORKS, WORKS_PARTLY = 0.9, 0.5
"""Mean ASR from which on tables say that an attack works, and that it works partly."""
COMPARED_IMAGES = 200
"""How many victim rows PSNR and SSIM are averaged over."""


def summarise(
    tested: Sequence[Sequence[Trial]],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    left_out: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Numbers of all attacks.

    Args:
        tested: for each plan, all seeds of its first part, then of the next.
        images: uint8 [N, H, W, C], the untouched test set.
        labels: int32 [N].
        seed: the number of the first.
        left_out: attack -> why the dataset does not allow it.

    Returns:
        A tree of plain numbers, the same for the same inputs; the content of results.json.
    """
    attacks = []
    for plan in tested:
        parts = list(dict.fromkeys(one.part.attack.name for one in plan))
        for part in parts:
            seeds = [one for one in plan if one.part.attack.name == part]
            attacks.append(_one_attack(seeds, images, labels))
    clean = {one.victim.prepared.seed: one.clean_model.cda for plan in tested for one in plan}
    return {
        "definitions": dict(DEFINITIONS),
        "test_rows": len(labels),
        "seeds": [seed + number for number in sorted(clean)],
        "clean_cda": [clean[number] for number in sorted(clean)],
        "attacks": attacks,
        "left_out": dict(left_out),
    }


def _one_attack(seeds: Sequence[Trial], images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    part, plan = seeds[0].part, seeds[0].victim.prepared.plan
    victims = np.flatnonzero(part.rule.victims(labels))[:COMPARED_IMAGES]
    rows = []
    for one in seeds:
        before, after = (each[victims].astype(np.float32) / 255 for each in (images, one.triggered))
        changed = np.any(before != after, axis=(1, 2, 3))
        rows.append(
            {
                **one.metrics._asdict(),
                "clean_cda": one.clean_model.cda,
                "clean_asr": one.clean_model.asr,
                "cover_accuracy": one.cover_accuracy,
                # An image that the trigger leaves alone has no finite PSNR; the mean is over the others.
                "psnr": float(np.mean(psnr(before[changed], after[changed]))) if changed.any() else None,
                "ssim": float(np.mean(ssim(before, after))),
            }
        )
    attack = part.attack
    return {
        "attack": attack.name,
        "with": [other.attack.name for other in plan.parts if other is not part],
        "title": attack.title + "".join(f", beside {other.attack.title}" for other in plan.parts if other is not part),
        "paper": attack.paper,
        "threat": attack.threat,
        "needs": list(attack.needs),
        "trigger_is_trained": attack.trigger_is_trained,
        "label_rule": part.rule.name,
        "settings": to_plain(part.settings),
        "adds_rows": attack.adds_rows,
        "fine_tunes": attack.starts_from_clean_model,
        "published": [dict(each._asdict()) for each in attack.published],
        "num_poisoned": [len(one.victim.prepared.poisoned_by[plan.parts.index(part)]) for one in seeds]
        if seeds[0].victim.prepared.poisoned is not None
        else None,
        "num_victims": int(np.sum(part.rule.victims(labels))),
        "summary": {name: _spread([row[name] for row in rows]) for name in rows[0]},
        "by_seed": rows,
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    if any(value is None for value in values):
        return {"mean": None, "standard_deviation": None}
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": spread}


def _cell(attack: Mapping[str, Any], name: str, decimals: int = 3) -> str:
    return mean_and_spread([row[name] for row in attack["by_seed"]], decimals)


def verdict_word(attack: Mapping[str, Any]) -> str | None:
    """What tables say of an attack's mean ASR; None of one that has no trigger, whose ASR is plain confusion."""
    if attack["summary"]["psnr"]["mean"] is None:
        return None
    asr = attack["summary"]["asr"]["mean"]
    return "yes" if asr >= WORKS else "partly" if asr >= WORKS_PARTLY else "no"


def attack_table(results: Mapping[str, Any], dataset: str) -> Table:
    """Every attack: what it has to control and what it reaches, with the papers' numbers for the same dataset."""
    printed = any(each["dataset"] == dataset for attack in results["attacks"] for each in attack["published"])
    header = ("attack", "controls", "poison", "CDA", "ASR", "R-ACC", "clean net's ASR", "PSNR", "SSIM", "works")
    clean = (
        "no attack", "nothing", None, mean_and_spread(results["clean_cda"]), None, None, None, None, None, None
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = [clean + ((None,) if printed else ())]
    for attack in results["attacks"]:
        row: tuple[Cell, ...] = (
            attack["title"],
            attack["threat"],
            _rate(attack),
            *(_cell(attack, name) for name in ("cda", "asr", "r_acc", "clean_asr")),
            _cell(attack, "psnr", 1),
            _cell(attack, "ssim"),
            verdict_word(attack),
        )
        if printed:
            own = [each for each in attack["published"] if each["dataset"] == dataset]
            texts = [f"{each['paper']} {each['clean_accuracy']:g} / {each['success']:g}" for each in own]
            row += ("; ".join(texts) or None,)
        rows.append(row)
    count = len(results["seeds"])
    notes = (
        f"Mean{' ± standard deviation' if count > 1 else ''} over {count} seed{'s' if count > 1 else ''}, "
        f"{results['test_rows']:,} test rows. Controls: data, rows of the training set; training, the whole training, so that "
        f"the model is handed over. Poison: share of all training rows (in each batch, where training is controlled), + cover "
        f"rows. Works: mean ASR at least {WORKS:g}; partly: at least {WORKS_PARTLY:g}. PSNR in dB."
        + (" The papers' columns are CDA / ASR in percent, each with its own network and schedule." if printed else "")
    )
    if results["left_out"]:
        notes += " Left out: " + "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items()) + "."
    return Table("Attacks", header + (("the papers'",) if printed else ()), tuple(rows), notes)


def _rate(attack: Mapping[str, Any]) -> str:
    settings = attack["settings"]
    cover = settings["cover_rate"]
    return f"{100 * settings['poison_rate']:.3g} %" + (f" + {100 * cover:.3g} %" if cover else "")


def detail_table(results: Mapping[str, Any]) -> Table:
    """The other readings of success: with the target class's rows, on rows that are not attacked, on cover rows."""
    header = ("attack", "labels", "victims", "ASR with target", "R-ACC with target", "spill", "cover accuracy")
    rows = tuple(
        (
            attack["title"],
            attack["label_rule"],
            attack["num_victims"],
            *(_cell(attack, name) for name in ("asr_with_target", "r_acc_with_target", "spill", "cover_accuracy")),
        )
        for attack in results["attacks"]
    )
    notes = (
        "ASR with target counts the target class's own rows as successes too, as several papers' code does. Spill is the ASR "
        "on rows that the attack is not after. Cover accuracy: true labels under what cover rows carry (another image's "
        "trigger, a noisy or a partial one)."
    )
    return Table("Other readings", header, rows, notes)


def needs_table(results: Mapping[str, Any]) -> Table:
    """What each attacker has."""
    rows = tuple(
        (
            attack["title"],
            ", ".join(attack["needs"]) or "nothing else",
            "trained" if attack["trigger_is_trained"] else "given",
            "fine-tuned" if attack["fine_tunes"] else "from scratch",
            "added" if attack["adds_rows"] else "in place" if attack["threat"] == "data" else "in each batch",
            attack["paper"],
        )
        for attack in results["attacks"]
    )
    return Table("What each attacker has", ("attack", "needs", "trigger", "victim", "poisoned rows", "paper"), rows)


def settings_table(tested: Sequence[Sequence[Trial]]) -> Mapping[str, Mapping[str, Any]]:
    """Attack -> setting -> value, for the report's list of settings."""
    return {one.part.attack.name: dataclasses.asdict(one.part.settings) for plan in tested for one in plan}
