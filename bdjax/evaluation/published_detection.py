"""What the VBD paper prints of four detectors of poisoned rows: F1 in percent, under the names that the registries have.

Tables 1 to 5 of Aseervatham et al. 2025, Variance-Based Defense Against Blended Backdoor Attacks, for CIFAR-10 and Tiny
ImageNet: 6 triggers at 4 opacities all-to-one, 4 triggers at 4 opacities all-to-all. At full opacity (the paper's "BadNets")
there is a number for each trigger; at the others only their mean.

To be read with: 10 % of the rows are poisoned, all-to-one those of the target class too. Five runs, seeds and, all-to-one,
target classes 0 to 4. A number is their mean, and its spread their standard deviation; that of an average is the one of the
five runs' averages. A run that came to no answer counts as F1 0, as one that flags nothing does. ABL flags a share of the rows
that is the poisoning rate, which it is told, so that its precision and recall are the same number. AGPD and SCAn are given 10
clean rows per class, taken from the test set. VBD's three networks are far smaller than the others' PreActResNet-18.

Means over both datasets are left out of here, other than table 5's.
"""

from typing import NamedTuple

ALL_TO_ONE, ALL_TO_ALL = "all-to-one", "all-to-all"
"""As names of label rules begin."""
FULL, BLENDED = (1.0,), (0.1, 0.2, 0.5)
"""Opacities of tables 1 and 2, and of tables 3 and 4."""
POISON_RATE = 0.1


class PublishedF1(NamedTuple):
    """One cell of a table of the paper."""

    paper: str  # "VBD Table 1"
    dataset: str | None  # as bdjax names it; None for the average over both
    rule: str | None  # ALL_TO_ONE or ALL_TO_ALL; None for all settings
    attack: str | None  # as bdjax names it; None for the average over the triggers
    opacity: float | None  # None for the average over those of the table; for all settings of table 5
    defense: str  # as bdjax names it
    f1: float  # in percent
    standard_deviation: float  # over five seeds, in percent


_DEFENSES = ("vbd", "abl", "agpd", "scan")

# dataset -> trigger -> for each defense, (mean, standard deviation).
_TABLE_1 = {
    "cifar10": {
        "big_kitty": ((99.87, 0.20), (55.39, 23.40), (79.35, 44.37), (100.00, 0.00)),
        "small_kitty": ((99.90, 0.14), (82.12, 10.54), (99.62, 0.28), (100.00, 0.00)),
        "color_grid": ((99.58, 0.15), (90.21, 3.01), (91.36, 12.88), (100.00, 0.00)),
        "green_square": ((99.34, 0.25), (84.04, 12.19), (90.93, 11.69), (99.99, 0.01)),
        "white_grid": ((99.65, 0.09), (89.66, 2.50), (94.60, 2.64), (100.00, 0.00)),
        "white_square": ((97.46, 0.31), (84.30, 2.13), (93.66, 2.96), (97.86, 0.12)),
        None: ((99.30, 0.10), (80.95, 4.01), (91.59, 11.65), (99.64, 0.02)),
    },
    "tiny_imagenet": {
        "big_kitty": ((99.98, 0.02), (81.69, 8.87), (0.00, 0.00), (94.41, 12.51)),
        "small_kitty": ((99.98, 0.02), (94.58, 7.34), (88.90, 24.04), (100.00, 0.00)),
        "color_grid": ((99.86, 0.12), (96.40, 2.82), (98.69, 0.19), (99.95, 0.04)),
        "green_square": ((99.72, 0.39), (96.77, 1.67), (98.21, 0.66), (95.34, 10.35)),
        "white_grid": ((98.70, 2.64), (95.93, 0.84), (98.34, 0.73), (97.39, 5.63)),
        "white_square": ((95.89, 2.35), (88.66, 6.24), (59.19, 54.03), (97.50, 1.26)),
        None: ((99.02, 0.68), (92.34, 2.61), (73.89, 8.12), (97.43, 3.16)),
    },
}

_TABLE_2 = {
    "cifar10": {
        "color_grid_all_to_all": ((94.37, 1.03), (56.76, 12.58), (68.28, 14.05), (0.00, 0.00)),
        "green_square_all_to_all": ((91.00, 2.00), (55.36, 12.30), (86.66, 15.02), (0.00, 0.00)),
        "white_grid_all_to_all": ((95.64, 3.54), (58.06, 7.48), (93.07, 9.05), (0.00, 0.00)),
        "white_square_all_to_all": ((93.51, 0.82), (53.14, 12.94), (91.73, 8.45), (0.00, 0.00)),
        None: ((93.63, 0.66), (55.83, 7.63), (84.94, 7.88), (0.00, 0.00)),
    },
    "tiny_imagenet": {
        "color_grid_all_to_all": ((83.91, 2.75), (50.57, 3.50), (33.30, 0.63), (0.00, 0.00)),
        "green_square_all_to_all": ((85.00, 1.24), (38.47, 8.08), (34.14, 1.30), (0.00, 0.00)),
        "white_grid_all_to_all": ((52.27, 2.68), (43.45, 6.51), (34.34, 0.97), (0.00, 0.00)),
        "white_square_all_to_all": ((44.82, 2.46), (41.36, 8.17), (33.84, 0.67), (0.00, 0.00)),
        None: ((66.50, 1.91), (43.46, 2.41), (33.90, 0.54), (0.00, 0.00)),
    },
}

