"""What TA-KD asks of its teachers: logits. Anything that gives them can be a teacher."""

from collections.abc import Callable, Sequence

import numpy as np

from bdjax.errors import InputError
from bdjax.types import Array, Classifier, PyTree

TeacherLogits = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> float32 [N, B, K], the logits of N teachers."""


def from_members(predict: Callable[[PyTree, Array], Array], variables: PyTree) -> TeacherLogits:
    """Stacked bdjax members as teachers.

    Args:
        predict: of `bdjax.training.ensemble.make_predict`.
        variables: stacked [N, ...].
    """
    return lambda images: np.asarray(predict(variables, images))


def from_classifiers(classifiers: Sequence[Classifier], num_classes: int) -> TeacherLogits:
    """Any Python callables as teachers, a PyTorch model or a remote service behind a function, say.

    They are called from outside every compiled function, once for each set of images, and never differentiated.

    Args:
        classifiers: each maps float32 [B, H, W, C] in [0, 1] to logits [B, K].
        num_classes: K.

    Raises:
        InputError: when one returns another shape, or values that are not finite.
    """
    if not classifiers:
        raise InputError("no teachers were given: TA-KD needs at least one")

    def logits(images: np.ndarray) -> np.ndarray:
        answers = []
        for i, classifier in enumerate(classifiers):
            answer = np.asarray(classifier(images.astype(np.float32) / 255), np.float32)
            if answer.shape != (len(images), num_classes):
                raise InputError(
                    f"teacher {i + 1} returned logits of shape {answer.shape}; should be {(len(images), num_classes)}"
                )
            if not np.isfinite(answer).all():
                raise InputError(f"teacher {i + 1} returned logits that are not finite")
            answers.append(answer)
        return np.stack(answers)

    return logits
