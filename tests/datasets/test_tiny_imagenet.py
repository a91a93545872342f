import io
import pathlib
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets.tiny_imagenet import load_tiny_imagenet
from bdjax.errors import InputError


def jpeg(level: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level, 0, 255 - level)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def noise() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    assert len(stream.getvalue()) > 3000
    return stream.getvalue()


TRAIN = [
    ("n01443537", "0", 10),
    ("n01443537", "1", 20),
    ("n01443537", "10", 30),
    ("n01443537", "2", 40),
    ("n02124075", "0", 60),
    ("n04067472", "7", 70),
    ("n04067472", "8", 80),
]
"""(class, number, level) of the training images, in the order of the rows."""
TEST = [("n04067472", 100), ("n01443537", 110), ("n04067472", 120)]
WORDS = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn04067472\treel\n"
ANNOTATIONS = "".join(f"val_{row}.JPEG\t{wnid}\t0\t32\t44\t62\n" for row, (wnid, _) in enumerate(TEST))


def published_files() -> dict[str, bytes]:
    """Three classes, listed in another order than that of their numbers; the second image is grey."""
    return {
        "wnids.txt": b"n02124075\nn04067472\nn01443537\n",
        "words.txt": WORDS.encode(),
        "val/val_annotations.txt": ANNOTATIONS.encode(),
        "test/images/test_0.JPEG": b"unused",
        **{f"train/{wnid}/{wnid}_boxes.txt": b"unused" for wnid, _, _ in TRAIN},
        **{
            f"train/{wnid}/images/{wnid}_{number}.JPEG": jpeg(level, mode="L" if level == 20 else "RGB")
            for wnid, number, level in reversed(TRAIN)
        },
        **{f"val/images/val_{row}.JPEG": jpeg(level) for row, (_, level) in enumerate(TEST)},
    }


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    root = folder / "tiny-imagenet-200"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/", b"")
        archive.writestr("tiny-imagenet-200/val/images/", b"")
        archive.writestr("__MACOSX/train/n09999999/images/n09999999_0.JPEG", b"unused")
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path


WRITERS = pytest.mark.parametrize("write", [write_files, write_archive])


