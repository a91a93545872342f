"""Does the variance of a network's features tell a backdoored network from a clean one?

RobustKD rests on this claim (figure 2 and finding 2): on the same clean images, the features of backdoored networks vary
"significantly" more than those of normal ones, by at least 30 %. It compares one network of each kind. Two networks of one
kind differ too, so here the unit is the network: every attacked one is set against the clean one of its seed.

Attacks that fine-tune the clean network hand over a network that was trained for longer. Clean networks that were
fine-tuned for as long belong among the measured ones, else that difference is taken for the backdoor's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import permutation_test
from sklearn.metrics import roc_auc_score

from bdjax.datasets.splits import sample_rows
from bdjax.errors import InputError
from bdjax.losses import feature_variance
from bdjax.training.ensemble import members, num_members
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Array, Dataset, Key, Model, PyTree

CLAIMED_RATIO = 1.3
"""A backdoored network's variance over a clean one's, at least, according to the paper."""
FEWEST_SEEDS = 5
"""From which on there is a p-value: of 2^n signs of n seeds, 1 in 32 is all positive."""
BEFORE_RELU = " before ReLU"
TRAINED_ON = "clean, trained on"
"""What clean networks are called that were trained for longer."""
NUM_IMAGES = 100
"""How many images are looked at, as in the paper."""


class Variances(NamedTuple):
    """One network on the images that all networks are measured on, and on the same with its own trigger."""

    kind: str
    """its attack; or what the clean network is called, or the clean one that was trained on"""
    seed: int
    is_attacked: bool
    clean: Mapping[str, np.ndarray]
    """place -> float32 [n]"""
    triggered: Mapping[str, np.ndarray] | None = None
    """the same keys; None of a network without a trigger"""
    reference_triggered: Mapping[str, np.ndarray] | None = None
    """of those images in the clean network of the seed"""


@cache
def row_variances(model: Model) -> Callable[..., dict[str, Array]]:
    """For `StageRunner.per_row`: the variance of each row where each group of blocks ends, by `feature_variance`.

    "group3" is what the third group hands on, which the published defense takes; "group3 before ReLU" is the same after the
    normalisation that follows, which is what students are distilled from. What a normalisation follows may be scaled at
    will without a change of what the network says, so the variance of the former has no scale of its own.

    Args:
        model: the network.

    Returns:
        A function to float32 [B] for each place, in the order of the network. It raises InputError for a network whose
        groups are not known.
    """

    def variances(variables: PyTree, images: Array, targets: Mapping[str, Array]) -> dict[str, Array]:
        groups = model.apply(variables, images, train=False).groups
        if not groups:
            raise InputError(f"{model.description} has no groups of blocks that features could be taken from")
        places = {}
        for name, end in groups.items():
            places |= {name: feature_variance(end.output), name + BEFORE_RELU: feature_variance(end.before_relu)}
        return places

    return variances


def measure_variances(
    runner: StageRunner, model: Model, variables: PyTree, images: np.ndarray, batch_size: int
) -> list[dict[str, np.ndarray]]:
    """Measure stacked networks, all in one call.

    Args:
        runner: lays them out.
        model: their architecture.
        variables: stacked [M, ...].
        images: uint8 [n, H, W, C] for all of them, or [M, n, H, W, C]: each network's own.
        batch_size: images at once.

    Returns:
        Of each network, place -> float32 [n].

    Raises:
        InputError: the groups of the architecture are not known.
    """
    count = num_members(variables)
    own = images.ndim == 5
    num_rows = images.shape[1] if own else len(images)
    first = num_rows * np.arange(count)[:, None] if own else np.zeros((count, 1), np.int64)
    index = jnp.asarray(first + np.arange(num_rows), jnp.int32)
    pool = jnp.asarray(images.reshape(-1, *images.shape[-3:]))
    # Nobody asks for the labels here, and yet rows have some.
    rows = Rows(index, {"labels": jnp.zeros(index.shape, jnp.int32)})
    found = runner.per_row(row_variances(model), variables, rows, pool, batch_size)
    return [{place: values[i] for place, values in found.items()} for i in range(count)]


def measure_suspects(
    runner: StageRunner,
    model: Model,
    kinds: Sequence[tuple[str, int]],
    variables: PyTree,
    images: np.ndarray,
    triggered: np.ndarray,
    clean: Mapping[str, PyTree],
    batch_size: int,
) -> list[Variances]:
    """Measure backdoored networks and clean ones, of one architecture and on the same images.

    Args:
        runner: lays them out.
        model: the architecture.
        kinds: of M backdoored networks, the name of the attack and the number of the seed.
        variables: of those, stacked [M, ...].
        images: uint8 [n, H, W, C].
        triggered: uint8 [M, n, H, W, C]: the same images under each one's trigger.
        clean: name of a kind without a backdoor -> networks of seeds 0, 1, ..., stacked. The first kind is the reference.
        batch_size: images at once.

    Returns:
        The clean ones, then the backdoored ones.

    Raises:
        InputError: the groups of the architecture are not known.
    """
    found = [
        Variances(kind, seed, False, values)
        for kind, own in clean.items()
        for seed, values in enumerate(measure_variances(runner, model, own, images, batch_size))
    ]
    references = members(next(iter(clean.values())), np.array([seed for _, seed in kinds]))
    columns = [
        measure_variances(runner, model, networks, on, batch_size)
        for networks, on in ((variables, images), (variables, triggered), (references, triggered))
    ]
    return found + [Variances(*kind, True, *values) for kind, *values in zip(kinds, *columns, strict=True)]


def measure_beside_clean(
    key: Key,
    runner: StageRunner,
    kinds: Sequence[tuple[str, int]],
    variables: PyTree,
    images: np.ndarray,
    triggered: Sequence[np.ndarray],
    clean: Nets,
    fine_tuning: TrainConfig,
    train: Dataset,
    batch_size: int,
) -> list[Variances]:
    """Measure backdoored networks beside the clean one of each seed, and beside that one trained for longer.

    Args:
        key: draws the images that are looked at, and the order of rows in that training.
        runner: trains and lays networks out.
        kinds: of M backdoored networks, the name of the attack and the number of the seed.
        variables: of those, stacked [M, ...].
        images: uint8 [N, H, W, C], of which `NUM_IMAGES` are looked at.
        triggered: of each backdoored network, uint8 [N, H, W, C]: the same images under its trigger.
        clean: a clean network of the same architecture for each seed.
        fine_tuning: how attackers train who start from those.
        train: the clean training set.
        batch_size: images at once.

    Returns:
        As `measure_suspects`: those of kinds "clean" and `TRAINED_ON`, then the backdoored ones.

    Raises:
        InputError: the groups of the architecture are not known.
    """
    rows_key, train_key = jax.random.split(key)
    count = num_members(clean.variables)
    rows = np.tile(np.arange(len(train), dtype=np.int32), (count, 1))
    all_rows = Rows(jnp.asarray(rows), {"labels": jnp.asarray(train.labels[rows])})
    pool, keys = jnp.asarray(train.images), jax.random.split(train_key, count)
    trained_on = runner.from_variables(TRAINED_ON, clean.model, fine_tuning, clean.variables, keys, 1, pool, all_rows)
    looked_at = sample_rows(rows_key, len(images), min(1.0, NUM_IMAGES / len(images)))
    return measure_suspects(
        runner,
        clean.model,
        kinds,
        variables,
        images[looked_at],
        np.stack([view[looked_at] for view in triggered]),
        {"clean": clean.variables, TRAINED_ON: trained_on.variables},
        batch_size,
    )


def last_place(places: Iterable[str]) -> str:
    """The end of the last group, as it hands on: where the published defense measures.

    Raises:
        ValueError: there is none.
    """
    return max((name for name in places if not name.endswith(BEFORE_RELU)), key=lambda name: (len(name), name))


def compare(measured: Sequence[Variances], place: str | None = None, *, reference: str = "clean") -> dict[str, Any]:
    """Set every network against the clean one of its seed.

    Networks that diverged, whose variance is no number or 0, are left out, and so are those whose clean one did.

    Args:
        measured: all networks, on the same clean images.
        place: where; None for `last_place`.
        reference: the kind of the clean networks that others are set against.

    Returns:
        Plain numbers, for a file:

        - place, images, reference; left_out: how many networks.
        - kinds: a list of {kind, is_attacked, seeds, mean_variance, ratio, triggered_ratio, reference_triggered_ratio}:
          lists with a number for each seed. `ratio` is the mean variance over that of the clean network of the seed;
          `triggered_ratio` the mean variance on triggered images over that on the clean ones, same network;
          `reference_triggered_ratio` the same for the clean network of the seed under this trigger. The last two None
          where nothing was triggered.
        - networks, larger, as_claimed, mean_ratio, smallest_ratio, largest_ratio: of the attacked networks' ratios: how
          many there are, how many are above 1, how many at least `CLAIMED_RATIO`. None without such a network.
        - auc_networks: the chance that the mean variance of an attacked network is above that of a network that is not
          attacked, those of kinds beside the reference included. auc_images: the same of single images' variances over
          all networks, which is what the paper's figure shows. None without both.
        - p_larger: the chance of ratios as large or larger if an attack changed the variance no way in particular; None
          for less than `FEWEST_SEEDS` seeds. The attacks of one seed share its clean network, so the unit is the seed: an
          exact sign-flip test of the mean over attacks of log ratio. seeds: how many there are.
    """
    place = place or last_place(measured[0].clean)
    means = [float(np.mean(one.clean[place], dtype=np.float64)) for one in measured]
    is_usable = [bool(np.isfinite(mean) and mean > 0) for mean in means]
    of_clean = {
        one.seed: mean
        for one, mean, usable in zip(measured, means, is_usable, strict=True)
        if one.kind == reference and usable
    }
    kept = [(one, mean) for one, mean, usable in zip(measured, means, is_usable, strict=True) if usable]
    kept = [(one, mean) for one, mean in kept if one.seed in of_clean]
    by_kind: dict[str, list[tuple[Variances, float]]] = {}
    for one, mean in kept:
        by_kind.setdefault(one.kind, []).append((one, mean))
    attacked = [(one, mean / of_clean[one.seed]) for one, mean in kept if one.is_attacked]
    ratios = [ratio for _, ratio in attacked]
    seeds = sorted({one.seed for one, _ in attacked})
    per_seed = [np.mean([np.log(ratio) for one, ratio in attacked if one.seed == seed]) for seed in seeds]
    truth = [one.is_attacked for one, _ in kept]
    sizes = [len(one.clean[place]) for one, _ in kept]
    has_both = any(truth) and not all(truth)
    return {
        "place": place,
        "images": len(measured[0].clean[place]),
        "reference": reference,
        "left_out": len(measured) - len(kept),
        "kinds": [_kind(kind, own, of_clean, place) for kind, own in by_kind.items()],
        "networks": len(ratios),
        "larger": sum(ratio > 1 for ratio in ratios),
        "as_claimed": sum(ratio >= CLAIMED_RATIO for ratio in ratios),
        "mean_ratio": float(np.mean(ratios)) if ratios else None,
        "smallest_ratio": min(ratios, default=None),
        "largest_ratio": max(ratios, default=None),
        "auc_networks": float(roc_auc_score(truth, [mean for _, mean in kept])) if has_both else None,
        "auc_images": (
            float(roc_auc_score(np.repeat(truth, sizes), np.concatenate([one.clean[place] for one, _ in kept])))
            if has_both
            else None
        ),
        "p_larger": _p_larger(np.array(per_seed)) if len(seeds) >= FEWEST_SEEDS else None,
        "seeds": len(seeds),
    }


def _kind(
    kind: str, own: Sequence[tuple[Variances, float]], of_clean: Mapping[int, float], place: str
) -> dict[str, Any]:
    def triggered(which: Callable[[Variances], Mapping[str, np.ndarray] | None], over: Sequence[float]):
        values = [which(one) for one, _ in own]
        if any(value is None for value in values):
            return None
        return [float(np.mean(each[place], dtype=np.float64)) / mean for each, mean in zip(values, over, strict=True)]

    references = [of_clean[one.seed] for one, _ in own]
    return {
        "kind": kind,
        "is_attacked": own[0][0].is_attacked,
        "seeds": [one.seed for one, _ in own],
        "mean_variance": [mean for _, mean in own],
        "ratio": [mean / clean for (_, mean), clean in zip(own, references, strict=True)],
        "triggered_ratio": triggered(lambda one: one.triggered, [mean for _, mean in own]),
        "reference_triggered_ratio": triggered(lambda one: one.reference_triggered, references),
    }


def _p_larger(log_ratios: np.ndarray) -> float:
    """Exact up to 13 seeds; of more, 9,999 draws of the signs."""
    rng = np.random.default_rng(0)
    how = {"permutation_type": "samples", "alternative": "greater", "n_resamples": 9999, "rng": rng}
    return float(permutation_test((log_ratios,), lambda x, axis: np.mean(x, axis=axis), vectorized=True, **how).pvalue)


def answer(comparison: Mapping[str, Any]) -> str:
    """The numbers in a few sentences, the first of which starts with Yes, In part, No or Not measured.

    Yes: every attacked network's variance is at least `CLAIMED_RATIO` of the clean one's, and no other network's is. In
    part: every one's is larger, by less than that or no more than without an attack. No: anything else.

    Args:
        comparison: of `compare`.
    """
    count = comparison["networks"]
    if not count:
        return "Not measured: there is no backdoored network with a clean network of the same seed."
    others = [
        ratio
        for kind in comparison["kinds"]
        if not kind["is_attacked"] and kind["kind"] != comparison["reference"]
        for ratio in kind["ratio"]
    ]
    if comparison["as_claimed"] == count and all(ratio < CLAIMED_RATIO for ratio in others):
        verdict = "Yes"
    else:
        verdict = "In part" if comparison["larger"] == count else "No"
    of_ratios = (
        f"the mean ratio is {_range(*(comparison[f'{name}_ratio'] for name in ('mean', 'smallest', 'largest')))}"
    )
    text = (
        f"{verdict}: {comparison['larger']} of {count} backdoored networks have a larger feature variance than the clean "
        f"network of the same seed, {comparison['as_claimed']} of them by the 30 % or more that the paper reports of "
        f"all; {of_ratios}."
    )
    if others:
        spread = _range(float(np.mean(others)), min(others), max(others))
        text += f" Clean networks that were only trained on have a ratio of {spread}."
    if comparison["auc_networks"] is not None:
        text += (
            f" The chance that a backdoored network's variance is above that of one without a backdoor is "
            f"{comparison['auc_networks']:.2f} (0.5 would be chance)"
        )
        p = comparison["p_larger"]
        text += f"; p = {p:.2g} over {comparison['seeds']} seeds." if p is not None else "."
    return text


def answer_triggered(comparison: Mapping[str, Any]) -> str:
    """What the trigger does to the variance, in one or two sentences; empty where nothing was triggered.

    Args:
        comparison: of `compare`.
    """
    kinds = [kind for kind in comparison["kinds"] if kind["is_attacked"] and kind["triggered_ratio"] is not None]
    own = [ratio for kind in kinds for ratio in kind["triggered_ratio"]]
    if not own:
        return ""
    text = (
        f"A trigger changes the variance of the attacked network's features by a factor of "
        f"{_range(float(np.mean(own)), min(own), max(own))}"
    )
    clean = [ratio for kind in kinds for ratio in kind["reference_triggered_ratio"] or ()]
    if clean:
        text += f", and that of the clean network's by {_range(float(np.mean(clean)), min(clean), max(clean))}"
    return f"{text}. A defender who does not know the trigger cannot see this."


def _range(mean: float, smallest: float, largest: float) -> str:
    return f"{mean:.2f} ({smallest:.2f} to {largest:.2f})"
