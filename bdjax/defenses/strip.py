"""STRIP: an image whose prediction no other image can disturb carries a trigger (Gao et al. 2019).

Lay N clean images over the image that came in, one at a time. What a clean image is predicted as changes with what lies over
it, so its N predictions are of high entropy; a trigger survives the mix, and they all say the target class. At test time

    H(x) = -1/N sum_n sum_k p_k(x_n) log p_k(x_n),   x_n = the mix of x and the n-th clean image       (Gao et al., eq. 3-4)

is held against a threshold that clean images fall below as seldom as the defender will have it. What is below is rejected:
the defended classifier has one more class, K, for that, and answers as the network does otherwise.

The threshold is the quantile of the entropies of the clean rows that the defender has, where the paper fits a normal
distribution to them; entropies are not negative, and much of them lies close to 0. The images to lay over come from the same
rows, so a row's own image is left out of its own entropy: laid over itself an image stays as it is, which says nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.defenses.contract import Defense, DefenseInput, labelled
from bdjax.errors import InputError
from bdjax.settings import check_values
from bdjax.training.member import as_float
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

NAME = "strip"
MODES = ("convex", "sum")
FAR = 1e6  # how far the logit of "rejected" is above, or below, all others


@dataclass(frozen=True)
class StripSettings:
    """How images are mixed, and how many clean ones may be rejected."""

    num_overlays: int = 100
    """N, the clean images to lay over; all clean rows where there are fewer"""
    false_rejection_rate: float = 0.01
    """share of the clean rows below the threshold, at most; 0.05 in BackdoorBench"""
    mode: Literal["convex", "sum"] = "convex"
    """convex: (1 - weight) x + weight x'; sum: x + weight x', which may leave the range of pixels, as in public code"""
    weight: float = 0.5
    """of the image that is laid over; sums in the paper's code have 1"""


def check(settings: StripSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        f"defense {NAME}",
        settings,
        choices={"mode": MODES},
        at_least={"num_overlays": 2, "false_rejection_rate": 0},
        above={"weight": 0},
        at_most={"weight": 1},
        below={"false_rejection_rate": 1},
    )


def mix(images: Array, overlay: Array, mode: str, weight: float) -> Array:
    """Lay one image over others.

    Args:
        images: float32 [B, H, W, C] in [0, 1].
        overlay: float32 [H, W, C] in [0, 1].
        mode: a key of `MODES`.
        weight: of the overlay.

    Returns:
        float32 [B, H, W, C]; in [0, 1] if the mode is convex.
    """
    kept = 1.0 - weight if mode == "convex" else 1.0
    return kept * images + weight * overlay[None]


def mixed_entropies(
    predict: Callable[[Array], Array], images: Array, overlays: Array, mode: str, weight: float
) -> Array:
    """The entropy of what is predicted for each image under each overlay, in nats (equation 3).

    One overlay at a time, so memory is that of one batch however many overlays there are.

    Args:
        predict: from images float32 [B, H, W, C] to logits float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        overlays: float32 [N, H, W, C] in [0, 1].
        mode: a key of `MODES`.
        weight: of the overlay.

    Returns:
        float32 [B, N], in [0, log K].
    """

    def under(overlay: Array) -> Array:
        logs = jax.nn.log_softmax(predict(mix(images, overlay, mode, weight)))
        return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

    return lax.map(under, overlays).T


@cache
def rejecting(model: Model, num_overlays: int, mode: str, weight: float) -> Model:
    """The network with one more class, K, which it answers for images whose mixes it is too sure of.

    Its variables are {"network": the network's, "overlays": float32 [N, H, W, C] in [0, 1], "threshold": float32 []}. Fresh
    ones reject nothing. Its taps are those of the image as it came in.

    Args:
        model: the network to serve.
        num_overlays: N.
        mode: a key of `MODES`.
        weight: of the overlay.

    Returns:
        The model. It has logits float32 [B, K + 1], and raises ValueError if it is called to be trained: train the network.
    """

    def init(key: Key, image_shape: tuple[int, int, int]) -> PyTree:
        overlays = jnp.zeros((num_overlays, *image_shape), jnp.float32)
        return {"network": model.init(key, image_shape), "overlays": overlays, "threshold": jnp.float32(0.0)}

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        if train:
            raise ValueError("a network behind STRIP is for serving; train the network itself")

        def network(images: Array) -> ModelOutput:
            return model.apply(variables["network"], images, train=False, edits=edits)

        plain = network(images)
        entropies = mixed_entropies(lambda mixed: network(mixed).logits, images, variables["overlays"], mode, weight)
        is_rejected = jnp.mean(entropies, axis=1) < variables["threshold"]
        above, below = (jnp.max(plain.logits, axis=1) + FAR, jnp.min(plain.logits, axis=1) - FAR)
        extra = jnp.where(is_rejected, above, below)
        return ModelOutput(jnp.concatenate([plain.logits, extra[:, None]], axis=1), plain.features, variables)

    return Model(init, apply, model.num_classes + 1, f"{model.description} behind STRIP of {num_overlays} overlays")


