"""The Python interface: arrays in, arrays out. Each function is a thin layer over the rest of the library.

Nothing is written to disk or printed. A result describes one network by default; `seeds=N` trains N networks that differ in
their initial weights and shuffling, and arrays, logits and facts then have a leading axis [N]. `bdjax.defend("abm", ...)` calls
the pure function `bdjax.DEFENSES["abm"].run`.

Settings default to the papers', whatever the dataset; `like="digits"` takes the settings that suit a named dataset, and
`preset="quick"` those that suit small networks and few rows.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CleanModel
from bdjax.attacks.label_rules import LabelRule
from bdjax.attacks.poisoning import trigger_all
from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.attacks.victims import make_plan, prepare
from bdjax.choices import QUERY_BATCH, Aggregation, Augmentation, Direction, Optimiser, Schedule
from bdjax.datasets import ReadOptions, check_like, load, load_suspect, splits
from bdjax.datasets.overlap import shared_rows
from bdjax.datasets.scaling import scaled, size_hint
from bdjax.datasets.validation import check_options, make_dataset
from bdjax.defenses import contract
from bdjax.defenses.aggregation import aggregate_logits
from bdjax.defenses.chain import LINK
from bdjax.defenses.contract import Defense, DefenseInput, labelled
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.ta_kd import TaKdConfig, make_clean_set, make_learners, train_parts
from bdjax.defenses.teachers import ask, from_classifiers, name_of
from bdjax.errors import InputError
from bdjax.evaluation import control_networks
from bdjax.evaluation import suspects as suspect_sets
from bdjax.evaluation import teachers as suspect_models
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.teachers import Recipes, SuspectTeachers
from bdjax.evaluation.variants import NO_ATTACK, NOT_TESTED, AttackVariant, facts_of, read_defense
from bdjax.exchange import corrected_model, saved_model, weights
from bdjax.exchange.leaving import Export, leave
from bdjax.metrics import LEAST_CONTROLS, clean_accuracy, measure_attack
from bdjax.models import MODELS, make_model
from bdjax.settings import changed, check_values
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, no_rows
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import (
    Array,
    Classifier,
    Dataset,
    ExtractedPattern,
    Key,
    Model,
    NotTested,
    PoisonedDataset,
    PyTree,
    Unread,
)

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "MODELS",
    "Classifier",
    "Dataset",
    "InputError",
    "PoisonedDataset",
    "ReadOptions",
    "audit_model",
    "dataset",
    "defend",
    "detect",
    "evaluate",
    "load",
    "load_model",
    "load_suspect",
    "poison",
    "save_model",
    "ta_kd",
    "train",
]

Preset = Literal["paper", "quick", "strong"]
SIZE = "image_size="
"""How messages name the argument of `dataset` and of `ReadOptions`."""
PLAIN = TrainConfig(epochs=20, evaluation_batch_size=250, learning_rate=1e-3, schedule="cosine", keep_last_batch=False)
"""Default training of an undefended network."""


# ---- Data --------------------------------------------------------------------------------------------------------


def dataset(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int | None = None,
    name: str = "data",
    class_names: Sequence[str] = (),
    image_size: int | None = None,
) -> Dataset:
    """Make a dataset from arrays, which are checked. Select rows by `data[mask]`, `data[10:20]` or `data[[3, 5]]`.

    Args:
        images: uint8 [N, H, W, C], C being 1 or 3.
        labels: integers [N], each in 0..num_classes-1.
        num_classes: K; None for the largest label plus 1.
        name: the name in reports; no result depends on it.
        class_names: empty, or K names.
        image_size: height and width that all images are scaled to, at least 8; None for their own.

    Raises:
        InputError: wrong shape or dtype, no rows, or a label that is not a class.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"dataset {name}: {_describe(images)}; they must be uint8 [rows, height, width, channels]")
    if num_classes is None and np.issubdtype(labels.dtype, np.integer) and labels.size:
        num_classes = max(int(labels.max()) + 1, 2)
    check_options(ReadOptions(image_size=image_size))
    names = tuple(class_names)
    return scaled(
        make_dataset(images, labels, num_classes or 2, name, "arrays", names, where=f"dataset {name}"), image_size
    )


def _describe(images: np.ndarray) -> str:
    return f"images are {images.dtype} of shape {list(images.shape)}"


def _check_data(data: object, where: str) -> None:
    if not isinstance(data, Dataset):
        raise InputError(
            f"{where} is a {type(data).__name__}; it must be a Dataset (bdjax.dataset makes one from arrays)"
        )


