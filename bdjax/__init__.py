"""bdjax: backdoor attacks and defenses on image classifiers, in JAX.

This module exports the Python interface (`bdjax.api`): datasets, functions and registries. The subpackages, in the order that
data flows through them: `datasets`, `triggers`, `models`, `training`, `attacks`, `defenses`, `inspection`, `exchange`,
`evaluation`, `run`, `reporting`, `workflows`. Each imports only from those before it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdjax.api import (
        ATTACKS,
        DEFENSES,
        MODELS,
        Classifier,
        Dataset,
        InputError,
        PoisonedDataset,
        ReadOptions,
        audit_model,
        dataset,
        defend,
        detect,
        evaluate,
        load,
        load_model,
        load_suspect,
        poison,
        save_model,
        ta_kd,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "ATTACKS",
    "DEFENSES",
    "MODELS",
    "Classifier",
    "Dataset",
    "InputError",
    "PoisonedDataset",
    "ReadOptions",
    "audit_model",
    "dataset",
    "defend",
    "detect",
    "evaluate",
    "load",
    "load_model",
    "load_suspect",
    "poison",
    "save_model",
    "ta_kd",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import `bdjax.api` on first use, so that a script's --version does not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'bdjax' has no attribute {name!r}")
    globals()[name] = getattr(import_module("bdjax.api"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
