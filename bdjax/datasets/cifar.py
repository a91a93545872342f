"""CIFAR-10 and CIFAR-100, from the binary or the Python version, unpacked or as an archive."""

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax.datasets.archives import Limits, read_tar_gz
from bdjax.datasets.files import list_files, read_file
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.validation import as_int32_labels, describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

_URLS = ("https://www.cs.toronto.edu/~kriz/",)
_PIXEL_BYTES = 3 * 32 * 32
_MAXIMUM_TAR_MEMBERS = 100
_MAXIMUM_OTHER_BYTES = 1 << 22  # in an archive, beside the batches
_KNOWN_FILES = {"batches.meta", "batches.meta.txt", "readme.html", "meta", "file.txt~"}
_KNOWN_FILES |= {"coarse_label_names.txt", "fine_label_names.txt"}
_MAXIMUM_OPCODES = 800_000  # of a pickle; CIFAR-100's training batch has 250,000, or twice as many from Python 3
_MAXIMUM_TUPLES = 1_000  # of a pickle; a batch has ten
_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING
    BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_ALLOWED_OPCODES = frozenset(_OPCODES.split())
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""


class _Version(NamedTuple):
    archive: str
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    is_python: bool


class _Format(NamedTuple):
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    label_bytes: int
    """number of label bytes in a binary record; the last is the label"""
    label_key: bytes
    """key of the labels in a Python batch"""
    rows_per_file: int
    """maximum number of rows in a training file"""
    versions: tuple[_Version, ...]
    remote: RemoteFile


