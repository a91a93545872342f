from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.inspection.grad_cam import grad_cam
from bdjax.testing.tiny_network import make_tiny
from bdjax.types import Model, ModelOutput
from tests.defenses.tiny import SHAPE, TINY, tiny_variables


def linear_model(num_classes: int = 2) -> Model:
    """Features are the image averaged over blocks of 2 x 2, logits any linear function of them."""

    def apply(variables, images, *, train, edits=None):
        assert not train
        rows, height, width, channels = images.shape
        features = images.reshape(rows, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        if edits:
            features = edits["stage3"](features)
        logits = jnp.einsum("nhwc,khwc->nk", features, variables["readout"]) + variables["bias"][None, :]
        return ModelOutput(logits, {"stage3": features}, variables)

    return Model(lambda key, image_shape: None, apply, num_classes, "linear")


LINEAR = linear_model()
# Averages over positions: class 0 weights the two channels by (2, -1), class 1 by (-1, 0.5).
READOUT = jnp.array(
    [
        [[[4.0, -1.0], [0.0, -1.0]], [[1.0, 0.0], [3.0, -2.0]]],
        [[[-1.0, 0.5], [-1.0, 0.5]], [[-2.0, 2.0], [0.0, -1.0]]],
    ]
)
LINEAR_VARIABLES = {"readout": READOUT, "bias": jnp.array([0.0, 0.0])}
BLOCKS = np.array([[[0.5, 0.0], [0.5, 0.5]], [[0.0, 0.5], [1.0, 0.5]]], np.float32)  # [2, 2, c]
IMAGE = jnp.asarray(BLOCKS.repeat(2, axis=0).repeat(2, axis=1))  # [4, 4, 2]


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, dict]:
    return TINY, tiny_variables(0)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (3, *SHAPE))


def heat_by_numpy(features: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    heat = np.maximum(np.einsum("nhwc,nc->nhw", features, weights), 0)
    heat = np.asarray(jax.image.resize(jnp.asarray(heat, jnp.float32), (len(heat), size, size), "bilinear"))
    low, high = heat.min((1, 2), keepdims=True), heat.max((1, 2), keepdims=True)
    return np.where(high > low, (heat - low) / np.where(high > low, high - low, 1), 0)


# Class 0: 2 a - b is [[1, 0.5], [-0.5 -> 0, 1.5]]. Bilinear to 4 x 4: the corners keep their values, in between by quarters
# of the way; all of it divided by 1.5, with a minimum of 0.
ROWS_0 = np.array([[1.0, 0.875, 0.625, 0.5], [0.0, 0.375, 1.125, 1.5]]) / 1.5
GOLDEN_0 = np.array([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]) @ ROWS_0
# Class 1: -a + b / 2 is [[-0.5, -0.25], [0.25, -0.75]]: only the block at the lower left supports it.
GOLDEN_1 = np.outer([0.0, 0.25, 0.75, 1.0], [1.0, 0.75, 0.25, 0.0])


@pytest.mark.parametrize(("explained", "golden"), [(0, GOLDEN_0), (1, GOLDEN_1)])
def test_closed_form_of_a_linear_model(explained, golden):
    heat_maps, classes = grad_cam(LINEAR, LINEAR_VARIABLES, IMAGE[None], jnp.array([explained]))
    assert heat_maps.dtype == jnp.float32
    assert classes.dtype == jnp.int32
    np.testing.assert_array_equal(classes, [explained])
    np.testing.assert_allclose(heat_maps, golden[None], atol=1e-6)


def test_without_classes_the_predicted_ones_are_explained():
    batch = jnp.stack([IMAGE, IMAGE])
    for bias, predicted in (([9.0, 0.0], 0), ([0.0, 9.0], 1)):
        variables = {**LINEAR_VARIABLES, "bias": jnp.array(bias)}
        heat_maps, classes = grad_cam(LINEAR, variables, batch)
        np.testing.assert_array_equal(classes, [predicted, predicted])
        expected, _ = grad_cam(LINEAR, variables, batch, predicted)  # one class for all rows
        np.testing.assert_array_equal(heat_maps, expected)


def test_each_row_has_its_own_class():
    heat_maps, classes = grad_cam(LINEAR, LINEAR_VARIABLES, jnp.stack([IMAGE, IMAGE]), np.array([1, 0]))
    np.testing.assert_array_equal(classes, [1, 0])
    np.testing.assert_allclose(heat_maps, np.stack([GOLDEN_1, GOLDEN_0]), atol=1e-6)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (jnp.zeros_like(IMAGE), "no features"),
        (jnp.ones_like(IMAGE) * jnp.array([0.0, 0.7])[None, None], "all features are against the class"),
        (jnp.ones_like(IMAGE) * jnp.array([0.7, 0.1])[None, None], "all features support it equally"),
        (jnp.full_like(IMAGE, jnp.nan), "a network that diverged"),
    ],
)
def test_maps_that_show_nothing_are_0(image, reason):
    heat_maps, _ = grad_cam(LINEAR, LINEAR_VARIABLES, image[None], 0)
    np.testing.assert_array_equal(heat_maps, np.zeros((1, 4, 4)), err_msg=reason)


