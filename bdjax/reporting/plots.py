"""The plots of a report: functions from arrays to figures.

Figures are made without pyplot and with a fixed style, so that they do not depend on the user's matplotlib settings or on
other plots of the process, and the same arrays give the same bytes. Names are drawn literally: a dollar sign does not start a
formula.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bdjax import atomic
from bdjax.reporting.tables import UNKNOWN
from bdjax.run.text import printable

DPI = 144
# Okabe and Ito's colours: distinguishable with every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>ph"

_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709
_INK = "#24292f"
_FAINT = "#8c959f"
_GRID = "#e6e8eb"
_MATRIX_COLOURS = "magma_r"  # perceptually uniform, and light for low values
_HEAT_COLOURS = "inferno"
_MAP_COLOURS = "viridis"
# A decorator for functions that draw figures of a report.
house_style = matplotlib.style.context(
    [
        "default",
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.parse_math": False,
            "text.color": _INK,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelcolor": _INK,
            "axes.edgecolor": _FAINT,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "legend.frameon": False,
            "figure.dpi": DPI,
            "figure.titlesize": 11,
            "figure.titleweight": "bold",
        },
    ]
)

# Grids are laid out in pixels, because every pixel of an image must be drawn by the same whole number of pixels.
_CELL = 132  # approximate length of the longer side of a cell
_CELL_MAX = 256
_GAP = 10
_MARGIN = 16
_LINE = 26  # height of a line of text
_BAR = 20  # width of a colour bar


@house_style
def matrix(
    values: np.ndarray,  # [R, C] in 0..1, NaN where there is no number
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    *,
    annotate: bool = True,
    separate_last_row: bool = False,
    row_label: str = "",
    column_label: str = "",
    value_label: str = "",
) -> Figure:
    """Draws a matrix of rates, such as the attack success of every model under every trigger.

    Args:
        values: the rates.
        row_names: a name for each row.
        column_names: a name for each column.
        title: of the figure.
        annotate: whether each cell shows its number.
        separate_last_row: whether a line separates the last row, as the reference that the other rows are
            compared with.
        row_label: label of the rows: "model".
        column_label: label of the columns: "trigger".
        value_label: label of the colour bar: "ASR".
    """
    values = np.asarray(values, np.float64)
    _require_shape("values", values.shape, (len(row_names), len(column_names)))
    _require_unit_range("values", values)
    rows, columns = values.shape
    rotate = max((len(name) for name in column_names), default=0) > 7
    figure = Figure(figsize=(2.6 + 0.62 * columns, 1.5 + 0.46 * rows + 0.4 * rotate), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    colours = matplotlib.colormaps[_MATRIX_COLOURS].with_extremes(bad="#e6e8eb")
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(
        range(columns),
        [_short(name) for name in column_names],
        rotation=35 if rotate else 0,
        ha="right" if rotate else "center",
        rotation_mode="anchor" if rotate else "default",
    )
    axes.set_yticks(range(rows), [_short(name) for name in row_names])
    axes.tick_params(length=0)
    # White lines between the cells, drawn as the minor grid.
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    if separate_last_row and rows > 1:
        axes.axhline(rows - 1.5, color="white", linewidth=7)
        axes.axhline(rows - 1.5, color=_INK, linewidth=1.2)
    if annotate:
        for row, column in np.ndindex(rows, columns):
            value = values[row, column]
            text = UNKNOWN if math.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=_text_colour(image.cmap(image.norm(value))))
    axes.set(xlabel=column_label, ylabel=row_label)
    bar = figure.colorbar(image, ax=axes, label=value_label, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    draw_title(figure, title)
    return figure


@house_style
def image_grid(
    images: Sequence[Sequence[np.ndarray]],  # [R, C, H, W, Ch] in 0..1, or rows of different lengths
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    *,
    captions: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Draws images in rows and columns, every pixel as a square of the same size, and single-channel images in grey.

    Args:
        images: the images. Rows may have different lengths.
        row_names: a name for each row, or empty.
        column_names: a name for each column, or empty.
        title: of the figure.
        captions: a line below each image, in the arrangement of the images.
    """
    return _draw_grid([[_to_rgb(image) for image in row] for row in images], row_names, column_names, title, captions)


