"""The ends of groups, whose features are distilled: what is recorded, and edits."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bdjax.choices import Lowering
from bdjax.models import MODELS, make_model
from bdjax.models.facade import as_model
from bdjax.models.layers import EXACT_LOWERINGS, BatchNorm, Taps, layout_of
from bdjax.models.resnet import ResNet

LOWERINGS = EXACT_LOWERINGS
RESNETS = {
    "resnet10": ("stage1_block1/BatchNorm_1", "stage2_block1/BatchNorm_1", "stage3_block1/BatchNorm_1"),
    "bottleneck": ("stage1_block1/BatchNorm_2", "stage2_block2/BatchNorm_2"),
}
NORMALISED = {  # before_relu is the output, normalised
    "wrn_10_2": ("stage2_block1/BatchNorm_0", "stage3_block1/BatchNorm_0", "last_norm"),
    "preact_resnet18_final_norm": (
        "stage2_block1/BatchNorm_0",
        "stage3_block1/BatchNorm_0",
        "stage4_block1/BatchNorm_0",
        "last_norm",
    ),
    "pyramidnet_20_12": ("stage2_block1/BatchNorm_0", "stage3_block1/BatchNorm_0", "last_norm"),
}
NORMS = {
    **RESNETS,
    **NORMALISED,
    "pyramidnet_11_24": ("stage2_block1/BatchNorm_1", "stage3_block1/BatchNorm_1", "last_norm"),
}
"""Network -> the normalisation of each group."""
SHAPE, K = (8, 8, 1), 3
IMAGES = jnp.asarray(np.random.default_rng(0).random((4, *SHAPE)), jnp.float32)


def network(name, lowering="native"):
    if name == "bottleneck":
        return as_model(ResNet("bottleneck", (1, 2), 2, K, lowering), K, "three bottleneck blocks")
    return make_model(name, K, 4, lowering)


@cache
def variables_of(name):
    """Random variables, so that nothing is neutral; half of the scales are negative."""
    shapes = jax.eval_shape(lambda key: network(name).init(key, SHAPE), jax.random.key(0))
    random = np.random.default_rng(3)

    def draw(path, leaf):
        noise = random.standard_normal(leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            noise *= (2 / np.prod(leaf.shape[:-1])) ** 0.5
        elif kind in ("scale", "variance"):
            noise = np.exp(0.3 * noise) * (random.choice([-1, 1], leaf.shape) if kind == "scale" else 1)
        else:
            noise *= 0.3
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def groups_of(name):
    return [f"group{number + 1}" for number in range(len(NORMS[name]))]


@cache
def compiled(name, lowering="native"):
    """(variables, factors of the groups' outputs) -> logits, features and groups in evaluation."""
    model = network(name, lowering)

    @jax.jit
    def run(variables, factors):
        edits = {group: lambda x, group=group: factors[group] * x for group in factors}
        output = model.apply(variables, IMAGES, train=False, edits=edits)
        return output.logits, output.features, output.groups

    return run


def ran(name, variables=None, lowering="native", **factors):
    factors = {group: jnp.float32(factors.get(group, 1.0)) for group in groups_of(name)}
    return compiled(name, lowering)(variables or variables_of(name), factors)


def norm_of(variables, path, collection="params"):
    place = variables[collection]
    for part in path.split("/"):
        place = place[part]
    return place


def normalised(x, variables, path):
    params, stats = (
        jax.tree.map(np.asarray, norm_of(variables, path, collection)) for collection in ("params", "batch_stats")
    )
    return (np.asarray(x) - stats["mean"]) / np.sqrt(stats["variance"] + 1e-5) * params["scale"] + params["bias"]


# ---- How they are recorded ------------------------------------------------------------------------------------------


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_taps_record_in_nhwc_and_pass_on_what_an_edit_returns(lowering):
    layout = layout_of(lowering)
    x = draw(0, 2, 3, 4, 5)
    taps = Taps(lowering, {"b": lambda features: 2.0 * features})
    passed = [layout.to_nhwc(taps(name, layout.from_nhwc(x))) for name in "ab"]
    recorded = taps.finish()
    chex.assert_trees_all_equal(passed, [x, 2.0 * x])
    chex.assert_trees_all_equal(recorded.features, {"a": x, "b": 2.0 * x})
    assert recorded.groups == {}


class Recording(nn.Module):
    """A normalisation after the end of a group."""

    taps: Taps
    lowering: Lowering

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(self.lowering)
        passed = self.taps.group("group1", x)
        y = norm(passed, train=False)
        self.taps.before_relu("group1", y, norm)
        return passed, y


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("edits", [{}, {"group1": lambda output: 3.0 * output - 1.0}])
def test_the_end_of_a_group_is_recorded_with_the_statistics_of_its_normalisation(edits, lowering):
    layout = layout_of(lowering)
    x = draw(0, 2, 3, 4, 5).astype(jnp.bfloat16)
    params = {"scale": jnp.asarray([2.0, -2.0, 0.5, 0.0, 1.0]), "bias": draw(1, 5)}
    variables = {"params": {"BatchNorm_0": params}}
    variables["batch_stats"] = {"BatchNorm_0": {"mean": draw(2, 5), "variance": 1.0 + draw(3, 5) ** 2}}
    taps = Taps(lowering, edits)

    @jax.jit
    def run():
        passed = Recording(taps, lowering).apply(variables, layout.from_nhwc(x))
        return [layout.to_nhwc(activation) for activation in passed], taps.finish()

    (passed, y), recorded = run()
    expected = 3.0 * x.astype(jnp.float32) - 1.0 if edits else x.astype(jnp.float32)

    assert recorded.features == {} and list(recorded.groups) == ["group1"]
    output, before_relu, mean, deviation = recorded.groups["group1"]
    assert {leaf.dtype for leaf in recorded.groups["group1"]} == {jnp.dtype("float32")}
    assert passed.dtype == y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal((output, passed), (expected, expected.astype(jnp.bfloat16)))
    chex.assert_trees_all_equal(before_relu, y.astype(jnp.float32))
    chex.assert_trees_all_equal((mean, deviation), (params["bias"], jnp.asarray([2.0, 2.0, 0.5, 0.0, 1.0])))


def test_editing_a_tap_that_is_not_there_is_an_error_that_names_those_that_are():
    taps = Taps("native", {"stage4": lambda features: features})
    taps("stage1", jnp.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"no tap stage4; this network has stage1$"):
        taps.finish()


def test_editing_a_group_that_is_not_there_is_an_error_that_names_taps_and_groups():
    taps = Taps("native", {"group4": lambda output: output, "stage1": lambda features: features})
    taps("stage1", jnp.zeros((1, 2, 2, 1)))
    taps("stage2", jnp.zeros((1, 2, 2, 1)))
    jax.eval_shape(Recording(taps, "native").init, jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"no tap group4; this network has stage1, stage2; and groups group1$"):
        taps.finish()


# ---- Which there are ------------------------------------------------------------------------------------------------


def shapes_of(model, image):
    """Group -> channels of its output and of what stands before the ReLU, and its height and width."""
    shapes = {}

    def call(key):
        images = jnp.zeros((2, *image), jnp.float32)
        for name, end in model.apply(model.init(key, image), images, train=False).groups.items():
            assert end.output.shape[:3] == end.before_relu.shape[:3]
            assert end.mean.shape == end.deviation.shape == end.before_relu.shape[3:]
            shapes[name] = end.output.shape[3], end.before_relu.shape[3], end.output.shape[1:3]

    jax.eval_shape(call, jax.random.key(0))
    assert list(shapes) == [f"group{number + 1}" for number in range(len(shapes))]
    return list(shapes.values())


@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("resnet10", ((64, 64), (128, 128), (256, 256)), (28, 14, 7)),
        ("resnet18_cifar", ((64, 64), (128, 128), (256, 256), (512, 512)), (28, 14, 7, 4)),
        ("resnet_s", ((2, 2), (2, 2), (2, 2), (4, 4)), (28, 14, 7, 4)),
        pytest.param("resnet56", ((16, 16), (32, 32), (64, 64)), (28, 14, 7), marks=pytest.mark.slow),
        ("wrn_16_2", ((32, 32), (64, 64), (128, 128)), (28, 14, 7)),
        ("preact_resnet18", ((64, 64), (128, 128), (256, 256)), (28, 14, 7)),
        ("preact_resnet18_final_norm", ((64, 64), (128, 128), (256, 256), (512, 512)), (28, 14, 7, 4)),
        ("pyramidnet_20_12", ((20, 20), (24, 24), (28, 28)), (28, 14, 7)),
        ("pyramidnet_11_24", ((96, 32), (128, 40), (160, 160)), (28, 14, 7)),
        *((name, (), ()) for name in ("lenet", "vgg_s", "mobilenet_v2_s", "vbd_4_4p")),
    ],
)
def test_groups_of_networks(name, channels, sides):
    expected = [(*both, (side, side)) for both, side in zip(channels, sides, strict=True)]
    assert shapes_of(make_model(name, 10), (28, 28, 3)) == expected


