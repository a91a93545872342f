import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdjax import datasets
from bdjax.defenses.vbd import Analysis
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.errors import InputError
from bdjax.reporting import audit_report
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, PoisonedDataset

ROWS, FLAGGED = 12, [8, 9, 10]  # of class 1, the later half of the rows
LABELS = (np.arange(ROWS) >= 6).astype(np.int32)
SETTINGS = VBDSettings(networks="64P")


def pixels():
    return np.random.default_rng(1).integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8)


def dataset(**changes):
    given = {"images": pixels(), "labels": LABELS, "num_classes": 2, "name": "mine", "source": "here"}
    return Dataset(**(given | changes))


def analysis(flagged=tuple(FLAGGED)):
    scores, masks = np.zeros(ROWS, np.float32), np.zeros((2, 8, 8), bool)
    if len(flagged):
        scores[LABELS == 1] = 0.2
    scores[list(flagged)] = 0.7 + 0.1 * np.arange(len(flagged))
    flags, found = np.isin(np.arange(ROWS), flagged), len(flagged) > 0
    patterns = np.zeros((2, 8, 8, 3), np.float32)
    if found:
        masks[1, 6:, 6:] = True
        patterns[1, 6:, 6:] = (1.0, 0.5, 0.0)
    parts = (
        flags,
        scores,
        np.array([0.3]),
        np.array([[0.5, 1e-5 if found else 0.4]]),
        np.array([[0.0, 0.9 * found]]),
        np.array([-1, 0 if found else -1]),
        masks,
        patterns,
        np.array([0.0, 0.9 * found]),
        LABELS,
    )
    return Analysis(*(np.asarray(part)[None] for part in parts))


def write(place, rows=None, found=None, source_folder=None, copy_files=False):
    folder = RunFolder(Path(place), is_new=True)
    given = (rows or dataset(), analysis() if found is None else found, SETTINGS)
    more = {"source_folder": source_folder, "copy_files": copy_files}
    return audit_report.write(folder, {"seed": 0}, *given, {"vbd": 1.5}, "python experiments/vbd.py", **more)


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
    assert [found[row]["file"] for row in range(ROWS)] == [name.replace("\udce4", "\\udce4") for name in files]
    assert found[0]["class_name"] == 'ant, "red"'
    page = (tmp_path / "report.html").read_bytes()
    assert page.decode("utf-8") and b"\\udce4" not in page


# ---- A cleaned copy -------------------------------------------------------------------------------------------------


def test_cleaned_npz_is_read_by_our_own_loader(tmp_path):
    results = write(tmp_path)
    assert results["cleaned"] == {"kind": "npz", "rows": 9}
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
    found = analysis()
    wide = {name: getattr(found, name) for name in ("p_values", "success", "network", "masks", "patterns")}
    wide["p_values"] = np.pad(wide["p_values"], ((0, 0), (0, 0), (0, 3)), constant_values=1.0)
    wide["success"] = np.pad(wide["success"], ((0, 0), (0, 0), (0, 3)))
    wide["network"] = np.pad(wide["network"], ((0, 0), (0, 3)), constant_values=-1)
    for name in ("masks", "patterns"):
        wide[name] = np.pad(wide[name], ((0, 0), (0, 3), *[(0, 0)] * (wide[name].ndim - 2)))
    wide["detector_accuracies"] = np.pad(found.detector_accuracies, ((0, 0), (0, 3)))
    write(tmp_path, rows, found._replace(**wide))
    read = datasets.load_suspect(str(tmp_path / "cleaned.npz"))
    assert isinstance(read, PoisonedDataset) and read.num_classes == 5
    assert read.is_poisoned.sum() == 1 and read.is_poisoned[-1] and read.is_cover[6]
    assert b"Against the truth" in (tmp_path / "report.html").read_bytes()


