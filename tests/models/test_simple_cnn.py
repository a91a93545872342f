from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bdjax.models import MODELS, count_parameters, embedding, make_model, simple_cnn
from bdjax.models.facade import as_model
from bdjax.models.simple_cnn import (
    LAYERS,
    ConvKernel,
    SimpleCNN,
    images_at_once,
    last_layer,
    make_pattern_detector,
    network_name,
    read_layers,
)

K = 3


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


class TestNames:
    def test_layers(self):
        assert read_layers("64P") == ((64, True),)
        assert read_layers("10-10P") == ((10, False), (10, True))
        assert read_layers("8P-4-16P") == ((8, True), (4, False), (16, True))

    @pytest.mark.parametrize("text", ["", "P", "0P", "-4", "4-", "4PP", "4p", "P4", "4-x", "4,4P", "-4P", "4.5", "²P"])
    def test_what_is_no_network(self, text):
        with pytest.raises(ValueError, match="^[^\n]* is not a number of channels"):
            read_layers(text)

    def test_every_name_is_a_model_of_those_layers(self):
        assert network_name("10-10P") == "vbd_10_10p"
        for layers in LAYERS:
            module = MODELS[network_name(layers)](K, 64, "native", "float32")
            assert module.layers == read_layers(layers) and module.normalise


@pytest.mark.parametrize(
    ("layers", "counts"),
    [
        ("64P", (145_866, 12_302_856, 108_874, 6_474)),
        ("10-10P", (20_820, 1_801_410, 15_440, 1_440)),
        ("16-16P", (34_170, 2_883_000, 25_562, 3_162)),
        (None, (8_065, 31_617, 5_697, 577)),  # the detector, one logit whatever the classes
    ],
)
def test_parameters_of_the_paper(layers, counts):
    shapes = ((32, 32, 3), 10), ((64, 64, 3), 200), ((28, 28, 1), 10), ((8, 8, 1), 10)
    for (shape, classes), expected in zip(shapes, counts, strict=True):
        model = make_model(network_name(layers), classes) if layers else make_pattern_detector()
        assert count_parameters(model, shape) == expected, shape


def test_weights_start_as_in_pytorch():
    """Uniform in ±1/sqrt(fan in), the default of PyTorch's layers, whichever way the first layer is computed."""
    for lowering in ("shifted", "native"):
        network = make_model("vbd_16_16p", 10, lowering=lowering)
        params = jax.jit(lambda key, init=network.init: init(key, (32, 32, 3))["params"])(jax.random.key(0))
        for name, fan_in in (("stage1_conv", 27), ("stage2_conv", 144), ("classifier", 16 * 14 * 14)):
            kernel = np.asarray(params[name]["kernel"]) * fan_in**0.5
            assert 0.98 < np.abs(kernel).max() <= 1, name
            np.testing.assert_allclose(kernel.std(), 3**-0.5, rtol=0.05)
        assert np.abs(params["classifier"]["bias"]).max() <= (16 * 14 * 14) ** -0.5


