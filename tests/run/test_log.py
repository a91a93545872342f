import io

import pytest
from rich.console import Console

from bdjax.reporting.report import timings_table
from bdjax.reporting.tables import to_markdown
from bdjax.run.log import StageLog, format_seconds


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_log(is_terminal: bool = False) -> tuple[StageLog, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=is_terminal, width=60, color_system=None, force_jupyter=False)
    return StageLog(console, clock), stream, clock


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_stage_prints_one_line_without_control_characters():
    log, stream, clock = make_log()
    with log.stage("teachers", total=30, unit="epochs", detail="21 members × 30 epochs") as progress:
        for _ in range(30):
            progress.advance(1, "loss 0.31")
        clock.now += 14.2
        progress.wrote("checkpoints/with/a/name/that/is/longer/than/the/console/is/wide")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert words(text) == (
        "teachers 21 members × 30 epochs 14.2 s → checkpoints/with/a/name/that/is/longer/than/the/console/is/wide"
    )
    assert all(letter.isprintable() for letter in text.rstrip("\n"))


def test_the_line_falls_back_on_total_and_unit():
    log, stream, _ = make_log()
    with log.stage("student", total=30, unit="epochs"):
        pass
    with log.stage("evaluation"):
        pass
    first, second = stream.getvalue().splitlines()
    assert words(first) == "student 30 epochs 0.0 s"
    assert words(second) == "evaluation 0.0 s"
    assert first.index("0.0 s") == second.index("0.0 s")


def test_timings_add_up_when_a_name_repeats():
    log, _, clock = make_log()
    for name, seconds in (("teachers", 2.0), ("evaluation", 1.0), ("teachers", 3.5)):
        with log.stage(name):
            clock.now += seconds
    assert log.timings == {"teachers": 5.5, "evaluation": 1.0}
    assert list(log.timings) == ["teachers", "evaluation"]


def test_a_stage_within_a_stage_is_counted_once():
    log, stream, clock = make_log()
    with log.stage("defense"):
        clock.now += 1.0
        with log.stage("teacher"):
            clock.now += 4.0
        clock.now += 2.0
        with log.stage("student"):
            clock.now += 8.0
    assert log.timings == {"teacher": 4.0, "student": 8.0, "defense": 3.0}
    assert "15.0 s" in stream.getvalue()  # the line has all of it


def test_a_stage_that_breaks_off_says_so_and_passes_the_error_on():
    log, stream, clock = make_log()
    with pytest.raises(RuntimeError, match="diverged"), log.stage("teachers", total=30):
        clock.now += 3.0
        raise RuntimeError("diverged")
    assert words(stream.getvalue()) == "teachers failed after 3.0 s"
    assert log.timings == {"teachers": 3.0}


def test_a_long_stage_gives_a_sign_of_life_now_and_then():
    log, stream, clock = make_log()
    with log.stage("teachers", total=200, unit="epochs") as progress:
        for epoch in range(200):
            clock.now += 0.5
            progress.advance(1, f"loss {epoch}")
    lines = stream.getvalue().splitlines()
    assert [words(line) for line in lines[:-1]] == [
        f"teachers … {count} of 200 epochs loss {count - 1}, {left} left"
        for count, left in ((60, "70.0 s"), (120, "40.0 s"), (180, "10.0 s"))
    ]
    assert words(lines[-1]) == "teachers 200 epochs 1 min 40 s"


def test_the_time_left_is_counted_without_the_first_epoch_which_compiles():
    log, stream, clock = make_log()
    with log.stage("teachers", total=4, unit="epochs") as progress:
        for seconds in (100, 10, 30, 40):
            clock.now += seconds
            progress.advance(1)
    assert [words(line) for line in stream.getvalue().splitlines()[:-1]] == [
        "teachers … 1 of 4 epochs, at most 5 min 00 s left",  # nothing better is known after the first epoch
        "teachers … 3 of 4 epochs, 20.0 s left",  # two epochs in 40 s
        "teachers … 4 of 4 epochs",
    ]


def test_a_file_is_wide_enough_for_tables():
    assert StageLog().console.width >= 160
    assert make_log()[0].console.width == 60  # that of the caller's console stays


def test_on_a_terminal_the_bar_is_gone_at_the_end():
    log, stream, clock = make_log(is_terminal=True)
    with log.stage("teachers", total=30, unit="epochs") as progress:
        progress.advance(12, "loss [red]0.31")
        log.note("data", "1,437 rows")
        with log.stage("evaluation"):  # a stage within a stage has no bar of its own
            clock.now += 1
        clock.now += 1
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "12/30" in text
    assert "loss [red]0.31" in text
    assert "data             1,437 rows" in text
    assert log.timings == {"evaluation": 1.0, "teachers": 1.0}
    last = text.rstrip("\n").splitlines()[-1]
    assert "2.0 s" in last
    assert "━" not in last


def test_what_comes_from_outside_cannot_steer_the_terminal():
    log, stream, _ = make_log()
    with log.stage("\x1b[2Jname", detail="[bold]x[/nope]\x07") as progress:
        progress.wrote("a\nb\x1b]0;title\x07")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/nope]" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (14.24, "14.2 s"),
        (99.96, "1 min 40 s"),
        (204, "3 min 24 s"),
        (3599.6, "1 h 00 min"),
        (3899, "1 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_timings_become_a_table():
    table = timings_table({"teachers": 15.0, "student": 5.0})
    assert table.rows == (("teachers", "15.0", "75%"), ("student", "5.0", "25%"), ("all", "20.0", "100%"))
    assert "stage" in to_markdown(timings_table({}))
