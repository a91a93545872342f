"""TA-KD: Teacher Aggregation and Knowledge Distillation (Heydari et al. 2025, section 3 and stage 4 of figure 1).

The defender holds N untrusted classifiers and a small clean labelled set. Stage 4.1 trains the Teacher-Aggregation model on
the clean set, by its labels and by the average of the teachers' logits; stage 4.2 trains a small student in the same way
with the TA model as the teacher. A trigger never appears in the clean set, so what it does is not handed on.

The teachers are frozen, so their logits on the clean set are computed once, before training; a black-box teacher costs
one call per set of images. With augmentation the defender draws `views` changed copies of every clean row up front and
asks for logits on those: the student still sees each image together with what the teachers say of *that* image.

Two baselines share the calls, as members with alpha = 0: the student's architecture trained on the clean labels alone,
and each teacher fine-tuned on them. A defense that is no better than these has not earned its teachers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.aggregation import Aggregation
from bdjax.training import ensemble
from bdjax.training.augmentation import Augmentation, augment
from bdjax.training.member import Rows, TrainConfig, TrainState, resume_from
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Array, Key, Model, PyTree


@dataclass(frozen=True)
class TaKdConfig:
    """What TA-KD leaves to choose. T and alpha are not in the paper: 4 and 0.5 are its public code's."""

    temperature: float = 4.0
    alpha: float = 0.5
    """weight of the teachers' word against the clean labels'"""
    direction: losses.Direction = "teacher_student"
    aggregation: Aggregation = "mean"
    trim: int = 1
    """for the trimmed mean"""
    augmentation: Augmentation = "none"
    views: int = 1
    """copies of each clean row; the first is the row as it is"""


class CleanSet(NamedTuple):
    """The defender's clean images of one seed: training views, then validation rows."""

    images: np.ndarray
    """uint8 [n * views + n', H, W, C]"""
    labels: np.ndarray
    """int32, of all of them"""
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
    """Lay out the clean rows, with augmented copies of the training rows where the configuration asks for them.

    Args:
        key: of the augmentation.
        images: uint8 [P, H, W, C], of the whole set.
        labels: int32 [P].
        train_rows: int [n], to train on.
        validation_rows: int [n'], for the learning-rate rule; may be empty.
        config: `augmentation` and `views` are read.
    """
    views = [images[train_rows]]
    change = jax.jit(partial(augment, kind=config.augmentation))
    for view in range(1, config.views):
        views.append(np.asarray(change(jax.random.fold_in(key, view), jnp.asarray(images[train_rows]))))
    everything = np.concatenate([*views, images[validation_rows]])
    all_labels = np.concatenate([np.tile(labels[train_rows], config.views), labels[validation_rows]])
    return CleanSet(everything, all_labels.astype(np.int32), len(train_rows) * config.views)


def distillation_loss(config: TaKdConfig) -> Callable[[Array, dict[str, Array]], Array]:
    """Equations 3-6 for the training engine; each row brings its own alpha, so that baselines are members too."""

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
    """Members of one architecture to be trained on the clean sets, and what each is told."""

    variables: PyTree | None
    """stacked [M, ...]; None for fresh networks"""
    clean_set: np.ndarray
    """int [M]: which seed's clean set"""
    teacher_logits: np.ndarray
    """float32 [M, rows of a clean set, K]"""
    alpha: np.ndarray
    """float32 [M]"""


def make_learners(variables: PyTree | None, clean_set: np.ndarray, told: np.ndarray, alpha: float) -> Learners:
    """Learners who are told the same as all others of their seed.

    Args:
        variables: stacked [M, ...], or None for fresh networks.
        clean_set: int [M], each learner's seed.
        told: float32 [seeds, rows of a clean set, K], the logits to imitate.
        alpha: the weight of those against the labels; 0 for a baseline that is told nothing.
    """
    return Learners(variables, clean_set, told[clean_set], np.full(len(clean_set), alpha, np.float32))


def initialise(learners: Learners, model: Model, image_shape: tuple[int, int, int], key: Key) -> Learners:
    """Give fresh learners their weights; others keep theirs."""
    if learners.variables is not None:
        return learners
    keys = jax.random.split(key, len(learners.alpha))
    return learners._replace(variables=ensemble.init_members(lambda one: model.init(one, image_shape), keys))


def join_learners(parts: list[Learners]) -> Learners:
    """Put initialised learners of one architecture into one stack, so that they share every call."""
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
    """Train learners of several roles, those of one architecture in one call.

    Args:
        runner: where checkpoints go.
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
                initialise(parts[name][1], model, runner.image_shape, jax.random.fold_in(init_key, i))
                for i, name in enumerate(names)
            ]
        )
        fit = partial(train_on_clean_sets, model, config, train_config, learners, clean_sets, shuffle_key)
        result = runner.train(" + ".join(names), model, train_config, len(learners.alpha), fit)
        start = 0
        for name in names:
            count = len(parts[name][1].alpha)
            own = slice(start, start + count)
            start += count
            trained[name] = Nets(
                model,
                ensemble.members(result.variables, own),
                count // len(clean_sets),
                {metric: np.asarray(values[own]) for metric, values in result.history.items()},
            )
    return trained


def train_on_clean_sets(
    model: Model,
    config: TaKdConfig,
    train_config: TrainConfig,
    learners: Learners,
    clean_sets: list[CleanSet],
    key: Key,
    **how: Any,
) -> TrainState:
    """Train all learners of one architecture in one call.

    Args:
        model: their architecture.
        config: of the distillation.
        train_config: of the training.
        learners: with variables.
        clean_sets: of each seed, all of one size.
        key: of the shuffles.
        how: keyword arguments of `ensemble.fit`, `layout` at least.

    Returns:
        The stacked final state, in the learners' order.
    """
    size, num_train = len(clean_sets[0].labels), clean_sets[0].num_train
    pool = jnp.asarray(np.concatenate([each.images for each in clean_sets]))
    labels = np.stack([each.labels for each in clean_sets])[learners.clean_set]  # [M, size]
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
        **how,
    )
