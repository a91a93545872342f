"""RobustKD: masks that lower the variance of a suspect teacher's features, and then FKD from those (Chen et al. 2024).

The paper observes that backdoored networks have features of larger variance than clean ones. Before distillation it learns,
for each group of blocks, a tensor p of the size of one image's features, which is added with a weight m to what the group
hands on, whatever the image (equation 7, section 4.2):

    F'_l = F_l + m p_l

Masks are cumulative: F'_1 goes on to the second group, whose output gets p_2, and so on. All of the teacher is frozen, and the
masks alone minimise, on clean rows, the labels' cross-entropy and the variance of the last group's masked output (equations 8
to 10); they start as the mean features. FKD then takes the masked features for the teacher's.

What the paper leaves open:
- Over what the variance is taken. p is the same for all images, so at the last group the variance *across images* does not
  depend on it at all, and its gradient is zero; only the variance over one image's elements can be lowered. That is the
  default, and the others are there to see.
- What m is. The text fixes it at 0.2, finds 0.1 best in its figure 4, and its algorithm 1 stops on the student's ASR, which no
  defender knows. Here the defender chooses: of some thresholds, the one with the least variance among those that cost the
  masked teacher at most a point of accuracy on clean rows that were held out. The paper's way is there as an oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses import fkd
from bdjax.defenses.contract import Defense, DefenseInput, Need, fingerprint
from bdjax.defenses.distillation import TeacherNetworks, check_student
from bdjax.defenses.mask_threshold import choose_by_oracle, choose_by_validation, repeat, split_rows
from bdjax.errors import InputError
from bdjax.models import group_shapes
from bdjax.settings import check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Form = Literal["added", "mixed", "elementwise"]
MaskLoss = Literal["both", "cross_entropy", "variance"]
Axes = Literal["elements", "all", "batch"]
Select = Literal["validation", "oracle"]


@dataclass(frozen=True)
class RobustKdSettings(fkd.FkdSettings):
    epochs: int = 300
    """of distillation"""
    batch_size: int = 64
    """of masks and students; or all clean rows, if they are fewer"""
    select: Select = "validation"
    """who chooses m: validation (least variance at an allowed loss of accuracy), or oracle, as the paper's algorithm 1: the
    student with the highest accuracy and the lowest ASR, which only the attacker can measure"""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6)
    """m, to choose from; a single one is fixed, as the paper's text has it: (0.2,)"""
    validation_share: float = 0.1
    """of the clean rows: held out from the masks' training, to choose m by"""
    allowed_drop: float = 0.01
    """of the masked teacher's accuracy on those rows"""
    form: Form = "added"
    """added: F + m p (equation 7); mixed: (1 - m) F + m p (equation 15); elementwise: F + m relu(tanh(v)) p, v trained too"""
    loss: MaskLoss = "both"
    """what the masks minimise: cross-entropy and variance, or one of them"""
    variance_axes: Axes = "elements"
    """over what the variance is: each image's elements, all of a batch's, or the batch (no gradient for the last mask)"""
    variance_weight: float = 1.0
    """of the variance beside the cross-entropy"""
    layers: int = 0
    """how many groups have a mask, counted from the last one; 0 for all"""
    mask_epochs: int = 40
    """of the masks' training"""
    mask_learning_rate: float = 1e-3
    """of Adam there (the paper does not name the optimiser)"""


Mask = dict[str, Array]
"""One group's: "pattern" float32 [h, w, C], and "gate" of the same shape where the form is elementwise."""


def put_on(features: Array, mask: Mask, threshold: Array, form: Form) -> Array:
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
    """A network with masks: its variables hold the network's as "network", and "masks" and "threshold" (float32 []) beside.

    Its output is the network's own with masked groups: logits, taps and groups all follow from those.

    Args:
        teacher: its architecture; it has groups.
        form: of the masks.
    """

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        edits = dict(edits or {})
        for name, mask in variables["masks"].items():
            after = edits.get(name, lambda features: features)
            put = partial(put_on, mask=mask, threshold=variables["threshold"], form=form)
            edits[name] = lambda features, put=put, after=after: after(put(features))
        output = teacher.apply(variables["network"], images, train=train, edits=edits)
        return output._replace(variables={**variables, "network": output.variables})

    def init(key: Key, image_shape: tuple[int, int, int]) -> PyTree:
        return {"network": teacher.init(key, image_shape), "masks": {}, "threshold": jnp.zeros((), jnp.float32)}

    return Model(init, apply, teacher.num_classes, f"{teacher.description}, masked ({form})")


