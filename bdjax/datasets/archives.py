"""Archives of untrusted data (.gz, .tar.gz, .zip, .npz), read into memory within limits; nothing is written to disk.

No size in a file is believed: unpacked bytes are counted as they come, and the header of an array is compared with its member
and with the memory that is available before any of it is read.
"""

import io
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from bdjax.datasets.files import free_memory, is_residue, open_file
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

_CHUNK = 1 << 16
_GZIP = 31  # zlib's code for a gzip header and checksum
_MAXIMUM_GZIP_STREAMS = 20_000
_TAR_BLOCK = 512
_MAXIMUM_TAR_HEADER_BYTES = 1 << 16  # long names and pax records
_MAXIMUM_TAR_HEADERS = 8  # before one member
_MAXIMUM_PADDING_BYTES = 1 << 20
_MAXIMUM_NAME_LETTERS = 4096
_MAXIMUM_DIRECTORY_BYTES = 1 << 26  # of a .zip archive
_BYTES_OF_AN_ENTRY = 46  # at least
_MAXIMUM_ARRAYS = 10_000
_MAXIMUM_ARRAY_HEADER_BYTES = 4096  # NumPy writes 128 for any plain array
_MAXIMUM_DIMENSIONS = 16
_MAXIMUM_PACKING = 200
"""how much larger than its archive a set of arrays may be if it has more than `_FREELY_UNPACKED_BYTES`; images shrink less"""
_FREELY_UNPACKED_BYTES = 1 << 28


class Limits(NamedTuple):
    """What an archive may unpack to."""

    what: str
    """what has the limits, in the plural: "files of GTSRB" """
    file_bytes: int
    """bytes of one member"""
    total_bytes: int
    """bytes of all members"""
    members: int
    published: str
    """what a true archive has: "the published archive has 8" """


# ---- gzip and tar -----------------------------------------------------------------------------------------------------


class GzipStream:
    """The unpacked content of a .gz file, read in order, at most `maximum_bytes` of it.

    Python's `gzip` reads the header's text byte by byte, for minutes if it has gigabytes; zlib does not.
    """

    def __init__(self, file: BinaryIO, maximum_bytes: int, where: object):
        self._file, self._left, self._maximum, self._where = file, maximum_bytes, maximum_bytes, where
        self._unpacker = zlib.decompressobj(_GZIP)
        self._packed = b""
        self._num_streams = 1

    def read(self, size: int) -> bytearray:
        """Returns the next `size` bytes, or fewer at the end of the file.

        Raises:
            InputError: If the file unpacks to more than the limit.
            EOFError, zlib.error: If it is damaged.
        """
        data = bytearray()
        while len(data) < size and (unpacked := self._unpack(min(size - len(data), _CHUNK))):
            data += unpacked
            self._left -= len(unpacked)
            if self._left < 0:
                raise InputError(f"{self._where}: unpacks to more than the limit of {self._maximum} bytes")
        return data

    def skip(self, size: int) -> int:
        """Passes over the next bytes; returns how many there were."""
        skipped = 0
        while skipped < size and (data := self.read(min(size - skipped, _CHUNK))):
            skipped += len(data)
        return skipped

    def _unpack(self, size: int) -> bytes:
        while True:
            packed = self._packed or self._file.read(_CHUNK)
            if self._unpacker is None:  # after the end of a stream: padding, another stream, or the end of the file
                if not packed:
                    return b""
                self._packed = packed.lstrip(b"\0")
                if self._packed:
                    self._unpacker = zlib.decompressobj(_GZIP)
                    self._num_streams += 1
                    if self._num_streams > _MAXIMUM_GZIP_STREAMS:
                        raise InputError(f"{self._where}: has over {_MAXIMUM_GZIP_STREAMS} streams; an archive has one")
                continue
            data = self._unpacker.decompress(packed, size)
            if self._unpacker.eof:
                self._packed, self._unpacker = self._unpacker.unused_data, None
            else:
                self._packed = self._unpacker.unconsumed_tail
                if not packed and not data:
                    raise EOFError("the file ends too early")
            if data:
                return data


