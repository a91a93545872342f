"""Published numbers of defenses, detectors and students, under the registries' names.

Every row is one cell of a table, in percent. Printed averages are kept only where a paper's text relies on them (VBD); the
others are recomputed, since several of them do not follow from the rows above them.

- LfD and ABM: networks after a defense. LfD's GTSRB average of the attack success repeats ABL's; ABM's averages leave out
  failed defenses, so that columns average different attacks. ABM prints "Fail" for a defense that "is very unstable" or
  leaves more than 80 % success: None here.
- VBD (Aseervatham et al. 2025, tables 1 to 5): how well four detectors flag poisoned rows, as F1, for 6 triggers at 4 opacities
  all-to-one and 4 triggers at 4 opacities all-to-all. At full opacity (the paper's "BadNets") there is a number for each
  trigger; at the others only their mean. 10 % of the rows are poisoned, all-to-one including those of the target class. Five
  runs differ in the seed and, all-to-one, in the target class, 0 to 4. A number is the mean of the five and its standard
  deviation; that of an average is the standard deviation of the five runs' averages. A run without a result counts as F1 0, as
  a run that flags nothing does. ABL is given the poisoning rate and flags that share of the rows, so that its precision equals
  its recall. AGPD and SCAn are given 10 clean rows per class, taken from the test set, AGPD 10 that its network classifies
  correctly. VBD's three networks are far smaller than the other detectors' PreActResNet-18. Means over both datasets are left
  out, other than table 5's.
- RobustKD (Chen et al. 2024, tables 3 to 7): students, and the teachers that they were distilled from. Every cell is kept, even
  where cells contradict each other: table 3 and the FKD columns of tables 4 and 5 print different numbers for the same
  experiments. The teachers of tables 3 to 6 have a single accuracy (and in tables 4 and 6 a single success) for all attacks,
  and the paper does not say for which attack. Its success counts all test images, including those of the target class. It is
  probably a maximum over epochs: the public code of RobustKD and CKD prints the highest success of any epoch whose accuracy is
  within 5 points of the teacher's (0 if none is), and no other summary. In CKD's public logs the last epoch is up to 15 points
  lower (ResNet-56: 66.85 and 81.46).
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

ALL_TO_ONE, ALL_TO_ALL = "all-to-one", "all-to-all"
"""Prefixes of the label rules' names."""
FULL, BLENDED = (1.0,), (0.1, 0.2, 0.5)
"""Opacities of VBD's tables 1 and 2, and of its tables 3 and 4."""
POISON_RATE = 0.1
"""In VBD's tables."""


class Published(NamedTuple):
    """One cell of a paper's table, in percent. None if the table does not print the number, or prints "Fail"."""

    paper: str
    """paper and table: "LfD Table 1" """
    measured: Literal["network", "flags", "student"]
    """a network after a defense; flags on rows; a student distilled from a teacher"""
    dataset: str | None
    """as bdjax names it; None for the average over VBD's two"""
    attack: str | None
    """as bdjax names it; "none" for a clean training set, None for the average over VBD's triggers"""
    method: str
    """the defense, as bdjax names it"""
    clean_accuracy: float | None = None
    """clean accuracy of a network or a student"""
    success: float | None = None
    """attack success on it; None if there is no attack"""
    rule: str | None = None
    """flags: ALL_TO_ONE or ALL_TO_ALL; None for the average over all settings"""
    opacity: float | None = None
    """flags: opacity of the trigger; None for the average over the table's opacities, or over all settings"""
    f1: float | None = None
    """F1 of the flags"""
    standard_deviation: float | None = None
    """standard deviation of F1 over five seeds"""
    teacher: str | None = None
    """student: the teacher's network, as bdjax names it"""
    student: str | None = None
    """student: its own network, as bdjax names it"""
    teacher_accuracy: float | None = None
    """student: the teacher's accuracy as printed; the paper does not say under which attack"""
    teacher_success: float | None = None
    """student: the teacher's attack success as printed; the paper does not say under which attack"""


# dataset -> attack -> for each defense, (clean accuracy, attack success). LfD prints 0 % success on the clean set, where
# nothing is triggered: None here. Its SIG is the same attack as in the other papers, so it is listed under `sig`.
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

# With a wide ResNet-16. BadNets on CIFAR-10 without defense is as printed, though 1.24 evidently repeats ABM's number.
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

_DETECTORS = ("vbd", "abl", "agpd", "scan")