_CIFAR10 = _Format(
    name="cifar10",
    num_classes=10,
    class_names=tuple(_CIFAR10_CLASSES.split()),
    label_bytes=1,
    label_key=b"labels",
    rows_per_file=10_000,
    versions=(
        _Version(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{batch}.bin" for batch in range(1, 6)),
            "test_batch.bin",
            False,
        ),
        _Version(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            tuple(f"data_batch_{batch}" for batch in range(1, 6)),
            "test_batch",
            True,
        ),
    ),
    remote=RemoteFile("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _URLS),
)

_CIFAR100 = _Format(
    name="cifar100",
    num_classes=100,
    class_names=tuple(_CIFAR100_CLASSES.split()),
    label_bytes=2,  # the coarse label, then the fine one
    label_key=b"fine_labels",
    rows_per_file=50_000,
    versions=(
        _Version("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", False),
        _Version("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", True),
    ),
    remote=RemoteFile("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", _URLS),
)


def load_cifar10(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads CIFAR-10: [32, 32, 3], 10 classes, 50,000 and 10,000 rows.

    Args:
        folders: Where to look for the unpacked folder (`cifar-10-batches-bin`, `cifar-10-batches-py`) or the archive
            (`cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz`), as the publisher names them.
        download: Whether to download the archive if nothing is found.

    Returns:
        The publisher's split.

    Raises:
        InputError: If the files are not found, incomplete, damaged, or pickles that contain more than arrays.
    """
    return _load(_CIFAR10, folders, download)


def load_cifar100(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads CIFAR-100 with its fine labels: [32, 32, 3], 100 classes, 50,000 and 10,000 rows.

    Args:
        folders: Where to look for the unpacked folder (`cifar-100-binary`, `cifar-100-python`) or the archive
            (`cifar-100-binary.tar.gz`, `cifar-100-python.tar.gz`), as the publisher names them.
        download: Whether to download the archive if nothing is found.

    Returns:
        The publisher's split.

    Raises:
        InputError: If the files are not found, incomplete, damaged, or pickles that contain more than arrays.
    """
    return _load(_CIFAR100, folders, download)


def read_pickle(data: bytes, where: object) -> Any:
    """Reads a pickle of plain values and NumPy arrays, without running any code from the file.

    Args:
        data: The content of the file.
        where: The file's name for error messages.

    Returns:
        The value; arrays are `PickledArray`.

    Raises:
        InputError: If the file contains anything else, is damaged, or needs more memory than its content takes.
    """
    try:
        _check_opcodes(data)
        return _ArrayUnpickler(data, where).load()
    except InputError:
        raise
    except Exception as error:  # the unpickler raises almost any exception on a damaged pickle
        raise InputError(f"{where}: is not an intact pickle ({one_line(error)[:200]})") from error


def _check_opcodes(data: bytes) -> None:
    """Checks the steps of a pickle before any is taken; raises ValueError.

    A few bytes can make the unpickler allocate gigabytes (the number of a memo) or nest tuples until their hash overflows the
    stack.
    """
    num_tuples = 0
    memo: dict[int, bool] = {}  # number -> whether it is text
    is_text = was_text = False  # of the last object, and of the one before
    for position, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if name not in _ALLOWED_OPCODES:
            raise ValueError(f"it has the opcode {name}, which a CIFAR batch does not need")
        if position >= _MAXIMUM_OPCODES:
            raise ValueError(f"it has over {_MAXIMUM_OPCODES} opcodes")
        if name == "FRAME" and argument > len(data):
            raise ValueError(f"it has a frame of {argument} bytes, more than the file")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else argument
            if not 0 <= number <= _MAXIMUM_OPCODES:
                raise ValueError(f"it numbers an object {number}; at most {_MAXIMUM_OPCODES} are read")
            memo[number] = is_text
            continue
        # Python 3 writes bytes in protocol 2 as two texts in a tuple, so such tuples, which do not nest, may be many.
        num_tuples += name in ("TUPLE", "TUPLE1", "TUPLE3") or (name == "TUPLE2" and not (is_text and was_text))
        if num_tuples > _MAXIMUM_TUPLES:
            raise ValueError(f"it has over {_MAXIMUM_TUPLES} tuples")
        was_text, is_text = is_text, name in _TEXTS or (name in _GETS and memo.get(argument, False))


class PickledArray:
    """Replaces `numpy.ndarray` in an unpickler: it stores the file's description of an array without interpreting it.

    NumPy's own `__setstate__` is C code that trusts its input; here `as_array` checks it first.
    """

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any):
        self.state = state

    def as_array(self) -> np.ndarray:
        """Returns the array, uint8; raises ValueError if it is not a complete uint8 array in C or Fortran order."""
        if self.state is None:  # protocol 5: _frombuffer(content, dtype, shape, order)
            content, dtype, shape, order = self.arguments
        else:
            _, shape, dtype, is_fortran, content = self.state
            order = "F" if is_fortran else "C"
        if not isinstance(dtype, PickledArray) or dtype.arguments[:1] not in (("u1",), (b"u1",)):
            raise ValueError("an array is not uint8")
        if not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
            raise ValueError("the content of an array is not bytes")
        return np.frombuffer(bytes(content), np.uint8).reshape(shape, order=order)


_ALLOWED_GLOBALS = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: object):
        # CIFAR was pickled by Python 2, whose strings are bytes.
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._where = where
        self._left_to_encode = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise InputError(
                f"{self._where}: this pickle refers to {one_line(module)[:100]}.{one_line(name)[:100]}, which may run code, so "
                "it was not loaded; a CIFAR batch contains only NumPy arrays and lists"
            )
        return self._encode if name == "encode" else PickledArray

    def _encode(self, text: str, encoding: str) -> bytes:
        # Python 3 writes bytes this way in protocol 2, which some re-pickled files use.
        self._left_to_encode -= len(text)
        if encoding not in ("latin1", "latin-1") or self._left_to_encode < 0:
            raise ValueError("bytes are not encoded as latin1, or more than once")
        return text.encode("latin1")


def _load(cifar: _Format, folders: Sequence[Path], download: bool) -> TrainTest:
    found = _find(cifar, folders)
    if found is None:
        wanted = " or ".join(name for version in cifar.versions for name in (version.folder, version.archive))
        if not download:
            raise not_found(cifar.name, wanted, folders, download_hint((cifar.remote,), folders[0], download))
        try:
            fetched = fetch((cifar.remote,), "")
        except InputError as error:
            hint = download_hint((cifar.remote,), folders[0], download, error)
            raise not_found(cifar.name, wanted, folders, hint) from error
        found = cifar.versions[0], fetched[cifar.remote.file_name]
    version, path = found
    names = (*version.train_files, version.test_file)
    read = _read_folder if path.is_dir() else _read_archive
    files, others = read(path, version, names, cifar)
    unread = tuple(Unread(name, f"is not a file of {cifar.name}") for name in others if name not in _KNOWN_FILES)
    parts = (
        _read_part(cifar, version, path, files, version.train_files, 50_000),
        _read_part(cifar, version, path, files, (version.test_file,), 10_000),
    )
    return TrainTest(*(dataclasses.replace(part, unread=unread) for part in parts))


def _find(cifar: _Format, folders: Sequence[Path]) -> tuple[_Version, Path] | None:
    for folder in folders:
        for version in cifar.versions:
            if (folder / version.folder).is_dir():
                return version, folder / version.folder
        for version in cifar.versions:
            if (folder / version.archive).exists():
                return version, folder / version.archive
    return None


