"""What the papers print of their defenses, in percent, under the names that the registries have.

Rows only. Several of the printed averages do not follow from the rows above them (LfD's GTSRB average of the attack
success repeats ABL's; ABM's averages leave out what failed, so that columns average different attacks), so means are our
own. "Fail" is in ABM's words a defense that "is very unstable" or leaves more than 80 % success: None here.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One cell of a paper's table."""

    paper: str  # whose table: "LfD Table 1"
    dataset: str  # as bdjax names it
    attack: str  # likewise; "none" for a clean training set
    defense: str  # likewise
    clean_accuracy: float | None  # None for "Fail"
    success: float | None  # None for "Fail", and where there is no attack to succeed


# attack -> for each defense, (clean accuracy, attack success). LfD prints 0 % success on the clean set, where nothing is
# triggered: None here. Its SIG is every paper's, so it stands under `sig`.
_LFD = {
    "cifar10": {
        "badnets_grid": ((91.51, 100), (85.22, 99.98), (91.17, 100), (91.49, 0.51), (92.62, 0.18)),
        "badnets_white": ((91.89, 99.95), (82.67, 98.71), (91.29, 92.57), (89.98, 3.26), (92.01, 0.45)),
        "blended": ((92.01, 99.98), (83.12, 85.62), (91.44, 99.85), (77.57, 44.18), (92.43, 3.38)),
        "trojan_square": ((92.95, 100), (83.9, 66.87), (94.24, 99.96), (92.09, 0.36), (92.17, 0.27)),
        "trojan_watermark": ((92.89, 100), (85.42, 61.02), (92.38, 99.32), (90.18, 0.04), (91.76, 0.02)),
        "input_aware_offline": ((92.7, 99.95), (90.49, 87.18), (83.32, 100), (90.71, 7.94), (91.14, 0.55)),
        "label_consistent": ((92.73, 94.92), (84.09, 54.95), (92.17, 0.56), (83.42, 0.7), (92.42, 0.64)),
        "sig": ((93.15, 92.16), (84.76, 76.32), (65.77, 87.37), (89.48, 6.12), (92.41, 0.4)),
        "l2_invisible": ((92.98, 99.96), (81.53, 80.57), (90.48, 97.91), (73.92, 10.71), (91.88, 0.11)),
        "none": ((92.64, None), (88.56, None), (92.45, None), (73.27, None), (91.68, None)),
    },
    "gtsrb": {
        "badnets_grid": ((96.13, 100), (88.53, 99.57), (96.41, 100), (86.44, 4.02), (95.22, 0.02)),
        "blended": ((95.42, 100), (85.9, 99.5), (96.28, 80.84), (82.09, 11.36), (92.31, 3.86)),
        "trojan_square": ((95.42, 99.95), (84.21, 93.54), (96.28, 99.91), (96.25, 16.06), (93.84, 25.7)),
        "input_aware_offline": ((96.35, 99.92), (88.38, 99.84), (95.96, 99.96), (96.67, 5.57), (88.39, 2.76)),
        "label_consistent": ((95.88, 43.85), (89.71, 59.26), (87.06, 83.45), (81.82, 26.29), (95.62, 0.02)),
        "sig": ((95.85, 67.87), (90.66, 78.07), (79.6, 95.79), (88.54, 4.63), (95.17, 4.45)),
        "none": ((96.9, None), (90.14, None), (90.46, None), (83.95, None), (93.53, None)),
    },
}