def test_nothing_left_is_no_file(tmp_path):
    results = write(tmp_path, found=analysis(tuple(range(ROWS))))
    assert results["cleaned"] == {"kind": None, "rows": 0} and not (tmp_path / "cleaned.npz").exists()
    assert lines(tmp_path / "kept.csv") == []


def test_files_are_copied_only_if_asked_for(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    for number, how in enumerate(({"source_folder": pictures}, {"copy_files": True})):
        results = write(tmp_path / f"run{number}", rows, **how)
        assert results["cleaned"] == {"kind": None, "rows": 9}
        assert not any((tmp_path / f"run{number}").glob("cleaned*"))


def test_a_cleaned_folder_is_read_by_our_own_loader_and_a_second_run_is_the_same(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    assert rows.files[0] == "train/ant/00.png"
    before = {path: path.read_bytes() for path in pictures.rglob("*.png")}
    for _ in range(2):
        results = write(tmp_path / "run", rows, source_folder=pictures, copy_files=True)
        assert results["cleaned"] == {"kind": "folder", "rows": 9, "copied": 9, "left_out": [], "strangers": []}
    read = datasets.load_suspect(str(tmp_path / "run/cleaned"))
    kept = np.setdiff1d(np.arange(ROWS), FLAGGED)
    np.testing.assert_array_equal(read.images, pixels()[kept])
    assert read.files[-1] == "bee/11.png" and read.class_names == ("ant", "bee")
    assert before == {path: path.read_bytes() for path in pictures.rglob("*.png")}
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_nothing_is_overwritten_and_strangers_are_named(tmp_path, pictures):
    (tmp_path / "run/cleaned/ant").mkdir(parents=True)
    (tmp_path / "run/cleaned/ant/00.png").write_bytes(b"mine")
    (tmp_path / "run/cleaned/ant/old.png").write_bytes(b"older")
    rows = datasets.load_suspect(str(pictures))
    cleaned = write(tmp_path / "run", rows, source_folder=pictures, copy_files=True)["cleaned"]
    assert (tmp_path / "run/cleaned/ant/00.png").read_bytes() == b"mine"
    assert cleaned["left_out"] == [{"file": "train/ant/00.png", "why": "another file of this name is there already"}]
    assert cleaned["strangers"] == ["cleaned/ant/00.png", "cleaned/ant/old.png"] and cleaned["copied"] == 8
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "Not copied: train/ant/00.png (another file" in page and "cleaned/ant/old.png" in page


def test_links_and_names_that_lead_out_of_the_folder_are_left_alone(tmp_path, pictures):
    rows = datasets.load_suspect(str(pictures))
    for name, link in (("00", "../../../secret.png"), ("01", "01.png"), ("02", "05.png"), ("03", "gone.png")):
        (pictures / f"train/ant/{name}.png").unlink()
        (pictures / f"train/ant/{name}.png").symlink_to(link)
    (pictures / "train/ant/06.png").mkdir()
    files = [*rows.files[:4], "../secret.png", str(tmp_path / "secret.png"), "train/ant/06.png", *rows.files[7:]]
    rows = dataset(files=tuple(files), class_names=rows.class_names)
    cleaned = write(tmp_path / "run", rows, source_folder=pictures, copy_files=True)["cleaned"]
    why = {one["file"]: one["why"] for one in cleaned["left_out"]}
    assert [why.get(file) for file in files[:8]] == [
        "is a link that leads out of the folder",
        "is not there any more",
        None,  # a link within the folder: a copy of what it leads to
        "is not there any more",
        "leads out of the folder",
        "leads out of the folder",
        "is no file",
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
    cleaned = write(tmp_path / "run", rows, source_folder=pictures, copy_files=True)["cleaned"]
    assert cleaned["copied"] == 0 and not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="names that are not UTF-8")
def test_a_file_whose_name_is_not_utf8_is_copied(tmp_path, pictures):
    (pictures / "train/bee/06.png").rename(pictures / "train/bee/06\udce4.png")
    rows = datasets.load_suspect(str(pictures))
    cleaned = write(tmp_path / "run", rows, source_folder=pictures, copy_files=True)["cleaned"]
    assert cleaned["copied"] == 9 and (tmp_path / "run/cleaned/bee/06\udce4.png").is_file()
    assert "06\\udce4.png" in (tmp_path / "run/kept.csv").read_text("utf-8")


def test_a_class_may_be_called_like_the_part_and_a_file_may_lie_deeper():
    below = audit_report._below_class
    as_path = audit_report.PurePosixPath
    assert str(below(as_path("train/train/1.png"), "train")) == "train/1.png"
    assert str(below(as_path("train/n01/images/1.png"), "n01")) == "n01/images/1.png"
    assert str(below(as_path("train/cat/1.png"), "")) == "train/cat/1.png"
    assert str(below(as_path("1.png/1.png"), "1.png")) == "1.png/1.png"


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, pictures):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/cleaned").write_bytes(b"a file where the folder should be")
    with pytest.raises(InputError, match="cleaned.*cannot be copied there"):
        write(tmp_path / "run", datasets.load_suspect(str(pictures)), source_folder=pictures, copy_files=True)


# ---- Pictures and report --------------------------------------------------------------------------------------------


def test_triggers_are_large_and_transparent_outside_the_mask(tmp_path):
    write(tmp_path)
    names = sorted(path.name for path in (tmp_path / "triggers").iterdir())
    assert names == [f"class-1-{name}.png" for name in ("example-1", "example-2", "example-3", "mask", "trigger")]
    with Image.open(tmp_path / "triggers/class-1-trigger.png") as image:
        assert (image.mode, image.size) == ("RGBA", (256, 256))
        values = np.asarray(image)
    assert set(np.unique(values[..., 3])) == {0, 255} and (values[192:, 192:, 3] == 255).all()
    assert (values[..., 3] == 255).sum() == 64 * 64
    np.testing.assert_array_equal(values[255, 255], (255, 128, 0, 255))
    with Image.open(tmp_path / "triggers/class-1-mask.png") as image:
        np.testing.assert_array_equal(np.asarray(image), values[..., 3])
    with Image.open(tmp_path / "triggers/class-1-example-1.png") as image:
        example = np.asarray(image)
    large = audit_report.enlarge(pixels()[10], 32)  # the flagged row with the highest score
    changed = np.any(example != large, axis=-1)
    assert changed.any() and (example[changed] == (255, 0, 0)).all()
    assert not changed[:192].any() and not changed[:, :192].any()


def test_grey_patterns_and_oblong_images(tmp_path):
    found = analysis()
    found = found._replace(masks=found.masks[:, :, :, 4:], patterns=found.patterns[:, :, :, 4:, :1])
    write(tmp_path, dataset(images=pixels()[:, :, 4:, :1]), found)
    with Image.open(tmp_path / "triggers/class-1-trigger.png") as image:
        assert (image.mode, image.size) == ("RGBA", (128, 256)) and image.getpixel((127, 255)) == (255, 255, 255, 255)


def test_the_report_says_the_verdict_and_shows_the_pictures(tmp_path):
    results = write(tmp_path, dataset(class_names=("ant", "<b>bee</b>")))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Class 1 (&lt;b&gt;bee&lt;/b&gt;) carries a trigger: 3 of 12 rows are flagged." in page and "<b>" not in page
    assert page.count('src="data:image/png') == 4 and "cleaned.npz has the 9 rows" in page
    assert all(f">{title}</h2>" in page for title in ("What to do next", "Evidence", "Triggers", "Examples", "Scores"))
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert stored == results and stored["verdict"]["level"] == "attacked"
    assert json.loads((tmp_path / "timings.json").read_text("utf-8")) == {"seconds": {"vbd": 1.5}}
    assert "Evidence for each class" in (tmp_path / "table.md").read_text("utf-8")


def test_a_clean_verdict_has_no_pictures_and_says_what_it_does_not_rule_out(tmp_path):
    results = write(tmp_path, found=analysis(()))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert results["verdict"]["level"] == "clean" and not (tmp_path / "triggers").exists()
    assert "That is not to say that the rows are clean." in page and "data:image/png" not in page
    assert len(lines(tmp_path / "kept.csv")) == ROWS and lines(tmp_path / "flagged.csv") == []


def test_the_same_audit_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_report, "describe_environment", dict)  # somebody may commit meanwhile
    for name in ("one", "two"):
        write(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 17
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_what_to_do_next_depends_on_the_finding(tmp_path):
    doubtful = analysis()._replace(success=np.array([[[0.0, 0.4]]]))
    unsure = analysis()._replace(flags=np.zeros((1, ROWS), bool), detector_accuracies=np.array([[0.0, 0.7]]))
    untested = analysis(())._replace(p_values=np.ones((1, 1, 2)))
    begins = {
        "Compare the triggers": analysis(),
        "Look at the triggers below and at the rows in flagged.csv": doubtful,
        "Look at the triggers below. If": unsure,
        "Try again": untested,
        "There is nothing to leave out.": analysis(()),
    }
    for number, (start, found) in enumerate(begins.items()):
        steps = audit_report.next_steps(write(tmp_path / str(number), found=found))
        assert steps[0].startswith(start)
        assert ("flagged.csv lists" in steps[-1]) == found.flags.any()


def test_a_class_that_would_be_gone_is_pointed_out(tmp_path):
    steps = audit_report.next_steps(write(tmp_path, found=analysis(tuple(range(6, ROWS)))))
    assert any(text.startswith("Every row is flagged of class 1: without them the class is gone.") for text in steps)


def test_many_classes_are_all_in_the_folder_but_not_all_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_report, "MOST_CLASSES", 1)
    found = analysis()
    found.network[0, 0], found.p_values[0, 0, 0], found.flags[0, 2] = 0, 1e-3, True
    found.masks[0, 0, 0, 0] = True
    found.success[0, 0, 0], found.detector_accuracies[0, 0] = 0.8, 0.9
    write(tmp_path, found=found)
    names = {path.name for path in (tmp_path / "triggers").iterdir()}
    assert {"class-0-trigger.png", "class-0-mask.png", "class-0-example-1.png", "class-1-trigger.png"} < names
    assert "class-0-example-2.png" not in names
    assert "1 of 2 classes." in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("scale", [1, 3, 6, 7, 16])
