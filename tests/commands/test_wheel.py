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


def test_it_is_the_wheel_that_runs(site, tmp_path):
    code = "import bdjax; print(bdjax.__file__)"
    found = done(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    assert found.stdout.strip() == str(site / "bdjax" / "__init__.py")
    assert not (site / "experiments").exists() and not (site / "tests").exists()


def test_every_command_has_its_help(run, tmp_path):
    assert run("--version").stdout == f"bdjax {bdjax.__version__}\n"
    assert all(name in run("--help").stdout for name in COMMANDS)
    for name in COMMANDS:
        found = run(name, "--help")
        assert (found.returncode, found.stderr) == (0, ""), name
        assert f"usage: bdjax {name}" in found.stdout
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
    unknown = run("audit-data", "nothing.npz")
    assert unknown.returncode == 2 and unknown.stderr == "error: nothing.npz: no such file or folder\n"
