import json

import jax
import pytest

from bdjax.models import default_lowering
from bdjax.models.layers import EXACT_LOWERINGS
from bdjax.training import ensemble, probe
from bdjax.training.probe import Choice, Shape

SHAPE = Shape((4, 4, 1), width=2, batch_size=16, members=12)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def plain_cpu(tmp_path, monkeypatch):
    """What is worth timing does not depend on the instructions of the machine that runs the tests."""
    monkeypatch.setattr(probe, "CPU_FACTS", tmp_path / "no facts")


class Stopwatch:
    """Invented seconds, and a list of what was timed."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.timed = []

    def __call__(self, choice, shape):
        self.timed.append((choice, shape.batch_size, shape.members))
        return self.seconds.get(tuple(choice), 1.0)


def test_given_choices_are_not_measured():
    stopwatch, lines = Stopwatch({}), []
    assert probe.choose(SHAPE, "vmap", "patches", report=lines.append, measure=stopwatch) == ("vmap", "patches")
    assert not stopwatch.timed and not lines and not probe.cache_file().exists()


def test_the_fastest_wins_and_is_cached_for_all_runs():
    stopwatch, lines = Stopwatch({("vmap", "shifted"): 0.002, ("map", "shifted"): 0.5}), []
    best = probe.choose(SHAPE, report=lines.append, measure=stopwatch)
    assert best == Choice("vmap", "shifted")
    assert lines[0].startswith("vmap/shifted (vmap/shifted 2 ms, map/shifted 500 ms, ")
    again = Stopwatch({})
    assert probe.choose(SHAPE, report=lines.append, measure=again) == best
    assert not again.timed
    assert "from an earlier measurement" in lines[1] and str(probe.cache_file()) in lines[1]


def test_a_choice_without_its_speed_is_measured_again():
    """Caches of earlier versions have none, and then no run knows how long it will take."""
    best = probe.choose(SHAPE, measure=Stopwatch({("vmap", "shifted"): 0.002}))
    entries = json.loads(probe.cache_file().read_text())
    choices = {key: value for key, value in entries.items() if isinstance(value, list)}
    assert len(choices) == 1 < len(entries)
    probe.cache_file().write_text(json.dumps(choices))
    assert probe.measured_speed(SHAPE, best) is None
    again = Stopwatch({("vmap", "shifted"): 0.002})
    assert probe.choose(SHAPE, measure=again) == best and again.timed
    assert probe.measured_speed(SHAPE, best) > 0


def test_each_shape_is_measured():
    assert probe.choose(SHAPE, measure=Stopwatch({("map", "native"): 0.9, ("vmap", "native"): 0.1})) == (
        "vmap",
        "native",
    )
    other = Stopwatch({("map", "patches"): 0.1})
    assert probe.choose(Shape((4, 4, 1), 2, 16, 3), measure=other) == ("map", "patches")
    assert probe.choose(Shape((4, 4, 1), 2, 16, 12, "bfloat16"), measure=other) == ("map", "patches")
    assert probe.choose(SHAPE, measure=Stopwatch({})) == ("vmap", "native")


def test_hopeless_lowerings_are_only_timed_on_few_rows_and_few_members():
    usual = ensemble.default_layout()
    stopwatch = Stopwatch({(usual, "native"): 1.5, (usual, "patches"): 0.9})
    assert probe.choose(SHAPE, measure=stopwatch).lowering != "native"
    few = [choice for choice, batch_size, _ in stopwatch.timed if batch_size == 2]
    whole = [choice for choice, batch_size, _ in stopwatch.timed if batch_size == 16]
    assert len(few) + len(whole) == len(stopwatch.timed)
    assert few[0] == (usual, default_lowering())
    assert sorted(few) == sorted(Choice(usual, lowering) for lowering in EXACT_LOWERINGS)
    # Each hopeful lowering in the usual layout, the best of them in the others.
    layouts = {layout for layout, lowering in whole if lowering == "patches"}
    assert sorted(whole) == sorted(
        [(usual, "patches"), (usual, "shifted"), *((layout, "patches") for layout in layouts - {usual})]
    )
    assert layouts == {"map", "vmap"}
    assert {members for *_, members in stopwatch.timed} == {6 * jax.device_count()}
    crowd = Stopwatch({})
    probe.choose(Shape((4, 4, 1), 2, 16, 100), measure=crowd)
    assert {members for *_, members in crowd.timed} == {8 * jax.device_count()}


def test_the_usual_combination_wins_a_near_tie():
    usual = (ensemble.default_layout(), default_lowering())
    other = ("vmap", "shifted") if usual[0] == "map" else ("map", "native")
    assert probe.choose(SHAPE, measure=Stopwatch({usual: 0.0105, other: 0.01})) == usual
    clear = Shape((4, 4, 1), 2, 32, 12)
    assert probe.choose(clear, measure=Stopwatch({usual: 0.0115, other: 0.01})) == other


@pytest.mark.parametrize(("members", "is_timed"), [(2, True), (6, True), (7, False)])
def test_unrolled_is_timed_where_it_compiles_quickly(members, is_timed):
    assert jax.device_count() == 2
    stopwatch = Stopwatch({})
    probe.choose(Shape((4, 4, 1), 2, 16, members), measure=stopwatch)
    assert any(choice.layout == "unrolled" for choice, *_ in stopwatch.timed) == is_timed
    assert probe.choose(Shape((4, 4, 1), 2, 16, members), "unrolled", measure=Stopwatch({})).layout == "unrolled"


def test_no_measurement_starts_that_would_end_after_the_time_limit():
    usual = (ensemble.default_layout(), default_lowering())
    faster = Stopwatch({usual: 0.9, ("map", "patches"): 0.1, ("vmap", "native"): 0.1})
    lines, now = [], [0.0]

    def slow(choice, shape):
        now[0] += 6.0
        return faster(choice, shape)

    best = probe.choose(SHAPE, seconds=20, report=lines.append, measure=slow, clock=lambda: now[0])
    assert now[0] == 18 and len(faster.timed) == 3  # the fourth would end at 24 s
    assert best == usual and "would pass the limit of 20 s" in lines[0]
    # What it found is kept, so that the next run does not measure again.
    again = Stopwatch({})
    assert probe.choose(SHAPE, measure=again) == best and not again.timed
    assert probe.measured_speed(SHAPE, best) == pytest.approx(12 * 2 * 16 / 0.9)


def test_a_limit_of_0_measures_nothing_but_the_speed_of_the_default():
    stopwatch, now = Stopwatch({}), [0.0]

    def slow(choice, shape):
        now[0] += 1.0
        return stopwatch(choice, shape)

    best = probe.choose(SHAPE, seconds=0, measure=slow, clock=lambda: now[0])
    assert best == (ensemble.default_layout(), default_lowering())
    assert stopwatch.timed == [(best, 16, 12)]


def test_the_speed_of_what_was_timed_is_known_to_later_runs():
    assert probe.measured_speed(SHAPE, Choice("vmap", "shifted")) is None
    best = probe.choose(SHAPE, measure=Stopwatch({("vmap", "shifted"): 0.002}))
    assert probe.measured_speed(SHAPE, best) == pytest.approx(12 * 2 * 16 / 0.002)
    assert probe.measured_speed(SHAPE, Choice("vmap", "native")) is None
    assert probe.measured_speed(Shape((4, 4, 1), 2, 16, 12, network="speedrun"), best) is None


def test_a_network_that_compiles_quickly_is_timed_itself():
    assert probe.probed_network(["speedrun", "resnet18"]) == "speedrun"
    assert probe.probed_network(["resnet34", "speedrun"]) == probe.probed_network([]) == "resnet10"


def test_a_run_keeps_its_first_choice(tmp_path):
    began = tmp_path / "engine.json"
    began.write_text(json.dumps(probe.record(Choice("vmap", "patches"))))
    stopwatch, lines = Stopwatch({("map", "shifted"): 0.1}), []
    assert probe.choose(SHAPE, choice_file=began, report=lines.append, measure=stopwatch) == ("vmap", "patches")
    assert not stopwatch.timed and lines == ["vmap/patches, as at the start of this run"]
    # A flag takes precedence.
    assert probe.choose(SHAPE, "map", choice_file=began, measure=stopwatch) == ("map", "shifted")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choice": 3}', '{"choice": ["map", "winograd"]}', '{"choice": [["map"], {}]}', "\xff"]
)
def test_a_file_without_a_valid_choice_is_ignored(tmp_path, text):
    broken = tmp_path / "engine.json"
    broken.write_bytes(text.encode("latin-1"))
    probe.cache_file().parent.mkdir(parents=True)
    probe.cache_file().write_bytes(text.encode("latin-1"))
    stopwatch = Stopwatch({("map", "shifted"): 0.1})
    assert probe.choose(SHAPE, choice_file=broken, measure=stopwatch) == ("map", "shifted")
    again = Stopwatch({})
    assert probe.choose(SHAPE, measure=again) == ("map", "shifted")
    assert not again.timed


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert probe.choose(SHAPE, measure=Stopwatch({("map", "shifted"): 0.1})) == ("map", "shifted")


@pytest.mark.parametrize("shape", [Shape((2, 2, 1), 2, 2, 3, "bfloat16"), Shape((1, 1, 1), 2, 2, 3)])
def test_convolutions_are_really_timed(shape):
    assert 0 < probe.time_convolutions(Choice("vmap", "patches"), shape) < 60


@pytest.mark.slow
def test_training_is_really_timed():
    """With one combination: the layouts and lowerings themselves are those of `test_ensemble.py`."""
    assert 0 < probe.time_training(Choice("map", "shifted"), Shape((8, 8, 1), 2, 2, 3, network="vbd_4_4p")) < 60


@pytest.mark.parametrize(("flags", "expected"), [("fma avx2", False), ("fma avx512_bf16 vnni", True), (None, False)])
def test_rounded_products_are_measured_only_where_the_cpu_has_instructions_for_them(
    tmp_path, monkeypatch, flags, expected
):
    facts = tmp_path / "cpuinfo"
    if flags is not None:
        facts.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(probe, "CPU_FACTS", facts)
    lowerings = probe.usable_lowerings()
    assert ("shifted_bfloat16" in lowerings) == expected and set(EXACT_LOWERINGS) <= set(lowerings)
