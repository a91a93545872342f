"""The configuration of runs on poisoned training sets."""

from dataclasses import dataclass

from bdjax.run.configs.shared import EvidenceConfig, ExportConfig, SuspectConfig
from bdjax.settings import Share


@dataclass(frozen=True, kw_only=True)
class Config(SuspectConfig, ExportConfig, EvidenceConfig):
    """Every setting of a run of defenses."""

    clean_share: Share = 0.05
    """share of the training rows that is held back before poisoning, for defenses that need clean rows"""
    clean_data: str = ""
    """a dataset's name or path to take the clean rows from instead"""
    save_models: bool = True
    """write the networks that the experiment's own defense makes in the first seed"""