# ---- The first layer, a few images at a time ------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def small_groups():
    """Groups of eight of these small images, as of larger ones otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simple_cnn, "PIXELS_AT_ONCE", 8 * 8 * 8)
        yield


@pytest.mark.parametrize(("size", "expected"), [((8, 8), 8), ((4, 4), 32), ((8, 9), 4), ((100, 100), 1), ((2, 3), 40)])
def test_groups_shrink_with_the_images(size, expected):
    assert images_at_once(40, *size) == expected


@cache
def model_of(layers, lowering, normalise=True):
    return as_model(SimpleCNN(read_layers(layers), K, lowering, normalise=normalise), K, layers)


@cache
def variables_of(layers, channels, normalise=True, size=(8, 8)):
    """Random parameters and statistics, so that nothing is neutral."""
    init = model_of(layers, "native", normalise).init
    shapes = jax.eval_shape(lambda key: init(key, (*size, channels)), jax.random.key(0))
    random = np.random.default_rng(1)

    def draw_leaf(path, leaf):
        noise = random.standard_normal(leaf.shape)
        noise = np.exp(0.3 * noise) if path[-1].key in ("scale", "variance") else 0.3 * noise
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw_leaf, shapes)


@cache
def differentiated(layers, lowering, train, normalise=True):
    """(variables, images) -> output and the gradients of a sum of squares with a different weight for every row."""
    model = model_of(layers, lowering, normalise)

    @jax.jit
    def run(variables, images):
        def loss(params, images):
            output = model.apply({**variables, "params": params}, images, train=train)
            weight = 1 + jnp.arange(len(images), dtype=jnp.float32)[:, None] / len(images)
            return jnp.mean(weight * jnp.square(output.logits)), output

        gradients, output = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], images)
        return output, gradients

    return run


def assert_same(layers, variables, images, train, normalise=True, rtol=1e-3):
    """Logits, taps, variables and gradients, each leaf to a thousandth of its largest entry."""
    found, exact = (
        differentiated(layers, lowering, train, normalise)(variables, images) for lowering in ("shifted", "native")
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, exact)
    for (path, values), expected in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True
    ):
        atol = rtol * max(float(np.abs(expected).max()), 1e-6)
        np.testing.assert_allclose(values, expected, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
    return found


@pytest.mark.parametrize(
    ("layers", "channels", "count", "train"),
    [*(("4P", 1, count, True) for count in (1, 11)), ("3-2P", 3, 16, True), ("3-2P", 3, 11, False)],
)
def test_a_few_images_at_a_time_is_layer_after_layer(layers, channels, count, train):
    assert images_at_once(count, 8, 8) == min(8, count)  # so these are part of a group, more than one, and two
    variables = variables_of(layers, channels)
    output, _ = assert_same(layers, variables, draw(count, count, 8, 8, channels), train)
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(output.variables["batch_stats"]), strict=True
    ):
        assert bool(np.all(old == new)) is not train
    chex.assert_trees_all_equal(output.variables["params"], variables["params"])


def test_without_normalisation():
    output, _ = assert_same("5P", variables_of("5P", 2, False), draw(0, 21, 8, 8, 2), True, False)
    assert output.variables["batch_stats"] == {}


def test_images_of_odd_sides():
    assert_same("4P", variables_of("4P", 1, size=(11, 7)), draw(0, 21, 11, 7, 1), True)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_bright_images_of_little_contrast(level):
    # The mean square of the maps is thousands of times their variance here, so that a product in float32 that is rounded
    # more coarsely, as some processors and settings have it, would show. The order of its sums alone makes up to 6e-3.
    images = level + 0.02 * draw(3, 32, 8, 8, 1)
    assert_same("4P", variables_of("4P", 1), images, True, rtol=1.5e-2)


def test_statistics_are_those_of_the_maps_written_out():
    layers, images = "4P", draw(4, 21, 8, 8, 1)
    variables = variables_of(layers, 1)
    output, _ = differentiated(layers, "shifted", True)(variables, images)
    after = output.variables["batch_stats"]["stage1_norm"]
    kernel = np.asarray(variables["params"]["stage1_conv"]["kernel"], np.float64)
    near = np.lib.stride_tricks.sliding_window_view(np.asarray(images[..., 0], np.float64), (3, 3), (1, 2))
    maps = np.einsum("nhwij,ijo->nhwo", near, kernel[:, :, 0])
    before = variables["batch_stats"]["stage1_norm"]
    for name, now in (("mean", maps.mean((0, 1, 2))), ("variance", maps.var((0, 1, 2), ddof=1))):
        np.testing.assert_allclose(after[name], 0.9 * np.asarray(before[name]) + 0.1 * now, rtol=1e-4)


def test_an_image_does_not_see_its_neighbours_when_evaluated():
    model, variables, images = model_of("3-2P", "shifted"), variables_of("3-2P", 3), draw(5, 21, 8, 8, 3)
    run = jax.jit(lambda images: model.apply(variables, images, train=False).logits)
    others = np.asarray(images)[::-1]  # the tenth image stays where it is
    np.testing.assert_allclose(run(images)[10], run(others)[10], rtol=1e-4, atol=1e-5)
    assert np.abs(run(images)[9] - run(others)[9]).max() > 1e-3


def test_the_kernel_starts_alike_in_both_forms():
    @jax.jit
    def init(key):
        models = [make_model("vbd_64p", K, lowering=lowering) for lowering in ("shifted", "native")]
        return [model.init(key, (8, 8, 3))["params"]["stage1_conv"]["kernel"] for model in models]

    shifted, native = init(jax.random.key(3))
    np.testing.assert_array_equal(shifted, native)
    kernel = jax.eval_shape(ConvKernel(64, 3).init, jax.random.key(3))["params"]["kernel"]
    assert kernel.shape == (3, 3, 3, 64)


# ---- The last layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["shifted", pytest.param("native", marks=pytest.mark.slow)])
def test_the_last_layer_of_an_embedding_is_the_logits(lowering):
    images = draw(6, 5, 8, 8, 3)
    for model in (model_of("3-2P", lowering), make_pattern_detector(lowering)):
        variables = jax.jit(lambda key, model=model: model.init(key, (8, 8, 3)))(jax.random.key(0))
        output = jax.jit(lambda variables, model=model: model.apply(variables, images, train=False))(variables)
        flat = embedding(output.features)
        before, last = (output.features[name] for name in sorted(output.features)[-2:])
        # All pixels, in the order of NHWC whatever the lowering; nothing is averaged away.
        np.testing.assert_array_equal(flat, before.reshape(5, -1))
        assert last.shape == (5, 1, 1, flat.shape[1])
        np.testing.assert_allclose(last_layer(variables["params"], flat), output.logits, rtol=1e-4, atol=1e-5)


def test_the_detector_does_not_normalise():
    model = make_pattern_detector()
    variables = jax.jit(lambda key: model.init(key, (8, 8, 1)))(jax.random.key(0))
    assert variables["batch_stats"] == {} and not any("norm" in name for name in variables["params"])
    images = draw(7, 4, 8, 8, 1)
    output = jax.jit(lambda variables: model.apply(variables, images, train=True))(variables)
    assert output.logits.shape == (4, 1) and output.logits.dtype == jnp.float32
    kernel = variables["params"]["stage1_conv"]["kernel"]

    @jax.jit
    def first_stage():
        numbers = ("NHWC", "HWIO", "NHWC")
        maps = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return nn.max_pool(nn.relu(maps), (2, 2), (2, 2))

    expected = first_stage()
    np.testing.assert_allclose(output.features["stage1"], expected, rtol=1e-4, atol=1e-5)
