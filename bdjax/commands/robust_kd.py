"""RobustKD: a small clean student from a teacher that may be backdoored, by features of low variance (Chen et al. 2024).

Each attack and seed gives one suspect teacher; every method gets all teachers and clean images, and returns students.
The same command continues an interrupted run, and ends at the same numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdjax import datasets
from bdjax.exchange import safetensors_files
from bdjax.run import presets
from bdjax.run.configs.suspect_models import LABELS_ONLY, Config
from bdjax.run.experiment import Experiment, read_flags
from bdjax.run.presets import Study

if TYPE_CHECKING:
    from bdjax.reporting.report import Section
    from bdjax.run.log import StageLog
    from bdjax.workflows.base import Context


CKD = "ckd:mask_bound=0.2"
"""With the bound of the CKD mask in RobustKD's repository. CKD's code clips its masks to 0.5, and most of the masks for CIFAR
in CKD's repository are not clipped at all."""
LBA = "latent_backdoor:features=groups:mask_bound=0.5:feature_weight=0.0"
"""RobustKD's LBA; `latent_backdoor` is Yao et al.'s. It is left out of the quick runs: on 8x8 digits its trigger fools the
clean network as well, so that the control leaves nothing to measure."""
PASSING = f"{CKD},latent_backdoor,none"
"""The attacks whose backdoor students inherit according to the paper, and the clean teacher, their control."""
ATTACKS = f"{CKD},{LBA},latent_backdoor,hidden_trigger,none"
METHODS = f"{LABELS_ONLY},fkd,robust_kd"
"""The paper compares with FKD only; but whoever has the clean images that students learn from may do without the teacher."""
BASELINES = f"{METHODS},logit_distillation,attention_transfer,ta_kd_student,fine_tuning+fkd,nad+fkd,fine_tuning,nad"


SEVERAL = "thresholds=(0.05, 0.1, 0.2, 0.4, 0.6)"
"""Values of m to search."""


def _robust_kd(*settings: str) -> str:
    """A student on labels only, FKD, and a variant of RobustKD for each text of settings."""
    return ",".join([LABELS_ONLY, "fkd", *(f"robust_kd{':' if text else ''}{text}" for text in settings)])


def _thresholds(*values: float, form: str = "added") -> str:
    """RobustKD with each of these values as its only m."""
    start = "robust_kd" if form == "added" else f"robust_kd:form={form}"
    return ",".join(f"{start}:thresholds=({value},)" for value in values)


STUDIES = {
    "transfer": Study("table 3: which backdoors plain feature distillation transfers", ATTACKS, f"{LABELS_ONLY},fkd"),
    "removal": Study("tables 4 to 6: RobustKD on these backdoors", f"{CKD},{LBA},latent_backdoor,none", METHODS),
    "threshold": Study(
        "figure 4: the mask's weight m, where equation 7 has it (only as a start) and in equation 15; and a search",
        PASSING,
        f"{LABELS_ONLY},fkd,{_thresholds(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},{_thresholds(0.1, 0.2, 0.4, 0.6, form='mixed')},"
        f"robust_kd:form=mixed:{SEVERAL}",
    ),
    "form": Study(
        "figure 5: forms of the mask (equations 7 and 15), and the public code's: elementwise, or taps before the masks",
        PASSING,
        _robust_kd("", "form=mixed", "form=elementwise:thresholds=(0.05,)", "taps=before_mask"),
    ),
    "losses": Study(
        "figure 6: the loss that the mask minimises, and the axes of the variance",
        PASSING,
        _robust_kd("", "loss=cross_entropy", "loss=variance", "variance_axes=all", "variance_axes=batch"),
    ),
    "layers": Study(
        "figure 7: masks on the last group, the last two, all", PASSING, _robust_kd("layers=1", "layers=2", "")
    ),
    "adaptive": Study(
        "table 7: an attacker who keeps the variance low", f"ckd_low_variance:mask_bound=0.2,{CKD},none", METHODS
    ),
    "baselines": Study(
        "beyond the paper: other distillations, and other defenses before or in place of them", PASSING, BASELINES
    ),
    "ablations": Study(
        "figures 4 to 7 in one run",
        PASSING,
        _robust_kd(
            "",
            "form=mixed",
            "loss=cross_entropy",
            "loss=variance",
            "layers=1",
            "layers=2",
        )
        + f",{_thresholds(0.1, 0.4)}",
    ),
    "oracle": Study(
        "algorithm 1: the threshold chosen by measured attack success, in equation 15, where it matters",
        PASSING,
        f"{METHODS},robust_kd:form=mixed:{SEVERAL},robust_kd:form=mixed:{SEVERAL}:select=oracle",
    ),
}


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: there is no such preset.
    """
    preset, dataset, compute_dtype = presets.choose(preset, dataset, ("quick", "paper"))
    if preset == "quick":
        quick = {"attacks": PASSING, **presets.quick("suspect_models", dataset)}
        return Config(dataset=dataset, preset=preset, defenses=METHODS, **quick)
    paper = Config(
        dataset=dataset,
        preset=preset,
        attacks=ATTACKS,
        defenses=METHODS,
        augmentation="crop_flip" if datasets.traits(dataset).flips else "crop",
        compute_dtype=compute_dtype,
    )
    # Few and large images; the paper runs only the PyramidNets on them.
    flowers = {"teacher_model": "pyramidnet_200_240", "student": "pyramidnet_110_84", "batch_size": 32}
    return dataclasses.replace(paper, **flowers) if dataset == "flowers17" else paper


def sections(context: "Context") -> "Sequence[Section]":
    """Figure 2, the paper's premise: whether features of attacked teachers vary more. Empty for networks without known groups,
    without a clean network as the baseline, and without a known trigger."""
    import jax
    import numpy as np

    from bdjax.inspection.feature_variance import measure_beside_clean
    from bdjax.models import group_shapes
    from bdjax.reporting import inspections
    from bdjax.training.ensemble import members

    teachers, config = context.teachers, context.config
    inputs, _, views = context.groups[0]
    attacked = [number for number, triggered in enumerate(views.triggered) if triggered]
    if teachers.clean is None or not attacked or not group_shapes(teachers.model, context.data.train.image_shape):
        return ()
    suspects = [teachers.suspects[number] for number in attacked]
    with context.log.stage("feature variance", detail=f"{len(attacked)} backdoored networks"):
        measured = measure_beside_clean(
            jax.random.fold_in(jax.random.key(config.seed), 1),
            inputs.runner,
            [(suspect.attack.title, suspect.seed) for suspect in suspects],
            members(teachers.variables, np.array(attacked)),
            views.test.images,
            [views.triggered[number][0] for number in attacked],
            teachers.clean,
            teachers.recipes.fine_tuning,
            context.data.train,
            config.evaluation_batch_size,
        )
    return inspections.feature_variance(context.folder, measured)


EXPERIMENT = Experiment("robust_kd", "RobustKD", ("robust_kd",), preset, STUDIES, sections)


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    safetensors_files.refuse_early([config.teacher] if config.teacher else [])
    from bdjax.workflows import suspect_models

    return suspect_models.run(config, EXPERIMENT, log)
