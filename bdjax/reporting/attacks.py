"""The report on attacks: numbers (results.json), tables with the papers' numbers, gallery, verdict and page."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bdjax.attacks.label_rules import titled
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
"""The numbers of every cell."""
COMPARED_IMAGES = 200
"""How many victim rows PSNR and SSIM are averaged over."""


def summarise(
    trials: Sequence[Sequence[Trial]],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    left_out: Mapping[str, str] = {},
    class_title: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Numbers of all attacks; a hybrid has an entry for each of its parts.

    Args:
        trials: for each plan, all seeds of its first part, then of the next.
        images: uint8 [N, H, W, C], the untouched test set.
        labels: int32 [N].
        seed: number of the first seed.
        left_out: attack -> why the dataset does not allow it.
        class_title: a class -> how reports name it.

    Returns:
        The tree of `bdjax.reporting.results`, the same for the same inputs, with the only method `NO_DEFENSE`: the victims.
        In addition "clean_cda": the CDA of each seed's clean network.
    """
    attacks, cells, clean = [], [], {}
    for plan in trials:
        clean |= {trial.victim.prepared.seed: trial.clean_model.cda for trial in plan}
        for name in dict.fromkeys(trial.part.attack.name for trial in plan):
            of_part = [trial for trial in plan if trial.part.attack.name == name]
            by_seed = [_measure(trial, images, labels, seed) for trial in of_part]
            attacks.append(_describe(of_part, labels, [row["seed"] for row in by_seed], class_title))
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
        # An image that the trigger does not change has no finite PSNR; the mean is over the others.
        "psnr": float(np.mean(psnr(before[changed], after[changed]))) if changed.any() else None,
        "ssim": float(np.mean(ssim(before, after))),
    }


def _describe(
    trials: Sequence[Trial], labels: np.ndarray, seeds: Sequence[int], class_title: Callable[[int], str]
) -> dict[str, Any]:
    """The entry of results["attacks"] for one part of a plan, over all its seeds."""
    part, plan = trials[0].part, trials[0].victim.prepared.plan
    attack, other_attacks = part.attack, [other.attack for other in plan.parts if other is not part]
    prepared = [trial.victim.prepared for trial in trials if trial.victim.prepared.poisoned is not None]
    counts = [len(training_set.poisoned_by[plan.parts.index(part)]) for training_set in prepared]
    return {
        "attack": f"{attack.name} in {plan.name}" if other_attacks else attack.name,
        "title": attack.title + "".join(f", beside {other.title}" for other in other_attacks),
        "base": attack.name,
        "with": [other.name for other in other_attacks],
        "paper": attack.paper,
        "threat": attack.threat,
        "needs": list(attack.needs),
        "trigger_is_trained": attack.trigger_is_trained,
        "label_rule": titled(part.rule.name, class_title),
        "settings": to_plain(part.settings),
        "adds_rows": attack.adds_rows,
        "fine_tunes": attack.starts_from_clean_model,
        "published": [dict(row._asdict()) for row in attack.published],
        "seeds": list(seeds),
        "num_poisoned": counts or None,  # unknown where poisoning happens inside the training
        "num_victims": int(np.sum(part.rule.victims(labels))),
    }


def verdict_word(cell: Mapping[str, Any]) -> AttackWord | None:
    """Whether an attack works; None for an attack without a trigger, whose ASR is only the classifier's confusion."""
    return None if mean_of(cell, "psnr") is None else attack_word(mean_of(cell, "asr"), mean_of(cell, "control_asr"))


def main_table(results: Mapping[str, Any], dataset: str) -> Table:
    """Every attack: what the attacker controls, and the results beside the papers' numbers for the same dataset."""
    header = ("attack", "controls", "poison", "CDA", "ASR", "R-ACC", "clean net's ASR", "PSNR", "SSIM", "works")
    clean = ("no attack", "nothing", None, mean_and_spread(results["clean_cda"]), *(None,) * 6)
    rows: list[tuple[Cell, ...]] = [clean]
    papers: list[str | None] = [None]
    for cell, attack, _ in schema.cells(results):
        settings, cover = attack["settings"], attack["settings"]["cover_rate"]
        rate = f"{100 * settings['poison_rate']:.3g} %" + (f" + {100 * cover:.3g} %" if cover else "")
        texts = *map(partial(number_text, cell), ("cda", "asr", "r_acc", "control_asr")), number_text(cell, "psnr", 1)
        rows.append((attack["title"], attack["threat"], rate, *texts, number_text(cell, "ssim"), verdict_word(cell)))
        published = [row for row in attack["published"] if row["dataset"] == dataset]
        printed = (f"{row['paper']} {row['clean_accuracy']:g} / {row['success']:g}" for row in published)
        papers.append("; ".join(printed) or None)
    notes = (
        f"{schema.mean_text(results).capitalize()}, {results['test_rows']:,} test rows. Controls: data, rows of the training "
        "set; training, the whole training, so that the model comes from the attacker. Poison: share of all training rows (in "
        "each batch, where training is controlled), + cover rows. Works: "
        f"{DEFINITIONS['works']}; the control is the clean net. PSNR in dB."
    )
    if any(papers):
        header += ("papers (CDA / ASR)",)
        rows = [(*row, text) for row, text in zip(rows, papers, strict=True)]
        notes += " The papers' numbers are in percent, each with its own network and schedule."
    return Table("Attacks", header, tuple(rows), notes + schema.left_out_text(results))


