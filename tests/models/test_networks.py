"""Every network of `MODELS`: its size, and what the rest of the library relies on.

Most tests use the smallest networks of each family only; deeper ones consist of the same blocks. Parameters are random, so that
nothing is neutral.
"""

import itertools
import pathlib
import re
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models import MODELS, as_model, count_parameters, make_model
from bdjax.models.layers import EXACT_LOWERINGS
from bdjax.testing import models as contract
from tests.shallow import distinct, shallow
from tests.tiers import slow_unless

LOWERINGS = EXACT_LOWERINGS
SMALLEST = ("resnet10", "resnet_s", "vgg_s", "mobilenet_v2_s", "lenet", "wrn_10_2", "vbd_4_4p", "pyramidnet_11_24")
SMALLEST += ("speedrun",)
NEW_FAMILIES = SMALLEST[2:]  # test_resnet.py compares ResNets with PyTorch's, in every lowering
RUN = (*SMALLEST, "resnet50")
AT_EVERY_SIZE = (*SMALLEST, "vbd_64p", "resnet18_cifar")
SLOW_TO_TRACE = ("resnet101", "resnet50", "resnet50_imagenet", "pyramidnet_110_84", "pyramidnet_200_240")
TAPS = dict.fromkeys(MODELS, 3) | {
    **dict.fromkeys(("resnet18_cifar", "resnet34_cifar", "resnet_s1", "resnet_s", "resnet_s2"), 4),
    **dict.fromkeys(("preact_resnet18", "preact_resnet18_final_norm"), 4),
    **dict.fromkeys(("resnet50_cifar", "resnet18_imagenet", "resnet34_imagenet", "resnet50_imagenet"), 4),
    **dict.fromkeys(("vgg11", "vgg16", "vgg19", "vgg_s"), 5),
    **dict.fromkeys(("vbd_64p", "vbd_16p"), 2),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v2_relu"), 8),
    "speedrun": 4,
}
SHAPE, K = (8, 8, 1), 3
IMAGES = contract.images_of(SHAPE)


@cache
def network(name):
    """Cut short, unless it is one of the smallest."""
    made = make_model(name, K, 2, "native")
    return made if name in SMALLEST else as_model(shallow(name, K, 2), K, made.description)


@cache
def variables_of(name, seed=0, width=2):
    model = network(name) if width == 2 else make_model(name, K, width, "native")
    return contract.variables_of(model, SHAPE, seed)


def run_members(name):
    return contract.run_members(network(name))


def names_of(name):
    return [f"stage{number + 1}" for number in range(TAPS[name])]


@cache
def variable_shapes(name, image, width=64, classes=10):
    """The shapes of a network's variables; nothing is computed. The native lowering takes the least time to trace."""
    return jax.eval_shape(lambda key: make_model(name, classes, width, "native").init(key, image), jax.random.key(0))


def shapes(model, image, *, train=False, rows=5):
    """The shapes of a network's variables and of an output; nothing is computed."""
    variables = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    images = jax.ShapeDtypeStruct((rows, *image), jnp.float32)
    return variables, jax.eval_shape(
        lambda variables, images: model.apply(variables, images, train=train), variables, images
    )


