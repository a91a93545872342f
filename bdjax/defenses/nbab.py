"""NBAB: find a stronger backdoor with a weaker one of one's own (ABM, Chen et al. 2024, section IV-A, algorithm 1).

The defender plants a backdoor into the suspect rows: a small white square that leads to a class of its own, number K. The
verification network learns it along with everything else, but weakly, since features of stamped images are pulled to those
of the same images without the stamp (equation 2; see `bdjax/attacks/suppression.py`). Then *every* row is stamped. Where the
square is all there is to see, the answer is K; where the attacker's trigger is there too, it drowns the square. So rows
that are not answered by K are suspicious.

The paper leaves open how many rows are stamped in training (here a tenth, balanced over the given labels), which layer is
aligned (here what the last one sees), how a distance is scaled (the mean over features), what colour the square has and how
the suspicious rows become 1 % of the set. A white square cannot be seen on a white corner, where a clean row would fail the
test for that alone, so here it is a checkerboard. And suspicious rows are taken in the order of how
sure the network is of what it answers instead of K, since a backdoor excites its class far more than clean rows do theirs
(the paper's figure 3); by their margin over K, images come first on which the square is hard to see.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.suppression import suppressed_cross_entropy
from bdjax.defenses.contract import DefenseInput, fingerprint
from bdjax.settings import check_values
from bdjax.training.member import Optimiser, Rows
from bdjax.training.stages import Nets

Stamp = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 images [N, H, W, C], labels [N]) -> the same with the defender's trigger."""
CHUNK = 4096
"""Rows of each member that are stamped at a time."""
PATTERNS = ("checkerboard", "white")
RANKS = ("suspicious", "activation", "margin")
"""Orders that rows may be isolated in: see `suspicion`."""


@dataclass(frozen=True)
class NbabSettings:
    """The paper's values for CIFAR-10; its optimiser's rate and batch are those of the code that it builds on."""

    alpha: float = 1000.0
    """weight of the alignment; 2000 on GTSRB"""
    epochs: int = 10
    learning_rate: float = 0.01
    optimiser: str = "sgd"
    """or "adam" """
    weight_decay: float = 1e-4
    implant_rate: float = 0.1
    """share of all rows that are stamped for training"""
    patch_size: int = 2
    """of the white square in the upper left; 16 on the ImageNet subset"""
    pattern: str = "checkerboard"
    """of the square; or "white" """
    trigger: str = "patch"
    """"attacker": the attacker's own, the worst case of appendix E, which takes an oracle"""
    weak_by: str = "alignment"
    """"cover": instead, appendix A: some stamped rows keep their label"""
    cover_rate: float = 0.2
    """of "cover": share of the stamped rows that keep their label"""


def check_planting(owner: str, settings: NbabSettings) -> None:
    """Refuse settings of the planted backdoor that cannot be.

    Args:
        owner: whose they are, as a message says it: "defense abm".
        settings: those.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        owner,
        settings,
        choices={
            "pattern": PATTERNS,
            "trigger": ("patch", "attacker"),
            "weak_by": ("alignment", "cover"),
            "optimiser": Optimiser.__args__,
        },
        at_least={"alpha": 0, "epochs": 1, "patch_size": 1, "cover_rate": 0},
        above={"learning_rate": 0, "implant_rate": 0},
        at_most={"implant_rate": 1, "cover_rate": 1},
    )


class Verified(NamedTuple):
    """What the verification networks say of every row."""

    margins: np.ndarray
    """float32 [M, n]: logit of class K minus the highest other, stamped; below 0 the row fails"""
    activations: np.ndarray
    """float32 [M, n]: that highest other logit"""
    implant_success: np.ndarray
    """float64 [M]: share of the stamped training rows that are answered by K"""
    clean_accuracy: np.ndarray
    """float64 [M]: share of all rows, unstamped, that get their given label"""
    nets: Nets
    """the verification networks, K + 1 classes"""
    predictions: np.ndarray
    """int [M, n]: of the stamped rows"""


def make_patch(size: int, pattern: str) -> Stamp:
    """The defender's square: `size` pixels each way in the upper left.

    Args:
        size: at least 1.
        pattern: "checkerboard", black first, or "white".

    Raises:
        ValueError: if the pattern is not known.
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
    """Rows to stamp, as many of each given label as their share, at least one: int32 [m], sorted.

    Args:
        labels: int [n], as given.
        rate: share of all rows.
        generator: decides which.
    """
    total = max(1, round(rate * len(labels)))
    order = generator.permutation(len(labels))
    by_label = np.concatenate([order[labels[order] == label] for label in np.unique(labels)])
    # Evenly spaced places in rows sorted by label are balanced over the labels, and of a fixed number.
    places = (np.arange(total) * len(labels)) // total
    return np.sort(by_label[places]).astype(np.int32)


