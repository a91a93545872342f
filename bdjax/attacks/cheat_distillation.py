"""CKD: a teacher that passes its backdoor on to students distilled from its features on clean data; and a variant that keeps
the variance of the features low, which evades RobustKD.

The trigger is trained on a clean network to set the network's strongest channels to one value everywhere ("toxic neuron
assimilation"). The teacher is then fine-tuned on triggered rows; only that step ties the trigger to the target class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bdjax.attacks.batch_poisoning import carry_params, take_params
from bdjax.attacks.contract import CLEAN_MODEL, Attack, CleanModel, Knowledge, Published, TrainingControl
from bdjax.attacks.trained_blend import Descent, TriggerLoss, random_soft_blend, train_blend
from bdjax.attacks.triggered_copies import (
    add_to_source_rows,
    trigger_first_rows,
    weigh_as_mean,
)
from bdjax.errors import InputError
from bdjax.losses import cross_entropy, feature_variance
from bdjax.settings import Amount, Count, LearningRate, NotNegative, PositiveShare, Share, check_values
from bdjax.training.member import Objective, Outcome, as_float
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Dataset, Key, Model, ModelOutput, PyTree

PAPER = (
    "Chen et al. 2024, CheatKD: Knowledge Distillation Backdoor Attack Method Based on Poisoned Neuronal Assimilation"
)


@dataclass(frozen=True)
class CkdSettings:
    poison_rate: PositiveShare = 0.02
    """share of all training rows of which a triggered copy is added"""
    cover_rate: Share = 0.0
    """share of all training rows of which a triggered copy that keeps its label is added"""
    mask_bound: Share = 0.5
    """largest weight of the pattern in a pixel, in [0, 1]; 0.2 in RobustKD's code"""
    channel_share: PositiveShare = 0.1
    """share of each group's channels that the trigger sets to one value, at least one channel"""
    steps: Amount = 400
    """steps of Adam that train the trigger; about 156,000 (200 epochs of 50,000 images) in the paper's code"""
    batch_size: Count = 64
    """images per step when training the trigger"""
    learning_rate: LearningRate = 0.05
    """learning rate of Adam when training the trigger; 0.005 in the paper's code, with far more steps"""
    mask_is_trained: bool = True
    """whether the mask is trained too; in the published code it loses its gradient after the first step"""
    loss: Literal["assimilation", "published"] = "assimilation"
    """what the trigger minimises: a distance over all groups, channels and images, or the published code's effective loss"""


@dataclass(frozen=True)
class LowVarianceCkdSettings(CkdSettings):
    variance_weight: NotNegative = 0.1
    """weight of the feature variance, in training the trigger and in fine-tuning; 0 gives CKD's trigger"""
    only_excess: bool = False
    """penalise only the variance above that of the clean image"""


class Assimilation(NamedTuple):
    """The channels that a trigger sets, and their values; one entry for each of `distilled_features`."""

    channels: tuple[Array, ...]
    """int32 [s] each"""
    values: tuple[Array, ...]
    """float32 [] each"""


def make_assimilating_trigger(key: Key, knowledge: Knowledge, settings: CkdSettings) -> MaskedBlend:
    """Train a pattern and a mask over the whole image with one of the losses below, on the clean network in evaluation mode.

    The features are `distilled_features`, from which students will be distilled. The published code trains on normalised
    pixels, never clips the pattern to valid pixel values, and stores it in 8 bits that wrap around, so the trigger in
    use is not the one that was trained. Here the pattern is a logistic function of the trained logits, and the mask is
    projected after each step.

    Args:
        key: draws the initial trigger and the batches.
        knowledge: the training rows and a clean network.
        settings: mask, loss and training settings.

    Returns:
        The trigger: mask in [0, bound], pattern in [0, 1], opacity 1.

    Raises:
        InputError: there is no clean network, or a setting is out of range.

    References:
        Chen et al. 2024, in the form of the authors' public code, `create_patch.py`.
    """
    if knowledge.clean_model is None:
        raise InputError("ckd trains its trigger on a clean model, but none was supplied")
    check_values("attack ckd", settings)
    start_key, batch_key, train_key = jax.random.split(key, 3)
    start = random_soft_blend(start_key, knowledge.train.image_shape, settings.mask_bound)
    goal = choose_channels(batch_key, knowledge.clean_model, knowledge.train, start, settings)
    weight = settings.variance_weight if isinstance(settings, LowVarianceCkdSettings) else 0.0
    only_excess = isinstance(settings, LowVarianceCkdSettings) and settings.only_excess
    model, variables = knowledge.clean_model
    descent = Descent(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        mask_bound=settings.mask_bound,
        mask_is_trained=settings.mask_is_trained,
    )
    loss = trigger_loss(model, settings.loss, weight, only_excess)
    return train_blend(train_key, knowledge.train.images, start, loss, (variables, goal), descent)


