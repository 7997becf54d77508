"""Where numbers change their kind: promotion, integer division, overflow, scalars, bits."""

from __future__ import annotations

from tests.zoo import Built, zoo
from tests.zoo.functions import fixed, rows


@zoo("bytes wrap before they are widened, and must not after")
def byte_overflow() -> Built:
    import torch

    def forward(self, x, y):
        wrapped = (x + y).float()
        negative = (x - y).to(torch.int32)
        widened = x.to(torch.int32) + y
        return wrapped, negative, widened, x * 3, (-x).long()

    def make(n: int):
        return tuple(torch.randint(0, 256, (2, n, 6), dtype=torch.uint8))

    return rows(forward, make)


@zoo("signed bytes wrap at 127; their absolute value can be negative")
def signed_byte_overflow() -> Built:
    import torch

    def forward(self, x, y):
        return (x * y).int(), x.abs(), (x + y).float() / 128, x.sum(), x.cumsum(1, dtype=torch.int8)

    def make(n: int):
        x, y = torch.randint(-128, 128, (2, n, 6), dtype=torch.int8)
        x[:, 0] = -128
        return x, y

    return rows(forward, make)


@zoo("an image in bytes normalised at the door")
def image_bytes() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        x = x.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return self.conv((x - self.mean) / self.std)

    return rows(
        forward,
        lambda n: (torch.randint(0, 256, (n, 6, 6, 3), dtype=torch.uint8),),
        conv=nn.Conv2d(3, 2, 3),
        mean=torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        std=torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )


@zoo("integers with floats, booleans in arithmetic, 0-d tensors that do not promote")
def promotions() -> Built:
    import torch

    def forward(self, x, i, b):
        half = x.half()
        zero_d = torch.tensor(2.0, dtype=torch.float64)
        return (
            i + 1.5,
            i * x,
            b + b,
            b * i,
            b.sum() / 2,
            half + zero_d,
            half * 2,
            half + x,
            x.double() - i,
            i / 2,
            torch.where(b, i, x),
            ~b & (x > 0),
            b ^ (i > 0),
        )

    def make(n: int):
        return torch.randn(n, 4), torch.randint(-9, 9, (n, 4)), torch.rand(n, 4) > 0.5

    return rows(forward, make)


@zoo("regions in float16, bfloat16 and float64 in one float32 model")
def dtype_islands() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        x = self.brain(x.bfloat16()).float()
        x = self.wide(x.double()).float()
        return x.half().softmax(-1).float() + x.to(torch.float16).cumsum(-1)

    return rows(
        forward,
        lambda n: (torch.randn(n, 6),),
        brain=nn.Linear(6, 8).bfloat16(),
        wide=nn.Linear(8, 4).double(),
    )


@zoo("autocast: a region whose matmuls run in bfloat16, left and entered again")
def autocast() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                y = y.float().exp().mean(-1, keepdim=True) + y.float()
            z = self.second(y)
        return y, z, z.softmax(-1)

    return rows(
        forward, lambda n: (torch.randn(n, 6),), first=nn.Linear(6, 8), second=nn.Linear(8, 4)
    )


@zoo("division of negative integers: floor, truncation, remainder and fmod disagree")
def integer_division() -> Built:
    import torch

    def forward(self, x, y):
        return (
            x // y,
            torch.div(x, y, rounding_mode="trunc"),
            torch.div(x, y, rounding_mode="floor"),
            x % y,
            torch.fmod(x, y),
            x / y,
            torch.remainder(-x, 3),
            -7 // y,
            x >> 1,
        )

    def make(n: int):
        x, y = torch.randint(-9, 10, (2, n, 6))
        return x, torch.where(y == 0, -4, y)

    return rows(forward, make)


@zoo("the same for floats, with signed zeros, infinities and division by zero")
def float_division() -> Built:
    import torch

    def forward(self, x, y):
        return (
            x // y,
            x % y,
            torch.fmod(x, y),
            torch.div(x, y, rounding_mode="trunc"),
            x / y,
            x.frac(),
            torch.copysign(x, y),
            torch.signbit(y),
        )

    def make(n: int):
        special = torch.tensor([0.0, -0.0, float("inf"), -2.5, 2.5])
        return torch.randn(n, 5) * 5, special[torch.randint(0, 5, (n, 5))]

    return rows(forward, make)


@zoo("scalars on the left: reversed subtraction, division, power, modulo")
def scalar_first() -> Built:
    import torch

    def forward(self, x):
        return 1.0 - x, 2**x, 1 / x, 3 % x, 7 // x, torch.pow(2.5, x), 5 - x.int()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a small constant keeps a reciprocal finite at zero; folding it away would not")
