"""Does the variance of a network's features distinguish backdoored networks from clean ones?

RobustKD rests on this claim (figure 2 and finding 2): on the same clean images, the features of backdoored networks vary
"significantly" more than those of normal ones, by at least 30 %. The paper compares one network of each kind. Networks of one
kind differ too, so here the unit is the network: every attacked network is compared with the clean network of its seed.

Attacks that fine-tune the clean network return a network that was trained for longer. As a control, clean networks that were
fine-tuned for as long should be measured too; otherwise the effect of longer training is attributed to the backdoor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.datasets.splits import sample_rows
from bdjax.errors import InputError
from bdjax.losses import feature_variance
from bdjax.training.ensemble import members, num_members
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Array, Dataset, Key, Model, PyTree

CLAIMED_RATIO = 1.3
"""Smallest ratio of a backdoored network's variance to a clean one's, according to the paper."""
FEWEST_SEEDS = 5
"""Smallest number of seeds with a p-value: with 5 seeds, 1 of 2^5 = 32 sign patterns is all positive."""
BEFORE_RELU = " before ReLU"
TRAINED_ON = "clean, trained on"
"""Name of the clean networks that were trained for longer."""
NUM_IMAGES = 100
"""How many images are measured, as in the paper."""


class Variances(NamedTuple):
    """The feature variances of one network, on images that all networks share and on the same images with its trigger."""

    kind: str
    """name of its attack, or of a kind of clean network"""
    seed: int
    is_attacked: bool
    clean: Mapping[str, np.ndarray]
    """place -> float32 [n]"""
    triggered: Mapping[str, np.ndarray] | None = None
    """place -> float32 [n] on triggered images; None for a network without a trigger"""
    reference_triggered: Mapping[str, np.ndarray] | None = None
    """place -> float32 [n] on the same triggered images, in the clean network of the seed"""


@cache
def row_variances(model: Model) -> Callable[..., dict[str, Array]]:
    """For `StageRunner.per_row`: `feature_variance` of each row at the end of each group of blocks.

    "group3" is the output of the third group, which the published defense uses; "group3 before ReLU" is the same after the
    normalisation that follows, which students are distilled from. Scaling the input of a normalisation does not change the
    network's predictions, so the variance of the former has no fixed scale.

    Args:
        model: the network.

    Returns:
        A function that returns float32 [B] for each place, in the order of the network. It raises InputError for a network
        without groups.
    """

    def variances(variables: PyTree, images: Array, targets: Mapping[str, Array]) -> dict[str, Array]:
        groups = model.apply(variables, images, train=False).groups
        if not groups:
            raise InputError(
                f"{model.description} has no groups to measure features of; use a WRN, a ResNet or a PyramidNet"
            )
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
        runner: lays out the members.
        model: their architecture.
        variables: stacked [M, ...].
        images: uint8 [n, H, W, C], shared by all networks, or [M, n, H, W, C], separate images for each network.
        batch_size: images per step.

    Returns:
        For each network, place -> float32 [n].

    Raises:
        InputError: the architecture has no groups.
    """
    count = num_members(variables)
    is_separate = images.ndim == 5
    num_rows = images.shape[1] if is_separate else len(images)
    first = num_rows * np.arange(count)[:, None] if is_separate else np.zeros((count, 1), np.int64)
    index = jnp.asarray(first + np.arange(num_rows), jnp.int32)
    pool = jnp.asarray(images.reshape(-1, *images.shape[-3:]))
    # Rows must have labels; they are not used here.
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
        runner: lays out the members.
        model: the architecture.
        kinds: of M backdoored networks, the name of the attack and the number of the seed.
        variables: of the backdoored networks, stacked [M, ...].
        images: uint8 [n, H, W, C].
        triggered: uint8 [M, n, H, W, C]: the same images with the trigger of each backdoored network.
        clean: name of a kind without a backdoor -> networks of seeds 0, 1, ..., stacked. The first kind is the reference.
        batch_size: images per step.

    Returns:
        The clean networks, then the backdoored networks.

    Raises:
        InputError: the architecture has no groups.
    """
    found = [
        Variances(kind, seed, False, values)
        for kind, networks in clean.items()
        for seed, values in enumerate(measure_variances(runner, model, networks, images, batch_size))
    ]
    references = members(next(iter(clean.values())), np.array([seed for _, seed in kinds]))
    columns = [
        measure_variances(runner, model, networks, shown, batch_size)
        for networks, shown in ((variables, images), (variables, triggered), (references, triggered))
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
    """Measure backdoored networks, the clean network of each seed, and that network trained for longer.

    Args:
        key: draws the images to measure, and the order of rows in the longer training.
        runner: trains networks and lays out the members.
        kinds: of M backdoored networks, the name of the attack and the number of the seed.
        variables: of the backdoored networks, stacked [M, ...].
        images: uint8 [N, H, W, C], of which `NUM_IMAGES` are measured.
        triggered: of each backdoored network, uint8 [N, H, W, C]: the same images with its trigger.
        clean: a clean network of the same architecture for each seed.
        fine_tuning: the training of attackers that start from the clean network.
        train: the clean training set.
        batch_size: images per step.

    Returns:
        As `measure_suspects`: networks of kinds "clean" and `TRAINED_ON`, then the backdoored networks.

    Raises:
        InputError: the architecture has no groups.
    """
    rows_key, train_key = jax.random.split(key)
    count = num_members(clean.variables)
    rows = np.tile(np.arange(len(train), dtype=np.int32), (count, 1))
    all_rows = Rows(jnp.asarray(rows), {"labels": jnp.asarray(train.labels[rows])})
    pool, keys = jnp.asarray(train.images), jax.random.split(train_key, count)
    trained_on = runner.from_variables(TRAINED_ON, clean.model, fine_tuning, clean.variables, keys, 1, pool, all_rows)
    sample = sample_rows(rows_key, len(images), min(1.0, NUM_IMAGES / len(images)))
    return measure_suspects(
        runner,
        clean.model,
        kinds,
        variables,
        images[sample],
        np.stack([view[sample] for view in triggered]),
        {"clean": clean.variables, TRAINED_ON: trained_on.variables},
        batch_size,
    )


def last_place(places: Iterable[str]) -> str:
    """The output of the last group, where the published defense measures.

    Raises:
        ValueError: there are no groups.
    """
    return max((name for name in places if not name.endswith(BEFORE_RELU)), key=lambda name: (len(name), name))


def compare(measured: Sequence[Variances], place: str | None = None, *, reference: str = "clean") -> dict[str, Any]:
    """Compare every network with the clean network of its seed.

    Networks that diverged (their variance is 0 or not finite) are left out, and so are networks whose clean network did.

    Args:
        measured: all networks, on the same clean images.
        place: where to compare; None for `last_place`.
        reference: the kind of the clean networks to compare with.

    Returns:
        Plain numbers, for a file:

        - place, images, reference; left_out: how many networks.
        - kinds: a list of {kind, is_attacked, seeds, mean_variance, ratio, triggered_ratio, reference_triggered_ratio}:
          lists with a number for each seed. `ratio` is the mean variance over that of the clean network of the seed;
          `triggered_ratio` the mean variance on triggered images over that on clean images, same network;
          `reference_triggered_ratio` the same for the clean network of the seed with this trigger. The last two are None
          for kinds without a trigger.
        - networks, larger, as_claimed, mean_ratio, smallest_ratio, largest_ratio: of the attacked networks' ratios: how
          many there are, how many are above 1, how many at least `CLAIMED_RATIO`. The ratios are None without such a network.
        - auc_networks: the probability that the mean variance of an attacked network is above that of a network without a
          backdoor, of any kind. auc_images: the same for the variances of single images over all networks, as in the
          paper's figure. None unless there are networks of both sorts.
        - p_larger: the p-value of ratios this large or larger if attacks did not change the variance; None for fewer than
          `FEWEST_SEEDS` seeds. The attacks of one seed share its clean network, so the unit is the seed: an exact
          sign-flip test of the mean over attacks of log ratio. seeds: how many there are.
    """
    # Slow to import, so only where needed.
    from sklearn.metrics import roc_auc_score

    place = place or last_place(measured[0].clean)
    means = [float(np.mean(network.clean[place], dtype=np.float64)) for network in measured]
    usable = [(network, mean) for network, mean in zip(measured, means, strict=True) if np.isfinite(mean) and mean > 0]
    of_clean = {network.seed: mean for network, mean in usable if network.kind == reference}
    kept = [(network, mean) for network, mean in usable if network.seed in of_clean]
    by_kind: dict[str, list[tuple[Variances, float]]] = {}
    for network, mean in kept:
        by_kind.setdefault(network.kind, []).append((network, mean))
    attacked = [(network, mean / of_clean[network.seed]) for network, mean in kept if network.is_attacked]
    ratios = [ratio for _, ratio in attacked]
    seeds = sorted({network.seed for network, _ in attacked})
    per_seed = [np.mean([np.log(ratio) for network, ratio in attacked if network.seed == seed]) for seed in seeds]
    truth = [network.is_attacked for network, _ in kept]
    sizes = [len(network.clean[place]) for network, _ in kept]
    has_both = any(truth) and not all(truth)
    return {
        "place": place,
        "images": len(measured[0].clean[place]),
        "reference": reference,
        "left_out": len(measured) - len(kept),
        "kinds": [_kind(kind, networks, of_clean, place) for kind, networks in by_kind.items()],
        "networks": len(ratios),
        "larger": sum(ratio > 1 for ratio in ratios),
        "as_claimed": sum(ratio >= CLAIMED_RATIO for ratio in ratios),
        "mean_ratio": float(np.mean(ratios)) if ratios else None,
        "smallest_ratio": min(ratios, default=None),
        "largest_ratio": max(ratios, default=None),
        "auc_networks": float(roc_auc_score(truth, [mean for _, mean in kept])) if has_both else None,
        "auc_images": (
            float(roc_auc_score(np.repeat(truth, sizes), np.concatenate([network.clean[place] for network, _ in kept])))
            if has_both
            else None
        ),
        "p_larger": _p_larger(np.array(per_seed)) if len(seeds) >= FEWEST_SEEDS else None,
        "seeds": len(seeds),
    }


def _kind(
    kind: str, networks: Sequence[tuple[Variances, float]], of_clean: Mapping[int, float], place: str
) -> dict[str, Any]:
    def ratios(select: Callable[[Variances], Mapping[str, np.ndarray] | None], baselines: Sequence[float]):
        selected = [select(network) for network, _ in networks]
        if any(values is None for values in selected):
            return None
        return [
            float(np.mean(values[place], dtype=np.float64)) / mean
            for values, mean in zip(selected, baselines, strict=True)
        ]

    references = [of_clean[network.seed] for network, _ in networks]
    return {
        "kind": kind,
        "is_attacked": networks[0][0].is_attacked,
        "seeds": [network.seed for network, _ in networks],
        "mean_variance": [mean for _, mean in networks],
        "ratio": [mean / clean for (_, mean), clean in zip(networks, references, strict=True)],
        "triggered_ratio": ratios(lambda network: network.triggered, [mean for _, mean in networks]),
        "reference_triggered_ratio": ratios(lambda network: network.reference_triggered, references),
    }


def _p_larger(log_ratios: np.ndarray) -> float:
    """Exact up to 13 seeds; for more seeds, 9,999 random sign patterns."""
    # Slow to import, so only where needed.
    from scipy.stats import permutation_test

    options = {
        "permutation_type": "samples",
        "alternative": "greater",
        "n_resamples": 9999,
        "rng": np.random.default_rng(0),
    }
    return float(
        permutation_test((log_ratios,), lambda x, axis: np.mean(x, axis=axis), vectorized=True, **options).pvalue
    )


def describe(comparison: Mapping[str, Any]) -> str:
    """A comparison in a few sentences; the text starts with Yes, In part, No or Not measured.

    Yes: the variance of every attacked network is at least `CLAIMED_RATIO` times that of its clean network, and that of no
    other network is. In part: all ratios of attacked networks are above 1, but the rest does not hold. No: anything else.

    Args:
        comparison: from `compare`.
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
    spread = _range(*(comparison[f"{name}_ratio"] for name in ("mean", "smallest", "largest")))
    text = (
        f"{verdict}: {comparison['larger']} of {count} backdoored networks have a larger feature variance than the clean "
        f"network of the same seed, {comparison['as_claimed']} of them by the 30 % or more that the paper reports for "
        f"all; the mean ratio is {spread}."
    )
    if others:
        spread = _range(float(np.mean(others)), min(others), max(others))
        text += f" Clean networks that were only trained for longer have a ratio of {spread}."
    if comparison["auc_networks"] is not None:
        text += (
            f" The probability that a backdoored network's variance is above that of a network without a backdoor is "
            f"{comparison['auc_networks']:.2f} (0.5 would be chance)"
        )
        p = comparison["p_larger"]
        text += f"; p = {p:.2g} over {comparison['seeds']} seeds." if p is not None else "."
    return text


def describe_triggered(comparison: Mapping[str, Any]) -> str:
    """The effect of the trigger on the variance, in one or two sentences; empty without a trigger.

    Args:
        comparison: from `compare`.
    """
    kinds = [kind for kind in comparison["kinds"] if kind["is_attacked"] and kind["triggered_ratio"] is not None]
    ratios = [ratio for kind in kinds for ratio in kind["triggered_ratio"]]
    if not ratios:
        return ""
    text = (
        f"A trigger changes the variance of the attacked network's features by a factor of "
        f"{_range(float(np.mean(ratios)), min(ratios), max(ratios))}"
    )
    clean = [ratio for kind in kinds for ratio in kind["reference_triggered_ratio"] or ()]
    if clean:
        text += f", and that of the clean network's by {_range(float(np.mean(clean)), min(clean), max(clean))}"
    return f"{text}. A defender who does not know the trigger cannot see this."


def _range(mean: float, smallest: float, largest: float) -> str:
    return f"{mean:.2f} ({smallest:.2f} to {largest:.2f})"
