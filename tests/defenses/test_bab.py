"""BAB: with one network and one objection it flags what NBAB without alignment suspects."""

from types import SimpleNamespace

import numpy as np

from bdjax.defenses import bab
from bdjax.defenses.bab import BabSettings, count_objections
from bdjax.defenses.nbab import PlantingSettings, verify

SMALL = {"epochs": 3, "optimiser": "adam", "learning_rate": 1e-2, "implant_rate": 0.2}


def test_one_network_objects_where_nbab_suspects(inputs):
    objections, margins = count_objections(inputs, BabSettings(networks=1, **SMALL))
    alone = verify(inputs, PlantingSettings(alpha=0.0, **SMALL))
    np.testing.assert_array_equal(objections == 1, alone.margins[:, 0] < 0)
    np.testing.assert_array_equal(margins, alone.margins[:, 0])


def test_votes_are_counted_over_different_networks(monkeypatch):
    margins = [np.array([[1.0, -1.0, -1.0], [1.0, 1.0, -2.0]]) * sign for sign in (1, 1, -1)]
    monkeypatch.setattr(
        bab, "verify", lambda inputs, settings, rungs: SimpleNamespace(margins=np.stack(margins, axis=1))
    )
    objections, margins = count_objections(None, BabSettings(networks=3))
    np.testing.assert_array_equal(objections, [[1, 2, 2], [1, 1, 2]])
    np.testing.assert_array_equal(margins, [[-1, -1, -1], [-1, -1, -2]])