def test_the_widths_of_the_papers_pyramids():
    basic, bottleneck = (
        MODELS[name](10, 64, "native", "float32").widths for name in ("pyramidnet_110_84", "pyramidnet_200_240")
    )
    assert [len(group) for group in (*basic, *bottleneck)] == 3 * [18] + 3 * [22]
    assert [(group[0], group[-1]) for group in basic] == [(18, 44), (46, 72), (74, 100)]
    # 16 + 240 k / 66 with k = 1, 22, 23, 44, 45, 66
    assert [(group[0], group[-1]) for group in bottleneck] == [(20, 96), (100, 176), (180, 256)]


# ---- What they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_the_tap_is_the_relu_of_before_relu(name):
    # A compiler may fuse two outputs with different operations, so they agree to rounding.
    assert_same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    _, features, groups = ran(name)
    assert list(groups) == groups_of(name)
    for group, tap in zip(groups.values(), features.values(), strict=True):
        assert group.before_relu.min() < -0.05 and group.before_relu.max() > 0.05
        if name in RESNETS:
            assert_same(group.before_relu, group.output)
            assert_same(np.maximum(group.before_relu, 0), np.asarray(tap))
    *first, last = groups.values()
    if name not in RESNETS:
        assert len(first) >= 2
        for group, tap in zip(first, features.values(), strict=False):
            assert_same(group.output, tap)
    assert_same(np.maximum(last.before_relu, 0), np.asarray(list(features.values())[-1]))


