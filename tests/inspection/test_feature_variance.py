import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.inspection.feature_variance import (
    Variances,
    compare,
    describe,
    describe_triggered,
    last_place,
    measure_beside_clean,
    measure_variances,
    row_variances,
)
from bdjax.run.log import StageLog
from bdjax.training.ensemble import init_members, members, stack
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, GroupEnd, Model, ModelOutput
from tests.defenses.tiny import SHAPE, TINY, tiny_variables

IMAGES = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)


def test_every_network_is_measured_on_its_images(tmp_path):
    variables = stack([tiny_variables(seed) for seed in range(2)])
    runner = StageRunner(tmp_path, SHAPE, "map", StageLog())
    groups_of = jax.jit(lambda variables, images: TINY.apply(variables, images, train=False).groups)
    separate = np.stack([IMAGES, 255 - IMAGES])
    shared, on_separate = (measure_variances(runner, TINY, variables, images, 2) for images in (IMAGES, separate))
    assert len(shared) == len(on_separate) == 2
    for member in range(2):
        for found, images in ((shared, IMAGES), (on_separate, separate[member])):
            groups = groups_of(tiny_variables(member), images / np.float32(255))
            assert set(found[member]) == {f"group{i}{end}" for i in (1, 2, 3) for end in ("", " before ReLU")}
            for group, end in groups.items():
                for place, values in ((group, end.output), (f"{group} before ReLU", end.before_relu)):
                    expected = [np.var(row, dtype=np.float64) for row in np.asarray(values)]
                    np.testing.assert_allclose(found[member][place], expected, rtol=1e-4)
    assert not np.allclose(shared[0]["group3"], shared[1]["group3"])


def network(groups):
    return Model(None, lambda variables, images, train: ModelOutput(None, {}, {}, groups(images)), 2, "toy")


def test_by_hand():
    def groups(images):
        return {"group1": GroupEnd(images, 3.0 * images, None, None)}

    images = jnp.asarray([[0.0, 1.0, 0.0, 1.0], [0.5] * 4, [0.0, 0.0, 0.0, 1.0]]).reshape(3, 2, 2, 1)
    variances = jax.jit(row_variances(network(groups)))({}, images, {})
    np.testing.assert_allclose(variances["group1"], [0.25, 0.0, 0.1875])
    np.testing.assert_allclose(variances["group1 before ReLU"], [2.25, 0.0, 1.6875])
    with pytest.raises(
        InputError, match="^toy has no groups to measure features of; use a WRN, a ResNet or a PyramidNet$"
    ):
        row_variances(network(lambda images: {}))({}, images, {})


def test_the_last_place():
    assert last_place(["group1", "group1 before ReLU", "group10", "group2", "group9 before ReLU"]) == "group10"


def of_mean(kind, seed, mean, is_attacked=True, triggered=None, reference_triggered=None, spread=0.5):
    """A network whose variances of 4 images have this mean."""
    around = np.array([-1.0, -0.5, 0.5, 1.0]) * spread * (mean if np.isfinite(mean) else 1.0)

    def at(value):
        return (
            None
            if value is None
            else {"group1": np.zeros(4), "group3": np.where(np.isfinite(value), value + around, value)}
        )

    return Variances(kind, seed, is_attacked, at(mean), at(triggered), at(reference_triggered))


def clean(*means, kind="clean"):
    return [of_mean(kind, seed, mean, is_attacked=False) for seed, mean in enumerate(means)]


def test_ratios_are_to_the_clean_network_of_the_same_seed():
    found = compare(
        [
            *clean(1.0, 10.0),
            of_mean("a", 0, 1.5, triggered=3.0, reference_triggered=1.1),
            of_mean("a", 1, 9.0, triggered=9.9, reference_triggered=12.0),
            of_mean("b", 1, 14.0),
        ]
    )
    assert found["place"] == "group3" and found["images"] == 4
    assert [kind["kind"] for kind in found["kinds"]] == ["clean", "a", "b"]
    kind = found["kinds"][1]
    assert kind["seeds"] == [0, 1] and kind["is_attacked"]
    np.testing.assert_allclose(kind["mean_variance"], [1.5, 9.0])
    np.testing.assert_allclose(kind["ratio"], [1.5, 0.9])
    np.testing.assert_allclose(kind["triggered_ratio"], [2.0, 1.1])
    np.testing.assert_allclose(kind["reference_triggered_ratio"], [1.1, 1.2])
    assert found["kinds"][2]["triggered_ratio"] is None
    assert (found["networks"], found["larger"], found["as_claimed"], found["left_out"]) == (3, 2, 2, 0)
    np.testing.assert_allclose(
        [found["mean_ratio"], found["smallest_ratio"], found["largest_ratio"]], [3.8 / 3, 0.9, 1.5]
    )
    # Of the 6 pairs of an attacked and a clean network, 1.5 > 1, 9 > 1, 14 > 1 and 14 > 10 are above.
    assert found["auc_networks"] == pytest.approx(4 / 6)
    assert json.loads(json.dumps(found)) == found


def test_the_auc_of_images_is_over_all_images_of_all_networks():
    found = compare([*clean(1.0), of_mean("a", 0, 1.1)])
    ones, others = np.array([0.5, 0.75, 1.25, 1.5]), 1.1 * np.array([0.5, 0.75, 1.25, 1.5])
    assert found["auc_images"] == pytest.approx(np.mean(others[:, None] > ones)) and found["auc_networks"] == 1.0
    assert compare([*clean(1.0), of_mean("a", 0, 1.0)])["auc_images"] == 0.5