def _maximum_bytes(cifar: _Format) -> int:
    # A Python batch also contains the file name of each row, and takes a few bytes for each label.
    return cifar.rows_per_file * (_PIXEL_BYTES + 100)


def _read_folder(
    folder: Path, version: _Version, wanted: tuple[str, ...], cifar: _Format
) -> tuple[dict[str, bytes], list[str]]:
    """The content of the wanted files, and the names of the others."""
    files = {}
    for name in wanted:
        path = folder / name
        if not path.exists():
            raise InputError(f"{path}: is missing; {folder.name} must contain {', '.join(wanted)}")
        files[name] = read_file(path, _maximum_bytes(cifar), f"files of {cifar.name}")
    return files, [listed.name for listed in list_files(folder) if listed.name not in wanted]


def _read_archive(
    path: Path, version: _Version, wanted: tuple[str, ...], cifar: _Format
) -> tuple[dict[str, bytes], list[str]]:
    """As `_read_folder`, for the archive's folder of this name."""
    prefix = f"{version.folder}/"
    total = _maximum_bytes(cifar) * len(wanted) + _MAXIMUM_OTHER_BYTES
    limits = Limits(
        f"files of {cifar.name}", _maximum_bytes(cifar), total, _MAXIMUM_TAR_MEMBERS, "the published archive has 8"
    )
    names = {prefix + name for name in wanted}
    contents, others = read_tar_gz(path, limits, names.__contains__)
    missing = [name for name in wanted if prefix + name not in contents]
    if missing:
        raise InputError(f"{path}: does not contain {version.folder}/{missing[0]}; it must contain {', '.join(wanted)}")
    return {name: contents[prefix + name] for name in wanted}, [name.removeprefix(prefix) for name in others]


def _read_part(
    cifar: _Format,
    version: _Version,
    path: Path,
    files: Mapping[str, bytes],
    names: tuple[str, ...],
    num_published: int,
) -> Dataset:
    images, labels = [], []
    for name in names:
        where = path / name if path.is_dir() else f"{path}, member {version.folder}/{name}"
        read = _read_python_batch if version.is_python else _read_binary_batch
        pixels, batch_labels = read(files[name], cifar, where)
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # CIFAR stores channels first
        labels.append(as_int32_labels(batch_labels, cifar.num_classes, where))
    all_labels = np.concatenate(labels)
    source = f"{path} ({describe_rows(len(all_labels), num_published)})"
    return make_dataset(
        np.concatenate(images), all_labels, cifar.num_classes, cifar.name, source, cifar.class_names, where=path
    )


def _read_binary_batch(data: bytes, cifar: _Format, where: object) -> tuple[np.ndarray, np.ndarray]:
    record_bytes = cifar.label_bytes + _PIXEL_BYTES
    num_rows, rest = divmod(len(data), record_bytes)
    if rest or not 1 <= num_rows <= cifar.rows_per_file:
        raise InputError(
            f"{where}: has {len(data)} bytes; it must have 1 to {cifar.rows_per_file} records of {record_bytes} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(num_rows, record_bytes)
    return records[:, cifar.label_bytes :], records[:, cifar.label_bytes - 1]


def _read_python_batch(data: bytes, cifar: _Format, where: object) -> tuple[np.ndarray, np.ndarray]:
    batch = read_pickle(data, where)
    if not isinstance(batch, dict):
        raise InputError(f"{where}: contains a {type(batch).__name__}; it must contain a dict with data and labels")
    # A file re-pickled by Python 3 has str keys.
    batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
    pixels, labels = batch.get(b"data"), batch.get(cifar.label_key)
    try:
        pixels = pixels.as_array()
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: data is not an intact uint8 array ({one_line(error)})") from error
    if pixels.ndim != 2 or pixels.shape[1] != _PIXEL_BYTES or not 1 <= len(pixels) <= cifar.rows_per_file:
        raise InputError(
            f"{where}: data has shape {list(pixels.shape)}; it must have 1 to {cifar.rows_per_file} rows of {_PIXEL_BYTES}"
        )
    if not isinstance(labels, list) or any(type(label) is not int or abs(label) >= 1 << 31 for label in labels):
        raise InputError(f"{where}: {cifar.label_key.decode()} is not a list of integers")
    if len(labels) != len(pixels):
        raise InputError(f"{where}: has {len(pixels)} images and {len(labels)} labels; the numbers must be equal")
    return pixels, np.array(labels, np.int64)
