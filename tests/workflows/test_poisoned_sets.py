"""experiments/lfd.py and experiments/abm.py from the command line to the files that they leave."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import bdjax
from bdjax.attacks.registry import ATTACKS
from bdjax.commands import abm, audit_model, lfd, ta_kd
from bdjax.datasets.digits import load_digits
from bdjax.errors import InputError
from bdjax.evaluation.variants import read_attack, read_defense
from bdjax.run.experiment import read_flags
from bdjax.run.log import StageLog
from bdjax.training import checkpoint
from bdjax.workflows import audited_models, base, poisoned_sets
from bdjax.workflows import ta_kd as ta_kd_workflow
from tests.fixtures import evidence

TINY: dict[str, Any] = {
    "seeds": 1,
    "model": "lenet",
    "width": 2,
    "train_rows": 240,
    "test_rows": 40,
    "epochs": 2,
    "layout": "map",
    "lowering": "shifted",
    "attacks": "badnets:poison_rate=0.2,none",
}
LFD, ABM = "lfd:teacher=lenet:teacher_epochs=1", "abm:epochs=1:student_epochs=1:isolation_rate=0.1"


def tiny(experiment, output: pathlib.Path, **changes: Any) -> poisoned_sets.Config:
    defenses = {"lfd": LFD, "abm": f"{ABM},fine_tuning:epochs=1"}[experiment.EXPERIMENT.name]
    start = experiment.preset("quick", "digits")
    return dataclasses.replace(start, output=output, **({"defenses": defenses} | TINY | changes))


@pytest.fixture(scope="module")
def abm_run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "abm"
    poisoned_sets.run(tiny(abm, folder, evidence=True), abm.EXPERIMENT, StageLog())
    return folder


def test_a_run_leaves_evidence(abm_run):
    verdict = evidence.check(abm_run / "evidence")
    roles = {entry["method"]: entry["role"] for entry in verdict["metrics"]}
    assert roles == {"none": "baseline", ABM: "subject", "fine_tuning:epochs=1": "other"}
    asr = [entry for entry in verdict["metrics"] if entry["metric"] == "asr"]
    test = load_digits([], False).test
    assert {entry["rows"] for entry in asr} <= set(range(1, len(test))) and all(
        entry["control"] is not None for entry in asr
    )
    assert verdict["limits"] and verdict["exit_code"] == 0


def test_a_run_leaves_numbers_tables_scores_pictures_and_models(abm_run):
    results = json.loads((abm_run / "results.json").read_text())
    assert [method["method"] for method in results["methods"]] == ["none", ABM, "fine_tuning:epochs=1"]
    assert [attack["attack"] for attack in results["attacks"]] == ["badnets:poison_rate=0.2", "none"]
    for name in ("table.md", "report.html", "verification.png", "timings.json"):
        assert (abm_run / name).stat().st_size > 0
    report = (abm_run / "report.html").read_text()
    assert "bdjax abm" in report and "Grad-CAM of the verification network" in report
    scores = sorted((abm_run / "scores").rglob("*.csv"))
    assert len(scores) == 2 and len(scores[0].read_text().splitlines()) > 200
    saved = sorted((abm_run / "models").glob("*/*"))
    assert len(saved) == 2 and checkpoint.about(saved[0])["num_classes"] == 10
    assert results["limits"] == [poisoned_sets.SMOKE_TEST] and "smoke test for defenses in training" in report


def test_the_two_networks_of_abm_can_be_asked_audited_and_distilled(abm_run):
    folders = [path.parent for path in (abm_run / "models").rglob("correction.json")]
    train = load_digits((), False).train
    for folder in folders:
        expected = bdjax.load_model(folder).predict(train.images[:20])
        assert expected.shape == (20, 10) and np.isfinite(expected).all()
        audited = read_flags(audit_model.EXPERIMENT, "", [f"--model={folder}", "--dataset=digits"])
        suspects = audited_models.open_suspects(audited, train, "native")
        assert suspects.model is None and suspects.titles == ["the model"]
        config = dataclasses.replace(ta_kd.preset("quick", "digits"), teachers=(str(folder),))
        teachers = ta_kd_workflow.open_teachers(config, train, "native")
        asked = ta_kd_workflow.ask_teachers(config, None, 10, teachers)(train.images[:20])
        np.testing.assert_allclose(asked, expected[None], atol=1e-4)
    assert folders


@pytest.mark.parametrize(
    ("preset", "changes", "epochs", "rate"),
    [
        ("quick", {}, 3, 1e-3),
        ("quick", {"recipe": ""}, 12, 3e-3),
        ("strong", {}, 3, 1e-3),
        ("paper", {}, 10, 1e-3),
    ],
)
def test_a_quick_run_by_a_recipe_has_settings_for_all_rows(preset, changes, epochs, rate):
    config = dataclasses.replace(lfd.preset(preset, "cifar10"), **changes)
    abl, teachers = (variant.settings for variant in poisoned_sets.read_defenses(config, ["abl", "lfd"]))
    assert (abl.isolation_epochs, teachers.teacher_learning_rate) == (epochs, rate)


@pytest.mark.slow
def test_a_repeated_run_ends_at_the_same_numbers(abm_run, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(abm_run, folder)
    (folder / "results.json").unlink()
    removed = next(folder.glob("checkpoints/abm-student-*"))
    shutil.rmtree(removed)
    poisoned_sets.run(tiny(abm, folder), abm.EXPERIMENT, StageLog())
    assert (folder / "results.json").read_bytes() == (abm_run / "results.json").read_bytes()


@pytest.mark.slow
def test_third_party_rows_have_no_asr_but_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(lfd, "GAP_NETWORKS", ("lenet",))  # the section is the same for any network
    data = load_digits((), False).train
    path = tmp_path / "own.npz"
    np.savez(path, images=data.images[:300], labels=data.labels[:300])
    start = lfd.preset("quick", str(path))
    assert start.attacks == "none" and start.seeds == 1
    changes = {name: value for name, value in TINY.items() if name not in ("attacks", "train_rows", "test_rows")}
    config = dataclasses.replace(start, output=tmp_path / "run", defenses=f"{LFD},nad", **changes)
    results = poisoned_sets.run(config, lfd.EXPERIMENT, StageLog())
    assert list(results["left_out"]) == ["nad"] and "--clean-data" in results["left_out"]["nad"]
    assert results["attacks"][0]["num_poisoned"] is None
    assert all(cell["summary"]["asr"]["mean"] is None for cell in results["cells"])
    assert len(list((tmp_path / "run" / "scores").rglob("none.csv"))) == 1
    assert "Ground truth unknown" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "figure99"}, "--study 'figure99' is not one of"),
        ({"study": "alpha", "attacks": "none"}, "sets attacks and defenses itself"),
        ({"clean_share": 1.5}, "--clean-share 1.5 is not at least 0 and at most 1"),
        ({"attacks": "wanet"}, "controls the training itself"),
        ({"attacks": "sig:colour=1"}, "has no setting 'colour'"),
        ({"defenses": "prayer"}, "is not one of none"),
        ({"defenses": "lfd:alpha=2.0"}, "defense lfd: alpha 2.0 is not above 0 and at most 1"),
        ({"model": "transformer"}, "--model 'transformer' is not one of"),
        ({"clean_share": 0.01}, "it should be at least one row for each of the 10 classes"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        poisoned_sets.run(tiny(lfd, tmp_path / "run", **changes), lfd.EXPERIMENT, StageLog())
    assert not (tmp_path / "run").exists()


def test_poisoned_rows_are_not_poisoned_again(tmp_path):
    data = load_digits((), False).train
    poisoned = np.arange(300) < 30
    path = tmp_path / "poisoned.npz"
    arrays = {"images": data.images[:300], "labels": data.labels[:300], "original_labels": data.labels[:300]}
    np.savez(path, **arrays, is_poisoned=poisoned)
    config = dataclasses.replace(tiny(lfd, tmp_path / "run"), dataset=str(path), train_rows=0, test_rows=0)
    with pytest.raises(InputError, match="30 rows are poisoned already"):
        poisoned_sets.run(config, lfd.EXPERIMENT, StageLog())


@pytest.mark.parametrize("experiment", [lfd, abm], ids=["lfd", "abm"])
def test_every_study_names_attacks_and_defenses_that_are_there(experiment):
    train = load_digits((), False).train
    for study in experiment.STUDIES.values():
        for text in study.defenses.split(","):
            read_defense(text, "paper", "cifar10")
        for text in study.attacks.split(","):
            name = text.split(":")[0]
            if name not in ("none", "refool", "narcissus") and all(part in ATTACKS for part in name.split("+")):
                attack = read_attack(text, train, 0, like="digits")
                assert attack.name == text
            else:
                assert name == "none" or set(name.split("+")) <= set(ATTACKS)


@pytest.mark.parametrize("experiment", [lfd, abm], ids=["lfd", "abm"])
@pytest.mark.parametrize("preset", ["quick", "paper", "strong"])
def test_presets_exist_for_every_set(experiment, preset):
    for dataset in ("digits", "mnist", "cifar10", "gtsrb"):
        config = experiment.preset(preset, dataset)
        base.check(config, experiment.EXPERIMENT)
    with pytest.raises(InputError, match="is not one of quick, paper, strong"):
        experiment.preset("fast", "digits")


@pytest.mark.parametrize("experiment", [lfd, abm], ids=["lfd", "abm"])
def test_the_command_line_starts_from_the_preset_of_the_set(experiment, monkeypatch):
    read = []
    monkeypatch.setattr(poisoned_sets, "run", lambda config, one, log: read.append((config, one)))
    experiment.main(["--dataset=cifar100", "--preset", "quick", "--seeds=5"])
    ((config, one),) = read
    assert one is experiment.EXPERIMENT
    assert config == dataclasses.replace(experiment.preset("quick", "cifar100"), seeds=5)
    like = dataclasses.replace(experiment.preset("quick", "cifar10"), dataset="cifar100", seeds=5)
    assert config == like and (config.train_rows, config.model) == (0, "speedrun")


@pytest.mark.parametrize(
    ("backend", "preset", "expected"),
    [("cpu", None, "quick"), ("gpu", None, "paper"), ("gpu", "quick", "quick"), ("cpu", "paper", "paper")],
)
def test_a_preset_is_of_its_own_size_and_the_device_decides_where_none_is_named(backend, preset, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = lfd.preset(preset, "cifar10")
    assert (config.preset, config.width) == (expected, {"quick": 16, "paper": 64}[expected])


@pytest.mark.parametrize(("backend", "width"), [("cpu", 16), ("gpu", 64)])
def test_strong_runs_are_of_the_size_that_the_device_can_bear(backend, width, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert lfd.preset("strong", "cifar10").width == width


def test_only_what_is_natural_is_flipped_at_the_paper_s_size():
    found = {name: lfd.preset("paper", name).augmentation for name in ("cifar10", "cifar100", "gtsrb", "mnist")}
    assert found == {"cifar10": "crop_flip", "cifar100": "crop_flip", "gtsrb": "crop", "mnist": "crop"}
