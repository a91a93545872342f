"""Curves for TensorBoard."""

import sys

import pytest

from bdjax.commands import lfd
from bdjax.errors import InputError
from bdjax.run.scalars import curves_of


def values(folder) -> dict[str, dict[int, float]]:
    """Tag -> step -> value in the event files of a folder."""
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):  # TFRecord: length, its checksum, the event, its checksum
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                assert event.step not in found.setdefault(value.tag, {}), "each epoch is there once"
                found[value.tag][event.step] = round(value.simple_value, 5)
    return found


def test_curves_are_written_once_however_often_the_run_continues(tmp_path):
    pytest.importorskip("tensorboardX")
    stage = tmp_path / "checkpoints" / "suspects-0000" / "no-defense"
    for epochs in (2, 3):
        with curves_of(tmp_path, stage) as write:
            for epoch in range(1, epochs + 1):
                write(epoch, {"loss": 1 / epoch, "accuracy": float("nan") if epoch == 1 else 0.5})
    found = values(tmp_path / "tensorboard" / "suspects-0000" / "no-defense")
    assert found == {"loss": {1: 1.0, 2: 0.5, 3: 0.33333}, "accuracy": {2: 0.5, 3: 0.5}}


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match="--tensorboard needs tensorboardX"):
        lfd.main(["--tensorboard", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(InputError, match=r"--tensorboard needs tensorboardX.*pip install 'bdjax\[grid\]'"),
        curves_of(tmp_path, tmp_path / "checkpoints" / "a"),
    ):
        pass
