"""Weights from torch give the logits that torch has. Needs torch, which is in the extra `bench`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.exchange import safetensors_files, weights

torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
nn = torch.nn
functional = torch.nn.functional

CLASSES, ROWS = 7, 8


def conv(inputs, outputs, size, stride=1, groups=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


class Block(nn.Module):
    """A basic or a bottleneck block, with the shortcut under torchvision's or kuangliu's name."""

    def __init__(self, inputs, width, stride, is_bottleneck, shortcut):
        super().__init__()
        outputs = 4 * width if is_bottleneck else width
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        shapes = shapes if is_bottleneck else [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.count, self.shortcut_name = len(shapes), shortcut
        for number, shape in enumerate(shapes, start=1):
            setattr(self, f"conv{number}", conv(*shape))
            setattr(self, f"bn{number}", nn.BatchNorm2d(shape[1]))
        layers = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
        setattr(self, shortcut, nn.Sequential(*(layers if stride > 1 or inputs != outputs else [])))

    def forward(self, x):
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = torch.relu(y) if number < self.count else y
        return torch.relu(y + getattr(self, self.shortcut_name)(x))


class PreActBlock(nn.Module):
    """With the shortcut under kuangliu's name, or under that of the usual wide ResNets."""

    def __init__(self, inputs, width, stride, is_wide):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.project = None
        if stride > 1 or inputs != width:
            layer = conv(inputs, width, 1, stride)
            name = "convShortcut" if is_wide else "shortcut"
            setattr(self, name, layer if is_wide else nn.Sequential(layer))
            self.project = name

    def forward(self, x):
        ready = torch.relu(self.bn1(x))
        y = self.conv2(torch.relu(self.bn2(self.conv1(ready))))
        return y + (getattr(self, self.project)(ready) if self.project else x)


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        width, self.stride = expansion * inputs, stride
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        projects = stride == 1 and inputs != outputs
        self.shortcut = nn.Sequential(*([conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)] if projects else []))

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