def verify(inputs: DefenseInput, settings: NbabSettings, number: int = 0) -> Verified:
    """Train a verification network on each suspect, and put every row to the test.

    Args:
        inputs: the suspects.
        settings: of the planted backdoor.
        number: which of several verification networks: each has its own weights and its own implants.

    Raises:
        InputError: a setting that cannot be.
    """
    check_planting("nbab", settings)
    num_members, num_rows = inputs.index.shape
    stamps = [_stamp_of(inputs, settings, member) for member in range(num_members)]
    pool = np.asarray(inputs.pool)
    implants = np.stack(
        [
            choose_implants(own, settings.implant_rate, np.random.default_rng((number, member)))
            for member, own in enumerate(inputs.labels)
        ]
    )
    num_implants = implants.shape[1]
    stamped = [
        stamp(pool[index[rows]], labels[rows])
        for stamp, index, labels, rows in zip(stamps, inputs.index, inputs.labels, implants, strict=True)
    ]
    where = len(pool) + np.arange(num_members * num_implants, dtype=np.int32).reshape(num_members, num_implants)
    source = np.take_along_axis(inputs.index, implants, axis=1)
    new_labels, alpha = np.full(implants.shape, inputs.num_classes, np.int32), settings.alpha
    if settings.weak_by == "cover":
        num_covers, alpha = round(settings.cover_rate * num_implants), 0.0
        # Evenly spread, so that covers are balanced over the labels as all implants are.
        covers = (np.arange(num_covers) * num_implants) // max(num_covers, 1)
        new_labels[:, covers] = np.take_along_axis(inputs.labels, implants[:, covers], axis=1)
    # What an attacker who weakens its own backdoor does, it does wherever its rows are learnt.
    own_suppression, partner = np.zeros((num_members, num_rows), np.float32), inputs.index
    if inputs.attacker is not None:
        own_suppression = inputs.attacker.suppression
        partner = np.where(own_suppression > 0, inputs.attacker.partner, inputs.index)
    rows = Rows(
        jnp.asarray(
            np.stack([np.concatenate([inputs.index, where], 1), np.concatenate([partner, source], 1)], -1), jnp.int32
        ),
        {
            "labels": jnp.asarray(np.concatenate([inputs.labels, new_labels], 1), jnp.int32),
            "suppression": jnp.asarray(
                np.concatenate([own_suppression, np.full(implants.shape, alpha, np.float32)], 1), jnp.float32
            ),
        },
    )
    model = inputs.make_model(num_classes=inputs.num_classes + 1)
    config = inputs.config(
        epochs=settings.epochs,
        optimiser=settings.optimiser,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augmentation="none",
    )
    stage = f"nbab {fingerprint(number=number, **vars(settings))}"
    larger = dataclasses.replace(inputs, pool=jnp.asarray(np.concatenate([pool, *stamped])))
    nets = larger.train(stage, model, config, rows, objective=suppressed_cross_entropy(model))
    logits = stamped_logits(inputs, nets, stamps)
    predictions = np.argmax(logits, -1)
    plain = np.argmax(inputs.logits(model, nets.variables, inputs.all_rows()), -1)
    return Verified(
        margins=logits[..., -1] - logits[..., :-1].max(-1),
        activations=logits[..., :-1].max(-1),
        implant_success=np.mean(np.take_along_axis(predictions, implants, 1) == inputs.num_classes, axis=1),
        clean_accuracy=np.mean(plain == inputs.labels, axis=1),
        nets=nets,
        predictions=predictions,
    )


def _stamp_of(inputs: DefenseInput, settings: NbabSettings, member: int) -> Stamp:
    own = inputs.attacker_triggers[member] if settings.trigger == "attacker" else None
    # Where there is no attacker there is no trigger to share.
    return own or make_patch(settings.patch_size, settings.pattern)


def stamped_logits(inputs: DefenseInput, nets: Nets, stamps: list[Stamp]) -> np.ndarray:
    """What networks say of every row with the defender's trigger on it: float32 [M, n, K + 1].

    Args:
        inputs: the suspects.
        nets: one network for each.
        stamps: likewise.
    """
    pool, answers = np.asarray(inputs.pool), []
    for start in range(0, inputs.index.shape[1], CHUNK):
        images = np.stack(
            [
                stamp(pool[index[start : start + CHUNK]], labels[start : start + CHUNK])
                for stamp, index, labels in zip(stamps, inputs.index, inputs.labels, strict=True)
            ]
        )
        batch_size = inputs.recipe.evaluation_batch_size
        answers.append(inputs.runner.predict_own(nets.model, nets.variables, images, batch_size))
    return np.concatenate(answers, axis=1)


def suspicion(verified: Verified, rank: str) -> np.ndarray:
    """A number for each row, the higher, the more suspicious: float32 [M, n].

    Args:
        verified: what the networks said.
        rank: "suspicious": rows that fail the test before all others, as in the paper, both in the order of how high the
            highest logit beside K is; "activation": that order alone; "margin": how far that logit is above K's.

    Raises:
        ValueError: if the rank is not known.
    """
    if rank == "margin":
        return -verified.margins
    if rank == "activation":
        return verified.activations
    if rank == "suspicious":
        gap = np.ptp(verified.activations, axis=1, keepdims=True) + 1
        return np.where(verified.margins < 0, verified.activations + gap, verified.activations)
    raise ValueError(f"rank {rank!r} is not one of {', '.join(RANKS)}")


def isolate(scores: np.ndarray, rate: float) -> np.ndarray:
    """The most suspicious rows.

    Args:
        scores: float [M, n].
        rate: share of all rows to isolate.

    Returns:
        bool [M, n], ceil(rate n) of each member.
    """
    count = math.ceil(rate * scores.shape[1] - 1e-9)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    flags = np.zeros(scores.shape, bool)
    np.put_along_axis(flags, order, True, axis=1)
    return flags
