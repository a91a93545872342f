"""Layers that match PyTorch's, in the memory layout and form that is fast on the backend.

A convolution can be lowered in four ways, of which the first three agree within float tolerance:

- `"native"`: `lax.conv_general_dilated` on NHWC arrays; cuDNN's form and the default on accelerators.
- `"patches"`: also NHWC, as one product of pixel neighbourhoods and kernel; vmapped over stacked kernels it is a batched
  product, where the native form becomes a grouped convolution.
- `"shifted"`: matrix products on batch-minor [C, H, W, N] arrays; the default on a CPU. There the gradients of XLA's own
  convolution are 5 to 100 times slower under vmap or inside `lax.scan`; with the batch innermost every shift is a long
  contiguous copy and every reduction of batch normalisation runs over contiguous memory.
- `"shifted_bfloat16"`: the same, but what is multiplied is rounded to bfloat16; sums, activations and parameters stay float32.
  Losses agree to about 1 %. It pays only on a CPU with instructions for such products.

`bdjax/training/probe.py` measures which is fastest. Parameters have one canonical form (float32, kernels HWIO), so checkpoints
depend neither on the lowering nor on the compute dtype.

Activations may be bfloat16: layers compute in the dtype of their input, with float32 parameters, float32 statistics of batch
normalisation and float32 logits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from bdjax.choices import ComputeDtype as ComputeDtype  # plugins' networks import both from here
from bdjax.choices import Lowering
from bdjax.selection import larger
from bdjax.types import GroupEnd

EXACT_LOWERINGS: tuple[Lowering, ...] = ("native", "patches", "shifted")
"""Those that agree within float tolerance."""
BATCH_MINOR: tuple[Lowering, ...] = ("shifted", "shifted_bfloat16")


def default_lowering() -> Lowering:
    """The lowering to use without a measurement: shifted matrix products on a CPU, native elsewhere."""
    return "shifted" if jax.default_backend() == "cpu" else "native"


def scale_channels(channels: int, width: int) -> int:
    """A layer's channels scaled to a network's width (64 is the papers' size): rounded, and at least 1."""
    return max(1, round(channels * width / 64))


class Layout(NamedTuple):
    """The positions of an activation's axes inside a network with a given lowering."""

    channel_axis: int
    spatial_axes: tuple[int, int]
    batch_axis: int
    from_nhwc: Callable[[jax.Array], jax.Array]
    to_nhwc: Callable[[jax.Array], jax.Array]


def layout_of(lowering: Lowering) -> Layout:
    """The memory layout of a lowering.

    Raises:
        ValueError: if the lowering is unknown.
    """
    if lowering in ("native", "patches"):
        return Layout(3, (1, 2), 0, lambda x: x, lambda x: x)
    if lowering in BATCH_MINOR:
        return Layout(0, (1, 2), 3, lambda x: jnp.transpose(x, (3, 1, 2, 0)), lambda x: jnp.transpose(x, (3, 1, 2, 0)))
    raise ValueError(f"lowering {lowering!r} is not one of {', '.join(map(repr, get_args(Lowering)))}")


LARGE_BYTES = 2 * 2**20
"""From this size on the copies of a whole activation would leave the cache of a core."""

# ---- Convolutions on [C, H, W, N] as matrix products ---------------------------------------------------------------


def _matmul(kernel: jax.Array, inputs: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The product of a kernel, as a matrix, and [C, H, W, N] -> float32 [O, H, W, N].

    XLA has two kinds of products on a CPU, and chooses by which axis of the matrix is summed over. For bfloat16 the kind with
    the outputs first is faster (192 x 192 x 6272 on a core with AVX-512: 0.9 and 2.0 ms), for float32 the other (2.1 and
    1.9 ms), so the matrix is written either way. Transposing the matrix would not do: XLA folds that into the product.

    Args:
        kernel: float, four axes.
        inputs: the axes of the kernel that are summed over, in the order of C; the others are the outputs.
        x: float [C, H, W, N], of the same dtype.
    """
    outputs = tuple(axis for axis in range(4) if axis not in inputs)
    count = math.prod(kernel.shape[axis] for axis in outputs)
    flat, precision = x.reshape(x.shape[0], -1), jnp.float32
    if kernel.dtype == jnp.bfloat16:
        matrix = jnp.transpose(kernel, outputs + inputs).reshape(count, -1)
        product = lax.dot(matrix, flat, preferred_element_type=precision)
    else:
        matrix = jnp.transpose(kernel, inputs + outputs).reshape(-1, count)
        product = lax.dot_general(matrix, flat, (((0,), (0,)), ((), ())), preferred_element_type=precision)
    return product.reshape(count, *x.shape[1:])


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Contract everything but the leading axes: [O, ...] and [C, ...] -> float32 [O, C]."""
    flat = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    return lax.dot_general(*flat, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _operand(x: jax.Array, is_rounded: bool) -> jax.Array:
    """What a product reads: rounded before it is copied, so that the copies are half as large."""
    return x.astype(jnp.bfloat16) if is_rounded else x


def _shift(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """y[:, h, w] = x[:, h + rows, w + columns], zero outside the image; each shift is -1, 0 or 1."""
    zero = jnp.zeros((), x.dtype)
    pads = tuple((max(-shift, 0) - max(shift, 0), max(shift, 0) - max(-shift, 0), 0) for shift in (rows, columns))
    return lax.pad(x, zero, ((0, 0, 0), *pads, (0, 0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_3x3(x: jax.Array, kernel: jax.Array, is_rounded: bool = False) -> jax.Array:
    """A 3x3 convolution, stride 1, padding 1, as one matrix product.

    Rows are shifted before the product (three copies instead of the nine of im2col) and columns after it (three adds). That is
    fast because the product stays wide and the data only triples. Activations of more than `LARGE_BYTES` are convolved row by
    row: what is worked on at once then stays in the cache, and three neighbouring rows need no copies.

    Args:
        x: float [C, H, W, N].
        kernel: float [3, 3, C, O].
        is_rounded: whether the operands of all products are rounded to bfloat16; sums are float32 in any case.

    Returns:
        float [O, H, W, N], of the dtype of x.
    """
    return _convolve_3x3_forward(x, kernel, is_rounded)[0]


def _stack_rows(x: jax.Array) -> jax.Array:
    """[C, H, W, N] -> [3C, H, W, N]."""
    return jnp.concatenate([_shift(x, i - 1, 0) for i in range(3)], axis=0)


def _is_large(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the larger of the input and the output has more than `LARGE_BYTES`."""
    channels, features = kernel.shape[2:]
    return x.size // channels * max(channels, features) * x.dtype.itemsize > LARGE_BYTES


def _shift_columns(x: jax.Array, columns: int) -> jax.Array:
    """y[..., w, :] = x[..., w + columns, :], zero outside the image; the shift is -1, 0 or 1."""
    pad = (max(-columns, 0) - max(columns, 0), max(columns, 0) - max(-columns, 0), 0)
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * (x.ndim - 2) + (pad, (0, 0, 0)))


def _pad_rows(x: jax.Array) -> jax.Array:
    """[C, H, W, N] -> [C, H + 2, W, N], with a row of zeros above and below."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 0)))


def _three_rows(padded: jax.Array, row: jax.Array) -> jax.Array:
    """The neighbourhood of a row of the image before padding: [C, H + 2, W, N] -> [C, 3, W, N]."""
    return lax.dynamic_slice_in_dim(padded, row, 3, axis=1)


def _product_of_rows(window: jax.Array, kernel: jax.Array) -> jax.Array:
    """[C, 3, W, N] with [3, 3, C, O] -> a row of the output, float32 [O, 1, W, N]."""
    products = _matmul(kernel, (2, 0), window.reshape(-1, 1, *window.shape[2:]))
    products = products.reshape(3, -1, *products.shape[1:])
    return sum(_shift_columns(products[i], i - 1) for i in range(3))


def _by_rows_forward(x: jax.Array, kernel: jax.Array, is_rounded: bool) -> jax.Array:
    padded, rounded = _pad_rows(_operand(x, is_rounded)), _operand(kernel, is_rounded)

    def add_row(row: jax.Array, y: jax.Array) -> jax.Array:
        of_row = _product_of_rows(_three_rows(padded, row), rounded).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, of_row, row, axis=1)

    return lax.fori_loop(0, x.shape[1], add_row, jnp.zeros((kernel.shape[3], *x.shape[1:]), x.dtype))


def _by_rows_backward(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, is_rounded: bool
) -> tuple[jax.Array, jax.Array]:
    """The gradient by the input is the convolution of the gradient with the transposed kernel."""
    channels, features = kernel.shape[2:]
    padded, padded_gradient = (_pad_rows(_operand(values, is_rounded)) for values in (x, gradient))
    transposed = _operand(jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2)), is_rounded)

    def add_row(row: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_gradient, matrix_gradient = sums
        window = _three_rows(padded_gradient, row)
        of_row = _product_of_rows(window, transposed).astype(x.dtype)
        x_gradient = lax.dynamic_update_slice_in_dim(x_gradient, of_row, row, axis=1)
        columns = jnp.stack([_shift_columns(window[:, 1], 1 - i) for i in range(3)])
        return x_gradient, matrix_gradient + _outer(
            columns.reshape(3 * features, -1), _three_rows(padded, row).reshape(3 * channels, -1)
        )

    start = jnp.zeros_like(x), jnp.zeros((3 * features, 3 * channels), jnp.float32)
    x_gradient, matrix_gradient = lax.fori_loop(0, x.shape[1], add_row, start)
    kernel_gradient = jnp.transpose(matrix_gradient.reshape(3, features, channels, 3), (3, 0, 2, 1))
    return x_gradient, kernel_gradient.astype(kernel.dtype)


def _convolve_3x3_forward(x, kernel, is_rounded):
    if _is_large(x, kernel):
        return _by_rows_forward(x, kernel, is_rounded), (x, kernel)
    products = jnp.split(_matmul(_operand(kernel, is_rounded), (0, 2), _stack_rows(_operand(x, is_rounded))), 3)
    return sum(_shift(products[i], 0, i - 1) for i in range(3)).astype(x.dtype), (x, kernel)


def _convolve_3x3_backward(is_rounded, residuals, gradient):
    x, kernel = residuals
    if _is_large(x, kernel):
        return _by_rows_backward(x, kernel, gradient, is_rounded)
    channels, features = kernel.shape[2:]
    columns = jnp.concatenate([_shift(_operand(gradient, is_rounded), 0, 1 - i) for i in range(3)], axis=0)
    stacked = _stack_rows(_operand(x, is_rounded))
    matrix_gradient = _outer(columns, stacked).reshape(3, features, 3, channels)
    rows = jnp.split(_matmul(_operand(kernel, is_rounded), (1, 3), columns), 3)
    x_gradient = sum(_shift(rows[i], 1 - i, 0) for i in range(3)).astype(x.dtype)
    return x_gradient, jnp.transpose(matrix_gradient, (2, 0, 3, 1)).astype(kernel.dtype)


convolve_3x3.defvjp(_convolve_3x3_forward, _convolve_3x3_backward)


def _patches(x: jax.Array, size: int, stride: int, padding: int, channel_axis: int) -> jax.Array:
    """The k*k neighbours of every output pixel on the channel axis (im2col), ordered by kernel row first."""
    around = (padding, padding, 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), around, around, (0, 0, 0))) if padding else x
    height, width = ((length - size) // stride * stride + 1 for length in padded.shape[1:3])
    first, last = padded.shape[0], padded.shape[3]
    # Indexing gives the same slices, and takes several times as long to trace.
    shifted = [
        lax.slice(padded, (0, i, j, 0), (first, i + height, j + width, last), (1, stride, stride, 1))
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, axis=channel_axis) if len(shifted) > 1 else shifted[0]


def _convolve_batch_minor(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, is_rounded: bool = False
) -> jax.Array:
    """Any square convolution by im2col: [C, H, W, N] with [k, k, C, O] -> [O, H', W', N]. For strides above 1, where the
    shifted form would compute columns that are discarded."""
    patches = _patches(_operand(x, is_rounded), kernel.shape[0], stride, padding, channel_axis=0)
    return _matmul(_operand(kernel, is_rounded), (0, 1, 2), patches).astype(x.dtype)


# ---- Convolutions on [N, H, W, C] ----------------------------------------------------------------------------------


# Checkpointed: the patches, k*k times the input, are computed again in the backward pass.
@partial(jax.checkpoint, static_argnums=(2, 3))
def _convolve_patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Any square convolution by im2col: [N, H, W, C] with [k, k, C, O] -> [N, H', W', O]."""
    patches = _patches(x, kernel.shape[0], stride, padding, channel_axis=3)
    return lax.dot_general(patches, kernel.reshape(-1, kernel.shape[3]), (((3,), (0,)), ((), ())))


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, lowering: Lowering) -> jax.Array:
    """A square convolution without bias, padded by `padding` on all sides as in PyTorch.

    `"SAME"` would pad a stride-2 convolution only on the bottom and right, shifting every feature map by half a pixel.

    Args:
        x: float activation in the lowering's layout.
        kernel: float [k, k, C, O].
        stride: in both directions.
        padding: zeros added on each of the four sides.
        lowering: how to compute it.

    Returns:
        The activation, in the same layout.
    """
    if lowering == "native":
        pads = ((padding, padding), (padding, padding))
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if lowering == "patches":
        return _convolve_patches(x, kernel, stride, padding)
    is_rounded = lowering == "shifted_bfloat16"
    if kernel.shape[0] == 3 and stride == 1 and padding == 1:
        return convolve_3x3(x, kernel, is_rounded)
    if kernel.shape[0] == 3 and stride == 1 and padding == 0:
        # Cheaper than nine copies, although the edge is discarded.
        return convolve_3x3(x, kernel, is_rounded)[:, 1:-1, 1:-1]
    return _convolve_batch_minor(x, kernel, stride, padding, is_rounded)


def convolve_depthwise(x: jax.Array, kernel: jax.Array, *, stride: int, lowering: Lowering) -> jax.Array:
    """A depthwise convolution, padded as in PyTorch to keep the size at stride 1.

    It is a sum of shifted multiples for every lowering: there is no sum over channels for a matrix product, XLA fuses the
    terms, and vmapping over stacked kernels creates no grouped convolution.

    Args:
        x: float activation in the lowering's layout.
        kernel: float [k, k, 1, C], k odd.
        stride: in both directions.
        lowering: determines the order of the axes.

    Returns:
        The activation, in the same layout.
    """
    layout = layout_of(lowering)
    size = kernel.shape[0]
    around = (size // 2, size // 2, 0)
    pads = tuple(around if axis in layout.spatial_axes else (0, 0, 0) for axis in range(4))
    padded = lax.pad(x, jnp.zeros((), x.dtype), pads)
    height, width = ((x.shape[axis] - 1) // stride * stride + 1 for axis in layout.spatial_axes)
    # Rows and columns are axes 1 and 2 of both layouts. Indexing would become a gather where the batch size is symbolic.
    first, last = padded.shape[0], padded.shape[3]
    return sum(
        lax.slice(padded, (0, i, j, 0), (first, i + height, j + width, last), (1, stride, stride, 1))
        * along(kernel[i, j, 0], layout.channel_axis)
        for i in range(size)
        for j in range(size)
    )


def max_pool(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """2x2 max-pooling with stride 2; an odd last row or column is left out, as in PyTorch.

    It takes maxima of slices, since the gradient of XLA's pooling is slow on a CPU. Equal pixels share the gradient, whereas
    PyTorch gives it to the first of them.

    Args:
        x: float, any layout; at least two pixels along both axes.
        axes: the axes of rows and columns.
    """
    for axis in axes:
        even = x.shape[axis] // 2 * 2
        first, second = (lax.slice_in_dim(x, start, even, 2, axis) for start in (0, 1))
        x = larger(first, second)
    return x


def global_max(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The maximum over all pixels; both axes are left with a length of 1. Equal pixels share the gradient: see `larger`.

    Args:
        x: float, any layout.
        axes: the axes of rows and columns.
    """
    for axis in axes:
        while (length := x.shape[axis]) > 1:
            half = length // 2
            first, second = (lax.slice_in_dim(x, start, start + half, axis=axis) for start in (0, half))
            parts = [larger(first, second)]
            if length % 2:
                parts.append(lax.slice_in_dim(x, length - 1, length, axis=axis))
            x = lax.concatenate(parts, axis)
    return x


def max_pool_3x3(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """3x3 max-pooling with stride 2 and padding 1, as in ImageNet stems. See `max_pool` for the gradient.

    Args:
        x: float, any layout.
        axes: the axes of rows and columns.
    """
    for axis in axes:
        pads = tuple((1, 1, 0) if i == axis else (0, 0, 0) for i in range(x.ndim))
        padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
        end = (x.shape[axis] - 1) // 2 * 2 + 1
        first, second, third = (lax.slice_in_dim(padded, start, start + end, 2, axis) for start in range(3))
        x = larger(larger(first, second), third)
    return x


def along(values: jax.Array, axis: int) -> jax.Array:
    """[C] reshaped to four axes, to broadcast along all but one of them."""
    return values.reshape(tuple(values.size if i == axis else 1 for i in range(4)))


# ---- Batch normalisation --------------------------------------------------------------------------------------------


def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    """x * factor + offset, both float [C] along `axis`: one multiplication and one addition per pixel."""
    return x * along(factor, axis) + along(offset, axis)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise_batch(x: jax.Array, scale: jax.Array, bias: jax.Array, axis: int, epsilon: float):
    """Normalise by the batch's statistics (Ioffe & Szegedy 2015), with the gradient in closed form.

    The closed form reads the activation twice; automatic differentiation would read and write it several times more.

    Args:
        x: float32 or bfloat16, any layout; statistics are float32 in either case.
        scale: float [C].
        bias: float [C].
        axis: the axis of the C channels.
        epsilon: added to the variance.

    Returns:
        (y like x, mean float [C], biased variance float [C]). No gradient flows through the returned statistics, which
        are for the running averages only.
    """
    return _normalise_forward(x, scale, bias, axis, epsilon)[0]


def _normalise_forward(x, scale, bias, axis, epsilon):
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    exact = x.astype(scale.dtype)
    mean = jnp.mean(exact, reduced)
    variance = jnp.mean(jnp.square(_affine(exact, jnp.ones_like(mean), -mean, axis)), reduced)
    inverse = lax.rsqrt(variance + epsilon)
    y = _affine(exact, scale * inverse, bias - mean * scale * inverse, axis)
    return (y.astype(x.dtype), mean, variance), (x, scale, mean, inverse)


def _normalise_backward(axis, epsilon, residuals, gradients):
    x, scale, mean, inverse = residuals
    gradient = gradients[0].astype(scale.dtype)
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    count = x.size // x.shape[axis]
    normalised = _affine(x.astype(scale.dtype), inverse, -mean * inverse, axis)
    bias_gradient = jnp.sum(gradient, reduced)
    scale_gradient = jnp.sum(gradient * normalised, reduced)
    factor = scale * inverse
    x_gradient = _affine(gradient, factor, -factor * bias_gradient / count, axis)
    x_gradient = x_gradient - _affine(normalised, factor * scale_gradient / count, jnp.zeros_like(factor), axis)
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


normalise_batch.defvjp(_normalise_forward, _normalise_backward)


# ---- Flax modules --------------------------------------------------------------------------------------------------


he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """PyTorch's default start of a layer's weights: uniform in ±1/sqrt(fan in). The last axis is the outputs'."""
    return _uniform(math.prod(shape[:-1]))(key, shape, dtype)


def parameter(layer: nn.Module, name: str, start: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
    """A layer's float32 parameter, as by `layer.param`, which traces the initialiser at every call only to learn its shape.

    That is a third of the time of tracing a network, so a parameter that is there and has the shape is returned at once.

    Args:
        layer: inside its compact method.
        name: of the parameter.
        start: draws it if the layer is being initialised.
        shape: of the parameter.

    Raises:
        flax.errors.ScopeParamShapeError: the parameter that is there has another shape.
    """
    if layer.has_variable("params", name):
        value = layer.get_variable("params", name)
        if jnp.shape(value) == shape:
            return value
    return layer.param(name, start, shape, jnp.float32)


class Convolution(nn.Module):
    """Any layer whose output `Model.convolutions` records; it has a `lowering`."""


class Conv(Convolution):
    """PyTorch's `Conv2d`, by default initialised as in torchvision's ResNets and VGGs: normal, He et al. 2015, fan out.

    A bias starts at 0.
    """

    features: int
    size: int
    stride: int = 1
    lowering: Lowering = "native"
    padding: int | None = None
    """zeros on each of the four sides; None for half the kernel's size, which keeps the image size at stride 1"""
    bias: bool = False
    start: nn.initializers.Initializer = he_fan_out

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channel_axis = layout_of(self.lowering).channel_axis
        shape = (self.size, self.size, x.shape[channel_axis], self.features)
        kernel = parameter(self, "kernel", self.start, shape)
        padding = self.size // 2 if self.padding is None else self.padding
        y = convolve(x, kernel.astype(x.dtype), stride=self.stride, padding=padding, lowering=self.lowering)
        if not self.bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        return y + along(bias.astype(x.dtype), channel_axis)


class DepthwiseConv(Convolution):
    """PyTorch's `Conv2d(C, C, 3, padding=1, groups=C, bias=False)`, initialised as in torchvision's MobileNetV2.

    That is normal, fan out; PyTorch counts all C channels in the fan out, although each input has one output.
    """

    stride: int = 1
    lowering: Lowering = "native"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[layout_of(self.lowering).channel_axis]
        kernel = parameter(self, "kernel", he_fan_out, (3, 3, 1, channels))
        return convolve_depthwise(x, kernel.astype(x.dtype), stride=self.stride, lowering=self.lowering)


class BatchNorm(nn.Module):
    """PyTorch's `BatchNorm2d`: epsilon 1e-5, a weight (momentum) of 0.1 for the new value, and *unbiased* running variance.

    Flax's `BatchNorm` uses the biased variance and, by default, a momentum of 0.99 for the old value.
    """

    lowering: Lowering = "native"
    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        axis = layout_of(self.lowering).channel_axis
        channels = x.shape[axis]
        scale = parameter(self, "scale", nn.initializers.ones, (channels,))
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (channels,), jnp.float32)
        if train:
            y, mean, variance = normalise_batch(x, scale, bias, axis, self.epsilon)
            if not self.is_initializing():
                count = x.size // channels
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_variance.value += self.momentum * (unbiased - running_variance.value)
            return y
        factor = scale * lax.rsqrt(running_variance.value + self.epsilon)
        return _affine(x.astype(scale.dtype), factor, bias - running_mean.value * factor, axis).astype(x.dtype)


class Dense(nn.Module):
    """A hidden fully connected layer: PyTorch's `Linear` (weights and bias uniform in ±1/sqrt(fan in)).

    For every lowering, pixels are flattened in NHWC order. The output is an activation of one pixel in the lowering's layout,
    which can be passed to a tap, to another `Dense` or to the `Classifier`.
    """

    features: int
    lowering: Lowering = "native"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layout = layout_of(self.lowering)
        flat = layout.to_nhwc(x).reshape(x.shape[layout.batch_axis], -1)
        kernel = parameter(self, "kernel", uniform_fan_in, (flat.shape[1], self.features))
        bias = parameter(self, "bias", _uniform(flat.shape[1]), (self.features,))
        y = lax.dot(flat, kernel.astype(x.dtype)) + bias.astype(x.dtype)[None, :]
        return layout.from_nhwc(y[:, None, None, :])


class Classifier(nn.Module):
    """Global average pooling and PyTorch's `Linear` (weights and bias uniform in ±1/sqrt(fan in))."""

    num_classes: int
    lowering: Lowering = "native"
    has_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layout = layout_of(self.lowering)
        channels = x.shape[layout.channel_axis]
        pooled = jnp.mean(x.astype(jnp.float32), layout.spatial_axes)  # [N, C] or [C, N]
        kernel = parameter(self, "kernel", uniform_fan_in, (channels, self.num_classes))
        contracted = 0 if layout.channel_axis == 0 else 1
        logits = lax.dot_general(pooled, kernel, (((contracted,), (0,)), ((), ())))
        if not self.has_bias:
            return logits
        bias = parameter(self, "bias", _uniform(channels), (self.num_classes,))
        return logits + bias[None, :]


class Recorded(NamedTuple):
    """The taps and ends of groups that a network has recorded."""

    features: dict[str, jax.Array]
    groups: dict[str, GroupEnd]


class Taps:
    """The named activations of a network that callers may read and replace.

    Each call of a network makes one object. `taps("stage1", x)` records x, as float32 NHWC, and returns the input of the next
    stage, which is `edits["stage1"](x)` if the caller gave that edit. The ends of groups, for distillation, are recorded in two
    steps, since the normalisation of a group's output may belong to the next group: `taps.group("group1", x)` does the same for
    a group's output, and `taps.before_relu("group1", y, norm)` adds the input of the next ReLU.
    """

    def __init__(self, lowering: Lowering, edits: dict[str, Callable[[jax.Array], jax.Array]] | None):
        self._layout = layout_of(lowering)
        self._edits = dict(edits or {})
        self._outputs: dict[str, jax.Array] = {}
        self.features: dict[str, jax.Array] = {}
        self.groups: dict[str, GroupEnd] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        self.features[name], x = self._edited(name, x)
        return x

    def group(self, name: str, x: jax.Array) -> jax.Array:
        """Record a group's output and return the input of the next layer."""
        self._outputs[name], x = self._edited(name, x)
        return x

    def before_relu(self, name: str, x: jax.Array, norm: "BatchNorm") -> None:
        """Record the input of the first ReLU after a group; `norm` is the last normalisation before it."""
        scale, bias = (norm.get_variable("params", parameter) for parameter in ("scale", "bias"))
        values = self._layout.to_nhwc(x).astype(jnp.float32)
        self.groups[name] = GroupEnd(self._outputs.pop(name), values, bias, jnp.abs(scale))

    def _edited(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = self._layout.to_nhwc(x).astype(jnp.float32)
        edit = self._edits.pop(name, None)
        if edit is not None:
            features = edit(features)
            x = self._layout.from_nhwc(features).astype(x.dtype)
        return features, x

    def finish(self) -> Recorded:
        """Return what was recorded; raise if an edit names a tap or group that the network does not have."""
        if self._edits:
            groups = f"; and groups {', '.join(self.groups)}" if self.groups else ""
            raise ValueError(
                f"no tap {', '.join(sorted(self._edits))}; this network has {', '.join(self.features)}{groups}"
            )
        return Recorded(self.features, self.groups)


relu = jax.nn.relu  # gradient 0 at 0, as in PyTorch
relu6 = jax.nn.relu6


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x, exactly, as in PyTorch; float of any shape."""
    return x * _normal(x)


def _normal(x: jax.Array) -> jax.Array:
    """The normal distribution function. By erf: XLA's erfc takes several passes over the activation."""
    return 0.5 + 0.5 * lax.erf(x * (0.5**0.5))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Computed from x again: automatic differentiation would keep three more arrays of its size."""
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return (gradient * (_normal(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)
