"""The benchmark of the ensemble engine, run small: its speeds are of no matter here, only that they are there."""

import importlib.util
import json
import pathlib
import shlex
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from bdjax.benchmarking import interleave, operations, report, settings, worker
from bdjax.errors import InputError
from bdjax.models import count_parameters, make_model
from bdjax.models.resnet import BLOCKS
from bdjax.run import command_line
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


def test_operations_of_a_bottleneck_block():
    one = operations.forward_operations("resnet50", 10, 4, (8, 8, 3))
    # The stem and the classifier are small: four times the pixels are nearly four times the work.
    assert 3.9 < operations.forward_operations("resnet50", 10, 4, (16, 16, 3)) / one < 4


# ---- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bench") / "run"
    bench_ensemble.main(flags(output=folder))
    return folder


def test_a_run_measures_every_contender(finished):
    results = json.loads((finished / "results.json").read_text())
    (entry,) = results["settings"]
    contenders = entry["contenders"]
    assert list(contenders) == list(TINY["forms"])
    assert entry["operations_per_image"] == operations.training_operations("resnet10", 10, 2, (4, 4, 1))
    assert results["peak"]["float32"]["operations_per_second"] > 1e8
    for name, images in {"map-shifted": 16, "alone": 8, "pytorch-contiguous": 8}.items():
        outcome = contenders[name]
        if name.startswith("pytorch") and not HAS_TORCH:
            assert outcome["reason"] == "not installed"
            continue
        assert outcome["status"] == "done"
        assert outcome["compile_seconds"] >= 0 and outcome["peak_mebibytes"] > 10
        (turn,) = outcome["turns"]
        assert turn["seconds"] >= 0.01 and turn["work"] > 0 and turn["work"] % images == 0
        # The other's library would count as this one's memory.
        assert list(outcome["versions"]) == (["torch"] if name.startswith("pytorch") else ["jax"])


def test_a_run_leaves_tables_and_a_picture(finished):
    table = (finished / "table.md").read_text()
    for name in TINY["forms"]:
        assert name in table
    assert "resnet10 width 2 at 4x4x1" in table
    record = json.loads((finished / "config.json").read_text())
    assert record["experiment"] == "bench_ensemble" and record["config"]["rounds"] == 1
    with Image.open(finished / "throughput.png") as picture:
        assert min(picture.size) > 100


def test_the_same_command_goes_on_and_another_is_refused(finished, capsys):
    before = (finished / "results.json").read_bytes()
    bench_ensemble.main(flags(output=finished))
    assert "done before" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before
    with pytest.raises(InputError, match="rounds 1 -> 2"):
        bench_ensemble.main(flags(output=finished, rounds=2))


