import gzip
import io
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets import load
from bdjax.datasets.flowers17 import load_flowers17
from bdjax.errors import InputError


def jpeg(level: int, size: tuple[int, int] = (20, 12)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, 0, 255 - level)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


IMAGES = [jpeg(10 * label, (20 + label, 12)) for label in range(17)]
PANSY = "jpg/image_1281.jpg"
"""The first of the last class."""


def published_files(per_class: int = 80) -> dict[str, bytes]:
    """The first images of each class, as the publisher numbers them."""
    numbers = [80 * label + i + 1 for label in range(17) for i in range(per_class)]
    return {"jpg/files.txt": b"unused"} | {f"jpg/image_{n:04d}.jpg": IMAGES[(n - 1) // 80] for n in numbers}


# What folders are called in copies that go round, in another order than the publisher's.
FOLDERS = [
    "Bluebell",
    "Buttercup",
    "ColtsFoot",
    "Cowslip",
    "Crocus",
    "Daffodil",
    "Daisy",
    "Dandelion",
    "Fritillary",
    "Iris",
    "LilyValley",
    "Pansy",
    "Snowdrop",
    "Sunflower",
    "Tigerlily",
    "Tulip",
    "Windflower",
]


def files_by_class(folders: list[str], per_class: int = 2, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{folder}/image_{i + 1}.jpg": IMAGES[label]
        for label, folder in enumerate(folders)
        for i in range(per_class)
    }


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    root = folder / "flowers17"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(
    folder: pathlib.Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()
) -> pathlib.Path:
    path = folder / "17flowers.tgz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


WRITERS = pytest.mark.parametrize("write", [write_files, write_archive])


@WRITERS
def test_the_publishers_layout_is_read(folder, write):
    path = write(folder, published_files())
    train, test = load("flowers17", folder, download=False)
    assert list(folder.iterdir()) == [path]  # an archive is not unpacked
    assert train.labels.tolist() == [label for label in range(17) for _ in range(70)]
    assert test.labels.tolist() == [label for label in range(17) for _ in range(10)]
    # The last 10 of the first class, and the first 70 of the second.
    assert test.files[:10] == tuple(f"jpg/image_{n:04d}.jpg" for n in range(71, 81))
    assert train.files[70:140] == tuple(f"jpg/image_{n:04d}.jpg" for n in range(81, 151))
    for part, which, rows in ((train, "first", "1,190"), (test, "last", "170")):
        assert part.images.dtype == np.uint8 and part.images.shape[1:] == (32, 32, 3)
        np.testing.assert_allclose(part.images[:, 5, 9, 0].astype(int), 10 * part.labels, atol=4)
        assert part.name == "flowers17" and part.num_classes == 17
        assert part.class_names[0] == "daffodil" and part.class_names[16] == "pansy"
        assert part.source == f"{path} ({rows} rows, the {which} of each class, 17 sizes scaled to 32x32)"


@WRITERS
def test_folders_that_bear_the_flowers_names_have_the_publishers_labels(folder, write):
    train, test = load_flowers17([folder.parent, write(folder, files_by_class(FOLDERS, 2)).parent], False)
    expected = [FOLDERS.index(name) for name in ("Daffodil", "Snowdrop", "LilyValley", "Bluebell")]
    np.testing.assert_allclose(train.images[:4, 0, 0, 0].astype(int), np.multiply(10, expected), atol=4)
    assert train.labels.tolist() == test.labels.tolist() == list(range(17))
    assert train.class_names[2] == "lily of the valley" and train.files[2] == "LilyValley/image_1.jpg"
    assert test.files[2] == "LilyValley/image_2.jpg" and "(17 of 170 rows, the last" in test.source


def test_class_folders_below_one_folder_of_an_archive(folder):
    write_archive(folder, files_by_class(FOLDERS, 2, "flowers/"))
    train, _ = load_flowers17([folder], False)
    assert train.class_names[0] == "daffodil" and train.files[0] == "flowers/Daffodil/image_1.jpg"


@WRITERS
def test_folders_of_other_names_are_labelled_in_their_order(folder, write):
    names = [f"{label:02d}" for label in range(17)]
    files = files_by_class(names, 16) | {".hidden/image.jpg": b"", "00/notes.txt": b"", "03/.thumb.jpg": b""}
    train, test = load_flowers17([write(folder, files).parent], False)
    assert train.class_names == tuple(names) and len(train) == 17 * 14 and len(test) == 17 * 2
    assert train.files[0] == "00/image_1.jpg" and test.files[:2] == ("00/image_8.jpg", "00/image_9.jpg")


@WRITERS
def test_residue_is_no_data_and_other_files_are_said(folder, write):
    files = {
        **{f"jpg/{name}": b"x" for name in ("._image_0001.jpg", ".DS_Store", "Thumbs.db", "desktop.ini")},
        "__MACOSX/jpg/image_0001.jpg": b"x",
        "jpg/more.tif": b"x",
        "notes.md": b"x",
    }
    if write is write_files:
        files["jpg/deep/image_0003.jpg"] = IMAGES[0]
    write(folder, published_files(2) | files)
    train, test = load_flowers17([folder], False)
    assert len(train) == len(test) == 17 and train.unread == test.unread
    assert {entry.file: entry.reason for entry in train.unread} == {
        "jpg/more.tif": "has a suffix that is not read",
        "notes.md": "has a suffix that is not read",
        **({"jpg/deep/image_0003.jpg": "is in a folder below a class"} if write is write_files else {}),
    }


@pytest.mark.usefixtures("no_network")
def test_without_files_and_network_one_line_tells_all(folder, cache):
    with pytest.raises(InputError) as caught:
        load_flowers17([folder, cache], True)
    assert str(caught.value) == (
        f"flowers17: found no folder flowers17 or archive 17flowers.tgz in {folder}, {cache}; the download failed "
        "(https://www.robots.ox.ac.uk/~vgg/data/flowers/17/17flowers.tgz: ConnectionError): put 17flowers.tgz from "
        f"https://www.robots.ox.ac.uk/~vgg/data/flowers/17/ into {folder}"
    )


def test_what_is_fetched_is_read(cache, monkeypatch):
    def fetch(files, subfolder):
        assert files[0].md5 == "b59a65d8d1a99cd66944d474e1289eab"
        (cache / subfolder).mkdir(parents=True)
        return {files[0].file_name: write_archive(cache / subfolder, published_files(2))}

    monkeypatch.setattr("bdjax.datasets.flowers17.fetch", fetch)
    for download in (True, False):  # found there the next time
        train, _ = load_flowers17([cache], download)
        assert train.source.startswith(f"{cache / '17flowers.tgz'} (17 of 1,190 rows, ")


@WRITERS
@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (published_files(2) | {PANSY: b"text"}, PANSY, "is not an image in a format that is read; PNG, JPEG, "),
        (published_files(2) | {PANSY: jpeg(1, (99, 99))[:700]}, PANSY, "is damaged ("),
        (
            published_files(2) | {"jpg/image_1361.jpg": IMAGES[0]},
            "jpg/image_1361.jpg",
            "is not one of image_0001.jpg to image_1360.jpg",
        ),
        (
            published_files(2) | {"jpg/other.jpg": IMAGES[0]},
            "jpg/other.jpg",
            "is not one of image_0001.jpg to image_1360.jpg",
        ),
        (
            {name: content for name, content in published_files(2).items() if name != PANSY},
            "",
            "has 1 image(s) of class 16 (pansy); at least 2 are needed",
        ),
        (
            files_by_class(FOLDERS[:3]),
            "",
            "has 3 folders of images; 17 are needed, one for each class, or jpg/image_00",
        ),
        ({"readme.txt": b""}, "", "has 0 folders of images; 17 are needed"),
    ],
)
def test_what_is_wrong_is_named(folder, write, files, name, message):
    path = write(folder, files)
    where = (path / name if path.is_dir() else f"{path}, member {name}") if name else path
    with pytest.raises(InputError, match="^" + re.escape(f"{where}: {message}")) as caught:
        load_flowers17([folder], False)
    assert "\n" not in str(caught.value)


