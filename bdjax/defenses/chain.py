"""Chains of defenses, such as "fine_tuning+fkd": each defense starts from the networks that the one before returned.

The first defense shares its checkpoints with the same defense outside the chain, so it is trained once however many chains
begin with it. Each later defense has its own folder, named after all defenses before it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bdjax.defenses import contract
from bdjax.defenses.contract import Defense, DefenseInput, Facts, fingerprint
from bdjax.errors import InputError
from bdjax.training.stages import Nets
from bdjax.types import DefenseResult, Model, NotTested

LINK = "+"
"""The separator of a chain's defenses on the command line."""


class ChainLink(NamedTuple):
    """A defense of a chain, with its settings."""

    defense: Defense
    settings: Any
    title: str
    """its title outside a chain, such as "FT (epochs 5)" """


def make_chain(parts: Sequence[ChainLink]) -> Defense:
    """Combine several defenses into one.

    Args:
        parts: two or more, in the order in which they run.

    Returns:
        A defense with the needs of all parts, whose settings are the tuple of their settings.

    Raises:
        InputError: no other defense can start from a part's result.
    """
    for part in parts[:-1]:
        if part.defense.stage == "at test time":
            raise InputError(
                f"defense {part.defense.name} works at test time and returns no network for the next defense to start "
                "from: it can only be the last of a chain"
            )
    needs = dict.fromkeys(need for part in parts for need in part.defense.needs_with(part.settings))
    return Defense(
        name=LINK.join(part.defense.name for part in parts),
        title=", then ".join(part.title for part in parts),
        paper="; then ".join(part.defense.paper for part in parts),
        stage=parts[-1].defense.stage,
        needs=tuple(needs),
        settings=tuple(part.settings for part in parts),
        run=lambda inputs, settings: run(inputs, [part.defense for part in parts], settings),
        least=lambda settings, facts: least([part.defense for part in parts], settings, facts),
        network_after=lambda settings, *network: network_after([part.defense for part in parts], settings, *network),
    )


def network_after(
    defenses: Sequence[Defense],
    settings: Sequence[Any],
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
) -> Model:
    """The architecture that a chain returns: `Defense.network_after` of each part applied to that of the part before."""
    for defense, defense_settings in zip(defenses, settings, strict=True):
        if defense.network_after:
            attacked = defense.network_after(defense_settings, attacked, make_model, image_shape)
    return attacked


def least(defenses: Sequence[Defense], settings: Sequence[Any], facts: Facts) -> NotTested:
    """What the parts cannot test: see `Defense.least`. If a part can test nothing, neither can the chain."""
    reason, classes = "", {}
    for defense, defense_settings in zip(defenses, settings, strict=True):
        found = defense.least(defense_settings, facts) if defense.least else NotTested()
        reason = reason or (f"{defense.title} {found.reason}" if found.reason else "")
        classes |= found.classes
    return NotTested(reason, classes)


def run(inputs: DefenseInput, defenses: Sequence[Defense], settings: Sequence[Any]) -> DefenseResult:
    """Run defenses in order, each on the networks that the one before returned and on nothing else beyond its own needs.

    Args:
        inputs: the suspects. All parts use the same keys: what a part draws does not depend on the parts before it.
        defenses: in the order in which they run.
        settings: the settings of each defense.

    Returns:
        The networks of the last defense; flags and scores of the last defense that has any; facts, pictures and further
        networks of all.
    """
    folder, results = inputs.runner.folder, []
    for number, (defense, defense_settings) in enumerate(zip(defenses, settings, strict=True)):
        if number:
            before = defenses[number - 1]
            folder = folder and folder / f"after-{before.name}-{fingerprint(**vars(settings[number - 1]))}"
            attacked = Nets(results[-1].model, results[-1].variables, 1, {})
            inputs = dataclasses.replace(
                inputs.with_knowledge({"attacked model": attacked}),
                runner=dataclasses.replace(inputs.runner, folder=folder),
            )
        results.append(contract.run(defense, inputs, defense_settings))
    names = [defense.name for defense in defenses]
    return DefenseResult(
        results[-1].model,
        results[-1].variables,
        flags=next((result.flags for result in reversed(results) if result.flags is not None), None),
        scores=next((result.scores for result in reversed(results) if result.scores is not None), None),
        facts=_merge(names, [result.facts for result in results]),
        pictures=_merge(names, [result.pictures for result in results]),
        not_tested=next((result.not_tested for result in reversed(results) if result.not_tested), ()),
        more_networks=_merge(names, [result.more_networks for result in results]),
    )


def _merge(owners: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge mappings. A key of several parts gets its defense's name as a prefix, and a defense that occurs twice in the chain
    also its position."""
    merged = {}
    for number, (owner, entries) in enumerate(zip(owners, parts, strict=True)):
        prefix = f"{owner} ({number + 1})" if owners.count(owner) > 1 else owner
        for key, value in entries.items():
            is_shared = sum(key in other for other in parts) > 1
            merged[f"{prefix}: {key}" if is_shared else key] = value
    return merged
