"""The configuration of runs on suspect models."""

from dataclasses import dataclass
from typing import Literal

from bdjax.choices import Augmentation, Optimiser, Schedule
from bdjax.run.configs.shared import ComparisonConfig, EvidenceConfig, ExportConfig
from bdjax.settings import Count, LearningRate, NotNegative, PositiveShare, Steps, Width

LABELS_ONLY = "logit_distillation:alpha=0.0"
"""A student that learns nothing from the teacher: what distillation is worth beside the clean rows alone."""


@dataclass(frozen=True, kw_only=True)
class Config(ComparisonConfig, ExportConfig, EvidenceConfig):
    """Every setting of a run; `--preset` and `--dataset` decide the defaults of the others."""

    preset: Literal["quick", "paper"] = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU"""
    attacks: str = "ckd,latent_backdoor,none"
    """attacks on the teacher separated by commas, each with its settings after colons: ckd:poison_rate=0.05. none is a clean
    teacher, the control of the others"""
    defenses: str = "fkd"
    """methods separated by commas, each with its settings: fkd,robust_kd:layers=1; or all methods for models; joined by +, the
    second runs on the first one's models: fine_tuning+fkd"""
    teacher: str | None = None
    """a third-party suspect model, in place of --attacks: a folder like those in teachers/ and models/ of a run, or
    FILE.safetensors:ARCHITECTURE"""
    teacher_model: str = "wrn_28_4"
    """architecture of teachers that the run trains"""
    student: str = "wrn_16_2"
    """architecture of students, for methods whose settings do not name another"""
    width: Width = 64
    """channels of teachers that the run trains and of students: 64 is the papers' size, other values scale all channels"""
    epochs: Count = 200
    """epochs of clean teachers, and of attacked teachers trained from scratch on poisoned data"""
    fine_tuning_epochs: Count = 30
    """epochs of attacked teachers that start from the clean teacher"""
    controlled_epochs: Count = 200
    """epochs of attacked teachers whose attacker controls the training from scratch"""
    batch_size: Count = 128
    """batch size of the teachers' training"""
    optimiser: Optimiser = "sgd"
    """optimiser of the teachers"""
    learning_rate: LearningRate = 0.1
    """initial learning rate of teachers trained from scratch"""
    fine_tuning_learning_rate: LearningRate = 0.008
    """initial learning rate of attacked teachers that start from the clean teacher; falls on half a cosine"""
    schedule: Schedule = "cosine"
    """learning-rate schedule of teachers trained from scratch"""
    steps: Steps = ()
    """for schedule steps: pairs of an epoch and the learning rate from it on"""
    weight_decay: NotNegative = 5e-4
    """L2 penalty of the teachers, added to the gradient as in PyTorch"""
    augmentation: Augmentation = "none"
    """augmentation of all training rows, after poisoning"""
    clean_share: PositiveShare = 1.0
    """the defender's clean rows: a share of each class's training rows, before any attack. With 1, students learn from the same
    images as the teachers, as in the paper"""
    clean_data: str = ""
    """a dataset's name or path to take the clean rows from instead"""
    save_models: bool = True
    """write the first seed's teachers and students"""
