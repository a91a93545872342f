"""RobustKD: masks lower the variance of a suspect teacher's features, then FKD distils from those (Chen et al. 2024).

The paper observes that backdoored networks have features of larger variance than clean ones. Before distillation it learns a
mask for each group of blocks, the same for every image, on clean rows and with the teacher frozen. Masks are cumulative: a
group's masked output goes on to the next group. FKD then distils from the masked features.

| symbol | here |
| --- | --- |
| F_l, float32 [N, h, w, C] | the output of group l, before the normalisation and the ReLU that follow (`GroupEnd.output`) |
| p_l, float32 [h, w, C] | a tensor of the size of one image's features, learnt; it starts as their mean over the clean rows |
| m, float32 [] | the mask's weight, the paper's threshold (`thresholds`) |
| u_l = m p_l | what is trained instead of p_l (`Mask`) |
| Var(F) | the biased variance over one image's elements (`variance`) |

| in the paper | here |
| --- | --- |
| equation 7, F' = F + m p | `apply_mask`, form "added" |
| equation 8, Var(F') of the last group | `variance`, `losses.feature_variance` |
| equation 9, the labels' cross-entropy of the masked network; equation 10, the sum of both | `mask_objective`, `train_masks` |
| equation 15, F' = (1 - m) F + m p | `apply_mask`, forms "mixed" and, as in the public code, "elementwise" |
| algorithm 1, the choice of m | `mask_threshold.choose_by_oracle`; for a real defender `choose_by_validation` |
| equation 6, distillation | `fkd.feature_distance` |

**In equation 7 m is redundant.** p is free, so F + m p has the same optimum for every m > 0, and m only scales the start and
the steps: with p trained, values of m compare degrees of under-training. Therefore u = m p is trained here, and m decides only
where u starts. This also explains why the paper finds its results insensitive to m. In equation 15 m is not redundant: it says
how much of F is left, and what no p can cancel of Var falls with (1 - m)^2.

What the paper leaves open, and where its public code differs:
- Over what the variance is taken. p is the same for all images, so at the last group the variance *across images* does not
  depend on it at all, and its gradient is zero; only the variance over one image's elements can be lowered. That is the
  default; the other choices are there for comparison.
- What m is. The text fixes it at 0.2, which is the default, finds 0.1 best in its figure 4, and its algorithm 1 stops on the
  student's ASR, which no defender knows. Several `thresholds` are a search, by held-out clean rows or by the oracle.
- The form. The public code has no training of the masks. It distils from WRNs by equation 15 with an elementwise M in place of
  m, and all four masks that come with it are clipped to [0, 0.05]: `form=elementwise:thresholds=(0.05,)`.
- The taps. For PyramidNets the public code distils the groups' outputs before their masks are added: `taps=before_mask`.
- The student's input. The public code adds salt-and-pepper noise by array calls that tensors do not have: left out.
"""

from collections.abc import Callable, Sequence
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
from bdjax.settings import Amount, Count, InnerShare, LearningRate, NotEmpty, NotNegative, Positive, check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Form = Literal["added", "mixed", "elementwise"]
Taps = Literal["after_mask", "before_mask"]
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
    """how m is chosen among several thresholds: "validation" (least variance within the allowed loss of accuracy), or "oracle"
    (the paper's algorithm 1: the student with the largest accuracy minus ASR, which only the attacker can measure)"""
    thresholds: Annotated[tuple[Positive, ...], NotEmpty()] = (0.2,)
    """m, as in the paper's text; several values are a search. In form "added" m is only where the masks start (m times the mean
    features), so a search there finds the best-trained masks and no more; in form "mixed" it is the share of the features that
    is replaced, at most 1; in form "elementwise" the bound of that share"""
    validation_share: InnerShare = 0.1
    """share of the clean rows that is held out from training the masks, to measure them and to choose m, in (0, 1)"""
    allowed_drop: NotNegative = 0.01
    """for select validation: largest loss of the masked teacher's accuracy on the held-out rows, as a fraction; if every m
    loses more, the m that loses least is taken"""
    form: Form = "added"
    """"added": F + m p (equation 7); "mixed": (1 - m) F + m p (equation 15); "elementwise": (1 - M) F + M p with M learnt,
    clipped to [0, m] (equation 15 as in the public code, where m is 0.05)"""
    taps: Taps = "after_mask"
    """the teacher's features that the student learns: with their group's mask ("after_mask"), or without it but with those of
    the groups before ("before_mask"), as in the public code for PyramidNets: then the first group's are the teacher's own,
    and the last mask never reaches the student"""
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
    """learning rate of Adam for u = m p (the paper names no optimiser, and 1e-3 for p)"""


