"""VBD, stages 5 and 6 (Aseervatham et al. 2025, algorithm 3): a detector for each pattern, and the rows that it flags.

A detector is a small network on gradient images g(x; c) of the simple network that revealed the pattern. It learns from rows
of other classes, each of them in a step both unchanged (0) and with the pattern blended in at a random opacity (1); after some
epochs, rows of class c itself are added, with the detector's own predictions as labels (pseudo-labels), as many as there are
rows of other classes, so a third of the step.

Algorithm 3 prints that the rows with y != c are removed; the text and the code train on them. The opacities are U(0.1, 1) in
the paper and U(0.2, 1) in the code. Pseudo-labels are renewed whenever a row is used rather than once an epoch, at no cost,
since its gradient is computed anyway; a row that has none yet is not learned from. The code ends an epoch with the rows of
class c, so that its epochs become shorter once these are added; here every epoch has all rows of other classes.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses import vbd_patterns
from bdjax.defenses.contract import DefenseInput, fingerprint
from bdjax.defenses.vbd_patterns import Candidate, VBDSettings
from bdjax.models import embedding
from bdjax.models.simple_cnn import last_layer, make_pattern_detector
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows
from bdjax.training.stages import Nets
from bdjax.types import Array, Key, Model, PyTree

NO_LABEL = -1.0
"""The pseudo-label of a row that was not labelled yet."""
SCALE_ROWS = 1000
"""Rows whose pixels give the standard deviations by which gradients are scaled."""


class Pattern(NamedTuple):
    """A pattern to train a detector for."""

    member: int
    label: int
    network: int


def epochs_for(epochs: int, least_steps: int, num_rows: int, batch_size: int) -> int:
    """The given epochs, or more if those have fewer than `least_steps` steps."""
    steps = max(num_rows // min(batch_size, num_rows), 1)
    return max(epochs, -(-least_steps // steps))


def pixels(inputs: DefenseInput, rows: np.ndarray) -> np.ndarray:
    """Images of the pool, float32 [..., H, W, C] in [0, 1]."""
    return np.asarray(inputs.pool[jnp.asarray(rows)], np.float32) / 255


def of_class(index: np.ndarray, classes: np.ndarray) -> Rows:
    """Rows of the pool with the class to evaluate, int [M, n] each."""
    return Rows(jnp.asarray(index, jnp.int32), {"class": jnp.asarray(classes, jnp.int32)})


@cache
def detector_objective(network: Model, settings: VBDSettings, batches_per_epoch: int) -> Objective:
    """Stage 5: binary cross-entropy of a detector on gradient images, with pseudo-labels for the rows of the class itself.

    `params` are the detector's; the variables hold the simple "network", its "mask" and "pattern", the "class", the factor of
    gradients ("scale", float32 [C]), the "pseudo_labels" float32 [rows of the class], which are 0, 1 or, before the first
    labelling, `NO_LABEL`, and the number of "steps". A row is a pair: a row of another class, and a row of the class itself,
    whose number within the class is targets["class_row"]. Accuracy is measured on the rows of other classes alone, half of them
    unchanged and the other half with the pattern.
    """
    detector = make_pattern_detector()

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        opacity_key, dropout_key = jax.random.split(key)
        count = len(images)
        class_count = max(1, round(settings.own_rows * count))
        others, of_class, which = images[:, 0], images[:class_count, 1], targets["class_row"][:class_count]
        opacity = jax.random.uniform(opacity_key, (count, 1, 1, 1), minval=settings.least_opacity)
        patched = vbd_patterns.blend(others, variables["mask"][None], variables["pattern"][None], opacity)
        gradients = scaled_gradients(network, variables, jnp.concatenate([others, patched, of_class]))
        flat = embedding(detector.apply(_weights(params), gradients, train=True).features)
        is_kept = jax.random.bernoulli(dropout_key, 1 - settings.dropout, flat.shape)
        output = last_layer(params, jnp.where(is_kept, flat / (1 - settings.dropout), 0))[:, 0]
        class_output = last_layer(params, flat[2 * count :])[:, 0]  # without dropout; gives labels only, no gradient

        epoch = variables["steps"] // batches_per_epoch
        is_labelling = (epoch >= settings.first_labelling) & (epoch <= settings.last_labelling)
        pseudo_labels = variables["pseudo_labels"]
        is_learned = (pseudo_labels[which] >= 0) & (epoch > settings.first_labelling)
        clean, patched = jnp.split(output[: 2 * count], 2)
        pair_losses = jax.nn.softplus(clean) + jax.nn.softplus(-patched)
        class_losses = optax.sigmoid_binary_cross_entropy(output[2 * count :], pseudo_labels[which])
        # The mean over all images of the step, written as a loss for each row of another class.
        class_loss = jnp.sum(jnp.where(is_learned, class_losses, 0))
        losses = (count * pair_losses + class_loss) / (2 * count + jnp.sum(is_learned, dtype=jnp.float32))
        renewed = pseudo_labels.at[which].set((class_output >= 0).astype(jnp.float32))
        variables = {
            **variables,
            "pseudo_labels": jnp.where(is_labelling, renewed, pseudo_labels),
            "steps": variables["steps"] + 1,
        }
        is_patched = jnp.arange(count) < count // 2
        shown = jnp.where(is_patched, patched, clean)
        return Outcome(
            losses, jnp.stack([jnp.zeros_like(shown), shown], axis=1), is_patched.astype(jnp.int32), variables
        )

    return objective


def _weights(params: PyTree) -> PyTree:
    return {"params": params, "batch_stats": {}}


def scaled_gradients(network: Model, variables: PyTree, images: Array) -> Array:
    """A detector's input: g for its class, as if pixels were standardised. No gradient flows through it."""
    classes = jnp.full(len(images), variables["class"])
    gradients = vbd_patterns.margin_gradients(network, variables["network"], images, classes)
    return jax.lax.stop_gradient(gradients * variables["scale"][None, None, None])


