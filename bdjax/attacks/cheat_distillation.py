"""CKD: a teacher whose students, distilled on clean data from its features, have its backdoor; and the form of it that keeps
the variance of features low, against RobustKD.

The trigger is trained on a clean network to set its strongest channels to one value everywhere ("toxic neuron
assimilation"), and the teacher is then fine-tuned on triggered rows. The trigger has nothing to do with the target class
until then.
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
    add_to_own_rows,
    trigger_first_rows,
    weigh_as_mean,
)
from bdjax.errors import InputError
from bdjax.losses import cross_entropy, feature_variance
from bdjax.training.member import Objective, Outcome, as_float
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Dataset, Key, Model, ModelOutput, PyTree

PAPER = (
    "Chen et al. 2024, CheatKD: Knowledge Distillation Backdoor Attack Method Based on Poisoned Neuronal Assimilation"
)


@dataclass(frozen=True)
class CkdSettings:
    poison_rate: float = 0.02
    """share of all training rows whose triggered copies are added to them"""
    cover_rate: float = 0.0
    """share of all training rows of which a triggered copy with the own label is added"""
    mask_bound: float = 0.5
    """the largest weight that the pattern may have in a pixel; 0.2 in RobustKD's code"""
    channel_share: float = 0.1
    """share of each group's channels that are set to one value, at least one channel"""
    steps: int = 400
    """of the trigger's training; about 156,000 (200 epochs of 50,000 images) in the paper's code"""
    batch_size: int = 64
    """images in one of those steps"""
    learning_rate: float = 0.05
    """of Adam in those steps; 0.005 in the paper's code, for so many more"""
    mask_is_trained: bool = True
    """whether the mask is trained with the pattern; in the published code it loses its gradient after the first step"""
    loss: Literal["assimilation", "published"] = "assimilation"
    """what the trigger minimises: all groups, channels and images, or what the published code comes to; see the two losses"""


@dataclass(frozen=True)
class LowVarianceCkdSettings(CkdSettings):
    variance_weight: float = 0.1
    """of the features' variance, in the trigger's training and in fine-tuning; 0 leaves CKD's trigger as it is"""
    only_excess: bool = False
    """whether only the variance above that of the clean image counts"""


class Assimilation(NamedTuple):
    """Which channels a trigger sets, and to what; one entry for each of `distilled_features`."""

    channels: tuple[Array, ...]
    """int32 [s]"""
    values: tuple[Array, ...]
    """float32 []"""


def make_assimilating_trigger(key: Key, knowledge: Knowledge, settings: CkdSettings) -> MaskedBlend:
    """Train a pattern and a mask over the whole image by one of the losses below, on the clean network in evaluation mode.

    The features are `distilled_features`, those that students will be given. The published code trains on normalised
    pixels, never cuts the pattern to what an image can hold, and stores it in 8 bits that wrap around, so the trigger in
    use is not the one that was trained; here the pattern is a logistic function of what is trained and the mask is
    projected after each step.

    Args:
        key: draws the start and the batches.
        knowledge: the training rows and a clean network.
        settings: of the mask, the loss and the training.

    Returns:
        The trigger: mask in [0, bound], pattern in [0, 1], opacity 1.

    Raises:
        InputError: there is no clean network, or a setting is outside of what it may be.

    References:
        Chen et al. 2024, in the form of the authors' public code, `create_patch.py`.
    """
    if knowledge.clean_model is None:
        raise InputError("ckd trains its trigger on a clean model, and none was given")
    if not 0.0 < settings.channel_share <= 1.0:
        raise InputError(f"channel share {settings.channel_share:g}: it is a share, above 0 and up to 1")
    if settings.loss not in ("assimilation", "published"):
        raise InputError(f"loss {settings.loss!r} is not one of 'assimilation', 'published'")
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
    """The features that a student is distilled from: those before the ReLU at the end of every group of blocks.

    A network without groups has none that are agreed upon, and its taps are taken as they come, most of them after a ReLU:
    there a channel that is already 0 in a place gets no gradient from it.

    Args:
        output: of `Model.apply`, fresh: a dictionary that has left a compiled function is sorted by name, and the order of
            the network is lost.

    Returns:
        float32 [N, h, w, C] of each group or tap, in the order of the network.
    """
    if output.groups:
        return tuple(end.before_relu for end in output.groups.values())
    return tuple(output.features.values())


def last_output(output: ModelOutput) -> Array:
    """What the last group hands on, before any normalisation that follows, or the last tap of a network without groups.

    Args:
        output: as for `distilled_features`.

    Returns:
        float32 [N, h, w, C].
    """
    return list(output.groups.values())[-1].output if output.groups else list(output.features.values())[-1]


def choose_channels(
    key: Key, clean_model: CleanModel, train: Dataset, start: MaskedBlend, settings: CkdSettings
) -> Assimilation:
    """In each group, the channels with the largest mean on one batch of images with the first trigger.

    Args:
        key: draws the batch.
        clean_model: the network.
        train: the images.
        start: the trigger before training.
        settings: the share of channels and the size of the batch.

    Returns:
        The channels, the strongest first, and the largest mean.
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

    a is the largest channel mean before training, a fixed value: one that followed the features could go to 0 with them.

    Args:
        features: float32 [B, h, w, C] each, of triggered images, as `distilled_features` gives them.
        goal: channels and values.
    """
    distances = [
        jnp.mean(jnp.square(own[..., channels] - value)) for own, channels, value in zip(features, *goal, strict=True)
    ]
    return sum(distances[1:], distances[0]) / len(distances)


def published_assimilation(features: Sequence[Array], goal: Assimilation) -> Array:
    """What the published code comes to: (2 / B) sum over places of (F[0, h, w, c] - a)^2, float32 [].

    Only the last group, its strongest channel and the first image of the batch enter; a is the batch's largest channel
    mean, without a gradient. The 2 is of a term that is added twice; RobustKD's copy of the code drops it.

    Args:
        features: as for `assimilation`.
        goal: its last channel is used.
    """
    last = features[-1]
    value = lax.stop_gradient(jnp.max(jnp.mean(last, axis=(0, 1, 2))))
    return 2.0 / last.shape[0] * jnp.sum(jnp.square(last[0, :, :, goal.channels[-1][0]] - value))


@cache
def trigger_loss(model: Model, form: str, variance_weight: float = 0.0, only_excess: bool = False) -> TriggerLoss:
    """What the trigger minimises, on a network in evaluation mode.

    Args:
        model: the network.
        form: "assimilation" or "published".
        variance_weight: of the mean `feature_variance` of `last_output`; with 0 that is not computed at all.
        only_excess: whether only what is above the clean image's variance counts.
    """
    distance = {"assimilation": assimilation, "published": published_assimilation}[form]

    def loss(given: tuple[PyTree, Assimilation], images: Array, triggered: Array) -> Array:
        variables, goal = given
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

    A copy counts as much as a row in the cross-entropy, so the poison rate is what it is for added rows; which rows are
    triggered changes from batch to batch. RobustKD's paper names neither the layer nor the weight nor where the term
    enters: `last_output`, 0.1 and both the trigger and the fine-tuning are choices made here.

    Args:
        model: the classifier.
        settings: the poison rate, the weight and what of the variance counts.
        wanted: int32 [K], the label of triggered rows of each class.

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
        losses = add_to_own_rows(cross_entropy(logits, labels), of_copies)
        return Outcome(losses, logits, labels, {**variables, **output.variables})

    return objective


# A copy of 2 % of so few rows would be a handful.
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
    # Teachers, WRN-28-4; success is counted over all test images, those of the target class too.
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
