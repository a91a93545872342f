"""Curves of a run as scalars for TensorBoard, in event files of `tensorboardX`."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bdjax import extras
from bdjax.training import processes

FOLDER = "tensorboard"


@contextlib.contextmanager
def curves_of(run: Path, stage: Path) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Write the curves of a stage to the folder in `tensorboard/` that has its name, and so is a run of TensorBoard's.

    A continued run passes on all epochs again, so what its earlier processes wrote is replaced. With several processes only the
    primary writes. Numbers that are not finite are left out.

    Args:
        run: the run's folder.
        stage: the stage's folder, in the run's `checkpoints/`.

    Yields:
        A function of an epoch, from 1, and name -> number.

    Raises:
        InputError: tensorboardX is not installed.
    """
    if not processes.is_primary():
        yield lambda epoch, numbers: None
        return
    folder = run / FOLDER / stage.relative_to(run / "checkpoints")
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    with extras.tensorboard().SummaryWriter(str(folder)) as events:

        def write(epoch: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                if math.isfinite(value):
                    events.add_scalar(name, value, epoch)
            events.flush()  # a run can be watched, and an interruption loses nothing

        yield write
