"""Small runs of the TA-KD experiment: that every number, picture and file is there, whatever the numbers are."""

import dataclasses
import glob
import gzip
import inspect
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bdjax.attacks.providers import make_provider_triggers
from bdjax.commands import robust_kd, ta_kd, vbd
from bdjax.errors import InputError
from bdjax.exchange import saved_model
from bdjax.exchange.opening import Opened
from bdjax.models import make_model
from bdjax.reporting import ta_kd as reporting
from bdjax.reporting.evidence import verdict as verdicts
from bdjax.reporting.results import find
from bdjax.run import command_line
from bdjax.run.checks import check_ranges, flag
from bdjax.run.experiment import read_flags
from bdjax.run.folder import default_name
from bdjax.workflows import base
from bdjax.workflows import ta_kd as workflow
from tests.fixtures import evidence, programs

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = {
    "layout": "map",
    "lowering": "shifted",
    "seeds": 2,
    "width": 2,
    "epochs": 4,
    "defense_epochs": 2,
    "train_rows": 300,
    "test_rows": 60,
    "num_teachers": 3,
    "batch_size": 16,
    "clean_model": "lenet",
    "teacher_model": "lenet",
    "aggregated_model": "lenet",
    "student_model": "lenet",
}
PICTURES = ("defenses", "training_curves", "triggers", "cross_trigger_asr", "cross_trigger_r_acc", "grad_cam")
ROLES = ["clean", "teachers", "soft vote", "hard vote", "aggregated", "student", "alone", "fine-tuned"]


def run(config: workflow.Config, **options: Any) -> dict[str, Any]:
    return workflow.run(config, ta_kd.EXPERIMENT, **options)


def tiny(output: pathlib.Path, **changes: Any) -> workflow.Config:
    return dataclasses.replace(ta_kd.preset("quick", "digits"), output=output, **(TINY | changes))


def flags(output: pathlib.Path, **changes: Any) -> list[str]:
    fields = {"preset": "quick", "dataset": "digits", "output": output} | TINY | changes
    return shlex.split(command_line.as_flags(fields))


PROGRAM = """
import runpy, sys
from bdjax.run import command_line
command_line.backend.set_up = lambda: None  # those of the tests
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*arguments: str) -> subprocess.Popen:
    """Start the experiment as a program, with the types, devices and compiled programs of the tests."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": str(len(jax.devices())),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
    }
    return programs.start("-c", PROGRAM, str(ROOT / "experiments" / "ta_kd.py"), *arguments, **environment)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Finished(NamedTuple):
    folder: pathlib.Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run of `tiny()`, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "ta_kd"
    run(tiny(folder, evidence=True))
    return Finished(folder, json.loads((folder / "results.json").read_text()))


# ---- A whole run ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_evidence(finished):
    verdict = evidence.check(finished.folder / "evidence")
    student = {entry["metric"]: entry for entry in verdict["metrics"] if entry["method"] == "student"}
    assert {entry["method"] for entry in verdict["metrics"] if entry["role"] == "subject"} == {"student"}
    # None of the 60 test rows of this run is of the target class.
    assert student["asr"]["rows"] == student["cda"]["rows"] == finished.results["test_rows"]
    assert student["asr"]["control"] is not None and verdict["verdict"]["word"] in {*verdicts.DEFENSE_WORDS} - {
        verdicts.UNKNOWN
    }


