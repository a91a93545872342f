"""Where NBAB's verification network looks: Grad-CAM under the defender's trigger, the attacker's, and both (ABM, figure 11)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.poisoning import trigger_all
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.nbab import NbabSettings, make_patch, verify
from bdjax.evaluation.measure import Comparison
from bdjax.evaluation.suspects import Suspect
from bdjax.inspection.grad_cam import grad_cam
from bdjax.models import last_tap
from bdjax.reporting import plots
from bdjax.reporting.report import Figure, Section
from bdjax.run.folder import RunFolder
from bdjax.training import ensemble
from bdjax.types import Dataset

COLUMNS = ("clean", "defender's trigger", "attacker's trigger", "both")
IMAGES = 3
"""How many test images of each attack."""
MOST_ATTACKS = 6


def section(
    folder: RunFolder,
    givens: Sequence[DefenseInput],
    groups: Sequence[Sequence[Suspect]],
    comparisons: Sequence[Comparison],
    test: Dataset,
) -> tuple[Section, ...]:
    """Draw the first seed of some attacks; nothing if no attack is known, or ABM was not run.

    Args:
        folder: of the run.
        givens: each group of suspects as defenses get it.
        groups: the same with the truth.
        comparisons: the first ABM among them says how the networks were trained: they are read back.
        test: clean images.
    """
    abm = [one.variant for one in comparisons if one.variant.defense.name == "abm"]
    if not abm:
        return ()
    settings = NbabSettings(**{name: getattr(abm[0].settings, name) for name in NbabSettings.__dataclass_fields__})
    rows, maps, names, captions = [], [], [], []
    for given, group in zip(givens, groups, strict=True):
        shown = [number for number, one in enumerate(group) if one.parts and one.seed == 0][:MOST_ATTACKS]
        if not shown:
            continue
        nets = verify(given, settings).nets
        for number in shown:
            suspect = group[number]
            part, params = suspect.parts[0], suspect.params[0]
            victims = np.flatnonzero(part.rule.victims(test.labels))[:IMAGES]
            plain = Dataset(test.images[victims], test.labels[victims], test.num_classes, "", "")
            own = make_patch(settings.patch_size, settings.pattern)
            stamped = own(plain.images, plain.labels)
            attacked = trigger_all(given.keys[number], plain, part.attack.apply, params)
            views = [plain.images, stamped, attacked, own(attacked, plain.labels)]
            member = ensemble.members(nets.variables, number)
            tap = last_tap(nets.model, member, test.image_shape)
            heats = [grad_cam(nets.model, member, jnp.asarray(each, jnp.float32) / 255, tap=tap) for each in views]
            for i in range(len(victims)):
                rows.append(np.stack([each[i].astype(np.float32) / 255 for each in views]))
                maps.append(np.stack([np.asarray(heat[i]) for heat, _ in heats]))
                names.append(suspect.attack.title)
                captions.append([_answer(int(classes[i]), given.num_classes) for _, classes in heats])
    if not rows:
        return ()
    picture = plots.overlay_grid(
        np.stack(rows), np.stack(maps), names, COLUMNS, "What the answer rests on", captions=captions
    )
    path = plots.save(picture, folder.path / "verification.png")
    caption = (
        "Grad-CAM of the verification network for the class that it answers, which stands below (the paper's figure 11). NBAB "
        "works where, with both triggers on the image, the attacker's decides."
    )
    return (Section("Where the verification network looks", "", (), (Figure(path, caption, caption),)),)


def _answer(label: int, num_classes: int) -> str:
    return "the defender's class" if label == num_classes else f"class {label}"
