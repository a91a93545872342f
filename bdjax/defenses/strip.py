"""STRIP: an image whose prediction no overlay changes carries a trigger (Gao et al. 2019).

Blend the incoming image with N clean images, one at a time. The prediction of a clean image changes with the overlay, so its N
predictions have high entropy; a trigger survives the blend, and all N predict the target class with certainty. At test time

    H(x) = -1/N sum_n sum_k p_k(x_n) log p_k(x_n),   x_n = the mix of x and the n-th clean image       (Gao et al., eq. 3-4)

is compared with a threshold, chosen for the share of clean images that the defender accepts to lose. An image below it is
rejected: the defended classifier predicts an extra class, K. All other images are predicted as before.

The threshold is a quantile of the entropies of the defender's clean rows, where the paper fits a normal distribution to them;
entropies are not negative, and many lie close to 0. The overlays are clean rows too, so a row is left out of its own entropy:
an image blended with itself is unchanged, which carries no information.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.defenses.contract import Defense, DefenseInput, Facts, labelled, unless_finite
from bdjax.errors import InputError
from bdjax.settings import PositiveShare, Range, ShareBelowOne, check_values
from bdjax.training.member import as_float
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, NotTested, PyTree

NAME = "strip"
MODES = ("convex", "sum")
LEAST_CLEAN = 2  # rows: an overlay is left out of its own entropy, so a single row has none
FAR = 1e6  # distance of the logit of "rejected" from all other logits


@dataclass(frozen=True)
class StripSettings:
    """How images are blended, and how many clean images may be rejected."""

    num_overlays: Annotated[int, Range(at_least=2, limit=10_000)] = 100
    """N, number of overlays, at most the number of clean rows; more cost as many more predictions"""
    false_rejection_rate: ShareBelowOne = 0.01
    """largest share of the clean rows below the threshold, in [0, 1); 0.05 in BackdoorBench"""
    mode: Literal["convex", "sum"] = "convex"
    """"convex": (1 - weight) x + weight x'; "sum": x + weight x', which may leave the range of pixels, as in public code"""
    weight: PositiveShare = 0.5
    """weight of the overlay, in (0, 1]; 1 for the sums in the paper's code"""


def check(settings: StripSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        f"defense {NAME}",
        settings,
        choices={"mode": MODES},
    )


