"""Writes a network as an ONNX model, with its normalisation inside and for any number of images.

The network is traced by JAX for a batch of unknown size, and the few primitives that networks consist of are translated one by
one; nothing here knows an architecture. Whatever depends on the weights alone is computed now. The weights are the same for
every lowering, so the native lowering of the same architecture is traced, whose convolutions become ONNX's.

ONNX has channels first, JAX has them last. Instead of transposing at every convolution, each traced array remembers in which
order the graph stores its axes (`_Array.order`), and an array is transposed only where two orders meet.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bdjax import extras
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError
from bdjax.exchange.saved_model import native
from bdjax.types import Model, PyTree

OPSET = 18
"""Version of the operators; IR_VERSION is the format's, of the same year (2022)."""
IR_VERSION = 8
INPUT, OUTPUT = "images", "logits"
_FROM_NHWC = (0, 3, 1, 2)
_SHARED_BYTES = 1 << 10
"""Smaller constants are written once, however often they occur."""


class _Array(NamedTuple):
    """A traced array: known now, or a tensor of the graph.

    Its sides may be 1 where the traced shape has more: it is then the same along that axis, and stretched when needed.
    """

    known: np.ndarray | None = None
    name: str = ""
    order: tuple[int, ...] = ()
    """axis i of the graph's tensor is axis order[i] of the traced array"""
    shape: tuple[Any, ...] = ()
    """sides in the traced order, before they are stretched; the batch's is symbolic"""


class _Window(NamedTuple):
    """A tensor whose elements are maxima of neighbours along one axis of another tensor: a slice, or a part of a max-pool."""

    source: _Array
    axis: int
    """of the graph's tensor"""
    start: int
    length: int
    stride: int


def to_onnx(model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> bytes:
    """Write a network as an ONNX model.

    Its input is "images", float32 [batch, C, H, W] in [0, 1]; its output is "logits", float32 [batch, K].

    Args:
        model: the network. Of an architecture in `MODELS`, or ABM's pair of them, the native lowering in float32 is written,
            whatever this one's is.
        variables: of one member.
        image_shape: (H, W, C).

    Returns:
        The content of the file, checked by `onnx.checker`.

    Raises:
        InputError: onnx is not installed, or the network has a primitive that has no translation.
    """
    onnx = extras.onnx()
    network = native(model) or model

    def logits(images: jax.Array) -> jax.Array:
        return network.apply(variables, images, train=False).logits

    (batch,) = export.symbolic_shape("batch")
    try:
        traced = jax.make_jaxpr(logits)(jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32))
    except Exception as error:  # a shape that depends on the number of images in a way that JAX cannot express
        raise InputError(
            f"{model.description}: cannot be written as ONNX for any number of images ({one_line(error)[:200]}); build it with "
            "the native lowering"
        ) from error
    writer = _Writer(model.description)
    images = _Array(None, INPUT, _FROM_NHWC, (batch, *image_shape))
    (found,) = writer.run(traced.jaxpr, traced.consts, [images])
    writer.add("Identity", [writer.tensor(writer.stretched(found, traced.out_avals[0].shape), (0, 1))], output=OUTPUT)

    height, width, channels = image_shape
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        writer.used_nodes(),
        "classifier",
        [value(INPUT, onnx.TensorProto.FLOAT, ["batch", channels, height, width])],
        [value(OUTPUT, onnx.TensorProto.FLOAT, ["batch", model.num_classes])],
        writer.used_constants(),
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    made = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="bdjax")
    onnx.helper.set_model_props(made, {"network": model.description, "pixels": "in [0, 1]"})
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


# ---- The graph --------------------------------------------------------------------------------------------------------


