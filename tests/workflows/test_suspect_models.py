"""experiments/robust_kd.py from the command line to the files that it leaves, and back again as a --teacher."""

import dataclasses
import json
import pathlib
import shutil
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import pytest

from bdjax.commands import robust_kd
from bdjax.datasets.digits import load_digits
from bdjax.errors import InputError
from bdjax.evaluation import teachers
from bdjax.evaluation.teachers import open_teacher
from bdjax.evaluation.variants import compatible_defenses, read_attack
from bdjax.exchange import saved_model
from bdjax.models import make_model
from bdjax.reporting import results as schema
from bdjax.run.log import StageLog
from bdjax.settings import split_variants
from bdjax.training.member import TrainConfig
from bdjax.workflows import suspect_models
from tests.fixtures import evidence

TINY: dict[str, Any] = {
    "seeds": 2,
    "width": 2,
    "teacher_model": "lenet",
    "student": "lenet",
    "train_rows": 240,
    "test_rows": 40,
    "epochs": 2,
    "fine_tuning_epochs": 1,
    "layout": "map",
    "lowering": "shifted",
}
BADNETS, STUDENT = "badnets:poison_rate=0.2:target=3", "logit_distillation:epochs=1"
CHAIN = f"fine_tuning:epochs=1+{STUDENT}"
WITH_GROUPS = {"teacher_model": "wrn_10_2", "student": "wrn_10_2", "defenses": "fkd"}
"""What is refused because of its groups of blocks, which LeNet does not have."""


def without_sections(context) -> tuple:
    """The section on feature variances has separate tests."""
    return ()


EXPERIMENT = robust_kd.EXPERIMENT._replace(sections=without_sections)


def tiny(output: pathlib.Path, **changes: Any) -> suspect_models.Config:
    start = robust_kd.preset("quick", "digits")
    changed = {"attacks": f"{BADNETS},none", "defenses": f"{STUDENT},{CHAIN}"}
    if "teacher" in changes:
        changed["attacks"] = start.attacks
    return dataclasses.replace(start, output=output, **(TINY | changed | changes))


def run(config: suspect_models.Config) -> dict[str, Any]:
    return suspect_models.run(config, EXPERIMENT, StageLog())


