"""Names of torch's tensors. The reference network is computed by NumPy, from tensors under torchvision's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.exchange import naming, safetensors_files, weights

SHAPE, CLASSES, WIDTH = (9, 9, 3), 3, 2


def convolve(x, kernel, stride, padding):
    """x [N, C, H, W], kernel [O, C, k, k], as torch does it."""
    size = kernel.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    rows, columns = ((side - size) // stride + 1 for side in x.shape[2:])
    y = np.zeros((len(x), len(kernel), rows, columns))
    for i in range(size):
        for j in range(size):
            taken = x[:, :, i : i + rows * stride : stride, j : j + columns * stride : stride]
            y += np.einsum("nchw,oc->nohw", taken[:, :, :rows, :columns], kernel[:, :, i, j])
    return y


def reference(tensors, images):
    """A ResNet of four stages of one basic block, with the CIFAR stem."""

    def layer(x, conv, norm, stride, padding):
        y = convolve(x, tensors[f"{conv}.weight"], stride, padding)
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-5)
        offset = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        return y * scale[:, None, None] + offset[:, None, None]

    x = np.maximum(layer(images.transpose(0, 3, 1, 2), "conv1", "bn1", 1, 1), 0)
    for stage in range(1, 5):
        block, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        y = np.maximum(layer(x, f"{block}.conv1", f"{block}.bn1", stride, 1), 0)
        y = layer(y, f"{block}.conv2", f"{block}.bn2", 1, 1)
        x = x if stage == 1 else layer(x, f"{block}.downsample.0", f"{block}.downsample.1", stride, 0)
        x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ tensors["fc.weight"].T + tensors["fc.bias"]


@pytest.fixture(scope="module")
def tensors():
    """A small network under torchvision's names, with DataParallel's prefix left out."""
    rng, shapes = np.random.default_rng(0), {"conv1": (WIDTH, 3, 3, 3), "bn1": WIDTH}
    inputs = WIDTH
    for stage in range(1, 5):
        outputs, block = WIDTH * 2 ** (stage - 1), f"layer{stage}.0"
        shapes |= {f"{block}.conv1": (outputs, inputs, 3, 3), f"{block}.bn1": outputs}
        shapes |= {f"{block}.conv2": (outputs, outputs, 3, 3), f"{block}.bn2": outputs}
        if stage > 1:
            shapes |= {f"{block}.downsample.0": (outputs, inputs, 1, 1), f"{block}.downsample.1": outputs}
        inputs = outputs
    found = {"fc.weight": rng.normal(size=(CLASSES, inputs)), "fc.bias": rng.normal(size=CLASSES)}
    for name, shape in shapes.items():
        if isinstance(shape, int):
            found |= {f"{name}.{part}": rng.normal(size=shape) for part in ("bias", "running_mean")}
            found |= {f"{name}.{part}": rng.random(shape) + 0.5 for part in ("weight", "running_var")}
        else:
            found[f"{name}.weight"] = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
    return {name: values.astype(np.float32) for name, values in found.items()}


def read(path, tensors, architecture="resnet_s2", **options):
    safetensors_files.write(path / "a.safetensors", tensors)
    return weights.read(path / "a.safetensors", architecture, CLASSES, SHAPE, lowering="native", **options)


def test_logits_are_those_of_the_network_that_the_names_describe(tmp_path, tensors):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    renamed = {f"module.{name}": values for name, values in tensors.items()}
    found = read(tmp_path, renamed, normalisation=(mean, std))
    assert found.model.architecture == ("resnet_s2", WIDTH, mean, std) and found.naming == "torchvision"
    images = np.random.default_rng(1).random((5, *SHAPE)).astype(np.float32)
    expected = reference(tensors, (images - np.float32(mean)) / np.float32(std))
    variables = jax.tree.map(lambda leaf: leaf[0], found.variables)
    logits = jax.jit(lambda x: found.model.apply(variables, x, train=False).logits)(jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))


def test_the_first_three_tensors_that_do_not_fit_are_named_with_their_shapes(tmp_path, tensors):
    changed = {name: values for name, values in tensors.items() if name != "bn1.bias"} | {
        "extra": np.zeros(1, np.float32)
    }
    changed["layer1.0.conv1.weight"] = np.zeros((WIDTH, WIDTH, 5, 5), np.float32)
    with pytest.raises(InputError) as error:
        read(tmp_path, changed)
    message = str(error.value)
    assert "'bn1.bias' is absent, should be [2]" in message and "'extra' is [1], should be absent" in message
    assert "'layer1.0.conv1.weight' is [2, 2, 5, 5], should be [2, 2, 3, 3]" in message and "more" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"naming": "torch"},
            "naming 'torch' is not known for resnet_s2; its tensors may be named as by torchvision, timm",
        ),
        ({"naming": "kuangliu"}, "'linear.weight' is absent"),
        ({"normalisation": "imagenette"}, "normalisation 'imagenette' is not one of none, imagenet"),
        ({"normalisation": "0.5,0.5/0.2,0.2"}, "2 means and 2 deviations; images have 3 channels"),
        ({"normalisation": "0.5/0"}, "std positive"),
        ({"normalisation": "nan/1"}, "must be finite"),
        ({"architecture": "resnet99"}, "unknown architecture 'resnet99'"),
        ({"architecture": "resnet18_cifar"}, "'layer1.1.bn1.bias' is absent"),
        ({"architecture": "lenet"}, "should hold lenet as named by flax"),
    ],
)
def test_what_cannot_be_read(tmp_path, tensors, options, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, tensors, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_numbers_of_classes_and_negative_variances(tmp_path, tensors):
    safetensors_files.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError, match="the network has 3 classes; the data has 1000"):
        weights.read(tmp_path / "a.safetensors", "resnet_s2", 1000, SHAPE)
    assert weights.read(tmp_path / "a.safetensors", "resnet_s2", None, SHAPE).model.num_classes == CLASSES
    with pytest.raises(InputError, match=r"bn1\.running_var has negative variances"):
        read(tmp_path, tensors | {"bn1.running_var": np.float32([-1, 1])})


def test_a_network_with_another_stem_is_recognised(tmp_path):
    shapes = {f"layer{s}.{b}.conv1.weight": (2, 2, 3, 3) for s in range(1, 5) for b in range(2)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in {**shapes, "conv1.weight": (2, 3, 7, 7)}.items()}
    with pytest.raises(InputError, match="; it looks like resnet18_imagenet$"):
        read(tmp_path, tensors, "resnet18_cifar")


@pytest.mark.parametrize(
    ("architecture", "table", "paths"),
    [
        ("preact_resnet18", "kuangliu", {"stage2_block1/shortcut_conv/kernel": "layer2.0.shortcut.0.weight"}),
        ("preact_resnet18", "kuangliu", {"stage1_block2/BatchNorm_1/scale": "layer1.1.bn2.weight"}),
        ("wrn_16_2", "kuangliu", {"stage3_block2/Conv_1/kernel": "block3.layer.1.conv2.weight"}),
        ("wrn_16_2", "kuangliu", {"stage1_block1/shortcut_conv/kernel": "block1.layer.0.convShortcut.weight"}),
        ("resnet50_cifar", "timm", {"stage1_block1/shortcut_norm/bias": "layer1.0.downsample.1.bias"}),
        ("vgg16", "kuangliu", {f"stage{s}_conv1/bias": f"features.{n}.bias" for s, n in ((1, 0), (2, 7), (3, 14))}),
        ("vgg16", "kuangliu", {"stage1_norm2/scale": "features.4.weight", "stage2_norm1/scale": "features.8.weight"}),
        (
            "mobilenet_v2_relu",
            "kuangliu",
            {"stage1_block1/filter_conv/kernel": "layers.0.conv2.weight"}
            | {"stage2_block1/shortcut_norm/scale": "layers.1.shortcut.1.weight"}
            | {"stage2_block2/project_norm/scale": "layers.2.bn3.weight"},
        ),
    ],
)
def test_names(architecture, table, paths):
    # The numbers of blocks and convolutions depend on all of them, so that others' paths are given as well.
    others = {
        "vgg16": [f"stage{s}_{kind}{i}/bias" for s in (1, 2) for i in (1, 2) for kind in ("conv", "norm")],
        "mobilenet_v2_relu": ["stage1_block1/expand_conv/kernel"],
    }
    shapes = {f"params/{path}": (1,) for path in [*paths, *others.get(architecture, [])]}
    found = naming.sources(architecture, table, shapes)
    assert {path: found[f"params/{path}"].name for path in paths} == paths


def test_shapes_there_and_back():
    assert naming.their_shape((3, 3, 4, 5), naming.Source("", (2, 3, 1, 0))) == (5, 4, 3, 3)
    assert naming.their_shape((4, 5), naming.Source("", (1, 0))) == (5, 4)
    assert np.transpose(np.zeros((5, 4, 3, 3)), (2, 3, 1, 0)).shape == (3, 3, 4, 5)
