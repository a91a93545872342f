"""experiments/attack.py from the command line to the files that it leaves."""

import dataclasses
import json
import pathlib
import shlex
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bdjax.attacks.registry import ATTACKS
from bdjax.commands import attack
from bdjax.datasets.npz import load_npz
from bdjax.errors import InputError
from bdjax.reporting import attacks
from bdjax.run import command_line
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, PoisonedDataset
from bdjax.workflows import attack as workflow
from bdjax.workflows import base

TINY: dict[str, Any] = {
    "attack": "badnets,ckd,badnets+sig",
    "seeds": 2,
    "costly_seeds": 1,
    "model": "lenet",
    "width": 2,
    "train_rows": 300,
    "test_rows": 60,
    "epochs": 2,
    "controlled_epochs": 1,
    "fine_tuning_epochs": 1,
    "layout": "map",
    "lowering": "shifted",
    "change": ("ckd.steps=5", "sig.poison_rate=0.05"),
}


def run(config: workflow.Config) -> dict[str, Any]:
    return workflow.run(config, attack.EXPERIMENT)


def tiny(output: pathlib.Path, **changes: Any) -> workflow.Config:
    return dataclasses.replace(attack.preset("quick", "digits"), output=output, **(TINY | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run of `tiny()`, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "attack"
    run(tiny(folder))
    return folder


class TestRun:
    def test_leaves_numbers_of_every_attack_and_seed(self, finished):
        results = json.loads((finished / "results.json").read_text())
        names = [(attack["base"], attack["with"]) for attack in results["attacks"]]
        assert names == [("badnets", []), ("ckd", []), ("badnets", ["sig"]), ("sig", ["badnets"])]
        assert [len(cell["by_seed"]) for cell in results["cells"]] == [2, 1, 2, 2]
        assert results["seeds"] == [0, 1] and results["test_rows"] == 60
        for cell in results["cells"]:
            assert set(cell["summary"]) == set(attacks.NUMBERS)
            for row in cell["by_seed"]:
                assert 0 <= row["asr"] <= 1 and 0 <= row["cda"] <= 1 and row["psnr"] > 0 and row["ssim"] <= 1
                assert row["asr"] + row["r_acc"] <= 1 + 1e-9

    def test_leaves_a_table_pictures_and_a_report(self, finished):
        table = (finished / "table.md").read_text()
        assert "| BadNets" in table and "SIG, beside BadNets" in table and "no attack" in table
        for name in ("gallery.png", "success.png", "report.html", "timings.json", "engine.json", "config.json"):
            assert (finished / name).stat().st_size > 0
        report = (finished / "report.html").read_text()
        assert "<img" in report and "Gallery" in report and "bdjax attack" in report

    def test_leaves_poisoned_sets_that_any_framework_reads(self, finished):
        assert sorted(path.name for path in (finished / "poisoned").iterdir()) == [
            "badnets+sig.npz",
            "badnets.npz",
            "ckd.npz",
        ]
        with np.load(finished / "poisoned" / "badnets.npz") as arrays:
            assert arrays["images"].shape == (300, 8, 8, 1) and arrays["images"].dtype == np.uint8
            is_poisoned = arrays["is_poisoned"]
            assert (arrays["labels"][is_poisoned] == 0).all() and (arrays["original_labels"][is_poisoned] != 0).all()
        data = load_npz(finished / "poisoned" / "badnets.npz")
        assert isinstance(data.train, PoisonedDataset) and data.train.is_poisoned.sum() == is_poisoned.sum()

    @pytest.mark.slow
    def test_repeated_gives_the_same_numbers(self, finished, tmp_path):
        again = pathlib.Path(shutil.copytree(finished, tmp_path / "again"))
        run(tiny(again))
        assert (again / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_attacks_that_control_the_training_leave_no_poisoned_set(tmp_path):
    victim = SimpleNamespace(seed=0, poisoned=None, plan=SimpleNamespace(name="wanet"))
    note = workflow.save_poisoned(RunFolder(tmp_path, True), [victim, SimpleNamespace(seed=1)])
    assert note == "no set for wanet: the attacker controls the training"
    assert not list((tmp_path / "poisoned").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attack": "goodnets"}, "'goodnets' is not one of"),
        ({"attack": "badnets+wanet"}, "from scratch can be combined"),
        (
            {"attack": "sig", "label_rule": "source_specific"},
            "sig: label rule source_specific is not one of clean_label",
        ),
        ({"attack": "sig", "poison_rate": 0.5}, "largest rate possible"),
        ({"attack": "sig", "poison_rate": 0.0}, "--poison-rate 0.0 is not above 0"),
        ({"attack": "sig", "change": ("loudness=3",)}, "no setting 'loudness'"),
        ({"attack": "sig", "change": ("amplitude",)}, "should be name=value"),
        ({"attack": "sig,badnets", "change": ("amplitude=1",)}, "attack.name=value"),
        ({"attack": "sig", "change": ("wanet.size=1",)}, "which is not run"),
        ({"attack": "sig", "change": ("amplitude='loud'",)}, "amplitude 'loud' is not of the type"),
        ({"target": 10}, "--target 10 is not a class of digits"),
        ({"epochs": 0}, "--epochs 0 is not at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason) as raised:
        run(tiny(tmp_path / "run", **({"change": ()} | changes)))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_the_command_gives_the_settings_again(tmp_path):
    config = tiny(tmp_path)
    words = shlex.split(base.command(attack.EXPERIMENT, config))
    assert words[:2] == ["bdjax", "attack"]
    parsed = command_line.parse(attack.preset, {"preset": None, "dataset": None}, words[2:])
    assert dataclasses.replace(parsed, output=config.output) == config


@pytest.mark.slow
def test_all_is_every_attack_and_the_hybrids_and_says_what_does_not_fit():
    labels = (np.arange(400) % 10).astype(np.int32)
    data = Dataset(np.zeros((400, 28, 28, 1), np.uint8), labels, 10, "mnist", "a test")
    config = dataclasses.replace(attack.preset("quick", "mnist"), attack="all")
    plans, left_out = workflow.make_plans(config, data)
    assert [plan.name for plan in plans] == [*ATTACKS, *workflow.HYBRIDS] and not left_out
    few = dataclasses.replace(data, images=data.images[:30], labels=labels[:30])
    plans, left_out = workflow.make_plans(config, few)
    assert "tact" in left_out and "less than one row" in left_out["tact"] and plans
    assert "tact left out: " in workflow.left_out_text(left_out)
