"""Teachers for TA-KD: anything that returns logits."""

from collections.abc import Callable, Sequence

import numpy as np

from bdjax.errors import InputError
from bdjax.types import Array, Classifier, PyTree

TeacherLogits = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> float32 [N, B, K], the logits of N teachers."""


def from_members(predict: Callable[[PyTree, Array], Array], variables: PyTree) -> TeacherLogits:
    """Use stacked bdjax members as teachers.

    Args:
        predict: from `bdjax.training.ensemble.make_predict`.
        variables: stacked [N, ...].
    """
    return lambda images: np.asarray(predict(variables, images))


def from_classifiers(classifiers: Sequence[Classifier], num_classes: int) -> TeacherLogits:
    """Use Python callables as teachers: for example a PyTorch model, or a function that queries a remote service.

    They are called outside compiled functions, once for each set of images, and are not differentiated.

    Args:
        classifiers: each maps float32 [B, H, W, C] in [0, 1] to logits [B, K].
        num_classes: K.

    Raises:
        InputError: no classifiers; later, one that returns another shape or values that are not finite.
    """
    if not classifiers:
        raise InputError("no teachers: TA-KD needs at least one")

    def logits(images: np.ndarray) -> np.ndarray:
        outputs = []
        for i, classifier in enumerate(classifiers):
            output = np.asarray(classifier(images.astype(np.float32) / 255), np.float32)
            if output.shape != (len(images), num_classes):
                raise InputError(
                    f"teacher {i + 1} returned logits of shape {output.shape}; should be {(len(images), num_classes)}"
                )
            if not np.isfinite(output).all():
                raise InputError(f"teacher {i + 1} returned logits that are not finite")
            outputs.append(output)
        return np.stack(outputs)

    return logits
