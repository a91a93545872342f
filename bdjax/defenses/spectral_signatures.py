"""Spectral signatures: poisoned rows stick out along the first principal direction of their class (Tran et al. 2018).

If some rows of a class carry a trigger, the network has to tell the class by two things, and its embeddings are a mixture of
two groups. When the groups are far enough apart for their spread, the direction in which the class varies most is the one
between them, and the minority is what lies far out along it.

    R_c: the embeddings of class c, its mean taken off;  v: the first right singular vector of R_c
    score of a row = ((r - mean) . v)^2                                                         (Tran et al., algorithm 1)

The highest scores of every class are left out, for nobody says which class is the target, and a network is trained on the
rest. Which share is left out has to be assumed: the paper knows a bound on the number of poisons, which no defender does.

A widely used benchmark's code projects the embeddings as they are on the vector that it found from the centred ones; then a
row scores for its norm, and the sign of v, which means nothing, decides which end of a class looks suspicious. Here both are
centred.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.filtering import retrained
from bdjax.settings import check_values
from bdjax.types import DefenseResult, Detection

NAME = "spectral_signatures"
BEYOND = 1.5  # the paper leaves out half as many again as there may be poisons


@dataclass(frozen=True)
class SpectralSignaturesSettings:
    """What is taken off each class."""

    rule: Literal["percentile", "poison_rate"] = "percentile"
    """percentile: what scores above it in its class, as in BackdoorBench; poison_rate: 1.5 times as many rows of each class
    as there would be poisons, as in the paper"""
    percentile: float = 85.0
    """of the scores of a class; 15 % of it is what the paper takes off where a tenth of the target class is poisoned"""
    poison_rate: float = 0.01
    """assumed share of all rows that are poisoned; the paper knows it, and has 500 of 50,000. No more than half of a class is
    left out: a higher rate would leave nothing of the other classes"""


def check(settings: SpectralSignaturesSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        f"defense {NAME}",
        settings,
        choices={"rule": ("percentile", "poison_rate")},
        at_least={"percentile": 0, "poison_rate": 0},
        at_most={"percentile": 100},
        below={"poison_rate": 1},
    )


def spectral_scores(embeddings: np.ndarray) -> np.ndarray:
    """Squared projections of one class on the direction in which it varies most (algorithm 1, line 8).

    Args:
        embeddings: float [n, d], the rows of one class.

    Returns:
        float64 [n], at least 0. They do not depend on the sign of the direction, nor on a shift of all rows.
    """
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(axis=0)
    # The right singular vectors of the rows are the eigenvectors of their d x d scatter, in ascending order.
    _, directions = np.linalg.eigh(centred.T @ centred)
    return (centred @ directions[:, -1]) ** 2


def most_suspicious(scores: np.ndarray, num_rows: int, settings: SpectralSignaturesSettings) -> np.ndarray:
    """Which rows of one class are left out.

    Args:
        scores: float [n], of one class.
        num_rows: of all classes together.
        settings: the rule.

    Returns:
        bool [n]. Rows that tie with the first one to stay are kept, so that their order is of no weight.
    """
    if settings.rule == "percentile":
        return scores > np.percentile(scores, settings.percentile)
    count = min(int(BEYOND * settings.poison_rate * num_rows), len(scores) // 2)
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
        Flags bool [n], scores float32 [n], and the largest share of a class's variance that its first direction holds.
    """
    flags, scores, largest = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32), 0.0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        own = spectral_scores(embeddings[rows])
        scores[rows] = own
        flags[rows] = most_suspicious(own, len(labels), settings)
        spread = len(rows) * np.var(embeddings[rows].astype(np.float64), axis=0).sum()
        largest = max(largest, own.sum() / spread) if spread > 0 else largest
    return flags, scores, largest


def detect(inputs: DefenseInput, settings: SpectralSignaturesSettings) -> Detection:
    """Flag the far end of every class.

    Args:
        inputs: the suspects; used are their training sets and attacked networks.
        settings: the rule.

    Returns:
        Flags and scores of all rows.

    Raises:
        InputError: a setting that cannot be.

    References:
        Tran et al. 2018, algorithm 1.
    """
    check(settings)
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, inputs.all_rows())
    found = [find_poisons(*own, settings) for own in zip(embeddings, inputs.labels, strict=True)]
    flags, scores, largest = (np.stack(each) for each in zip(*found, strict=True))
    facts = {"rows left out": flags.sum(axis=1), "largest share of variance in one direction": largest}
    return Detection(flags, scores, facts)


def run(inputs: DefenseInput, settings: SpectralSignaturesSettings) -> DefenseResult:
    """`detect`, and train on what is left.

    Raises:
        InputError: a setting that cannot be.
    """
    found = detect(inputs, settings)
    told = f"{settings.rule} {getattr(settings, settings.rule):g}"
    return retrained(inputs, f"spectral signatures: {told}", found)


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
)
