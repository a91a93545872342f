import io
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest

from bdjax.datasets.npz import load_npz, load_suspect_npz
from bdjax.datasets.validation import ReadOptions
from bdjax.errors import InputError
from bdjax.types import Dataset, PoisonedDataset
from tests.fixtures import arrays


def rows(num_rows: int, channels: int = 3) -> np.ndarray:
    """Row r is filled with r."""
    return np.broadcast_to(np.arange(num_rows, dtype=np.uint8)[:, None, None, None], (num_rows, 4, 5, channels)).copy()


def whole(**changes) -> dict[str, np.ndarray]:
    return {"images": rows(20), "labels": np.arange(20) % 2} | changes


def parts(**changes) -> dict[str, np.ndarray]:
    return {
        "train_images": rows(6),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rows(3),
        "test_labels": np.array([2, 1, 0]),
    } | changes


def poison(num_rows: int, poisoned: list[int], original_labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"is_poisoned": np.isin(np.arange(num_rows), poisoned), "original_labels": original_labels}


@pytest.fixture
def path(folder) -> pathlib.Path:
    return folder / "mine.npz"


def test_parts_are_kept(path):
    np.savez(path, **parts())
    train, test = load_npz(path)
    np.testing.assert_array_equal(train.images, rows(6))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2] and test.labels.tolist() == [2, 1, 0]
    assert train.labels.dtype == np.int32 and train.num_classes == 3 and train.name == "mine"
    assert train.source == f"{path} (6 train images)" and test.source == f"{path} (3 test images)"
    assert type(train) is Dataset


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whole_sets_are_split(path, save):
    save(path, **whole())
    train, test = load_npz(path)
    assert np.bincount(train.labels).tolist() == [8, 8] and np.bincount(test.labels).tolist() == [2, 2]
    together = np.concatenate([train.images, test.images])[:, 0, 0, 0]
    assert sorted(together.tolist()) == list(range(20))
    np.testing.assert_array_equal(train.images[:, 0, 0, 0] % 2, train.labels)
    assert test.source == f"{path} (20 images), test rows of a fixed 80/20 split"
    np.testing.assert_array_equal(load_npz(path).test.images, test.images)


def test_floats_and_grey_images(path):
    np.savez(path, **whole(images=rows(20, 1)[..., 0].astype(np.float32) / 255))
    train, test = load_npz(path)
    assert train.images.shape == (16, 4, 5, 1) and train.images.dtype == np.uint8
    together = np.concatenate([train.images, test.images])[:, 0, 0, 0]
    assert sorted(together.tolist()) == list(range(20))


def test_num_classes_of_the_file(path):
    np.savez(path, **parts(num_classes=np.array(7)))
    assert load_npz(path).train.num_classes == 7
    np.savez(path, **parts(num_classes=2))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, train_labels: row 2 has label 2; labels must be"):
        load_npz(path)


def test_poisoned_parts(path):
    labels = np.array([0, 1, 0, 0, 1, 0])
    np.savez(path, **parts(train_labels=labels), **poison(6, [2, 5], np.array([0, 1, 2, 0, 1, 2])))
    train, test = load_npz(path)
    assert isinstance(train, PoisonedDataset) and type(test) is Dataset
    assert np.flatnonzero(train.is_poisoned).tolist() == [2, 5]
    assert train.original_labels.tolist() == [0, 1, 2, 0, 1, 2] and train.original_labels.dtype == np.int32
    assert train.labels.tolist() == labels.tolist() and train.num_classes == 3


def test_poisoned_rows_of_a_whole_set_all_go_to_training(path):
    original = np.arange(20) % 2
    labels = np.where(np.arange(20) < 10, 0, original)
    np.savez(path, **whole(labels=labels), **poison(20, list(range(10)), original))
    train, test = load_npz(path)
    assert isinstance(train, PoisonedDataset) and type(test) is Dataset
    assert train.is_poisoned.sum() == 10 and len(test) == 2 and len(train) == 18
    assert (test.images[:, 0, 0, 0] >= 10).all()
    np.testing.assert_array_equal(train.original_labels, train.images[:, 0, 0, 0] % 2)


def test_rows_with_a_trigger_and_their_own_label_are_known_and_go_to_training(path):
    labels, is_cover = np.arange(20) % 2, np.arange(20) >= 10
    np.savez(path, **whole(is_cover=is_cover), **poison(20, [3], labels))
    train, test = load_npz(path)
    assert np.flatnonzero(train.is_cover[train.images[:, 0, 0, 0] >= 10]).size == 10 == train.is_cover.sum()
    assert len(test) == 2 and (test.images[:, 0, 0, 0] < 10).all()


