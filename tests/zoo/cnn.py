"""Convolutional nets written by hand, in the manner of torchvision, and their layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.functions import rows


def pictures(model: Any, size: int = 32, channels: int = 3) -> Built:
    import torch

    return rows(model, lambda n: (torch.randn(n, channels, size, size),))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, act: Any = None, **options: Any) -> Any:
    """Convolution that keeps the size, batch norm with lived-in statistics, activation."""
    import torch
    from torch import nn

    norm = nn.BatchNorm2d(outputs)
    norm.running_mean.normal_(0, 0.2)
    norm.running_var.uniform_(0.5, 1.5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, norm, act or nn.Identity())


@zoo("residual additions after batch norm; ReLU in place")
def resnet18() -> Built:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.first = conv_bn(inputs, outputs, stride=stride)
            self.second = conv_bn(outputs, outputs)
            self.down = conv_bn(inputs, outputs, 1, stride=stride) if stride > 1 else None

        def forward(self, x):
            identity = x if self.down is None else self.down(x)
            y = self.relu(self.first(x))
            y = self.second(y)
            y += identity
            return self.relu(y)

    widths = [8, 8, 16, 24, 32]
    stages = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        stages += [Block(before, after, 2 if stage else 1), Block(after, after, 1)]
    stem = [conv_bn(3, 8, 7, nn.ReLU(inplace=True), stride=2), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return pictures(nn.Sequential(*stem, *stages, *head))


@zoo("inverted residuals, depthwise convolutions, ReLU6, dropout before the classifier")
def mobilenet_v2() -> Built:
    from torch import nn

    class Inverted(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
            super().__init__()
            hidden = inputs * expand
            self.shortcut = stride == 1 and inputs == outputs
            self.conv = nn.Sequential(
                conv_bn(inputs, hidden, 1, nn.ReLU6(inplace=True)),
                conv_bn(hidden, hidden, 3, nn.ReLU6(inplace=True), stride=stride, groups=hidden),
                conv_bn(hidden, outputs, 1),
            )

        def forward(self, x):
            return x + self.conv(x) if self.shortcut else self.conv(x)

    return pictures(
        nn.Sequential(
            conv_bn(3, 8, act=nn.ReLU6(inplace=True), stride=2),
            Inverted(8, 8, 1, 1),
            Inverted(8, 12, 2, 6),
            Inverted(12, 12, 1, 6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, 10),
        )
    )


@zoo("SiLU, squeeze and excitation, stochastic depth that is off in eval")
def efficientnet() -> Built:
    import torch
    from torch import nn

    class SqueezeExcite(nn.Module):
        def __init__(self, width: int, squeezed: int) -> None:
            super().__init__()
            self.reduce = nn.Conv2d(width, squeezed, 1)
            self.expand = nn.Conv2d(squeezed, width, 1)

        def forward(self, x):
            scale = x.mean((2, 3), keepdim=True)
            scale = self.expand(nn.functional.silu(self.reduce(scale)))
            return x * scale.sigmoid()

    class MBConv(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            hidden = inputs * 4
            self.body = nn.Sequential(
                conv_bn(inputs, hidden, 1, nn.SiLU()),
                conv_bn(hidden, hidden, 5, nn.SiLU(), groups=hidden),
                SqueezeExcite(hidden, 2),
                conv_bn(hidden, outputs, 1),
            )

        def forward(self, x):
            y = self.body(x)
            if self.training:
                keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) > 0.2
                y = y * keep / 0.8
            return x + y

    stem = conv_bn(3, 8, act=nn.SiLU(), stride=2)
    return pictures(nn.Sequential(stem, MBConv(8, 8), MBConv(8, 8), nn.Flatten(2)))


@zoo("every layer reads the concatenation of all before it; norm before convolution")
def densenet() -> Built:
    import torch
    from torch import nn

    class Dense(nn.Module):
        def __init__(self, inputs: int, growth: int, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(inputs + i * growth),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(inputs + i * growth, growth, 3, padding=1, bias=False),
                )
                for i in range(layers)
            )

        def forward(self, x):
            features = [x]
            for layer in self.layers:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)

    return pictures(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            Dense(8, 4, 3),
            nn.Conv2d(20, 10, 1),
            nn.AvgPool2d(2),
            Dense(10, 4, 2),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(18, 5),
        )
    )


@zoo("channel shuffle: view, transpose, view; channels split in two")
def shufflenet() -> Built:
    import torch
    from torch import nn

    class Shuffle(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            half = width // 2
            self.branch = nn.Sequential(
                conv_bn(half, half, 1, nn.ReLU(inplace=True)),
                conv_bn(half, half, groups=half),
                conv_bn(half, half, 1, nn.ReLU(inplace=True)),
            )

        def forward(self, x):
            left, right = x.chunk(2, dim=1)
            y = torch.cat((left, self.branch(right)), dim=1)
            n, c, h, w = y.size()
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)

    return pictures(nn.Sequential(conv_bn(3, 16, stride=2), Shuffle(16), Shuffle(16)))


@zoo("parallel branches of different kernels joined by concatenation; asymmetric kernels")
def inception() -> Built:
    import torch
    from torch import nn

    class Inception(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(inputs, 4, 1)
            self.wide = nn.Conv2d(inputs, 4, (1, 7), padding=(0, 3))
            self.tall = nn.Conv2d(4, 4, (7, 1), padding=(3, 0))
            self.pool = nn.Conv2d(inputs, 4, 1)

        def forward(self, x):
            pooled = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
            branches = [self.one(x), self.tall(self.wide(x)), self.pool(pooled)]
            return torch.cat([b.relu() for b in branches], 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Inception(3), Inception(12)
            self.auxiliary = nn.Linear(12, 5)
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            x = self.first(x)
            auxiliary = self.auxiliary(x.mean((2, 3))) if self.training else None
            return self.head(self.second(x).mean((2, 3))), auxiliary

    return pictures(Net())


@zoo("plain stack of convolutions and pools, big linear layers, dropout in place")
def vgg() -> Built:
    from torch import nn

    features = []
    width = 3
    for item in (8, "M", 12, "M", 16, 16, "M"):
        if item == "M":
            features.append(nn.MaxPool2d(2, 2))
        else:
            features += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU(inplace=True)]
            width = item
    head = [nn.Flatten(), nn.Linear(16 * 16, 32), nn.ReLU(True), nn.Dropout(inplace=True)]
    return pictures(nn.Sequential(*features, *head, nn.Linear(32, 10)))


def _unet() -> Any:
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> Any:
        return nn.Sequential(
            conv_bn(inputs, outputs, act=nn.ReLU(inplace=True)),
            conv_bn(outputs, outputs, act=nn.ReLU(inplace=True)),
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList([double(3, 8), double(8, 12)])
            self.bottom = double(12, 16)
            self.up = nn.ModuleList(
                [nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)]
            )
            self.merge = nn.ModuleList([double(24, 12), double(16, 8)])
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            skips = []
            for stage in self.down:
                x = stage(x)
                skips.append(x)
                x = nn.functional.max_pool2d(x, 2)
            x = self.bottom(x)
            for grow, merge in zip(self.up, self.merge, strict=True):
                x, skip = grow(x), skips.pop()
                if x.shape[-2:] != skip.shape[-2:]:
                    x = nn.functional.interpolate(x, size=skip.shape[-2:])
                x = merge(torch.cat([skip, x], dim=1))
            return self.head(x)

    return UNet()


@zoo("skip connections across the whole depth: long-lived values")
def unet() -> Built:
    return pictures(_unet())


@zoo("height and width dynamic in multiples of four, skips compared by shape in Python")
def unet_dynamic_image() -> Built:
    import torch

    shape = {0: batch(), 2: 4 * dim("h", 32, min=2), 3: 4 * dim("w", 32, min=2)}
    return Built.of(
        _unet(),
        lambda n, h, w: (torch.randn(n, 3, 4 * h, 4 * w),),
        (2, 5, 6),
        (1, 3, 8),
        (3, 4, 4),
        dynamic_shapes=(shape,),
    )


@zoo("channels-last weights and activations: strides are not those of the shape")
def channels_last() -> Built:
    import torch
    from torch import nn

    net = nn.Sequential(conv_bn(3, 8, act=nn.ReLU()), conv_bn(8, 8)).to(
        memory_format=torch.channels_last
    )
    return rows(
        net, lambda n: (torch.randn(n, 3, 8, 8).contiguous(memory_format=torch.channels_last),)
    )


@zoo("batch norm in training: running statistics and a counter are written", training=True)
def batch_norm_training() -> Built:
    from torch import nn

    return pictures(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 8)


@zoo("group, instance, layer and local response norms over channels")
def norms() -> Built:
    from torch import nn

    return pictures(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.InstanceNorm2d(8, affine=True),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.LayerNorm([8, 8, 8]),
            nn.LocalResponseNorm(3),
            nn.RMSNorm([8, 8], eps=1e-6),
        ),
        8,
    )


@zoo("weights parametrised by direction and length, computed at each call")
def weight_norm() -> Built:
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    return pictures(
        nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), weight_norm(nn.Conv2d(4, 2, 1), dim=None)),
        8,
    )


@zoo("weights divided by their largest singular value; power iteration is off in eval")
def spectral_norm() -> Built:
    from torch import nn
    from torch.nn.utils.parametrizations import orthogonal, spectral_norm

    return pictures(
        nn.Sequential(
            spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(2), orthogonal(nn.Linear(36, 8))
        ),
        8,
    )


@zoo("one-dimensional convolutions: dilated, causal, strided, padding='same'")
def conv1d_stack() -> Built:
    import torch
    from torch import nn

    class Causal(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            self.left = 2 * dilation
            self.conv = nn.Conv1d(4, 8, 3, dilation=dilation)

        def forward(self, x):
            value, gate = self.conv(nn.functional.pad(x, (self.left, 0))).chunk(2, dim=1)
            return x + value.tanh() * gate.sigmoid()

    model = nn.Sequential(
        Causal(1), Causal(4), nn.Conv1d(4, 4, 4, padding="same"), nn.Conv1d(4, 2, 5, stride=3)
    )
    return Built.of(
        model,
        lambda n, t: (torch.randn(n, 4, t),),
        (2, 20),
        (1, 31),
        (3, 16),
        dynamic_shapes=({0: batch(), 2: dim("time", 256, min=8)},),
    )


@zoo("volumes: 3-d convolution and pooling")
def conv3d_stack() -> Built:
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 2)),
        nn.BatchNorm3d(4),
        nn.MaxPool3d(2),
        nn.ConvTranspose3d(4, 2, 2, stride=2),
        nn.AdaptiveAvgPool3d((2, 3, 4)),
    )
    return rows(model, lambda n: (torch.randn(n, 2, 4, 8, 8),))


@zoo("transposed convolutions: stride, output padding, groups, dilation")
def conv_transpose_stack() -> Built:
    from torch import nn

    return pictures(
        nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, output_padding=1),
            nn.ConvTranspose2d(6, 6, 3, groups=3, dilation=2),
            nn.ConvTranspose2d(6, 2, (1, 4), bias=False),
        ),
        8,
    )


@zoo("maximum over windows of negative numbers, where padding must not win; ceil mode")
def max_pool_negative() -> Built:
    import torch
    from torch import nn

    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2, ceil_mode=True))
    return rows(model, lambda n: (-torch.rand(n, 2, 9, 9) - 1,))


@zoo("pools with indices and their inverse; power-average pooling; averages without padding")
def pools() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        top, index = F.max_pool2d(x, 2, return_indices=True)
        back = F.max_unpool2d(top, index, 2)
        mean = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        return back, mean, F.lp_pool2d(x.abs(), 2.0, 2), index

    return rows(forward, lambda n: (torch.randn(n, 2, 8, 8),))


@zoo("adaptive pooling to sizes that do not divide the input")
def adaptive_pools() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        largest, index = F.adaptive_max_pool2d(x, (3, 5), return_indices=True)
        return largest, index, F.adaptive_avg_pool2d(x, (None, 3)), F.adaptive_max_pool2d(x, 1)

    return rows(forward, lambda n: (torch.randn(n, 2, 7, 8),))


@zoo("padding modes inside convolutions and outside")
def paddings() -> Built:
    import torch
    import torch.nn.functional as F
    from torch import nn

    def forward(self, x):
        x = self.circular(self.replicate(self.reflect(x)))
        x = F.pad(x, (1, 2, 0, 1), value=-1.5)
        x = F.pad(x, (-1, 0, 0, -2))
        return F.pad(x, (3, 1, 2, 2), mode="reflect"), F.pad(x, (0, 1, 1, 0), mode="circular")

    return rows(
        forward,
        lambda n: (torch.randn(n, 2, 8, 8),),
        reflect=nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        replicate=nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        circular=nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    )


@zoo("resizing: every mode, by scale and by size, corners aligned or not, antialiased")
def resizes() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        return (
            F.interpolate(x, scale_factor=2, mode="nearest"),
            F.interpolate(x, size=(5, 9), mode="nearest-exact"),
            F.interpolate(x, scale_factor=1.7, mode="bilinear"),
            F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
            F.interpolate(x, scale_factor=(0.5, 2.0), mode="bicubic"),
            F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
            F.interpolate(x, size=(4, 4), mode="area"),
        )

    return rows(forward, lambda n: (torch.randn(n, 2, 6, 7),))


@zoo("a spatial transformer: the grid is computed from the image")
def grid_samples() -> Built:
    import torch
    import torch.nn.functional as F
    from torch import nn

    def forward(self, x):
        theta = self.locate(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        zeros = F.grid_sample(x, grid, align_corners=False)
        border = F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)
        return zeros, border, F.grid_sample(x, grid, mode="bicubic", align_corners=False)

    return rows(forward, lambda n: (torch.randn(n, 3, 6, 6),), locate=nn.Linear(3, 6))


@zoo("super-resolution: pixel shuffle and its inverse, unfold and fold")
def pixel_shuffles() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        columns = F.unfold(x, 3, padding=1, stride=2)
        folded = F.fold(columns, (8, 8), 3, padding=1, stride=2)
        return F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 4), columns, folded

    return rows(forward, lambda n: (torch.randn(n, 4, 8, 8),))


@zoo("weights made from the input: a convolution per sample by grouping the batch")
def dynamic_convolution() -> Built:
    import torch
    import torch.nn.functional as F
    from torch import nn

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = self.predict(x.mean((2, 3))).view(n * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n * c).view_as(x)

    return rows(forward, lambda n: (torch.randn(n, 4, 6, 6),), predict=nn.Linear(4, 36))


@zoo("deep nest of modules whose one layer is called twice with different shapes")
def shared_layer() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        once = self.conv(x)
        return once.mean((2, 3)) + self.conv(once[:, :, ::2, ::2]).mean((2, 3))

    return rows(forward, lambda n: (torch.randn(n, 3, 8, 8),), conv=nn.Conv2d(3, 3, 3, padding=1))
