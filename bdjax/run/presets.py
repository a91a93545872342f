"""Presets: the defaults of each kind of run, by preset and dataset.

`paper` is the paper's setting, defined with its experiment (a dataclass's defaults, or `bdjax/commands/*.py`). `quick` runs in
minutes on two cores: the tables below.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from bdjax import datasets
from bdjax.run import backend
from bdjax.run.configs.shared import ExperimentConfig
from bdjax.settings import check_choice

Preset = Literal["quick", "paper", "strong"]
NO_ATTACK = "none"
Settings = TypeVar("Settings", bound=ExperimentConfig)


class Study(NamedTuple):
    """A table or figure of a paper."""

    about: str
    """"figure 4b: alpha" """
    attacks: str
    defenses: str


OTHER = "other"
"""The key of a table for named datasets that it does not list and that are like none of them."""

_SMALL = {"model": "resnet10", "width": 8, "batch_size": 64, "learning_rate": 3e-3}
_SPEEDRUN = {"width": 16, "batch_size": 128, "recipe": "speedrun", "epochs": 8}
_ATTACK = _SMALL | {"fine_tuning_learning_rate": 1e-3}
_TA_KD = {
    "clean_model": "resnet10",
    "teacher_model": "resnet18",
    "aggregated_model": "resnet18",
    "student_model": "resnet10",
    "width": 8,
    "keep_last_batch": False,  # its different shape would double the compilation time
    "minimum_contrast": 0.3,
}
_TA_KD_SPEEDRUN = _SPEEDRUN | {
    "clean_model": "speedrun",
    "teacher_model": "speedrun",
    "aggregated_model": "speedrun",
    "student_model": "speedrun",
    "poison_rate": 0.05,
    "minimum_contrast": 0.3,
    "keep_last_batch": False,
    "evaluation_batch_size": 250,
    "defense_learning_rate": 3e-3,
    "seeds": 1,
}
_ROBUST_KD = {
    "teacher_model": "wrn_16_2",
    "student": "wrn_10_2",
    "width": 16,
    # As in the paper: without weight decay the variance of the features is several times the cross-entropy.
    "optimiser": "sgd",
    "learning_rate": 0.1,
    "fine_tuning_learning_rate": 0.02,
    "weight_decay": 5e-4,
    "batch_size": 64,
    "augmentation": "crop",
}
_ROBUST_KD_PHOTOS = {
    "train_rows": 6000,
    "test_rows": 1000,
    "epochs": 12,
    "fine_tuning_epochs": 6,
    "controlled_epochs": 12,
    "seeds": 2,
}

_AUDIT_MODEL = {
    "width": 8,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "search_rows": 512,
    "search_batch_size": 32,
    "search_epochs": 20,
    "search_patience": 2,
    "held_out_rows": 500,
    "controls": 5,
}

QUICK: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ta_kd": {
        "digits": _TA_KD
        | {
            "epochs": 20,
            "batch_size": 32,
            "poison_rate": 0.1,
            "blend_opacity": (0.2, 0.3),
            "auxiliary_fraction": 0.15,
            "plateau_patience": 4,  # an epoch has 14 steps, 10 in the defense
            "defense_epochs": 30,
            "defense_batch_size": 16,
        },
        "mnist": _TA_KD_SPEEDRUN
        | {
            "epochs": 4,
            "attack_augmentation": "reflect",
            "blend_opacity": (0.15, 0.2),
        },
        OTHER: _TA_KD
        | {
            "num_similar": 3,
            "train_rows": 8000,
            "test_rows": 1000,
            "epochs": 8,
            "learning_rate": 3e-3,
            "poison_rate": 0.05,
            "evaluation_batch_size": 250,
        },
        "cifar10": _TA_KD_SPEEDRUN | {"attack_augmentation": "reflect_flip", "num_similar": 3},
    },
    "attack": {
        "digits": _ATTACK | {"batch_size": 32, "epochs": 20, "controlled_epochs": 40, "fine_tuning_epochs": 10},
        "mnist": _SPEEDRUN
        | {
            "model": "speedrun",
            "epochs": 4,
            "augmentation": "reflect",
            "controlled_epochs": 4,
            "fine_tuning_epochs": 1,
            "fine_tuning_learning_rate": 1e-3,
            "seeds": 1,
        },
        OTHER: _ATTACK
        | {
            "train_rows": 6000,
            "test_rows": 1000,
            "epochs": 10,
            "controlled_epochs": 12,
            "fine_tuning_epochs": 4,
            "seeds": 1,
        },
        "cifar10": _SPEEDRUN
        | {
            "model": "speedrun",
            "augmentation": "reflect_flip",
            "controlled_epochs": 8,
            "fine_tuning_epochs": 2,
            "fine_tuning_learning_rate": 1e-3,
            "seeds": 1,
        },
    },
    "poisoned_sets": {
        "digits": _SMALL
        | {"batch_size": 32, "epochs": 20, "attacks": "badnets,blended,sig:amplitude=0.6:target=8,none"},
        "mnist": _SPEEDRUN
        | {
            "model": "speedrun",
            "epochs": 4,
            "augmentation": "reflect",
            "attacks": "badnets_grid,blended,none",
            "seeds": 1,
        },
        OTHER: _SMALL
        | {"train_rows": 6000, "test_rows": 1000, "epochs": 12, "attacks": "badnets,blended,none", "seeds": 2},
        "cifar10": _SPEEDRUN
        | {"model": "speedrun", "augmentation": "reflect_flip", "attacks": "badnets_grid,blended,none", "seeds": 1},
    },
    "detection": {
        "digits": _SMALL
        | {
            "batch_size": 32,
            "epochs": 20,
            "attacks": "white_square,green_square:opacity=0.5,none",
            "suspects_at_once": 16,
        },
        "textures": _SMALL | {"epochs": 8, "attacks": "white_square,none", "seeds": 1},
        "mnist": _SMALL
        | {
            "train_rows": 10_000,
            "test_rows": 1000,
            "epochs": 8,
            "attacks": "white_square,white_grid:opacity=0.5,none",
            "seeds": 2,
        },
        "cifar10": _SPEEDRUN
        | {
            "model": "speedrun",
            "augmentation": "reflect_flip",
            "attacks": "white_square,color_grid:opacity=0.2,none",
            "seeds": 1,
        },
        "tiny_imagenet": _SMALL
        | {
            "batch_size": 32,
            "train_rows": 20_000,
            "epochs": 20,
            "attacks": "white_square,color_grid:opacity=0.5,none",
            "seeds": 2,
        },
    },
    "audit_model": {
        "digits": _AUDIT_MODEL
        | {
            "controls": 9,
            "clean_rows": 500,
            "epochs": 30,
            "surrogate_epochs": 30,
            "batch_size": 32,
            "search_rows": 128,
            "search_batch_size": 16,
            "search_epochs": 80,
            "search_patience": 5,
        },
        OTHER: _AUDIT_MODEL | {"clean_rows": 6000, "epochs": 12, "surrogate_epochs": 12},
        # The recipe suits the network of the quick runs on these sets.
        "mnist": _AUDIT_MODEL
        | _SPEEDRUN
        | {
            "surrogate": "speedrun",
            "epochs": 4,
            "surrogate_epochs": 4,
            "augmentation": "reflect",
            "clean_rows": 10_000,
        },
        "cifar10": _AUDIT_MODEL
        | _SPEEDRUN
        | {"surrogate": "speedrun", "surrogate_epochs": 8, "augmentation": "reflect_flip", "clean_rows": 10_000},
    },
    "suspect_models": {
        # CKD is only in the studies.
        "digits": _ROBUST_KD
        | {
            "attacks": "latent_backdoor,none",
            # A student smaller than the teacher cannot match its features well enough for the backdoor to pass.
            "student": "wrn_16_4",
            "width": 24,
            "batch_size": 32,
            "epochs": 20,
            "fine_tuning_epochs": 15,
            "controlled_epochs": 40,
        },
        "mnist": _ROBUST_KD
        | {
            "train_rows": 4000,
            "test_rows": 1000,
            "epochs": 8,
            "fine_tuning_epochs": 5,
            "controlled_epochs": 12,
            "seeds": 2,
        },
        "cifar10": _ROBUST_KD | _ROBUST_KD_PHOTOS,
        "gtsrb": _ROBUST_KD | _ROBUST_KD_PHOTOS,
    },
}
"""Workflow -> dataset -> field -> value in quick runs."""


def is_registered(dataset: str) -> bool:
    """Whether a dataset is a named public dataset, and not the user's data at a path."""
    return dataset in datasets.DATASETS or dataset.startswith("tfds:")


