"""NAD, neural attention distillation (Li et al. 2021): a fine-tuned copy guides the attention of the attacked network.

The *teacher* is the attacked network after some fine-tuning on clean rows. The *student* starts from the attacked network
again, and learns the labels of the same rows together with the teacher's attention maps at several depths:

    a(F) = sum over channels of |F_c|^p,   CE + sum over taps of beta_l MSE(a_s / ||a_s||_2, a_t / ||a_t||_2)

The norm and the mean square are over the pixels of one image. Both networks see the same augmented batch; the teacher is
frozen, with running statistics.

A mistake of public code that is not made here: it takes "every child but the last" of a network as taps, which includes the
output of the global pooling. There a map is a single pixel, normalised to 1 in both networks, and a third of the loss is
constant. The taps here are all feature maps.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import jax
import jax.numpy as jnp

from bdjax import losses
from bdjax.defenses.attention import distillation_loss
from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.defenses.fine_tuning import tune, weight_change
from bdjax.settings import Amount, Count, LearningRate, NotEmpty, NotNegative, Positive, Steps
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, DefenseResult, Key, Model, PyTree


@dataclass(frozen=True)
class NadSettings:
    betas: Annotated[tuple[NotNegative, ...], NotEmpty()] = (500.0, 1000.0, 1000.0)
    """weights of the attention losses at the network's last taps, in order of depth; a network with fewer taps uses the last
    weights"""
    power: Positive = 2.0
    """p, exponent of the attention maps"""
    teacher_epochs: Amount = 10
    """epochs of fine-tuning the teacher, by labels alone"""
    epochs: Count = 20
    """training epochs of the student"""
    batch_size: Count = 64
    """rows per step, at most the number of clean rows"""
    learning_rate: LearningRate = 0.1
    """initial learning rate of SGD with Nesterov momentum 0.9, for teacher and student"""
    steps: Steps = ((2, 0.01), (20, 1e-4))
    """(epoch, learning rate from that epoch on)"""
    weight_decay: NotNegative = 1e-4
    """L2 penalty on every parameter"""
    cutout: Amount = 3
    """side in pixels of a square blacked out in every image, in addition to the run's augmentation; 0 for none"""


def cutout(key: Key, images: Array, side: int) -> Array:
    """Black out a square at a random place of each image, clipped at the edge (DeVries and Taylor 2017).

    Args:
        key: for the batch.
        images: float32 [N, H, W, C].
        side: in pixels; 0 for none.
    """
    if side == 0:
        return images
    num, height, width, _ = images.shape
    row_key, column_key = jax.random.split(key)

    def is_inside(key: Key, length: int) -> Array:
        start = jax.random.randint(key, (num, 1), 0, length) - side // 2
        where = jnp.arange(length)[None, :]
        return (where >= start) & (where < start + side)

    hole = is_inside(row_key, height)[:, :, None] & is_inside(column_key, width)[:, None, :]
    return jnp.where(hole[..., None], 0.0, images)


@cache
def teacher_objective(model: Model, hole: int) -> Objective:
    """What the teacher minimises: cross-entropy on images with a square of side `hole` cut out."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        output = model.apply({**variables, "params": params}, cutout(key, images, hole), train=True)
        loss = losses.cross_entropy(output.logits, targets["labels"])
        return Outcome(loss, output.logits, targets["labels"], output.variables)

    return objective


@cache
def attention_distillation(model: Model, betas: tuple[float, ...], power: float, hole: int) -> Objective:
    """What the student minimises (equation 4).

    Args:
        model: the architecture of teacher and student.
        betas: see `NadSettings`.
        power: see `NadSettings`.
        hole: `cutout` of `NadSettings`.

    Returns:
        An objective whose variables hold the frozen teacher's as "teacher".
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        images = cutout(key, images, hole)
        teacher = model.apply(variables["teacher"], images, train=False)
        network = {name: value for name, value in variables.items() if name != "teacher"}
        student = model.apply({**network, "params": params}, images, train=True)
        attention = distillation_loss(list(student.features.values()), list(teacher.features.values()), betas, power)
        loss = losses.cross_entropy(student.logits, targets["labels"]) + attention
        return Outcome(loss, student.logits, targets["labels"], {**student.variables, "teacher": variables["teacher"]})

    return objective


def run(inputs: DefenseInput, settings: NadSettings) -> DefenseResult:
    """Fine-tune the teachers, then train students that start from the attacked networks."""
    model, attacked = inputs.attacked.model, inputs.attacked.variables
    config = inputs.config(
        epochs=settings.teacher_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        optimiser="sgd",
        momentum=0.9,
        nesterov=True,
        schedule="steps",
        steps=settings.steps,
    )
    # Variants that differ in the student alone share their teachers.
    student_settings = ("betas", "power", "epochs")
    shared = {name: value for name, value in vars(settings).items() if name not in student_settings}
    teachers = tune(
        inputs,
        f"NAD teacher {fingerprint(**shared)}",
        model,
        config,
        attacked,
        teacher_objective(model, settings.cutout),
    )
    student = tune(
        inputs,
        f"NAD student {fingerprint(**vars(settings))}",
        model,
        dataclasses.replace(config, epochs=settings.epochs),
        {**attacked, "teacher": teachers},
        attention_distillation(model, settings.betas, settings.power, settings.cutout),
    )
    variables = {name: value for name, value in student.items() if name != "teacher"}
    facts = {
        "teacher's weight change": weight_change(attacked["params"], teachers["params"]),
        "weight change": weight_change(attacked["params"], variables["params"]),
    }
    return DefenseResult(model, variables, facts=facts)


NAD = Defense(
    name="nad",
    title="NAD",
    paper="Li et al. 2021, Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=NadSettings(),
    run=run,
    changes={
        "quick": {"batch_size": 32},
        # Maps of 15, 7 and 3 pixels, not 32, 16 and 8, so the mean squares are 5 to 7 times as large. With the paper's numbers
        # this network lost half of its accuracy.
        "speedrun": {"betas": (50.0, 100.0, 100.0), "learning_rate": 0.05},
        # The mean square of maps of norm 1 is 16 times as large with 8x8 pixels as with 32x32, so the betas are smaller by
        # that factor, and by another half to keep the accuracy. A black square of 3x3 would hide a seventh of a digit. With
        # two steps an epoch, more epochs are needed.
        "quick digits": {
            "betas": (15.0, 30.0, 30.0),
            "cutout": 0,
            "teacher_epochs": 30,
            "epochs": 30,
            "steps": ((20, 0.01),),
        },
    },
)
