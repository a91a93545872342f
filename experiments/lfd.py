"""LfD: train a clean model on a poisoned set, led by the losses of a network of low capacity.

    python experiments/lfd.py                                       # digits: BadNets, Blended, SIG, and no attack
    python experiments/lfd.py --dataset=cifar10 --attacks=badnets_grid --defenses=abl,lfd,lfd:weighting=drop
    python experiments/lfd.py --study=teachers                      # a figure of the paper; see --help
    python experiments/lfd.py --dataset=suspect.npz                 # rows of one's own: what is suspicious among them?

Each attack and seed gives one poisoned training set; every defense gets all of them, with what its row of the table says it
was given. The same command continues a run that was cut off, and ends at the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax

from bdjax import command_line, datasets
from bdjax.errors import InputError
from bdjax.poisoned_data import Config, Context, Experiment, Study, run
from bdjax.reporting import loss_gap
from bdjax.reporting.progress import StageLog
from bdjax.reporting.report import Section

DEFENSES = "fine_pruning,activation_clustering,abl,lfd"
"""Those of the paper's table 1."""
ABLATED = "badnets_grid,blended,sig"
"""The attacks of figure 5; the other ablations name none, so they are done on these too."""
STUDIES = {
    "table1": Study(
        "table 1: nine attacks and a clean set",
        "badnets_grid,badnets_white,blended,trojan_square,trojan_watermark,input_aware_offline,label_consistent,sig,"
        "l2_invisible,none",
        DEFENSES,
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
"""Whose losses the studies of teachers draw: figures 4a and 6."""
GAP_NETWORKS = ("resnet_s", "resnet18_cifar")
"""Whose losses every run draws: figures 1 and 2."""

_QUICK = {"model": "resnet10", "width": 8, "batch_size": 64, "learning_rate": 3e-3}
_QUICK_SETS: dict[str, dict[str, Any]] = {
    "digits": _QUICK | {"batch_size": 32, "epochs": 20, "attacks": "badnets,blended,sig:amplitude=0.6:target=8,none"},
    "mnist": _QUICK | {"train_rows": 4000, "test_rows": 1000, "epochs": 8},
    "cifar10": _QUICK
    | {"train_rows": 6000, "test_rows": 1000, "epochs": 12, "attacks": "badnets,blended,none", "seeds": 2},
}
FLIPPABLE = ("cifar10", "cifar100")
"""Sets of natural images, where a mirrored picture is of the same class."""


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: if there is no such preset.
    """
    on_cpu = jax.default_backend() == "cpu"
    preset = preset or ("quick" if on_cpu else "paper")
    dataset = dataset or "digits"
    if preset not in ("quick", "paper", "strong"):
        raise InputError(f"--preset {preset!r} is not one of quick, paper, strong")
    base: dict[str, Any] = {"defenses": DEFENSES, "target": 0}
    if preset == "paper" or not on_cpu:
        # Section 5 and appendix A.1; the target is class 1 on CIFAR-10 and GTSRB.
        base |= {"model": "resnet18_cifar", "width": 64, "epochs": 80, "batch_size": 128, "learning_rate": 1e-3}
        base |= {"augmentation": "crop_flip" if dataset in FLIPPABLE else "crop", "target": 1}
        base |= {"attacks": STUDIES["table1"].attacks, "compute_dtype": "float32" if on_cpu else "bfloat16"}
    else:
        like = {"fashion_mnist": "mnist", "cifar100": "cifar10", "gtsrb": "cifar10"}.get(dataset, dataset)
        base |= _QUICK_SETS.get(like, _QUICK_SETS["digits"] | {"attacks": "none"})
    if dataset not in datasets.DATASETS and not dataset.startswith("tfds:"):
        base |= {"attacks": "none", "seeds": 1, "defenses": "activation_clustering,abl,lfd"}
    return Config(dataset=dataset, preset=preset, **base)


def sections(context: Context) -> Sequence[Section]:
    """The loss gap, for the networks that the run is about."""
    networks = {"teachers": CAPACITIES, "architectures": OTHER_FAMILIES}.get(context.config.study, GAP_NETWORKS)
    return loss_gap.section(context.folder, context.givens, context.groups, networks)


EXPERIMENT = Experiment("lfd", "Learning from Distinction", "lfd", preset, STUDIES, sections)


def main(arguments: Sequence[str] | None = None, log: StageLog | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    studies = "; ".join(f"{name}: {study.about}" for name, study in STUDIES.items())
    choosers = {"preset": None, "dataset": None}
    description = f"{__doc__.splitlines()[0]} Studies: {studies}."
    return run(command_line.parse(preset, choosers, arguments, prog="lfd.py", description=description), EXPERIMENT, log)


if __name__ == "__main__":
    command_line.run(main)
