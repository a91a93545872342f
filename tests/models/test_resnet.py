"""The golden arrays are PyTorch's; how they were made is in tests/golden/README.md."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.errors import InputError
from bdjax.models import count_parameters, make_model
from bdjax.models.facade import as_model
from bdjax.models.layers import EXACT_LOWERINGS
from bdjax.models.resnet import ResNet
from bdjax.training.member import TrainConfig, as_float, make_optimiser, make_step, supervised

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LOWERINGS = EXACT_LOWERINGS
SHIFTED_FIRST = ["shifted", *(pytest.param(name, marks=pytest.mark.slow) for name in LOWERINGS if name != "shifted")]
"""The fast tests use the default lowering of a CPU; test_layers.py has all three for each layer."""


def torch_state(arrays, name):
    """One of the stored state dicts: PyTorch's name -> array."""
    state, start = {}, 0
    for entry in arrays[f"{name}_names"]:
        key, *shape = entry.split()
        shape = tuple(map(int, shape))
        size = int(np.prod(shape))
        state[key] = arrays[name][start : start + size].reshape(shape).astype(np.float32)
        start += size
    assert start == arrays[name].size
    return state


def path_of(torch_name):
    """The path of an array of the PyTorch net in our variables: (collection, module, ..., leaf)."""
    *modules, leaf = torch_name.replace(".convs.", ".Conv_").replace(".norms.", ".BatchNorm_").split(".")
    modules = [f"{module}_block1" if module.startswith("stage") else module for module in modules]
    if leaf.startswith("running"):
        return ("batch_stats", *modules, {"running_mean": "mean", "running_var": "variance"}[leaf])
    return (
        "params",
        *modules,
        "scale" if "norm" in torch_name and leaf == "weight" else {"weight": "kernel"}.get(leaf, leaf),
    )


def ours(state):
    """A PyTorch state dict as our variables."""
    variables = {}
    for name, array in state.items():
        *folders, leaf = path_of(name)
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
        place[leaf] = jnp.asarray(array.transpose(axes))
    return variables


def part_of(variables, like):
    """The leaves of `variables` that `like` also has."""
    return {k: part_of(variables[k], v) if isinstance(v, dict) else variables[k] for k, v in like.items()}


def assert_same_structure(model, variables):
    expected = jax.eval_shape(lambda key: model.init(key, (9, 8, 3)), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, expected)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "resnet10.npz") as file:
        return dict(file)


# ---- Against PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", SHIFTED_FIRST)
def test_three_steps_of_adam_are_pytorchs(lowering, golden):
    model = make_model("resnet10", 3, 4, lowering)
    before = ours(torch_state(golden, "before"))
    assert_same_structure(model, before)
    images = as_float(jnp.asarray(golden["images"]))
    targets = {"labels": jnp.asarray(golden["labels"])}

    @jax.jit
    def logits(variables):
        return [model.apply(variables, images, train=train).logits for train in (False, True)]

    @jax.jit
    def step(variables, optimiser, weight_decay):
        config = TrainConfig(weight_decay=weight_decay)
        minimised = supervised(model, lambda logits, targets: losses.cross_entropy(logits, targets["labels"]))
        run = make_step(minimised, config)
        return run(variables, optimiser, images, targets, jnp.float32(0.01), jax.random.key(0))

    def train(weight_decay):
        variables, optimiser, seen = before, make_optimiser(TrainConfig()).init(before["params"]), []
        for _ in range(3):
            (variables, optimiser), metrics = step(variables, optimiser, jnp.float32(weight_decay))
            seen.append(float(metrics["loss"]) / len(images))
        return variables, seen

    evaluated, trained = logits(before)
    np.testing.assert_allclose(evaluated, golden["eval_logits"], atol=1e-5)
    np.testing.assert_allclose(trained, golden["train_logits"], atol=1e-5)

    variables, seen = train(0.0)
    np.testing.assert_allclose(seen, golden["losses"], atol=2e-5)
    chex.assert_trees_all_close(variables, ours(torch_state(golden, "after")), atol=2e-5)
    np.testing.assert_allclose(logits(variables)[0], golden["eval_logits_after"], atol=5e-5)

    variables, seen = train(0.05)
    decayed = ours(torch_state(golden, "decayed"))
    np.testing.assert_allclose(seen, golden["decayed_losses"], atol=2e-5)
    chex.assert_trees_all_close(part_of(variables, decayed), decayed, atol=2e-5)


@pytest.mark.parametrize("lowering", SHIFTED_FIRST)
def test_bottleneck_blocks_are_pytorchs(lowering):
    golden = np.load(GOLDEN / "bottleneck.npz")
    model = as_model(ResNet("bottleneck", (1, 1, 1), 2, 3, lowering), 3, "one block a stage")
    variables = ours(torch_state(golden, "before"))
    assert_same_structure(model, variables)
    output = jax.jit(lambda images: model.apply(variables, images, train=False))(
        as_float(jnp.asarray(golden["images"]))
    )
    np.testing.assert_allclose(output.logits, golden["eval_logits"], atol=1e-4)
    for tap in ("stage1", "stage2", "stage3"):
        np.testing.assert_allclose(output.features[tap], golden[tap], atol=1e-4)


