"""The template of docs/plugins.md: the page shows its files, pip installs it, and its attack runs like any other."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bdjax.attacks.registry import ATTACKS
from bdjax.commands import attack
from bdjax.errors import InputError
from bdjax.testing import check_attack
from bdjax.types import Dataset
from bdjax.workflows import attack as workflow

TEMPLATE = pathlib.Path(__file__).parent / "template"
ROOT = TEMPLATE.parents[2]
FILES = sorted(path.name for path in TEMPLATE.iterdir() if path.is_file())
TINY = ("--model=lenet", "--width=2", "--train-rows=300", "--test-rows=60", "--epochs=1", "--seeds=1", "--layout=map")
TINY += ("--lowering=shifted", "--batch-size=16")  # as in test_wheel.py, so both compile the same programs


def install(source: pathlib.Path, folder: pathlib.Path, scratch: pathlib.Path) -> None:
    """Build a wheel of a copy of the folder, without a network, and install it into another folder."""
    copy = scratch / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, f"--target={folder}", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder that pip has installed the template into."""
    folder = tmp_path_factory.mktemp("template")
    install(TEMPLATE, folder / "site", folder)
    return folder / "site"


def test_the_page_shows_the_files_and_they_are_short():
    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    shown = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert sorted(shown) == FILES
    for name in FILES:
        assert shown[name] == (TEMPLATE / name).read_text("utf-8"), name
    code = [line for line in shown["bdjax_stripe.py"].splitlines() if line.strip()]
    assert len(code) <= 30


def test_its_attack_is_among_all_attacks_and_keeps_the_contract(installed, on_path):
    assert "stripe" not in ATTACKS
    on_path(installed)
    config = dataclasses.replace(attack.preset("quick", "digits"), attack="all")
    rows = Dataset(np.zeros((100, 8, 8, 1), np.uint8), np.arange(100, dtype=np.int32) % 10, 10, "digits", "a test")
    plans, _ = workflow.make_plans(config, rows)
    assert {"stripe", "badnets"} <= {plan.name for plan in plans}
    check_attack(ATTACKS["stripe"], shapes=[(8, 8, 1)])


@pytest.mark.slow
def test_its_attack_runs_from_the_command_line_and_the_run_says_where_it_is_from(installed, on_path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "bdjax", "attack", "--attack=stripe", "--dataset=digits", "--preset=quick", *TINY]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (run,) = (tmp_path / "runs" / "attack").iterdir()
    results = json.loads((run / "results.json").read_text())
    assert [entry["base"] for entry in results["attacks"]] == ["stripe"]
    report = (run / "report.html").read_text("utf-8")
    assert "Stripe" in report and "bdjax-stripe 0.1" in report
    *_, verdict, last = done.stdout.splitlines()
    assert last == f"report: {run / 'report.html'}" and verdict.endswith(".")
    on_path(installed)
    with pytest.raises(InputError, match=r"did you mean stripe\?"):
        attack.main(["--attack=strip"])
