"""The grid: which cells go into which job, what is refused before any, what a job leaves, and a whole grid on two workers."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
from rich.console import Console

from bdjax import commands
from bdjax.commands import grid as command
from bdjax.commands import lfd
from bdjax.errors import InputError
from bdjax.run import grid_file, jobs
from bdjax.run.log import StageLog
from bdjax.run.presets import Study
from bdjax.workflows import grid, grid_run
from bdjax.workflows.grid import divide

ROOT = pathlib.Path(commands.__file__).parents[2]
TINY = """\
seeds = 2
seed = 10
attacks = ["badnets:poison_rate=0.2", "blended:poison_rate=0.2"]
defenses = ["none", "fine_tuning:epochs=1"]

[flags]
model = "lenet"
epochs = 3
train_rows = 600
test_rows = 100
width = 4
layout = "map"
lowering = "shifted"
save_models = false

[[blocks]]
experiments = ["lfd"]
flags = { loss_gap = false }

[[blocks]]
experiments = ["abm"]
"""


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def quiet() -> StageLog:
    return StageLog(Console(quiet=True))


def plan(folder: pathlib.Path, text: str, limit: int | None = None) -> grid.Plan:
    file = grid_file.read(write(folder, text))
    return grid.make_plan(file, command.experiments(), lambda block: limit, quiet())


# ---- Planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attacks", "seeds", "most", "expected"),
    [
        ("abc", 2, 0, ["abc"]),
        ("abc", 2, 6, ["abc"]),
        ("abc", 2, 5, ["ab", "c"]),
        ("abcd", 2, 4, ["ab", "cd"]),
        ("abcde", 1, 2, ["ab", "cd", "e"]),
        ("abc", 5, 2, ["a", "b", "c"]),  # a job has all seeds of an attack
    ],
)
def test_attacks_are_divided_among_as_few_jobs_as_possible(attacks, seeds, most, expected):
    assert divide(list(attacks), seeds, most) == [list(part) for part in expected]


def test_the_control_is_in_every_job():
    assert divide(["none", "a", "b", "c"], 2, 6) == [["a", "b", "none"], ["c", "none"]]
    assert divide(["none", "a"], 2, 2) == [["a", "none"]]


def test_what_shares_an_experiment_and_a_dataset_is_one_job(tmp_path):
    found = plan(tmp_path, TINY)
    assert [job.experiment for job in found.jobs] == ["lfd", "abm"] and not found.refused
    assert len(found.cells) == 16 and [len(job.cells) for job in found.jobs] == [8, 8]
    assert found.jobs[0].cells[1] == ("lfd", "digits", "quick", "badnets:poison_rate=0.2", "none", 11)
    arguments = found.jobs[0].arguments
    assert {"--dataset=digits", "--preset=quick", "--seed=10", "--seeds=2", "--no-loss-gap", "--epochs=3"} <= set(
        arguments
    )
    assert "--attacks=badnets:poison_rate=0.2,blended:poison_rate=0.2" in arguments
    assert plan(tmp_path, "# the same\n" + TINY).jobs == found.jobs


def test_a_dataset_is_read_once_for_all_blocks_and_experiments(tmp_path, monkeypatch):
    real, read = grid.run_config.load, []
    monkeypatch.setattr(grid.run_config, "load", lambda config, log: read.append(config) or real(config, log))
    other = '[[blocks]]\nexperiments = ["lfd"]\nflags = { target = 1 }\n'
    assert len(plan(tmp_path, TINY + other).jobs) == 3
    assert [config.target for config in read] == [0, 1]  # the target is checked with the rows


def test_what_a_dataset_is_kept_by_is_all_that_its_reading_depends_on():
    class Recorded:
        def __getattr__(self, name):
            seen.add(name)
            return getattr(lfd.EXPERIMENT.default(), name)

    seen = set()
    grid.run_config.load(Recorded(), quiet())
    assert seen == set(grid.OF_THE_DATA)


def test_the_defenses_of_a_study_are_those_of_its_run():
    study = Study("a table", "none", "all")
    experiment = lfd.EXPERIMENT._replace(studies={"few": study, "two": study._replace(defenses="abl,none")})
    for name in experiment.studies:
        config = dataclasses.replace(lfd.EXPERIMENT.default(), study=name)
        assert {"none", *grid._listed_defenses(config, experiment)} == set(
            grid.base.attacks_and_defenses(config, experiment)[1]
        )


def test_more_members_than_allowed_are_several_jobs(tmp_path):
    found = plan(tmp_path, TINY.replace("seeds = 2", "seeds = 2\nmembers_per_job = 2"))
    assert [len(job.cells) for job in found.jobs] == [4, 4, 4, 4] and len(found.cells) == 16
    assert len({job.name for job in found.jobs}) == 4


def test_the_memory_estimate_divides_members(tmp_path):
    file = grid_file.read(write(tmp_path, TINY))
    _, config = grid.read_config(file, 0, lfd.EXPERIMENT, "digits")
    train = grid.run_config.load(config, quiet()).train

    def fitting(limit):
        return grid.members_that_fit(config, "lenet", train, 4, limit)

    limits = [2**20, 2**23, 2**30]
    found = []
    for limit in limits:
        try:
            found.append(fitting(limit))
        except InputError:
            found.append(0)
    assert found == sorted(found) and found[0] == 0 and found[-1] == 4
    with pytest.raises(InputError, match=r"grid.toml line 16: training one member takes"):
        plan(tmp_path, TINY, limits[0])


def test_a_restart_with_other_free_memory_or_workers_has_the_same_jobs(tmp_path, monkeypatch):
    file, out = write(tmp_path, TINY), tmp_path / "out"

    def names(free, text=TINY, **flags):
        file.write_text(text)
        monkeypatch.setattr(grid_run, "free_memory", lambda: free)
        monkeypatch.setattr(grid_run, "_run_jobs", lambda *_: None)
        command.main([str(file), f"--output={out}", *(f"--{name}={value}" for name, value in flags.items())], quiet())
        return [job["name"] for job in json.loads((out / "grid.json").read_text())["jobs"]]

    monkeypatch.setattr(grid, "try_out", lambda *_: None)
    monkeypatch.setattr(grid, "members_that_fit", lambda *arguments: 4 if arguments[-1] > 2**30 else 2)
    first = names(2**35)
    assert len(first) == 2
    assert names(2**35, workers=64) == first
    assert names(2**20, "# the same\n" + TINY) == first, "a changed file keeps the jobs of what it has still"
    assert len(names(2**20, TINY.replace("seeds = 2", "seeds = 2\nmembers_per_job = 2"))) == 4
    (out / "grid.json").write_text('{"most_members": {"a": "b"}}')
    assert len(names(2**20)) == 4


def test_experiments_without_attacks_or_defenses_have_cells_of_what_they_make(tmp_path):
    text = '[[blocks]]\nexperiments = ["ta_kd"]\nseeds = 2\n'
    text += '[[blocks]]\nexperiments = ["attack"]\nattacks = ["badnets", "blended"]\n'
    ta_kd, attack = plan(tmp_path, text).jobs
    assert {cell[3:5] for cell in ta_kd.cells} == {("outsourcing", "student")} and len(ta_kd.cells) == 2
    assert {cell[3:5] for cell in attack.cells} == {("badnets", "none"), ("blended", "none")}
    assert "--attack=badnets,blended" in attack.arguments


def test_what_a_dataset_does_not_allow_is_a_cell_with_the_reason(tmp_path):
    text = TINY.replace('"blended:poison_rate=0.2"', '"blended:poison_rate=0.001"')
    found = plan(tmp_path, text)
    assert len(found.cells) == 16 and len(found.refused) == 8 and [len(job.cells) for job in found.jobs] == [4, 4]
    assert {entry.cell.attack for entry in found.refused} == {"blended:poison_rate=0.001"}
    assert all("0.001 of" in entry.reason for entry in found.refused)
    assert all("--attacks=badnets:poison_rate=0.2" in job.arguments for job in found.jobs)


def test_cells_of_hybrids_and_costly_attacks_are_those_of_the_results(tmp_path, monkeypatch):
    """As `reporting/attacks.py` names them, with as many seeds as `workflows/attack.py` runs."""
    monkeypatch.setattr(grid.attack, "try_out", lambda *_: None)
    text = 'seeds = 3\n[[blocks]]\nexperiments = ["attack"]\nattacks = ["badnets+sig", "blended", "input_aware"]\n'
    (job,) = plan(tmp_path, text + "flags = { costly_seeds = 1 }\n").jobs
    seeds = {}
    for cell in job.cells:
        seeds.setdefault(cell.attack, []).append(cell.seed)
    assert seeds == {
        "badnets in badnets+sig": [0, 1, 2],
        "sig in badnets+sig": [0, 1, 2],
        "blended": [0, 1, 2],
        "input_aware": [0],
    }
    assert "--attack=badnets+sig,blended,input_aware" in job.arguments


def test_cells_of_attacks_are_those_of_a_committed_run():
    run = ROOT / "docs" / "results" / "attack" / "mnist-all"
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "config.json").read_text())["config"]
    config = types.SimpleNamespace(seeds=config["seeds"], costly_seeds=config["costly_seeds"])
    found = {}
    for name in [*grid.ATTACKS, *grid.attack.HYBRIDS]:
        names, seeds = grid.KINDS[grid.attack.Config].victims(config, name)
        found |= dict.fromkeys(names, seeds)
    ran = {cell["attack"]: len(cell["by_seed"]) for cell in results["cells"]}
    assert len(set(ran.values())) == 2 and any(" in " in name for name in ran)
    assert {name: found[name] for name in ran} == ran


def test_an_impossible_attack_refuses_its_whole_study(tmp_path, monkeypatch):
    def refuse_sig(key, attacks, train):
        if attacks[0].name == "sig":
            raise InputError("too few rows")

    monkeypatch.setattr(grid, "try_out", refuse_sig)
    found = plan(tmp_path, '[[blocks]]\nexperiments = ["lfd"]\nflags = { study = "table1" }\n')
    assert not found.jobs and len({entry.cell.attack for entry in found.refused}) == 10
    reasons = {entry.cell.attack: entry.reason for entry in found.refused}
    assert reasons.pop("sig") == "too few rows"
    assert set(reasons.values()) == {"the study table1 has sig: too few rows"}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('["lfd"]', '["ldf"]', 17, "experiment 'ldf' is not one of ta_kd, attack, lfd, abm, vbd, robust_kd; did you mean lfd?"),
        ('["lfd"]', '["lfd"]\ndatasets = ["digist"]', 18, "did you mean digits?"),
        ("badnets:", "badnet:", 3, "did you mean badnets?"),
        ("blended:poison_rate=0.2", "blended:posion_rate=0.2", 3, "did you mean poison_rate?"),
        ("blended:poison_rate=0.2", "blended:poison_rate=2", 3, "poison_rate 2 is not"),
        ("blended:poison_rate=0.2", "sig:poison_rate=0.5", 3, "the largest rate possible is 0.1"),
        ("fine_tuning:", "fine_tunning:", 4, "did you mean fine_tuning?"),
        ("fine_tuning:epochs", "fine_tuning:epoch", 4, "has no setting 'epoch'"),
        ("epochs = 3", "ephocs = 3", 8, "flags: lfd has no flag 'ephocs'; did you mean epochs?"),
        ("epochs = 3", "coherence = 3", 8, "flags: lfd has no flag 'coherence'; bdjax lfd --help lists them"),
        ("epochs = 3", "epochs = 0", 8, "--epochs 0 is not at least 1"),
        ('"lenet"', '"lennet"', 7, "did you mean lenet?"),
        ("epochs = 3", 'epochs = 3\ndataset = "mnist"', 9, "flags: dataset is set by datasets of the block"),
        ("epochs = 3", 'epochs = 3\noutput = "a"', 9, "every job has a folder of its own"),
        ("epochs = 3", 'epochs = 3\nexport = ["--seeds=9"]', 9, "flags: export has '--seeds=9', which is a flag, not a value"),
        ("epochs = 3", 'epochs = 3\nexport = ["-h"]', 9, "flags: export has '-h', which is a flag, not a value"),
        ("seeds = 2", 'seeds = 2\npreset = "stong"', 2, "did you mean strong?"),
        ('["abm"]', '["ta_kd"]', 3, "experiment ta_kd has no attacks"),
    ],
)  # fmt: skip
def test_a_mistake_has_its_file_and_line_before_any_job(tmp_path, old, new, line, message):
    assert old in TINY
    path = write(tmp_path, TINY.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        command.main([str(path), f"--output={tmp_path / 'out'}"], quiet())
    assert str(error.value).startswith(f"{path} line {line}: ") and message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_flags_are_refused_in_one_line(tmp_path):
    for arguments, message in (
        ([], "give the grid's TOML file first"),
        (["collect"], "collect needs a folder"),
        (["collect", str(tmp_path / "none")], "is not a folder"),
        (["collect", str(tmp_path)], "has no finished run"),
        ([str(tmp_path / "none.toml")], "No such file"),
        (["a.toml", "--executor=slrum"], "did you mean slurm?"),
        (["a.toml", "--workers=0"], "--workers 0 is not at least 1"),
        (["a.toml", "--gpus", "-1"], "--gpus (-1,) has the entry -1, which is not at least 0"),
        (["a.toml", "--output=a\0b"], "--output 'a\\x00b' has a zero byte"),
        (["collect", str(tmp_path), "--output=a\0b"], "--output 'a\\x00b' has a zero byte"),
    ):
        with pytest.raises(InputError) as error:
            command.main(arguments, quiet())
        assert message in str(error.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"has files \(thesis.tex\) but no grid.json"):
        command.main([str(write(tmp_path, TINY)), f"--output={tmp_path / 'out'}"], quiet())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_slurm_is_needed_for_slurm(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no sbatch and srun"):
        command.main([str(write(tmp_path, TINY)), "--executor=slurm"], quiet())


# ---- Jobs whose command is a fake ------------------------------------------------------------------------------------


def fake_main(arguments):
    """Write results as a run does: CDA 0.5 for each cell; `blended` cannot be run, `sig` ends the process."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
    if "blended" in flags["attacks"]:
        raise InputError("the rows are\ntoo few")
    if "sig" in flags["attacks"]:
        raise RuntimeError("broken")
    output = pathlib.Path(flags["output"])
    output.mkdir(parents=True)
    attacks, defenses, seeds = flags["attacks"].split(","), flags["defenses"].split(","), [10, 11]
    cells = [
        {
            "attack": attack,
            "method": defense,
            "summary": {"cda": {}},
            "facts": {},
            "by_seed": [{"seed": seed, "cda": 0.5} for seed in seeds],
        }
        for attack in attacks
        for defense in defenses
    ]
    results = {
        "attacks": [{"attack": name} for name in attacks],
        "methods": [{"method": name} for name in defenses],
        "seeds": seeds,
        "cells": cells,
        "left_out": {},
    }
    (output / "results.json").write_text(json.dumps(results))
    config = {"dataset": "digits", "preset": "quick", "defenses": flags["defenses"]}
    (output / "config.json").write_text(json.dumps({"experiment": "lfd", "config": config}))
    with open(output / "times", "a") as file:
        file.write("x")