# ---- Networks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """A trained classifier, or N of them with `seeds=N`. Calling it is `predict`, so it is a `Classifier`."""

    model: Model = field(repr=False)
    """the pure functions"""
    variables: PyTree = field(repr=False)
    """of one network; of N networks, each leaf with a leading axis [N]"""
    image_shape: tuple[int, int, int]
    width: int
    """channel width of further networks that a defense trains"""
    seeds: int | None
    """N; None for a single network"""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits.

        Args:
            images: uint8 [B, H, W, C], or float [B, H, W, C] in [0, 1].

        Returns:
            float32 [B, K], or [N, B, K].

        Raises:
            InputError: images of the wrong shape or dtype.
        """
        images = np.asarray(images)
        is_pixel = images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)
        if images.shape[1:] != self.image_shape or not len(images) or not is_pixel:
            shape = ", ".join(map(str, self.image_shape))
            raise InputError(
                f"{_describe(images)}; this network takes uint8, or floats in 0..1, of shape [rows, {shape}]"
            )
        images = images if images.dtype == np.uint8 else images.astype(np.float32)
        logits = _runner(self.image_shape).predict(
            self.model, _stacked(self, self.seeds or 1), images, PLAIN.evaluation_batch_size
        )
        return logits if self.seeds else logits[0]

    __call__ = predict


def load_model(
    path: str | pathlib.Path,
    model: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    *,
    num_classes: int | None = None,
    naming: str | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> Network:
    """Load a network: one that a run or `save_model` has left, or weights from elsewhere. Nothing in a file is run.

    Args:
        path: the folder of a saved model, or a safetensors file.
        model: of a safetensors file: the architecture, a key of `MODELS`.
        image_shape: of a safetensors file: (H, W, C).
        num_classes: of a safetensors file: K; None for that of its last layer.
        naming: of a safetensors file: whose names the tensors have, torchvision, timm, kuangliu or flax; None to see it from
            the names.
        mean, std: of a safetensors file: the normalisation of pixels in [0, 1] that the network was trained with, C numbers
            each, or a single number for all channels; None for none. It becomes part of the network.

    Raises:
        InputError: the file is damaged, a pickle, or holds another network.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        if any(setting is not None for setting in (model, image_shape, num_classes, naming, mean, std)):
            raise InputError(f"{path}: is the folder of a saved model, which needs no other argument; leave them out")
        reader = corrected_model if corrected_model.is_corrected_model(path) else saved_model
        found = reader.read(path)
        shape, count, width = found.about.image_shape, found.about.members, found.about.architecture.width
    else:
        if model is None or image_shape is None:
            raise InputError(f"{path}: load_model needs the architecture and the image shape of a file of weights")
        if (mean is None) != (std is None):
            raise InputError(f"{path}: give both mean and std, or neither")
        normalisation = None if mean is None else (mean, std)
        found = weights.read(path, model, num_classes, tuple(image_shape), naming, normalisation)
        shape, count, width = tuple(image_shape), 1, found.model.architecture.width
    seeds = count if count > 1 else None
    return Network(found.model, _squeezed(found.variables, seeds), shape, width, seeds)


def save_model(
    network: Network,
    folder: str | pathlib.Path,
    class_names: Sequence[str] = (),
    exports: Sequence[Export] = (),
) -> None:
    """Save a network as model.safetensors and model.json, which `load_model` reads; bit by bit the same.

    Two networks of which one corrects the other, such as ABM's, get a folder each, and the rule is in correction.json.

    Args:
        network: from `train`, `defend`, `ta_kd` or `load_model`; several seeds are saved together.
        folder: created if needed.
        class_names: empty, or K names.
        exports: further files for other programs, of a single network: "stablehlo", "onnx" (with the extra `onnx`).

    Raises:
        InputError: the network is not one of `MODELS`, such as a pruned one.
    """
    if not isinstance(network, Network):
        raise InputError(f"save_model: the network is a {type(network).__name__}; it must be a trained network")
    if class_names and len(class_names) != network.model.num_classes:
        raise InputError(f"save_model: {len(class_names)} class names for {network.model.num_classes} classes")
    variables, shape = _stacked(network, network.seeds or 1), network.image_shape
    names = tuple(map(str, class_names))
    if not leave(pathlib.Path(folder), network.model, variables, shape, class_names=names, exports=exports):
        raise InputError(f"save_model: {network.model.description} is no network that a file can describe")


@dataclass(frozen=True, eq=False)
class Trained(Network):
    """The result of `train`."""

    recipe: TrainConfig = field(repr=False)
    """how it was trained"""
    history: Mapping[str, np.ndarray] = field(repr=False)
    """name -> float32 [epochs], or [N, epochs]"""


def _runner(image_shape: tuple[int, int, int]) -> StageRunner:
    return StageRunner(None, image_shape, ensemble.default_layout())


@cache
def _network(name: str, num_classes: int, width: int) -> Model:
    """The same object for the same architecture, so that compiled functions are reused."""
    return make_model(name, num_classes, width)


def _stacked(network: Network, count: int) -> PyTree:
    """The variables stacked [count, ...]."""
    if network.seeds:
        return network.variables
    return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (count, *np.shape(leaf))), network.variables)


def _squeezed(tree: PyTree, seeds: int | None) -> PyTree:
    """Remove the member axis unless `seeds` is given."""
    return tree if seeds else jax.tree.map(lambda leaf: leaf[0], tree)


def _keys(key: Key, seeds: int | None) -> Key:
    """A typed key for each seed, [M]; a single network has the first."""
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds {seeds} is not at least 1")
    return jnp.stack([jax.random.fold_in(key, seed) for seed in range(seeds or 1)])


def _recipe(owner: str, changes: Mapping[str, Any], start: TrainConfig = PLAIN) -> TrainConfig:
    recipe = changed(owner, start, changes)
    kinds = {"optimiser": Optimiser, "schedule": Schedule, "augmentation": Augmentation}
    check_values(
        owner,
        recipe,
        choices={name: kind.__args__ for name, kind in kinds.items()},
    )
    return recipe