@house_style
def overlay_grid(
    images: np.ndarray,  # [R, C, H, W, Ch] in 0..1
    heat_maps: np.ndarray,  # [R, C, H, W] in 0..1
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    *,
    opacity: float = 0.4,
    grey: bool = True,
    captions: Sequence[Sequence[str]] | None = None,
    value_label: str = "Grad-CAM",
) -> Figure:
    """Draws heat maps, such as Grad-CAM's, over their images.

    Args:
        images: the images.
        heat_maps: a heat map for each image.
        row_names: a name for each row, or empty.
        column_names: a name for each column, or empty.
        title: of the figure.
        opacity: weight of the heat map over the image.
        grey: whether images are drawn in grey, so that all colour is from the heat map.
        captions: a line below each image, such as the predicted class, in the arrangement of the images.
        value_label: label of the colour bar.
    """
    colours = matplotlib.colormaps[_HEAT_COLOURS]
    if len(images) != len(heat_maps):
        raise ValueError(f"heat_maps has {len(heat_maps)} rows, images has {len(images)}; they must agree")
    cells = []
    for image_row, heat_row in zip(images, heat_maps, strict=True):
        if len(image_row) != len(heat_row):
            raise ValueError(
                f"a row of heat_maps has {len(heat_row)} cells, the row of images {len(image_row)}; they must agree"
            )
        cells.append([])
        for image, heat in zip(image_row, heat_row, strict=True):
            image, heat = _to_rgb(image), np.asarray(heat, np.float64)
            _require_shape("a heat map", heat.shape, image.shape[:2])
            _require_unit_range("heat_maps", heat, may_be_unknown=False)
            if grey:
                image = np.repeat((image @ _LUMINANCE)[..., None], 3, axis=-1)
            cells[-1].append((1 - opacity) * image + opacity * colours(heat)[..., :3])
    # The bar shows the pure colours; on the images they are mixed with the image below.
    return _draw_grid(cells, row_names, column_names, title, captions, bar=(_HEAT_COLOURS, value_label))


@house_style
def feature_map_grid(
    features: Mapping[str, Mapping[str, np.ndarray]],  # model -> stage -> [h, w, c]
    title: str,
    *,
    channels: int = 8,
) -> Figure:
    """Draws the mean over all channels and the first channels of each stage of each model, for one image.

    Rows of a stage are adjacent, so that models can be compared line by line. Every map is scaled to its own range: compare
    where a map is active, not how much.

    Args:
        features: for each model, the features of each stage. Models must have the same stages, but may differ in the
            number of channels.
        title: of the figure.
        channels: number of channels to draw.
    """
    models = list(features)
    stages = list(features[models[0]])
    for model in models:
        if list(features[model]) != stages:
            raise ValueError(
                f"model {model!r} has stages {list(features[model])}, model {models[0]!r} {stages}; they must agree"
            )
    colours = matplotlib.colormaps[_MAP_COLOURS]
    cells, row_names = [], []
    shown = min(channels, max(np.shape(maps)[-1] for stage in features.values() for maps in stage.values()))
    for stage in stages:
        for model in models:
            maps = np.asarray(features[model][stage], np.float64)
            drawn = [maps.mean(axis=-1), *np.moveaxis(maps[..., :shown], -1, 0)]
            cells.append([colours(_to_unit_range(feature_map))[..., :3] for feature_map in drawn])
            row_names.append(f"{stage}\n{model}")
    names = ["mean of all", *(f"channel {index}" for index in range(shown))]
    return _draw_grid(cells, row_names, names, title, None, rows_per_block=len(models))