class InProcess:
    """An executor and its job: what is submitted has ended before `submit` returns."""

    state, job_id = "FINISHED", "1"

    def __init__(self, folder, *options) -> None:
        del folder, options

    def submit(self, work):
        work()
        return self


@pytest.fixture
def fakes(monkeypatch):
    real = commands.load

    def load(name):
        module = real(name)
        return types.SimpleNamespace(EXPERIMENT=module.EXPERIMENT, main=fake_main)

    monkeypatch.setattr(command.commands, "load", load)
    monkeypatch.setattr(jobs, "local_executor", InProcess)


def cells_of(folder: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "cells.csv").read_text())))


THREE = """\
seeds = 2
seed = 10
defenses = ["none", "abl"]
flags = { train_rows = 600, test_rows = 100 }
[[blocks]]
experiments = ["lfd"]
attacks = ["badnets"]
[[blocks]]
experiments = ["lfd"]
attacks = ["blended"]
[[blocks]]
experiments = ["lfd"]
attacks = ["sig"]
"""


def test_failed_cells_are_rows_that_say_why_and_a_restart_redoes_nothing(tmp_path, fakes):
    out = tmp_path / "out"
    arguments = [str(write(tmp_path, THREE)), f"--output={out}"]
    assert command.main(arguments, quiet()) == grid_run.FAILED
    cells = cells_of(out)
    assert [cell["status"] for cell in cells] == ["done"] * 4 + ["failed"] * 8
    assert {cell["reason"] for cell in cells} == {"", "the rows are too few", "RuntimeError: broken"}
    assert [cell["cda"] for cell in cells] == ["0.5"] * 4 + [""] * 8
    (run,) = (out / "runs").iterdir()
    text = THREE.replace('["blended"]', '["badnets:poison_rate=0.2"]').replace('["sig"]', '["badnets:target=1"]')
    assert command.main([str(write(tmp_path, text)), f"--output={out}"], quiet()) == 0
    assert [cell["status"] for cell in cells_of(out)] == ["done"] * 12 and len(list((out / "runs").iterdir())) == 3
    before = (out / "cells.csv").read_bytes()
    assert command.main([str(write(tmp_path, text)), f"--output={out}"], quiet()) == 0
    assert (out / "cells.csv").read_bytes() == before and (run / "times").read_text() == "x"


