"""RobustKD: masks lower the variance of a suspect teacher's features, then FKD distils from those (Chen et al. 2024).

The paper observes that backdoored networks have features of larger variance than clean ones. Before distillation it learns,
for each group of blocks, a tensor p of the size of one image's features, which is added with a weight m to the group's output,
the same for every image (equation 7, section 4.2):

    F'_l = F_l + m p_l

Masks are cumulative: F'_1 goes on to the second group, whose output gets p_2, and so on. The teacher is frozen; the masks alone
minimise, on clean rows, the labels' cross-entropy and the variance of the last group's masked output (equations 8 to 10).
They start as the mean features. FKD then distils from the masked features.

What the paper leaves open:
- Over what the variance is taken. p is the same for all images, so at the last group the variance *across images* does not
  depend on it at all, and its gradient is zero; only the variance over one image's elements can be lowered. That is the
  default; the other choices are there for comparison.
- What m is. The text fixes it at 0.2, finds 0.1 best in its figure 4, and its algorithm 1 stops on the student's ASR, which no
  defender knows. Here the defender chooses among several values (thresholds): the one with the least variance among those that
  cost the masked teacher at most a point of accuracy on held-out clean rows. The paper's way is available as an oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses import distillation, fkd
from bdjax.defenses.contract import Defense, DefenseInput, Need, fingerprint
from bdjax.defenses.distillation import TeacherNetworks, check_student
from bdjax.defenses.mask_threshold import choose_by_oracle, choose_by_validation, repeat, split_rows
from bdjax.errors import InputError
from bdjax.models import group_shapes
from bdjax.settings import Amount, Count, InnerShare, LearningRate, NotEmpty, NotNegative, check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Form = Literal["added", "mixed", "elementwise"]
MaskLoss = Literal["both", "cross_entropy", "variance"]
Axes = Literal["elements", "all", "batch"]
Select = Literal["validation", "oracle"]


@dataclass(frozen=True)
class RobustKdSettings(fkd.FkdSettings):
    epochs: Count = 300
    """epochs of distillation"""
    batch_size: Count = 64
    """rows per step for masks and students, at most the number of clean rows"""
    select: Select = "validation"
    """how m is chosen: "validation" (least variance within the allowed loss of accuracy), or "oracle" (the paper's algorithm 1:
    the student with the largest accuracy minus ASR, which only the attacker can measure)"""
    thresholds: Annotated[tuple[NotNegative, ...], NotEmpty()] = (0.05, 0.1, 0.2, 0.4, 0.6)
    """values of m to choose from; a single value fixes m, as the paper's text does: (0.2,)"""
    validation_share: InnerShare = 0.1
    """share of the clean rows that is held out from training the masks, to choose m, in (0, 1)"""
    allowed_drop: NotNegative = 0.01
    """largest loss of the masked teacher's accuracy on the held-out rows, as a fraction"""
    form: Form = "added"
    """"added": F + m p (equation 7); "mixed": (1 - m) F + m p (equation 15); "elementwise": F + m relu(tanh(v)) p, v trained"""
    loss: MaskLoss = "both"
    """what the masks minimise: "both", "cross_entropy" or "variance" """
    variance_axes: Axes = "elements"
    """variance over the "elements" of each image, "all" elements of a batch, or the "batch" (no gradient for the last mask)"""
    variance_weight: NotNegative = 1.0
    """weight of the variance relative to the cross-entropy"""
    layers: Amount = 0
    """how many groups have a mask, counted from the last one; 0 for all"""
    mask_epochs: Count = 40
    """epochs of training the masks"""
    mask_learning_rate: LearningRate = 1e-3
    """learning rate of Adam for the masks (the paper does not name the optimiser)"""


Mask = dict[str, Array]
"""The mask of one group: "pattern" float32 [h, w, C], and "gate" of the same shape if the form is elementwise."""


def apply_mask(features: Array, mask: Mask, threshold: Array, form: Form) -> Array:
    """F', a group's masked output (equations 7 and 15).

    Args:
        features: float32 [N, h, w, C].
        mask: of the group.
        threshold: m, float32 [].
        form: see `RobustKdSettings`.

    Returns:
        float32 [N, h, w, C]; with m = 0, the features themselves.
    """
    weighted = threshold * mask["pattern"][None]
    if form == "added":
        return features + weighted
    if form == "mixed":
        return (1.0 - threshold) * features + weighted
    if form == "elementwise":
        return features + jax.nn.relu(jnp.tanh(mask["gate"]))[None] * weighted
    raise ValueError(f"form {form!r} is not one of {', '.join(Form.__args__)}")


