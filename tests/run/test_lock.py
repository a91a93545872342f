import fcntl
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from bdjax.errors import InputError
from bdjax.run import lock as locks
from bdjax.run.folder import open_run
from bdjax.run.lock import lock

HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2] or f"process {os.getpid()} on here")
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


@dataclass(frozen=True)
class Config:
    epochs: int = 3


@pytest.fixture
def hold(tmp_path):
    """Locks tmp_path in another process, which is killed at the end: (text of the lock file, "" for its usual one) -> PID."""
    started = []

    def start(text: str = "") -> int:
        command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / ".lock"), text]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert started[0].stdout.readline() == b"locked\n"
        return started[0].pid

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_is_locked_as_long_as_the_lock_lives(tmp_path):
    first = lock(tmp_path, "runs/x")
    assert lock(tmp_path, "runs/x") is first  # this process may open a run twice
    with open(tmp_path / ".lock") as file:
        assert re.fullmatch(rf"process {os.getpid()} on \S+\n", file.read())
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del first
    assert not list(tmp_path.iterdir())
    assert lock(tmp_path, "runs/x") is not None


def test_a_second_process_is_refused_in_one_line_and_a_kill_releases_the_lock(tmp_path, hold):
    holder = hold()
    with pytest.raises(InputError) as caught:
        open_run(tmp_path, Config(), experiment="ta_kd")
    assert str(caught.value) == (
        f"{tmp_path} is in use by process {holder} on here; wait until it has ended, or choose another --output"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    run = open_run(tmp_path, Config(), experiment="ta_kd")  # the lock file is still there
    assert run.is_new and f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


@pytest.mark.parametrize("text", ["\x1b[31m", "process 1 on " + "a" * 5000, "nobody"])
def test_what_a_lock_file_says_is_untrusted(text, tmp_path, hold):
    hold(text)
    with pytest.raises(InputError, match="is in use by another process; wait until"):
        lock(tmp_path, "runs/x")


def test_a_lock_that_was_released_while_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    first, opened = [lock(tmp_path, "x")], []
    locks._locks.clear()  # as if the first were another process
    real = locks._open

    def open_then_release(file):
        opened.append(real(file))
        first.clear()  # deletes the file
        return opened[-1]

    monkeypatch.setattr(locks, "_open", open_then_release)
    second = lock(tmp_path, "x")
    assert second is not None and len(opened) == 2 and (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert lock(tmp_path, "runs/x") is None
    assert not list(tmp_path.iterdir())
    assert open_run(tmp_path, Config(), experiment="ta_kd").is_new
    monkeypatch.setattr(locks, "fcntl", None)
    assert lock(tmp_path, "runs/x") is None


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_lock_file_is_one_line(make, tmp_path):
    make(tmp_path / ".lock")
    with pytest.raises(InputError, match="cannot be used .*; choose another --output"):
        open_run(tmp_path, Config(), experiment="ta_kd")
