"""ONNX classifiers as black boxes: checked, then run by ONNX Runtime on the CPU.

A file from a stranger is a program, so it is read as data first. Only operators that compute on arrays are run (`OPERATORS`):
no control flow, so that every graph ends; no custom operators, which are code of other libraries; no local functions, which
may unfold without bounds; no external data, which could be any file of this machine. What sizes a file claims is compared with
what it contains, and what it makes while it runs is limited by `MEMORY_SHARE`.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from bdjax import extras
from bdjax.datasets.files import free_memory, read_file
from bdjax.datasets.scaling import size_hint
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError
from bdjax.exchange.outputs import Outputs, check_outputs, convert
from bdjax.models.normalisation import per_channel
from bdjax.types import Classifier

ImageLayout = Literal["nchw", "nhwc"]
"""The order of an image's axes in a model's input: channels first, as PyTorch exports, or last."""

MAXIMUM_BYTES = 1 << 30
"""Largest file that is read; protocol buffers end at 2 GiB."""
MAXIMUM_NODES = 20_000
MAXIMUM_BATCH = 4096
"""Largest fixed batch size."""
MEMORY_SHARE = 0.5
"""Share of the free memory that all ONNX models of a process may use together."""

_OPERATORS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitShift
BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu
Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization
IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul
MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QLinearConv
QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements
ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze
Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())
"""Operators of the standard domain that are run: those that compute on arrays, always alike; of Dropout only for inference."""
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")

_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive, as PyTorch's torch.save writes",
    b"\x80\x02": "a pickle, which could run any code",
    b"\x80\x03": "a pickle, which could run any code",
    b"\x80\x04": "a pickle, which could run any code",
    b"\x80\x05": "a pickle, which could run any code",
    b"\x1f\x8b": "a gzip file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"ORTM": "a model in ONNX Runtime's own format",
    b"<": "a text, as a web page is",
    b"version https://git-lfs": "a pointer of Git LFS, without the file's content",
}
"""First bytes of other files -> what they are."""


class _Image(NamedTuple):
    """The input of a model."""

    name: str
    dtype: np.dtype
    batch: int | None
    """number of images that it takes; None for any"""
    layout: ImageLayout


def read(
    path: str | Path,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    outputs: Outputs = "logits",
    layout: ImageLayout | None = None,
    output: str | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> Classifier:
    """Read an ONNX model as a classifier.

    Args:
        path: the file.
        num_classes: K of the data.
        image_shape: (H, W, C) of the data.
        outputs: what the model returns; see `bdjax.exchange.outputs`.
        layout: the order of an image's axes; None to find it from the input's shape.
        output: the output to use, by name; None if there is only one.
        mean: what is subtracted from each channel first, of pixels in [0, 1]: C numbers, or a single number for all. None if
            the model does this itself.
        std: what each channel is divided by then, in the same form.

    Returns:
        A function from float32 [B, H, W, C] in [0, 1] to float [B, K]. Models of a fixed batch size get batches of that size,
        filled up with the last image.

    Raises:
        InputError: the file is no ONNX model, or has anything that is not run; the model is for other images or classes, or
            fails on the first image. Later, from the function: the model fails.
    """
    check_outputs(outputs)
    runtime = extras.onnxruntime()
    model = _parsed(path)
    _check_graph(path, model)
    image = _image_input(path, model.graph, image_shape, layout)
    chosen = _chosen_output(path, model.graph, output)
    if outputs != "labels":
        _check_classes(path, chosen, num_classes)
    statistics = per_channel(0.0 if mean is None else mean, 1.0 if std is None else std, image_shape[2])
    shift, scale = (np.asarray(values, np.float32) for values in statistics)
    session = _session(path, runtime, model)
    name = Path(path).name

    def run(images: np.ndarray) -> np.ndarray:
        if image.layout == "nchw":
            images = np.transpose(images, (0, 3, 1, 2))
        try:
            return session.run([chosen.name], {image.name: np.ascontiguousarray(images, image.dtype)})[0]
        except Exception as error:
            raise InputError(f"{path}: ONNX Runtime failed: {_reason(error)}") from error

    def classifier(images: np.ndarray) -> np.ndarray:
        images = (images - shift) / scale
        if image.batch is None:
            return run(images)
        parts = [images[start : start + image.batch] for start in range(0, len(images), image.batch)]
        return np.concatenate([run(_filled(part, image.batch))[: len(part)] for part in parts])

    classifier.__name__ = name
    converted = convert(classifier, outputs, num_classes)
    try:
        first = np.asarray(converted(np.full((1, *image_shape), 0.5, np.float32)))
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error
    if first.shape != (1, num_classes):
        raise InputError(f"{path}: returns {list(first.shape)} for one image; should be {[1, num_classes]}")
    return converted


def _filled(images: np.ndarray, rows: int) -> np.ndarray:
    """Images with the last of them repeated."""
    return np.concatenate([images, np.repeat(images[-1:], rows - len(images), axis=0)])


# ---- What a file contains ---------------------------------------------------------------------------------------------


def _parsed(path: str | Path) -> Any:
    data = read_file(path, MAXIMUM_BYTES, "ONNX models")
    kinds = [kind for head, kind in _OTHER_FILES.items() if data.startswith(head)]
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        kinds.append("a safetensors file")
    if kinds:
        raise InputError(f"{path}: is {kinds[0]}; should be an ONNX model")
    try:
        model = extras.onnx().ModelProto.FromString(data)
    except Exception as error:
        raise InputError(
            f"{path}: is no intact ONNX model ({one_line(error)[:100]}); copy or export it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: is no ONNX model: it has no operators; export it again")
    return model


def _check_graph(path: str | Path, model: Any) -> None:
    graph = model.graph
    if model.functions:
        raise InputError(
            f"{path}: has {len(model.functions)} local functions, which are not run; inline them: "
            "onnx.inliner.inline_local_functions"
        )
    if len(graph.node) > MAXIMUM_NODES or len(graph.initializer) > MAXIMUM_NODES:
        raise InputError(
            f"{path}: has {len(graph.node)} operators and {len(graph.initializer)} arrays; at most {MAXIMUM_NODES} are read"
        )
    for node in graph.node:
        kind = f"operator {_short(node.op_type)}"
        if node.domain not in ("", "ai.onnx"):
            raise InputError(
                f"{path}: has {kind} of domain {_short(node.domain)}; custom operators are code of other libraries and are "
                "not run"
            )
        if node.op_type in _CONTROL_FLOW:
            raise InputError(
                f"{path}: has {kind}, and control flow is not run; export a plain graph for images of one size"
            )
        if node.op_type == "Dropout" and any(node.input[2:]):
            raise InputError(
                f"{path}: has {kind} with a training mode, which would make answers random; export the network for inference"
            )
        if node.op_type not in OPERATORS:
            raise InputError(f"{path}: has {kind}, which is not among those that are run: plain arithmetic on arrays")
    if graph.sparse_initializer:
        raise InputError(f"{path}: has sparse arrays, which are not read; export plain ones")
    for tensor in _tensors(path, graph):
        _check_tensor(path, tensor)


def _tensors(path: str | Path, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise InputError(f"{path}: operator {_short(node.op_type)} has a graph within, which is not run")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise InputError(f"{path}: operator {_short(node.op_type)} has a sparse array, which is not read")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensor(path: str | Path, tensor: Any) -> None:
    onnx = extras.onnx()
    where = f"{path}: array {_short(tensor.name) or 'without a name'}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise InputError(f"{where} lies in another file, which is not read; save the model with its data inside")
    typed = sum(len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "int64", "double", "uint64"))
    if tensor.data_type == onnx.TensorProto.STRING or tensor.string_data:
        raise InputError(f"{where} is text; numbers are needed")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as error:
        raise InputError(f"{where} has the unknown type {tensor.data_type}") from error
    shape = list(tensor.dims[:9])
    if len(tensor.dims) > 8 or min(shape, default=0) < 0:
        raise InputError(f"{where} has shape {shape}; at most 8 dimensions, none negative, are read")
    count = math.prod(shape)
    # Numbers of 4 bits come in twos.
    has, needs = (len(tensor.raw_data), count * dtype.itemsize) if tensor.raw_data else (typed, count)
    if has not in (needs, 2 * needs, -(-needs // 2)):
        what = "bytes" if tensor.raw_data else "numbers"
        raise InputError(f"{where} has {has} {what} of data, and its shape {shape} needs {needs}")


# ---- Inputs and outputs -----------------------------------------------------------------------------------------------


def _dimensions(value: Any) -> list[int | None] | None:
    """The shape of an input or output: None for dimensions without a number, None for an unknown shape."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return [axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in kind.shape.dim]


