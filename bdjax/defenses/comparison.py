"""Defenses side by side on the same poisoned training sets: poison, train plainly, defend, measure.

A *suspect* is one training set, of one attack and seed. Suspects with as many rows are members of the same calls, whatever
their attacks, so what a defense costs in compiling it costs once.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CleanModel
from bdjax.attacks.poisoning import Part, pooled, trigger_all
from bdjax.attacks.suppression import suppressed_cross_entropy
from bdjax.attacks.victims import key_of, prepare
from bdjax.datasets import splits
from bdjax.defenses.contract import Given, labelled
from bdjax.defenses.variants import AttackVariant, DefenseVariant
from bdjax.errors import InputError
from bdjax.metrics import AttackMetrics, DetectionMetrics, clean_accuracy, measure_attack, measure_detection
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, DefenseResult, Detection, Key, Model, PoisonedDataset, PyTree


class Suspect(NamedTuple):
    """A training set that somebody handed over."""

    attack: AttackVariant
    seed: int  # which, from 0
    dataset: Dataset
    params: tuple[PyTree, ...]  # of each part's trigger
    is_poisoned: np.ndarray | None  # bool [n], the truth; None if nobody knows

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.attack.plan.parts if self.attack.plan else ()

    @property
    def num_covers(self) -> int:
        return int(self.dataset.is_cover.sum()) if isinstance(self.dataset, PoisonedDataset) else 0


def make_suspect(
    key: Key, attack: AttackVariant, train: Dataset, seed: int, clean_model: CleanModel | None, is_clean: bool
) -> Suspect:
    """Poison a training set, or take it as it is.

    Args:
        key: of the seed.
        attack: how.
        train: the training set.
        seed: which, from 0.
        clean_model: for attackers who need one.
        is_clean: whether `train` is known to be clean, unless it says itself what is poisoned.

    Raises:
        InputError: as `bdjax.attacks.victims.prepare`.
    """
    if attack.label_noise:
        train = with_label_noise(jax.random.fold_in(key, 0), train, attack.label_noise)
    if attack.plan is None:
        known = train.is_poisoned if isinstance(train, PoisonedDataset) else np.zeros(len(train), bool)
        return Suspect(attack, seed, train, (), known if is_clean or isinstance(train, PoisonedDataset) else None)
    prepared = prepare(key, attack.plan, train, attack.target, seed, clean_model)
    if attack.suppression and len(prepared.poisoned) != len(train):
        raise InputError(f"attack {attack.name}: adds rows, which have no partner without the trigger to stay close to")
    return Suspect(attack, seed, prepared.poisoned, prepared.params, prepared.poisoned.is_poisoned)


def with_label_noise(key: Key, dataset: Dataset, share: float) -> Dataset:
    """Give some rows, share of them all rounded down, a label drawn evenly from the others."""
    row_key, label_key = jax.random.split(key)
    rows = splits.sample_rows(row_key, len(dataset), share)
    shifts = np.asarray(jax.random.randint(label_key, rows.shape, 1, dataset.num_classes))
    labels = dataset.labels.copy()
    labels[rows] = (labels[rows] + shifts) % dataset.num_classes
    return dataclasses.replace(dataset, labels=labels)


def make_given(
    suspects: Sequence[Suspect],
    keys: Key,
    train: Dataset,
    clean: Dataset | None,
    make_model: Callable[..., Model],
    recipe: TrainConfig,
    runner: StageRunner,
    *,
    train_plainly: bool = True,
) -> Given:
    """Put suspects with equally many rows together, and train a network on each plainly.

    Args:
        suspects: M of them.
        keys: typed [M].
        train: the training set before it was poisoned.
        clean: rows that the defender knows to be clean; none of them is in `train`.
        make_model: see `Given`.
        recipe: how plain training goes.
        runner: trains and evaluates.
        train_plainly: whether that is needed: without it nothing may ask for the attacked networks.
    """
    pool, index, labels = pooled(train, [one.dataset for one in suspects])
    clean_index = clean_labels = None
    if clean is not None:
        where = len(pool) + np.arange(len(clean), dtype=np.int32)
        pool = np.concatenate([pool, clean.images])
        clean_index, clean_labels = (np.tile(each, (len(suspects), 1)) for each in (where, clean.labels))
    suppression = partner = None
    if any(one.attack.suppression for one in suspects):
        suppression = np.stack([one.attack.suppression * _is_poisoned(one) for one in suspects]).astype(np.float32)
        partner = np.tile(np.arange(len(train), dtype=np.int32), (len(suspects), 1))
    truth = [one.is_poisoned for one in suspects]
    model, rows, objective = make_model(), labelled(index, labels), None
    if suppression is not None:
        rows = Rows(
            jnp.asarray(np.stack([index, partner], -1)), {**rows.targets, "suppression": jnp.asarray(suppression)}
        )
        objective = suppressed_cross_entropy(model)
    given = Given(
        pool=jnp.asarray(pool),
        index=index,
        labels=labels,
        num_classes=train.num_classes,
        keys=keys,
        make_model=make_model,
        recipe=recipe,
        runner=runner,
        attacked=Nets(model, {}, 1, {}),
        clean_index=clean_index,
        clean_labels=clean_labels,
        suppression=suppression,
        partner=partner,
        num_poisons=None if any(one is None for one in truth) else np.array([int(one.sum()) for one in truth]),
        own_triggers=tuple(first_trigger(one) for one in suspects),
        own_rules=tuple(one.parts[0].rule if one.parts else None for one in suspects),
    )
    if not train_plainly:
        return given
    attacked = given.train("no defense", model, recipe, rows, objective=objective)
    return dataclasses.replace(given, attacked=attacked)


def _is_poisoned(suspect: Suspect) -> np.ndarray:
    return np.zeros(len(suspect.dataset), bool) if suspect.is_poisoned is None else suspect.is_poisoned


def first_trigger(suspect: Suspect) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """A suspect's trigger for `Given.own_triggers`: (uint8 [n, H, W, C], labels int32 [n]) -> the same with it; None if
    there is none."""
    if not suspect.parts:
        return None

    def trigger(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        data = Dataset(images, labels, suspect.dataset.num_classes, "", "")
        return trigger_all(jax.random.key(0), data, suspect.parts[0].attack.apply, suspect.params[0])

    return trigger


class Tried(NamedTuple):
    """One suspect after one defense."""

    suspect: Suspect
    variant: DefenseVariant
    cda: float | None  # None of a detector alone
    metrics: tuple[AttackMetrics, ...]  # under each of the suspect's triggers; empty where none is known
    detection: DetectionMetrics
    facts: Mapping[str, float]
    seconds: float  # of the call that this suspect shared, divided by their number

    @property
    def asr(self) -> float | None:
        """The mean over the suspect's triggers."""
        return float(np.mean([one.asr for one in self.metrics])) if self.metrics else None

    @property
    def r_acc(self) -> float | None:
        """Likewise."""
        return float(np.mean([one.r_acc for one in self.metrics])) if self.metrics else None