@house_style
def training_curves(
    histories: Mapping[str, Mapping[str, np.ndarray]],  # model -> metric -> [epochs] or [members, epochs]
    title: str = "",
    *,
    value_label: str = "loss",
    log_scale: bool = False,
    epochs: Mapping[str, Sequence[int]] = {},  # model -> [epochs]
) -> Figure:
    """Draws metrics against epochs, with a panel for each model or ensemble.

    Args:
        histories: for each model, its metrics. With several members, the line is the mean and the band minimum to maximum.
        title: of the figure.
        value_label: label of the vertical axis.
        log_scale: whether the vertical axis is logarithmic; it is linear in panels without a positive number, as after training
            that diverged.
        epochs: the epochs that the metrics are of, from 1; all of them for models that are not in it.
    """
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure = Figure(figsize=(0.6 + 3.3 * columns, 0.5 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(histories) :]:
        panel.remove()
    metrics = list(dict.fromkeys(metric for history in histories.values() for metric in history))
    for panel, (name, history) in zip(panels, histories.items(), strict=False):
        members = 1
        for metric, series in history.items():
            # Masked, so that a diverged member does not make the mean of all members NaN.
            lines = np.ma.masked_invalid(np.atleast_2d(np.asarray(series, np.float64)))
            members = max(members, len(lines))
            numbers = epochs.get(name, np.arange(1, lines.shape[1] + 1))
            colour = COLOURS[metrics.index(metric) % len(COLOURS)]
            marker = "o" if lines.shape[1] == 1 else ""
            panel.plot(numbers, lines.mean(axis=0), color=colour, label=_words(metric), linewidth=1.6, marker=marker)
            if len(lines) > 1:
                panel.fill_between(numbers, lines.min(axis=0), lines.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        panel.set_title(_short(name) + (f" ({members} members)" if members > 1 else ""))
        is_log = log_scale and any(np.any(np.nan_to_num(series, posinf=0.0) > 0) for series in history.values())
        panel.set(xlabel="epoch", yscale="log" if is_log else "linear")
        if is_log:  # maths parsing is off (names may contain $), and matplotlib writes powers of ten as formulas
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.legend(loc="best")
    for panel in panels[: len(histories) : columns]:
        panel.set_ylabel(value_label)
    if title:
        draw_title(figure, title)
    return figure


@house_style
def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],  # metric -> a mean for each name
    errors: Mapping[str, Sequence[float | None]] | None = None,
    title: str = "",
) -> Figure:
    """Draws bars of rates, such as the clean accuracy and the attack success after each defense.

    Args:
        names: the groups of bars, from top to bottom.
        series: for each metric, its rate in 0..1 for each name, None if unknown.
        errors: for some metrics, half the length of each error bar, None for no bar.
        title: of the figure.
    """
    errors = errors or {}
    for metric, values in [*series.items(), *errors.items()]:
        _require_shape(metric, (len(values),), (len(names),))
    thickness = 0.8 / len(series)
    # The height leaves room for the legend, whatever the number of bars.
    figure = Figure(figsize=(7.2, 1.1 + len(names) * (0.16 + 0.2 * len(series))), layout="constrained")
    axes = figure.add_subplot()
    for index, (metric, values) in enumerate(series.items()):
        means = np.array([np.nan if value is None else value for value in values], np.float64)
        _require_unit_range(metric, means)
        metric_errors = errors.get(metric, [None] * len(names))
        spreads = np.array([0.0 if error is None else error for error in metric_errors], np.float64)
        heights = np.arange(len(names)) + (index - (len(series) - 1) / 2) * thickness
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(heights, np.nan_to_num(means), thickness * 0.88, color=colour, label=printable(metric))
        has_bar = spreads > 0
        axes.errorbar(
            means[has_bar], heights[has_bar], xerr=spreads[has_bar], fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5
        )
        for height, mean, spread in zip(heights, means, spreads, strict=True):
            text = UNKNOWN if math.isnan(mean) else f"{mean:.3f}"
            end = 0.0 if math.isnan(mean) else mean + spread
            axes.text(end + 0.012, height, text, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set(ylim=(len(names) - 0.45, -0.55), xlim=(0, 1.1), xticks=np.arange(0, 1.01, 0.2))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(series))
    if title:
        draw_title(figure, title)
    return figure


@house_style
def trade_off(
    methods: Sequence[str],
    clean_accuracy: np.ndarray,  # [M, A] in 0..1, NaN where unknown
    success: np.ndarray,  # [M, A] in 0..1, NaN where unknown
    title: str = "",
) -> Figure:
    """Draws clean accuracy against attack success after each method: best is top left.

    A small mark is one attack; a large mark is the mean over the attacks that are known for all methods.

    Args:
        methods: their names.
        clean_accuracy: CDA of each method for each attack.
        success: ASR of each method for each attack.
        title: of the figure.
    """
    known = np.isfinite(clean_accuracy) & np.isfinite(success)
    common = known.all(axis=0)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(methods):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        shown = known[number]
        axes.scatter(success[number, shown], clean_accuracy[number, shown], s=16, alpha=0.4, linewidths=0, **style)
        if common.any():
            mean = success[number, common].mean(), clean_accuracy[number, common].mean()
            axes.scatter(*mean, s=90, edgecolors="white", linewidths=0.8, label=printable(name), zorder=3, **style)
    values = clean_accuracy[known] if known.any() else np.array([1.0])
    # The axis spans at least 0.2, so that differences of a point or two look small.
    low, high = min(values.min(), values.max() - 0.2) - 0.02, values.max() + 0.02
    axes.set(xlabel="ASR (lower is better)", ylabel="CDA (higher is better)", xlim=(-0.03, 1.03), ylim=(low, high))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if common.any():
        figure.legend(loc="outside right upper", title="mean of attacks")
    draw_title(figure, title)
    return figure


