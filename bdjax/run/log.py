"""The log of a run: a progress bar for the current stage, one line for each finished stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bdjax import interruption
from bdjax.run.text import printable, shortened
from bdjax.training import processes

_SECONDS_BETWEEN_PLAIN_LINES = 30.0
_WIDTH_OF_FILES = 160
LONGEST_LINE = 2000
"""Letters of a line. Printing more takes long, and nobody reads it."""


class StageProgress:
    """The handle of the current stage, from `StageLog.stage`."""

    def __init__(self, report: Callable[[int, str], None], detail: str) -> None:
        self._report = report
        self.done = 0
        self.detail = detail  # what the stage's line prints; may be changed while the stage runs
        self.output = ""

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Reports further finished steps, and a message such as "loss 0.31"."""
        interruption.check()
        self.done += steps
        self._report(self.done, message)

    def wrote(self, output: str | Path) -> None:
        """Sets the file or folder that the stage's line points to."""
        self.output = str(output)


class StageLog:
    """Times the stages of a run and prints a line for each.

    On a terminal the current stage has a progress bar, which is removed at its end. Elsewhere (a file, a pipe) there are only
    plain lines without control characters: one for each finished stage, and now and then one from a long stage. With several
    processes only the primary prints.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = console or Console(quiet=not processes.is_primary())
        if console is None and not self.console.is_terminal:
            # A file or a pipe has no width, and rich would cut the numbers of wide tables off.
            self.console.width = max(self.console.width, _WIDTH_OF_FILES)
        self.timings: dict[str, float] = {}  # seconds without those of nested stages; repeated stages add up
        self._clock = clock
        self._has_bar = False
        self._inner: list[float] = []  # for each open stage, the outermost first: seconds of the stages nested in it

    @contextmanager
    def stage(
        self, name: str, *, total: int | None = None, unit: str = "", detail: str = ""
    ) -> Iterator[StageProgress]:
        """Runs a stage.

        Args:
            name: name of the stage in the log and in `timings`.
            total: number of steps, if known.
            unit: unit of the steps: "epochs".
            detail: text of the stage's line, "21 members × 30 epochs"; if empty, total and unit.

        Yields:
            The handle to report progress and what was written.
        """
        name = printable(name)
        detail = detail or (f"{total} {unit}".strip() if total is not None else "")
        start = self._clock()
        self._inner.append(0.0)
        failure = ""
        # One bar at a time: a nested stage has only its line.
        shown = self._bar if self.console.is_terminal and not self._has_bar else self._plain_lines
        try:
            with shown(name, total, unit) as report:
                progress = StageProgress(report, detail)
                yield progress
            interruption.check()
        except BaseException as error:
            failure = "failed" if isinstance(error, Exception) else "interrupted"
            raise
        finally:
            seconds = self._clock() - start
            self.timings[name] = self.timings.get(name, 0.0) + seconds - self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds
            if failure:
                self.note(name, f"{failure} after {format_seconds(seconds)}")
            else:
                written = f"   → {printable(progress.output)}" if progress.output else ""
                self.note(name, f"{printable(progress.detail):<28} {format_seconds(seconds):>10}{written}")

    def say(self, text: str) -> None:
        """Prints a line that belongs to no stage, such as the path of the report."""
        self._print(printable(text))

    def note(self, name: str, text: str) -> None:
        """Prints one line about a stage, such as that it was skipped."""
        self._print(f"{printable(name):<16} {text}")

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int, str], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn() if total is not None else TextColumn("{task.completed}"),
            TextColumn(printable(unit), markup=False),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn()] if total is not None else []),
            TextColumn("{task.fields[message]}", markup=False),
        )
        self._has_bar = True
        try:
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(shortened(name, 200), total=total, message="")
                yield lambda done, message: bar.update(task, completed=done, message=shortened(printable(message), 200))
        finally:
            self._has_bar = False

    @contextmanager
    def _plain_lines(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int, str], None]]:
        start = last = self._clock()
        # Steps and time of the first report, which has the compilation behind it.
        first: tuple[int, float] | None = None

        def report(done: int, message: str) -> None:
            nonlocal last, first
            first = first or (done, self._clock())
            if self._has_bar or self._clock() - last < _SECONDS_BETWEEN_PLAIN_LINES:
                return
            last = self._clock()
            count = f"{done} of {total}" if total is not None else f"{done}"
            # Until a second report the compilation is counted too: a limit from above.
            steps, since, most = (done - first[0], first[1], "") if done > first[0] else (done, start, "at most ")
            left = ""
            if total is not None and steps and done < total:
                left = f", {most}{format_seconds((last - since) / steps * (total - done))} left"
            said = f"  {message}" if message else ""
            self.note(name, printable(f"… {count} {unit}{said}{left}"))

        yield report

    def _print(self, line: str) -> None:
        # Text, not a string, which rich would read as markup. No wrapping: a line stays a line.
        self.console.print(Text(shortened(line.rstrip(), LONGEST_LINE)), soft_wrap=True, highlight=False)


def format_seconds(seconds: float) -> str:
    """Formats a duration: "0.4 s", "14.2 s", "3 min 24 s", "1 h 05 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
