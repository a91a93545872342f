"""The readers of archives, and each reader's answer to the same hostile archives and files."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from bdjax.datasets import archives
from bdjax.datasets.archives import GzipStream, Limits, open_npz, open_zip, read_npy, read_tar_gz
from bdjax.datasets.cifar import load_cifar10, load_cifar100
from bdjax.datasets.flowers17 import load_flowers17
from bdjax.datasets.gtsrb import load_gtsrb
from bdjax.datasets.mnist import read_idx
from bdjax.datasets.npz import load_npz, load_suspect_npz
from bdjax.datasets.tiny_imagenet import load_tiny_imagenet
from bdjax.errors import InputError
from bdjax.exchange import model_folder
from bdjax.workflows.outcomes import read_outcome
from tests.datasets import test_gtsrb as gtsrb
from tests.datasets import test_tiny_imagenet as tiny
from tests.fixtures.archives import (
    FILE_FAULTS,
    PICKLE_FAULTS,
    TAR_FAULTS,
    gzip_zeros,
    pax_record,
    tar_member,
    zip_faults,
)
from tests.fixtures.arrays import NPZ_FAULTS, images, npy, saved, whole, with_member

LIMITS = Limits("files of the test", 1000, 5000, 5, "the published archive has 2")


def refused(read, *arguments) -> str:
    """The one line with which a call is refused, within seconds."""
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert time.perf_counter() - start < 5  # 3 s on a machine that does nothing else
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


# ---- tar.gz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_of_every_form_are_read(folder, form):
    """As Python's own reader reads them."""
    contents = {"a": b"1", "b/c": b"", "b/" + "long" * 40 + "/d": b"2" * 513, "./é": b"3"}
    path = folder / "a.tgz"
    with tarfile.open(path, "w:gz", format=form) as archive:
        for name, content in contents.items():
            if form == tarfile.USTAR_FORMAT and len(name) > 100:
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "target" * 30 if form != tarfile.USTAR_FORMAT else "a"
        archive.addfile(link)
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        left = tarfile.TarInfo("b/._c")
        archive.addfile(left, io.BytesIO())
    found = read_tar_gz(path, Limits("files", 1000, 1 << 20, 10, ""), lambda name: name != "a")
    with tarfile.open(path) as archive:
        wanted = {
            member.name.removeprefix("./"): archive.extractfile(member).read() for member in archive if member.isreg()
        }
    del wanted["b/._c"], wanted["a"]
    assert found.contents == wanted and len(wanted) >= 2
    assert found.others == {"a": "", "link": "is a link"}


def test_the_limits_of_a_tar_archive(folder):
    path = folder / "a.tgz"

    def read(*blocks: bytes, limits: Limits = LIMITS) -> str:
        path.write_bytes(gzip.compress(b"".join(blocks) + bytes(1024)))
        return refused(read_tar_gz, path, limits, bool)

    assert read(tar_member("a", bytes(1001))) == (
        f"{path}, member a: unpacks to 1001 bytes; files of the test have at most 1000"
    )
    roomy = LIMITS._replace(total_bytes=1 << 20)
    assert read(*(tar_member(str(i), b"") for i in range(6)), limits=roomy) == (
        f"{path}: has over 5 members; the published archive has 2"
    )
    many = LIMITS._replace(members=100)
    assert read(*(tar_member(str(i), bytes(900)) for i in range(6)), limits=many) == (
        f"{path}: unpacks to more than the limit of 5000 bytes"
    )
    assert "has two members a; names must differ" in read(tar_member("a", b"1"), tar_member("./a", b"2"))
    long = tar_member("x", pax_record("path", "n" * 5000), b"x")
    assert "has a member whose name has 5000 letters" in read(long, tar_member("a", b"1"), limits=roomy)


@pytest.mark.parametrize("data", [b"", b"1", b"12" * 100_000, np.random.default_rng(0).bytes(300_000)])
def test_gzip_streams_are_read_in_any_portion(data):
    packed = gzip.compress(data[:1000]) + gzip.compress(data[1000:], 1) + bytes(100)
    for size in (1, 7, 65536, 1 << 20):
        stream = GzipStream(io.BytesIO(packed), 1 << 20, "file")
        first = stream.read(size)
        assert bytes(first) == data[:size]
        assert bytes(stream.read(1 << 20)) == data[size:] and stream.read(10) == b""
    assert "unpacks to more than the limit of 9 bytes" in refused(
        GzipStream(io.BytesIO(gzip.compress(bytes(10))), 9, "file").read, 100
    )


TAR_READERS = {
    "cifar10": ("cifar-10-binary.tar.gz", load_cifar10),
    "cifar100": ("cifar-100-python.tar.gz", load_cifar100),
    "flowers17": ("17flowers.tgz", load_flowers17),
}


