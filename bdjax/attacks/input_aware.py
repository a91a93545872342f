"""Input-Aware Dynamic: one network generates a pattern for each image, another a mask for it (Nguyen & Tran 2020).

The attacker trains the classifier and the pattern network together. Rows that carry the trigger of *another* image keep
their label, so a trigger only works on the image it was made for. The mask network is trained first and then frozen.

`input_aware_offline` is the attack as LfD and ABL use it: the attacker trains the three networks, discards the classifier
and supplies poisoned rows. Without cover rows, its victim reacts to any image's trigger.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.attacks.batch_poisoning import shares
from bdjax.attacks.contract import Attack, Knowledge, Published, TrainingControl
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models import default_lowering, generators, make_model
from bdjax.models.generators import Generator
from bdjax.settings import Count, LearningRate, NotNegative, NumRows, PositiveShare, Range, Share, Width, check_values
from bdjax.training import ensemble, memory
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig, as_float, resume_from
from bdjax.types import Array, Dataset, Key, Model, PyTree

PAPER = "Nguyen & Tran 2020, Input-Aware Dynamic Backdoor Attack"
MASK_BATCH = 128
TINY = 1e-7


@dataclass(frozen=True)
class InputAwareSettings:
    poison_rate: PositiveShare = 0.1
    """share of the rows with their own trigger and the attacker's label; a share of each batch where the attacker trains"""
    cover_rate: Share = 0.1
    """share of the rows with the trigger of another image and their true label"""
    width: Width = 32
    """channels of the first stage of the pattern and mask networks; 16 in the paper for MNIST"""
    stages: Annotated[int, Range(at_least=1, at_most=10)] = 3
    """number of times the two networks halve the image size; 2 in the paper for MNIST"""
    density: Share = 0.032
    """share of the image that a mask may cover without a penalty"""
    density_weight: NotNegative = 100.0
    """weight of the penalty for covering more"""
    diversity_weight: NotNegative = 1.0
    """weight of the penalty for similar patterns on different images"""
    mask_epochs: Count = 25
    """epochs of training the mask network"""
    mask_learning_rate: LearningRate = 0.01
    """learning rate of Adam for the mask network; a tenth after 40 % of the steps, a hundredth after 80 %"""
    rows: NumRows = 0
    """number of rows, at most, that the attacker's networks are trained on; 0 for all"""
    donors: Count = 128
    """number of training images whose triggers cover rows get, except during the attacker's training"""


