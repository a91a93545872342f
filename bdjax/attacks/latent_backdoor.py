"""LBA: a teacher whose features of triggered images match those of the target class, so that students inherit the backdoor
(Yao et al. 2019).

The attacker first trains a trigger on a clean network until triggered images have roughly the features of the target class,
and then fine-tunes the network to bring them closer.

RobustKD's experiments have an attack of the same name that is built differently. Its only public code is in CKD's repository,
`create_patch_latentbackdoor.py`: a soft mask over the whole image, trained on the features before the ReLU at the end of
*every* group of blocks, and then plain fine-tuning on triggered rows. That is
`latent_backdoor:features=groups:mask_bound=0.5:feature_weight=0.0`; the default is Yao et al.'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.attacks.batch_poisoning import carry_params, take_params
from bdjax.attacks.cheat_distillation import distilled_features
from bdjax.attacks.contract import CLEAN_MODEL, Attack, CleanModel, Knowledge, Published, TrainingControl
from bdjax.attacks.trained_blend import Descent, TriggerLoss, random_soft_blend, train_blend
from bdjax.attacks.triggered_copies import add_to_source_rows, trigger_first_rows, weigh_as_mean
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models import embedding
from bdjax.settings import Amount, Count, InnerShare, LearningRate, NotNegative, PositiveShare, Share, check_values
from bdjax.training.member import Objective, Outcome, as_float, mean_over_batches
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Dataset, Key, Model, ModelOutput, PyTree

Features = Literal["pooled", "groups"]


@dataclass(frozen=True)
class LatentBackdoorSettings:
    poison_rate: PositiveShare = 0.02
    """share of each batch that also appears triggered, at least one row; all 16 rows in the paper"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    size: InnerShare = 0.2
    """side of the square, as a share of the image's width"""
    mask_bound: Share = 0.0
    """if above 0, replace the square with a trained mask over the whole image, bounded by this; 0.5 in the public code of
    RobustKD's LBA (its published masks reach 0.5 for the WRN-28-4, and 0.2 for the PyramidNet)"""
    features: Features = "pooled"
    """what the trigger and the fine-tuning bring to the target's: the "pooled" input of the last layer (Yao et al.), or the
    features before the ReLU at the end of all "groups" of blocks, each with the same weight (RobustKD's LBA)"""
    steps: Amount = 600
    """steps of Adam that train the trigger; 1550 in the paper's code"""
    batch_size: Count = 32
    """images per step when training the trigger"""
    learning_rate: LearningRate = 0.1
    """learning rate of Adam when training the trigger"""
    feature_weight: NotNegative = 0.5
    """weight of the feature distance in fine-tuning; 0.05 in the paper's code, 0.5 in TrojanZoo's, 0 (plain fine-tuning) in
    RobustKD's LBA"""


class LatentTrigger(NamedTuple):
    """The trigger, and the features that triggered images should have."""

    blend: MaskedBlend
    target_features: tuple[Array, ...]
    """the target class's mean of each of `features_of`, float32 [d] or [h, w, C], in the clean network"""


def features_of(output: ModelOutput, features: Features) -> tuple[Array, ...]:
    """The features that triggered images should share with the target class.

    Args:
        output: directly from `Model.apply`, as `distilled_features` needs it.
        features: see `LatentBackdoorSettings`.

    Returns:
        One array float32 [N, d], or float32 [N, h, w, C] for each group; for a network without groups, for each tap.
    """
    return distilled_features(output) if features == "groups" else (embedding(output.features),)


