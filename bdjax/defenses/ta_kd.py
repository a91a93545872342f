"""TA-KD: Teacher Aggregation and Knowledge Distillation (Heydari et al. 2025, section 3 and stage 4 of figure 1).

The defender holds N untrusted classifiers and a small clean labelled set. Stage 4.1 trains the Teacher-Aggregation model on
the clean set, from its labels and the average of the teachers' logits; stage 4.2 trains a small student in the same way
with the TA model as the teacher. No trigger appears in the clean set, so its effect is not passed on.

The teachers are frozen, so their logits on the clean set are computed once, before training; a black-box teacher costs
one call per set of images. With augmentation the defender draws `views` augmented copies of every clean row in advance and
queries the teachers on those, so the student sees each image with the teachers' logits for exactly *that* image.

Two baselines are members of the same calls, with alpha = 0: the student's architecture trained on the clean labels alone,
and each teacher fine-tuned on them. A defense that is no better than these gains nothing from its teachers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.choices import Aggregation, Augmentation, Direction
from bdjax.settings import Amount, Positive, Range, Share
from bdjax.training import ensemble
from bdjax.training.augmentation import augment
from bdjax.training.member import Rows, TrainConfig, TrainState, resume_from
from bdjax.training.stages import Nets, StageRunner, prepare
from bdjax.types import Array, Key, Model, PyTree


@dataclass(frozen=True)
class TaKdConfig:
    """Settings of TA-KD. The paper does not give T and alpha: 4 and 0.5 are those of its public code."""

    temperature: Positive = 4.0
    """T, temperature of both softmaxes"""
    alpha: Share = 0.5
    """weight of the teachers' logits, in [0, 1]; the clean labels get the rest"""
    direction: Direction = "teacher_student"
    """direction of the KL divergence"""
    aggregation: Aggregation = "mean"
    """how the teachers' logits are averaged"""
    trim: Amount = 1
    """lowest and highest values that the trimmed mean leaves out, each"""
    augmentation: Augmentation = "none"
    """augmentation of the copies of clean rows"""
    views: Annotated[int, Range(at_least=1, limit=10_000)] = 1
    """copies of each clean row; the first is not augmented"""


class CleanSet(NamedTuple):
    """The defender's clean images of one seed: training views, then validation rows."""

    images: np.ndarray
    """uint8 [n * views + n', H, W, C]"""
    labels: np.ndarray
    """int32 [n * views + n']"""
    num_train: int
    """n * views"""


def make_clean_set(
    key: Key,
    images: np.ndarray,
    labels: np.ndarray,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    config: TaKdConfig,
) -> CleanSet:
    """Collect the clean rows, with augmented copies of the training rows if `config.views` is above 1.

    Args:
        key: of the augmentation.
        images: uint8 [P, H, W, C], of the whole set.
        labels: int32 [P].
        train_rows: int [n], to train on.
        validation_rows: int [n'], for the learning-rate schedule; may be empty.
        config: reads `augmentation` and `views`.
    """
    views = [images[train_rows]]
    augmented = jax.jit(partial(augment, kind=config.augmentation))
    for view in range(1, config.views):
        views.append(np.asarray(augmented(jax.random.fold_in(key, view), jnp.asarray(images[train_rows]))))
    all_images = np.concatenate([*views, images[validation_rows]])
    all_labels = np.concatenate([np.tile(labels[train_rows], config.views), labels[validation_rows]])
    return CleanSet(all_images, all_labels.astype(np.int32), len(train_rows) * config.views)


def distillation_loss(config: TaKdConfig) -> Callable[[Array, dict[str, Array]], Array]:
    """Equations 3-6 for the training engine. Alpha is a target of each row, so that baselines can be members too."""

    def loss(logits: Array, targets: dict[str, Array]) -> Array:
        return losses.distillation(
            logits,
            targets["teacher_logits"],
            targets["labels"],
            temperature=config.temperature,
            alpha=targets["alpha"],
            direction=config.direction,
        )

    return loss


class Learners(NamedTuple):
    """Members of one architecture to be trained on the clean sets, with the logits that they learn from."""

    variables: PyTree | None
    """stacked [M, ...]; None for fresh networks"""
    clean_set: np.ndarray
    """int [M]: the seed whose clean set is used"""
    teacher_logits: np.ndarray
    """float32 [M, rows of a clean set, K]"""
    alpha: np.ndarray
    """float32 [M]: weight of the teacher logits"""


def make_learners(
    variables: PyTree | None, clean_set: np.ndarray, teacher_logits: np.ndarray, alpha: float
) -> Learners:
    """Make learners; all learners of one seed have the same teacher logits.

    Args:
        variables: stacked [M, ...], or None for fresh networks.
        clean_set: int [M], each learner's seed.
        teacher_logits: float32 [seeds, rows of a clean set, K].
        alpha: weight of the teacher logits; the labels get the rest. 0 for a baseline without teachers.
    """
    return Learners(variables, clean_set, teacher_logits[clean_set], np.full(len(clean_set), alpha, np.float32))


