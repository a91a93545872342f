"""Extracted triggers in a report on detectors: a table of all of them, and pictures of some beside the true triggers."""

from collections.abc import Sequence

import numpy as np

from bdjax.defenses.vbd_patterns import SURE
from bdjax.evaluation.patterns import FoundPattern
from bdjax.reporting import detector_plots, plots
from bdjax.reporting.report import Figure
from bdjax.reporting.tables import Table
from bdjax.run.folder import RunFolder

MOST_TRIGGERS, TRIGGERS_OF_ONE = 24, 6
"""Most found triggers that are shown, and number of them in one figure."""


def patterns_table(found: Sequence[FoundPattern]) -> Table | None:
    """All extracted patterns, with the evidence for each; None if there are none."""
    if not found:
        return None
    rows = [
        (
            pattern.attack,
            pattern.seed,
            pattern.class_title or str(pattern.label),
            {True: "yes", False: "no", None: None}[pattern.is_true_class],
            pattern.network or None,
            int(pattern.mask.sum()),
            pattern.overlap if pattern.is_true_class else None,
            pattern.success,
            pattern.flagged,
            pattern.sure,
        )
        for pattern in found
    ]
    header = (
        "training set",
        "seed",
        "class",
        "poisoned",
        "network",
        "pixels",
        "IoU of masks",
        "success",
        "flagged",
        "sure",
    )
    notes = (
        "Poisoned: whether the attack sends rows to this class; a pattern of another class is a false alarm. Pixels: in the "
        "pattern's mask. Success: share of rows of other classes that the pattern sends to this class. Flagged: rows of the "
        f"class. Sure: of its rows with a score of at least 0.5, the share with at least {SURE:g}; unknown in runs that "
        "did not record it."
    )
    return Table("Patterns that were kept", header, tuple(rows), notes, decimals=2)


def choose_patterns(found: Sequence[FoundPattern], most: int = MOST_TRIGGERS) -> list[FoundPattern]:
    """A sample of the found triggers, in their order, from as many attacks as possible: one of each before a second."""
    attacks = [pattern.attack for pattern in found]
    ranks = [attacks[:number].count(attack) for number, attack in enumerate(attacks)]
    chosen = np.argsort(ranks, kind="stable")[:most]
    return [found[i] for i in sorted(chosen)]


def trigger_figures(folder: RunFolder, found: Sequence[FoundPattern]) -> list[Figure]:
    """The found triggers beside the true triggers, and on flagged rows."""
    shown, figures = choose_patterns(found), []
    for start in range(0, len(shown), TRIGGERS_OF_ONE):
        group = shown[start : start + TRIGGERS_OF_ONE]
        figure = detector_plots.trigger_grid(group)
        path = plots.save(figure, folder.file(f"triggers-{start // TRIGGERS_OF_ONE + 1}.png"))
        caption = f"Triggers {start + 1} to {start + len(group)} of {len(shown)}."
        if not start:
            caption += (
                " Grey is transparent. A found trigger's colours come from rows with the true trigger, so a faint trigger is "
                "mixed with the image below it. Red outlines the found pixels."
            )
            caption += f" {len(found)} were found in all." if len(found) > len(shown) else ""
        figures.append(Figure(path, caption, "; ".join(map(detector_plots.pattern_caption, group))))
    return figures