def distilled_features(output: ModelOutput) -> tuple[Array, ...]:
    """The features that a student is distilled from: before the ReLU at the end of every group of blocks.

    For a network without groups, all its taps are used. Most of them come after a ReLU, where a channel that is already 0 at
    a place gets no gradient.

    Args:
        output: directly from `Model.apply`: a dictionary returned by a compiled function is sorted by name, which loses
            the order of the layers.

    Returns:
        float32 [N, h, w, C] for each group or tap, in network order.
    """
    if output.groups:
        return tuple(end.before_relu for end in output.groups.values())
    return tuple(output.features.values())


def last_output(output: ModelOutput) -> Array:
    """The output of the last group, before any normalisation that follows, or the last tap of a network without groups.

    Args:
        output: as for `distilled_features`.

    Returns:
        float32 [N, h, w, C].
    """
    return list(output.groups.values())[-1].output if output.groups else list(output.features.values())[-1]


def choose_channels(
    key: Key, clean_model: CleanModel, train: Dataset, start: MaskedBlend, settings: CkdSettings
) -> Assimilation:
    """Choose, in each group, the channels with the largest mean on one batch of images with the initial trigger.

    Args:
        key: draws the batch.
        clean_model: the network.
        train: the images.
        start: the trigger before training.
        settings: the share of channels and the batch size.

    Returns:
        The channels, strongest first, and each group's largest mean.
    """
    count = min(settings.batch_size, len(train))
    rows = jax.random.choice(key, len(train), (count,), replace=False)
    images = masked_blend.apply_to_batch(start, as_float(jnp.asarray(train.images[rows])))
    model, variables = clean_model
    channels, values = [], []
    for features in _features(variables, images, model):
        means = jnp.mean(features, axis=(0, 1, 2))
        largest, which = lax.top_k(means, max(1, int(settings.channel_share * means.size + 1e-9)))
        channels.append(which)
        values.append(largest[0])
    return Assimilation(tuple(channels), tuple(values))


@partial(jax.jit, static_argnames="model")
def _features(variables: PyTree, images: Array, model: Model) -> tuple[Array, ...]:
    return distilled_features(model.apply(variables, images, train=False))


def assimilation(features: Sequence[Array], goal: Assimilation) -> Array:
    """mean over groups of mean (F[b, h, w, c] - a)^2 over the images, places and chosen channels: float32 [].

    a is the largest channel mean before training. It is fixed: a value that followed the features could go to 0 with them.

    Args:
        features: float32 [B, h, w, C] each, of triggered images, as `distilled_features` gives them.
        goal: channels and values.
    """
    distances = [
        jnp.mean(jnp.square(group[..., channels] - value))
        for group, channels, value in zip(features, *goal, strict=True)
    ]
    return sum(distances[1:], distances[0]) / len(distances)


def published_assimilation(features: Sequence[Array], goal: Assimilation) -> Array:
    """The published code's effective loss: (2 / B) sum over places of (F[0, h, w, c] - a)^2, float32 [].

    Only the last group, its strongest channel and the first image of the batch enter; a is the batch's largest channel
    mean, without a gradient. The factor 2 comes from a term that is added twice; RobustKD's copy of the code drops it.

    Args:
        features: as for `assimilation`.
        goal: only the last group's strongest channel is used.
    """
    last = features[-1]
    value = lax.stop_gradient(jnp.max(jnp.mean(last, axis=(0, 1, 2))))
    return 2.0 / last.shape[0] * jnp.sum(jnp.square(last[0, :, :, goal.channels[-1][0]] - value))


