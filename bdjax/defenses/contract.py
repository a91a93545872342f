"""The interface of a defense: every defense file implements it, and experiments and tests rely on it.

A defense receives M suspects at once: M training sets, one for each attack and seed, each with a network that was trained on it
without any defense. It returns M defended classifiers, computed as members of the same calls. Every table prints what a defense
needs next to its numbers, so that a defense with clean images is not compared unnoticed with one that has none. A defense
receives no more than it needs: experiments call it through `run` and `detect` below, never through its own functions.
(TA-KD, whose suspects are several models without their data, has its own experiment.)
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
from bdjax.training import ensemble, recipes
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner, prepare
from bdjax.types import Array, DefenseResult, Detection, Key, Model, NotTested, PyTree

Need = Literal["training set", "attacked model", "clean rows", "number of poisons", "attacker's trigger"]
"""training set: the suspect rows. attacked model: the network trained on them without a defense, or the suspect model. clean
rows: rows known to be clean. The last two are oracles: no real defender has them."""
Stage = Literal["before training", "in training", "after training", "at test time"]


class UndeclaredNeedError(Exception):
    """A defense reads something that `Defense.needs` does not declare, so tables would not print all that it used."""


class PoolRows(NamedTuple):
    """Rows of the pool with labels, the same number for each suspect."""

    index: np.ndarray
    """int32 [M, n], positions in the pool"""
    labels: np.ndarray
    """int32 [M, n]"""


class AttackerTriggers(NamedTuple):
    """The trigger of each suspect's attacker; None where the trigger is unknown."""

    triggers: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray] | None, ...]
    """for each member: (uint8 [n, H, W, C], labels int32 [n]) -> the same images with the trigger"""
    rules: tuple[Any, ...]
    """for each member: the trigger's `LabelRule`"""


class AttackerInTraining(NamedTuple):
    """How ABM's adaptive attackers interfere with every training on their rows: they keep the features of triggered images
    close to those of the same images without the trigger (`bdjax/attacks/suppression.py`)."""

    suppression: np.ndarray
    """float32 [M, n]: weight of the penalty, 0 for unaffected rows"""
    partner: np.ndarray
    """int32 [M, n]: position in the pool of each row's image without the trigger"""


DIVERGED = "needs a network whose outputs are finite numbers, but its training diverged"
"""Why a detector can find nothing in such a network: every comparison with a NaN is false."""


class Facts(NamedTuple):
    """What is known of a suspect before anything is trained, to see whether a defense can find anything in it."""

    rows: np.ndarray
    """int [K]: training rows of each class; zeros without a training set"""
    clean_rows: np.ndarray
    """int [K]: clean rows of each class; zeros without clean rows"""


