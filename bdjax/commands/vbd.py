"""VBD: find the poisoned rows of a training set, and the trigger, without clean data.

Each attack and seed gives one poisoned training set; every detector runs on all of them, and the table lists what each detector
was given. Each seed has another target class. The same command continues an interrupted run, and ends at the same numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdjax import datasets
from bdjax.run import presets
from bdjax.run.configs.detection import Config
from bdjax.run.experiment import Experiment, read_flags
from bdjax.run.presets import Study

if TYPE_CHECKING:
    from bdjax.run.log import StageLog

TRIGGERS = ("big_kitty", "small_kitty", "color_grid", "green_square", "white_grid", "white_square")
TILES = ("white_square", "green_square", "white_grid", "color_grid")
"""The triggers with an all-to-all form."""
FAINT = (0.1, 0.2, 0.5)
"""Opacities of the paper's Blended attacks; 1 is BadNets."""
DETECTORS = "vbd,abl:isolate=oracle,agpd,scan"
"""The detectors of the paper's tables; ABL is given the number of poisoned rows, as in the paper."""
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
    "rates": Study("detection at low poisoning rates", ",".join(f"white_square:poison_rate={rate}" for rate in RATES), "vbd"),
    "noise": Study(
        "label noise, with and without poisoned rows",
        ",".join(f"{name}:label_noise={noise}" for noise in NOISES for name in ("none", "white_square")),
        "vbd",
    ),
    "clean": Study("false alarms on clean training sets; use more --seeds", "none", WITHOUT_CLEAN_ROWS),
}  # fmt: skip


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: there is no such preset.
    """
    # The other detectors' networks as BackdoorBench trains them, which is where the paper's numbers are from.
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
    return presets.start_from(
        "detection", preset, dataset, always, paper, kind=Config, path_defenses="vbd", usual="textures"
    )


EXPERIMENT = Experiment("vbd", "Variance-based defense", ("vbd",), preset, STUDIES)


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    about = (
        f"{__doc__.splitlines()[0]} Data at a path is audited unchanged, unless --attacks is set; named datasets are poisoned "
        "first."
    )
    config = read_flags(EXPERIMENT, about, arguments)
    from bdjax.workflows import audit, detection

    workflow = audit if detection.is_audit(config, EXPERIMENT) else detection
    return workflow.run(config, EXPERIMENT, log)
