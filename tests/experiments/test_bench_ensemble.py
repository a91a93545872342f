"""The benchmark of the ensemble engine on tiny networks: its speeds do not matter here, only that they are measured."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import shlex
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bdjax.benchmarking import contenders, interleave, learning, report, settings, worker
from bdjax.errors import InputError
from bdjax.models import count_parameters, make_model, operations
from bdjax.models.resnet import BLOCKS
from bdjax.run import command_line
from bdjax.testing.tiny_network import make_tiny
from bdjax.training.member import Rows, TrainConfig, make_epoch, resume_from
from bdjax.training.stages import cross_entropy_of
from experiments import bench_ensemble

HAS_TORCH = importlib.util.find_spec("torch") is not None
TINY = {
    "preset": "quick",
    "model": "resnet10",
    "shapes": ("4x4x1",),
    "widths": (2,),
    "members": (2,),
    "batch_size": 4,
    "rows": 8,
    "rounds": 1,
    "seconds_per_turn": 0.01,
    "time_limit": 60.0,
    "compile_limit": 300.0,
    "forms": ("map-shifted", "alone", "pytorch-contiguous"),
}
SETTING = settings.Setting("resnet10", (4, 4, 1), 2, "float32", 2, 8, 4)


def flags(**changes: Any) -> list[str]:
    return shlex.split(command_line.as_flags(TINY | changes))


# ---- What is counted ------------------------------------------------------------------------------------------------


def test_operations_are_those_counted_by_hand():
    stem = 16 * 9 * 1 * 2
    stage1 = 2 * (16 * 9 * 2 * 2)
    stage2 = 4 * 9 * 2 * 4 + 4 * 9 * 4 * 4 + 4 * 2 * 4  # two convolutions and the shortcut, on 2x2
    stage3 = 9 * 4 * 8 + 9 * 8 * 8 + 4 * 8
    multiplications = stem + stage1 + stage2 + stage3 + 8 * 3
    assert operations.forward_operations("resnet10", 3, 2, (4, 4, 1)) == 2 * multiplications
    assert operations.training_operations("resnet10", 3, 2, (4, 4, 1)) == 6 * multiplications


def test_operations_of_bottleneck_blocks_are_those_counted_by_hand():
    multiplications, channels, side = 64 * 9 * 3 * 4, 4, 8
    for stage, count in enumerate(BLOCKS["resnet50"][1]):
        width = 4 * 2**stage
        for number in range(count):
            before, side = side, side // 2 if stage and not number else side
            multiplications += before**2 * channels * width + side**2 * (9 * width * width + width * 4 * width)
            multiplications += side**2 * channels * 4 * width if not number else 0  # the shortcut
            channels = 4 * width
    assert operations.forward_operations("resnet50", 10, 4, (8, 8, 3)) == 2 * (multiplications + channels * 10)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


class FakeWorker:
    """Replies like a worker, without a process: an epoch takes 0.02 s, and contenders in `broken` fail at their first turn."""

    started: list[str] = []
    broken: set[str] = set()

    def __init__(self, spec: dict[str, Any], scratch: pathlib.Path | None = None, *, own_session: bool = True) -> None:
        self.spec = spec
        self.started.append(spec.get("name", f"matmul {spec['library']}"))

    def receive(self, limit: float) -> dict[str, Any]:
        return {"versions": {self.spec["library"]: "1.0"}}

    def request(self, limit: float, **request: Any) -> dict[str, Any]:
        if request["do"] == "compile":
            return {"compile_seconds": 0.5}
        if request["do"] == "memory":
            return {"peak_mebibytes": 20.0}
        if request["do"] == "accuracy":
            self.epochs = getattr(self, "epochs", 0) + 1
            return {"accuracies": [0.2 * self.epochs] * 2}
        if self.spec.get("name") in self.broken:
            raise interleave.FailedError("ValueError: no such layout")
        if limit < 0.02:
            raise interleave.TooLongError
        return {
            "seconds": max(0.02, request["seconds"]),
            "work": self.spec.get("members", 1) * self.spec.get("rows", 1),
        }

    def end(self) -> None:
        pass


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(interleave, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(FakeWorker, "broken", set())
    return FakeWorker


def test_a_run_leaves_tables_and_a_picture_and_resumes(workers, tmp_path, capsys):
    folder = tmp_path / "run"
    results = bench_ensemble.main(flags(output=folder, rounds=2))
    assert json.loads((folder / "results.json").read_text()) == results
    (entry,) = results["settings"]
    assert list(entry["contenders"]) == list(TINY["forms"])
    assert entry["operations_per_image"] == operations.training_operations("resnet10", 10, 2, (4, 4, 1))
    for name, images in {"map-shifted": 16, "alone": 8, "pytorch-contiguous": 8}.items():
        outcome = entry["contenders"][name]
        assert outcome["turns"] == [{"seconds": 0.02, "work": images}] * 2
        assert (outcome["status"], outcome["first_seconds"], outcome["peak_mebibytes"]) == ("done", 0.02, 20.0)
    assert results["peak"]["float32"]["operations_per_second"] == 1 / 0.02
    table = (folder / "table.md").read_text()
    assert all(name in table for name in TINY["forms"]) and "resnet10 width 2 at 4x4x1" in table
    record = json.loads((folder / "config.json").read_text())
    assert record["experiment"] == "bench_ensemble" and record["config"]["rounds"] == 2
    with Image.open(folder / "throughput.png") as picture:
        assert min(picture.size) > 100

    before, started = (folder / "results.json").read_bytes(), len(workers.started)
    bench_ensemble.main(flags(output=folder, rounds=2))
    assert "restored from results.json" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before and len(workers.started) == started
    with pytest.raises(InputError, match="rounds 2 -> 3"):
        bench_ensemble.main(flags(output=folder, rounds=3))


def test_a_contender_over_the_limit_is_reported_with_its_bound(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_ensemble.plots, "save", lambda figure, path: path)
    monkeypatch.setattr(operations, "training_operations", lambda *_: 1)
    changes = {"members": (1, 2), "forms": ("map-shifted",), "time_limit": 0.01}
    results = bench_ensemble.main(flags(output=tmp_path / "run", **changes))
    first, second = (entry["contenders"]["map-shifted"] for entry in results["settings"])
    assert first["status"] == second["status"] == "slow"
    assert first["images_per_second_below"] == pytest.approx(8 / 0.01)
    assert second["images_per_second_below"] == pytest.approx(16 / 0.01)
    assert "versions" in first and "versions" not in second and workers.started.count("map-shifted") == 1
    table = (tmp_path / "run" / "table.md").read_text()
    assert "&lt; 800" in table and "| an epoch takes more than 0.01 s" in table
    assert "not run: an epoch takes more than 0.01 s even with 1 member" in table
    assert results["peak"]["float32"]["operations_per_second"] is None


def test_a_failing_contender_gives_the_reason_and_the_others_continue(workers):
    workers.broken.add("alone")
    specs = {name: settings.describe(SETTING, name) for name in ("alone", "map-shifted")}
    with interleave.WorkerPool() as pool:
        outcomes = pool.race(specs, interleave.Schedule(1, 0.01, 60.0, 60.0))
    assert (outcomes["alone"]["status"], outcomes["alone"]["turns"]) == ("failed", [])
    assert outcomes["alone"]["reason"] == "ValueError: no such layout"
    assert outcomes["map-shifted"]["status"] == "done" and len(outcomes["map-shifted"]["turns"]) == 1


def test_a_contender_that_settings_share_is_started_once(workers):
    specs = {name: settings.describe(SETTING, name) for name in ("alone", "map-shifted")}
    with interleave.WorkerPool() as pool:
        pool.race(specs, interleave.Schedule(1, 0.01, 60.0, 60.0), keep=[specs["alone"]])
        pool.race(specs, interleave.Schedule(1, 0.01, 60.0, 60.0))
    assert workers.started == ["alone", "map-shifted", "map-shifted"]


def replies(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    written = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), written)
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_worker_compiles_trains_and_measures_its_memory(monkeypatch):
    monkeypatch.setattr(contenders, "make_model", lambda name, num_classes, *_: make_tiny(num_classes))
    requests = {"do": "compile"}, {"do": "turn", "seconds": 0.01}, {"do": "memory"}
    started, compiled, turn, memory = replies(settings.describe(SETTING, "map-shifted"), *requests)
    assert started["versions"]["jax"] == jax.__version__ and compiled["compile_seconds"] > 0
    assert turn["seconds"] >= 0.01 and turn["work"] > 0 and turn["work"] % 16 == 0
    assert memory["peak_mebibytes"] > 10


def test_a_worker_replies_with_its_error_and_ends():
    (reply,) = replies(settings.describe(SETTING, "alone") | {"model": "vgg"}, {"do": "compile"})
    assert reply["error"].startswith("InputError: ") and "vgg" in reply["error"]


@pytest.mark.slow
def test_contenders_run_in_their_own_processes(tmp_path):
    images_of = {"map-shifted": 16, "pytorch-contiguous": 8}
    bench_ensemble.main(flags(output=tmp_path / "run", forms=tuple(images_of)))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (entry,) = results["settings"]
    assert results["peak"]["float32"]["operations_per_second"] > 1e8
    for name, images in images_of.items():
        outcome = entry["contenders"][name]
        if name.startswith("pytorch") and not HAS_TORCH:
            assert outcome["reason"] == "PyTorch is not installed"
            continue
        assert outcome["status"] == "done"
        assert outcome["compile_seconds"] >= 0 and outcome["peak_mebibytes"] > 10
        (turn,) = outcome["turns"]
        assert turn["seconds"] >= 0.01 and turn["work"] > 0 and turn["work"] % images == 0
        # A library of another contender would count as memory of this one.
        assert list(outcome["versions"]) == (["torch"] if name.startswith("pytorch") else ["jax"])


@pytest.mark.slow
def test_a_process_that_fails_or_is_too_slow_is_ended():
    broken = settings.describe(SETTING, "alone") | {"layout": "sideways"}
    slow = settings.describe_matmul("jax", "float32")
    with interleave.WorkerPool() as pool:
        outcomes = pool.race({"broken": broken, "slow": slow}, interleave.Schedule(1, 0.01, 1e-6, 60.0))
        assert not pool._workers
    assert outcomes["broken"]["status"] == "failed"
    assert outcomes["broken"]["reason"].startswith("ValueError: layout 'sideways' is not one of")
    assert outcomes["slow"]["status"] == "slow" and outcomes["slow"]["turns"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": (0,)}, "--members (0,) has the entry 0, which is not at least 1 and at most 35"),
        ({"members": (36,)}, "--members (36,) has the entry 36, which is not at least 1 and at most 35"),
        ({"widths": (0,)}, "--widths (0,) has the entry 0, which is not at least 1"),
        ({"shapes": ("8x8",)}, "--shapes '8x8' must be height x width x channels"),
        ({"shapes": ("0x8x1",)}, "--shapes '0x8x1' must be height x width x channels"),
        ({"rows": 10}, "--rows 10 must be a multiple of --batch-size 4"),
        ({"rounds": 0}, "--rounds 0 is not at least 1"),
        ({"seconds_per_turn": -1.0}, "--seconds-per-turn -1.0 is not above 0"),
        ({"time_limit": 0.0}, "--time-limit 0.0 is not above 0"),
        ({"model": "vgg"}, "--model 'vgg' is not one of resnet10"),
        ({"forms": ("map-*", "tensorflow")}, "--forms 'tensorflow' matches none of vmap-native"),
        ({"forms": ("alone", "!alone")}, "excludes every contender"),
        ({"preset": "slow"}, "--preset 'slow' is not one of quick, full, gpu"),
        ({"target_accuracy": 1.0}, "--target-accuracy 1.0 is not above 0 and below 1"),
        ({"dataset": "digits"}, "--dataset digits needs the speed-run network on such images"),
        ({"dataset": "digits", "train_rows": 5000}, "--train-rows 5000: digits has 1438 training rows"),
        ({"dataset": "nothing"}, "'nothing': no such dataset"),
    ],
)
def test_invalid_flags_give_an_error_of_one_line(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        bench_ensemble.main(flags(output=tmp_path / "run", **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- Contenders -----------------------------------------------------------------------------------------------------


def test_presets_make_the_grid():
    quick = bench_ensemble.grid(bench_ensemble.preset("quick"))
    assert [setting.members for setting in quick] == [1, 2, 7, 14, 35, 2, 7, 2, 7, 2, 7]
    assert [setting.batch_size for setting in quick] == [64] * 9 + [128] * 2
    assert {setting.model for setting in quick[9:]} == {"speedrun"}
    assert {setting.rows for setting in quick} == {512}
    assert len(bench_ensemble.grid(bench_ensemble.preset("full"))) == 6 * 3 * 4
    gpu = bench_ensemble.grid(bench_ensemble.preset("gpu"))
    assert [(setting.model, setting.width, setting.compute_dtype) for setting in gpu] == [
        ("resnet34", 64, "float32"),
        ("speedrun", 64, "float32"),
        ("resnet34", 64, "bfloat16"),
        ("speedrun", 64, "bfloat16"),
    ]


def test_forms_are_chosen_by_pattern():
    forms = settings.all_forms(has_gpu=False)
    assert settings.choose(forms, ()) == forms
    assert settings.choose(forms, ("*-shifted", "!vmap-*"))[0] == "map-shifted"
    assert "alone" not in settings.choose(forms, ("!alone",))
    assert "pytorch-compiled-graphs" in settings.all_forms(has_gpu=True)


def test_contenders_that_train_more_models_than_members_are_left_out(monkeypatch):
    monkeypatch.setattr(settings, "num_cores", lambda: 4)
    assert settings.fitting_forms(SETTING, ("map-shifted", "alone", "pytorch-contiguous-per-core")) == (
        "map-shifted",
        "alone",
    )


def test_every_round_starts_with_another_contender():
    assert [interleave.rotate("abc", number) for number in range(4)] == [*map(tuple, ("abc", "bca", "cab", "abc"))]


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_the_peer_of_the_speed_run_network_takes_the_same_step():
    """Logits before, and after a step of the recipe; weights are ours, transposed."""
    import torch

    from bdjax.benchmarking import peer_pytorch

    setting = dataclasses.replace(SETTING, model="speedrun", shape=(12, 12, 3), width=4, batch_size=8)
    spec = settings.describe(setting, "pytorch-contiguous")
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)
    labels = np.arange(8, dtype=np.int32) % settings.NUM_CLASSES
    model = make_model("speedrun", settings.NUM_CLASSES, setting.width, "native")
    config = dataclasses.replace(TrainConfig(1, 8), **spec["recipe"] | {"schedule": "constant"})
    variables = model.init(jax.random.key(0), setting.shape)
    state = resume_from(variables, jax.random.key(1), config)
    rows = Rows(jnp.arange(8, dtype=jnp.int32), {"labels": jnp.asarray(labels)})
    none = Rows(rows.index[:0], {"labels": rows.targets["labels"][:0]})
    epoch = jax.jit(make_epoch(model, cross_entropy_of(config), config))
    trained = epoch(state, rows, none, jnp.asarray(images)).variables

    peer = peer_pytorch.Training(spec, images, labels)
    kernels = [("whitening", peer.network.whitening), ("classifier", peer.network.classifier)]
    convolutions = [layer for layer in peer.network.blocks if isinstance(layer, torch.nn.Conv2d)]
    names = [f"stage{stage}_conv{number}" for stage in (1, 2, 3) for number in (1, 2)]
    with torch.no_grad():
        for name, layer in [*kernels, *zip(names, convolutions, strict=True)]:
            source = variables["batch_stats"] if name == "whitening" else variables["params"]
            kernel = np.asarray(source[name]["kernel"])
            layer.weight.copy_(torch.tensor(kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)))
        offset = np.asarray(variables["batch_stats"]["whitening"]["offset"])
        peer.network.whitening.bias.copy_(torch.tensor(offset))
    peer.step(torch.arange(8))
    for name, layer in zip(names, convolutions, strict=True):
        before, after = (np.asarray(tree["params"][name]["kernel"]) for tree in (variables, trained))
        theirs = layer.weight.detach().numpy().transpose(2, 3, 1, 0)
        # Rounding may change which of two nearly equal pixels a maximum takes, so single weights may differ more.
        assert np.linalg.norm(theirs - after) < 0.02 * np.linalg.norm(after - before), name


def test_without_pytorch_its_contenders_are_unavailable(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(worker.UnavailableError, match="^PyTorch is not installed$"):
        worker.make_contender(settings.describe(SETTING, "pytorch-contiguous"))


# ---- Whole trainings ------------------------------------------------------------------------------------------------

LEARNING = {"model": "speedrun", "shapes": ("8x8x1",), "dataset": "digits", "train_rows": 64, "epochs": 5}


def test_the_fastest_form_of_each_library_is_trained_to_the_end(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "num_cores", lambda: 2)
    specs = []
    monkeypatch.setattr(
        FakeWorker, "__init__", lambda self, spec, *_, **__: (setattr(self, "spec", spec), specs.append(spec))[0]
    )
    results = bench_ensemble.main(flags(output=tmp_path / "run", **LEARNING))
    learned = results["learning"]
    assert (learned["dataset"], learned["rows"], learned["target_accuracy"]) == ("digits", 64, 0.85)
    assert list(learned["contenders"]) == ["map-shifted, float32", "pytorch-contiguous, float32"]
    for outcome in learned["contenders"].values():
        assert outcome["status"] == "done" and len(outcome["epochs"]) == 5
        spec = outcome["specification"]
        assert (spec["rows"], spec["epochs"], spec["num_classes"]) == (64, 5, 10) and "data" not in spec
        assert spec["augmentation"] == "reflect"  # a mirrored digit is another
        assert learning.seconds_to(outcome, 0.85) == pytest.approx(5 * 0.02)
    table = (tmp_path / "run" / "table.md").read_text()
    assert "**Time to an accuracy of 0.85**" in table and "on 64 rows of digits" in table
    started = len(specs)
    assert bench_ensemble.main(flags(output=tmp_path / "run", **LEARNING)) == results
    assert len(specs) == started


def test_a_contender_that_fails_does_not_end_the_training_of_the_others(workers):
    workers.broken.add("alone")
    specs = {name: settings.describe(SETTING, name) | {"epochs": 2} for name in ("alone", "map-shifted")}
    with interleave.WorkerPool() as pool:
        outcomes = pool.learn(specs, 60.0)
        assert not pool._workers
    assert (outcomes["alone"]["status"], outcomes["alone"]["epochs"]) == ("failed", [])
    assert outcomes["map-shifted"]["status"] == "done" and len(outcomes["map-shifted"]["epochs"]) == 2
    learned = {"dataset": "digits", "rows": 8, "target_accuracy": 0.3, "contenders": outcomes}
    failed, done = learning.table(learned).rows
    assert failed == ("alone", None, 0, None, None, None, None, None, "0.5", "ValueError: no such layout")
    assert done == ("map-shifted", 2, 2, "0.400", "0.400", "0", 800, "0", "0.5", "")


def test_the_time_to_an_accuracy_is_to_the_end_of_the_first_epoch_that_has_it():
    outcome = {"epochs": [{"seconds": 2.0, "accuracies": [0.9, 0.5]}, {"seconds": 3.0, "accuracies": [0.9, 0.7]}]}
    assert learning.seconds_to(outcome, 0.7) == 2.0
    assert learning.seconds_to(outcome, 0.8) == 5.0
    assert learning.seconds_to(outcome, 0.9) is None


def spec_of_halves(tmp_path: pathlib.Path, form: str, epochs: int = 4) -> dict[str, Any]:
    """Rows whose upper half is bright in class 1, and the lower half in class 0."""
    random = np.random.default_rng(0)
    labels = (np.arange(480) % 2).astype(np.int32)
    images = random.integers(0, 60, (480, 12, 12, 3), dtype=np.uint8)
    images[labels == 1, :6] += 150
    images[labels == 0, 6:] += 150
    path = tmp_path / "rows.npz"
    np.savez(path, images=images, labels=labels, test_images=images[:32], test_labels=labels[:32])
    setting = dataclasses.replace(SETTING, model="speedrun", shape=(12, 12, 3), width=4, batch_size=16, rows=480)
    return settings.describe(setting, form) | {"data": str(path), "epochs": epochs, "augmentation": "reflect_flip"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["map-shifted", "pytorch-channels-last"])
def test_a_worker_learns_the_rows_of_a_file(tmp_path, form):
    if form.startswith("pytorch") and not HAS_TORCH:
        pytest.skip("PyTorch is not installed")
    requests = {"do": "turn", "seconds": 0.0}, {"do": "accuracy"}
    spec = spec_of_halves(tmp_path, form)
    answers = replies(spec, *requests * spec["epochs"])
    members = spec["members"]
    assert [answer["work"] for answer in answers[1::2]] == [480 * members] * spec["epochs"]
    last = answers[-1]["accuracies"]
    assert len(last) == members and min(last) > 0.9


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_the_peer_starts_and_is_scheduled_as_ours(tmp_path):
    from bdjax.benchmarking import peer_pytorch
    from bdjax.models import speedrun
    from bdjax.training.member import triangle_at

    spec = spec_of_halves(tmp_path, "pytorch-contiguous")
    with np.load(spec["data"]) as rows:
        images, labels = rows["images"], rows["labels"]
    peer = peer_pytorch.Training(spec, images, labels)
    model = make_model("speedrun", settings.NUM_CLASSES, 4, "native")
    ours = speedrun.whiten(model.init(jax.random.key(0), (12, 12, 3)), jnp.asarray(images, jnp.float32) / 255)
    whitened = ours["batch_stats"]["whitening"]
    x = np.random.default_rng(1).random((2, 12, 12, 3), dtype=np.float32)
    expected = jax.lax.conv_general_dilated(
        x, whitened["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = np.asarray(expected) + np.asarray(whitened["offset"])
    found = peer.network.whitening(peer_pytorch.torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    # The order and the signs of eigenvectors are arbitrary; both signs are filters.
    moments = [np.sort(np.abs(values).reshape(-1, 24).mean(axis=0)) for values in (expected, found.detach().numpy())]
    np.testing.assert_allclose(*moments, rtol=2e-2)
    config = TrainConfig(1, 16)
    for progress in (0.0, 0.1, 0.23, 0.5, 1.0):
        assert peer_pytorch._triangle(progress) == pytest.approx(
            float(triangle_at(jnp.float32(progress), config)), abs=1e-6
        )
    kernel = peer.network.blocks[0].weight.detach().numpy()
    np.testing.assert_array_equal(kernel[:4, :4, 1, 1], np.eye(4))


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_the_peer_shifts_and_mirrors_as_ours():
    from bdjax.benchmarking import peer_pytorch

    torch = peer_pytorch.torch
    image = np.arange(32 * 32, dtype=np.int64).reshape(32, 32, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifted = [padded[i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
    views = {"reflect": shifted, "reflect_flip": shifted + [np.ascontiguousarray(view[:, ::-1]) for view in shifted]}
    for kind, expected in views.items():
        found = peer_pytorch._augmented(torch.tensor(image).repeat(2000, 1, 1, 1), kind, True).numpy()
        assert {np.ascontiguousarray(each).tobytes() for each in found} == {each.tobytes() for each in expected}


# ---- The tables -----------------------------------------------------------------------------------------------------


def made_up(members: int) -> dict[str, Any]:
    def outcome(*speeds: float) -> dict[str, Any]:
        return {"status": "done", "turns": [{"seconds": 2.0, "work": 2 * speed} for speed in speeds]}

    slow = {"status": "slow", "turns": [], "limit": 5.0, "images_per_second_below": 40.0}
    return {
        "setting": settings.Setting("resnet10", (4, 4, 1), 2, "float32", members, 8, 4).key,
        "operations_per_image": 10**6,
        "contenders": {
            "vmap-native": slow,
            "map-shifted": outcome(900, 1000, 1100),
            "alone": outcome(500, 400, 600),
            "pytorch-contiguous": outcome(300, 100, 200),
            "pytorch-compiled": {"status": "failed", "turns": [], "reason": "no compiler"},
        },
    }


def test_tables_have_medians_ratios_and_bounds():
    peak = {"operations_per_second": 4e9, "library": "jax", "contenders": {}}
    results = {"peak": {"float32": peak}, "settings": [made_up(2), made_up(7)]}
    summary = report.summary_table(results).rows[0]
    assert summary[1:] == (2, "map-shifted", 1000, "contiguous", 200, "5.00", "3.00", "2.00")
    rows = {row[2]: row for row in report.details_table(results).rows}
    assert rows["map-shifted"][3:9] == (1000, 900, 1100, "5.00", "1.0", "25.0 %")
    assert rows["vmap-native"][3] == "< 40" and rows["vmap-native"][-1] == "an epoch takes more than 5 s"
    assert rows["pytorch-compiled"][3] is None and rows["pytorch-compiled"][-1] == "no compiler"
    figure = report.throughput(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["resnet10 width 2 at 4x4x1"]


@pytest.mark.parametrize("speeds", [(2400, 4600), (300, 900), (40, 70000)], ids=str)
def test_the_speeds_of_the_picture_can_be_read(speeds):
    entries = [made_up(2), made_up(7)]
    for entry in entries:
        entry["contenders"] = {
            name: {"status": "done", "turns": [{"seconds": 1.0, "work": speed}]}
            for name, speed in zip(("map-shifted", "alone"), speeds, strict=True)
        }
    figure = report.throughput({"settings": entries})
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    read = [tick for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
    assert len(read) >= 2


# ---- The peer -------------------------------------------------------------------------------------------------------


def peer_and_ours(name: str) -> tuple[Any, Any, Any]:
    pytest.importorskip("torch")
    from bdjax.benchmarking import peer_pytorch

    kind, blocks = BLOCKS[name]
    return peer_pytorch.ResNet(kind, blocks, 4, 10, 3), make_model(name, 10, 4, "native"), peer_pytorch


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_peer_has_as_many_parameters(name):
    peer, ours, _ = peer_and_ours(name)
    assert sum(parameter.numel() for parameter in peer.parameters()) == count_parameters(ours, (8, 8, 3))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_peer_gives_the_same_logits_with_our_weights(name):
    peer, ours, peer_pytorch = peer_and_ours(name)
    torch = peer_pytorch.torch
    variables = jax.jit(ours.init, static_argnums=1)(jax.random.key(0), (8, 8, 3))
    params = variables["params"]

    def put(layer: Any, weights: dict[str, Any]) -> None:
        with torch.no_grad():
            if "scale" in weights:
                layer.weight.copy_(torch.tensor(np.asarray(weights["scale"])))
            else:
                kernel = np.asarray(weights["kernel"])
                layer.weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T))
            if "bias" in weights:
                layer.bias.copy_(torch.tensor(np.asarray(weights["bias"])))

    for part in ("stem_conv", "stem_norm", "classifier"):
        put(getattr(peer, part), params[part])
    names = [f"stage{stage + 1}_block{i + 1}" for stage, count in enumerate(BLOCKS[name][1]) for i in range(count)]
    for block, block_name in zip(peer.blocks, names, strict=True):
        weights = params[block_name]
        for index, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            put(conv, weights[f"Conv_{index}"])
            put(norm, weights[f"BatchNorm_{index}"])
        assert block.has_shortcut == ("shortcut_conv" in weights)
        if block.has_shortcut:
            put(block.shortcut_conv, weights["shortcut_conv"])
            put(block.shortcut_norm, weights["shortcut_norm"])
    images = np.random.default_rng(0).random((5, 8, 8, 3), dtype=np.float32)
    expected = jax.jit(lambda variables, images: ours.apply(variables, images, train=True).logits)(variables, images)
    logits = peer.train()(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
