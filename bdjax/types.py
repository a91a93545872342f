"""The types that the subpackages share; no logic.

Letters in shapes: N rows, H height, W width, C channels, K classes, M ensemble members.
Images are stored as NHWC uint8 and become float32 in [0, 1] inside the compiled step; triggers act on the latter.
`Array` and `Key` are for annotations only: at run time they are `Any`, since importing JAX takes longer than --help.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from jax import Array
else:
    Array = Any
Key = Array
"""A typed key, as from `jax.random.key`."""
PyTree = Any


class Unread(NamedTuple):
    """Data of a source that its reader left out."""

    file: str
    """name relative to the source, with "/"; a folder's ends in "/" """
    reason: str
    """predicate of a sentence: "is a link", "has a suffix that is not read" """


def class_title(number: int, name: str = "") -> str:
    """A class as messages and reports name it: "3 (cat)", or "3" where it has no name but its number.

    Names come from untrusted files, so characters that cannot be printed are replaced.
    """
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(name.split()))
    return f"{number} ({name})" if name and name != str(number) else str(number)


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory."""

    images: np.ndarray
    """uint8 [N, H, W, C]"""
    labels: np.ndarray
    """int32 [N], in 0..num_classes-1"""
    num_classes: int
    name: str
    """name in reports: "cifar10" """
    source: str
    """origin of the rows: a path, a URL, "scikit-learn" """
    class_names: tuple[str, ...] = ()
    """empty, or num_classes names"""
    files: tuple[str, ...] = field(default=(), kw_only=True)  # keyword only: `PoisonedDataset` adds fields by position
    """N file names relative to the source, with "/"; empty where rows have no files"""
    records: bool = field(default=False, kw_only=True)
    """whether `files` names records inside files ("train.parquet#17"), of which there is nothing to copy"""
    unread: tuple[Unread, ...] = field(default=(), kw_only=True)
    """what the source has beside these rows and was not read; reports list it"""
    original_sizes: Mapping[tuple[int, int], int] = field(default_factory=dict, kw_only=True)
    """(height, width) of the source's images before they were scaled to this size -> their number; empty if none was scaled"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | np.ndarray | Sequence[int]) -> "Dataset":
        """Select rows, with all their fields, by a slice, a mask bool [N] or indices int [n]."""
        which = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows)]
        if which.ndim != 1:
            raise TypeError("select rows of a dataset by a slice, a mask or a list of indices")
        per_row = ("images", "labels", "is_poisoned", "original_labels", "is_cover")
        selected = {name: getattr(self, name)[which] for name in per_row if hasattr(self, name)}
        return replace(self, **selected, files=tuple(self.files[row] for row in which) if self.files else ())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.images.shape[1:])

    @property
    def class_range(self) -> str:
        """The classes, for messages: "0 (cat) to 9 (truck)"."""
        return f"{self.class_title(0)} to {self.class_title(self.num_classes - 1)}"

    def class_title(self, number: int) -> str:
        """A class as messages and reports name it: see `class_title`."""
        return class_title(int(number), name_of_class(self, number))


def name_of_class(dataset: Dataset, number: int) -> str:
    """The class's name, "" if it has none but its number."""
    name = dataset.class_names[number] if dataset.class_names else ""
    return "" if name == str(number) else name


