"""What no run can do is refused by every workflow before the probe, and before the run's folder is opened."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from bdjax.commands import attack, lfd, robust_kd, ta_kd, vbd
from bdjax.datasets.digits import load_digits
from bdjax.errors import InputError
from bdjax.run import config as run_config
from bdjax.run.folder import to_plain
from bdjax.run.log import StageLog
from bdjax.workflows import attack as attack_workflow
from bdjax.workflows import audit, detection, poisoned_sets, suspect_models
from bdjax.workflows import ta_kd as ta_kd_workflow
from tests.fixtures import folders


class Workflow(NamedTuple):
    """How a test starts a run: `changes` of its quick configuration."""

    module: Any
    run: Callable[..., Any]
    changes: dict[str, Any]


WORKFLOWS = {
    "poisoned_sets": Workflow(lfd, poisoned_sets.run, {"attacks": "badnets", "defenses": "none"}),
    "detection": Workflow(vbd, detection.run, {"attacks": "badnets", "defenses": "vbd"}),
    "attack": Workflow(attack, attack_workflow.run, {"attack": "badnets"}),
    "suspect_models": Workflow(robust_kd, suspect_models.run, {"attacks": "latent_backdoor", "defenses": "fkd"}),
    "ta_kd": Workflow(ta_kd, ta_kd_workflow.run, {}),
    "audit": Workflow(vbd, audit.run, {"attacks": "none", "defenses": "vbd"}),
}
SMALL = {"train_rows": 300, "test_rows": 50, "seeds": 1}

ATTACKS = (
    "blended:opacity=2",
    "blended:opacity=0",  # changes no pixel
    "blended:opacity=None",
    "blended:poison_rate={[]:1}",
    "blended:opacity=" + "(" * 500,
    "sig:amplitude=-1",
    "sig:amplitude=1e999",
    "sig:frequency=0",
    "sig:poison_rate=0.2",  # more than the target class has
    "badnets_white:size=-1",
    "badnets_white:size=9",
    "badnets_white:size=100000000000",
    "badnets_white:margin=8",
    "badnets:cover_rate=0.99",
    "badnets:target=10",
    "badnets:target=" + "0x" + "f" * 900,
    "badnets:label_rule=0",
    "badnets:label_rule=[]",
    "badnets:suppression=" + "9" * 400,
    "badnets+blended:poison_rate=0.6",  # each alone would fit
    "badnets+nothing",
    "badnets:poison_rate=0.1:poison_rate=0.2",
    "adaptive_blend:pieces=17",
    "wanet_offline:control_points=1",
    "bpp_offline:levels=b'8'",
    "refool:least_offset=9",
    "refool:least_strength=0.9:most_strength=0.1",
    "provider_blend:least_opacity=0.9:most_opacity=0.1",
    "white_square:opacity=0",
    "white_square:opacity=nan",
    "issba:stages=6",
    "input_aware_offline:stages=6",
    "input_aware_offline:joint_poison_rate=0.6:joint_cover_rate=0.6",
    "narcissus:surrogate_model=resnet11",
    "narcissus:steps=0",
    "unknown",
    "",
)
CLEAN_MODEL_ATTACKS = (
    "trojan_square:steps=0",
    "l2_invisible:norm=0",
    "label_consistent:square=5",
    "label_consistent:corners=three",
    "composite:jitter=4",
    "composite:suppression=10",
)
MODEL_ATTACKS = (
    "latent_backdoor:size=1.0",
    "latent_backdoor:size=0.01",
    "ckd:mask_bound=2",
    "ckd:loss=both",
    "hidden_trigger:size=0.9:margin=0.9",
    "input_aware:stages=6",
    "input_aware:poison_rate=0.6:cover_rate=0.6",
    "wanet:poison_rate=0.6:cover_rate=0.6",
    "bpp:poison_rate=0.6:cover_rate=0.6",
    "blended:opacity=0",
)
DEFENSES = (
    "vbd:epochs=0",
    "vbd:epochs=99999999999",
    "vbd:p_value=nan",
    "vbd:networks=" + "9" * 2000,
    "spectral_signatures:percentile=101",
    "spectral_signatures:percentile={[]:1}",
    "activation_clustering:dimensions=None",
    "activation_clustering:reduction=['pca']",
    "vdb",
    "fine_tuning:learning_rate=-1",
    "nad:betas=()",
    "nad:steps=((5, 0.1), (2, 0.01))",
    "nad:steps=((0, 0.1),)",
    "nad:betas=('a',)",
    "fine_pruning:held_out=1.0",
    "ft_sam:rho=inf",
)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    def choose_engine(*arguments):
        raise AssertionError("the probe was run before everything was checked")

    monkeypatch.setattr(run_config, "choose_engine", choose_engine)


def refuse(name: str, folder, **changes: Any) -> str:
    """The one-line error of a run, which must leave nothing."""
    workflow = WORKFLOWS[name]
    start = workflow.module.preset("quick", changes.pop("dataset", "digits"))
    config = dataclasses.replace(start, **{"output": folder / "run", **SMALL, **workflow.changes, **changes})
    with pytest.raises(InputError) as error:
        workflow.run(config, workflow.module.EXPERIMENT, log=StageLog())
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()
    return str(error.value)


@pytest.mark.parametrize("text", [*ATTACKS, *CLEAN_MODEL_ATTACKS])
def test_attacks_on_training_sets(text, tmp_path):
    refuse("poisoned_sets", tmp_path, attacks=text)
    refuse("detection", tmp_path, attacks=text)


@pytest.mark.parametrize("text", [*CLEAN_MODEL_ATTACKS[:-1], *MODEL_ATTACKS])
def test_attacks_on_models(text, tmp_path):
    refuse("suspect_models", tmp_path, attacks=text)
    name, *settings = text.split(":")
    refuse("attack", tmp_path, attack=name, change=tuple(settings))


@pytest.mark.parametrize("text", DEFENSES)
def test_defenses(text, tmp_path):
    photos = tmp_path / "own.npz"
    np.savez(photos, images=load_digits((), False).train.images[:300], labels=load_digits((), False).train.labels[:300])
    refuse("poisoned_sets", tmp_path, defenses=text)
    refuse("detection", tmp_path, defenses=text)
    refuse("suspect_models", tmp_path, defenses=text)
    refuse("audit", tmp_path, defenses=text, dataset=str(photos))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": ("size=3", "size=4")}, "size is set twice"),
        ({"attack": "badnets_white", "change": ("size=-1",)}, "size -1 is not at least 1"),
        ({"attack": "badnets_white", "change": ("poison_rate={[]:1}",)}, "is not of the type of its default"),
        ({"attack": "badnets_white", "change": ("size=" + "9" * 100_000,)}, "is not of the type of its default"),
        ({"attack": "badnets,badnet"}, "did you mean badnets?"),
    ],
)
def test_changes_of_an_attack(changes, message, tmp_path):
    assert message in refuse("attack", tmp_path, **changes)


LARGE = {"width": 1024, "seeds": 100}


@pytest.mark.parametrize(
    ("name", "changes", "free", "message"),
    [
        (
            "detection",
            {"seeds": 1000, "suspects_at_once": 1000, "train_rows": 0},
            2**24,
            "the training and test sets of 1000 networks take",
        ),
        ("poisoned_sets", LARGE, 2**30, "100 networks of --width 1024 take about"),
        ("attack", LARGE, 2**30, "--width="),
        ("ta_kd", {"num_teachers": 100, "width": 1024}, 2**30, "100 networks of --width 1024 take about"),
        ("ta_kd", {"views": 10_000, "seeds": 100}, 2**24, "10000 --views of 45 clean rows take about"),
        ("ta_kd", {"num_teachers": 1000}, 2**30, "the rows of 1000 teachers take about"),
    ],
)
def test_what_does_not_fit_into_memory(name, changes, free, message, tmp_path, monkeypatch):
    monkeypatch.setattr("bdjax.training.memory.free_memory", lambda: free)
    assert message in refuse(name, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 10}, "--target 10 is not a class"),
        ({"num_similar": 100}, "similar triggers among"),
        ({"num_similar": 1}, "similar triggers among"),
        ({"poison_rate": 0.001}, "less than one row"),
        ({"auxiliary_fraction": 0.001}, "leaves no clean row"),
        ({"output": pathlib.Path("/dev/null")}, "/dev/null is a file, not a folder"),
    ],
)
def test_settings_of_ta_kd_that_do_not_fit_the_data(changes, message, tmp_path):
    assert message in refuse("ta_kd", tmp_path, **changes)


def test_a_folder_of_something_else_or_of_other_settings(tmp_path):
    """They are looked at before the probe, and not changed."""
    config = dataclasses.replace(ta_kd.preset("quick", "digits"), output=tmp_path, **SMALL)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"has files \(thesis.tex\) but no config.json"):
        ta_kd_workflow.run(config, ta_kd.EXPERIMENT, log=StageLog())
    record = {"experiment": "ta_kd", "config": to_plain(dataclasses.replace(config, epochs=7))}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="holds a run with other settings: epochs 7 -> 20"):
        ta_kd_workflow.run(config, ta_kd.EXPERIMENT, log=StageLog())
    (tmp_path / "config.json").write_text(json.dumps({**record, "experiment": "lfd"}))
    with pytest.raises(InputError, match="holds a run of lfd, not of ta_kd"):
        ta_kd_workflow.run(config, ta_kd.EXPERIMENT, log=StageLog())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thesis.tex"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_images_of_several_sizes_and_sizes_that_no_network_takes(name, tmp_path):
    photos = folders.classes(tmp_path / "photos", {"cat": range(12)}, size=(24, 24))
    folders.classes(photos, {"dog": range(10)}, size=(20, 16))
    assert refuse(name, tmp_path, dataset=str(photos)) == (
        f"{photos}: images have 2 sizes (24x24: 12, 20x16: 10); one size is needed: --image-size=N scales all images to N x N "
        "pixels, for instance --image-size=32"
    )
    assert "--image-size 7 is not at least 8" in refuse(name, tmp_path, dataset=str(photos), image_size=7)


@pytest.mark.parametrize("name", ["poisoned_sets", "detection", "suspect_models", "audit"])
def test_clean_data_of_another_size(name, tmp_path):
    data, clean = load_digits((), False).train, tmp_path / "clean.npz"
    np.savez(tmp_path / "own.npz", images=data.images[:300], labels=data.labels[:300])
    np.savez(clean, images=data.images[300:800, :6, :6], labels=data.labels[300:800])
    changes = {"dataset": str(tmp_path / "own.npz"), "clean_data": str(clean)}
    changes |= {"defenses": "scan"} if name in ("detection", "audit") else {}
    message = refuse(name, tmp_path, **changes)
    assert message.startswith(f"--clean-data {clean}: ")
    assert message.endswith("images of shape (8, 8, 1); --image-size=8 scales images to 8x8 pixels")
    # With the flag it is read as the training set is.
    assert "shape" not in refuse(name, tmp_path, **changes, image_size=8, output=pathlib.Path("/dev/null"))


@pytest.mark.parametrize("name", ["poisoned_sets", "detection", "attack", "suspect_models", "ta_kd"])
def test_a_target_without_rows(name, tmp_path, monkeypatch):
    data = load_digits((), False)
    kept = data.train.labels != 3
    train = dataclasses.replace(data.train, images=data.train.images[kept], labels=data.train.labels[kept])
    monkeypatch.setattr(run_config.datasets, "load", lambda *arguments, **options: type(data)(train, data.test))
    message = refuse(name, tmp_path, target=3, train_rows=0, test_rows=0)
    assert "target 3 has none of the" in message and "classes with rows: 0, 1, 2, 4, 5" in message
