"""BAB: Backdoor Against Backdoor, several verification networks vote on every row (Chen et al. 2023, AISafety workshop).

The predecessor of NBAB (`nbab.py`): each of ten verification networks learns the defender's backdoor from a different set of
stamped rows, and nothing keeps it weak. A row is left out if some of the networks do not predict the defender's class for it
with the defender's trigger; the classifier is then trained from scratch on the rest.

Only the paper's front matter was available; this follows the description by ABM's authors. They do not say how many networks
must object. The clean accuracy of BAB in ABM's table (77 % of 83 %) suggests one; half of them is the default.
"""

import math
from dataclasses import dataclass

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.defenses.filtering import retrain_without
from bdjax.defenses.nbab import PlantingSettings, check_planting, verify
from bdjax.settings import Amount, Members, NotNegative, check_values
from bdjax.types import DefenseResult


@dataclass(frozen=True)
class BabSettings(PlantingSettings):
    """ABM's settings for BAB; those of the planted backdoor are NBAB's, without the alignment."""

    alpha: NotNegative = 0.0
    """weight of the alignment"""
    networks: Members = 10
    """number of verification networks"""
    objections: Amount = 0
    """networks that must object to a row for it to be left out; 0 for half of them, rounded up"""


def check(settings: BabSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_planting("defense bab", settings)
    check_values("defense bab", settings, at_most={"objections": settings.networks})


def count_objections(inputs: DefenseInput, settings: BabSettings) -> tuple[np.ndarray, np.ndarray]:
    """Count the verification networks that do not predict the defender's class.

    Returns:
        Objections, int [M, n]; and each row's lowest margin for that class, float32 [M, n], to order rows of equal counts.
    """
    margins = verify(inputs, settings, (1.0,) * settings.networks).margins
    return np.sum(margins < 0, axis=1), margins.min(axis=1)


def run(inputs: DefenseInput, settings: BabSettings) -> DefenseResult:
    """Vote, leave out the rows that were objected to, and train from scratch."""
    objections, margins = count_objections(inputs, settings)
    flags = objections >= (settings.objections or math.ceil(settings.networks / 2))
    nets = retrain_without(inputs, f"bab: retrained {fingerprint(**vars(settings))}", flags)
    # Squeezed into (-1, 1), so that margins only order rows of equal counts.
    squeezed = -margins / (1 + np.abs(margins))
    return DefenseResult(
        nets.model,
        nets.variables,
        flags=flags,
        scores=(objections + 0.5 * squeezed).astype(np.float32),
        facts={"rows objected to by any": (objections > 0).mean(axis=1)},
    )


BAB = Defense(
    name="bab",
    title="BAB",
    paper="Chen et al. 2023, BAB: A novel algorithm for training clean model based on poisoned data",
    stage="in training",
    needs=("training set",),
    more_needs=lambda settings: ("attacker's trigger",) if settings.trigger == "attacker" else (),
    settings=BabSettings(),
    run=run,
    check=check,
    changes={
        "quick": {"optimiser": "adam", "learning_rate": 3e-3, "networks": 3, "epochs": 6},
        "speedrun": {"optimiser": "recipe", "epochs": 3},
    },
)
