"""The settings that several commands have. Like every configuration, they need no JAX, so that --help is quick."""

import pathlib
from dataclasses import dataclass
from typing import Literal

from bdjax.choices import (
    PROBE_SECONDS,
    Augmentation,
    ComputeDtype,
    Layout,
    Lowering,
    Optimiser,
    Recipe,
    Schedule,
)
from bdjax.extras import Export
from bdjax.settings import Amount, Count, ImageSide, LearningRate, Members, NotNegative, NumRows, Seed, Steps, Width


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The settings that every experiment has; each adds its own."""

    dataset: str = "digits"
    """a named dataset (digits, mnist, cifar10, ...; an unknown name prints the whole list), tfds:NAME, or the path of an image
    folder, .npz, parquet, tar shards or COCO's annotations"""
    seeds: Members = 3
    """number of seeds, trained as members of the same calls; tables show mean and standard deviation"""
    seed: Seed = 0
    """the first seed"""
    data_dir: pathlib.Path | None = None
    """folder with the datasets; by default BDJAX_DATA_DIR, else a cache that they are downloaded into"""
    output: pathlib.Path | None = None
    """the run's folder; by default runs/<experiment>/<dataset>-<preset>"""
    train_rows: NumRows = 0
    """number of training rows to use, drawn once; 0 for all"""
    test_rows: NumRows = 0
    """number of test rows to use, drawn once; 0 for all"""
    like: str = ""
    """a named dataset whose settings attacks and defenses use; by default that of --dataset if it is a name, and none if it is
    a path"""
    skip_unreadable: bool = False
    """leave out files of a folder that cannot be read, and list them in the report; by default the run ends with an error"""
    allow_empty_classes: bool = False
    """accept a folder or an .npz with classes that have no rows"""
    image_size: ImageSide | None = None
    """height and width that all images are scaled to, without cropping; by default they keep their size, and the run ends with
    an error if a folder has several sizes"""
    image_column: str = ""
    """the column (or member of a tar) with the images, in data that has columns; by default image, img or the like"""
    label_column: str = ""
    """the column (or member of a tar) with the classes; by default label, class or the like"""
    target: Amount = 0
    """the attacker's class"""

    layout: Layout | Literal["auto"] = "auto"
    """how members are laid out in a compiled call; auto measures once which is fastest on this machine"""
    lowering: Lowering | Literal["auto"] = "auto"
    """how convolutions are computed; auto measures once which is fastest on this machine"""
    compute_dtype: ComputeDtype = "float32"
    """dtype of activations and products; parameters, statistics and losses are always float32"""
    probe_seconds: NotNegative = PROBE_SECONDS
    """time limit of that measurement, whose result is kept for later runs on this machine"""
    member_group: Amount = 0
    """most members that train in one call; 0 for as many as fit into memory"""
    tensorboard: bool = False
    """write each stage's curves to tensorboard/ in the run's folder, as scalars for TensorBoard (with the extra grid)"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The setting of every run that leaves networks in models/."""

    export: tuple[Export, ...] = ()
    """further forms of the networks in models/, beside model.safetensors: stablehlo, onnx (with the extra onnx)"""


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """The setting of every audit and of every run of defenses."""

    evidence: bool = False
    """write evidence/: verdict.json, findings.sarif, bom.cdx.json, model_card.md and SHA256SUMS; see docs/evidence.md"""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run trains the networks that no attack and no defense trains in its own way; see `train_config`."""

    width: Width = 64
    """channels of the first stage: 64 is the papers' size, other values scale all channels"""
    epochs: Count = 80
    """epochs of undefended or clean training, and of training from scratch in defenses without a setting of their own"""
    batch_size: Count = 128
    """batch size of every training"""
    recipe: Recipe = ""
    """named recipe of this training, in place of optimiser, learning rate, schedule and weight decay: speedrun"""
    optimiser: Optimiser = "adam"
    """optimiser of this training"""
    learning_rate: LearningRate = 1e-3
    """initial learning rate of this training"""
    schedule: Schedule = "cosine"
    """learning-rate schedule of this training"""
    steps: Steps = ()
    """for schedule steps: pairs of an epoch and the learning rate from it on"""
    weight_decay: NotNegative = 0.0
    """L2 penalty, added to the gradient as in PyTorch"""
    augmentation: Augmentation = "none"
    """augmentation of training rows, after poisoning"""
    evaluation_batch_size: Count = 250
    """batch size of evaluation"""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(TrainingConfig, ExperimentConfig):
    """The settings of every run that compares defenses, on training sets or on models."""

    preset: Literal["quick", "paper", "strong"] = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU; strong: our own settings, same threat
    model"""
    attacks: str = "badnets,blended,sig,none"
    """attacks separated by commas, each with its settings after colons: badnets:poison_rate=0.05:target=4. none is the
    unchanged training set. Third-party data, at a path, is not attacked by default"""
    defenses: str = "none"
    """defenses separated by commas, each with its settings: abl,lfd:alpha=0.5; or all, the whole registry; joined by +, the
    second runs on the first one's models: fine_tuning+nad"""
    study: str = ""
    """a table or figure of the paper to run, in place of --attacks and --defenses"""


@dataclass(frozen=True, kw_only=True)
class SuspectConfig(ComparisonConfig):
    """The settings of every run on suspect training sets; `--preset` and `--dataset` decide the defaults of the others."""

    model: str = "resnet18_cifar"
    """architecture of the network that is trained on the suspect rows"""