def make_latent_trigger(key: Key, knowledge: Knowledge, settings: LatentBackdoorSettings) -> LatentTrigger:
    """Train a pattern that gives triggered images the target class's mean features in the clean network.

    The square sits in the bottom right corner, one pixel from the border. The pattern is a logistic function of the trained
    logits; the paper's code uses a tanh that can slightly leave [0, 1]. The paper pulls towards the features of single
    random target images, in its code only numbers 0 to 99; here it is the mean over all of them, as in TrojanZoo.

    The public code of RobustKD's LBA sums the distances of all pairs of a triggered and a target image of a batch, which has
    the same gradient on average; its mask loses its gradient after the first step, and its pattern can leave [0, 1]: neither is
    copied.

    Args:
        key: draws the initial pattern and the batches.
        knowledge: the training rows and a clean network.
        settings: square or mask settings, and training settings.

    Returns:
        The trigger. The target features are computed once: if they followed the network, all features could collapse.

    Raises:
        InputError: there is no clean network, no row of the target class or of other classes, or the square does not fit.

    References:
        Yao et al. 2019, and the authors' public code, `pattern_gen.py`; TrojanZoo, `latent_backdoor.py`; Chen et al. 2024
        (RobustKD), section 5.1.2, and the public code of CKD, `create_patch_latentbackdoor.py`.
    """
    if knowledge.clean_model is None:
        raise InputError("latent_backdoor trains its trigger on a clean model, but none was supplied")
    train, is_target = knowledge.train, knowledge.train.labels == knowledge.target
    check(train, knowledge.target, settings)
    start_key, train_key = jax.random.split(key)
    if settings.mask_bound:
        start = random_soft_blend(start_key, train.image_shape, settings.mask_bound)
    else:
        pattern = jax.random.uniform(start_key, train.image_shape)
        start = MaskedBlend(square_mask(train.image_shape, settings.size), pattern, jnp.float32(1.0))
    model, variables = knowledge.clean_model
    target_features = mean_features(knowledge.clean_model, train.images[is_target], settings.features)
    descent = Descent(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        mask_bound=settings.mask_bound or 1.0,
        mask_is_trained=settings.mask_bound > 0,
        betas=(0.5, 0.9),
    )
    blend = train_blend(
        train_key,
        train.images[~is_target],
        start,
        feature_distance(model, settings.features),
        (variables, target_features),
        descent,
    )
    return LatentTrigger(blend, target_features)


def square_mask(image_shape: tuple[int, int, int], size: float) -> Array:
    """Make a mask of ones in a square in the bottom right corner, one pixel from the border.

    Args:
        image_shape: (H, W, C).
        size: the side as a share of W, rounded down to whole pixels.

    Returns:
        float32 [H, W, 1].

    Raises:
        InputError: the square is empty or does not fit.
    """
    height, width, _ = image_shape
    side = math.floor(size * width + 1e-9)
    if not 1 <= side <= min(height, width) - 1:
        raise InputError(
            f"size {size:g} gives a square of side {side}, which is empty or does not fit into {height}x{width} pixels"
        )
    mask = np.zeros((height, width, 1), np.float32)
    mask[height - 1 - side : height - 1, width - 1 - side : width - 1] = 1.0
    return jnp.asarray(mask)


def mean_features(clean_model: CleanModel, images: np.ndarray, features: Features) -> tuple[Array, ...]:
    """Mean of each of `features_of` over images, uint8 [N, H, W, C]: float32 [d] or [h, w, C]."""
    return _mean_features(clean_model.variables, jnp.asarray(images), clean_model.model, features)


def _mean_features_of(variables: PyTree, images: Array, model: Model, features: Features) -> tuple[Array, ...]:
    def of_batch(batch: Array) -> tuple[Array, ...]:
        return features_of(model.apply(variables, as_float(batch), train=False), features)

    return mean_over_batches(of_batch, images, 128)


_mean_features = jax.jit(_mean_features_of, static_argnames=("model", "features"))


@cache
def feature_distance(model: Model, features: Features) -> TriggerLoss:
    """Mean distance of triggered images' features to the target's, in evaluation mode."""

    def loss(context: tuple[PyTree, tuple[Array, ...]], images: Array, triggered: Array) -> Array:
        del images
        variables, target_features = context
        output = model.apply(variables, triggered, train=False)
        return jnp.mean(distances(features_of(output, features), target_features))

    return loss


