import io
import os
from functools import cache

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from bdjax.reporting import plots

GENERATOR = np.random.default_rng(0)
MATRIX = GENERATOR.random((8, 7))
IMAGES = GENERATOR.random((2, 3, 8, 8, 1)).astype(np.float32)
COLOUR_IMAGES = GENERATOR.random((1, 2, 32, 32, 3))
NAMES = ["τ1", "$x_{$", "badly named trigger with a lot to say"]

FIGURES = {
    "matrix": lambda: plots.matrix(
        MATRIX, [f"teacher {i}" for i in range(8)], list("abcdefg"), "ASR", separate_last_row=True
    ),
    "image_grid": lambda: plots.image_grid(IMAGES, ["clean", "poisoned"], NAMES, "Triggers"),
    "colour_image_grid": lambda: plots.image_grid(COLOUR_IMAGES, [], [], ""),
    "overlay_grid": lambda: plots.overlay_grid(
        IMAGES, IMAGES[..., 0], ["teacher", "student"], NAMES, "Grad-CAM", captions=[["cat"] * 3, ["dog $"] * 3]
    ),
    "feature_map_grid": lambda: plots.feature_map_grid(
        dict.fromkeys(["clean", "student"], {"layer1": IMAGES[0, 0] * np.arange(5), "layer2": IMAGES[0, 1, :4, :4]}),
        "Features",
    ),
    "training_curves": lambda: plots.training_curves(
        {"teachers": {"loss": MATRIX, "validation_loss": MATRIX + 1}, "student": {"loss": MATRIX[0]}}, "Training"
    ),
    "score_histograms": lambda: plots.score_histograms(
        [plots.Scores("one", MATRIX.ravel(), MATRIX.ravel() > 0.7), plots.Scores("two", MATRIX.ravel(), None)], "LfD"
    ),
    "bars": lambda: plots.bars(
        NAMES, {"CDA": [0.9, 0.8, 0.7], "ASR": [0.1, None, 0.0]}, {"CDA": [0.01, None, 0.02]}, "Defenses"
    ),
}


@cache
def png_of(name: str) -> bytes:
    return plots.to_png(FIGURES[name]())


def pixels_of(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.to_png(figure))).convert("RGB"))


