"""What evidence is about, beside the numbers in results.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.reporting.report import Verdict
from bdjax.types import Dataset


class Flagged(NamedTuple):
    """The rows that a detector or a defense flags in a training set whose ground truth is unknown."""

    title: str
    """of the detector: "VBD" """
    dataset: Dataset
    """n rows"""
    flags: np.ndarray
    """bool [n]"""
    scores: np.ndarray | None
    """float [n], higher for more suspicious rows; None for a method without scores"""


class Subject(NamedTuple):
    """What a workflow knows and results.json has not."""

    parts: Mapping[str, Dataset]
    """what the rows are ("training data") -> the rows"""
    flagged: Sequence[Flagged] = ()
    asr_rows: Mapping[str, int] = {}
    """attack -> the test rows that its ASR is a share of; of several triggers, those of the one with the fewest"""
    suspects: Mapping[str, str] = {}
    """audited or third-party model -> SHA-256 of what decides its answers"""
    methods: tuple[str, ...] = ()
    """base names of the methods that the run is about; without any of them on the command
    line, all but the baseline are"""
    compared_with: str | None = None
    """the method that words compare the others with, which has no word itself; None if that is no defense"""
    word_of: Callable[[str, str], str | None] = lambda attack, method: None
    """(attack, method) -> the word for what became of the backdoor, or for the detection; None if that is unknown"""


class Facts(NamedTuple):
    """The run that the evidence is from."""

    experiment: str
    title: str
    command: str
    """that repeats it"""
    settings: Mapping[str, Any]
    """every setting that numbers depend on"""
    record: Mapping[str, Any]
    """contents of config.json: versions, revision, hardware"""
    verdict: Verdict
    time: str
    """ISO 8601, UTC"""
    files: Mapping[str, str]
    """file of the run -> SHA-256"""
    networks: Mapping[str, Mapping[str, Any]]
    """folder of a network that the run has left -> contents of its model.json"""
