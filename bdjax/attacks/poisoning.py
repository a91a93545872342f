"""Poison a training set once, before training: select rows, apply the trigger, change the labels."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack
from bdjax.attacks.label_rules import LabelRule
from bdjax.choices import RateOf
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.triggers import masked_blend
from bdjax.types import Array, Dataset, Key, PoisonedDataset, PyTree

IMAGES_AT_ONCE = 512
"""Number of images converted to float32 at a time: a whole set may fit in memory in 8 bits but not in 32."""


def select_rows(key: Key, labels: np.ndarray, rate: float, rule: LabelRule, *, rate_of: RateOf = "all") -> np.ndarray:
    """Choose which rows to poison.

    The result is the first floor(rate N) rows of a random permutation of the rule's candidates. N is the number of all rows
    or of the candidates. Papers state rates of all rows; the code released with TA-KD takes 1 % of the rows outside the
    target class, about a tenth fewer with ten balanced classes.

    Args:
        key: a key of `jax.random.key`. The same key and labels give the same rows.
        labels: int32 [N].
        rate: in (0, 1].
        rule: defines the candidates.
        rate_of: what the rate is a share of, "all" rows or the "candidates".

    Returns:
        int32 [n], distinct rows in random order.

    Raises:
        InputError: the rate gives no row, or more rows than there are candidates (a clean-label attack can poison only rows
          of the target class).

    References:
        Heydari et al. 2025, section 4.3.
    """
    candidates = np.flatnonzero(rule.candidates(labels)).astype(np.int32)
    if rate_of not in ("all", "candidates"):
        raise InputError(f'rate_of "{rate_of}" must be "all" or "candidates"')
    base, of_what = (len(labels), "") if rate_of == "all" else (len(candidates), " that may be poisoned")
    if not 0.0 < rate <= 1.0:
        raise InputError(f"poison rate {rate:g} must be above 0 and at most 1")
    if len(candidates) == 0:
        raise InputError(
            f"none of {len(labels)} rows may be poisoned under the rule {rule.name}: no row has a matching label"
        )
    # 0.29 * 100 is 28.999999999999996 in floating point, but 29 is meant.
    num_poisoned = math.floor(rate * base + 1e-9)
    if num_poisoned == 0:
        raise InputError(
            f"poison rate {rate:g} of {base} rows{of_what} is less than one row; "
            f"the smallest rate that gives one row is {_round_up(1.0 / base):g}"
        )
    if num_poisoned > len(candidates):
        raise InputError(
            f"poison rate {rate:g} of {base} rows is {num_poisoned} rows, but only {len(candidates)} may be poisoned "
            f"under the rule {rule.name}; the largest rate possible is {_round_down(len(candidates) / base):g}"
        )
    return candidates[permutation(key, len(candidates))[:num_poisoned]]


def to_8_bits(images: Array) -> Array:
    """Round float images in [0, 1] to the nearest of 256 levels, as uint8."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@partial(jax.jit, static_argnames="trigger_apply")
def poisoned_rows(
    images: Array,
    params: PyTree,
    labels: Array | None = None,
    keys: Key | None = None,
    *,
    trigger_apply: Callable[..., Array] = masked_blend.apply,
) -> Array:
    """Put a trigger on 8-bit images and round the result to 8 bits.

    Poisoned data reaches its victim as 8-bit image files, so the result is rounded to the nearest of 256 levels, an error of
    at most 1/510. Pixels that the trigger does not change stay bit-identical.

    Args:
        images: uint8 [n, H, W, C], only the selected rows.
        params: the trigger's parameters.
        labels: int32 [n], the original labels, for triggers that depend on the class.
        keys: typed keys [n], for triggers that are random per image.
        trigger_apply: the trigger's `apply`; a module-level function, so that calls share a compilation.

    Returns:
        uint8 [n, H, W, C].
    """

    def poison_one(row: tuple[Array, Array | None, Key | None]) -> Array:
        image, label, key = row
        triggered = trigger_apply(params, image.astype(jnp.float32) / 255.0, label, key)
        return to_8_bits(triggered)

    return jax.lax.map(poison_one, (images, labels, keys), batch_size=min(IMAGES_AT_ONCE, len(images)))


