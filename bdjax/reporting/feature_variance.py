"""Feature variances of backdoored and of clean networks as a section of a report: RobustKD's figure 2, and the answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter, NullFormatter

from bdjax.datasets.splits import sample_rows
from bdjax.evaluation.measure import TriggeredViews
from bdjax.evaluation.suspects import Suspect
from bdjax.inspection.feature_variance import (
    CLAIMED_RATIO,
    Measured,
    answer,
    answer_triggered,
    compare,
    last_place,
    measure_suspects,
)
from bdjax.reporting import plots
from bdjax.reporting.plots import COLOURS, MARKERS, draw_title, house_style
from bdjax.reporting.report import Figure, Section
from bdjax.reporting.tables import Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.run.text import printable
from bdjax.training.ensemble import members, num_members
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, Key, PyTree

FILE = "feature-variance.png"
NUMBERS = "feature_variance.json"
TRAINED_ON = "clean, trained on"
NUM_IMAGES = 100
"""How many images are looked at, as in the paper."""
_FAINT = "#e6e8eb"
_WIDE = 20.0
"""The largest over the smallest value from which on an axis is logarithmic."""


def of_suspects(
    key: Key,
    folder: RunFolder,
    runner: StageRunner,
    suspects: Sequence[Suspect],
    variables: PyTree,
    clean: Nets,
    fine_tuning: TrainConfig,
    train: Dataset,
    views: TriggeredViews,
    batch_size: int,
) -> tuple[Section, ...]:
    """Measure suspect networks beside the clean one of each seed, and beside that trained on for as long as some attackers do.

    The numbers are written to `NUMBERS` in the folder of the run.

    Args:
        key: draws the images that are looked at, and the order of rows in that training.
        folder: of the run.
        runner: trains and evaluates.
        suspects: M of them; those without a known trigger are passed over, clean ones among them.
        variables: stacked [M, ...].
        clean: one clean network of the same architecture for each seed.
        fine_tuning: how attackers train who start from those.
        train: the clean training set.
        views: the test images under the suspects' triggers.
        batch_size: images at once.

    Returns:
        As `section`; none without a known trigger.

    Raises:
        InputError: the groups of the architecture are not known.
    """
    which = [number for number, own in enumerate(views.triggered) if own]
    if not which:
        return ()
    rows_key, train_key = jax.random.split(key)
    count = num_members(clean.variables)
    rows = np.tile(np.arange(len(train), dtype=np.int32), (count, 1))
    all_rows = Rows(jnp.asarray(rows), {"labels": jnp.asarray(train.labels[rows])})
    pool, keys = jnp.asarray(train.images), jax.random.split(train_key, count)
    trained_on = runner.from_variables(TRAINED_ON, clean.model, fine_tuning, clean.variables, keys, 1, pool, all_rows)
    looked_at = sample_rows(rows_key, len(views.test), min(1.0, NUM_IMAGES / len(views.test)))
    measured = measure_suspects(
        runner,
        clean.model,
        [(suspects[number].attack.title, suspects[number].seed) for number in which],
        members(variables, np.array(which)),
        views.test.images[looked_at],
        np.stack([views.triggered[number][0][looked_at] for number in which]),
        {"clean": clean.variables, TRAINED_ON: trained_on.variables},
        batch_size,
    )
    sections, numbers = section(folder, measured)
    folder.write_json(NUMBERS, numbers)
    return sections


def section(
    folder: RunFolder, measured: Sequence[Measured], *, reference: str = "clean"
) -> tuple[tuple[Section, ...], dict[str, Any]]:
    """What the variances say, in words, as a table, and drawn as in the paper.

    Args:
        folder: of the run; the figure is written into it.
        measured: all networks on the same clean images, at least one of them a clean reference.
        reference: the kind of the clean networks that others are set against.

    Returns:
        One section, or none if there is no attacked network with a clean one of its seed; and for results.json the
        comparison at `last_place`, with those of the other places under "places".
    """
    place = last_place(measured[0].clean)
    by_place = {each: compare(measured, each, reference=reference) for each in measured[0].clean}
    comparison = by_place[place]
    results = comparison | {"places": {each: one for each, one in by_place.items() if each != place}}
    if not comparison["networks"]:
        return (), results
    path = plots.save(variance_figure(measured, comparison), folder.path / FILE)
    caption = (
        f"Left: the feature variance ({place}) of each of {comparison['images']} clean images, the mean over seeds for each "
        "kind of network; images in the order of the clean networks' variance. This is the paper's figure 2. Right: each "
        f"network's mean variance over that of the clean network of its seed; the paper reports {CLAIMED_RATIO:g} and more "
        "of every backdoored network."
    )
    alt = "Feature variance of each image for every kind of network, and the ratio to the clean network for every seed."
    text = "\n\n".join(
        part
        for part in (
            "RobustKD's premise: on the same clean images, the features of a backdoored network vary more than those of a "
            "clean one.",
            answer(comparison),
            answer_triggered(comparison),
        )
        if part
    )
    tables = (kinds_table(comparison), places_table(by_place))
    return (Section("Feature variance", text, tables, (Figure(path, caption, alt),)),), results


def kinds_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each kind of network.

    Args:
        comparison: of `compare`.
    """
    rows = [
        (
            kind["kind"],
            len(kind["seeds"]),
            mean_and_spread(kind["mean_variance"]),
            mean_and_spread(kind["ratio"], 2),
            f"{sum(ratio > 1 for ratio in kind['ratio'])} of {len(kind['ratio'])}",
            mean_and_spread(kind["triggered_ratio"], 2),
            mean_and_spread(kind["reference_triggered_ratio"], 2),
        )
        for kind in comparison["kinds"]
    ]
    header = ("network", "seeds", "variance", "over clean", "larger", "triggered over clean images", "clean network's")
    left_out = f" Left out, because they or their clean network diverged: {comparison['left_out']}."
    notes = (
        f"Variance: of each image's features over all their elements ({comparison['place']}), the mean over "
        f"{comparison['images']} clean images. Over clean: divided by that of the clean network of the same seed. Triggered "
        "over clean images: the variance on triggered images divided by that on the same images without, in the network "
        "itself and in the clean one."
    )
    return Table("Feature variance", header, tuple(rows), notes + (left_out if comparison["left_out"] else ""))


