"""The configuration of audits of models."""

from dataclasses import dataclass
from typing import Annotated, Literal

from bdjax.choices import QUERY_BATCH
from bdjax.metrics import LEAST_CONTROLS
from bdjax.run.configs.shared import EvidenceConfig, ExperimentConfig, TrainingConfig
from bdjax.settings import Amount, Count, Members, NumRows, Range, Width

Controlled = Annotated[int, Range(at_least=LEAST_CONTROLS, limit=1000)]


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, ExperimentConfig, EvidenceConfig):
    """Every setting of an audit of models; `--preset` and `--dataset` decide the defaults of the others."""

    model: tuple[str, ...] = ()
    """the suspect model, or several of one architecture: a folder, FILE.safetensors:ARCHITECTURE, FILE.onnx or
    http://HOST:PORT/PATH; a folder may hold several models"""
    members: tuple[Annotated[int, Range(at_least=1, limit=1_000_000)], ...] = ()
    """which of a folder's models to audit, counted from 1; by default all"""
    outputs: Literal["logits", "probabilities", "labels"] = "logits"
    """what a black box (.onnx, http) returns"""
    preset: Literal["quick", "paper"] = "paper"
    """quick: minutes on two cores; paper: the searches of the papers, for a GPU"""
    seeds: Members = 1
    """an audit has one seed; --controls sets the number of control networks"""

    controls: Controlled = 9
    """clean networks of the suspect's architecture, trained on the clean rows: the p-value is at least 1 / (this + 1)"""
    clean_rows: NumRows = 0
    """clean training rows that the control networks learn from; 0 for all"""
    search_rows: Count = 1000
    """clean rows among them that triggers are searched on"""
    held_out_rows: Count = 1000
    """test rows that success is measured on"""
    search_epochs: Count = 80
    """passes over the rows of the search"""
    search_patience: Count = 5
    """epochs of the search, all successful or all not, after which the weight of the masks' size changes; of
    few epochs it must be small, or masks stay large"""
    search_batch_size: Count = 64
    """rows per step of the search; each is stamped with the triggers of all classes"""
    random_triggers: Amount = 150
    """triggers of each of seven kinds that are drawn at random and put on 40 held-out rows; 0 for none"""
    surrogate: str = "resnet10"
    """architecture of the networks that imitate a black box, and of its control networks"""
    surrogate_epochs: Count = 80
    """epochs of these imitations"""
    queries: Count = 4
    """pictures made of each clean row that a black box gets: itself and this many less one with other rows or
    noise in places"""
    query_batch: Count = QUERY_BATCH
    """most images that such a model gets in one call"""

    width: Width = 64
    """channels of surrogates; suspects with known weights set that of their control networks"""
    epochs: Count = 80
    """epochs of the control networks"""
