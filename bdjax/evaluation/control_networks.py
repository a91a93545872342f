"""Networks of known training beside suspects: clean controls, a network with a planted trigger, and surrogates of black boxes;
and the audit made with them.

All of them train on the defender's clean rows, as members of few calls, and triggers into all classes of all of them are
searched in one call: see `audit`. `bdjax/evaluation/model_audit.py` has the statistics.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.poisoning import pooled, trigger_all
from bdjax.datasets import splits
from bdjax.defenses import neural_cleanse
from bdjax.defenses.contract import DefenseInput, PoolRows, labelled
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings, Triggers
from bdjax.errors import InputError
from bdjax.evaluation import sensitivity
from bdjax.evaluation.model_audit import LEAST_ROWS, Measured, describe_weights, judge, least_accuracy
from bdjax.evaluation.sensitivity import Planting
from bdjax.inspection import random_triggers, weight_outliers
from bdjax.inspection.random_triggers import Responses
from bdjax.inspection.weight_outliers import ClassOutlier, LayerOutlier
from bdjax.models import normalised_convolutions
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig, no_rows
from bdjax.training.stages import Nets, SilentStage, StageRunner, prepare
from bdjax.triggers import MaskedBlend
from bdjax.types import Array, Dataset, Key, Model, PyTree

PLANTED_SHARE = 0.1
"""Share of the clean rows on which a trigger is planted, for the network that must be found."""
PLANTED_SIDE = 0.15
"""Side of that trigger, a square, as a share of the images' shorter side, rounded to a multiple of 3 pixels. On photographs
of 32 x 32 pixels a square of 3 pixels on this share of 10,000 rows is not learned in 8 epochs."""

Ask = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> logits [B, K] of one network."""


class Controls(NamedTuple):
    """Networks of known training: J clean ones, and one with a planted trigger if that could be planted."""

    model: Model
    clean: PyTree
    """stacked [J, ...]"""
    planted: PyTree | None
    """stacked [1, ...]"""
    planting: Planting | None
    why: str = ""
    """why nothing was planted"""


def planted_scale(image_shape: tuple[int, int, int]) -> int:
    """The side of the planted square in units of 3 pixels, for images of shape (H, W, C): `PLANTED_SIDE`, rounded."""
    return max(1, round(PLANTED_SIDE / 3 * min(image_shape[:2])))


def train_controls(
    key: Key, count: int, model: Model, recipe: TrainConfig, runner: StageRunner, clean: Dataset
) -> Controls:
    """Train the control networks and the network with a planted trigger, as members of one call.

    Args:
        key: for weights, shuffles, and the rows that are planted.
        count: J.
        model: the suspects' architecture.
        recipe: of the training.
        runner: trains.
        clean: the clean rows.
    """
    planting, why = None, ""
    try:
        planting = sensitivity.plant(
            jax.random.fold_in(key, 1),
            clean,
            max(1, round(PLANTED_SHARE / sensitivity.MULTIPLES[-1] * len(clean))),
            scale=planted_scale(clean.image_shape),
        )
    except InputError as error:
        why = f"the trigger {error}"
    copies = [planting.suspects[-1].dataset] if planting else []
    pool, index, labels = pooled(clean, [None] * count + copies)
    rows = labelled(index, labels)
    none = no_rows(rows)
    keys = jnp.stack([jax.random.fold_in(key, 2 + number) for number in range(len(index))])
    nets = runner.from_scratch("control networks", model, recipe, keys, 1, jnp.asarray(pool), rows, none)
    clean_nets = ensemble.members(nets.variables, slice(0, count))
    planted = ensemble.members(nets.variables, slice(count, count + 1)) if planting else None
    return Controls(model, clean_nets, planted, planting, why)


def planted_success(controls: Controls, predict: Callable[[PyTree, np.ndarray], np.ndarray], test: Dataset) -> float:
    """Success of the planted trigger on its network, on held-out rows of other classes.

    Args:
        controls: with a planting.
        predict: (stacked variables, images) -> logits [1, N, K].
        test: the held-out rows.
    """
    suspect = controls.planting.suspects[-1]
    shown = trigger_all(jax.random.key(0), test, suspect.parts[0].attack.apply, suspect.params[0])
    others = test.labels != controls.planting.target
    classes = predict(controls.planted, shown)[0].argmax(axis=1)
    return float((classes == controls.planting.target)[others].mean())