def _in_words(values: Sequence[Any]) -> str:
    """Names and shapes: "images [?, 3, 32, 32], size [2]"."""
    texts = []
    for value in values[:5]:
        shape = _dimensions(value)
        sides = "" if shape is None else f" [{', '.join('?' if side is None else str(side) for side in shape[:8])}]"
        texts.append(f"{_short(value.name)}{sides}")
    return ", ".join(texts) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _image_input(path: str | Path, graph: Any, image_shape: tuple[int, int, int], layout: ImageLayout | None) -> _Image:
    if layout is not None and layout not in get_args(ImageLayout):
        raise InputError(f"layout {layout!r} is not one of {', '.join(get_args(ImageLayout))}")
    arrays = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in arrays]
    if len(inputs) != 1:
        found = f"has {len(inputs)} inputs, {_in_words(inputs)}" if inputs else "has no input"
        raise InputError(f"{path}: {found}; a classifier has one, the images")
    value, shape = inputs[0], _dimensions(inputs[0])
    if shape is None or len(shape) != 4:
        raise InputError(f"{path}: input {_in_words(inputs)} should have 4 axes: images, channels, height and width")
    onnx = extras.onnx()
    floats = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.DOUBLE: float}
    if (element := value.type.tensor_type.elem_type) not in floats:
        raise InputError(f"{path}: input {_in_words(inputs)} is no array of floating-point numbers, which images are")
    height, width, channels = image_shape
    wanted = {"nchw": (channels, height, width), "nhwc": image_shape}
    fitting = [
        order
        for order, sides in wanted.items()
        if all(side is None or side == needed for side, needed in zip(shape[1:], sides, strict=True))
    ]
    if layout:
        fitting = [order for order in fitting if order == layout]
    if not fitting:
        numbers = [0 if side is None else side for side in shape[1:]]
        is_last = layout == "nhwc" or (layout is None and numbers[2] == channels and numbers[0] != channels)
        takes = numbers if is_last else [numbers[1], numbers[2], numbers[0]]
        hint = size_hint(takes, image_shape) if takes[2] in (0, channels) else ""
        raise InputError(
            f"{path}: input {_in_words(inputs)} does not fit the data's images of shape {list(image_shape)} "
            f"(height, width, channels){hint}"
        )
    if len(fitting) > 1:
        raise InputError(f"{path}: input {_in_words(inputs)} may be channels first or last; set layout to nchw or nhwc")
    if shape[0] is not None and shape[0] > MAXIMUM_BATCH:
        raise InputError(
            f"{path}: input {_in_words(inputs)} takes {shape[0]} images at once; at most {MAXIMUM_BATCH} are given"
        )
    return _Image(value.name, np.dtype(floats[element]), shape[0], fitting[0])


