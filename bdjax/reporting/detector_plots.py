"""The plots that a report on detectors of poisoned rows has: how well they find them, and why a row was flagged."""

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
"""Pixels that a picture of `trigger_grid` is wide, more or less."""
COLUMNS = ("true trigger", "found trigger", "its mask", "a flagged row", "where it is")
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
    """F1 of one detector against something."""

    title: str
    x: Sequence[float]
    mean: Sequence[float]
    """in percent"""
    spread: Sequence[float | None]
    """over seeds; None of a single one"""
    is_paper: bool = False
    """drawn dashed and without the spread"""


@house_style
def roc(curves: Sequence[Curve], title: str = "") -> Figure:
    """Draws what share of the poisoned rows is found at what share of false alarms.

    The horizontal axis is square-rooted: rows are many, and it is small rates that a detector can be used at.

    Args:
        curves: one for each training set, or each detector.
        title: what there is to see.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(curves):
        style = _LINES[number // len(COLOURS) % len(_LINES)]
        name = f"{printable(one.title)}: {one.auc:.3f}"
        axes.plot(one.fpr, one.tpr, color=COLOURS[number % len(COLOURS)], linestyle=style, linewidth=1.6, label=name)
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
        x_label: what x is a share of, in percent: "opacity".
        title: what there is to see.
    """
    columns = min(2, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(0.8 + 3.6 * columns, 0.9 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(values) :]:
        panel.remove()
    titles = list(dict.fromkeys(one.title for lines in values.values() for one in lines if not one.is_paper))
    drawn: dict[str, object] = {}
    for axes, (name, lines) in zip(panels, values.items(), strict=False):
        for one in lines:
            number = titles.index(one.title) if one.title in titles else len(titles)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6}
            x = 100 * np.asarray(one.x, np.float64)
            if one.is_paper:
                (line,) = axes.plot(x, one.mean, linestyle=":", marker=".", alpha=0.7, **style)
                drawn.setdefault(f"{one.title}, paper", line)
                continue
            spread = np.array([0.0 if value is None else value for value in one.spread])
            marker = MARKERS[number % len(MARKERS)]
            bars = axes.errorbar(
                x, one.mean, yerr=spread if spread.any() else None, marker=marker, markersize=4.5, capsize=2.5, **style
            )
            drawn.setdefault(one.title, bars)
        every = sorted({100 * float(x) for one in lines for x in one.x})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(every))
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


def pattern_lines(one: FoundPattern) -> tuple[str, ...]:
    """All there is to say of a pattern, in parts: what it is of, how well it works, what it has of the true one."""
    is_right = one.is_true_class is not False
    parts = [
        f"{one.attack}, target {one.label}{'' if is_right else ': a false alarm'}",
        f"success {one.success:.2f}",
    ]
    if one.overlap is not None and is_right:
        parts.append(f"IoU of masks {one.overlap:.2f}")
    return (*parts, f"network {one.network}, seed {one.seed}" if one.network else f"seed {one.seed}")


def pattern_caption(one: FoundPattern) -> str:
    """`pattern_lines` as a single line."""
    first, *others = pattern_lines(one)
    return f"{first}: {', '.join(others)}"


def trigger_grid(found: Sequence[FoundPattern], title: str = "") -> Figure:
    """Draws found triggers beside the true ones, and where they lie on a row that was flagged (figure 5 of the VBD paper).

    Args:
        found: a line for each.
        title: what there is to see.
    """
    cells = [[*_pictures(one)] for one in found]
    captions = [
        [
            "" if one.true_pattern is not None else "not known",
            "",
            f"{int(one.mask.sum()):,} pixel{'s' if one.mask.sum() != 1 else ''}",
            "" if one.example is not None else "none is flagged",
            "",
        ]
        for one in found
    ]
    names = ["\n".join(line for part in pattern_lines(one) for line in textwrap.wrap(part, 28)) for one in found]
    return image_grid(cells, names, COLUMNS, title, captions=captions)


def _pictures(one: FoundPattern) -> list[np.ndarray]:
    """The cells of a line, all enlarged alike so that a thin line is drawn as it is."""
    scale = max(1, round(SIDE / max(one.mask.shape)))
    blank = np.ones((*one.mask.shape, 3))
    true = blank if one.true_pattern is None or one.true_mask is None else on_grey(one.true_pattern, one.true_mask)
    plain = [true, on_grey(one.pattern, one.mask), blank * one.mask[..., None]]
    example = blank if one.example is None else to_rgb(one.example / 255)
    outlined = np.ones((scale * len(blank), scale * blank.shape[1], 3))
    if one.example is not None:
        outlined = outline(one.example, one.mask, scale) / 255
    return [*(enlarge(each, scale) for each in [*plain, example]), outlined]