class Imitation(NamedTuple):
    """How surrogates of black boxes are made."""

    recipe: TrainConfig
    copies: int
    """pictures of each clean row that a black box is queried with"""


class Setup(NamedTuple):
    """What an audit is made with."""

    controls: int
    """J, the number of control networks"""
    model: Model
    """the suspects' architecture; that of the surrogates for black boxes"""
    recipe: TrainConfig
    """training of the networks of known training"""
    imitation: Imitation
    """how surrogates are made; only for black boxes"""
    search: NeuralCleanseSettings
    runner: StageRunner
    """trains and predicts"""
    clean: Dataset
    """the rows that networks are trained on"""
    searched: Dataset
    """the rows that triggers are searched on"""
    held_out: Dataset
    """the rows that their success is measured on"""
    random_triggers: int = 0
    """of each kind; 0 for none"""
    shown_as: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
    """from logits [N, K] to what is left of them in the outputs of a black box like the suspects"""


class Asked(NamedTuple):
    """N models that are audited: all of one architecture, or all black boxes."""

    titles: Sequence[str]
    sources: Sequence[str]
    """where they come from"""
    asks: Sequence[Ask]
    variables: PyTree | None
    """stacked [N, ...]; None for black boxes"""


class Audit(NamedTuple):
    """The outcome of an audit."""

    numbers: dict[str, Any]
    """see `model_audit.judge`"""
    tested: list[int]
    """T of the N suspects: those that could be tested"""
    measured: Measured | None
    """of the T suspects and then the networks of known training, see `Examined`; None if T is 0"""


def audit(key: Key, setup: Setup, suspects: Asked) -> Audit:
    """Audit models: what cannot be tested, the measurements of the others, and what follows from them.

    Args:
        key: random key.
        setup: what it is made with.
        suspects: the models.
    """
    clean, held_out = setup.clean, setup.held_out
    detail = f"{len(suspects.asks)} × {len(held_out):,} held-out rows"
    with stage_of(setup.runner, "accuracy", None, "", detail):
        logits = [ask(held_out.images) for ask in suspects.asks]
    models = describe_suspects(suspects.titles, suspects.sources, logits, held_out, clean)
    tested = [number for number, entry in enumerate(models) if not entry["reason"]]
    names = [f"class {clean.class_title(number)}" for number in range(clean.num_classes)]
    is_black_box, found = suspects.variables is None, {}
    if tested:
        variables = None if is_black_box else ensemble.members(suspects.variables, np.array(tested))
        examined = examine(key, setup, variables, [suspects.asks[number] for number in tested])
        found = {name: getattr(examined, name) for name in ("measured", "places", "accuracies", "planted")}
        if variables is not None and setup.model.architecture is not None:  # whose layers have known names
            parts = (variables, examined.controls.clean)
            weighed = [weigh(setup.model, part, clean.image_shape) for part in parts]
            found["weights"] = describe_weights(*weighed, names)
    return Audit(judge(models, names, black_box=is_black_box, **found), tested, found.get("measured"))


class Examined(NamedTuple):
    """What was measured of T suspects."""

    measured: Measured
    """of the T suspects, the J controls, and the network with a planted trigger if there is one, in this order"""
    places: list[int]
    """which of them are the controls"""
    accuracies: list[float]
    """of each control network on held-out rows"""
    planted: dict[str, Any]
    """"title", "class" and "success" of the planted trigger; or "why" there is none"""
    controls: Controls