def row(results: dict[str, Any], attack: str, method: str, seed: int = 0) -> dict[str, Any]:
    return schema.find(results, attack, method)["by_seed"][seed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("runs") / "robust_kd"
    run(tiny(place, evidence=True, tensorboard=find_spec("tensorboardX") is not None))
    return place


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


class TestARun:
    def test_evidence(self, folder, results):
        verdict = evidence.check(folder / "evidence")
        asr = {entry["attack"]: entry for entry in verdict["metrics"] if entry["metric"] == "asr"}
        assert list(asr) == [BADNETS] and 0 < asr[BADNETS]["rows"] < results["test_rows"]
        assert asr[BADNETS]["control"] is not None
        bom = json.loads((folder / "evidence" / "bom.cdx.json").read_text())
        left = [entry for entry in bom["components"] if entry["bom-ref"].startswith("network: models/")]
        assert left and all(entry["hashes"][0]["alg"] == "SHA-256" for entry in left)

    def test_numbers(self, results):
        assert [method["method"] for method in results["methods"]] == ["none", STUDENT, CHAIN]
        assert [attack["attack"] for attack in results["attacks"]] == [BADNETS, "none"]
        assert [method["model"] for method in results["methods"]] == ["lenet width 2"] * 3
        for method in ("none", STUDENT, CHAIN):
            attacked, clean = row(results, BADNETS, method), row(results, "none", method)
            assert attacked["asr"] is not None and attacked["control_asr"] is not None
            assert clean["asr"] is None and clean["control_asr"] is None

    def test_tables_pictures_and_the_command(self, folder):
        for name in ("table.md", "report.html", "asr.png", "control-asr.png", "trade-off.png", "timings.json"):
            assert (folder / name).stat().st_size > 0
        page = (folder / "report.html").read_text()
        assert "bdjax robust-kd" in page and "clean teacher" in page

    def test_the_first_part_of_a_chain_is_trained_once_and_what_follows_has_a_folder(self, folder):
        places = [path.relative_to(folder / "checkpoints") for path in (folder / "checkpoints").rglob("about.json")]
        tops = sorted(str(path.parent) for path in places)
        (after,) = (top for top in tops if top.startswith("after-fine_tuning-"))
        assert "KD-lenet" in after and sum(top.startswith("fine-tuning") for top in tops) == 1
        assert sum(top.startswith("KD-lenet") for top in tops) == 1

    def test_teachers_and_students_are_saved_with_their_trigger(self, folder):
        saved = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("models/*/*/about.json"))
        assert len(saved) == 4 and len(list(folder.glob("teachers/*/about.json"))) == 2
        triggers = sorted(path.parent.name for path in folder.rglob("triggers.npz"))
        assert triggers == ["badnets-poison_rate=0.2-target=3"] * 3

    @pytest.mark.slow
    def test_students_are_measured_during_their_training(self, folder, results):
        of_student = [curve for curve in results["curves"] if curve["method"] == STUDENT]
        assert [(curve["attack"], curve["seed"]) for curve in of_student] == [(BADNETS, 0), (BADNETS, 1)]
        last = of_student[0]["points"][-1]
        measured = row(results, BADNETS, STUDENT)
        assert {name: last[name] for name in ("cda", "asr", "control_asr")} == {
            name: pytest.approx(measured[name]) for name in ("cda", "asr", "control_asr")
        }
        assert (folder / "students-by-epoch.png").exists() and len(list((folder / "curves").glob("*.json"))) == 2

    def test_curves_for_tensorboard(self, folder):
        pytest.importorskip("tensorboardX")
        stages, curves = (
            {path.parent.relative_to(folder / top).as_posix() for path in (folder / top).rglob(name)}
            for top, name in (("checkpoints", "about.json"), ("tensorboard", "events*"))
        )
        assert stages < curves and all(name.endswith("-measured") for name in curves - stages)

    def test_a_repeated_run_ends_at_the_same_numbers(self, folder, tmp_path):
        again = tmp_path / "again"
        shutil.copytree(folder, again)
        (again / "results.json").unlink()
        run(tiny(again))
        assert (again / "results.json").read_bytes() == (folder / "results.json").read_bytes()


