"""An attack run: its numbers (results.json), its tables beside the papers', its gallery, its verdict and its report."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bdjax.attacks.victims import Trial
from bdjax.inspection.gallery import COLUMNS, as_float, gallery
from bdjax.inspection.similarity import psnr, ssim
from bdjax.metrics import ATTACK_WORKS_PARTLY, DEFINITIONS, AttackWord, attack_word
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.report import Figure, Report, Section, Verdict
from bdjax.reporting.results import NO_DEFENSE, mean_of, number_text
from bdjax.reporting.sections import cell_table, entry_table
from bdjax.reporting.tables import Cell, Table, mean_and_spread
from bdjax.run.folder import RunFolder, to_plain
from bdjax.types import TrainTest

NUMBERS = (
    *("cda", "asr", "r_acc", "asr_with_target", "r_acc_with_target", "asr_outside", "clean_cda", "control_asr"),
    *("cover_accuracy", "psnr", "ssim"),
)
"""What every cell has."""
COMPARED_IMAGES = 200
"""How many victim rows PSNR and SSIM are averaged over."""


def summarise(
    trials: Sequence[Sequence[Trial]],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    left_out: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Numbers of all attacks; a hybrid has an entry for each of its parts.

    Args:
        trials: for each plan, all seeds of its first part, then of the next.
        images: uint8 [N, H, W, C], the untouched test set.
        labels: int32 [N].
        seed: the number of the first.
        left_out: attack -> why the dataset does not allow it.

    Returns:
        The tree of `bdjax.reporting.results`, the same for the same inputs, with the only method `NO_DEFENSE`: the victims.
        Beside it "clean_cda": of each seed's clean network.
    """
    attacks, cells, clean = [], [], {}
    for plan in trials:
        clean |= {trial.victim.prepared.seed: trial.clean_model.cda for trial in plan}
        for name in dict.fromkeys(trial.part.attack.name for trial in plan):
            of_part = [trial for trial in plan if trial.part.attack.name == name]
            by_seed = [_measure(trial, images, labels, seed) for trial in of_part]
            attacks.append(_describe(of_part, labels, [row["seed"] for row in by_seed]))
            cells.append(schema.make_cell(attacks[-1]["attack"], NO_DEFENSE, by_seed, NUMBERS))
    victims = {"method": NO_DEFENSE, "base": NO_DEFENSE, "title": "no defense", "needs": []}
    seeds, clean_cda = zip(*((seed + number, clean[number]) for number in sorted(clean)), strict=True)
    return schema.assemble(
        (*NUMBERS, "works"), len(labels), seeds, attacks, [victims], cells, left_out, clean_cda=list(clean_cda)
    )


def _measure(trial: Trial, images: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Any]:
    victims = np.flatnonzero(trial.part.rule.victims(labels))[:COMPARED_IMAGES]
    before, after = as_float(images[victims]), as_float(trial.triggered[victims])
    changed = np.any(before != after, axis=(1, 2, 3))
    return {
        "seed": seed + trial.victim.prepared.seed,
        **trial.metrics._asdict(),
        "clean_cda": trial.clean_model.cda,
        "control_asr": trial.clean_model.asr,
        "cover_accuracy": trial.cover_accuracy,
        # An image that the trigger leaves alone has no finite PSNR; the mean is over the others.
        "psnr": float(np.mean(psnr(before[changed], after[changed]))) if changed.any() else None,
        "ssim": float(np.mean(ssim(before, after))),
    }