def examine(key: Key, setup: Setup, suspects: PyTree | None, asks: Sequence[Ask]) -> Examined:
    """Train the networks of known training, search triggers into all classes of all networks, and measure them.

    Args:
        key: random key.
        setup: what the audit is made with.
        suspects: their variables, stacked [T, ...]; None for black boxes.
        asks: the T suspects.
    """
    count, model, recipe, runner, held_out = setup.controls, setup.model, setup.recipe, setup.runner, setup.held_out
    train_key, search_key, query_key, imitation_key = jax.random.split(key, 4)

    def predict(variables: PyTree, images: np.ndarray) -> np.ndarray:
        return runner.predict(model, variables, images, recipe.evaluation_batch_size)

    controls = train_controls(train_key, count, model, recipe, runner, setup.clean)
    boxes, planted = list(asks), {"why": controls.why}
    if controls.planting:
        boxes.append(lambda images: setup.shown_as(predict(controls.planted, images)[0]))
        rate = planted_success(controls, predict, held_out)
        planted = {"title": controls.planting.title, "class": controls.planting.target, "success": rate}
    if suspects is not None:
        parts = [suspects, controls.clean] + ([controls.planted] if controls.planting else [])
    else:
        made = imitate(query_key, imitation_key, model, *setup.imitation, runner, boxes, setup.clean)
        last = [ensemble.members(made, np.arange(len(asks), len(boxes)))] if controls.planting else []
        parts = [ensemble.members(made, np.arange(len(asks))), controls.clean, *last]
    triggers = search(search_key, model, ensemble.join(parts), setup.searched, recipe, runner, setup.search)
    places = list(range(len(asks), len(asks) + count))
    networks = [*asks, *[None] * count, *boxes[len(asks) :]]
    with stage_of(runner, "held-out rows", len(networks), "networks") as stage:
        measured = measure(
            triggers, networks, lambda images: predict(controls.clean, images), places, held_out, stage.advance
        )
        classes = predict(controls.clean, held_out.images).argmax(axis=-1)
        accuracies = (classes == held_out.labels).mean(axis=1).tolist()
    if setup.random_triggers:
        controls_alone = [ensemble.members(controls.clean, np.arange(number, number + 1)) for number in range(count)]
        asked = [lambda images, alone=alone: predict(alone, images)[0] for alone in controls_alone]
        every = [*asks, *asked, *boxes[len(asks) :]]
        responses = respond(key, every, held_out, setup.random_triggers, runner)
        measured = measured._replace(responses=responses, kinds=tuple(random_triggers.KINDS))
    return Examined(measured, places, accuracies, planted, controls)


def respond(key: Key, networks: Sequence[Ask], test: Dataset, count: int, runner: StageRunner) -> Responses:
    """What random triggers do to M networks: leaves [M, S, K].

    Args:
        key: the audit's; see `draw_random`.
        networks: the M networks.
        test: the held-out rows.
        count: triggers of each kind.
        runner: whose log has the stage.
    """
    triggers, rows = draw_random(key, test, count)
    found, detail = [], f"{len(triggers)} kinds × {count} × {len(rows)} rows"
    with stage_of(runner, "random triggers", len(networks), "networks", detail) as stage:
        for ask in networks:
            found.append(random_triggers.strongest_successes(ask, triggers, rows.images, rows.labels, test.num_classes))
            stage.advance()
    return Responses(*(np.stack(leaves) for leaves in zip(*found, strict=True)))


def draw_random(key: Key, test: Dataset, count: int) -> tuple[dict[str, MaskedBlend], Dataset]:
    """The random triggers of each kind, and the rows that they are put on, of all classes in equal shares.

    Args:
        key: the audit's; decides the triggers, and which `random_triggers.ROWS` of the rows they are put on.
        test: the held-out rows.
        count: triggers of each kind.
    """
    trigger_key, row_key = jax.random.split(jax.random.fold_in(key, 1))  # the key itself is split elsewhere
    rows = splits.take(test, splits.balanced_rows(row_key, test.labels, random_triggers.ROWS))
    kinds = random_triggers.KINDS
    return {kind: random_triggers.draw_triggers(trigger_key, kind, count, test.image_shape) for kind in kinds}, rows


def stage_of(runner: StageRunner, name: str, total: int | None, unit: str, detail: str = "") -> AbstractContextManager:
    """A stage of the runner's log, or of none."""
    return runner.log.stage(name, total=total, unit=unit, detail=detail) if runner.log else nullcontext(SilentStage())


def describe_suspects(
    titles: Sequence[str], sources: Sequence[str], logits: Sequence[np.ndarray], held_out: Dataset, clean: Dataset
) -> list[dict[str, Any]]:
    """What is known of each suspect before anything is trained, as `model_audit.judge` takes it.

    Args:
        titles: of the suspects.
        sources: where they come from.
        logits: of each, float [N, K], on the held-out rows.
        held_out: the held-out rows.
        clean: the clean rows.
    """
    return [
        {
            "title": title,
            "source": source,
            "accuracy": float((rows.argmax(axis=1) == held_out.labels).mean()),
            "reason": reason_untested(rows, held_out, clean),
        }
        for title, source, rows in zip(titles, sources, logits, strict=True)
    ]