def quick(workflow: str, dataset: str) -> dict[str, Any]:
    """The fields of a quick run: those of the dataset, else of the dataset that it is like, else of `OTHER` or of CIFAR-10.
    Data at a path gets those of the digits, which use all rows. Images are mirrored only where their class stays the same.

    Args:
        workflow: a key of `QUICK`.
        dataset: its name or path.
    """
    table, traits = QUICK[workflow], datasets.traits(dataset)
    fallback = (OTHER, "cifar10") if is_registered(dataset) else ("digits",)
    fields = dict(next(table[name] for name in (dataset, traits.like, *fallback) if name in table))
    for name in ("augmentation", "attack_augmentation"):
        if name in fields and not traits.flips:
            fields[name] = fields[name].removesuffix("_flip")
    return fields


def choose(
    preset: str | None, dataset: str | None, presets: tuple[str, ...], usual: str = "digits"
) -> tuple[str, str, str]:
    """Fill in the preset and the dataset if they are None, and choose the compute dtype for the backend.

    Args:
        preset: its name; None for quick on a CPU, paper elsewhere.
        dataset: its name or path; None for the usual one.
        presets: the names of the experiment's presets.
        usual: the name of the dataset without a choice, which needs no files.

    Raises:
        InputError: there is no such preset.
    """
    on_cpu = backend.is_cpu()
    preset = preset or ("quick" if on_cpu else "paper")
    check_choice("--preset", preset, presets)
    return preset, dataset or usual, "float32" if on_cpu else "bfloat16"


