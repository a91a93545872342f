"""A grid's TOML file: which experiments run on which datasets, with which attacks, defenses and seeds.

Everything that is wrong with the file is an error that names the file and the line. The TOML reader of the standard library
keeps no line numbers, so the line of a key or a value is found by a scan of the text.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bdjax.datasets.files import read_file
from bdjax.errors import InputError
from bdjax.settings import Amount, Count, Members, NotEmpty, Positive, Range, Seed, kinds_of, mistake, nearest, shown

LONGEST_FILE = 2**20
"""Bytes."""
BLOCKS, PARTITIONS = "blocks", "partitions"
Preset = Literal["quick", "paper", "strong"]
Names = Annotated[tuple[str, ...], NotEmpty()]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One [[blocks]] table: every experiment on every dataset, with every attack, defense and seed. What a block does not set
    is set at the top of the file, for all blocks."""

    experiments: Names
    """names of experiments: lfd, abm, vbd, robust_kd, attack, ta_kd"""
    datasets: Names = ("digits",)
    """as --dataset"""
    preset: Preset = "quick"
    """as --preset; also on a GPU, the default is quick"""
    attacks: tuple[str, ...] = ()
    """as in --attacks, without commas; by default those of the preset"""
    defenses: tuple[str, ...] = ()
    """as in --defenses"""
    seeds: Members | None = None
    """number of seeds, which are members of the same calls; by default that of the preset"""
    seed: Seed = 0
    """the first seed"""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """further flags of the experiments, with _ in the place of -"""
    members_per_job: Amount = 0
    """most attacks times seeds of a job; 0 for as many as are estimated to fit into memory"""
    partition: str = ""
    """a table in [partitions]; by default the only one"""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One [partitions.NAME] table: what a job asks Slurm for, by the names of its flags. NAME is the partition."""

    time: Count = 60
    """minutes; a job that runs out of them is queued again, at most 100 times, and continues"""
    nodes: Count = 1
    tasks_per_node: Count = 1
    """processes; several share the members of a job by `jax.distributed`"""
    cpus_per_task: Count = 1
    gpus_per_node: Amount = 0
    mem_gb: Annotated[float, Range(above=0, limit=1e6)] | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    device_gb: Positive | None = None
    """memory of one device, for the estimate of the members that fit; without it nothing is estimated, and all members of a
    dataset are one job"""
    setup: tuple[str, ...] = ()
    """shell commands before the job, such as "module load cuda" """


@dataclass(frozen=True)
class GridFile:
    """A grid's file without mistakes of form; the values of flags, attacks and defenses are not checked."""

    path: Path
    text: str
    blocks: tuple[Block, ...]
    partitions: Mapping[str, Partition]

    def error(self, block: int | None, message: str, *words: str) -> InputError:
        """An error that names the file and the line.

        Args:
            block: index of the block that it is in; None for any place.
            message: what is wrong.
            words: keys or values to find the line by; the first that is in the file counts.
        """
        return _error(self.path, self.text, block, message, *words)


def read(path: Path) -> GridFile:
    """Read a grid's file.

    Raises:
        InputError: the file cannot be read, is not TOML, or has keys or values that are not possible.
    """
    text = _read_text(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        where = f" line {found[2]}" if found else ""
        raise InputError(f"{path}{where}: {found[1] if found else error}; the file is not TOML") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    shared = {name: value for name, value in content.items() if name not in (BLOCKS, PARTITIONS)}
    tables = content.get(BLOCKS, [])
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise _error(path, text, None, "has no [[blocks]], the tables that list experiments and datasets", BLOCKS)
    # A wrong key at the top is reported as such, not in each block.
    _checked(Block, {"experiments": ["lfd"], **shared}, path, text, None, {BLOCKS, PARTITIONS})
    partitions = content.get(PARTITIONS, {})
    if not (isinstance(partitions, dict) and all(isinstance(table, dict) for table in partitions.values())):
        raise _error(path, text, None, "partitions should be tables: [partitions.NAME]", PARTITIONS)
    found = {name: _checked(Partition, table, path, text, name) for name, table in partitions.items()}
    blocks = tuple(_block(path, text, number, shared, table) for number, table in enumerate(tables))
    file = GridFile(path, text, blocks, found)
    for number, block in enumerate(blocks):
        if block.partition and block.partition not in found:
            near = nearest(block.partition, found) or f"; there are {', '.join(found) or 'none'}"
            raise file.error(
                number, f"partition {shown(block.partition)} has no table [partitions.NAME]{near}", block.partition
            )
        if not block.partition and len(found) > 1:
            raise file.error(number, f"there are several partitions ({', '.join(found)}); the block should name one")
    return file


def _read_text(path: Path) -> str:
    data = read_file(path, LONGEST_FILE, "files of grids")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}: is not UTF-8, as TOML files are") from None