def reason_untested(logits: np.ndarray, held_out: Dataset, clean: Dataset) -> str:
    """Why a model cannot be tested, before anything is trained; "" if it can.

    Args:
        logits: float [N, K], of the model on the held-out rows.
        held_out: the held-out rows.
        clean: the clean rows.
    """
    if not np.isfinite(logits).all():
        return "its outputs are not finite numbers"
    for name, rows in (("clean", clean), ("held-out", held_out)):
        if len(rows) < LEAST_ROWS:
            return f"{len(rows)} {name} rows are too few; at least {LEAST_ROWS} are needed"
    if len(set(held_out.labels.tolist())) < 2:
        return "the held-out rows are of one class; success is measured on rows of other classes"
    if missing := sorted(set(range(clean.num_classes)) - set(clean.labels.tolist())):
        return f"there is no clean row of class {clean.class_title(missing[0])}"
    accuracy = float((logits.argmax(axis=1) == held_out.labels).mean())
    least = least_accuracy(clean.num_classes)
    if accuracy < least:
        return (
            f"it predicts {100 * accuracy:.0f} % of the held-out rows correctly, below {100 * least:.0f} %: these are not rows "
            "that it was made for, or their classes are in another order"
        )
    return ""


# ---- Black boxes ----------------------------------------------------------------------------------------------------


