import numpy as np
import pytest

from bdjax.evaluation.patterns import FoundPattern
from bdjax.inspection.extracted_triggers import GREY
from bdjax.reporting.detector_plots import (
    COLUMNS,
    Curve,
    Line,
    f1_by,
    pattern_caption,
    roc,
    trigger_grid,
)
from bdjax.reporting.plots import to_png

MASK = np.zeros((8, 8), bool)
MASK[5:, 5:] = True


def pattern(**changes):
    fields = {
        "attack": "white square 50 %",
        "seed": 2,
        "label": 1,
        "pattern": np.ones((8, 8, 1), np.float32),
        "mask": MASK,
        "success": 0.984,
        "network": "64P",
        "true_pattern": np.ones((8, 8, 1), np.float32),
        "true_mask": np.roll(MASK, 1, axis=1).astype(np.float32) / 2,
        "example": np.full((8, 8, 1), 60, np.uint8),
        "is_true_class": True,
    }
    return FoundPattern(**{**fields, **changes})


def test_captions():
    assert pattern().overlap == pytest.approx(6 / 12)
    assert pattern_caption(pattern()) == (
        "white square 50 %, target 1: success 0.98, IoU of masks 0.50, network 64P, seed 2"
    )
    false = pattern(is_true_class=False, label=3)
    assert pattern_caption(false) == "white square 50 %, target 3: a false alarm: success 0.98, network 64P, seed 2"
    unknown = pattern(true_mask=None, true_pattern=None, is_true_class=None)
    assert (
        unknown.overlap is None
        and pattern_caption(unknown) == "white square 50 %, target 1: success 0.98, network 64P, seed 2"
    )
    named = pattern(class_title="1 (cat)")
    assert pattern_caption(named).startswith("white square 50 %, target 1 (cat): success 0.98")
    empty = pattern(true_mask=np.zeros((8, 8), np.float32), mask=np.zeros((8, 8), bool))
    assert empty.overlap == 0


def test_trigger_grid_draws_what_there_is():
    figure = trigger_grid([pattern(), pattern(true_pattern=None, true_mask=None, example=None)], "found")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert set(COLUMNS) <= set(texts) and "not known" in texts and "none is flagged" in texts
    canvas = np.asarray(axes.images[0].get_array())
    # Two lines of five pictures, each of 8 x 8 pixels enlarged 20 times; only one has a row to outline pixels on.
    red = (canvas == (1, 0, 0)).all(axis=-1)
    across = 160 + 10
    line = 2 * 60 + 2 * 58  # along the edges of 60 x 60, in a width of 2
    assert red.sum() == 2 * line - 8 and red[:160, 4 * across :].sum() == red.sum()
    grey = (canvas == GREY).all(axis=-1)
    assert grey[:160, :160].sum() == (64 - 9) * 400 and not grey[180:, :160].any()
    colour = pattern(example=np.full((8, 8, 3), 60, np.uint8), pattern=np.ones((8, 8, 3), np.float32))
    assert to_png(trigger_grid([colour]))


def test_roc():
    curves = [Curve(f"set {i}", np.array([0, 0.1, 1]), np.array([0, 0.5 + i / 30, 1]), 0.75) for i in range(12)]
    figure = roc(curves, "VBD")
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[3].get_ydata(), [0, 0.6, 1])
    assert len(lines) == 13 and len({(line.get_color(), line.get_linestyle()) for line in lines[:12]}) == 12
    assert figure.legends[0].get_texts()[0].get_text() == "set 0: 0.750"
    assert to_png(figure) == to_png(roc(curves, "VBD"))
    assert to_png(roc([]))


def test_f1_by():
    vbd = Line("VBD", (0.1, 0.2, 1.0), (50, 60, 99.5), (1.0, 2.0, 0.5))
    single = Line("SCAn", (0.1, 1.0), (0, 90), (None, None))
    paper = Line("VBD", (0.1, 1.0), (93.34, 99.3), (1.0, 1.0), is_paper=True)
    figure = f1_by({"all-to-one": [vbd, paper, single], "all-to-all": [single]}, "opacity")
    first, second = figure.axes
    assert first.get_xscale() == "log" and [text.get_text() for text in figure.legends[0].get_texts()] == [
        "VBD",
        "VBD, paper",
        "SCAn",
    ]
    assert [f"{tick:g}" for tick in first.get_xticks()] == ["10", "20", "100"]
    bars, scan = first.containers
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[10, 50], [20, 60], [100, 99.5]])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.lines[2][0].get_segments()][1], [58, 62])
    assert not scan.has_yerr
    assert scan.lines[0].get_color() == second.containers[0].lines[0].get_color() != bars.lines[0].get_color()
    assert to_png(figure)