def check(train, test, path: pathlib.Path):
    assert train.images.shape == (7, 64, 64, 3) and train.images.dtype == np.uint8
    red = [level for _, _, level in TRAIN]
    blue = [level if level == 20 else 255 - level for level in red]
    np.testing.assert_allclose(train.images[:, 30, 40, 0].astype(int), red, atol=3)
    np.testing.assert_allclose(train.images[:, 30, 40, 2].astype(int), blue, atol=3)
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 2, 2] and train.labels.dtype == np.int32
    assert train.files == tuple(f"train/{wnid}/images/{wnid}_{number}.JPEG" for wnid, number, _ in TRAIN)
    np.testing.assert_allclose(test.images[:, 0, 0, 0].astype(int), [level for _, level in TEST], atol=3)
    assert test.labels.tolist() == [2, 0, 2]
    assert test.files == ("val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    for part in (train, test):
        assert part.class_names == ("goldfish", "Egyptian cat", "reel") and part.num_classes == 3
        assert part.name == "tiny_imagenet"
    assert train.source == f"{path} (7 of 100,000 rows, 3 of 200 classes)"
    assert test.source == f"{path} (3 of 10,000 rows, 3 of 200 classes)"


@WRITERS
def test_the_publishers_layout_is_read(folder, write):
    path = write(folder, published_files())
    check(*load_tiny_imagenet([folder.parent / "elsewhere", folder], False), path)
    assert list(folder.iterdir()) == [path]  # an archive is not unpacked


def test_all_classes_are_the_usual_case_and_not_told(folder):
    wnids = [f"n{number:08d}" for number in range(200)]
    images = {f"train/{wnid}/images/{wnid}_0.JPEG": jpeg(1) for wnid in wnids}
    tables = {"wnids.txt": "\r\n".join(wnids), "words.txt": "".join(f"{wnid}\tone, two\n" for wnid in wnids)}
    tables["val/val_annotations.txt"] = f"val_0.JPEG\t{wnids[199]}\t0\t0\t9\t9\r\n\r\n"
    write_archive(
        folder, images | {name: text.encode() for name, text in tables.items()} | {"val/images/val_0.JPEG": jpeg(2)}
    )
    train, test = load_tiny_imagenet([folder], False)
    assert train.source.endswith(".zip (200 of 100,000 rows)") and train.labels.tolist() == list(range(200))
    assert test.labels.tolist() == [199] and test.class_names[199] == "one"


def test_what_is_fetched_is_read(cache, monkeypatch):
    def fetch(files, subfolder):
        (file,) = files
        assert file.base_urls == ("http://cs231n.stanford.edu/",) and file.md5 == "90528d7ca1a48142e341f4ef8d21d0de"
        (cache / subfolder).mkdir(parents=True)
        return {file.file_name: write_archive(cache / subfolder, published_files())}

    monkeypatch.setattr("bdjax.datasets.tiny_imagenet.fetch", fetch)
    path = cache / "tiny-imagenet-200.zip"
    check(*load_tiny_imagenet([cache], True), path)
    check(*load_tiny_imagenet([cache], False), path)  # found there the next time


@pytest.mark.usefixtures("no_network")
def test_without_files_and_network_one_line_tells_all(folder, cache):
    with pytest.raises(InputError) as caught:
        load_tiny_imagenet([folder, cache], True)
    assert str(caught.value) == (
        f"tiny_imagenet: found no tiny-imagenet-200 or tiny-imagenet-200.zip in {folder}, {cache}; the download failed "
        "(http://cs231n.stanford.edu/tiny-imagenet-200.zip: ConnectionError): put tiny-imagenet-200.zip from "
        f"http://cs231n.stanford.edu/ into {folder}"
    )


@WRITERS
def test_residue_is_no_data_and_other_files_are_said(folder, write):
    class_folder = "train/n01443537/images"
    files = {
        f"{class_folder}/._n01443537_0.JPEG": b"x",
        f"{class_folder}/.DS_Store": b"x",
        "train/.DS_Store/images/x.JPEG": b"x",
        "__MACOSX/train/x.JPEG": b"x",
        f"{class_folder}/more.jpg": jpeg(1),
        f"{class_folder}/deep/more.JPEG": jpeg(1),
        "val/images/val_7.JPEG": jpeg(1),
        "val/images/._val_0.JPEG": b"x",
        "extra/more.JPEG": jpeg(1),
    }
    path = write(folder, published_files() | files)
    train, test = load_tiny_imagenet([folder], False)
    check(train, test, path)
    assert {entry.file: entry.reason for entry in train.unread} == {
        f"{class_folder}/more.jpg": "has a suffix that is not read; .JPEG is",
        f"{class_folder}/deep/more.JPEG": "is not in the images folder of a class",
        "test": "holds 1 file(s) without labels",
        "extra": "holds 1 file(s), not read",
    }
    assert test.unread == (("val/images/val_7.JPEG", "has no line in val/val_annotations.txt"),)


def test_members_outside_the_folder_are_said(folder):
    path = write_archive(folder, published_files())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../x.JPEG", b"x")
        archive.writestr("/abs.JPEG", b"x")
    train, _ = load_tiny_imagenet([folder], False)
    assert [entry for entry in train.unread if "outside" in entry.reason] == [
        ("../x.JPEG", "is outside tiny-imagenet-200/"),
        ("/abs.JPEG", "is outside tiny-imagenet-200/"),
    ]


def without(*names: str) -> dict[str, bytes]:
    return {name: content for name, content in published_files().items() if not name.startswith(names)}


GOLDFISH = "train/n01443537/images/n01443537_0.JPEG"


@WRITERS
@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (without("wnids.txt"), "wnids.txt", "is missing; it contains the classes"),
        (without("words.txt"), "words.txt", "is missing; it contains the names of the classes"),
        (without("val/val_a"), "val/val_annotations.txt", "is missing; it contains the labels of val/images"),
        (
            without("train/n02124075/images"),
            "train/n02124075/images",
            "is missing or contains no .JPEG, although wnids.txt lists n02124075",
        ),
        ({"wnids.txt": b"n02124075\n../etc\n"}, "wnids.txt", "line 2 is '../etc'; n and 8 digits are needed"),
        ({"wnids.txt": b"n02124075\n\nn02124075\n"}, "wnids.txt", "lists 1 class(es); at least 2 are needed"),
        ({"wnids.txt": b"n02124075\nn04067472\n"}, GOLDFISH, "has a class that wnids.txt does not list"),
        (
            {"words.txt": b"n01443537\tgoldfish\nn02124075\t\nn04067472\treel\n"},
            "words.txt",
            "has no name for n02124075, which wnids.txt lists",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\tn04067472\t0\t0\t1\t1\nval_1.JPEG\tn00001740\t0\t0\t1\t1\n"},
            "val/val_annotations.txt",
            "line 2 has class 'n00001740', which wnids.txt does not list",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\tn04067472\n\nval_9.JPEG\tn04067472\n"},
            "val/val_annotations.txt",
            "line 3 has image 'val_9.JPEG', which is not in val/images",
        ),
        (
            {"val/val_annotations.txt": b"../../wnids.txt\tn04067472\n"},
            "val/val_annotations.txt",
            "line 1 has image '../../wnids.txt', which is not in val/images",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG 3\n"},
            "val/val_annotations.txt",
            "line 1 has class '', which wnids.txt does not list",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\tn04067472\n" * 2},
            "val/val_annotations.txt",
            "line 2 has val_0.JPEG again; each image has one",
        ),
        (
            {"wnids.txt": b"".join(b"n%08d\n" % i for i in range(100_000))},
            "wnids.txt",
            "lists more than 1000 classes; Tiny ImageNet has 200",
        ),
        ({"wnids.txt": b"n" * 1_000_000}, "wnids.txt", f"line 1 is '{'n' * 97}...'; n and 8 digits are needed"),
        ({"val/val_annotations.txt": b"\n"}, "val/val_annotations.txt", "labels no images; at least one is needed"),
        ({GOLDFISH: jpeg(1, (64, 63))}, GOLDFISH, "has 64x63 pixels; 64x64 are needed"),
        ({"val/images/val_2.JPEG": noise()[:2000]}, "val/images/val_2.JPEG", "is damaged ("),
        ({GOLDFISH: b"text"}, GOLDFISH, "is not an image in a format that is read; PNG, JPEG, "),
    ],
)
def test_what_is_wrong_is_named(folder, write, files, name, message):
    path = write(folder, files if len(files) > 1 else published_files() | files)
    where = path / name if path.is_dir() else f"{path}, member tiny-imagenet-200/{name}"
    with pytest.raises(InputError, match="^" + re.escape(f"{where}: {message}")) as caught:
        load_tiny_imagenet([folder], False)
    assert "\n" not in str(caught.value)


