"""Several processes: with a simulated store in the fast tests, with two interpreters on this machine in the slow ones."""

import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_run

from bdjax.errors import InputError
from bdjax.run import command_line
from bdjax.run.log import StageProgress
from bdjax.training import process_flags, processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 120
"""Seconds; a run takes a few, but the machine may be busy."""

# ---- Flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ("--coordinator=host:1234 --processes=4 --process=3", ("host:1234", 4, 3)),
        ("--process 0 --processes 1 --coordinator [::1]:80", ("[::1]:80", 1, 0)),
        ("--distributed", (None, None, None)),
    ],
)
def test_flags_about_processes_are_taken_out(arguments, flags):
    words = arguments.split()
    assert process_flags.take_flags(["--epochs=3", *words, "--out", "x"]) == (flags, ["--epochs=3", "--out", "x"])
    assert process_flags.take_flags(["--epochs=3"]) == (None, ["--epochs=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--coordinator=host:1", "--processes and --process missing"),
        ("--processes=2 --process=1", "--coordinator missing"),
        ("--coordinator=host:1 --processes=2 --process", "--process '' is not a whole number"),
        ("--coordinator=host:1 --processes=two --process=1", "--processes 'two' is not a whole number"),
        ("--coordinator=host:1 --processes=2 --process=2", "--process 2 must be below --processes 2"),
        ("--coordinator=host --processes=2 --process=1", "--coordinator 'host' is not HOST:PORT"),
        ("--coordinator=host:99999 --processes=2 --process=1", "--coordinator 'host:99999' is not HOST:PORT"),
        ("--distributed --process=1", "leave out --process"),
    ],
)
def test_flags_that_make_no_sense_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    with pytest.raises(InputError, match=re.escape(message)):
        process_flags.take_flags(arguments.split())
    monkeypatch.setattr(command_line.backend, "set_up", lambda: None)
    with pytest.raises(SystemExit) as stop:
        command_line.run(print, arguments.split())
    assert stop.value.code == command_line.FAILED
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1 and message in error


# ---- One process ----------------------------------------------------------------------------------------------------


def test_a_single_process_waits_for_nobody():
    calls = []

    @processes.by_primary
    def function(value):
        calls.append(value)
        return value

    assert processes.count() == 1 and processes.is_primary()
    processes.barrier("here")
    assert processes.exchange("here", "text") == ["text"]
    assert function(calls) is calls and len(calls) == 1


# ---- A simulated store ----------------------------------------------------------------------------------------------


class Store:
    """The coordinator's key-value store with the messages of other processes; never waits."""

    def __init__(self, **messages: str):
        self.content = {f"bdjax/{key.replace('_', '/')}": text for key, text in messages.items()}

    def key_value_set(self, key, text, allow_overwrite=False):
        assert allow_overwrite or key not in self.content
        self.content[key] = text

    def key_value_delete(self, key):
        del self.content[key]

    def key_value_dir_get(self, prefix):
        return [(key, text) for key, text in self.content.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.content:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.content[key]


@pytest.fixture
def process(monkeypatch):
    """Be one of two processes, with these messages in the store: (number of this process, messages) -> store."""

    def become(number: int, **messages: str) -> Store:
        store = Store(**messages)
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "is_primary", lambda: number == 0)
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(processes, "_client", lambda: store)
        monkeypatch.setattr(processes, "_numbers", itertools.count())
        return store

    return become


def test_texts_are_exchanged_in_the_order_of_the_processes(process):
    store = process(1, **{"0_0": "memory\nfirst", "1_0": "memory\nmore"})
    assert processes.exchange("memory", "second") == ["first", "second"]
    assert processes.exchange("memory", "less") == ["more", "less"]
    assert sorted(store.content) == ["bdjax/0/0", "bdjax/1/0", "bdjax/1/1"]  # its own old text is deleted


def test_a_process_elsewhere_in_the_program_is_an_error(process):
    process(0, **{"0_1": "fetch\n"})
    with pytest.raises(processes.ProcessError, match="process 1 is at 'fetch', but process 0 is at 'memory'"):
        processes.exchange("memory", "text")


def test_a_failed_process_is_not_waited_for(process):
    store = process(0, failed_1="out of memory")
    with pytest.raises(processes.ProcessError, match="^process 1 failed: out of memory$"):
        processes.barrier("here")
    processes.report_failure(InputError("two\nlines"))
    assert store.content["bdjax/failed/0"] == "two lines"


def test_the_primary_alone_runs_a_function_and_sends_the_result(process):
    @processes.by_primary
    def function(value):
        processes.barrier("inside")  # waits for nobody
        if value < 0:
            raise InputError("value is below 0")
        return 2 * value

    name = function.__qualname__
    store = process(0, **{"0_1": f"{name}\nnull", "1_1": f"{name}\nnull"})
    assert function(3) == 6 and store.content["bdjax/0/0"] == f'{name}\n{{"result": 6}}'
    with pytest.raises(InputError, match="value is below 0"):
        function(-1)
    sent = store.content["bdjax/1/0"]
    process(1, **{"0_0": f'{name}\n{{"result": 8}}', "1_0": sent, "2_0": f'{name}\n{{"error": "disk full"}}'})
    assert function(3) == 8  # the primary's result, not its own
    with pytest.raises(InputError, match="^value is below 0$"):
        function(3)
    with pytest.raises(processes.ProcessError, match="^process 0 failed: disk full$"):
        function(3)