def test_it_is_the_older_class_activation_map_where_pooling_and_a_matrix_follow(images):
    model = make_tiny(4)
    variables = jax.jit(model.init, static_argnums=1)(jax.random.key(0), SHAPE)
    heat_maps, classes = grad_cam(model, variables, images, tap="stage1")
    output = jax.jit(partial(model.apply, train=False))(variables, images)
    np.testing.assert_array_equal(classes, np.argmax(output.logits, axis=1))
    features = np.asarray(output.features["stage1"])
    weights = np.asarray(variables["params"]["classifier"]["kernel"]).T[classes] / (8 * 8)
    np.testing.assert_allclose(heat_maps, heat_by_numpy(features, weights, 8), atol=1e-5)


def test_finite_differences(tiny, images):
    model, variables = tiny
    tap, positions = "stage2", 16  # 4x4 pixels
    explained, step = 2, 2e-3
    features = jax.jit(partial(model.apply, train=False))(variables, images).features[tap]

    @jax.jit
    def logit(shift):  # [c], added at every position: its derivative is the sum that the weight is the mean of
        edits = {tap: lambda before: before + shift[None, None, None]}
        return model.apply(variables, images, train=False, edits=edits).logits[:, explained]

    steps = step * jnp.eye(features.shape[-1])
    sums = np.stack([np.asarray((logit(up) - logit(-up)) / (2 * step)) for up in steps], axis=1)
    expected = heat_by_numpy(np.asarray(features), sums / positions, 8)
    assert expected.max() == 1
    heat_maps, _ = grad_cam(model, variables, images, explained, tap=tap)
    np.testing.assert_allclose(heat_maps, expected, atol=5e-3)


def test_maps_lie_in_0_to_1_and_reach_both_unless_they_are_0(tiny, images):
    model, variables = tiny
    for explained in range(4):
        heat_maps, classes = grad_cam(model, variables, images, explained)
        assert heat_maps.shape == (3, 8, 8)
        np.testing.assert_array_equal(classes, [explained] * 3)
        for heat in np.asarray(heat_maps):
            assert heat.min() == 0
            assert heat.max() <= 1
            assert heat.max() == pytest.approx(1, abs=1e-6) or not heat.any()
        assert heat_maps.any()


def test_a_map_does_not_depend_on_the_other_rows(tiny, images):
    model, variables = tiny
    together, _ = grad_cam(model, variables, images, 1)
    swapped, _ = grad_cam(model, variables, images[::-1], 1)
    np.testing.assert_allclose(swapped[::-1], together, atol=1e-5)
    spoiled, _ = grad_cam(model, variables, images.at[1:].set(0.0), 1)
    np.testing.assert_allclose(spoiled[0], together[0], atol=1e-5)


def test_it_can_be_part_of_a_compiled_function():
    heat_maps, classes = jax.jit(lambda variables, images: grad_cam(LINEAR, variables, images))(
        LINEAR_VARIABLES, IMAGE[None]
    )
    np.testing.assert_array_equal(classes, [0])
    np.testing.assert_allclose(heat_maps, GOLDEN_0[None], atol=1e-6)


def test_one_compilation_per_model_and_number_of_rows():
    calls = []

    def counted(*arguments, **options):
        calls.append(None)
        return LINEAR.apply(*arguments, **options)

    model = LINEAR._replace(apply=counted)
    grad_cam(model, LINEAR_VARIABLES, IMAGE[None], jnp.array([0]))
    traced = len(calls)
    grad_cam(model, {**LINEAR_VARIABLES, "bias": jnp.ones(2)}, 1.0 - IMAGE[None], jnp.array([1]))
    assert len(calls) == traced


def test_an_unknown_tap_is_named_with_the_known_ones(tiny, images):
    model, variables = tiny
    with pytest.raises(ValueError, match="no tap 'layer4'; this network has stage1, stage2, stage3"):
        grad_cam(model, variables, images, tap="layer4")
