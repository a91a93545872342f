"""Tables and plot of the benchmark, from the content of results.json.

A contender that was too slow is not left out, but reported with an upper bound of its speed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bdjax.benchmarking import settings
from bdjax.reporting.plots import COLOURS, draw_title, house_style
from bdjax.reporting.tables import Cell, Table

Outcome = Mapping[str, Any]
"""The outcome of one contender from `interleave.WorkerPool.race`, with "work" in images."""


class Rate(NamedTuple):
    """Images per second over the rounds."""

    median: float
    low: float
    high: float


def rates(outcome: Outcome) -> list[float]:
    """Images per second in each round that was run."""
    return [turn["work"] / turn["seconds"] for turn in outcome.get("turns", ())]


def rate_of(outcome: Outcome) -> Rate | None:
    """Median, minimum and maximum over the rounds; None if no round was run."""
    values = rates(outcome)
    return Rate(float(np.median(values)), min(values), max(values)) if values else None


def fastest(contenders: Mapping[str, Outcome], belongs: Callable[[str], bool]) -> str | None:
    """The contender with the highest median among those whose name `belongs`; None if none of them has run."""
    medians = {
        name: rate.median for name, outcome in contenders.items() if belongs(name) and (rate := rate_of(outcome))
    }
    return max(medians, key=medians.__getitem__) if medians else None


def is_engine(name: str) -> bool:
    """Whether all members are trained in one call."""
    return name in settings.engine_forms()


def is_pytorch(name: str) -> bool:
    """Whether it runs PyTorch."""
    return name.startswith(settings.PYTORCH)


def remark(outcome: Outcome) -> str:
    """Why there is no rate, in a few words; "" if there is a rate."""
    status, limit = outcome["status"], outcome.get("limit")
    if status == "done":
        return ""
    if status == "slow":
        text = f"an epoch takes more than {limit:g} s"
    elif status == "slow to compile":
        text = f"compilation takes more than {limit:g} s"
    else:
        return outcome.get("reason", status)
    known_from = outcome.get("known_from")
    return f"not run: {text} even with {known_from}" if known_from else text


def _ratio(contenders: Mapping[str, Outcome], name: str | None, reference: str | None) -> float | None:
    rate, reference_rate = (rate_of(contenders[key]) if key else None for key in (name, reference))
    return rate.median / reference_rate.median if rate and reference_rate else None


def _worst_round(contenders: Mapping[str, Outcome], name: str | None, reference: str | None) -> float | None:
    if not name or not reference:
        return None
    # Rounds are paired: both contenders ran within seconds of each other.
    pairs = zip(rates(contenders[name]), rates(contenders[reference]), strict=False)
    return min((rate / reference_rate for rate, reference_rate in pairs), default=None)


def _times(ratio: float | None) -> Cell:
    return None if ratio is None else f"{ratio:.2f}"


def summary_table(results: Mapping[str, Any]) -> Table:
    """For each setting: the engine's best form, compared with PyTorch's best and with one member at a time."""
    rows = []
    for entry in results["settings"]:
        contenders = entry["contenders"]
        engine_best, pytorch_best = fastest(contenders, is_engine), fastest(contenders, is_pytorch)
        alone = settings.ALONE if settings.ALONE in contenders else None
        speeds = [round(rate_of(contenders[name]).median) if name else None for name in (engine_best, pytorch_best)]
        rows.append(
            (
                *_place(entry),
                engine_best,
                speeds[0],
                pytorch_best.removeprefix(settings.PYTORCH) if pytorch_best else _why_none(contenders),
                speeds[1],
                _times(_ratio(contenders, engine_best, pytorch_best)),
                _times(_worst_round(contenders, engine_best, pytorch_best)),
                _times(_ratio(contenders, engine_best, alone)),
            )
        )
    return Table(
        "The engine's best form, PyTorch's best, and one member at a time",
        (
            "network and images",
            "members",
            "engine's best",
            "images/s",
            "PyTorch's best",
            "images/s",
            "× PyTorch",
            "worst round",
            "× alone",
        ),
        tuple(rows),
        "Images trained on per second, all members together, median over the rounds. × is the ratio of two medians, worst "
        "round the smallest ratio within a round. PyTorch and alone train one model after another.",
    )


def _why_none(contenders: Mapping[str, Outcome]) -> Cell:
    return next((remark(outcome) for name, outcome in contenders.items() if is_pytorch(name) and remark(outcome)), None)


def _place(entry: Mapping[str, Any]) -> tuple[str, int]:
    setting = entry["setting"]
    setting = settings.Setting(**setting | {"shape": tuple(setting["shape"])})
    return setting.family_name, setting.members


def details_table(results: Mapping[str, Any]) -> Table:
    """Every contender at every setting, the fastest of each setting in bold."""
    rows, styles = [], []
    for entry in results["settings"]:
        contenders = entry["contenders"]
        pytorch_best, best = fastest(contenders, is_pytorch), fastest(contenders, lambda name: True)
        peak = results["peak"].get(entry["setting"]["compute_dtype"], {}).get("operations_per_second")
        for name, outcome in contenders.items():
            rate = rate_of(outcome)
            speed = rate.median * entry["operations_per_image"] if rate else None
            bound = outcome.get("images_per_second_below")
            memory = outcome.get("peak_mebibytes")
            compiling = outcome.get("compile_seconds")
            rows.append(
                (
                    *_place(entry),
                    name,
                    round(rate.median) if rate else None if bound is None else f"< {bound:,.0f}",
                    *((round(rate.low), round(rate.high)) if rate else (None, None)),
                    _times(_ratio(contenders, name, pytorch_best)),
                    None if speed is None else f"{speed / 1e9:.1f}",
                    None if speed is None or not peak else f"{100 * speed / peak:.1f} %",
                    None if compiling is None else f"{compiling:.1f}",
                    None if memory is None else round(memory),
                    remark(outcome),
                )
            )
            styles.append("ours" if name == best else "")
    peaks = ", ".join(
        f"{dtype} {measured['operations_per_second'] / 1e9:,.0f} GFLOP/s ({measured['library']})"
        for dtype, measured in results["peak"].items()
        if measured["operations_per_second"]
    )
    return Table(
        "Every contender",
        (
            "network and images",
            "members",
            "contender",
            "images/s",
            "minimum",
            "maximum",
            "× PyTorch's best",
            "GFLOP/s",
            "of peak",
            "compile s",
            "peak MiB",
            "remark",
        ),
        tuple(rows),
        "Images trained on per second, all members together: median, minimum and maximum over the rounds. GFLOP/s counts the "
        "products of convolutions and classifier, three times the forward pass for a step; the peak is the fastest large "
        f"square matrix product of this run: {peaks or 'not measured'}. Peak memory is that of the GPU, or on a CPU that of "
        "the whole process including libraries; PyTorch and alone hold one model at a time.",
        tuple(styles),
    )


# ---- Throughput against members -------------------------------------------------------------------------------------

_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def _line_style(name: str) -> dict[str, Any]:
    """Colour is the lowering, dashes the layout; PyTorch's forms have other colours, alone is black."""
    forms = settings.engine_forms()
    if name in forms:
        layouts, lowerings = (list(dict.fromkeys(values)) for values in zip(*forms.values(), strict=True))
        layout, lowering = forms[name]
        number = layouts.index(layout)
        return {
            "color": COLOURS[lowerings.index(lowering) % 3],
            "linestyle": _DASHES[number % 4],
            "marker": _MARKERS[number % 4],
        }
    if name == settings.ALONE:
        return {"color": COLOURS[6], "linestyle": "-", "marker": "x"}
    base = name.removeprefix(settings.PYTORCH)
    suffix = next((ending for ending in (settings.ONE_THREAD, settings.PER_CORE) if base.endswith(ending)), "")
    number = (*settings.PYTORCH_FORMS, *settings.PYTORCH_GPU_FORMS).index(base.removesuffix(suffix))
    dashes = ("", settings.ONE_THREAD, settings.PER_CORE).index(suffix)
    return {"color": COLOURS[3 + number % 3], "linestyle": _DASHES[dashes], "marker": ("P", "X", "*", "p")[number]}