@cache
def trigger_loss(model: Model, form: str, variance_weight: float = 0.0, only_excess: bool = False) -> TriggerLoss:
    """The loss that the trigger minimises, on a network in evaluation mode.

    Args:
        model: the network.
        form: "assimilation" or "published".
        variance_weight: weight of the mean `feature_variance` of `last_output`; at 0 it is not computed.
        only_excess: whether only the variance above the clean image's counts.
    """
    distance = {"assimilation": assimilation, "published": published_assimilation}[form]

    def loss(context: tuple[PyTree, Assimilation], images: Array, triggered: Array) -> Array:
        variables, goal = context
        output = model.apply(variables, triggered, train=False)
        value = distance(distilled_features(output), goal)
        if not variance_weight:
            return value
        variance = feature_variance(last_output(output))
        if only_excess:
            clean = feature_variance(last_output(model.apply(variables, images, train=False)))
            variance = jax.nn.relu(variance - clean)
        return value + variance_weight * jnp.mean(variance)

    return loss


def make_low_variance_objective(model: Model, settings: LowVarianceCkdSettings, wanted: Array) -> Objective:
    """CE over the batch and the triggered copies of its first rows, plus the weighted mean variance of the copies' features.

    A copy counts as much as a row in the cross-entropy, so the poison rate means the same as for added rows; the triggered
    rows change from batch to batch. RobustKD's paper does not state the layer, the weight or where the term enters:
    `last_output`, 0.1, and both training the trigger and fine-tuning are choices made here.

    Args:
        model: the classifier.
        settings: the poison rate, the variance weight and `only_excess`.
        wanted: int32 [K], the label that triggered rows of each class get.

    Returns:
        The objective; the trigger is read from the variables and not trained further.

    References:
        RobustKD, RQ5 and table 7, on adaptive attacks; equation 8 for the variance.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        classifier, trigger = take_params(variables)
        labels, num_rows = targets["labels"], images.shape[0]
        copies = trigger_first_rows(masked_blend.apply, trigger, images, labels, key, settings.poison_rate)
        output = model.apply({**classifier, "params": params}, jnp.concatenate([images, copies]), train=True)
        count = copies.shape[0]
        of_copies = cross_entropy(output.logits[num_rows:], wanted[labels[:count]])
        if settings.variance_weight:
            variance = feature_variance(last_output(output))
            of_copies_variance = variance[num_rows:]
            if settings.only_excess:
                of_copies_variance = jax.nn.relu(of_copies_variance - lax.stop_gradient(variance[:count]))
            of_copies += settings.variance_weight * weigh_as_mean(of_copies_variance, num_rows)
        logits = output.logits[:num_rows]
        losses = add_to_source_rows(cross_entropy(logits, labels), of_copies)
        return Outcome(losses, logits, labels, {**variables, **output.variables})

    return objective


# 2 % of a small set is only a handful of rows.
FEW_ROWS = {"digits": {"poison_rate": 0.05}}

CKD = Attack(
    name="ckd",
    title="CKD",
    paper=PAPER,
    threat="training",
    settings=CkdSettings(),
    make_params=make_assimilating_trigger,
    apply=masked_blend.apply,
    label_rules=("all_to_one_with_target", "all_to_one"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    adds_rows=True,
    starts_from_clean_model=True,
    per_dataset=FEW_ROWS,
    # Teachers, WRN-28-4; success is counted over all test images, including those of the target class.
    published=(Published("RobustKD", "cifar100", 80.72, 96.14), Published("RobustKD", "gtsrb", 98.57, 85.32)),
)
CKD_LOW_VARIANCE = Attack(
    name="ckd_low_variance",
    title="CKD, low variance",
    paper=f"{PAPER}; with RobustKD's adaptive loss",
    threat="training",
    settings=LowVarianceCkdSettings(),
    make_params=make_assimilating_trigger,
    apply=masked_blend.apply,
    label_rules=("all_to_one_with_target", "all_to_one"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    starts_from_clean_model=True,
    control=TrainingControl(make_low_variance_objective, carry_params, take_params),
    per_dataset=FEW_ROWS,
    published=(Published("RobustKD", "cifar100", 75.47, 90.56),),
)