def test_outlined_pictures_have_the_size_that_was_asked_for(scale):
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    black = np.zeros((8, 8, 1), np.uint8)
    drawn = audit_report._outlined(black, mask, scale)
    assert drawn.shape == (8 * scale, 8 * scale, 3)
    # Inside of the four pixels, and two wide where there is room.
    assert (drawn[2 * scale, 2 * scale : 4 * scale] == (255, 0, 0)).all() and not drawn[: 2 * scale].any()
    assert (drawn[2 * scale + 1, 3 * scale, 0] == 255) == (scale in (1, 6, 16))


def test_a_cleaned_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cleaned.npz").mkdir()
    with pytest.raises(InputError, match="cleaned.npz: cannot be written"):
        write(tmp_path)
    assert not (tmp_path / ".cleaned.npz.tmp").exists()


def test_suspicious_rows_are_captioned_with_what_the_owner_calls_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(audit_report.plots, "image_grid", lambda *_, captions: drawn.extend(captions[0]))
    monkeypatch.setattr(audit_report.plots, "save", lambda _, path: path)
    folder, files = RunFolder(tmp_path, is_new=True), tuple(f"bee/{row}.png" for row in range(ROWS))
    for rows in (dataset(), dataset(class_names=("0", "1")), dataset(class_names=("ant", "bee"), files=files)):
        audit_report.suspicious_figures(folder, rows, analysis())
    assert drawn[::6] == ["row 10: class 1", "row 10: class 1", "10.png: bee"]
