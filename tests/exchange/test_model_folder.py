import json
import pathlib
import pickle
import re
import shutil

import chex
import jax
import numpy as np
import pytest

from bdjax.attacks.providers import make_provider_triggers
from bdjax.errors import InputError
from bdjax.exchange import model_folder
from bdjax.models import make_model
from bdjax.training import ensemble
from tests.fixtures import checkpoints

SHAPE = (8, 8, 3)
TRIGGERS = make_provider_triggers(jax.random.key(1), SHAPE, 3, num_similar=2)


@pytest.fixture(scope="module")
def variables():
    """Random variables of three networks; drawn by NumPy, since initialising them would compile for a long time."""
    rng, shapes = np.random.default_rng(0), ensemble.trained_like(make_model("resnet10", 4, 2), SHAPE, 3, 0).variables
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory, variables):
    folder = tmp_path_factory.mktemp("suspects") / "third" / "party"
    model_folder.write(folder, "resnet10", 2, 4, SHAPE, variables, TRIGGERS, 1)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> pathlib.Path:
    """A copy to be spoilt."""
    return shutil.copytree(written, tmp_path / "suspects")


def read(folder, num_classes=4, image_shape=SHAPE, target=1):
    return model_folder.read(folder, num_classes, image_shape, target, "native")


def change_about(folder, **changes):
    path = folder / "about.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_triggers(folder, **changes):
    with np.load(folder / "triggers.npz") as file:
        arrays = dict(file) | changes
    np.savez(folder / "triggers.npz", **{name: values for name, values in arrays.items() if values is not None})


def test_what_was_written_is_read(written, variables):
    found = read(written)
    assert found.model.description == "resnet10 width 2"
    chex.assert_trees_all_equal(found.variables, variables)
    chex.assert_trees_all_equal(found.triggers.params, TRIGGERS.params)
    assert found.triggers.names == TRIGGERS.names
    np.testing.assert_array_equal(found.triggers.similar_group, TRIGGERS.similar_group)


def test_what_is_complete_is_not_written_again(folder, variables):
    before = (folder / "triggers.npz").stat().st_mtime_ns, (folder / "about.json").stat().st_mtime_ns
    model_folder.write(folder, "resnet10", 2, 4, SHAPE, variables, TRIGGERS, 1)
    assert before == ((folder / "triggers.npz").stat().st_mtime_ns, (folder / "about.json").stat().st_mtime_ns)


def test_what_was_cut_off_is_written_anew(folder, variables):
    (folder / "about.json").unlink()
    (folder / "triggers.npz").write_bytes(b"half")
    with pytest.raises(InputError, match="not a finished checkpoint"):
        read(folder)
    model_folder.write(folder, "resnet10", 2, 4, SHAPE, variables, TRIGGERS, 1)
    chex.assert_trees_all_equal(read(folder).triggers.params, TRIGGERS.params)


def test_models_without_triggers(tmp_path, variables):
    model_folder.write(tmp_path / "one", "resnet10", 2, 4, SHAPE, variables, None, 1)
    assert not (tmp_path / "one" / "triggers.npz").exists()
    found = read(tmp_path / "one", target=3)
    assert found.triggers is None and found.label_rules == ()


def test_label_rules_go_with_the_triggers(tmp_path, written, variables):
    rules = ("hidden_source", "all_to_one", "clean_label")
    model_folder.write(tmp_path / "one", "resnet10", 2, 4, SHAPE, variables, TRIGGERS, 1, rules)
    assert read(tmp_path / "one").label_rules == rules
    assert read(written).label_rules == ("all_to_one",) * 3
    change_triggers(tmp_path / "one", label_rule=np.array(["all_to_one", "unknown", "all_to_one"]))
    with pytest.raises(InputError, match="label_rule 'unknown' is not one of"):
        read(tmp_path / "one")


def test_a_digest_depends_on_the_content_and_not_on_the_place(folder, written):
    digest = read(written).digest
    assert re.fullmatch("[0-9a-f]{64}", digest) and read(folder).digest == digest
    change_triggers(folder, opacity=np.full(3, 0.5, np.float32))
    assert read(folder).digest != digest
    (folder / "triggers.npz").unlink()
    assert read(folder).digest != digest


def test_a_damaged_folder_is_to_be_copied_again(folder):
    checkpoints.flipped(folder / "tree")
    with pytest.raises(InputError, match="its content is not what was written; the folder is damaged; copy it again"):
        read(folder)


