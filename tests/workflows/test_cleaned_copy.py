"""Lists of rows, and the cleaned copy: nothing of the user's own is touched, and nothing leaves the run folder."""

import csv
import dataclasses
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdjax import datasets
from bdjax.errors import InputError
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, PoisonedDataset
from bdjax.workflows import cleaned_copy

ROWS, FLAGGED = 12, [8, 9, 10]  # of class 1, the later half of the rows
LABELS = (np.arange(ROWS) >= 6).astype(np.int32)


def pixels():
    return np.random.default_rng(1).integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8)


def dataset(**changes):
    inputs = {"images": pixels(), "labels": LABELS, "num_classes": 2, "name": "mine", "source": "here"}
    return Dataset(**(inputs | changes))


def write(place, rows=None, source_folder=None, flagged=tuple(FLAGGED)):
    """Everything, of rows of which some are flagged; the rest of class 1 has small scores, and class 0 none."""
    folder, rows = RunFolder(Path(place), is_new=True), rows or dataset()
    flags, scores = np.isin(np.arange(ROWS), flagged), np.where(LABELS == 1, 0.2, 0).astype(np.float32)
    scores[list(flagged)] = 0.7 + 0.1 * np.arange(len(flagged))
    cleaned_copy.write_rows(folder, rows, flags, scores)
    return cleaned_copy.write_cleaned(folder, rows, ~flags, source_folder)


def lines(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline="")))