def start_from(
    workflow: str,
    preset: str | None,
    dataset: str | None,
    always: Mapping[str, Any],
    paper: Mapping[str, Any],
    *,
    kind: type[Settings],
    path_defenses: str,
    usual: str = "digits",
) -> Settings:
    """The configuration that a preset of a run on suspect training sets starts from.

    Args:
        workflow: a key of `QUICK`.
        preset: as for `choose`.
        dataset: as for `choose`.
        always: field -> value in every preset.
        paper: field -> value at the paper's size, also used by strong runs on an accelerator.
        kind: the configuration's class.
        path_defenses: the defenses for data at a path, which is not attacked and has no known clean rows.
        usual: as for `choose`.

    Raises:
        InputError: there is no such preset.
    """
    preset, dataset, compute_dtype = choose(preset, dataset, ("quick", "paper", "strong"), usual)
    if preset == "paper" or (preset == "strong" and compute_dtype == "bfloat16"):
        sized = {**paper, "compute_dtype": compute_dtype}
    else:
        sized = quick(workflow, dataset)
    if not is_registered(dataset):
        sized = {**sized, "attacks": NO_ATTACK, "seeds": 1, "defenses": path_defenses}
    return kind(dataset=dataset, preset=preset, **{**always, **sized})


def start_plainly_from(workflow: str, preset: str | None, dataset: str | None, kind: type[Settings]) -> Settings:
    """The configuration that a preset of a run without a strong preset starts from.

    Args:
        workflow: a key of `QUICK`.
        preset: quick or paper; the latter is the class's own defaults, with the usual augmentation of the dataset.
        dataset: as for `choose`.
        kind: the configuration's class.

    Raises:
        InputError: there is no such preset.
    """
    preset, dataset, compute_dtype = choose(preset, dataset, ("quick", "paper"))
    if preset == "quick":
        changes = quick(workflow, dataset)
    else:
        changes = {"augmentation": "crop_flip" if datasets.traits(dataset).flips else "crop"}
    return kind(**{"dataset": dataset, "preset": preset, "compute_dtype": compute_dtype, **changes})
