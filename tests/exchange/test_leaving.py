"""Networks in the forms in which others run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from bdjax.errors import InputError
from bdjax.exchange import leaving, saved_model
from bdjax.models import make_model, normalised
from bdjax.training import ensemble

SHAPE = (8, 8, 1)
MODEL = normalised(make_model("lenet", 3), (0.5,), (0.25,))


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
        expected = MODEL.apply(single, jnp.asarray(images), train=False).logits
        np.testing.assert_allclose(program.call(images), expected, atol=1e-5)
    assert saved_model.read(tmp_path).about.made_by["role"] == "student"


def test_what_cannot_be_left(tmp_path):
    assert not leaving.leave(tmp_path / "none", MODEL._replace(architecture=None), variables_of(1), SHAPE)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="2 networks; only a single network is exported"):
        leaving.leave(tmp_path, MODEL, variables_of(2), SHAPE, exports=["stablehlo"])
    with pytest.raises(InputError, match="export 'torch' is not one of stablehlo, onnx"):
        leaving.leave(tmp_path, MODEL, variables_of(1), SHAPE, exports=["torch"])
