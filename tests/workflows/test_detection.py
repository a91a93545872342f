"""experiments/vbd.py on a grid of poisoned sets, from the command line to the files that it leaves."""

import json
import pathlib
import shutil
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from planted_rows import ENGINE, VBD, make_rows, poisoned_rows, quiet, run

from bdjax.commands import vbd
from bdjax.datasets import DATASETS
from bdjax.errors import InputError
from bdjax.evaluation.variants import read_attack
from bdjax.reporting.sections import file_name
from bdjax.run.log import StageLog
from bdjax.types import Dataset, Detection
from bdjax.workflows import base, detection
from bdjax.workflows.outcomes import FILES
from tests.fixtures import evidence

SQUARE, CLEAN = "white_square:poison_rate=0.2", "none"
GRID = (*ENGINE, f"--attacks={SQUARE},{CLEAN}", f"--defenses={VBD}", "--seeds=1", "--suspects-at-once=2")
DETECTED = ("flagged", "precision", "recall", "f1", "auc", "facts")


class Interrupted(StageLog):
    """A user who presses Ctrl-C as soon as a stage of this name is done."""

    def __init__(self, name: str) -> None:
        super().__init__(quiet().console)
        self._name = name

    @contextmanager
    def stage(self, name: str, **options: Any):
        with super().stage(name, **options) as progress:
            yield progress
        if self._name in name:
            raise KeyboardInterrupt