def variance(features: Array, axes: Axes) -> Array:
    """The biased variance of features (equation 8): of each image's elements, of all of a batch's, or across the batch.

    Args:
        features: float32 [N, h, w, C].
        axes: see `RobustKdSettings`.

    Returns:
        float32 [N]; one value N times where it is of the whole batch.
    """
    if axes == "elements":
        return losses.feature_variance(features)
    if axes == "all":
        return jnp.full(features.shape[0], jnp.var(features))
    if axes == "batch":
        return jnp.full(features.shape[0], jnp.mean(jnp.var(features, axis=0)))
    raise ValueError(f"variance axes {axes!r} is not one of {', '.join(Axes.__args__)}")


def last_output(output: ModelOutput) -> Array:
    """What the last group hands on, float32 [N, h, w, C]."""
    return list(output.groups.values())[-1].output


@cache
def mask_objective(teacher: Model, form: Form, loss: MaskLoss, axes: Axes, weight: float) -> Objective:
    """What the masks minimise (equation 10), on a frozen network with running statistics.

    Args:
        teacher: its architecture.
        form: of the masks.
        loss: see `RobustKdSettings`.
        axes: of the variance.
        weight: of the variance.

    Returns:
        An objective whose `params` are the masks, and whose variables are those of `masked` beside.
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
def judge_row(teacher: Model) -> Callable[..., PyTree]:
    """For `StageRunner.mean`: whether a row is classified as its label says, and the variance of its last group's output."""

    def judge(variables: PyTree, images: Array, targets: dict[str, Array]) -> dict[str, Array]:
        output = teacher.apply(variables, images, train=False)
        correct = (jnp.argmax(output.logits, axis=1) == targets["labels"]).astype(jnp.float32)
        return {"accuracy": correct, "variance": variance(last_output(output), "elements")}

    return judge


def masked_groups(teacher: Model, layers: int, image_shape: tuple[int, int, int]) -> list[str]:
    """The names of the groups that have a mask: the last ones, or all.

    Args:
        teacher: the network.
        layers: how many; 0 for all.
        image_shape: (H, W, C).

    Raises:
        InputError: the network has no groups, or fewer than that.
    """
    names = list(group_shapes(teacher, image_shape))
    if not names:
        raise InputError(f"{teacher.description} has no groups to mask: take a WRN, a ResNet or a PyramidNet")
    if layers > len(names):
        raise InputError(
            f"defense robust_kd: layers {layers} is not at most {len(names)}, the groups of {teacher.description}"
        )
    return names[len(names) - (layers or len(names)) :]


def train_masks(inputs: DefenseInput, settings: RobustKdSettings, rows: Rows) -> TeacherNetworks:
    """Learn masks for each suspect and each of T thresholds, all as members of one call.

    Args:
        inputs: M suspects.
        settings: of the masks.
        rows: clean rows, leaves [M, n].

    Returns:
        M T masked networks: all thresholds of the first suspect, then of the second.

    Raises:
        InputError: the network has no groups, or fewer than are to be masked.
    """
    teacher, attacked = inputs.attacked.model, inputs.attacked.variables
    names = masked_groups(teacher, settings.layers, inputs.runner.image_shape)
    batch_size = inputs.recipe.evaluation_batch_size
    means = inputs.runner.mean(group_outputs(teacher), attacked, rows, inputs.pool, batch_size)
    masks = {name: {"pattern": jnp.asarray(means[name])} for name in names}
    if settings.form == "elementwise":
        masks = {name: {**mask, "gate": jnp.ones_like(mask["pattern"])} for name, mask in masks.items()}
    count = len(settings.thresholds)
    own = jnp.tile(jnp.asarray(settings.thresholds, jnp.float32), len(inputs.keys))
    variables = {"params": repeat(masks, count), "network": repeat(attacked, count), "threshold": own}
    config = inputs.config(
        epochs=settings.mask_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.mask_learning_rate,
        weight_decay=0.0,
        optimiser="adam",
        schedule="constant",
    )
    of_masks = ("form", "loss", "variance_axes", "variance_weight", "layers", "mask_epochs", "mask_learning_rate")
    told = {name: getattr(settings, name) for name in (*of_masks, "batch_size", "validation_share", "thresholds")}
    nets = inputs.runner.from_variables(
        f"RobustKD masks {fingerprint(**told)}",
        teacher,
        config,
        variables,
        repeat(inputs.keys_for("RobustKD: shuffles of masks"), count),
        1,
        inputs.pool,
        repeat(rows, count),
        mask_objective(teacher, settings.form, settings.loss, settings.variance_axes, settings.variance_weight),
    )
    trained = {"network": nets.variables["network"], "threshold": own, "masks": nets.variables["params"]}
    return TeacherNetworks(masked(teacher, settings.form), trained)