def test_a_run_leaves_its_settings_numbers_pictures_and_models(finished):
    folder = finished.folder
    record = json.loads((folder / "config.json").read_text())
    assert record["experiment"] == "ta_kd"
    assert {name: record["config"][name] for name in TINY} == TINY
    for name in (*PICTURES, "feature_maps"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 100
    seconds = json.loads((folder / "timings.json").read_text())["seconds"]
    assert {"data", "clean", "teachers", "student + alone", "evaluation"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())
    for stage in ("clean", "teachers", "aggregated-fine-tuned", "student-alone"):
        assert (folder / "checkpoints" / stage / "about.json").is_file()
        assert not list((folder / "checkpoints" / stage).glob("progress-*"))
    for seed in range(2):
        place = folder / "teachers" / f"seed-{seed}"
        assert json.loads((place / "about.json").read_text())["members"] == 3
        assert (place / "triggers.npz").is_file()
    assert not list(folder.rglob("*.tmp"))


def test_every_number_is_there_and_in_range(finished):
    results = finished.results
    (attack,) = results["attacks"]
    assert [cell["method"] for cell in results["cells"]] == [method["method"] for method in results["methods"]] == ROLES
    assert results["test_rows"] == 60 and results["seeds"] == [0, 1] and attack["target"] == 0
    assert [len(names) for names in attack["triggers"]] == [3, 3]
    for cell in results["cells"]:
        role = cell["method"]
        assert [seed["seed"] for seed in cell["by_seed"]] == [0, 1]
        for seed in cell["by_seed"]:
            single = seed.get("members", [seed])
            assert len(single) == (3 if role in ("teachers", "fine-tuned") else 1)
            for numbers in (seed, *single):
                assert all(0 <= numbers[name] <= 1 for name in ("cda", "asr", "r_acc"))
                assert numbers["asr"] + numbers["r_acc"] <= 1 + 1e-9
                assert ("delta_asr" in numbers) == (role != "clean")
        for name, summary in cell["summary"].items():
            values = [seed[name] for seed in cell["by_seed"]]
            assert math.isclose(summary["mean"], np.mean(values), abs_tol=1e-12)
            assert math.isclose(summary["standard_deviation"], np.std(values, ddof=1), abs_tol=1e-12)
    for cross in results["cross_trigger"]:
        assert np.shape(cross["asr"]) == np.shape(cross["r_acc"]) == (4, 3)
        assert cross["last_row_is_clean"]
    sizes = {method["method"]: method["parameters"] for method in results["methods"]}
    assert sizes["hard vote"] == 3 * sizes["teachers"]
    assert sizes["student"] == sizes["teachers"] > 0


def test_the_tables_and_the_report_name_every_role(finished):
    table = (finished.folder / "table.md").read_text()
    for method in finished.results["methods"]:
        assert method["title"] in table
    assert "| teacher 3" in table and "ensemble (votes)" in table
    page = (finished.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES) + 1
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # everything is embedded
    assert not re.search(r"<script[^>]+src|@import|url\((?!['\"]?data:)", page)
    assert "--num-teachers=3" in page
    assert str(finished.folder) not in page


def test_other_settings_are_not_mixed_in(finished):
    before = contents(finished.folder)
    with pytest.raises(InputError, match=r"holds a run with other settings: temperature 4.0 -> 2.0; "):
        run(tiny(finished.folder, temperature=2.0))
    assert contents(finished.folder) == before


# ---- Interrupted and killed -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_killed_ends_at_the_same_numbers(finished, tmp_path, capsys):
    """A moment of each kind: at the start, in a stage, between two, while a checkpoint is written, after the last stage, and at
    the end; `test_interruptions.py` kills a stage at random moments."""
    folder = tmp_path / "killed"
    stages, clean = folder / "checkpoints", {}
    moments = {
        "config.json": signal.SIGINT,
        "checkpoints/clean/about.json": signal.SIGINT,
        "checkpoints/teachers/progress-00000[234]": signal.SIGKILL,
        "checkpoints/aggregated-fine-tuned/progress-*tmp*": signal.SIGTERM,
        "checkpoints/student-alone/about.json": signal.SIGKILL,
        "results.json": signal.SIGINT,
    }
    for pattern, number in moments.items():
        program = start(*flags(folder))
        # Path.glob would look at every folder on the way, hundreds of times a second.
        programs.wait_for(program, lambda pattern=str(folder / pattern): glob.glob(pattern))
        if pattern == "config.json":
            assert_a_second_process_is_refused(program, folder)
        programs.interrupt(program, number)
        if pattern == "checkpoints/teachers/progress-00000[234]":
            assert not (stages / "teachers" / "about.json").exists()
            clean = contents(stages / "clean")
        assert pattern == "results.json" or not (folder / "results.json").exists()
    results = run(tiny(folder))
    assert capsys.readouterr().out.count("restored from checkpoint") == 4

    assert json.loads(json.dumps(results)) == finished.results
    for name in ("results.json", "table.md"):
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()
    assert contents(stages / "clean") == clean  # trained once
    assert contents(folder).keys() >= {f"{name}.png" for name in PICTURES} | {"report.html"}
    assert not list(stages.glob("*/progress-*"))
    assert not (folder / ".lock").exists() and not list(folder.rglob("*tmp*"))


def assert_a_second_process_is_refused(first: subprocess.Popen, folder: pathlib.Path) -> None:
    """In one line, while the first has the folder; it is stopped for that time."""
    first.send_signal(signal.SIGSTOP)
    try:
        second = start(*flags(folder))
        _, error = second.communicate(timeout=120)
        assert second.returncode == 2
        assert error.count("\n") == 1 and f"{folder} is in use by process {first.pid} on " in error
    except BaseException:
        first.kill()
        raise
    first.send_signal(signal.SIGCONT)


# ---- Other teachers -------------------------------------------------------------------------------------------------


def teachers_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of each teacher of the first seed."""
    return find(results, reporting.ATTACK, "teachers")["by_seed"][0]["members"]


@pytest.fixture(scope="module")
def third_party(finished, tmp_path_factory) -> Finished:
    """A run with the first seed's teachers of `finished`, whose triggers are known."""
    folder = tmp_path_factory.mktemp("runs") / "known"
    run(tiny(folder, teachers=(str(finished.folder / "teachers" / "seed-0"),), seeds=1))
    return Finished(folder, json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
def test_third_party_teachers_with_their_triggers(finished, third_party):
    results = third_party.results
    assert [method["method"] for method in results["methods"]] == [role for role in ROLES if role != "clean"]
    assert results["attacks"][0]["triggers"] == finished.results["attacks"][0]["triggers"][:1]
    # They are the teachers of that run, so their numbers are the same.
    for teacher, original in zip(teachers_of(results), teachers_of(finished.results), strict=True):
        assert all(math.isclose(teacher[name], original[name], abs_tol=0.02) for name in ("cda", "asr", "r_acc"))
    assert not (third_party.folder / "teachers").exists()


@pytest.mark.slow
def test_third_party_teachers_without_their_triggers(finished, third_party, tmp_path):
    folder = tmp_path / "third party"
    shutil.copytree(finished.folder / "teachers" / "seed-0", folder)
    (folder / "triggers.npz").unlink()
    run(tiny(tmp_path / "unknown", teachers=(str(folder),), seeds=1))
    unknown = json.loads((tmp_path / "unknown" / "results.json").read_text())
    assert unknown["attacks"][0]["triggers"] == [None] and unknown["cross_trigger"] == [None]
    for cell, with_triggers in zip(unknown["cells"], third_party.results["cells"], strict=True):
        assert cell["summary"]["asr"]["mean"] is None and cell["summary"]["r_acc"]["mean"] is None
        # The defense does not use the triggers.
        assert cell["method"] == with_triggers["method"]
        assert cell["summary"]["cda"] == with_triggers["summary"]["cda"]
    assert "triggers are " in (tmp_path / "unknown" / "report.html").read_text()
    assert not (tmp_path / "unknown" / "triggers.png").exists()


def opened(name, model=None, count=0, triggers=None):
    variables = {"params": jnp.arange(count, dtype=jnp.float32)} if count else None
    classifier = None if count else lambda images: np.zeros((len(images), 10))
    return Opened(name, f"digest of {name}", model, variables, classifier, triggers)


def test_what_teachers_of_several_kinds_have_in_common():
    two, one = make_model("lenet", 10), make_model("resnet10", 10, 4)
    triggers = [make_provider_triggers(jax.random.key(s), (8, 8, 1), count) for s, count in enumerate((2, 1))]
    pair, single, black = opened("a", two, 2, triggers[0]), opened("b", two, 1, triggers[1]), opened("c.onnx")
    assert workflow.is_one_architecture([pair, single]) and not workflow.is_one_architecture([pair, black])
    assert not workflow.is_one_architecture([pair, opened("d", one, 1)])
    assert not workflow.is_one_architecture([black])
    assert workflow.names_of([pair, black], []) == ["a, network 1", "a, network 2", "c.onnx"]
    assert workflow.digest_of([pair]) == "digest of a" != workflow.digest_of([pair, single])
    joined = workflow.join_triggers([pair, single])
    assert joined.names == (*triggers[0].names, *triggers[1].names) and len(joined.similar_group) == 3
    assert all(len(leaf) == 3 for leaf in joined.params) and workflow.join_triggers([pair, black]) is None
    taken = workflow.take_teachers(tiny(pathlib.Path("run"), seeds=2), [pair, single])
    assert taken.per_seed == 3 and taken.variables["params"].tolist() == [0, 1, 0, 0, 1, 0]


def test_teachers_of_several_kinds_answer_in_the_order_of_the_command_line():
    def predict(model, variables, images):
        return np.full((2, len(images), 10), 5.0) + np.asarray(variables["params"])[:, None, None]

    third_party = [opened("c.onnx"), opened("a", make_model("lenet", 10), 2)]
    answers = workflow.ask_teachers(tiny(pathlib.Path("run")), predict, 10, third_party)(
        np.zeros((4, 8, 8, 1), np.uint8)
    )
    assert answers.shape == (3, 4, 10) and answers[:, 0, 0].tolist() == [0, 5, 6]


def test_a_single_teacher_is_named_on_the_command_line_as_before(tmp_path):
    for arguments, expected in [(["--teachers=a"], ("a",)), (["--teachers", "a", "b:c"], ("a", "b:c")), ([], None)]:
        found = read_flags(ta_kd.EXPERIMENT, "", ["--preset=quick", *arguments])
        assert found.teachers == expected
    # The folder of a run on one folder of teachers is named as when there could be no more.
    config = dataclasses.replace(ta_kd.preset("quick", "digits"), teachers=("a",))
    expected = default_name("digits", "quick", {"teachers": "a"})
    assert base.output_folder(ta_kd.EXPERIMENT, config).name == expected
    with pytest.raises(InputError, match="--teachers"):
        workflow.check(dataclasses.replace(config, teachers=("x" * 5000,)))


def test_only_runs_that_leave_networks_have_the_flag_for_their_forms(monkeypatch):
    config = dataclasses.replace(ta_kd.preset("quick", "digits"), export=("onnx",))
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it fails
    with pytest.raises(InputError, match="onnx, which is not installed"):
        workflow.check(config)
    with pytest.raises(InputError, match="leave out one of the two"):
        check_ranges(dataclasses.replace(robust_kd.preset("quick", "digits"), export=("stablehlo",), save_models=False))
    assert not hasattr(vbd.preset("quick", "digits"), "export")


@pytest.mark.slow
def test_a_mixture_of_teachers_and_what_the_run_leaves(finished, tmp_path):
    """A folder of several networks, a saved model and a file of weights, of two architectures."""
    left = finished.folder / "models" / "student"
    assert (finished.folder / "models" / "student-seed-1" / "model.json").is_file()
    assert saved_model.read(left).about.made_by["role"] == "student"
    texts = (str(finished.folder / "teachers" / "seed-0"), str(left), f"{left}/model.safetensors:lenet")
    results = run(tiny(tmp_path / "run", teachers=texts, seeds=1, width=3))
    found = results["agreement"]
    assert found["teachers"] == [*(f"{texts[0]}, network {i}" for i in (1, 2, 3)), *texts[1:]]
    assert found["pairs"][3][4] == 1  # the same network
    page = (tmp_path / "run" / "report.html").read_text()
    assert "models/aggregated, models/student" in page and "Agreement between the teachers" in page
    assert f"--teachers {texts[0]} {texts[1]} {texts[2]}" in page


@pytest.mark.slow
def test_python_functions_as_teachers(tmp_path):
    calls = []

    def by_brightness(images):
        assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
        calls.append(len(images))
        means = images.mean(axis=(1, 2, 3))
        return -np.abs(means[:, None] - np.linspace(0, 1, 10)) * 10  # float64: any float will do

    def always_three(images):
        return np.tile(5 * np.eye(10, dtype=np.float32)[3], (len(images), 1))

    results = run(tiny(tmp_path / "run", seeds=1, teacher_batch=20), classifiers=[by_brightness, always_three])
    roles = ["teachers", "soft vote", "hard vote", "aggregated", "student", "alone"]
    assert [method["method"] for method in results["methods"]] == roles
    assert len(teachers_of(results)) == 2
    assert results["methods"][0]["parameters"] is None
    # The clean rows once and the test rows once, in batches; between them, the first rows again, to see whether answers change.
    assert calls == [20, 20, 5, 8, 20, 20, 20]
    assert (tmp_path / "run" / "report.html").is_file()


def test_logits_of_the_wrong_shape_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"teacher 1 \(.*\) returned logits of shape"):
        run(tiny(tmp_path / "run", seeds=1), classifiers=[lambda images: np.zeros((len(images), 3))])


# ---- What cannot be used --------------------------------------------------------------------------------------------


def refused(message: str, config: workflow.Config) -> None:
    """The run must end with an error of one line, and write nothing."""
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poison_rate": 2.0}, "--poison-rate 2.0 is not above 0 and at most 1"),
        ({"auxiliary_fraction": 0.0}, "--auxiliary-fraction 0.0 is not above 0 and at most 1"),
        ({"provider_fraction": 1.5}, "--provider-fraction 1.5 is not above 0 and at most 1"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0 is not at least 0 and below 1"),
        ({"like": "mnist"}, "--like does not apply to TA-KD"),
        ({"trim": -1}, "--trim -1 is not at least 0"),
        ({"seeds": 0}, "--seeds 0 is not at least 1"),
        ({"seed": -1}, "--seed -1 is not at least 0"),
        ({"target": -1}, "--target -1 is not at least 0"),
        ({"seed": 2**31}, "--seed 2147483648 with 2 seeds is not below 2**31"),
        ({"epochs": 0}, "--epochs 0 is not at least 1"),
        ({"defense_epochs": -1}, "--defense-epochs -1 is not at least 1"),
        ({"batch_size": 0}, "--batch-size 0 is not at least 1"),
        ({"defense_batch_size": -4}, "--defense-batch-size -4 is not at least 1"),
        ({"evaluation_batch_size": 0}, "--evaluation-batch-size 0 is not at least 1"),
        ({"train_rows": -1}, "--train-rows -1 is not at least 0"),
        ({"num_teachers": 0}, "--num-teachers 0 is not at least 1"),
        ({"width": 0}, "--width 0 is not at least 1"),
        ({"views": 0}, "--views 0 is not at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0 is not above 0"),
        ({"temperature": math.nan}, "--temperature nan is not above 0"),
        ({"alpha": 1.5}, "--alpha 1.5 is not at least 0 and at most 1"),
        ({"alpha": -0.1}, "--alpha -0.1 is not at least 0 and at most 1"),
        ({"blend_opacity": (0.3, 0.1)}, "--blend-opacity (0.3, 0.1) is not in increasing order"),
        ({"learning_rate": math.inf}, "--learning-rate inf is not at most 1,000"),
        ({"num_teachers": 10**9}, "--num-teachers 1000000000 is not at most 1,000"),
        ({"teacher_model": "vgg"}, "--teacher-model 'vgg' is not one of"),
    ],
)
def test_settings_out_of_range(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        workflow.check(tiny(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no/such/folder"}, "no such file or folder"),
        ({"target": 10}, "--target 10 is not a class of digits; classes are 0 to 9"),
        ({"poison_rate": 0.001}, "is less than one row"),
        ({"poison_rate": 0.999}, "may be poisoned"),
        ({"auxiliary_fraction": 0.001}, "--auxiliary-fraction 0.001 of 300 rows leaves no clean row"),
        ({"num_similar": 1}, "1 similar triggers among 3 providers"),
        ({"num_similar": 4}, "4 similar triggers among 3 providers"),
        ({"aggregation": "trimmed_mean", "trim": 2}, "--trim 2 at each end leaves no logits of 3 teachers"),
        ({"seeds": 0}, "--seeds 0 is not at least 1"),
    ],
)
def test_settings_that_do_not_fit_the_data_leave_nothing(tmp_path, changes, message):
    refused(message, tiny(tmp_path / "run", **({"seeds": 1} | changes)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "minst"}, "no such dataset, folder or file ("),
        ({"preset": "fast"}, "--preset 'fast' is not one of quick, paper, strong"),
        ({"scale": "big"}, "--scale 'big' is not one of quick, paper"),
        ({"temperature": 0.0}, "--temperature 0.0 is not above 0"),
    ],
)
def test_the_command_line_fails_with_one_line_and_status_2(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(command_line.backend, "set_up", lambda: None)
    with pytest.raises(SystemExit) as stop:
        command_line.run(ta_kd.main, flags(tmp_path / "run", **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert message in error
    assert not list(tmp_path.iterdir())


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


class Hostile:
    def __init__(self, trace: pathlib.Path):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def truncated_mnist(folder):
    for part, count in (("train", 40), ("t10k", 20)):
        images, labels = np.ones((count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    damaged = folder / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:60])
    return {"dataset": "mnist", "data_dir": folder}, "train-images-idx3-ubyte.gz: cannot be read"


def hostile_cifar(folder):
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (place / name).write_bytes(pickle.dumps({b"data": Hostile(folder / "owned"), b"labels": [0]}, 2))
    return {"dataset": "cifar10", "data_dir": folder}, "data_batch_1"


def labels_out_of_range(folder):
    images = np.zeros((20, 8, 8), np.uint8)
    np.savez(folder / "set.npz", images=images, labels=np.arange(20), num_classes=10)
    return {"dataset": str(folder / "set.npz")}, "set.npz, labels: row 10 has"


def pixels_that_are_no_numbers(folder):
    np.savez(folder / "set.npz", images=np.full((20, 8, 8), np.nan), labels=np.arange(20) % 2)
    return {"dataset": str(folder / "set.npz")}, "pixel value nan"


def only_the_target_is_tested(folder):
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(
        folder / "set.npz", train_images=images, train_labels=labels, test_images=images[:3], test_labels=labels[:6:2]
    )
    return {"dataset": str(folder / "set.npz")}, "all 3 test rows are of class 0, the target"


def corrupt_image(folder):
    place = folder / "pictures"
    for name in "ab":
        (place / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8)).save(place / name / f"{i}.png")
    (place / "b" / "2.png").write_bytes((place / "b" / "2.png").read_bytes()[:40])
    return {"dataset": str(place)}, "2.png"


@pytest.mark.parametrize(
    "prepare",
    [
        truncated_mnist,
        hostile_cifar,
        labels_out_of_range,
        pixels_that_are_no_numbers,
        only_the_target_is_tested,
        corrupt_image,
    ],
)
def test_data_that_cannot_be_used(tmp_path, prepare):
    folder = tmp_path / "data"
    folder.mkdir()
    changes, message = prepare(folder)
    refused(message, tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    assert not (folder / "owned").exists()


def test_folders_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refused("file is a file, not a folder; choose another --output", tiny(file, seeds=1))
    refused("file is a file, not a folder; choose another --output", tiny(file / "below", seeds=1))
    others = tmp_path / "others"
    others.mkdir()
    (others / "thesis.tex").write_text("mine")
    refused("others has files (thesis.tex) but no config.json", tiny(others, seeds=1))
    assert contents(tmp_path) == {"file": b"mine", "others/thesis.tex": b"mine"}


def other_images(folder):
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"image_shape": [28, 28, 1]}))
    said = "take images of shape [28, 28, 1]; the data has 10 classes and images of shape [8, 8, 1]"
    return f"{said}; --image-size=28 scales images to 28x28 pixels"


