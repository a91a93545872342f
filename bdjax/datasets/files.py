"""Files of untrusted folders: what is there, and their content, within limits.

Names are decided here once for all readers: what an operating system leaves behind is no data and is skipped silently;
everything else that a reader does not read belongs in `Dataset.unread`.
"""

import json
import os
import re
import resource
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

_RESIDUE = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", ".ipynb_checkpoints", ".ds_store"}
_RESIDUE |= {".spotlight-v100", ".trashes", ".fseventsd", "$recycle.bin", "system volume information"}
# O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_MAXIMUM_FILES = 20_000_000
_MAXIMUM_DEPTH = 64


class Listed(NamedTuple):
    """An entry of a folder."""

    name: str
    """relative to the listed folder, with "/" """
    path: Path
    problem: str = ""
    """why it is not a regular file that can be read; "" if it is. A predicate: "is a link to a folder" """
    is_link: bool = False
    """a symbolic link"""
    inode: int = 0
    """the same for hard links to one file"""


def is_residue(name: str) -> bool:
    """Whether a file is left by an operating system or a tool, and so no data: "._cat.png", "__MACOSX/a", "Thumbs.db".

    Args:
        name: relative to the dataset's folder or archive, with "/".
    """
    return any(part.startswith("._") or part.lower() in _RESIDUE for part in name.split("/"))


def list_files(folder: Path) -> list[Listed]:
    """Lists the files in a folder and in the folders below it, without residue of operating systems.

    Links to folders are not followed, so that a loop of links ends; links to files are.

    Args:
        folder: The folder.

    Returns:
        All files, and the folders and special files that are not entered, sorted by their names' parts.

    Raises:
        InputError: If the folder cannot be listed, or has too many files or levels.
    """
    return sorted(_walk(folder, ()), key=lambda listed: listed.name.split("/"))


def list_level(folder: Path) -> tuple[list[Listed], list[Listed]]:
    """Lists a folder without entering the folders in it, and without residue of operating systems.

    Args:
        folder: The folder.

    Returns:
        The folders in it, links to folders included, and everything else; both sorted by name.

    Raises:
        InputError: If the folder cannot be listed, or has too many files.
    """
    folders, others = [], []
    for entry in _entries(folder):
        is_folder = _is_folder(entry)
        problem = "" if is_folder else _problem(entry)
        listed = Listed(entry.name, Path(entry.path), problem, entry.is_symlink(), entry.inode())
        (folders if is_folder else others).append(listed)
    return sorted(folders, key=lambda listed: listed.name), sorted(others, key=lambda listed: listed.name)


def read_file(path: str | Path, maximum_bytes: int, what: str) -> bytes:
    """Reads a regular file; anything else (a device, a pipe, a folder) is refused without waiting for it.

    Args:
        path: The file, or a link to it.
        maximum_bytes: The limit on its size.
        what: What has the limit, for the error message: "images", "files of GTSRB".

    Returns:
        The content.

    Raises:
        InputError: If it is not a regular file, cannot be read, or is too large.
    """
    number = _open(path, maximum_bytes, what)
    try:
        size = os.fstat(number).st_size
        pieces = []
        left = maximum_bytes + 1  # the file may grow while it is read
        while left and (piece := os.read(number, min(left, size + 1))):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error.strerror or error)})") from error
    finally:
        os.close(number)
    if not left:
        raise InputError(f"{path}: grew beyond {maximum_bytes} bytes while it was read")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_json(path: str | Path, maximum_bytes: int, what: str, *, strict: bool = False) -> tuple[bytes, Any]:
    """Reads a file of JSON, for its bytes and their value; other arguments and errors are those of `read_file`.

    Args:
        strict: Whether NaN and infinities, which Python writes and JSON has not, are refused.
    """

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number")

    data = read_file(path, maximum_bytes, what)
    try:
        return data, json.loads(data, parse_constant=refuse if strict else None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({one_line(error)[:100]})") from error


def open_file(path: str | Path, maximum_bytes: int, what: str) -> BinaryIO:
    """Opens a regular file; arguments and errors are those of `read_file`."""
    return os.fdopen(_open(path, maximum_bytes, what), "rb")


def _open(path: str | Path, maximum_bytes: int, what: str) -> int:
    """The descriptor of an opened regular file within the limit."""
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error.strerror or error)})") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"{str(path)!r}: cannot be read ({one_line(error)})") from error
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size <= maximum_bytes:
        return number
    os.close(number)
    if stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: has {status.st_size} bytes; {what} have at most {maximum_bytes}")
    raise InputError(f"{path}: is not a regular file; a plain file is needed")


def free_memory() -> int:
    """Returns how many bytes can be allocated, as far as the system says."""
    page = os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_PHYS_PAGES") * page
    with suppress(OSError, ValueError):  # Linux only
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        available = int(match[1]) << 10 if match else available
    with suppress(OSError, ValueError):  # a container's limit, if there is one
        group = Path("/sys/fs/cgroup")
        used = re.search(r"^anon (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        available = min(available, int((group / "memory.max").read_text()) - int(used[1] if used else 0))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            available = min(available, limit - int(Path("/proc/self/statm").read_text().split()[0]) * page)
    return max(available, 0)


def _walk(folder: Path, parents: tuple[str, ...]) -> Iterator[Listed]:
    try:
        entries = _entries(folder)
    except InputError as error:
        if not parents:
            raise
        yield Listed("/".join(parents) + "/", folder, str(error).removeprefix(f"{folder}: "))
        return
    for entry in entries:
        parts = (*parents, entry.name)
        name = "/".join(parts)
        if entry.is_dir(follow_symlinks=False):
            if len(parts) > _MAXIMUM_DEPTH:
                yield Listed(name + "/", Path(entry.path), f"is more than {_MAXIMUM_DEPTH} folders deep")
            else:
                yield from _walk(Path(entry.path), parts)
            continue
        is_link = entry.is_symlink()
        problem = "is a link to a folder" if is_link and _is_folder(entry) else _problem(entry)
        yield Listed(name, Path(entry.path), problem, is_link, entry.inode())


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, without residue."""
    try:
        with os.scandir(folder) as listing:
            entries = [entry for entry in listing if not is_residue(entry.name)]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({one_line(error.strerror or error)})") from error
    if len(entries) > _MAXIMUM_FILES:
        raise InputError(f"{folder}: has {len(entries)} files; the limit is {_MAXIMUM_FILES}")
    return entries


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _problem(entry: os.DirEntry) -> str:
    try:
        if entry.is_file():
            return ""
        return (
            "is a link to nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "is not a regular file"
        )
    except OSError as error:
        return f"cannot be read ({one_line(error.strerror or error)})"
