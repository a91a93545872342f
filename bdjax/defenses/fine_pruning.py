"""Fine-pruning (Liu et al. 2018): prune the channels that are inactive on clean images, then fine-tune the network.

The idea is that a backdoor uses channels that are active for the trigger alone. The channels of the last tap, whose average is
the classifier's input, are ordered by their mean activation over clean rows. The least active ones are pruned first, a few at a
time, as long as the accuracy stays within a tolerance of the original. Fine-tuning on the clean rows follows, with the mask in
place: a pruned channel stays pruned.

Bugs of public code that this implementation avoids: it stops by the accuracy on *test* images; it prunes one channel fewer than
it counts; its "last good" network is an alias of the one that is pruned further, so the over-pruned network is fine-tuned; and
it masks the classifier's columns, so that the features seen by everything else do not change.

Here a share of the clean rows of each class is held out from the ordering and used by the stopping rule alone: with a share of
a fifth, at least one row of every class that has three. Fine-tuning, after which nothing is selected, uses all clean rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.defenses.fine_tuning import cosine_sgd, tune, weight_change
from bdjax.errors import InputError
from bdjax.models import last_tap
from bdjax.settings import Amount, Count, InnerShare, LearningRate, NotNegative, PositiveShare, Share
from bdjax.training.member import Rows
from bdjax.types import Array, DefenseResult, Model, ModelOutput, PyTree


@dataclass(frozen=True)
class FinePruningSettings:
    step: PositiveShare = 0.01
    """share of the channels pruned at a time; at least one channel"""
    tolerance: Share = 0.1
    """r: pruning continues while the held-out accuracy is at least (1 - r) times the unpruned network's"""
    held_out: InnerShare = 0.2
    """share of the clean rows that is held out from the ordering for the stopping rule"""
    epochs: Amount = 100
    """epochs of fine-tuning; 0 for pruning alone"""
    batch_size: Count = 256
    """clean rows in a step; all of them if there are fewer"""
    learning_rate: LearningRate = 0.01
    """initial learning rate of SGD with momentum 0.9 and a half-cosine schedule"""
    weight_decay: NotNegative = 5e-4
    """L2 penalty on every parameter"""


def split_rows(
    labels: np.ndarray, share: float, generators: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray]:
    """Split each member's rows, class by class, into those that order the channels and those that are held out.

    The number of held-out rows is the same for all members, whatever their labels.

    Args:
        labels: int32 [M, c].
        share: share of the rows to hold out, in (0, 1).
        generators: of each member.

    Returns:
        Row numbers int32 [M, c - k] and [M, k], where k is share * c, rounded; disjoint, and together 0..c-1.

    Raises:
        InputError: one of the two parts would be empty.
    """
    count = labels.shape[1]
    num_held = round(share * count)
    if not 0 < num_held < count:
        raise InputError(
            f"defense fine_pruning: held_out {share} of {count} clean rows is {num_held} rows: at least 1 must be held out "
            "and at least 1 must remain"
        )
    order = []
    for member_labels, generator in zip(labels, generators, strict=True):
        shuffled = generator.permutation(count)
        # A row's place within its class, from 0 to 1: the first k by place are about the same share of every class.
        place = np.empty(count)
        for label in np.unique(member_labels):
            rows = shuffled[member_labels[shuffled] == label]
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        order.append(shuffled[np.argsort(place[shuffled], kind="stable")])
    order = np.stack(order).astype(np.int32)
    return order[:, num_held:], order[:, :num_held]


def pruned_counts(num_channels: int, step: float) -> np.ndarray:
    """The number of pruned channels after each step: int [S], starting at 0; at least one channel always remains."""
    at_a_time = max(1, round(step * num_channels))
    return np.arange(0, num_channels, at_a_time)


