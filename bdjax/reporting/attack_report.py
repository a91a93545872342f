"""An attack run as something to look at: the gallery, the verdict in words, the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.victims import Trial
from bdjax.inspection.trigger_pictures import magnified_difference
from bdjax.reporting import attack_results as numbers
from bdjax.reporting import plots, report, tables
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.types import Dataset, TrainTest

COLUMNS = ("training row", "poisoned", "difference × 10", "test row", "triggered", "difference × 10")
ROWS_PER_PICTURE = 12
IMAGES_OF_ONE = 6
"""How many rows of images the gallery of a single attack has."""


def gallery(tested: Sequence[Sequence[Trial]], data: TrainTest) -> list[tuple[list[list[np.ndarray]], list[str]]]:
    """Rows of images for each attack, of the first seed: what the victim trained on, and what it is tried with.

    Args:
        tested: for each plan, all seeds of its first part, then of the next.
        data: the clean images.

    Returns:
        Pictures of at most `ROWS_PER_PICTURE` rows each: (images [rows, 6, H, W, C] in [0, 1], names of the rows).
    """
    ones = [one for plan in tested for one in plan if one.victim.prepared.seed == 0]
    each = IMAGES_OF_ONE if len(ones) == 1 else 1
    blank = np.ones((*data.train.image_shape[:2], 1), np.float32)
    rows, names = [], []
    for one in ones:
        shown = zip(_poisoned_pairs(one, data.train, each), _test_pairs(one, data.test, each), strict=True)
        for pair in shown:
            images = []
            for before, after in pair:
                difference = None
                if before is not None:
                    difference = np.asarray(magnified_difference(jnp.asarray(before), jnp.asarray(after)))
                images += [blank if image is None else image for image in (before, after, difference)]
            rows.append(images)
            names.append(_row_name(one))
    blocks = range(0, len(rows), ROWS_PER_PICTURE)
    return [(rows[i : i + ROWS_PER_PICTURE], names[i : i + ROWS_PER_PICTURE]) for i in blocks]


def _row_name(one: Trial) -> str:
    plan = one.victim.prepared.plan
    return one.part.attack.title + ("" if len(plan.parts) == 1 else f"\n(in {plan.title})")


def _poisoned_pairs(one: Trial, train: Dataset, count: int) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Training rows before and after; None where there is no such row."""
    prepared = one.victim.prepared
    if prepared.poisoned is None:
        return [(None, None)] * count
    rows = np.resize(prepared.poisoned_by[prepared.plan.parts.index(one.part)], count)
    after = [_as_float(image) for image in prepared.poisoned.images[rows]]
    if one.part.attack.adds_rows:
        return [(None, image) for image in after]
    return [(_as_float(train.images[row]), image) for row, image in zip(rows, after, strict=True)]