def least(settings: StripSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    del settings
    count = int(facts.clean_rows.sum())
    if count >= LEAST_CLEAN:
        return NotTested()
    return NotTested(f"needs at least {LEAST_CLEAN} clean rows to blend with each other; there are {count}")


def mix(images: Array, overlay: Array, mode: str, weight: float) -> Array:
    """Blend one image into others.

    Args:
        images: float32 [B, H, W, C] in [0, 1].
        overlay: float32 [H, W, C] in [0, 1].
        mode: one of `MODES`.
        weight: of the overlay.

    Returns:
        float32 [B, H, W, C]; in [0, 1] if the mode is convex.
    """
    image_weight = 1.0 - weight if mode == "convex" else 1.0
    return image_weight * images + weight * overlay[None]


def mixed_entropies(
    predict: Callable[[Array], Array], images: Array, overlays: Array, mode: str, weight: float
) -> Array:
    """The entropy of the prediction for each image under each overlay, in nats (equation 3).

    One overlay at a time, so memory does not grow with the number of overlays.

    Args:
        predict: from images float32 [B, H, W, C] to logits float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        overlays: float32 [N, H, W, C] in [0, 1].
        mode: one of `MODES`.
        weight: of the overlay.

    Returns:
        float32 [B, N], in [0, log K].
    """

    def entropies_under(overlay: Array) -> Array:
        logs = jax.nn.log_softmax(predict(mix(images, overlay, mode, weight)))
        return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

    return lax.map(entropies_under, overlays).T


@cache
def with_rejection(model: Model, num_overlays: int, mode: str, weight: float) -> Model:
    """The network with an extra class, K, which it predicts for images whose mean entropy is below the threshold.

    Its variables are {"network": the network's, "overlays": float32 [N, H, W, C] in [0, 1], "threshold": float32 []}. Fresh
    variables reject nothing. Its taps are those of the image without an overlay.

    Args:
        model: the network.
        num_overlays: N.
        mode: one of `MODES`.
        weight: of the overlay.

    Returns:
        The model, with logits float32 [B, K + 1]. It raises ValueError if called with `train`.
    """

    def init(key: Key, image_shape: tuple[int, int, int]) -> PyTree:
        overlays = jnp.zeros((num_overlays, *image_shape), jnp.float32)
        return {"network": model.init(key, image_shape), "overlays": overlays, "threshold": jnp.float32(0.0)}

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        if train:
            raise ValueError("a network behind STRIP cannot be trained; train the network without STRIP")

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
    """For `DefenseInput.per_row`: each row's entropy H, without the overlay that is the row itself.

    Variables hold "network" and "overlays", targets "overlay": int32 [B], which overlay is the row itself, or -1.
    """

    def function(variables: PyTree, images: Array, targets: dict[str, Array]) -> Array:
        overlays = variables["overlays"]
        entropies = mixed_entropies(
            lambda mixed: model.apply(variables["network"], mixed, train=False).logits, images, overlays, mode, weight
        )
        counts = (targets["overlay"][:, None] != jnp.arange(len(overlays))[None]).astype(jnp.float32)
        return jnp.sum(counts * entropies, axis=1) / jnp.sum(counts, axis=1)

    return function


def choose_overlays(keys: Key, num_rows: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw each member's overlays from its clean rows.

    Args:
        keys: typed [M].
        num_rows: c.
        count: N, at most c.

    Returns:
        The chosen rows, int32 [M, N], and for each clean row which overlay it is, or -1, int32 [M, c].
    """
    chosen = np.asarray(jax.vmap(lambda key: jax.random.permutation(key, num_rows)[:count])(keys)).astype(np.int32)
    overlay_of_row = np.full((len(chosen), num_rows), -1, np.int32)
    np.put_along_axis(overlay_of_row, chosen, np.arange(count, dtype=np.int32)[None], axis=1)
    return chosen, overlay_of_row


def run(inputs: DefenseInput, settings: StripSettings) -> DefenseResult:
    """Put the attacked networks behind STRIP.

    Args:
        inputs: the suspects; reads their attacked networks and clean rows.
        settings: of the defense.

    Returns:
        Networks that predict K, an extra class, for images they reject. There are no flags: STRIP does not use the training
        set.

    Raises:
        InputError: an invalid setting, or fewer than two clean rows.

    References:
        Gao et al. 2019, section 5.
    """
    check(settings)
    rows, network = inputs.clean_rows(), inputs.attacked
    num_clean = rows.index.shape[1]
    if num_clean < LEAST_CLEAN:
        raise InputError(f"defense {NAME}: {num_clean} clean rows are too few; it needs at least {LEAST_CLEAN}")
    count = min(settings.num_overlays, num_clean)
    chosen, overlay_of_row = choose_overlays(inputs.keys_for("strip: overlays"), num_clean, count)
    overlays = as_float(inputs.pool[np.take_along_axis(inputs.clean_index, chosen, axis=1)])
    rows = labelled(inputs.clean_index, inputs.clean_labels)._replace(
        targets={"labels": rows.targets["labels"], "overlay": jnp.asarray(overlay_of_row)}
    )
    variables = {"network": network.variables, "overlays": overlays}
    entropies = inputs.per_row(row_entropies(network.model, settings.mode, settings.weight), variables, rows)
    # "lower", so that at most the set share of the clean rows is below the threshold.
    thresholds = np.quantile(entropies, settings.false_rejection_rate, axis=1, method="lower").astype(np.float32)
    model = with_rejection(network.model, count, settings.mode, settings.weight)
    facts = {"threshold": thresholds, "median entropy of the clean rows": np.median(entropies, axis=1)}
    nothing = NotTested("needs a clean row whose entropy is above 0: no image has one below a threshold of 0")
    limits = tuple(
        unless_finite(of_member) if not np.isfinite(threshold) else NotTested() if threshold > 0 else nothing
        for of_member, threshold in zip(entropies, thresholds, strict=True)
    )
    return DefenseResult(model, {**variables, "threshold": jnp.asarray(thresholds)}, facts=facts, not_tested=limits)


STRIP = Defense(
    name=NAME,
    title="STRIP",
    paper="Gao et al. 2019, STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
    stage="at test time",
    needs=("attacked model", "clean rows"),
    settings=StripSettings(),
    run=run,
    check=check,
    least=least,
    changes={
        "quick": {"num_overlays": 20},
        # At half its brightness a patch of a few pixels no longer works as a trigger; on a black background a sum preserves it,
        # as in the paper's code. For blended triggers it is the other way round: the sum hides them, the mean does not.
        "quick digits": {"mode": "sum", "weight": 1.0},
    },
)