Mask = dict[str, Array]
"""The mask of one group: "shift", u = m p, float32 [h, w, C]; if the form is elementwise also "gate" of the same shape, M / m
before it is clipped to [0, 1]."""


def apply_mask(features: Array, mask: Mask, threshold: Array, form: Form) -> Array:
    """F', a group's masked output (equations 7 and 15).

    Args:
        features: float32 [N, h, w, C].
        mask: of the group.
        threshold: m, float32 []; unused in form "added", where u has all of it.
        form: see `RobustKdSettings`.

    Returns:
        float32 [N, h, w, C]; with m = 0 and so u = 0, the features themselves.

    Raises:
        ValueError: there is no such form.
    """
    shift = mask["shift"][None]
    if form == "added":
        return features + shift
    if form == "mixed":
        return (1.0 - threshold) * features + shift
    if form == "elementwise":
        gate = clip_to_unit(mask["gate"])[None]
        return (1.0 - threshold * gate) * features + gate * shift
    raise ValueError(f"form {form!r} is not one of {', '.join(Form.__args__)}")


@jax.custom_vjp
def clip_to_unit(values: Array) -> Array:
    """Clip to [0, 1], float32 of any shape.

    The gradient is zero only where a step against it would lead further out. Beyond a bound the clip's own gradient is zero
    in both directions, so that an element which a step has carried out could never come back.
    """
    return jnp.clip(values, 0.0, 1.0)


def _clip_backward(values: Array, gradient: Array) -> tuple[Array]:
    leads_out = ((values <= 0.0) & (gradient > 0.0)) | ((values >= 1.0) & (gradient < 0.0))
    return (jnp.where(leads_out, 0.0, gradient),)


clip_to_unit.defvjp(lambda values: (clip_to_unit(values), values), _clip_backward)