class TrainTest(NamedTuple):
    """The result of every dataset loader."""

    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class PoisonedDataset(Dataset):
    """A dataset in which some rows carry a trigger, with the ground truth of each row."""

    is_poisoned: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [N]"""
    original_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [N], before poisoning"""
    is_cover: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool [N]: rows with a trigger that keep their label"""


class TriggerFamily(NamedTuple):
    """A family of triggers as two pure functions, both for one image.

    `init(key, image_shape) -> params` draws one instance (on the host; sizes may be data dependent);
    `apply(params, image, label, key) -> image` adds it to a float32 [H, W, C] image in [0, 1]. `label` and `key` are for
    triggers that depend on the class or are random for each image; fixed triggers ignore them.
    """

    init: Callable[..., PyTree]
    apply: Callable[..., Array]


class GroupEnd(NamedTuple):
    """The end of a group of blocks, where features are distilled: before the next ReLU."""

    output: Array
    """float32 [N, h, w, C']: the group's output"""
    before_relu: Array
    """float32 [N, h, w, C]: the input of the next ReLU, after any normalisation in between"""
    mean: Array
    """float32 [C]: mean of each channel of `before_relu`, from the normalisation's shift"""
    deviation: Array
    """float32 [C], at least 0: standard deviation of each channel of `before_relu`, from the normalisation's scale"""


class ModelOutput(NamedTuple):
    logits: Array
    """float32 [N, K]"""
    features: Mapping[str, Array]
    """name -> float32 [N, h, w, c]: the taps"""
    variables: PyTree
    """the variables after the call; changed only if train"""
    groups: Mapping[str, GroupEnd] = {}
    """"group1", "group2", ...; empty for a network without groups of blocks"""


class ModelApply(Protocol):
    def __call__(
        self,
        variables: PyTree,
        images: Array,  # float32 [N, H, W, C] in [0, 1]
        *,
        train: bool,
        edits: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> ModelOutput: ...


class Architecture(NamedTuple):
    """What a network is built from, beside the number of classes."""

    name: str
    """a key of `bdjax.models.MODELS`"""
    width: int
    mean: tuple[float, ...] = ()
    """of every channel, subtracted from pixels in [0, 1]; () without normalisation"""
    std: tuple[float, ...] = ()
    """of every channel, that the difference is divided by"""


class Model(NamedTuple):
    """A network as two pure functions, independent of the layer library behind it.

    `init(key, image_shape) -> variables`, a dict with "params" and "batch_stats";
    `apply(variables, images, *, train, edits=None) -> ModelOutput`. `edits` maps the name of a tap to a function whose result
    replaces the tap's features in the rest of the network (Grad-CAM adds zeros to differentiate by; masks multiply). The name
    of a group does the same for that group's output.
    """

    init: Callable[[Key, tuple[int, int, int]], PyTree]
    apply: ModelApply
    num_classes: int
    description: str
    """"resnet34 width 64", for checkpoints and reports"""
    prepare: Callable[[PyTree, Array], PyTree] | None = None
    """(variables, training images float32 [N, H, W, C] in [0, 1]) -> variables with the constants that depend on the data;
    whoever trains from scratch calls it once. None for a network without such constants"""
    convolutions: Callable[..., tuple[Array, dict[str, Array]]] | None = None
    """(variables, images, offsets={}) -> (logits, name -> float32 [N, h, w, c]: the output of every convolution, in the order
    of the network), without training. `offsets` maps names to arrays that are added to these outputs, to differentiate by.
    None for a model of other making"""
    architecture: Architecture | None = None
    """None for a model of other making, which no file can describe"""
    parts: "tuple[Model, ...]" = ()
    """the networks that it combines, if it combines several"""


class ExtractedPattern(NamedTuple):
    """A trigger that a detector extracted from the rows of one class."""

    label: int
    """the class"""
    pattern: np.ndarray
    """float32 [H, W, C] in [0, 1], zero outside the mask"""
    mask: np.ndarray
    """bool [H, W]"""
    success: float
    """share of rows of other classes that the pattern moves to this class"""
    network: str = ""
    """the network that found it, for detectors with several: "64P" """
    accuracy: float | None = None
    """accuracy of the classifier that recognises the pattern; None without such a classifier"""


class NotTested(NamedTuple):
    """What of one suspect a detector could not test, because no finding was possible whatever the rows are."""

    reason: str = ""
    """why nothing could be tested: "needs at least 3 classes with rows: ..."; "" if something could be"""
    classes: Mapping[int, str] = {}
    """label -> why this class could not be tested: "has fewer than 3 rows"; without classes that have no rows"""


class Detection(NamedTuple):
    """The result of a detector for M suspect training sets."""

    flags: np.ndarray
    """bool [M, n]: rows flagged as poisoned"""
    scores: np.ndarray
    """float32 [M, n], higher for more suspicious rows"""
    facts: Mapping[str, np.ndarray] = {}
    """see `DefenseResult.facts`"""
    pictures: Mapping[str, np.ndarray] = {}
    """see `DefenseResult.pictures`"""
    patterns: tuple[tuple[ExtractedPattern, ...], ...] = ()
    """for each of the M sets, the extracted triggers by class; () for a detector that extracts none"""
    evidence: Mapping[str, np.ndarray] = {}
    """name -> [M, ...]: the detector's statistics behind its flags"""
    not_tested: tuple[NotTested, ...] = ()
    """for each of the M sets, what could not be tested; () if everything was. Rows that were not tested have no flags"""
    warnings: tuple[str, ...] = ()
    """for each of the M sets, why its result should not be relied on, "" for no reason; () if there is none for any"""


class DefenseResult(NamedTuple):
    """The result of a defense for M suspects (training sets or models); arrays have a leading axis [M]."""

    model: Model
    """the defended classifier; a detector at test time has one more class, K, for "rejected" """
    variables: PyTree
    """stacked [M, ...]"""
    flags: np.ndarray | None = None
    """bool [M, n]: training rows that are flagged as poisoned, isolated or left out"""
    scores: np.ndarray | None = None
    """float32 [M, n], higher for more suspicious training rows"""
    facts: Mapping[str, np.ndarray] = {}
    """name -> float [M]: further numbers for the report"""
    pictures: Mapping[str, np.ndarray] = {}
    """name -> float32 [M, k, H, W, C] in [0, 1]: images for the report, such as extracted triggers"""
    not_tested: tuple[NotTested, ...] = ()
    """see `Detection.not_tested`"""
    warnings: tuple[str, ...] = ()
    """of each suspect, why its result should not be relied on, "" for nothing; () for nothing at all"""
    single_scores: np.ndarray | None = None
    """float32 [M, T, n]: the scores of the T networks that `scores` combines; None if they are not a combination"""
    more_networks: Mapping[str, tuple[Model, PyTree]] = {}
    """name -> an intermediate network of each suspect and its variables, stacked [M, ...], for the evaluator to measure beside
    the result: "masked teacher" """


Classifier = Callable[[np.ndarray], np.ndarray]
"""Any function from images, float32 [N, H, W, C] in [0, 1], to logits, float [N, K]; all that TA-KD needs of a teacher."""
