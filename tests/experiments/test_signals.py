"""A script that gets Ctrl-C or SIGTERM at any moment ends with one line, and the same command completes the run."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from bdjax.commands import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINE = "interrupted; run the same command again to continue\n"
FLAGS = [
    "--dataset=digits",
    "--preset=quick",
    "--layout=map",
    "--lowering=shifted",
    "--seeds=1",
    "--width=2",
    "--epochs=3",
    "--defense-epochs=2",
    "--train-rows=300",
    "--test-rows=60",
    "--num-teachers=3",
    "--batch-size=16",
    "--clean-model=lenet",
    "--teacher-model=lenet",
    "--aggregated-model=lenet",
    "--student-model=lenet",
]


def start(output: pathlib.Path, script: str = "ta_kd", flags: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), *(flags or FLAGS), f"--output={output}"]
    # A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(program: subprocess.Popen, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.002)


def modules_mapped(program: subprocess.Popen, name: str) -> bool:
    """Whether the process has loaded a library with this in its path."""
    try:
        return name in pathlib.Path(f"/proc/{program.pid}/maps").read_text()
    except OSError:
        return False


def interrupt(program: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal; the program must end with the one line."""
    program.send_signal(number)
    try:
        output, error = program.communicate(timeout=120)
    finally:
        program.kill()
    assert (program.returncode, error) == (128 + number, LINE), output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("script", [*(command.module for command in COMMANDS.values()), "bench_ensemble"])
def test_an_interruption_of_the_imports_is_one_line(script, tmp_path):
    if script in ("grid", "gate"):
        pytest.skip("imports neither library for what ends within the test")
    needed = {"audit_model": ("--model=http://127.0.0.1:9/predict",), "bench_ensemble": ("--seed=0",)}
    flags = needed.get(script, ("--dataset=digits",))
    for number, library in ((signal.SIGINT, "jaxlib"), (signal.SIGTERM, "_multiarray_umath")):
        program = start(tmp_path / "run", script, flags)
        wait_for(program, lambda program=program, library=library: modules_mapped(program, library))
        interrupt(program, number)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interruption_at_any_moment_is_one_line_and_the_same_command_completes_the_run(tmp_path):
    """A moment of each kind: at the start, in a stage, between two, while a checkpoint is written, and at the end."""
    run = tmp_path / "run"
    moments = {
        "the folder is opened": lambda: (run / "config.json").exists(),
        "the first epoch is saved": lambda: any(run.glob("checkpoints/clean/progress-*")),
        "a stage has ended": lambda: (run / "checkpoints" / "clean" / "about.json").exists(),
        "a checkpoint is written": lambda: any(run.glob("checkpoints/teachers/progress-*tmp*")),
        "the report is written": lambda: (run / "results.json").exists(),
    }
    for number, (moment, happened) in zip([signal.SIGINT, signal.SIGTERM] * 3, moments.items(), strict=False):
        program = start(run)
        wait_for(program, happened)
        if moment == "the folder is opened":
            assert_a_second_process_is_refused(program, run)
        interrupt(program, number)
    program = start(run)
    output, error = program.communicate(timeout=300)
    assert (program.returncode, error) == (0, ""), output
    assert "restored from checkpoint" in output and (run / "report.html").is_file()
    assert not (run / ".lock").exists() and not list(run.rglob("*tmp*"))


def assert_a_second_process_is_refused(first: subprocess.Popen, run: pathlib.Path) -> None:
    """In one line, while the first has the folder; it is stopped for that time."""
    first.send_signal(signal.SIGSTOP)
    try:
        second = start(run)
        output, error = second.communicate(timeout=120)
        assert second.returncode == 2 and "Traceback" not in output
        assert error.count("\n") == 1 and f"{run} is in use by process {first.pid} on " in error
    except BaseException:
        first.kill()
        raise
    first.send_signal(signal.SIGCONT)