def train(
    model: str | Model | Network,
    data: Dataset,
    key: Key,
    *,
    width: int = 64,
    epochs: int = PLAIN.epochs,
    batch_size: int = PLAIN.batch_size,
    learning_rate: float = PLAIN.learning_rate,
    seeds: int | None = None,
    **training: Any,
) -> Trained:
    """Train a network on labels, without any defense.

    Args:
        model: a key of `MODELS`; a `Model`; or a trained network, to continue its training.
        data: the training rows.
        key: a `jax.random.key`, for initial weights and shuffling.
        width: channel width of a network given by name; 64 is the papers' size.
        epochs, batch_size, learning_rate: of the training.
        seeds: the number of networks to train in one call; None for a single network, which equals the first of them.
        training: other fields of `bdjax.training.member.TrainConfig`: optimiser, schedule, weight_decay, augmentation, ...

    Raises:
        InputError: unknown network, invalid setting, or a network that does not fit the data.
    """
    _check_data(data, "train: data")
    changes = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    recipe = _recipe("train", {**changes, **training})
    start = model if isinstance(model, Network) else None
    if start is not None:
        _check_fits(start, data, "train: data")
        seeds, width = _seeds_with(start, seeds), start.width
    network = start.model if start is not None else _as_model(model, data.num_classes, width)
    keys, runner = _keys(key, seeds), _runner(data.image_shape)
    pool, rows = jnp.asarray(data.images), _all_rows(data, len(keys))
    if start is not None:
        variables = _stacked(start, len(keys))
        nets = runner.from_variables("network", network, recipe, variables, keys, 1, pool, rows)
    else:
        none = no_rows(rows)
        nets = runner.from_scratch("network", network, recipe, keys, 1, pool, rows, none)
    history = _squeezed(nets.history, seeds)
    return Trained(network, _squeezed(nets.variables, seeds), data.image_shape, width, seeds, recipe, history)


def _as_model(model: str | Model, num_classes: int, width: int) -> Model:
    if isinstance(model, str):
        return _network(model, num_classes, width)
    if not isinstance(model, Model):
        raise InputError(
            f"model is a {type(model).__name__}; it must be a name in MODELS, a Model or a trained network"
        )
    if model.num_classes != num_classes:
        raise InputError(f"model {model.description} has {model.num_classes} classes; the data has {num_classes}")
    return model


def _all_rows(data: Dataset, count: int) -> Rows:
    index = np.tile(np.arange(len(data), dtype=np.int32), (count, 1))
    return labelled(index, np.tile(data.labels, (count, 1)))


def _check_fits(network: Network, data: Dataset, where: str) -> None:
    _check_data(data, where)
    if (network.image_shape, network.model.num_classes) != (data.image_shape, data.num_classes):
        raise InputError(
            f"{where} has {data.num_classes} classes of images {data.image_shape}; the network is for "
            f"{network.model.num_classes} of {network.image_shape}{size_hint(network.image_shape, data.image_shape, SIZE)}"
        )


def _seeds_with(network: Network, seeds: int | None) -> int | None:
    if network.seeds and seeds not in (None, network.seeds):
        raise InputError(f"seeds {seeds}: the given network has {network.seeds} seeds; leave seeds out")
    return network.seeds or seeds


