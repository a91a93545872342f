import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax import lax

from bdjax.models import layers
from bdjax.models.layers import (
    EXACT_LOWERINGS,
    BatchNorm,
    Classifier,
    Conv,
    Dense,
    DepthwiseConv,
    convolve,
    convolve_3x3,
    convolve_depthwise,
    default_lowering,
    gelu,
    global_max,
    layout_of,
    max_pool,
    max_pool_3x3,
    normalise_batch,
    relu,
    scale_channels,
)

LOWERINGS = EXACT_LOWERINGS
SHIFTED_FIRST = ["shifted", *(pytest.param(name, marks=pytest.mark.slow) for name in LOWERINGS if name != "shifted")]
"""The fast tests use the default lowering of a CPU."""
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "batch_norm.npz"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pulled_back(function, arguments, cotangent):
    """The value and the gradients of sum(cotangent * value), in one compiled call."""

    def run(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(jnp.asarray(cotangent))

    return jax.jit(run)(*arguments)


def assert_slope(function, arguments, cotangent):
    """The gradient against central differences along random directions, summed in float64."""
    _, gradients = pulled_back(function, arguments, cotangent)
    value = jax.jit(function)
    step = 1e-2
    for seed in range(3):
        directions = [draw(100 + 10 * seed + i, *each.shape) for i, each in enumerate(arguments)]
        ahead, behind = (
            np.asarray(value(*(x + sign * step * d for x, d in zip(arguments, directions, strict=True))), np.float64)
            for sign in (1, -1)
        )
        measured = np.sum((ahead - behind) * np.asarray(cotangent, np.float64)) / (2 * step)
        expected = sum(np.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(expected, measured, rtol=5e-3, atol=5e-3)


def torch_convolution(x, kernel, stride, padding):
    """PyTorch's definition, pixel by pixel: x [N, H, W, C], kernel [k, k, C, O]."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((length - size) // stride + 1 for length in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.einsum("nijc,ijco->no", window, kernel)
    return y


# ---- Convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_stride_2_convolution_is_padded_on_both_sides(lowering):
    # Window i covers pixels 2i-1 to 2i+1 under ((1, 1), (1, 1)), but 2i to 2i+2 under XLA's "SAME".
    @jax.jit
    def run(x):
        layout = layout_of(lowering)
        y = convolve(layout.from_nhwc(x), jnp.ones((3, 3, 1, 1)), stride=2, padding=1, lowering=lowering)
        return layout.to_nhwc(y)

    def windows_over(row, column):
        x = np.zeros((1, 8, 8, 1), np.float32)
        x[0, row, column, 0] = 1
        return {(int(i), int(j)) for i, j in np.argwhere(np.asarray(run(x))[0, :, :, 0])}

    assert windows_over(0, 0) == {(0, 0)}
    assert windows_over(3, 4) == {(1, 2), (2, 2)}
    assert windows_over(5, 5) == {(2, 2), (2, 3), (3, 2), (3, 3)}
    assert windows_over(7, 7) == {(3, 3)}


@pytest.mark.parametrize(
    ("size", "stride", "shape"),
    [(3, 1, (8, 8)), (3, 1, (7, 5)), (3, 2, (8, 8)), (3, 2, (7, 5)), (1, 1, (7, 5)), (1, 2, (7, 5)), (5, 3, (8, 8))],
)
def test_all_lowerings_are_pytorchs_convolution_with_the_same_gradients(size, stride, shape):
    x, kernel = draw(0, 2, *shape, 3), draw(1, size, size, 3, 4)
    expected = torch_convolution(np.asarray(x, np.float64), np.asarray(kernel, np.float64), stride, size // 2)
    cotangent = draw(2, *expected.shape)

    def run(lowering):
        layout = layout_of(lowering)

        def function(x, kernel):
            y = convolve(layout.from_nhwc(x), kernel, stride=stride, padding=size // 2, lowering=lowering)
            return layout.to_nhwc(y)

        return pulled_back(function, (x, kernel), cotangent)

    native, *others = (run(lowering) for lowering in LOWERINGS)
    np.testing.assert_allclose(native[0], expected, rtol=1e-5, atol=1e-5)
    for other in others:
        chex.assert_trees_all_close(other, native, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_rounded_products_have_float32_sums_and_results(size, stride):
    x, kernel = draw(0, 8, 8, 8, 16), draw(1, size, size, 16, 4)

    def run(lowering):
        layout = layout_of(lowering)

        def function(x, kernel):
            y = convolve(layout.from_nhwc(x), kernel, stride=stride, padding=size // 2, lowering=lowering)
            return layout.to_nhwc(y)

        shape = jax.eval_shape(function, x, kernel).shape
        return pulled_back(function, (x, kernel), draw(2, *shape))

    for exact, rounded in zip(jax.tree.leaves(run("shifted")), jax.tree.leaves(run("shifted_bfloat16")), strict=True):
        assert rounded.dtype == np.float32 == exact.dtype
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        # Each operand is off by at most 2^-9, mostly by less; a sum in bfloat16 would be off by several times as much.
        assert 1e-5 < error < 4e-3


def test_rounded_products_row_by_row_are_those_of_whole_activations(monkeypatch):
    x, kernel = draw(0, 3, 6, 5, 2), draw(1, 3, 3, 3, 4)

    def run(x, kernel):
        y, pull = jax.vjp(lambda x, kernel: layers.convolve_3x3(x, kernel, True), x, kernel)
        return y, pull(jnp.cos(y))

    whole = jax.jit(run)(x, kernel)
    monkeypatch.setattr(layers, "LARGE_BYTES", 0)
    chex.assert_trees_all_close(jax.jit(lambda *values: run(*values))(x, kernel), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lowering", SHIFTED_FIRST)
def test_in_bfloat16_only_activations_are_rounded(lowering):
    layout = layout_of(lowering)
    x = draw(0, 4, 6, 6, 3)
    conv, norm, classifier = Conv(4, 3, 1, lowering), BatchNorm(lowering), Classifier(3, lowering)

    @jax.jit
    def run(x):
        x = layout.from_nhwc(x)
        kernels = conv.init(jax.random.key(0), x)
        inner = conv.apply(kernels, x)
        statistics = norm.init(jax.random.key(1), inner, train=False)
        y, updated = norm.apply(statistics, inner, train=True, mutable=["batch_stats"])
        weights = classifier.init(jax.random.key(2), y)
        return (kernels, statistics, weights), (inner, y), (updated, classifier.apply(weights, y))

    parameters, activations, kept = run(x.astype(jnp.bfloat16))
    exact_parameters, exact_activations, exact_kept = run(x)
    chex.assert_trees_all_equal(parameters, exact_parameters)
    assert {leaf.dtype for leaf in activations} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves((parameters, kept))} == {jnp.dtype("float32")}
    # 8 bits of mantissa: 0.4 % of each factor.
    as_float = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), activations)
    chex.assert_trees_all_close((as_float, kept), (exact_activations, exact_kept), atol=0.04)


@pytest.mark.parametrize("lowering", SHIFTED_FIRST)
def test_gradients_in_bfloat16_point_where_the_exact_ones_do(lowering):
    layout = layout_of(lowering)
    x, target = draw(0, 4, 6, 6, 3), draw(3, 4, 6, 6, 4)

    def loss(params, dtype):
        y = convolve(
            layout.from_nhwc(x.astype(dtype)), params["kernel"].astype(dtype), stride=1, padding=1, lowering=lowering
        )
        y = normalise_batch(y, params["scale"], params["bias"], layout.channel_axis, 1e-5)[0]
        return jnp.mean(jnp.square(layout.to_nhwc(relu(y)).astype(jnp.float32) - target))

    params = {"kernel": draw(1, 3, 3, 3, 4), "scale": 1 + 0.1 * draw(4, 4), "bias": 0.1 * draw(5, 4)}
    gradient_of = jax.jit(lambda params: [jax.grad(loss)(params, dtype) for dtype in (jnp.float32, jnp.bfloat16)])
    exact, rounded = gradient_of(params)
    for name, gradient in rounded.items():
        assert gradient.dtype == jnp.float32
        cosine = np.vdot(gradient, exact[name]) / np.linalg.norm(gradient) / np.linalg.norm(exact[name])
        assert cosine > 0.999, name


@pytest.fixture(params=["whole", "by rows"])
def form(request, monkeypatch):
    """Both forms of the 3x3 convolution, which is chosen by size."""
    monkeypatch.setattr(layers, "LARGE_BYTES", 0 if request.param == "by rows" else layers.LARGE_BYTES)


def test_large_activations_are_convolved_by_rows():
    kernel = draw(0, 3, 3, 2, 8)

    def loops(rows):
        x = jax.ShapeDtypeStruct((2, rows, 64, 64), jnp.float32)
        traced = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(convolve_3x3(x, kernel))))(x)
        return str(traced).count("scan[")

    assert (loops(15), loops(17)) == (0, 2)  # 8 channels of 16 rows are 2 MiB; forward and backward


def test_the_written_gradient_of_the_3x3_convolution_is_right(form):
    arguments = draw(0, 2, 4, 3, 2), draw(1, 3, 3, 2, 3)  # [C, H, W, N] and HWIO
    cotangent = draw(2, 3, 4, 3, 2)
    assert_slope(convolve_3x3, arguments, cotangent)

    def reference(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("CHWN", "HWIO", "CHWN"))

    written, automatic = (pulled_back(each, arguments, cotangent) for each in (convolve_3x3, reference))
    chex.assert_trees_all_close(written, automatic, rtol=1e-5, atol=1e-5)


def test_the_3x3_convolution_maps_over_stacked_kernels(form):
    x, kernels = draw(0, 2, 4, 3, 2), draw(1, 5, 3, 3, 2, 3)
    gradient = jax.grad(lambda kernel: jnp.sum(jnp.square(convolve_3x3(x, kernel))))
    alone = jax.jit(gradient)
    stacked = jax.jit(jax.vmap(gradient))(kernels)
    expected = np.stack([alone(kernel) for kernel in np.asarray(kernels)])
    np.testing.assert_allclose(stacked, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layouts_name_their_axes_and_go_there_and_back(lowering):
    layout = layout_of(lowering)
    x = draw(0, 2, 3, 4, 5)
    inside = layout.from_nhwc(x)
    axes = (layout.batch_axis, *layout.spatial_axes, layout.channel_axis)
    assert tuple(inside.shape[axis] for axis in axes) == x.shape
    chex.assert_trees_all_equal(layout.to_nhwc(inside), x)


def test_an_unknown_lowering_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'winograd' is not one of 'native', 'patches', 'shifted'"):
        layout_of("winograd")
    assert default_lowering() in LOWERINGS


@pytest.mark.parametrize(("size", "lowering"), [(1, "native"), (3, "patches"), (3, "shifted")])
def test_convolutions_start_with_he_initialisation_over_the_fan_out(size, lowering):
    channels, features = 32, 64
    image = layout_of(lowering).from_nhwc(jnp.zeros((1, 4, 4, channels)))
    module = Conv(features, size, 2, lowering)
    kernel = np.asarray(jax.jit(module.init)(jax.random.key(0), image)["params"]["kernel"])
    assert kernel.shape == (size, size, channels, features)
    deviation = (2 / (features * size**2)) ** 0.5  # fan in would give sqrt(2) times as much
    assert kernel.std() == pytest.approx(deviation, rel=0.06)
    assert abs(kernel.mean()) < 4 * deviation / kernel.size**0.5
    assert np.abs(kernel).max() > 2.5 * deviation  # not truncated
    output = jax.eval_shape(
        lambda image: layout_of(lowering).to_nhwc(module.apply({"params": {"kernel": kernel}}, image)), image
    )
    assert output.shape == (1, 2, 2, features)


@pytest.mark.parametrize(("stride", "shape"), [(1, (7, 5)), (2, (8, 8)), (2, (7, 5)), (2, (1, 2))])
def test_a_depthwise_convolution_is_pytorchs_of_every_channel_alone(stride, shape):
    x, kernel = draw(0, 2, *shape, 3), draw(1, 3, 3, 1, 3)
    each = [
        torch_convolution(np.asarray(x, np.float64)[..., c : c + 1], np.asarray(kernel)[..., c : c + 1], stride, 1)
        for c in range(3)
    ]
    expected = np.concatenate(each, axis=3)
    cotangent = draw(2, *expected.shape)

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        pads = ((1, 1), (1, 1))
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers, feature_group_count=3
        )

    def shifted(lowering):
        layout = layout_of(lowering)

        def function(x, kernel):
            return layout.to_nhwc(convolve_depthwise(layout.from_nhwc(x), kernel, stride=stride, lowering=lowering))

        return pulled_back(function, (x, kernel), cotangent)

    grouped = pulled_back(reference, (x, kernel), cotangent)
    np.testing.assert_allclose(grouped[0], expected, rtol=1e-5, atol=1e-5)
    for lowering in ("native", "shifted"):
        chex.assert_trees_all_close(shifted(lowering), grouped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_convolution_may_have_a_bias_and_no_padding(lowering):
    layout = layout_of(lowering)
    x, module = draw(0, 2, 7, 6, 3), Conv(4, 5, 1, lowering, 0, bias=True)
    params = jax.jit(module.init)(jax.random.key(0), layout.from_nhwc(x))["params"]
    np.testing.assert_array_equal(params["bias"], np.zeros(4))
    params = {**params, "bias": draw(1, 4)}
    y = jax.jit(lambda params: layout.to_nhwc(module.apply({"params": params}, layout.from_nhwc(x))))(params)
    expected = torch_convolution(np.asarray(x), np.asarray(params["kernel"]), 1, 0) + np.asarray(params["bias"])
    assert y.shape == (2, 3, 2, 4)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_depthwise_convolution_starts_as_in_torchvision():
    params = jax.jit(DepthwiseConv().init)(jax.random.key(0), jnp.zeros((1, 4, 4, 300)))["params"]
    assert params["kernel"].shape == (3, 3, 1, 300)
    assert np.std(params["kernel"]) == pytest.approx((2 / (300 * 9)) ** 0.5, rel=0.06)


def test_a_parameter_of_another_shape_is_an_error():
    variables = {"params": {"kernel": jnp.zeros((3, 3, 2, 4))}}
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        Conv(5, 3).apply(variables, jnp.zeros((1, 4, 4, 2)))


# ---- Batch normalisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_batch_normalisation_is_pytorchs(lowering):
    golden = np.load(GOLDEN)
    layout = layout_of(lowering)
    module = BatchNorm(lowering)
    params = {"scale": jnp.asarray([1.5, 0.5, -1.0]), "bias": jnp.asarray([0.0, 0.25, -2.0])}
    stats = {"mean": jnp.zeros(3), "variance": jnp.ones(3)}

    @jax.jit
    def train(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, updated = module.apply(variables, layout.from_nhwc(x), train=True, mutable=["batch_stats"])
        return layout.to_nhwc(y), updated["batch_stats"]

    for call in range(3):
        before, x = stats, golden["x"][call]
        y, stats = train(params, stats, x)
        np.testing.assert_allclose(y, golden["y"][call], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats["mean"], golden["mean"][call], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["variance"], golden["variance"][call], rtol=1e-5, atol=1e-6)

    variables = {"params": params, "batch_stats": stats}
    evaluated = jax.jit(lambda x: layout.to_nhwc(module.apply(variables, layout.from_nhwc(x), train=False)))(x)
    np.testing.assert_allclose(evaluated, golden["eval_y"], rtol=1e-4, atol=1e-5)

    _, (by_params, by_x) = pulled_back(lambda params, x: train(params, before, x)[0], (params, x), golden["g"])
    np.testing.assert_allclose(by_params["scale"], golden["dscale"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_params["bias"], golden["dbias"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_x, golden["dx"], rtol=1e-4, atol=2e-4)


def naive_normalise(x, scale, bias, axis, epsilon):
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    mean = jnp.mean(x, reduced, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, reduced, keepdims=True)
    shape = mean.shape
    return (x - mean) / jnp.sqrt(variance + epsilon) * scale.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize("axis", [0, 3])
def test_the_written_gradient_of_batch_normalisation_is_right(axis):
    x = 0.5 + 2.0 * draw(0, *((3, 4, 5, 2) if axis == 0 else (2, 4, 5, 3)))
    arguments, cotangent = (x, draw(1, 3), draw(2, 3)), draw(3, *x.shape)

    def closed(x, scale, bias):
        return normalise_batch(x, scale, bias, axis, 1e-5)[0]

    def naive(x, scale, bias):
        return naive_normalise(x, scale, bias, axis, 1e-5)

    written, automatic = (pulled_back(each, arguments, cotangent) for each in (closed, naive))
    chex.assert_trees_all_close(written, automatic, rtol=1e-3, atol=1e-4)
    assert_slope(closed, arguments, cotangent)


def test_a_far_from_zero_activation_keeps_its_variance():
    # E[x^2] - E[x]^2 in float32 would be off by more than the variance itself.
    x = 1000.0 + 0.1 * draw(0, 4, 4, 4, 2)
    _, mean, variance = jax.jit(lambda x: normalise_batch(x, jnp.ones(2), jnp.zeros(2), 3, 1e-5))(x)
    np.testing.assert_allclose(variance, np.var(np.asarray(x, np.float64), (0, 1, 2)), rtol=1e-2)
    np.testing.assert_allclose(mean, np.mean(np.asarray(x, np.float64), (0, 1, 2)), rtol=1e-6)


def test_statistics_of_one_value_stay_finite():
    @jax.jit
    def run(x):
        variables = BatchNorm().init(jax.random.key(0), x, train=False)
        return BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])

    chex.assert_tree_all_finite(run(jnp.full((1, 1, 1, 2), 3.0)))


def test_initialising_leaves_the_running_statistics_neutral():
    x = 5.0 + draw(0, 4, 3, 3, 2)
    for train in (True, False):
        stats = jax.jit(lambda x, train=train: BatchNorm().init(jax.random.key(0), x, train=train))(x)["batch_stats"]
        chex.assert_trees_all_equal(stats, {"mean": jnp.zeros(2), "variance": jnp.ones(2)})


# ---- The rest -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_relu_at_zero_is_zero():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(relu(x), [0, 0, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu))(x), [0, 0, 1])


def test_gelu_is_the_exact_one_and_so_is_its_gradient():
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.zeros(1)])
    y, (gradient,) = pulled_back(gelu, [x], jnp.ones_like(x))
    expected, (expected_gradient,) = pulled_back(lambda x: jax.nn.gelu(x, approximate=False), [x], jnp.ones_like(x))
    chex.assert_trees_all_close((y, gradient), (expected, expected_gradient), atol=1e-6, rtol=1e-6)
    assert_slope(gelu, [draw(0, 3, 4)], draw(1, 3, 4))


def test_gelu_keeps_nothing_for_its_gradient_but_its_input():
    x = draw(0, 5, 4)
    _, pull = jax.vjp(gelu, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
    assert len(kept) == 1
    chex.assert_trees_all_equal(kept[0], x)


@pytest.mark.parametrize(("is_rounded", "summed"), [(True, "[1] x [0]"), (False, "[0] x [0]")])
def test_products_are_of_the_kind_that_is_fast_for_their_dtype(is_rounded, summed):
    x, kernel = draw(0, 4, 6, 6, 8), draw(1, 3, 3, 4, 5)

    def gradient_by_input(x, kernel):
        return jax.grad(lambda x: convolve_3x3(x, kernel, is_rounded).sum())(x)

    products = [
        line
        for function in (lambda x, kernel: convolve_3x3(x, kernel, is_rounded), gradient_by_input)
        for line in jax.jit(function).lower(x, kernel).as_text().splitlines()
        if "dot_general" in line and "[1] x [1]" not in line  # the gradient by the kernel
    ]
    assert len(products) >= 2
    assert all(f"contracting_dims = {summed}" in line for line in products)


@pytest.mark.parametrize("axes", [(1, 2), (0, 2)])
def test_pooling_takes_the_largest_of_four(axes):
    x = draw(0, 4, 4, 7, 4)
    expected = np.stack(
        [
            np.asarray(x).take(range(i, 4, 2), axes[0]).take(range(j, j + 5, 2), axes[1])
            for i in range(2)
            for j in range(2)
        ]
    ).max(axis=0)
    np.testing.assert_array_equal(jax.jit(max_pool, static_argnums=1)(x, axes), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 7)], ids=str)
def test_the_global_maximum_is_that_of_all_pixels_and_so_is_its_gradient(size):
    x = np.random.default_rng(0).permutation(2 * np.prod(size) * 3).reshape(2, *size, 3).astype(np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(global_max(x, (1, 2)))))(x)
    largest = x.max((1, 2), keepdims=True)
    np.testing.assert_array_equal(jax.jit(lambda x: global_max(x, (1, 2)))(x), largest)
    assert value == largest.sum()
    np.testing.assert_array_equal(gradient, x == largest)


def test_no_gradient_of_a_pool_depends_on_how_the_maximum_is_rounded():
    """A compiler that computes a pixel twice may round it differently: then it does not equal the maximum."""
    for pool in (max_pool, max_pool_3x3, global_max):
        gradient = jax.grad(lambda x, pool=pool: jnp.sum(pool(x, (1, 2))))
        equations = jax.make_jaxpr(gradient)(jnp.zeros((1, 4, 4, 1))).eqns
        maxima = {e.outvars[0]: e.invars for e in equations if e.primitive.name in ("max", "custom_jvp_call")}
        compared = [e.invars for e in equations if e.primitive.name in ("eq", "ne", "gt", "ge", "lt", "le")]
        assert len(maxima) >= 2
        assert len(compared) >= 2
        for first, second in compared:
            assert first not in maxima.get(second, ())
            assert second not in maxima.get(first, ())


def test_channels_are_scaled_by_the_width_of_which_64_is_the_papers():
    scaled = [scale_channels(channels, width) for channels, width in ((512, 64), (512, 4), (100, 8), (16, 1), (3, 128))]
    assert scaled == [512, 32, 12, 1, 6]


def test_all_lowerings_start_from_the_same_parameters():
    @jax.jit
    def init():
        return [
            [
                module.init(jax.random.key(3), layout_of(lowering).from_nhwc(jnp.zeros((2, 5, 4, 3))))
                for module in (
                    Conv(4, 3, 1, lowering),
                    DepthwiseConv(1, lowering),
                    Dense(4, lowering),
                    Classifier(4, lowering),
                )
            ]
            for lowering in LOWERINGS
        ]

    chex.assert_trees_all_equal(*init())


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_classifier_starts_as_pytorchs_linear(lowering):
    channels, classes = 25, 400
    x = draw(0, 2, 3, 4, channels)
    module = Classifier(classes, lowering)
    params = jax.jit(module.init)(jax.random.key(1), layout_of(lowering).from_nhwc(x))["params"]
    for name, shape in (("kernel", (channels, classes)), ("bias", (classes,))):
        values = np.asarray(params[name])
        assert values.shape == shape
        assert np.abs(values).max() <= channels**-0.5
        assert values.std() == pytest.approx(channels**-0.5 / 3**0.5, rel=0.1)  # uniform up to the bound
    logits = jax.jit(lambda params: module.apply({"params": params}, layout_of(lowering).from_nhwc(x)))(params)
    expected = np.asarray(x).mean((1, 2)) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_fully_connected_layer_flattens_pixels_in_the_order_of_nhwc(lowering):
    layout = layout_of(lowering)
    x, module = draw(0, 5, 2, 3, 4), Dense(200, lowering)
    params = jax.jit(module.init)(jax.random.key(1), layout.from_nhwc(x))["params"]
    for name, shape in (("kernel", (24, 200)), ("bias", (200,))):
        values = np.asarray(params[name])
        assert values.shape == shape
        assert np.abs(values).max() <= 24**-0.5
        assert values.std() == pytest.approx(24**-0.5 / 3**0.5, rel=0.1)
    y = jax.jit(lambda params: layout.to_nhwc(module.apply({"params": params}, layout.from_nhwc(x))))(params)
    expected = np.asarray(x).reshape(5, 24) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(y, expected[:, None, None, :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axes", "shape"), [((1, 2), (2, 7, 4, 3)), ((1, 2), (2, 1, 8, 3))])
def test_pooling_of_imagenet_stems_takes_the_largest_of_nine(axes, shape):
    x = np.asarray(draw(0, *shape))
    padded = np.pad(x, [(1, 1) if axis in axes else (0, 0) for axis in range(4)], constant_values=-np.inf)
    rows, columns = ((shape[axis] - 1) // 2 + 1 for axis in axes)
    expected = np.stack(
        [
            padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2][:, :rows, :columns]
            for i in range(3)
            for j in range(3)
        ]
    ).max(axis=0)
    np.testing.assert_array_equal(jax.jit(max_pool_3x3, static_argnums=1)(x, axes), expected)
