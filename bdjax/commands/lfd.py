"""LfD: train a clean model on a poisoned training set, guided by the losses of a low-capacity network.

Each attack and seed gives one poisoned training set; every defense runs on all of them, and the table lists what each defense
was given. The same command continues an interrupted run, and ends at the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdjax import datasets
from bdjax.run import presets
from bdjax.run.configs.poisoned_sets import Config
from bdjax.run.experiment import Experiment, read_flags
from bdjax.run.presets import Study

if TYPE_CHECKING:
    from bdjax.reporting.report import Section
    from bdjax.run.log import StageLog
    from bdjax.workflows.base import Context


DEFENSES = "fine_pruning,activation_clustering,abl,lfd"
"""The defenses of the paper's table 1, at each defense's own settings."""
AS_IN_TABLE_1 = (
    "fine_pruning,activation_clustering:network=unaugmented,"
    "abl:isolation_epochs=20:unlearning=paper:unlearning_epochs=20:unlearning_learning_rate=1e-4,lfd"
)
"""The same at the settings of appendix A.2. Its ABL unlearns the isolated rows while it trains on the others (LGGA)."""
ABLATED = "badnets_grid,blended,sig"
"""The attacks of figure 5; the paper does not name those of the other ablations, which use the same here."""
STUDIES = {
    "table1": Study(
        "table 1: nine attacks and a clean set",
        "badnets_grid,badnets_white,blended,trojan_square,trojan_watermark,input_aware_offline,label_consistent,sig,"
        "l2_invisible,none",
        AS_IN_TABLE_1,
    ),
    "teachers": Study(
        "figure 4a: the teacher's capacity",
        ABLATED,
        "lfd:teacher=resnet_s1,lfd,lfd:teacher=resnet_s2,lfd:teacher=resnet18_cifar",
    ),
    "architectures": Study(
        "beyond the paper: LfD with the small networks of appendix A.4 as teachers",
        ABLATED,
        "lfd,lfd:teacher=vgg_s,lfd:teacher=mobilenet_v2_s,lfd:teacher=lenet",
    ),
    "alpha": Study("figure 4b: alpha", ABLATED, "lfd:alpha=0.01,lfd:alpha=0.1,lfd,lfd:alpha=0.5"),
    "beta": Study("figure 4c: beta", ABLATED, "lfd:beta=0.0,lfd:beta=1e-4,lfd,lfd:beta=1e-2"),
    "ascent": Study(
        "figure 5: no ascent (two readings), ascent, weighted ascent",
        ABLATED,
        "lfd:weighting=plain,lfd:weighting=drop,lfd:weighting=ascent:loss_cap=10.0,lfd",
    ),
}
CAPACITIES = ("resnet_s1", "resnet_s", "resnet_s2", "resnet18_cifar")
OTHER_FAMILIES = ("vgg_s", "vgg11", "lenet", "mobilenet_v2_s", "mobilenet_v2")
"""Networks whose losses the studies of teachers plot: figures 4a and 6."""
GAP_NETWORKS = ("resnet_s", None)
"""Networks whose losses a run plots: figures 1 and 2. None is the run's own network, the paper's ResNet-18 in its preset."""


@dataclass(frozen=True, kw_only=True)
class LfdConfig(Config):
    """Every setting of a run."""

    loss_gap: bool = True
    """train the networks whose losses are plotted (figures 1, 2, 4a and 6), which takes about as long as the defense"""


def preset(preset: str | None = None, dataset: str | None = None) -> LfdConfig:
    """The configuration that a preset starts from: see `presets.start_from`."""
    # Section 5 and appendix A.1; the target is class 1 on CIFAR-10 and GTSRB.
    paper = {
        "model": "resnet18_cifar",
        "width": 64,
        "epochs": 80,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "augmentation": "crop_flip" if dataset and datasets.traits(dataset).flips else "crop",
        "target": 1,
        "attacks": STUDIES["table1"].attacks,
        "defenses": AS_IN_TABLE_1,
    }
    always = {"defenses": DEFENSES, "target": 0}
    return presets.start_from(
        "poisoned_sets",
        preset,
        dataset,
        always,
        paper,
        kind=LfdConfig,
        path_defenses="activation_clustering,abl,lfd",
    )


def sections(context: "Context") -> "Sequence[Section]":
    """The loss gap between clean and poisoned rows, for the networks of the study; empty with --no-loss-gap."""
    from bdjax.inspection.loss_gap import EPOCHS, loss_gaps
    from bdjax.reporting import inspections

    if not context.config.loss_gap:
        return ()
    networks = {"teachers": CAPACITIES, "architectures": OTHER_FAMILIES}.get(context.config.study, GAP_NETWORKS)
    gaps = []
    with context.log.stage("loss gap", detail=f"{len(networks)} networks × {EPOCHS} epochs"):
        for inputs, suspects, _ in context.groups:
            titles = [suspect.attack.title for suspect in suspects]
            gaps += loss_gaps(inputs, titles, [suspect.is_poisoned for suspect in suspects], networks)
    return inspections.loss_gap(context.folder, gaps)


EXPERIMENT = Experiment("lfd", "Learning from Distinction", ("lfd",), preset, STUDIES, sections)


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    from bdjax.workflows import poisoned_sets

    return poisoned_sets.run(config, EXPERIMENT, log)
