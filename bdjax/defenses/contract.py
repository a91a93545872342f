"""What a defense is: the one contract that every file of a defense fills in, and that experiments and tests rely on.

A defense of this table is given M suspects at once: M training sets, one for each attack and seed, which all went through
plain training already. It makes M defended classifiers of them, as members of the same calls. What it needs is printed
wherever its numbers are: a defense that had clean images is not compared in silence with one that had none. And it is given
no more than it needs: experiments call defenses by `run` and `detect` below, never by their own functions.
(TA-KD, whose suspects are several models without their data, has an experiment of its own.)
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.models import embedding
from bdjax.settings import changed
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Array, DefenseResult, Detection, Key, Model, PyTree

Need = Literal["training set", "attacked model", "clean rows", "number of poisons", "attacker's trigger"]
"""training set: the suspect rows. attacked model: the network that plain training on them gave, or the suspect model. clean
rows: some that are known to be clean. The last two are oracles: no defender has them."""
Stage = Literal["before training", "in training", "after training", "at test time"]


class UndeclaredNeedError(Exception):
    """A defense reads what it does not declare in `Defense.needs`: tables would print too little of what it was given."""


class PoolRows(NamedTuple):
    """Rows of the pool with labels, as many of each suspect."""

    index: np.ndarray
    """int32 [M, n], in the pool"""
    labels: np.ndarray
    """int32 [M, n]"""


class AttackerTriggers(NamedTuple):
    """The trigger of each suspect's attacker; None in the place of each that nobody knows."""

    triggers: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray] | None, ...]
    """of each member: (uint8 [n, H, W, C], labels int32 [n]) -> the same images with the trigger"""
    rules: tuple[Any, ...]
    """of each member: the trigger's `LabelRule`"""


class AttackerInTraining(NamedTuple):
    """What ABM's adaptive attackers do to every training on their rows: they keep the features of triggered images close to
    those of the same images without the trigger (`bdjax/attacks/suppression.py`)."""

    suppression: np.ndarray
    """float32 [M, n]: how hard, 0 for rows that are left alone"""
    partner: np.ndarray
    """int32 [M, n]: each row's image without the trigger, in the pool"""


