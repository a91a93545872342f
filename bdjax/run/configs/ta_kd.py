"""The configuration of TA-KD runs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bdjax.choices import (
    QUERY_BATCH,
    Aggregation,
    Augmentation,
    Direction,
    RateOf,
    Recipe,
    Schedule,
    Tie,
    VoteSpace,
)
from bdjax.run.configs.shared import EvidenceConfig, ExperimentConfig, ExportConfig
from bdjax.settings import (
    Amount,
    Count,
    Increasing,
    LearningRate,
    Members,
    NotNegative,
    Positive,
    PositiveShare,
    Range,
    Share,
    ShareBelowOne,
    Width,
)

Preset = Literal["quick", "paper", "strong"]
Scale = Literal["quick", "paper"]


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig, ExportConfig, EvidenceConfig):
    """Every setting of a TA-KD run; `--preset` and `--dataset` decide the defaults of the others."""

    preset: Preset = "paper"
    """quick: minutes on two cores; paper: to the letter, for a GPU; strong: the same attack, a better defender"""
    scale: Scale = "paper"
    """sizes of networks, rows and epochs that the strong preset starts from"""
    teachers: tuple[str, ...] | None = None
    """third-party teachers, any mixture of: a folder, like teachers/seed-0 or models/student of a run;
    FILE.safetensors:ARCHITECTURE; FILE.onnx; http://HOST:PORT/PATH. No attack is trained then"""
    outputs: Literal["logits", "probabilities", "labels"] = "logits"
    """what teachers return that are ONNX files or addresses"""
    teacher_batch: Count = QUERY_BATCH
    """most images that a teacher which is a Python function gets in one call"""

    auxiliary_fraction: PositiveShare = 0.1
    """the defender's clean set, as a share of the training rows"""
    validation_fraction: ShareBelowOne = 0.2
    """share of its rows that each model holds back for the learning-rate rule"""

    num_teachers: Members = 7
    """number of providers, each with a different trigger"""
    provider_fraction: PositiveShare = 0.4
    """each provider's share of the training rows; providers overlap"""
    poison_rate: PositiveShare = 0.01
    """share of each provider's rows that it poisons"""
    poison_rate_of: RateOf = "all"
    """rows that the rate is a share of: all rows (the paper's text) or those outside the target class (its code)"""
    num_similar: Amount = 0
    """number of triggers that are look-alikes of another; 3 in the paper's CIFAR-10 experiment"""
    similarity: Share = 0.75
    """similarity of the look-alikes, from 0 to 1"""
    blend_opacity: Annotated[tuple[Share, Share], Increasing(or_equal=True)] | None = None
    """range that the opacity of blended pictures is drawn from; by default 0.05 0.1 for grey, 0.15 0.2 for colour"""
    minimum_contrast: Share = 0.0
    """smallest brightness of solid patches and smallest step of checkerboards; 0 is the paper's distribution"""

    clean_model: str = "resnet18"
    """architecture of the clean reference, trained on all rows but the validation share"""
    teacher_model: str = "resnet34"
    """architecture of the suspect models"""
    aggregated_model: str = "resnet34"
    """architecture of the Teacher-Aggregation model"""
    student_model: str = "resnet18"
    """architecture of the student"""
    width: Width = 64
    """channels of the first stage of every network"""

    epochs: Count = 15
    """epochs of the clean reference and of the teachers"""
    batch_size: Count = 64
    """batch size of the clean reference and of the teachers"""
    recipe: Recipe = ""
    """named recipe of the clean reference and the teachers, in place of Adam, its rate and the plateau rule: speedrun"""
    learning_rate: LearningRate = 0.01
    """initial learning rate of Adam for the clean reference and the teachers"""
    attack_augmentation: Augmentation = "none"
    """augmentation of the rows of the clean reference and the teachers, after poisoning"""
    keep_last_batch: bool = True
    """train on the incomplete last batch of an epoch too"""
    evaluation_batch_size: Count = 128
    """batch size of validation and test"""
    plateau_factor: Positive = 0.5
    """factor that a plateau of the validation loss multiplies the learning rate by"""
    plateau_patience: Amount = 2
    """number of epochs without improvement before the learning rate is cut"""
    plateau_threshold: NotNegative = 1e-3
    """smallest relative decrease of the loss that counts as an improvement"""

    defense_epochs: Count = 15
    """epochs of the aggregated model, the student and both baselines"""
    defense_batch_size: Count = 64
    """batch size of the defense's trainings"""
    defense_recipe: Recipe = ""
    """named recipe of the defense's trainings, in place of Adam, its rate, schedule and weight decay: speedrun"""
    defense_learning_rate: LearningRate = 0.01
    """initial learning rate of Adam in the defense's trainings"""
    defense_schedule: Schedule = "plateau"
    """learning-rate schedule of the defense's trainings: the plateau rule, or half a cosine"""
    defense_weight_decay: NotNegative = 0.0
    """L2 penalty of the defense's trainings, added to the gradient as in PyTorch's Adam"""
    temperature: Positive = 4.0
    """T of the distillation (not in the paper; from its code)"""
    alpha: Share = 0.5
    """weight of the teachers' logits; the clean labels have 1 - alpha (not in the paper; from its code)"""
    direction: Direction = "teacher_student"
    """direction of the KL divergence: as in the code, or as printed in equation 3"""
    aggregation: Aggregation = "mean"
    """how the teachers' logits are combined: mean (the paper), median, trimmed_mean"""
    trim: Amount = 1
    """number of logits that the trimmed mean leaves out at each end"""
    augmentation: Augmentation = "none"
    """augmentation of the further views of a clean row"""
    views: Annotated[int, Range(at_least=1, limit=10_000)] = 1
    """copies of each clean row, the first unchanged; the teachers' logits are computed for every copy"""
    vote_space: VoteSpace = "logits"
    """what the soft vote averages"""
    tie: Tie = "lowest"
    """winner of a tied hard vote: the lowest class (the paper's code; the target 0 wins ties), or the higher soft vote"""