def cumulative_masks(activation: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Masks that prune the least active channels.

    Args:
        activation: float [C], each channel's mean over clean rows; of equal channels the first is pruned first.
        counts: int [S], the numbers of channels to prune.

    Returns:
        float32 [S, C]: row s is 0 for exactly counts[s] channels, and 1 for the others.
    """
    rank = np.argsort(np.argsort(activation, kind="stable"), kind="stable")
    return (rank[None, :] >= counts[:, None]).astype(np.float32)


def last_good(accuracy: np.ndarray, tolerance: float) -> int:
    """The index in `accuracy` [S] before the first that falls below (1 - tolerance) accuracy[0]."""
    is_bad = accuracy < (1 - tolerance) * accuracy[0] - 1e-9  # rounding errors do not count as a loss
    return int(np.argmax(is_bad)) - 1 if is_bad.any() else len(accuracy) - 1


@cache
def pruned_model(model: Model, tap: str) -> Model:
    """The network with a mask on the channels of a tap.

    Args:
        model: the network.
        tap: name of the tap.

    Returns:
        A model whose variables also contain a "mask", float32 [C], which training does not change.
    """

    def init(key: Array, image_shape: tuple[int, int, int]) -> PyTree:
        variables = model.init(key, image_shape)
        features = jax.eval_shape(
            lambda: model.apply(variables, jnp.zeros((1, *image_shape), jnp.float32), train=False).features[tap]
        )
        return {**variables, "mask": jnp.ones(features.shape[-1], jnp.float32)}

    def apply(
        variables: PyTree, images: Array, *, train: bool, edits: dict[str, Callable[[Array], Array]] | None = None
    ) -> ModelOutput:
        edits = dict(edits or {})
        edit = edits.get(tap, lambda features: features)
        mask = variables["mask"]
        edits[tap] = lambda features: edit(features * mask[None, None, None, :])
        network = {name: value for name, value in variables.items() if name != "mask"}
        output = model.apply(network, images, train=train, edits=edits)
        return output._replace(variables={**output.variables, "mask": mask})

    return Model(init, apply, model.num_classes, f"{model.description}, pruned")


@cache
def row_hits(model: Model, tap: str) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: whether each row is classified correctly under each of S masks.

    Returns:
        A function of the variables {"network": ..., "masks": float32 [S, C]} to bool [B, S].
    """

    def hits(variables: PyTree, images: Array, targets: dict[str, Array]) -> Array:
        network = variables["network"]
        features = model.apply(network, images, train=False).features[tap]

        def under(mask: Array) -> Array:
            # The edit ignores what the network computes up to the tap, so the compiler removes it: a mask costs only the
            # layers after the tap.
            masked = features * mask[None, None, None, :]
            logits = model.apply(network, images, train=False, edits={tap: lambda _: masked}).logits
            return jnp.argmax(logits, axis=1) == targets["labels"]

        return jax.lax.map(under, variables["masks"]).T

    return hits


def prune(inputs: DefenseInput, settings: FinePruningSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose the channels of each attacked network to prune.

    Args:
        inputs: the suspects.
        settings: `step`, `tolerance` and `held_out` are used.

    Returns:
        The masks, float32 [M, C]; and the held-out accuracy before and after pruning, float [M] each, in [0, 1].
    """
    model, variables = inputs.attacked.model, inputs.attacked.variables
    all_rows = inputs.clean_rows()
    labels = np.asarray(all_rows.targets["labels"])
    ordering, held = split_rows(labels, settings.held_out, inputs.generators("fine-pruning: held-out rows"))

    def take(rows: np.ndarray) -> Rows:
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, jnp.asarray(rows), axis=1), all_rows)

    activation = inputs.embeddings(model, variables, take(ordering)).mean(axis=1)
    counts = pruned_counts(activation.shape[1], settings.step)
    masks = np.stack([cumulative_masks(member_activation, counts) for member_activation in activation])
    tap = _last_tap(inputs)
    hits = inputs.per_row(row_hits(model, tap), {"network": variables, "masks": jnp.asarray(masks)}, take(held))
    accuracy = hits.mean(axis=1)
    best = np.array([last_good(member_accuracy, settings.tolerance) for member_accuracy in accuracy])
    members = np.arange(len(best))
    return masks[members, best], accuracy[:, 0], accuracy[members, best]


def _last_tap(inputs: DefenseInput) -> str:
    variables = jax.tree.map(lambda leaf: leaf[0], inputs.attacked.variables)
    return last_tap(inputs.attacked.model, variables, inputs.runner.image_shape)


def run(inputs: DefenseInput, settings: FinePruningSettings) -> DefenseResult:
    """Prune the attacked networks, then fine-tune them with their masks.

    Raises:
        InputError: there are too few clean rows to hold some out.
    """
    masks, before, after = prune(inputs, settings)
    model = pruned_model(inputs.attacked.model, _last_tap(inputs))
    config = cosine_sgd(inputs, settings)
    variables = {**inputs.attacked.variables, "mask": jnp.asarray(masks)}
    tuned = tune(inputs, f"fine-pruning {fingerprint(**vars(settings))}", model, config, variables)
    return DefenseResult(
        model,
        tuned,
        facts={
            "channels pruned": (masks == 0).sum(axis=1),
            "of channels": np.full(len(masks), masks.shape[1]),
            "held-out accuracy before": before,
            "held-out accuracy pruned": after,
            "weight change": weight_change(inputs.attacked.variables["params"], tuned["params"]),
        },
    )


FINE_PRUNING = Defense(
    name="fine_pruning",
    title="FP",
    paper="Liu et al. 2018, Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=FinePruningSettings(),
    run=run,
    changes={
        "quick": {"epochs": 30, "batch_size": 32, "learning_rate": 0.05},
        "quick digits": {"learning_rate": 0.15},
    },
)