def _chosen_output(path: str | Path, graph: Any, name: str | None) -> Any:
    found = [value for value in graph.output if name in (None, value.name)]
    if len(found) == 1:
        return found[0]
    if not graph.output:
        raise InputError(f"{path}: has no output; a classifier has one, the logits")
    which = "set output to the name of the logits" if name is None else f"none is named {_short(name)}"
    raise InputError(f"{path}: has {len(graph.output)} outputs, {_in_words(graph.output)}; {which}")


def _check_classes(path: str | Path, output: Any, num_classes: int) -> None:
    shape = _dimensions(output)
    if shape is not None and (len(shape) != 2 or shape[1] not in (None, num_classes)):
        raise InputError(
            f"{path}: output {_in_words([output])} should be [images, {num_classes}], for the data's {num_classes} classes"
        )


# ---- Running ----------------------------------------------------------------------------------------------------------


@functools.cache
def _limit_memory(runtime: Any) -> None:
    """Limits what the sessions of this process allocate; the runtime keeps the limit as long as the process lives."""
    arena = runtime.OrtArenaCfg({"max_mem": int(MEMORY_SHARE * free_memory()), "arena_extend_strategy": 1})
    memory = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    runtime.create_and_register_allocator(memory, arena)


def _session(path: str | Path, runtime: Any, model: Any) -> Any:
    _limit_memory(runtime)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions; the runtime would print them, too
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        # What was checked, not the file again.
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime does not accept it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The last part of the runtime's message, on one line."""
    text = one_line(error).rpartition("Status Message: ")[2].removeprefix("[ONNXRuntimeError] : ")
    return "".join(letter for letter in text if letter.isprintable())[:200]


def _short(name: str) -> str:
    """A name of the file, on one line."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(name.split()))
    return text if len(text) <= 60 else f"{text[:59]}…"
