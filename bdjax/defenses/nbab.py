"""NBAB: find a strong backdoor with a weaker one that the defender plants (ABM, Chen et al. 2024, section IV-A, algorithm 1).

The defender plants a backdoor into the suspect rows: a small square that leads to an extra class, number K. The
verification network learns it along with everything else, but weakly, since features of stamped images are pulled to those
of the same images without the stamp (equation 2; see `bdjax/attacks/suppression.py`). Then *every* row is stamped. A clean
row with the square is predicted as K; where the attacker's trigger is present too, it dominates the square. So rows that are
not predicted as K are suspicious.

That rests on a premise: the defender's backdoor is learned, and it is the weaker one. Which one is weaker depends on alpha, on
the attack and on the network's start, and not smoothly. So several verification networks may be trained, of several alphas
(`rungs`), and a row's score is its mean rank over them. The defender can see where the premise fails without knowing the
poisons: where stamped rows that were not stamped in training are hardly ever predicted as K, the square was not learned; where
they nearly always are, it dominates whatever else is in the rows. Such networks are left out (`least_success`, `most_success`).

The paper leaves open how many rows are stamped in training (here a tenth, balanced over the given labels), which layer is
aligned (here the input of the last one), how a distance is scaled (here the mean over features), which colour the square has
and how the suspicious rows are reduced to 1 % of the set. On a white corner a white square is invisible, and a clean row would
be suspicious for that reason alone, so the square here is a checkerboard. Suspicious rows are ranked by the highest logit
other than K's, since a backdoor activates its class far more than clean rows do theirs (the paper's figure 3); a ranking by the
margin over K puts images first on which the square is hard to see. The lead of the highest of these logits over the second is
ours: classes share features, so that a clean row that activates its class also activates similar classes, and a trigger does
not.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.suppression import most_pairs, suppressed_cross_entropy
from bdjax.choices import Optimiser
from bdjax.defenses.contract import DefenseInput, apart, fingerprint
from bdjax.metrics import top_rows
from bdjax.models import MODELS
from bdjax.settings import Count, LearningRate, NotEmpty, NotNegative, PositiveShare, Range, Share, check_values
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets

Stamp = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 images [N, H, W, C], labels [N]) -> the same images with the defender's trigger."""
CHUNK = 4096
"""Rows of each member that are stamped at a time."""
PATTERNS = ("checkerboard", "white")
RECIPE = "recipe"
RANKS = ("suspicious", "activation", "lead", "margin")
"""How rows are ranked for isolation: see `suspicion`."""


@dataclass(frozen=True)
class PlantingSettings:
    """How the defender's backdoor is planted: the paper's values for CIFAR-10; learning rate and batch size are those of the
    code that it builds on."""

    network: str = ""
    """architecture of a verification network; "" for that of the undefended network"""
    alpha: NotNegative = 1000.0
    """weight of the alignment; larger values weaken the planted backdoor; 2000 on GTSRB"""
    epochs: Count = 10
    """training epochs of a verification network"""
    learning_rate: LearningRate = 0.01
    """constant learning rate of a verification network"""
    optimiser: str = "sgd"
    """optimiser of a verification network: "sgd"; "adam"; or "recipe", trained as an undefended network but
    without smoothed labels, so that learning rate and weight decay have no effect"""
    weight_decay: NotNegative = 1e-4
    """weight decay of a verification network"""
    implant_rate: PositiveShare = 0.1
    """share of all rows that are stamped for training, in (0, 1]"""
    patch_size: Annotated[int, Range(at_least=1, limit=512)] = 2
    """side in pixels of the square in the upper left; 16 on the ImageNet subset"""
    pattern: str = "checkerboard"
    """pattern of the square: "checkerboard" or "white" """
    trigger: str = "patch"
    """the planted trigger: "patch", or "attacker" for the attacker's trigger (the worst case of appendix E, an oracle)"""
    partners: str = "apart"
    """batch in which the images without the stamp are normalised: "apart", one of their own; "together", that of the images
    with the stamp"""
    weak_by: str = "alignment"
    """how the planted backdoor is weakened: "alignment", or "cover" (appendix A): some stamped rows keep their label"""
    cover_rate: Share = 0.2
    """share of the stamped rows that keep their label if `weak_by` is "cover", in [0, 1]"""


