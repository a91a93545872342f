"""Networks in the forms in which others run them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from bdjax.defenses.abm import defended_model
from bdjax.errors import InputError
from bdjax.exchange import leaving, onnx_reader, saved_model
from bdjax.models import make_model, normalised
from bdjax.training import ensemble

SHAPE = (8, 8, 1)
MODEL = normalised(make_model("lenet", 3), (0.5,), (0.25,))


@jax.jit
def logits_of(variables, images):
    return MODEL.apply(variables, images, train=False).logits


def variables_of(count):
    rng, shapes = np.random.default_rng(0), ensemble.trained_like(MODEL, SHAPE, count, 0).variables
    return jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


@pytest.mark.slow
def test_stablehlo_takes_pixels_of_any_number_of_images(tmp_path):
    variables = variables_of(1)
    assert leaving.leave(tmp_path, MODEL, variables, SHAPE, made_by={"role": "student"}, exports=["stablehlo"])
    program = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    assert program.in_avals[0].shape[1:] == SHAPE and set(program.platforms) == {"cpu", "cuda", "tpu"}
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), variables)
    for rows in (1, 3):
        images = np.random.default_rng(rows).random((rows, *SHAPE)).astype(np.float32)
        expected = logits_of(single, images)
        np.testing.assert_allclose(program.call(images), expected, atol=1e-5)
    assert saved_model.read(tmp_path).about.made_by["role"] == "student"


def test_two_networks_of_which_one_corrects_the_other(tmp_path):
    """ABM's. The program of both is compared with the logits in the slow tier."""
    plain = make_model("lenet", 3)
    teacher, student = variables_of(1), variables_of(1)
    variables = {"teacher": teacher, "student": student, "average": jnp.full((1, 3), 2.0)}
    variables |= {"gamma": jnp.full(1, 0.5), "delta": jnp.full(1, 2.5)}
    assert leaving.leave(tmp_path, defended_model(MODEL, plain), variables, SHAPE, made_by={"role": "defended"})
    parts = [saved_model.read(tmp_path / part) for part in ("teacher", "student")]
    assert [part.model.architecture.mean for part in parts] == [(0.5,), ()]
    facts = json.loads((tmp_path / "correction.json").read_text())
    assert facts["gamma"] == [0.5] and facts["delta"] == [2.5] and facts["average"] == [[2.0] * 3]
    assert not (tmp_path / "model.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_the_program_of_two_networks_has_the_rule_inside(tmp_path, form):
    model, networks = defended_model(MODEL, MODEL), variables_of(2)
    both = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), networks) for i in range(2)]
    variables = {"teacher": both[0], "student": both[1], "average": jnp.full(3, 0.1)}
    variables |= {"gamma": jnp.float32(0.5), "delta": jnp.float32(2.5)}
    path = tmp_path / f"model.{form}"
    leaving.export(path, form, model, variables, SHAPE)
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
        program = onnx_reader.read(path, 3, SHAPE)
    else:
        program = export.deserialize(bytearray(path.read_bytes())).call
    images = np.random.default_rng(0).random((3, *SHAPE)).astype(np.float32)
    first, second = (logits_of(of, images) for of in both)
    expected = first - 2.5 * np.maximum(second - 0.05, 0)
    np.testing.assert_allclose(program(images), expected, atol=1e-5)


def test_what_cannot_be_left(tmp_path):
    assert not leaving.leave(tmp_path / "none", MODEL._replace(architecture=None), variables_of(1), SHAPE)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="2 networks; only a single network is exported"):
        leaving.leave(tmp_path, MODEL, variables_of(2), SHAPE, exports=["stablehlo"])
    with pytest.raises(InputError, match="export 'torch' is not one of stablehlo, onnx"):
        leaving.leave(tmp_path, MODEL, variables_of(1), SHAPE, exports=["torch"])
