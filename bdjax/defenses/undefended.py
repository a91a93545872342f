"""No defense: the network that plain training on the suspect rows gives. What every other row of a table is held against."""

from dataclasses import dataclass

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.types import DefenseResult


@dataclass(frozen=True)
class UndefendedSettings:
    """Nothing to choose: the run's own recipe."""


def run(inputs: DefenseInput, settings: UndefendedSettings) -> DefenseResult:
    """Hand the attacked networks on."""
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