@cache
def row_entropies(model: Model, mode: str, weight: float) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: each row's entropy H, its own image among the overlays left out.

    Variables hold "network" and "overlays", targets "own": int32 [B], which overlay the row is, or -1.
    """

    def function(variables: PyTree, images: Array, targets: dict[str, Array]) -> Array:
        overlays = variables["overlays"]
        entropies = mixed_entropies(
            lambda mixed: model.apply(variables["network"], mixed, train=False).logits, images, overlays, mode, weight
        )
        counts = (targets["own"][:, None] != jnp.arange(len(overlays))[None]).astype(jnp.float32)
        return jnp.sum(counts * entropies, axis=1) / jnp.sum(counts, axis=1)

    return function


def choose_overlays(keys: Key, num_rows: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw each member's overlays from its clean rows.

    Args:
        keys: typed [M].
        num_rows: c.
        count: N, at most c.

    Returns:
        Which rows, int32 [M, N], and of each row which overlay it is or -1, int32 [M, c].
    """
    chosen = np.asarray(jax.vmap(lambda key: jax.random.permutation(key, num_rows)[:count])(keys)).astype(np.int32)
    own = np.full((len(chosen), num_rows), -1, np.int32)
    np.put_along_axis(own, chosen, np.arange(count, dtype=np.int32)[None], axis=1)
    return chosen, own


def run(inputs: DefenseInput, settings: StripSettings) -> DefenseResult:
    """Put the attacked networks behind STRIP.

    Args:
        inputs: the suspects; used are their attacked networks and clean rows.
        settings: how.

    Returns:
        Networks that answer K, one more than the classes, for what they reject. There are no flags: it sees no training set.

    Raises:
        InputError: a setting that cannot be, or fewer than two clean rows.

    References:
        Gao et al. 2019, section 5.
    """
    check(settings)
    rows, network = inputs.clean_rows(), inputs.attacked
    num_clean = rows.index.shape[1]
    if num_clean < 2:
        raise InputError(f"defense {NAME}: {num_clean} clean rows are too few: there must be another to lay over one")
    count = min(settings.num_overlays, num_clean)
    chosen, own = choose_overlays(inputs.keys_for("strip: overlays"), num_clean, count)
    overlays = as_float(inputs.pool[np.take_along_axis(inputs.clean_index, chosen, axis=1)])
    rows = labelled(inputs.clean_index, inputs.clean_labels)._replace(
        targets={"labels": rows.targets["labels"], "own": jnp.asarray(own)}
    )
    variables = {"network": network.variables, "overlays": overlays}
    entropies = inputs.per_row(row_entropies(network.model, settings.mode, settings.weight), variables, rows)
    # The lower of two neighbours, so that no larger share of the clean rows than asked for is below it.
    thresholds = np.quantile(entropies, settings.false_rejection_rate, axis=1, method="lower").astype(np.float32)
    model = rejecting(network.model, count, settings.mode, settings.weight)
    facts = {"threshold": thresholds, "median entropy of the clean rows": np.median(entropies, axis=1)}
    return DefenseResult(model, {**variables, "threshold": jnp.asarray(thresholds)}, facts=facts)


STRIP = Defense(
    name=NAME,
    title="STRIP",
    paper="Gao et al. 2019, STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
    stage="at test time",
    needs=("attacked model", "clean rows"),
    settings=StripSettings(),
    run=run,
    check=check,
    changes={
        "quick": {"num_overlays": 20},
        # At half its brightness a patch of a few pixels is no trigger any more; on black, a sum keeps it whole, as in the
        # paper's code. Pictures that are blended in are the other way round: the sum hides them, the mean does not.
        "quick digits": {"mode": "sum", "weight": 1.0},
    },
)