@cache
def masked(teacher: Model, form: Form) -> Model:
    """A network with masks. Its variables are "network", "masks" and "threshold" (float32 []).

    Logits, taps and groups of its output all follow from the masked groups.

    Args:
        teacher: the architecture; it has groups.
        form: of the masks.
    """

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        edits = dict(edits or {})
        for name, mask in variables["masks"].items():
            after = edits.get(name, lambda features: features)
            put_on = partial(apply_mask, mask=mask, threshold=variables["threshold"], form=form)
            edits[name] = lambda features, put_on=put_on, after=after: after(put_on(features))
        output = teacher.apply(variables["network"], images, train=train, edits=edits)
        return output._replace(variables={**variables, "network": output.variables})

    def init(key: Key, image_shape: tuple[int, int, int]) -> PyTree:
        return {"network": teacher.init(key, image_shape), "masks": {}, "threshold": jnp.zeros((), jnp.float32)}

    return Model(init, apply, teacher.num_classes, f"{teacher.description}, masked ({form})")


def variance(features: Array, axes: Axes) -> Array:
    """The biased variance of features (equation 8).

    Args:
        features: float32 [N, h, w, C].
        axes: see `RobustKdSettings`.

    Returns:
        float32 [N]; the same value N times for a variance of the whole batch.
    """
    if axes == "elements":
        return losses.feature_variance(features)
    if axes == "all":
        return jnp.full(features.shape[0], jnp.var(features))
    if axes == "batch":
        return jnp.full(features.shape[0], jnp.mean(jnp.var(features, axis=0)))
    raise ValueError(f"variance axes {axes!r} is not one of {', '.join(Axes.__args__)}")


def last_output(output: ModelOutput) -> Array:
    """The output of the last group, float32 [N, h, w, C]."""
    return list(output.groups.values())[-1].output


@cache
def mask_objective(teacher: Model, form: Form, loss: MaskLoss, axes: Axes, weight: float) -> Objective:
    """What the masks minimise (equation 10), on a frozen network with running statistics.

    Args:
        teacher: the architecture.
        form: of the masks.
        loss: see `RobustKdSettings`.
        axes: of the variance.
        weight: of the variance.

    Returns:
        An objective whose `params` are the masks, and whose variables are the other ones of `masked`.
    """
    model = masked(teacher, form)

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        frozen = {"network": variables["network"], "threshold": variables["threshold"], "masks": params}
        output = model.apply(frozen, images, train=False)
        total = jnp.zeros(images.shape[0], jnp.float32)
        if loss != "variance":
            total += losses.cross_entropy(output.logits, targets["labels"])
        if loss != "cross_entropy":
            total += weight * variance(last_output(output), axes)
        return Outcome(total, output.logits, targets["labels"], variables)

    return objective


@cache
def group_outputs(teacher: Model) -> Callable[..., PyTree]:
    """For `StageRunner.mean`: each group's output."""
    return lambda variables, images, targets: {
        name: end.output for name, end in teacher.apply(variables, images, train=False).groups.items()
    }


@cache
def accuracy_and_variance(teacher: Model) -> Callable[..., PyTree]:
    """For `StageRunner.mean`: whether a row is predicted as its label, and the variance of its last group's output."""

    def evaluate(variables: PyTree, images: Array, targets: dict[str, Array]) -> dict[str, Array]:
        output = teacher.apply(variables, images, train=False)
        correct = (jnp.argmax(output.logits, axis=1) == targets["labels"]).astype(jnp.float32)
        return {"accuracy": correct, "variance": variance(last_output(output), "elements")}

    return evaluate


def masked_groups(teacher: Model, layers: int, image_shape: tuple[int, int, int]) -> list[str]:
    """The names of the groups that have a mask: the last ones, or all.

    Args:
        teacher: the network.
        layers: how many; 0 for all.
        image_shape: (H, W, C).

    Raises:
        InputError: the network has no groups, or fewer than `layers`.
    """
    names = list(group_shapes(teacher, image_shape))
    if not names:
        raise InputError(f"{teacher.description} has no groups to mask; use a WRN, a ResNet or a PyramidNet")
    if layers > len(names):
        raise InputError(
            f"defense robust_kd: layers {layers} is not at most {len(names)}, the number of groups of {teacher.description}"
        )
    return names[len(names) - (layers or len(names)) :]


