"""Jobs: how they share cores, in which order they run, and what is known of them after a kill."""

import json
import os
import signal

import pytest

from bdjax import interruption
from bdjax.run import jobs
from bdjax.run.grid_file import Partition


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ([0, 1], 1, [(0, 1)]),
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1], 3, [(0,), (1,), (0,)]),
        ([2, 3, 5, 7, 8], 2, [(2, 3), (5, 7, 8)]),
    ],
)
def test_workers_divide_the_cores(cores, workers, expected):
    assert jobs.shares(cores, workers) == expected


def test_a_process_that_is_started_on_some_cores_has_as_many_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: asked.append(list(cores)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    with jobs.on_cores([1]):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ
    assert asked == [[1], [0, 1]] and signal.getsignal(signal.SIGINT) == handler


def test_an_outcome_is_what_was_written(tmp_path):
    assert jobs.read_outcome(tmp_path, "a") is None
    outcome = jobs.Outcome(False, "the disk is full", 1.5, 2.5)
    jobs.write_outcome(tmp_path, "a", outcome)
    assert jobs.read_outcome(tmp_path, "a") == outcome
    for damaged in ("", "[]", '{"is_done": true}', '{"is_done": true, "reason": "", "more": 1}'):
        (tmp_path / "jobs" / "a.json").write_text(damaged)
        assert jobs.read_outcome(tmp_path, "a") is None
    jobs.drop_outcome(tmp_path, "a")
    jobs.drop_outcome(tmp_path, "a")


class FakeJob:
    """A job that is over after it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def state(self) -> str:
        self.looks -= 1
        return "RUNNING" if self.looks >= 0 else "FINISHED"


def run_fakes(looks: dict[str, int], at_once: int, **options) -> tuple[list[str], list[tuple[str, int]]]:
    ended, started = [], []

    def start(name, slot):
        started.append((name, slot))
        return FakeJob(looks[name])

    jobs.follow(list(looks), start, ended.append, options.pop("is_done", lambda name: False), at_once, 0.0, **options)
    return ended, started


def test_at_most_so_many_jobs_run_at_a_time_and_a_free_slot_is_used_again():
    ended, started = run_fakes({"a": 5, "b": 1, "c": 1, "d": 9}, 2)
    assert ended == ["b", "c", "a", "d"] and started == [("a", 0), ("b", 1), ("c", 1), ("d", 1)]
    assert run_fakes({}, 1) == ([], [])


def test_a_job_that_is_known_to_be_done_is_not_waited_for():
    ended, _ = run_fakes({"a": 10**9, "b": 3}, 2, is_done=lambda name: name == "a")
    assert ended == ["a", "b"]


def test_a_job_that_comes_back_within_the_grace_goes_on():
    class Requeued(FakeJob):
        states = iter(["COMPLETED", "PENDING", "RUNNING", "COMPLETED"])

        @property
        def state(self):
            return next(self.states, "COMPLETED")

    ended, looks = [], []
    job = Requeued(0)

    def is_done(name):
        looks.append(name)
        return len(looks) > 6

    jobs.follow(["a"], lambda name, slot: job, ended.append, is_done, 1, 0.0, 60.0)
    assert ended == ["a"] and len(looks) == 7


def test_an_interruption_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(interruption, "_received", int(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run_fakes({"a": 10**9}, 1)


# ---- Slurm, by submitit's test double --------------------------------------------------------------------------------


@pytest.fixture
def slurm():
    test_double = pytest.importorskip("submitit.core.test_core")
    submitit_slurm = pytest.importorskip("submitit.slurm.slurm")
    with test_double.MockedSubprocess(known_cmds=["srun", "sbatch"]).context() as context:
        yield context
    submitit_slurm.SlurmJob.watcher.clear()


def test_a_partition_is_what_sbatch_gets(tmp_path, slurm):
    partition = Partition(time=240, cpus_per_task=8, gpus_per_node=1, mem_gb=64, device_gb=80, setup=("module load x",))
    assert jobs.has_slurm()
    job = jobs.slurm_executor(tmp_path, "gpu", partition).submit(print, "x")
    script = (tmp_path / "log" / f"{job.job_id}_submission.sh").read_text()
    for line in ("partition=gpu", "time=240", "cpus-per-task=8", "gpus-per-node=1", "mem=65536MB", "job-name=bdjax"):
        assert f"#SBATCH --{line}\n" in script
    assert "\nmodule load x\n" in script and "device" not in script and "--signal=USR2@90" in script
    script = jobs.slurm_parameters(None, Partition())
    assert set(script) == {"time", "nodes", "cpus_per_task", "job_name", "ntasks_per_node"}


def test_a_job_may_run_out_of_its_time_many_times(tmp_path, slurm):
    job = jobs.slurm_executor(tmp_path, None, Partition()).submit(print, "x")
    from submitit.core.utils import DelayedSubmission

    assert DelayedSubmission.load(job.paths.submitted_pickle)._timeout_countdown == jobs.MOST_TIMEOUTS == 100


def test_a_job_in_the_queue_is_found_again_until_it_is_over(tmp_path, slurm, monkeypatch):
    submitit_slurm = pytest.importorskip("submitit.slurm.slurm")
    job = jobs.slurm_executor(tmp_path, None, Partition()).submit(print, "x")
    jobs.record(tmp_path, "a", "slurm", job)
    assert jobs.sent_to_slurm(tmp_path, "a").job_id == job.job_id
    assert jobs.log_of(tmp_path, "a").name == f"{job.job_id}_0_log.err"
    monkeypatch.setattr(submitit_slurm.SlurmJob.watcher, "get_state", lambda *_, **__: "FAILED")
    assert jobs.is_over(job) and jobs.sent_to_slurm(tmp_path, "a") is None
    assert jobs.sent_to_slurm(tmp_path, "never sent") is None
    for damaged in ({"executor": "local", "job": "12"}, {"executor": "slurm", "job": "12; rm"}, {"job": 3}, []):
        (tmp_path / "submitted" / "a.json").write_text(json.dumps(damaged))
        assert jobs.sent_to_slurm(tmp_path, "a") is None


def test_the_queue_is_asked_where_there_is_one(monkeypatch):
    answers = iter([(0, "11\n12\n"), (0, ""), (1, "")])

    class Done:
        def __init__(self, returncode, stdout):
            self.returncode, self.stdout = returncode, stdout

    SlurmJob = type("SlurmJob", (), {"job_id": "12", "state": "UNKNOWN"})
    monkeypatch.setattr(jobs.shutil, "which", lambda name: name)
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: Done(*next(answers)))
    found = []
    for _ in range(3):
        jobs._queue.cache_clear()
        found.append(jobs.is_over(SlurmJob()))
    jobs._queue.cache_clear()
    assert found == [False, True, False], "a queue that does not answer says nothing"
