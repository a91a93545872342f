"""The digits, and a network on them that compiles in a fraction of a second and needs no training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import CleanModel, Knowledge
from bdjax.datasets.digits import load_digits
from bdjax.types import GroupEnd, Model, ModelOutput, TrainTest
from tests.progress import without_progress

CHANNELS = 16


def apply_filters(variables, images, *, train, edits=None):
    """3x3 filters, ReLU and a linear layer on the mean over the pixels: one tap, and one group that ends before the ReLU."""
    params = variables["params"]
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    maps = jnp.concatenate(patches, axis=-1) @ params["filters"]
    tap = jax.nn.relu(maps)
    logits = jnp.mean(tap, axis=(1, 2)) @ params["classifier"]["kernel"] + params["classifier"]["bias"][None, :]
    group = GroupEnd(maps, maps, jnp.zeros(CHANNELS), jnp.ones(CHANNELS))
    return ModelOutput(logits, {"stage1": tap}, variables, {"group1": group})


@pytest.fixture(scope="module", autouse=True)
def no_progress():
    with without_progress():
        yield


@pytest.fixture(scope="session")
def digits() -> TrainTest:
    return load_digits()


@pytest.fixture(scope="session")
def clean_digits_model(digits) -> CleanModel:
    """Random filters, and the class with the nearest mean features: 2 m_k f - |m_k|^2 is the logit of class k."""
    train = digits.train
    filters = jnp.asarray(np.random.default_rng(0).normal(size=(9, CHANNELS)), jnp.float32)
    empty = {"kernel": jnp.zeros((CHANNELS, 10)), "bias": jnp.zeros(10)}
    variables = {"params": {"filters": filters, "classifier": empty}, "batch_stats": {}}
    output = jax.jit(lambda images: apply_filters(variables, images, train=False))(train.images / np.float32(255))
    features = np.asarray(output.features["stage1"]).mean(axis=(1, 2))
    means = np.stack([features[train.labels == label].mean(axis=0) for label in range(10)])
    classifier = {"kernel": jnp.asarray(2 * means.T), "bias": jnp.asarray(-np.square(means).sum(axis=1))}
    variables["params"]["classifier"] = classifier
    return CleanModel(Model(lambda key, shape: variables, apply_filters, 10, "random filters"), variables)


@pytest.fixture(scope="session")
def knowledge(digits, clean_digits_model) -> Knowledge:
    return Knowledge(digits.train, 0, clean_digits_model)