def count_with(name, image, classes, width=64):
    """The number of parameters with so many classes: only the last layer depends on them."""
    params = variable_shapes(name, image, width)["params"]
    inputs = params["classifier"]["kernel"].shape[0]
    return sum(leaf.size for leaf in jax.tree.leaves(params)) + (classes - 10) * (inputs + 1)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ten_classes", "forty_three"),
    [
        ("resnet18_cifar", 11_173_962, 11_190_891),
        ("resnet34_cifar", 21_282_122, 21_299_051),
        ("resnet_s1", 2_606, 2_672),
        ("resnet_s", 3_658, 3_823),
        ("resnet_s2", 4_903_242, 4_920_171),
        ("vgg11", 9_231_114, None),
        ("vgg16", 14_728_266, None),
        ("vgg19", 20_040_522, None),
        ("vgg_s", 181_434, 198_363),
        ("mobilenet_v2", 2_296_922, None),
        ("resnet50_cifar", 23_520_842, None),
        ("mobilenet_v2_s", 942, None),
        ("lenet", 62_006, None),
        ("wrn_10_2", 303_706, 307_963),
        ("wrn_16_1", 175_066, 177_211),
        ("wrn_16_2", 691_674, 695_931),
        ("wrn_16_4", 2_748_890, 2_757_371),
        ("wrn_28_2", 1_467_610, 1_471_867),
        ("wrn_28_4", 5_849_050, 5_857_531),
        ("wrn_40_1", 563_930, 566_075),
        ("wrn_40_2", 2_243_546, 2_247_803),
        ("preact_resnet18", 11_171_146, 11_188_075),
        ("preact_resnet18_final_norm", 11_172_170, None),
        ("resnet56", 855_770, 857_915),
        ("pyramidnet_20_12", 84_765, 85_722),
        ("pyramidnet_11_24", 54_202, 59_515),
        ("speedrun", 1_972_504, None),  # as published, less the 288 of the fixed whitening kernel
    ],
)
def test_parameters_at_32x32x3(name, ten_classes, forty_three):
    # VGG-11, -16 and MobileNetV2 have as many parameters as the usual ports to CIFAR-10.
    assert count_with(name, (32, 32, 3), 10) == ten_classes
    if forty_three:
        assert count_with(name, (32, 32, 3), 43) == forty_three


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18_imagenet", 11_689_512), ("resnet34_imagenet", 21_797_672), ("resnet50_imagenet", 25_557_032)],
)
def test_parameters_of_torchvisions_networks(name, parameters):
    assert count_with(name, (224, 224, 3), 1000) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet_s", 3_823), ("vgg_s", 198_363), ("wrn_10_2", 307_963)])
def test_only_the_last_layer_depends_on_the_number_of_classes(name, parameters):
    assert count_parameters(make_model(name, 43), (32, 32, 3)) == count_with(name, (32, 32, 3), 43) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wrn_16_2", 703_284),
        ("wrn_16_4", 2_772_020),
        ("wrn_28_2", 1_479_220),
        ("wrn_28_4", 5_872_180),
        ("resnet56", 861_620),
        pytest.param("pyramidnet_110_84", 3_913_536, marks=pytest.mark.slow),
    ],
)
def test_parameters_of_teachers_and_students_of_a_hundred_classes(name, parameters):
    # Printed in papers on distillation: 0.70M, 2.77M, 1.47M, 5.87M, 0.86M, 3.91M. The deepest network with bottlenecks,
    # pyramidnet_200_240, takes 11 s to trace; pyramidnet_11_24 above is made by the same code.
    assert count_with(name, (32, 32, 3), 100) == parameters