# ---- Structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "parameters"),
    [
        ("resnet18", (32, 32, 3), 2_777_674),
        ("resnet18", (28, 28, 1), 2_776_522),
        ("resnet34", (32, 32, 3), 8_165_194),
        ("resnet50", (28, 28, 1), 8_544_714),
        pytest.param("resnet34", (28, 28, 1), 8_164_042, marks=pytest.mark.slow),
        pytest.param("resnet50", (32, 32, 3), 8_545_866, marks=pytest.mark.slow),
        pytest.param("resnet101", (32, 32, 3), 27_537_994, marks=pytest.mark.slow),
        pytest.param("resnet101", (28, 28, 1), 27_536_842, marks=pytest.mark.slow),
    ],
)
def test_parameters_of_the_papers_networks(name, image, parameters):
    # ResNet-18 and -34 are printed in the paper as 2.8M and 8.2M.
    assert count_parameters(make_model(name, 10), image) == parameters


@pytest.mark.parametrize(
    ("image", "sizes", "kind", "expansion", "lowering"),
    [
        ((28, 28, 1), (28, 14, 7), "basic", 1, "native"),
        ((32, 32, 3), (32, 16, 8), "basic", 1, "patches"),
        ((9, 9, 3), (9, 5, 3), "bottleneck", 4, "shifted"),
    ],
)
def test_shapes_of_logits_and_taps(kind, expansion, image, sizes, lowering):
    model = as_model(ResNet(kind, (1, 2, 1), 2, 10, lowering), 10, "small")
    variables = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    for train in (False, True):
        images = jax.ShapeDtypeStruct((5, *image), jnp.float32)
        output = jax.eval_shape(lambda v, x, train=train: model.apply(v, x, train=train), variables, images)
        assert output.logits.shape == (5, 10)
        assert list(output.features) == ["stage1", "stage2", "stage3"]
        for stage, size in enumerate(sizes):
            assert output.features[f"stage{stage + 1}"].shape == (5, size, size, 2 * 2**stage * expansion)
        chex.assert_trees_all_equal_shapes_and_dtypes(output.variables, variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg99", 10), "unknown model 'vgg99'; models are resnet10, resnet18"),
        (("resnet18", 1), "classes 1 at least 2"),
        (("resnet18", 10, 0), "width 0 must be at least 1"),
    ],
)
def test_invalid_networks_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(*arguments)


# ---- Behaviour ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHIFTED_FIRST)
def net(request, golden):
    """A network whose running statistics are not neutral."""
    model = make_model("resnet10", 3, 4, request.param)
    return model, ours(torch_state(golden, "before")), as_float(jnp.asarray(golden["images"]))


def test_evaluation_changes_no_variable_and_sees_each_row_alone(net):
    model, variables, images = net
    evaluate = jax.jit(lambda x: model.apply(variables, x, train=False))
    output = evaluate(images)
    chex.assert_trees_all_equal(output.variables, variables)
    others = evaluate(jnp.concatenate([images[:1], 0.1 * jnp.flip(images[1:], (0, 1))]))
    np.testing.assert_allclose(others.logits[0], output.logits[0], rtol=1e-5, atol=1e-6)
    assert np.abs(others.logits[1:] - output.logits[1:]).max() > 1e-3


def test_training_sees_the_batch_and_moves_only_the_statistics(net):
    model, variables, images = net
    apply = jax.jit(lambda x: model.apply(variables, x, train=True))
    output, others = apply(images), apply(images.at[1:].multiply(0.1))
    assert np.abs(others.logits[0] - output.logits[0]).max() > 1e-3
    chex.assert_trees_all_equal(output.variables["params"], variables["params"])
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(output.variables["batch_stats"]), strict=True
    ):
        assert np.all(before != after)


def test_an_edit_replaces_its_tap(net):
    model, variables, images = net

    @jax.jit
    def run(zero):
        def edited(**edits):
            return model.apply(variables, images, train=False, edits=edits)

        gradient = jax.grad(lambda zero: jnp.sum(edited(stage3=lambda x: x + zero).logits[:, 1]))(zero)
        same = edited(stage1=lambda x: x, stage3=lambda x: x + 0.0)
        return edited(), same, edited(stage2=lambda x: 2.0 * x), edited(stage3=jnp.zeros_like).logits, gradient

    plain, same, doubled, silent, gradient = run(jnp.zeros((len(images), 3, 2, 16)))
    chex.assert_trees_all_close(same, plain, atol=1e-6)
    chex.assert_trees_all_close(doubled.features["stage1"], plain.features["stage1"], atol=1e-6)
    chex.assert_trees_all_close(doubled.features["stage2"], 2.0 * plain.features["stage2"], atol=1e-5)
    assert np.abs(doubled.features["stage3"] - plain.features["stage3"]).max() > 1e-2
    classifier = variables["params"]["classifier"]
    np.testing.assert_allclose(silent, np.tile(classifier["bias"], (len(images), 1)), atol=1e-6)
    # What Grad-CAM needs: the gradient of a logit with respect to the last tap is that class's weights, over the pixels.
    expected = np.broadcast_to(np.asarray(classifier["kernel"])[:, 1] / 6, gradient.shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_an_edit_of_an_unknown_tap_is_an_error():
    model = make_model("resnet10", 3, 2)
    with pytest.raises(ValueError, match="no tap stage4; this network has stage1, stage2, stage3"):
        jax.eval_shape(
            lambda key, images: model.apply(
                model.init(key, (8, 8, 3)), images, train=False, edits={"stage4": lambda x: x}
            ),
            jax.random.key(0),
            jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
        )