class Layers(nn.Module):
    """Named layers whose order is `run`."""

    def __init__(self, layers, run):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Group(nn.Module):
    """What the usual wide ResNets call block1, block2 and block3."""

    def __init__(self, blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


def pooled(x):
    return x.mean((2, 3))


def resnet(blocks, width, naming, is_bottleneck=False, has_imagenet_stem=False):
    shortcut, last = ("downsample", "fc") if naming != "kuangliu" else ("shortcut", "linear")
    inputs, layers = width, {"conv1": conv(3, width, *((7, 2) if has_imagenet_stem else (3, 1)))}
    layers["bn1"] = nn.BatchNorm2d(width)
    for stage, count in enumerate(blocks):
        made = []
        for index in range(count):
            wide, stride = width * 2**stage, 2 if stage and not index else 1
            made.append(Block(inputs, wide, stride, is_bottleneck, shortcut))
            inputs = 4 * wide if is_bottleneck else wide
        layers[f"layer{stage + 1}"] = nn.Sequential(*made)
    layers[last] = nn.Linear(inputs, CLASSES)

    def run(net, x):
        x = torch.relu(net.bn1(net.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if has_imagenet_stem else x
        for stage in range(len(blocks)):
            x = getattr(net, f"layer{stage + 1}")(x)
        return getattr(net, last)(pooled(x))

    return Layers(layers, run)


def preact(width):
    inputs, layers = width, {"conv1": conv(3, width, 3)}
    for stage in range(4):
        made = []
        for index in range(2):
            made.append(PreActBlock(inputs, width * 2**stage, 2 if stage and not index else 1, False))
            inputs = width * 2**stage
        layers[f"layer{stage + 1}"] = nn.Sequential(*made)
    layers["linear"] = nn.Linear(inputs, CLASSES)

    def run(net, x):
        return net.linear(pooled(net.layer4(net.layer3(net.layer2(net.layer1(net.conv1(x)))))))

    return Layers(layers, run)


def wide_resnet(depth, factor):
    inputs, layers = 16, {"conv1": conv(3, 16, 3)}
    for stage in range(3):
        made = []
        for index in range((depth - 4) // 6):
            width = 16 * factor * 2**stage
            made.append(PreActBlock(inputs, width, 2 if stage and not index else 1, True))
            inputs = width
        layers[f"block{stage + 1}"] = Group(made)
    layers |= {"bn1": nn.BatchNorm2d(inputs), "fc": nn.Linear(inputs, CLASSES)}

    def run(net, x):
        return net.fc(pooled(torch.relu(net.bn1(net.block3(net.block2(net.block1(net.conv1(x))))))))

    return Layers(layers, run)


def vgg(stages):
    layers, inputs = [], 3
    for channels in stages:
        for width in channels:
            layers += [conv(inputs, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    parts = {"features": nn.Sequential(*layers), "classifier": nn.Linear(inputs, CLASSES)}
    return Layers(parts, lambda net, x: net.classifier(net.features(x).flatten(1)))


def mobilenet_v2(width):
    def scaled(channels):
        return max(1, round(channels * width / 64))

    settings = [
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    inputs, blocks = scaled(32), []
    for expansion, outputs, count, stride in settings:
        for index in range(count):
            blocks.append(Inverted(inputs, scaled(outputs), expansion, stride if not index else 1))
            inputs = scaled(outputs)
    stem, last = scaled(32), scaled(1280)
    layers = {"conv1": conv(3, stem, 3), "bn1": nn.BatchNorm2d(stem), "layers": nn.Sequential(*blocks)}
    layers |= {"conv2": conv(inputs, last, 1), "bn2": nn.BatchNorm2d(last), "linear": nn.Linear(last, CLASSES)}

    def run(net, x):
        x = net.layers(torch.relu(net.bn1(net.conv1(x))))
        return net.linear(pooled(torch.relu(net.bn2(net.conv2(x)))))

    return Layers(layers, run)


def randomised(network):
    """Weights, statistics and biases that are nowhere neutral, in a network that is evaluated."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.bias.shape, generator=generator) + 0.5)
    return network.eval()


VGG16 = ((8, 8), (16, 16), (32,) * 3, (64,) * 3, (64,) * 3)
SHALLOW, DEEP = (2, 2, 2, 2), (3, 4, 6, 3)
CASES = [
    ("resnet18_cifar", "torchvision", 64, lambda: resnet(SHALLOW, 64, "timm")),
    ("resnet34_cifar", "kuangliu", 8, lambda: resnet(DEEP, 8, "kuangliu")),
    ("resnet50_imagenet", "torchvision", 8, lambda: resnet(DEEP, 8, "torchvision", True, True)),
    ("preact_resnet18", "kuangliu", 8, lambda: preact(8)),
    ("wrn_16_2", "kuangliu", 64, lambda: wide_resnet(16, 2)),
    ("vgg16", "kuangliu", 8, lambda: vgg(VGG16)),
    ("mobilenet_v2_relu", "kuangliu", 16, lambda: mobilenet_v2(16)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "naming", "width", "make"), CASES, ids=[case[0] for case in CASES])
def test_logits_are_torchs(architecture, naming, width, make, tmp_path):
    """Measured with 64 rows at width 64 for all tables of `naming`: at most 1.5e-6 of the logits' range."""
    torch.manual_seed(0)
    network = randomised(make())
    path = tmp_path / "network.safetensors"
    safetensors_files.write(path, {name: tensor.float().numpy() for name, tensor in network.state_dict().items()})
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    images = np.random.default_rng(0).random((ROWS, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        normalised = (images - np.float32(mean)) / np.float32(std)
        expected = network(torch.from_numpy(normalised).permute(0, 3, 1, 2)).numpy()
    found = weights.read(path, architecture, CLASSES, (32, 32, 3), None, (mean, std), lowering="native")
    assert found.naming == naming and found.model.architecture == (architecture, width, mean, std)
    variables = jax.tree.map(lambda leaf: leaf[0], found.variables)
    logits = np.asarray(found.model.apply(variables, jnp.asarray(images), train=False).logits)
    assert np.abs(logits - expected).max() <= 1e-5 * np.ptp(expected)