# ---- Attacks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trigger:
    """Adds a trigger to images; holds the label rule, which says on which rows and by which class success is measured."""

    attack: str
    target: int
    rule: LabelRule
    num_classes: int
    apply: Callable[..., Array] = field(repr=False)
    params: PyTree = field(repr=False)
    key: Key = field(repr=False)

    def __call__(self, images: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Add the trigger to images.

        Args:
            images: uint8 [N, H, W, C].
            labels: int32 [N], the true classes; only needed by triggers that depend on them.

        Returns:
            uint8 [N, H, W, C].

        Raises:
            InputError: images of the wrong shape or dtype, or missing labels.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise InputError(f"{_describe(images)}; a trigger takes uint8 [rows, height, width, channels]")
        if labels is None and self._reads_labels(images.shape[1:]):
            raise InputError(
                f"the trigger of {self.attack} depends on the class: pass the labels, trigger(images, labels)"
            )
        labels = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels, np.int32)
        data = Dataset(images, labels, self.num_classes, "", "")
        return trigger_all(self.key, data, self.apply, self.params)

    def _reads_labels(self, image_shape: tuple[int, ...]) -> bool:
        image, label = jax.ShapeDtypeStruct(image_shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        program = jax.make_jaxpr(self.apply)(self.params, image, label, self.key).jaxpr
        label_input = program.invars[-2]
        return any(variable is label_input for equation in program.eqns for variable in equation.invars)


class Poisoned(NamedTuple):
    """A poisoned training set and its trigger."""

    data: PoisonedDataset
    trigger: Trigger
    settings: Any
    """the settings of the attack that were used"""


def poison(
    attack: str,
    data: Dataset,
    key: Key,
    *,
    target: int = 0,
    poison_rate: float | None = None,
    label_rule: str | None = None,
    like: str | None = None,
    clean_model: Network | None = None,
    **settings: Any,
) -> Poisoned:
    """Poison a training set.

    Args:
        attack: a key of `ATTACKS`, of an attack that poisons data and does not train the network itself.
        data: clean rows.
        key: random key for the trigger and the choice of rows.
        target: the attacker's class.
        poison_rate: share of all rows; None for the attack's default.
        label_rule: a key of `bdjax.attacks.label_rules.LABEL_RULES`; None for the attack's default.
        like: a named dataset whose settings to use: "digits".
        clean_model: a network without a backdoor, for attacks that need one.
        settings: settings of the attack, by name.

    Raises:
        InputError: unknown attack, setting, label rule or class; an attack that trains the network itself; a missing clean
          model; or rows that are already poisoned.
    """
    _check_data(data, "poison: data")
    if isinstance(data, PoisonedDataset) and data.is_poisoned.any():
        raise InputError(
            f"poison: {int(data.is_poisoned.sum())} rows of the data are already poisoned; pass clean rows"
        )
    definition = find_attack(attack)
    if definition.control:
        data_attacks = [name for name, other in ATTACKS.items() if not other.control]
        raise InputError(
            f"attack {attack} trains the network itself; attacks that poison data are {', '.join(data_attacks)}"
        )
    if type(target) is not int or not 0 <= target < data.num_classes:
        raise InputError(f"poison: target {target!r} is not a class; classes are {data.class_range}")
    needs_model = definition.needs_clean_model or definition.starts_from_clean_model
    if needs_model and clean_model is None:
        raise InputError(
            f"attack {attack} needs a clean network: pass clean_model=, trained by bdjax.train on clean rows"
        )
    if needs_model:
        _check_fits(clean_model, data, "poison: data")
    check_like(like, "poison: like")
    options = {"label_rule": label_rule, "poison_rate": poison_rate, "changes": {attack: settings}, "like": like}
    plan = make_plan(attack, data, target, **options)
    clean = CleanModel(clean_model.model, ensemble.members(_stacked(clean_model, 1), 0)) if needs_model else None
    prepared = prepare(key, plan, data, target, 0, clean)
    (part,), (params,) = plan.parts, prepared.params
    trigger = Trigger(attack, target, part.rule, data.num_classes, definition.apply, params, jax.random.fold_in(key, 1))
    return Poisoned(prepared.poisoned, trigger, part.settings)


class Evaluation(NamedTuple):
    """Metrics of a classifier: floats, or float [N] for N networks. See `bdjax.metrics`."""

    cda: float | np.ndarray
    """share of untouched rows predicted as their label"""
    asr: float | np.ndarray | None
    """share of the triggered victim rows predicted as the class that the attacker wants"""
    r_acc: float | np.ndarray | None
    """share of the same rows predicted as their true label"""

    def __str__(self) -> str:
        def number(value: float | np.ndarray) -> str:
            spread = f"±{np.std(value):.3f}" if np.ndim(value) else ""
            return f"{np.mean(value):.3f}{spread}"

        return " ".join(f"{name}={number(value)}" for name, value in self._asdict().items() if value is not None)


def evaluate(model: Classifier | Network, test: Dataset, trigger: Trigger | None = None) -> Evaluation:
    """Measure a classifier.

    Args:
        model: any function from images, float32 [N, H, W, C] in [0, 1], to logits, float [N, K].
        test: clean rows that it was not trained on.
        trigger: from `poison`; None to measure accuracy only.

    Raises:
        InputError: logits of the wrong shape, or no test row that the attack aims at.
    """
    _check_data(test, "evaluate: test")
    if trigger is not None and not isinstance(trigger, Trigger):
        raise InputError("evaluate: trigger must be the .trigger that bdjax.poison returned, which knows its target")
    clean = _predicted_classes(model, test, test.images)
    if trigger is None:
        cda = [clean_accuracy(predictions, test.labels) for predictions in clean.reshape(-1, len(test))]
        return Evaluation(np.array(cda) if clean.ndim > 1 else cda[0], None, None)
    victims, wanted = trigger.rule.victims(test.labels), trigger.rule.wanted(test.labels)
    if not victims.any():
        raise InputError(f"evaluate: the attack aims at none of the {len(test)} test rows; pass rows of other classes")
    triggered = _predicted_classes(model, test, trigger(test.images, test.labels))
    pairs = zip(clean.reshape(-1, len(test)), triggered.reshape(-1, len(test)), strict=True)
    measured = [measure_attack(*pair, test.labels, victims, wanted) for pair in pairs]
    numbers = ([getattr(metrics, name) for metrics in measured] for name in Evaluation._fields)
    return Evaluation(*(np.array(values) if clean.ndim > 1 else values[0] for values in numbers))


def _predicted_classes(model: Classifier | Network, test: Dataset, images: np.ndarray) -> np.ndarray:
    """Predicted classes, int [rows] or [N, rows]."""
    if not isinstance(model, Network):
        if not callable(model):
            raise InputError(f"evaluate: model is a {type(model).__name__}; it must map images to logits")
        name = f"evaluate: the model ({name_of(model)})"
        return np.argmax(ask(model, images, test.num_classes, name, more_classes=True), -1)
    logits = model(images.astype(np.float32) / 255)
    if logits.shape[-1] < test.num_classes:
        raise InputError(f"evaluate: the model has {logits.shape[-1]} classes; the test rows have {test.num_classes}")
    return np.argmax(logits, -1)


# ---- Defenses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Detected:
    """The result of a detector. With N seeds each array has a leading axis [N]."""

    flags: np.ndarray | None = field(repr=False)
    """bool [n]: rows flagged as poisoned; None if nothing could be tested, which is not the same as no flag"""
    scores: np.ndarray | None = field(repr=False)
    """float32 [n], higher for more suspicious rows; None if nothing could be tested"""
    patterns: tuple[ExtractedPattern, ...] | tuple[tuple[ExtractedPattern, ...], ...] = field(repr=False)
    """extracted triggers, by class; with N seeds, one such tuple per seed"""
    facts: Mapping[str, Any]
    """further numbers, by name"""
    given: tuple[str, ...]
    """the inputs that it used, which are exactly its declared needs"""
    settings: Any
    """the settings of the detector that were used"""
    not_tested: NotTested = NotTested()
    """what could not be tested, in all or in classes; with N seeds, what could not be in any of them"""
    shared_rows: int = 0
    """clean rows that are suspect rows, too: a detector that trusts them may take what they carry for clean"""
    unread: tuple[Unread, ...] = ()
    """what the data's source has beside its rows and was not read, and so not examined"""
    warnings: tuple[str, ...] = ()
    """why the result should not be relied on, such as a premise of the method that fails; of all seeds, each text once"""


@dataclass(frozen=True, eq=False)
class Defended(Network):
    """The network that a defense returns. With N seeds each array has a leading axis [N]."""

    flags: np.ndarray | None = field(repr=False)
    """bool [n]: rows flagged as poisoned or left out of training"""
    scores: np.ndarray | None = field(repr=False)
    """float32 [n], higher for more suspicious rows"""
    facts: Mapping[str, Any]
    """further numbers, by name"""
    pictures: Mapping[str, np.ndarray] = field(repr=False)
    """name -> float32 [k, H, W, C] in [0, 1]"""
    given: tuple[str, ...]
    """the inputs that it used, which are exactly its declared needs"""
    settings: Any
    """the settings of the defense that were used"""
    not_tested: NotTested = NotTested()
    """see `Detected.not_tested`"""
    shared_rows: int = 0
    """see `Detected.shared_rows`"""


def detect(
    detector: str,
    data: Dataset,
    key: Key,
    *,
    model: str | Model = "resnet10",
    width: int = 64,
    training: Mapping[str, Any] = {},
    victim: Network | None = None,
    clean: Dataset | None = None,
    seeds: int | None = None,
    preset: Preset = "paper",
    like: str | None = None,
    **settings: Any,
) -> Detected:
    """Find poisoned rows.

    Args:
        detector: a defense that detects; settings may follow its name as on the command line, "scan:threshold=10".
        data: the suspect rows. Their ground truth is ignored, even in a `PoisonedDataset`.
        key: random key.
        model: the network to train on the rows, for detectors that need the attacked network.
        width: channel width of networks given by name; 64 is the papers' size.
        training: fields of `TrainConfig` for that network, where they differ from `PLAIN`: {"epochs": 8}.
        victim: a network already trained on the rows, instead of `model`, `width` and `training`.
        clean: known clean rows, for detectors that need them.
        seeds: the number of seeds to run in one call; None for a single run, which equals the first of them.
        preset: "paper"; "quick" for small networks and few rows; "strong" for settings that improve on the paper's.
        like: a named dataset whose settings to use: "digits".
        settings: settings of the detector, by name.

    Returns:
        The flags. Where the rows are too few for the detector to find anything whatever they are, nothing is trained, and
        `not_tested` has the reason; where that is so for some classes, it lists them.

    Raises:
        InputError: unknown detector or setting, or a missing input.
    """
    defense, config = _find_defense(detector, preset, like, settings)
    if defense.detect is None:
        detectors = ", ".join(name for name, other in DEFENSES.items() if other.detect)
        raise InputError(f"defense {detector} does not flag rows; detectors are {detectors}")
    _check_data(data, f"detect {detector}: data")
    needs = defense.needs_with(config)
    inputs, seeds, _ = _make_inputs(
        defense, config, needs, data, key, model, width, training, victim, clean, seeds, is_detection=True
    )
    found = contract.detect(defense, inputs, config)
    patterns = found.patterns if seeds or not found.patterns else found.patterns[0]
    flags, scores, facts = _squeezed((found.flags, found.scores, dict(found.facts)), seeds)
    limits = _in_any(found.not_tested)
    if found.not_tested and all(of_seed.reason for of_seed in found.not_tested):
        flags = scores = None
    warnings, shared = tuple(dict.fromkeys(filter(None, found.warnings))), _shared_rows(clean, data)
    return Detected(flags, scores, patterns, facts, needs, config, limits, shared, data.unread, warnings)


def defend(
    defense: str,
    suspect: Dataset | Network,
    key: Key,
    *,
    model: str | Model = "resnet10",
    width: int = 64,
    training: Mapping[str, Any] = {},
    victim: Network | None = None,
    clean: Dataset | None = None,
    seeds: int | None = None,
    preset: Preset = "paper",
    like: str | None = None,
    **settings: Any,
) -> Defended:
    """Make a clean network from a suspect training set, or from a suspect network and clean rows.

    Args:
        defense: a key of `DEFENSES`; or as on the command line, with settings or as a chain: "fine_tuning+fkd".
        suspect: training rows, whose ground truth is ignored; or a network.
        key, model, width, training, victim, clean, seeds, preset, like: as for `detect`.
        settings: settings of the defense, by name.

    Raises:
        InputError: unknown defense or setting, a missing input, or rows so few that the defense can find nothing in them.
    """
    method, config = _find_defense(defense, preset, like, settings)
    if not isinstance(suspect, Network):
        _check_data(suspect, f"defend {defense}: suspect")
    needs = method.needs_with(config)
    inputs, seeds, width = _make_inputs(
        method, config, needs, suspect, key, model, width, training, victim, clean, seeds, is_detection=False
    )
    limits = contract.not_tested(method, config, contract.facts_of(inputs))
    if limits and all(of_seed.reason for of_seed in limits):
        raise InputError(f"defense {defense} {NOT_TESTED}: {limits[0].reason}")
    result = contract.run(method, inputs, config)
    arrays = (result.variables, result.flags, result.scores, dict(result.facts), dict(result.pictures))
    variables, flags, scores, facts, pictures = _squeezed(arrays, seeds)
    shape = inputs.runner.image_shape
    limits = _in_any(result.not_tested)
    shared = _shared_rows(clean, suspect) if isinstance(suspect, Dataset) else 0
    return Defended(
        result.model, variables, shape, width, seeds, flags, scores, facts, pictures, needs, config, limits, shared
    )


def _in_any(limits: Sequence[NotTested]) -> NotTested:
    """What could not be tested with some seed."""
    classes = {label: reason for of_seed in limits for label, reason in of_seed.classes.items()}
    return NotTested(next((of_seed.reason for of_seed in limits if of_seed.reason), ""), classes)


def _shared_rows(clean: Dataset | None, data: Dataset) -> int:
    return 0 if clean is None else int(shared_rows(clean, data).sum())


def _find_defense(name: str, preset: str, like: str | None, settings: Mapping[str, Any]) -> tuple[Defense, Any]:
    """A defense and its settings."""
    check_like(like, f"defense {name}: like")
    if preset not in Preset.__args__:
        raise InputError(f"defense {name}: preset {preset!r} is not one of {', '.join(Preset.__args__)}")
    variant = read_defense(name, preset, like)
    if not settings:
        return variant.defense, variant.settings
    if LINK in name:
        raise InputError(f"defense {name}: give the settings of a chain in its text, as in fine_tuning:epochs=5+fkd")
    config = changed(f"defense {variant.defense.name}", variant.settings, settings)
    if variant.defense.check:
        variant.defense.check(config)
    return variant.defense, config


def _make_inputs(
    defense: Defense,
    settings: Any,
    needs: Sequence[str],
    suspect: Dataset | Network,
    key: Key,
    model: str | Model,
    width: int,
    training: Mapping[str, Any],
    victim: Network | None,
    clean: Dataset | None,
    seeds: int | None,
    *,
    is_detection: bool,
) -> tuple[DefenseInput, int | None, int]:
    """The inputs of a defense, with the number of seeds and the width that follow from the suspect.

    A detection only asks the victim; a defense may train another network like it.
    """
    where, is_set = f"defense {defense.name}", isinstance(suspect, Dataset)
    _check_needs(where, needs, suspect, clean)
    network, rows = victim if is_set else suspect, suspect if is_set else clean
    first = DEFENSES.get(defense.name.split(LINK)[0], defense)
    if network is not None and network.model.parts:
        is_after = first.stage == "after training"
        is_training = first.stage == "in training" or not is_detection
        if is_after and not first.network_after:
            what = "changes a network's weights"
        elif is_set and is_training and not is_after and first.name != "none":
            what = "trains a network like the victim"
        else:
            what = ""
        if what:
            raise InputError(f"{where} {what}; two networks that correct each other cannot be trained")
    if rows is None:  # only a defense of a network can do without any
        empty = np.zeros((0, *network.image_shape), np.uint8)
        rows = Dataset(empty, np.zeros(0, np.int32), network.model.num_classes, "no rows", "")
    if network is not None:
        _check_fits(network, rows, f"{where}: {'data' if is_set else 'clean'}")
        seeds, width, model = _seeds_with(network, seeds), network.width, network.model
    if is_set and clean is not None and _kind(clean) != _kind(suspect):
        hint = size_hint(suspect.image_shape, clean.image_shape, SIZE)
        raise InputError(f"{where}: clean has {_kind(clean)}; the data has {_kind(suspect)}{hint}")
    attacked, keys, runner = _as_model(model, rows.num_classes, width), _keys(key, seeds), _runner(rows.image_shape)

    def make_network(name: str | None = None, num_classes: int | None = None) -> Model:
        if name is None and num_classes in (None, attacked.num_classes):
            return attacked
        name = name or attacked.description.split()[0]
        if name not in MODELS:
            raise InputError(
                f"{where} trains variants of {name} with {num_classes} classes: give the model by a name in MODELS"
            )
        return _network(name, num_classes or attacked.num_classes, width)

    if defense.network_after:
        defense.network_after(settings, attacked, make_network, rows.image_shape)
    recipe = _recipe(f"{where}: training", training, network.recipe if isinstance(network, Trained) else PLAIN)
    plain = Dataset(**{field.name: getattr(rows, field.name) for field in fields(Dataset)})  # without the ground truth
    truth = rows.is_poisoned if isinstance(rows, PoisonedDataset) else None
    group = [Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), seed, plain, (), truth) for seed in range(len(keys))]
    variables = None if network is None else _stacked(network, len(keys))
    if not is_set:
        teachers = SuspectTeachers(attacked, group, variables, None, Recipes(recipe, recipe, recipe))
        return suspect_models.make_defense_input(teachers, keys, clean, make_network, runner), seeds, width
    limits = contract.not_tested(defense, settings, [facts_of(plain, clean, plain.num_classes)])
    is_trained_here = network is None and "attacked model" in needs and not (limits and limits[0].reason)
    inputs = suspect_sets.make_defense_input(
        group, keys, plain, clean, make_network, recipe, runner, train_plainly=is_trained_here
    )
    if network is not None:
        inputs = inputs.with_knowledge({"attacked model": Nets(attacked, variables, 1, {})})
    return inputs, seeds, width