@pytest.mark.parametrize(("seeds", "p"), [(4, None), (5, 1 / 32), (6, 1 / 64)])
def test_the_p_value_counts_signs_of_seeds(seeds, p):
    """Two attacks of one seed are one observation."""
    larger = [of_mean(kind, seed, 1.1 + 0.01 * seed) for kind in ("a", "b") for seed in range(seeds)]
    found = compare([*clean(*[1.0] * seeds), *larger])
    assert found["p_larger"] == (None if p is None else pytest.approx(p)) and found["seeds"] == seeds
    smaller = [network._replace(clean={"group3": 0.5 * network.clean["group3"]}) for network in larger]
    if p is not None:
        assert compare([*clean(*[1.0] * seeds), *smaller], "group3")["p_larger"] == pytest.approx(1.0)


def test_networks_that_diverged_are_left_out_and_counted():
    broken = of_mean("a", 0, np.nan)
    found = compare([*clean(1.0, np.inf, 0.0), broken, *(of_mean("a", seed, 2.0) for seed in (0, 1, 2))])
    assert found["left_out"] == 5 and found["networks"] == 1 and found["mean_ratio"] == 2.0
    nothing = compare([*clean(np.nan), of_mean("a", 0, 1.0)])
    assert nothing["networks"] == 0 and nothing["mean_ratio"] is None and nothing["auc_networks"] is None
    assert describe(nothing) == "Not measured: there is no backdoored network with a clean network of the same seed."
    assert describe(compare(clean(1.0))).startswith("Not measured: ")


@pytest.mark.parametrize(
    ("means", "trained_on", "verdict"),
    [
        ((1.3, 2.0), (1.0, 1.1), "Yes: 2 of 2 "),
        ((1.3, 2.0), (), "Yes: 2 of 2 "),
        ((1.3, 2.0), (1.0, 1.4), "In part: 2 of 2 "),  # the increase comes without an attack too
        ((1.01, 2.0), (), "In part: 2 of 2 "),
        ((0.99, 2.0), (), "No: 1 of 2 "),
        ((0.5, 0.6), (), "No: 0 of 2 "),
    ],
)
def test_the_verdict_in_words(means, trained_on, verdict):
    measured = [*clean(1.0, 1.0), *(of_mean("a", seed, mean) for seed, mean in enumerate(means))]
    assert describe(compare([*measured, *clean(*trained_on, kind="trained on")])).startswith(verdict)


def test_the_whole_description():
    measured = [*clean(1.0, 1.0), of_mean("a", 0, 1.4), of_mean("a", 1, 0.8), *clean(1.1, 1.3, kind="trained on")]
    assert describe(compare(measured)) == (
        "No: 1 of 2 backdoored networks have a larger feature variance than the clean network of the same seed, 1 of them "
        "by the 30 % or more that the paper reports for all; the mean ratio is 1.10 (0.80 to 1.40). Clean networks that were "
        "only trained for longer have a ratio of 1.20 (1.10 to 1.30). The probability that a backdoored network's variance is "
        "above that of a network without a backdoor is 0.50 (0.5 would be chance)."
    )
    attacked = [of_mean("a", seed, 2.0) for seed in range(5)]
    assert describe(compare([*clean(*[1.0] * 5), *attacked])).endswith("; p = 0.031 over 5 seeds.")


def test_the_description_of_triggers():
    measured = [*clean(1.0), of_mean("a", 0, 2.0, triggered=3.0, reference_triggered=1.2)]
    assert describe_triggered(compare(measured)) == (
        "A trigger changes the variance of the attacked network's features by a factor of 1.50 (1.50 to 1.50), and that of "
        "the clean network's by 1.20 (1.20 to 1.20). A defender who does not know the trigger cannot see this."
    )
    assert "clean network" not in describe_triggered(compare([*clean(1.0), of_mean("a", 0, 2.0, triggered=3.0)]))
    assert describe_triggered(compare([*clean(1.0), of_mean("a", 0, 2.0)])) == ""


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


def test_networks_are_measured_beside_clean_ones_that_were_trained_on(tmp_path):
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
    # The third network is backdoored, of the second seed; its trigger makes images black.
    attacked, triggered = members(networks, slice(2, 3)), [np.zeros_like(test.images)]
    recipe = TrainConfig(1, 32, 30, 1e-2)
    measured = measure_beside_clean(
        jax.random.key(1), runner, [("LBA", 1)], attacked, test.images, triggered, clean, recipe, train, 30
    )
    found = compare(measured)
    assert [(kind["kind"], kind["seeds"]) for kind in found["kinds"]] == [
        ("clean", [0, 1]),
        ("clean, trained on", [0, 1]),
        ("LBA", [1]),
    ]
    assert found["images"] == 30 and found["place"] == "group1"
    expected = measure_variances(runner, model, networks, test.images, 30)
    variances = [float(np.mean(places["group1"])) for places in expected]
    np.testing.assert_allclose(found["kinds"][0]["mean_variance"], variances[:2], rtol=1e-5)
    np.testing.assert_allclose(found["kinds"][2]["ratio"], [variances[2] / variances[1]], rtol=1e-5)
    assert np.abs(np.array(found["kinds"][1]["ratio"]) - 1).min() > 1e-3  # a step changes something
    black = measure_variances(runner, model, networks, np.zeros_like(test.images[:1]), 30)
    of_black = [float(places["group1"][0]) for places in black]
    np.testing.assert_allclose(found["kinds"][2]["triggered_ratio"], [of_black[2] / variances[2]], rtol=1e-5)
    np.testing.assert_allclose(found["kinds"][2]["reference_triggered_ratio"], [of_black[1] / variances[1]], rtol=1e-5)
