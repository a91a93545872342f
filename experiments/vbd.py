"""VBD: which rows of a training set are poisoned, and what does the trigger look like? No clean copy is needed.

    python experiments/vbd.py                                       # digits: two triggers, and no attack
    python experiments/vbd.py --dataset=photos/                     # a folder of one's own, or an .npz: a verdict on it
    python experiments/vbd.py --dataset=photos/ --defenses=spectral_signatures    # by another detector
    python experiments/vbd.py --dataset=cifar10 --study=table1      # a table of the paper; see --help
    python experiments/vbd.py --dataset=cifar10 --study=grid --preset=paper     # all of its 80 settings, 5 seeds each

Each attack and seed gives one poisoned training set; every detector gets all of them, with what its row of the table says it
was given. The class that the attack is aimed at goes with the seed. The same command continues a run that was cut off, and ends
at the same numbers.
"""

from collections.abc import Sequence
from typing import Any

from bdjax import datasets
from bdjax.attacks.vbd_triggers import TILES
from bdjax.run import command_line, presets
from bdjax.run.log import StageLog
from bdjax.run.presets import Study
from bdjax.workflows import audit, detection
from bdjax.workflows.base import Experiment, read_flags
from bdjax.workflows.detection import Config

TRIGGERS = ("big_kitty", "small_kitty", "color_grid", "green_square", "white_grid", "white_square")
FAINT = (0.1, 0.2, 0.5)
"""The opacities of its Blended attacks; 1 is BadNets."""
DETECTORS = "vbd,abl:isolate=oracle,agpd,scan"
"""Those of the paper's tables; ABL is given the number of poisoned rows, as it was there."""
WITHOUT_CLEAN_ROWS = "vbd,activation_clustering,spectral_signatures"

ALL_TO_ONE = ",".join(TRIGGERS)
ALL_TO_ALL = ",".join(f"{tile}_all_to_all" for tile in TILES)
BLENDED = ",".join(f"{trigger}:opacity={opacity}" for opacity in FAINT for trigger in TRIGGERS)
BLENDED_ALL_TO_ALL = ",".join(f"{tile}_all_to_all:opacity={opacity}" for opacity in FAINT for tile in TILES)
RATES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
NOISES = (0.05, 0.1, 0.2)

STUDIES = {
    "grid": Study(
        "table 5: all 80 settings", f"{ALL_TO_ONE},{ALL_TO_ALL},{BLENDED},{BLENDED_ALL_TO_ALL}", DETECTORS
    ),
    "table1": Study("table 1: BadNets, all-to-one", ALL_TO_ONE, DETECTORS),
    "table2": Study("table 2: BadNets, all-to-all", ALL_TO_ALL, DETECTORS),
    "table3": Study("table 3: Blended, all-to-one", BLENDED, DETECTORS),
    "table4": Study("table 4: Blended, all-to-all", BLENDED_ALL_TO_ALL, DETECTORS),
    "rates": Study("how few poisoned rows are found", ",".join(f"white_square:poison_rate={rate}" for rate in RATES), "vbd"),
    "noise": Study(
        "wrong labels beside the poison, and without any",
        ",".join(f"{name}:label_noise={noise}" for noise in NOISES for name in ("none", "white_square")),
        "vbd",
    ),
    "clean": Study("false alarms: nothing is poisoned; take more --seeds", "none", WITHOUT_CLEAN_ROWS),
}  # fmt: skip


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: if there is no such preset.
    """
    # The competitors' networks as BackdoorBench trains them, which the paper's numbers are from.
    paper = {
        "model": "preact_resnet18",
        "width": 64,
        "epochs": 100,
        "batch_size": 128,
        "optimiser": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 5e-4,
        "augmentation": "crop_flip" if dataset and datasets.traits(dataset).flips else "crop",
        "attacks": STUDIES["grid"].attacks,
        "defenses": DETECTORS,
        "seeds": 5,
    }
    always = {"defenses": "vbd", "schedule": "cosine"}
    return presets.start_from("detection", preset, dataset, always, paper, kind=Config, defenses_of_own_rows="vbd")


EXPERIMENT = Experiment("vbd", "Variance-based defense", ("vbd",), preset, STUDIES)


def main(arguments: Sequence[str] | None = None, log: StageLog | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    about = (
        f"{__doc__.splitlines()[0]} Rows at a path are audited as they are, unless --attacks says otherwise; other sets are "
        "poisoned first."
    )
    config = read_flags(EXPERIMENT, about, arguments)
    workflow = audit if detection.is_audit(config, EXPERIMENT) else detection
    return workflow.run(config, EXPERIMENT, log)


if __name__ == "__main__":
    command_line.run(main)