def counts_on_the_page():
    """Name -> parameters, as the table of networks in docs/data_and_models.md has them."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "data_and_models.md"
    section = page.read_text("utf-8").split("\n## Networks\n")[1].split("\n## ")[0]
    counts = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, numbers = (line.split("|")[column] for column in (1, 2))
            names, numbers = re.findall(r"`(\w+)`", names), [int(text.replace(",", "")) for text in numbers.split(";")]
            counts |= zip(names, numbers if len(numbers) > 1 else numbers * len(names), strict=True)
    return counts


@pytest.mark.parametrize("name", slow_unless(MODELS, [name for name in MODELS if name not in SLOW_TO_TRACE]))
def test_parameters_on_the_page(name):
    assert counts_on_the_page()[name] == count_with(name, (32, 32, 3), 10)


def test_other_images_and_other_numbers_of_classes():
    count = {
        (name, classes, shape): count_parameters(make_model(name, classes), shape)
        for name, classes, shape in [
            ("resnet18_cifar", 100, (32, 32, 3)),
            ("preact_resnet18", 200, (64, 64, 3)),
            ("wrn_16_2", 10, (28, 28, 1)),
            ("lenet", 10, (28, 28, 1)),
            ("lenet", 10, (8, 8, 1)),
        ]
    }
    dense = 64 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10  # LeNet of 2x2 pixels of 16 channels
    assert list(count.values()) == [11_220_132, 11_268_616, 691_674 - 288, 61_706, 6 * 26 + 16 * 151 + dense]


def test_capacities_are_in_the_order_of_the_papers():
    names = ("resnet_s1", "resnet_s", "resnet_s2", "resnet18_cifar")
    for width in (64, 8):
        counts = [count_with(name, (32, 32, 3), 10, width) for name in names]
        assert counts == sorted(set(counts)), width


def test_what_makes_a_network_small_does_not_grow_with_the_width():
    def channels(name, width):
        images = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
        init = partial(shallow(name, 10, width).init_with_output, train=False)
        (_, recorded), _ = jax.eval_shape(init, jax.random.key(0), images)
        return [recorded.features[tap].shape[3] for tap in names_of(name)]

    width = 128
    assert channels("resnet_s1", width) == [1, 1, 1, 1]
    assert channels("resnet_s", width) == [2, 2, 2, 4]
    assert channels("vgg_s", width) == [4, 8, 16, 32, 8 * width]
    assert channels("mobilenet_v2_s", width) == [8, 8, 16]
    assert channels("lenet", width) == [6, 16, 84]
    assert channels("resnet_s2", width) == [width, 2 * width, 4 * width, 8 * width]
    assert channels("vgg11", width) == [width, 2 * width, 4 * width, 8 * width, 8 * width]
    assert channels("wrn_10_2", width) == [width // 2, width, 2 * width]
    assert channels("preact_resnet18", width) == [width, 2 * width, 4 * width, 8 * width]
    assert channels("mobilenet_v2", 32) == [8, 12, 16, 32, 48, 80, 160, 640]
    assert channels("wrn_16_1", 1) == [1, 1, 1]
    assert channels("resnet56", width) == [32, 64, 128]
    assert channels("pyramidnet_20_12", width) == [40, 48, 56]
    assert channels("pyramidnet_11_24", 16) == [4 * 6, 4 * 8, 4 * 10]
    assert channels("pyramidnet_11_24", 1) == [4, 4, 4]


LARGE = [name for name in MODELS if name not in (*AT_EVERY_SIZE, "mobilenet_v2", "mobilenet_v2_relu")]


@pytest.mark.parametrize("name", slow_unless([*AT_EVERY_SIZE, *distinct(LARGE, 10, 2)], AT_EVERY_SIZE))
def test_shapes_at_the_sizes_of_digits_mnist_and_cifar(name):
    sides = {
        "resnet_imagenet": {28: (7, 4, 2, 1)},
        "resnet": {8: (8, 4, 2, 1), 28: (28, 14, 7, 4), 32: (32, 16, 8, 4)},
        "preact": {8: (8, 4, 2, 1), 28: (28, 14, 7, 4), 32: (32, 16, 8, 4)},
        "wrn": {8: (8, 4, 2), 28: (28, 14, 7), 32: (32, 16, 8)},
        "vgg": {8: (4, 2, 1, 1, 1), 28: (14, 7, 3, 1, 1), 32: (16, 8, 4, 2, 1)},
        "mobilenet": {8: (8, 2, 2), 28: (28, 7, 7), 32: (32, 8, 8)},
        "pyramidnet": {8: (8, 4, 2), 28: (28, 14, 7), 32: (32, 16, 8)},
        "lenet": {8: (4, 2, 1), 28: (14, 5, 1), 32: (14, 5, 1)},
        "speedrun": {8: (3, 1, 1, 1), 28: (13, 6, 3, 1), 32: (15, 7, 3, 1)},
        "vbd": {8: (3, 1), 28: (13, 1), 32: (15, 1)}
        if TAPS[name] == 2
        else {8: (6, 2, 1), 28: (26, 12, 1), 32: (30, 14, 1)},
    }["resnet_imagenet" if name.endswith("_imagenet") else name.split("_")[0].rstrip("0123456789")]
    model = as_model(shallow(name, 10, 2), 10, name)
    for image in ((8, 8, 1), (28, 28, 1), (32, 32, 3)) if name in AT_EVERY_SIZE else ((28, 28, 1),):
        variables, output = shapes(model, image, train=image[0] != 28)
        assert set(variables) == {"params", "batch_stats"}
        assert output.logits.shape == (5, 10)
        assert list(output.features) == names_of(name)
        expected = [(5, side, side) for side in sides[image[0]][: TAPS[name]]]
        assert [tap.shape[:3] for tap in output.features.values()] == expected
        chex.assert_trees_all_equal_shapes_and_dtypes(output.variables, variables)


def test_images_of_tiny_imagenet():
    _, output = shapes(make_model("preact_resnet18", 10, 2, "native"), (64, 64, 3), train=True)
    assert [tap.shape[1:3] for tap in output.features.values()] == [(side, side) for side in (64, 32, 16, 8)]


# ---- What the rest relies on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_the_classes_and_the_name_that_were_asked_for(name):
    model = make_model(name, K, 2, "native")
    assert (model.num_classes, model.description) == (K, f"{name} width 2")


@pytest.mark.parametrize("name", slow_unless(RUN, SMALLEST))
def test_the_smallest_network_of_each_family(name):
    """And one with the bottleneck blocks of the deepest ResNets."""
    model = network(name)
    members = [variables_of(name, seed) for seed in range(2)]
    contract.check_members(f"model {name}", model, members, IMAGES)
    seen = jax.eval_shape(lambda variables: model.apply(variables, IMAGES, train=False).features, members[0])
    assert list(seen) == names_of(name)

    if name == "vbd_4_4p":  # members one after another, not compiled, nothing edited
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        ones = {tap: jnp.float32(1.0) for tap in names_of(name)}
        logits, features, _ = run_members(name)(stacked, IMAGES, ones)
        for i, member in enumerate(members):
            output = model.apply(member, IMAGES, train=False)
            chex.assert_trees_all_close(
                (output.logits, output.features), (logits[i], jax.tree.map(lambda each, i=i: each[i], features)),
                rtol=1e-3, atol=1e-4,
            )  # fmt: skip


@pytest.mark.parametrize("name", slow_unless(distinct([name for name in MODELS if name not in RUN], K, 2), ()))
def test_edits_of_a_deeper_network_are_those_of_its_taps(name):
    """Traced, not run: its blocks are those of a network above."""
    model = network(name)
    variables = jax.eval_shape(lambda key: model.init(key, SHAPE), jax.random.key(0))
    edited = []

    def note(tap, features):
        edited.append((tap, features.shape))
        return features

    edits = {tap: partial(note, tap) for tap in names_of(name)}
    output = jax.eval_shape(lambda variables: model.apply(variables, IMAGES, train=False, edits=edits), variables)
    assert edited == [(tap, features.shape) for tap, features in output.features.items()]
    assert output.logits.shape == (3, K) and output.logits.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(output.variables, variables)
    *_, last = output.features.values()
    assert variables["params"]["classifier"]["kernel"].shape == (last.shape[3], K)


@pytest.mark.slow
def test_only_the_preact_resnet_of_the_paper_normalises_after_its_last_block():
    ones = {tap: jnp.float32(1.0) for tap in names_of("preact_resnet18")}
    plain, final = variables_of("preact_resnet18"), variables_of("preact_resnet18_final_norm")
    assert final["params"].keys() - plain["params"].keys() == {"last_norm"}
    neutral = {"params": {"last_norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}}
    neutral["batch_stats"] = {"last_norm": {"mean": jnp.zeros(16), "variance": jnp.ones(16) - 1e-5}}
    final = {kind: {**plain[kind], **neutral[kind]} for kind in neutral}
    (_, before, _), (_, after, _) = (
        run_members(name)(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables), IMAGES, ones)
        for name, variables in (("preact_resnet18", plain), ("preact_resnet18_final_norm", final))
    )
    assert before["stage4"].min() < -0.1
    np.testing.assert_allclose(after["stage4"], np.maximum(before["stage4"], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["stage3"], before["stage3"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet", "wrn_10_2"])  # without and with groups
def test_an_edit_of_an_unknown_tap_is_an_error(name):
    model = make_model(name, K, 2)
    with pytest.raises(
        ValueError,
        match=rf"no tap stage9; this network has {', '.join(names_of(name))}(; and groups group1, .*)?(\n|$)",
    ):
        jax.eval_shape(
            lambda variables: model.apply(variables, IMAGES, train=False, edits={"stage9": lambda x: x}),
            variables_of(name),
        )


@pytest.mark.parametrize("name", slow_unless(NEW_FAMILIES, ("lenet",)))
def test_all_lowerings_are_the_same_network(name):
    """With gradients where there are convolutions that no ResNet has: of any size, without padding, and depthwise (whose
    lowerings differ in the order of the axes alone)."""

    def run(lowering):
        model = make_model(name, K, 4, lowering)
        has_gradient = name in ("lenet", "vbd_4_4p") or (name == "mobilenet_v2_s" and lowering != "patches")

        @jax.jit
        def trained(variables):
            def loss(params):
                output = model.apply({**variables, "params": params}, IMAGES, train=True)
                return jnp.sum(jnp.square(output.logits)), output

            if not has_gradient:
                return loss(variables["params"])[1], {}
            (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            return output, gradient

        return trained(variables_of(name, width=4))

    (output, gradient), *others = (run(lowering) for lowering in LOWERINGS)
    before = variables_of(name, width=4)
    chex.assert_trees_all_equal(output.variables["params"], before["params"])
    for new, old in zip(
        jax.tree.leaves(output.variables["batch_stats"]), jax.tree.leaves(before["batch_stats"]), strict=True
    ):
        assert np.all(new != old) or name == "speedrun"  # whose whitening is constant
    assert bool(before["batch_stats"]) == (name != "lenet")
    for other, other_gradient in others:
        chex.assert_trees_all_close(other, output, rtol=1e-3, atol=1e-3)
        # Statistics of a batch of few pixels magnify rounding.
        scale = max((float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)), default=0.0)
        if other_gradient:
            chex.assert_trees_all_close(other_gradient, gradient, rtol=1e-2, atol=2e-4 * scale)


@pytest.mark.parametrize(("name", "lowering"), list(zip(SMALLEST, itertools.cycle(LOWERINGS), strict=False)))
def test_only_activations_are_bfloat16(name, lowering):
    model = make_model(name, K, 2, lowering, "bfloat16")
    program, output = jax.make_jaxpr(lambda variables: model.apply(variables, IMAGES, train=True), return_shape=True)(
        variables_of(name)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    assert ":bf16[3," in str(program)


@pytest.mark.parametrize("name", ["resnet_s", "lenet"])
def test_logits_in_bfloat16_are_near_the_exact_ones(name):
    run = jax.jit(lambda v: make_model(name, K, 2, "native", "bfloat16").apply(v, IMAGES, train=False).logits)
    stacked = jax.tree.map(lambda leaf: leaf[None], variables_of(name))
    exact, *_ = run_members(name)(stacked, IMAGES, {tap: jnp.float32(1.0) for tap in names_of(name)})
    rounded = run(variables_of(name))
    assert np.any(rounded != exact[0])
    np.testing.assert_allclose(rounded, exact[0], atol=0.05 * np.abs(exact).max())