class Scores(NamedTuple):
    """One panel of `score_histograms`."""

    name: str
    scores: np.ndarray
    """float [n]"""
    is_poisoned: np.ndarray | None
    """bool [n]; None if unknown"""


@house_style
def score_histograms(panels: Sequence[Scores], title: str = "", *, bins: int = 40) -> Figure:
    """Draws histograms of the scores of clean and of poisoned rows, with a panel for each training set.

    Heights are shares of the clean and of the poisoned rows, so that a few poisoned rows are visible beside many clean rows.
    Scores beyond the outer 0.5 % of either group are counted in the outermost bins.

    Args:
        panels: a panel for each training set.
        title: of the figure.
        bins: number of bins.
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
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid[: len(panels) : columns]:
        axes.set_ylabel("share of the group")
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("score (higher: more suspicious)")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn))
    draw_title(figure, title)
    return figure


@house_style
def to_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; the warning must not stop a run.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "bdjax"})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as a PNG, atomically, and returns the path."""
    return atomic.write_bytes(path, to_png(figure))


def draw_title(figure: Figure, title: str) -> None:
    """Puts a title on top of a figure, wrapped to its width; nothing if it is empty."""
    if title:
        # Constrained layout reserves a title's height, not its width.
        figure.suptitle(_wrap(title, round(figure.get_figwidth() * DPI / 1.3)), x=0.01, ha="left")


def _draw_grid(
    cells: list[list[np.ndarray]],  # [H, W, 3] in 0..1
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    captions: Sequence[Sequence[str]] | None,
    *,
    bar: tuple[str, str] | None = None,  # colour map, label
    rows_per_block: int = 0,  # a wider gap after every so many rows
) -> Figure:
    rows, columns = len(cells), max((len(row) for row in cells), default=0)
    if not columns:
        raise ValueError("images is empty; give at least one image")
    if row_names:
        _require_shape("row_names", (len(row_names),), (rows,))
    if column_names:
        _require_shape("column_names", (len(column_names),), (columns,))
    if captions is not None and [len(row) for row in captions] != [len(row) for row in cells]:
        raise ValueError(
            f"captions has rows of lengths {[len(row) for row in captions]}, images {[len(row) for row in cells]}"
        )
    height, width = _cell_size(cells[0][0].shape[:2])
    title = _short(title, 90)
    column_lines = [_wrap(name, width + _GAP) for name in column_names]
    row_lines = ["\n".join(_short(line, 28) for line in name.split("\n")) for name in row_names]
    caption_lines = [[_wrap(text, width + _GAP) for text in row] for row in captions or []]
    caption_height = _LINE * max((_line_count(text) for row in caption_lines for text in row), default=0)

    down, across = height + _GAP + caption_height, width + _GAP
    block_gap = 2 * _GAP
    tops = [row * down + (row // rows_per_block * block_gap if rows_per_block else 0) for row in range(rows)]
    canvas = np.ones((tops[-1] + height + caption_height, columns * across - _GAP, 3))
    for top, row in zip(tops, cells, strict=True):
        for column, cell in enumerate(row):
            left = column * across
            canvas[top : top + height, left : left + width] = _resize(cell, height, width)
            # A frame of one pixel around the cell, so that white cells are visible.
            for edge in (
                (slice(max(top - 1, 0), top + height + 1), slice(left + width, left + width + 1)),
                (slice(max(top - 1, 0), top + height + 1), slice(max(left - 1, 0), left)),
                (slice(max(top - 1, 0), top), slice(left, left + width)),
                (slice(top + height, top + height + 1), slice(left, left + width)),
            ):
                canvas[edge] = 0.85

    left = _MARGIN + (_text_width(row_lines) + _MARGIN if row_names else 0)
    above = _MARGIN + (_LINE + _GAP if title else 0) + _LINE * max(map(_line_count, column_lines), default=0)
    right = _MARGIN + (2 * _MARGIN + _BAR + 90 if bar else 0)
    grid_height, grid_width = canvas.shape[:2]
    total_width = max(left + grid_width + right, 2 * _MARGIN + _text_width([title], weight="bold", size=11))
    total_height = above + grid_height + _MARGIN
    figure = Figure(figsize=(total_width / DPI, total_height / DPI))
    axes = _axes_at(figure, left, above, grid_width, grid_height, total_width, total_height)
    axes.axis("off")
    axes.imshow(canvas, interpolation="nearest", extent=(0, grid_width, grid_height, 0), aspect="auto")
    for column, text in enumerate(column_lines):
        axes.text(column * across + width / 2, -_GAP / 2, text, ha="center", va="bottom")
    for top, text in zip(tops, row_lines, strict=False):
        axes.text(-_MARGIN, top + height / 2, text, ha="right", va="center")
    for top, row in zip(tops, caption_lines, strict=False):
        for column, text in enumerate(row):
            axes.text(column * across + width / 2, top + height + 3, text, ha="center", va="top", fontsize=8)
    if bar:
        bar_height = min(grid_height - caption_height, 3 * _CELL)
        bar_axes = _axes_at(figure, left + grid_width + 2 * _MARGIN, above, _BAR, bar_height, total_width, total_height)
        scale = figure.colorbar(ScalarMappable(Normalize(0, 1), bar[0]), cax=bar_axes, label=bar[1], ticks=[0, 0.5, 1])
        scale.outline.set_visible(False)
    if title:
        figure.text(_MARGIN / total_width, 1 - _MARGIN / total_height, title, va="top", fontsize=11, weight="bold")
    return figure


def _axes_at(figure: Figure, left: int, top: int, width: int, height: int, total_width: int, total_height: int) -> Axes:
    bottom = total_height - top - height
    return figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))


