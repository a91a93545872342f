"""MNIST and Fashion-MNIST, from the published IDX files, compressed or not."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdjax.datasets.archives import GzipStream
from bdjax.datasets.files import open_file
from bdjax.datasets.locate import RemoteFile, cache_folder, download_hint, fetch, not_found
from bdjax.datasets.validation import as_int32_labels, describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

_FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_IMAGE_SIZE = (28, 28)
_NUM_CLASSES = 10
_MAXIMUM_ROWS = 1_000_000

_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MNIST_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_MNIST_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_mnist(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads MNIST: [28, 28, 1], 10 classes, 60,000 and 10,000 rows.

    Args:
        folders: Where to look, in this order, for `MNIST/raw`, `mnist` or the files themselves.
        download: Whether to download the files if they are not found.

    Returns:
        The published split.

    Raises:
        InputError: If the files are not found, incomplete or damaged.
    """
    files = tuple(RemoteFile(f"{name}.gz", md5, _MNIST_URLS) for name, md5 in zip(_FILE_NAMES, _MNIST_MD5, strict=True))
    class_names = tuple(str(digit) for digit in range(_NUM_CLASSES))
    return _load("mnist", ("MNIST/raw", "mnist"), files, class_names, folders, download)


def load_fashion_mnist(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads Fashion-MNIST: [28, 28, 1], 10 classes, 60,000 and 10,000 rows.

    Args:
        folders: Where to look, in this order, for `FashionMNIST/raw` or `fashion_mnist`; and for the files themselves
            in a folder with such a name, since they are named like MNIST's.
        download: Whether to download the files if they are not found.

    Returns:
        The published split.

    Raises:
        InputError: If the files are not found, incomplete or damaged.
    """
    files = tuple(
        RemoteFile(f"{name}.gz", md5, _FASHION_MNIST_URLS)
        for name, md5 in zip(_FILE_NAMES, _FASHION_MNIST_MD5, strict=True)
    )
    return _load("fashion_mnist", ("FashionMNIST/raw", "fashion_mnist"), files, _FASHION_CLASSES, folders, download)


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes.

    Args:
        path: The file; compressed if its name ends in .gz.
        num_dimensions: 3 for images, 1 for labels.

    Returns:
        uint8, with the shape in the file's header.

    Raises:
        InputError: If the header or the length of the file is wrong, or it cannot be decompressed.
    """
    header_bytes = 4 + 4 * num_dimensions
    maximum_bytes = header_bytes + _MAXIMUM_ROWS * (math.prod(_IMAGE_SIZE) if num_dimensions == 3 else 1) + 1
    try:
        with open_file(path, maximum_bytes, "IDX files") as opened:
            file = GzipStream(opened, maximum_bytes, path) if path.suffix == ".gz" else opened
            header = file.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes((0, 0, 8, num_dimensions)):
                raise InputError(
                    f"{path}: is not an IDX file of bytes in {num_dimensions} dimension(s): it must start with "
                    f"{bytes((0, 0, 8, num_dimensions)).hex()}, but starts with {header[:4].hex() or 'nothing'}"
                )
            shape = tuple(int(size) for size in np.frombuffer(header[4:], ">u4"))
            if shape[0] > _MAXIMUM_ROWS or (num_dimensions == 3 and shape[1:] != _IMAGE_SIZE):
                raise InputError(
                    f"{path}: its header gives shape {list(shape)}; it must have at most {_MAXIMUM_ROWS} rows"
                    + (f" of {list(_IMAGE_SIZE)} pixels" if num_dimensions == 3 else "")
                )
            # Read at most one byte too many: enough to notice, without letting a compressed file fill the memory.
            content = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); an intact copy is needed") from error
    if len(content) != math.prod(shape):
        relation = "more" if len(content) > math.prod(shape) else "fewer"
        raise InputError(f"{path}: has {relation} than the {math.prod(shape)} bytes that its header gives")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _load(
    name: str,
    subfolders: tuple[str, ...],
    files: tuple[RemoteFile, ...],
    class_names: tuple[str, ...],
    folders: Sequence[Path],
    download: bool,
) -> TrainTest:
    paths = _find(name, subfolders, folders)
    if paths is None:
        destination = folders[0] / subfolders[0]
        wanted = f"{' or '.join(subfolders)} with {_FILE_NAMES[0]}[.gz] and the other three files"
        if not download:
            raise not_found(name, wanted, folders, download_hint(files, destination, download))
        try:
            fetched = fetch(files, name)
        except InputError as error:
            raise not_found(name, wanted, folders, download_hint(files, destination, download, error)) from error
        paths = tuple(fetched[file.file_name] for file in files)
    return TrainTest(
        _read_part(name, paths[0], paths[1], 60_000, class_names),
        _read_part(name, paths[2], paths[3], 10_000, class_names),
    )


def _find(name: str, subfolders: tuple[str, ...], folders: Sequence[Path]) -> tuple[Path, ...] | None:
    for folder in folders:
        candidates = [folder / subfolder for subfolder in subfolders]
        if _is_fashion_folder(folder) == (name == "fashion_mnist"):
            candidates.append(folder)
        for candidate in candidates:
            paths = [_existing_file(candidate, file_name) for file_name in _FILE_NAMES]
            if all(paths):
                return tuple(paths)
            # The cache may contain part of an interrupted download, which is then completed. An incomplete folder elsewhere
            # is an error: silently using rows from another place would go unnoticed.
            if any(paths) and not candidate.is_relative_to(cache_folder()):
                missing = _FILE_NAMES[paths.index(None)]
                raise InputError(f"{candidate}: {missing}[.gz] is missing; all four files of {name} are needed")
    return None


def _is_fashion_folder(folder: Path) -> bool:
    folder = folder.resolve()
    named = folder.parent if folder.name == "raw" else folder
    return named.name.lower().replace("-", "").replace("_", "") in ("fashion", "fashionmnist")


def _existing_file(folder: Path, file_name: str) -> Path | None:
    for path in (folder / file_name, folder / f"{file_name}.gz"):
        if path.exists():
            return path
    return None


def _read_part(
    name: str, images_path: Path, labels_path: Path, num_published: int, class_names: tuple[str, ...]
) -> Dataset:
    images = read_idx(images_path, 3)
    labels = as_int32_labels(read_idx(labels_path, 1), _NUM_CLASSES, labels_path)
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: has {len(labels)} labels for the {len(images)} images of {images_path.name}; "
            "the numbers must be equal"
        )
    source = f"{images_path.parent} ({describe_rows(len(images), num_published)})"
    return make_dataset(images, labels, _NUM_CLASSES, name, source, class_names, where=images_path)
