"""A lock on the folder of a run: two processes that write to it would spoil each other's checkpoints.

The kernel releases the lock when its process ends, in whatever way. File systems without locks are used without.
"""

import contextlib
import os
import re
import socket
import weakref
from pathlib import Path

from bdjax.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK_FILE = ".lock"
"""Exists while a run is open, and after a kill. It names the process."""


class Lock:
    """Keeps a folder locked as long as this object lives."""


_locks: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()
"""those of this process, by folder: it may open a run twice"""


def lock(folder: Path, name: object) -> Lock | None:
    """Locks a folder for this process.

    Args:
        folder: an existing folder.
        name: what the error calls it.

    Returns:
        The lock; None on a file system without locks.

    Raises:
        InputError: another process has locked it.
        OSError: the lock file cannot be written.
    """
    if fcntl is None:
        return None
    folder = folder.resolve()
    if folder in _locks:
        return _locks[folder]
    file = folder / LOCK_FILE
    while True:
        descriptor = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise InputError(
                f"{name} is in use by {holder}; wait until it has ended, or choose another --output"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            file.unlink(missing_ok=True)
            return None
        # The last process deletes the file before it releases the lock: was this one deleted meanwhile?
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    found = _locks[folder] = Lock()
    weakref.finalize(found, _release, file, descriptor, os.getpid())
    return found


def _open(file: Path) -> int:
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(file, os.O_RDWR | flags, 0o666)
    except PermissionError:  # left by another user
        return os.open(file, os.O_RDONLY | flags, 0o666)


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
    return text if re.fullmatch(r"process \d{1,10} on [\w.-]{1,64}", text) else "another process"


def _release(file: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork has a copy of the descriptor, but not the lock
        with contextlib.suppress(OSError):
            file.unlink()
    os.close(descriptor)