def train_masks(inputs: DefenseInput, settings: RobustKdSettings, rows: Rows) -> TeacherNetworks:
    """Learn masks for each suspect and each of T thresholds, in one call.

    Args:
        inputs: M suspects.
        settings: of the masks.
        rows: clean rows, leaves [M, n].

    Returns:
        M T masked networks: all thresholds of the first suspect, then of the second.

    Raises:
        InputError: the network has no groups, or fewer than `settings.layers`.
    """
    teacher, attacked = inputs.attacked.model, inputs.attacked.variables
    names = masked_groups(teacher, settings.layers, inputs.runner.image_shape)
    batch_size = inputs.recipe.evaluation_batch_size
    means = inputs.runner.mean(group_outputs(teacher), attacked, rows, inputs.pool, batch_size)
    masks = {name: {"pattern": jnp.asarray(means[name])} for name in names}
    if settings.form == "elementwise":
        masks = {name: {**mask, "gate": jnp.ones_like(mask["pattern"])} for name, mask in masks.items()}
    count = len(settings.thresholds)
    thresholds = jnp.tile(jnp.asarray(settings.thresholds, jnp.float32), len(inputs.keys))
    variables = {"params": repeat(masks, count), "network": repeat(attacked, count), "threshold": thresholds}
    config = inputs.config(
        epochs=settings.mask_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.mask_learning_rate,
        weight_decay=0.0,
        optimiser="adam",
        schedule="constant",
    )
    mask_settings = ("form", "loss", "variance_axes", "variance_weight", "layers", "mask_epochs", "mask_learning_rate")
    used = {name: getattr(settings, name) for name in (*mask_settings, "batch_size", "validation_share", "thresholds")}
    nets = inputs.runner.from_variables(
        f"RobustKD masks {fingerprint(**used)}",
        teacher,
        config,
        variables,
        repeat(inputs.keys_for("RobustKD: shuffles of masks"), count),
        1,
        inputs.pool,
        repeat(rows, count),
        mask_objective(teacher, settings.form, settings.loss, settings.variance_axes, settings.variance_weight),
    )
    trained = {"network": nets.variables["network"], "threshold": thresholds, "masks": nets.variables["params"]}
    return TeacherNetworks(masked(teacher, settings.form), trained)


def detoxify(inputs: DefenseInput, settings: RobustKdSettings) -> tuple[TeacherNetworks, dict[str, np.ndarray]]:
    """The first half of the method: train masked networks and choose the threshold.

    Returns:
        M masked networks, and facts for the report, float [M] each.
    """
    num, batch_size = len(settings.thresholds), inputs.recipe.evaluation_batch_size
    kept, held_out = split_rows(inputs, settings.validation_share)
    teachers = train_masks(inputs, settings, kept)
    attacked, pool = inputs.attacked, inputs.pool
    plain = inputs.runner.mean(accuracy_and_variance(attacked.model), attacked.variables, held_out, pool, batch_size)
    with_masks = inputs.runner.mean(
        accuracy_and_variance(teachers.model), teachers.variables, repeat(held_out, num), pool, batch_size
    )
    accuracy, variances = (with_masks[name].reshape(-1, num) for name in ("accuracy", "variance"))
    if settings.select == "oracle":
        chosen = choose_by_oracle(inputs, settings, teachers, num, kept, held_out)
    else:
        chosen = choose_by_validation(accuracy, variances, plain["accuracy"], settings.allowed_drop)
    members = np.arange(len(chosen)) * num + chosen
    of_chosen = np.arange(len(chosen)), chosen
    facts = {
        "mask threshold": np.asarray(settings.thresholds)[chosen],
        "teacher's accuracy on held-out clean rows": plain["accuracy"],
        "masked teacher's": accuracy[of_chosen],
        "feature variance": plain["variance"],
        "masked feature variance": variances[of_chosen],
    }
    return TeacherNetworks(teachers.model, ensemble.members(teachers.variables, members)), facts


def run(inputs: DefenseInput, settings: RobustKdSettings) -> DefenseResult:
    """Learn masks, choose the threshold, distil."""
    teachers, facts = detoxify(inputs, settings)
    return fkd.run_from(inputs, "RobustKD", settings, teachers)._replace(facts=facts)


def network_after(
    settings: RobustKdSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """The student, after checking that the teacher has the groups to mask and that the student can learn them."""
    masked_groups(attacked, settings.layers, image_shape)
    return fkd.student_of_pair(settings, attacked, make_model, image_shape)


def more_needs(settings: RobustKdSettings) -> tuple[Need, ...]:
    """Algorithm 1 needs the attacker's trigger."""
    return ("attacker's trigger",) if settings.select == "oracle" else ()


def check(settings: RobustKdSettings) -> None:
    """Reject invalid settings."""
    check_student("defense robust_kd", settings)
    check_values(
        "defense robust_kd",
        settings,
        choices={
            "select": Select.__args__,
            "form": Form.__args__,
            "loss": MaskLoss.__args__,
            "variance_axes": Axes.__args__,
        },
    )


ROBUST_KD = Defense(
    name="robust_kd",
    title="RobustKD",
    paper="Chen et al. 2024, Robust Knowledge Distillation Based on Feature Variance Against Backdoored Teacher Model",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=RobustKdSettings(),
    run=run,
    check=check,
    network_after=network_after,
    more_needs=more_needs,
    # Adam moves a mask by about its learning rate in each step, whatever m is. The paper takes some 31,000 steps of 1e-3; small
    # runs take a few hundred, so their rate is larger by about the same factor.
    changes={
        "paper": fkd.PAPER,
        "quick": {**distillation.QUICK, "mask_epochs": 10, "mask_learning_rate": 0.05, "thresholds": (0.1, 0.2, 0.4)},
        "quick digits": {
            **distillation.QUICK_DIGITS,
            "mask_epochs": 15,
            "mask_learning_rate": 0.1,
            "thresholds": (0.1, 0.3),
        },
    },
)
