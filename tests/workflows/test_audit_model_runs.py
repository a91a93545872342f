"""experiments/audit_model.py: what is refused, or could not be tested, before anything is measured.

`test_audit_model_commands.py` has whole audits.
"""

import pathlib

import jax
import numpy as np
import pytest

import bdjax
from bdjax.commands import audit_model
from bdjax.errors import InputError
from bdjax.evaluation.teachers import write_folder
from bdjax.models import make_model
from bdjax.reporting.audit_verdict import exit_status
from bdjax.run.experiment import read_flags
from bdjax.run.log import StageLog
from bdjax.training import ensemble
from bdjax.workflows import audit_model as workflow
from bdjax.workflows import audited_models

SHAPE = (8, 8, 1)


def config(*arguments: str) -> workflow.Config:
    return read_flags(audit_model.EXPERIMENT, "an audit", ["--preset=quick", *arguments])


def run(*arguments: str) -> dict:
    return audit_model.main(["--preset=quick", *arguments], StageLog())


def test_the_search_has_the_settings_of_the_flags():
    flags = ["--model=x", "--dataset=digits", "--search-epochs=7", "--search-patience=3", "--search-batch-size=16"]
    found = workflow.search_settings(config(*flags), 12)
    assert (found.epochs, found.patience, found.batch_size) == (7, 3, 12)


def random_folder(path: pathlib.Path, count: int = 2, name: str = "vbd_4_4p") -> pathlib.Path:
    """A model folder of networks that have learned nothing."""
    model = make_model(name, 10, 8)
    keys = jax.random.split(jax.random.key(0), count)
    variables = ensemble.init_members(lambda key: model.init(key, SHAPE), keys)
    assert write_folder(path, model, variables, SHAPE, None, 0)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model="], "--model is empty"),
        (["--model=nowhere"], "nowhere"),
        (["--model=x", "--seeds=2"], "--seeds 2 does not apply to an audit of models; set --controls instead"),
        (["--model=x", "--target=3"], "--target 3 does not apply"),
        (["--model=x", "--controls=1"], "--controls 1 is not at least 2"),
        (["--model=x", "--surrogate=resnet0"], "--surrogate"),
        (["--model=x", "--like=mnist"], "--like does not apply"),
    ],
)
def test_flags_that_cannot_be_used_end_in_one_line(arguments, message, tmp_path):
    with pytest.raises(InputError) as error:
        run(*arguments, f"--output={tmp_path / 'run'}")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_members_of_a_folder_are_counted_from_1(tmp_path):
    folder = random_folder(tmp_path / "models", 3)
    data = bdjax.dataset(np.zeros((10, *SHAPE), np.uint8), np.arange(10))
    suspects = audited_models.open_suspects(config(f"--model={folder}", "--members", "3", "1"), data, "shifted")
    assert suspects.titles == ["model 3", "model 1"] and ensemble.num_members(suspects.variables) == 2
    np.testing.assert_array_equal(
        jax.tree.leaves(suspects.variables)[0][0], jax.tree.leaves(suspects.opened[0].variables)[0][2]
    )
    with pytest.raises(InputError, match="--members 4: .* has 3 models, counted from 1"):
        audited_models.open_suspects(config(f"--model={folder}", "--members", "4"), data, "shifted")
    other = random_folder(tmp_path / "others", 1, "vbd_8_8p")
    with pytest.raises(InputError, match="cannot share control networks"):
        audited_models.open_suspects(config("--model", str(folder), str(other)), data, "shifted")
    both = audited_models.open_suspects(config("--model", str(folder), str(folder)), data, "shifted")
    assert both.titles == [f"model {number}" for number in range(1, 7)]


def test_a_network_that_has_learned_nothing_could_not_be_tested_and_nothing_is_trained(tmp_path):
    folder = random_folder(tmp_path / "models", 1)
    arguments = [f"--model={folder}", "--layout=map", "--lowering=shifted", f"--output={tmp_path / 'run'}"]
    results = run(*arguments)
    assert exit_status(results) == 4 and "of the held-out rows correctly" in results["models"][0]["reason"]
    assert results["verdict"]["level"] == "not_tested"
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "table.md").exists()
