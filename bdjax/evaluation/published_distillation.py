"""What RobustKD's paper prints of its students (Chen et al. 2024, tables 3 to 7), in percent, under the registries' names.

Every cell, also where they contradict each other: table 3 and the FKD columns of tables 4 and 5 print the same experiments
with other numbers. The teachers of tables 3 to 6 have one accuracy (and in 4 and 6 one success) for all attacks, and the
paper does not say of which one it is. Its success counts all test images, those of the target class as well.
"""

from typing import NamedTuple


class PublishedStudent(NamedTuple):
    """One cell of a table: a student, and the teacher that it was distilled from."""

    paper: str  # whose table: "RobustKD Table 4"
    dataset: str  # as bdjax names it
    teacher: str  # a network, likewise
    student: str  # likewise
    attack: str  # likewise
    method: str  # the defense's name, likewise
    clean_accuracy: float | None  # None where the table does not print it
    success: float | None  # likewise
    teacher_accuracy: float | None  # as printed beside it, of whatever attack
    teacher_success: float | None  # likewise


_PAIRS = {
    "28-4/16-2": ("wrn_28_4", "wrn_16_2"),
    "28-4/56": ("wrn_28_4", "resnet56"),
    "28-4/16-4": ("wrn_28_4", "wrn_16_4"),
    "28-4/28-2": ("wrn_28_4", "wrn_28_2"),
    "200/28-4": ("pyramidnet_200_240", "wrn_28_4"),
    "200/110": ("pyramidnet_200_240", "pyramidnet_110_84"),
}

# pair -> teacher's accuracy; then accuracy and success of FKD's student under CKD, LBA and HTBA.
_TABLE_3 = {
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
_TABLE_4_SUCCESS = {
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
_TABLE_5_ACCURACY = {
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
_TABLE_6 = {
    "28-4/16-4": ((78.82, 92.04), (79.44, 96.13), (80.17, 74.58), (78.36, 13.32), (78.95, 1.61)),
    "28-4/28-2": ((78.68, 99.83), (78.28, 94.05), (77.64, 80.13), (76.02, 10.94), (76.17, 3.56)),
}
# CIFAR-100, RobustKD under the adaptive attack: pair -> teacher, student.
_TABLE_7 = {
    "28-4/16-4": ((75.47, 90.56), (77.12, 16.14)),
    "28-4/28-2": ((75.47, 90.56), (76.85, 19.43)),
    "28-4/16-2": ((75.47, 90.56), (75.98, 14.42)),
    "28-4/56": ((75.47, 90.56), (77.17, 12.86)),
}
_FOUR = (("fkd", "ckd"), ("fkd", "latent_backdoor"), ("robust_kd", "ckd"), ("robust_kd", "latent_backdoor"))


def _rows() -> list[PublishedStudent]:
    rows = []
    for dataset, pairs in _TABLE_3.items():
        for pair, (teacher, *students) in pairs.items():
            for attack, numbers in zip(("ckd", "latent_backdoor", "hidden_trigger"), students, strict=True):
                rows.append(
                    PublishedStudent("RobustKD Table 3", dataset, *_PAIRS[pair], attack, "fkd", *numbers, teacher, None)
                )
    for dataset, pairs in _TABLE_4_SUCCESS.items():
        for pair, (teacher_success, *successes) in pairs.items():
            teacher_accuracy, *accuracies = _TABLE_5_ACCURACY[dataset][pair]
            for (method, attack), *numbers in zip(_FOUR, accuracies, successes, strict=True):
                told = *numbers, teacher_accuracy, teacher_success
                rows.append(PublishedStudent("RobustKD Tables 4, 5", dataset, *_PAIRS[pair], attack, method, *told))
    for pair, (teacher, *students) in _TABLE_6.items():
        for (method, attack), numbers in zip(_FOUR, students, strict=True):
            told = *numbers, *teacher
            rows.append(PublishedStudent("RobustKD Table 6", "cifar100", *_PAIRS[pair], attack, method, *told))
    for pair, (teacher, numbers) in _TABLE_7.items():
        told = *numbers, *teacher
        rows.append(
            PublishedStudent("RobustKD Table 7", "cifar100", *_PAIRS[pair], "ckd_low_variance", "robust_kd", *told)
        )
    return rows


PUBLISHED_STUDENTS: tuple[PublishedStudent, ...] = tuple(_rows())
"""Every student of the five tables."""
