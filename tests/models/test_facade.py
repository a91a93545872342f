import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bdjax.models import make_model
from bdjax.models.facade import (
    as_model,
    convolution_shapes,
    count_parameters,
    group_shapes,
    last_tap,
    normalised_convolutions,
    tap_shapes,
)
from bdjax.models.layers import Recorded
from bdjax.testing.models import images_of, variables_of
from bdjax.types import Model, ModelOutput


class Centred(nn.Module):
    """A network of five parameters whose running mean moves in training."""

    @nn.compact
    def __call__(self, images, *, train, edits=None):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (1,), jnp.float32)
        features = images - mean.value[None, None, None, :]
        if edits:
            features = edits["tap"](features)
        if train:
            mean.value = 0.5 * mean.value + 0.5 * jnp.mean(images, (0, 1, 2))
        scale = self.param("scale", nn.initializers.ones, (1,), jnp.float32)
        kernel = self.param("kernel", nn.initializers.normal(), (1, 4), jnp.float32)
        return jnp.mean(features, (1, 2)) * scale[None, :] @ kernel, Recorded({"tap": features}, {})


MODEL = as_model(Centred(), 4, "centred")
KEY = jax.random.key(0)


def test_variables_are_plain_and_hold_the_two_collections():
    variables = MODEL.init(jax.random.key(0), (3, 2, 1))
    assert set(variables) == {"params", "batch_stats"}
    assert type(variables) is type(variables["params"]) is dict
    chex.assert_trees_all_equal(variables, MODEL.init(jax.random.key(0), (3, 2, 1)))
    assert (MODEL.num_classes, MODEL.description) == (4, "centred")


def test_training_returns_new_statistics_and_evaluation_the_old_ones():
    variables = MODEL.init(jax.random.key(0), (3, 2, 1))
    images = jnp.full((5, 3, 2, 1), 0.5)
    trained = MODEL.apply(variables, images, train=True)
    chex.assert_shape([trained.logits, trained.features["tap"]], [(5, 4), (5, 3, 2, 1)])
    np.testing.assert_allclose(trained.variables["batch_stats"]["mean"], [0.25])
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0.0])  # the input is untouched
    chex.assert_trees_all_equal(trained.variables["params"], variables["params"])
    evaluated = MODEL.apply(trained.variables, images, train=False)
    chex.assert_trees_all_equal(evaluated.variables, trained.variables)
    np.testing.assert_allclose(evaluated.features["tap"], images - 0.25)


def test_edits_reach_the_network_in_both_modes():
    variables = MODEL.init(jax.random.key(0), (3, 2, 1))
    for train in (True, False):
        output = MODEL.apply(variables, jnp.ones((2, 3, 2, 1)), train=train, edits={"tap": lambda x: 0.0 * x})
        np.testing.assert_array_equal(output.logits, np.zeros((2, 4)))


def test_counting_leaves_the_statistics_out():
    assert count_parameters(MODEL, (3, 2, 1)) == 5


def test_the_last_tap_is_the_network_s_not_the_alphabet_s_and_nothing_is_computed():
    assert last_tap(MODEL, MODEL.init(jax.random.key(0), (3, 2, 1)), (3, 2, 1)) == "tap"

    def apply(variables, images, *, train, edits=None):
        assert isinstance(images, jax.core.Tracer) and images.shape == (1, 4, 4, 1)
        return ModelOutput(images, {"zebra": images, "apple": images + variables["shift"]}, variables)

    two_taps = Model(lambda key, shape: {}, apply, 3, "two taps")
    assert last_tap(two_taps, {"shift": jnp.ones((), jnp.float32)}, (4, 4, 1)) == "apple"


def test_shapes_are_told_without_computing_anything():
    assert tap_shapes(MODEL, (3, 2, 1)) == {"tap": (3, 2, 1)} and group_shapes(MODEL, (3, 2, 1)) == {}
    wide = make_model("wrn_10_2", 10, 4)
    assert list(tap_shapes(wide, (8, 8, 1)).values()) == [(8, 8, 2), (4, 4, 4), (2, 2, 8)]
    assert group_shapes(wide, (8, 8, 1))["group2"] == ((4, 4, 4), (4, 4, 4))


RESNET = make_model("resnet10", 4, width=2, lowering="native")


