"""The contract of an attack, in parts: tests of many attacks compile and make each thing once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CLEAN_MODEL, Attack, CleanModel, Knowledge, settings_for
from bdjax.attacks.label_rules import LABEL_RULES, make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.plugins import NAME
from bdjax.testing.failure import ContractError, promised, require
from bdjax.testing.tiny_network import make_tiny
from bdjax.types import Array, Dataset, PyTree

CLASSES, PER_CLASS, TARGET = 10, 20, 1
SHAPES = ((28, 28, 1), (32, 32, 3))
"""Grey and colour images."""
FEW_OPERATIONS = 40
"""Up to so many, a function is run operation by operation; a longer one takes seconds, since each operation is compiled."""


class Prepared(NamedTuple):
    """An attack whose trigger is made for `rows_of` a shape."""

    attack: Attack
    settings: Any
    params: PyTree
    knowledge: Knowledge
    shape: tuple[int, int, int]


def check_attack(
    attack: Attack, *, settings: Mapping[str, Any] = {}, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> None:
    """Check all that bdjax relies on: the entry, the trigger, the poisoned rows, and the control of the training, if any.

    Args:
        attack: the entry.
        settings: changes of its settings for which making a trigger takes seconds.
        shapes: (H, W, C) of the images; a trigger is made for each.

    Raises:
        ContractError: it breaks a promise.
    """
    check_entry(attack)
    for shape in shapes:
        prepared = prepare(attack, shape, settings)
        images = triggered(prepared)
        check_trigger(prepared, images)
        if shape == shapes[0]:
            for function in functions_of(attack):
                check_function(prepared, function, images[function])
            check_made_again(prepared)
            check_poisoned_rows(prepared)
            if attack.control:
                check_control(prepared)


# ---- What is tried --------------------------------------------------------------------------------------------------


@cache
def rows_of(shape: tuple[int, int, int]) -> Dataset:
    """200 noisy images of ten classes, each class around its own mean picture of 4 x 4 blocks.

    Args:
        shape: (H, W, C); height and width are multiples of 4.
    """
    generator = np.random.default_rng(0)
    height, width, channels = shape
    coarse = generator.uniform(0.2, 0.8, (CLASSES, 4, 4, channels))
    means = np.repeat(np.repeat(coarse, height // 4, axis=1), width // 4, axis=2)
    labels = np.arange(CLASSES * PER_CLASS, dtype=np.int32) % CLASSES
    noise = generator.normal(0, 0.08, (len(labels), *shape))
    images = np.clip(means[labels] + noise, 0, 1)
    return Dataset((images * 255).astype(np.uint8), labels, CLASSES, "synthetic", "bdjax.testing")


@cache
def clean_model(shape: tuple[int, int, int]) -> CleanModel:
    """The attacker's network, which is not trained."""
    model = make_tiny(CLASSES)
    return CleanModel(model, model.init(jax.random.key(5), shape))