@pytest.mark.parametrize("fault", TAR_FAULTS)
@pytest.mark.parametrize("reader", TAR_READERS)
def test_hostile_tar_archives_are_refused(folder, reader, fault):
    name, load = TAR_READERS[reader]
    path = TAR_FAULTS[fault](folder / name)
    assert refused(load, [folder], False).startswith(str(path))


# ---- zip --------------------------------------------------------------------------------------------------------------


def test_zip_members_are_read(folder):
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("a", b"1" * 500)
        archive.writestr("folder/b", b"2", zipfile.ZIP_DEFLATED)
        for name in ("__MACOSX/a", "folder/._b", ".DS_Store", "Thumbs.db"):
            archive.writestr(name, b"")
    with open_zip(path, LIMITS._replace(members=10)) as files:
        assert files.sizes == {"a": 500, "folder/b": 1}
        assert files.read("a") == b"1" * 500 and files.read("folder/b") == b"2"


def test_the_limits_of_a_zip_archive(folder):
    path = folder / "a.zip"

    def read(sizes: dict[str, int]) -> str:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, size in sizes.items():
                archive.writestr(name, bytes(size))
        return refused(open_zip(path, LIMITS).__enter__)

    assert read({"a": 1001}) == f"{path}, member a: unpacks to 1001 bytes; files of the test have at most 1000"
    assert read({str(i): 1 for i in range(6)}) == f"{path}: has 6 members; the published archive has 2"
    many = LIMITS._replace(total_bytes=2500)
    with zipfile.ZipFile(path, "w") as archive:
        for name in "abc":
            archive.writestr(name, bytes(1000))
    assert refused(open_zip(path, many).__enter__) == f"{path}: unpacks to more than the limit of 2500 bytes"


GTSRB_FAULTS = zip_faults("GTSRB/Training/00000/00000.ppm", gtsrb.ppm(1), {})
TABLE_FAULTS = zip_faults("GT-final_test.csv", gtsrb.published_files()["GT-final_test.csv"], {})
TINY_FAULTS = zip_faults(
    f"tiny-imagenet-200/{tiny.GOLDFISH}",
    tiny.jpeg(1),
    {f"tiny-imagenet-200/{name}": data for name, data in tiny.published_files().items() if name != tiny.GOLDFISH},
)


@pytest.mark.parametrize("fault", GTSRB_FAULTS)
def test_hostile_zip_archives_are_refused(folder, fault):
    gtsrb.write_archives(folder, gtsrb.published_files())
    for name, faults in (("GTSRB-Training_fixed.zip", GTSRB_FAULTS), ("GTSRB_Final_Test_GT.zip", TABLE_FAULTS)):
        path = folder / name
        sound = path.read_bytes()
        path.unlink()
        faults[fault](path)
        assert refused(load_gtsrb, [folder], False).startswith(str(path))
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(sound)
    path = TINY_FAULTS[fault](folder / "tiny-imagenet-200.zip")
    assert refused(load_tiny_imagenet, [folder], False).startswith(str(path))


# ---- npz --------------------------------------------------------------------------------------------------------------


def test_arrays_are_read_as_numpy_reads_them(folder):
    arrays = {
        "a": np.arange(24, dtype=">i4").reshape(2, 3, 4),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array(["a", "bc"]),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3)),
        "truth": np.array([True, False]),
    }
    path = folder / "a.npz"
    np.savez_compressed(path, **arrays)
    with open_npz(path) as file, np.load(path) as loaded:
        assert set(file.headers) == set(arrays) and not file.problems
        for name, array in arrays.items():
            read = file.read(name)
            np.testing.assert_array_equal(read, array)
            assert read.dtype == loaded[name].dtype and read.flags.f_contiguous == loaded[name].flags.f_contiguous


def test_what_is_no_plain_array_is_said(folder):
    path = folder / "a.npz"
    with_member(npy(images()), **{"readme.txt": b"x", "__MACOSX/._images.npy": b"x"})(path)
    with open_npz(path) as file:
        assert file.problems == {"readme.txt": "is not an array (.npy)"} and set(file.headers) == {"images", "labels"}
    saved(o=np.array([None], object), s=np.zeros(2, [("x", int)]))(path)
    with open_npz(path) as file:
        assert file.problems["o"].startswith("is an array of objects") and file.problems["s"].startswith("has dtype [")


def test_arrays_are_compared_with_the_memory_that_there_is(folder, monkeypatch):
    path = folder / "a.npz"
    whole()(path)
    monkeypatch.setattr(archives, "free_memory", lambda: 1300)
    message = f"{path}, labels: int64 [20] has 160 bytes, 60 more than the memory that is available"
    assert refused(load_npz, path) == message
    monkeypatch.undo()
    assert 1 << 24 < archives.free_memory() < 1 << 60


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_hostile_npz_files_are_refused(folder, fault):
    path = NPZ_FAULTS[fault](folder / "mine.npz")
    for load in (load_npz, load_suspect_npz):
        assert refused(load, path).startswith(str(path))