def _describe(trials: Sequence[Trial], labels: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """The entry of results["attacks"] for one part of a plan, of all its seeds."""
    part, plan = trials[0].part, trials[0].victim.prepared.plan
    attack, others = part.attack, [other.attack for other in plan.parts if other is not part]
    prepared = [trial.victim.prepared for trial in trials if trial.victim.prepared.poisoned is not None]
    counts = [len(each.poisoned_by[plan.parts.index(part)]) for each in prepared]
    return {
        "attack": f"{attack.name} in {plan.name}" if others else attack.name,
        "title": attack.title + "".join(f", beside {other.title}" for other in others),
        "base": attack.name,
        "with": [other.name for other in others],
        "paper": attack.paper,
        "threat": attack.threat,
        "needs": list(attack.needs),
        "trigger_is_trained": attack.trigger_is_trained,
        "label_rule": part.rule.name,
        "settings": to_plain(part.settings),
        "adds_rows": attack.adds_rows,
        "fine_tunes": attack.starts_from_clean_model,
        "published": [dict(row._asdict()) for row in attack.published],
        "seeds": list(seeds),
        "num_poisoned": counts or None,  # unknown where poisoning happens inside the training
        "num_victims": int(np.sum(part.rule.victims(labels))),
    }


def verdict_word(cell: Mapping[str, Any]) -> AttackWord | None:
    """Whether an attack works; None of an attack that has no trigger, whose ASR is plain confusion."""
    return None if mean_of(cell, "psnr") is None else attack_word(mean_of(cell, "asr"), mean_of(cell, "control_asr"))


def main_table(results: Mapping[str, Any], dataset: str) -> Table:
    """Every attack: what it has to control and what it reaches, with the papers' numbers for the same dataset."""
    header = ("attack", "controls", "poison", "CDA", "ASR", "R-ACC", "clean net's ASR", "PSNR", "SSIM", "works")
    clean = ("no attack", "nothing", None, mean_and_spread(results["clean_cda"]), *(None,) * 6)
    rows: list[tuple[Cell, ...]] = [clean]
    papers: list[str | None] = [None]
    for cell, attack, _ in schema.cells(results):
        settings, cover = attack["settings"], attack["settings"]["cover_rate"]
        rate = f"{100 * settings['poison_rate']:.3g} %" + (f" + {100 * cover:.3g} %" if cover else "")
        texts = *map(partial(number_text, cell), ("cda", "asr", "r_acc", "control_asr")), number_text(cell, "psnr", 1)
        rows.append((attack["title"], attack["threat"], rate, *texts, number_text(cell, "ssim"), verdict_word(cell)))
        published = [each for each in attack["published"] if each["dataset"] == dataset]
        printed = (f"{each['paper']} {each['clean_accuracy']:g} / {each['success']:g}" for each in published)
        papers.append("; ".join(printed) or None)
    notes = (
        f"{schema.mean_text(results).capitalize()}, {results['test_rows']:,} test rows. Controls: data, rows of the training "
        "set; training, the whole training, so that the model comes from the attacker. Poison: share of all training rows (in "
        "each batch, where training is controlled), + cover rows. Works: "
        f"{DEFINITIONS['works']}; the control is the clean net. PSNR in dB."
    )
    if any(papers):
        header += ("the papers'",)
        rows = [(*row, text) for row, text in zip(rows, papers, strict=True)]
        notes += " The papers' columns are CDA / ASR in percent, each with its own network and schedule."
    return Table("Attacks", header, tuple(rows), notes + schema.left_out_text(results))


def detail_table(results: Mapping[str, Any]) -> Table:
    """The other readings of success: with the target class's rows, on rows that are not attacked, on cover rows."""
    columns = {
        "attack": lambda _, attack, __: attack["title"],
        "labels": lambda _, attack, __: attack["label_rule"],
        "victims": lambda _, attack, __: attack["num_victims"],
        "ASR with target": lambda cell, *_: number_text(cell, "asr_with_target"),
        "R-ACC with target": lambda cell, *_: number_text(cell, "r_acc_with_target"),
        "ASR outside": lambda cell, *_: number_text(cell, "asr_outside"),
        "cover accuracy": lambda cell, *_: number_text(cell, "cover_accuracy"),
    }
    notes = (
        "ASR with target counts the target class's own rows as successes too, as several papers' code does. Spill is the ASR "
        "on rows that the attack is not after. Cover accuracy: true labels under what cover rows carry (another image's "
        "trigger, a noisy or a partial one)."
    )
    return cell_table("Other readings", schema.cells(results), columns, notes)


def needs_table(results: Mapping[str, Any]) -> Table:
    """What each attacker has."""
    place = {"data": "in place", "training": "in each batch"}
    columns = {
        "attack": lambda attack: attack["title"],
        "needs": lambda attack: ", ".join(attack["needs"]) or "nothing else",
        "trigger": lambda attack: "trained" if attack["trigger_is_trained"] else "given",
        "victim": lambda attack: "fine-tuned" if attack["fine_tunes"] else "from scratch",
        "poisoned rows": lambda attack: "added" if attack["adds_rows"] else place[attack["threat"]],
        "paper": lambda attack: attack["paper"],
    }
    return entry_table("What each attacker has", results["attacks"], columns)


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Say in words what the numbers say."""
    found = [(cell, attack["title"], verdict_word(cell)) for cell, attack, _ in schema.cells(results)]
    found = [(cell, title, word) for cell, title, word in found if word]
    if not found:
        return Verdict("info", "No trigger was put on any image, so there is no attack success to measure.")

    def named(cells: Sequence[tuple[Mapping[str, Any], str]], name: str) -> str:
        return ", ".join(f"{title} ({mean_of(cell, name):.2f})" for cell, title in cells)

    reached = [mean_of(cell, "cda") for cell, _, _ in found]
    victims = f"from {min(reached):.3f} to {max(reached):.3f}" if len(reached) > 1 else f"{reached[0]:.3f}"
    text = f"The clean networks have CDA {np.mean(results['clean_cda']):.3f}, the victims {victims}."
    for wanted, beginning in (("partly", "Partly"), ("no", "Not")):
        if cells := [(cell, title) for cell, title, word in found if word == wanted]:
            text += f"\n\n{beginning} (mean ASR): {named(cells, 'asr')}."
    fooling = [
        (cell, title)
        for cell, title, word in found
        if mean_of(cell, "control_asr") >= ATTACK_WORKS_PARTLY or word != attack_word(mean_of(cell, "asr"))
    ]
    if fooling:
        text += "\n\nThese triggers fool a clean network, too, so their success is not all due to a backdoor: "
        text += f"{named(fooling, 'control_asr')}."
    working = [word for _, _, word in found].count("yes")
    level = "attacked" if working == len(found) else "warning"
    if len(found) == 1:
        ((cell, title, word),) = found
        said = {"yes": "works", "partly": "works partly", "no": "does not work"}[word]
        return Verdict(level, f"{title} {said} here: mean ASR {mean_of(cell, 'asr'):.3f}.", text)
    return Verdict(level, f"{working} of {len(found)} triggers work.", text)


def page(folder: RunFolder, results: Mapping[str, Any], trials: Sequence[Sequence[Trial]], data: TrainTest) -> Report:
    """The report, without what every run has. Its figures are drawn into the folder.

    Args:
        folder: the open run.
        results: of `summarise`.
        trials: what they were made of.
        data: what was trained and tested on.
    """
    figures, pictures = [], gallery(trials, data)
    for number, (images, names) in enumerate(pictures, 1):
        name = "gallery.png" if len(pictures) == 1 else f"gallery-{number}.png"
        path = plots.save(plots.image_grid(images, names, COLUMNS, ""), folder.file(name))
        caption = (
            "First seed. Left: a training row before and after poisoning, and ten times their difference (blank where the "
            "attacker poisons inside the training, and before rows that are added). Right: "
            "a test row without and with the trigger as it is tested on the victim."
        )
        alt = f"Clean, poisoned and triggered images of {', '.join(dict.fromkeys(names))}."
        figures.append(Figure(path, caption, alt))
    titles = [attack["title"] for attack in results["attacks"]]
    bars = {"ASR": "asr", "the clean net's ASR": "control_asr", "CDA": "cda"}
    values, errors = (
        {title: [cell["summary"][name][what] for cell in results["cells"]] for title, name in bars.items()}
        for what in ("mean", "standard_deviation")
    )
    success = Figure(
        plots.save(plots.bars(titles, values, errors), folder.file("success.png")),
        "What each attack reaches on the victims and on a clean network. Bars of error: standard deviation over seeds.",
        "Attack success rates as bars, of victims and of clean networks, and clean accuracy.",
    )
    return Report(
        title=f"{'Attacks' if len(titles) > 1 else titles[0]} on {data.train.name}",
        verdict=verdict(results),
        key_numbers=_key_numbers(results),
        sections=(
            Section("Results", "", (main_table(results, data.train.name), detail_table(results)), (success,)),
            Section("Gallery", "", (), tuple(figures)),
            Section("What each attacker has", "", (needs_table(results),)),
        ),
        settings={attack["base"]: attack["settings"] for attack in results["attacks"]},
    )


def _key_numbers(results: Mapping[str, Any]) -> dict[str, str]:
    if len(results["cells"]) > 1:
        asr, cda = [mean_of(cell, "asr") for cell in results["cells"]], np.mean(results["clean_cda"])
        return {"triggers": str(len(asr)), "median ASR": f"{np.median(asr):.3f}", "clean CDA": f"{cda:.3f}"}
    names = {"ASR": "asr", "CDA": "cda", "clean CDA": "clean_cda", "R-ACC": "r_acc"}
    return {title: number_text(results["cells"][0], name) for title, name in names.items()}
