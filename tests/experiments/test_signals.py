"""A script that gets Ctrl-C or SIGTERM while it imports ends with one line, and leaves nothing.

`tests/workflows/test_ta_kd_runs.py` interrupts a run at later moments.
"""

import os
import pathlib
import signal

import pytest

from bdjax.commands import COMMANDS
from tests.fixtures import programs

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("script", [*(command.module for command in COMMANDS.values()), "bench_ensemble"])
def test_an_interruption_of_the_imports_is_one_line(script, tmp_path):
    if script in ("grid", "gate"):
        pytest.skip("imports neither library for what ends within the test")
    needed = {"audit_model": ("--model=http://127.0.0.1:9/predict",), "bench_ensemble": ("--seed=0",)}
    flags = needed.get(script, ("--dataset=digits",))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    path = str(ROOT / "experiments" / f"{script}.py")
    for number, library in ((signal.SIGINT, "jaxlib"), (signal.SIGTERM, "_multiarray_umath")):
        program = programs.start(path, *flags, f"--output={tmp_path / 'run'}", **environment)
        programs.wait_for(program, lambda program=program, library=library: programs.is_loaded(program, library))
        programs.interrupt(program, number)
    assert not list(tmp_path.iterdir())
