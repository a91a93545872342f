"""The interface that every attack implements and that experiments and tests rely on.

An attack is a trigger as two pure functions, `make_params` (once, on the host) and `apply` (one image, at test time), and
the facts needed to compare results: what the attacker controls, what else it needs, and which label rules make sense.
Separate fields hold what differs between training and test time; most attacks leave them at None.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bdjax.settings import changed
from bdjax.training.member import Objective
from bdjax.types import Array, Dataset, Key, Model, PyTree

Threat = Literal["data", "training"]
"""data: the attacker supplies training rows; training: it supplies a model that it has trained."""

Apply = Callable[[PyTree, Array, Array, Key], Array]
"""(params, image float32 [H, W, C] in [0, 1], label int32 [], key) -> image of the same shape, dtype and range."""


class CleanModel(NamedTuple):
    """The attacker's network without a backdoor: a surrogate, a feature extractor, or a starting point."""

    model: Model
    variables: PyTree


@dataclass(frozen=True)
class Knowledge:
    """What the attacker may use to make its trigger."""

    train: Dataset
    """the clean training rows"""
    target: int
    clean_model: CleanModel | None = None
    """set for attacks whose `needs` contain CLEAN_MODEL"""


class TrainingControl(NamedTuple):
    """How an attacker who supplies the model trains it.

    The attack's state is stored in the variables of each ensemble member, so that members may have different triggers:
    `begin` puts it there, and `end` takes it out again.
    """

    objective: Callable[[Model, Any, Array], Objective]
    """(classifier, settings, labels int32 [K] that poisoned rows of each class get) -> the objective of a training step"""
    begin: Callable[[Key, PyTree, PyTree], PyTree]
    """(key, classifier's variables, params) -> variables"""
    end: Callable[[PyTree], tuple[PyTree, PyTree]]
    """variables -> (classifier's variables, params)"""


class Published(NamedTuple):
    """A paper's result without any defense, in percent."""

    paper: str
    """the paper whose table is cited: "LfD", "ABM", "RobustKD" """
    dataset: str
    """bdjax's name of the dataset: "cifar10" """
    clean_accuracy: float
    success: float


@dataclass(frozen=True)
class Attack:
    """One attack.

    `settings` is a frozen dataclass with documented fields and the paper's values as defaults; it always has `poison_rate`
    and `cover_rate`, both shares of all training rows. Settings that `apply` needs go into the params.
    """

    name: str
    """name on the command line"""
    title: str
    """name in tables"""
    paper: str
    """reference: "Barni et al. 2019, A new Backdoor Attack in CNNs by Training Set Corruption ..." """
    threat: Threat
    settings: Any
    make_params: Callable[[Key, Knowledge, Any], PyTree]
    """(key, knowledge, settings) -> params"""
    apply: Apply
    """the trigger at test time"""
    apply_in_training: Apply | None = None
    """the trigger on poisoned training rows; None for `apply`"""
    apply_to_cover: Apply | None = None
    """the change to cover rows; None for the same as on poisoned training rows"""
    craft: Callable[[PyTree, Array, Array, Key], Array] | None = None
    """replaces `apply_in_training` for attacks whose rows depend on each other: (params, images float32 [n, H, W, C],
    labels int32 [n], keys [n]) -> images"""
    check: Callable[[Dataset, int, Any], None] | None = None
    """(clean training rows, target, settings) -> None; raises a one-line InputError if settings do not fit each other or the
    rows. Called before anything is trained or written, in addition to the ranges in the settings' types, by attacks whose
    `make_params` is costly or that poison in training; those of the others are tried out"""
    label_rules: tuple[str, ...] = ("all_to_one",)
    """keys of LABEL_RULES, the default first"""
    needs: tuple[str, ...] = ()
    """what the attacker needs besides the rows it poisons: "clean model", "all training rows" """
    trigger_is_trained: bool = False
    changes_images: bool = True
    """False: only labels are changed"""
    adds_rows: bool = False
    """poisoned rows are added to the clean rows instead of replacing them"""
    starts_from_clean_model: bool = False
    """the victim is fine-tuned from the clean model instead of trained from scratch"""
    control: TrainingControl | None = None
    per_dataset: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """changes of the settings for grey or colour images ("grey", "colour"), applied automatically; and for datasets like a
    named one ("digits", "gtsrb"), applied on top if requested"""
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        for changes in self.per_dataset.values():
            dataclasses.replace(self.settings, **changes)

    @property
    def needs_clean_model(self) -> bool:
        return CLEAN_MODEL in self.needs


CLEAN_MODEL = "clean model"
"""The entry of `Attack.needs` that makes an experiment train `Knowledge.clean_model`."""


def settings_for(
    attack: Attack, dataset: Dataset, changes: Mapping[str, Any] | None = None, *, like: str | None = None
) -> Any:
    """The attack's settings for a dataset: the defaults, then the changes for its kind of images, then those for the dataset
    named by `like`, then `changes`. The dataset's own name has no effect.

    Args:
        attack: the attack.
        dataset: its images are grey or colour.
        changes: setting -> value.
        like: a key of `bdjax.datasets.DATASETS` whose changes are applied; None to skip this step.

    Raises:
        InputError: `changes` names an unknown setting, or gives a value of the wrong type.
    """
    kind = "grey" if dataset.image_shape[2] == 1 else "colour"
    settings = dataclasses.replace(
        attack.settings, **{**attack.per_dataset.get(kind, {}), **attack.per_dataset.get(like, {})}
    )
    return changed(f"attack {attack.name}", settings, changes or {})
