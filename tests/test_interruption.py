import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from bdjax import interruption

pytestmark = pytest.mark.usefixtures("foreground")
BOTH = pytest.mark.parametrize("number", interruption.SIGNALS)


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_interrupts_the_block_and_the_old_handlers_come_back(number):
    before, hook = [signal.getsignal(each) for each in interruption.SIGNALS], sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interruption.handled():
        send(number)
    assert [signal.getsignal(each) for each in interruption.SIGNALS] == before and sys.unraisablehook is hook
    interruption.check()
    assert not interruption.received()


@BOTH
def test_what_a_callback_drops_is_raised_at_the_next_check(number, capfd):
    class Dropping:
        def __del__(self):
            send(number)  # an exception in __del__ is printed and ignored

    with interruption.handled():
        interruption.check()
        Dropping()
        gc.collect()
        assert interruption.received() == number
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interruption.check()
        assert interruption.end() == 128 + number
    assert capfd.readouterr() == ("", "")


def test_other_exceptions_in_callbacks_are_printed_as_ever(monkeypatch):
    class Failing:
        def __del__(self):
            raise ValueError("ours")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    with interruption.handled():
        with contextlib.suppress(KeyboardInterrupt):
            send()
        Failing()
    assert seen == ["ours"]


def test_a_postponed_signal_interrupts_at_the_end_of_the_outermost_block():
    done = []
    with interruption.handled():
        with pytest.raises(KeyboardInterrupt), interruption.postponed():
            with interruption.postponed():
                send()
                done.append("written")
            done.append("renamed")
        assert done == ["written", "renamed"]
        with pytest.raises(KeyboardInterrupt), interruption.postponed():
            send()  # the second interrupts at once
            done.append("more")
        assert done == ["written", "renamed"]


STUBBORN = """
import time
from bdjax import interruption
interruption._PATIENCE, interruption._PATIENCE_AFTER_SECOND = {patience}
with interruption.handled():
    said = "ready"
    while True:
        try:
            print(said, flush=True)  # within the block, so that the next signal is dropped as well
            time.sleep(30)
        except KeyboardInterrupt:
            said = "dropped"
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_goes_on_all_the_same_is_ended(signals):
    program = STUBBORN.format(patience=(0.3, 30.0) if signals == 1 else (30.0, 0.3))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "dropped\n"
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, interruption.MESSAGE + "\n")


def test_the_thread_that_watches_ends_with_the_block():
    before = set(threading.enumerate())
    with interruption.handled():
        (watching,) = set(threading.enumerate()) - before
    watching.join(10)
    assert not watching.is_alive()


def test_an_error_in_a_postponed_block_stays_itself():
    with interruption.handled():
        with pytest.raises(ValueError, match="ours"), interruption.postponed():
            send()
            raise ValueError("ours")
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with interruption.handled():
            send()
        interruption.exit_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_another_thread_leaves_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with interruption.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@BOTH
@pytest.mark.parametrize("is_ending", [False, True])
def test_before_the_run_a_signal_ends_the_process_with_one_line(number, is_ending, monkeypatch):
    written, ended = [], []
    monkeypatch.setattr(interruption, "_is_ending", is_ending)
    monkeypatch.setattr(os, "write", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(os, "_exit", ended.append)
    interruption._exit(number, None)
    line = "interrupted; run the same command again to continue\n"
    assert written == ([] if is_ending else [(2, line.encode())])
    assert ended == [128 + number]


IMPORTING = """
from bdjax import interruption
with interruption.handled():
    try:
        import interrupted
    finally:
        print("an import was left half done")
"""


@BOTH
def test_during_an_import_a_signal_ends_the_process_with_one_line(number, tmp_path):
    (tmp_path / "interrupted.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(number)})\nfor _ in range(1000): pass\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((os.getcwd(), str(tmp_path)))}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", interruption.MESSAGE + "\n")