class TarFiles(NamedTuple):
    """The members of a .tar.gz."""

    contents: dict[str, bytearray]
    """name -> content of each wanted file"""
    others: dict[str, str]
    """name -> why it is not a regular file, or "", for the other members but folders and residue of operating systems"""


def read_tar_gz(path: Path, limits: Limits, is_wanted: Callable[[str], bool]) -> TarFiles:
    """Reads files of a .tar.gz archive into memory.

    Python's `tarfile` reads long names, pax records and maps of sparse files whole, whatever their size.

    Args:
        path: The archive.
        limits: What it may unpack to.
        is_wanted: name of a member, without "./" -> whether to read it.

    Returns:
        The files.

    Raises:
        InputError: If the archive is damaged or exceeds a limit.
    """
    found = TarFiles({}, {})
    # A .gz file is hardly larger than its content, so neither may its comment be.
    with open_file(path, limits.total_bytes + _MAXIMUM_PADDING_BYTES, "archives of " + limits.what) as file:
        stream = GzipStream(file, limits.total_bytes, path)
        try:
            for position, member in enumerate(tar_members(stream, path)):
                _check_name(path, member.name)
                where = f"{path}, member {short(member.name)}"
                if position >= limits.members:
                    raise InputError(f"{path}: has over {limits.members} members; {limits.published}")
                has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                if has_data and member.size > limits.file_bytes:
                    raise InputError(
                        f"{where}: unpacks to {member.size} bytes; {limits.what} have at most {limits.file_bytes}"
                    )
                if member.name in found.contents:
                    raise InputError(f"{path}: has two members {short(member.name)}; names must differ")
                if member.isreg() and is_wanted(member.name) and not is_residue(member.name):
                    found.contents[member.name] = _read_exactly(stream, member.size)
                else:
                    if not member.isdir() and not is_residue(member.name):
                        is_link = member.islnk() or member.issym()
                        found.others[member.name] = (
                            "is a link" if is_link else "" if member.isreg() else "is not a regular file"
                        )
                    if has_data:
                        _skip_exactly(stream, member.size)
                if has_data:
                    _skip_exactly(stream, -member.size % _TAR_BLOCK)
            # gzip's checksum is at the end of the file, which is after the end of the tar archive.
            if stream.skip(_MAXIMUM_PADDING_BYTES + 1) > _MAXIMUM_PADDING_BYTES:
                raise InputError(f"{path}: has over {_MAXIMUM_PADDING_BYTES} bytes after the end of the archive")
        except InputError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{path}: is not an intact .tar.gz ({one_line(error)}); download it again") from error
    return found


class Stream(Protocol):
    """What the members of a tar archive are read from, in order."""

    def read(self, size: int) -> bytearray: ...

    def skip(self, size: int) -> int: ...