_ABM = {
    "cifar10": {
        "none": ((82.91, None), (78.22, None), (45.8, None), (77.22, None), (79.78, None)),
        "badnets": ((79.31, 97.98), (78.67, 0.3), (77.44, 3.01), (79.17, 1.88), (80.71, 0.82)),
        "blended": ((80.56, 99.9), (78.02, 4.5), (81.77, 0.73), (77.2, 0.12), (81.5, 0.13)),
        "composite": ((80.08, 80.78), (77.96, 7.06), (80.99, 43.52), (77.7, 2.08), (80.67, 0.76)),
        "sig": ((79.53, 99.96), (76.14, 0.01), (83.27, 2.88), (77.37, 0.01), (77.68, 2.78)),
        "refool": ((81.5, 99.33), (77.21, 0.07), (82.03, 4.27), (77.61, 0), (81.5, 0.53)),
        "bpp_offline": ((79.2, 99.92), (78.07, 4.73), (72.81, 5.29), (75.09, 1), (80.13, 2.26)),
        "narcissus": ((81.34, 100), (78.67, 3), (None, None), (80.4, 56.72), (81.14, 0.01)),
    },
    "gtsrb": {
        "none": ((92.88, None), (92.17, None), (77.59, None), (92.62, None), (92.59, None)),
        "badnets": ((92.8, 92.91), (93.68, 3.23), (83.2, 0.03), (92.24, 0.9), (93.12, 0.29)),
        "blended": ((91.11, 100), (89.74, 14.68), (81.83, 0.11), (89.31, 7.14), (91.21, 0)),
        "composite": ((93.41, 78.12), (91.08, 29.95), (86.98, 12.22), (91.8, 4.68), (93.57, 4.73)),
        "sig": ((92.64, 100), (87.72, 12.33), (82.65, 0.34), (90.92, 0), (92.64, 0.29)),
        "refool": ((93.94, 91.93), (89.76, 19.95), (80.79, 0.13), (91.82, 0), (93.94, 0)),
        "bpp_offline": ((80.47, 99.87), (89.52, 66.3), (70, 26.25), (72.81, 0.13), (80.13, 2.84)),
        "narcissus": ((93.86, 70.58), (83.04, 5.74), (None, None), (None, None), (93.86, 14.31)),
    },
}

# With a wide ResNet-16. BadNets on CIFAR-10 without defense is as printed, though 1.24 is evidently ABM's own number twice.
_ABM_CBD = {
    "cifar10": {
        "none": ((79.04, None), (77.01, None), (79.23, None)),
        "badnets": ((78.63, 1.24), (76.46, 4.38), (79.6, 1.24)),
        "blended": ((79.46, 99.78), (79.29, 2.64), (80.12, 0.2)),
        "composite": ((79.04, 65.54), (69.98, 18.18), (79.4, 2.98)),
        "sig": ((78.11, 99.93), (79.76, 0.21), (77.96, 0.88)),
        "refool": ((80.97, 99.44), (None, None), (80.83, 2.91)),
        "bpp_offline": ((79.08, 99.78), (79.2, 5.3), (80.35, 0.5)),
        "narcissus": ((80.87, 100), (None, None), (None, None)),
    },
    "gtsrb": {
        "none": ((94.84, None), (79.28, None), (94.44, None)),
        "badnets": ((93.09, 93.17), (77.71, 2.01), (93.65, 0.6)),
        "blended": ((92.29, 100), (66.67, 17.43), (92.27, 2.72)),
        "composite": ((94.33, 91.87), (None, None), (94.39, 3.07)),
        "sig": ((93.86, 97.3), (None, None), (93.86, 3.3)),
        "refool": ((92.3, 87.48), (None, None), (92.3, 0.27)),
        "bpp_offline": ((92.22, 100), (51.02, 2.01), (92.22, 33.73)),
        "narcissus": ((90.44, 74.52), (None, None), (90.47, 2.32)),
    },
}


def _rows(paper: str, table: dict, defenses: tuple[str, ...]) -> tuple[Published, ...]:
    return tuple(
        Published(paper, dataset, attack, defense, *numbers)
        for dataset, attacks in table.items()
        for attack, cells in attacks.items()
        for defense, numbers in zip(defenses, cells, strict=True)
    )


PUBLISHED: tuple[Published, ...] = (
    *_rows("LfD Table 1", _LFD, ("none", "fine_pruning", "activation_clustering", "abl", "lfd")),
    *_rows("ABM Table III", _ABM, ("none", "nad", "abl", "bab", "abm")),
    *_rows("ABM Table XI", _ABM_CBD, ("none", "cbd", "abm")),
)
"""Every row of the three tables for CIFAR-10 and GTSRB."""
