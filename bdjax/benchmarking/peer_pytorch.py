"""The networks of `bdjax/models/resnet.py` and `speedrun.py` in PyTorch, trained as usual: one model after another.

PyTorch is an optional extra for this benchmark (`pip install -e '.[bench]'`), so this file is imported only in the processes of
these contenders. It imports nothing from JAX, whose memory would count as PyTorch's.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

FORMS = ("contiguous", "channels-last", "compiled", "compiled-graphs")
"""The last two are also channels-last; graphs are CUDA graphs."""
TRIANGLE = (0.2, 0.23, 0.07)
"""As `TrainConfig.triangle`."""
STARTED_ON, EVALUATED_AT_ONCE = 2000, 500
"""Images that the whitening is computed from, and test images in a batch."""


class Block(nn.Module):
    """A basic or a bottleneck block; layers have the same names as in our networks."""

    def __init__(self, kind: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = (
            [(channels, width, 3, stride), (width, width, 3, 1)]
            if kind == "basic"
            else [(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        )
        self.features = shapes[-1][1]
        self.convs = nn.ModuleList(_convolution(*shape) for shape in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        self.has_shortcut = stride != 1 or channels != self.features
        if self.has_shortcut:
            self.shortcut_conv = _convolution(channels, self.features, 1, stride)
            self.shortcut_norm = nn.BatchNorm2d(self.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if index < last:
                y = functional.relu(y, inplace=True)
        shortcut = self.shortcut_norm(self.shortcut_conv(x)) if self.has_shortcut else x
        return functional.relu(y + shortcut, inplace=True)


class ResNet(nn.Module):
    """float [N, C, H, W] in [0, 1] -> logits [N, K]."""

    def __init__(self, kind: str, blocks: tuple[int, ...], width: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem_conv = _convolution(channels, width, 3, 1)
        self.stem_norm = nn.BatchNorm2d(width)
        features = width
        stages = []
        for stage, count in enumerate(blocks):
            for index in range(count):
                stages.append(Block(kind, features, width * 2**stage, 2 if stage > 0 and index == 0 else 1))
                features = stages[-1].features
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem_norm(self.stem_conv(x)), inplace=True)
        return self.classifier(self.blocks(x).mean((2, 3)))


class SpeedrunNet(nn.Module):
    """float [N, C, H, W] in [0, 1] -> logits [N, K]; the whitening is fixed, and so are the scales of normalisations."""

    def __init__(self, channels: tuple[int, ...], num_classes: int, colors: int) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(colors, 8 * colors, 2)
        self.whitening.weight.requires_grad = False
        features, layers = 8 * colors, []
        for count in channels:
            layers += [_convolution(features, count, 3, 1), nn.MaxPool2d(2), _fixed_norm(count), nn.GELU()]
            layers += [_convolution(count, count, 3, 1), _fixed_norm(count), nn.GELU()]
            features = count
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(features, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(functional.gelu(self.whitening(x))).amax((2, 3)) / 9)

    @torch.no_grad()
    def start(self, images: torch.Tensor) -> None:
        """The start of `bdjax/models/speedrun.py`: whiten patches of these images, float [N, C, H, W]; pass on inputs."""
        mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0) + 1e-4
        standard = (images - mean[:, None, None]) / deviation[:, None, None]
        patches = functional.unfold(standard, 2).transpose(1, 2).flatten(0, 1)  # ordered by channel, row, column
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, len(mean), 2, 2)
        kernel = torch.cat([filters, -filters]) / deviation[:, None, None]
        self.whitening.weight.copy_(kernel)
        self.whitening.bias.copy_(-(kernel * mean[:, None, None]).sum((1, 2, 3)))
        for layer in self.blocks:
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight[: layer.in_channels])


def _fixed_norm(features: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(features, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad = False
    return norm


def _convolution(channels: int, features: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, features, size, stride, size // 2, bias=False)


def find_device(threads: int) -> torch.device:
    """The GPU if there is one, with its fastest settings; otherwise the CPU with this number of threads."""
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, JAX's own default
        return torch.device("cuda")
    torch.set_num_threads(threads)
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Training:
    """Epochs of one model, on uint8 images that stay on the device.

    The optimiser is fused, PyTorch's fastest version. Only the training step is computed: no running loss, no accuracy. On
    images that mean nothing the rate is constant, which changes no time. If the specification names "data", the network starts
    like ours, and its schedule and augmentation are those of the recipe.
    """

    def __init__(self, spec: Mapping[str, Any], images: Any, labels: Any) -> None:
        """Take a worker's specification (`settings.describe`), images uint8 [n, H, W, C] and labels int32 [n]."""
        form = spec["form"]
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
        self.device = find_device(spec["threads"])
        if form == "compiled-graphs" and self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        torch.manual_seed(spec.get("seed", 0))
        self.batch_size = spec["batch_size"]
        # Channels-last rows are gathered as NHWC and permuted at no cost: an NCHW view of them is channels-last.
        self.is_channels_last = form != "contiguous"
        pool = torch.from_numpy(images)
        self.pool = (pool if self.is_channels_last else pool.permute(0, 3, 1, 2).contiguous()).to(self.device)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        colors = images.shape[3]
        if spec["kind"] == "speedrun":
            network = SpeedrunNet(spec["blocks"], spec["num_classes"], colors)
            if spec.get("data"):
                network.start(torch.from_numpy(images[:STARTED_ON]).permute(0, 3, 1, 2).float().div(255.0))
        else:
            network = ResNet(spec["kind"], spec["blocks"], spec["width"], spec["num_classes"], colors)
        network = network.to(
            self.device, memory_format=torch.channels_last if self.is_channels_last else torch.contiguous_format
        )
        self.network = network.train()
        self.smoothing = spec["recipe"].get("label_smoothing", 0.0)
        self.optimiser = _optimiser(network, spec["recipe"], spec["learning_rate"])
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.is_learning, self.augmentation = bool(spec.get("data")), spec.get("augmentation", "none")
        self.steps, self.total_steps = 0, spec.get("epochs", 1) * -(-len(labels) // self.batch_size)
        is_half = spec["compute_dtype"] == "bfloat16"
        self.precision = (lambda: torch.autocast(self.device.type, torch.bfloat16)) if is_half else nullcontext
        self.loss = self._loss
        if form.startswith("compiled"):
            self.loss = torch.compile(self._loss, mode="reduce-overhead" if form == "compiled-graphs" else None)

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.is_channels_last:
            images = images.permute(0, 3, 1, 2)
        with self.precision():
            logits = self.network(images.float().div(255.0))
        return functional.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)

    def step(self, rows: torch.Tensor) -> None:
        """One step of the optimiser on these rows of the pool, int64 [B]."""
        images = self.pool[rows]
        if self.is_learning:
            images = _augmented(images, self.augmentation, self.is_channels_last)
            share = _triangle(self.steps / self.total_steps)
            for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
        self.steps += 1
        loss = self.loss(images, self.labels[rows])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def compile(self) -> float:
        """Compile time: the seconds by which the first step is slower than a later step; nothing if these steps count."""
        if self.is_learning:
            return 0.0
        rows = torch.arange(self.batch_size, device=self.device)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.step(rows)
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return max(0.0, seconds[0] - seconds[-1])

    def epoch(self) -> int:
        """Train on every row once, in a new order, and return the number of images."""
        order = torch.randperm(len(self.labels), device=self.device)
        for rows in order.split(self.batch_size):
            self.step(rows)
        synchronize(self.device)
        return len(self.labels)

    @torch.no_grad()
    def predict(self, images: Any) -> Any:
        """The most likely class of each image, int [1, n], from uint8 [n, H, W, C]."""
        self.network.eval()
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(EVALUATED_AT_ONCE)
        predicted = [self.network(batch.to(self.device).float().div(255.0)).argmax(1).cpu() for batch in batches]
        self.network.train()
        return torch.cat(predicted).numpy()[None]

    def peak_bytes(self) -> int | None:
        """Peak memory on a GPU; None on a CPU, where the memory of the process is measured instead."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def _triangle(progress: float) -> float:
    """The schedule "triangle" of `bdjax/training/member.py`: a share of the peak rate."""
    first, peak, last = TRIANGLE
    if progress < peak:
        return first + (1 - first) * progress / peak
    return 1 - (1 - last) * (progress - peak) / (1 - peak)


def _augmented(images: torch.Tensor, kind: str, is_channels_last: bool) -> torch.Tensor:
    """The augmentations "reflect" and "reflect_flip": uint8 [N, H, W, C], or [N, C, H, W] if not channels-last."""
    images = images if is_channels_last else images.permute(0, 2, 3, 1)
    count, height, width, _ = images.shape
    device, margin = images.device, max(1, height // 16)
    rows, columns = (
        torch.randint(-margin, margin + 1, (count, 1), device=device) + torch.arange(length, device=device)
        for length in (height, width)
    )
    if kind.endswith("flip"):
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    rows, columns = (
        last - (last - place.abs()).abs() for place, last in ((rows, height - 1), (columns, width - 1))
    )  # mirrored at the border, without repeating it
    images = images[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images if is_channels_last else images.permute(0, 3, 1, 2).contiguous()


def _optimiser(network: nn.Module, recipe: Mapping[str, Any], learning_rate: float) -> torch.optim.Optimizer:
    """Adam, or the SGD of a recipe (`bdjax.training.recipes`)."""
    if not recipe["recipe"]:
        return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = [norm.bias for norm in norms]
    others = [p for p in network.parameters() if p.requires_grad and all(p is not bias for bias in biases)]
    groups = [
        {"params": params, "lr": rate, "weight_decay": recipe["weight_decay"] / rate}
        for params, rate in (
            (others, recipe["learning_rate"]),
            (biases, recipe["learning_rate"] * recipe["norm_bias_rate"]),
        )
    ]
    return torch.optim.SGD(groups, momentum=recipe["momentum"], nesterov=recipe["nesterov"], fused=True)


class Matmul:
    """A large square matrix product, which measures the peak rate of the machine."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.device = find_device(spec["threads"])
        self.size = spec["size_on_gpu"] if self.device.type == "cuda" else spec["size"]
        dtype = getattr(torch, spec["compute_dtype"])
        self.matrix = torch.randn(self.size, self.size, device=self.device).to(dtype)

    def compile(self) -> float:
        """Multiply once to load the libraries; nothing is compiled."""
        self.epoch()
        return 0.0

    def epoch(self) -> int:
        """Multiply once and return the floating-point operations."""
        torch.mm(self.matrix, self.matrix)
        synchronize(self.device)
        return 2 * self.size**3

    def peak_bytes(self) -> int | None:
        """Not measured."""
        return None
