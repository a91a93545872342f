import dataclasses

import jax
import pytest

from bdjax import datasets
from bdjax.commands import lfd, vbd
from bdjax.errors import InputError
from bdjax.run import presets
from bdjax.workflows import attack, audit_model, detection, poisoned_sets, suspect_models, ta_kd

CONFIGS = {
    "audit_model": audit_model.Config,
    "ta_kd": ta_kd.Config,
    "attack": attack.Config,
    "poisoned_sets": poisoned_sets.Config,
    "detection": detection.Config,
    "suspect_models": suspect_models.Config,
}


@pytest.mark.parametrize("workflow", CONFIGS)
def test_every_size_is_a_field_of_the_workflow_and_differs_from_its_default(workflow):
    defaults = {field.name: field.default for field in dataclasses.fields(CONFIGS[workflow])}
    assert set(presets.QUICK) == set(CONFIGS)
    for dataset, fields in presets.QUICK[workflow].items():
        assert dataset in (*datasets.DATASETS, presets.OTHER)
        assert set(fields) <= set(defaults)
        assert any(defaults[name] != value for name, value in fields.items())


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", "digits"),
        ("fashion_mnist", "mnist"),
        ("cifar100", "cifar10"),
        ("tiny_imagenet", presets.OTHER),
        ("tfds:anything", presets.OTHER),
        ("photos/", "digits"),
        ("digits.npz", "digits"),
    ],
)
def test_a_set_without_sizes_takes_those_of_the_set_it_is_like(dataset, expected):
    assert presets.quick("attack", dataset) == presets.QUICK["attack"][expected]


@pytest.mark.parametrize("workflow", ["attack", "poisoned_sets"])
def test_images_are_mirrored_only_where_their_class_stays_the_same(workflow):
    assert presets.quick(workflow, "cifar100")["augmentation"] == "reflect_flip"
    # A mirrored sign "turn left" is a sign "turn right".
    signs = presets.quick(workflow, "gtsrb")
    assert signs == {**presets.quick(workflow, "cifar10"), "augmentation": "reflect"}


def test_of_data_at_a_path_no_row_is_left_out():
    for workflow in presets.QUICK:
        assert not {"train_rows", "test_rows"} & presets.quick(workflow, "mine/").keys()


def test_sizes_are_a_copy():
    presets.quick("attack", "digits")["epochs"] = 0
    assert presets.QUICK["attack"]["digits"]["epochs"] == 20


@pytest.mark.parametrize(
    ("backend", "named", "expected"),
    [
        ("cpu", None, ("quick", "digits", "float32")),
        ("gpu", None, ("paper", "digits", "bfloat16")),
        ("gpu", "quick", ("quick", "digits", "bfloat16")),
    ],
)
def test_the_device_decides_where_no_preset_is_named(backend, named, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert presets.choose(named, None, ("quick", "paper")) == expected


def test_without_a_dataset_vbd_runs_on_one_that_its_networks_do_not_learn():
    chosen = vbd.preset("quick")
    assert (chosen.dataset, chosen.attacks, chosen.defenses) == ("textures", "white_square,none", "vbd")
    assert vbd.preset("quick", "digits").dataset == "digits" and lfd.preset("quick").dataset == "digits"


def test_a_preset_that_the_experiment_does_not_have():
    with pytest.raises(InputError, match="--preset 'strong' is not one of quick, paper"):
        presets.choose("strong", "digits", ("quick", "paper"))
