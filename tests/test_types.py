import numpy as np
import pytest

from bdjax.types import Dataset, class_title


@pytest.mark.parametrize(
    ("number", "name", "title"),
    [
        (3, "cat", "3 (cat)"),
        (3, "3", "3"),
        (3, "", "3"),
        (0, "1", "0 (1)"),
        (3, "a\nb\tc", "3 (a b c)"),
        (3, "\x1b[31mred\u202e", "3 (\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER})"),
    ],
)
def test_a_class_has_its_name_beside_its_number(number, name, title):
    assert class_title(number, name) == title


def test_a_dataset_names_its_classes():
    images, labels = np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1], np.int32)
    named, plain = (Dataset(images, labels, 2, "", "", names) for names in (("cat", "dog"), ()))
    assert named.class_title(np.int32(1)) == "1 (dog)" and named.class_range == "0 (cat) to 1 (dog)"
    assert plain.class_title(1) == "1" and plain.class_range == "0 to 1"