def detoxify(inputs: DefenseInput, settings: RobustKdSettings) -> tuple[TeacherNetworks, dict[str, np.ndarray]]:
    """The first half of the method: masked networks, with the threshold chosen.

    Returns:
        M masked networks; and what a report tells of them, float [M] each.
    """
    num, batch_size = len(settings.thresholds), inputs.recipe.evaluation_batch_size
    kept, held_out = split_rows(inputs, settings.validation_share)
    teachers = train_masks(inputs, settings, kept)
    how = {"pool": inputs.pool, "batch_size": batch_size}
    plain = inputs.runner.mean(judge_row(inputs.attacked.model), inputs.attacked.variables, held_out, **how)
    after = inputs.runner.mean(judge_row(teachers.model), teachers.variables, repeat(held_out, num), **how)
    accuracy, variances = (after[name].reshape(-1, num) for name in ("accuracy", "variance"))
    if settings.select == "oracle":
        chosen = choose_by_oracle(inputs, settings, teachers, num, kept, held_out)
    else:
        chosen = choose_by_validation(accuracy, variances, plain["accuracy"], settings.allowed_drop)
    where = np.arange(len(chosen)) * num + chosen
    of_chosen = np.arange(len(chosen)), chosen
    facts = {
        "mask threshold": np.asarray(settings.thresholds)[chosen],
        "teacher's accuracy on held-out clean rows": plain["accuracy"],
        "masked teacher's": accuracy[of_chosen],
        "feature variance": plain["variance"],
        "masked feature variance": variances[of_chosen],
    }
    return TeacherNetworks(teachers.model, ensemble.members(teachers.variables, where)), facts


def run(inputs: DefenseInput, settings: RobustKdSettings) -> DefenseResult:
    """Learn masks, choose their threshold, distil."""
    teachers, facts = detoxify(inputs, settings)
    return fkd.run_from(inputs, "RobustKD", settings, teachers)._replace(facts=facts)


def network_after(
    settings: RobustKdSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """The student, if the teacher has the groups that are to be masked and the student can learn them."""
    masked_groups(attacked, settings.layers, image_shape)
    return fkd.student_of_pair(settings, attacked, make_model, image_shape)


def oracles(settings: RobustKdSettings) -> tuple[Need, ...]:
    """Algorithm 1 needs what only the attacker has."""
    return ("attacker's trigger",) if settings.select == "oracle" else ()


def check(settings: RobustKdSettings) -> None:
    """Refuse what cannot be."""
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
        at_least={
            "allowed_drop": 0,
            "variance_weight": 0,
            "layers": 0,
            "mask_epochs": 1,
        },
        above={"divisor": 0, "validation_share": 0, "mask_learning_rate": 0},
        below={"validation_share": 1},
    )
    if not settings.thresholds or not all(0 <= one < np.inf for one in settings.thresholds):
        raise InputError(f"defense robust_kd: thresholds {settings.thresholds} is not one of numbers of at least 0")


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
    oracles=oracles,
    # Adam moves a mask by its rate in each step, whatever m is. The paper takes some 31,000 steps of 1e-3 and small runs a few
    # hundred, so that masks move about as far only at a rate that is as much larger.
    changes={
        "quick": {**fkd.QUICK, "mask_epochs": 10, "mask_learning_rate": 0.05, "thresholds": (0.1, 0.2, 0.4)},
        "quick digits": {**fkd.QUICK_DIGITS, "mask_epochs": 15, "mask_learning_rate": 0.1, "thresholds": (0.1, 0.3)},
    },
)
