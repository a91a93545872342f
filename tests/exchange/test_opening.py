"""Networks by the text that a command line names them with."""

import pickle
import shutil

import jax
import numpy as np
import pytest

from bdjax.attacks.providers import make_provider_triggers
from bdjax.errors import InputError
from bdjax.exchange import model_folder, safetensors_files, saved_model
from bdjax.exchange.opening import open_model
from bdjax.models import make_model
from bdjax.training import ensemble
from bdjax.types import Architecture

SHAPE, CLASSES = (8, 8, 3), 4
NAMES = ("ant", "bee", "cat", "dog")


def variables_of(count):
    rng, shapes = (
        np.random.default_rng(0),
        ensemble.trained_like(make_model("resnet_s", CLASSES, 2), SHAPE, count, 0).variables,
    )
    return jax.tree.map(lambda leaf: rng.random(leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    about = saved_model.About(Architecture("resnet_s", 2), CLASSES, SHAPE, NAMES)
    saved_model.write(folder, about, variables_of(1))
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "teachers"
    triggers = make_provider_triggers(jax.random.key(1), SHAPE, 2)
    model_folder.write(folder, "resnet_s", 2, CLASSES, SHAPE, variables_of(2), triggers, 1)
    return folder


def opened(text, **options):
    return open_model(str(text), CLASSES, SHAPE, lowering="native", **options)


def refusal(text, **options):
    with pytest.raises(InputError) as error:
        opened(text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_same_network_from_its_folder_and_from_its_file(saved, tmp_path):
    from_folder, from_file = opened(saved, class_names=NAMES), opened(f"{saved}/model.safetensors:resnet_s")
    assert from_folder.name == str(saved) and from_folder.classifier is None and from_folder.triggers is None
    for ours, theirs in zip(*(jax.tree.leaves(of.variables) for of in (from_folder, from_file)), strict=True):
        assert ours.shape[0] == 1 and np.array_equal(ours, theirs)
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert opened(moved).digest == from_folder.digest != from_file.digest
    normalised = opened(f"{saved}/model.safetensors:resnet_s:flax:imagenet")
    assert normalised.model.architecture.mean == (0.485, 0.456, 0.406) and normalised.digest != from_file.digest


def test_a_model_folder_has_its_triggers_and_their_target(old, saved):
    found = opened(old)
    assert found.target == 1 and len(found.triggers.names) == 2 and found.label_rules == ("all_to_one",) * 2
    assert found.digest == model_folder.read(old, CLASSES, SHAPE, 1, "native").digest
    assert "use --target=1" in refusal(old, target=2)


def test_triggers_beside_a_saved_model_are_not_lost(old, tmp_path):
    both = shutil.copytree(old, tmp_path / "both")
    saved_model.write(both, saved_model.About(Architecture("resnet_s", 2), CLASSES, SHAPE, (), 2), variables_of(2))
    assert opened(both).triggers is not None
    (both / model_folder.TRIGGERS).unlink()
    assert opened(both).triggers is None


def test_models_for_other_data(saved):
    with pytest.raises(
        InputError, match="the model has 4 classes and takes images of shape .*; the data has 5 classes"
    ):
        open_model(str(saved), 5, SHAPE)
    with pytest.raises(InputError, match="--image-size=8 scales images"):
        open_model(str(saved), CLASSES, (16, 16, 3))
    assert "class 1 of the model is 'bee', of the data 'dog'" in refusal(
        saved, class_names=("ant", "dog", "cat", "bee")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{saved}/model.safetensors", "a file of weights needs its architecture: FILE.safetensors:ARCHITECTURE"),
        ("{saved}/model.safetensors:", "a file of weights needs its architecture"),
        ("{saved}/model.safetensors:resnet_s:flax:none:more", "a file of weights needs its architecture"),
        ("{saved}/model.safetensors:resnet_x", "unknown architecture 'resnet_x'; architectures are"),
        ("{saved}/model.safetensors:resnet_s:tf", "naming 'tf' is not known"),
        ("{saved}/model.json", "is no form of a model that is known by its name"),
        ("{saved}/..", "holds no model; it should contain model.json"),
        ("{tmp}/none", "does not exist; a model is FOLDER, FILE.safetensors:ARCHITECTURE, FILE.onnx or http://"),
        ("{tmp}/none.safetensors:resnet_s", "cannot be read"),
        ("a\0b.safetensors:resnet_s", r"'a\x00b.safetensors': cannot be read (embedded null byte)"),
        ("", "does not exist"),
        ("\0", "does not exist"),
        ("x" * 5000, "does not exist"),
    ],
)
def test_texts_that_name_no_model(saved, tmp_path, text, message):
    assert message in refusal(text.format(saved=saved, tmp=tmp_path))


def test_a_pickle_is_refused_in_whatever_form_it_is_named(tmp_path):
    for name in ("a.pth", "a.pt", "a.bin", "a", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"fc.weight": 1}))
        for text in (tmp_path / name, f"{tmp_path / name}:resnet_s"):
            if name != "a.safetensors" or ":" in str(text):
                assert "is a pickle, which can run code, and is not read" in refusal(text)


def test_the_file_of_a_folder_without_description(tmp_path):
    safetensors_files.write(tmp_path / saved_model.TENSORS, {"a": np.zeros(1, np.float32)})
    assert f"has no model.json; name the file and its architecture: {tmp_path}/model.safetensors:ARCH" in refusal(
        tmp_path
    )
