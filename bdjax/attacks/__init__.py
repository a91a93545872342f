"""Attacks: how a trigger gets into a model.

`label_rules` says which rows may be poisoned and what they are relabelled to, `poisoning` poisons a dataset, and each
method that needs more has its own file.
"""

from bdjax.attacks.label_rules import LabelRule, all_to_all, all_to_one, clean_label, label_map
from bdjax.attacks.poisoning import poison, poisoned_rows, select_rows
from bdjax.attacks.providers import (
    ProviderPool,
    ProviderTriggers,
    make_provider_triggers,
    poison_providers,
    provider_trigger_types,
)

__all__ = [
    "LabelRule",
    "ProviderPool",
    "ProviderTriggers",
    "all_to_all",
    "all_to_one",
    "clean_label",
    "label_map",
    "make_provider_triggers",
    "poison",
    "poison_providers",
    "poisoned_rows",
    "provider_trigger_types",
    "select_rows",
]
