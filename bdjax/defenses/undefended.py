"""No defense: the network of plain training on the suspect rows. It is the baseline of every table."""

from dataclasses import dataclass

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.types import DefenseResult


@dataclass(frozen=True)
class UndefendedSettings:
    """No settings: the network is trained with the run's recipe."""


def run(inputs: DefenseInput, settings: UndefendedSettings) -> DefenseResult:
    """Return the attacked networks."""
    del settings
    return DefenseResult(inputs.attacked.model, inputs.attacked.variables)


UNDEFENDED = Defense(
    name="none",
    title="no defense",
    paper="plain training",
    stage="in training",
    needs=("attacked model",),
    settings=UndefendedSettings(),
    run=run,
)
