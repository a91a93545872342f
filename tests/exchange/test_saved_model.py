"""The saved form of a model: what was written is read, bit by bit, and what is damaged is refused in a line."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import bdjax
from bdjax.errors import InputError
from bdjax.exchange import saved_model
from bdjax.models import make_model
from bdjax.training import ensemble
from bdjax.types import Architecture

SHAPE = (8, 8, 1)
ARCHITECTURE = Architecture("resnet_s", 2, (0.5,), (0.25,))
ABOUT = saved_model.About(
    ARCHITECTURE, 3, SHAPE, ("a", "b", "\u00e9"), 1, {"experiment": "ta_kd", "role": "student", "seed": 4}
)


def variables_of(count, name="resnet_s"):
    rng, shapes = np.random.default_rng(0), ensemble.trained_like(make_model(name, 3, 2), SHAPE, count, 0).variables
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    saved_model.write(folder, ABOUT, variables_of(1))
    return folder


@pytest.fixture
def folder(written, tmp_path) -> pathlib.Path:
    """A copy to be spoilt."""
    return shutil.copytree(written, tmp_path / "student")


def refusal(folder):
    with pytest.raises(InputError) as error:
        saved_model.read(folder, "native")
    message = str(error.value)
    assert message.startswith(str(folder)) and "\n" not in message and message.isprintable()
    return message


@pytest.mark.parametrize("count", [1, 3])
def test_a_round_trip_is_exact(tmp_path, count):
    variables = variables_of(count)
    saved_model.write(tmp_path, ABOUT._replace(members=count), variables)
    found = saved_model.read(tmp_path, "native")
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(found.variables), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours.view(np.uint32), np.asarray(theirs).view(np.uint32))
    assert found.about.made_by == {"bdjax": bdjax.__version__, **ABOUT.made_by}
    assert found.about._replace(made_by=ABOUT.made_by) == ABOUT._replace(members=count)
    assert found.model.architecture == ARCHITECTURE and found.model.num_classes == 3


def test_a_network_without_statistics_has_the_same_form(tmp_path):
    variables = variables_of(1, "lenet")
    saved_model.write(tmp_path, ABOUT._replace(architecture=Architecture("lenet", 2)), variables)
    assert jax.tree.structure(saved_model.read(tmp_path).variables) == jax.tree.structure(variables)


def test_an_interrupted_write_leaves_no_description(folder, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(saved_model.safetensors_files, "write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        saved_model.write(folder, ABOUT, variables_of(1))
    assert not saved_model.is_saved_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "\"format\" should be 'bdjax model'"),
        ({"version": 2}, "version 2 of the format; this bdjax reads version 1"),
        ({"version": None}, "version None of the format"),
        ({"architecture": "resnet99"}, "architecture is 'resnet99'; should be a network of bdjax"),
        ({"architecture": ["resnet_s"]}, "should be a network of bdjax"),
        ({"width": 0}, "width is 0; should be a width"),
        ({"width": 10**9}, "should be a width from 1 to 1024"),
        ({"width": True}, "width is True"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 10**12}, "num_classes is 1000000000000"),
        ({"image_shape": [8, 8]}, "image_shape is [8, 8]; should be [height, width, channels]"),
        ({"image_shape": [8, 8, 10**9]}, "should be [height, width, channels]"),
        ({"image_shape": [1, 8, 1]}, "should be [height, width, channels]"),
        ({"members": 0}, "members is 0"),
        ({"members": 2}, "which its tensors do not fit: 'params/classifier/bias' is [3], should be [2, 3]"),
        ({"tensors_sha256": "0"}, "should be the SHA-256"),
        ({"tensors_sha256": "0" * 64}, "its content is not what model.json was written for"),
        ({"class_names": ["a"]}, "class_names has 1 names for 3 classes"),
        ({"class_names": [1, 2, 3]}, "should be a list of texts"),
        ({"normalisation": {"mean": [0.5], "std": [0]}}, "std positive"),
        ({"normalisation": {"mean": [0.5, 0.5], "std": [1, 1]}}, "mean and std with 1 numbers each"),
        ({"normalisation": [1]}, "should be null, or mean and std"),
        ({"made_by": {"x": {"y": 1}}}, "should be an object of texts and numbers"),
        ({"code": "import os"}, "'code' is no fact of version 1 of the format"),
        ({"\x1b[31m": 1}, r"'\x1b[31m' is no fact"),
    ],
)
def test_descriptions_that_cannot_be_true(folder, changes, message):
    path = folder / saved_model.ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"width": NaN}', b"null"])
def test_descriptions_that_are_none(folder, content):
    (folder / saved_model.ABOUT).write_bytes(content)
    assert "not JSON" in (message := refusal(folder)) or "not the description of a saved model" in message


def test_tensors_that_are_missing_cut_off_or_changed(folder):
    path = folder / saved_model.TENSORS
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "its content is not what model.json was written for" in refusal(folder)
    path.write_bytes(data[:-4])
    assert "damaged or cut off" in refusal(folder)
    path.unlink()
    assert "cannot be read" in refusal(folder)
