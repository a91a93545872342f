"""The groups in which --help lists the flags of a command, the common ones first."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from bdjax.settings import kinds_of


class Group(NamedTuple):
    """A group of flags."""

    about: str
    """what is in it, in a line"""
    fields: tuple[str, ...]
    """names of fields in the order of the help text; "audit_model.model" is the field of the configuration in that module
    alone, where the name means something else elsewhere"""


def _group(about: str, fields: str) -> Group:
    """A group of fields that are listed as words."""
    return Group(about, tuple(fields.split()))


GROUPS = {
    "data": _group(
        "What the run is about, and how much of it.",
        """
        audit_model.model audit_model.members teachers teacher dataset preset scale seeds train_rows test_rows
        image_size data_dir image_column label_column like clean_data clean_share clean_per_class clean_rows
        search_rows held_out_rows auxiliary_fraction validation_fraction outputs skip_unreadable allow_empty_classes
        seed shapes
        """,
    ),
    "attack": _group(
        "What the attackers do, where there are any.",
        """
        attack attacks target poison_rate poison_rate_of label_rule change costly_seeds num_teachers
        provider_fraction num_similar similarity blend_opacity minimum_contrast
        """,
    ),
    "training": _group(
        "The networks, and how they are trained.",
        """
        model clean_model teacher_model aggregated_model student_model student surrogate width widths epochs
        batch_size recipe optimiser learning_rate schedule steps weight_decay augmentation attack_augmentation
        fine_tuning_epochs fine_tuning_learning_rate controlled_epochs surrogate_epochs keep_last_batch
        evaluation_batch_size plateau_factor plateau_patience plateau_threshold
        """,
    ),
    "defense": _group(
        "What the defender does.",
        """
        study defenses controls search_epochs search_patience search_batch_size random_triggers queries
        sensitivity loss_gap defense_epochs
        defense_batch_size defense_recipe defense_learning_rate defense_schedule defense_weight_decay temperature
        alpha direction aggregation trim views vote_space tie
        """,
    ),
    "engine": _group(
        "How it is computed; results differ by rounding only.",
        """
        layout lowering compute_dtype member_group suspects_at_once teacher_batch query_batch probe_seconds members
        rows rounds seconds_per_turn time_limit compile_limit target_accuracy forms executor workers gpus
        """,
    ),
    "limits": _group(
        "What a verdict.json is compared with.",
        """
        verdict max_asr min_cda require_verdict method
        """,
    ),
    "output": _group(
        "What is written, and where.",
        """
        output format metrics plan save_models save_poisoned export copy_files evidence tensorboard
        """,
    ),
}
OTHER = "other"
"""The group of a field that no group has."""


def grouped(settings: type, left_out: Sequence[str] = ()) -> dict[str, list[str]]:
    """The fields of a configuration by group, without groups that it has no field of.

    Args:
        settings: a dataclass.
        left_out: fields that are in no group.
    """
    module = settings.__module__.rpartition(".")[2]
    waiting = [name for name in kinds_of(settings) if name not in left_out]
    found: dict[str, list[str]] = {}
    for title, group in GROUPS.items():
        others = {field for other in GROUPS.values() for field in other.fields if other is not group}
        for field in group.fields:
            owner, _, name = field.rpartition(".")
            if name in waiting and (owner == module if owner else f"{module}.{name}" not in others):
                waiting.remove(name)
                found.setdefault(title, []).append(name)
    return found | ({OTHER: waiting} if waiting else {})


def documentation(settings: type) -> dict[str, str]:
    """Field of a dataclass -> the text below it in the source, on one line; inherited ones included."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(settings.__mro__)):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # a wheel may be installed without its sources
            continue
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(text.value.value.split())
    return found
