"""A student on logits, and on labels alone: what it is given, and what it then minimises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses import contract
from bdjax.defenses.logit_distillation import LOGIT_DISTILLATION, distillation_method
from bdjax.evaluation.variants import read_defense
from bdjax.types import ModelOutput
from tests.defenses.tiny import tiny_inputs


def output(seed: int) -> ModelOutput:
    return ModelOutput(jax.random.normal(jax.random.key(seed), (4, 3)), {}, {})


def test_with_labels_alone_it_needs_no_teacher():
    for text, needs in (("", ("attacked model", "clean rows")), (":alpha=0.0", ("clean rows",))):
        variant = read_defense(f"logit_distillation{text}", "quick", None)
        assert variant.defense.needs_with(variant.settings) == needs


def test_the_loss_of_labels_alone_is_that_of_an_alpha_of_0():
    student, teacher, labels = output(0), output(1), jnp.array([0, 1, 2, 0])
    alone, mixed = distillation_method(4.0, 0.0), distillation_method(4.0, 0.5)
    assert mixed.uses_teacher and not alone.uses_teacher
    expected = losses.distillation(student.logits, teacher.logits, labels, temperature=4.0, alpha=0.0)
    np.testing.assert_allclose(alone.loss({}, student, None, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_only_a_student_on_labels_alone_can_be_trained_without_a_teacher(alpha, tmp_path):
    settings = read_defense(f"logit_distillation:alpha={alpha}:epochs=1:student=lenet", "paper", None).settings
    inputs = tiny_inputs(tmp_path)
    rest = {need: value for need, value in inputs.knowledge.items() if need != "attacked model"}
    inputs = dataclasses.replace(inputs, knowledge=rest)
    if alpha:
        with pytest.raises(ValueError, match="needs the attacked model"):
            contract.run(LOGIT_DISTILLATION, inputs, settings)
    else:
        student = contract.run(LOGIT_DISTILLATION, inputs, settings)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(student.variables))
