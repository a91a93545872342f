"""The manual: its pages are those of docs/, its API page has every public name, its examples and notebooks run."""

import importlib.util
import os
import pathlib
import re
import resource
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

import bdjax
from bdjax.attacks.registry import ATTACKS
from bdjax.defenses.registry import DEFENSES

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = DOCS / "manual" / "mkdocs.yml"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
EXTRA = "pip install -e '.[docs]'"
NOTEBOOK_SECONDS = 120
"""Most seconds of computing of a notebook; a busy machine takes longer."""


def needs(*modules: str) -> None:
    """Skip a test where a library of the extra `docs` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: {EXTRA}")


def children_seconds() -> float:
    """Seconds of computing of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def examples(page: str) -> dict[str, object]:
    """What the Python blocks of a page define."""
    found: dict[str, object] = {"__name__": "example"}
    for code in re.findall(
        r"^```python\n(.*?)^```", (DOCS / "manual" / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        exec(compile(code, page, "exec"), found)
    return found


def test_every_page_is_in_the_manual():
    listed = re.findall(r"^ +- (?:[^\n:]+: )?([\w/]+\.md)$", CONFIG.read_text("utf-8"), re.MULTILINE)
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name != "table.md"]
    assert sorted(listed) == sorted(pages)


def test_the_api_page_has_every_public_name():
    names = {
        line.rpartition(".")[2]
        for line in re.findall(r"^::: (\S+)$", (DOCS / "manual" / "api.md").read_text(), re.MULTILINE)
    }
    assert names >= set(bdjax.__all__)


def test_the_example_of_an_attack(monkeypatch):
    monkeypatch.setitem(ATTACKS._own, "dot", examples("add_an_attack.md")["DOT"])
    train, _ = bdjax.load("digits")
    bad = bdjax.poison("dot", train[:100], jax.random.key(0), target=3, brightness=0.5)
    assert bad.data.is_poisoned.sum() == 10 and set(bad.data.labels[bad.data.is_poisoned]) == {3}
    assert set(np.unique(bad.data.images[bad.data.is_poisoned, 0, 0])) <= {127, 128}


@pytest.mark.slow  # it trains a network
def test_the_example_of_a_defense(monkeypatch):
    monkeypatch.setitem(DEFENSES._own, "clip", examples("add_a_defense.md")["CLIP"])
    train, _ = bdjax.load("digits")
    victim = bdjax.train("vbd_4_4p", train[:64], jax.random.key(0), epochs=1, batch_size=32, learning_rate=1e-3)
    safe = bdjax.defend("clip", victim, jax.random.key(1), clean=train[64:128], share=0.5)
    before, after = (
        max(np.abs(leaf).max() for leaf in jax.tree.leaves(of.variables["params"])) for of in (victim, safe)
    )
    assert after <= before / 2 + 1e-6 and safe.given == ("attacked model",)


@pytest.mark.slow
def test_the_manual_is_built_without_a_warning(tmp_path):
    needs("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(CONFIG),
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "manual" / "api.html").read_text("utf-8")
    assert all(f">{name}<" in api for name in ("poison", "audit_model")) and "Poison a training set" in api
    outside = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', api)
    assert not outside  # the manual can be read without a network


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    needs("jupytext", "nbclient", "ipykernel")
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The older code generator takes half of the time, and what it compiles is as fast.
    older = [flag for flag in os.environ["XLA_FLAGS"].split() if "use_fusion_emitters" in flag]
    # Those of the tests draw nothing, compile fast rather than well, and save every program.
    for name in ("MPLBACKEND", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", " ".join(older))
    notebook, before = jupytext.read(path), children_seconds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's libraries warn of each other
        NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert children_seconds() - before < NOTEBOOK_SECONDS
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