def _kind(data: Dataset) -> str:
    return f"{data.num_classes} classes of images {data.image_shape}"


def _check_needs(where: str, needs: Sequence[str], suspect: Dataset | Network, clean: Dataset | None) -> None:
    if isinstance(suspect, Network) and {"training set", "number of poisons"} & set(needs):
        able = ", ".join(name for name, defense in DEFENSES.items() if "training set" not in defense.needs)
        raise InputError(f"{where} needs the training set, not only a network; defenses of networks are {able}")
    if clean is not None:
        _check_data(clean, f"{where}: clean")
    elif "clean rows" in needs:
        raise InputError(f"{where} needs clean rows: pass clean=, a Dataset of known clean rows")
    if "number of poisons" in needs and not isinstance(suspect, PoisonedDataset):
        raise InputError(f"{where} needs the number of poisons, which only a PoisonedDataset has")
    if "attacker's trigger" in needs:
        raise InputError(f"{where} needs the attacker's trigger with these settings, which no defender has")


# ---- Audit -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Audited:
    """The result of `audit_model`. For a network of N seeds, arrays have a leading axis [N]."""

    outcome: str
    """found, nothing found, or could not be tested; never "clean": what was not found may be there"""
    reason: str | list[str]
    """why it could not be tested; "" if it could"""
    found: tuple[int, ...] | list[tuple[int, ...]]
    """the classes that a trigger was found for"""
    masks: np.ndarray | None = field(repr=False)
    """float32 [K, H, W, 1] in [0, 1]: the mask of the reversed trigger into each class; NaN for a network that could not be
    tested, None if none could"""
    patterns: np.ndarray | None = field(repr=False)
    """float32 [K, H, W, C] in [0, 1]: its pattern"""
    numbers: Mapping[str, Any] = field(repr=False)
    """all numbers, see `bdjax.evaluation.model_audit.judge`"""