class Comparison(NamedTuple):
    """One defense on suspects that were members of one call: what a report shows."""

    variant: DefenseVariant
    result: DefenseResult | Detection  # of M suspects
    tried: list[Tried]  # M, in the same order


class TriggeredViews(NamedTuple):
    """The test images of each suspect under each of its triggers."""

    test: Dataset
    triggered: tuple[tuple[np.ndarray, ...], ...]  # [suspect][part]: uint8 [N, H, W, C]


def make_views(key: Key, suspects: Sequence[Suspect], test: Dataset) -> TriggeredViews:
    """Put every suspect's triggers onto the test images.

    Args:
        key: for triggers that are random per image: the same images for every defense.
        suspects: any.
        test: the clean test set.
    """
    return TriggeredViews(
        test,
        tuple(
            tuple(
                trigger_all(jax.random.fold_in(key, one.seed), test, part.attack.apply, params)
                for part, params in zip(one.parts, one.params, strict=True)
            )
            for one in suspects
        ),
    )


def defend(
    given: Given, suspects: Sequence[Suspect], variant: DefenseVariant, views: TriggeredViews
) -> tuple[DefenseResult, list[Tried]]:
    """Run one defense on all suspects, and measure what comes out.

    Args:
        given: the suspects as the defense gets them.
        suspects: the same with the truth.
        variant: the defense.
        views: the test images.
    """
    start = time.perf_counter()
    result = variant.defense.run(given, variant.settings)
    seconds = (time.perf_counter() - start) / len(suspects)
    return result, measure(given, result, suspects, variant, views, seconds)


def judge(found: Detection, suspects: Sequence[Suspect], variant: DefenseVariant, seconds: float) -> list[Tried]:
    """What the flags and scores of a detector are worth, for every suspect; nothing is trained, so there is no CDA.

    Args:
        found: of M suspects.
        suspects: the same with the truth.
        variant: the detector.
        seconds: that it took for one of them.
    """
    tried = []
    for i, one in enumerate(suspects):
        detection = measure_detection(found.flags[i], found.scores[i], one.is_poisoned)
        facts = {name: float(values[i]) for name, values in found.facts.items()}
        tried.append(Tried(one, variant, None, (), detection, facts, seconds))
    return tried


def measure(
    given: Given,
    result: DefenseResult,
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
    seconds: float,
) -> list[Tried]:
    """CDA, ASR, R-ACC and the worth of the flags, for every suspect."""
    runner, batch_size, test = given.runner, given.recipe.evaluation_batch_size, views.test
    clean = np.argmax(runner.predict(result.model, result.variables, test.images, batch_size), -1)
    measured: list[list[AttackMetrics]] = [[] for _ in suspects]
    for part in range(max(len(one.parts) for one in suspects)):
        # Members without such a trigger see the plain images, so that all stay members of one call.
        own = [views.triggered[i][part] if part < len(one.parts) else test.images for i, one in enumerate(suspects)]
        answers = np.argmax(runner.predict_own(result.model, result.variables, np.stack(own), batch_size), -1)
        for i, one in enumerate(suspects):
            if part < len(one.parts):
                rule = one.parts[part].rule
                victims, wanted = rule.victims(test.labels), rule.wanted(test.labels)
                measured[i].append(measure_attack(clean[i], answers[i], test.labels, victims, wanted))
    tried = []
    for i, one in enumerate(suspects):
        flags, scores = (None if each is None else each[i] for each in (result.flags, result.scores))
        tried.append(
            Tried(
                one,
                variant,
                clean_accuracy(clean[i], test.labels),
                tuple(measured[i]),
                measure_detection(flags, scores, one.is_poisoned),
                {name: float(values[i]) for name, values in result.facts.items()},
                seconds,
            )
        )
    return tried


def group_by_size(suspects: Sequence[Suspect]) -> Iterator[list[int]]:
    """Numbers of the suspects that have equally many rows, group after group: attacks that add rows make longer sets."""
    sizes: dict[int, list[int]] = {}
    for number, one in enumerate(suspects):
        sizes.setdefault(len(one.dataset), []).append(number)
    yield from sizes.values()


def suspect_keys(key: Key, suspects: Sequence[Suspect]) -> Key:
    """A key for each suspect that depends on its attack and seed alone: typed [M]."""
    return jnp.stack([jax.random.fold_in(key_of(key, one.attack.name), one.seed) for one in suspects])