def test_convolutions_are_all_in_the_order_of_the_network():
    shapes = convolution_shapes(RESNET, (8, 8, 1))
    assert list(shapes) == [
        "stem_conv", "stage1_block1/Conv_0", "stage1_block1/Conv_1",
        "stage2_block1/Conv_0", "stage2_block1/Conv_1", "stage2_block1/shortcut_conv",
        "stage3_block1/Conv_0", "stage3_block1/Conv_1", "stage3_block1/shortcut_conv",
    ]  # fmt: skip
    assert list(shapes.values()) == [(8, 8, 2)] * 3 + [(4, 4, 4)] * 3 + [(2, 2, 8)] * 3
    assert convolution_shapes(Model(RESNET.init, RESNET.apply, 4, "of other making"), (8, 8, 1)) == {}


@pytest.mark.parametrize("name", ["lenet", "mobilenet_v2_s", "preact_resnet18", "speedrun", "vgg_s"])
def test_each_kernel_is_that_of_a_convolution(name):
    model = make_model(name, 4, 8, "native")
    variables = jax.eval_shape(lambda key: model.init(key, (8, 8, 3)), KEY)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    kernels = [path for path, leaf in leaves if "kernel" in str(path[-1]) and leaf.ndim == 4]
    assert len(convolution_shapes(model, (8, 8, 3))) == len(kernels) > 0


@pytest.mark.parametrize("lowering", ["native", "shifted"])
def test_recording_changes_no_logit_and_offsets_are_added(lowering):
    model = make_model("resnet10", 4, width=2, lowering=lowering)
    variables, images = variables_of(model, (8, 8, 1)), images_of((8, 8, 1))
    convolutions = jax.jit(model.convolutions)
    zero = {"stage3_block1/Conv_1": jnp.zeros((3, 2, 2, 8))}
    logits, outputs = convolutions(variables, images, zero)
    recorded = jax.jit(lambda variables: model.convolutions(variables, images)[0])
    plain = jax.jit(lambda variables: model.apply(variables, images, train=False).logits)
    assert recorded.lower(variables).as_text() == plain.lower(variables).as_text()
    np.testing.assert_allclose(logits, plain(variables), rtol=1e-6, atol=1e-6)
    kernel = variables["params"]["stem_conv"]["kernel"]
    expected = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(outputs["stem_conv"], expected, rtol=1e-4, atol=1e-5)
    # An offset of the last convolution passes normalisation, ReLU, the pool and the last layer.
    name = "stage3_block1/Conv_1"
    shifted, moved = convolutions(variables, images, {name: jnp.ones((3, 2, 2, 8))})
    np.testing.assert_allclose(moved[name], outputs[name] + 1, rtol=1e-5)
    np.testing.assert_array_equal(moved["stage3_block1/Conv_0"], outputs["stage3_block1/Conv_0"])
    assert np.abs(shifted - logits).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("resnet10", ("stem_conv", "stem_norm")),
        ("resnet10", ("stage2_block1/shortcut_conv", "stage2_block1/shortcut_norm")),
        ("speedrun", ("stage1_conv1", "stage1_norm1")),  # with a max-pool between them
        ("preact_resnet18", ("stage1_block1/Conv_0", "stage1_block1/BatchNorm_1")),
    ],
)
def test_every_normalisation_is_paired_with_the_convolution_before_it(name, some):
    model = make_model(name, 4, width=4)
    pairs = normalised_convolutions(model, (8, 8, 1))
    assert some in pairs
    variables = jax.eval_shape(lambda key: model.init(key, (8, 8, 1)), jax.random.key(0))
    for convolution, norm in pairs:
        found = [variables["params"]] * 2
        for place, path in enumerate((convolution, norm)):
            for part in path.split("/"):
                found[place] = found[place][part]
        assert found[0]["kernel"].shape[-1] == found[1]["scale"].shape[0]


def test_networks_of_the_same_settings_are_one_object():
    settings = ("lenet", 10, 2, "native", "float32")
    others = [("resnet10", *settings[1:]), ("lenet", 9, *settings[2:]), ("lenet", 10, 3, *settings[3:])]
    others += [(*settings[:3], "patches", "float32"), (*settings[:4], "bfloat16")]
    assert make_model(*settings) is make_model(*settings)
    assert all(make_model(*other) != make_model(*settings) for other in others)