def places_table(by_place: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each place in the network: whether the claim holds elsewhere than where it was looked at first.

    Args:
        by_place: place -> comparison of `compare`.
    """
    rows = [
        (
            place,
            mean_and_spread([one["mean_ratio"]], 2),
            f"{one['larger']} of {one['networks']}",
            f"{one['as_claimed']} of {one['networks']}",
            one["auc_networks"],
            one["auc_images"],
            None if one["p_larger"] is None else f"{one['p_larger']:.2g}",
        )
        for place, one in by_place.items()
    ]
    header = ("place", "mean ratio", "larger", f"at least {CLAIMED_RATIO:g}", "AUC of networks", "AUC of images", "p")
    notes = (
        "Ratio: of an attacked network's mean variance to that of the clean one of its seed. AUC: the chance that an "
        "attacked network's mean variance is above that of a network without an attack, and the same of single images. p: "
        "exact, one-sided, over seeds, and not corrected for looking at several places. Before ReLU: behind the normalisation, "
        "which is where students look."
    )
    return Table("The same elsewhere in the network", header, tuple(rows), notes)


@house_style
def variance_figure(measured: Sequence[Measured], comparison: Mapping[str, Any], title: str = "") -> Plot:
    """Draws each image's variance for every kind of network, and every network's ratio to the clean one.

    Args:
        measured: all networks.
        comparison: of `compare` on them; its place is drawn, and what it left out is not.
        title: what there is to see.
    """
    place, reference, kinds = comparison["place"], comparison["reference"], comparison["kinds"]
    usable = {(kind["kind"], seed) for kind in kinds for seed in kind["seeds"]}
    means = {
        kind["kind"]: np.mean(
            [one.clean[place] for one in measured if one.kind == kind["kind"] and (one.kind, one.seed) in usable],
            axis=0,
        )
        for kind in kinds
    }
    order = np.argsort(means[reference], kind="stable")
    figure = Plot(figsize=(9.2, 3.9), layout="constrained")
    images, ratios = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for number, (name, values) in enumerate(means.items()):
        how = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        images.scatter(np.arange(1, len(order) + 1), values[order], s=13, linewidths=0, label=printable(name), **how)
    images.set(xlabel="image, by the clean networks' variance", ylabel="feature variance")
    if _is_wide(np.concatenate(list(means.values()))):
        images.set_yscale("log")
    others = [(number, kind) for number, kind in enumerate(kinds) if kind["kind"] != reference]
    for position, (number, kind) in enumerate(others):
        seeds = len(kind["ratio"])
        across = position + (np.linspace(-0.18, 0.18, seeds) if seeds > 1 else np.zeros(1))
        how = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        ratios.scatter(across, kind["ratio"], s=26, linewidths=0, **how)
    if _is_wide(np.array([ratio for _, kind in others for ratio in kind["ratio"]])):
        ratios.set_yscale("log")
    ratios.axhline(1.0, color="#57606a", linewidth=0.9)
    ratios.axhline(CLAIMED_RATIO, color="#57606a", linewidth=0.9, linestyle="--")
    ratios.set_xticks(range(len(others)), [printable(kind["kind"]) for _, kind in others], rotation=30, ha="right")
    ratios.set(ylabel="mean variance over the clean network's", xlim=(-0.5, max(len(others) - 0.5, 0.5)))
    for axes in (images, ratios):
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        if axes.get_yscale() == "log":  # names are never parsed as formulas here, and powers of ten are written as such
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*images.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(means), 5))
    draw_title(figure, title)
    return figure


def _is_wide(values: np.ndarray) -> bool:
    return len(values) > 0 and values.min() > 0 and values.max() > _WIDE * values.min()
