"""ABM: the Anti-Backdoor Model, whose output is subtracted from the attacked network's (Chen et al. 2024, TIFS).

1. NBAB isolates a few rows that are mostly poisoned (`nbab.py`).
2. The teacher is the attacked network itself, trained on all rows without a defense and left unchanged.
3. The student is trained on the teacher's outputs for the isolated rows alone: too few to learn the task from, enough to learn
   the backdoor.
4. The defended model is (equation 4)

       f_t(x) - delta relu(f_s(x) - gamma A)

   where A_k is the teacher's mean logit of class k over the rows with that label. The student changes a logit only where its
   own exceeds the teacher's average for that class: where it sees the trigger.

The paper does not define the distillation's distance (here the mean square difference of logits, since logits are subtracted),
nor whether A is a single number or one for each class (here one for each class: the mean over all rows and classes is near 0).

Ours: contrast rows. The isolated rows of an attack with one target all have the same label, so a student that always gives that
class the teacher's logit fits them, whatever the image is, and its subtraction takes the class from clean rows, too. Contrast
rows are drawn from the half of the rows that NBAB suspects least, and the student's logits for them should be 0.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.choices import Optimiser
from bdjax.defenses.contract import Defense, DefenseInput, Need, fingerprint, labelled
from bdjax.defenses.nbab import RANKS, NbabSettings, agreement, check_planting, isolate, suspicion, usable, verify
from bdjax.models import MODELS
from bdjax.settings import Count, InnerShare, LearningRate, NotNegative, Number, Share, check_values
from bdjax.training.member import Objective, Outcome
from bdjax.training.stages import Nets
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Distance = Literal["logits", "kl", "hard"]
Average = Literal["label", "prediction", "scalar"]
MOST_HALVINGS = 6
"""How often delta is halved before nothing is subtracted; ours."""
CHANGED_WITHOUT_WARNING = 0.02
"""Share of the least suspected half of the rows whose prediction may change without a warning; ours."""


@dataclass(frozen=True)
class AbmSettings(NbabSettings):
    """The paper's values for CIFAR-10 (section V-A), in addition to NBAB's."""

    rank: str = "suspicious"
    """score by which rows are isolated: see `bdjax.defenses.nbab.suspicion`"""
    isolation_rate: InnerShare = 0.01
    """share of all rows that the student is trained on"""
    student_rows: str = "isolated"
    """rows that the student is trained on: "isolated"; or "clean", as many known clean rows (all if there are fewer), a control
    that shows what the subtraction does by itself"""
    contrast: NotNegative = 0.0
    """contrast rows for each isolated row: drawn from the half of the rows that is suspected least, with logits of 0 as the
    student's target; 0 for none (the paper)"""
    student: str = ""
    """the student's architecture; "" for the teacher's"""
    student_epochs: Count = 20
    """epochs on the isolated rows"""
    student_optimiser: str = "sgd"
    """"sgd" or "adam" """
    student_learning_rate: LearningRate = 0.01
    """the student's learning rate, constant"""
    distance: str = "logits"
    """distance from the teacher: "logits", mean square difference of logits; "kl"; "hard", cross-entropy with the labels
    instead (section V-D)"""
    average: str = "label"
    """rows over which A_k is averaged: "label", those labelled k; "prediction", those predicted as k; "scalar", the mean of
    "label" over the classes, one number for all"""
    gamma: Number = 0.8
    """share of A that the student's logit must exceed; 1 on the ImageNet subset"""
    delta: Number = 2.5
    """factor of the subtracted logits; larger removes more of the backdoor and of the accuracy"""
    most_changed: Share = 0.0
    """share of the known clean rows whose prediction the subtraction may change: delta is halved until no more do; 0 to
    keep delta (the paper), which needs no clean rows"""


def check(settings: AbmSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
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
            "student_rows": ("isolated", "clean"),
            **({"student": MODELS} if settings.student else {}),
        },
    )


def corrected(teacher: Array, student: Array, average: Array, *, gamma: float | Array, delta: float | Array) -> Array:
    """The logits of ABM (equation 4).

    Args:
        teacher: float32 [N, K], the attacked network's logits.
        student: float32 [N, K], the student's logits.
        average: float32 [K] or [], A.
        gamma: share of A that the student's logit must exceed.
        delta: factor of what is subtracted.

    Returns:
        float32 [N, K].
    """
    return teacher - delta * jax.nn.relu(student - gamma * jnp.expand_dims(average, 0))


