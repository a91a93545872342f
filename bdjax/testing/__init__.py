"""The contracts of attacks, defenses, datasets and networks as functions, for tests of plugins; bdjax's own tests call them.

Each `check_...` takes an entry as a registry has it, works on a few small generated images without a network connection, and
raises `ContractError` for the first promise that the entry breaks.
"""

from bdjax.testing.attacks import check_attack
from bdjax.testing.datasets import check_dataset
from bdjax.testing.defenses import check_defense
from bdjax.testing.failure import ContractError
from bdjax.testing.models import check_model

__all__ = ["ContractError", "check_attack", "check_dataset", "check_defense", "check_model"]
