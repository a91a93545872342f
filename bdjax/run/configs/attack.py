"""The configuration of attack runs."""

from dataclasses import dataclass
from typing import Literal

from bdjax.choices import Augmentation, Recipe, Schedule
from bdjax.run.configs.shared import ExperimentConfig, ExportConfig
from bdjax.settings import Amount, Count, LearningRate, NotNegative, PositiveShare, Width


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig, ExportConfig):
    """Every setting of an attack run; `--preset` and `--dataset` decide the defaults of the others."""

    attack: str = "badnets"
    """an attack, several separated by commas, a hybrid (badnets+sig), or all"""
    preset: Literal["quick", "paper"] = "paper"
    """quick: minutes on two cores; paper: ResNet-18 of width 64 for 80 epochs, as LfD trains, for a GPU"""
    label_rule: str | None = None
    """how poisoned rows are relabelled: all_to_one, all_to_all, clean_label, ...; by default each attack's own rule"""
    poison_rate: PositiveShare | None = None
    """share of all training rows that each trigger poisons; by default each attack's own rate"""
    change: tuple[str, ...] = ()
    """settings of an attack, as name=value, or attack.name=value if several are run"""
    costly_seeds: Amount = 0
    """number of seeds for attacks that train a trigger or control the training; 0 for all"""
    save_poisoned: bool = True
    """write the first seed's poisoned training sets"""

    model: str = "resnet18"
    """architecture of the victims, the clean reference, and the clean model that some attackers have"""
    width: Width = 64
    """channels of the first stage"""
    epochs: Count = 80
    """epochs of the clean reference and of victims trained from scratch on poisoned data"""
    controlled_epochs: Count = 100
    """epochs of victims whose attacker controls the training from scratch"""
    fine_tuning_epochs: Count = 8
    """epochs of victims that start from the clean model"""
    batch_size: Count = 128
    """batch size of every training"""
    recipe: Recipe = ""
    """named recipe of training from scratch, in place of Adam, learning rate, schedule and weight decay: speedrun"""
    learning_rate: LearningRate = 1e-3
    """initial learning rate of Adam"""
    fine_tuning_learning_rate: LearningRate = 1e-4
    """initial learning rate of Adam for victims that start from the clean model"""
    schedule: Schedule = "cosine"
    """learning-rate schedule: half a cosine, or the plateau rule on the training loss"""
    weight_decay: NotNegative = 0.0
    """L2 penalty, added to the gradient as in PyTorch's Adam"""
    augmentation: Augmentation = "none"
    """augmentation of training rows, after poisoning"""
    evaluation_batch_size: Count = 250
    """batch size of evaluation"""