def texts_of(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def count_blocks(pixels: np.ndarray, colour, side: int) -> int:
    """Counts the places where a square of one colour starts."""
    same = np.all(pixels == np.asarray(colour), axis=-1)
    whole = np.lib.stride_tricks.sliding_window_view(same, (side, side)).all(axis=(2, 3))
    return int(whole.sum())


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_arrays_give_the_same_png(name):
    first = png_of(name)
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == plots.to_png(FIGURES[name]())
    image = Image.open(io.BytesIO(first))
    assert image.width > 100
    assert image.height > 100
    assert image.convert("L").getextrema()[0] < 128  # something is drawn
    assert "Creation Time" not in image.info


def test_figures_neither_depend_on_the_users_settings_nor_change_them():
    with matplotlib.rc_context({"font.size": 30, "figure.dpi": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert plots.to_png(FIGURES["bars"]()) == png_of("bars")
        assert dict(matplotlib.rcParams) == before


def test_save_is_atomic(tmp_path, monkeypatch):
    path = plots.save(FIGURES["image_grid"](), tmp_path / "triggers.png")
    before = path.read_bytes()
    assert before == png_of("image_grid")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        plots.save(FIGURES["colour_image_grid"](), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["triggers.png"]


@pytest.mark.parametrize("side", [8, 28, 32])
def test_every_image_pixel_becomes_a_square_of_whole_pixels(side):
    image = np.full((side, side, 3), 0.5)
    image[2, 5] = (1, 0, 0)
    image[side - 1, side - 1] = (0, 0, 1)
    pixels = pixels_of(plots.image_grid([[image, image]], ["a row"], ["one", "two"], "title"))
    scale = round(132 / side)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert count_blocks(pixels, colour, scale) == 2
        assert np.all(pixels == colour, axis=-1).sum() == 2 * scale * scale


def test_big_images_are_made_smaller_and_rows_may_differ_in_length():
    images = [[np.zeros((400, 800, 1))], [np.ones((400, 800, 3))] * 2]
    height, width, _ = pixels_of(plots.image_grid(images, [], [], "")).shape
    assert 2 * 128 < height < 2 * 128 + 100
    assert 2 * 256 < width < 2 * 256 + 100


def test_matrix_prints_numbers_that_can_be_read():
    values = np.array([[0.0, 1.0], [0.5, np.nan]])
    figure = plots.matrix(values, ["a", "b"], ["c", "d"], "ASR")
    assert texts_of(figure) == ["0.00", "1.00", "0.50", "–"]
    assert texts_of(plots.matrix(values, ["a", "b"], ["c", "d"], "ASR", annotate=False)) == []

    image = figure.axes[0].images[0]
    for text, value in zip(figure.axes[0].texts[:3], (0.0, 1.0, 0.5), strict=True):
        luminances = [
            float(np.dot(np.array(matplotlib.colors.to_rgb(colour)) ** 2.2, (0.2126, 0.7152, 0.0722)))
            for colour in (image.cmap(image.norm(value))[:3], text.get_color())
        ]
        contrast = (max(luminances) + 0.05) / (min(luminances) + 0.05)
        assert contrast > 4.5, (value, contrast)  # the minimum of the accessibility guidelines


def test_matrix_sets_the_last_row_apart():
    names = [["a", "b", "c"], ["d", "e"]]
    plain = plots.matrix(MATRIX[:3, :2], *names, "ASR")
    ruled = plots.matrix(MATRIX[:3, :2], *names, "ASR", separate_last_row=True)
    assert len(plain.axes[0].lines) == 0
    assert {tuple(line.get_ydata()) for line in ruled.axes[0].lines} == {(1.5, 1.5)}


def test_overlay_mixes_image_and_heat():
    image, heat = np.full((1, 1, 8, 8, 3), (1.0, 0.0, 0.0)), np.ones((1, 1, 8, 8))
    hottest = np.array(matplotlib.colormaps["inferno"](1.0)[:3])

    def centre(**options) -> np.ndarray:
        canvas = plots.overlay_grid(image, heat, [], [], "", **options).axes[0].images[0].get_array()
        return canvas[20, 20]

    np.testing.assert_allclose(centre(grey=False), 0.6 * np.array([1, 0, 0]) + 0.4 * hottest, atol=1e-6)
    np.testing.assert_allclose(centre(opacity=0.0), [0.2126] * 3, atol=1e-6)
    np.testing.assert_allclose(centre(opacity=1.0), hottest, atol=1e-6)


def test_captions_stand_in_the_figure():
    texts = texts_of(FIGURES["overlay_grid"]())
    assert texts.count("cat") == 3
    assert texts.count("dog $") == 3


def test_feature_maps_have_rows_for_stages_and_models_and_the_mean_first():
    maps = np.stack([np.eye(4), np.ones((4, 4))], axis=-1)  # the second channel is flat
    figure = plots.feature_map_grid({"clean": {"layer1": maps}, "student": {"layer1": np.nan * maps}}, "t", channels=1)
    assert texts_of(figure) == ["mean of all", "channel 0", "layer1\nclean", "layer1\nstudent"]
    canvas = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(canvas[0, 0], matplotlib.colormaps["viridis"](1.0)[:3])
    assert canvas[-1, 0].max() == 0  # a model that diverged is drawn black


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_training_curves_without_a_positive_number_are_not_logarithmic(value):
    curves = {"lost": {"loss": np.full((2, 3), value)}, "student": {"loss": np.array([1.0, 0.1])}}
    figure = plots.training_curves(curves, log_scale=True)
    figure.canvas.draw()
    assert [panel.get_yscale() for panel in figure.axes] == ["linear", "log"]


def test_training_curves_draw_mean_and_range_in_spite_of_a_lost_member():
    losses = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [np.nan, np.nan, np.nan]])
    figure = plots.training_curves({"teachers": {"loss": losses}, "student": {"loss": losses[0]}})
    teachers, student = figure.axes
    np.testing.assert_allclose(teachers.lines[0].get_ydata(), [2, 2, 2])
    band = teachers.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 3)
    assert not student.collections
    assert "3 members" in teachers.get_title(loc="left")
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [3, 3]


def test_bars_show_values_and_errors():
    figure = FIGURES["bars"]()
    axes = figure.axes[0]
    assert [round(float(bar.get_width()), 3) for bar in axes.patches] == [0.9, 0.8, 0.7, 0.1, 0.0, 0.0]
    assert texts_of(figure) == ["0.900", "0.800", "0.700", "0.100", "–", "0.000"]
    error_bars = [container for container in axes.containers if "Errorbar" in type(container).__name__]
    segments = [segment for container in error_bars for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose([segment[:, 0] for segment in segments], [[0.89, 0.91], [0.68, 0.72]])


def test_a_long_title_stays_inside_a_narrow_figure():
    figure = plots.matrix([[0.5]], ["a"], ["b"], "attack success of one model under one trigger, " * 3)
    plots.to_png(figure)
    assert figure.get_suptitle().count("\n") == 2
    extent = figure.texts[0].get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
    assert pixels_of(figure)[:4].min() == 255  # nor is it cut off above


def test_names_in_scripts_the_font_lacks_are_no_reason_to_stop():
    for figure in (
        plots.image_grid(IMAGES[:, :1], ["猫", "\x1b[31m"], ["犬"], "漢字"),
        plots.bars(["猫", "b"], {"CDA": [0.5, 0.5]}, title="犬"),
    ):
        assert plots.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.matrix(MATRIX, ["a"], ["b"], "t"), r"shape \(8, 7\); it must have shape \(1, 1\)"),
        (lambda: plots.matrix(MATRIX[:1, :1] + 1, ["a"], ["b"], "t"), r"must lie in 0\.\.1"),
        (lambda: plots.image_grid([[np.zeros((8, 8, 2))]], [], [], "t"), r"must be \[height, width, 1 or 3\]"),
        (lambda: plots.image_grid(IMAGES * 255, [], [], "t"), r"images ranges from .* must lie in 0\.\.1"),
        (lambda: plots.image_grid(IMAGES * np.nan, [], [], "t"), "images has NaN"),
        (lambda: plots.image_grid([], [], [], "t"), "images is empty"),
        (lambda: plots.image_grid(IMAGES, ["a"], [], "t"), "row_names has shape"),
        (lambda: plots.image_grid(IMAGES, [], ["a"], "t"), "column_names has shape"),
        (
            lambda: plots.image_grid(IMAGES, [], [], "t", captions=[["a"]]),
            r"captions has rows of lengths \[1\], images \[3, 3\]",
        ),
        (lambda: plots.overlay_grid(IMAGES, IMAGES[:1, ..., 0], [], [], "t"), "heat_maps has 1 rows, images has 2"),
        (lambda: plots.overlay_grid(IMAGES, IMAGES[..., :4, 0], [], [], "t"), "a heat map has shape"),
        (lambda: plots.bars(["a"], {"CDA": [0.1, 0.2]}), "CDA has shape"),
        (
            lambda: plots.feature_map_grid({"a": {"x": IMAGES[0, 0]}, "b": {"y": IMAGES[0, 0]}}, "t"),
            r"model 'b' has stages \['y'\]",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_trade_off_has_a_mark_for_each_attack_and_a_large_one_for_their_mean():
    accuracy = np.array([[0.9, 0.8, 0.7], [0.9, 0.9, np.nan]])
    success = np.array([[1.0, 0.8, 0.6], [0.0, 0.2, np.nan]])
    figure = plots.trade_off(["none", "lfd"], accuracy, success)
    axes = figure.axes[0]
    drawn = [np.asarray(marks.get_offsets()) for marks in axes.collections]
    np.testing.assert_allclose(drawn[0], np.stack([success[0], accuracy[0]], -1))
    # The third attack is not one that both have, so it is in no mean.
    np.testing.assert_allclose(drawn[1], [[0.9, 0.85]])
    np.testing.assert_allclose(drawn[2], [[0.0, 0.9], [0.2, 0.9]])
    np.testing.assert_allclose(drawn[3], [[0.1, 0.9]])
    assert np.diff(axes.get_ylim())[0] >= 0.2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "lfd"]
    assert plots.to_png(figure) == plots.to_png(plots.trade_off(["none", "lfd"], accuracy, success))


def test_trade_off_without_a_common_attack_has_no_means():
    figure = plots.trade_off(
        ["a", "b"], np.array([[0.9, np.nan], [np.nan, 0.9]]), np.array([[0.1, np.nan], [np.nan, 0.1]])
    )
    assert len(figure.axes[0].collections) == 2 and not figure.legends


def heights(axes):
    return [steps.get_data().values for steps in axes.patches]


def test_histograms_are_shares_of_each_group_outliers_included():
    scores = np.concatenate([np.linspace(0, 1, 300), [1e6], np.linspace(2, 3, 20)])
    is_poisoned = np.arange(321) >= 301
    figure = plots.score_histograms(
        [plots.Scores("one", scores, is_poisoned), plots.Scores("two", scores, None)], "LfD", bins=10
    )
    first, second = figure.axes
    assert [sum(shares) for shares in heights(first)] == [pytest.approx(1)] * 2 and len(first.patches) == 2
    assert first.get_xlim()[1] < 4 and len(second.patches) == 1
    assert heights(first)[1][:5].sum() == 0 and sum(heights(second)[0]) == pytest.approx(1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "poisoned", "rows"]


def test_histograms_of_scores_that_are_all_alike_and_of_clean_sets():
    panel = plots.Scores("clean", np.ones(5), np.zeros(5, bool))
    figure = plots.score_histograms([panel])
    assert sum(heights(figure.axes[0])[0]) == pytest.approx(1) and len(figure.axes[0].patches) == 1
