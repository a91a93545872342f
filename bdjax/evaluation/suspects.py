"""Suspect training sets: poison them, and prepare what defenses are given.

A *suspect* is the training set of one attack and seed. Suspects with equally many rows are members of the same calls, whatever
their attacks, so each defense compiles once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks import victims
from bdjax.attacks.contract import CleanModel
from bdjax.attacks.poisoning import ConfiguredAttack, check_rows, pooled, trigger_all
from bdjax.attacks.suppression import suppressed_cross_entropy
from bdjax.attacks.victims import key_of, prepare
from bdjax.datasets import splits
from bdjax.defenses.contract import AttackerInTraining, AttackerTriggers, DefenseInput, PoolRows, labelled
from bdjax.evaluation.variants import AttackVariant
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Key, Model, PoisonedDataset, PyTree


class Suspect(NamedTuple):
    """A training set, or a model trained on one, that may be poisoned."""

    attack: AttackVariant
    seed: int
    """index of the seed in the run, from 0"""
    dataset: Dataset
    params: tuple[PyTree, ...]
    """parameters of each part's trigger"""
    is_poisoned: np.ndarray | None
    """bool [n], the ground truth; None if unknown"""

    @property
    def parts(self) -> tuple[ConfiguredAttack, ...]:
        return self.attack.plan.parts if self.attack.plan else ()

    @property
    def is_clean(self) -> bool:
        """Whether the suspect is known to have no poisoned rows."""
        return self.attack.plan is None and self.is_poisoned is not None and not self.is_poisoned.any()

    @property
    def num_covers(self) -> int:
        return int(self.dataset.is_cover.sum()) if isinstance(self.dataset, PoisonedDataset) else 0


def make_suspect(
    key: Key, attack: AttackVariant, train: Dataset, seed: int, clean_model: CleanModel | None, is_clean: bool
) -> Suspect:
    """Poison a training set; without an attack, take it unchanged.

    Args:
        key: key of the seed.
        attack: the attack; its `plan` is None for no attack.
        train: the training set.
        seed: index of the seed, from 0.
        clean_model: for attackers who need one.
        is_clean: whether `train` is known to be clean; ignored if it is a `PoisonedDataset`, which holds the ground truth.

    Raises:
        InputError: as `bdjax.attacks.victims.prepare`.
    """
    if attack.label_noise:
        train = with_label_noise(jax.random.fold_in(key, 0), train, attack.label_noise)
    if attack.plan is None:
        known = train.is_poisoned if isinstance(train, PoisonedDataset) else np.zeros(len(train), bool)
        return Suspect(attack, seed, train, (), known if is_clean or isinstance(train, PoisonedDataset) else None)
    prepared = prepare(key, attack.plan, train, attack.target, seed, clean_model)
    return Suspect(attack, seed, prepared.poisoned, prepared.params, prepared.poisoned.is_poisoned)


def try_out(key: Key, attacks: Sequence[AttackVariant], train: Dataset) -> None:
    """Refuse attacks that cannot be carried out on a training set, before anything is trained or written.

    Args:
        key: key of the first seed.
        attacks: any number.
        train: the clean training set.

    Raises:
        InputError: as `make_suspect`, except for what shows only when a trigger is trained.
    """
    for attack in attacks:
        if attack.plan is None:
            continue
        rows = train
        if attack.label_noise:
            rows = with_label_noise(jax.random.fold_in(key, 0), train, attack.label_noise)
            check_rows(rows.labels, attack.plan.parts)
        victims.try_out(key, attack.plan, rows, attack.target)


def with_label_noise(key: Key, dataset: Dataset, share: float) -> Dataset:
    """Give a share of the rows, rounded down, a wrong label drawn uniformly from the other classes."""
    row_key, label_key = jax.random.split(key)
    rows = splits.sample_rows(row_key, len(dataset), share)
    shifts = np.asarray(jax.random.randint(label_key, rows.shape, 1, dataset.num_classes))
    labels = dataset.labels.copy()
    labels[rows] = (labels[rows] + shifts) % dataset.num_classes
    return dataclasses.replace(dataset, labels=labels)


