"""The configuration of runs of detectors, and of audits of training sets."""

from dataclasses import dataclass

from bdjax.run.configs.shared import EvidenceConfig, SuspectConfig
from bdjax.settings import Amount, Count


@dataclass(frozen=True, kw_only=True)
class Config(SuspectConfig, EvidenceConfig):
    """Every setting of a run; `--preset` and `--dataset` decide the defaults of the others. The settings of undefended training
    (model to augmentation) are used only if a detector needs the attacked network."""

    target: Amount = 0
    """the target class in the first seed; each further seed takes the next class"""
    defenses: str = "vbd"
    """detectors separated by commas, each with its settings: vbd,scan:threshold=10"""
    clean_per_class: Amount = 10
    """clean rows of each class, taken from the test set, for detectors that need them; AGPD chooses among five times as many,
    those that the network classifies correctly. 0 leaves those detectors out"""
    clean_data: str = ""
    """a dataset's name or path to take the clean rows from; an audited dataset has no test set"""
    suspects_at_once: Count = 10
    """number of training sets that share a call; more need more memory"""
    copy_files: bool = False
    """when auditing an image folder, copy the files that are not flagged"""
    sensitivity: bool = True
    """when an audit finds nothing, plant a trigger in copies of the rows, and report from how many rows on the detector finds
    it; takes three to six times as long as the audit itself"""