@cache
def row_detections(network: Model) -> Callable[..., Array]:
    """For `StageRunner.per_row`: the probability that a row carries the pattern, float32 [B]."""
    detector = make_pattern_detector()

    def probabilities(variables: PyTree, images: Array, targets: dict[str, Array]) -> Array:
        del targets
        gradients = scaled_gradients(network, variables, images)
        return jax.nn.sigmoid(detector.apply(_weights(variables["params"]), gradients, train=False).logits[:, 0])

    return probabilities


def train_detectors(
    inputs: DefenseInput,
    settings: VBDSettings,
    nets: Nets,
    patterns: list[Pattern],
    found: list[list[Candidate]],
    rows: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Stages 5 and 6 for patterns of one network: train a detector for each, and apply it to the rows of its class.

    Args:
        inputs: the suspects.
        settings: of the defense.
        nets: one simple network, trained on each suspect.
        patterns: the suspects and classes to train detectors for.
        found: the candidates of this network, of each suspect and class.
        rows: int [M, r], rows of the training sets to train on.

    Returns:
        For each pattern: the rows of its class, int [n_c]; the probability of each row, float32 [n_c]; and the detector's
        training accuracy in the last epoch.
    """
    per_epoch = round(rows.shape[1] * (inputs.num_classes - 1) / inputs.num_classes)
    per_epoch = min(per_epoch, settings.most_detector_rows or per_epoch)
    batch_size = min(settings.detector_batch_size, per_epoch)
    pairs, class_counts, scales = [], [], []
    for member, label, _ in patterns:
        labels = inputs.labels[member, rows[member]]
        others, in_class = rows[member, labels != label], rows[member, labels == label]
        number = np.arange(per_epoch)
        # As many rows of other classes as a balanced set has; rows of the class itself are repeated.
        views = [inputs.index[member, numbers[number % len(numbers)]] for numbers in (others, in_class)]
        pairs.append(np.stack(views, axis=-1))
        class_counts.append(len(in_class))
        sample = inputs.index[member, rows[member, :SCALE_ROWS]]
        scales.append(pixels(inputs, sample).std(axis=(0, 1, 2)))
    class_row = np.stack([np.arange(per_epoch) % count for count in class_counts])
    targets = {"labels": jnp.zeros(class_row.shape, jnp.int32), "class_row": jnp.asarray(class_row, jnp.int32)}
    members = np.array([pattern.member for pattern in patterns])
    candidates = [found[pattern.member][pattern.label] for pattern in patterns]
    keys = inputs.keys_for("vbd: detectors")
    keys = jnp.stack([jax.random.fold_in(keys[pattern.member], pattern.label) for pattern in patterns])
    init_keys, shuffle_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    detector = make_pattern_detector()
    variables = {
        "params": ensemble.init_members(lambda key: detector.init(key, inputs.runner.image_shape)["params"], init_keys),
        "network": ensemble.members(nets.variables, members),
        "mask": jnp.asarray([candidate.mask[..., None] for candidate in candidates], jnp.float32),
        "pattern": jnp.asarray([candidate.pattern for candidate in candidates]),
        "class": jnp.asarray([pattern.label for pattern in patterns], jnp.int32),
        "scale": jnp.asarray(np.stack(scales), jnp.float32),
        "pseudo_labels": jnp.full((len(patterns), max(class_counts)), NO_LABEL, jnp.float32),
        "steps": jnp.zeros(len(patterns), jnp.int32),
    }
    config = inputs.config(
        epochs=epochs_for(settings.detector_epochs, settings.least_detector_steps, per_epoch, batch_size),
        batch_size=batch_size,
        optimiser="sgd",
        momentum=0.9,
        nesterov=False,
        learning_rate=settings.detector_learning_rate,
        weight_decay=settings.detector_weight_decay,
        schedule="constant",
        augmentation="none",
        keep_last_batch=False,
    )
    masks = [candidate.mask.tobytes() for candidate in candidates]
    trained = inputs.runner.from_variables(
        f"vbd: detectors of {nets.model.description} {fingerprint(settings=settings, patterns=patterns, masks=masks)}",
        detector,
        config,
        variables,
        shuffle_keys,
        1,
        inputs.pool,
        Rows(jnp.asarray(np.stack(pairs), jnp.int32), targets),
        detector_objective(nets.model, settings, per_epoch // batch_size),
    )
    class_rows = [np.flatnonzero(inputs.labels[member] == label) for member, label, _ in patterns]
    longest = max(map(len, class_rows))
    padded = np.stack(
        [
            inputs.index[pattern.member, np.resize(numbers, longest)]
            for pattern, numbers in zip(patterns, class_rows, strict=True)
        ]
    )
    probabilities = inputs.runner.per_row(
        row_detections(nets.model),
        trained.variables,
        of_class(padded, np.zeros_like(padded)),
        inputs.pool,
        inputs.recipe.evaluation_batch_size,
    )
    accuracies = trained.history["accuracy"][:, -1]
    return [(numbers, probabilities[i, : len(numbers)], float(accuracies[i])) for i, numbers in enumerate(class_rows)]
