"""Sections for single experiments, made from the measurements of `bdjax.inspection`: LfD's loss gap, Grad-CAM of ABM's
verification networks, and RobustKD's feature variances."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter, NullFormatter

from bdjax.inspection.feature_variance import (
    CLAIMED_RATIO,
    Variances,
    compare,
    describe,
    describe_triggered,
    last_place,
)
from bdjax.inspection.loss_gap import COUNTED_EPOCH, LossGap
from bdjax.inspection.verification import VIEWS, VerificationHeat
from bdjax.reporting import plots
from bdjax.reporting.plots import COLOURS, MARKERS, draw_title, house_style
from bdjax.reporting.report import Figure, Section
from bdjax.reporting.sections import entry_table
from bdjax.reporting.tables import Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.run.text import printable
from bdjax.types import Dataset

VERIFICATION_FILE, VARIANCE_FILE, VARIANCE_NUMBERS = "verification.png", "feature-variance.png", "feature_variance.json"
_FAINT = "#e6e8eb"
_WIDE = 20.0
"""An axis is logarithmic if its largest value is more than this many times the smallest."""


def loss_gap(folder: RunFolder, gaps: Sequence[tuple[str, Sequence[LossGap]]]) -> tuple[Section, ...]:
    """LfD's claim as figures and a table.

    Args:
        folder: of the run; a figure for each attack is written into it.
        gaps: from `inspection.loss_gap.loss_gaps`.

    Returns:
        One section; none if nothing was measured.
    """
    if not gaps:
        return ()
    figures, rows = [], []
    for number, (attack, networks) in enumerate(gaps, 1):
        panels = {f"{gap.network}, {gap.parameters:,} parameters": gap.by_epoch for gap in networks}
        curves = plots.training_curves(panels, f"Training loss: {attack}", log_scale=True)
        path = plots.save(curves, folder.file(f"loss-gap-{number}.png"))
        caption = f"{attack}: mean training loss of clean and of poisoned rows; the band"
        caption += " is from the lowest to the highest seed."
        figures.append(Figure(path, caption, caption))
        for gap in networks:
            numbers = (gap.parameters, mean_and_spread(gap.missed, 1), gap.num_poisoned, mean_and_spread(gap.aucs))
            rows.append((attack, gap.network, *numbers))
    header = (
        "attack",
        "network",
        "parameters",
        "poisoned rows above the clean mean",
        "poisoned rows",
        "AUC of minus the loss",
    )
    notes = (
        f"In epoch {COUNTED_EPOCH}, measured during training, without augmentation. Poisoned rows above the clean mean: those "
        "that a threshold at the clean rows' mean loss would miss (the paper's figure 2). AUC: the chance that a poisoned "
        "row's loss is below a clean row's."
    )
    text = "LfD's claim: the lower a network's capacity, the larger the gap between its losses on clean and on poisoned rows."
    table = Table("Losses of clean and poisoned rows", header, tuple(rows), notes)
    return (Section("The loss gap", text, (table,), tuple(figures)),)


def verification(
    folder: RunFolder, found: Sequence[tuple[str, VerificationHeat]], data: Dataset
) -> tuple[Section, ...]:
    """ABM's figure 11: Grad-CAM of the verification networks.

    Args:
        folder: of the run; the figure is written into it.
        found: each attack's title, with the result of `inspection.verification.verification_heat` for one of its training sets.
        data: the training set; its number of classes is also the number of the defender's class.

    Returns:
        One section; none if nothing was measured.
    """
    if not found:
        return ()
    names = [attack for attack, heat in found for _ in heat.images]
    predicted = [
        ["the defender's class" if label == data.num_classes else f"class {data.class_title(label)}" for label in row]
        for _, heat in found
        for row in heat.classes
    ]
    images, maps = (np.concatenate([getattr(heat, name) for _, heat in found]) for name in ("images", "heat_maps"))
    picture = plots.overlay_grid(images, maps, names, VIEWS, "Evidence for the predicted class", captions=predicted)
    caption = (
        "Grad-CAM of the verification network for its predicted class, which is printed below (the paper's figure 11). NBAB "
        "works if, with both triggers on the image, the attacker's trigger decides the prediction."
    )
    figure = Figure(plots.save(picture, folder.file(VERIFICATION_FILE)), caption, caption)
    return (Section("Grad-CAM of the verification network", "", (), (figure,)),)


def feature_variance(folder: RunFolder, measured: Sequence[Variances]) -> tuple[Section, ...]:
    """The feature variances in words, as tables, and drawn as in RobustKD's figure 2.

    Args:
        folder: of the run; the figure is written into it, and the numbers to `VARIANCE_NUMBERS`: the comparison at
            `last_place`, with the comparisons at other places under "places".
        measured: all networks on the same clean images, at least one of them of the kind "clean".

    Returns:
        One section, or none if there is no attacked network with a clean one of its seed.
    """
    place = last_place(measured[0].clean)
    by_place = {name: compare(measured, name) for name in measured[0].clean}
    comparison = by_place[place]
    other_places = {name: numbers for name, numbers in by_place.items() if name != place}
    folder.write_json(VARIANCE_NUMBERS, comparison | {"places": other_places})
    if not comparison["networks"]:
        return ()
    path = plots.save(variance_figure(measured, comparison), folder.file(VARIANCE_FILE))
    caption = (
        f"Left: the feature variance ({place}) of each of {comparison['images']} clean images, the mean over seeds for each "
        "kind of network; images in the order of the clean networks' variance. This is the paper's figure 2. Right: each "
        f"network's mean variance over that of the clean network of its seed; the paper reports at least {CLAIMED_RATIO:g} "
        "for every backdoored network."
    )
    alt = "Feature variance of each image for every kind of network, and the ratio to the clean network for every seed."
    premise = (
        "RobustKD's premise: on the same clean images, the features of a backdoored network vary more than those of a "
        "clean one."
    )
    text = "\n\n".join(part for part in (premise, describe(comparison), describe_triggered(comparison)) if part)
    tables = (kinds_table(comparison), places_table(by_place))
    return (Section("Feature variance", text, tables, (Figure(path, caption, alt),)),)


def kinds_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each kind of network in a comparison of `compare`."""
    columns = {
        "network": lambda kind: kind["kind"],
        "seeds": lambda kind: len(kind["seeds"]),
        "variance": lambda kind: mean_and_spread(kind["mean_variance"]),
        "over clean": lambda kind: mean_and_spread(kind["ratio"], 2),
        "larger": lambda kind: f"{sum(ratio > 1 for ratio in kind['ratio'])} of {len(kind['ratio'])}",
        "triggered over clean images": lambda kind: mean_and_spread(kind["triggered_ratio"], 2),
        "clean network's": lambda kind: mean_and_spread(kind["reference_triggered_ratio"], 2),
    }
    left_out = f" Left out, because they or their clean network diverged: {comparison['left_out']}."
    notes = (
        f"Variance: of each image's features over all their elements ({comparison['place']}), the mean over "
        f"{comparison['images']} clean images. Over clean: divided by that of the clean network of the same seed. Triggered "
        "over clean images: the variance on triggered images divided by that on the same images without the trigger, in the "
        "network itself and in the clean network."
    )
    notes += left_out if comparison["left_out"] else ""
    return entry_table("Feature variance", comparison["kinds"], columns, notes)