@dataclass(frozen=True)
class InputAwareOfflineSettings(InputAwareSettings):
    cover_rate: Share = 0.0
    """share of the supplied rows with the trigger of another image and their true label"""
    joint_poison_rate: Share = 0.1
    """share of each batch with the trigger and the target label, in the attacker's own training"""
    joint_cover_rate: Share = 0.1
    """share of each batch with the trigger of another image, in the attacker's own training"""
    joint_epochs: Count = 25
    """epochs of that training, with a cosine schedule; 600 in the paper, 100 in BackdoorBench"""
    joint_learning_rate: LearningRate = 0.01
    """learning rate of Adam for the classifier and the pattern network"""
    classifier_width: Width = 16
    """channels of the first stage of the ResNet-10 that is discarded"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputAware:
    """The pattern and mask networks."""

    pattern: PyTree
    """variables of the pattern network"""
    mask: PyTree
    """variables of the mask network"""
    donors: Array
    """uint8 [n, H, W, C]: images whose triggers cover rows get"""
    pattern_network: Generator = field(metadata={"static": True})
    mask_network: Generator = field(metadata={"static": True})


def threshold(mask: Array) -> Array:
    """Push a mask towards 0 and 1: 0.018 at 0.4, 0.5 at 0.5, 0.982 at 0.6.

    Args:
        mask: float32, any shape, in (0, 1).

    Returns:
        float32, same shape, in (0, 1).
    """
    return jnp.tanh(20 * mask - 10) / (2 + TINY) + 0.5


def distance(first: Array, second: Array) -> Array:
    """The root of the mean squared difference of each pair of images.

    Args:
        first: float32 [N, H, W, C].
        second: float32 [N, H, W, C].

    Returns:
        float32 [N], at least 1e-6, so that two equal images have a gradient.
    """
    return jnp.sqrt(jnp.mean(jnp.square(first - second), axis=(1, 2, 3)) + 1e-12)


def diversity_loss(images: tuple[Array, Array], made: tuple[Array, Array]) -> Array:
    """The ratio of the distance of two images to the distance of their patterns (or masks).

    The reference implementation normalises images by mean and deviation. That changes nothing for patterns, which it
    normalises too, but gives this term two (MNIST) to four times the weight for masks.

    Args:
        images: two batches float32 [N, H, W, C].
        made: the patterns or masks of each batch, float32 [N, H, W, C'].

    Returns:
        float32 [].

    References:
        Nguyen & Tran 2020, section 4.3, the diversity loss.
    """
    return jnp.mean(distance(*images) / (distance(*made) + TINY))


def make_networks(key: Key, knowledge: Knowledge, settings: InputAwareSettings) -> InputAware:
    """Train the mask network and initialise the pattern network, which is trained later with the classifier.

    Masks should be small and differ between images. Images are paired with their neighbours in the shuffled batch; the
    reference implementation shuffles a second time, which takes a second pass through the network.

    Args:
        key: draws initial weights, shuffles and donors.
        knowledge: the training images.
        settings: network, loss and training settings.

    Returns:
        Both networks; the pattern network is not trained yet.

    Raises:
        InputError: a setting is out of range, or the images are too small for the number of stages.

    References:
        Nguyen & Tran 2020, sections 4.2 and 4.3.
    """
    shape = knowledge.train.image_shape
    check_values("Input-Aware", settings)
    check(knowledge.train, knowledge.target, settings)
    row_key, donor_key, pattern_key, mask_key, train_key = jax.random.split(key, 5)
    images = knowledge.train.images[_sample_rows(row_key, knowledge, settings)]
    mask_network = Generator(1, settings.width, settings.stages, default_lowering())
    pattern_network = dataclasses.replace(mask_network, channels=shape[2])
    mask = _initialised(partial(generators.init, mask_network, image_shape=shape), mask_key)
    donors = np.sort(permutation(donor_key, len(knowledge.train))[: settings.donors])
    return InputAware(
        _initialised(partial(generators.init, pattern_network, image_shape=shape), pattern_key),
        _train_mask(train_key, mask, jnp.asarray(images), mask_network, _of_mask(settings)),
        jnp.asarray(knowledge.train.images[donors]),
        pattern_network,
        mask_network,
    )


def _initialised(init: Callable[[Key], PyTree], key: Key) -> PyTree:
    # Through the engine, which compiles it with few optimisations: with all of them, compiling takes longer than training.
    return ensemble.members(ensemble.init_members(init, key[None]), 0)


def _sample_rows(key: Key, knowledge: Knowledge, settings: InputAwareSettings) -> np.ndarray:
    count = len(knowledge.train)
    return np.sort(permutation(key, count)[: settings.rows]) if 0 < settings.rows < count else np.arange(count)


def _of_mask(settings: InputAwareSettings) -> InputAwareSettings:
    """The settings that training the mask depends on; all others at their defaults, so that compilations are shared."""
    names = ("density", "density_weight", "mask_epochs", "mask_learning_rate")
    return InputAwareSettings(**{name: getattr(settings, name) for name in names})


@partial(jax.jit, static_argnames=("network", "settings"))
def _train_mask(
    key: Key, variables: PyTree, pool: Array, network: Generator, settings: InputAwareSettings
) -> dict[str, PyTree]:
    batch_size = min(MASK_BATCH, len(pool))
    batches = len(pool) // batch_size
    steps = batches * settings.mask_epochs
    drops = {int(0.4 * steps): 0.1, int(0.8 * steps): 0.1}
    rate = optax.piecewise_constant_schedule(settings.mask_learning_rate, drops)
    optimiser = optax.adam(rate, b1=0.5, b2=0.9)

    def loss(params: PyTree, variables: PyTree, images: Array) -> tuple[Array, PyTree]:
        raw_masks, variables = generators.generate(network, {**variables, "params": params}, images, train=True)
        masks = threshold(raw_masks)
        excess = jnp.mean(jax.nn.relu(masks - settings.density))
        pairs = (images, jnp.roll(images, 1, axis=0)), (masks, jnp.roll(masks, 1, axis=0))
        return settings.density_weight * excess + diversity_loss(*pairs), variables

    def step(state: tuple[PyTree, PyTree], rows: Array) -> tuple[tuple[PyTree, PyTree], None]:
        variables, optimiser_state = state
        gradient, variables = jax.grad(loss, has_aux=True)(variables["params"], variables, as_float(pool[rows]))
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            update, optimiser_state = optimiser.update(gradient, optimiser_state)
            params = optax.apply_updates(variables["params"], update)
        return ({**variables, "params": params}, optimiser_state), None

    def epoch(state: tuple[PyTree, PyTree], key: Key) -> tuple[tuple[PyTree, PyTree], None]:
        order = jax.random.permutation(key, len(pool))[: batches * batch_size]
        return lax.scan(step, state, order.reshape(batches, batch_size))

    keys = jax.random.split(key, settings.mask_epochs)
    return lax.scan(epoch, (variables, optimiser.init(variables["params"])), keys)[0][0]


def apply(params: InputAware, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Apply an image's own trigger: x (1 - m(x)) + m(x) g(x).

    Args:
        params: both networks.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the networks only see the image.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1]; each value lies between those of the image and the pattern.

    References:
        Nguyen & Tran 2020, section 4.1.
    """
    del label, key
    return _blend(image, *_trigger_of(params, image))


def apply_foreign(params: InputAware, image: Array, label: Array | None, key: Key) -> Array:
    """Apply the trigger of another image, to which the model must not react.

    Args:
        params: both networks.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the donor.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Nguyen & Tran 2020, section 4.3, the cross-trigger mode.
    """
    del label
    which = jax.random.randint(key, (), 0, params.donors.shape[0])
    return _blend(image, *_trigger_of(params, as_float(params.donors[which])))


def _trigger_of(params: InputAware, image: Array) -> tuple[Array, Array]:
    """(pattern [H, W, C], mask [H, W, 1]) of one image."""
    pattern, _ = generators.generate(params.pattern_network, params.pattern, image[None], train=False)
    return pattern[0], _masks(params, image[None])[0]


def _masks(params: InputAware, images: Array) -> Array:
    return threshold(generators.generate(params.mask_network, params.mask, images, train=False)[0])


def _blend(image: Array, pattern: Array, mask: Array) -> Array:
    return image * (1.0 - mask) + mask * pattern


def check(train: Dataset, target: int, settings: InputAwareSettings) -> None:
    """`Attack.check`: the rates, and the size of the networks.

    Raises:
        InputError: the rates exceed 1 together, the images are too small for the number of stages, or the networks do not fit
          into memory.
    """
    del target
    is_offline = isinstance(settings, InputAwareOfflineSettings)
    joint_shares = (settings.joint_poison_rate, settings.joint_cover_rate) if is_offline else ()
    shares(1, *(joint_shares or (settings.poison_rate, settings.cover_rate)))
    height, width, channels = train.image_shape
    if min(height, width) < 2**settings.stages:
        raise InputError(f"Input-Aware: {height}x{width} images cannot be halved {settings.stages} times (stages)")
    if settings.width * 2**settings.stages > LARGE_NETWORK:
        network = Generator(channels, settings.width, settings.stages, default_lowering())
        sizes = jax.eval_shape(partial(generators.init, network, image_shape=train.image_shape), jax.random.key(0))
        memory.check_fits(
            "the networks of Input-Aware", 8 * memory.count_bytes(sizes), "use a smaller width or fewer stages"
        )


def make_objective(model: Model, settings: InputAwareSettings, wanted: Array) -> Objective:
    """Train classifier and pattern network together: cross-entropy on all rows plus the diversity loss of the patterns.

    Both are trained by the classifier's optimiser. The reference implementation uses SGD for the classifier and Adam with
    momenta 0.5 and 0.9 for the pattern network, whose gradients it never resets; here they are reset in each step. The
    pattern network sees the triggered rows and their donors, which are later rows of the batch, as one separate batch.

    Args:
        model: the classifier.
        settings: the rates and the weight of the diversity loss.
        wanted: int32 [K], the label that a poisoned row of each class gets.

    Returns:
        The objective; each row's loss includes the whole diversity term, so that their mean includes it once.

    References:
        Nguyen & Tran 2020, section 4.3, algorithm 1.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        attack, statistics = variables["attack"]["params"], variables["batch_stats"]
        classifier, pattern_variables = (
            {"params": params[name], "batch_stats": statistics[name]} for name in ("classifier", "pattern")
        )
        count = shares(images.shape[0], settings.poison_rate, settings.cover_rate)
        poisoned, end = images[: count.poisoned], count.poisoned + count.cover
        donors = jnp.roll(images, -end, axis=0)[: max(count)]
        patterns, pattern_variables = generators.generate(
            attack.pattern_network, pattern_variables, jnp.concatenate([poisoned, donors]), train=True
        )
        masks = _masks(attack, jnp.concatenate([poisoned, donors]))
        of_donors = slice(count.poisoned, end)
        inputs = jnp.concatenate(
            [
                _blend(poisoned, patterns[: count.poisoned], masks[: count.poisoned]),
                _blend(images[count.poisoned : end], patterns[of_donors], masks[of_donors]),
                images[end:],
            ]
        )
        labels = targets["labels"]
        labels = jnp.concatenate([wanted[labels[: count.poisoned]], labels[count.poisoned :]])
        output = model.apply(classifier, inputs, train=True)
        diversity = diversity_loss(
            (poisoned, donors[: count.poisoned]),
            (patterns[: count.poisoned], patterns[count.poisoned : 2 * count.poisoned]),
        )
        after = {
            "params": params,
            "batch_stats": {
                "classifier": output.variables["batch_stats"],
                "pattern": pattern_variables["batch_stats"],
            },
            "attack": variables["attack"],
        }
        losses = cross_entropy(output.logits, labels) + settings.diversity_weight * diversity
        return Outcome(losses, output.logits, labels, after)

    return objective


def begin(key: Key, classifier: PyTree, params: InputAware) -> dict[str, Any]:
    """Add the pattern network to the variables that are trained.

    Args:
        key: not used; the params hold an initialised network.
        classifier: the classifier's variables.
        params: from `make_networks`.

    Returns:
        The variables of both; those that are not trained are under "attack".
    """
    del key
    trained = {
        kind: {"classifier": classifier[kind], "pattern": params.pattern[kind]} for kind in ("params", "batch_stats")
    }
    return {**trained, "attack": {"params": dataclasses.replace(params, pattern=None)}}


def end(variables: PyTree) -> tuple[PyTree, InputAware]:
    """Inverse of `begin`: (classifier's variables, params with the trained pattern network)."""
    classifier, pattern = (
        {kind: variables[kind][name] for kind in ("params", "batch_stats")} for name in ("classifier", "pattern")
    )
    return classifier, dataclasses.replace(variables["attack"]["params"], pattern=pattern)


def make_offline(key: Key, knowledge: Knowledge, settings: InputAwareOfflineSettings) -> InputAware:
    """Train all three networks with all-to-one labels, and keep the pattern and mask networks.

    Args:
        key: for all random choices.
        knowledge: the training rows and the target.
        settings: for the mask network and the joint training.

    Returns:
        Both networks, trained.

    Raises:
        InputError: as in `make_networks`; or the classifier width or the number of epochs is below 1.

    References:
        Nguyen & Tran 2020, section 4.3; Li et al. 2021 (ABL) for the use offline.
    """
    network_key, row_key, classifier_key, fit_key = jax.random.split(key, 4)
    params = make_networks(network_key, knowledge, settings)
    data = knowledge.train
    model = make_model("resnet10", data.num_classes, settings.classifier_width)
    config = TrainConfig(
        epochs=settings.joint_epochs,
        batch_size=MASK_BATCH,
        learning_rate=settings.joint_learning_rate,
        schedule="cosine",
        keep_last_batch=False,
    )
    joint = dataclasses.replace(settings, poison_rate=settings.joint_poison_rate, cover_rate=settings.joint_cover_rate)
    wanted = jnp.full(data.num_classes, knowledge.target, jnp.int32)
    classifier = _initialised(partial(model.init, image_shape=data.image_shape), classifier_key)
    states = ensemble.stack([resume_from(begin(classifier_key, classifier, params), fit_key, config)])
    rows = _sample_rows(row_key, knowledge, settings)
    no_rows = Rows(jnp.zeros((1, 0), jnp.int32), {"labels": jnp.zeros((1, 0), jnp.int32)})
    trained = ensemble.fit(
        model,
        lambda logits, targets: cross_entropy(logits, targets["labels"]),
        config,
        states,
        jnp.asarray(data.images[rows]),
        Rows(jnp.arange(len(rows), dtype=jnp.int32)[None], {"labels": jnp.asarray(data.labels[rows])[None]}),
        no_rows,
        layout="map",
        objective=make_objective(model, joint, wanted),
        group_size=1,
    )
    return end(ensemble.members(trained.variables, 0))[1]


LARGE_NETWORK = 2048
"""Channels above which a network's memory is estimated."""
SMALL_NETWORKS = {"width": 8, "stages": 2, "mask_epochs": 5, "rows": 2500}

INPUT_AWARE = Attack(
    name="input_aware",
    title="Input-Aware",
    paper=PAPER,
    threat="training",
    settings=InputAwareSettings(),
    make_params=make_networks,
    apply=apply,
    apply_to_cover=apply_foreign,
    label_rules=("all_to_one", "all_to_all"),
    trigger_is_trained=True,
    check=check,
    control=TrainingControl(make_objective, begin, end),
    per_dataset={"grey": SMALL_NETWORKS, "digits": {"mask_epochs": 15}},
)
INPUT_AWARE_OFFLINE = Attack(
    name="input_aware_offline",
    title="Input-Aware, offline",
    paper=f"{PAPER}; with the networks trained beforehand, as in LfD and ABL",
    threat="data",
    settings=InputAwareOfflineSettings(),
    make_params=make_offline,
    apply=apply,
    apply_to_cover=apply_foreign,
    label_rules=("all_to_one", "all_to_all"),
    needs=("all training rows",),
    trigger_is_trained=True,
    check=check,
    per_dataset={
        "grey": {**SMALL_NETWORKS, "joint_epochs": 6, "classifier_width": 8},
        "digits": {"mask_epochs": 15, "joint_epochs": 30},
    },
    published=(Published("LfD", "cifar10", 92.7, 99.95),),
)