@cache
def masked(teacher: Model, form: Form, taps: Taps = "after_mask") -> Model:
    """A network with masks. Its variables are "network", "masks" and "threshold" (float32 []).

    Logits and taps of its output follow from the masked groups.

    Args:
        teacher: the architecture; it has groups.
        form: of the masks.
        taps: whether the groups of its output are those with their mask, or those before it. The latter takes a forward pass
            for each mask, of which a compiler can share what is the same.
    """

    def apply(variables: PyTree, images: Array, *, train: bool, edits=None) -> ModelOutput:
        masks, edits = variables["masks"], dict(edits or {})

        def with_masks(names: Sequence[str]) -> ModelOutput:
            all_edits = dict(edits)
            for name in names:
                after = edits.get(name, lambda features: features)
                put_on = partial(apply_mask, mask=masks[name], threshold=variables["threshold"], form=form)
                all_edits[name] = lambda features, put_on=put_on, after=after: after(put_on(features))
            return teacher.apply(variables["network"], images, train=train, edits=all_edits)

        output = with_masks(list(masks))
        if taps == "before_mask":
            names = list(output.groups)
            before = {
                name: with_masks([other for other in names[:number] if other in masks])
                for number, name in enumerate(names)
            }
            output = output._replace(groups={name: before[name].groups[name] for name in names})
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
        float32 [N], at least 0; the same value N times for a variance of the whole batch.

    Raises:
        ValueError: there are no such axes.
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
    """What the masks minimise on a frozen network with running statistics: the labels' cross-entropy (equation 9) plus the
    variance of the last group's masked output (equation 8), which is equation 10.

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
    """Learn masks for each suspect and each of T thresholds, in one call (section 4.2.3).

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
    count = len(settings.thresholds)
    thresholds = jnp.tile(jnp.asarray(settings.thresholds, jnp.float32), len(inputs.keys))
    starts = repeat({name: jnp.asarray(means[name]) for name in names}, count)
    masks = {name: {"shift": thresholds[:, None, None, None] * start} for name, start in starts.items()}
    if settings.form == "elementwise":
        masks = {name: {**mask, "gate": jnp.full_like(mask["shift"], 0.5)} for name, mask in masks.items()}
    variables = {"params": masks, "network": repeat(attacked, count), "threshold": thresholds}
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
        chosen = choose_by_oracle(inputs, settings, taught(teachers, inputs, settings), num, kept, held_out)
    else:
        chosen = choose_by_validation(accuracy, variances, plain["accuracy"], settings.allowed_drop)
    members = np.arange(len(chosen)) * num + chosen
    of_chosen = np.arange(len(chosen)), chosen
    facts = {
        "mask threshold": np.asarray(settings.thresholds)[chosen],
        "teacher's accuracy on held-out clean rows": plain["accuracy"],
        "masked teacher's accuracy on them": accuracy[of_chosen],
        "teacher's feature variance": plain["variance"],
        "masked teacher's feature variance": variances[of_chosen],
    }
    return TeacherNetworks(teachers.model, ensemble.members(teachers.variables, members)), facts


def taught(teachers: TeacherNetworks, inputs: DefenseInput, settings: RobustKdSettings) -> TeacherNetworks:
    """The masked networks with the taps that students learn."""
    return TeacherNetworks(masked(inputs.attacked.model, settings.form, settings.taps), teachers.variables)


def run(inputs: DefenseInput, settings: RobustKdSettings) -> DefenseResult:
    """Learn masks, choose the threshold, distil. The masked teachers are passed to the evaluator: whether masks remove a
    backdoor from the *teacher* is the direct test of the paper's mechanism, and only the evaluator has the trigger."""
    teachers, facts = detoxify(inputs, settings)
    result = fkd.run_from(inputs, "RobustKD", settings, taught(teachers, inputs, settings))
    return result._replace(facts=facts, more_networks={"masked teacher": tuple(teachers)})


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
    """Reject invalid settings.

    Raises:
        InputError: a setting is invalid, or an oracle has a single m to choose from.
    """
    check_student("defense robust_kd", settings)
    check_values(
        "defense robust_kd",
        settings,
        choices={
            "select": Select.__args__,
            "form": Form.__args__,
            "taps": Taps.__args__,
            "loss": MaskLoss.__args__,
            "variance_axes": Axes.__args__,
        },
    )
    if settings.form != "added" and max(settings.thresholds) > 1:
        raise InputError(
            f"defense robust_kd: thresholds {settings.thresholds} should be at most 1 in form {settings.form}, which replaces "
            "this share of the features"
        )
    if settings.select == "oracle" and len(settings.thresholds) == 1:
        raise InputError(
            f"defense robust_kd: select oracle has only thresholds {settings.thresholds} to choose from; add some, as in "
            "thresholds=(0.1, 0.2, 0.4)"
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
    # Adam moves a mask by about its learning rate in each step. The paper takes some 31,000 steps of 1e-3; small runs take a
    # few hundred, so their rate is larger.
    changes={
        "paper": fkd.PAPER,
        "quick": {**distillation.QUICK, "mask_epochs": 10, "mask_learning_rate": 0.02},
        "quick digits": {**distillation.QUICK_DIGITS, "mask_epochs": 15, "mask_learning_rate": 0.03},
    },
)