def _test_pairs(one: Trial, test: Dataset, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = np.flatnonzero(one.part.rule.victims(test.labels))
    changed = rows[np.any(one.triggered[rows] != test.images[rows], axis=(1, 2, 3))]
    rows = np.resize(changed if len(changed) else rows, count)
    return [(_as_float(test.images[row]), _as_float(one.triggered[row])) for row in rows]


def _as_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Say in words what the numbers say."""
    attacks = [attack for attack in results["attacks"] if numbers.verdict_word(attack) is not None]
    if not attacks:
        return Verdict("info", "No trigger was put on any image, so there is no attack success to measure.")
    words = {word: [a for a in attacks if numbers.verdict_word(a) == word] for word in ("yes", "partly", "no")}
    working = len(words["yes"])
    clean = float(np.mean(results["clean_cda"]))
    reached = [attack["summary"]["cda"]["mean"] for attack in attacks]
    victims = f"from {min(reached):.3f} to {max(reached):.3f}" if len(reached) > 1 else f"{reached[0]:.3f}"
    text = f"The clean networks have CDA {clean:.3f}, the victims {victims}."
    for word, title in (("partly", "Partly"), ("no", "Not")):
        if words[word]:
            named = ", ".join(f"{a['title']} ({a['summary']['asr']['mean']:.2f})" for a in words[word])
            text += f"\n\n{title} (mean ASR): {named}."
    adversarial = [a for a in attacks if a["summary"]["clean_asr"]["mean"] >= numbers.WORKS_PARTLY]
    if adversarial:
        named = ", ".join(f"{a['title']} ({a['summary']['clean_asr']['mean']:.2f})" for a in adversarial)
        text += f"\n\nThese triggers fool a clean network, too, so their success is not all due to a backdoor: {named}."
    if len(attacks) == 1:
        asr = attacks[0]["summary"]["asr"]["mean"]
        said = {"yes": "works", "partly": "works partly", "no": "does not work"}[numbers.verdict_word(attacks[0])]
        level = "attacked" if asr >= numbers.WORKS else "warning"
        return Verdict(level, f"{attacks[0]['title']} {said} here: mean ASR {asr:.3f}.", text)
    level = "attacked" if working == len(attacks) else "warning"
    return Verdict(level, f"{working} of {len(attacks)} triggers reach a mean ASR of {numbers.WORKS:g}.", text)


def write(
    folder: RunFolder,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    tested: Sequence[Sequence[Trial]],
    timings: Mapping[str, float],
    data: TrainTest,
    reproduce: str,
) -> None:
    """Write table.md, the gallery, timings.json and report.html.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        results: of `attack_results.summarise`.
        tested: what they were made of.
        timings: seconds for each stage.
        data: what was trained and tested on.
        reproduce: the command.
    """
    table = numbers.attack_table(results, data.train.name)
    others = (numbers.detail_table(results), numbers.needs_table(results))
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, (table, *others))) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})
    figures = []
    pictures = gallery(tested, data)
    for number, (images, names) in enumerate(pictures):
        figure = plots.image_grid(images, names, COLUMNS, "")
        name = "gallery.png" if len(pictures) == 1 else f"gallery-{number + 1}.png"
        caption = (
            "First seed. Left: a training row before and after poisoning, and ten times their difference (blank where the "
            "attacker poisons inside the training, and before rows that are added). Right: "
            "a test row without and with the trigger as it is tried on the victim."
        )
        alt = f"Clean, poisoned and triggered images of {', '.join(dict.fromkeys(names))}."
        figures.append(Figure(plots.save(figure, folder.file(name)), caption, alt))
    bars = plots.save(_bars(results), folder.file("success.png"))
    caption = (
        "What each attack reaches on the victims and on a clean network. Bars of error: standard deviation over seeds."
    )
    success = Figure(
        bars, caption, "Attack success rates as bars, of victims and of clean networks, and clean accuracy."
    )
    page = report.Report(
        title=f"Attacks on {data.train.name}"
        if len(results["attacks"]) > 1
        else f"{results['attacks'][0]['title']} on {data.train.name}",
        verdict=verdict(results),
        key_numbers=_key_numbers(results),
        sections=(
            Section("Results", "", (table, others[0]), (success,)),
            Section("Gallery", "", (), tuple(figures)),
            Section("What each attacker has", "", (others[1],)),
        ),
        settings={**settings, **numbers.settings_table(tested)},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"training data": data.train.source, "test data": data.test.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))


def _bars(results: Mapping[str, Any]):
    attacks = results["attacks"]
    series = {"ASR": "asr", "the clean net's ASR": "clean_asr", "CDA": "cda"}

    def of(what: str) -> dict[str, list[float | None]]:
        return {title: [attack["summary"][name][what] for attack in attacks] for title, name in series.items()}

    return plots.bars([attack["title"] for attack in attacks], of("mean"), of("standard_deviation"))


def _key_numbers(results: Mapping[str, Any]) -> dict[str, str]:
    if len(results["attacks"]) > 1:
        asr = [attack["summary"]["asr"]["mean"] for attack in results["attacks"]]
        return {
            "triggers": str(len(asr)),
            "median ASR": f"{np.median(asr):.3f}",
            "clean CDA": f"{np.mean(results['clean_cda']):.3f}",
        }
    (attack,) = results["attacks"]
    return {
        title: tables.mean_and_spread([row[name] for row in attack["by_seed"]])
        for title, name in (("ASR", "asr"), ("CDA", "cda"), ("clean CDA", "clean_cda"), ("R-ACC", "r_acc"))
    }