def make_defense_input(
    suspects: Sequence[Suspect],
    keys: Key,
    train: Dataset,
    clean: Dataset | None,
    make_model: Callable[..., Model],
    recipe: TrainConfig,
    runner: StageRunner,
    *,
    train_plainly: bool = True,
) -> DefenseInput:
    """Gather what defenses may be given of suspects with equally many rows, and train a network on each without a defense.

    Args:
        suspects: M of them.
        keys: typed [M].
        train: the training set before it was poisoned.
        clean: rows that the defender knows to be clean; none of them is in `train`.
        make_model: see `DefenseInput`.
        recipe: settings of the undefended training.
        runner: trains and evaluates.
        train_plainly: whether to train without a defense; False leaves out the attacked model.
    """
    pool, index, labels = pooled(train, [suspect.dataset for suspect in suspects])
    truth = [suspect.is_poisoned for suspect in suspects]
    is_known = all(flags is not None for flags in truth)
    knowledge = {
        "training set": PoolRows(index, labels),
        "number of poisons": np.array([int(flags.sum()) for flags in truth]) if is_known else None,
        "attacker's trigger": first_triggers(suspects),
    }
    if clean is not None:
        where = len(pool) + np.arange(len(clean), dtype=np.int32)
        pool = np.concatenate([pool, clean.images])
        knowledge["clean rows"] = PoolRows(*(np.tile(array, (len(suspects), 1)) for array in (where, clean.labels)))
    model, rows, objective, attacker = make_model(), labelled(index, labels), None, None
    if any(suspect.attack.suppression for suspect in suspects):
        suppression = np.stack([suspect.attack.suppression * _is_poisoned(suspect) for suspect in suspects])
        suppression = suppression.astype(np.float32)
        partner = np.tile(np.arange(len(train), dtype=np.int32), (len(suspects), 1))
        attacker = AttackerInTraining(suppression, partner)
        rows = Rows(
            jnp.asarray(np.stack([index, partner], -1)), {**rows.targets, "suppression": jnp.asarray(suppression)}
        )
        objective = suppressed_cross_entropy(model)
    inputs = DefenseInput(
        pool=jnp.asarray(pool),
        num_classes=train.num_classes,
        keys=keys,
        make_model=make_model,
        recipe=recipe,
        runner=runner,
        knowledge=knowledge,
        attacker=attacker,
    )
    if not train_plainly:
        return inputs
    attacked = inputs.train("no defense", model, recipe, rows, objective=objective)
    return inputs.with_knowledge({"attacked model": attacked})


def _is_poisoned(suspect: Suspect) -> np.ndarray:
    return np.zeros(len(suspect.dataset), bool) if suspect.is_poisoned is None else suspect.is_poisoned


def first_triggers(suspects: Sequence[Suspect]) -> AttackerTriggers:
    """What oracles are given: the first trigger of each suspect, None for a suspect without a trigger."""
    return AttackerTriggers(
        tuple(_first_trigger(suspect) for suspect in suspects),
        tuple(suspect.parts[0].rule if suspect.parts else None for suspect in suspects),
    )


def _first_trigger(suspect: Suspect) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    if not suspect.parts:
        return None

    def trigger(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        data = Dataset(images, labels, suspect.dataset.num_classes, "", "")
        return trigger_all(jax.random.key(0), data, suspect.parts[0].attack.apply, suspect.params[0])

    return trigger


def group_by_size(suspects: Sequence[Suspect]) -> Iterator[list[int]]:
    """Indices of the suspects, grouped by their number of rows: attacks that add rows make longer sets."""
    sizes: dict[int, list[int]] = {}
    for number, suspect in enumerate(suspects):
        sizes.setdefault(len(suspect.dataset), []).append(number)
    yield from sizes.values()


def suspect_keys(key: Key, suspects: Sequence[Suspect]) -> Key:
    """A key for each suspect that depends only on its attack and seed: typed [M]."""
    return jnp.stack([jax.random.fold_in(key_of(key, suspect.attack.name), suspect.seed) for suspect in suspects])