class Reader(NamedTuple):
    """The defense that a `DefenseInput` is restricted to."""

    name: str
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class DefenseInput:
    """M suspects, and what a defender knows of them.

    `knowledge` is what `Defense.needs` speaks of, and `restricted_to` takes from it what a defense does not declare. All
    other fields go to every defense. The pool is among them: it has every image, clean rows and images without their trigger
    included, but nothing in it says which image is which without an index.
    """

    pool: Array
    """uint8 [P, H, W, C]: all images"""
    num_classes: int
    keys: Key
    """typed keys [M]"""
    make_model: Callable[..., Model]
    """(name=None, num_classes=None): the run's network, or another at the run's scale"""
    recipe: TrainConfig
    """how an undefended network trains; what a defense does not say is as here"""
    runner: StageRunner
    """trains, keeps what is trained, and evaluates"""
    knowledge: Mapping[Need, Any]
    """what there is of "training set" and "clean rows" (`PoolRows`), "attacked model" (`Nets`, variables stacked [M, ...]),
    "number of poisons" (int [M], or None if nobody knows it) and "attacker's trigger" (`AttackerTriggers`)"""
    attacker: AttackerInTraining | None = None
    """The attacker's part in training, which no defender knows: for a training on the suspect rows to read, and for nothing
    else. None where no attacker has one, and for defenses without the training set."""
    reader: Reader | None = None
    """None: all of the knowledge may be read"""

    def restricted_to(self, name: str, needs: Sequence[Need]) -> "DefenseInput":
        """The same without the knowledge that a defense does not declare: reading that raises UndeclaredNeedError.

        Args:
            name: of the defense.
            needs: that it declares.
        """
        kept = {need: known for need, known in self.knowledge.items() if need in needs}
        attacker = self.attacker if "training set" in needs else None
        return dataclasses.replace(self, knowledge=kept, attacker=attacker, reader=Reader(name, tuple(needs)))

    def with_knowledge(self, changes: Mapping[Need, Any]) -> "DefenseInput":
        """The same with some knowledge added or replaced."""
        return dataclasses.replace(self, knowledge={**self.knowledge, **changes})

    def known(self, need: Need) -> Any:
        """An entry of `knowledge`. The properties below, which defenses read, all go through here.

        Raises:
            UndeclaredNeedError: the defense that this is restricted to does not declare the need.
            ValueError: there is no such knowledge; experiments leave such defenses out before.
        """
        if self.reader and need not in self.reader.needs:
            declared = ", ".join(self.reader.needs) or "nothing"
            raise UndeclaredNeedError(
                f"{need!r} is not among the needs that defense {self.reader.name} declares ({declared})"
            )
        if need not in self.knowledge:
            raise ValueError(f"no {need} given to a defense that needs it")
        return self.knowledge[need]

    @property
    def index(self) -> np.ndarray:
        """The rows of each training set, in the pool: int32 [M, n]."""
        return self.known("training set").index

    @property
    def labels(self) -> np.ndarray:
        """The labels of the training sets: int32 [M, n]."""
        return self.known("training set").labels

    @property
    def attacked(self) -> Nets:
        """The attacked networks, variables stacked [M, ...]."""
        return self.known("attacked model")

    @property
    def clean_index(self) -> np.ndarray:
        """The clean rows, in the pool: int32 [M, c]."""
        return self.known("clean rows").index

    @property
    def clean_labels(self) -> np.ndarray:
        """The labels of the clean rows: int32 [M, c]."""
        return self.known("clean rows").labels

    @property
    def num_poisons(self) -> np.ndarray | None:
        """How many rows of each training set are poisoned: int [M]; None if nobody knows."""
        return self.known("number of poisons")

    @property
    def attacker_triggers(self) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray] | None, ...]:
        """The trigger of each member: see `AttackerTriggers`."""
        return self.known("attacker's trigger").triggers

    @property
    def attacker_rules(self) -> tuple[Any, ...]:
        """The label rule of each member's trigger: see `AttackerTriggers`."""
        return self.known("attacker's trigger").rules

    def keys_for(self, stage: str) -> Key:
        """Keys of a stage's own, typed [M]: what else is run does not change them."""
        return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(stage.encode()) >> 1))(self.keys)

    def all_rows(self) -> Rows:
        """The training sets as they are: leaves [M, n]."""
        return labelled(self.index, self.labels)

    def clean_rows(self) -> Rows:
        """The clean rows: leaves [M, c]."""
        return labelled(self.clean_index, self.clean_labels)

    def config(self, **changes: Any) -> TrainConfig:
        """The recipe with changes."""
        return dataclasses.replace(self.recipe, **changes)

    def begin(self, stage: str, model: Model) -> PyTree:
        """Fresh variables of a stage's networks, stacked [M, ...]."""
        shape = self.runner.image_shape
        return ensemble.init_members(lambda key: model.init(key, shape), self.keys_for(f"{stage}: weights"))

    def train(
        self,
        stage: str,
        model: Model,
        config: TrainConfig,
        rows: Rows,
        *,
        variables: PyTree | None = None,
        objective: Objective | None = None,
        loss_cap: float = 0.0,
    ) -> Nets:
        """Train a network for each of the M suspects, or read back those of a stage that is done.

        Args:
            stage: its name, which holds everything that its result depends on beside the run's own settings: two stages
                of one name are one stage.
            model: the architecture.
            config: how it is trained.
            rows: leaves [M, n', ...]; without a target "weight" each row counts alike.
            variables: where to start; None for fresh networks.
            objective: what a step minimises; None for the mean of weight times cross-entropy.
            loss_cap: without an objective, above what cross-entropy no row's loss is raised any more; 0 for no such bound.
        """
        if variables is None:
            variables = self.begin(stage, model)
        if objective is None:
            ones = jnp.ones(rows.targets["labels"].shape, jnp.float32)
            rows = rows._replace(targets={"weight": ones, **rows.targets})
            objective = weighted_cross_entropy(model, loss_cap)
        keys = self.keys_for(f"{stage}: shuffles")
        return self.runner.from_variables(stage, model, config, variables, keys, 1, self.pool, rows, objective)

    def per_row(self, function: Callable[..., PyTree], variables: PyTree, rows: Rows) -> PyTree:
        """`StageRunner.per_row` of rows of the pool."""
        return self.runner.per_row(function, variables, rows, self.pool, self.recipe.evaluation_batch_size)

    def losses(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """Each row's cross-entropy, un-augmented and with running statistics: float32 [M, n']."""
        return self.per_row(row_losses(model), variables, rows)

    def logits(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """Each row's logits, likewise: float32 [M, n', K]."""
        return self.per_row(row_logits(model), variables, rows)

    def embeddings(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """What the last layer sees of each row, likewise: float32 [M, n', d]."""
        return self.per_row(row_embeddings(model), variables, rows)


def labelled(index: np.ndarray, labels: np.ndarray) -> Rows:
    """Rows of the pool with their labels: int [M, n] each."""
    return Rows(jnp.asarray(index, jnp.int32), {"labels": jnp.asarray(labels, jnp.int32)})


def fingerprint(**settings: Any) -> str:
    """Eight hexadecimal digits of what a stage depends on, for its name where the settings are too many to spell out."""
    told = ", ".join(f"{name}={settings[name]!r}" for name in sorted(settings))
    return f"{zlib.crc32(told.encode()):08x}"


@cache
def weighted_cross_entropy(model: Model, loss_cap: float = 0.0) -> Objective:
    """The mean over the batch of targets["weight"], float32 [N], times the cross-entropy. A negative weight ascends.

    Args:
        model: the network.
        loss_cap: rows of negative weight whose cross-entropy is above it have no gradient: without a bound an ascent
            ends in overflow. 0 for none.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        loss, weight = losses.cross_entropy(output.logits, targets["labels"]), targets["weight"]
        if loss_cap:
            loss = jnp.where(weight < 0, jnp.minimum(loss, loss_cap), loss)
        weighted = weight * loss
        return Outcome(weighted, output.logits, targets["labels"], output.variables)

    return objective


@cache
def row_losses(model: Model) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: each row's cross-entropy."""
    return lambda variables, images, targets: losses.cross_entropy(
        model.apply(variables, images, train=False).logits, targets["labels"]
    )


@cache
def row_logits(model: Model) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: each row's logits."""
    return lambda variables, images, targets: model.apply(variables, images, train=False).logits


@cache
def row_embeddings(model: Model) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: each row's embedding."""
    return lambda variables, images, targets: embedding(model.apply(variables, images, train=False).features)


@dataclass(frozen=True)
class Defense:
    """One defense, complete.

    `settings` is a frozen dataclass of the paper's values with a documented field each.
    """

    name: str
    """on the command line"""
    title: str
    """in a table"""
    paper: str
    """"Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data" """
    stage: Stage
    needs: tuple[Need, ...]
    """whatever it reads of `DefenseInput.knowledge`"""
    settings: Any
    run: Callable[[DefenseInput, Any], DefenseResult]
    """(given, settings) -> result"""
    detect: Callable[[DefenseInput, Any], Detection] | None = None
    """(given, settings) -> which rows are poisoned, without the training that follows: of those that look for them."""
    oracles: Callable[[Any], tuple[Need, ...]] | None = None
    """(settings) -> what some settings need beside `needs`, and no defender has."""
    check: Callable[[Any], None] | None = None
    """(settings) -> nothing, or an InputError of one line that names the setting which cannot be, and says what would be
    right. `variants.read_defense` calls it before anything is trained."""
    network_after: Callable[[Any, Model, Callable[..., Model], tuple[int, int, int]], Model] | None = None
    """(settings, attacked network, `DefenseInput.make_model`, image shape) -> the network that comes out, where that is another
    than the attacked one; or an InputError of one line, if the two do not go together. Asked before anything is trained."""
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Changes of the settings by preset ("quick", "strong"), for data like a named set ("gtsrb"), and for both ("quick
    digits")."""

    def __post_init__(self) -> None:
        for one in self.changes.values():
            changed(f"defense {self.name}", self.settings, one)

    def needs_with(self, settings: Any) -> tuple[Need, ...]:
        """All that the defense needs with these settings."""
        return self.needs + (self.oracles(settings) if self.oracles else ())


def settings_for(defense: Defense, preset: str, like: str | None, changes: Mapping[str, Any] | None = None) -> Any:
    """The defense's settings: the paper's, then those for data like a named set, for the preset and for both, then `changes`.

    Args:
        defense: any.
        preset: "paper", "quick" or "strong"; "quick strong" is both, one after the other: strong settings at a small scale.
        like: a key of `bdjax.datasets.DATASETS`, whose settings are adopted; None for none.
        changes: setting -> value.

    Raises:
        InputError: a change of something that the defense does not have, or to a value of another kind.
    """
    owner, settings = f"defense {defense.name}", defense.settings
    for one in (like, *(name for each in preset.split() for name in (each, f"{each} {like}"))):
        settings = changed(owner, settings, defense.changes.get(one, {}))
    return changed(owner, settings, changes or {})


def restricted(defense: Defense, inputs: DefenseInput, settings: Any) -> DefenseInput:
    """What there is for a defense to read: no more than it needs with these settings."""
    return inputs.restricted_to(defense.name, defense.needs_with(settings))


def run(defense: Defense, inputs: DefenseInput, settings: Any) -> DefenseResult:
    """Run a defense on no more than it needs.

    Args:
        defense: any.
        inputs: M suspects.
        settings: of the defense.

    Raises:
        UndeclaredNeedError: the defense reads what it does not declare.
    """
    return defense.run(restricted(defense, inputs, settings), settings)


def detect(defense: Defense, inputs: DefenseInput, settings: Any) -> Detection:
    """Which rows a detector takes for poisoned, going by no more than it needs.

    Args:
        defense: one whose `detect` is not None.
        inputs: M suspects.
        settings: of the defense.

    Raises:
        UndeclaredNeedError: the detector reads what it does not declare.
    """
    return defense.detect(restricted(defense, inputs, settings), settings)