def cells(results: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(attack, detector, seed) -> what was measured."""
    return {
        (cell["attack"], cell["method"], row["seed"]): {name: row[name] for name in DETECTED}
        for cell in results["cells"]
        for row in cell["by_seed"]
    }


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "own.npz"
    images, labels = make_rows()
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def grid(own_rows, tmp_path_factory) -> pathlib.Path:
    """A finished grid of one batch of two suspects."""
    folder = tmp_path_factory.mktemp("runs") / "grid"
    run([f"--dataset={own_rows}", f"--output={folder}", *GRID, "--evidence"])
    return folder


@pytest.fixture(scope="module")
def apart(own_rows, tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    """The same grid in two batches of one suspect, with a detector that cannot be run, and the arguments without the output."""
    folder = tmp_path_factory.mktemp("runs") / "apart"
    arguments = [*ENGINE, f"--attacks={SQUARE},{CLEAN}", f"--defenses={VBD},scan", "--seeds=1", "--suspects-at-once=1"]
    arguments += [f"--dataset={own_rows}", "--clean-per-class=0"]
    run([*arguments, f"--output={folder}"])
    return folder, arguments


@pytest.fixture
def copied(grid, own_rows, tmp_path) -> tuple[pathlib.Path, list[str]]:
    """A copy of the finished grid, and the arguments that it was made with."""
    folder = tmp_path / "grid"
    shutil.copytree(grid, folder)
    return folder, [f"--dataset={own_rows}", f"--output={folder}", *GRID]


# ---- A grid ---------------------------------------------------------------------------------------------------------


def test_a_grid_leaves_evidence(grid):
    verdict = evidence.check(grid / "evidence")
    assert verdict["run"]["kind"] == "detectors" and verdict["verdict"]["word"] in ("found", "partly", "missed")
    flagged = [entry for entry in verdict["metrics"] if entry["metric"] == "flagged" and entry["attack"] == SQUARE]
    assert [entry["rows"] for entry in flagged] == [verdict["data"][0]["rows"]]
    assert flagged[0]["control"] is not None, "the false alarms on the clean set"


def test_a_grid_leaves_numbers_tables_a_report_and_the_outcome_of_each_batch(grid):
    results = json.loads((grid / "results.json").read_text())
    assert [attack["attack"] for attack in results["attacks"]] == [SQUARE, CLEAN]
    assert [method["method"] for method in results["methods"]] == [VBD]
    assert results["seeds"] == [0] and results["left_out"] == {}
    assert results["attacks"][0]["num_poisoned"] == [80] and results["attacks"][1]["num_poisoned"] == [0]
    assert len(cells(results)) == 2
    assert "| vbd" in (grid / "table.md").read_text().lower()
    report = (grid / "report.html").read_text()
    assert "bdjax vbd" in report and "Variance-based defense on own" in report
    assert [path.name for path in (grid / FILES).iterdir()] == ["suspects-0000.npz"]
    assert not list((grid / "checkpoints").iterdir()), "the checkpoints of a finished batch are removed"


def test_settings_as_long_as_these_still_make_names_of_files(grid):
    assert len(VBD) > 250 and file_name("lfd:alpha=0.5") == "lfd-alpha=0.5"
    assert len(file_name(VBD)) == 100 and file_name(VBD) != file_name(f"{VBD}:votes=1")
    assert (grid / f"roc-{file_name(VBD)}.png").exists()


def test_a_planted_trigger_is_found_in_the_class_that_the_attack_aims_at(grid):
    measured = cells(json.loads((grid / "results.json").read_text()))
    assert measured[SQUARE, VBD, 0]["facts"]["poisoned classes found"] == 1
    assert measured[SQUARE, VBD, 0]["f1"] > 0.5
    assert measured[CLEAN, VBD, 0]["f1"] is None and measured[CLEAN, VBD, 0]["facts"]["poisoned classes"] == 0


def sees_white(seen: list[int]):
    """A detector in the place of `contract.detect`: it flags what has white pixels, and counts the suspects of each call."""

    def detect(defense, inputs, settings) -> Detection:
        del defense, settings
        seen.append(len(inputs.keys))
        flags = (np.asarray(inputs.pool)[inputs.index] == 255).any(axis=(2, 3, 4))
        return Detection(flags, flags.astype(np.float32))

    return detect


def test_batches_are_measured_one_by_one_and_only_a_missing_one_is_run_again(own_rows, tmp_path, monkeypatch):
    """And the class that an attack aims at goes with the seed."""
    seen: list[int] = []
    monkeypatch.setattr(detection.contract, "detect", sees_white(seen))
    folder, seeds = tmp_path / "grid", (0, 1, 2)
    arguments = [*ENGINE, f"--attacks={SQUARE},{CLEAN}", "--defenses=abl", f"--seeds={len(seeds)}"]
    arguments += [f"--dataset={own_rows}", f"--output={folder}", "--suspects-at-once=2"]
    results = run(arguments)
    assert seen == [2, 2, 2]
    files = sorted((folder / FILES).iterdir())
    assert [path.name for path in files] == [f"suspects-000{first}.npz" for first in (0, 2, 4)]
    of_suspects = {}
    for path, first in zip(files, (0, 2, 4), strict=True):
        with np.load(path) as arrays:
            for number in (0, 1):
                of_suspects[first + number] = arrays[f"is_poisoned {number}"], arrays[f"labels {number}"]
    for number, (is_poisoned, labels) in of_suspects.items():
        assert is_poisoned.sum() == (80 if number in seeds else 0)
        assert set(labels[is_poisoned]) == ({number} if number in seeds else set())
    measured = cells(results)
    assert {key: row["flagged"] for key, row in measured.items()} == {
        (attack, "abl", seed): 0.2 * (attack == SQUARE) for attack in (SQUARE, CLEAN) for seed in seeds
    }
    assert all(measured[SQUARE, "abl", seed]["f1"] == 1 for seed in seeds)
    before, others = (folder / "results.json").read_bytes(), [files[0].read_bytes(), files[2].read_bytes()]
    files[1].unlink()
    log = quiet()
    run(arguments, log)
    assert (folder / "results.json").read_bytes() == before and seen == [2, 2, 2, 2]
    assert [files[0].read_bytes(), files[2].read_bytes()] == others
    assert [name for name in log.timings if "poisoning" in name] == ["suspects-0002: poisoning"]


def test_a_repeated_grid_trains_nothing_and_ends_at_the_same_bytes(copied):
    folder, arguments = copied
    results, log = (folder / "results.json").read_bytes(), quiet()
    (folder / "results.json").unlink()
    run(arguments, log)
    assert (folder / "results.json").read_bytes() == results
    assert not any("poisoning" in name or name.startswith("vbd") for name in log.timings)


@pytest.mark.slow
def test_a_missing_batch_is_run_again_even_after_an_interruption(apart, tmp_path):
    folder, arguments = tmp_path / "grid", [*apart[1], f"--output={tmp_path / 'grid'}"]
    shutil.copytree(apart[0], folder)
    results = (folder / "results.json").read_bytes()
    first, second = sorted((folder / FILES).iterdir())
    arrays, untouched = dict(np.load(second)), first.read_bytes()
    second.unlink()
    (folder / "results.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(arguments, Interrupted("vbd: 4-4P"))
    assert not second.exists() and not (folder / "results.json").exists()
    log = quiet()
    run(arguments, log)
    assert (folder / "results.json").read_bytes() == results
    assert first.read_bytes() == untouched
    assert [name for name in log.timings if "poisoning" in name] == ["suspects-0001: poisoning"]
    again = dict(np.load(second))
    assert again.keys() == arrays.keys()
    for name in arrays.keys() - {"seconds 0"}:
        np.testing.assert_array_equal(again[name], arrays[name], err_msg=name)


def test_a_damaged_outcome_is_one_line_that_names_it(copied):
    folder, arguments = copied
    file = folder / FILES / "suspects-0000.npz"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="suspects-0000.npz: is damaged .*; remove it") as error:
        run(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_how_many_suspects_share_a_call_changes_no_number(grid, apart):
    """And detectors that need clean rows are left out where there are none."""
    folder, results = apart[0], json.loads((apart[0] / "results.json").read_text())
    assert cells(results) == cells(json.loads((grid / "results.json").read_text())) and len(cells(results)) == 2
    flags = [np.load(folder / FILES / f"suspects-000{number}.npz")["flags 0"] for number in (0, 1)]
    together = np.load(grid / FILES / "suspects-0000.npz")["flags 0"]
    np.testing.assert_array_equal(np.concatenate(flags), together)
    assert list(results["left_out"]) == ["scan"] and "--clean-per-class" in results["left_out"]["scan"]


@pytest.mark.slow
def test_a_detector_that_chooses_its_clean_rows_chooses_among_more_than_the_others_get(tmp_path, monkeypatch):
    seen = {}

    def detected(defense, inputs, settings):
        seen[defense.name] = np.bincount(inputs.clean_labels[0]).tolist(), getattr(settings, "clean_per_class", None)
        rows, shown = inputs.pool[inputs.clean_index[0]], seen.setdefault("rows", {})
        shown[defense.name] = {image.tobytes() for image in np.asarray(rows)}
        return Detection(np.zeros(inputs.index.shape, bool), np.zeros(inputs.index.shape, np.float32))

    monkeypatch.setattr(detection.contract, "detect", detected)
    start = ("--dataset=digits", "--preset=quick", f"--output={tmp_path / 'run'}", "--seeds=1", "--train-rows=200")
    run([*start, *ENGINE, f"--attacks={SQUARE}", "--defenses=scan,agpd", "--clean-per-class=4"])
    shown = seen.pop("rows")
    assert seen == {"scan": ([4] * 10, None), "agpd": ([20] * 10, 4)}  # and AGPD uses no more than four
    assert shown["scan"] < shown["agpd"]


def test_of_small_classes_a_detector_chooses_among_all():
    labels = np.repeat(np.arange(3, dtype=np.int32), [4, 9, 30])
    data = Dataset(np.zeros((43, 2, 2, 1), np.uint8), labels, 3, "mine", "arrays")
    assert np.bincount(detection.take_per_class(data, 4, 5).labels).tolist() == [4, 9, 20]
    assert np.bincount(detection.take_per_class(data, 4).labels).tolist() == [4, 4, 4]
    with pytest.raises(InputError, match="class 0 of mine has only 4 rows"):
        detection.take_per_class(data, 5, 5)


def test_competitors_get_clean_rows_and_a_network(tmp_path):
    arguments = [f"--attacks={SQUARE},{CLEAN}", "--defenses=scan,agpd", "--seeds=1", "--train-rows=200"]
    start = ("--dataset=digits", "--preset=quick", f"--output={tmp_path / 'run'}")
    results = run([*start, *ENGINE, *arguments, "--clean-per-class=5"])
    assert {key[:2] for key in cells(results)} == {
        (attack, name) for attack in (SQUARE, CLEAN) for name in ("scan", "agpd")
    }
    assert results["left_out"] == {} and all(
        measured["auc"] is not None for _, measured in cells(results).items() if measured["f1"]
    )
    assert "clean rows" in results["methods"][0]["needs"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defenses=nad"], "defense nad is not a detector"),
        (["--defenses=none"], "--defenses none: no detector can be run"),
        (
            ["--defenses=scan", "--clean-per-class=0"],
            r"--defenses scan: no detector can be run \(scan needs clean rows: set --clean",
        ),
        (["--defenses=scan", "--clean-per-class=1000"], "--clean-per-class 1000: class [0-9] of digits has only"),
        (["--defenses=vbd:networks=8-9P"], "networks '8-9P' is not one of"),
        (["--attacks=composite"], "attack composite adds rows"),
        (["--attacks=label_consistent"], "attack label_consistent needs a network trained on clean rows"),
        (["--attacks=white_square:opacity=0.0", "--defenses=abl"], "opacity 0"),
        (
            ["--defenses=vbd"],
            "no detector can be run .vbd could not be tested: needs at least 10 held-back rows of a class",
        ),
        (["--attacks=none:label_noise=2"], "label_noise 2 should be a share"),
        (["--suspects-at-once=0"], "--suspects-at-once 0 is not at least 1"),
        (["--study=table9"], "--study 'table9' is not one of grid, table1"),
        (["--study=table1", "--attacks=none"], "--study table1 sets attacks and defenses itself"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message, tmp_path):
    start = ["--dataset=digits", "--preset=quick", "--train-rows=200", f"--output={tmp_path / 'run'}", *ENGINE]
    with pytest.raises(InputError, match=message) as error:
        run([*start, *arguments])
    assert "\n" not in str(error.value)


def test_rows_that_are_poisoned_already_are_not_poisoned_again(tmp_path):
    images, labels, is_poisoned, original = poisoned_rows()
    path = tmp_path / "known.npz"
    np.savez(path, images=images, labels=labels, is_poisoned=is_poisoned, original_labels=original)
    with pytest.raises(InputError, match="100 rows are poisoned already; use --attacks=none"):
        run([f"--dataset={path}", f"--output={tmp_path / 'run'}", *GRID])


# ---- Presets and studies --------------------------------------------------------------------------------------------


def test_every_study_can_be_read():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (1000, 32, 32, 3)).astype(np.uint8)
    train = Dataset(images, np.tile(np.arange(10, dtype=np.int32), 100), 10, "cifar10", "")
    for name, study in vbd.STUDIES.items():
        texts = study.attacks.split(",")
        assert [read_attack(text, train, 9).name for text in texts] == texts and len(set(texts)) == len(texts), name
        for preset in ("quick", "paper", "strong"):
            config = vbd.preset(preset, "cifar10")
            variants = detection.read_detectors(config, study.defenses.split(","))
            assert all(variant.defense.detect for variant in variants)


def test_the_paper_s_grid_is_eighty_settings_of_five_seeds():
    grid = vbd.STUDIES["grid"].attacks.split(",")
    all_to_all = [text for text in grid if "_all_to_all" in text]
    assert (len(grid), len(all_to_all), len(set(grid))) == (40, 16, 40)
    assert sorted(grid) == sorted(
        text for name in ("table1", "table2", "table3", "table4") for text in vbd.STUDIES[name].attacks.split(",")
    )
    for dataset in ("cifar10", "tiny_imagenet"):
        config = vbd.preset("paper", dataset)
        assert config.attacks.split(",") == grid and config.seeds == 5
        assert config.defenses == vbd.STUDIES["grid"].defenses


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("preset", ["quick", "paper", "strong"])
def test_presets_exist_for_every_set(preset, dataset):
    config = vbd.preset(preset, dataset)
    base.check(config, vbd.EXPERIMENT)
    assert (config.preset, config.dataset) == (preset, dataset)
    _, texts = base.attacks_and_defenses(config, vbd.EXPERIMENT)
    assert detection.read_detectors(config, [text for text in texts if text != "none"])


def test_own_rows_are_audited_and_other_presets_are_refused():
    config = vbd.preset("quick", "photos/")
    assert (config.attacks, config.defenses, config.seeds) == ("none", "vbd", 1)
    with pytest.raises(InputError, match="is not one of quick, paper, strong"):
        vbd.preset("fast", "digits")


def test_help_tells_of_studies_and_own_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        vbd.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for part in (
        "VBD: find the poisoned rows",
        "grid: table 5",
        "--clean-per-class",
        "--suspects-at-once",
        "--copy-files",
    ):
        assert part in shown