@pytest.mark.parametrize("name", NORMALISED)
def test_before_relu_is_the_normalised_output(name):
    for group, path in zip(ran(name)[2].values(), NORMS[name], strict=True):
        expected = normalised(group.output, variables_of(name), path)
        np.testing.assert_allclose(group.before_relu, expected, rtol=1e-4, atol=1e-4)


def test_a_bottleneck_pyramid_takes_its_first_two_groups_through_a_1x1_convolution():
    name = "pyramidnet_11_24"
    variables, groups = variables_of(name), ran(name)[2]
    for number in (1, 2):
        block = f"stage{number + 1}_block1"
        kernel = variables["params"][block]["Conv_0"]["kernel"][0, 0]
        inner = normalised(groups[f"group{number}"].output, variables, f"{block}/BatchNorm_0") @ np.asarray(kernel)
        expected = normalised(inner, variables, f"{block}/BatchNorm_1")
        np.testing.assert_allclose(groups[f"group{number}"].before_relu, expected, rtol=1e-4, atol=1e-4)
    expected = normalised(groups["group3"].output, variables, "last_norm")
    np.testing.assert_allclose(groups["group3"].before_relu, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_mean_and_deviation_are_by_the_shift_and_the_scale_of_the_normalisation(name):
    variables = variables_of(name)
    _, _, before = ran(name)
    for number, path in enumerate(NORMS[name]):
        group = f"group{number + 1}"
        norm = norm_of(variables, path)
        chex.assert_trees_all_equal((before[group].mean, before[group].deviation), (norm["bias"], abs(norm["scale"])))
        # Shifted by one half, it and nothing before it moves by one half.
        moved = jax.tree.map(lambda leaf: leaf, variables)
        norm_of(moved, path)["bias"] = norm["bias"] + 0.5
        _, _, after = ran(name, moved)
        np.testing.assert_array_equal(after[group].mean, norm["bias"] + 0.5)
        np.testing.assert_allclose(after[group].before_relu, before[group].before_relu + 0.5, rtol=1e-4, atol=1e-4)
        if name not in RESNETS:
            np.testing.assert_allclose(after[group].output, before[group].output, rtol=1e-5, atol=1e-5)
        for earlier in groups_of(name)[:number]:
            chex.assert_trees_all_close(after[earlier], before[earlier], rtol=1e-5, atol=1e-5)
        for later in groups_of(name)[number + 1 :]:
            assert np.abs(after[later].before_relu - before[later].before_relu).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["wrn_10_2", pytest.param("preact_resnet18_final_norm", marks=pytest.mark.slow), "pyramidnet_11_24"]
)
def test_in_training_it_is_the_batch_that_has_this_mean_and_this_deviation(name):
    model, variables = network(name), variables_of(name)
    trained = jax.jit(lambda: model.apply(variables, IMAGES, train=True).groups)()

    def moments(groups):
        return [(np.mean(end.before_relu, (0, 1, 2)), np.std(end.before_relu, (0, 1, 2))) for end in groups.values()]

    def stated(groups):
        return [(end.mean, end.deviation) for end in groups.values()]

    chex.assert_trees_all_close(moments(trained), stated(trained), rtol=1e-2, atol=1e-2)
    evaluated = ran(name)[2]
    chex.assert_trees_all_equal(stated(evaluated), stated(trained))
    for found, expected in zip(moments(evaluated), stated(evaluated), strict=True):
        assert np.abs(found[0] - expected[0]).max() > 0.05 and np.abs(found[1] - expected[1]).max() > 0.05