# dataset -> opacity, None for the average over the three -> for each defense, (mean, standard deviation).
_TABLE_3 = {
    "cifar10": {
        0.1: ((93.34, 1.08), (68.60, 4.12), (90.38, 7.27), (92.80, 6.14)),
        0.2: ((96.85, 0.75), (76.58, 1.18), (90.22, 8.70), (96.19, 1.10)),
        0.5: ((98.68, 0.54), (84.40, 1.90), (90.68, 9.68), (99.14, 0.10)),
        None: ((96.29, 0.72), (76.53, 1.99), (90.43, 5.73), (96.05, 2.01)),
    },
    "tiny_imagenet": {
        0.1: ((83.12, 6.42), (78.03, 3.02), (65.02, 9.46), (75.80, 3.19)),
        0.2: ((93.62, 5.91), (87.03, 2.73), (72.76, 19.37), (84.58, 2.84)),
        0.5: ((98.05, 0.99), (92.01, 1.67), (79.50, 13.01), (92.31, 3.99)),
        None: ((91.60, 3.80), (85.69, 1.33), (72.43, 11.90), (84.23, 2.28)),
    },
}

_TABLE_4 = {
    "cifar10": {
        0.1: ((56.16, 3.38), (14.08, 6.64), (70.70, 16.82), (0.00, 0.00)),
        0.2: ((72.08, 1.54), (43.97, 5.78), (75.29, 12.39), (0.00, 0.00)),
        0.5: ((91.68, 1.27), (53.31, 6.28), (84.47, 4.86), (1.40, 3.13)),
        None: ((73.31, 0.80), (37.12, 5.43), (76.82, 5.14), (0.47, 1.04)),
    },
    "tiny_imagenet": {
        0.1: ((0.00, 0.00), (2.84, 0.12), (20.81, 8.53), (0.00, 0.00)),
        0.2: ((9.15, 4.93), (8.80, 3.78), (29.04, 7.64), (0.00, 0.00)),
        0.5: ((42.55, 1.09), (37.17, 3.07), (35.05, 0.18), (0.00, 0.00)),
        None: ((17.23, 1.69), (16.27, 1.94), (28.30, 5.07), (0.00, 0.00)),
    },
}

_TABLE_5 = {
    "cifar10": ((89.58, 0.54), (63.30, 3.02), (85.97, 3.60), (58.31, 0.60)),
    "tiny_imagenet": ((67.89, 1.64), (61.64, 0.94), (55.56, 6.94), (52.52, 1.36)),
    None: ((78.74, 0.77), (62.47, 1.28), (70.76, 4.75), (55.41, 0.96)),
}


def _cells(number: int, dataset: str | None, rule: str | None, attack: str | None, opacity: float | None, cells: tuple):
    return [
        PublishedF1(f"VBD Table {number}", dataset, rule, attack, opacity, defense, *cell)
        for defense, cell in zip(_DEFENSES, cells, strict=True)
    ]


PUBLISHED_F1: tuple[PublishedF1, ...] = tuple(
    one
    for some in (
        *(
            _cells(number, dataset, rule, attack, 1.0, cells)
            for number, rule, table in ((1, ALL_TO_ONE, _TABLE_1), (2, ALL_TO_ALL, _TABLE_2))
            for dataset, rows in table.items()
            for attack, cells in rows.items()
        ),
        *(
            _cells(number, dataset, rule, None, opacity, cells)
            for number, rule, table in ((3, ALL_TO_ONE, _TABLE_3), (4, ALL_TO_ALL, _TABLE_4))
            for dataset, rows in table.items()
            for opacity, cells in rows.items()
        ),
        *(_cells(5, dataset, None, None, None, cells) for dataset, cells in _TABLE_5.items()),
    )
    for one in some
)
"""Every row of the five tables, those that average both datasets left out of tables 1 to 4."""

TRIGGERS = {ALL_TO_ONE: tuple(filter(None, _TABLE_1["cifar10"])), ALL_TO_ALL: tuple(filter(None, _TABLE_2["cifar10"]))}
"""The paper's triggers by label rule, as bdjax names the attacks."""
DATASETS = tuple(filter(None, _TABLE_5))


def find_f1(
    dataset: str, rule: str | None, attack: str | None, opacity: float | None, defense: str
) -> PublishedF1 | None:
    """The paper's cell with these entries, where None stands for an average; None if it prints none."""
    wanted = (dataset, rule, attack, opacity, defense)
    return next((one for one in PUBLISHED_F1 if one[1:6] == wanted), None)