def initialise(
    learners: Learners, model: Model, image_shape: tuple[int, int, int], key: Key, clean_sets: list[CleanSet]
) -> Learners:
    """Initialise fresh learners, prepared with their clean set; other learners are returned unchanged."""
    if learners.variables is not None:
        return learners
    keys = jax.random.split(key, len(learners.alpha))
    variables = ensemble.init_networks(model, image_shape, keys)
    size, num_train = len(clean_sets[0].labels), clean_sets[0].num_train
    pool = jnp.asarray(np.concatenate([clean_set.images for clean_set in clean_sets]))
    index = learners.clean_set[:, None] * size + np.arange(num_train)
    return learners._replace(variables=prepare(model, variables, pool, jnp.asarray(index, jnp.int32)))


def join_learners(parts: list[Learners]) -> Learners:
    """Stack initialised learners of one architecture."""
    return Learners(
        ensemble.join([part.variables for part in parts]),
        np.concatenate([part.clean_set for part in parts]),
        np.concatenate([part.teacher_logits for part in parts]),
        np.concatenate([part.alpha for part in parts]),
    )


def train_parts(
    runner: StageRunner,
    parts: Mapping[str, tuple[Model, Learners]],
    config: TaKdConfig,
    train_config: TrainConfig,
    clean_sets: list[CleanSet],
    key: Key,
) -> dict[str, Nets]:
    """Train learners of several roles; learners of one architecture share a call.

    Args:
        runner: trains and keeps checkpoints.
        parts: role -> (architecture, learners).
        config: of the distillation.
        train_config: of the training.
        clean_sets: of each seed.
        key: of weights and shuffles.

    Returns:
        Role -> trained networks.
    """
    groups: dict[str, list[str]] = {}
    for name, (model, _) in parts.items():
        groups.setdefault(model.description, []).append(name)
    trained: dict[str, Nets] = {}
    for number, names in enumerate(groups.values()):
        model = parts[names[0]][0]
        init_key, shuffle_key = jax.random.split(jax.random.fold_in(key, number))
        learners = join_learners(
            [
                initialise(parts[name][1], model, runner.image_shape, jax.random.fold_in(init_key, i), clean_sets)
                for i, name in enumerate(names)
            ]
        )
        fit = partial(train_on_clean_sets, model, config, train_config, learners, clean_sets, shuffle_key)
        result = runner.train(" + ".join(names), model, train_config, len(learners.alpha), fit)
        start = 0
        for name in names:
            count = len(parts[name][1].alpha)
            members = slice(start, start + count)
            start += count
            trained[name] = Nets(
                model,
                ensemble.members(result.variables, members),
                count // len(clean_sets),
                {metric: np.asarray(values[members]) for metric, values in result.history.items()},
            )
    return trained


def train_on_clean_sets(
    model: Model,
    config: TaKdConfig,
    train_config: TrainConfig,
    learners: Learners,
    clean_sets: list[CleanSet],
    key: Key,
    **options: Any,
) -> TrainState:
    """Train all learners of one architecture in one call.

    Args:
        model: their architecture.
        config: of the distillation.
        train_config: of the training.
        learners: with variables.
        clean_sets: of each seed, all of the same size.
        key: of the shuffles.
        options: keyword arguments of `ensemble.fit`, `layout` at least.

    Returns:
        The stacked final state, in the learners' order.
    """
    size, num_train = len(clean_sets[0].labels), clean_sets[0].num_train
    pool = jnp.asarray(np.concatenate([clean_set.images for clean_set in clean_sets]))
    labels = np.stack([clean_set.labels for clean_set in clean_sets])[learners.clean_set]  # [M, size]
    index = learners.clean_set[:, None] * size + np.arange(size)
    alpha = np.broadcast_to(learners.alpha[:, None], labels.shape).astype(np.float32)

    def rows(part: slice) -> Rows:
        return Rows(
            jnp.asarray(index[:, part], jnp.int32),
            {
                "labels": jnp.asarray(labels[:, part]),
                "teacher_logits": jnp.asarray(learners.teacher_logits[:, part]),
                "alpha": jnp.asarray(alpha[:, part]),
            },
        )

    keys = jax.random.split(key, len(learners.alpha))
    states = jax.jit(jax.vmap(partial(resume_from, config=train_config)))(learners.variables, keys)
    return ensemble.fit(
        model,
        distillation_loss(config),
        train_config,
        states,
        pool,
        rows(slice(0, num_train)),
        rows(slice(num_train, size)),
        **options,
    )