def tar_members(stream: Stream, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members' headers; the caller reads or skips a member's data, to a whole block, before it goes on.

    Args:
        stream: the content of the archive.
        path: the archive, for error messages.

    Raises:
        InputError, tarfile.TarError, EOFError: If a header is damaged or out of bounds.
    """
    extended: dict[str, str] = {}
    num_extended = 0
    is_first = True
    while True:
        block = bytes(stream.read(_TAR_BLOCK))
        if (not block and not is_first) or block == bytes(_TAR_BLOCK):
            return
        is_first = False
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.size < 0:
            raise tarfile.HeaderError("negative size")
        if member.type in (b"L", b"K", b"x", b"X", b"g"):  # GNU's long names, and pax records
            num_extended += 1
            if member.size > _MAXIMUM_TAR_HEADER_BYTES or num_extended > _MAXIMUM_TAR_HEADERS:
                raise InputError(
                    f"{path}: has an extended header of {member.size} bytes, the {num_extended}. before a member; at most "
                    f"{_MAXIMUM_TAR_HEADERS} of {_MAXIMUM_TAR_HEADER_BYTES} bytes are read"
                )
            data = bytes(_read_exactly(stream, member.size))
            _skip_exactly(stream, -member.size % _TAR_BLOCK)
            if member.type == b"L":
                extended["path"] = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif member.type in (b"x", b"X"):
                extended |= _pax_records(data)
            continue
        if member.type == b"S" or any(name.startswith("GNU.sparse.") for name in extended):
            raise InputError(f"{path}, member {short(member.name)}: is a sparse file; plain files are needed")
        name = extended.get("path", member.name).rstrip("/")
        member.name = name.removeprefix("./")
        if "size" in extended:
            if not re.fullmatch(r"[0-9]{1,20}", extended["size"]):
                raise tarfile.HeaderError("invalid size")
            member.size = int(extended["size"])
        yield member
        extended, num_extended = {}, 0


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines of "LENGTH NAME=VALUE" and a line break, in which LENGTH counts all of the line."""
    records, start = {}, 0
    line = re.compile(rb"([1-9][0-9]{0,5}) ([^=\0]{1,255})=")
    while start < len(data) and data[start]:
        match = line.match(data, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data):
            raise tarfile.HeaderError("invalid pax header")
        name, value = match[2], data[match.end() : end - 1]
        records[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def _read_exactly(stream: Stream, size: int) -> bytearray:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the archive ends within a member")
    return data


def _skip_exactly(stream: Stream, size: int) -> None:
    if stream.skip(size) != size:
        raise EOFError("the archive ends within a member")


# ---- zip --------------------------------------------------------------------------------------------------------------


class ZipFiles(NamedTuple):
    """The members of an open .zip archive but its folders, and residue of operating systems."""

    sizes: Mapping[str, int]
    """name -> bytes, as the archive says"""
    read: Callable[[str], bytes]
    """name -> content"""
    open: Callable[[str], BinaryIO]
    """name -> stream of the content; to be read with a size"""


class _BoundedFile(io.BufferedReader):
    """A file of which `zipfile` can read only a bounded directory."""

    limit: tuple[int, object, str] = (0, "", "")
    """largest number of members, and the file and a remark for the error message"""

    def read(self, size: int | None = -1, /) -> bytes:
        members, where, published = self.limit
        is_bounded = size is not None and 0 <= size <= _MAXIMUM_DIRECTORY_BYTES
        data = super().read(size if is_bounded else _MAXIMUM_DIRECTORY_BYTES + 1)
        if len(data) > _MAXIMUM_DIRECTORY_BYTES:
            raise InputError(f"{where}: has a directory of over {_MAXIMUM_DIRECTORY_BYTES} bytes; {published}")
        # Each entry of the directory starts with these bytes; elsewhere they are rare.
        if len(data) > _BYTES_OF_AN_ENTRY * members and (count := data.count(b"PK\x01\x02")) > members:
            raise InputError(f"{where}: has {count} members; {published}")
        return data


@contextmanager
def open_zip(path: Path, limits: Limits, what: str = ".zip", remedy: str = "; download it again") -> Iterator[ZipFiles]:
    """Opens a .zip archive whose members are read into memory.

    Args:
        path: The archive.
        limits: What it may unpack to.
        what: What it should be, for the error message.
        remedy: What to do about a damaged archive, for the error message.

    Yields:
        Its members; reading one raises InputError if it is damaged.

    Raises:
        InputError: If the archive is damaged, exceeds a limit, or has encrypted members or two members of a name.
    """
    intact = partial(_intact, path, what, remedy)
    with _BoundedFile(open_file(path, 1 << 62, "").detach()) as file:
        file.limit = limits.members, path, limits.published
        with intact():
            archive = zipfile.ZipFile(file)
        with archive:
            infos = _checked_members(archive, path, limits)

            def open_member(name: str) -> BinaryIO:
                with intact():
                    return archive.open(infos[name])

            def read(name: str) -> bytes:
                with open_member(name) as member, intact():
                    # With a size: otherwise zipfile unpacks up to 2 GiB before it compares the size with the archive's.
                    data = member.read(infos[name].file_size + 1)
                    if len(data) != infos[name].file_size:
                        raise EOFError(f"member {short(name)} is shorter than the archive says")
                return data

            yield ZipFiles({name: info.file_size for name, info in infos.items()}, read, open_member)


@contextmanager
def _intact(path: Path, what: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise almost any exception on a damaged file
        raise InputError(f"{path}: is not an intact {what} ({one_line(error)[:200]}){remedy}") from error


def _check_name(path: Path, name: str) -> None:
    if len(name) > _MAXIMUM_NAME_LETTERS:
        raise InputError(
            f"{path}: has a member whose name has {len(name)} letters; at most {_MAXIMUM_NAME_LETTERS} are read"
        )


def _checked_members(archive: zipfile.ZipFile, path: Path, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    infos: dict[str, zipfile.ZipInfo] = {}
    total = 0
    if len(archive.filelist) > limits.members:
        raise InputError(f"{path}: has {len(archive.filelist)} members; {limits.published}")
    for info in archive.filelist:
        _check_name(path, info.filename)
        where = f"{path}, member {short(info.filename)}"
        if info.is_dir() or is_residue(info.filename):
            continue
        if info.filename in infos:
            raise InputError(f"{path}: has two members {short(info.filename)}; names must differ")
        if info.flag_bits & 1:
            raise InputError(f"{where}: is encrypted; an archive without a password is needed")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{where}: is packed by method {info.compress_type}; stored or deflated members are needed"
            )
        if info.file_size > limits.file_bytes:
            raise InputError(
                f"{where}: unpacks to {info.file_size} bytes; {limits.what} have at most {limits.file_bytes}"
            )
        total += info.file_size
        if total > limits.total_bytes:
            raise InputError(f"{path}: unpacks to more than the limit of {limits.total_bytes} bytes")
        infos[info.filename] = info
    return infos


# ---- npz --------------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What an array's member says about itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    start: int
    """bytes before the content"""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Arrays(NamedTuple):
    """The arrays of an open .npz file."""

    headers: Mapping[str, Header]
    """name -> header, for arrays of numbers, truth values and text"""
    problems: Mapping[str, str]
    """name of any other member -> why it is no such array: a predicate"""
    read: Callable[[str], np.ndarray]
    """name -> array"""


@contextmanager
def open_npz(path: Path, what: str = ".npz file of plain arrays") -> Iterator[Arrays]:
    """Opens an .npz file and reads the headers of its arrays; `read` then reads arrays one by one.

    `numpy.load` leaves a damaged file open, returns members that are not arrays as bytes, and allocates what a header says.

    Args:
        path: The file.
        what: What it should be, for error messages.

    Yields:
        The arrays. `read` raises InputError if an array is damaged, or larger than the memory that is available.

    Raises:
        InputError: If the file is not an intact .npz file.
    """
    limits = Limits("arrays", 1 << 62, 1 << 62, _MAXIMUM_ARRAYS, f".npz files have at most {_MAXIMUM_ARRAYS}")
    with open_zip(path, limits, what, "") as archive:
        headers: dict[str, Header] = {}
        problems: dict[str, str] = {}
        for member, size in archive.sizes.items():
            name = member.removesuffix(".npy")
            if name == member:
                problems[member] = "is not an array (.npy)"
                continue
            with archive.open(member) as stream, _intact(path, what):
                header = _read_header(stream, size)
            if isinstance(header, str):
                problems[name] = header
            else:
                headers[name] = header
        available, total = free_memory(), 0

        def read(name: str) -> np.ndarray:
            nonlocal total
            total += headers[name].num_bytes
            _check_memory(path, name, headers[name], total, available)
            with archive.open(f"{name}.npy") as stream, _intact(path, what):
                return _read_content(stream, headers[name])

        yield Arrays(headers, problems, read)


def read_npy(data: bytes, where: object) -> np.ndarray:
    """Reads an array in the form of an .npy file, without pickle; nothing is allocated for what its header says.

    Args:
        data: The bytes.
        where: Their origin, for error messages.

    Raises:
        InputError: If they are no plain array, or have another length than the header says.
    """
    try:
        header = _read_header(io.BytesIO(data), len(data))
    except Exception as error:
        raise InputError(f"{where}: is no intact array in NumPy's .npy format ({one_line(error)[:100]})") from error
    if isinstance(header, str):
        raise InputError(f"{where}: {header}")
    return np.frombuffer(data, header.dtype, offset=header.start).reshape(
        header.shape, order="F" if header.is_fortran else "C"
    )


def _read_header(stream: BinaryIO, size: int) -> Header | str:
    """The header of a member of `size` bytes, or why it is not one of an array that can be read."""
    version = np.lib.format.read_magic(stream)
    length_bytes = 2 if version == (1, 0) else 4
    length = stream.read(length_bytes)
    num_bytes = int.from_bytes(length, "little")
    if len(length) < length_bytes or num_bytes > _MAXIMUM_ARRAY_HEADER_BYTES:
        return f"is an array with a header of {num_bytes} bytes; at most {_MAXIMUM_ARRAY_HEADER_BYTES} are read"
    text = io.BytesIO(length + stream.read(num_bytes))
    if version == (3, 0):  # NumPy needs it for names of fields only
        return "is a structured array; plain arrays are needed"
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(text, max_header_size=_MAXIMUM_ARRAY_HEADER_BYTES)
    header = Header(shape, dtype, is_fortran, 6 + 2 + length_bytes + num_bytes)
    if dtype.hasobject:
        return "is an array of objects, which are pickles; plain arrays are needed"
    if dtype.names is not None or dtype.subdtype is not None or dtype.kind not in "biufcUS" or not dtype.itemsize:
        return f"has dtype {one_line(dtype)[:50]}; plain arrays are needed"
    if len(shape) > _MAXIMUM_DIMENSIONS or any(length < 0 for length in shape):
        return f"has {len(shape)} dimensions; at most {_MAXIMUM_DIMENSIONS} are read"
    if header.start + header.num_bytes != size:
        raise ValueError(f"{size - header.start} bytes of data, but its header says {header}")
    return header


def _check_memory(path: Path, name: str, header: Header, total: int, available: int) -> None:
    """Checks the bytes of all arrays read so far and of this one."""
    if total > available:
        raise InputError(
            f"{path}, {short(name)}: {header} has {header.num_bytes:,} bytes, {total - available:,} more than the memory that "
            f"is available"
        )
    packed = path.stat().st_size
    if total > max(_FREELY_UNPACKED_BYTES, _MAXIMUM_PACKING * packed):
        raise InputError(
            f"{path}, {short(name)}: {header} makes {total:,} bytes of {packed:,}, more than {_MAXIMUM_PACKING} times as "
            "many, so the file is almost empty; if that is intended, save it with np.savez, without compression"
        )


def _read_content(stream: BinaryIO, header: Header) -> np.ndarray:
    skipped = stream.read(header.start)
    array = np.empty(math.prod(header.shape), header.dtype)
    content = memoryview(array.view(np.uint8)) if array.size else memoryview(b"")
    start = 0
    while start < len(content):
        data = stream.read(min(1 << 20, len(content) - start))
        if not data:
            raise EOFError("the data ends too early")
        content[start : start + len(data)] = data
        start += len(data)
    if len(skipped) != header.start or stream.read(1):
        raise EOFError("the data has another length than its header says")
    return array.reshape(header.shape, order="F" if header.is_fortran else "C")


def short(name: str) -> str:
    """A member's name for an error message: on one line, at most 100 letters of it."""
    text = " ".join(name.split())
    return text if len(text) <= 100 else f"{text[:97]}..."