@cache
def batch_of(shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """(images float32 [6, H, W, C], labels int32 [6], keys [6]): four rows, a black and a white one."""
    data = rows_of(shape)
    images = np.concatenate([data.images[:4] / np.float32(255), np.zeros((1, *shape)), np.ones((1, *shape))])
    return jnp.asarray(images, jnp.float32), jnp.asarray(data.labels[:6]), jax.random.split(jax.random.key(3), 6)


def prepare(attack: Attack, shape: tuple[int, int, int], changes: Mapping[str, Any] = {}) -> Prepared:
    """Make an attack's trigger for images of a shape.

    Args:
        attack: the entry.
        shape: (H, W, C).
        changes: of its settings.
    """
    data = rows_of(shape)
    settings = settings_for(attack, data, changes)
    # The set has 20 rows of a class: a tenth of all rows is a whole class.
    settings = dataclasses.replace(settings, poison_rate=0.1, cover_rate=0.1 if settings.cover_rate else 0.0)
    model = clean_model(shape) if attack.needs_clean_model or attack.starts_from_clean_model else None
    knowledge = Knowledge(data, TARGET, model)
    return Prepared(attack, settings, attack.make_params(jax.random.key(2), knowledge, settings), knowledge, shape)


def functions_of(attack: Attack) -> list[Callable[..., Array]]:
    """The distinct functions that put the trigger on an image, in a fixed order."""
    found = (attack.apply, attack.apply_in_training, attack.apply_to_cover)
    return list(dict.fromkeys(function for function in found if function is not None))


@cache
def compiled(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of an image for a batch."""
    return jax.jit(jax.vmap(function, in_axes=(None, 0, 0, 0)))


def triggered(prepared: Prepared) -> dict[Callable[..., Array], np.ndarray]:
    """What each function of an attack makes of `batch_of` the shape: float32 [6, H, W, C]."""
    batch = batch_of(prepared.shape)
    with promised(f"{_title(prepared)}: its functions can be compiled for a batch of images"):
        return {f: np.asarray(compiled(f)(prepared.params, *batch)) for f in functions_of(prepared.attack)}


def _title(prepared: Prepared) -> str:
    return f"attack {prepared.attack.name} on images of {'x'.join(map(str, prepared.shape))}"


# ---- Promises -------------------------------------------------------------------------------------------------------


def check_entry(attack: Attack) -> None:
    """The facts that tables print, and the settings.

    Raises:
        ContractError: one is missing or wrong.
    """
    title = f"attack {attack.name}"
    require(NAME.fullmatch(attack.name), f"{title}: the name has only a to z, 0 to 9 and _")
    require(attack.title and attack.paper, f"{title}: it has a title and a reference")
    require(attack.make_params.__doc__, f"{title}: make_params has a docstring")
    require(attack.threat in ("data", "training"), f"{title}: threat is data or training")
    require(
        attack.label_rules and set(attack.label_rules) <= LABEL_RULES.keys(),
        f"{title}: label_rules are some of {', '.join(LABEL_RULES)}",
    )
    settings = attack.settings
    is_frozen = dataclasses.is_dataclass(settings) and type(settings).__dataclass_params__.frozen
    require(is_frozen and hash(settings) is not None, f"{title}: settings are a frozen dataclass that can be hashed")
    require(0 < settings.poison_rate <= 1, f"{title}: settings.poison_rate is above 0 and at most 1")
    require(0 <= settings.cover_rate <= 1, f"{title}: settings.cover_rate is from 0 to 1")
    require(
        attack.needs_clean_model == (CLEAN_MODEL in attack.needs), f"{title}: a clean model is among its needs if used"
    )
    require(
        attack.control is None or attack.threat == "training", f"{title}: only an attacker who trains has a control"
    )
    for shape in SHAPES:
        data = rows_of(shape)
        for called in ("digits", "cifar10", "mine"):
            require(
                settings_for(attack, dataclasses.replace(data, name=called)) == settings_for(attack, data),
                f"{title}: the name of a dataset does not change the settings",
            )
        adapted = dataclasses.replace(settings_for(attack, data), **attack.per_dataset.get("digits", {}))
        require(settings_for(attack, data, like="digits") == adapted, f"{title}: per_dataset is applied on request")
    try:
        settings_for(attack, rows_of(SHAPES[0]), {"colour_of_the_bikeshed": 1})
    except InputError:
        return
    raise ContractError(f"broken: {title}: a setting that it does not have is refused")


def check_trigger(prepared: Prepared, images: Mapping[Callable[..., Array], np.ndarray]) -> None:
    """The trigger on a batch: shape, dtype, range, repeatable, visible.

    Args:
        prepared: the attack.
        images: from `triggered`.

    Raises:
        ContractError: it breaks a promise.
    """
    title, batch = _title(prepared), batch_of(prepared.shape)
    for function, made in images.items():
        name = f"{title}: {function.__name__}"
        require(made.shape == batch[0].shape and made.dtype == np.float32, f"{name} keeps the shape and float32")
        require(made.min() >= 0.0 and made.max() <= 1.0, f"{name} gives pixels from 0 to 1")  # which no NaN is
        with promised(f"{name} gives the same image for the same parameters, image, label and key"):
            np.testing.assert_array_equal(compiled(function)(prepared.params, *batch), made)
    change = np.abs(images[prepared.attack.apply] - batch[0])[:4].max()
    require(
        (change > 1e-3) == prepared.attack.changes_images, f"{title}: apply changes images if changes_images says so"
    )


def check_function(prepared: Prepared, function: Callable[..., Array], made: np.ndarray) -> None:
    """A function does the same for an image alone; one of few operations also op by op: then none depends on being compiled.

    Args:
        prepared: an attack that has the function.
        function: of one image.
        made: what it makes of `batch_of` the shape, compiled for a batch.

    Raises:
        ContractError: it does not.
    """
    images, labels, keys = batch_of(prepared.shape)
    program = jax.make_jaxpr(function)(prepared.params, images[0], labels[0], keys[0])
    run = function if str(program).count(" = ") <= FEW_OPERATIONS else jax.jit(function)
    with promised(f"{_title(prepared)}: {function.__name__} does the same for an image alone as for a batch"):
        for row in (0, 1):
            alone = run(prepared.params, images[row], labels[row], keys[row])
            np.testing.assert_allclose(alone, made[row], atol=2e-5, rtol=0)


def check_made_again(prepared: Prepared) -> None:
    """The same key makes the same trigger.

    Raises:
        ContractError: it does not.
    """
    attack, settings, params, knowledge, _ = prepared
    with promised(f"{_title(prepared)}: make_params gives the same again for the same key"):
        chex.assert_trees_all_equal(params, attack.make_params(jax.random.key(2), knowledge, settings))


def check_poisoned_rows(prepared: Prepared) -> None:
    """Poisoned sets by each of its label rules: as many rows as the rates say, with the rule's labels, all others unchanged.

    Raises:
        ContractError: a set is not so.
    """
    attack, settings, params, _, shape = prepared
    clean = rows_of(shape)
    for rule_name in attack.label_rules:
        title = f"{_title(prepared)} by the rule {rule_name}"
        rule = make_rule(rule_name, TARGET, CLASSES)
        count = int(settings.poison_rate * len(clean))
        num_cover = int(settings.cover_rate * len(clean))
        configured = ConfiguredAttack(attack, settings, rule)
        poisoned = poison_by(jax.random.key(4), clean, configured, params)
        require(poisoned.is_poisoned.sum() == count, f"{title}: poison_rate of the rows are poisoned")
        require(poisoned.is_cover.sum() == num_cover, f"{title}: cover_rate of the rows are cover rows")
        require(not (poisoned.is_poisoned & poisoned.is_cover).any(), f"{title}: no row is poisoned and a cover row")
        added = count + num_cover if attack.adds_rows else 0
        require(len(poisoned) == len(clean) + added, f"{title}: rows are added if adds_rows says so")
        originals = poisoned.original_labels
        require(rule.candidates(originals)[poisoned.is_poisoned].all(), f"{title}: poisoned rows are its candidates")
        require(rule.cover(originals)[poisoned.is_cover].all(), f"{title}: cover rows are those that it allows")
        with promised(f"{title}: poisoned rows have its labels, and all others their own"):
            expected = np.where(poisoned.is_poisoned, rule.relabel(originals), originals)
            np.testing.assert_array_equal(poisoned.labels, expected)
        untouched = ~(poisoned.is_poisoned | poisoned.is_cover)[: len(clean)]
        with promised(f"{title}: the images of all other rows are unchanged"):
            np.testing.assert_array_equal(poisoned.images[: len(clean)][untouched], clean.images[untouched])
        if rule_name == "clean_label":
            with promised(f"{title}: no label is changed"):
                np.testing.assert_array_equal(poisoned.labels, originals)
        require(poisoned.images.dtype == np.uint8, f"{title}: images are uint8")
    # The last rule's set once more, and another set.
    again = poison_by(jax.random.key(4), clean, configured, params)
    with promised(f"{title}: the same key poisons the same rows in the same way"):
        np.testing.assert_array_equal(again.images, poisoned.images)
        np.testing.assert_array_equal(again.labels, poisoned.labels)
    if rule.candidates(clean.labels).sum() > count:
        other = poison_by(jax.random.key(40), clean, configured, params)
        is_same = np.array_equal(other.images, poisoned.images) and np.array_equal(other.labels, poisoned.labels)
        require(not is_same, f"{title}: another key poisons otherwise")


def check_control(prepared: Prepared) -> None:
    """What an attacker who trains adds to the training: its state, and an objective with a gradient.

    Args:
        prepared: an attack with `control`.

    Raises:
        ContractError: it breaks a promise.
    """
    attack, settings, params, _, shape = prepared
    title = _title(prepared)
    model, classifier = clean_model(shape)
    data = rows_of(shape)
    images, labels = jnp.asarray(data.images[:20], jnp.float32) / 255, jnp.asarray(data.labels[:20])
    wanted = jnp.asarray(make_rule(attack.label_rules[0], TARGET, CLASSES).relabel(np.arange(CLASSES, dtype=np.int32)))
    variables = attack.control.begin(jax.random.key(0), classifier, params)
    with promised(f"{title}: control.end takes out what control.begin put in"):
        begun = attack.control.end(variables)
        chex.assert_trees_all_equal(begun[0], classifier)
        chex.assert_trees_all_equal_structs(begun[1], params)
    objective = attack.control.objective(model, settings, wanted)

    def mean_loss(trained: PyTree, key: Array) -> tuple[Array, Any]:
        outcome = objective(trained, variables, images, {"labels": labels}, key)
        return jnp.mean(outcome.losses), outcome

    run = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (_, outcome), gradient = run(variables["params"], jax.random.key(1))
    with promised(f"{title}: its objective has finite losses, a gradient, and the shapes of the batch"):
        chex.assert_tree_all_finite((outcome.losses, gradient))
        chex.assert_shape(outcome.losses, (20,))
        chex.assert_shape(outcome.logits, (20, CLASSES))
        chex.assert_trees_all_equal_shapes_and_dtypes(outcome.variables, variables)
    in_range = outcome.labels.min() >= 0 and outcome.labels.max() < CLASSES
    require(in_range, f"{title}: the labels of its objective are classes")
    has_gradient = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    require(has_gradient, f"{title}: the gradient of its objective is not zero")
    with promised(f"{title}: its objective gives the same again for the same key"):
        chex.assert_trees_all_equal(run(variables["params"], jax.random.key(1))[0][1].losses, outcome.losses)
