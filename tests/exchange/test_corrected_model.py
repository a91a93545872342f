"""Two networks of which one corrects the other, as files: what comes back, where they can be used, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdjax
from bdjax.defenses.abm import corrected, defended_model
from bdjax.errors import InputError
from bdjax.evaluation import teachers
from bdjax.exchange import corrected_model, leaving, saved_model
from bdjax.exchange.opening import is_black_box, open_model
from bdjax.models import make_model, normalised
from bdjax.training import ensemble

SHAPE = (8, 8, 1)
TEACHER, STUDENT = normalised(make_model("lenet", 3), (0.5,), (0.25,)), make_model("vbd_4_4p", 3)
IMAGES = np.random.default_rng(3).random((5, *SHAPE)).astype(np.float32)


def drawn(model, count):
    rng, shapes = np.random.default_rng(0), ensemble.trained_like(model, SHAPE, count, 0).variables
    return jax.tree.map(lambda leaf: jnp.abs(0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


def pair(count=1):
    numbers = np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)
    return defended_model(TEACHER, STUDENT), {
        "teacher": drawn(TEACHER, count),
        "student": drawn(STUDENT, count),
        "average": jnp.asarray(numbers),
        "gamma": jnp.asarray(numbers[:, 0]),
        "delta": jnp.asarray(np.float32(0.1) + numbers[:, 1]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair") / "saved"
    assert leaving.leave(path, *pair(), SHAPE, class_names=("a", "b", "c"), made_by={"role": "defended"})
    return path


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.rglob("*.*"):
        if file.is_file():
            place = tmp_path / "copy" / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return tmp_path / "copy"


@jax.jit
def both_logits(teacher, student, images):
    return tuple(
        model.apply(variables, images, train=False).logits
        for model, variables in ((TEACHER, teacher), (STUDENT, student))
    )


def expected(variables, images):
    first, second = both_logits(
        *(jax.tree.map(lambda leaf: leaf[0], variables[part]) for part in ("teacher", "student")), images
    )
    numbers = {name: variables[name][0] for name in ("average", "gamma", "delta")}
    return np.asarray(corrected(first, second, **numbers))


@pytest.mark.parametrize("count", [1, 2])
def test_a_pair_comes_back_bit_by_bit(count, tmp_path):
    model, variables = pair(count)
    leaving.leave(tmp_path, model, variables, SHAPE)
    found = corrected_model.read(tmp_path)
    assert found.model.description == model.description and found.about.members == count
    for part in ("teacher", "student"):
        wanted = {name: variables[part][name] for name in ("params", "batch_stats")}
        assert jax.tree.structure(found.variables[part]) == jax.tree.structure(wanted)
        for mine, theirs in zip(jax.tree.leaves(found.variables[part]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for name in ("average", "gamma", "delta"):
        np.testing.assert_array_equal(found.variables[name], variables[name])


def test_a_pair_is_a_network_in_python(folder, tmp_path):
    network = bdjax.load_model(folder)
    np.testing.assert_allclose(network.predict(IMAGES), expected(pair()[1], IMAGES), atol=1e-5)
    bdjax.save_model(network, tmp_path / "again", ("a", "b", "c"))
    again = bdjax.load_model(tmp_path / "again")
    np.testing.assert_array_equal(again.predict(IMAGES), network.predict(IMAGES))


@pytest.mark.parametrize("first", ["pair", "network"])
def test_a_folder_is_what_was_saved_in_it_last(first, tmp_path):
    left = {"pair": pair(), "network": (STUDENT, drawn(STUDENT, 1))}
    (last,) = left.keys() - {first}
    for name in (first, last):
        assert leaving.leave(tmp_path, *left[name], SHAPE)
    assert bdjax.load_model(tmp_path).model.description == left[last][0].description
    assert is_black_box(str(tmp_path)) == (last == "pair") != saved_model.is_saved_model(tmp_path)


def test_a_network_that_cannot_be_left_leaves_the_folder_as_it_is(folder):
    assert not leaving.leave(folder, STUDENT._replace(architecture=None), {"params": {"a": np.zeros(1)}}, SHAPE)
    assert corrected_model.is_corrected_model(folder)


@pytest.mark.parametrize("outputs", ["probabilities", "labels"])
def test_a_pair_returns_logits(outputs, folder):
    with pytest.raises(InputError, match=f"two networks that correct each other return logits, not {outputs}"):
        open_model(str(folder), 3, SHAPE, outputs=outputs)


def test_a_pair_is_a_black_box_for_a_command(folder):
    assert is_black_box(str(folder)) and not is_black_box(str(folder / "teacher"))
    opened = open_model(str(folder), 3, SHAPE, class_names=("a", "b", "c"))
    assert opened.model is None and len(opened.digest) == 64
    np.testing.assert_allclose(opened.classifier(IMAGES), expected(pair()[1], IMAGES), atol=1e-5)
    with pytest.raises(InputError, match="class 0 of the model is 'a', of the data 'x'"):
        open_model(str(folder), 3, SHAPE, class_names=("x", "b", "c"))
    with pytest.raises(InputError, match="the model has 3 classes .*; the data has 4 classes"):
        open_model(str(folder), 4, SHAPE)
    rows = bdjax.dataset(np.zeros((3, *SHAPE), np.uint8), np.arange(3))
    with pytest.raises(InputError, match="is a black box, and these methods need its weights"):
        teachers.open_teacher(str(folder), rows, 0, "shifted")


def test_several_pairs_are_no_single_black_box(tmp_path):
    leaving.leave(tmp_path, *pair(2), SHAPE)
    with pytest.raises(InputError, match="holds 2 pairs of networks; a black box is a single one"):
        open_model(str(tmp_path), 3, SHAPE)


def edited(**changes):
    def edit(folder):
        path = folder / corrected_model.CORRECTION
        facts = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))

    return edit


def another_student(folder):
    about, _ = saved_model.read_about(folder / "student")
    saved_model.write(folder / "student", about, jax.tree.map(lambda leaf: 2 * leaf, pair()[1]["student"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "correction.json").write_text("{"), "correction.json: is not JSON"),
        (lambda folder: (folder / "correction.json").write_text("[" * 100_000), "correction.json: is not JSON"),
        (edited(format="other"), "not the correction of a model"),
        (edited(version=1), "version 1 of the format; this bdjax reads version 2"),
        (edited(code="x"), "'code' is no fact of version 2"),
        (edited(gamma=None), "'gamma' is missing, which is a fact of version 2"),
        (edited(logits="teacher"), "logits is 'teacher'; should be 'teacher - delta"),
        (edited(delta=[float("nan")]), "delta is .*; should be a list of finite numbers"),
        (edited(delta=["2"]), "delta is .*; should be a list of finite numbers"),
        (edited(gamma=[1e300]), "gamma is .*; should be a list of finite numbers"),
        (edited(gamma=[1.0, 2.0]), r"gamma has the shape \[2\]; should be \[1\]"),
        (edited(average=[[1.0]]), r"average has the shape \[1, 1\]; should be \[1, 3\]"),
        (
            edited(tensors_sha256={"teacher": "0"}),
            "tensors_sha256 is .*; should be the SHA-256 of teacher and of student",
        ),
        (another_student, "was written for another network than that in student/"),
        (lambda folder: (folder / "student" / "model.json").unlink(), "model.json"),
    ],
)
def test_a_damaged_pair_is_one_line(change, message, copy):
    change(copy)
    for call in (lambda: bdjax.load_model(copy), lambda: open_model(str(copy), 3, SHAPE)):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
