import numpy as np
import pytest

from bdjax.defenses.teachers import ask, from_classifiers
from bdjax.errors import InputError
from bdjax.exchange.outputs import LABEL_SMOOTHING, LEAST_PROBABILITY, as_logits, convert

IMAGES = np.arange(5 * 2 * 2 * 3).reshape(5, 2, 2, 3).astype(np.uint8)
LOGITS = np.array([[1.0, -2.0, 0.5], [30.0, 0.0, -90.0]], np.float32)
LABELS = np.array([2, 0])


def softmax(logits):
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def test_probabilities_become_logits_up_to_a_constant_of_each_row():
    found = as_logits(softmax(LOGITS), "probabilities", 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0] - found[0, 0], LOGITS[0] - LOGITS[0, 0], rtol=1e-5)
    np.testing.assert_allclose(softmax(found)[0], softmax(LOGITS)[0], rtol=1e-5)
    np.testing.assert_allclose(found[1, 1:], np.log(LEAST_PROBABILITY), rtol=1e-5)  # clipped


@pytest.mark.parametrize(
    "form", [LABELS, LABELS[:, None], LABELS.astype(np.float32), np.eye(3)[LABELS], np.eye(3, dtype=int)[LABELS]]
)
def test_labels_become_logarithms_of_smoothed_one_hots(form):
    found = as_logits(form, "labels", 3)
    expected = np.full((2, 3), LABEL_SMOOTHING / 3)
    expected[[0, 1], LABELS] += 1 - LABEL_SMOOTHING
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-6)


def test_two_classes_in_one_column_are_labels():
    assert as_logits(np.array([[1], [0]]), "labels", 2).argmax(1).tolist() == [1, 0]


def test_logits_are_left_alone():
    assert as_logits(LOGITS, "logits", 3) is LOGITS
    assert convert(len, "logits", 3) is len


@pytest.mark.parametrize(
    ("output", "outputs", "message"),
    [
        (LOGITS, "probabilities", r"no probabilities: row 0 has -2 to 1 and sum -0.5; if .* use --outputs=logits"),
        (np.array([[0.5, 0.4, 0.0]]), "probabilities", "no probabilities: row 0 has 0 to 0.5 and sum 0.9"),
        (np.array([[np.nan, 0.4, 0.0]]), "probabilities", "probabilities that are not finite"),
        (np.ones((2, 4)) / 4, "probabilities", r"probabilities of shape \(2, 4\); should be \(2, 3\)"),
        (np.ones(3) / 3, "probabilities", r"probabilities of shape \(3,\); should be \(3, 3\)"),
        (np.array([0, 3]), "labels", "label 3 for row 1; labels are whole numbers from 0 to 2"),
        (np.array([-1, 0]), "labels", "label -1 for row 0"),
        (np.array([0.5, 0]), "labels", "label 0.5 for row 0"),
        (np.array([0, np.nan]), "labels", "label nan for row 1"),
        (LOGITS, "labels", r"labels of shape \(2, 3\); should be class numbers \(2,\) or one-hot vectors \(2, 3\)"),
        (LOGITS, "votes", "outputs 'votes' is not one of logits, probabilities, labels"),
    ],
)
def test_outputs_of_another_kind_are_one_line(output, outputs, message):
    with pytest.raises(InputError, match=message):
        as_logits(output, outputs, 3)


def test_a_converted_callable_is_a_teacher_of_its_name():
    def vote(images):
        return images[:, 0, 0, 0] > 0.1  # truth values are no labels

    with pytest.raises(InputError, match=r"^teacher 1 \(vote\): it returned bool values"):
        from_classifiers([convert(vote, "labels", 2)], 2)(IMAGES)

    def label(images):
        return (images[:, 0, 0, 0] > 0.1).astype(int)

    found = ask(convert(label, "labels", 2), IMAGES, 2, "it")
    assert found.argmax(1).tolist() == [0, 0, 0, 1, 1]


def test_converted_probabilities_give_no_warning():
    from_classifiers([convert(lambda images: softmax(images[:, 0, 0]), "probabilities", 3)], 3)(IMAGES)
