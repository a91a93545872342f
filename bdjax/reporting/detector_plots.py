"""Plots of the report on detectors of poisoned rows: how well they find them, and why a row was flagged."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bdjax.evaluation.patterns import FoundPattern
from bdjax.inspection.extracted_triggers import enlarge, on_grey, outline, to_rgb
from bdjax.reporting.plots import COLOURS, MARKERS, draw_title, house_style, image_grid
from bdjax.run.text import printable

SIDE = 160
"""Approximate width in pixels of a picture in `trigger_grid`."""
COLUMNS = ("true trigger", "found trigger", "found mask", "a flagged row", "mask on the row")
_FAINT = "#e6e8eb"
_LINES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """One receiver operating characteristic."""

    title: str
    fpr: np.ndarray
    """float [k]: share of the clean rows above each threshold"""
    tpr: np.ndarray
    """float [k]: share of the poisoned rows"""
    auc: float


class Line(NamedTuple):
    """F1 of a detector as a function of x."""

    title: str
    x: Sequence[float]
    mean: Sequence[float]
    """in percent"""
    spread: Sequence[float | None]
    """standard deviation over seeds; None for a single seed"""
    is_paper: bool = False
    """drawn dashed and without the spread"""


@house_style
def roc(curves: Sequence[Curve], title: str = "") -> Figure:
    """Draws ROC curves: the share of poisoned rows found against the share of clean rows flagged.

    The horizontal axis has a square-root scale, since a detector is useful only at small rates of false alarms.

    Args:
        curves: a curve for each training set or each detector.
        title: of the figure.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        style = _LINES[number // len(COLOURS) % len(_LINES)]
        name = f"{printable(curve.title)}: {curve.auc:.3f}"
        axes.plot(
            curve.fpr, curve.tpr, color=COLOURS[number % len(COLOURS)], linestyle=style, linewidth=1.6, label=name
        )
    chance = np.linspace(0, 1, 101)
    axes.plot(chance, chance, color="#8c959f", linewidth=0.8, linestyle=":")
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set(xlabel="share of clean rows flagged", ylabel="share of poisoned rows flagged")
    axes.set(xlim=(0, 1), ylim=(-0.01, 1.02), xticks=(0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    if curves:
        figure.legend(loc="outside right upper", title="AUC", fontsize=8)
    draw_title(figure, title)
    return figure


@house_style
def f1_by(values: Mapping[str, Sequence[Line]], x_label: str, title: str = "") -> Figure:
    """Draws F1 against a rate on a logarithmic axis, such as the opacity or the poisoning rate, with bars for the spread.

    Args:
        values: for each panel its lines, x in 0..1 above 0 and F1 in percent. Equal titles have equal colours.
        x_label: label of x, which is drawn in percent: "opacity".
        title: of the figure.
    """
    columns = min(2, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(0.8 + 3.6 * columns, 0.9 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(values) :]:
        panel.remove()
    titles = list(dict.fromkeys(line.title for lines in values.values() for line in lines if not line.is_paper))
    drawn: dict[str, object] = {}
    for axes, (name, lines) in zip(panels, values.items(), strict=False):
        for line in lines:
            number = titles.index(line.title) if line.title in titles else len(titles)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6}
            x = 100 * np.asarray(line.x, np.float64)
            if line.is_paper:
                (artist,) = axes.plot(x, line.mean, linestyle=":", marker=".", alpha=0.7, **style)
                drawn.setdefault(f"{line.title}, paper", artist)
                continue
            spread = np.array([0.0 if value is None else value for value in line.spread])
            marker = MARKERS[number % len(MARKERS)]
            bars = axes.errorbar(
                x, line.mean, yerr=spread if spread.any() else None, marker=marker, markersize=4.5, capsize=2.5, **style
            )
            drawn.setdefault(line.title, bars)
        ticks = sorted({100 * float(x) for line in lines for x in line.x})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(printable(name))
        axes.set(xlabel=f"{x_label} (%)", ylim=(-3, 105))
        axes.grid(color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in panels[: len(values) : columns]:
        axes.set_ylabel("F1 (%)")
    names = [printable(name) for name in drawn]
    figure.legend(drawn.values(), names, loc="outside lower center", ncols=min(4, len(names)))
    draw_title(figure, title)
    return figure


def pattern_lines(pattern: FoundPattern) -> tuple[str, ...]:
    """The description of a pattern, in parts: attack and class, success, overlap with the true trigger, network and seed."""
    is_right = pattern.is_true_class is not False
    parts = [
        f"{pattern.attack}, target {pattern.class_title or pattern.label}{'' if is_right else ': a false alarm'}",
        f"success {pattern.success:.2f}",
    ]
    if pattern.overlap is not None and is_right:
        parts.append(f"IoU of masks {pattern.overlap:.2f}")
    return (*parts, f"network {pattern.network}, seed {pattern.seed}" if pattern.network else f"seed {pattern.seed}")


def pattern_caption(pattern: FoundPattern) -> str:
    """`pattern_lines` as a single line."""
    first, *rest = pattern_lines(pattern)
    return f"{first}: {', '.join(rest)}"


def trigger_grid(found: Sequence[FoundPattern], title: str = "") -> Figure:
    """Draws found triggers beside the true ones, and where they lie on a row that was flagged (figure 5 of the VBD paper).

    Args:
        found: the triggers, a line for each.
        title: of the figure.
    """
    cells = [[*_pictures(pattern)] for pattern in found]
    captions = [
        [
            "" if pattern.true_pattern is not None else "not known",
            "",
            f"{int(pattern.mask.sum()):,} pixel{'s' if pattern.mask.sum() != 1 else ''}",
            "" if pattern.example is not None else "none is flagged",
            "",
        ]
        for pattern in found
    ]
    names = [
        "\n".join(line for part in pattern_lines(pattern) for line in textwrap.wrap(part, 28)) for pattern in found
    ]
    return image_grid(cells, names, COLUMNS, title, captions=captions)


def _pictures(pattern: FoundPattern) -> list[np.ndarray]:
    """The cells of a line, all enlarged by the same whole factor so that thin lines stay sharp."""
    scale = max(1, round(SIDE / max(pattern.mask.shape)))
    blank = np.ones((*pattern.mask.shape, 3))
    true = (
        blank
        if pattern.true_pattern is None or pattern.true_mask is None
        else on_grey(pattern.true_pattern, pattern.true_mask)
    )
    plain = [true, on_grey(pattern.pattern, pattern.mask), blank * pattern.mask[..., None]]
    example = blank if pattern.example is None else to_rgb(pattern.example / 255)
    outlined = np.ones((scale * len(blank), scale * blank.shape[1], 3))
    if pattern.example is not None:
        outlined = outline(pattern.example, pattern.mask, scale) / 255
    return [*(enlarge(image, scale) for image in [*plain, example]), outlined]