@pytest.fixture
def pictures(tmp_path):
    """A user's folder: train/ant and train/bee, six files each, and a secret outside it."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "mine/train" / name).mkdir(parents=True)
        for row in np.flatnonzero(label == LABELS):
            Image.fromarray(pixels()[row]).save(tmp_path / f"mine/train/{name}/{row:02}.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path / "mine"


# ---- Rows -----------------------------------------------------------------------------------------------------------


def test_csv_files_have_every_row_once_the_most_suspicious_first(tmp_path):
    write(tmp_path)
    flagged, kept, rows = (lines(tmp_path / f"{name}.csv") for name in ("flagged", "kept", "rows"))
    assert list(flagged[0]) == ["row", "class", "class_name", "score"]
    assert flagged[0] == {"row": "10", "class": "1", "class_name": "class 1", "score": "0.9"}
    assert [line["row"] for line in flagged] == ["10", "9", "8"]
    assert [int(line["row"]) for line in kept] == [0, 1, 2, 3, 4, 5, 6, 7, 11]
    assert list(kept[0]) == ["row", "class", "class_name"]
    assert [int(line["row"]) for line in rows] == [10, 9, 8, 6, 7, 11, 0, 1, 2, 3, 4, 5]
    assert [line["flagged"] for line in rows] == ["1"] * 3 + ["0"] * 9


def test_names_are_quoted_and_kept_to_the_letter(tmp_path):
    names = [
        "a,b.png",
        'say "hi".png',
        "two\nlines\r.png",
        "=1+1.png",
        "not-\udce4-utf8.png",
        *(f"{i}" for i in range(7)),
    ]
    files = tuple(reversed(names))  # the odd ones are among the last rows, some of them flagged
    write(tmp_path, dataset(files=files, class_names=('ant, "red"', "bee")))
    found = {int(line["row"]): line for line in lines(tmp_path / "rows.csv")}
    shown = {
        "=1+1.png": "'=1+1.png",
        "not-\udce4-utf8.png": "not-\\udce4-utf8.png",
    }  # a spreadsheet would run the first
    assert [found[row]["file"] for row in range(ROWS)] == [shown.get(name, name) for name in files]
    assert found[0]["class_name"] == 'ant, "red"'


# ---- A cleaned copy -------------------------------------------------------------------------------------------------


def test_cleaned_npz_is_read_by_our_own_loader(tmp_path):
    assert write(tmp_path) == {"kind": "npz", "rows": 9}
    kept = np.setdiff1d(np.arange(ROWS), FLAGGED)
    read = datasets.load_suspect(str(tmp_path / "cleaned.npz"))
    np.testing.assert_array_equal(read.images, pixels()[kept])
    np.testing.assert_array_equal(read.labels, LABELS[kept])
    assert read.num_classes == 2 and not isinstance(read, PoisonedDataset)
    with np.load(tmp_path / "cleaned.npz") as arrays:
        assert arrays["row"].dtype == np.int32
        np.testing.assert_array_equal(arrays["row"], kept)


def test_cleaned_npz_keeps_the_number_of_classes_and_the_truth(tmp_path):
    truth = np.isin(np.arange(ROWS), [8, 11])
    labels = np.where(truth, 0, LABELS).astype(np.int32)
    cover = np.arange(ROWS) == 6
    rows = PoisonedDataset(**vars(dataset(num_classes=5)), is_poisoned=truth, original_labels=labels, is_cover=cover)
    write(tmp_path, rows)
    read = datasets.load_suspect(str(tmp_path / "cleaned.npz"))
    assert isinstance(read, PoisonedDataset) and read.num_classes == 5
    assert read.is_poisoned.sum() == 1 and read.is_poisoned[-1] and read.is_cover[6]


def test_cleaned_npz_keeps_the_names_of_the_classes(tmp_path):
    names = ("cat", "Hund ß\x1b[31m", "n" * 300, " ")
    write(tmp_path, dataclasses.replace(dataset(num_classes=4), class_names=names))
    read = datasets.load_suspect(str(tmp_path / "cleaned.npz"))
    assert read.class_names == ("cat", "Hund ß\N{REPLACEMENT CHARACTER}[31m", "n" * 256, "?") and read.unread == ()


def test_nothing_left_is_no_file(tmp_path):
    cleaned = write(tmp_path, flagged=tuple(range(ROWS)))
    assert cleaned == {"kind": None, "rows": 0} and not (tmp_path / "cleaned.npz").exists()
    assert lines(tmp_path / "kept.csv") == []


def test_files_are_copied_only_if_asked_for(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    assert write(tmp_path / "run", rows) == {"kind": None, "rows": 9}
    assert not any((tmp_path / "run").glob("cleaned*"))


def test_a_cleaned_folder_is_read_by_our_own_loader_and_a_second_run_is_the_same(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    assert rows.files[0] == "train/ant/00.png"
    before = {path: path.read_bytes() for path in pictures.rglob("*.png")}
    for _ in range(2):
        cleaned = write(tmp_path / "run", rows, source_folder=pictures)
        assert cleaned == {"kind": "folder", "rows": 9, "copied": 9, "left_out": [], "strangers": []}
    read = datasets.load_suspect(str(tmp_path / "run/cleaned"))
    kept = np.setdiff1d(np.arange(ROWS), FLAGGED)
    np.testing.assert_array_equal(read.images, pixels()[kept])
    assert read.files[-1] == "bee/11.png" and read.class_names == ("ant", "bee")
    assert before == {path: path.read_bytes() for path in pictures.rglob("*.png")}
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def listed(folder, names, labels):
    """A folder of images with a list."""
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()[row]).save(folder / name)
    text = "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
    (folder / "metadata.csv").write_text("file_name,label\n" + text)
    return folder


@pytest.mark.parametrize("classes", [("ant", "bee"), ("train", "val")])
def test_listed_files_keep_their_names(tmp_path, classes):
    labels = [classes[label] for label in LABELS]
    names = [f"s{row % 3}/{label}/{row // 3}.png" for row, label in enumerate(labels)]
    folder = listed(tmp_path / "mine", names, labels)
    rows = datasets.load_suspect(str(folder))
    cleaned = write(tmp_path / "run", rows, source_folder=folder)
    assert cleaned == {"kind": "folder", "rows": 9, "copied": 9, "left_out": [], "strangers": []}
    read = datasets.load_suspect(str(tmp_path / "run/cleaned"))
    kept = np.setdiff1d(np.arange(ROWS), FLAGGED)
    assert list(read.files) == [names[row] for row in kept] and read.class_names == classes
    np.testing.assert_array_equal(read.images, pixels()[kept])


def test_classes_called_like_parts_can_be_read_again(tmp_path, pictures):
    for old, new in (("ant", "train"), ("bee", "val")):
        (pictures / "train" / old).rename(pictures / "train" / new)
    rows = datasets.load_suspect(str(pictures))
    write(tmp_path / "run", rows, source_folder=pictures)
    read = datasets.load_suspect(str(tmp_path / "run/cleaned"))
    assert read.class_names == ("train", "val") and len(read) == 9


def test_nothing_is_overwritten_and_strangers_are_named(tmp_path, pictures):
    (tmp_path / "run/cleaned/ant").mkdir(parents=True)
    (tmp_path / "run/cleaned/ant/00.png").write_bytes(b"mine")
    (tmp_path / "run/cleaned/ant/old.png").write_bytes(b"older")
    rows = datasets.load_suspect(str(pictures))
    cleaned = write(tmp_path / "run", rows, source_folder=pictures)
    assert (tmp_path / "run/cleaned/ant/00.png").read_bytes() == b"mine"
    assert cleaned["left_out"] == [{"file": "train/ant/00.png", "why": "a different file of this name exists already"}]
    assert cleaned["strangers"] == ["cleaned/ant/00.png", "cleaned/ant/old.png"] and cleaned["copied"] == 8


def test_links_and_names_that_lead_out_of_the_folder_are_left_alone(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    for name, link in (("00", "../../../secret.png"), ("01", "01.png"), ("02", "05.png"), ("03", "gone.png")):
        (pictures / f"train/ant/{name}.png").unlink()
        (pictures / f"train/ant/{name}.png").symlink_to(link)
    (pictures / "train/ant/06.png").mkdir()
    files = [*rows.files[:4], "../secret.png", str(tmp_path / "secret.png"), "train/ant/06.png", *rows.files[7:]]
    rows = dataset(files=tuple(files), class_names=rows.class_names)
    cleaned = write(tmp_path / "run", rows, source_folder=pictures)
    why = {entry["file"]: entry["why"] for entry in cleaned["left_out"]}
    assert [why.get(file) for file in files[:8]] == [
        "is a link that leads out of the folder",
        "no longer exists",
        None,  # a link within the folder: a copy of what it leads to
        "no longer exists",
        "leads out of the folder",
        "leads out of the folder",
        "is not a file",
        None,
    ]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(path.read_bytes() == b"secret" for path in written)
    assert (tmp_path / "run/cleaned/ant/02.png").read_bytes() == (pictures / "train/ant/05.png").read_bytes()
    assert not (tmp_path / "run/cleaned/ant/02.png").is_symlink()


def test_nothing_is_copied_through_a_link_in_the_run_folder(tmp_path, pictures):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/cleaned").symlink_to(tmp_path / "elsewhere")
    rows = datasets.load_suspect(str(pictures))
    cleaned = write(tmp_path / "run", rows, source_folder=pictures)
    assert cleaned["copied"] == 0 and not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="names that are not UTF-8")
def test_a_file_whose_name_is_not_utf8_is_copied(tmp_path, pictures):
    (pictures / "train/bee/06.png").rename(pictures / "train/bee/06\udce4.png")
    rows = datasets.load_suspect(str(pictures))
    cleaned = write(tmp_path / "run", rows, source_folder=pictures)
    assert cleaned["copied"] == 9 and (tmp_path / "run/cleaned/bee/06\udce4.png").is_file()
    assert "06\\udce4.png" in (tmp_path / "run/kept.csv").read_text("utf-8")


def test_a_class_may_be_called_like_the_part_and_a_file_may_lie_deeper():
    below = cleaned_copy._below_class
    as_path = cleaned_copy.PurePosixPath
    assert str(below(as_path("train/train/1.png"), "train")) == "train/1.png"
    assert str(below(as_path("train/n01/images/1.png"), "n01")) == "n01/images/1.png"
    assert str(below(as_path("train/cat/1.png"), "")) == "train/cat/1.png"
    assert str(below(as_path("1.png/1.png"), "1.png")) == "1.png/1.png"


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, pictures):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/cleaned").write_bytes(b"a file where the folder should be")
    with pytest.raises(InputError, match="cleaned.*cannot be written"):
        write(tmp_path / "run", datasets.load_suspect(str(pictures)), source_folder=pictures)


def test_a_cleaned_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(InputError, match="cleaned.npz: cannot be written .No space left on device"):
            write(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "cleaned.npz").mkdir()
    with pytest.raises(InputError, match="cleaned.npz is a folder, in the place of a file of the run"):
        write(tmp_path)
