import json
from types import SimpleNamespace

import numpy as np
import pytest

from bdjax.commands import robust_kd
from bdjax.inspection.feature_variance import Variances, compare
from bdjax.inspection.loss_gap import LossGap
from bdjax.inspection.verification import IMAGES, VIEWS, VerificationHeat
from bdjax.reporting import plots
from bdjax.reporting.inspections import (
    feature_variance,
    kinds_table,
    loss_gap,
    places_table,
    variance_figure,
    verification,
)
from bdjax.reporting.plots import to_png
from bdjax.reporting.tables import cells
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset


def network(kind, seed, factor, triggered=None):
    images = np.linspace(1.0, 2.0, 10)[::-1]

    def at(value):
        return None if value is None else {"group2": value * images**2, "group2 before ReLU": images}

    return Variances(kind, seed, kind not in ("clean", "clean, trained on"), at(factor), at(triggered), at(triggered))


MEASURED = [
    *(network("clean", seed, 1.0) for seed in range(2)),
    *(network("clean, trained on", seed, 1.1) for seed in range(2)),
    *(network("ckd", seed, 1.5 + seed, triggered=3.0) for seed in range(2)),
    network("bad$nets", 1, np.nan),
]


def test_the_figure_has_every_image_of_every_kind_and_every_ratio():
    figure = variance_figure(MEASURED, compare(MEASURED))
    images, ratios = figure.axes
    drawn = [np.asarray(marks.get_offsets()) for marks in images.collections]
    assert len(drawn) == 3  # the network that diverged is not drawn
    base = np.linspace(1.0, 2.0, 10) ** 2  # in ascending order
    np.testing.assert_allclose(drawn[0], np.stack([np.arange(1, 11), base], -1))
    np.testing.assert_allclose(drawn[2][:, 1], 2.0 * base)  # the mean of 1.5 and 2.5
    np.testing.assert_allclose(
        [np.asarray(marks.get_offsets())[:, 1] for marks in ratios.collections], [[1.1] * 2, [1.5, 2.5]]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "clean, trained on", "ckd"]
    assert images.get_yscale() == "linear"
    assert to_png(figure) == to_png(variance_figure(MEASURED, compare(MEASURED)))


def test_values_that_are_far_apart_are_drawn_on_a_logarithmic_axis():
    measured = [network("clean", 0, 1.0), network("ckd", 0, 500.0), network("other", 0, 2.0)]
    figure = variance_figure(measured, compare(measured), "far apart")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"] and to_png(figure)


def test_the_table():
    table = kinds_table(compare(MEASURED))
    assert [row[0] for row in table.rows] == ["clean", "clean, trained on", "ckd"]
    assert table.rows[2][3:5] == ("2.00 ± 0.71", "2 of 2") and table.rows[0][5] == "–"
    assert table.rows[2][6] == "3.00 ± 0.00" and table.notes.endswith("diverged: 1.")


def test_the_places_are_all_there():
    table = places_table({place: compare(MEASURED, place) for place in MEASURED[0].clean})
    assert [row[0] for row in table.rows] == ["group2", "group2 before ReLU"]
    assert table.rows[0][1:4] == ("2.00", "2 of 2", "2 of 2")
    assert table.rows[1][1:4] == ("1.00", "0 of 3", "0 of 3") and table.rows[1][4] == pytest.approx(0.5)


def test_a_section_with_its_numbers(tmp_path, undrawn):
    (section,) = feature_variance(RunFolder(tmp_path, True), MEASURED)
    assert section.title == "Feature variance"
    assert "Yes: 2 of 2 backdoored networks" in section.text and "factor of" in section.text
    assert section.figures[0].image.read_bytes().startswith(b"\x89PNG") and len(section.tables) == 2
    results = json.loads((tmp_path / "feature_variance.json").read_text())
    assert results["place"] == "group2" and list(results["places"]) == ["group2 before ReLU"]


def test_no_section_without_an_attacked_network(tmp_path):
    assert feature_variance(RunFolder(tmp_path, True), MEASURED[:4]) == ()
    assert json.loads((tmp_path / "feature_variance.json").read_text())["networks"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["feature_variance.json"]


def test_the_loss_gap_has_a_figure_for_each_attack_and_a_row_for_each_network(tmp_path, undrawn):
    curves = {"clean rows": np.ones((2, 8)), "poisoned rows": np.full((2, 8), 0.5)}
    small, large = (LossGap(name, 1200, curves, (3, 5), 20, (0.9, 0.7)) for name in ("small", "large"))
    (section,) = loss_gap(RunFolder(tmp_path, True), [("BadNets", [small, large]), ("Blended", [small])])
    assert section.title == "The loss gap"
    assert [figure.image.name for figure in section.figures] == ["loss-gap-1.png", "loss-gap-2.png"]
    assert all(figure.image.read_bytes().startswith(b"\x89PNG") for figure in section.figures)
    rows = cells(section.tables[0])
    assert [row[:2] for row in rows] == [("BadNets", "small"), ("BadNets", "large"), ("Blended", "small")]
    assert rows[0][2:] == ("1,200", "4.0 ± 1.4", "20", "0.800 ± 0.141")
    assert loss_gap(RunFolder(tmp_path, True), []) == ()


NAMES = ("0", "1", "2", "dog", "4", "5", "6", "7", "8", "9")
TEN = Dataset(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32), 10, "ten", "arrays", NAMES)


def test_the_verification_section_names_every_predicted_class(tmp_path, monkeypatch, undrawn):
    heat = VerificationHeat(
        np.full((IMAGES, len(VIEWS), 8, 8, 1), 0.5, np.float32),
        np.zeros((IMAGES, len(VIEWS), 8, 8), np.float32),
        np.tile([3, 10, 0, 0], (IMAGES, 1)),
    )
    drawn = {}
    draw = plots.overlay_grid

    def overlay_grid(images, maps, names, columns, title, *, captions):
        drawn.update(names=names, captions=captions, shape=images.shape)
        return draw(images, maps, names, columns, title, captions=captions)

    monkeypatch.setattr(plots, "overlay_grid", overlay_grid)
    (section,) = verification(RunFolder(tmp_path, True), [("BadNets", heat), ("Blended", heat)], TEN)
    assert section.title == "Grad-CAM of the verification network"
    assert section.figures[0].image == tmp_path / "verification.png" and section.figures[0].image.stat().st_size > 0
    assert drawn["names"] == ["BadNets"] * IMAGES + ["Blended"] * IMAGES and drawn["shape"][:2] == (2 * IMAGES, 4)
    assert drawn["captions"][0] == ["class 3 (dog)", "the defender's class", "class 0", "class 0"]
    assert verification(RunFolder(tmp_path, True), [], TEN) == ()


def test_robust_kd_measures_nothing_without_a_clean_network_or_a_known_trigger():
    for clean, triggered in ((None, ((np.zeros((1, 8, 8, 1)),),)), ("networks", ((),))):
        teachers, groups = SimpleNamespace(clean=clean), [(None, [], SimpleNamespace(triggered=triggered))]
        assert robust_kd.sections(SimpleNamespace(teachers=teachers, groups=groups, config=None)) == ()
