"""ABM: the Anti-Backdoor Model, whose answer is subtracted from the attacked network's (Chen et al. 2024, TIFS).

1. NBAB isolates a few rows that are mostly poisoned (`nbab.py`).
2. The teacher is the attacked network itself, trained plainly on all rows and left as it is.
3. The student is trained by the teacher's answers on the isolated rows alone: too few to learn the task from, enough
   to learn the backdoor.
4. What is served is (equation 4)

       f_t(x) - delta relu(f_s(x) - gamma A)

   where A_k is the teacher's mean logit of class k over the rows of that label. The student speaks up only where it is
   surer than the teacher is on average of that class: where it sees the trigger.

The paper does not define the distillation's distance (here the mean square of logits, since logits are subtracted), nor
whether A is one number or one for each class (here the latter: a mean over all rows and classes is near 0).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput, fingerprint, labelled
from bdjax.defenses.nbab import RANKS, NbabSettings, check_planting, isolate, suspicion, verify
from bdjax.models import MODELS
from bdjax.settings import check_values
from bdjax.training.member import Objective, Optimiser, Outcome
from bdjax.training.stages import Nets
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Distance = Literal["logits", "kl", "hard"]
Average = Literal["label", "prediction", "scalar"]


@dataclass(frozen=True)
class AbmSettings(NbabSettings):
    """The paper's values for CIFAR-10 (section V-A); the first ones are NBAB's."""

    rank: str = "suspicious"
    """in what order rows are isolated: see `bdjax.defenses.nbab.suspicion`"""
    isolation_rate: float = 0.01
    """share of all rows that the student is trained on"""
    student: str = ""
    """another network; "" for the teacher's own"""
    student_epochs: int = 20
    student_optimiser: str = "sgd"
    student_learning_rate: float = 0.01
    distance: str = "logits"
    """mean square of logits; "kl"; "hard": labels instead of the teacher (section V-D)"""
    average: str = "label"
    """over what A is taken: rows of a given label, of a predicted one, or one number for all"""
    gamma: float = 0.8
    """1 on the ImageNet subset"""
    delta: float = 2.5


