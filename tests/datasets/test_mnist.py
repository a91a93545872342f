import gzip
import pathlib
import re
import struct

import numpy as np
import pytest

from bdjax.datasets.mnist import load_fashion_mnist, load_mnist, read_idx
from bdjax.errors import InputError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_set(folder: pathlib.Path, *, packed: bool = False, first_pixel: int = 0) -> None:
    """Writes 12 training and 4 test rows; row i is filled with i, its label is i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, num_rows in (("train", 12), ("t10k", 4)):
        rows = np.arange(num_rows, dtype=np.uint8)
        images = np.broadcast_to(rows[:, None, None], (num_rows, 28, 28)).copy()
        images[:, 0, 0] = first_pixel
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", rows % 10)):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("subfolder", ["MNIST/raw", "mnist", "."])
def test_mnist_is_found_and_read(folder, subfolder, packed):
    write_set(folder / subfolder, packed=packed)
    train, test = load_mnist([folder], False)
    assert train.images.shape == (12, 28, 28, 1) and test.images.shape == (4, 28, 28, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.images[:, 5, 5, 0].tolist() == list(range(12))
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.source == f"{folder / subfolder} (12 of 60,000 rows)"
    assert test.source == f"{folder / subfolder} (4 of 10,000 rows)"


def test_mnist_and_fashion_mnist_are_told_apart_by_their_folders(folder):
    write_set(folder / "FashionMNIST" / "raw", first_pixel=99)
    with pytest.raises(InputError, match="^mnist: found no MNIST/raw or mnist with "):
        load_mnist([folder], False)
    with pytest.raises(InputError, match="^mnist: found no "):
        load_mnist([folder / "FashionMNIST" / "raw"], False)
    write_set(folder)
    assert load_mnist([folder], False).train.images[0, 0, 0, 0] == 0
    for data_dir in (folder, folder / "FashionMNIST" / "raw"):
        fashion, _ = load_fashion_mnist([data_dir], False)
        assert fashion.images[0, 0, 0, 0] == 99
        assert fashion.name == "fashion_mnist" and fashion.class_names[9] == "ankle boot"


def test_fashion_mnist_is_not_taken_from_a_folder_of_another_name(folder):
    write_set(folder)
    with pytest.raises(InputError, match="^fashion_mnist: found no FashionMNIST/raw or fashion_mnist with "):
        load_fashion_mnist([folder], False)


def test_earlier_folders_go_first(folder):
    write_set(folder / "one" / "mnist", first_pixel=1)
    write_set(folder / "two" / "mnist", first_pixel=2)
    assert load_mnist([folder / "two", folder / "one"], False).train.images[0, 0, 0, 0] == 2


@pytest.mark.usefixtures("no_network")
def test_without_files_and_network_one_line_tells_all(folder, cache):
    with pytest.raises(InputError) as caught:
        load_mnist([folder, cache], True)
    assert str(caught.value) == (
        "mnist: found no MNIST/raw or mnist with train-images-idx3-ubyte[.gz] and the other three files in "
        f"{folder}, {cache}; the download failed ("
        "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz: ConnectionError; "
        "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz: ConnectionError): put "
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz "
        f"from https://ossci-datasets.s3.amazonaws.com/mnist/ into {folder}/MNIST/raw"
    )


def test_without_leave_to_download_nothing_is_tried(folder, cache, monkeypatch):
    monkeypatch.setattr("bdjax.datasets.mnist.fetch", lambda *arguments: pytest.fail("a download was tried"))
    with pytest.raises(InputError, match="; downloads are switched off: put train-images-idx3-ubyte.gz, "):
        load_mnist([folder, cache], False)


def test_what_is_fetched_is_read(cache, monkeypatch):
    def fetch(files, subfolder):
        write_set(cache / subfolder, packed=True)
        return {file.file_name: cache / subfolder / file.file_name for file in files}

    monkeypatch.setattr("bdjax.datasets.mnist.fetch", fetch)
    assert load_mnist([cache], True).train.source == f"{cache / 'mnist'} (12 of 60,000 rows)"
    assert load_mnist([cache], False).test.labels.tolist() == [0, 1, 2, 3]  # found there the next time


def test_a_part_of_the_files_is_an_error_but_in_the_cache(folder, cache):
    for place in (folder / "mnist", cache / "mnist"):
        write_set(place)
        (place / "t10k-labels-idx1-ubyte").unlink()
    message = f"{folder / 'mnist'}: t10k-labels-idx1-ubyte[.gz] is missing; all four files of mnist are needed"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_mnist([folder], True)
    with pytest.raises(InputError, match="^mnist: found no "):
        load_mnist([cache], False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file of bytes in 1 dimension(s): it must start with 00000801, but starts with nothing"),
        (b"\0\0\x08\x03" + b"\0" * 20, "is not an IDX file of bytes in 1 dimension(s): it must start with 00000801"),
        (b"\0\0\x0d\x01" + b"\0" * 20, "is not an IDX file of bytes in 1 dimension(s): it must start with 00000801"),
        (struct.pack(">HBBI", 0, 8, 1, 10) + b"123456789", "has fewer than the 10 bytes that its header gives"),
        (struct.pack(">HBBI", 0, 8, 1, 10) + b"12345678901", "has more than the 10 bytes that its header gives"),
        (
            struct.pack(">HBBI", 0, 8, 1, 1 << 31),
            "its header gives shape [2147483648]; it must have at most 1000000 rows",
        ),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_idx_file_is_named(folder, content, message, packed):
    path = folder / ("labels.gz" if packed else "labels")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: {message}")):
        read_idx(path, 1)


def test_other_image_sizes_are_refused(folder):
    path = folder / "images"
    path.write_bytes(idx(np.zeros((2, 27, 28), np.uint8)))
    message = f"{path}: its header gives shape [2, 27, 28]; it must have at most 1000000 rows of [28, 28] pixels"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_idx(path, 3)


@pytest.mark.parametrize("keep", [5, 30, -4])
def test_a_truncated_gzip_file_is_named(folder, keep):
    path = folder / "labels.gz"
    path.write_bytes(gzip.compress(idx(np.random.default_rng(0).integers(0, 10, 1000).astype(np.uint8)))[:keep])
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be read \(.+\); an intact copy is needed$"):
        read_idx(path, 1)


def test_what_is_no_gzip_file_is_named(folder):
    path = folder / "labels.gz"
    path.write_bytes(idx(np.zeros(10, np.uint8)))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: cannot be read "):
        read_idx(path, 1)


def test_labels_are_checked(folder):
    write_set(folder)
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.array([0, 1, 10] * 4, np.uint8)))
    message = f"{path}: row 2 has label 10; labels must be in 0..9"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_mnist([folder], False)
    path.write_bytes(idx(np.zeros(11, np.uint8)))
    message = f"{path}: has 11 labels for the 12 images of train-images-idx3-ubyte; the numbers must be equal"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_mnist([folder], False)


def test_the_real_mnist(data_dir):
    if not (data_dir / "MNIST").exists():
        pytest.skip("MNIST is not in BDJAX_DATA_DIR")
    train, test = load_mnist([data_dir], False)
    assert train.images.shape == (60_000, 28, 28, 1) and test.images.shape == (10_000, 28, 28, 1)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.source.endswith("(60,000 rows)")