def _cell_size(shape: tuple[int, int]) -> tuple[int, int]:
    longer = max(shape)
    factor = max(1, round(_CELL / longer)) if longer <= _CELL_MAX else _CELL_MAX / longer
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    return image[rows[:, None], columns]


def _to_rgb(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image, np.float64)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or not image.size:
        raise ValueError(f"an image has shape {image.shape}; it must be [height, width, 1 or 3]")
    _require_unit_range("images", image, may_be_unknown=False)
    return np.broadcast_to(np.clip(image, 0, 1), (*image.shape[:2], 3))


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]  # a diverged model still gets its row, in black
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.where(np.isnan(values), np.nan, 0.0)


def _text_width(lines: Sequence[str], size: float = 9, weight: str = "normal") -> int:
    """Width of the widest line in pixels, measured on a figure that is not shown."""
    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        widths = [
            figure.text(0, 0, line, fontsize=size, weight=weight).get_window_extent(renderer).width for line in lines
        ]
    return math.ceil(max(widths, default=0))


def _line_count(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _wrap(text: str, width: int) -> str:
    """Breaks a name into at most three lines of about `width` pixels."""
    lines = textwrap.wrap(printable(text), max(6, width // 11), max_lines=3, placeholder=" …")
    return "\n".join(lines)


def _short(text: str, length: int = 32) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _words(name: str) -> str:
    return printable(name.replace("_", " "))


def _text_colour(background: tuple[float, float, float, float]) -> str:
    # By perceived lightness, not by value: colour maps differ in where they turn dark.
    linear = np.asarray(background[:3]) ** 2.2
    return "black" if linear @ _LUMINANCE > 0.2 else "white"


def _require_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(shape)}; it must have shape {tuple(expected)}, as the names do")


def _require_unit_range(name: str, values: np.ndarray, *, may_be_unknown: bool = True) -> None:
    if not may_be_unknown and np.isnan(values).any():
        raise ValueError(f"{name} has NaN; it must lie in 0..1")
    # float32 rounding may exceed the range slightly.
    if np.any(values < -1e-4) or np.any(values > 1 + 1e-4):
        raise ValueError(f"{name} ranges from {np.nanmin(values):g} to {np.nanmax(values):g}; it must lie in 0..1")
