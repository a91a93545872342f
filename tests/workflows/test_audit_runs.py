"""experiments/vbd.py on a user's own rows: an audit by any detector, from the command line to the files that it leaves."""

import csv
import hashlib
import io
import json
import pathlib
import re
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from planted_rows import CLASSES, ENGINE, TARGET, VBD, make_rows, poisoned_rows, run
from rich.console import Console

from bdjax import datasets
from bdjax.commands import gate
from bdjax.defenses import contract
from bdjax.errors import InputError
from bdjax.reporting.audit_verdict import exit_status
from bdjax.run.log import StageLog
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Detection, Unread
from tests.fixtures import evidence, forms


def write_folder(folder: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"kind-{label}" / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def hashes(folder: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "own.npz"
    images, labels = make_rows()
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def folder_audit(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, list[str], dict[str, str]]:
    """An audit of a poisoned folder: the run, the folder, the arguments, and what the folder was before."""
    place = tmp_path_factory.mktemp("audit")
    images, labels, _, _ = poisoned_rows()
    pictures = write_folder(place / "pictures", images, labels)
    before = hashes(pictures)
    arguments = [*ENGINE, f"--dataset={pictures}", f"--output={place / 'run'}", f"--defenses={VBD}", "--copy-files"]
    run([*arguments, "--evidence"])
    return place / "run", pictures, arguments, before


def test_an_audit_of_a_folder_names_the_files_to_leave_out(folder_audit):
    folder, _, _, _ = folder_audit
    images, labels, is_poisoned, _ = poisoned_rows()
    results = json.loads((folder / "results.json").read_text())
    assert results["rows"] == len(images) and results["detection"] is None
    # A detector of so few steps may be unsure of many rows, which makes the evidence weak.
    assert results["outcome"] == "found" and results["classes"][TARGET]["finding"] in ("trigger", "weak")
    assert exit_status(results) == 3
    flagged = (folder / "flagged.csv").read_text().splitlines()
    kept = (folder / "kept.csv").read_text().splitlines()
    assert len(flagged) - 1 == results["flagged"] and len(flagged) + len(kept) - 2 == len(images)
    names = [line.split(",")[1].strip('"') for line in flagged[1:]]
    hits = [is_poisoned[int(pathlib.Path(name).stem)] for name in names]
    with open(folder / "flagged.csv", newline="") as file:
        likely = [(row["class"], row["likely_class"], row["likely_class_name"]) for row in csv.DictReader(file)]
    assert all(given != other and name == f"kind-{other}" for given, other, name in likely)
    assert np.mean(hits) > 0.6 and sum(hits) > 0.5 * is_poisoned.sum()
    assert {pathlib.Path(name).parent.name for name in names} >= {f"kind-{TARGET}"}
    trigger = folder / "triggers" / f"class-{TARGET}-trigger.png"
    opacity = np.asarray(Image.open(trigger))[..., 3] > 0
    corner = opacity[-opacity.shape[0] // 4 :, -opacity.shape[1] // 4 :]
    assert corner.mean() > 2 * opacity.mean(), f"{corner.mean():.2f} of the planted pixels, {opacity.mean():.2f} of all"
    assert (folder / "triggers" / f"class-{TARGET}-mask.png").exists()
    report = (folder / "report.html").read_text()
    assert results["verdict"]["headline"] in report and "bdjax vbd" in report


def test_an_audit_of_a_folder_leaves_evidence(folder_audit):
    folder, pictures, _, _ = folder_audit
    verdict, results = evidence.check(folder / "evidence"), json.loads((folder / "results.json").read_text())
    assert verdict["verdict"]["word"] == "found" and verdict["exit_code"] == 3
    values = {entry["metric"]: entry for entry in verdict["metrics"]}
    assert values["flagged"]["value"] == results["flagged_share"] and values["flagged"]["rows"] == results["rows"]
    assert values["asr"]["value"] is None and "unknown" in values["asr"]["why"]
    assert gate.main([str(folder / "evidence" / "verdict.json"), "--max-asr=1"]) == 4
    (log,) = json.loads((folder / "evidence" / "findings.sarif").read_text())["runs"]
    found = [result for result in log["results"] if result["ruleId"] == "flagged-row"]
    places = [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in found]
    assert len(places) == results["flagged"] and all((pictures / unquote(place)).is_file() for place in places)
    assert f"class {TARGET}" in "".join(
        result["message"]["text"] for result in log["results"] if result["ruleId"] == "class-with-pattern"
    )


def test_files_that_are_kept_are_copied_and_the_user_s_own_stay_as_they_are(folder_audit):
    folder, pictures, _, before = folder_audit
    assert hashes(pictures) == before
    kept = (folder / "kept.csv").read_text().splitlines()[1:]
    names = {line.split(",")[1].strip('"') for line in kept}
    assert hashes(folder / "cleaned") == {name: before[name] for name in names}


def test_a_repeated_audit_ends_at_the_same_bytes(folder_audit):
    folder, pictures, arguments, before = folder_audit
    results = (folder / "results.json").read_bytes()
    before_it = {name: (folder / "evidence" / name).read_text() for name in evidence.FILES}
    run([*arguments, "--evidence"])
    assert (folder / "results.json").read_bytes() == results
    for name, text in before_it.items():
        now = (folder / "evidence" / name).read_text()
        assert re.sub(evidence.TIME, "", now) == re.sub(evidence.TIME, "", text), name
    assert hashes(pictures) == before


def test_an_audit_of_a_clean_folder_flags_nothing_for_sure(tmp_path, monkeypatch):
    """`tests/defenses/test_vbd.py` shows that VBD finds nothing in clean rows."""
    calls, run_folder = [], tmp_path / "run"
    monkeypatch.setattr(contract, "detect", sees_squares(1, calls))
    pictures = write_folder(tmp_path / "pictures", *make_rows())
    flags = [f"--dataset={pictures}", f"--output={run_folder}", f"--defenses={VBD}", "--no-sensitivity"]
    results = run([*ENGINE, *flags])
    assert calls == [1], "no trigger is planted in copies"
    assert results["verdict"]["level"] == "nothing_found" and results["flagged"] == 0 and exit_status(results) == 0
    assert len((run_folder / "flagged.csv").read_text().splitlines()) == 1
    assert results["cleaned"]["kind"] is None and not (run_folder / "cleaned").exists()
    report = (run_folder / "report.html").read_text()
    assert "Nothing found in these 500 files" in report and "was not measured: --no-sensitivity." in report


def sees_squares(smallest: int, calls: list[int]):
    """A detector in the place of `contract.detect`: it flags green and white corners if at least so many rows have them."""

    def detect(defense, inputs, settings) -> Detection:
        del defense, settings
        calls.append(len(inputs.keys))
        corners = np.asarray(inputs.pool)[inputs.index][:, :, -3:, -3:]
        flags = np.isin(corners, (0, 255)).all(axis=(2, 3, 4))
        flags &= flags.sum(axis=1, keepdims=True) >= smallest
        return Detection(flags, flags.astype(np.float32))

    return detect


@pytest.mark.parametrize(("form", "first"), [("parquet", "set.parquet#"), ("metadata.csv", "images/")])
def test_an_audit_of_rows_in_another_form_names_their_records(tmp_path, monkeypatch, form, first):
    """The arrays are those of a class folder, and so are the flags: `tests/datasets/test_forms.py` compares the arrays."""
    monkeypatch.setattr(contract, "detect", sees_squares(1, []))
    images, labels, is_poisoned, _ = poisoned_rows()
    rows = forms.rows_of(images, [f"kind-{label}" for label in labels])
    data, folder = forms.WRITERS[form](tmp_path / "set", rows), tmp_path / "run"
    flags = [f"--dataset={data}", f"--output={folder}", f"--defenses={VBD}", "--copy-files", "--evidence"]
    results = run([*ENGINE, *flags])
    assert results["flagged"] == is_poisoned.sum() and results["unit"] == ("rows" if form == "parquet" else "files")
    with open(folder / "flagged.csv", newline="") as file:
        flagged = list(csv.DictReader(file))
    planted = {number for number, row in enumerate(rows) if is_poisoned[int(row.name[-9:-4])]}
    assert {int(row["row"]) for row in flagged} == planted and all(row["file"].startswith(first) for row in flagged)
    kept = datasets.load_suspect(str(folder / ("cleaned.npz" if form == "parquet" else "cleaned")))
    whole = datasets.load_suspect(str(data))
    left = np.array([number for number in range(len(rows)) if number not in planted])
    np.testing.assert_array_equal(kept.images, whole.images[left])
    assert kept.class_names == whole.class_names and not kept.unread
    np.testing.assert_array_equal(kept.labels, whole.labels[left])
    evidence.check(folder / "evidence")
    (log,) = json.loads((folder / "evidence" / "findings.sarif").read_text())["runs"]
    found = [result for result in log["results"] if result["ruleId"] == "flagged-row"]
    has_place = ["physicalLocation" in result["locations"][0] for result in found]
    assert len(found) == len(planted) and all(has_place) == any(has_place) == (form == "metadata.csv")


@pytest.mark.parametrize(
    ("smallest", "headline", "status"),
    [
        (
            30,
            "Nothing found in these 500 rows; a 3×3 white square planted in 34 of them (6.8 %) was found, in 17 it was not.",
            0,
        ),
        (
            99,
            ") could not be tested: not even a 3×3 white square that was planted in 68 rows of a copy was found.",
            4,
        ),
    ],
)
def test_an_audit_that_finds_nothing_plants_a_trigger_and_says_what_became_of_it(
    own_rows, tmp_path, monkeypatch, smallest, headline, status
):
    calls, text = [], io.StringIO()
    monkeypatch.setattr(contract, "detect", sees_squares(smallest, calls))
    log, folder = StageLog(Console(file=text, width=400)), tmp_path / "run"
    results = run([*ENGINE, f"--dataset={own_rows}", f"--output={folder}", f"--defenses={VBD}"], log)
    assert calls == [1, 3], "the copies are members of one call"
    assert [(entry["planted"], entry["found"]) for entry in results["sensitivity"]["sets"]] == [
        (17, False),
        (34, not status),
        (68, not status),
    ]
    assert results["verdict"]["headline"].endswith(headline) and exit_status(results) == status
    assert json.loads((folder / "results.json").read_text()) == results
    assert "planting a 3×3 white square in copies, in 17, 34, 68 rows: roughly" in text.getvalue()
    assert headline in text.getvalue() and (folder / "planted.png").exists()
    assert "flagged in all" in (folder / "table.md").read_text()
    assert (folder / "flagged.csv").exists() != bool(status)


def test_a_trigger_that_cannot_be_planted_is_a_reason(own_rows, tmp_path, monkeypatch):
    calls, many = [], VBD.replace("rows_per_class=10", "rows_per_class=1000")
    monkeypatch.setattr(contract, "detect", sees_squares(1, calls))
    results = run([*ENGINE, f"--dataset={own_rows}", f"--output={tmp_path / 'run'}", f"--defenses={many}"])
    assert calls == [1] and results["outcome"] == "nothing found"
    assert (
        "not measured: the trigger cannot be planted: 1,667 rows are more than half of the 375"
        in results["verdict"]["text"]
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> pathlib.Path:
    """Poisoned rows with the truth about each."""
    images, labels, is_poisoned, original = poisoned_rows()
    path = tmp_path_factory.mktemp("known") / "known.npz"
    np.savez(path, images=images, labels=labels, is_poisoned=is_poisoned, original_labels=original)
    return path


@pytest.mark.parametrize("defense", ["spectral_signatures", pytest.param("abl:isolate=oracle", marks=pytest.mark.slow)])
def test_an_audit_by_another_detector_has_its_flags_and_nothing_of_vbd(known, tmp_path, defense):
    folder, before = tmp_path / "run", hashlib.sha256(known.read_bytes()).hexdigest()
    results = run([*ENGINE, f"--dataset={known}", f"--output={folder}", f"--defenses={defense}"])
    assert [method["method"] for method in results["methods"]] == [defense] and not results["extracts_patterns"]
    assert results["flagged"] > 0 and results["detection"][0]["poisoned"] == 100
    assert json.loads((folder / "results.json").read_text()) == results
    assert len((folder / "flagged.csv").read_text().splitlines()) == 1 + results["flagged"]
    report = (folder / "report.html").read_text()
    assert f">{results['detector']}<" in report and results["verdict"]["headline"] in report
    assert "p-value" not in report and "VBD" not in report and not (folder / "triggers").exists()
    images, _, is_poisoned, _ = poisoned_rows()
    with np.load(folder / "cleaned.npz") as cleaned:
        assert len(cleaned["labels"]) == 500 - results["flagged"]
        np.testing.assert_array_equal(cleaned["images"], images[cleaned["row"]])
        hits = 100 - int(is_poisoned[cleaned["row"]].sum())
    measured = results["detection"][0]
    assert measured["recall"] == pytest.approx(hits / 100) and "precision" in report
    assert measured["precision"] == pytest.approx(hits / results["flagged"])
    assert hashlib.sha256(known.read_bytes()).hexdigest() == before


@pytest.mark.slow
def test_clean_rows_from_elsewhere_are_for_detectors_that_need_some(known, own_rows, tmp_path):
    arguments = [
        *ENGINE,
        f"--dataset={known}",
        f"--output={tmp_path / 'run'}",
        "--defenses=scan",
        "--clean-per-class=5",
    ]
    results = run([*arguments, f"--clean-data={own_rows}"])
    assert "clean rows" in results["methods"][0]["needs"] and results["cells"][0]["summary"]["auc"]["mean"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defenses=vbd,scan"], "--defenses vbd,scan: an audit of .* takes exactly one detector"),
        (["--defenses=vbd,vbd:votes=2"], "takes exactly one detector"),
        (["--defenses=none"], "--defenses none: an audit of .* takes exactly one detector"),
        (["--defenses=nad"], "defense nad is not a detector"),
        (
            ["--defenses=scan"],
            "--defenses scan: needs rows that are known to be clean, and there are none; set --clean-data",
        ),
        (["--defenses=agpd"], "--defenses agpd: needs rows that are known to be clean"),
        (["--defenses=scan", "--clean-data=digits"], "--clean-data digits: 10 classes and images"),
        (["--defenses=abl:isolate=oracle"], "needs the number of poisoned rows, which is unknown for"),
    ],
)
def test_what_an_audit_cannot_have_is_refused_in_one_line(own_rows, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        run([*ENGINE, f"--dataset={own_rows}", f"--output={tmp_path / 'run'}", *arguments])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("defense", ["activation_clustering", "vbd"])
def test_an_audit_of_too_few_rows_trains_nothing_and_says_that_it_knows_nothing(tmp_path, monkeypatch, defense):
    images, labels = make_rows()
    unread = (Unread("cat/x.tif", "has a suffix that is not read"),)
    data = Dataset(
        images[:9], labels[:9].astype(np.int32), CLASSES, "own", "own/", ("ant", "bee", "cat", "dog"), unread=unread
    )
    monkeypatch.setattr(datasets, "load_suspect", lambda *_, **__: data)
    monkeypatch.setattr(StageRunner, "from_variables", None)
    text, folder = io.StringIO(), tmp_path / "run"
    log = StageLog(Console(file=text, width=400))
    results = run([*ENGINE, "--dataset=own/", f"--output={folder}", f"--defenses={defense}"], log)
    headline = results["verdict"]["headline"]
    assert "could not be tested: needs at least" in headline and results["verdict"]["level"] == "not_tested"
    assert exit_status(results) == 4
    assert results["flagged"] is None and results["detection"] is None and results["cleaned"]["kind"] is None
    report, table = (folder / "report.html").read_text(), (folder / "table.md").read_text()
    assert headline in report and headline in text.getvalue() and "not tested" in table
    assert not any(f"flags none {end}" in report + text.getvalue() for end in ("of", "0"))
    assert not list(folder.glob("*.csv")) or [path.name for path in folder.glob("*.csv")] == ["not_read.csv"]
    for said in (text.getvalue(), report, results["verdict"]["text"]):
        assert "1 file of the data was not read and so not examined: not_read.csv lists it." in said
    assert "not read" in text.getvalue().splitlines()[1] and results["not_read"] == 1


@pytest.mark.slow
def test_an_audit_says_which_clean_rows_are_suspect_rows_and_which_classes_are_too_small(tmp_path):
    images, labels = make_rows()
    last = CLASSES - 1  # a class of one row; as many classes as in the other runs, whose programs are compiled
    labels = np.where((labels == last) & (np.arange(len(labels)) != last), 0, labels)
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    fresh = make_rows(1)[0]
    fresh[:2] = images[:2]
    np.savez(tmp_path / "clean.npz", images=np.concatenate([fresh[:40], fresh[-10:]]), labels=np.arange(50) % CLASSES)
    arguments = [f"--dataset={tmp_path / 'own.npz'}", f"--clean-data={tmp_path / 'clean.npz'}", "--clean-per-class=5"]
    results = run([*ENGINE, *arguments, f"--output={tmp_path / 'run'}", "--defenses=scan", "--no-sensitivity"])
    assert results["classes"][last]["not_tested"] == "has 1 row; needs at least 2"
    assert results["classes"][last]["flagged"] is None and results["classes"][0]["not_tested"] is None
    assert results["shared_rows"][0]["of"] == "the suspect set" and results["shared_rows"][0]["count"] in (1, 2)
    text = results["verdict"]["text"]
    assert "of the 20 clean rows" in text and "SCAn: class 3 could not be tested (class 3 has 1 row" in text
    assert "Class 3: could not be tested." in (tmp_path / "run" / "table.md").read_text()