class Reader(NamedTuple):
    """The defense that a `DefenseInput` is restricted to."""

    name: str
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class DefenseInput:
    """M suspects, and what a defender knows about them.

    `knowledge` holds what `Defense.needs` refers to, and `restricted_to` removes from it what a defense does not declare. Every
    defense receives all other fields. The pool is among them: it contains every image, including clean rows and images without
    their trigger, but without an index nothing in it says which image is which.
    """

    pool: Array
    """uint8 [P, H, W, C]: all images"""
    num_classes: int
    keys: Key
    """typed keys [M]"""
    make_model: Callable[..., Model]
    """(name=None, num_classes=None): the run's network, or another architecture at the run's scale"""
    recipe: TrainConfig
    """how an undefended network trains, and the default for whatever a defense does not set"""
    runner: StageRunner
    """trains, saves checkpoints, and evaluates"""
    knowledge: Mapping[Need, Any]
    """what is available of "training set" and "clean rows" (`PoolRows`), "attacked model" (`Nets`, variables stacked [M, ...]),
    "number of poisons" (int [M], or None if unknown) and "attacker's trigger" (`AttackerTriggers`)"""
    attacker: AttackerInTraining | None = None
    """the attacker's part in training, unknown to the defender: only code that trains on the suspect rows may read it. None
    without such an attacker, and for defenses without the training set"""
    reader: Reader | None = None
    """None: the whole `knowledge` may be read"""

    def restricted_to(self, name: str, needs: Sequence[Need]) -> "DefenseInput":
        """A copy without the knowledge that a defense does not declare: reading that raises UndeclaredNeedError.

        Args:
            name: the defense's name.
            needs: the needs that it declares.
        """
        kept = {need: value for need, value in self.knowledge.items() if need in needs}
        attacker = self.attacker if "training set" in needs else None
        return dataclasses.replace(self, knowledge=kept, attacker=attacker, reader=Reader(name, tuple(needs)))

    def with_knowledge(self, changes: Mapping[Need, Any]) -> "DefenseInput":
        """A copy with some knowledge added or replaced."""
        return dataclasses.replace(self, knowledge={**self.knowledge, **changes})

    def copies(self, count: int) -> "DefenseInput":
        """Every suspect `count` times in succession, each copy with a key that depends on its number alone: for several
        networks of each suspect as members of one call. Results have the shape [M * count, ...], see `apart`.

        Args:
            count: how many.
        """

        def repeated(leaf: Any) -> Any:
            return None if leaf is None else np.repeat(np.asarray(leaf), count, axis=0)

        rows = {need: self.knowledge[need] for need in ("training set", "clean rows") if need in self.knowledge}
        keys = jax.vmap(lambda key: jax.vmap(lambda copy: jax.random.fold_in(key, copy))(jnp.arange(count)))(self.keys)
        return dataclasses.replace(
            self,
            keys=keys.reshape(-1),
            knowledge={need: PoolRows(*map(repeated, value)) for need, value in rows.items()},
            attacker=self.attacker and AttackerInTraining(*map(repeated, self.attacker)),
        )

    def known(self, need: Need) -> Any:
        """An entry of `knowledge`. All properties below, which defenses read, go through this method.

        Raises:
            UndeclaredNeedError: the inputs are restricted to a defense that does not declare the need.
            ValueError: the inputs have no such knowledge; experiments skip such defenses beforehand.
        """
        if self.reader and need not in self.reader.needs:
            declared = ", ".join(self.reader.needs) or "nothing"
            raise UndeclaredNeedError(
                f"{need!r} is not among the needs that defense {self.reader.name} declares ({declared})"
            )
        if need not in self.knowledge:
            raise ValueError(f"the defense needs the {need}, which these inputs do not have")
        return self.knowledge[need]

    @property
    def index(self) -> np.ndarray:
        """The rows of each training set, as positions in the pool: int32 [M, n]."""
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
        """The clean rows, as positions in the pool: int32 [M, c]."""
        return self.known("clean rows").index

    @property
    def clean_labels(self) -> np.ndarray:
        """The labels of the clean rows: int32 [M, c]."""
        return self.known("clean rows").labels

    @property
    def num_poisons(self) -> np.ndarray | None:
        """How many rows of each training set are poisoned: int [M]; None if unknown."""
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
        """Typed keys [M] that depend on the stage's name alone, whatever else is run."""
        return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(stage.encode()) >> 1))(self.keys)

    def generators(self, stage: str) -> list[np.random.Generator]:
        """NumPy generators, one for each suspect, seeded by `keys_for`: for choices of rows outside of compiled code."""
        data = np.asarray(jax.random.key_data(self.keys_for(stage)))
        return [np.random.default_rng(words.tolist()) for words in data]

    def all_rows(self) -> Rows:
        """All rows of the training sets: leaves [M, n]."""
        return labelled(self.index, self.labels)

    def clean_rows(self) -> Rows:
        """The clean rows: leaves [M, c]."""
        return labelled(self.clean_index, self.clean_labels)

    def config(self, **changes: Any) -> TrainConfig:
        """The recipe with changes; a defense that sets an optimiser gets nothing of a named recipe."""
        recipe = recipes.without(self.recipe) if "optimiser" in changes else self.recipe
        return dataclasses.replace(recipe, **changes)

    def begin(self, stage: str, model: Model) -> PyTree:
        """Fresh variables of a stage's networks, stacked [M, ...], prepared with the suspect rows or else the clean rows."""
        shape = self.runner.image_shape
        variables = ensemble.init_networks(model, shape, self.keys_for(f"{stage}: weights"))
        for need in ("training set", "clean rows"):
            if need in self.knowledge:
                return prepare(model, variables, self.pool, self.knowledge[need].index)
        return variables

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
        """Train a network for each of the M suspects, or restore the networks of a finished stage.

        Args:
            stage: its name, which must contain everything that its result depends on besides the run's settings: stages of
                the same name share their result.
            model: the architecture.
            config: how it is trained.
            rows: leaves [M, n', ...]; without a target "weight" all rows have the same weight.
            variables: initial variables; None for fresh networks.
            objective: what a step minimises; None for the mean of weight times cross-entropy.
            loss_cap: see `weighted_cross_entropy`, which is used without an objective.
        """
        if variables is None:
            variables = self.begin(stage, model)
        if objective is None:
            ones = jnp.ones(rows.targets["labels"].shape, jnp.float32)
            rows = rows._replace(targets={"weight": ones, **rows.targets})
            objective = weighted_cross_entropy(model, loss_cap, config.label_smoothing)
        keys = self.keys_for(f"{stage}: shuffles")
        return self.runner.from_variables(stage, model, config, variables, keys, 1, self.pool, rows, objective)

    def per_row(self, function: Callable[..., PyTree], variables: PyTree, rows: Rows) -> PyTree:
        """`StageRunner.per_row` for rows of the pool."""
        return self.runner.per_row(function, variables, rows, self.pool, self.recipe.evaluation_batch_size)

    def losses(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """Each row's cross-entropy, un-augmented and with running statistics: float32 [M, n']."""
        return self.per_row(row_losses(model), variables, rows)

    def logits(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """Each row's logits, un-augmented and with running statistics: float32 [M, n', K]."""
        return self.per_row(row_logits(model), variables, rows)

    def embeddings(self, model: Model, variables: PyTree, rows: Rows) -> np.ndarray:
        """Each row's embedding, the input of the last layer, un-augmented and with running statistics: float32 [M, n', d]."""
        return self.per_row(row_embeddings(model), variables, rows)


def apart(values: np.ndarray, count: int) -> np.ndarray:
    """Results of `DefenseInput.copies`, [M * count, ...], as [M, count, ...]."""
    return values.reshape(-1, count, *values.shape[1:])


def labelled(index: np.ndarray, labels: np.ndarray) -> Rows:
    """Combine rows of the pool with their labels, int [M, n] each."""
    return Rows(jnp.asarray(index, jnp.int32), {"labels": jnp.asarray(labels, jnp.int32)})


def fingerprint(**settings: Any) -> str:
    """A hash of settings in eight hexadecimal digits, for the name of a stage with too many settings to spell out."""
    text = ", ".join(f"{name}={settings[name]!r}" for name in sorted(settings))
    return f"{zlib.crc32(text.encode()):08x}"


@cache
def weighted_cross_entropy(model: Model, loss_cap: float = 0.0, smoothing: float = 0.0) -> Objective:
    """The mean over the batch of targets["weight"], float32 [N], times the cross-entropy. A negative weight raises the loss.

    Args:
        model: the network.
        loss_cap: rows of negative weight have no gradient once their cross-entropy exceeds this, since an unbounded ascent
            overflows; 0 for no cap.
        smoothing: label smoothing, see `losses.cross_entropy`.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        loss, weight = losses.cross_entropy(output.logits, targets["labels"], smoothing), targets["weight"]
        if loss_cap:
            # Selected, since the derivative of a minimum depends on how it is rounded: see `bdjax/selection.py`.
            loss = jnp.where((weight < 0) & (loss > loss_cap), loss_cap, loss)
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
    """A complete defense."""

    name: str
    """the name on the command line"""
    title: str
    """the name in tables"""
    paper: str
    """"Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data" """
    stage: Stage
    needs: tuple[Need, ...]
    """everything that it reads from `DefenseInput.knowledge`"""
    settings: Any
    """a frozen dataclass with the paper's values as defaults and a docstring for each field"""
    run: Callable[[DefenseInput, Any], DefenseResult]
    """(inputs, settings) -> result"""
    detect: Callable[[DefenseInput, Any], Detection] | None = None
    """(inputs, settings) -> which rows are poisoned, without the training that follows; None if it flags no rows"""
    more_needs: Callable[[Any], tuple[Need, ...]] | None = None
    """(settings) -> what these settings need in addition to `needs`: oracles, or the rows of a control"""
    unused_needs: Callable[[Any], tuple[Need, ...]] | None = None
    """(settings) -> what these settings do without, of `needs`. The tables of all defenses print `needs`, so that has what the
    paper's settings need"""
    check: Callable[[Any], None] | None = None
    """(settings) -> None; raises a one-line InputError that names the invalid setting and the valid values.
    `variants.read_defense` calls it before anything is trained"""
    least: Callable[[Any, Facts], NotTested] | None = None
    """(settings, facts) -> what no rows could make it find in a sample as small as this; None for a method that draws no
    conclusion from rows. Every detector has it"""
    smallest: Callable[[Any], int] | None = None
    """settings -> about how many poisoned rows of one class its own rule asks for: fewer are found by luck, if at all.
    None for a method whose settings say nothing about it"""
    network_after: Callable[[Any, Model, Callable[..., Model], tuple[int, int, int]], Model] | None = None
    """(settings, attacked network, `DefenseInput.make_model`, image shape) -> the architecture of the defended network, where
    it differs from the attacked one; raises a one-line InputError if the two are incompatible. Called before any training"""
    chosen_clean: str = ""
    """the setting with the most clean rows of a class that it uses, if it chooses rows that the network classifies
    correctly and so can be given more than it uses; "" for a defense that uses all it is given"""
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """changes of the settings by preset ("paper", "quick", "strong"), by the recipe of a quick run ("speedrun", which has all
    rows), by the dataset ("gtsrb"), or by both ("quick digits")"""

    def __post_init__(self) -> None:
        for changes in self.changes.values():
            changed(f"defense {self.name}", self.settings, changes)

    def needs_with(self, settings: Any) -> tuple[Need, ...]:
        """Everything that the defense needs with these settings."""
        unused = self.unused_needs(settings) if self.unused_needs else ()
        needed = tuple(need for need in self.needs if need not in unused)
        return needed + (self.more_needs(settings) if self.more_needs else ())


def settings_for(defense: Defense, preset: str, like: str | None, changes: Mapping[str, Any] | None = None) -> Any:
    """The settings of a defense.

    Later values override earlier ones: the paper's, those for the dataset, for the preset, for both, and `changes`.

    Args:
        defense: the defense.
        preset: "paper", "quick" or "strong"; several words are applied in their order: "quick strong" are strong settings at a
            small scale, "quick speedrun" those of a quick run by that recipe.
        like: a key of `bdjax.datasets.DATASETS`, whose settings are used; None for no dataset.
        changes: setting -> value.

    Raises:
        InputError: the defense has no such setting, or the value has the wrong type.
    """
    owner, settings = f"defense {defense.name}", defense.settings
    for key in (like, *(key for word in preset.split() for key in (word, f"{word} {like}"))):
        settings = changed(owner, settings, defense.changes.get(key, {}))
    return changed(owner, settings, changes or {})


def restricted(defense: Defense, inputs: DefenseInput, settings: Any) -> DefenseInput:
    """Restrict the inputs to what the defense needs with these settings."""
    return inputs.restricted_to(defense.name, defense.needs_with(settings))


def facts_of(inputs: DefenseInput) -> list[Facts]:
    """The facts of each of the M suspects."""

    def counts(need: Need) -> np.ndarray:
        if need not in inputs.knowledge:
            return np.zeros((len(inputs.keys), inputs.num_classes), int)
        return np.stack([np.bincount(labels, minlength=inputs.num_classes) for labels in inputs.knowledge[need].labels])

    return [Facts(*of_member) for of_member in zip(counts("training set"), counts("clean rows"), strict=True)]


def not_tested(defense: Defense, settings: Any, facts: Sequence[Facts]) -> tuple[NotTested, ...]:
    """What the defense cannot test of each suspect, known before any training; () if it can test everything.

    Args:
        defense: the defense.
        settings: its settings.
        facts: of each suspect.
    """
    found = tuple(defense.least(settings, of_suspect) for of_suspect in facts) if defense.least else ()
    return found if any(any(of_suspect) for of_suspect in found) else ()


def count_text(count: int) -> str:
    """ "1 row", "2,000 rows"."""
    return "1 row" if count == 1 else f"{count:,} rows"


def too_few(counts: np.ndarray, least: int) -> dict[int, str]:
    """The classes that have rows, but fewer than `least` -> the reason.

    Args:
        counts: int [K], rows of each class.
        least: the smallest number that can be tested.
    """
    return {
        int(label): f"has {count_text(counts[label])}; needs at least {least}"
        for label in np.flatnonzero((counts > 0) & (counts < least))
    }


def unless_finite(*outputs: np.ndarray) -> NotTested:
    """That a suspect could not be tested if its network's outputs are not all finite."""
    return NotTested("" if all(np.isfinite(values).all() for values in outputs) else DIVERGED)


def limits(facts: Facts, classes: Mapping[int, str], reason: str) -> NotTested:
    """Limits of single classes: if no class with rows is left, nothing can be tested.

    Args:
        facts: of the suspect.
        classes: class -> why it cannot be tested.
        reason: why nothing can be tested if none of the classes with rows can.
    """
    with_rows = set(np.flatnonzero(facts.rows).tolist())
    return NotTested(reason, dict(classes)) if with_rows <= classes.keys() else NotTested("", dict(classes))


def _known(defense: Defense, inputs: DefenseInput, settings: Any) -> tuple[NotTested, ...]:
    return not_tested(defense, settings, facts_of(inputs)) if defense.least else ()


def _merged(first: Sequence[NotTested], second: Sequence[NotTested]) -> tuple[NotTested, ...]:
    """Both lists of limits of the same M suspects, the first list's reasons where both have some; () without any."""
    merged = tuple(first or second)
    if first and second:
        merged = tuple(
            NotTested(a.reason or b.reason, {**b.classes, **a.classes}) for a, b in zip(first, second, strict=True)
        )
    return merged if any(map(any, merged)) else ()


def run(defense: Defense, inputs: DefenseInput, settings: Any) -> DefenseResult:
    """Run a defense on what it needs and nothing else.

    Args:
        defense: the defense.
        inputs: M suspects.
        settings: the defense's settings.

    Raises:
        UndeclaredNeedError: the defense reads something that it does not declare.
    """
    result = defense.run(restricted(defense, inputs, settings), settings)
    merged = _merged(_known(defense, inputs, settings), result.not_tested)
    return result._replace(not_tested=merged) if merged or result.not_tested else result


def detect(defense: Defense, inputs: DefenseInput, settings: Any) -> Detection:
    """Run a detector on what it needs and nothing else.

    Where it cannot test any of the suspects, nothing is trained, and `Detection.not_tested` has the reasons.

    Args:
        defense: a defense whose `detect` is not None.
        inputs: M suspects.
        settings: the defense's settings.

    Raises:
        UndeclaredNeedError: the detector reads something that it does not declare.
    """
    known = _known(defense, inputs, settings)
    if known and all(of_suspect.reason for of_suspect in known):
        shape = inputs.knowledge["training set"].index.shape
        return Detection(np.zeros(shape, bool), np.zeros(shape, np.float32), not_tested=known)
    found = defense.detect(restricted(defense, inputs, settings), settings)
    merged = _merged(known, found.not_tested)
    if merged:
        flags = found.flags & np.array([[not of_suspect.reason] for of_suspect in merged])
        found = found._replace(flags=flags)
    return found._replace(not_tested=merged)
