"""A student on logits, and on labels alone: what it is given, and what it then minimises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses import contract
from bdjax.defenses.distillation import distil
from bdjax.defenses.logit_distillation import LOGIT_DISTILLATION, distillation_method
from bdjax.evaluation.variants import read_defense
from bdjax.training.stages import Nets, StageRunner
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


def test_a_student_on_labels_alone_does_not_continue_one_with_a_teacher(tmp_path, monkeypatch):
    settings = read_defense("logit_distillation:alpha=0.0:student=lenet", "paper", None).settings
    alone, started = distillation_method(settings.temperature, 0.0), []

    def from_variables(self, name, model, config, variables, *rest, **more):
        started.append((name, bool(variables["teacher"])))
        return Nets(model, variables, 1, {})

    monkeypatch.setattr(StageRunner, "from_variables", from_variables)
    for method in (alone, alone._replace(uses_teacher=True)):
        distil(tiny_inputs(tmp_path), "KD", settings, method)
    (first, first_has_teacher), (second, second_has_teacher) = started
    assert (first_has_teacher, second_has_teacher) == (False, True) and first != second


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