def queries(key: Key, images: np.ndarray, copies: int) -> np.ndarray:
    """Pictures that a black box is queried with: clean rows, and copies with a rectangle of another row or of noise.

    Args:
        key: decides rectangles and rows.
        images: uint8 [n, H, W, C].
        copies: pictures of each row, the first unchanged.

    Returns:
        uint8 [copies * n, H, W, C].
    """
    words = np.asarray(jax.random.key_data(key)).tolist()
    generator = np.random.default_rng(words)
    height, width, channels = images.shape[1:]
    parts = [images]
    for _ in range(copies - 1):
        changed = images.copy()
        for row in range(len(images)):
            tall, wide = generator.integers(1, height // 2 + 1), generator.integers(1, width // 2 + 1)
            top, left = generator.integers(0, height - tall + 1), generator.integers(0, width - wide + 1)
            place = slice(top, top + tall), slice(left, left + wide)
            if generator.random() < 0.5:
                changed[row][place] = images[generator.integers(len(images))][place]
            else:
                changed[row][place] = generator.integers(
                    0, 256, (1, 1, channels) if generator.random() < 0.5 else (tall, wide, channels)
                )
        parts.append(changed)
    return np.concatenate(parts)


def surrogate_objective(model: Model) -> Objective:
    """Cross-entropy with the probabilities that a black box gives, targets["probabilities"] float32 [N, K]."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        loss = -jnp.sum(targets["probabilities"] * jax.nn.log_softmax(output.logits), axis=1)
        return Outcome(loss, output.logits, targets["labels"], output.variables)

    return objective


def imitate(
    query_key: Key,
    key: Key,
    model: Model,
    recipe: TrainConfig,
    copies: int,
    runner: StageRunner,
    boxes: Sequence[Ask],
    clean: Dataset,
) -> PyTree:
    """A surrogate of each black box, distilled from its answers on pictures of the clean rows.

    Args:
        query_key: decides the pictures, see `queries`.
        key: for weights and shuffles.
        model: the surrogates' architecture.
        recipe: of their training.
        copies: pictures of each clean row.
        runner: trains.
        boxes: the black boxes.
        clean: the clean rows.

    Returns:
        Variables stacked [boxes, ...].
    """
    pictures = queries(query_key, clean.images, copies)
    with stage_of(runner, "queries", len(boxes), "models") as stage:
        stage.detail = f"{len(pictures):,} pictures each"
        answers = []
        for ask in boxes:
            answers.append(np.asarray(jax.nn.softmax(jnp.asarray(ask(pictures)))))
            stage.advance()
    labels = np.tile(clean.labels, (len(boxes), copies))
    rows = labelled(np.tile(np.arange(len(pictures), dtype=np.int32), (len(boxes), 1)), labels)
    rows = Rows(rows.index, {**rows.targets, "probabilities": jnp.asarray(np.stack(answers))})
    keys = jnp.stack([jax.random.fold_in(key, number) for number in range(len(boxes))])
    start = ensemble.init_networks(model, clean.image_shape, keys)
    start = prepare(model, start, jnp.asarray(pictures), rows.index)
    objective = surrogate_objective(model)
    return runner.from_variables(
        "surrogates", model, recipe, start, keys, 1, jnp.asarray(pictures), rows, objective
    ).variables


# ---- Triggers -------------------------------------------------------------------------------------------------------


def search(
    key: Key,
    model: Model,
    variables: PyTree,
    clean: Dataset,
    recipe: TrainConfig,
    runner: StageRunner,
    settings: NeuralCleanseSettings,
) -> Triggers:
    """The smallest triggers into all classes of M networks: NumPy leaves [M, K, ...]; see `neural_cleanse.find_triggers`."""
    count = ensemble.num_members(variables)
    inputs = DefenseInput(
        pool=jnp.asarray(clean.images),
        num_classes=clean.num_classes,
        keys=jnp.stack([jax.random.fold_in(key, number) for number in range(count)]),
        make_model=lambda name=None, num_classes=None: model,
        recipe=recipe,
        runner=runner,
        knowledge={
            "attacked model": Nets(model, variables, 1, {}),
            "clean rows": PoolRows(
                np.tile(np.arange(len(clean), dtype=np.int32), (count, 1)), np.tile(clean.labels, (count, 1))
            ),
        },
    )
    return neural_cleanse.find_triggers(inputs, settings)


def measure(
    triggers: Triggers,
    networks: Sequence[Ask],
    ask_controls: Callable[[np.ndarray], np.ndarray],
    controls: Sequence[int],
    test: Dataset,
    advance: Callable[[], object] = lambda: None,
) -> Measured:
    """The success of each network's triggers on held-out rows, of the network and of the control networks.

    Args:
        triggers: leaves [M, K, ...].
        networks: the M networks, which a black box's triggers need not have been found on.
        ask_controls: uint8 [B, H, W, C] -> logits [J, B, K] of the control networks.
        controls: which of the M networks these J are.
        test: the held-out rows.
        advance: called after every network.
    """
    count, classes = triggers.masks.shape[:2]
    own, transfer = np.zeros((count, classes)), np.zeros((count, classes, len(controls)))
    images = test.images.astype(np.float32) / 255
    for number in range(count):
        for label in range(classes):
            stamped = neural_cleanse.stamp(
                images, triggers.masks[number, label][None], triggers.patterns[number, label][None]
            )
            stamped = np.rint(255 * np.asarray(stamped)).astype(np.uint8)  # what a camera or a file can hold
            others = test.labels != label
            reached = ask_controls(stamped).argmax(axis=-1) == label
            transfer[number, label] = reached[:, others].mean(axis=1)
            if number in controls:
                place = controls.index(number)
                own[number, label], transfer[number, label, place] = transfer[number, label, place], np.nan
            else:
                own[number, label] = (networks[number](stamped).argmax(axis=-1) == label)[others].mean()
        advance()
    return Measured(triggers, triggers.masks.sum(axis=(2, 3, 4), dtype=np.float64), own, transfer)


# ---- Weights --------------------------------------------------------------------------------------------------------

Outliers = tuple[Sequence[LayerOutlier], ClassOutlier]
"""Of one network: the channel outlier of every layer, and the class outlier of the last layer."""


def weigh(model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> list[Outliers]:
    """What two detectors on the weights measure of N networks: see `bdjax/inspection/weight_outliers.py`.

    Args:
        model: the architecture.
        variables: stacked [N, ...].
        image_shape: (H, W, C).
    """
    pairs, found = normalised_convolutions(model, image_shape), []
    for number in range(ensemble.num_members(variables)):
        member = jax.tree.map(lambda leaf, number=number: np.asarray(leaf[number]), variables)
        last = weight_outliers.class_outlier(member["params"]["classifier"]["kernel"])
        found.append((weight_outliers.channel_outliers(member, pairs), last))
    return found