def check(settings: AbmSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_planting("defense abm", settings)
    check_values(
        "defense abm",
        settings,
        choices={
            "rank": RANKS,
            "distance": Distance.__args__,
            "average": Average.__args__,
            "student_optimiser": Optimiser.__args__,
            **({"student": MODELS} if settings.student else {}),
        },
        above={"isolation_rate": 0, "student_learning_rate": 0},
        at_least={"student_epochs": 1},
        below={"isolation_rate": 1},
    )


def corrected(teacher: Array, student: Array, average: Array, *, gamma: float | Array, delta: float | Array) -> Array:
    """What ABM answers (equation 4).

    Args:
        teacher: float32 [N, K], the attacked network's logits.
        student: float32 [N, K], the external network's.
        average: float32 [K] or [], A.
        gamma: how much of A the student must exceed.
        delta: how strongly it is subtracted.

    Returns:
        float32 [N, K].
    """
    return teacher - delta * jax.nn.relu(student - gamma * jnp.expand_dims(average, 0))


@cache
def defended_model(teacher: Model, student: Model) -> Model:
    """Both networks as one, to be served: variables {"teacher", "student", "average", "gamma", "delta"}.

    Taps are the teacher's. It is not trained any more: `train=True` is refused, and there is nothing to initialise.
    """

    def init(key: Key, image_shape: tuple[int, int, int]) -> PyTree:
        return {
            "teacher": teacher.init(key, image_shape),
            "student": student.init(jax.random.fold_in(key, 1), image_shape),
            "average": jnp.zeros(teacher.num_classes, jnp.float32),
            "gamma": jnp.float32(0.8),
            "delta": jnp.float32(2.5),
        }

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        if train:
            raise ValueError(
                "an anti-backdoor model is put together from two trained networks; it is not trained itself"
            )
        told = teacher.apply(variables["teacher"], images, train=False, edits=edits)
        subtracted = student.apply(variables["student"], images, train=False).logits
        how = {name: variables[name] for name in ("gamma", "delta")}
        return ModelOutput(corrected(told.logits, subtracted, variables["average"], **how), told.features, variables)

    return Model(init, apply, teacher.num_classes, f"{teacher.description}, corrected by {student.description}")


def average_activation(logits: np.ndarray, labels: np.ndarray, num_classes: int, how: str) -> np.ndarray:
    """A (section IV-B): how high the teacher's logit of a class stands on rows of that class.

    Args:
        logits: float [n, K], the teacher's, of all training rows.
        labels: int [n], as given.
        num_classes: K.
        how: a value of `Average`: "label" and "prediction" say whose rows a class's are; "scalar" is the mean of "label"'s.

    Returns:
        float32 [K]; a class without rows gets the highest of the others, so that the student is silent on it.

    Raises:
        ValueError: if `how` is not known.
    """
    if how not in Average.__args__:
        raise ValueError(f"average {how!r} is not one of {', '.join(Average.__args__)}")
    own = np.argmax(logits, 1) if how == "prediction" else labels
    means = np.array([logits[own == k, k].mean() if np.any(own == k) else np.nan for k in range(num_classes)])
    means = np.where(np.isnan(means), np.nanmax(means), means)
    return np.full(num_classes, means.mean() if how == "scalar" else means, np.float32)


@cache
def imitation(teacher: Model, student: Model, distance: str) -> Objective:
    """Equation 3: the student's distance from the frozen teacher in variables["teacher"], on the same (augmented) images.

    Raises:
        ValueError: if the distance is not known.
    """
    if distance not in Distance.__args__:
        raise ValueError(f"distance {distance!r} is not one of {', '.join(Distance.__args__)}")

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        frozen = variables["teacher"]
        own = {name: value for name, value in variables.items() if name != "teacher"}
        output = student.apply({**own, "params": params}, images, train=True)
        told = teacher.apply(frozen, images, train=False).logits
        if distance == "logits":
            loss = jnp.mean(jnp.square(output.logits - told), axis=1)
        elif distance == "kl":
            loss = losses.kl_divergence(jax.nn.log_softmax(told), jax.nn.log_softmax(output.logits))
        else:
            loss = losses.cross_entropy(output.logits, targets["labels"])
        return Outcome(loss, output.logits, targets["labels"], {**output.variables, "teacher": frozen})

    return objective


def train_student(inputs: DefenseInput, flags: np.ndarray, settings: AbmSettings) -> Nets:
    """The external network: trained on the isolated rows alone.

    Args:
        inputs: the suspects.
        flags: bool [M, n], the isolated rows, equally many of each.
        settings: of the student; those of NBAB, which the rows depend on, name the stage.
    """
    rows = np.stack([np.flatnonzero(own) for own in flags])
    index, labels = (np.take_along_axis(each, rows, axis=1) for each in (inputs.index, inputs.labels))
    teacher, student = inputs.attacked.model, inputs.make_model(settings.student or None)
    config = inputs.config(
        epochs=settings.student_epochs,
        optimiser=settings.student_optimiser,
        learning_rate=settings.student_learning_rate,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augmentation="none",
    )
    later = ("average", "gamma", "delta")
    stage = f"abm student {fingerprint(**{k: v for k, v in vars(settings).items() if k not in later})}"
    start = {**inputs.begin(stage, student), "teacher": inputs.attacked.variables}
    objective = imitation(teacher, student, settings.distance)
    nets = inputs.train(stage, student, config, labelled(index, labels), variables=start, objective=objective)
    return nets._replace(variables={name: value for name, value in nets.variables.items() if name != "teacher"})


def run(inputs: DefenseInput, settings: AbmSettings) -> DefenseResult:
    """Isolate, train the student, and put both networks together."""
    nbab = NbabSettings(**{name: getattr(settings, name) for name in NbabSettings.__dataclass_fields__})
    verified = verify(inputs, nbab)
    scores = suspicion(verified, settings.rank)
    flags = isolate(scores, settings.isolation_rate)
    student = train_student(inputs, flags, settings)
    logits = inputs.logits(inputs.attacked.model, inputs.attacked.variables, inputs.all_rows())
    average = np.stack(
        [
            average_activation(own, labels, inputs.num_classes, settings.average)
            for own, labels in zip(logits, inputs.labels, strict=True)
        ]
    )
    members = len(flags)
    failed = verified.margins < 0
    return DefenseResult(
        defended_model(inputs.attacked.model, student.model),
        {
            "teacher": inputs.attacked.variables,
            "student": student.variables,
            "average": jnp.asarray(average),
            "gamma": jnp.full(members, settings.gamma, jnp.float32),
            "delta": jnp.full(members, settings.delta, jnp.float32),
        },
        flags=flags,
        scores=scores,
        facts={
            "own trigger answered": verified.implant_success,
            "rows that fail the test": failed.mean(axis=1),
            "isolated rows that failed": (flags & failed).sum(axis=1) / flags.sum(axis=1),
            "accuracy of the verification network": verified.clean_accuracy,
        },
    )


ABM = Defense(
    name="abm",
    title="ABM",
    paper="Chen et al. 2024, Anti-Backdoor Model: A Novel Algorithm to Remove Backdoors in a Non-Invasive Way",
    stage="in training",
    needs=("training set", "attacked model"),
    oracles=lambda settings: ("attacker's trigger",) if settings.trigger == "attacker" else (),
    settings=AbmSettings(),
    run=run,
    check=check,
    changes={
        "gtsrb": {"alpha": 2000.0},
        "strong": {"rank": "activation"},
        # A hundredth of a few thousand rows is one batch: as many steps take more epochs. And so small a network loses its
        # own backdoor at 1000.
        "quick": {
            "alpha": 30.0,
            "student_epochs": 160,
            "optimiser": "adam",
            "learning_rate": 3e-3,
            "student_optimiser": "adam",
            "student_learning_rate": 3e-3,
        },
    },
)
