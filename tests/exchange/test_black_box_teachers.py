"""The same four networks as members of one call, and as three ONNX files and a server."""

import contextlib

import jax
import numpy as np
import pytest

from bdjax.defenses.aggregation import aggregate_logits
from bdjax.defenses.teachers import from_classifiers, from_members
from bdjax.exchange.onnx_writer import to_onnx
from bdjax.exchange.opening import open_model
from bdjax.models import make_model
from bdjax.training import ensemble
from tests.exchange.test_onnx_writer import random_variables
from tests.fixtures.served import served

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

SHAPE, CLASSES = (8, 8, 1), 5


@pytest.fixture
def serve():
    """Runs the server of the documentation for a function; returns its address."""
    with contextlib.ExitStack() as servers:
        yield lambda network: servers.enter_context(served(network))


def test_black_boxes_give_the_numbers_of_the_same_networks_as_members(serve, tmp_path):
    model = make_model("lenet", CLASSES, lowering="native")
    networks = [random_variables(model, SHAPE, seed) for seed in range(4)]
    predict = jax.jit(lambda variables, images: model.apply(variables, images, train=False).logits)
    texts = []
    for number, variables in enumerate(networks[:3]):
        path = tmp_path / f"teacher{number}.onnx"
        path.write_bytes(to_onnx(model, variables, SHAPE))
        texts.append(f"{path}:nchw" if number else str(path))
    texts.append(serve(lambda images: np.asarray(predict(networks[3], images))))
    store = tmp_path / "answers"
    opened = [open_model(text, CLASSES, SHAPE, store=store) for text in texts]
    assert len({found.digest for found in opened}) == 4 and all(found.model is None for found in opened)
    images = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), np.uint8)
    asked = from_classifiers([found.classifier for found in opened], CLASSES)(images)
    members = from_members(ensemble.make_predict(model, "map", 64), ensemble.stack(networks))(images)
    np.testing.assert_allclose(asked, members, rtol=0, atol=1e-4 * np.ptp(members))
    assert np.ptp(members, axis=0).min() > 0  # four different networks
    for aggregation in ("mean", "median"):
        votes = [aggregate_logits(logits, aggregation, 0).argmax(-1) for logits in (asked, members)]
        np.testing.assert_array_equal(*votes)
    assert list(store.rglob("*.npy"))


def test_settings_follow_the_name_of_an_onnx_file(tmp_path):
    model = make_model("lenet", CLASSES)
    path = tmp_path / "network.onnx"
    path.write_bytes(to_onnx(model, random_variables(model, SHAPE), SHAPE))
    images = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    plain, same, normalised = (
        open_model(f"{path}{settings}", CLASSES, SHAPE) for settings in ("", ":nchw:output=logits:none", ":0.2/0.5")
    )
    np.testing.assert_array_equal(plain.classifier(images), same.classifier(images))
    np.testing.assert_allclose(normalised.classifier(images), plain.classifier((images - 0.2) / 0.5), atol=1e-5)
    assert len({plain.digest, normalised.digest}) == 2