def select_cover_rows(
    key: Key, labels: np.ndarray, rate: float, rule: LabelRule, poisoned_rows: np.ndarray
) -> np.ndarray:
    """Choose cover rows, which get the trigger and keep their label: floor(rate N) of the rule's cover rows, not poisoned.

    Args:
        key: a key of `jax.random.key`.
        labels: int32 [N].
        rate: share of all rows, in [0, 1].
        rule: defines which rows may be cover rows.
        poisoned_rows: int [n], excluded.

    Returns:
        int32 [m], distinct rows in random order.

    Raises:
        InputError: the rate is out of range, or there are too few rows.
    """
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"cover rate {rate:g} must be from 0 to 1")
    is_candidate = rule.cover(labels)
    is_candidate[poisoned_rows] = False
    candidates = np.flatnonzero(is_candidate).astype(np.int32)
    count = math.floor(rate * len(labels) + 1e-9)
    if count > len(candidates):
        raise InputError(
            f"cover rate {rate:g} of {len(labels)} rows is {count} rows, but only {len(candidates)} that are not poisoned "
            f"may be cover rows under the rule {rule.name}; the largest rate possible is "
            f"{_round_down(len(candidates) / len(labels)) if len(candidates) else 0:g}"
        )
    return candidates[permutation(key, len(candidates))[:count]] if count else np.zeros(0, np.int32)


def poison(
    dataset: Dataset,
    rows: np.ndarray,
    trigger_apply: Callable[..., Array],
    rule: LabelRule,
    *,
    params: PyTree,
    key: Key | None = None,
    cover_rows: np.ndarray | None = None,
    cover_apply: Callable[..., Array] | None = None,
    craft: Callable[..., Array] | None = None,
    adds_rows: bool = False,
) -> PoisonedDataset:
    """Poison the given rows of a dataset; all other rows stay bit-identical.

    Args:
        dataset: the clean data; it is not modified.
        rows: int [n], distinct row numbers, as from `select_rows`.
        trigger_apply: the trigger's `apply`.
        rule: gives the new labels.
        params: the trigger's parameters.
        key: for triggers that are random per image. Row i gets `fold_in(key, i)`, so its poisoned version does not depend
          on the other rows or their order.
        cover_rows: int [m], rows that get the trigger and keep their label.
        cover_apply: the change to cover rows; None for `trigger_apply`.
        craft: makes all poisoned images at once, instead of `trigger_apply`; see `Attack.craft`.
        adds_rows: append the changed rows, poisoned rows first, instead of replacing the clean rows.

    Returns:
        The poisoned set, with the ground truth of each row.

    Raises:
        InputError: there are no rows, a row number is out of range or repeated, or a new label is not a class.

    References:
        Heydari et al. 2025, section 4.3, equation 2.
    """
    rows = np.asarray(rows)
    cover_rows = np.zeros(0, np.int32) if cover_rows is None else np.asarray(cover_rows)
    changed = np.concatenate([rows, cover_rows]).astype(np.int32)
    if len(rows) == 0:
        raise InputError(f"no row of {len(dataset)} was selected for poisoning: the result would be the clean dataset")
    if changed.min() < 0 or changed.max() >= len(dataset) or len(np.unique(changed)) < len(changed):
        raise InputError(f"rows to poison must be distinct numbers from 0 to {len(dataset) - 1}")
    new_labels = rule.relabel(dataset.labels[rows])
    _check_labels(new_labels, dataset.num_classes, rule)

    def changed_images(numbers: np.ndarray, run: Callable[..., Array], function: Callable[..., Array]) -> np.ndarray:
        labels = jnp.asarray(dataset.labels[numbers])
        return np.asarray(run(dataset.images[numbers], params, labels, row_keys(key, numbers), function))

    images = [changed_images(rows, _crafted_rows if craft else _triggered_rows, craft or trigger_apply)]
    if len(cover_rows):
        images.append(changed_images(cover_rows, _triggered_rows, cover_apply or trigger_apply))
    base = np.concatenate([np.arange(len(dataset)), changed]) if adds_rows else np.arange(len(dataset))
    where = np.arange(len(dataset), len(base)) if adds_rows else changed
    poisoned, cover = where[: len(rows)], where[len(rows) :]
    fields = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(Dataset)}
    # Added rows come from no file, and file names for only some rows would be misread.
    files = () if adds_rows else dataset.files
    result = PoisonedDataset(
        **fields | {"images": dataset.images[base], "labels": dataset.labels[base], "files": files},
        is_poisoned=np.zeros(len(base), bool),
        original_labels=dataset.labels[base],
        is_cover=np.zeros(len(base), bool),
    )
    result.images[where] = np.concatenate(images)
    result.labels[poisoned] = new_labels
    result.is_poisoned[poisoned] = True
    result.is_cover[cover] = True
    return result


