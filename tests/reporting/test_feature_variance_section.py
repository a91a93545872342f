import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.evaluation.measure import TriggeredViews
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import read_attack
from bdjax.inspection.feature_variance import Measured, compare, measure_variances
from bdjax.reporting.feature_variance import kinds_table, of_suspects, places_table, section, variance_figure
from bdjax.reporting.plots import to_png
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.training.ensemble import init_members, members
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, GroupEnd, Model, ModelOutput


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
    (one,), results = section(RunFolder(tmp_path, True), MEASURED)
    assert "Yes: 2 of 2 backdoored networks" in one.text and "factor of" in one.text
    assert one.figures[0].image.read_bytes().startswith(b"\x89PNG") and len(one.tables) == 2
    assert results["place"] == "group2" and list(results["places"]) == ["group2 before ReLU"]
    json.dumps(results, allow_nan=False)


def test_no_section_without_an_attacked_network(tmp_path):
    sections, results = section(RunFolder(tmp_path, True), MEASURED[:4])
    assert sections == () and results["networks"] == 0 and not list(tmp_path.iterdir())


def toy() -> Model:
    """A linear network of one group: what it hands on are the images times its scale."""

    def init(key, image_shape):
        size = int(np.prod(image_shape))
        scale, weights = jax.random.split(key)
        params = {"scale": jax.random.uniform(scale, (), minval=1.0, maxval=3.0)}
        return {"params": params | {"weights": jax.random.normal(weights, (size, 3))}, "batch_stats": {}}

    def apply(variables, images, *, train, edits=None):
        params = variables["params"]
        output = params["scale"] * images
        logits = output.reshape(len(images), -1) @ params["weights"]
        groups = {"group1": GroupEnd(output, -output, jnp.zeros(1), jnp.ones(1))}
        return ModelOutput(logits, {}, variables, groups)

    return Model(init, apply, 3, "toy")


def test_suspects_are_measured_beside_clean_networks_that_were_trained_on(tmp_path):
    random = np.random.default_rng(0)
    train, test = (
        Dataset(
            random.integers(0, 256, (count, 8, 8, 1), np.uint8), (np.arange(count) % 3).astype(np.int32), 3, "toy", ""
        )
        for count in (64, 30)
    )
    model = toy()
    runner = StageRunner(tmp_path / "checkpoints", train.image_shape, "map", StageLog())
    networks = init_members(lambda key: model.init(key, train.image_shape), jax.random.split(jax.random.key(0), 3))
    clean = Nets(model, members(networks, slice(0, 2)), 1, {})
    attack = read_attack("badnets", train, 0)
    nothing = Suspect(read_attack("none", train, 0), 0, train, (), None)
    # The third network is backdoored, of the second seed; its trigger makes images black.
    suspects = [nothing, Suspect(attack, 1, train, (), None)]
    views = TriggeredViews(test, ((), (np.zeros_like(test.images),)))
    recipe = TrainConfig(1, 32, 30, 1e-2)
    variables = members(networks, np.array([0, 2]))
    arguments = (runner, suspects, variables, clean, recipe, train, views, 30)
    (one,) = of_suspects(jax.random.key(1), RunFolder(tmp_path, True), *arguments)
    found = json.loads((tmp_path / "feature_variance.json").read_text())
    assert [(kind["kind"], kind["seeds"]) for kind in found["kinds"]] == [
        ("clean", [0, 1]),
        ("clean, trained on", [0, 1]),
        (attack.title, [1]),
    ]
    assert found["images"] == 30 and found["place"] == "group1"
    expected = measure_variances(runner, model, networks, test.images, 30)
    variances = [float(np.mean(each["group1"])) for each in expected]
    np.testing.assert_allclose(found["kinds"][0]["mean_variance"], variances[:2], rtol=1e-5)
    np.testing.assert_allclose(found["kinds"][2]["ratio"], [variances[2] / variances[1]], rtol=1e-5)
    assert np.abs(np.array(found["kinds"][1]["ratio"]) - 1).min() > 1e-3  # a step changes something
    black = measure_variances(runner, model, networks, np.zeros_like(test.images[:1]), 30)
    of_black = [float(each["group1"][0]) for each in black]
    np.testing.assert_allclose(found["kinds"][2]["triggered_ratio"], [of_black[2] / variances[2]], rtol=1e-5)
    np.testing.assert_allclose(found["kinds"][2]["reference_triggered_ratio"], [of_black[1] / variances[1]], rtol=1e-5)
    assert one.title == "Feature variance"
    assert (
        of_suspects(
            jax.random.key(1),
            RunFolder(tmp_path, True),
            runner,
            [nothing],
            *arguments[2:-2],
            TriggeredViews(test, ((),)),
            30,
        )
        == ()
    )