def _block(path: Path, text: str, number: int, shared: Mapping[str, Any], table: Mapping[str, Any]) -> Block:
    both = {**shared, **table}
    if isinstance(shared.get("flags"), dict) and isinstance(table.get("flags"), dict):
        both["flags"] = {**shared["flags"], **table["flags"]}
    if "experiments" not in both:
        raise _error(path, text, number, 'should list its experiments, such as experiments = ["lfd"]')
    return _checked(Block, both, path, text, number)


def _checked(
    kind: type, table: Mapping[str, Any], path: Path, text: str, where: int | str | None, others: set[str] = frozenset()
) -> Any:
    """A table as a dataclass; lists become tuples.

    Raises:
        InputError: an unknown key, or a value that its field cannot have.
    """
    kinds = kinds_of(kind)
    for name, value in table.items():
        if name not in kinds:
            names = [*kinds, *others]
            near = nearest(name, names) or f"; there are {', '.join(names)}"
            if kind is Block and not nearest(name, names):
                near += ", and flags of the experiments go into flags = {...}"
            raise _error(path, text, where, f"there is no key {shown(name)}{near}", name)
        if name == "flags":
            if not isinstance(value, dict):
                raise _error(path, text, where, "flags should be a table: flags = { epochs = 10 }", name)
        elif wrong := mistake(kinds[name], _as_tuple(value)):
            wrong = wrong.replace("a tuple of values, such as (1, 2)", 'a list, such as ["a", "b"]')
            written = [value, *value] if isinstance(value, list) else [value]
            raise _error(path, text, where, f"{name} {shown(value)} {wrong}", name, *map(str, written))
    return kind(**{name: _as_tuple(value) for name, value in table.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


# ---- Lines -----------------------------------------------------------------------------------------------------------


def _error(path: Path, text: str, where: int | str | None, message: str, *words: str) -> InputError:
    line = line_of(text, where, *words)
    return InputError(f"{path}{f' line {line}' if line else ''}: {message}")


def line_of(text: str, where: int | str | None, *words: str) -> int | None:
    """The line, from 1, that a key or a value stands on.

    Args:
        text: of the file.
        where: index of a block, name of a partition, or None for what is before all of them.
        words: keys, or values as text; the first that is found counts. A block's words may stand above all blocks.

    Returns:
        The line; the beginning of the block or the partition if no word is found; None if that is not found, either.
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"\s*\[", line) and _is_table(line)]
    ranges = {}
    ends = [*starts[1:], len(lines)]
    block = -1
    for start, end in zip(starts, ends, strict=False):
        header = lines[start].partition("#")[0]
        if re.match(rf"\s*\[\[\s*[\"']?{BLOCKS}", header):
            block += 1
            ranges[block] = [start, end]
        elif re.match(rf"\s*\[\s*{BLOCKS}\s*\.", header) and block >= 0:  # [blocks.flags]
            ranges[block][1] = end
        elif found := re.match(rf"\s*\[\s*{PARTITIONS}\s*\.\s*[\"']?([^\"'\].]+)", header):
            ranges[found[1].strip()] = [start, end]
        else:
            ranges.setdefault(None, [start, end])[1] = end
    top = [0, starts[0] if starts else len(lines)]
    if None in ranges:  # tables at the top, such as [flags]
        top[1] = max(top[1], ranges[None][1])
    places = [top] if where is None else [ranges[where], top] if where in ranges else [[0, len(lines)]]
    for word in words:
        for start, end in places:
            for number in range(start, end):
                if _has(lines[number], word):
                    return number + 1
    return ranges[where][0] + 1 if where in ranges and where is not None else None


def _is_table(line: str) -> bool:
    """Whether a line is a header, not a list that begins on a line of its own."""
    return bool(re.fullmatch(r"\s*(\[\[[^\[\]]+\]\]|\[[\w\s.\"'-]+\])\s*(#.*)?", line)) and "," not in line


def _has(line: str, word: str) -> bool:
    """Whether a line has a word as a key, as a string or as a number, outside of a comment."""
    word = re.escape(word)
    before = re.split(r"#(?=[^\"']*$)", line)[0]
    key = rf"(^|[\s{{,.\[])[\"']?{word}[\"']?\s*([=.\]]|$)"
    return bool(re.search(key, before) or re.search(rf"[\"']{word}[\"']|[\s=\[,]{word}(?=[\s,\]}}]|$)", before))