def audit_model(
    suspect: Network | Classifier,
    clean: Dataset,
    held_out: Dataset,
    key: Key,
    *,
    controls: int = 9,
    search_epochs: int = 80,
    search_patience: int = 5,
    search_batch_size: int = 64,
    random_triggers: int = 150,
    surrogate: str = "resnet10",
    width: int = 64,
    queries: int = 4,
    training: Mapping[str, Any] = {},
) -> Audited:
    """Is there a backdoor in a network? Reversed and random triggers on held-out rows, beside control networks trained here.

    Args:
        suspect: a network; or any function from images, float32 [B, H, W, C] in [0, 1], to logits, a black box:
            triggers are then searched on a surrogate, which finds less. Two networks that correct each other are one, too.
        clean: known clean rows, for the search and for the control networks.
        held_out: other clean rows, on which the success of the reversed triggers is measured.
        key: random key.
        controls: the number of control networks, at least 2; the p-value is at least 1 / (controls + 1).
        search_epochs, search_patience, search_batch_size: of the search by Neural Cleanse.
        random_triggers: triggers of each kind that are drawn at random and put on 40 held-out rows; 0 for none.
        surrogate, width, queries: architecture and channel width of surrogates, and pictures of each clean row that the
            suspect is queried with; only for a function.
        training: fields of `TrainConfig` for the control networks and surrogates: {"epochs": 8}.

    Raises:
        InputError: rows or settings that do not fit.
    """
    for name, rows in (("clean", clean), ("held_out", held_out)):
        _check_data(rows, f"audit_model: {name}")
    if _kind(clean) != _kind(held_out):
        raise InputError(f"audit_model: clean has {_kind(clean)}; held_out has {_kind(held_out)}")
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < LEAST_CONTROLS:
        raise InputError(f"audit_model: controls {controls!r} is not a whole number of at least {LEAST_CONTROLS}")
    if isinstance(random_triggers, bool) or not isinstance(random_triggers, int) or random_triggers < 0:
        raise InputError(f"audit_model: random_triggers {random_triggers!r} is not a whole number of at least 0")
    changes = {
        "epochs": search_epochs,
        "patience": search_patience,
        "batch_size": min(search_batch_size, len(clean)),
    }
    settings = changed("audit_model: search", NeuralCleanseSettings(), changes)
    check_values("audit_model: search", settings)
    start = suspect.recipe if isinstance(suspect, Trained) else PLAIN
    recipe, runner = _recipe("audit_model: training", training, start), _runner(clean.image_shape)
    if isinstance(suspect, Network):
        _check_fits(suspect, clean, "audit_model: clean")
    if isinstance(suspect, Network) and not suspect.model.parts:
        model, variables = suspect.model, _stacked(suspect, suspect.seeds or 1)
        members = [ensemble.members(variables, np.arange(number, number + 1)) for number in range(suspect.seeds or 1)]
        asks = [
            lambda images, member=member: runner.predict(model, member, images, recipe.evaluation_batch_size)[0]
            for member in members
        ]
    else:
        model, variables = _network(surrogate, clean.num_classes, width), None
        asks = [
            lambda images, alone=alone: ask(alone, images, clean.num_classes, name_of(alone))
            for alone in (_each(suspect) if isinstance(suspect, Network) else [suspect])
        ]
    count = len(asks)
    titles = ["the model"] if count == 1 else [f"model {number}" for number in range(1, count + 1)]
    imitation = control_networks.Imitation(recipe, queries)
    rows = clean, clean, held_out
    setup = control_networks.Setup(controls, model, recipe, imitation, settings, runner, *rows, random_triggers)
    audited = control_networks.audit(key, setup, control_networks.Asked(titles, ["Python"] * count, asks, variables))
    masks = patterns = None
    if audited.tested:
        masks, patterns = (_at(audited.tested, count, leaf) for leaf in audited.measured.triggers)
    classes = [tuple(entry["found"]) for entry in audited.numbers["models"]]
    reasons = [entry["reason"] for entry in audited.numbers["models"]]
    if count == 1:
        classes, reasons = classes[0], reasons[0]
    return Audited(audited.numbers["outcome"], reasons, classes, masks, patterns, audited.numbers)


