from types import SimpleNamespace

import numpy as np
import pytest

from bdjax.inspection import loss_gap
from bdjax.inspection.loss_gap import COUNTED_EPOCH, EPOCHS, gap_by_epoch, loss_gaps
from bdjax.models import count_parameters, make_model

ROWS, SHAPE = 40, (8, 8, 1)
INPUTS = SimpleNamespace(
    make_model=lambda name: make_model(name, 10, {"resnet10": 2, "resnet18": 4}[name]),
    runner=SimpleNamespace(image_shape=SHAPE),
)
"""The part of a `DefenseInput` that is read if nothing is trained."""


def history(inputs, name, epochs):
    """Losses of three training sets; no epoch uses the last row."""
    losses = np.random.default_rng(len(name)).gamma(1.0, size=(3, epochs, ROWS)).astype(np.float32)
    losses[:, :, -1] = np.nan
    return losses


def test_every_network_and_every_seed_of_an_attack_is_measured(monkeypatch):
    poisoned = np.arange(ROWS) < 8
    truth = [poisoned, np.zeros(ROWS, bool), ~poisoned, None]
    attacks = ["BadNets", "no attack", "BadNets", "user data"]
    monkeypatch.setattr(loss_gap, "loss_history", lambda *of: np.concatenate([history(*of), history(*of)[:1]]))
    ((attack, gaps),) = loss_gaps(INPUTS, attacks, truth, ["resnet10", "resnet18"])
    assert attack == "BadNets" and [gap.network for gap in gaps] == ["resnet10", "resnet18"]
    for gap in gaps:
        assert gap.parameters == count_parameters(INPUTS.make_model(gap.network), SHAPE) and gap.num_poisoned == 8
        losses = history(INPUTS, gap.network, EPOCHS)[[0, 2], :, :-1]
        for seed, rows in enumerate((poisoned[:-1], ~poisoned[:-1])):
            np.testing.assert_allclose(gap.by_epoch["clean rows"][seed], losses[seed][:, ~rows].mean(1), rtol=1e-5)
            np.testing.assert_allclose(gap.by_epoch["poisoned rows"][seed], losses[seed][:, rows].mean(1), rtol=1e-5)
            counted = losses[seed, COUNTED_EPOCH - 1]
            assert gap.missed[seed] == np.sum(counted[rows] > counted[~rows].mean())
            lower = counted[rows][:, None] < counted[~rows]
            np.testing.assert_allclose(gap.aucs[seed], lower.mean(), atol=1e-6)


@pytest.mark.parametrize("truth", [None, np.zeros(ROWS, bool)])
def test_nothing_is_trained_if_no_row_is_known_to_be_poisoned(truth):
    assert loss_gaps(None, ["user data"] * 3, [truth] * 3, ["resnet10"]) == []


def test_rows_that_an_epoch_left_out_do_not_count():
    losses = [np.array([[1.0, 2.0, np.nan, 6.0], [np.nan, 3.0, 5.0, 7.0]])]
    gaps = gap_by_epoch(losses, [np.array([False, False, True, True])])
    np.testing.assert_allclose(gaps["clean rows"], [[1.5, 3.0]])
    np.testing.assert_allclose(gaps["poisoned rows"], [[6.0, 6.0]])
