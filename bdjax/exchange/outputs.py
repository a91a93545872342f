"""What a black-box classifier returns, as logits: `--outputs=logits|probabilities|labels`.

Distillation and votes work on logits. Probabilities are as good: their logarithms are logits, up to a constant for each image,
which a softmax removes. Predicted labels say less: each becomes the logarithm of a smoothed one-hot vector, the same for every
image of a class, so that nothing is left of how sure the classifier was.
"""

from typing import Literal, get_args

import numpy as np

from bdjax.defenses.teachers import NEARLY, as_array, name_of
from bdjax.errors import InputError
from bdjax.types import Classifier

Outputs = Literal["logits", "probabilities", "labels"]

LEAST_PROBABILITY = 1e-7
"""Smaller probabilities count as this, so that a logarithm is at least -16.1: float32 has rounded many of them to 0."""
LABEL_SMOOTHING = 0.1
"""Share of a label's one-hot vector that is spread over all classes (Szegedy et al. 2016, section 7)."""


def as_logits(output: np.ndarray, outputs: Outputs, num_classes: int) -> np.ndarray:
    """Convert what a classifier returned for N images.

    Args:
        output: logits or probabilities float [N, K], or labels: integers [N], or one-hot vectors [N, K].
        outputs: which of these. Logits are returned as they are, whatever their shape: `bdjax.defenses.teachers.ask` checks
            them.
        num_classes: K.

    Returns:
        float [N, K]: logits; the logarithms of probabilities, clipped at `LEAST_PROBABILITY`; or those of one-hot vectors
        smoothed by `LABEL_SMOOTHING`.

    Raises:
        InputError: `outputs` is unknown; probabilities that are negative or do not sum to 1; labels that are no classes.
    """
    check_outputs(outputs)
    if outputs == "logits":
        return output
    if outputs == "labels":
        one_hot = np.eye(num_classes)[_labels(output, num_classes)]
        return np.log((1 - LABEL_SMOOTHING) * one_hot + LABEL_SMOOTHING / num_classes).astype(np.float32)
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise InputError(f"it returned probabilities of shape {output.shape}; should be {(len(output), num_classes)}")
    if not np.isfinite(output).all():
        raise InputError("it returned probabilities that are not finite")
    sums = output.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((np.abs(sums - 1) > NEARLY) | (output.min(axis=1) < -NEARLY))
    if len(wrong):
        row = output[wrong[0]]
        raise InputError(
            f"it returned numbers that are no probabilities: row {wrong[0]} has {row.min():.4g} to {row.max():.4g} and sum "
            f"{sums[wrong[0]]:.4g}; if these are the numbers before the softmax, use --outputs=logits"
        )
    return np.log(np.maximum(output, LEAST_PROBABILITY)).astype(np.float32)


def _labels(output: np.ndarray, num_classes: int) -> np.ndarray:
    """Class numbers [N] of labels in either form."""
    is_binary = output.ndim == 2 and output.shape[1] == num_classes and np.isin(output, (0, 1)).all()
    if is_binary and (output.sum(axis=1) == 1).all():
        return np.argmax(output, axis=1)
    labels = output[:, 0] if output.ndim == 2 and output.shape[1] == 1 else output
    if labels.ndim != 1:
        raise InputError(
            f"it returned labels of shape {output.shape}; should be class numbers {(len(output),)} or one-hot vectors "
            f"{(len(output), num_classes)}"
        )
    wrong = np.flatnonzero(~(np.isin(labels, np.arange(num_classes))))
    if len(wrong):
        raise InputError(
            f"it returned label {labels[wrong[0]]} for row {wrong[0]}; labels are whole numbers from 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)


def convert(classifier: Classifier, outputs: Outputs, num_classes: int) -> Classifier:
    """A classifier of logits from a classifier of other outputs; see `as_logits`.

    Args:
        classifier: maps float32 [B, H, W, C] in [0, 1] to these outputs.
        outputs: what they are.
        num_classes: K.
    """
    check_outputs(outputs)
    if outputs == "logits":
        return classifier
    name = name_of(classifier)

    def logits(images: np.ndarray) -> np.ndarray:
        return as_logits(as_array(classifier(images), "it"), outputs, num_classes)

    logits.__name__ = name
    return logits


def check_outputs(outputs: str) -> None:
    """Raises InputError if this is not one of the kinds of `Outputs`."""
    if outputs not in get_args(Outputs):
        raise InputError(f"outputs {outputs!r} is not one of {', '.join(get_args(Outputs))}")