def _each(network: Network) -> list[Network]:
    """A network of each seed."""
    if not network.seeds:
        return [network]
    variables = [jax.tree.map(lambda leaf, seed=seed: leaf[seed], network.variables) for seed in range(network.seeds)]
    return [replace(network, variables=of_seed, seeds=None) for of_seed in variables]


def _at(tested: Sequence[int], count: int, triggers: np.ndarray) -> np.ndarray:
    """The triggers of the networks that were tested, float32 [T, ...], at their places in [N, ...], NaN elsewhere; of a single
    network without that axis."""
    placed = np.full((count, *triggers.shape[1:]), np.nan, np.float32)
    placed[tested] = triggers[: len(tested)]
    return placed if count > 1 else placed[0]


# ---- TA-KD -------------------------------------------------------------------------------------------------------


class TaKd(NamedTuple):
    """The two networks of TA-KD."""

    aggregated: Trained
    """distilled from the teachers' aggregated logits and the clean labels"""
    student: Trained
    """distilled from the aggregated network and the clean labels"""


def ta_kd(
    models: Sequence[Classifier | Network],
    clean: Dataset,
    key: Key,
    *,
    model: str | Model = "resnet18",
    student: str | Model = "resnet10",
    width: int = 64,
    epochs: int = 15,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    validation_share: float = 0.2,
    training: Mapping[str, Any] = {},
    seeds: int | None = None,
    teacher_batch: int = QUERY_BATCH,
    **settings: Any,
) -> TaKd:
    """Distil a clean student from untrusted classifiers, using only their logits on clean images.

    Args:
        models: the teachers: functions from images, float32 [N, H, W, C] in [0, 1], to logits, float [N, K].
        clean: known clean rows.
        key: random key.
        model: the aggregated network.
        student: the student.
        width: channel width of networks given by name; 64 is the paper's size.
        epochs, batch_size, learning_rate: of both trainings.
        validation_share: share of the clean rows for the learning-rate schedule.
        training: other fields of `bdjax.training.member.TrainConfig`.
        seeds: the number of seeds to run in one call; None for a single run.
        teacher_batch: the most images that a teacher gets in one call.
        settings: fields of `bdjax.defenses.ta_kd.TaKdConfig`: temperature, alpha, aggregation, ...

    Raises:
        InputError: no teachers, a teacher whose logits have the wrong shape, or an invalid setting.
    """
    _check_data(clean, "ta_kd: clean")
    config = changed("ta_kd", TaKdConfig(), settings)
    models = models if callable(models) else list(models)
    logits_of_teachers = from_classifiers(models, clean.num_classes, teacher_batch)
    _check_ta_kd(config, len(models), validation_share)
    changes = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, **training}
    recipe = _recipe("ta_kd: training", changes, TrainConfig(keep_last_batch=False))
    keys, runner = _keys(key, seeds), _runner(clean.image_shape)
    clean_sets = []
    for split_key, view_key in map(jax.random.split, keys):
        parts = splits.train_validation_rows(split_key, np.arange(len(clean)), validation_share)
        clean_sets.append(make_clean_set(view_key, clean.images, clean.labels, *parts, config))
    teacher_logits = np.stack(
        [aggregate_logits(logits_of_teachers(rows.images), config.aggregation, config.trim) for rows in clean_sets]
    )
    trained = []
    for number, (role, name) in enumerate((("aggregated", model), ("student", student))):
        network = _as_model(name, clean.num_classes, width)
        learners = make_learners(None, np.arange(len(keys)), teacher_logits, config.alpha)
        role_key = jax.random.fold_in(key, number)
        nets = train_parts(runner, {role: (network, learners)}, config, recipe, clean_sets, role_key)[role]
        variables, history = _squeezed((nets.variables, nets.history), seeds)
        trained.append(Trained(network, variables, clean.image_shape, width, seeds, recipe, history))
        images = np.stack([rows.images for rows in clean_sets])
        teacher_logits = runner.predict_own(network, nets.variables, images, recipe.evaluation_batch_size)
    return TaKd(*trained)


def _check_ta_kd(config: TaKdConfig, num_teachers: int, validation_share: float) -> None:
    kinds = {"direction": Direction, "aggregation": Aggregation, "augmentation": Augmentation}
    check_values(
        "ta_kd",
        config,
        choices={name: kind.__args__ for name, kind in kinds.items()},
    )
    if config.aggregation == "trimmed_mean" and 2 * config.trim >= num_teachers:
        raise InputError(f"ta_kd: trim {config.trim} at each end leaves no logits of {num_teachers} teachers")
    if not 0 <= validation_share < 1:
        raise InputError(f"ta_kd: validation_share {validation_share} is not at least 0 and below 1")
