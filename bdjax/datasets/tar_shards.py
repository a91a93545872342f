"""Tar shards in the form of WebDataset: the members of one sample follow each other and share a name up to its first dot.

    train-000.tar:  0001.jpg  0001.cls  0002.jpg  0002.cls ...

A class is the text of a member .cls or .txt, or a field of a member .json. Pickles are refused. Nothing is unpacked to disk.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bdjax.datasets.archives import Limits, read_tar_gz, short, tar_members
from bdjax.datasets.decoding import SUFFIXES
from bdjax.datasets.files import free_memory, is_residue, open_file
from bdjax.datasets.records import (
    LABEL_COLUMNS,
    Encoded,
    Part,
    Source,
    by_split,
    check_name,
    class_of,
    files_without_images,
)
from bdjax.datasets.validation import ReadOptions, one_line
from bdjax.errors import InputError
from bdjax.types import Unread

ENDINGS = (".tar", ".tar.gz", ".tgz")
PICKLES = (".pyd", ".pickle", ".pkl", ".pth", ".pt", ".joblib")
LABELS = ("cls", "txt")
"""Members whose text is the class, in the order in which they are looked for; then fields of json."""
_MAXIMUM_IMAGE, _MAXIMUM_LABEL = 1 << 28, 1 << 20
_MAXIMUM_MEMBERS = 20_000_000
_PACKED = 0.4
"""Share of the free memory that the members of a packed shard may take."""


class _Sample(NamedTuple):
    name: str
    """of the member with the image, or of the sample if it has none"""
    label: str | None
    read: Callable[[], bytes] | None
    problem: str = ""
    """why there is no image, a predicate"""


class _Others(NamedTuple):
    """What is not read."""

    endings: Counter[str]
    """members of samples, by ending"""
    irregular: dict[str, str]
    """name of a link, a device or the like -> what it is"""


def holds(path: Path) -> bool:
    """Whether a path is a tar archive or a folder with some."""
    return _is_tar(path.name) if path.is_file() else bool(_shards(path))


def find(path: Path, options: ReadOptions) -> Source:
    """The samples of an archive, or of a folder of shards, whose names say which are for testing.

    Raises:
        InputError: An archive is damaged, has a pickle, a name that leads out of it, or a sample without a class.
    """
    if path.is_file():
        parts, unread, root = [("", [path.name])], [], path.parent
    else:
        (parts, unread), root = by_split(path, _shards(path)), path
    found, others = [], _Others(Counter(), {})
    for title, names in parts:
        samples = [(name, sample) for name in names for sample in _samples(root / name, name, options, others)]
        if not found and all(sample.read is None for _, sample in samples):
            raise InputError(f"{path}: has no samples with images; members such as 0001.jpg and 0001.cls are needed")
        found.append(
            Part(
                title,
                [sample.label for _, sample in samples],
                [f"{name}/{sample.name}" for name, sample in samples],
                partial(_images, [sample for _, sample in samples]),
            )
        )
    unread += [Unread(*entry) for entry in others.irregular.items()]
    counts = others.endings.items()
    unread += [Unread(f"*.{ending}", f"are {count:,} members that are not read") for ending, count in counts]
    return Source(tuple(found), (), tuple(unread))


def _is_tar(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _shards(folder: Path) -> list[str]:
    return files_without_images(folder, ENDINGS)


def _images(samples: Sequence[_Sample]) -> Iterator[Encoded]:
    for sample in samples:
        yield Encoded(problem=sample.problem) if sample.read is None else Encoded(sample.read())


# ---- Members ---------------------------------------------------------------------------------------------------------


class _Plain:
    """An archive that is not packed, read in order; a member can be read again by its place."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, size: int) -> bytearray:
        return bytearray(self.file.read(min(size, self.size - self.file.tell())))

    def skip(self, size: int) -> int:
        skipped = min(size, self.size - self.file.tell())
        self.file.seek(skipped, os.SEEK_CUR)
        return skipped


def _samples(path: Path, shard: str, options: ReadOptions, others: _Others) -> Iterator[_Sample]:
    """The samples of an archive in order; `others` gets what is not read."""
    key, members, keys = None, {}, set()
    for name, read in _members(path, shard, others.irregular):
        _check_member(path, name)
        folder, _, base = name.rpartition("/")
        stem, dot, ending = base.partition(".")
        here = f"{folder}/{stem}" if folder else stem
        if not dot or not stem:
            others.endings[base if not dot else ending] += 1
            continue
        if here != key and members:
            yield _sample(path, key, members, options, others.endings)
        if here != key:
            if here in keys:
                raise InputError(
                    f"{path}: has the sample {short(here)} in two places; a sample's members must follow each other, and the "
                    "names of samples must differ"
                )
            keys.add(here)
            key, members = here, {}
        if ending in members:
            raise InputError(f"{path}: has two members {short(name)}; names must differ")
        members[ending] = (name, read)
    if members:
        yield _sample(path, key, members, options, others.endings)


def _check_member(path: Path, name: str) -> None:
    if name.lower().endswith(PICKLES):
        raise InputError(
            f"{path}: member {short(name)} is a pickle by its name, and reading one can run code; shards of images (.jpg, "
            ".png) and classes (.cls, .txt, .json) are needed"
        )
    check_name(path, name)