def test_members_that_point_elsewhere_are_passed_over(folder):
    """Nothing is unpacked; links are not followed; a name with .. is no image of the set."""
    link = tarfile.TarInfo("jpg/image_0003.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("jpg/image_0004.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../secret"
    write_archive(folder, published_files(2), (link, hard))
    train, test = load_flowers17([folder], False)
    assert len(train) == len(test) == 17 and "jpg/image_0003.jpg" not in train.files + test.files
    assert train.unread == (("jpg/image_0003.jpg", "is a link"), ("jpg/image_0004.jpg", "is a link"))
    write_archive(folder, published_files(2) | {"../../image_0003.jpg": IMAGES[0], "/image_0004.jpg": IMAGES[0]})
    with pytest.raises(InputError, match="member /image_0004.jpg: is not one of image_0001.jpg to"):
        load_flowers17([folder], False)
    write_archive(folder, published_files(2) | {"../../image_0003.jpg": IMAGES[0]})
    assert len(load_flowers17([folder], False).train) == 17
    assert not (folder.parent.parent / "image_0003.jpg").exists()


def test_what_is_too_large_is_refused(folder, monkeypatch):
    path = write_archive(folder, published_files(2) | {"jpg/bomb": bytes(5 << 20)})
    message = f"{path}, member jpg/bomb: unpacks to {5 << 20} bytes; files of Flowers-17 have at most {4 << 20}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_flowers17([folder], False)
    write_archive(folder, published_files(2))
    monkeypatch.setattr("bdjax.datasets.flowers17._MAXIMUM_ARCHIVE_BYTES", 20_000)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: unpacks to more than the limit of 20000 bytes$"):
        load_flowers17([folder], False)
    monkeypatch.setattr("bdjax.datasets.flowers17._MAXIMUM_ARCHIVE_MEMBERS", 10)
    with pytest.raises(
        InputError, match=f"^{re.escape(str(path))}: has over 10 members; the published archive has 1,363$"
    ):
        load_flowers17([folder], False)
    root = write_files(folder, published_files(2))  # goes before the archive
    monkeypatch.setattr("bdjax.datasets.flowers17._MAXIMUM_FILE_BYTES", 100)
    with pytest.raises(
        InputError, match=f"^{re.escape(str(root))}/jpg/image_0001.jpg: has [0-9]+ bytes; files of Flowers"
    ):
        load_flowers17([folder], False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5],
        lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],  # the checksum
        lambda data: gzip.compress(b"text"),
        lambda data: b"",
    ],
)
def test_an_archive_that_is_not_intact_is_named(folder, damage):
    path = write_archive(folder, published_files(2))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))}: is not an intact .tar.gz \(.+\); download it again$"
    ):
        load_flowers17([folder], False)


def test_the_real_flowers(data_dir):
    if not any((data_dir / name).exists() for name in ("flowers17", "17flowers", "17flowers.tgz")):
        pytest.skip("Flowers-17 is not in BDJAX_DATA_DIR")
    train, test = load_flowers17([data_dir], False)
    assert np.bincount(train.labels).tolist() == [70] * 17 and np.bincount(test.labels).tolist() == [10] * 17
