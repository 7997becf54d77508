"""How a forward is called and what it returns: nested, keyword-only, optional, unused, scalar."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.zoo import Built, batch, zoo
from tests.zoo.functions import fixed, module, rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Detection:
    """What a small detector returns: registered with pytree by its users."""

    boxes: Tensor
    scores: dict[str, Tensor]
    extra: Tensor | None = None


Pair = namedtuple("Pair", ["first", "second"])


def _register() -> None:
    import torch
    from torch.utils import _pytree as pytree

    if Detection not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(
            Detection, serialized_type_name="tests.zoo.calling.Detection"
        )


@zoo("a dataclass holding a dict and None comes out")
def dataclass_output() -> Built:
    import torch
    from torch import nn

    _register()

    def forward(self, x):
        y = self.head(x)
        return Detection(boxes=y[:, :4], scores={"top": y[:, 4], "all": y.softmax(-1)})

    return rows(forward, lambda n: (torch.randn(n, 6),), head=nn.Linear(6, 8))


@zoo("a dataclass goes in")
def dataclass_input() -> Built:
    import torch

    _register()

    def forward(self, found):
        return found.boxes.mean(0) + found.scores["top"].sum()

    def make(n: int):
        return (Detection(torch.randn(n, 4), {"top": torch.rand(n)}),)

    shape = [{0: batch()}, {"top": {0: batch()}}]  # fields that are None are no leaves
    return Built.of(module(forward), make, (3,), (1,), (5,), dynamic_shapes=(shape,))


@zoo("nested dict, list, tuple, named tuple and ordered dict in and out")
def nested_containers() -> Built:
    import torch

    def forward(self, inputs, pairs):
        total = inputs["a"] + inputs["more"]["b"] + pairs[0][0] * pairs[1].second
        return {
            "z": [total, (inputs["a"],)],
            "a": OrderedDict(x=total.sum(), y=Pair(pairs[0][1], {"deep": [pairs[1].first]})),
        }

    def make(n: int):
        t = [torch.randn(n, 4) for _ in range(6)]
        return {"a": t[0], "more": {"b": t[1]}}, [(t[2], t[3]), Pair(t[4], t[5])]

    rows_first = {0: batch()}
    return Built.of(
        module(forward),
        make,
        (3,),
        (1,),
        (5,),
        dynamic_shapes=(
            {"a": rows_first, "more": {"b": rows_first}},
            [(rows_first, rows_first), Pair(rows_first, rows_first)],
        ),
    )


@zoo("arguments after a star; some given, some left at their defaults")
def keyword_only() -> Built:
    import torch

    def forward(self, x, *, scale, shift=None, bias=2.0):
        y = x * scale + bias
        return y if shift is None else y + shift

    return Built.of(
        module(forward),
        lambda n: {"x": torch.randn(n, 4), "scale": torch.randn(4)},
        (3,),
        (1,),
        (5,),
        dynamic_shapes={"x": {0: batch()}, "scale": None},
    )


@zoo("keyword arguments given in another order than the signature's")
def keywords_reordered() -> Built:
    import torch

    def forward(self, x, y, z):
        return x - 2 * y + 3 * z

    def make(n: int):
        return {"z": torch.randn(n, 2), "x": torch.randn(n, 2), "y": torch.randn(n, 2)}

    shape = {0: batch()}
    return Built.of(
        module(forward),
        make,
        (3,),
        (1,),
        (5,),
        dynamic_shapes={"x": shape, "y": shape, "z": shape},
    )


@zoo("star arguments and double-star arguments")
def variadic() -> Built:
    import torch

    def forward(self, first, *rest, **named):
        return first + sum(rest) - named["left"] * named["right"]

    def call(n: int):
        t = torch.randn(5, n, 3)
        return (t[0], t[1], t[2]), {"left": t[3], "right": t[4]}

    shape = {0: batch()}
    args, kwargs = call(3)
    return Built(
        module(forward),
        args,
        kwargs,
        {"first": shape, "rest": (shape, shape), "named": {"left": shape, "right": shape}},
        (call(1), call(5)),
    )


@zoo("int, float, bool, string and None among the arguments, as constants")
def scalar_arguments() -> Built:
    import torch

    def forward(self, x, power: int, scale: float, flip: bool, mode: str, mask=None):
        y = x**power * scale
        y = y.flip(-1) if flip else y
        y = y.relu() if mode == "relu" else y.tanh()
        return y if mask is None else y * mask

    return rows(forward, lambda n: (torch.randn(n, 4), 3, 0.5, True, "relu", None))


@zoo("an integer argument that changes from call to call")
def dynamic_integer() -> Built:
    import torch
    from torch.export import Dim

    def forward(self, x, count: int):
        return x[:, :2] * count + torch.arange(count).sum()

    return Built.of(
        module(forward),
        lambda n, count: (torch.randn(n, 4), count),
        (3, 5),
        (1, 2),
        (5, 9),
        dynamic_shapes=({0: batch()}, Dim.DYNAMIC),
    )


@zoo("inputs that nothing reads, and a parameter and a submodule that nothing reads")
def unused() -> Built:
    import torch
    from torch import nn

    def forward(self, x, ignored, also_ignored):
        return self.used(x)

    return rows(
        forward,
        lambda n: (torch.randn(n, 4), torch.randn(n, 9), torch.randn(2)[0]),
        used=nn.Linear(4, 2),
        never=nn.Linear(7, 7),
        nothing=nn.Parameter(torch.randn(3)),
    )


@zoo("the same tensor passed for two arguments")
def repeated_input() -> Built:
    import torch

    def forward(self, x, y):
        return x @ y.mT

    def make(n: int):
        x = torch.randn(n, 3, 4)
        return x, x

    return rows(forward, make)


@zoo("no tensor goes in: everything comes from parameters")
def no_inputs() -> Built:
    import torch
    from torch import nn

    def forward(self):
        return self.weight.softmax(-1), torch.arange(3)

    return fixed(forward, lambda: (), weight=nn.Parameter(torch.randn(4)))


@zoo("returns its input untouched, and nothing else")
def identity() -> Built:
    import torch
    from torch import nn

    return rows(nn.Identity(), lambda n: (torch.randn(n, 4),))


@zoo("tensors made from Python lists inside forward, kept on the module, closed over")
def lifted_constants() -> Built:
    import torch

    outside = torch.tensor([3.0, 2.0, 1.0, 0.0])

    def forward(self, x):
        listed = torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x * listed + outside + self.plain + torch.tensor(5) + x.new_tensor([0.5])

    built = rows(forward, lambda n: (torch.randn(n, 4),))
    built.model.plain = torch.full((4,), 0.25)
    return built


@zoo("one weight under two names, one module under two names")
def tied_weights() -> Built:
    import torch
    from torch import nn

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.body = nn.Linear(4, 4)
            self.again = self.body
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index):
            return self.head(self.again(self.body(self.embed(index)).relu()))

    return rows(Tied(), lambda n: (torch.randint(0, 9, (n, 3)),))


@zoo("one parameter that is a view of another's storage")
def shared_storage() -> Built:
    import torch
    from torch import nn

    whole = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.whole.T, x @ self.top.T, x @ self.turned

    return rows(
        forward,
        lambda n: (torch.randn(n, 4),),
        whole=whole,
        top=whole.detach()[:2],
        turned=whole.detach().t(),
    )


@zoo("modules in lists and dicts, with names that are not identifiers or clash with methods")
def awkward_names() -> Built:
    import torch
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {"a-b": nn.Linear(4, 4), "1": nn.Linear(4, 4), "class": nn.Linear(4, 4)}
            )
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
            self.table = nn.ParameterDict({"in put": nn.Parameter(torch.randn(4))})

        def forward(self, x):
            for layer in self.layers.values():
                x = layer(x)
            return x * self.weights[0] + self.weights[1] - self.table["in put"]

    return rows(Named(), lambda n: (torch.randn(n, 4),))


@zoo("hooks: one changes the input of a layer, one its output")
def hooks() -> Built:
    import torch
    from torch import nn

    linear = nn.Linear(4, 4)
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return rows(nn.Sequential(linear, nn.ReLU()), lambda n: (torch.randn(n, 4),))


@zoo("strided, transposed and expanded tensors as inputs")
def strided_inputs() -> Built:
    import torch

    def forward(self, x, y, z):
        return x + y * z, x.contiguous().view(-1), y.reshape(-1), z.sum(0), x.stride(0)

    def make():
        return torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.randn(1, 4).expand(3, 4)

    return fixed(forward, make)


@zoo("two batches that need not agree, and one that is twice another")
def related_sizes() -> Built:
    import torch

    from tests.zoo import dim

    def forward(self, x, y, z):
        return torch.cat([x, y]), z.view(-1, 2, 3).sum(1) + x

    left = dim("left")
    return Built.of(
        module(forward),
        lambda a, b: (torch.randn(a, 3), torch.randn(b, 3), torch.randn(2 * a, 3)),
        (3, 4),
        (1, 1),
        (5, 2),
        dynamic_shapes=({0: left}, {0: dim("right")}, {0: 2 * left}),
    )


@zoo("gradients forbidden, allowed and forbidden again inside forward")
def grad_modes() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        with torch.no_grad():
            target = self.layer(x).detach()
        with torch.inference_mode():
            scale = x.abs().max()
        with torch.enable_grad():
            y = self.layer(x * 2)
        return y - target, scale * 1

    return rows(forward, lambda n: (torch.randn(n, 4),), layer=nn.Linear(4, 4))


@zoo("a custom autograd function: rounding whose gradient passes straight through")
def straight_through() -> Built:
    import torch

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def forward(self, x):
        return Round.apply(x * 4) / 4, x + (x.sign() - x).detach()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a checkpointed block: forward run through torch.utils.checkpoint")
def checkpointed() -> Built:
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) + x

    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return rows(forward, lambda n: (torch.randn(n, 4),), block=block)


@zoo("a user's own operator with a shape function")
def custom_operator() -> Built:
    import torch

    if not hasattr(torch.ops.zoo, "cube"):

        @torch.library.custom_op(
            "zoo::cube", mutates_args=(), schema="(Tensor x, float scale) -> Tensor"
        )
        def cube(x, scale):
            return x**3 * scale

        cube.register_fake(lambda x, scale: torch.empty_like(x))

    def forward(self, x):
        return torch.ops.zoo.cube(x, 0.5) + 1

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a scripted submodule inside a Python one")
def scripted_submodule() -> Built:
    import torch
    from torch import nn

    block: Any = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    return rows(nn.Sequential(block, nn.Linear(4, 2)), lambda n: (torch.randn(n, 4),))