def _members(path: Path, shard: str, irregular: dict[str, str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name of each file in an archive, and what reads it; `irregular` gets what is no file."""
    if path.name.lower().endswith(".tar"):
        yield from _plain_members(path, shard, irregular)
        return
    most = int(_PACKED * free_memory())
    limits = Limits("packed shards", _MAXIMUM_IMAGE, most, _MAXIMUM_MEMBERS, f"at most {_MAXIMUM_MEMBERS:,} are read")
    found = read_tar_gz(path, limits, lambda name: True)
    irregular |= {f"{shard}/{name}": problem for name, problem in found.others.items()}
    for name, content in found.contents.items():
        yield name, partial(bytes, content)


def _plain_members(path: Path, shard: str, irregular: dict[str, str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with open_file(path, 1 << 62, "") as file:
        stream = _Plain(file)
        try:
            for number, member in enumerate(tar_members(stream, path)):
                if number >= _MAXIMUM_MEMBERS:
                    raise InputError(f"{path}: has over {_MAXIMUM_MEMBERS:,} members")
                start, end = file.tell(), file.tell() + member.size
                if member.isreg() and not is_residue(member.name):
                    if end > stream.size:
                        raise EOFError("the archive ends within a member")
                    yield member.name, partial(_read_at, path, start, member.size)
                    file.seek(start)
                elif not member.isreg() and not member.isdir() and not is_residue(member.name):
                    is_link = member.islnk() or member.issym()
                    irregular[f"{shard}/{member.name}"] = "is a link" if is_link else "is not a regular file"
                has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                if has_data:
                    stream.skip(member.size + -member.size % 512)
        except InputError:
            raise
        except Exception as error:  # tarfile raises several kinds on a damaged header
            raise InputError(f"{path}: is not an intact .tar archive ({one_line(error)[:150]})") from error


def _read_at(path: Path, start: int, size: int) -> bytes:
    if size > _MAXIMUM_IMAGE:
        raise InputError(f"{path}: has a member of {size:,} bytes; at most {_MAXIMUM_IMAGE:,} are read")
    with open_file(path, 1 << 62, "") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise InputError(f"{path}: ended while it was read")
    return data


# ---- Samples ---------------------------------------------------------------------------------------------------------


def _sample(
    path: Path, key: str, members: Mapping[str, tuple[str, Callable[[], bytes]]], options: ReadOptions, others: Counter
) -> _Sample:
    where = f"{path}: sample {short(key)}"
    images = [ending for ending in members if f".{ending.rpartition('.')[2].lower()}" in SUFFIXES]
    if not images and options.image_column.lstrip(".") not in members:  # a README.txt, for instance
        return _Sample(key, None, None, f"is a sample without an image; it has {_listed(members)}")
    if options.image_column:
        image = options.image_column.lstrip(".")
        if image not in members:
            raise InputError(
                f"{where}: has no member .{image}; it has {_listed(members)}; --image-column=NAME names one"
            )
    elif len(images) > 1:
        raise InputError(f"{where}: has {len(images)} images ({_listed(images)}); --image-column=NAME names one")
    else:
        (image,) = images
    label, source = _label(where, members, options)
    for ending in members:
        if ending not in (image, source):
            others[ending] += 1
    name, read = members[image]
    return _Sample(name, label, read)


def _listed(endings: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f".{short(ending)}" for ending in list(endings)[:10])


def _label(
    where: str, members: Mapping[str, tuple[str, Callable[[], bytes]]], options: ReadOptions
) -> tuple[str | None, str]:
    """The class of a sample, and the ending of the member that says so."""
    wanted = options.label_column.lstrip(".")
    for ending in (wanted,) if wanted else LABELS:
        if ending in members and ending != "json":
            return class_of(where, _text(where, *members[ending]).strip()), ending
    if "json" in members:
        fields = _fields(where, *members["json"])
        names = (wanted,) if wanted and wanted != "json" else LABEL_COLUMNS
        for name in names:
            if name in fields:
                return class_of(f"{where}: {name!r}", fields[name]), "json"
        there = ", ".join(map(repr, list(fields)[:20])) or "none"
        raise InputError(
            f"{where}: has no class under {' or '.join(map(repr, names[:3]))}; its members are {_listed(members)}, and the "
            f"fields of .json are {there}; --label-column=NAME names one"
        )
    looked = f".{wanted}" if wanted else ".cls, .txt or .json"
    raise InputError(f"{where}: has no class ({looked}); it has {_listed(members)}; --label-column=NAME names one")


def _text(where: str, name: str, read: Callable[[], bytes]) -> str:
    data = read()
    if len(data) > _MAXIMUM_LABEL:
        raise InputError(f"{where}: {short(name)} has {len(data):,} bytes; a class is a short text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {short(name)} is no text in UTF-8") from error


def _fields(where: str, name: str, read: Callable[[], bytes]) -> Mapping[str, object]:
    try:
        value = json.loads(_text(where, name, read))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {short(name)} is not JSON ({one_line(error)[:100]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {short(name)} is no JSON object")
    return value
