"""How a detector becomes a defense: train from scratch on the rows that are not flagged."""

from collections.abc import Sequence

import numpy as np

from bdjax.defenses.contract import DefenseInput, labelled
from bdjax.training.stages import Nets
from bdjax.types import DefenseResult, Detection


def kept_rows(flags: np.ndarray, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """The row numbers that each member keeps, padded to the same length by repeating some of them.

    The members of a call need the same number of rows, but detectors flag different numbers. A member that keeps fewer rows
    than another sees some of its rows more than once per epoch; no row is lost.

    Args:
        flags: bool [M, n]; a member whose rows are all flagged keeps all of them.
        generators: of each member, chooses the repeated rows.

    Returns:
        int32 [M, m], where m is the largest number of rows that a member keeps.
    """
    flags = np.where(flags.all(axis=1, keepdims=True), False, flags)
    size = int((~flags).sum(axis=1).max())
    rows = []
    for member_flags, generator in zip(flags, generators, strict=True):
        kept = np.flatnonzero(~member_flags)
        rounds = [kept] * (size // len(kept))
        rest = generator.choice(kept, size % len(kept), replace=False)
        rows.append(np.concatenate([*rounds, rest]))
    return np.stack(rows).astype(np.int32)


def retrain_without(inputs: DefenseInput, stage: str, flags: np.ndarray) -> Nets:
    """Train networks from scratch on the rows that are not flagged, by the recipe of undefended networks.

    Args:
        inputs: the suspects.
        stage: name of the stage, for checkpoints.
        flags: bool [M, n].
    """
    rows = kept_rows(flags, inputs.generators(f"{stage}: repeated rows"))
    index, labels = (np.take_along_axis(array, rows, axis=1) for array in (inputs.index, inputs.labels))
    return inputs.train(stage, inputs.make_model(), inputs.recipe, labelled(index, labels))


def retrained(inputs: DefenseInput, stage: str, found: Detection) -> DefenseResult:
    """A detector's result as a defense: networks trained on the rows that it did not flag.

    Args:
        inputs: the suspects.
        stage: name of the stage, for checkpoints.
        found: the detector's result.
    """
    return as_result(retrain_without(inputs, stage, found.flags), found)


def as_result(nets: Nets, found: Detection) -> DefenseResult:
    """Networks that were trained because of a detector's result, with all that it says of the rows."""
    return DefenseResult(
        nets.model,
        nets.variables,
        found.flags,
        found.scores,
        found.facts,
        found.pictures,
        found.not_tested,
        found.warnings,
    )
