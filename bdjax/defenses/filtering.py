"""What every detector does with its flags: leave the flagged rows out, and train from scratch on what is left."""

import numpy as np

from bdjax.defenses.contract import DefenseInput, labelled
from bdjax.training.stages import Nets
from bdjax.types import DefenseResult, Detection


def kept_rows(flags: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Row numbers of one length for all members: all that a member keeps, filled up with some of them again.

    Members of one call have equally many rows, but detectors flag as many as they please. The members that keep fewest
    see some of their rows twice in an epoch; none is lost.

    Args:
        flags: bool [M, n]; a member whose rows are all flagged keeps them all.
        generator: chooses what is repeated.

    Returns:
        int32 [M, m], m the most rows that any member keeps.
    """
    flags = np.where(flags.all(axis=1, keepdims=True), False, flags)
    size = int((~flags).sum(axis=1).max())
    rows = []
    for own in flags:
        kept = np.flatnonzero(~own)
        rounds = [kept] * (size // len(kept))
        rest = generator.choice(kept, size % len(kept), replace=False)
        rows.append(np.concatenate([*rounds, rest]))
    return np.stack(rows).astype(np.int32)


def retrain_without(inputs: DefenseInput, stage: str, flags: np.ndarray) -> Nets:
    """Train from scratch, as an undefended network trains, on the rows that are not flagged.

    Args:
        inputs: the suspects.
        stage: its name, for checkpoints.
        flags: bool [M, n].
    """
    rows = kept_rows(flags, np.random.default_rng(0))
    index, labels = (np.take_along_axis(each, rows, axis=1) for each in (inputs.index, inputs.labels))
    return inputs.train(stage, inputs.make_model(), inputs.recipe, labelled(index, labels))


def retrained(inputs: DefenseInput, stage: str, found: Detection) -> DefenseResult:
    """What a detector amounts to as a defense: networks trained on the rows that it did not flag.

    Args:
        inputs: the suspects.
        stage: as `retrain_without` has it.
        found: what was detected.
    """
    nets = retrain_without(inputs, stage, found.flags)
    return DefenseResult(nets.model, nets.variables, found.flags, found.scores, found.facts, found.pictures)