# ---- Two processes --------------------------------------------------------------------------------------------------


def start(devices: int, *arguments: str) -> subprocess.Popen:
    """Start `small_run.py` as a program, as strict as the tests and sharing their compiled programs."""
    clusters = ("SLURM_", "OMPI_", "JAX_COORDINATOR")  # these tests may run on one
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(clusters)},
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, small_run.__file__, str(devices), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*programs: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each; none outlives the test."""
    try:
        outputs = [program.communicate(timeout=TIMEOUT) for program in programs]
        return [(program.returncode, *texts) for program, texts in zip(programs, outputs, strict=True)]
    finally:
        for program in programs:
            program.kill()


def run_two(devices: int, *arguments: str) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"--coordinator=localhost:{free.getsockname()[1]}"
    return finish(*(start(devices, *arguments, where, "--processes=2", f"--process={i}") for i in range(2)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    small_run.main([f"--output={folder / 'run'}", f"--seen={folder}"])
    return folder


def assert_same(alone: pathlib.Path, folder: pathlib.Path, count: int) -> None:
    expected = np.load(alone / "0.npz")
    for process in range(count):
        seen = np.load(folder / f"{process}.npz")
        for name, values in expected.items():
            np.testing.assert_array_equal(seen[name], values)
    results = [json.loads((run / "run" / "results.json").read_text()) for run in (alone, folder)]
    assert results[0] == results[1]
    files = [sorted(path.name for path in (run / "run").iterdir()) for run in (alone, folder)]
    assert files[0] == files[1]
    assert not list((folder / "run").rglob("progress-*"))


@pytest.mark.slow
def test_two_processes_end_where_one_does(alone, tmp_path):
    arguments = f"--output={tmp_path / 'run'}", f"--seen={tmp_path}"
    (status, output, error), (other_status, other_output, other_error) = run_two(1, *arguments)
    assert status == other_status == 0, error + other_error
    assert_same(alone, tmp_path, 2)
    assert "4 epochs" in output and "finished" in output
    assert "epochs" not in other_output and "finished" not in other_output  # but what Gloo says of itself

    # A finished run is read by both, and one with other settings refused by both.
    written = (tmp_path / "run" / "config.json").read_bytes()
    ended = run_two(1, f"--output={tmp_path / 'run'}", "--epochs=5")
    assert [status for status, _, _ in ended] == [command_line.FAILED] * 2
    for _, _, error in ended:
        assert "holds a run with other settings: epochs 4 -> 5" in error and "Traceback" not in error
    assert (tmp_path / "run" / "config.json").read_bytes() == written


@pytest.mark.slow
def test_one_process_resumes_what_two_left(alone, tmp_path):
    arguments = f"--output={tmp_path / 'run'}", f"--seen={tmp_path}"
    ended = run_two(1, *arguments, "--kill-after=2")
    assert all(status < 0 for status, _, _ in ended), ended
    assert -signal.SIGKILL in [status for status, _, _ in ended]
    assert [path.name for path in (tmp_path / "run").rglob("progress-*")] == ["progress-000002"]
    small_run.main(arguments)
    assert_same(alone, tmp_path, 1)


@pytest.mark.slow
def test_two_processes_with_two_devices_resume_what_one_left(alone, tmp_path, monkeypatch):
    arguments = f"--output={tmp_path / 'run'}", f"--seen={tmp_path}"

    def interrupt(progress: StageProgress, steps: int, message: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StageProgress, "advance", interrupt)
        small_run.main(arguments)
    assert [path.name for path in (tmp_path / "run").rglob("progress-*")] == ["progress-000001"]
    ended = run_two(2, *arguments)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_same(alone, tmp_path, 2)


@pytest.mark.slow
def test_if_one_process_fails_the_other_reports_it(tmp_path):
    (status, _, error), (other_status, _, other_error) = run_two(1, f"--output={tmp_path / 'run'}", "--fail-in=1")
    assert other_status == command_line.FAILED
    assert other_error == "error: this process cannot go on\n"
    assert status == command_line.LOST
    assert error.startswith("error: process 1 failed: this process cannot go on; run the same command again")
    assert "Traceback" not in error


@pytest.mark.slow
def test_distributed_without_a_cluster_is_an_error(tmp_path):
    ((status, output, error),) = finish(start(1, "--distributed", f"--output={tmp_path / 'run'}"))
    assert status == command_line.FAILED
    assert output == "" and error.startswith("error: --distributed: JAX detects no cluster")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