def test_every_row_of_a_whole_set_is_suspect(path):
    original = np.arange(20) % 2
    labels, is_cover = np.where(np.arange(20) == 4, 1, original), np.arange(20) == 9
    np.savez(path, **whole(labels=labels, is_cover=is_cover), **poison(20, [4], original))
    suspect = load_suspect_npz(path)
    np.testing.assert_array_equal(suspect.images, rows(20))
    assert isinstance(suspect, PoisonedDataset) and suspect.labels.tolist() == labels.tolist()
    assert np.flatnonzero(suspect.is_poisoned).tolist() == [4] and np.flatnonzero(suspect.is_cover).tolist() == [9]
    assert suspect.original_labels.tolist() == original.tolist()
    assert suspect.source == f"{path} (20 images)" and suspect.files == ()
    np.savez(path, **whole(images=rows(3), labels=np.array([0, 1, 2])))  # too few to set any aside
    assert type(load_suspect_npz(path)) is Dataset and len(load_suspect_npz(path)) == 3


def test_images_are_scaled_if_asked_for(path):
    np.savez(path, **parts(test_images=rows(3)[:, :, :3]))
    height, width = rows(1).shape[1:3]
    with pytest.raises(InputError, match="their shapes must be equal$"):  # no side that scales only one of them
        load_npz(path)
    train, test = load_npz(path, ReadOptions(image_size=16))
    assert train.images.shape[1:3] == test.images.shape[1:3] == (16, 16)
    assert train.original_sizes == {(height, width): 6} and test.original_sizes == {(height, 3): 3}
    assert train.source == f"{path} (6 train images), {width}x{height} scaled to 16x16"


def test_poisoned_rows_stay_known_when_images_are_scaled(path):
    np.savez(path, **whole(), **poison(20, [4], np.arange(20) % 2))
    suspect = load_suspect_npz(path, ReadOptions(image_size=16))
    assert np.flatnonzero(suspect.is_poisoned).tolist() == [4] and suspect.images.shape[1:3] == (16, 16)


def test_of_parts_the_training_part_is_suspect(path):
    np.savez(path, **parts(test_labels=np.array([2, 1, 3])), **poison(6, [], np.array([0, 1, 2, 0, 1, 2])))
    suspect, train = load_suspect_npz(path), load_npz(path).train
    np.testing.assert_array_equal(suspect.images, rows(6))
    assert isinstance(suspect, PoisonedDataset) and suspect.num_classes == train.num_classes == 4
    assert (suspect.labels.tolist(), suspect.source) == (train.labels.tolist(), train.source)
    np.savez(path, images=rows(4), **parts())  # no labels for those
    assert len(load_suspect_npz(path)) == len(load_npz(path).train) == 6


