"""Pages without the time that their figures take."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bdjax import atomic
from bdjax.reporting import plots

PNG = plots.to_png(plots.image_grid(np.zeros((1, 1, 8, 8, 1)), [], [], "a picture"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not rendered, which takes most of a page's time: each file has the same small PNG.

    test_plots.py, test_detector_plots.py and the tests of whole runs render every kind of figure.
    """

    def save(figure: Figure, path: Path) -> Path:
        assert isinstance(figure, Figure)
        return atomic.write_bytes(path, PNG)

    monkeypatch.setattr(plots, "save", save)