class ConfiguredAttack(NamedTuple):
    """An attack with its settings and label rule for one dataset."""

    attack: Attack
    settings: Any
    """the attack's settings; `poison_rate` and `cover_rate` are read from them"""
    rule: LabelRule


def poison_by(key: Key, dataset: Dataset, part: ConfiguredAttack, params: PyTree) -> PoisonedDataset:
    """Poison a training set with a configured attack: choose rows and cover rows, then apply the trigger and relabel.

    Args:
        key: draws the rows, and everything random in the triggers.
        dataset: the clean data.
        part: the attack, its settings and the rule.
        params: from its `make_params`.

    Raises:
        InputError: a rate gives no row, or more rows than there are.
    """
    return _poison_free_rows(key, dataset, part, params, np.ones(len(dataset), bool))


def poison_by_several(
    key: Key, dataset: Dataset, parts: Sequence[ConfiguredAttack], params: Sequence[PyTree]
) -> tuple[PoisonedDataset, list[np.ndarray]]:
    """Poison one training set with several attacks; no row gets two triggers.

    Clean-label attacks choose first: their rows all come from one class.

    Args:
        key: as in `poison_by`; a single part gives the same result as `poison_by`.
        dataset: the clean data.
        parts: the attacks.
        params: trigger parameters of each.

    Returns:
        The poisoned set, and for each part the rows that it poisoned, int32.

    Raises:
        InputError: as in `poison_by`, counting only rows that are still free.

    References:
        ABM, section V: BadNets with Blend, CBA, SIG or Refool.
    """
    order = _order(parts, dataset.labels)
    is_free = np.ones(len(dataset), bool)
    current: Dataset = dataset
    original = dataset.labels
    is_poisoned, is_cover = np.zeros(len(dataset), bool), np.zeros(len(dataset), bool)
    rows: list[np.ndarray] = [np.zeros(0, np.int32)] * len(parts)
    for step, number in enumerate(order):
        part_key = key if len(parts) == 1 else jax.random.fold_in(key, step)
        poisoned = _poison_free_rows(part_key, current, parts[number], params[number], is_free)
        rows[number] = np.flatnonzero(poisoned.is_poisoned).astype(np.int32)
        added = len(poisoned) - len(current)
        original = np.concatenate([original, poisoned.original_labels[len(current) :]])
        is_poisoned = np.concatenate([is_poisoned, np.zeros(added, bool)]) | poisoned.is_poisoned
        is_cover = np.concatenate([is_cover, np.zeros(added, bool)]) | poisoned.is_cover
        is_free = ~(is_poisoned | is_cover)
        current = poisoned
    fields = {field.name: getattr(current, field.name) for field in dataclasses.fields(Dataset)}
    return PoisonedDataset(**fields, is_poisoned=is_poisoned, original_labels=original, is_cover=is_cover), rows


def check_rows(labels: np.ndarray, parts: Sequence[ConfiguredAttack]) -> None:
    """Refuse rates that do not fit the rows, by choosing rows as `poison_by_several` does, without images.

    Args:
        labels: int32 [N].
        parts: the attacks.

    Raises:
        InputError: as in `poison_by_several`.
    """
    is_free = np.ones(len(labels), bool)
    for number in _order(parts, labels):
        part = parts[number]
        rows, cover_rows = _choose_rows(jax.random.key(0), labels, part, is_free)
        changed = np.concatenate([rows, cover_rows])
        if part.attack.adds_rows:
            labels = np.concatenate([labels, labels[changed]])
            is_free = np.concatenate([is_free, np.zeros(len(changed), bool)])
        else:
            is_free[changed] = False


def _order(parts: Sequence[ConfiguredAttack], labels: np.ndarray) -> list[int]:
    """The order in which the attacks choose their rows."""
    return sorted(range(len(parts)), key=lambda number: not _keeps_labels(parts[number].rule, labels))


def _keeps_labels(rule: LabelRule, labels: np.ndarray) -> bool:
    candidates = labels[rule.candidates(labels)]
    return np.array_equal(rule.relabel(candidates), candidates)