@pytest.mark.parametrize(
    "fault", [*FILE_FAULTS, "no magic", "header of 4 GB", "shape without end", "3 GB in 3 MB", "objects"]
)
def test_hostile_triggers_and_outcomes_are_refused(folder, fault):
    path = NPZ_FAULTS[fault](folder / "triggers.npz")
    assert refused(model_folder._read_triggers, path, 2, (4, 5, 3), 0).startswith(str(path))
    assert "remove it to run the detectors" in refused(read_outcome, path, [], [])


# ---- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["endless", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused(folder, fault):
    make = FILE_FAULTS[fault]
    for name, num_dimensions in (("images.gz", 3), ("labels", 1)):
        assert refused(read_idx, make(folder / name), num_dimensions).startswith(str(folder / name))
    gtsrb.write_files(folder, gtsrb.published_files())
    tiny.write_files(folder, tiny.published_files())
    cases = {
        "GTSRB/Training/00001/00000.ppm": load_gtsrb,
        "GTSRB/Final_Test/Images/00001.ppm": load_gtsrb,
        "GT-final_test.csv": load_gtsrb,
        f"tiny-imagenet-200/{tiny.GOLDFISH}": load_tiny_imagenet,
        "tiny-imagenet-200/wnids.txt": load_tiny_imagenet,
        "tiny-imagenet-200/words.txt": load_tiny_imagenet,
        "tiny-imagenet-200/val/val_annotations.txt": load_tiny_imagenet,
    }
    for name, load in cases.items():
        path = folder / name
        sound = path.read_bytes()
        path.unlink()
        make(path)
        if fault == "folder" and path.suffix in (".ppm", ".JPEG"):  # an empty folder in a folder is nothing
            path.rmdir()
        else:
            assert str(path) in refused(load, [folder], False)
            path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(sound)


def test_unpacked_bytes_are_counted_as_they_come(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0\0\0\x01" + b"\0\0\0\x1c" * 2) + gzip_zeros(2048))
    assert refused(read_idx, path, 3).endswith("has more than the 784 bytes that its header gives")


IN_LITTLE_MEMORY = """
import pathlib, resource, sys
from bdjax.datasets.cifar import load_cifar10, read_pickle
from bdjax.datasets.npz import load_npz
from bdjax.datasets.tiny_imagenet import load_tiny_imagenet
from bdjax.errors import InputError
from tests.datasets.test_archives import TINY_FAULTS
from tests.fixtures import archives, arrays

folder = pathlib.Path(sys.argv[1])
cases = [
    (archives.TAR_FAULTS[name], "cifar-10-binary.tar.gz", lambda path: load_cifar10([folder], False))
    for name in ("long name", "pax header", "bomb", "large member", "comment", "streams without end", "endless")
]
cases += [
    (arrays.NPZ_FAULTS[name], "mine.npz", load_npz)
    for name in ("3 GB in 3 MB", "3 GB of floats", "header of 4 GB", "dtype without end", "larger than it says", "endless")
]
cases += [
    (TINY_FAULTS[name], "tiny-imagenet-200.zip", lambda path: load_tiny_imagenet([folder], False))
    for name in ("larger than it says", "members without end", "endless")
]
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
for make, name, load in cases:
    path = make(folder / name)
    try:
        load(path)
    except InputError as error:
        print("refused", error)
    path.unlink()
for name, data in archives.PICKLE_FAULTS.items():
    try:
        read_pickle(data, name).as_array()
    except (InputError, AttributeError) as error:
        print("refused", error)
"""


@pytest.mark.slow
def test_a_gigabyte_is_enough_to_refuse(folder):
    """In a process of its own, since the limit cannot be lifted again."""
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 7 + 6 + 3 + len(PICKLE_FAULTS) and all(line.startswith("refused ") for line in lines)
    assert "MemoryError" not in done.stdout and "Cannot allocate" not in done.stdout


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(1)]
)
def test_an_array_in_memory_is_read(array):
    found = read_npy(npy(array), "answer")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "^answer: is no intact array in NumPy's .npy format"),
        (npy(np.arange(3))[:-1], "^answer: is no intact array .*, but its header says"),
        (npy(np.arange(3)) + b"x", "^answer: is no intact array .*, but its header says"),
        (npy(np.array([None])), "^answer: is an array of objects, which are pickles"),
    ],
)
def test_what_is_no_array_in_memory_is_one_line(data, message):
    with pytest.raises(InputError, match=message):
        read_npy(data, "answer")
