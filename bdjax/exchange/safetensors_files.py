"""Reads and writes safetensors files; the only module that imports safetensors.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little endian; the header, a
JSON object from names to {"dtype", "shape", "data_offsets"}; then the tensors' bytes. Files come from strangers, so the header
is checked against the size of the file before anything is allocated, and only tensors that a network needs are read.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from bdjax import atomic
from bdjax.datasets.files import open_file
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

TENSORS = "model.safetensors"
"""the weights in the folder of a saved model"""
MAXIMUM_BYTES = 1 << 33
"""the largest file that is read"""
_MAXIMUM_HEADER = 1 << 22
_MAXIMUM_TENSORS = 10_000
_MAXIMUM_AXES = 8
_WEIGHTS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_COUNTER = "num_batches_tracked"
_CHUNK = 1 << 20
NAMED = re.compile(r"(?P<path>.+?\.safetensors)(?::(?P<rest>.*))?", re.IGNORECASE | re.DOTALL)
"""How a command line names a file of weights: FILE.safetensors:ARCHITECTURE[:NAMING[:NORMALISATION]]."""

_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""The first bytes of a pickle of protocols 2 to 5 and of the ZIP archive around one that `torch.save` writes."""
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


class Tensor(NamedTuple):
    """What the header says about a tensor."""

    dtype: str
    """a key of the format: "F32" """
    shape: tuple[int, ...]
    start: int
    """offset in the file"""
    num_bytes: int


class Opened(NamedTuple):
    """An opened file whose header has been checked."""

    path: pathlib.Path
    tensors: Mapping[str, Tensor]
    """without the counters of batches that torch's batch normalisation keeps"""
    file: BinaryIO

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
            InputError: its values are not finite, or the file has become shorter.
        """
        tensor = self.tensors[name]
        self.file.seek(tensor.start)
        data = self.file.read(tensor.num_bytes)
        if len(data) != tensor.num_bytes:
            raise InputError(f"{self.path}: became shorter while it was read")
        stored = np.frombuffer(data, np.dtype(_WEIGHTS[tensor.dtype]).newbyteorder("<")).reshape(tensor.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {shown(name)} has values that are not finite")
        return values

    def sha256(self) -> str:
        """The SHA-256 of the whole file."""
        digest = hashlib.sha256()
        self.file.seek(0)
        while chunk := self.file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Opened]:
    """Open a safetensors file and check its header; no tensor is read.

    Raises:
        InputError: it is not a regular file or not safetensors, is damaged, or has tensors that are no weights.
    """
    refuse_pickle(path)
    with open_file(path, MAXIMUM_BYTES, "files of weights") as file:
        yield Opened(path, _read_header(path, file), file)


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write float32 tensors to a safetensors file, whole or not at all, and return its SHA-256.

    Args:
        path: the file.
        tensors: name -> float32.
    """
    arrays = {name: np.ascontiguousarray(values).reshape(np.shape(values)) for name, values in tensors.items()}
    data = safetensors.numpy.save(arrays)
    atomic.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def refuse_early(texts: Iterable[str]) -> None:
    """Refuse files that cannot be weights by their name, first bytes, header or values, before libraries are imported that
    take longer than that.

    Args:
        texts: as a command line names models, see `bdjax.exchange.opening`, which looks at everything again. What is neither
            a regular file nor the folder of a saved model is not looked at here.

    Raises:
        InputError: a pickle, a damaged safetensors file, or weights that are not finite.
    """
    for text in texts:
        named = NAMED.fullmatch(text)
        path = pathlib.Path(named["path"] if named else text)
        try:
            is_file = path.is_file()
            is_saved = not is_file and (path / TENSORS).is_file()
        except (OSError, ValueError):  # a null byte, or a name that is too long
            continue
        if is_saved or (is_file and named):
            with opened(path / TENSORS if is_saved else path) as weights:
                for name in weights.tensors:
                    weights.read(name)
        elif is_file:
            refuse_pickle(path)


def refuse_pickle(path: pathlib.Path) -> None:
    """Refuse a file that holds a pickle, whatever its name, and a file with the name of one.

    Raises:
        InputError: says how to convert it; also if the file is not regular or cannot be read.
    """
    with open_file(path, 1 << 62, "files of weights") as file:
        start = file.read(4)
    if path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(_PICKLES):
        raise InputError(
            f"{path}: a torch file is a pickle, which can run code, and is not read; convert it elsewhere, then use the "
            f"result: {conversion(path)}"
        )


def conversion(path: pathlib.Path) -> str:
    """The command that converts a torch file to safetensors without running code from it."""
    source, target = (
        re.sub(r"[^\w./ -]", "_", str(name)) for name in (path.name, path.with_suffix(".safetensors").name)
    )
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{source}', map_location='cpu', weights_only=True), '{target}')\""
    )


def shown(value: Any) -> str:
    """A value of an untrusted file for a message: escaped, and not long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read_header(path: pathlib.Path, file: BinaryIO) -> dict[str, Tensor]:
    size = file.seek(0, 2)
    file.seek(0)
    if size < 10:
        raise InputError(f"{path}: has {size} bytes; a safetensors file has a header of at least 10")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise InputError(f"{path}: is no safetensors file, or cut off: its header would have {length} bytes of {size}")
    if length > _MAXIMUM_HEADER:
        raise InputError(f"{path}: its header has {length} bytes; at most {_MAXIMUM_HEADER} are read")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not JSON ({one_line(error)[:100]})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is a {type(header).__name__}; should be an object from names to tensors")
    header.pop("__metadata__", None)
    if len(header) > _MAXIMUM_TENSORS:
        raise InputError(f"{path}: has {len(header)} tensors; at most {_MAXIMUM_TENSORS} are read")
    found = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            raise InputError(
                f"{path}: {shown(name)} begins at byte {tensor.start}; should follow the tensor before it, {end}"
            )
        end += tensor.num_bytes
    if end != size:
        raise InputError(f"{path}: has {size} bytes; the header describes {end}, so it is damaged or cut off")
    return {name: tensor for name, tensor in found.items() if name.rsplit(".", 1)[-1] != _COUNTER}


def _tensor(path: pathlib.Path, name: str, entry: Any, offset: int) -> Tensor:
    """A tensor's description, checked by itself; `offset` is where the tensors begin."""
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} should be described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    is_counter = name.rsplit(".", 1)[-1] == _COUNTER
    if not isinstance(dtype, str) or (dtype not in _WEIGHTS and not (is_counter and dtype == "I64")):
        raise InputError(f"{where} has dtype {shown(dtype)}; weights are {', '.join(_WEIGHTS)}")
    if not _are_counts(shape) or len(shape) > _MAXIMUM_AXES:
        raise InputError(f"{where} has shape {shown(shape)}; should be at most {_MAXIMUM_AXES} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{where} has data_offsets {shown(offsets)}; should be two whole numbers")
    start, end = offsets
    expected = math.prod(shape) * (8 if dtype == "I64" else np.dtype(_WEIGHTS[dtype]).itemsize)
    if end - start != expected:
        raise InputError(f"{where} has {end - start} bytes; {dtype} {shape} has {expected}")
    return Tensor(dtype, tuple(shape), offset + start, expected)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