@pytest.mark.parametrize("name", RESNETS)
def test_in_training_a_resnets_sum_is_of_the_batch_too(name):
    model, variables = network(name), variables_of(name)
    apply = jax.jit(lambda images: model.apply(variables, images, train=True).groups)
    groups, others = apply(IMAGES), apply(IMAGES.at[1:].multiply(0.1))
    for group in groups_of(name):
        assert np.abs(groups[group].before_relu[0] - others[group].before_relu[0]).max() > 1e-2


# ---- Edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_zeros_in_place_of_a_group_change_what_follows_and_nothing_before(name):
    logits, _, groups = ran(name)
    bias = np.asarray(variables_of(name)["params"]["classifier"]["bias"])
    for number, group in enumerate(groups_of(name)):
        silent, _, edited = ran(name, **{group: 0.0})
        assert not np.any(edited[group].output)
        assert np.abs(edited[group].before_relu - groups[group].before_relu).max() > 1e-2
        assert np.abs(silent - logits).max() > 1e-3
        np.testing.assert_allclose(silent, np.broadcast_to(silent[:1], silent.shape), rtol=1e-5, atol=1e-5)
        for earlier in groups_of(name)[:number]:
            chex.assert_trees_all_equal(edited[earlier], groups[earlier])
        for later in groups_of(name)[number + 1 :]:
            assert np.abs(edited[later].output - groups[later].output).max() > 1e-2
    if name in RESNETS:
        np.testing.assert_allclose(silent, np.broadcast_to(bias, silent.shape), atol=1e-6)


@pytest.mark.parametrize(("name", "lowering"), [("resnet10", "native"), ("wrn_10_2", "shifted")])
def test_an_identity_edit_changes_no_bit(name, lowering):
    model = network(name, lowering)

    def run(edits):
        return jax.jit(lambda variables: model.apply(variables, IMAGES, train=False, edits=edits))(variables_of(name))

    chex.assert_trees_all_equal(run({group: lambda x: x for group in groups_of(name)}), run(None))


def test_all_lowerings_have_the_same_groups():
    """`test_networks.py` and `test_resnet.py` compare the outputs of all families."""
    name = "bottleneck"
    factors = {"group1": 1.5, "group2": -0.5}
    expected = ran(name, **factors)
    for lowering in LOWERINGS[1:]:
        chex.assert_trees_all_close(ran(name, lowering=lowering, **factors), expected, rtol=1e-3, atol=1e-3)
