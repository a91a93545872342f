"""The wheel in an empty folder: every command's help, a run and an audit."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import bdjax
from bdjax.commands import COMMANDS

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("bdjax", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
TINY = ("--model=lenet", "--width=2", "--epochs=1", "--batch-size=16", "--layout=map", "--lowering=shifted")


def done(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder that the wheel is installed in. It is built of a copy, since building leaves files beside the source."""
    scratch = tmp_path_factory.mktemp("wheel")
    (scratch / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, scratch / "source" / name, **options)
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(scratch))
    built = done(*PIP, "wheel", str(scratch / "source"), *flags)
    assert built.returncode == 0, built.stderr
    (wheel,) = scratch.glob("bdjax-*.whl")
    installed = done(*PIP, "install", "--no-deps", "--no-index", f"--target={scratch / 'site'}", str(wheel))
    assert installed.returncode == 0, installed.stderr
    return scratch / "site"


@pytest.fixture
def run(site: pathlib.Path, tmp_path: pathlib.Path):
    """Runs the installed `bdjax` in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "80"}
    return lambda *words: done(sys.executable, str(site / "bin" / "bdjax"), *words, cwd=tmp_path, env=environment)


@pytest.fixture
def python(site: pathlib.Path, tmp_path: pathlib.Path):
    """Runs Python code with what is installed, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "80"}
    return lambda code: done(sys.executable, "-c", code, cwd=tmp_path, env=environment)


API = """
import jax, numpy as np, bdjax
print(bdjax.__file__)
rows = bdjax.dataset(np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2)
bad = bdjax.poison("badnets", rows, jax.random.key(0), poison_rate=0.1)
print(bad.data.is_poisoned.sum(), bad.trigger(rows.images[:1]).max())
"""
HELP = """
import sys
from bdjax.__main__ import main
from bdjax.commands import COMMANDS
sys.argv = ["bdjax"]
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert not stop.code, name
"""


def test_it_is_the_wheel_that_runs(site, tmp_path, python):
    found = python(API)
    assert found.stdout.split() == [str(site / "bdjax" / "__init__.py"), "2", "255"], found.stderr
    assert list((site / "bdjax" / "reporting").glob("*.j2")) and not list(tmp_path.iterdir())
    assert not (site / "experiments").exists() and not (site / "tests").exists()


def test_every_command_has_its_help(run, python, tmp_path):
    assert run("--version").stdout == f"bdjax {bdjax.__version__}\n"
    overview = run("--help").stdout
    assert all(name in overview for name in COMMANDS)
    found = python(HELP)
    assert (found.returncode, found.stderr) == (0, "")
    assert all(f"usage: bdjax {name}" in found.stdout for name in COMMANDS)
    assert not list(tmp_path.iterdir())


def test_a_run_on_the_digits_ends_with_its_verdict(run, tmp_path):
    found = run(
        "attack", "--dataset=digits", "--preset=quick", "--seeds=1", "--train-rows=300", "--test-rows=60", *TINY
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout
    *_, verdict, report = found.stdout.splitlines()
    assert verdict.endswith(".") and "BadNets" in verdict
    page = (tmp_path / report.removeprefix("report: ")).read_text("utf-8")
    assert "bdjax attack --attack=badnets --dataset=digits" in page


def test_an_audit_of_a_file_ends_with_its_verdict(run, tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = (random.integers(0, 60, (120, 8, 8, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    found = run("audit-data", "mine.npz", "--defenses=spectral_signatures", "--no-sensitivity", *TINY)
    assert (found.returncode, found.stderr) == (3, ""), found.stdout
    *_, verdict, report = found.stdout.splitlines()
    assert "flags" in verdict or "flagged" in verdict
    page = pathlib.Path(report.removeprefix("report: "))
    assert page.is_file() and page.is_relative_to(tmp_path / "runs" / "audit_data")
