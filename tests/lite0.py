"""EfficientNet-Lite0, defined here, with its trained weights; and a linear probe on CIFAR-10.

Source:  TensorFlow's EfficientNet-Lite: no squeeze-and-excitation, ReLU6, SAME padding, which is
         asymmetric at stride 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# repeats, kernel, stride, expansion, channels
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIDE = 128  # of CIFAR pictures, enlarged
PROBED = 3000  # training pictures that the probe is fitted on


class SameConv(nn.Conv2d):
    """A convolution that pads as TensorFlow's SAME: the odd pixel at the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        if s == 1:
            return F.conv2d(x, self.weight, None, s, (k - 1) // 2, 1, self.groups)
        across, down = (max((-(-n // s) - 1) * s + k - n, 0) for n in (x.shape[3], x.shape[2]))
        left, top = across // 2, down // 2
        if (left, top) == (across - left, down - top):
            return F.conv2d(x, self.weight, None, s, (top, left), 1, self.groups)
        x = F.pad(x, (left, across - left, top, down - top))
        return F.conv2d(x, self.weight, None, s, 0, 1, self.groups)


def unit(n: int, m: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    conv = SameConv(n, m, kernel, stride, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(m, eps=1e-3)


class Block(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shapes allow one."""

    def __init__(self, n: int, m: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n * expansion
        parts: list[nn.Module] = []
        if expansion != 1:
            parts += [*unit(n, wide, 1), nn.ReLU6()]
        parts += [*unit(wide, wide, kernel, stride, wide), nn.ReLU6(), *unit(wide, m, 1)]
        self.body = nn.Sequential(*parts)
        self.shortcut = stride == 1 and n == m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class Lite0(nn.Module):
    """Pictures [B, 3, H, W], (x - 0.5) / 0.5, to logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 32, 3, 2), nn.ReLU6())
        blocks, n = [], 32
        for repeats, kernel, stride, expansion, m in BLOCKS:
            for i in range(repeats):
                blocks.append(Block(n, m, kernel, 1 if i else stride, expansion))
                n = m
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*unit(n, 1280, 1), nn.ReLU6())
        self.classifier = nn.Linear(1280, classes)

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.head(self.blocks(self.stem(x))), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def lite0(folder: Path) -> Lite0:
    """The network with the weights that were trained on ImageNet."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    net = Lite0().eval()
    names = [n for n in net.state_dict() if not n.endswith("num_batches_tracked")]
    net.load_state_dict(
        dict(zip(names, (stored[n] for n in _in_order(stored)), strict=True)), strict=False
    )
    return net


def _in_order(stored: dict[str, Tensor]) -> list[str]:
    """The names of the checkpoint in the order of the network."""
    layers = ("_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1", "_fc")
    inside = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
    last = ("weight", "bias", "running_mean", "running_var")

    def place(name: str) -> tuple[int, ...]:
        first, *rest = name.split(".")
        if first == "_blocks":
            return layers.index(first), int(rest[0]), inside.index(rest[1]), last.index(rest[2])
        return layers.index(first), 0, 0, last.index(rest[0])

    return sorted((n for n in stored if not n.endswith("num_batches_tracked")), key=place)


def imagenet20(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures as the network wants them, and their classes."""
    from safetensors.torch import load_file

    stored = load_file(folder / "pictures.safetensors")
    x = stored["pictures"].permute(0, 3, 1, 2).float() / 255
    return (x - 0.5) / 0.5, stored["labels"]


# The probe on CIFAR-10


def cifar10(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures u8[N, 32, 32, 3] and labels."""
    from safetensors.torch import load_file

    stored = load_file(folder / f"{split}.safetensors")
    return stored["pictures"], stored["labels"]


def enlarged(pictures: Tensor) -> Tensor:
    """Pictures as the network wants them, at SIDE pixels."""
    x = pictures.permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    return (x - 0.5) / 0.5


def batches(pictures: Tensor, size: int = 50) -> Iterator[Tensor]:
    for part in pictures.split(size):
        yield enlarged(part)


def fitted(features: Tensor, labels: Tensor, c: float = 0.02) -> tuple[Tensor, Tensor]:
    """Weight and bias of a logistic regression: sum of losses + |W|^2 / (2 c), to its optimum."""
    x, classes = features.double(), int(labels.max()) + 1
    w = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w.T + b, labels, reduction="sum") + w.square().sum() / (2 * c)
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach().float(), b.detach().float()


def probe(net: Lite0, folder: Path) -> Lite0:
    """The network with a classifier for CIFAR-10, fitted on its first 3000 training pictures."""
    pictures, labels = cifar10(folder, "train")
    with torch.no_grad():
        features = torch.cat([net.features(x) for x in batches(pictures[:PROBED])])
    small = Lite0(10).eval()
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("classifier")}
    weight, bias = fitted(features, labels[:PROBED])
    small.load_state_dict({**state, "classifier.weight": weight, "classifier.bias": bias})
    return small