def epsilon_then_reciprocal() -> Built:
    import torch

    def forward(self, x):
        return (x + 1e-8).reciprocal(), 1 / (x.abs().sum(-1) + 1e-12), (x * x + 1e-6).rsqrt()

    def make(n: int):
        x = torch.randn(n, 4).relu()
        x[0] = 0
        return (x,)

    return rows(forward, make)


@zoo("and, or, xor, not, shifts; population count by masks")
def bitwise() -> Built:
    import torch

    def forward(self, x, y):
        count = x - ((x >> 1) & 0x55555555)
        count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
        count = (((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101 & 0xFFFFFFFF) >> 24
        return x & y, x | y, x ^ 5, ~x, x << 2, x >> y % 4, count, (x & 1).bool()

    return rows(forward, lambda n: tuple(torch.randint(0, 2**31, (2, n, 6))))


@zoo("the bits of a float read as an integer, changed and read back")
def dtype_views() -> Built:
    import torch

    def forward(self, x):
        bits = x.view(torch.int32)
        exponent = ((bits >> 23) & 255) - 127
        magnitude = (bits & 0x7FFFFFFF).view(torch.float32)
        return exponent, magnitude, x.view(torch.int16), x.view(torch.uint8).int().sum(-1)

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("4-bit weights in bytes unpacked by shifts, scaled by group")
def packed_weights() -> Built:
    import torch

    def forward(self, x):
        low, high = self.packed & 0xF, self.packed >> 4
        levels = torch.stack([low, high], -1).flatten(1).to(torch.int8) - 8
        weight = (levels.view(6, -1, 4) * self.scale.unsqueeze(-1)).view(6, -1)
        return torch.nn.functional.linear(x, weight.to(x.dtype))

    return rows(
        forward,
        lambda n: (torch.randn(n, 16),),
        packed=torch.randint(0, 256, (6, 8), dtype=torch.uint8),
        scale=torch.rand(6, 4),
    )


@zoo("quantised by hand: round half to even, clamp, convert; a matmul of bytes")
def rounding() -> Built:
    import torch

    def forward(self, x):
        scale = x.abs().amax() / 127
        q = torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8)
        product = (q.int() @ self.weight.int()).float() * scale
        return q, product, torch.round(x * 2) / 2, torch.round(x, decimals=1)

    return rows(
        forward,
        lambda n: (torch.randn(n, 6),),
        weight=torch.randint(-128, 128, (6, 4), dtype=torch.int8),
    )


@zoo("fake quantisation as an operator, which training aware of quantisation leaves behind")
def fake_quantize_operator() -> Built:
    import torch

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255)

    return rows(forward, lambda n: (torch.randn(n, 6) * 20,))


@zoo("0-d tensors and 0-d parameters as operands, indices and outputs")
def zero_dimensional() -> Built:
    import torch
    from torch import nn

    def forward(self, x, scale, index):
        top = x[index] * scale
        return x.mean() * self.gain, top, x.max() - scale, index + 1, self.gain.expand(2)

    def make():
        return torch.randn(5), torch.randn(()), torch.randint(0, 5, ())

    return fixed(forward, make, gain=nn.Parameter(torch.tensor(1.5)))


@zoo("dimensions of size zero: concatenated, reduced, multiplied")
def empty_tensors() -> Built:
    import torch

    def forward(self, x, nothing):
        product = nothing @ x.new_ones(0, 3)
        return (
            torch.cat([x, nothing], 1),
            product,
            nothing.sum(1),
            nothing.prod(1),
            x[:, 4:],
            torch.zeros(0).sum(),
            nothing.mean(1),
        )

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randn(n, 0)))


@zoo("an empty input: a detector without boxes")
def empty_input() -> Built:
    import torch
    from torch import nn

    def forward(self, boxes):
        width = boxes[:, 2] - boxes[:, 0]
        return self.head(boxes), width.sum(), torch.cat([boxes, boxes.new_zeros(1, 4)])

    return fixed(forward, lambda: (torch.randn(0, 4),), head=nn.Linear(4, 2))


@zoo("large integers that a float cannot hold; sums of many small ones")
def large_integers() -> Built:
    import torch

    def forward(self, x):
        return x + 1, x * 2 - x, x.sum(), x.float(), x.double().long(), (x % 1000003).cumsum(0)

    return rows(forward, lambda n: (torch.randint(2**53, 2**60, (n, 3)),))