def triggers_for_another_class(folder):
    with np.load(folder / "triggers.npz") as file:
        arrays = dict(file)
    np.savez(folder / "triggers.npz", **(arrays | {"target": np.array(4)}))
    return "these triggers aim at class 4"


@pytest.mark.parametrize("spoil", [other_images, triggers_for_another_class])
def test_teachers_that_cannot_be_used(finished, tmp_path, spoil):
    """`tests/exchange/test_model_folder.py` has every way in which a folder may be damaged."""
    folder = tmp_path / "teachers"
    shutil.copytree(finished.folder / "teachers" / "seed-0", folder)
    message = spoil(folder)
    refused(message, tiny(tmp_path / "run", teachers=(str(folder),)))
    assert not (tmp_path / "run").exists()


# ---- Flags and presets ----------------------------------------------------------------------------------------------


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        ta_kd.main(["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(workflow.Config):
        assert flag(field.name) in output
    # The string below a field in the source is its help.
    files = (inspect.getsourcefile(kind) for kind in workflow.Config.__mro__[:-1])
    source = "".join(pathlib.Path(file).read_text() for file in set(files))
    for field in dataclasses.fields(workflow.Config):
        assert re.search(rf'^    {field.name}: .+ = .+\n    """\S', source, re.MULTILINE), field.name


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_the_paper_to_the_letter(dataset):
    config = ta_kd.preset("paper", dataset)
    paper = {
        "clean_model": "resnet18",
        "teacher_model": "resnet34",
        "aggregated_model": "resnet34",
        "student_model": "resnet18",
        "width": 64,
        "num_teachers": 7,
        "provider_fraction": 0.4,
        "auxiliary_fraction": 0.1,
        "validation_fraction": 0.2,
        "poison_rate": 0.01,
        "poison_rate_of": "all",
        "target": 0,
        "num_similar": 3 if dataset.startswith("cifar") else 0,
        "similarity": 0.75,
        "blend_opacity": None,
        "minimum_contrast": 0.0,
        "train_rows": 0,
        "test_rows": 0,
        "epochs": 15,
        "batch_size": 64,
        "learning_rate": 0.01,
        "keep_last_batch": True,
        "evaluation_batch_size": 128,
        "plateau_factor": 0.5,
        "plateau_patience": 2,
        "plateau_threshold": 1e-3,
        "defense_epochs": 15,
        "defense_batch_size": 64,
        "defense_learning_rate": 0.01,
        "defense_schedule": "plateau",
        "defense_weight_decay": 0.0,
        "temperature": 4.0,
        "alpha": 0.5,
        "direction": "teacher_student",
        "aggregation": "mean",
        "augmentation": "none",
        "views": 1,
        "vote_space": "logits",
        "tie": "lowest",
    }
    assert {name: getattr(config, name) for name in paper} == paper


DEFENDERS = {field.name for field in dataclasses.fields(workflow.Config) if field.name.startswith("defense_")} | {
    "preset", "temperature", "alpha", "direction", "aggregation", "trim", "augmentation", "views"
}  # fmt: skip


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "gtsrb", "mine.npz"])
@pytest.mark.parametrize("scale", ["quick", "paper"])
def test_strong_is_the_same_attack_and_another_defender(dataset, scale):
    plain, strong = ta_kd.preset(scale, dataset), ta_kd.preset("strong", dataset, scale)
    changed = command_line.changed_fields(strong, plain)
    assert changed.keys() <= DEFENDERS
    assert {"aggregation", "augmentation", "views"} <= changed.keys()
    # A mirrored digit is no digit, and a mirrored sign may be another.
    assert strong.augmentation == ("crop_flip" if dataset.startswith("cifar") else "crop")


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "gtsrb", "mine.npz"])
@pytest.mark.parametrize("preset", ["quick", "paper", "strong"])
def test_every_preset_passes_the_check_and_its_flags_give_it_back(dataset, preset):
    config = ta_kd.preset(preset, dataset)
    workflow.check(config)
    choosers = {"preset": None, "dataset": None, "scale": None}
    printed = shlex.split(base.command(ta_kd.EXPERIMENT, dataclasses.replace(config, views=3, keep_last_batch=True)))[
        2:
    ]
    assert command_line.parse(ta_kd.preset, choosers, printed) == dataclasses.replace(
        config, views=3, keep_last_batch=True
    )


def test_the_same_settings_always_find_the_same_folder(tmp_path):
    config = ta_kd.preset("quick", "digits")
    assert base.output_folder(ta_kd.EXPERIMENT, config) == pathlib.Path("runs/ta_kd/digits-quick")
    other = base.output_folder(ta_kd.EXPERIMENT, dataclasses.replace(config, alpha=0.1))
    assert other.name.startswith("digits-quick-")
    assert other == base.output_folder(ta_kd.EXPERIMENT, dataclasses.replace(config, alpha=0.1, data_dir=tmp_path))
    assert base.output_folder(ta_kd.EXPERIMENT, dataclasses.replace(config, output=tmp_path)) == tmp_path