class TestAThirdPartyTeacher:
    @pytest.mark.slow
    def test_a_run_s_teacher_is_the_same_suspect(self, folder, results, tmp_path):
        place = folder / "teachers" / "badnets-poison_rate=0.2-target=3"
        found = run(tiny(tmp_path / "run", teacher=str(place), target=3, seeds=1, defenses="none"))
        assert [attack["attack"] for attack in found["attacks"]] == ["teacher", "none"]
        assert found["attacks"][0]["title"] == "your teacher (BadNets)"
        own, before = row(found, "teacher", "none"), row(results, BADNETS, "none")
        assert (own["cda"], own["asr"], own["r_acc"]) == (before["cda"], before["asr"], before["r_acc"])
        assert own["control_asr"] is not None
        assert not (tmp_path / "run" / "checkpoints" / "victims").exists()

    @pytest.mark.slow
    def test_a_student_without_its_trigger_is_another_suspect(self, folder, results, tmp_path):
        place = shutil.copytree(
            folder / "models" / STUDENT.replace(":", "-") / "badnets-poison_rate=0.2-target=3", tmp_path / "own"
        )
        (place / "triggers.npz").unlink()
        found = run(tiny(tmp_path / "run", teacher=str(place), seeds=1, defenses=STUDENT))
        assert [attack["title"] for attack in found["attacks"]] == ["your teacher"]
        assert row(found, "teacher", "none")["cda"] == row(results, BADNETS, STUDENT)["cda"]
        assert row(found, "teacher", STUDENT)["asr"] is None
        assert not (tmp_path / "run" / "checkpoints" / "clean-teachers").exists()
        assert "Trigger unknown" in (tmp_path / "run" / "report.html").read_text()

    @pytest.mark.parametrize("form", ["a saved model", "a file of weights"])
    def test_other_forms_are_the_same_suspect(self, folder, tmp_path, form):
        train, place = load_digits((), False).train, folder / "teachers" / "none"
        same = open_teacher(str(place), train, 0, "native")
        member = jax.tree.map(np.asarray, same.variables)
        about = saved_model.About(same.model.architecture, 10, train.image_shape)
        saved_model.write(tmp_path / "saved", about, member)
        text = str(tmp_path / "saved") if form == "a saved model" else f"{tmp_path / 'saved'}/model.safetensors:lenet"
        found = open_teacher(text, train, 0, "native")
        assert found.model.description.startswith("lenet width ") and len(found.suspects) == 1
        assert found.suspects[0].attack.plan is None and found.digest
        jax.tree.map(np.testing.assert_array_equal, found.variables, member)

    @pytest.mark.slow
    def test_a_run_on_a_normalised_file_of_weights(self, folder, tmp_path):
        train = load_digits((), False).train
        same = open_teacher(str(folder / "teachers" / "none"), train, 0, "native")
        about = saved_model.About(same.model.architecture, 10, train.image_shape)
        saved_model.write(tmp_path / "saved", about, jax.tree.map(np.asarray, same.variables))
        text = f"{tmp_path / 'saved'}/model.safetensors:lenet:flax:half"
        found = run(tiny(tmp_path / "run", teacher=text, seeds=1, defenses=STUDENT))
        assert [attack["title"] for attack in found["attacks"]] == ["your teacher"]
        assert "normalised by mean" in found["teacher"]["model"]
        assert row(found, "teacher", STUDENT)["cda"] is not None
        assert (tmp_path / "run" / "models" / STUDENT.replace(":", "-") / "teacher" / "model.json").exists()

    def test_an_oracle_needs_a_known_trigger(self, folder, tmp_path):
        message = "needs the attacker's trigger, which the --teacher model does not come with"
        with pytest.raises(InputError, match=message):
            run(
                tiny(
                    tmp_path / "run",
                    teacher=str(folder / "teachers" / "none"),
                    defenses="robust_kd:select=oracle:thresholds=(0.1, 0.2)",
                )
            )
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": "mnist", "attacks": robust_kd.PASSING}, "the data has 10 classes and images"),
            ({"target": 0}, "these triggers aim at class 3; use --target=3"),
            ({"attacks": "badnets", "target": 3}, "--teacher sets the suspect; leave out --attacks"),
            ({"teacher": "nowhere"}, "'nowhere' does not exist; a model is FOLDER, FILE.safetensors:ARCHITECTURE"),
            ({"teacher": ""}, "--teacher is empty"),
            (
                {"teacher": "a.onnx:nchw"},
                "a.onnx:nchw: is a black box, .* Students of black boxes: bdjax ta-kd --teachers",
            ),
            ({"teacher": "http://127.0.0.1:9/x"}, "9/x: is a black box, and these methods need its weights"),
            ({"target": 3, "defenses": "fkd"}, "lenet width 2 has no features before a ReLU"),
        ],
    )
    def test_errors(self, folder, tmp_path, changes, message, monkeypatch):
        place = folder / "teachers" / "badnets-poison_rate=0.2-target=3"
        data = load_digits((), False)
        if changes.get("dataset") == "mnist":  # that set need not be here for this
            wider = [dataclasses.replace(part, images=np.repeat(part.images, 2, axis=1)) for part in data]
            monkeypatch.setattr(suspect_models, "load", lambda config, log: type(data)(*wider))
        with pytest.raises(InputError, match=message):
            run(tiny(tmp_path / "run", **({"teacher": str(place)} | changes)))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "figure99"}, "--study 'figure99' is not one of"),
        ({"study": "form", "attacks": "none"}, "sets attacks and defenses itself"),
        ({"clean_share": 0.0}, "--clean-share 0.0 is not above 0 and at most 1"),
        ({"clean_share": 1.5}, "--clean-share 1.5 is not above 0 and at most 1"),
        ({"clean_share": 0.02}, "it should be at least one row for each of the 10 classes"),
        ({"fine_tuning_epochs": 0}, "--fine-tuning-epochs 0 is not at least 1"),
        ({"attacks": "unknown"}, "'unknown' is not one of"),
        ({"attacks": "none:label_noise=0.1"}, "label_noise applies to training sets only"),
        ({"defenses": "prayer"}, "'prayer' is not one of"),
        (
            {"defenses": "abl"},
            "defense abl needs the training set, which a model does not come with; defenses for models: ",
        ),
        ({"defenses": "lfd+fkd"}, "needs the training set"),
        ({"teacher_model": "transformer"}, "--teacher-model 'transformer' is not one of"),
        ({"student": "transformer"}, "--student 'transformer' is not one of"),
        ({**WITH_GROUPS, "student": "lenet"}, "lenet width 2 has no features before a ReLU"),
        ({**WITH_GROUPS, "teacher_model": "resnet18_cifar"}, "groups of resnet18_cifar width 2 end at"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        run(tiny(tmp_path / "run", **changes))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_poisoned_rows_are_no_clean_rows(tmp_path):
    data = load_digits((), False).train
    arrays = {"images": data.images[:300], "labels": data.labels[:300], "original_labels": data.labels[:300]}
    np.savez(tmp_path / "poisoned.npz", **arrays, is_poisoned=np.arange(300) < 30)
    config = tiny(tmp_path / "run", dataset=str(tmp_path / "poisoned.npz"), train_rows=0, test_rows=0)
    with pytest.raises(InputError, match="30 rows are poisoned; runs on suspect models need a clean dataset"):
        run(config)


class TestCleanRows:
    def test_all_some_or_those_of_another_set(self, tmp_path):
        train = load_digits((), False).train
        config = tiny(tmp_path)
        assert suspect_models.clean_rows(config, train) is train
        some = suspect_models.clean_rows(dataclasses.replace(config, clean_share=0.1), train)
        assert len(some) == pytest.approx(0.1 * len(train), abs=10) and len(np.unique(some.labels)) == 10
        np.savez(tmp_path / "own.npz", images=train.images[:200], labels=train.labels[:200])
        own = suspect_models.clean_rows(dataclasses.replace(config, clean_data=str(tmp_path / "own.npz")), train)
        assert 0 < len(own) <= 200 and own.source != train.source
        np.savez(tmp_path / "other.npz", images=np.repeat(train.images[:200], 2, axis=2), labels=train.labels[:200])
        with pytest.raises(InputError, match="--clean-data .*other.npz"):
            suspect_models.clean_rows(dataclasses.replace(config, clean_data=str(tmp_path / "other.npz")), train)


class TestMethods:
    def test_all_are_those_that_a_model_can_be_put_before(self, tmp_path):
        config = tiny(tmp_path, defenses="all")
        variants, left_out = suspect_models.read_methods(config, ["none", "fkd", "abl", "fine_tuning"])
        assert [variant.name for variant in variants] == ["none", "fkd", "fine_tuning"] and list(left_out) == ["abl"]
        assert variants[0].title == "teacher itself" and variants[0].defense.needs == ("attacked model",)

    def test_the_run_s_student_is_every_method_s(self, tmp_path):
        config = tiny(tmp_path, student="wrn_16_1")
        texts = ["fkd", "fkd:student=wrn_10_2", "fine_tuning+fkd"]
        plain, own, linked = suspect_models.read_methods(config, texts)[0]
        assert (plain.settings.student, own.settings.student) == ("wrn_16_1", "wrn_10_2")
        assert linked.settings[1].student == "wrn_16_1"

    def test_a_chain_of_students_is_checked_link_by_link(self, tmp_path):
        config = tiny(tmp_path)
        texts = ["logit_distillation:student=lenet+fkd"]
        variants, _ = suspect_models.read_methods(config, texts)
        network = lambda name: make_model(name, 10, 2)  # noqa: E731
        with pytest.raises(InputError, match="lenet width 2 has no features before a ReLU"):
            compatible_defenses(variants, network("wrn_10_2"), network, (8, 8, 1), is_all=False)
        fitting, left_out = compatible_defenses(variants, network("wrn_10_2"), network, (8, 8, 1), is_all=True)
        assert not fitting and "lenet" in left_out[texts[0]]


def test_recipes():
    base = TrainConfig(epochs=100, learning_rate=0.1, schedule="steps", steps=((50, 0.01), (75, 0.001)))
    recipes = teachers.make_recipes(base, 8, 0.005, 20)
    assert recipes.from_scratch is base
    tuned = recipes.fine_tuning
    assert (tuned.epochs, tuned.learning_rate, tuned.schedule, tuned.steps) == (8, 0.005, "cosine", ())
    assert (recipes.controlled.epochs, recipes.controlled.steps) == (20, ((10, 0.01), (15, 0.001)))


def test_every_study_names_attacks_and_methods_that_are_there(tmp_path):
    train = load_digits((), False).train
    for study in robust_kd.STUDIES.values():
        suspect_models.read_methods(tiny(tmp_path), split_variants(study.defenses))
        for text in split_variants(study.attacks):
            assert read_attack(text, train, 0, defender_gets="model").name == text


def test_a_student_that_learns_nothing_from_the_teacher_is_a_baseline_of_every_run(tmp_path):
    for preset in ("quick", "paper"):
        variants, _ = suspect_models.read_methods(
            tiny(tmp_path), split_variants(robust_kd.preset(preset, "digits").defenses)
        )
        assert [variant.title for variant in variants] == ["student on labels only", "FKD", "RobustKD"]
        assert variants[0].settings.alpha == 0


def test_quick_teachers_are_trained_as_in_the_paper():
    quick, paper = (robust_kd.preset(preset, "digits") for preset in ("quick", "paper"))
    assert (quick.optimiser, quick.weight_decay) == (paper.optimiser, paper.weight_decay) == ("sgd", 5e-4)


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_presets_exist_for_every_set(preset):
    for dataset in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "gtsrb", "flowers17", "own.npz"):
        config = robust_kd.preset(preset, dataset)
        suspect_models.check(config, robust_kd.EXPERIMENT)
        assert (config.dataset, config.preset) == (dataset, preset)
    with pytest.raises(InputError, match="is not one of quick, paper"):
        robust_kd.preset("strong", "digits")


def test_the_command_line_starts_from_the_preset_of_the_set(monkeypatch):
    inputs = []
    monkeypatch.setattr(suspect_models, "run", lambda config, one, log: inputs.append((config, one)))
    robust_kd.main(["--dataset=gtsrb", "--preset", "quick", "--seeds=5", "--teacher=some/where"])
    ((config, one),) = inputs
    assert one is robust_kd.EXPERIMENT
    like = dataclasses.replace(robust_kd.preset("quick", "gtsrb"), seeds=5, teacher="some/where")
    assert config == like


def test_the_saved_teacher_answers_as_the_run_s(folder):
    train = load_digits((), False).train
    found = open_teacher(str(folder / "teachers" / "none"), train, 0, "native")
    assert found.model.description == "lenet width 2" and found.suspects[0].parts == ()