def detail_table(results: Mapping[str, Any]) -> Table:
    """Other measures of success: with the target class's rows, on rows that are not attacked, on cover rows."""
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
        "ASR with target counts the target class's own rows as successes too, as several papers' code does. ASR outside: on "
        "rows that the attack does not aim at. Cover accuracy: share of rows predicted as their true label under the triggers "
        "of cover rows (another image's trigger, a noisy or a partial one)."
    )
    return cell_table("Other measures of success", schema.cells(results), columns, notes)


def needs_table(results: Mapping[str, Any]) -> Table:
    """What each attacker has."""
    place = {"data": "in place", "training": "in each batch"}
    columns = {
        "attack": lambda attack: attack["title"],
        "needs": lambda attack: ", ".join(attack["needs"]) or "nothing else",
        "trigger": lambda attack: "trained" if attack["trigger_is_trained"] else "not trained",
        "victim": lambda attack: "fine-tuned" if attack["fine_tunes"] else "from scratch",
        "poisoned rows": lambda attack: "added" if attack["adds_rows"] else place[attack["threat"]],
        "paper": lambda attack: attack["paper"],
    }
    return entry_table("What each attacker has", results["attacks"], columns)


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Put the numbers into words."""
    found = [(cell, attack["title"], verdict_word(cell)) for cell, attack, _ in schema.cells(results)]
    found = [(cell, title, word) for cell, title, word in found if word]
    if not found:
        return Verdict("info", "No trigger was put on any image, so there is no attack success to measure.")

    def named(cells: Sequence[tuple[Mapping[str, Any], str]], name: str) -> str:
        return ", ".join(f"{title} ({mean_of(cell, name):.2f})" for cell, title in cells)

    reached = [mean_of(cell, "cda") for cell, _, _ in found]
    victims = f"from {min(reached):.3f} to {max(reached):.3f}" if len(reached) > 1 else f"{reached[0]:.3f}"
    text = f"The clean networks have CDA {np.mean(results['clean_cda']):.3f}, the victims {victims}."
    for wanted, beginning in (("partly", "Working partly"), ("no", "Not working")):
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
        verb = {"yes": "works", "partly": "works partly", "no": "does not work"}[word]
        return Verdict(level, f"{title} {verb} here: mean ASR {mean_of(cell, 'asr'):.3f}.", text)
    return Verdict(level, f"{working} of {len(found)} triggers work.", text)


def page(folder: RunFolder, results: Mapping[str, Any], trials: Sequence[Sequence[Trial]], data: TrainTest) -> Report:
    """The report page, without the parts that `report.publish` adds to every run. Figures are written into the folder.

    Args:
        folder: the open run.
        results: of `summarise`.
        trials: the trials that `results` summarises.
        data: the training and the test set.
    """
    figures, pictures = [], gallery(trials, data)
    for number, (images, names) in enumerate(pictures, 1):
        name = "gallery.png" if len(pictures) == 1 else f"gallery-{number}.png"
        path = plots.save(plots.image_grid(images, names, COLUMNS, ""), folder.file(name))
        caption = (
            "First seed. Left: a training row before and after poisoning, and ten times their difference (blank where the "
            "attacker poisons inside the training, and before rows that are added). Right: "
            "a test row without and with the trigger, as it is applied to the victim."
        )
        alt = f"Clean, poisoned and triggered images of {', '.join(dict.fromkeys(names))}."
        figures.append(Figure(path, caption, alt))
    titles = [attack["title"] for attack in results["attacks"]]
    bars = {"ASR": "asr", "the clean net's ASR": "control_asr", "CDA": "cda"}
    means, deviations = schema.means_and_deviations(results, bars)
    success = Figure(
        plots.save(plots.bars(titles, means, deviations), folder.file("success.png")),
        "ASR of each trigger on the victims and on a clean network, and CDA of the victims. Error bars: standard deviation "
        "over seeds.",
        "Bars of the attack success rates of victims and of clean networks, and of the clean accuracy.",
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
