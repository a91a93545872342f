"""experiments/vbd.py on a user's own rows: an audit by any detector, from the command line to the files that it leaves."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from planted_rows import ENGINE, TARGET, VBD, make_rows, poisoned_rows, run

from bdjax.errors import InputError


def write_folder(folder: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"kind-{label}" / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def hashes(folder: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Compiling takes longer than running here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    run(arguments)
    return place / "run", pictures, arguments, before


def test_an_audit_of_a_folder_names_the_files_to_leave_out(folder_audit):
    folder, _, _, _ = folder_audit
    images, labels, is_poisoned, _ = poisoned_rows()
    results = json.loads((folder / "results.json").read_text())
    assert results["rows"] == len(images) and results["detection"] is None
    assert results["verdict"]["level"] == "attacked" and results["classes"][TARGET]["finding"] == "trigger"
    flagged = (folder / "flagged.csv").read_text().splitlines()
    kept = (folder / "kept.csv").read_text().splitlines()
    assert len(flagged) - 1 == results["flagged"] and len(flagged) + len(kept) - 2 == len(images)
    names = [line.split(",")[1].strip('"') for line in flagged[1:]]
    hits = [is_poisoned[int(pathlib.Path(name).stem)] for name in names]
    assert np.mean(hits) > 0.6 and sum(hits) > 0.5 * is_poisoned.sum()
    assert {pathlib.Path(name).parent.name for name in names} >= {f"kind-{TARGET}"}
    trigger = folder / "triggers" / f"class-{TARGET}-trigger.png"
    opacity = np.asarray(Image.open(trigger))[..., 3] > 0
    corner = opacity[-opacity.shape[0] // 4 :, -opacity.shape[1] // 4 :]
    assert corner.all() and opacity.mean() < 0.6, "the pattern is where the planted one is, and not everywhere"
    assert (folder / "triggers" / f"class-{TARGET}-mask.png").exists()
    report = (folder / "report.html").read_text()
    assert results["verdict"]["headline"] in report and "python experiments/vbd.py" in report


def test_files_that_are_kept_are_copied_and_the_user_s_own_stay_as_they_are(folder_audit):
    folder, pictures, _, before = folder_audit
    assert hashes(pictures) == before
    kept = (folder / "kept.csv").read_text().splitlines()[1:]
    names = {line.split(",")[1].strip('"') for line in kept}
    assert hashes(folder / "cleaned") == {name: before[name] for name in names}


def test_a_repeated_audit_ends_at_the_same_bytes(folder_audit):
    folder, pictures, arguments, before = folder_audit
    results = (folder / "results.json").read_bytes()
    run(arguments)
    assert (folder / "results.json").read_bytes() == results
    assert hashes(pictures) == before


def test_an_audit_of_a_clean_folder_flags_nothing_for_sure(tmp_path):
    pictures = write_folder(tmp_path / "pictures", *make_rows())
    strict = VBD.replace("p_value=0.4", "p_value=1e-09")
    run_folder = tmp_path / "run"
    results = run([*ENGINE, f"--dataset={pictures}", f"--output={run_folder}", f"--defenses={strict}"])
    assert results["verdict"]["level"] == "info" and results["flagged"] == 0
    assert len((run_folder / "flagged.csv").read_text().splitlines()) == 1
    assert results["cleaned"]["kind"] is None and not (run_folder / "cleaned").exists()
    assert "No class has a trigger that this method can find" in (run_folder / "report.html").read_text()


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