@house_style
def throughput(results: Mapping[str, Any]) -> Figure:
    """Images per second against members, a panel for each family of settings, a line for each contender.

    Bars reach from the slowest round to the fastest. A hollow triangle is a bound: the contender was slower than that.
    """
    families: dict[str, list[Mapping[str, Any]]] = {}
    for entry in results["settings"]:
        families.setdefault(_place(entry)[0], []).append(entry)
    columns = min(2, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 1.6 + 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(families) :]:
        panel.remove()
    handles: dict[str, Any] = {}
    for panel, (family, entries) in zip(panels, families.items(), strict=False):
        for name in dict.fromkeys(name for entry in entries for name in entry["contenders"]):
            handle = _draw_contender(panel, name, entries)
            if handle is not None:
                handles.setdefault(name, handle)
        members = sorted({entry["setting"]["members"] for entry in entries})
        panel.set_title(family)
        panel.set(xlabel="members", xscale="log", yscale="log")
        panel.set_xticks(members, [str(count) for count in members])
        panel.set_xlim(members[0] / 1.2, members[-1] * 1.2)
        panel.xaxis.set_minor_locator(NullLocator())
        # Names are never parsed as formulas here, and matplotlib writes powers of ten as formulas.
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        low, high = panel.get_ylim()
        # Less than a decade may have no tick at a power of ten, and none at twice or five times that.
        labelled = "25" if high >= 10 * low else "123456789"
        panel.yaxis.set_minor_formatter(FuncFormatter(partial(_minor_label, labelled)))
        panel.grid(axis="y", which="both", color="#e6e8eb", linewidth=0.8)
        panel.set_axisbelow(True)
    for panel in panels[: len(families) : columns]:
        panel.set_ylabel("images trained on per second")
    if handles:
        # A contender without a place in the first panel still stands where its kind stands.
        order = dict.fromkeys((*settings.all_forms(has_gpu=False), *settings.all_forms(has_gpu=True)))
        names = [name for name in order if name in handles]
        # Names are up to 33 letters long: two of them, small, are as wide as a panel.
        figure.legend(
            [handles[name] for name in names], names, loc="outside lower center", ncols=1 + columns, fontsize="small"
        )
    draw_title(figure, "Throughput of training, all members together")
    return figure


def _minor_label(labelled: str, value: float, _: int) -> str:
    return f"{value:,g}" if f"{value:e}"[0] in labelled else ""


def _draw_contender(panel: Axes, name: str, entries: Sequence[Mapping[str, Any]]) -> Any:
    """Draw a contender's line and its bounds; returns the handle for the legend, None if nothing was drawn."""
    style = _line_style(name)
    points, bounds = [], []
    for entry in entries:
        outcome = entry["contenders"].get(name)
        rate = rate_of(outcome) if outcome else None
        if rate:
            points.append((entry["setting"]["members"], *rate))
        elif outcome and outcome.get("images_per_second_below"):
            bounds.append((entry["setting"]["members"], outcome["images_per_second_below"]))
    handle = None
    if bounds:
        (handle,) = panel.plot(
            *zip(*bounds, strict=True), color=style["color"], linestyle="", marker="v", markerfacecolor="none"
        )
    if points:
        count, median, low, high = np.array(sorted(points)).T
        handle = panel.errorbar(
            count, median, yerr=(median - low, high - median), linewidth=1.4, markersize=4.5, elinewidth=0.9, **style
        )
    return handle
