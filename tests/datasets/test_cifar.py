import gzip
import io
import os
import pathlib
import pickle
import re
import tarfile
import time

import numpy as np
import pytest

from bdjax.datasets.cifar import load_cifar10, load_cifar100, read_pickle
from bdjax.errors import InputError
from tests.fixtures.archives import PICKLE_FAULTS

ROWS = 3
BATCHES = [f"data_batch_{batch}" for batch in range(1, 6)]


def batch_pixels(position: int) -> np.ndarray:
    """[3, 3072]: row r of the file at this position has red r, green 100 + position, blue a ramp along the width."""
    pixels = np.zeros((ROWS, 3, 32, 32), np.uint8)
    pixels[:, 0] = np.arange(ROWS)[:, None, None]
    pixels[:, 1] = 100 + position
    pixels[:, 2] = np.arange(32)
    return pixels.reshape(ROWS, 3072)


def batch_labels(position: int) -> list[int]:
    return [(position + row) % 10 for row in range(ROWS)]


def python_batch(position: int, label_key: str, protocol: int = 2) -> bytes:
    batch = {
        b"data": batch_pixels(position),
        label_key.encode(): batch_labels(position),
        b"filenames": [b"a.png"] * ROWS,
    }
    return pickle.dumps(batch, protocol)


def binary_batch(position: int, *, fine: bool = False) -> bytes:
    labels = np.array(batch_labels(position), np.uint8)[:, None]
    coarse = [np.full((ROWS, 1), 19, np.uint8)] if fine else []
    return np.concatenate([*coarse, labels, batch_pixels(position)], axis=1).tobytes()


def cifar10_files(is_python: bool) -> dict[str, bytes]:
    if is_python:
        return {name: python_batch(i, "labels") for i, name in enumerate([*BATCHES, "test_batch"])}
    return {f"{name}.bin": binary_batch(i) for i, name in enumerate([*BATCHES, "test_batch"])}


