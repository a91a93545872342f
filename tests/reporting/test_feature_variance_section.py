import json
import pathlib

import numpy as np
import pytest

from bdjax.inspection.feature_variance import Measured, compare
from bdjax.reporting.feature_variance import kinds_table, places_table, section, variance_figure
from bdjax.reporting.plots import to_png


def network(kind, seed, factor, triggered=None):
    images = np.linspace(1.0, 2.0, 10)[::-1]

    def at(value):
        return None if value is None else {"group2": value * images**2, "group2 before ReLU": images}

    return Measured(kind, seed, kind not in ("clean", "clean, trained on"), at(factor), at(triggered), at(triggered))


MEASURED = [
    *(network("clean", seed, 1.0) for seed in range(2)),
    *(network("clean, trained on", seed, 1.1) for seed in range(2)),
    *(network("ckd", seed, 1.5 + seed, triggered=3.0) for seed in range(2)),
    network("bad$nets", 1, np.nan),
]


class Folder:
    def __init__(self, path: pathlib.Path):
        self.path = path


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


def test_a_section_with_its_numbers(tmp_path):
    (one,), results = section(Folder(tmp_path), MEASURED)
    assert "Yes: 2 of 2 backdoored networks" in one.text and "factor of" in one.text
    assert one.figures[0].image.read_bytes().startswith(b"\x89PNG") and len(one.tables) == 2
    assert results["place"] == "group2" and list(results["places"]) == ["group2 before ReLU"]
    json.dumps(results, allow_nan=False)


def test_no_section_without_an_attacked_network(tmp_path):
    sections, results = section(Folder(tmp_path), MEASURED[:4])
    assert sections == () and results["networks"] == 0 and not list(tmp_path.iterdir())