def places_table(by_place: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each place in the network, with its comparison: whether the claim holds elsewhere, too."""
    columns = {
        "place": lambda numbers: numbers["place"],
        "mean ratio": lambda numbers: mean_and_spread([numbers["mean_ratio"]], 2),
        "larger": lambda numbers: f"{numbers['larger']} of {numbers['networks']}",
        f"at least {CLAIMED_RATIO:g}": lambda numbers: f"{numbers['as_claimed']} of {numbers['networks']}",
        "AUC of networks": lambda numbers: numbers["auc_networks"],
        "AUC of images": lambda numbers: numbers["auc_images"],
        "p": lambda numbers: None if numbers["p_larger"] is None else f"{numbers['p_larger']:.2g}",
    }
    notes = (
        "Ratio: of an attacked network's mean variance to that of the clean network of its seed. AUC: the chance that an "
        "attacked network's mean variance is above that of a network without an attack, and the same for single images. p: "
        "exact, one-sided, over seeds, not corrected for testing several places. Before ReLU: after the normalisation, where "
        "feature distillation compares teacher and student."
    )
    return entry_table("Feature variance at other places in the network", by_place.values(), columns, notes)


@house_style
def variance_figure(measured: Sequence[Variances], comparison: Mapping[str, Any], title: str = "") -> Plot:
    """Draw each image's variance for every kind of network, and every network's ratio to the clean one.

    Args:
        measured: all networks.
        comparison: from `compare` on them; its place is drawn, without the networks that it left out.
        title: of the figure.
    """
    place, reference, kinds = comparison["place"], comparison["reference"], comparison["kinds"]
    usable = {(kind["kind"], seed) for kind in kinds for seed in kind["seeds"]}
    drawn = [network for network in measured if (network.kind, network.seed) in usable]
    means = {
        kind["kind"]: np.mean([network.clean[place] for network in drawn if network.kind == kind["kind"]], axis=0)
        for kind in kinds
    }
    order = np.argsort(means[reference], kind="stable")
    figure = Plot(figsize=(9.2, 3.9), layout="constrained")
    images, ratios = figure.subplots(1, 2, width_ratios=(1.5, 1))
    styles = [
        {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linewidths": 0}
        for number in range(len(kinds))
    ]
    for style, (name, values) in zip(styles, means.items(), strict=True):
        images.scatter(np.arange(1, len(order) + 1), values[order], s=13, label=printable(name), **style)
    images.set(xlabel="image, by the clean networks' variance", ylabel="feature variance")
    compared = [(style, kind) for style, kind in zip(styles, kinds, strict=True) if kind["kind"] != reference]
    for position, (style, kind) in enumerate(compared):
        seeds = len(kind["ratio"])
        across = position + (np.linspace(-0.18, 0.18, seeds) if seeds > 1 else np.zeros(1))
        ratios.scatter(across, kind["ratio"], s=26, **style)
    ratios.axhline(1.0, color="#57606a", linewidth=0.9)
    ratios.axhline(CLAIMED_RATIO, color="#57606a", linewidth=0.9, linestyle="--")
    ratios.set_xticks(range(len(compared)), [printable(kind["kind"]) for _, kind in compared], rotation=30, ha="right")
    ratios.set(ylabel="mean variance over the clean network's", xlim=(-0.5, max(len(compared) - 0.5, 0.5)))
    shown = np.concatenate(list(means.values())), np.array([ratio for _, kind in compared for ratio in kind["ratio"]])
    for axes, values in zip((images, ratios), shown, strict=True):
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        if len(values) and values.min() > 0 and values.max() > _WIDE * values.min():
            axes.set_yscale("log")
            # Maths parsing is off (names may contain $), and matplotlib writes powers of ten as formulas.
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*images.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(means), 5))
    draw_title(figure, title)
    return figure