def write_folder(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_archive(path: pathlib.Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def check_cifar10(train, test):
    assert train.images.shape == (15, 32, 32, 3) and test.images.shape == (3, 32, 32, 3)
    assert train.images.dtype == np.uint8 and train.images.flags.c_contiguous and train.labels.dtype == np.int32
    assert train.images[:, 7, 9, 0].tolist() == [0, 1, 2] * 5
    assert train.images[:, 7, 9, 1].tolist() == sum(([100 + i] * ROWS for i in range(5)), [])
    assert train.images[4, 7, :, 2].tolist() == list(range(32))
    assert train.labels.tolist() == sum((batch_labels(i) for i in range(5)), [])
    assert test.labels.tolist() == batch_labels(5) and (test.images[..., 1] == 105).all()
    assert train.num_classes == 10 and train.class_names[6] == "frog"


@pytest.mark.parametrize("is_python", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_in_each_form(folder, is_python, packed):
    name = "cifar-10-batches-py" if is_python else "cifar-10-batches-bin"
    archive = folder / ("cifar-10-python.tar.gz" if is_python else "cifar-10-binary.tar.gz")
    if packed:
        write_archive(archive, name, {"batches.meta": b"unused", "readme.html": b""} | cifar10_files(is_python))
    else:
        write_folder(folder / name, cifar10_files(is_python))
    train, test = load_cifar10([folder], False)
    check_cifar10(train, test)
    assert train.source == f"{archive if packed else folder / name} (15 of 50,000 rows)"
    assert [path.name for path in folder.iterdir()] == [archive.name if packed else name]  # nothing was unpacked


@pytest.mark.parametrize("is_python", [True, False])
def test_cifar100_has_fine_labels(folder, is_python):
    if is_python:
        files = {name: python_batch(i, "fine_labels") for i, name in enumerate(["train", "test"])}
    else:
        files = {name: binary_batch(i, fine=True) for i, name in enumerate(["train.bin", "test.bin"])}
    write_folder(folder / ("cifar-100-python" if is_python else "cifar-100-binary"), files)
    train, test = load_cifar100([folder], False)
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2, 3]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert train.num_classes == 100 and len(set(train.class_names)) == 100
    assert train.class_names[0] == "apple" and train.class_names[99] == "worm"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_from_every_protocol(protocol, order):
    array = np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order)
    read = read_pickle(pickle.dumps([array], protocol), "file")[0].as_array()
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


def test_arrays_of_old_numpy_and_python_2_are_read():
    # What Python 2 wrote: the module's old name, and byte strings (opcode U).
    python_2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x06\x00\x01\x02\xfd\xfe\xfftb."
    )
    assert read_pickle(python_2, "file").as_array().tolist() == [[0, 1, 2], [253, 254, 255]]


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_runs_nothing(folder, protocol):
    trace = folder / "owned"
    files = cifar10_files(True)
    hostile = pickle.dumps({b"data": Hostile(os.system, f"touch {trace}"), b"labels": [0]}, protocol)
    pickle.loads(hostile)
    assert trace.exists()  # so the attack does work where a pickle is trusted
    trace.unlink()
    write_folder(folder / "cifar-10-batches-py", files | {"data_batch_3": hostile})
    message = (
        f"{folder}/cifar-10-batches-py/data_batch_3: this pickle refers to {os.system.__module__}.system, which may run "
        "code, so it was not loaded; a CIFAR batch contains only NumPy arrays and lists"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_cifar10([folder], False)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (pickle.dumps(Hostile(eval, "1")), "builtins.eval"),
        (pickle.dumps(Hostile(getattr, "a", "b")), "builtins.getattr"),
        (pickle.dumps(np.float64(1)), "numpy._core.multiarray.scalar"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0cload.__doc__\x93.", "numpy.load.__doc__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "numpy.ndarray.__init__"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"ccodecs\nencode\n.", "codecs.encode"),
    ],
)
def test_every_other_global_is_refused(data, name):
    with pytest.raises(InputError, match=rf"^file: this pickle refers to {re.escape(name)}, which may run code"):
        read_pickle(data, "file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"plain text",
        python_batch(0, "labels")[:-200],
        pickle.dumps(Hostile(__import__("_codecs").encode, "text", "zlib")),
        b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",  # to set attributes of the class
        b"\x80\x04\x82\x01.",  # a global by its number
        b"\x80\x02U\x01aQ.",  # a persistent object
    ],
)
def test_a_damaged_pickle_is_named(data):
    with pytest.raises(InputError, match=r"^file: is not an intact pickle \(.+\)$"):
        read_pickle(data, "file")


@pytest.mark.parametrize("fault", PICKLE_FAULTS)
def test_hostile_pickles_are_refused_at_once(folder, fault, monkeypatch):
    monkeypatch.setattr("bdjax.datasets.cifar._MAXIMUM_OPCODES", 100_000)  # 800,000 take a second
    write_folder(folder / "cifar-10-batches-py", cifar10_files(True) | {"data_batch_2": PICKLE_FAULTS[fault]})
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"^{re.escape(str(folder))}/cifar-10-batches-py/data_batch_2: ") as caught:
        load_cifar10([folder], False)
    assert time.perf_counter() - start < 5 and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_pickle_as_large_as_the_largest_batch_is_read():
    """CIFAR-100's training batch has 50,000 rows with names and two labels."""
    batch = {
        b"filenames": [b"name_%d.png" % i for i in range(50_000)],
        b"fine_labels": [5] * 50_000,
        b"coarse": [1] * 50_000,
    }
    # Protocol 2 of Python 3 takes the most steps: it writes bytes as calls.
    assert len(read_pickle(pickle.dumps(batch, 2), "file")[b"filenames"]) == 50_000


