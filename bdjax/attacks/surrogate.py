"""Train an attacker's surrogate network, and draw the batches on which a trigger is optimised."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.datasets.splits import permutation
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, no_rows
from bdjax.types import Array, Key, Model, PyTree


def train_surrogate(key: Key, model: Model, images: np.ndarray, labels: np.ndarray, config: TrainConfig) -> PyTree:
    """Train one network from scratch, with cross-entropy.

    Args:
        key: draws its weights and shuffles.
        model: its architecture.
        images: uint8 [n, H, W, C].
        labels: int32 [n].
        config: the training settings. No rows are held out for validation.

    Returns:
        Its variables.
    """
    states = ensemble.init_states(model, images.shape[1:], config, jnp.stack([key]))
    rows = Rows(jnp.arange(len(labels), dtype=jnp.int32)[None], {"labels": jnp.asarray(labels, jnp.int32)[None]})
    trained = ensemble.fit(
        model, _cross_entropy, config, states, jnp.asarray(images), rows, no_rows(rows), layout="map"
    )
    return ensemble.members(trained.variables, 0)


def _cross_entropy(logits: Array, targets: dict[str, Array]) -> Array:
    return losses.cross_entropy(logits, targets["labels"])


def batches(key: Key, num_rows: int, batch_size: int, steps: int) -> np.ndarray:
    """Draw the rows of each step: from one shuffle of all rows after another, dropping each shuffle's incomplete last batch.

    Args:
        key: draws the shuffles.
        num_rows: at least 1.
        batch_size: at least 1; smaller if there are fewer rows.
        steps: at least 1.

    Returns:
        int32 [steps, batch], from 0 to num_rows - 1.
    """
    batch_size = min(batch_size, num_rows)
    per_shuffle = num_rows // batch_size
    shuffles = [permutation(jax.random.fold_in(key, i), num_rows) for i in range(-(-steps // per_shuffle))]
    batched = [shuffle[: per_shuffle * batch_size].reshape(per_shuffle, batch_size) for shuffle in shuffles]
    return np.concatenate(batched)[:steps]