def test_a_contender_over_the_limit_is_reported_with_its_bound(tmp_path):
    limit = 1e-6  # no epoch is that quick
    changes = {"members": (1, 2), "forms": ("map-shifted",), "time_limit": limit}
    results = bench_ensemble.main(flags(output=tmp_path / "run", **changes))
    first, second = (entry["contenders"]["map-shifted"] for entry in results["settings"])
    assert first["status"] == second["status"] == "slow"
    assert first["images_per_second_below"] == pytest.approx(8 / limit)
    assert second["images_per_second_below"] == pytest.approx(16 / limit)
    assert "versions" in first and "versions" not in second  # the second was not even started
    table = (tmp_path / "run" / "table.md").read_text()
    assert "&lt; 8,000,000" in table and "an epoch takes over 1e-06 s" in table
    assert "with 1 member already; not run" in table
    assert results["peak"]["float32"]["operations_per_second"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": (0,)}, "--members 0 is not within 1 and 35"),
        ({"members": (36,)}, "--members 36 is not within 1 and 35"),
        ({"widths": (0,)}, "--widths 0 is not at least 1"),
        ({"shapes": ("8x8",)}, "--shapes '8x8' is not height x width x channels"),
        ({"shapes": ("0x8x1",)}, "--shapes '0x8x1' is not height x width x channels"),
        ({"rows": 10}, "--rows 10 is not a multiple of --batch-size 4"),
        ({"rounds": 0}, "--rounds 0 is not at least 1"),
        ({"seconds_per_turn": -1.0}, "--seconds-per-turn -1 is not above 0"),
        ({"time_limit": 0.0}, "--time-limit 0 is not above 0"),
        ({"model": "vgg"}, "--model 'vgg' is not one of resnet10"),
        ({"forms": ("map-*", "tensorflow")}, "--forms 'tensorflow' matches none of vmap-native"),
        ({"forms": ("alone", "!alone")}, "leaves no contender"),
        ({"preset": "slow"}, "--preset 'slow' is not one of quick, full, gpu"),
    ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        bench_ensemble.main(flags(output=tmp_path / "run", **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- Who takes part -------------------------------------------------------------------------------------------------


def test_presets_make_the_grid():
    quick = bench_ensemble.grid(bench_ensemble.preset("quick"))
    assert [setting.members for setting in quick] == [1, 2, 7, 14, 35, 2, 7, 2, 7]
    assert {setting.rows for setting in quick} == {512}
    assert len(bench_ensemble.grid(bench_ensemble.preset("full"))) == 6 * 3 * 4
    gpu = bench_ensemble.grid(bench_ensemble.preset("gpu"))
    assert [(setting.model, setting.width, setting.compute_dtype) for setting in gpu] == [
        ("resnet34", 64, "float32"),
        ("resnet34", 64, "bfloat16"),
    ]


def test_forms_are_chosen_by_pattern():
    forms = settings.all_forms(has_gpu=False)
    assert settings.choose(forms, ()) == forms
    assert settings.choose(forms, ("*-shifted", "!vmap-*"))[0] == "map-shifted"
    assert "alone" not in settings.choose(forms, ("!alone",))
    assert "pytorch-compiled-graphs" in settings.all_forms(has_gpu=True)


def test_contenders_that_train_more_models_than_asked_for_are_left_out(monkeypatch):
    monkeypatch.setattr(settings, "num_cores", lambda: 4)
    assert settings.that_fit(SETTING, ("map-shifted", "alone", "pytorch-contiguous-per-core")) == (
        "map-shifted",
        "alone",
    )


def test_every_round_starts_with_another():
    assert [interleave.rotate("abc", number) for number in range(4)] == [*map(tuple, ("abc", "bca", "cab", "abc"))]


def test_a_contender_that_fails_says_why_and_the_others_go_on():
    broken = settings.describe(SETTING, "alone") | {"layout": "sideways"}
    with interleave.Stable() as stable:
        schedule = interleave.Schedule(1, 0.01, 60.0, 60.0)
        outcomes = stable.race({"broken": broken, "good": settings.describe(SETTING, "map-shifted")}, schedule)
    assert outcomes["broken"]["status"] == "failed"
    assert outcomes["broken"]["reason"].startswith("ValueError: layout 'sideways' is not one of")
    assert outcomes["good"]["status"] == "done" and len(outcomes["good"]["turns"]) == 1


def test_without_pytorch_the_table_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(worker.UnavailableError, match="^not installed$"):
        worker.make_contender(settings.describe(SETTING, "pytorch-contiguous"))


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
    assert rows["vmap-native"][3] == "< 40" and rows["vmap-native"][-1] == "an epoch takes over 5 s"
    assert rows["pytorch-compiled"][3] is None and rows["pytorch-compiled"][-1] == "no compiler"
    figure = report.throughput(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["resnet10 width 2 at 4x4x1"]


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

    def put(layer: Any, own: dict[str, Any]) -> None:
        with torch.no_grad():
            if "scale" in own:
                layer.weight.copy_(torch.tensor(np.asarray(own["scale"])))
            else:
                kernel = np.asarray(own["kernel"])
                layer.weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T))
            if "bias" in own:
                layer.bias.copy_(torch.tensor(np.asarray(own["bias"])))

    for part in ("stem_conv", "stem_norm", "classifier"):
        put(getattr(peer, part), params[part])
    names = [f"stage{stage + 1}_block{i + 1}" for stage, count in enumerate(BLOCKS[name][1]) for i in range(count)]
    for block, block_name in zip(peer.blocks, names, strict=True):
        own = params[block_name]
        for index, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            put(conv, own[f"Conv_{index}"])
            put(norm, own[f"BatchNorm_{index}"])
        assert block.has_shortcut == ("shortcut_conv" in own)
        if block.has_shortcut:
            put(block.shortcut_conv, own["shortcut_conv"])
            put(block.shortcut_norm, own["shortcut_norm"])
    images = np.random.default_rng(0).random((5, 8, 8, 3), dtype=np.float32)
    expected = jax.jit(lambda variables, images: ours.apply(variables, images, train=True).logits)(variables, images)
    logits = peer.train()(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