# dataset -> trigger -> for each of the detectors, (mean, standard deviation).
_VBD_1 = {
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

_VBD_2 = {
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

# dataset -> opacity, None for the average over the three -> for each of the detectors, (mean, standard deviation).
_VBD_3 = {
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

_VBD_4 = {
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

_VBD_5 = {
    "cifar10": ((89.58, 0.54), (63.30, 3.02), (85.97, 3.60), (58.31, 0.60)),
    "tiny_imagenet": ((67.89, 1.64), (61.64, 0.94), (55.56, 6.94), (52.52, 1.36)),
    None: ((78.74, 0.77), (62.47, 1.28), (70.76, 4.75), (55.41, 0.96)),
}

_PAIRS = {
    "28-4/16-2": ("wrn_28_4", "wrn_16_2"),
    "28-4/56": ("wrn_28_4", "resnet56"),
    "28-4/16-4": ("wrn_28_4", "wrn_16_4"),
    "28-4/28-2": ("wrn_28_4", "wrn_28_2"),
    "200/28-4": ("pyramidnet_200_240", "wrn_28_4"),
    "200/110": ("pyramidnet_200_240", "pyramidnet_110_84"),
}

# pair -> teacher's accuracy; then accuracy and success of FKD's student under CKD, LBA and HTBA.
_ROBUST_KD_3 = {
    "cifar100": {
        "28-4/16-2": (80.72, (79.43, 96.14), (80.15, 74.52), (78.52, 22.36)),
        "28-4/56": (80.72, (76.65, 95.36), (79.24, 74.36), (75.86, 20.57)),
        "200/28-4": (83.45, (81.49, 96.34), (81.24, 75.29), (80.62, 21.54)),
        "200/110": (83.45, (80.62, 93.52), (80.63, 76.81), (80.51, 23.87)),
    },
    "gtsrb": {
        "28-4/16-2": (98.57, (97.23, 93.08), (97.05, 75.21), (96.57, 20.55)),
        "28-4/56": (98.57, (97.56, 93.54), (98.13, 75.67), (96.48, 23.62)),
        "200/28-4": (99.27, (97.86, 95.13), (98.14, 71.52), (97.96, 19.25)),
        "200/110": (99.27, (98.21, 96.31), (98.4, 77.85), (95.69, 21.36)),
    },
    "flowers17": {
        "200/28-4": (96.25, (91.34, 76.24), (90.98, 71.34), (92.57, 16.57)),
        "200/110": (96.25, (95.12, 82.45), (92.54, 80.26), (93.04, 15.89)),
    },
    "imagenet": {
        "200/28-4": (84.36, (82.41, 54.87), (81.14, 49.63), (82.75, 6.27)),
        "200/110": (84.36, (83.25, 55.42), (82.51, 50.31), (81.95, 7.34)),
    },
}

# pair -> teacher's number; then FKD's students under CKD and LBA, and RobustKD's.
_ROBUST_KD_4_SUCCESS = {
    "cifar100": {
        "28-4/16-2": (96.14, 90.17, 80.46, 4.32, 2.67),
        "28-4/56": (96.14, 93.58, 72.84, 3.31, 0.72),
        "200/28-4": (95.52, 95.68, 76.42, 10.54, 5.69),
        "200/110": (95.52, 92.38, 77.83, 8.46, 7.15),
    },
    "gtsrb": {
        "28-4/16-2": (85.32, 92.63, 74.12, 6.45, 8.14),
        "28-4/56": (85.32, 93.54, 75.49, 4.01, 3.87),
        "200/28-4": (85.64, 94.87, 70.58, 6.73, 5.69),
        "200/110": (85.64, 95.52, 78.46, 8.32, 2.51),
    },
    "flowers17": {
        "200/28-4": (98.67, 75.81, 70.42, 6.42, 4.13),
        "200/110": (98.67, 82.36, 80.17, 8.12, 2.56),
    },
    "imagenet": {
        "200/28-4": (84.76, 53.34, 49.04, 6.93, 7.24),
        "200/110": (84.76, 55.36, 50.14, 8.41, 5.64),
    },
}
_ROBUST_KD_5_ACCURACY = {
    "cifar100": {
        "28-4/16-2": (80.72, 78.23, 78.62, 74.57, 76.25),
        "28-4/56": (80.72, 78.31, 79.64, 74.26, 75.96),
        "200/28-4": (83.45, 83.47, 84.51, 81.42, 81.02),
        "200/110": (83.45, 83.42, 82.46, 81.63, 80.45),
    },
    "gtsrb": {
        "28-4/16-2": (98.57, 100.0, 99.56, 98.74, 97.51),
        "28-4/56": (98.57, 100.0, 100.0, 97.82, 98.06),
        "200/28-4": (99.27, 100.0, 98.54, 97.51, 97.8),
        "200/110": (99.27, 100.0, 100.0, 98.04, 98.42),
    },
    "flowers17": {
        "200/28-4": (96.25, 90.45, 90.91, 86.74, 87.43),
        "200/110": (96.25, 95.47, 93.45, 89.42, 90.15),
    },
    "imagenet": {
        "200/28-4": (84.36, 84.26, 83.47, 81.64, 82.59),
        "200/110": (84.36, 84.15, 83.16, 82.15, 82.24),
    },
}

# CIFAR-100: pair -> teacher; then accuracy and success of FKD's students under CKD and LBA, and RobustKD's.
_ROBUST_KD_6 = {
    "28-4/16-4": ((78.82, 92.04), (79.44, 96.13), (80.17, 74.58), (78.36, 13.32), (78.95, 1.61)),
    "28-4/28-2": ((78.68, 99.83), (78.28, 94.05), (77.64, 80.13), (76.02, 10.94), (76.17, 3.56)),
}
# CIFAR-100, RobustKD under the adaptive attack: pair -> teacher, student.
_ROBUST_KD_7 = {
    "28-4/16-4": ((75.47, 90.56), (77.12, 16.14)),
    "28-4/28-2": ((75.47, 90.56), (76.85, 19.43)),
    "28-4/16-2": ((75.47, 90.56), (75.98, 14.42)),
    "28-4/56": ((75.47, 90.56), (77.17, 12.86)),
}
_FOUR = (("fkd", "ckd"), ("fkd", "latent_backdoor"), ("robust_kd", "ckd"), ("robust_kd", "latent_backdoor"))


def _networks(paper: str, table: dict, methods: tuple[str, ...]) -> Iterator[Published]:
    for dataset, attacks in table.items():
        for attack, cells in attacks.items():
            for method, numbers in zip(methods, cells, strict=True):
                yield Published(paper, "network", dataset, attack, method, *numbers)


def _flags() -> Iterator[Published]:
    cells: list[tuple] = []  # table, dataset, rule, attack, opacity, numbers
    for number, rule, table in ((1, ALL_TO_ONE, _VBD_1), (2, ALL_TO_ALL, _VBD_2)):
        cells += [
            (number, dataset, rule, attack, 1.0, numbers)
            for dataset, rows in table.items()
            for attack, numbers in rows.items()
        ]
    for number, rule, table in ((3, ALL_TO_ONE, _VBD_3), (4, ALL_TO_ALL, _VBD_4)):
        cells += [
            (number, dataset, rule, None, opacity, numbers)
            for dataset, rows in table.items()
            for opacity, numbers in rows.items()
        ]
    cells += [(5, dataset, None, None, None, numbers) for dataset, numbers in _VBD_5.items()]
    for number, dataset, rule, attack, opacity, of_methods in cells:
        for method, (f1, deviation) in zip(_DETECTORS, of_methods, strict=True):
            where = Published(f"VBD Table {number}", "flags", dataset, attack, method)
            yield where._replace(rule=rule, opacity=opacity, f1=f1, standard_deviation=deviation)


def _students() -> Iterator[Published]:
    def make(
        table: str, dataset: str, pair: str, attack: str, method: str, numbers: tuple, of_teacher: tuple
    ) -> Published:
        teacher, student = _PAIRS[pair]
        names = {"teacher": teacher, "student": student}
        names |= dict(zip(("teacher_accuracy", "teacher_success"), of_teacher, strict=True))
        return Published(f"RobustKD {table}", "student", dataset, attack, method, *numbers, **names)

    for dataset, pairs in _ROBUST_KD_3.items():
        for pair, (accuracy, *students) in pairs.items():
            for attack, numbers in zip(("ckd", "latent_backdoor", "hidden_trigger"), students, strict=True):
                yield make("Table 3", dataset, pair, attack, "fkd", numbers, (accuracy, None))
    for dataset, pairs in _ROBUST_KD_4_SUCCESS.items():
        for pair, (success, *successes) in pairs.items():
            accuracy, *accuracies = _ROBUST_KD_5_ACCURACY[dataset][pair]
            for (method, attack), *numbers in zip(_FOUR, accuracies, successes, strict=True):
                yield make("Tables 4, 5", dataset, pair, attack, method, numbers, (accuracy, success))
    for pair, (of_teacher, *students) in _ROBUST_KD_6.items():
        for (method, attack), numbers in zip(_FOUR, students, strict=True):
            yield make("Table 6", "cifar100", pair, attack, method, numbers, of_teacher)
    for pair, (of_teacher, numbers) in _ROBUST_KD_7.items():
        yield make("Table 7", "cifar100", pair, "ckd_low_variance", "robust_kd", numbers, of_teacher)


PUBLISHED: tuple[Published, ...] = (
    *_networks("LfD Table 1", _LFD, ("none", "fine_pruning", "activation_clustering", "abl", "lfd")),
    *_networks("ABM Table III", _ABM, ("none", "nad", "abl", "bab", "abm")),
    *_networks("ABM Table XI", _ABM_CBD, ("none", "cbd", "abm")),
    *_flags(),
    *_students(),
)
"""All rows: LfD's and ABM's tables for CIFAR-10 and GTSRB, VBD's five tables and RobustKD's five."""

TRIGGERS = {ALL_TO_ONE: tuple(filter(None, _VBD_1["cifar10"])), ALL_TO_ALL: tuple(filter(None, _VBD_2["cifar10"]))}
"""VBD's triggers by label rule, as bdjax names the attacks."""
DETECTION_DATASETS = tuple(filter(None, _VBD_5))
"""The datasets of VBD's tables."""


def find_published(**wanted: Any) -> tuple[Published, ...]:
    """The rows with exactly these values, in the papers' order.

    Args:
        wanted: fields of `Published` and their values; None stands for an average, or for a field that the row lacks.
    """
    return tuple(row for row in PUBLISHED if all(getattr(row, name) == value for name, value in wanted.items()))
