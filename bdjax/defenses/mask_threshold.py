"""Two ways to choose the weight m of RobustKD's masks: by the defender, on held-out clean rows, or by an oracle.

Both compare masks that were trained for each m. What differs between them depends on the form (`robust_kd.apply_mask`):
- "added" (equation 7): only where the masks start. Enough training makes them equal, so that no choice is left.
- "mixed" and "elementwise" (equation 15): how much of the features is replaced. A larger m has a lower variance and, from some
  m on, a lower accuracy; the choice on held-out rows takes the largest m that accuracy allows.
Held-out clean rows do not show how much of the backdoor is left. The oracle, which is the paper's algorithm 1, measures that by
the students' ASR, which takes the attacker's trigger.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses import fkd
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.distillation import TeacherNetworks
from bdjax.defenses.fkd import FkdSettings
from bdjax.training.member import Rows
from bdjax.types import PyTree


def repeat(tree: PyTree, count: int) -> PyTree:
    """Repeat each stacked member `count` times in a row: [M, ...] -> [M count, ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)


def split_rows(inputs: DefenseInput, share: float) -> tuple[Rows, Rows]:
    """Split each suspect's clean rows into those kept and a held-out share: leaves [M, n - h] and [M, h]."""
    rows = inputs.clean_rows()
    held_out, kept = [], []
    for key in inputs.keys_for("RobustKD: held-out rows"):
        order = splits.permutation(key, rows.index.shape[1])
        count = max(1, round(share * len(order)))
        held_out.append(np.sort(order[:count]))
        kept.append(np.sort(order[count:]))

    def take(which: list[np.ndarray]) -> Rows:
        which = jnp.asarray(np.stack(which))
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, which, axis=1), rows)

    return take(kept), take(held_out)


def choose_by_validation(accuracy: np.ndarray, variances: np.ndarray, plain: np.ndarray, allowed: float) -> np.ndarray:
    """The threshold of least variance among those that lose at most the allowed accuracy; if all lose more, the one that
    loses least.

    Args:
        accuracy: float [M, T], of masked networks.
        variances: float [M, T], feature variance of masked networks.
        plain: float [M], accuracy without masks.
        allowed: largest allowed loss of accuracy.

    Returns:
        int [M], index of the chosen threshold.
    """
    is_allowed = accuracy >= plain[:, None] - allowed - 1e-9
    least = np.argmin(np.where(is_allowed, variances, np.inf), axis=1)
    return np.where(is_allowed.any(axis=1), least, np.argmax(accuracy, axis=1))


def choose_by_oracle(
    inputs: DefenseInput, settings: FkdSettings, teachers: TeacherNetworks, num: int, kept: Rows, held_out: Rows
) -> np.ndarray:
    """The threshold whose student has the largest accuracy minus ASR on the held-out rows (algorithm 1).

    Args:
        inputs: M suspects, with the attackers' triggers.
        settings: of the students.
        teachers: M T masked networks: all thresholds of the first suspect, then of the second.
        num: T.
        kept: rows to distil on, leaves [M, n].
        held_out: rows to measure on, leaves [M, h].

    Returns:
        int [M], index of the chosen threshold.
    """
    # The students of one suspect share its key; everything else they are trained from is passed explicitly.
    repeated = dataclasses.replace(inputs, keys=repeat(inputs.keys, num), knowledge={})
    students = fkd.run_from(repeated, "RobustKD for the oracle", settings, teachers, rows=repeat(kept, num))
    index, labels = np.asarray(held_out.index), np.asarray(held_out.targets["labels"])
    pool = np.asarray(inputs.pool)
    plain = np.concatenate([pool[member_rows] for member_rows in index for _ in range(num)]).reshape(
        len(index) * num, -1, *pool.shape[1:]
    )
    triggered = plain.copy()
    for i, trigger in enumerate(inputs.attacker_triggers):
        if trigger is not None:
            triggered[i * num : (i + 1) * num] = trigger(pool[index[i]], labels[i])[None]
    batch_size = inputs.recipe.evaluation_batch_size
    clean, backdoor = (
        np.argmax(inputs.runner.predict_own(students.model, students.variables, images, batch_size), -1)
        for images in (plain, triggered)
    )
    gain = (clean.reshape(len(index), num, -1) == labels[:, None, :]).mean(-1)
    for i, rule in enumerate(inputs.attacker_rules):
        if rule is not None:
            victims, wanted = rule.victims(labels[i]), rule.wanted(labels[i])
            succeeded = backdoor.reshape(len(index), num, -1)[i] == wanted[None, :]
            gain[i] -= succeeded[:, victims].mean(-1)
    return np.argmax(gain, axis=1)