def test_collect_has_the_cells_without_a_result(tmp_path, fakes):
    out = tmp_path / "out"
    command.main([str(write(tmp_path, THREE)), f"--output={out}"], quiet())
    rows = grid_run.read_rows(out)
    assert [row.status for row in rows] == ["done"] * 4 + ["failed"] * 8
    assert (
        rows[-1][:9] == ("lfd", "digits", "quick", "", "sig", "abl", 11, "", None)
        and rows[-1].reason == "RuntimeError: broken"
    )
    for form, name in grid_run.FORMATS.items():
        assert command.main(["collect", str(out), f"--format={form}"], quiet()) == 0
        assert (out / "collected" / name).stat().st_size > 100
    assert "RuntimeError: broken" in (out / "collected" / "tables.md").read_text()
    (out / "jobs").rename(out / "gone")
    assert {row.reason for row in grid_run.read_rows(out)} == {"the grid was interrupted"}


def write_grid(folder: pathlib.Path, **changes) -> None:
    """A grid.json with one job of one cell, which has not run."""
    cell = dict(zip(grid.Cell._fields, ("lfd", "digits", "quick", "badnets", "abl", 0), strict=True)) | changes
    (folder / "grid.json").write_text(json.dumps({"jobs": [{"name": "a", "cells": [cell]}], "refused": []}))


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "0"), ("seed", True), ("seed", None), ("attack", 3), ("defense", [])]
)
def test_a_cell_of_wrong_types_is_refused_in_one_line(tmp_path, name, value):
    write_grid(tmp_path)
    assert [row.status for row in grid_run.read_rows(tmp_path)] == ["not run"]
    write_grid(tmp_path, **{name: value})
    with pytest.raises(InputError, match=f"grid.json: is not the file of a grid .{name} ") as error:
        command.main(["collect", str(tmp_path)], quiet())
    assert "\n" not in str(error.value)


