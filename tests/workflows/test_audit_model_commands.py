"""Audits of models by the command, from its arguments to its exit status and its files: weights, an ONNX file, an address.

The same networks for all, with so few steps that only the form of the outcome is known.
"""

import dataclasses
import html
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdjax
from bdjax import commands
from bdjax.api import Network
from bdjax.commands import gate
from bdjax.evaluation.teachers import write_folder
from bdjax.inspection import random_triggers
from bdjax.run import backend
from tests.fixtures import evidence
from tests.fixtures.served import served

pytestmark = pytest.mark.slow
STATUS = {"found": 3, "nothing found": 0, "could not be tested": 4}
FEW = (
    *("--dataset=digits", "--preset=quick", "--controls=2", "--epochs=4", "--search-epochs=1"),
    *("--search-rows=100", "--held-out-rows=100", "--random-triggers=20", "--layout=map", "--lowering=shifted"),
)
SURROGATE = ("--surrogate=vbd_4_4p", "--width=16", "--queries=2", "--surrogate-epochs=4")


@pytest.fixture(scope="module")
def networks() -> Network:
    """Two of them."""
    train, _ = bdjax.load("digits")
    training = {"width": 16, "epochs": 8, "batch_size": 32, "learning_rate": 1e-2, "seeds": 2}
    return bdjax.train("vbd_4_4p", train, jax.random.key(3), **training)


@pytest.fixture(scope="module")
def network(networks) -> Network:
    return dataclasses.replace(networks, variables=jax.tree.map(lambda leaf: leaf[0], networks.variables), seeds=None)


@pytest.fixture
def start(monkeypatch):
    """Runs the command; returns the exit status."""
    monkeypatch.setattr(commands.interruption, "exit_at_once", lambda: None)
    monkeypatch.setattr(backend, "set_up", lambda: None)

    def start(*arguments: str) -> int:
        try:
            commands.start("audit-model", list(arguments))
        except SystemExit as stop:
            return stop.code
        return 0

    return start


def check_run(folder: pathlib.Path, status: int, *, black_box: bool) -> dict:
    """What every audit leaves; returns the results."""
    results = json.loads((folder / "results.json").read_text())
    assert status == STATUS[results["outcome"]]
    assert results["outcome"] in [model["outcome"] for model in results["models"]]
    assert results["black_box"] == black_box and results["controls"]["count"] == 2
    for model in results["models"]:
        assert all(entry["random_triggers"]["kind"] in random_triggers.KINDS for entry in model["classes"])
        assert len(model["classes"]) == 10 and (model["weights"] is None) == black_box
    planted = results["planted"]
    assert planted["title"] and 0 <= planted["success"] <= 1 and planted["numbers"]["class"] == planted["class"]
    page = (folder / "report.html").read_text()
    verdicts = "Verdict" if len(results["models"]) == 1 else "Verdicts"
    assert all(title in page for title in (verdicts, "Control networks", "The reversed triggers"))
    assert html.escape(results["verdict"]["headline"]) in page and (folder / "table.md").exists()
    assert (folder / "checkpoints" / "surrogates").exists() == black_box
    return results


def test_weights_of_two_networks_and_the_evidence_on_them(networks, start, tmp_path):
    variables = jax.tree.map(jnp.asarray, networks.variables)
    assert write_folder(tmp_path / "suspect", networks.model, variables, networks.image_shape, None, 0)
    folder = tmp_path / "run"
    arguments = [str(tmp_path / "suspect"), *FEW, f"--output={folder}"]
    status = start(*arguments, "--evidence")
    results = check_run(folder, status, black_box=False)
    first, second = results["models"]
    assert first["title"] != second["title"] and first["classes"] != second["classes"]
    assert "Other signs" in (folder / "report.html").read_text() and (folder / "triggers.png").exists()
    assert json.loads((folder / "config.json").read_text())["config"]["width"] == networks.width
    verdict = evidence.check(folder / "evidence")
    assert verdict["exit_code"] == status and verdict["verdict"]["word"] == results["outcome"]
    card = (folder / "evidence" / "model_card.md").read_text()
    assert str(tmp_path / "suspect") in card
    path = folder / "evidence" / "verdict.json"
    assert gate.main([str(path), "--max-asr=1"]) == 4  # no trigger is known, so ASR is not
    assert gate.main([str(path), f"--require-verdict={results['outcome']}"]) == 0
    before = {name: (folder / "evidence" / name).read_text() for name in evidence.FILES}
    assert start(*arguments, "--evidence") == status
    for name, text in before.items():
        assert evidence.without_time((folder / "evidence" / name).read_text()) == evidence.without_time(text), name


def test_an_onnx_file(network, start, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnx", reason="needs the extra onnx")
    bdjax.save_model(network, tmp_path / "suspect", exports=["onnx"])
    path, folder = tmp_path / "suspect" / "model.onnx", tmp_path / "run"
    status = start(f"--model={path}", *FEW, *SURROGATE, f"--output={folder}")
    results = check_run(folder, status, black_box=True)
    _, test = bdjax.load("digits")
    whole = np.mean(network.predict(test.images).argmax(1) == test.labels)
    assert abs(results["models"][0]["accuracy"] - whole) < 0.1  # on 100 of its rows


def test_an_address_which_no_image_is_sent_twice(network, start, tmp_path):
    asked = []

    def answer(images: np.ndarray) -> np.ndarray:
        asked.append(len(images))
        return network.predict(images)

    folder = tmp_path / "run"
    with served(answer) as address:
        arguments = [f"--model={address}", *FEW, *SURROGATE, f"--output={folder}"]
        status = start(*arguments)
        results, first = check_run(folder, status, black_box=True), sum(asked)
        assert first >= 2 * 500 + 100 and list((folder / "answers").rglob("*.npy"))
        assert start(*arguments) == status and sum(asked) - first <= 8  # those that see whether it answers alike
    assert json.loads((folder / "results.json").read_text())["models"] == results["models"]