def _poison_free_rows(
    key: Key, dataset: Dataset, part: ConfiguredAttack, params: PyTree, is_free: np.ndarray
) -> PoisonedDataset:
    attack = part.attack
    image_key = jax.random.split(key, 3)[2]
    rows, cover_rows = _choose_rows(key, dataset.labels, part, is_free)
    return poison(
        dataset,
        rows,
        attack.apply_in_training or attack.apply,
        part.rule,
        params=params,
        key=image_key,
        cover_rows=cover_rows,
        cover_apply=attack.apply_to_cover,
        craft=attack.craft,
        adds_rows=attack.adds_rows,
    )


def _choose_rows(
    key: Key, labels: np.ndarray, part: ConfiguredAttack, is_free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that an attack poisons, and its cover rows: int32 [n] and [m]."""
    row_key, cover_key, _ = jax.random.split(key, 3)
    rule = part.rule._replace(
        candidates=lambda labels: part.rule.candidates(labels) & is_free,
        cover=lambda labels: part.rule.cover(labels) & is_free,
    )
    rows = select_rows(row_key, labels, part.settings.poison_rate, rule)
    return rows, select_cover_rows(cover_key, labels, part.settings.cover_rate, rule, rows)


def pooled(clean: Dataset, sets: Sequence[Dataset | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine training sets that share their clean images into one pool.

    Args:
        clean: the shared images.
        sets: each poisoned from `clean`, or None for `clean` itself; all of the same length.

    Returns:
        The pool, uint8 [P, H, W, C]: the clean images, then the changed images of each set; and for each set, its rows'
        numbers in the pool, int32 [M, n], and their labels, int32 [M, n].
    """
    images, index, labels = [clean.images], [], []
    start = len(clean)
    for dataset in sets:
        dataset = clean if dataset is None else dataset
        rows = np.arange(len(dataset), dtype=np.int32)
        if isinstance(dataset, PoisonedDataset):
            changed = np.flatnonzero(dataset.is_poisoned | dataset.is_cover)
            rows[changed] = start + np.arange(len(changed))
            start += len(changed)
            images.append(dataset.images[changed])
        index.append(rows)
        labels.append(dataset.labels)
    return np.concatenate(images), np.stack(index), np.stack(labels).astype(np.int32)


def trigger_all(key: Key, dataset: Dataset, apply: Callable[..., Array], params: PyTree) -> np.ndarray:
    """Put the trigger on every image of a set, in 8 bits like the image files of an attacker.

    Args:
        key: row i gets `fold_in(key, i)`.
        dataset: the clean images, with labels for triggers that depend on the class.
        apply: the trigger.
        params: its parameters.

    Returns:
        uint8 [N, H, W, C].
    """
    rows = np.arange(len(dataset), dtype=np.int32)
    return np.asarray(_triggered_rows(dataset.images, params, jnp.asarray(dataset.labels), row_keys(key, rows), apply))


def row_keys(key: Key | None, rows: np.ndarray) -> Key | None:
    """The keys of rows, derived from their numbers in the dataset: typed keys [n]."""
    return None if key is None else _fold_in(key, np.asarray(rows, np.int32))


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _triggered_rows(images, params, labels, keys, function: Callable[..., Array]) -> Array:
    return poisoned_rows(images, params, labels, keys, trigger_apply=function)


def _crafted_rows(images, params, labels, keys, function: Callable[..., Array]) -> Array:
    crafted = function(params, jnp.asarray(images, jnp.float32) / 255.0, labels, keys)
    return to_8_bits(crafted)


def _check_labels(labels: np.ndarray, num_classes: int, rule: LabelRule) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise InputError(f"the rule {rule.name} gives label {wrong[0]}, but classes go from 0 to {num_classes - 1}")


def _round_up(rate: float) -> float:
    """Round up to four significant digits, so that the printed rate still gives a row."""
    return _round_digits(rate, math.ceil)


def _round_down(rate: float) -> float:
    return _round_digits(rate, math.floor)


def _round_digits(rate: float, rounding: Callable[[float], int]) -> float:
    unit = 10.0 ** (math.floor(math.log10(rate)) - 3)
    # The tolerance keeps an exact 0.1, which may come out as 1000.0000000001 units, at 0.1.
    tolerance = -1e-6 if rounding is math.ceil else 1e-6
    return rounding(rate / unit + tolerance) * unit