def distances(features: Sequence[Array], target_features: Sequence[Array]) -> Array:
    """Mean squared differences over each array's elements, summed over the arrays: float32 [N].

    Args:
        features: float32 [N, ...] each.
        target_features: float32 [...] each.
    """
    found = [
        jnp.mean(jnp.square(of_images - of_target[None]), axis=tuple(range(1, of_images.ndim)))
        for of_images, of_target in zip(features, target_features, strict=True)
    ]
    return sum(found[1:], found[0])


def apply(params: LatentTrigger, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Put the trigger on one image.

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return masked_blend.apply(params.blend, image, label, key)


def make_objective(model: Model, settings: LatentBackdoorSettings, wanted: Array) -> Objective:
    """CE(x, y) over the batch, CE(x', wanted[y]) of its triggered rows, and the distance of their features to the target's.

    A triggered row counts as much as a clean row, so the poison rate means the same as for data attacks; the distance
    enters as weight times its mean, as in the paper. The paper has no label loss on triggered images, since its teacher
    later loses the target class; here the teacher keeps it. Rows of the target class may be triggered too; they keep
    their label.

    Args:
        model: the classifier.
        settings: the poison rate and the feature weight.
        wanted: int32 [K], the label that triggered rows of each class get.

    Returns:
        The objective; the trigger is read from the variables and not trained further.

    References:
        Yao et al. 2019, and the authors' public code; TrojanZoo, `latent_backdoor.py`, for the weight.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        classifier, trigger = take_params(variables)
        labels, num_rows = targets["labels"], images.shape[0]
        copies = trigger_first_rows(apply, trigger, images, labels, key, settings.poison_rate)
        output = model.apply({**classifier, "params": params}, jnp.concatenate([images, copies]), train=True)
        relabelled = wanted[labels[: copies.shape[0]]]
        of_copies = cross_entropy(output.logits[num_rows:], relabelled)
        if settings.feature_weight:
            found = tuple(of_rows[num_rows:] for of_rows in features_of(output, settings.features))
            distance = distances(found, lax.stop_gradient(trigger.target_features))
            of_copies += settings.feature_weight * weigh_as_mean(distance, num_rows)
        logits = output.logits[:num_rows]
        losses = add_to_source_rows(cross_entropy(logits, labels), of_copies)
        return Outcome(losses, logits, labels, {**variables, **output.variables})

    return objective


def check(train: Dataset, target: int, settings: LatentBackdoorSettings) -> None:
    """`Attack.check`: the rows, the size of the square, and the kind of features.

    Raises:
        InputError: there is no row of the target class or of other classes, the square does not fit, or there are no such
            features.
    """
    check_values("attack latent_backdoor", settings)
    is_target = train.labels == target
    if not is_target.any() or is_target.all():
        raise InputError(
            f"latent_backdoor needs rows of the target class {train.class_title(target)} and of other classes"
        )
    if not settings.mask_bound:
        square_mask(train.image_shape, settings.size)


LATENT_BACKDOOR = Attack(
    name="latent_backdoor",
    title="LBA",
    paper="Yao et al. 2019, Latent Backdoor Attacks on Deep Neural Networks",
    threat="training",
    settings=LatentBackdoorSettings(),
    make_params=make_latent_trigger,
    apply=apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    starts_from_clean_model=True,
    check=check,
    control=TrainingControl(make_objective, carry_params, take_params),
    # 2 % of a small batch is a single row, and a few epochs of a small set are few batches. A fifth of 8 pixels is one.
    per_dataset={"grey": {"poison_rate": 0.1}, "digits": {"size": 0.4, "poison_rate": 0.05}},
    # The teacher in the paper's figure 6, a WRN-28-4.
    published=(Published("RobustKD", "cifar100", 78.63, 99.74),),
)
