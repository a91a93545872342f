"""Spectral signatures: poisoned rows are outliers along the first principal direction of their class (Tran et al. 2018).

If some rows of a class carry a trigger, the network recognises the class by two features, and its embeddings are a mixture of
two groups. If the groups are far apart relative to their spread, the direction of largest variance is the one between them,
and the minority lies far out along it.

    R_c: the centred embeddings of class c;  v: the first right singular vector of R_c
    score of a row = ((r - mean) . v)^2                                                         (Tran et al., algorithm 1)

The rows with the highest scores of every class are left out, since the target class is unknown, and a network is trained on
the rest. Which share is left out has to be assumed: the paper uses a bound on the number of poisons, which no defender knows.

A widely used benchmark's code computes v from the centred embeddings but projects the uncentred ones on it; then a row's score
depends on its norm, and the arbitrary sign of v decides which end of a class looks suspicious. Here both are centred.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, Facts, limits, too_few, unless_finite
from bdjax.defenses.filtering import retrained
from bdjax.settings import Percentile, ShareBelowOne, check_values
from bdjax.types import DefenseResult, Detection, NotTested

NAME = "spectral_signatures"
LEAST_ROWS = 3  # of a class: two rows are equally far from their mean, so neither is an outlier
MARGIN = 1.5  # the paper leaves out this many times the assumed number of poisons


@dataclass(frozen=True)
class SpectralSignaturesSettings:
    """Which rows of each class are left out."""

    rule: Literal["percentile", "poison_rate"] = "percentile"
    """which rows of each class are left out: "percentile" (scores above that percentile, as in BackdoorBench) or "poison_rate"
    (1.5 times the assumed number of poisons, as in the paper)"""
    percentile: Percentile = 85.0
    """percentile of a class's scores, in [0, 100]; 85 leaves out 15 %, as the paper does if a tenth of the class is poisoned"""
    poison_rate: ShareBelowOne = 0.01
    """assumed share of all rows that are poisoned, in [0, 1); the paper knows it (500 of 50,000). At most half of a class is
    left out, so that a high rate does not remove the other classes"""


def check(settings: SpectralSignaturesSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        f"defense {NAME}",
        settings,
        choices={"rule": ("percentile", "poison_rate")},
    )


def least(settings: SpectralSignaturesSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    total = int(facts.rows.sum())
    if settings.rule == "percentile" and settings.percentile >= 100:
        return NotTested("flags no row, whatever the rows are: none is above percentile 100")
    if settings.rule == "poison_rate" and int(MARGIN * settings.poison_rate * total) < 1:
        if not settings.poison_rate:
            return NotTested("flags no row, whatever the rows are: poison_rate is 0")
        needed = math.ceil(1 / (MARGIN * settings.poison_rate))
        return NotTested(
            f"needs at least {needed:,} rows: {MARGIN:g} times poison_rate {settings.poison_rate:g} of {total:,} is less than "
            "one row"
        )
    reason = f"needs at least {LEAST_ROWS} rows of a class: two rows are equally far from their mean"
    return limits(facts, too_few(facts.rows, LEAST_ROWS), reason)


def spectral_scores(embeddings: np.ndarray) -> np.ndarray:
    """Squared projections of one class on its direction of largest variance (algorithm 1, line 8).

    Args:
        embeddings: float [n, d], the rows of one class.

    Returns:
        float64 [n], at least 0. They do not depend on the sign of the direction, nor on a shift of all rows.
    """
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(axis=0)
    # The right singular vectors of the rows are the eigenvectors of their d x d scatter matrix, here in ascending order.
    _, directions = np.linalg.eigh(centred.T @ centred)
    return (centred @ directions[:, -1]) ** 2


def most_suspicious(scores: np.ndarray, num_rows: int, settings: SpectralSignaturesSettings) -> np.ndarray:
    """Which rows of one class are left out.

    Args:
        scores: float [n], of one class.
        num_rows: number of rows of all classes together.
        settings: the rule.

    Returns:
        bool [n]. Rows tied with the highest score that stays are kept too, so the order of rows does not matter.
    """
    if settings.rule == "percentile":
        return scores > np.percentile(scores, settings.percentile)
    count = min(int(MARGIN * settings.poison_rate * num_rows), len(scores) // 2)
    return scores > np.sort(scores)[::-1][count]


def find_poisons(
    embeddings: np.ndarray, labels: np.ndarray, settings: SpectralSignaturesSettings
) -> tuple[np.ndarray, np.ndarray, float]:
    """Score and flag the rows of one training set, class by class.

    Args:
        embeddings: float32 [n, d].
        labels: int32 [n].
        settings: the rule.

    Returns:
        Flags bool [n], scores float32 [n], and the largest share of a class's variance along its first direction.
    """
    flags, scores, largest = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32), 0.0
    if unless_finite(embeddings).reason:
        return flags, scores, largest
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        class_scores = spectral_scores(embeddings[rows])
        scores[rows] = class_scores
        if len(rows) >= LEAST_ROWS:  # of two rows, rounding would decide
            flags[rows] = most_suspicious(class_scores, len(labels), settings)
        spread = len(rows) * np.var(embeddings[rows].astype(np.float64), axis=0).sum()
        largest = max(largest, class_scores.sum() / spread) if spread > 0 else largest
    return flags, scores, largest


def detect(inputs: DefenseInput, settings: SpectralSignaturesSettings) -> Detection:
    """Flag the outliers of every class.

    Args:
        inputs: the suspects; reads their training sets and attacked networks.
        settings: the rule.

    Returns:
        Flags and scores of all rows.

    Raises:
        InputError: an invalid setting.

    References:
        Tran et al. 2018, algorithm 1.
    """
    check(settings)
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, inputs.all_rows())
    found = [find_poisons(*arrays, settings) for arrays in zip(embeddings, inputs.labels, strict=True)]
    flags, scores, largest = (np.stack(values) for values in zip(*found, strict=True))
    facts = {"rows left out": flags.sum(axis=1), "largest share of variance in one direction": largest}
    return Detection(flags, scores, facts, not_tested=tuple(map(unless_finite, embeddings)))


def run(inputs: DefenseInput, settings: SpectralSignaturesSettings) -> DefenseResult:
    """`detect`, then train on the rows that are not flagged.

    Raises:
        InputError: an invalid setting.
    """
    found = detect(inputs, settings)
    return retrained(inputs, f"spectral signatures: {settings.rule} {getattr(settings, settings.rule):g}", found)


SPECTRAL_SIGNATURES = Defense(
    name=NAME,
    title="spectral signatures",
    paper="Tran et al. 2018, Spectral Signatures in Backdoor Attacks",
    stage="before training",
    needs=("training set", "attacked model"),
    settings=SpectralSignaturesSettings(),
    run=run,
    detect=detect,
    check=check,
    least=least,
)
