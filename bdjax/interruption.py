"""Ctrl-C and SIGTERM: a run ends with one line, and the same command continues it.

Python raises KeyboardInterrupt wherever the program happens to be. That may be in a callback of a library that drops exceptions
(JAX has some that run when memory is freed), so the signal is also remembered, and `check` raises again at the next epoch or
stage. A thread ends the process if that takes long, as it may while a large program compiles: whatever is written is written
whole, so a run can be ended anywhere.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

MESSAGE = "interrupted; run the same command again to continue"
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PATIENCE = 60.0
"""seconds from a signal to the end of the process, whatever it is doing"""
_PATIENCE_AFTER_SECOND = 5.0
"""the same after a second signal"""

_received = 0
"""number of the last signal; 0 for none"""
_postponed = 0
"""how many `postponed` blocks are open"""
_is_ending = False
"""whether the line is printed, so that a further signal ends the process at once"""


def exit_at_once() -> None:
    """Until `handled`, let a signal end the process with one line. For scripts, before imports that take seconds."""
    for number in _to_handle():
        signal.signal(number, _exit)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within the block, a signal raises KeyboardInterrupt and is remembered; a minute later the process ends in any case.

    During an import the process ends at once. Has no effect outside of the main thread.
    """
    global _received, _is_ending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received, _is_ending = 0, False
    before, hook = _to_handle(), sys.unraisablehook

    def silent_hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # What a callback dropped is raised again by `check`; without this, its traceback would be printed.
        if not (_received and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            hook(unraisable)

    # Python writes the number of every signal to this pipe, even while a compiler keeps the main thread busy.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading, frozenset(before)), daemon=True).start()
    try:
        sys.unraisablehook = silent_hook
        previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, _remember)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.close(writing)  # ends the thread
        if sys.unraisablehook is silent_hook:  # a later one calls it
            sys.unraisablehook = hook
        _received = 0


def received() -> int:
    """The number of the signal that was received in `handled`; 0 for none."""
    return _received


def check() -> None:
    """Raise the KeyboardInterrupt of a signal that was received earlier, if it was dropped or postponed.

    Raises:
        KeyboardInterrupt: a signal was received.
    """
    if _received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Finish a block, such as the write of a checkpoint, before a signal interrupts the run; a second signal does so at once.

    Raises:
        KeyboardInterrupt: at the end of the block, if a signal was received.
    """
    global _postponed
    _postponed += 1
    try:
        yield
    finally:
        _postponed -= 1
    if not _postponed:
        check()


def end() -> int:
    """The run is about to end: a further signal ends the process at once. Returns its exit status, 130 for Ctrl-C."""
    global _is_ending
    _is_ending = True
    return 128 + (_received or signal.SIGINT)


def _to_handle() -> dict[signal.Signals, object]:
    """The signals and their handlers, except those that the parent process chose to ignore (`nohup`, `&` in a script)."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _watch(descriptor: int, numbers: frozenset[int]) -> None:
    """End the process some time after the first of these signals, unless the other end of the pipe is closed before."""
    patience, last = None, 0
    while select.select([descriptor], [], [], patience)[0]:
        received = os.read(descriptor, 1)
        if not received:
            os.close(descriptor)
            return
        if received[0] in numbers:
            patience, last = (_PATIENCE_AFTER_SECOND if last else _PATIENCE), received[0]
    _exit(last, None)


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    if _is_ending:
        os._exit(128 + number)
    is_first, _received = not _received, number
    if not (_postponed and is_first):
        if _is_importing(frame):
            _exit(number, frame)
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the program is importing a module. An exception would leave it half initialised, and jaxlib crashes then."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _exit(number: int, frame: FrameType | None) -> None:
    if not _is_ending:
        with contextlib.suppress(OSError):
            os.write(2, f"{MESSAGE}\n".encode())
    os._exit(128 + number)
