"""What an attack is: the one contract that every file of an attack fills in, and that experiments and tests rely on.

An attack is a trigger as two pure functions, `make_params` (once, on the host) and `apply` (one image, at test time), with
the facts that a reader must know before comparing numbers: who has to control what, what else the attacker needs, which
label rules make sense. What differs between training and test time has a field of its own, and most attacks leave it at None.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bdjax.settings import changed
from bdjax.training.member import Objective
from bdjax.types import Array, Dataset, Key, Model, PyTree

Threat = Literal["data", "training"]
"""data: the attacker hands over rows; training: it hands over a model that it has trained."""

Apply = Callable[[PyTree, Array, Array, Key], Array]
"""(params, image float32 [H, W, C] in [0, 1], label int32 [], key) -> image of the same shape, dtype and range."""


class CleanModel(NamedTuple):
    """A network without a backdoor that the attacker has: a surrogate, a feature extractor, or a start."""

    model: Model
    variables: PyTree


@dataclass(frozen=True)
class Knowledge:
    """What an attacker may use to make its trigger."""

    train: Dataset
    """the clean training rows"""
    target: int
    clean_model: CleanModel | None = None
    """for attacks whose needs name it"""


class TrainingControl(NamedTuple):
    """How an attacker trains who hands over the model.

    Whatever it has beside the classifier travels in the member's own variables, so that members of one ensemble may have
    different triggers: `begin` puts it there, and `end` takes it out again.
    """

    objective: Callable[[Model, Any, Array], Objective]
    """(classifier, settings, labels int32 [K] that poisoned rows of each class get) -> what one step minimises."""
    begin: Callable[[Key, PyTree, PyTree], PyTree]
    """(key, classifier's variables, params) -> variables"""
    end: Callable[[PyTree], tuple[PyTree, PyTree]]
    """variables -> (classifier's variables, params)"""


class Published(NamedTuple):
    """What a paper prints without any defense, in percent."""

    paper: str
    """"LfD", "ABM", "RobustKD": the paper whose table it is"""
    dataset: str
    """as bdjax names it: "cifar10" """
    clean_accuracy: float
    success: float


@dataclass(frozen=True)
class Attack:
    """One attack, complete.

    `settings` is a frozen dataclass of the paper's values with a documented field each; it always has `poison_rate` and
    `cover_rate`, both shares of all training rows. Everything of it that `apply` needs goes into the params.
    """

    name: str
    """on the command line"""
    title: str
    """in a table"""
    paper: str
    """"Barni et al. 2019, A new Backdoor Attack in CNNs by Training Set Corruption ..." """
    threat: Threat
    settings: Any
    make_params: Callable[[Key, Knowledge, Any], PyTree]
    """(key, knowledge, settings) -> params"""
    apply: Apply
    """the trigger at test time"""
    apply_in_training: Apply | None = None
    """on poisoned training rows; None: as at test time"""
    apply_to_cover: Apply | None = None
    """on rows that keep their label; None: as on poisoned training rows"""
    craft: Callable[[PyTree, Array, Array, Key], Array] | None = None
    """In place of `apply_in_training`, for attacks whose rows depend on each other: (params, images float32 [n, H, W, C],
    labels int32 [n], keys [n]) -> images."""
    label_rules: tuple[str, ...] = ("all_to_one",)
    """keys of LABEL_RULES, the default first"""
    needs: tuple[str, ...] = ()
    """what the attacker has besides rows: "clean model", "all training rows" """
    trigger_is_trained: bool = False
    changes_images: bool = True
    """False: labels are all that it changes"""
    adds_rows: bool = False
    """poisoned rows are added to the clean ones instead of taking their place"""
    starts_from_clean_model: bool = False
    """the victim is fine-tuned, not trained from scratch"""
    control: TrainingControl | None = None
    per_dataset: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Changes of the settings for grey or colour images ("grey", "colour"), which images themselves say; and those for data
    like a named set ("digits", "gtsrb"), which are asked for and added to the former."""
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        for changes in self.per_dataset.values():
            dataclasses.replace(self.settings, **changes)

    @property
    def needs_clean_model(self) -> bool:
        return CLEAN_MODEL in self.needs


CLEAN_MODEL = "clean model"
"""The entry of `Attack.needs` that has an experiment train `Knowledge.clean_model`."""


def settings_for(
    attack: Attack, dataset: Dataset, changes: Mapping[str, Any] | None = None, *, like: str | None = None
) -> Any:
    """The attack's settings for a dataset: the paper's, then those for its kind of images, then those for data like a named
    set, then `changes`. What the dataset is called changes nothing.

    Args:
        attack: any.
        dataset: whose images are grey or colour.
        changes: setting -> value.
        like: a key of `bdjax.datasets.DATASETS`, whose settings are adopted; None for none.

    Raises:
        InputError: a change of something that the attack does not have, or to a value of another kind.
    """
    kind = "grey" if dataset.image_shape[2] == 1 else "colour"
    settings = dataclasses.replace(
        attack.settings, **{**attack.per_dataset.get(kind, {}), **attack.per_dataset.get(like, {})}
    )
    return changed(f"attack {attack.name}", settings, changes or {})