def test_suspect_rows_that_cannot_be_used_are_refused(path):
    np.savez(path, **whole(labels=np.zeros(20)))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, labels: labels are float64 of shape"):
        load_suspect_npz(path)
    np.savez(path, images=rows(4))
    with pytest.raises(
        InputError,
        match=rf"^{re.escape(str(path))}: contains images \(uint8 \[4, 4, 5, 3\]\); it must contain either images, labels",
    ):
        load_suspect_npz(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": rows(4)},
            ": contains images (uint8 [4, 4, 5, 3]); it must contain either images, labels or train_images, train",
        ),
        (
            {"x": rows(4)},
            ": contains x (uint8 [4, 4, 5, 3]); it must contain either images, labels or train_images, ",
        ),
        (
            whole() | parts(),
            ": contains images (uint8 [20, 4, 5, 3]), labels (int64 [20]), train_images (uint8 [6, 4, 5, 3]), train_labels (",
        ),
        (whole(images=rows(0), labels=np.zeros(0, int)), ", images: contains no images; at least one row is needed"),
        (whole(images=rows(20).astype(np.int32)), ", images: images are int32; they must be uint8, or float in 0..1"),
        (whole(images=rows(20).astype(complex)), ", images: images are complex128; they must be uint8, or float in"),
        (whole(images=rows(20).transpose(0, 3, 1, 2)), ", images: images have shape [20, 3, 4, 5]; they must be"),
        (
            whole(images=np.full((20, 4, 5), np.nan)),
            ", images: row 0 has pixel value nan at [0, 0, 0]; float pixels",
        ),
        (
            whole(images=np.full((20, 4, 5), 255.0)),
            ", images: row 0 has pixel value 255.0 at [0, 0, 0]; float pixels",
        ),
        (whole(labels=np.arange(19) % 2), ", images: has 20 images and 19 labels; the numbers must be equal"),
        (whole(labels=np.arange(20) % 2 - 1), ", labels: row 0 has label -1; labels must be in 0..0"),
        (
            whole(labels=np.zeros(20)),
            ", labels: labels are float64 of shape [20]; they must be integers, one per row",
        ),
        (
            whole(labels=np.eye(20, dtype=int) * 2),
            ", labels: labels are int64 of shape [20, 20]; they must be integers",
        ),
        (whole(labels=np.zeros(20, int)), ", images: has 1 class(es); a classifier needs 2 to 1000000"),
        (
            whole(labels=np.arange(20) * 10),
            ": the highest label is 190 although there are only 20 labels; labels start",
        ),
        (whole(num_classes=np.array([2])), ": num_classes is int64 of shape [1]; it must be an int"),
        (whole(num_classes=2.0), ": num_classes is float64 of shape []; it must be an int"),
        (
            parts(test_labels=np.array([2, 1, 5])) | {"num_classes": 3},
            ", test_labels: row 2 has label 5; labels must",
        ),
        (parts(test_images=rows(3, 1)), ": train_images are [4, 5, 3] and test_images [4, 5, 1]; their shapes must be"),
        (
            whole(is_poisoned=np.zeros(20, bool)),
            ": contains only one of is_poisoned and original_labels; both or neither",
        ),
        (
            whole(is_poisoned=np.zeros(20, np.uint8), original_labels=np.arange(20) % 2),
            ", is_poisoned: is uint8 of shape [20]; it must be bool, one for each of the 20 rows",
        ),
        (
            whole(is_poisoned=np.zeros(19, bool), original_labels=np.arange(20) % 2),
            ", is_poisoned: is bool of shape [19]; it must be bool, one for each of the 20 rows",
        ),
        (whole(**poison(20, [1], np.arange(19) % 2)), ", original_labels: has 19 rows; 20 are needed"),
        (
            whole(**poison(20, [0, 1], np.where(np.arange(20) < 4, 1, np.arange(20) % 2))),
            ", original_labels: row 2 is not poisoned, but its label is 0 and its original label 1; they must be equal",
        ),
        (
            whole(images=rows(3), labels=np.array([0, 1, 2])),
            ": 20 % of the clean rows of each class, for testing, is less than one row; at least 3 rows of a class are",
        ),
        (
            whole(**poison(20, list(range(20)), np.arange(20) % 2)),
            ": 20 % of the clean rows of each class, for testing",
        ),
    ],
)
def test_what_is_wrong_is_named(path, content, message):
    np.savez(path, **content)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}{message}")):
        load_npz(path)


