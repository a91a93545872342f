"""The few types that pass between the parts. No logic lives here.

Shapes are written in trailing comments: N rows, H height, W width, C channels, K classes, M ensemble members.
Images are NHWC and 8-bit at rest; they become float32 in [0, 1] inside the compiled step, and triggers act on that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
"""A typed key of `jax.random.key`."""
PyTree = Any


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory."""

    images: np.ndarray
    """uint8 [N, H, W, C]"""
    labels: np.ndarray
    """int32 [N], in 0..num_classes-1"""
    num_classes: int
    name: str
    """as a report prints it: "cifar10" """
    source: str
    """where the rows came from: a path, a URL, "scikit-learn" """
    class_names: tuple[str, ...] = ()
    """empty, or num_classes names"""
    # Each row's file, relative to the folder or archive that the rows came from, with "/" between its parts; empty where
    # rows have no files of their own. Given by name only, so that `PoisonedDataset` may add fields by position.
    files: tuple[str, ...] = field(default=(), kw_only=True)
    """empty, or N names"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | np.ndarray | Sequence[int]) -> "Dataset":
        """Some rows, with all that is known of them: a slice, a mask bool [N], or numbers int [n]."""
        which = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows)]
        if which.ndim != 1:
            raise TypeError("rows of a dataset are chosen by a slice, a mask, or several numbers")
        per_row = ("images", "labels", "is_poisoned", "original_labels", "is_cover")
        taken = {name: getattr(self, name)[which] for name in per_row if hasattr(self, name)}
        return replace(self, **taken, files=tuple(self.files[row] for row in which) if self.files else ())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.images.shape[1:])


class TrainTest(NamedTuple):
    """What every dataset loader returns."""

    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class PoisonedDataset(Dataset):
    """A dataset of which some rows carry a trigger, with the truth about each row."""

    is_poisoned: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [N]"""
    original_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [N]"""
    is_cover: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [N]: triggered under its own label"""


class TriggerFamily(NamedTuple):
    """A family of triggers as two pure functions, both for one image.

    `init(key, image_shape) -> params` draws one instance (on the host; sizes may be data dependent);
    `apply(params, image, label, key) -> image` puts it on a float32 [H, W, C] image in [0, 1]. `label` and `key` are for
    triggers that depend on the class or are random per image; fixed triggers ignore them.
    """

    init: Callable[..., PyTree]
    apply: Callable[..., Array]


class GroupEnd(NamedTuple):
    """Where a group of blocks ends, which is where features are distilled: before the ReLU that comes next."""

    output: Array
    """float32 [N, h, w, C']: what the group hands on"""
    before_relu: Array
    """float32 [N, h, w, C]: the same once it stands before a ReLU, after whatever normalisation lies between"""
    mean: Array
    """float32 [C]: of each channel of that, as the normalisation's shift has it"""
    deviation: Array
    """float32 [C], at least 0: likewise the standard deviation, by its scale"""


class ModelOutput(NamedTuple):
    logits: Array
    """float32 [N, K]"""
    features: Mapping[str, Array]
    """name -> float32 [N, h, w, c]: the taps"""
    variables: PyTree
    """the variables after the call; differ from those before it only if train"""
    groups: Mapping[str, GroupEnd] = {}
    """"group1", "group2", ...; empty for a network that has no such groups"""


class ModelApply(Protocol):
    def __call__(
        self,
        variables: PyTree,
        images: Array,  # float32 [N, H, W, C] in [0, 1]
        *,
        train: bool,
        edits: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> ModelOutput: ...


class Model(NamedTuple):
    """A network as two pure functions; no caller sees the layer library behind it.

    `init(key, image_shape) -> variables`, a dict with "params" and "batch_stats";
    `apply(variables, images, *, train, edits=None) -> ModelOutput`. `edits` maps the name of a tap to a function of its
    features, put in place of them on the way to the next stage: Grad-CAM adds zeros to differentiate by, masks multiply. The
    name of a group does the same to that group's output.
    """

    init: Callable[[Key, tuple[int, int, int]], PyTree]
    apply: ModelApply
    num_classes: int
    description: str
    """"resnet34 width 64": what checkpoints and reports say of it"""


class ExtractedPattern(NamedTuple):
    """A trigger that a detector extracted from the rows of one class."""

    label: int
    """the class"""
    pattern: np.ndarray
    """float32 [H, W, C] in [0, 1], zero outside the mask"""
    mask: np.ndarray
    """bool [H, W]"""
    success: float
    """share of rows of other classes that it turns into that class"""
    network: str = ""
    """of a detector with several networks, by which it was found: "64P" """
    accuracy: float | None = None
    """of what tells rows with the pattern from rows without it; None if there is no such thing"""


class Detection(NamedTuple):
    """What a detector says of the rows of M suspect training sets."""

    flags: np.ndarray
    """bool [M, n]: rows that it takes for poisoned"""
    scores: np.ndarray
    """float32 [M, n]: the higher, the more suspicious"""
    facts: Mapping[str, np.ndarray] = {}
    """as `DefenseResult` has them"""
    pictures: Mapping[str, np.ndarray] = {}
    """as `DefenseResult` has them"""
    patterns: tuple[tuple[ExtractedPattern, ...], ...] = ()
    """of each of the M, by class; () of a detector that extracts none"""
    evidence: Mapping[str, np.ndarray] = {}
    """name -> [M, ...]: what its flags rest on, in the detector's own terms"""


class DefenseResult(NamedTuple):
    """What a defense makes of M suspects (training sets or models), for each of them on a leading axis."""

    model: Model
    """the defended classifier; a detector at test time answers K, one more than the classes, for "rejected" """
    variables: PyTree
    """stacked [M, ...]"""
    flags: np.ndarray | None = None
    """bool [M, n]: training rows that it takes for poisoned, isolates or leaves out"""
    scores: np.ndarray | None = None
    """float32 [M, n]: the higher, the more suspicious the training row"""
    facts: Mapping[str, np.ndarray] = {}
    """name -> float [M]: numbers of its own that a report shows"""
    pictures: Mapping[str, np.ndarray] = {}
    """name -> float32 [M, k, H, W, C] in [0, 1]: what it found, to look at"""


Classifier = Callable[[np.ndarray], np.ndarray]
"""Anything that maps images, float32 [N, H, W, C] in [0, 1], to logits, float [N, K]: all that TA-KD asks of a teacher."""