@dataclass(frozen=True)
class NbabSettings(PlantingSettings):
    """The planted backdoor, and which verification networks there are."""

    rungs: Annotated[tuple[NotNegative, ...], NotEmpty()] = (1.0,)
    """factors of alpha: one verification network for each. Equal factors are networks with different starts; the paper has one
    network"""
    least_success: Share = 0.05
    """a network is left out if a smaller share of the held-out stamped rows is predicted as K, in [0, 1]"""
    most_success: Share = 0.9
    """a network is left out if a larger share of the held-out stamped rows is predicted as K, in [0, 1]"""


def check_planting(owner: str, settings: PlantingSettings) -> None:
    """Reject invalid settings of the planted backdoor.

    Args:
        owner: whose settings they are, as an error message names it: "defense abm".
        settings: to check.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        owner,
        settings,
        choices={
            "pattern": PATTERNS,
            "trigger": ("patch", "attacker"),
            "partners": ("apart", "together"),
            "weak_by": ("alignment", "cover"),
            "optimiser": (*Optimiser.__args__, RECIPE),
            **({"network": MODELS} if settings.network else {}),
        },
    )


class Verified(NamedTuple):
    """What V verification networks of each of M suspects predict for every row."""

    margins: np.ndarray
    """float32 [M, V, n]: of the stamped row, the logit of class K minus the highest other logit; below 0 it is suspicious"""
    activations: np.ndarray
    """float32 [M, V, n]: of the stamped row, the highest logit other than that of class K"""
    leads: np.ndarray
    """float32 [M, V, n]: of the stamped row, the difference of the two highest logits other than that of class K"""
    implant_success: np.ndarray
    """float64 [M, V]: share of the rows stamped in training that are predicted as K"""
    held_out_success: np.ndarray
    """float64 [M, V]: share of the other rows that are predicted as K with the stamp; nan if there are no others"""
    clean_accuracy: np.ndarray
    """float64 [M, V]: share of all rows that, unstamped, are predicted as their given label"""
    nets: Nets
    """the verification networks, K + 1 classes, stacked [M * V, ...]"""


def make_patch(size: int, pattern: str) -> Stamp:
    """The defender's square: `size` pixels each way in the upper left.

    Args:
        size: at least 1.
        pattern: "checkerboard", black first, or "white".

    Raises:
        ValueError: an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    cells = np.add.outer(np.arange(size), np.arange(size)) % 2 if pattern == "checkerboard" else np.ones((size, size))
    square = (255 * cells).astype(np.uint8)[None, :, :, None]

    def stamp(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        del labels
        stamped = images.copy()
        stamped[:, :size, :size] = square[:, : images.shape[1], : images.shape[2]]
        return stamped

    return stamp


def choose_implants(labels: np.ndarray, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Choose rows to stamp, stratified by label: int32 [m], sorted, m at least 1.

    Args:
        labels: int [n], the given labels.
        rate: share of all rows.
        generator: chooses the rows.
    """
    total = max(1, round(rate * len(labels)))
    order = generator.permutation(len(labels))
    by_label = np.concatenate([order[labels[order] == label] for label in np.unique(labels)])
    # Evenly spaced places in rows sorted by label are balanced over the labels, and their number does not depend on them.
    places = (np.arange(total) * len(labels)) // total
    return np.sort(by_label[places]).astype(np.int32)


def verify(inputs: DefenseInput, settings: PlantingSettings, rungs: Sequence[float] = (1.0,)) -> Verified:
    """Train verification networks on each suspect, as members of one call, and predict every row with the stamp on it.

    Args:
        inputs: the suspects.
        settings: of the planted backdoor; those of a subclass do not change the result.
        rungs: of each of the V networks, the factor of alpha. Each has its own weights and its own stamped rows.

    Raises:
        InputError: an invalid setting.
    """
    check_planting("nbab", settings)
    networks = len(rungs)
    stamps = [_stamp_of(inputs, settings, member) for member in range(len(inputs.keys)) for _ in rungs]
    inputs = inputs.copies(networks)
    num_members, num_rows = inputs.index.shape
    planting = {field.name: getattr(settings, field.name) for field in dataclasses.fields(PlantingSettings)}
    stage = f"nbab {fingerprint(rungs=tuple(rungs), **planting)}"
    pool = np.asarray(inputs.pool)
    implants = np.stack(
        [
            choose_implants(labels, settings.implant_rate, generator)
            for labels, generator in zip(inputs.labels, inputs.generators(f"{stage}: stamped rows"), strict=True)
        ]
    )
    num_implants = implants.shape[1]
    stamped = [
        stamp(pool[index[rows]], labels[rows])
        for stamp, index, labels, rows in zip(stamps, inputs.index, inputs.labels, implants, strict=True)
    ]
    where = len(pool) + np.arange(num_members * num_implants, dtype=np.int32).reshape(num_members, num_implants)
    source = np.take_along_axis(inputs.index, implants, axis=1)
    new_labels = np.full(implants.shape, inputs.num_classes, np.int32)
    alpha = settings.alpha * np.tile(rungs, num_members // networks)[:, None]
    if settings.weak_by == "cover":
        num_covers, alpha = round(settings.cover_rate * num_implants), 0.0 * alpha
        # Evenly spaced, so that the rows that keep their label are balanced over the labels.
        covers = (np.arange(num_covers) * num_implants) // max(num_covers, 1)
        new_labels[:, covers] = np.take_along_axis(inputs.labels, implants[:, covers], axis=1)
    # An adaptive attacker suppresses its backdoor in every training on its rows, so here too.
    suppression, partner = np.zeros((num_members, num_rows), np.float32), inputs.index
    if inputs.attacker is not None:
        suppression = inputs.attacker.suppression
        partner = np.where(suppression > 0, inputs.attacker.partner, inputs.index)
    rows = Rows(
        jnp.asarray(
            np.stack([np.concatenate([inputs.index, where], 1), np.concatenate([partner, source], 1)], -1), jnp.int32
        ),
        {
            "labels": jnp.asarray(np.concatenate([inputs.labels, new_labels], 1), jnp.int32),
            "suppression": jnp.asarray(
                np.concatenate([suppression, np.broadcast_to(alpha, implants.shape)], 1), jnp.float32
            ),
        },
    )
    model = inputs.make_model(settings.network or None, inputs.num_classes + 1)
    config = _training(inputs, settings)
    is_suppressed = np.asarray(rows.targets["suppression"]) > 0
    pairs = most_pairs(config.batch_size, is_suppressed.mean(axis=1).max()) if settings.partners == "together" else 0
    objective = suppressed_cross_entropy(model, config.label_smoothing, pairs)
    if not np.any(rows.targets["suppression"]):
        # Nothing is aligned, so the partners' forward pass would have no effect.
        rows, objective = rows._replace(index=rows.index[..., 0]), None
    with_stamped = dataclasses.replace(inputs, pool=jnp.asarray(np.concatenate([pool, *stamped])))
    nets = with_stamped.train(stage, model, config, rows, objective=objective)
    logits = stamped_logits(inputs, nets, stamps)
    is_own = np.argmax(logits, -1) == inputs.num_classes
    plain = np.argmax(inputs.logits(model, nets.variables, inputs.all_rows()), -1)
    in_training = np.zeros(is_own.shape, bool)
    np.put_along_axis(in_training, implants, True, axis=1)
    num_held = num_rows - num_implants
    held_out = (is_own & ~in_training).sum(1) / num_held if num_held else np.full(num_members, np.nan)
    second, highest = np.moveaxis(np.partition(logits[..., :-1], -2, axis=-1)[..., -2:], -1, 0)
    of_networks = {
        "margins": logits[..., -1] - highest,
        "activations": highest,
        "leads": highest - second,
        "implant_success": (is_own & in_training).sum(1) / num_implants,
        "held_out_success": held_out,
        "clean_accuracy": np.mean(plain == inputs.labels, axis=1),
    }
    return Verified(**{name: apart(values, networks) for name, values in of_networks.items()}, nets=nets)


def _training(inputs: DefenseInput, settings: PlantingSettings) -> TrainConfig:
    """How a verification network is trained."""
    if settings.optimiser == RECIPE:
        # Smoothed labels keep the logits of what is learned best, the poisons, from growing beyond those of clean rows.
        return inputs.config(epochs=settings.epochs, augmentation="none", label_smoothing=0.0)
    return inputs.config(
        epochs=settings.epochs,
        optimiser=settings.optimiser,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augmentation="none",
    )


def _stamp_of(inputs: DefenseInput, settings: PlantingSettings, member: int) -> Stamp:
    trigger = inputs.attacker_triggers[member] if settings.trigger == "attacker" else None
    # A suspect without an attacker has no trigger: it gets the patch.
    return trigger or make_patch(settings.patch_size, settings.pattern)


def stamped_logits(inputs: DefenseInput, nets: Nets, stamps: list[Stamp]) -> np.ndarray:
    """The logits of every row with the defender's trigger on it: float32 [M, n, K + 1].

    Args:
        inputs: the suspects.
        nets: a network for each suspect.
        stamps: the defender's trigger for each suspect.
    """
    pool, logits = np.asarray(inputs.pool), []
    for start in range(0, inputs.index.shape[1], CHUNK):
        images = np.stack(
            [
                stamp(pool[index[start : start + CHUNK]], labels[start : start + CHUNK])
                for stamp, index, labels in zip(stamps, inputs.index, inputs.labels, strict=True)
            ]
        )
        batch_size = inputs.recipe.evaluation_batch_size
        logits.append(inputs.runner.predict_own(nets.model, nets.variables, images, batch_size))
    return np.concatenate(logits, axis=1)


def suspicion(verified: Verified, rank: str) -> np.ndarray:
    """Score the rows: float32 [M, V, n], higher is more suspicious.

    Args:
        verified: predictions of the verification networks.
        rank: "activation": the highest logit other than K's; "suspicious": the same, but rows that are not predicted as K come
            before all others, as in the paper; "margin": how far that logit is above K's; "lead": how far it is above the
            second highest of the same classes.

    Raises:
        ValueError: an unknown rank.
    """
    if rank == "margin":
        return -verified.margins
    if rank == "activation":
        return verified.activations
    if rank == "lead":
        return verified.leads
    if rank == "suspicious":
        gap = np.ptp(verified.activations, axis=-1, keepdims=True) + 1
        return np.where(verified.margins < 0, verified.activations + gap, verified.activations)
    raise ValueError(f"rank {rank!r} is not one of {', '.join(RANKS)}")


def usable(held_out_success: np.ndarray, least: float, most: float) -> np.ndarray:
    """The networks for which the premise may hold: the defender's square is learned, but not dominant.

    Args:
        held_out_success: float [M, V]; NaN, where no row was held out, cannot be checked and counts as usable.
        least, most: the allowed range, in [0, 1].

    Returns:
        bool [M, V]; all networks of a suspect without a usable one are False.
    """
    return ~((held_out_success < least) | (held_out_success > most))


def agreement(scores: np.ndarray, is_usable: np.ndarray) -> np.ndarray:
    """Each row's mean rank over the usable networks of its suspect, or over all if none is usable.

    Args:
        scores: float [M, V, n], higher is more suspicious.
        is_usable: bool [M, V].

    Returns:
        float32 [M, n], in [0, 1]: 1 for a row that every network ranks highest.
    """
    ranks = np.argsort(np.argsort(scores, axis=-1, kind="stable"), axis=-1, kind="stable")
    weights = np.where(is_usable.any(1, keepdims=True), is_usable, True).astype(np.float64)
    mean = np.einsum("mvn,mv->mn", ranks, weights) / weights.sum(1, keepdims=True)
    return (mean / max(scores.shape[-1] - 1, 1)).astype(np.float32)


def isolate(scores: np.ndarray, rate: float) -> np.ndarray:
    """Flag the most suspicious rows.

    Args:
        scores: float [M, n].
        rate: share of all rows to isolate.

    Returns:
        bool [M, n], ceil(rate n) rows of each member.
    """
    count = math.ceil(rate * scores.shape[1] - 1e-9)
    return np.stack([top_rows(of_member, count) for of_member in scores])