class Hostile:
    def __init__(self, trace: pathlib.Path):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def test_object_arrays_are_refused_and_run_nothing(path, folder):
    trace = folder / "owned"
    np.savez(path, **whole(labels=np.array([Hostile(trace)] * 20, object)))
    with pytest.raises(
        InputError,
        match=f"^{re.escape(str(path))}, labels: is an array of objects, which are pickles; plain arrays are needed$",
    ):
        load_npz(path)
    path.write_bytes(pickle.dumps(Hostile(trace)))  # which numpy.load would take, if it were let
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: is not an intact .npz file of plain arrays \("):
        load_npz(path)
    assert not trace.exists()


def with_header(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def test_files_that_are_not_intact_are_named(path):
    message = rf"^{re.escape(str(path))}: is not an intact .npz file of plain arrays \(.+\)$"
    np.savez_compressed(path, **whole(images=np.random.default_rng(0).integers(0, 256, (20, 9, 9), np.uint8)))
    intact = path.read_bytes()
    for content in (b"", b"text", intact[: len(intact) // 2], intact[:300] + bytes(20) + intact[320:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_npz(path)
    for member in (
        b"",
        b"text",
        with_header("(9, 9)") + bytes(80),
        with_header("(99999999, 99999999999)"),
        with_header("x"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", member)
        with pytest.raises(InputError, match=message):
            load_npz(path)


def test_a_single_array_is_refused(path):
    stream = io.BytesIO()
    np.save(stream, rows(4))
    path.write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"is not an intact .npz file of plain arrays \(File is not a zip file\)$"):
        load_npz(path)


@pytest.mark.parametrize("kind", arrays.FOREIGN)
def test_files_of_other_libraries_are_read(path, kind):
    make, num_train, said = arrays.FOREIGN[kind]
    train, test = load_npz(make(path))
    suspect = load_suspect_npz(path)
    assert len(train) == num_train and len(test) == 4 and train.num_classes == 2 and len(suspect) == 20
    np.testing.assert_array_equal(train.labels, train.images[:, 0, 0, 0] % 2)
    np.testing.assert_array_equal(suspect.labels, np.arange(20) % 2)
    assert suspect.source == f"{path} ({said})"


def test_arrays_that_are_not_read_are_said(path):
    arrays.FOREIGN["medmnist"][0](path)
    train, test = load_npz(path)
    assert train.unread == test.unread == load_suspect_npz(path).unread
    assert {entry.file: entry.reason for entry in train.unread} == {
        "val_images": "is a further part of 6 rows (uint8 [6, 4, 5])",
        "val_labels": "is a further part of 6 rows (uint8 [6, 1])",
    }
    arrays.whole(
        more_images=arrays.images(3), o=np.array([None], object), row=np.arange(20), is_cover=np.zeros(20, bool)
    )(path)
    unread = load_npz(path).train.unread
    assert {entry.file: entry.reason for entry in unread} == {
        "more_images": "is an array of a name that is not read (uint8 [3, 4, 5, 3])",
        "is_cover": "is an array of a name that is not read (bool [20])",
        "o": "is an array of objects, which are pickles",
    }
    arrays.with_member(arrays.npy(arrays.images()), **{"notes.txt": b"x"})(path)
    assert load_npz(path).train.unread == (("notes.txt", "is not an array (.npy)"),)
    arrays.whole()(path)
    assert load_npz(path).train.unread == ()


def test_the_training_part_alone_is_enough_for_a_suspect(path):
    arrays.saved(x_train=arrays.images(), y_train=arrays.labels())(path)
    assert len(load_suspect_npz(path)) == 20
    with pytest.raises(
        InputError, match=r": contains x_train \(uint8 \[20, 4, 5, 3\]\), y_train \(int64 \[20\]\); it must "
    ):
        load_npz(path)


def test_the_list_of_what_a_file_holds_is_short(path):
    arrays.NPZ_FAULTS["many arrays"](path)
    with pytest.raises(InputError, match=r"a9 \(float64 \[1\]\), 190 more; it must contain either images, labels or "):
        load_npz(path)


def test_names_of_classes_are_read(path):
    arrays.whole(class_names=np.array(["cat", "Hund ß"]))(path)
    train, test = load_npz(path)
    assert train.class_names == test.class_names == load_suspect_npz(path).class_names == ("cat", "Hund ß")
    arrays.whole(class_names=np.array(["a", "b", "c"]))(path)  # a class without rows, but with a name
    assert load_npz(path).train.num_classes == 3


def test_labels_from_1_are_read_if_that_is_intended(path):
    labels = arrays.labels() + 1
    arrays.whole(labels=labels)(path)
    message = (
        f"{path}: the lowest label is 1, so class 0 has no rows; labels start at 0: labels - 1; or add num_classes to the "
        "file, or give --allow-empty-classes, if this is intended"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_suspect_npz(path)
    assert load_npz(path, ReadOptions(allow_empty_classes=True)).train.num_classes == 3
    for changes in ({"num_classes": 3}, {"class_names": np.array(["none", "a", "b"])}):
        arrays.whole(labels=labels, **changes)(path)
        assert load_suspect_npz(path).num_classes == 3


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("0 to 255 as float", "images / 255"),
        ("-1 to 1", "(images + 1) / 2"),
        ("colour first", "np.moveaxis(images, 1, -1)"),
        ("alpha", "images[..., :3] leaves out an alpha channel"),
        ("grey and alpha", "images[..., :1] leaves out an alpha channel"),
        ("integers", "images.astype(np.uint8)"),
        ("labels of floats", "labels.astype(int)"),
        ("labels of text", "class_names, labels = np.unique(labels, return_inverse=True) gives numbers and names"),
    ],
)
def test_the_line_that_mends_a_file_is_given_and_does(path, fault, line):
    arrays.NPZ_FAULTS[fault](path)
    with pytest.raises(InputError, match=re.escape(line)) as caught:
        load_npz(path)
    with np.load(path) as file:
        scope = {"np": np, **file}
    statement = line.partition(" leaves")[0].partition(" gives")[0]
    name = "images" if ", images: " in str(caught.value) else "labels"
    exec(statement if "=" in statement.partition("(")[0] else f"{name} = {statement}", scope)
    np.savez(path, images=scope["images"], labels=scope["labels"])
    assert len(load_suspect_npz(path)) == 20
