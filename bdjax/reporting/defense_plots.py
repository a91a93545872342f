"""The plots that a report on defenses has beside those of every report: each a function from arrays to a figure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bdjax.reporting.plots import COLOURS, draw_title, house_style
from bdjax.run.text import printable

MARKERS = "osD^vPX<>ph"
_FAINT = "#e6e8eb"


@house_style
def trade_off(
    defenses: Sequence[str],
    clean_accuracy: np.ndarray,  # [D, A] in 0..1, NaN where unknown
    success: np.ndarray,  # likewise
    title: str = "",
) -> Figure:
    """Draws what each defense leaves of the attacks against what it leaves of the accuracy: best is top left.

    A small mark is one attack; the large one is their mean over the attacks that all defenses have.

    Args:
        defenses: their names.
        clean_accuracy: CDA of each defense for each attack.
        success: ASR.
        title: what there is to see.
    """
    known = np.isfinite(clean_accuracy) & np.isfinite(success)
    common = known.all(axis=0)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(defenses):
        how = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        own = known[number]
        axes.scatter(success[number, own], clean_accuracy[number, own], s=16, alpha=0.4, linewidths=0, **how)
        if common.any():
            mean = success[number, common].mean(), clean_accuracy[number, common].mean()
            axes.scatter(*mean, s=90, edgecolors="white", linewidths=0.8, label=printable(name), zorder=3, **how)
    values = clean_accuracy[known] if known.any() else np.array([1.0])
    # At least so much of the axis that differences of a point or two look as small as they are.
    low, high = min(values.min(), values.max() - 0.2) - 0.02, values.max() + 0.02
    axes.set(xlabel="ASR (lower is better)", ylabel="CDA (higher is better)", xlim=(-0.03, 1.03), ylim=(low, high))
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    if common.any():
        figure.legend(loc="outside right upper", title="mean of attacks")
    draw_title(figure, title)
    return figure


class Scores(NamedTuple):
    """One panel of `score_histograms`."""

    name: str
    scores: np.ndarray  # float [n]
    is_poisoned: np.ndarray | None  # bool [n]; None if nobody knows


@house_style
def score_histograms(panels: Sequence[Scores], title: str = "", *, bins: int = 40) -> Figure:
    """Draws how the scores of clean and of poisoned rows are spread, a panel for each training set.

    Heights are shares of the clean and of the poisoned rows, so that a few poisoned rows can be seen beside many clean
    ones. Scores beyond the outer 0.5 % of either group are counted in the outermost bins.

    Args:
        panels: one for each training set.
        title: what there is to see.
        bins: how many.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(0.6 + 3.3 * columns, 0.7 + 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    drawn: dict[str, object] = {}
    for axes, panel in zip(grid, panels, strict=False):
        scores = np.asarray(panel.scores, np.float64)
        if panel.is_poisoned is None:
            groups = {"rows": (scores, "#57606a")}
        else:
            groups = {
                "clean": (scores[~panel.is_poisoned], COLOURS[0]),
                "poisoned": (scores[panel.is_poisoned], COLOURS[1]),
            }
        groups = {name: group for name, group in groups.items() if len(group[0])}
        ends = np.array([np.percentile(values, (0.5, 99.5)) for values, _ in groups.values()])
        low, high = ends[:, 0].min(), ends[:, 1].max()
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
        for name, (values, colour) in groups.items():
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            steps = axes.stairs(counts / len(values), edges, fill=True, color=colour, alpha=0.6, label=name)
            drawn.setdefault(name, steps)
        axes.set_title(printable(panel.name)[:40])
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid[: len(panels) : columns]:
        axes.set_ylabel("share of the group")
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("score (higher: more suspicious)")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn))
    draw_title(figure, title)
    return figure


def most_suspicious(flags: np.ndarray | None, scores: np.ndarray | None, count: int) -> np.ndarray:
    """The rows to look at first: flagged ones before others, higher scores before lower ones.

    Without scores only flagged rows are suspicious, and none of them more than another: some of all over the set.

    Args:
        flags: bool [n], or None.
        scores: float [n], or None.
        count: at most so many.

    Returns:
        int [at most count], row numbers.
    """
    if scores is None:
        rows = np.flatnonzero(flags) if flags is not None else np.zeros(0, int)
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    first = np.zeros(len(scores), bool) if flags is None else flags
    return np.lexsort((-np.asarray(scores, np.float64), ~first))[:count]
