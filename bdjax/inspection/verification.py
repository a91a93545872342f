"""Grad-CAM of NBAB's verification network with the defender's trigger, the attacker's, and both (ABM, figure 11)."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.poisoning import ConfiguredAttack, trigger_all
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.nbab import NbabSettings, make_patch, verify
from bdjax.inspection.grad_cam import grad_cam
from bdjax.models import last_tap
from bdjax.training import ensemble
from bdjax.types import Dataset, PyTree

VIEWS = ("clean", "defender's trigger", "attacker's trigger", "both")
IMAGES = 3
"""How many test images are shown for each training set."""


class VerificationHeat(NamedTuple):
    """Heat maps of the verification network of one training set, for n test images in each of `VIEWS`."""

    images: np.ndarray
    """float32 [n, 4, H, W, C] in [0, 1]"""
    heat_maps: np.ndarray
    """float32 [n, 4, H, W] in [0, 1]"""
    classes: np.ndarray
    """int [n, 4]: the predicted class, which the map explains; K is the defender's class"""


def verification_heat(
    inputs: DefenseInput, settings: NbabSettings, triggers: Mapping[int, tuple[ConfiguredAttack, PyTree]], test: Dataset
) -> list[VerificationHeat]:
    """Explain the predictions of the verification networks; networks that the run has trained are restored.

    Args:
        inputs: M suspect training sets.
        settings: of the networks, the same as in the run that trained them.
        triggers: number of a set -> the attacker's trigger and its parameters.
        test: clean images; the first victims of each trigger are shown.

    Returns:
        Heat maps of each set, in the order of `triggers`. Empty, without training, if `triggers` is empty.
    """
    if not triggers:
        return []
    nets = verify(inputs, settings, settings.rungs).nets
    stamp = make_patch(settings.patch_size, settings.pattern)
    found = []
    for number, (part, params) in triggers.items():
        victims = np.flatnonzero(part.rule.victims(test.labels))[:IMAGES]
        plain = Dataset(test.images[victims], test.labels[victims], test.num_classes, "", "")
        attacked = trigger_all(inputs.keys[number], plain, part.attack.apply, params)
        views = [plain.images, stamp(plain.images, plain.labels), attacked, stamp(attacked, plain.labels)]
        member = ensemble.members(nets.variables, number * len(settings.rungs))  # the first of its networks
        tap = last_tap(nets.model, member, test.image_shape)
        maps = [grad_cam(nets.model, member, jnp.asarray(view, jnp.float32) / 255, tap=tap) for view in views]
        found.append(
            VerificationHeat(
                np.stack(views, axis=1).astype(np.float32) / 255,
                np.stack([heat for heat, _ in maps], axis=1),
                np.stack([classes for _, classes in maps], axis=1),
            )
        )
    return found
