"""The blocks of networks, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models.layers import relu6
from bdjax.models.mobilenet_v2 import InvertedResidual
from bdjax.models.pyramid_net import PyramidBlock, PyramidBottleneck
from bdjax.models.wide_resnet import PreActivationBlock


def draw_like(shapes, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 + random.random(leaf.shape), jnp.float32), shapes)


def normalised(x, variables, name):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    return (x - stats["mean"]) / np.sqrt(stats["variance"] + 1e-5) * params["scale"] + params["bias"]


def convolved(x, kernel, stride, groups=1):
    padding = 2 * [2 * [kernel.shape[0] // 2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jnp.asarray(x, jnp.float32)
    return np.asarray(
        jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
        )
    )


def block_and_input(block, channels, size=(4, 4)):
    x = np.random.default_rng(5).standard_normal((2, *size, channels)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: block.init(key, jnp.asarray(x), train=False), jax.random.key(0))
    variables = draw_like(shapes, 6)
    y = jax.jit(lambda x: block.apply(variables, x, train=False))(jnp.asarray(x))
    variables = jax.tree.map(np.asarray, variables)
    params = {name: layer.get("kernel") for name, layer in variables["params"].items()}
    return x, variables, params, np.asarray(y)


@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (2, 1), (2, 2), (3, 2)])
def test_a_pre_activation_block_shares_its_first_activation_with_a_projecting_shortcut(channels, stride):
    x, variables, params, y = block_and_input(PreActivationBlock(3, stride, "native"), channels)
    ready = np.maximum(normalised(x, variables, "BatchNorm_0"), 0)
    inner = normalised(convolved(ready, params["Conv_0"], stride), variables, "BatchNorm_1")
    expected = convolved(np.maximum(inner, 0), params["Conv_1"], 1)
    is_identity = (channels, stride) == (3, 1)
    assert is_identity == ("shortcut_conv" not in params)
    expected = expected + (x if is_identity else convolved(ready, params["shortcut_conv"], stride))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (2, 1), (3, 2)])
def test_an_inverted_residual_has_a_linear_end(channels, stride, projects):
    x, variables, params, y = block_and_input(InvertedResidual(5, 3, stride, projects, relu6, "native"), channels)
    inner = np.clip(normalised(convolved(x, params["expand_conv"], 1), variables, "expand_norm"), 0, 6)
    inner = normalised(convolved(inner, params["filter_conv"], stride, groups=5), variables, "filter_norm")
    assert inner.max() > 6
    expected = normalised(convolved(np.clip(inner, 0, 6), params["project_conv"], 1), variables, "project_norm")
    if stride == 1 and channels == 3:
        expected = expected + x
    elif stride == 1 and projects:
        expected = expected + normalised(convolved(x, params["shortcut_conv"], 1), variables, "shortcut_norm")
    assert ("shortcut_conv" in params) == (stride == 1 and channels == 2 and projects)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def widened(x, channels, stride):
    """PyramidNet's shortcut: means of what there is of 2x2 pixels, and channels of zeros."""
    rows, columns = (-(-length // stride) for length in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, channels))
    for i in range(rows):
        for j in range(columns):
            window = x[:, stride * i : stride * (i + 1), stride * j : stride * (j + 1)]
            y[:, i, j, : x.shape[3]] = window.mean((1, 2))
    return y


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (4, 1), (3, 2)])
def test_a_pyramid_block_has_a_relu_between_its_convolutions_only(channels, stride, size):
    x, variables, params, y = block_and_input(PyramidBlock(4, stride, "native"), channels, size)
    inner = convolved(normalised(x, variables, "BatchNorm_0"), params["Conv_0"], stride)
    inner = np.maximum(normalised(inner, variables, "BatchNorm_1"), 0)
    expected = normalised(convolved(inner, params["Conv_1"], 1), variables, "BatchNorm_2")
    assert len(params) == 5
    np.testing.assert_allclose(y, expected + widened(x, 4, stride), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (8, 2)])
def test_a_pyramid_bottleneck_has_its_stride_on_the_3x3_convolution(channels, stride):
    x, variables, params, y = block_and_input(PyramidBottleneck(2, stride, "native"), channels, (5, 4))
    inner = convolved(normalised(x, variables, "BatchNorm_0"), params["Conv_0"], 1)
    inner = convolved(np.maximum(normalised(inner, variables, "BatchNorm_1"), 0), params["Conv_1"], stride)
    inner = convolved(np.maximum(normalised(inner, variables, "BatchNorm_2"), 0), params["Conv_2"], 1)
    assert [params[f"Conv_{i}"].shape[0] for i in range(3)] == [1, 3, 1] and len(params) == 7
    expected = normalised(inner, variables, "BatchNorm_3") + widened(x, 8, stride)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