def test_collect_has_a_run_once_that_is_in_two_folders(tmp_path):
    results = ROOT / "docs" / "results"
    counts = []
    for number, folders in enumerate(([results / "lfd"], [results / "lfd" / "digits", results / "lfd"])):
        out = tmp_path / str(number)
        command.main(["collect", *map(str, folders), f"--output={out}", "--format=csv"], quiet())
        counts.append(sorted((out / "rows.csv").read_text().splitlines()))
    assert counts[0] == counts[1]


def test_a_hybrid_that_is_left_out_has_its_reason(tmp_path):
    name = "a"
    cells = tuple(grid.Cell("attack", "digits", "quick", f"{part} in a+b", "none", 0) for part in "ab")
    found = grid.Plan((grid.Job(name, "attack", (), cells, ""),), (), {})
    jobs.write_outcome(tmp_path, name, jobs.Outcome(True, ""))
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    results = {"attacks": [], "methods": [{"method": "none"}], "seeds": [0], "cells": [], "left_out": {"a+b": "why"}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.json").write_text(json.dumps({"experiment": "attack", "config": {"dataset": "digits"}}))
    assert [line[6:8] for line in grid_run._cells(tmp_path, found)] == [("left out", "why")] * 2


def test_a_cell_is_not_tested_although_it_has_a_cda():
    row = grid_run.collected.Row(*("",) * 7, "cda", 0.5, "done", "", *("",) * 8)
    rows = {"cda": row, "": row._replace(metric="", value=None, status="not tested", reason="why")}
    assert grid_run.status_of(jobs.Outcome(True, ""), rows) == ("not tested", "why")


def test_the_help_says_nothing_of_several_processes(capsys):
    for words in ([], ["collect"]):
        with pytest.raises(SystemExit):
            command.main([*words, "--help"], quiet())
        assert "--coordinator" not in capsys.readouterr().out


def test_a_job_that_another_process_has_finished_is_not_run_again(tmp_path, fakes):
    work = command.Work("lfd", ("--attacks=sig", "--defenses=none"), str(tmp_path), "a")
    jobs.write_outcome(tmp_path, "a", jobs.Outcome(True, ""))
    work()
    assert jobs.read_outcome(tmp_path, "a").is_done
    assert work.checkpoint().function == work


def test_collect_reads_committed_runs_of_several_folders(tmp_path):
    folders = [str(ROOT / "docs" / "results" / name) for name in ("lfd", "bench_ensemble", "vbd/cifar10-competitors")]
    assert (
        command.main(["collect", *folders[:1], folders[2], f"--output={tmp_path}", "--metrics", "asr", "f1"], quiet())
        == 0
    )
    text = (tmp_path / "tables.md").read_text()
    assert "**ASR: lfd on digits, quick**" in text and "**F1: vbd on cifar10, quick**" in text and "CDA" not in text
    assert len(list(tmp_path.glob("trade-off-lfd-*.png"))) >= 2
    with pytest.raises(InputError, match="has no finished run with results"):
        command.main(["collect", folders[1]], quiet())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "asr", "cad"], "--metrics 'cad' is not one of cda, asr.*did you mean cda"),
        (["--metrics=cda", "--format=csv"], "--format=csv has every number"),
        (["--metrics=cda", "--format=parquet"], "--format=parquet has every number"),
    ],
)
def test_collect_refuses_metrics_that_it_cannot_show(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command.main(["collect", str(ROOT / "docs" / "results" / "lfd"), f"--output={tmp_path}", *flags], quiet())
    assert not list(tmp_path.iterdir())


def test_metrics_are_no_mistake_in_a_grid_without_results(tmp_path):
    write_grid(tmp_path)
    assert command.main(["collect", str(tmp_path), "--metrics=cda"], quiet()) == 0


# ---- A whole grid ----------------------------------------------------------------------------------------------------

SHORT = (
    TINY.replace('"badnets:poison_rate=0.2", "blended:poison_rate=0.2"', '"badnets:poison_rate=0.2"')
    .replace("epochs = 3", "epochs = 2")
    .replace("train_rows = 600", "train_rows = 240")
    .replace("test_rows = 100", "test_rows = 40")
)
"""Two jobs of four cells: another attack would be more members of the same calls."""


SINGLE = """
import json, sys
from bdjax import commands
from bdjax.run import backend, jobs

with jobs.on_cores(jobs.shares(jobs.own_cores(), 2)[0]):  # as many devices as a worker has
    backend.set_up()
    for experiment, arguments in json.loads(sys.argv[1]):
        commands.load(experiment).main(arguments)
"""


def run_program(arguments: list[str], printed: pathlib.Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(printed, "w") as file:
        return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT)


def start(path: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
    arguments = [str(ROOT / "experiments" / "grid.py"), str(path), f"--output={out}", "--workers=2"]
    return run_program(arguments, path.with_suffix(".log"))


def rerun(path: pathlib.Path, out: pathlib.Path) -> None:
    """The same command again, when all is done."""
    before = {run: run.stat().st_mtime_ns for run in out.glob("runs/*/*")}
    printed = io.StringIO()
    assert command.main([str(path), f"--output={out}"], StageLog(Console(file=printed))) == 0
    assert "2 of 2 are done already" in printed.getvalue()
    assert before and before == {run: run.stat().st_mtime_ns for run in out.glob("runs/*/*")}


def assert_same_to_rounding(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """Two JSON documents have the same places and texts, and numbers within 1e-5 of each other's."""
    leaves = [jax.tree_util.tree_flatten_with_path(json.loads(path.read_text())) for path in (found, wanted)]
    assert leaves[0][1] == leaves[1][1]
    for (place, value), (_, other) in zip(leaves[0][0], leaves[1][0], strict=True):
        same = value == other if isinstance(value, str) else value == pytest.approx(other, rel=1e-5)
        assert same, (jax.tree_util.keystr(place), value, other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_grid_that_is_killed_twice_equals_the_single_runs(tmp_path):
    path, killed, single = write(tmp_path, SHORT), tmp_path / "killed", tmp_path / "single"
    found = plan(tmp_path, SHORT).jobs
    runs = [(job.experiment, [*job.arguments, f"--output={single / 'runs' / job.name}"]) for job in found]
    assert run_program(["-c", SINGLE, json.dumps(runs)], tmp_path / "single.log").wait(timeout=900) == 0
    # While the first epochs run, and when a job has trained its first networks.
    for sent, moment in ((signal.SIGTERM, "checkpoints/*"), (signal.SIGKILL, "checkpoints/*/about.json")):
        process = start(path, killed)
        while process.poll() is None and not any(killed.glob(f"runs/*/{moment}")):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(sent)
        process.wait(timeout=300)
    assert not (killed / "cells.csv").exists()
    assert start(path, killed).wait(timeout=900) == 0  # the workers of the last one may still be about to end
    output = path.with_suffix(".log").read_text()
    assert "8 cells: 8 done" in output and "Traceback" not in output
    cells = cells_of(killed)
    assert len(cells) == 8 and {cell["status"] for cell in cells} == {"done"}
    assert sorted(run.name for run in (killed / "runs").iterdir()) == sorted(job.name for job in found)
    for job in found:
        of_job, of_single = (folder / "runs" / job.name for folder in (killed, single))
        assert_same_to_rounding(of_job / "results.json", of_single / "results.json")
        hardware = [json.loads((run / "config.json").read_text())["hardware"] for run in (of_job, of_single)]
        if hardware[0] == hardware[1]:  # as many devices, unless the number of cores is odd
            assert (of_job / "results.json").read_bytes() == (of_single / "results.json").read_bytes()
        jobs.write_outcome(single, job.name, jobs.Outcome(True, ""))
    shutil.copy(killed / "grid.json", single)  # so that it is the folder of a grid
    for folder in (single, killed):
        rerun(path, folder)
    assert (killed / "cells.csv").read_bytes() == (single / "cells.csv").read_bytes()
