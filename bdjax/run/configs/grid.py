"""The settings of a grid, and of the collection of results."""

import pathlib
from dataclasses import dataclass
from typing import Literal

from bdjax.settings import Amount, Count


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The flags of a grid."""

    executor: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: jobs in its queue, with the [partitions] of the file"""
    output: pathlib.Path | None = None
    """the grid's folder; by default runs/grid/<name of the file>"""
    workers: Count = 1
    """local jobs at a time; they divide the cores among themselves"""
    gpus: tuple[Amount, ...] = ()
    """GPUs of this machine for local jobs, one for each worker in turn; without, local jobs compute on the CPU"""
    plan: bool = False
    """print the jobs, and start none"""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """The flags of `collect`."""

    format: Literal["md", "latex", "csv", "parquet"] = "md"
    """md, latex: tables and figures; csv, parquet: a row for each number"""
    output: pathlib.Path | None = None
    """where the files are written; by default collected/ in the first folder"""
    metrics: tuple[str, ...] = ()
    """metrics of the tables; by default cda, asr and f1 where they are known"""