class _Writer:
    """The nodes and constants of a graph that is being written."""

    def __init__(self, network: str):
        self._network = network
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {}
        self._shared: dict[tuple, str] = {}
        self.windows: dict[str, _Window] = {}
        """name of a tensor -> what it is, for those that may become parts of a max-pool"""

    def run(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[_Array]) -> list[_Array]:
        """Translate traced operations; returns their results."""
        values: dict[Any, _Array] = {}

        def read(atom: Any) -> _Array:
            return known(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else values[atom]

        values |= zip(jaxpr.constvars, (known(np.asarray(constant)) for constant in constants), strict=True)
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            values |= zip(
                equation.outvars, self._equation(equation, [read(atom) for atom in equation.invars]), strict=True
            )
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[_Array]) -> list[_Array]:
        name = equation.primitive.name
        inner = next(
            (equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params), None
        )
        if inner is not None and name in _CALLS:
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        translate = _TRANSLATIONS.get(name)
        if all(value.known is not None for value in inputs) and name != "broadcast_in_dim":
            return _computed(equation, inputs)
        if translate is None:
            raise InputError(f"{self._network}: cannot be written as ONNX: JAX's {name} has no translation")
        return [translate(self, equation, *inputs)]

    def add(self, operator: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        output = output or f"{operator.lower()}_{len(self._nodes)}"
        node = extras.onnx().helper.make_node(operator, list(inputs), [output], name=output, **attributes)
        self._nodes.append(node)
        return output

    def constant(self, array: np.ndarray) -> str:
        """The name of a constant."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.nbytes <= _SHARED_BYTES else None
        name = self._shared.get(key) or f"constant_{len(self._constants)}"
        if key:
            self._shared[key] = name
        self._constants[name] = array
        return name

    def tensor(self, value: _Array, order: tuple[int, ...]) -> str:
        """The name of an array as a tensor whose axes are stored in this order."""
        if value.known is not None:
            # A number stands for an array of any shape.
            return self.constant(np.transpose(value.known, order) if value.known.ndim else value.known)
        if value.order == order:
            return value.name
        return self.add("Transpose", [value.name], perm=[value.order.index(axis) for axis in order])

    def stretched(self, value: _Array, shape: tuple[Any, ...]) -> _Array:
        """An array with all its sides."""
        if value.shape == tuple(shape):
            return value
        if value.known is not None and not any(map(_is_symbolic, shape)):
            return known(np.broadcast_to(value.known, shape))
        if any(_is_symbolic(side) and own == 1 for side, own in zip(shape, value.shape, strict=True)):
            raise InputError(f"{self._network}: cannot be written as ONNX: an array is repeated for every image")
        order = value.order or tuple(range(len(shape)))
        sides = [1 if _is_symbolic(shape[axis]) else shape[axis] for axis in order]
        name = self.add("Expand", [self.tensor(value, order), self.constant(np.array(sides, np.int64))])
        return _Array(None, name, order, tuple(shape))

    def used_nodes(self) -> list[Any]:
        """The nodes that the output depends on, in order."""
        wanted, used = {OUTPUT}, []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                used.append(node)
        return used[::-1]

    def used_constants(self) -> list[Any]:
        wanted = {name for node in self.used_nodes() for name in node.input}
        make = extras.onnx().numpy_helper.from_array
        return [make(array, name) for name, array in self._constants.items() if name in wanted]


def known(array: np.ndarray) -> _Array:
    return _Array(array, "", tuple(range(array.ndim)), array.shape)


def _is_symbolic(side: Any) -> bool:
    return not isinstance(side, (int, np.integer))


_BY_NUMPY: Mapping[str, Callable[..., np.ndarray]] = {
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "div": np.divide,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "neg": np.negative,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
}
"""Without a compilation for each shape."""


def _computed(equation: Any, inputs: list[_Array]) -> list[_Array]:
    """The results of an operation on known arrays."""
    name, arrays = equation.primitive.name, [value.known for value in inputs]
    if name in _BY_NUMPY and (name == "squeeze" or np.issubdtype(arrays[0].dtype, np.floating)):
        params = equation.params if name == "squeeze" else {}
        dtype = equation.outvars[0].aval.dtype
        return [known(np.asarray(_BY_NUMPY[name](*arrays, **params), dtype))]
    if name == "reshape" and not any(map(_is_symbolic, equation.params["new_sizes"])):
        return [known(_full(inputs[0], equation.invars[0]).reshape(equation.params["new_sizes"]))]
    full = [jnp.asarray(_full(value, atom)) for value, atom in zip(inputs, equation.invars, strict=True)]
    found = equation.primitive.bind(*full, **equation.params)
    return [known(np.asarray(array)) for array in (found if equation.primitive.multiple_results else [found])]


def _full(value: _Array, atom: Any) -> np.ndarray:
    """A known array with all its sides."""
    return np.broadcast_to(value.known, atom.aval.shape)


# ---- Translations of JAX's primitives ---------------------------------------------------------------------------------


def _together(writer: _Writer, operator: str, *inputs: _Array) -> _Array:
    """An operation on the elements of arrays of one rank; numbers stand for arrays."""
    order = next(value.order for value in inputs if value.known is None)
    shapes = [value.shape for value in inputs if value.shape or not order]
    shape = tuple(next((side for side in sides if side != 1), 1) for sides in zip(*shapes, strict=True))
    return _Array(None, writer.add(operator, [writer.tensor(value, order) for value in inputs]), order, shape)


def _elementwise(operator: str) -> Callable[..., _Array]:
    return lambda writer, equation, *inputs: _together(writer, operator, *inputs)


def _number(value: float, like: Any) -> _Array:
    return known(np.asarray(value, like.aval.dtype))


def _max(writer: _Writer, equation: Any, x: _Array, y: _Array) -> _Array:
    for value, other in ((x, y), (y, x)):
        if other.known is not None and other.known.size == 1 and float(other.known.item()) == 0:
            return _together(writer, "Relu", value)
    return _max_pool(writer, x, y) or _together(writer, "Max", x, y)


def _max_pool(writer: _Writer, x: _Array, y: _Array) -> _Array | None:
    """The maximum of neighbouring slices as a max-pool along one axis; None if they are anything else."""
    first, second = (writer.windows.get(value.name) for value in (x, y))
    if not first or not second or second != first._replace(start=first.start + first.length, length=second.length):
        return None
    if x.shape != y.shape or len(x.shape) != 4 or first.axis < 2 or first.start:
        return None
    joined = first._replace(length=first.length + second.length)
    side = first.source.shape[first.source.order[first.axis]]
    if (side - joined.length) // joined.stride + 1 == x.shape[x.order[first.axis]]:
        kernel, strides = [1, 1], [1, 1]
        kernel[first.axis - 2], strides[first.axis - 2] = joined.length, joined.stride
        found = x._replace(name=writer.add("MaxPool", [first.source.name], kernel_shape=kernel, strides=strides))
    else:  # a window that ends before the edge; the next slice may complete it
        found = _together(writer, "Max", x, y)
    writer.windows[found.name] = joined
    return found


def _rsqrt(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return _together(writer, "Reciprocal", _together(writer, "Sqrt", x))


def _erfc(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return _together(writer, "Sub", _number(1, equation.outvars[0]), _together(writer, "Erf", x))


def _integer_power(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return _together(writer, "Pow", x, _number(equation.params["y"], equation.outvars[0]))


def _same(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return x


def _convert(writer: _Writer, equation: Any, x: _Array) -> _Array:
    kind = extras.onnx().helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    return x._replace(name=writer.add("Cast", [x.name], to=kind))


def _select(writer: _Writer, equation: Any, which: _Array, first: _Array, second: _Array) -> _Array:
    return _together(writer, "Where", which, second, first)


def _clamp(writer: _Writer, equation: Any, low: _Array, x: _Array, high: _Array) -> _Array:
    return _together(writer, "Min", _together(writer, "Max", x, low), high)


def _convolution(writer: _Writer, equation: Any, x: _Array, kernel: _Array) -> _Array:
    params = equation.params
    spec = params["dimension_numbers"]
    pads = [pad for pair in zip(*params["padding"], strict=True) for pad in pair]
    if kernel.known is None or set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1 or min(pads) < 0:
        raise InputError(f"{writer._network}: cannot be written as ONNX: it has a convolution of an unusual kind")
    weights = np.transpose(_full(kernel, equation.invars[1]), spec.rhs_spec)
    x = writer.stretched(x, equation.invars[0].aval.shape)
    name = writer.add(
        "Conv",
        [writer.tensor(x, tuple(spec.lhs_spec)), writer.constant(weights)],
        strides=list(params["window_strides"]),
        pads=pads,
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        kernel_shape=list(weights.shape[2:]),
    )
    return _Array(None, name, tuple(spec.out_spec), equation.outvars[0].aval.shape)


def _product(writer: _Writer, equation: Any, x: _Array, y: _Array) -> _Array:
    (contracted, batched) = equation.params["dimension_numbers"]
    x, y = (writer.stretched(value, atom.aval.shape) for value, atom in zip((x, y), equation.invars, strict=True))
    if batched[0] or len(contracted[0]) != 1 or len(y.shape) != 2:
        raise InputError(f"{writer._network}: cannot be written as ONNX: it has a product of an unusual kind")
    free = tuple(axis for axis in range(len(x.shape)) if axis != contracted[0][0])
    names = [writer.tensor(x, (*free, contracted[0][0])), writer.tensor(y, (contracted[1][0], 1 - contracted[1][0]))]
    shape = equation.outvars[0].aval.shape
    return _Array(None, writer.add("MatMul", names), tuple(range(len(shape))), shape)


def _reduction(operator: str) -> Callable[..., _Array]:
    def translate(writer: _Writer, equation: Any, x: _Array) -> _Array:
        axes = equation.params["axes"]
        x = writer.stretched(x, equation.invars[0].aval.shape)
        positions = np.array([x.order.index(axis) for axis in axes], np.int64)
        name = writer.add(operator, [x.name, writer.constant(positions)], keepdims=0)
        left = sorted(set(x.order) - set(axes))
        order = tuple(left.index(axis) for axis in x.order if axis not in axes)
        return _Array(None, name, order, equation.outvars[0].aval.shape)

    return translate


def _reshape(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return _reshaped(writer, writer.stretched(x, equation.invars[0].aval.shape), equation.outvars[0].aval.shape)


def _reshaped(writer: _Writer, x: _Array, shape: tuple[Any, ...]) -> _Array:
    sides = [-1 if _is_symbolic(side) else side for side in shape]
    if sides.count(-1) > 1:
        raise InputError(f"{writer._network}: cannot be written as ONNX: an array has the images on several axes")
    plain = writer.tensor(x, tuple(range(len(x.shape))))
    name = writer.add("Reshape", [plain, writer.constant(np.array(sides, np.int64))])
    return _Array(None, name, tuple(range(len(shape))), tuple(shape))


def _squeeze(writer: _Writer, equation: Any, x: _Array) -> _Array:
    return _reshape(writer, equation, x)


def _broadcast(writer: _Writer, equation: Any, x: _Array) -> _Array:
    """Only adds axes of side 1; they are stretched where that is needed."""
    shape = [1] * len(equation.outvars[0].aval.shape)
    for axis, side in zip(equation.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = side
    if x.known is not None:
        return known(x.known.reshape(shape)) if shape else x
    return x if len(shape) == len(x.shape) else _reshaped(writer, x, tuple(shape))


def _transpose(writer: _Writer, equation: Any, x: _Array) -> _Array:
    permutation = equation.params["permutation"]
    order = tuple(permutation.index(axis) for axis in x.order)
    return x._replace(order=order, shape=tuple(x.shape[axis] for axis in permutation))


def _slice(writer: _Writer, equation: Any, x: _Array) -> _Array:
    params, shape = equation.params, equation.invars[0].aval.shape
    x = writer.stretched(x, shape)
    strides = params["strides"] or (1,) * len(shape)
    parts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    return _sliced(writer, x, parts, equation.outvars[0].aval.shape)


def _sliced(writer: _Writer, x: _Array, parts: Sequence[tuple[Any, Any, int]], shape: tuple[Any, ...]) -> _Array:
    """The array with (start, end, stride) along each axis; an axis that is taken whole may be the batch's."""
    cut = [axis for axis, part in enumerate(parts) if part != (0, x.shape[axis], 1)]
    if not cut:
        return x
    columns = [*zip(*(parts[axis] for axis in cut), strict=True)]
    numbers = [columns[0], columns[1], [x.order.index(axis) for axis in cut], columns[2]]
    names = [writer.constant(np.array(column, np.int64)) for column in numbers]
    name = writer.add("Slice", [x.name, *names])
    if len(cut) == 1:
        writer.windows[name] = _Window(x, numbers[2][0], columns[0][0], 1, columns[2][0])
    return x._replace(name=name, shape=tuple(shape))


def _gather(writer: _Writer, equation: Any, x: _Array, starts: _Array) -> _Array:
    """A slice, which is what indexing becomes where the batch size is symbolic."""
    spec, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    result = equation.outvars[0].aval.shape
    is_slice = starts.known is not None and starts.known.ndim == 1 and not spec.operand_batching_dims
    if not is_slice or spec.offset_dims != tuple(range(len(result))):
        raise InputError(f"{writer._network}: cannot be written as ONNX: it picks elements in an unusual way")
    x = writer.stretched(x, equation.invars[0].aval.shape)
    first = dict(zip(spec.start_index_map, starts.known.tolist(), strict=True))
    parts = [
        (first.get(axis, 0), side if first.get(axis, 0) == 0 else first[axis] + side, 1)
        for axis, side in enumerate(sizes)
    ]
    x = _sliced(writer, x, parts, sizes)
    return _reshaped(writer, x, result) if spec.collapsed_slice_dims else x


def _pad(writer: _Writer, equation: Any, x: _Array, filling: _Array) -> _Array:
    config, shape = equation.params["padding_config"], equation.invars[0].aval.shape
    if any(interior for _, _, interior in config) or filling.known is None:
        raise InputError(f"{writer._network}: cannot be written as ONNX: it has a padding of an unusual kind")
    x = writer.stretched(x, shape)
    kept = [(max(-low, 0), side + min(high, 0), 1) for (low, high, _), side in zip(config, shape, strict=True)]
    x = _sliced(writer, x, kept, tuple(end - start for start, end, _ in kept))
    around = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    if not any(map(any, around)):
        return x
    pads = np.array([[around[axis][end] for axis in x.order] for end in (0, 1)], np.int64).reshape(-1)
    name = writer.add("Pad", [x.name, writer.constant(pads), writer.constant(filling.known)])
    return x._replace(name=name, shape=equation.outvars[0].aval.shape)


def _concatenate(writer: _Writer, equation: Any, *inputs: _Array) -> _Array:
    parts = [writer.stretched(value, atom.aval.shape) for value, atom in zip(inputs, equation.invars, strict=True)]
    order = next(value.order for value in parts if value.known is None)
    axis = order.index(equation.params["dimension"])
    name = writer.add("Concat", [writer.tensor(value, order) for value in parts], axis=axis)
    return _Array(None, name, order, equation.outvars[0].aval.shape)


_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "remat2",
    "checkpoint",
)
_NAMES = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "min": "Min",
    "pow": "Pow",
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "erf": "Erf",
    "logistic": "Sigmoid",
    "floor": "Floor",
    "sign": "Sign",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "eq": "Equal",
}
_TRANSLATIONS: Mapping[str, Callable[..., _Array]] = {
    **{name: _elementwise(operator) for name, operator in _NAMES.items()},
    "max": _max,
    "rsqrt": _rsqrt,
    "erfc": _erfc,
    "integer_pow": _integer_power,
    "square": lambda writer, equation, x: _together(writer, "Mul", x, x),
    "copy": _same,
    "stop_gradient": _same,
    "optimization_barrier": _same,
    "convert_element_type": _convert,
    "select_n": _select,
    "clamp": _clamp,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "slice": _slice,
    "gather": _gather,
    "pad": _pad,
    "concatenate": _concatenate,
}
"""JAX's primitive -> its translation (writer, equation, inputs) -> result."""
