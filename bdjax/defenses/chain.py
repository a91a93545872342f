"""Defenses one after the other: the second gets what the first made of the suspects, "fine_tuning+fkd" for one.

What a chain trains lies where it belongs to: the first part's stages are those of that defense alone, and are trained once
however many chains begin with it; what comes after has a folder of its own, named after all that came before.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bdjax.defenses import contract
from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.errors import InputError
from bdjax.training.stages import Nets
from bdjax.types import DefenseResult, Model

LINK = "+"
"""What stands between the parts of a chain on the command line."""


class ChainLink(NamedTuple):
    """A defense of a chain, with its settings."""

    defense: Defense
    settings: Any
    title: str
    """as it stands alone: "FT (epochs 5)" """


def make_chain(parts: Sequence[ChainLink]) -> Defense:
    """One defense of several.

    Args:
        parts: in the order in which they are run; two or more.

    Returns:
        A defense that needs all that any of them needs, whose settings are a tuple of theirs.

    Raises:
        InputError: a part whose result no other defense can start from.
    """
    for part in parts[:-1]:
        if part.defense.stage == "at test time":
            raise InputError(
                f"defense {part.defense.name} looks at each image at test time: it has no network to hand on, so it can only "
                "be the last of a chain"
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
        network_after=lambda settings, *network: network_after([part.defense for part in parts], settings, *network),
    )


def network_after(
    defenses: Sequence[Defense],
    settings: Sequence[Any],
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
) -> Model:
    """The network that comes out of a chain, each part being asked about what the one before hands on."""
    for defense, own in zip(defenses, settings, strict=True):
        if defense.network_after:
            attacked = defense.network_after(own, attacked, make_model, image_shape)
    return attacked


def run(inputs: DefenseInput, defenses: Sequence[Defense], settings: Sequence[Any]) -> DefenseResult:
    """Run defenses one after the other, each on what the one before made of the attacked networks, and each on no more than
    its own needs.

    Args:
        inputs: the suspects. The keys stay: what a part draws does not depend on what came before.
        defenses: in order.
        settings: of each.

    Returns:
        The last one's networks; flags and scores of the last one that has any, facts and pictures of all.
    """
    folder, results = inputs.runner.folder, []
    for number, (defense, own) in enumerate(zip(defenses, settings, strict=True)):
        if number:
            before = defenses[number - 1]
            folder = folder and folder / f"after-{before.name}-{fingerprint(**vars(settings[number - 1]))}"
            attacked = Nets(results[-1].model, results[-1].variables, 1, {})
            inputs = dataclasses.replace(
                inputs.with_knowledge({"attacked model": attacked}),
                runner=dataclasses.replace(inputs.runner, folder=folder),
            )
        results.append(contract.run(defense, inputs, own))
    names = [defense.name for defense in defenses]
    return DefenseResult(
        results[-1].model,
        results[-1].variables,
        flags=next((one.flags for one in reversed(results) if one.flags is not None), None),
        scores=next((one.scores for one in reversed(results) if one.scores is not None), None),
        facts=_together(names, [one.facts for one in results]),
        pictures=_together(names, [one.pictures for one in results]),
    )


def _together(owners: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries of several mappings; a name that two of them have is told apart by its owner, and one that comes twice by
    its place in the chain."""
    together = {}
    for number, (owner, entries) in enumerate(zip(owners, parts, strict=True)):
        place = f"{owner} ({number + 1})" if owners.count(owner) > 1 else owner
        for name, value in entries.items():
            is_shared = sum(name in other for other in parts) > 1
            together[f"{place}: {name}" if is_shared else name] = value
    return together