def test_files_that_are_too_large_are_refused_unread(folder, monkeypatch):
    monkeypatch.setattr("bdjax.datasets.tiny_imagenet._MAXIMUM_FILE_BYTES", 10_000)
    files = published_files() | {GOLDFISH: bytes(10_001)}
    path = write_archive(folder, files)
    message = f"{path}, member tiny-imagenet-200/{GOLDFISH}: unpacks to 10001 bytes; files of Tiny ImageNet have at most 10000"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_tiny_imagenet([folder], False)
    path = write_files(folder, files)  # goes before the archive
    with pytest.raises(
        InputError, match="^" + re.escape(f"{path / GOLDFISH}: has 10001 bytes; files of Tiny ImageNet")
    ):
        load_tiny_imagenet([folder], False)


def test_an_archive_of_too_many_members_is_refused(folder, monkeypatch):
    monkeypatch.setattr("bdjax.datasets.tiny_imagenet._MAXIMUM_ARCHIVE_MEMBERS", 10)
    path = write_archive(folder, published_files())
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))}: has \d+ members; the published archive has fewer than"
    ):
        load_tiny_imagenet([folder], False)


def test_an_archive_that_is_not_intact_is_named(folder):
    path = write_archive(folder, published_files())
    intact = path.read_bytes()
    start = intact.index(jpeg(10)) + 100
    for content in (intact[:-30], b"", intact[:start] + b"?" + intact[start + 1 :]):
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=rf"^{re.escape(str(path))}: is not an intact .zip \(.+\); download it again$"
        ):
            load_tiny_imagenet([folder], False)


@pytest.mark.slow
def test_the_real_tiny_imagenet(data_dir):
    if not any((data_dir / name).exists() for name in ("tiny-imagenet-200", "tiny-imagenet-200.zip")):
        pytest.skip("Tiny ImageNet is not in BDJAX_DATA_DIR")
    """All 200 published classes, or a part of them with all of their images."""
    train, test = load_tiny_imagenet([data_dir], False)
    classes = train.num_classes
    assert 2 <= classes <= 200 and len(set(train.class_names)) == classes
    assert train.images.shape == (500 * classes, 64, 64, 3) and test.images.shape == (50 * classes, 64, 64, 3)
    assert np.bincount(train.labels).tolist() == [500] * classes and np.bincount(test.labels).tolist() == [50] * classes
    assert train.class_names[0] == "goldfish" and f"{500 * classes:,}" in train.source
    # Photographs: no two classes have the same mean colour, and pixels next to each other are alike.
    means = np.array([train.images[train.labels == label].mean(axis=(0, 1, 2)) for label in range(classes)])
    assert len(np.unique(means.round(1), axis=0)) == classes
    pixels = train.images[:200].astype(np.float32)
    assert np.abs(np.diff(pixels, axis=1)).mean() < 0.5 * np.abs(pixels[:, :32] - pixels[:, 32:]).mean()
