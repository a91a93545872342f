"""What a defense is: the one contract that every file of a defense fills in, and that experiments and tests rely on.

A defense of this table is given M suspects at once: M training sets, one for each attack and seed, which all went through
plain training already. It makes M defended classifiers of them, as members of the same calls. What it was given beside
the rows is printed wherever its numbers are: a defense that had clean images is not compared in silence with one that had
none. (TA-KD, whose suspects are several models without their data, has an experiment of its own.)
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

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
"""training set: the suspect rows. attacked model: the network that plain training on them gave. clean rows: some that are
known to be clean. The last two are oracles: no defender has them."""
Stage = Literal["before training", "in training", "after training", "at test time"]


@dataclass(frozen=True)
class DefenseInput:
    """M suspect training sets, and what a defender may use of each. A defense uses no more than what it says it needs."""

    pool: Array  # uint8 [P, H, W, C]: all images
    index: np.ndarray  # int32 [M, n]: each training set's rows, in the pool
    labels: np.ndarray  # int32 [M, n], as they were handed over
    num_classes: int
    keys: Key  # typed keys [M]
    make_model: Callable[..., Model]  # (name=None, num_classes=None): the run's network, or another at the run's scale
    recipe: TrainConfig  # how an undefended network trains; what a defense does not say is as here
    runner: StageRunner  # trains, keeps what is trained, and evaluates
    attacked: Nets  # what plain training gave: stacked [M, ...]
    clean_index: np.ndarray | None = None  # int32 [M, c], in the pool
    clean_labels: np.ndarray | None = None  # int32 [M, c]
    suppression: np.ndarray | None = None  # float32 [M, n], for ABM's adaptive attackers: see `abm.py`
    partner: np.ndarray | None = None  # int32 [M, n]: the untriggered image of each row, in the pool; likewise
    num_poisons: np.ndarray | None = None  # int [M], for oracles
    attacker_triggers: tuple[
        Callable[[np.ndarray], np.ndarray], ...
    ] = ()  # of each member: (uint8 images, labels) -> triggered; likewise
    attacker_rules: tuple[Any, ...] = ()  # of each member: the `LabelRule` of that trigger; likewise

    def keys_for(self, stage: str) -> Key:
        """Keys of a stage's own, typed [M]: what else is run does not change them."""
        return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(stage.encode()) >> 1))(self.keys)

    def all_rows(self) -> Rows:
        """The training sets as they are: leaves [M, n]."""
        return labelled(self.index, self.labels)

    def clean_rows(self) -> Rows:
        """The clean rows: leaves [M, c].

        Raises:
            ValueError: if there are none; experiments leave such defenses out before.
        """
        if self.clean_index is None:
            raise ValueError("no clean rows were given to a defense that needs some")
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

    name: str  # on the command line
    title: str  # in a table
    paper: str  # "Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data"
    stage: Stage
    needs: tuple[Need, ...]
    settings: Any
    run: Callable[[DefenseInput, Any], DefenseResult]  # (given, settings) -> result
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
    """Changes of the settings by preset ("quick", "strong") and by dataset ("gtsrb"), and by both ("quick digits")."""

    def __post_init__(self) -> None:
        for one in self.changes.values():
            changed(f"defense {self.name}", self.settings, one)

    def needs_with(self, settings: Any) -> tuple[Need, ...]:
        """All that the defense needs with these settings."""
        return self.needs + (self.oracles(settings) if self.oracles else ())


def settings_for(defense: Defense, preset: str, dataset: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The defense's settings: the paper's, then those for the dataset, the preset and both, then `changes`.

    The preset "quick strong" is both, one after the other: strong settings at a small scale.

    Raises:
        InputError: a change of something that the defense does not have, or to a value of another kind.
    """
    owner, settings = f"defense {defense.name}", defense.settings
    for one in (dataset, *(name for each in preset.split() for name in (each, f"{each} {dataset}"))):
        settings = changed(owner, settings, defense.changes.get(one, {}))
    return changed(owner, settings, changes or {})