@cache
def defended_model(teacher: Model, student: Model) -> Model:
    """Teacher and student as one model with variables {"teacher", "student", "average", "gamma", "delta"}.

    Its taps are the teacher's. It cannot be trained: `apply` refuses `train=True`.
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
                "an anti-backdoor model combines two trained networks and cannot be trained: pass train=False"
            )
        teacher_output = teacher.apply(variables["teacher"], images, train=False, edits=edits)
        student_logits = student.apply(variables["student"], images, train=False).logits
        gamma, delta = variables["gamma"], variables["delta"]
        logits = corrected(teacher_output.logits, student_logits, variables["average"], gamma=gamma, delta=delta)
        return ModelOutput(logits, teacher_output.features, variables)

    description = f"{teacher.description}, corrected by {student.description}"
    return Model(init, apply, teacher.num_classes, description, parts=(teacher, student))


def average_activation(logits: np.ndarray, labels: np.ndarray, num_classes: int, average: str) -> np.ndarray:
    """A (section IV-B): the teacher's mean logit of each class over rows of that class.

    Args:
        logits: float [n, K], the teacher's logits of all training rows.
        labels: int [n], the labels of the training set.
        num_classes: K.
        average: a value of `Average`: see `AbmSettings.average`.

    Returns:
        float32 [K]; a class without rows gets the largest mean of the others, so that the student hardly affects it.

    Raises:
        ValueError: `average` is not a value of `Average`.
    """
    if average not in Average.__args__:
        raise ValueError(f"average {average!r} is not one of {', '.join(Average.__args__)}")
    classes = np.argmax(logits, 1) if average == "prediction" else labels
    means = np.array([logits[classes == k, k].mean() if np.any(classes == k) else np.nan for k in range(num_classes)])
    means = np.where(np.isnan(means), np.nanmax(means), means)
    return np.full(num_classes, means.mean() if average == "scalar" else means, np.float32)


@cache
def imitation(teacher: Model, student: Model, distance: str) -> Objective:
    """Equation 3: the student's distance from the frozen teacher in variables["teacher"], on the same images.

    Where targets["is_contrast"], bool [N], the distance is from logits of 0 instead.

    Raises:
        ValueError: `distance` is not a value of `Distance`.
    """
    if distance not in Distance.__args__:
        raise ValueError(f"distance {distance!r} is not one of {', '.join(Distance.__args__)}")

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        frozen = variables["teacher"]
        student_variables = {name: value for name, value in variables.items() if name != "teacher"}
        output = student.apply({**student_variables, "params": params}, images, train=True)
        is_contrast = jnp.expand_dims(targets["is_contrast"], 1)
        teacher_logits = jnp.where(is_contrast, 0.0, teacher.apply(frozen, images, train=False).logits)
        if distance == "logits":
            loss = jnp.mean(jnp.square(output.logits - teacher_logits), axis=1)
        elif distance == "kl":
            loss = losses.kl_divergence(jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(output.logits))
        else:
            uniform = -jnp.mean(jax.nn.log_softmax(output.logits), axis=1)
            by_label = losses.cross_entropy(output.logits, targets["labels"])
            loss = jnp.where(targets["is_contrast"], uniform, by_label)
        return Outcome(loss, output.logits, targets["labels"], {**output.variables, "teacher": frozen})

    return objective


def least_suspected(scores: np.ndarray) -> np.ndarray:
    """The half of the rows with the lowest scores, int [n // 2], from float [n], higher for the more suspicious."""
    return np.argsort(scores, kind="stable")[: len(scores) // 2]


def train_student(inputs: DefenseInput, flags: np.ndarray, scores: np.ndarray, settings: AbmSettings) -> Nets:
    """Train the student on the isolated rows, or on as many clean rows, and on the contrast rows.

    Args:
        inputs: the suspects.
        flags: bool [M, n], the isolated rows, the same number for each suspect.
        scores: float [M, n], the suspicion of every row.
        settings: of the student; NBAB's, on which the rows depend, are part of the stage's name.
    """
    rows, index, labels = np.stack([np.flatnonzero(of_member) for of_member in flags]), inputs.index, inputs.labels
    chosen = rows.shape[1]
    pairs = zip(scores, inputs.generators("abm: contrast rows"), strict=True)
    count = round(settings.contrast * chosen)
    contrast = np.stack([generator.permutation(least_suspected(of_member))[:count] for of_member, generator in pairs])
    if settings.student_rows == "clean":
        index, labels = inputs.clean_index, inputs.clean_labels
        # Drawn, since data may be sorted by class.
        generators = inputs.generators("abm: clean rows")
        rows = np.stack([generator.permutation(index.shape[1])[:chosen] for generator in generators])
    take = np.take_along_axis
    index = np.concatenate([take(index, rows, 1), take(inputs.index, contrast, 1)], axis=1)
    labels = np.concatenate([take(labels, rows, 1), take(inputs.labels, contrast, 1)], axis=1)
    student_rows = labelled(index, labels)
    is_contrast = np.arange(index.shape[1]) >= rows.shape[1]
    student_rows.targets["is_contrast"] = jnp.asarray(np.broadcast_to(is_contrast, index.shape))
    teacher, student = inputs.attacked.model, inputs.make_model(settings.student or None)
    config = inputs.config(
        epochs=settings.student_epochs,
        optimiser=settings.student_optimiser,
        learning_rate=settings.student_learning_rate,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augmentation="none",
    )
    unused_in_training = ("average", "gamma", "delta", "most_changed")
    stage = f"abm student {fingerprint(**{k: v for k, v in vars(settings).items() if k not in unused_in_training})}"
    start = {**inputs.begin(stage, student), "teacher": inputs.attacked.variables}
    objective = imitation(teacher, student, settings.distance)
    nets = inputs.train(stage, student, config, student_rows, variables=start, objective=objective)
    return nets._replace(variables={name: value for name, value in nets.variables.items() if name != "teacher"})


def affordable_delta(
    teacher: np.ndarray, student: np.ndarray, average: np.ndarray, *, gamma: float, delta: float, most_changed: float
) -> float:
    """The largest of delta, delta / 2, delta / 4 ... that changes few enough predictions; 0 if none of `MOST_HALVINGS` does.

    Args:
        teacher: float [n, K], the attacked network's logits of clean rows.
        student: float [n, K], the student's.
        average: float [K], A.
        gamma, delta: see `AbmSettings`.
        most_changed: share of the rows whose prediction may change.
    """
    before = np.argmax(teacher, 1)
    for halvings in range(MOST_HALVINGS + 1):
        after = corrected(teacher, student, average, gamma=gamma, delta=delta / 2**halvings)
        if np.mean(np.argmax(after, 1) != before) <= most_changed:
            return delta / 2**halvings
    return 0.0


def doubts(held_out_success: np.ndarray, is_usable: np.ndarray, changed: float) -> str:
    """What a defender can see of a result that is not to be trusted; "" if nothing.

    Args:
        held_out_success: float [V], the success of the defender's own trigger in each verification network.
        is_usable: bool [V], where NBAB's premise may hold.
        changed: share of the least suspected half of the rows whose prediction the subtraction changes.
    """
    found = []
    if not is_usable.any():
        shares = ", ".join(f"{share:.2f}" for share in held_out_success)
        found.append(
            "the isolated rows may be no poisoned ones: the defender's own trigger succeeds on "
            f"{shares} of the rows that were not stamped in training, so it was not learned, or it dominates the attacker's. "
            "Change alpha"
        )
    if changed > CHANGED_WITHOUT_WARNING:
        found.append(
            f"the subtraction changes the prediction of {100 * changed:.1f} % of the half of the rows that is suspected least, "
            "so it costs accuracy: these rows may be clean, and the isolated ones, too. Use more contrast or a smaller delta"
        )
    return "; ".join(found)


def run(inputs: DefenseInput, settings: AbmSettings) -> DefenseResult:
    """Isolate rows, train the student on them, and combine both networks."""
    verified = verify(inputs, settings, settings.rungs)
    single_scores = suspicion(verified, settings.rank)
    is_usable = usable(verified.held_out_success, settings.least_success, settings.most_success)
    scores = agreement(single_scores, is_usable)
    flags = isolate(scores, settings.isolation_rate)
    student = train_student(inputs, flags, scores, settings)
    logits, student_logits = (
        inputs.logits(nets.model, nets.variables, inputs.all_rows()) for nets in (inputs.attacked, student)
    )
    average = np.stack(
        [
            average_activation(member_logits, labels, inputs.num_classes, settings.average)
            for member_logits, labels in zip(logits, inputs.labels, strict=True)
        ]
    )
    members, gamma = len(flags), settings.gamma
    delta = np.full(members, settings.delta, np.float32)
    if settings.most_changed:
        clean = (inputs.logits(nets.model, nets.variables, inputs.clean_rows()) for nets in (inputs.attacked, student))
        limits = {"gamma": gamma, "delta": settings.delta, "most_changed": settings.most_changed}
        delta = np.array(
            [affordable_delta(*of_member, **limits) for of_member in zip(*clean, average, strict=True)], np.float32
        )
    changed = []
    for *networks, mean, of_member, factor in zip(logits, student_logits, average, scores, delta, strict=True):
        teacher_rows, student_rows = (of_network[least_suspected(of_member)] for of_network in networks)
        after = corrected(teacher_rows, student_rows, mean, gamma=gamma, delta=factor)
        changed.append(float(np.mean(np.argmax(after, 1) != np.argmax(teacher_rows, 1))))
    failed = np.mean(verified.margins < 0, axis=1) > 0.5  # by most of the networks
    return DefenseResult(
        defended_model(inputs.attacked.model, student.model),
        {
            "teacher": inputs.attacked.variables,
            "student": student.variables,
            "average": jnp.asarray(average),
            "gamma": jnp.full(members, settings.gamma, jnp.float32),
            "delta": jnp.asarray(delta),
        },
        flags=flags,
        scores=scores,
        facts={
            "own trigger's success, rows of training": verified.implant_success.mean(axis=1),
            "own trigger's success, other rows": verified.held_out_success.mean(axis=1),
            "usable verification networks": is_usable.sum(axis=1),
            "rows that fail the test": failed.mean(axis=1),
            "isolated rows": flags.sum(axis=1),
            "isolated rows that failed": (flags & failed).sum(axis=1) / flags.sum(axis=1),
            "delta": delta,
            "predictions changed, least suspected half": np.array(changed),
            "accuracy of the verification networks": verified.clean_accuracy.mean(axis=1),
        },
        single_scores=single_scores,
        warnings=tuple(map(doubts, verified.held_out_success, is_usable, changed)),
    )


def more_needs(settings: AbmSettings) -> tuple[Need, ...]:
    """What these settings need in addition: see `Defense.more_needs`."""
    oracle = ("attacker's trigger",) if settings.trigger == "attacker" else ()
    return (*oracle, "clean rows") if settings.student_rows == "clean" or settings.most_changed else oracle


ABM = Defense(
    name="abm",
    title="ABM",
    paper="Chen et al. 2024, Anti-Backdoor Model: A Novel Algorithm to Remove Backdoors in a Non-Invasive Way",
    stage="in training",
    needs=("training set", "attacked model"),
    more_needs=more_needs,
    settings=AbmSettings(),
    run=run,
    check=check,
    changes={
        "gtsrb": {"alpha": 2000.0},
        "strong": {"rank": "activation"},
        # One per cent of a few thousand rows is a single batch, so the same number of steps takes more epochs. At the paper's
        # alpha of 1000, a network this small loses the defender's backdoor.
        "quick": {
            "alpha": 30.0,
            "student_epochs": 160,
            "optimiser": "adam",
            "learning_rate": 3e-3,
            "student_optimiser": "adam",
            "student_learning_rate": 3e-3,
        },
        # By the lead, a network whose planted backdoor was not learned finds the poisons as well; two networks err on
        # different clean rows. A teacher of smoothed labels has a poison's logit hardly above A, so more is subtracted.
        "speedrun": {
            "optimiser": "recipe",
            "epochs": 3,
            "alpha": 100.0,
            "rungs": (1.0, 3.0),
            "least_success": 0.0,
            "partners": "together",
            "rank": "lead",
            "isolation_rate": 0.02,
            "contrast": 4.0,
            "student_epochs": 20,
            "gamma": 0.5,
            "delta": 5.0,
        },
    },
)
