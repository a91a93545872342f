"""Files that are written whole or not at all.

A file is written under a temporary name and renamed, so an interruption leaves the previous one. Temporary names are hidden and
unique: two processes never share one, and a link that lies in wait under a known name is not followed.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_REMAINS = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes a file, creates its folder if needed, and returns its path.

    Raises:
        OSError: the file cannot be written; the previous one is unchanged.
    """
    with replacing(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the new name
    return Path(path)


@contextlib.contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file that becomes `path` at the end of the block; if the block fails, it is deleted.

    A link at `path` is replaced, not followed.

    Args:
        path: the file; its folder is created if needed.
        scratch: an existing folder on the same file system for the temporary file; by default that of `path`.

    Raises:
        OSError: the file cannot be written; the previous one is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of 255 bytes is the limit of most file systems.
    temporary = (scratch or path.parent) / f".{path.name[:50]}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_remains(folder: Path) -> None:
    """Deletes the temporary files that killed processes left in a folder; no other process may be writing there."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _REMAINS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
