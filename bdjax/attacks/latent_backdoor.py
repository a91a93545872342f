"""LBA: a teacher whose features of triggered images are those of the target class, so that its students inherit the backdoor
(Yao et al. 2019).

The attacker trains a trigger on a clean network until triggered images have about the features of the target class, and
then fine-tunes the network until they really have.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.attacks.batch_poisoning import carry_params, take_params
from bdjax.attacks.contract import CLEAN_MODEL, Attack, CleanModel, Knowledge, Published, TrainingControl
from bdjax.attacks.trained_blend import Descent, TriggerLoss, random_soft_blend, train_blend
from bdjax.attacks.triggered_copies import add_to_own_rows, trigger_first_rows, weigh_as_mean
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models import embedding
from bdjax.training.member import Objective, Outcome, as_float, over_batches
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key, Model, ModelOutput, PyTree


@dataclass(frozen=True)
class LatentBackdoorSettings:
    poison_rate: float = 0.02
    """share of each batch that also appears triggered, at least one row; the paper triggers every row of its 16"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    size: float = 0.2
    """side of the square, as a share of the image's width"""
    mask_bound: float = 0.0
    """above 0: instead of the square, a trained mask over the whole image from 0 to this, as in RobustKD's code (0.2)"""
    steps: int = 600
    """of the trigger's training; 1550 in the paper's code"""
    batch_size: int = 32
    """images in one of those steps"""
    learning_rate: float = 0.1
    """of Adam in those steps"""
    feature_weight: float = 0.5
    """of the features' distance in fine-tuning; 0.05 in the paper's code, 0.5 in TrojanZoo's"""


class LatentTrigger(NamedTuple):
    """The trigger, with the features that it is to stand for."""

    blend: MaskedBlend
    target_features: Array
    """float32 [d]: the target class's mean in the clean network"""


def pooled_features(output: ModelOutput) -> Array:
    """What the last layer of the network sees, float32 [N, d]."""
    return embedding(output.features)


def make_latent_trigger(key: Key, knowledge: Knowledge, settings: LatentBackdoorSettings) -> LatentTrigger:
    """Train a pattern such that the clean network sees the target class's mean features in triggered images.

    The square sits in the bottom right corner, one pixel from the border. The pattern is a logistic function of what is
    trained, where the paper's code has a tanh that can leave [0, 1] a little. The paper pulls to the features of
    single random target images and, in its code, those numbered 0 to 99 only; here it is all of them and the mean, as
    in TrojanZoo.

    Args:
        key: draws the first pattern and the batches.
        knowledge: the training rows and a clean network.
        settings: of the square or the mask, and of the training.

    Returns:
        The trigger. Its features are computed once: a target that followed the network would let all features collapse.

    Raises:
        InputError: there is no clean network, no row of the target class or no other one, or the square does not fit.

    References:
        Yao et al. 2019, and the authors' public code, `pattern_gen.py`; TrojanZoo, `latent_backdoor.py`.
    """
    if knowledge.clean_model is None:
        raise InputError("latent_backdoor trains its trigger on a clean model, and none was given")
    train, is_target = knowledge.train, knowledge.train.labels == knowledge.target
    if not is_target.any() or is_target.all():
        raise InputError(f"latent_backdoor needs rows of the target class {knowledge.target} and of others")
    start_key, train_key = jax.random.split(key)
    if settings.mask_bound:
        start = random_soft_blend(start_key, train.image_shape, settings.mask_bound)
    else:
        pattern = jax.random.uniform(start_key, train.image_shape)
        start = MaskedBlend(square_mask(train.image_shape, settings.size), pattern, jnp.float32(1.0))
    model, variables = knowledge.clean_model
    target_features = mean_features(knowledge.clean_model, train.images[is_target])
    descent = Descent(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        mask_bound=settings.mask_bound or 1.0,
        mask_is_trained=settings.mask_bound > 0,
        betas=(0.5, 0.9),
    )
    blend = train_blend(
        train_key, train.images[~is_target], start, feature_distance(model), (variables, target_features), descent
    )
    return LatentTrigger(blend, target_features)


def square_mask(image_shape: tuple[int, int, int], size: float) -> Array:
    """A mask of ones in a square in the bottom right corner, one pixel from the border.

    Args:
        image_shape: (H, W, C).
        size: its side as a share of W; the side is rounded down.

    Returns:
        float32 [H, W, 1].

    Raises:
        InputError: the square is empty or does not fit.
    """
    height, width, _ = image_shape
    side = math.floor(size * width + 1e-9)
    if not 1 <= side <= min(height, width) - 1:
        raise InputError(
            f"size {size:g}: a square of side {side} is empty or does not fit into {height}x{width} pixels"
        )
    mask = np.zeros((height, width, 1), np.float32)
    mask[height - 1 - side : height - 1, width - 1 - side : width - 1] = 1.0
    return jnp.asarray(mask)


def mean_features(clean_model: CleanModel, images: np.ndarray) -> Array:
    """The mean of `pooled_features` over images, uint8 [N, H, W, C]: float32 [d]."""
    return _mean_features(clean_model.variables, jnp.asarray(images), clean_model.model)


def _mean_features_of(variables: PyTree, images: Array, model: Model) -> Array:
    def features(batch: Array) -> Array:
        return pooled_features(model.apply(variables, as_float(batch), train=False))

    return over_batches(features, images, 128).mean(axis=0)


_mean_features = jax.jit(_mean_features_of, static_argnames="model")


@cache
def feature_distance(model: Model) -> TriggerLoss:
    """The mean squared distance of triggered images' features to the target's, in evaluation mode."""

    def loss(given: tuple[PyTree, Array], images: Array, triggered: Array) -> Array:
        del images
        variables, target_features = given
        return jnp.mean(distances(pooled_features(model.apply(variables, triggered, train=False)), target_features))

    return loss


def distances(features: Array, target_features: Array) -> Array:
    """Mean squared differences: float32 [N, d] and [d] to [N]."""
    return jnp.mean(jnp.square(features - target_features[None, :]), axis=1)


def apply(params: LatentTrigger, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Put the square on one image.

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

    A triggered row counts as much as a clean one, so the poison rate is what it is for attacks on data; the distance
    enters as weight times its mean, as in the paper. The paper has no label loss on triggered images, since its teacher
    loses the target class again; here it keeps it. Rows of the target class may be triggered too, and keep their label.

    Args:
        model: the classifier.
        settings: the poison rate and the weight.
        wanted: int32 [K], the label of triggered rows of each class.

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
        distance = distances(pooled_features(output)[num_rows:], lax.stop_gradient(trigger.target_features))
        of_copies = cross_entropy(output.logits[num_rows:], relabelled)
        of_copies += settings.feature_weight * weigh_as_mean(distance, num_rows)
        logits = output.logits[:num_rows]
        losses = add_to_own_rows(cross_entropy(logits, labels), of_copies)
        return Outcome(losses, logits, labels, {**variables, **output.variables})

    return objective


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
    control=TrainingControl(make_objective, carry_params, take_params),
    # A fifth of 8 pixels is a single one.
    # 2 % of a small batch is a single row, and a few epochs of a small set are few batches.
    per_dataset={"grey": {"poison_rate": 0.1}, "digits": {"size": 0.4, "poison_rate": 0.05}},
    # The teacher of the paper's figure 6, a WRN-28-4.
    published=(Published("RobustKD", "cifar100", 78.63, 99.74),),
)