@pytest.mark.parametrize("packed", [True, False])
def test_files_that_are_no_batches_are_said(folder, packed):
    files = cifar10_files(False) | {
        "batches.meta.txt": b"",
        "readme.html": b"",
        "._test_batch.bin": b"",
        ".DS_Store": b"",
    }
    files |= {"data_batch_6.bin": binary_batch(6)}
    if packed:
        write_archive(folder / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    else:
        write_folder(folder / "cifar-10-batches-bin", files)
    for part in load_cifar10([folder], False):
        assert part.unread == (("data_batch_6.bin", "is not a file of cifar10"),)


def reduced(dtype: bytes, shape: bytes, content: bytes) -> bytes:
    """A pickle of a batch whose array's parts are given, for arrays that NumPy would not write."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\n"
        b"U\x02"
        + dtype
        + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + content
        + b"tb"
    )
    return b"\x80\x02}U\x04data" + array + b"sU\x06labels](K\x00K\x01es."


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pickle.dumps([1]), "contains a list; it must contain a dict with data and labels"),
        (pickle.dumps({}), "data is not an intact uint8 array "),
        (pickle.dumps({"data": 5, "labels": [0]}), "data is not an intact uint8 array "),
        (
            pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}),
            "data is not an intact uint8 array (an array is not",
        ),
        (
            reduced(b"O8", b"K\x01K\x01\x86", b"U\x08AAAAAAAA"),
            "data is not an intact uint8 array (an array is not uint8)",
        ),
        (reduced(b"u1", b"K\x64K\x64\x86", b"U\x08AAAAAAAA"), "data is not an intact uint8 array (cannot reshape"),
        (
            reduced(b"u1", b"K\x01K\x08\x86", b"K\x05"),
            "data is not an intact uint8 array (the content of an array is not bytes)",
        ),
        (
            reduced(b"u1", b"K\x01K\x08\x86", b"U\x08AAAAAAAA"),
            "data has shape [1, 8]; it must have 1 to 10000 rows of 3072",
        ),
        (pickle.dumps({"data": batch_pixels(0), "labels": "012"}), "labels is not a list of integers"),
        (pickle.dumps({"data": batch_pixels(0), "labels": [0, 1, "2"]}), "labels is not a list of integers"),
        (pickle.dumps({"data": batch_pixels(0), "labels": [0, 1, 1 << 70]}), "labels is not a list of integers"),
        (
            pickle.dumps({"data": batch_pixels(0), "labels": [0, 1]}),
            "has 3 images and 2 labels; the numbers must be equal",
        ),
        (
            pickle.dumps({"data": batch_pixels(0), "labels": [0, 1, -1]}),
            "row 2 has label -1; labels must be in 0..9",
        ),
        (
            pickle.dumps({"data": batch_pixels(0), "labels": [0, 10, 1]}),
            "row 1 has label 10; labels must be in 0..9",
        ),
    ],
)
def test_a_python_batch_is_checked(folder, batch, message):
    write_folder(folder / "cifar-10-batches-py", cifar10_files(True) | {"data_batch_2": batch})
    with pytest.raises(InputError, match="^" + re.escape(f"{folder}/cifar-10-batches-py/data_batch_2: {message}")):
        load_cifar10([folder], False)


def test_a_batch_that_python_3_wrote_again_is_read(folder):
    batch = {"data": batch_pixels(2), "labels": batch_labels(2)}
    files = cifar10_files(True) | {"data_batch_3": pickle.dumps(batch)}
    write_folder(folder / "cifar-10-batches-py", files)
    check_cifar10(*load_cifar10([folder], False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes; it must have 1 to 10000 records of 3073 bytes"),
        (binary_batch(0)[:-1], "has 9218 bytes; it must have 1 to 10000 records of 3073 bytes"),
        (bytes([0]) * 3073 + bytes([255]) + bytes(3072), "row 1 has label 255; labels must be in 0..9"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_binary_batch_is_checked(folder, content, message, packed):
    files = cifar10_files(False) | {"test_batch.bin": content}
    if packed:
        path = folder / "cifar-10-binary.tar.gz"
        write_archive(path, "cifar-10-batches-bin", files)
        where = f"{path}, member cifar-10-batches-bin/test_batch.bin"
    else:
        write_folder(folder / "cifar-10-batches-bin", files)
        where = f"{folder}/cifar-10-batches-bin/test_batch.bin"
    with pytest.raises(InputError, match=f"^{re.escape(f'{where}: {message}')}$"):
        load_cifar10([folder], False)


def test_a_missing_file_is_named(folder):
    files = cifar10_files(False)
    del files["data_batch_4.bin"]
    write_folder(folder / "cifar-10-batches-bin", files)
    path = folder / "cifar-10-batches-bin" / "data_batch_4.bin"
    with pytest.raises(
        InputError, match=f"^{re.escape(str(path))}: is missing; cifar-10-batches-bin must contain data_batch_1"
    ):
        load_cifar10([folder], False)


def test_a_missing_member_is_named(folder):
    path = folder / "cifar-10-binary.tar.gz"
    write_archive(path, "../cifar-10-batches-bin", cifar10_files(False))
    message = f"{path}: does not contain cifar-10-batches-bin/data_batch_1.bin; it must contain data_batch_1.bin, "
    with pytest.raises(InputError, match="^" + re.escape(message)):
        load_cifar10([folder], False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5],
        lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],  # the checksum
        lambda data: b"text",
        lambda data: gzip.compress(b"text"),
        lambda data: b"",
    ],
)
def test_a_damaged_archive_is_named(folder, damage):
    path = folder / "cifar-10-binary.tar.gz"
    write_archive(path, "cifar-10-batches-bin", cifar10_files(False))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))}: is not an intact .tar.gz \(.+\); download it again$"
    ):
        load_cifar10([folder], False)


def test_oversized_files_and_members_are_refused(folder):
    path = folder / "cifar-10-binary.tar.gz"
    write_archive(path, "", {"bomb": bytes(40_000_000)})
    assert path.stat().st_size < 100_000
    message = f"{path}, member bomb: unpacks to 40000000 bytes; files of cifar10 have at most 31720000"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_cifar10([folder], False)
    write_archive(path, "", {f"file_{i}": b"" for i in range(101)})
    with pytest.raises(
        InputError, match=f"^{re.escape(str(path))}: has over 100 members; the published archive has 8$"
    ):
        load_cifar10([folder], False)
    write_archive(path, "cifar-10-batches-bin", cifar10_files(False))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2 << 20)))
    with pytest.raises(InputError, match=r"has over 1048576 bytes after the end of the archive$"):
        load_cifar10([folder], False)
    write_folder(folder / "cifar-10-batches-bin", cifar10_files(False))
    with open(folder / "cifar-10-batches-bin" / "data_batch_1.bin", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(
        InputError, match=r"data_batch_1.bin: has 8589934592 bytes; files of cifar10 have at most 31720000$"
    ):
        load_cifar10([folder], False)


@pytest.mark.usefixtures("no_network")
def test_without_files_and_network_one_line_tells_all(folder, cache):
    with pytest.raises(InputError) as caught:
        load_cifar100([folder, cache], True)
    assert str(caught.value) == (
        "cifar100: found no cifar-100-binary or cifar-100-binary.tar.gz or cifar-100-python or cifar-100-python.tar.gz "
        f"in {folder}, {cache}; the download failed (https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz: "
        "ConnectionError): put cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/ into "
        f"{folder}"
    )


def test_what_is_fetched_is_read(cache, monkeypatch):
    def fetch(files, subfolder):
        path = cache / subfolder / files[0].file_name
        path.parent.mkdir()
        write_archive(path, "cifar-10-batches-bin", cifar10_files(False))
        return {files[0].file_name: path}

    monkeypatch.setattr("bdjax.datasets.cifar.fetch", fetch)
    check_cifar10(*load_cifar10([cache], True))
    check_cifar10(*load_cifar10([cache], False))  # found there the next time


def test_the_real_cifar10(data_dir):
    if not list(data_dir.glob("cifar-10-*")):
        pytest.skip("CIFAR-10 is not in BDJAX_DATA_DIR")
    train, test = load_cifar10([data_dir], False)
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert train.labels[0] == 6 and train.class_names[train.labels[0]] == "frog"
    assert train.images[0, 0, 0].tolist() == [59, 62, 63]