def test_triggers_need_not_be_known(folder, variables):
    (folder / "triggers.npz").unlink()
    found = read(folder)
    assert found.triggers is None
    chex.assert_trees_all_equal(found.variables, variables)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name": 3}, "about.json: model_name should be str, not 3"),
        ({"width": "2"}, "about.json: width should be int, not '2'"),
        ({"members": None}, "about.json: members should be int, not None"),
        ({"members": 0}, "about.json: members is 0; should be at least 1"),
        ({"members": -1}, "about.json: members is -1; should be at least 1"),
        ({"members": 2}, "the checkpoint does not fit the model that about.json describes"),
        ({"width": 3}, "the checkpoint does not fit the model that about.json describes"),
        ({"width": 0}, "width 0 must be at least 1"),
        ({"model_name": "resnet18"}, "the checkpoint does not fit the model that about.json describes"),
        ({"model_name": "nn.Sequential"}, "unknown model 'nn.Sequential'"),
        ({"num_classes": 5}, "the models have 5 classes and take images of shape [8, 8, 3]; the data has 4 classes"),
        ({"image_shape": [8, 8, 1]}, "the models have 4 classes and take images of shape [8, 8, 1]; the data has 4"),
        ({"image_shape": "8x8"}, "about.json: image_shape should be list, not '8x8'"),
    ],
)
def test_what_about_json_must_say(folder, changes, said):
    change_about(folder, **changes)
    with pytest.raises(InputError, match=re.escape(said)):
        read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_about_json_must_be_an_object(folder, text):
    (folder / "about.json").write_text(text)
    with pytest.raises(InputError, match="about.json"):
        read(folder)


def test_weights_must_be_finite(tmp_path, variables):
    broken = jax.tree.map(np.copy, variables)
    jax.tree.leaves(broken)[0][1] = np.nan
    model_folder.write(tmp_path / "broken", "resnet10", 2, 4, SHAPE, broken, TRIGGERS, 1)
    with pytest.raises(InputError, match="has values that are not finite"):
        read(tmp_path / "broken")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match="not a finished checkpoint"):
        read(tmp_path / "absent")
    (tmp_path / "tree").mkdir()
    (tmp_path / "about.json").write_text("{}")
    with pytest.raises(InputError, match="model_name should be str"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": None}, "mask is missing; should be floating"),
        ({"mask": np.zeros((3, 8, 4, 1), np.float32)}, "mask is float32 (3, 8, 4, 1); should be floating (3, 8, 8, 1)"),
        ({"pattern": np.zeros((3, 8, 8, 3), np.uint8)}, "pattern is uint8 (3, 8, 8, 3); should be floating"),
        ({"opacity": np.full(3, np.nan)}, "opacity has values outside [0, 1]"),
        ({"opacity": np.full(3, 1.5)}, "opacity has values outside [0, 1]"),
        ({"opacity": np.full(2, 0.5)}, "opacity is float64 (2,); should be floating (3,)"),
        ({"names": np.array("solid")}, "names is <U5 (); should be str (3,)"),
        ({"names": np.zeros(3)}, "names is float64 (3,); should be str (3,)"),
        ({"similar_group": np.zeros(1, bool)}, "similar_group is bool (1,); should be bool (3,)"),
        ({"target": np.array([1, 2])}, "target is int64 (2,); should be integer ()"),
        ({"target": np.array(1.0)}, "target is float64 (); should be integer ()"),
        ({"target": np.array(2)}, "these triggers aim at class 2; use --target=2"),
    ],
)
def test_what_triggers_must_be(folder, changes, said):
    change_triggers(folder, **changes)
    with pytest.raises(InputError, match=re.escape(said)):
        read(folder)


def test_there_is_one_trigger_for_each_model(folder):
    arrays = {name: np.asarray(leaf)[:2] for name, leaf in TRIGGERS.params._asdict().items()}
    change_triggers(folder, **arrays, names=np.array(TRIGGERS.names[:2]), similar_group=TRIGGERS.similar_group[:2])
    with pytest.raises(InputError, match=re.escape("mask is float32 (2, 8, 8, 1); should be floating (3, 8, 8, 1)")):
        read(folder)


class Hostile:
    def __init__(self, trace: pathlib.Path):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def test_triggers_run_nothing(folder, tmp_path):
    trace = tmp_path / "owned"
    change_triggers(folder, names=np.array([Hostile(trace)] * 3, object))
    with pytest.raises(InputError, match="names is an array of objects, which are pickles; .+ should be str "):
        read(folder)
    for content in (pickle.dumps(Hostile(trace)), b"", b"PK\x03\x04"):
        (folder / "triggers.npz").write_bytes(content)
        with pytest.raises(InputError, match="is not an intact triggers.npz of a model folder"):
            read(folder)
    assert not trace.exists()


def test_damaged_triggers(folder):
    path = folder / "triggers.npz"
    intact = path.read_bytes()
    for content in (intact[: len(intact) // 2], intact[:400] + bytes([7] * 20) + intact[420:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not an intact triggers.npz of a model folder"):
            read(folder)


def test_the_name_of_the_target_is_written_beside_its_number_and_named_in_the_error(folder):
    (folder / "triggers.npz").unlink()
    model_folder._write_triggers(folder, TRIGGERS, 1, (), "cat")
    with np.load(folder / "triggers.npz") as arrays:
        assert (int(arrays["target"]), str(arrays["target_name"])) == (1, "cat")
    path = folder / "triggers.npz"
    assert model_folder._read_triggers(path, 3, SHAPE, 1)[0].names == TRIGGERS.names
    with pytest.raises(InputError, match=r"these triggers aim at class 1 \(cat\); use --target=1"):
        model_folder._read_triggers(path, 3, SHAPE, 2)
    change_triggers(folder, target_name=np.array([["a", "b"]]))
    with pytest.raises(InputError, match="target_name is "):
        model_folder._read_triggers(path, 3, SHAPE, 1)
