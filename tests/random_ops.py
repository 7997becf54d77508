"""The ops of random graphs: each a recipe for one node, or a few, and how often it is taken."""

from __future__ import annotations

import dfc.ops  # noqa: F401
from dfc.errors import DfcError
from dfc.ir.expr import Expr, symbol
from dfc.ir.graph import Argument, Graph, Node, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.builder import Builder
from tests.random_maker import SIZES, Maker, recipe


def is_small(t: TensorType) -> bool:
    return all(isinstance(s, Expr) or s <= 64 for s in t.shape) and t.rank <= 4


def not_empty(t: TensorType) -> bool:
    return t.dtype.is_float and t.rank >= 1 and 0 not in t.shape


UNARY = (
    "relu", "sigmoid", "tanh", "sin", "cos", "neg", "abs", "gelu", "silu", "erf", "floor",
    "ceil", "round", "sign", "exp", "log1p", "reciprocal", "trunc", "square", "softplus",
    "absolute", "negative",
)  # fmt: skip


@recipe(8)
def unary(m: Maker) -> Node:
    name = m.rng.choice(UNARY)
    return m.b.node(f"aten.{name}.default", m.float())


@recipe(6)
def binary(m: Maker) -> Node:
    name = m.rng.choice(("add", "sub", "mul", "multiply", "subtract"))
    x = m.pick(lambda t: t.dtype.kind != "bool")
    return m.b.node(f"aten.{name}.Tensor", x, m.like(x))


@recipe()
def extremum(m: Maker) -> Node:
    x = m.float()
    return m.b.node(f"aten.{m.rng.choice(('maximum', 'minimum'))}.default", x, m.like(x))


@recipe()
def division(m: Maker) -> Node:
    x = m.float()
    return m.b.node(f"aten.{m.rng.choice(('div', 'true_divide'))}.Tensor", x, m.like(x))


@recipe(6)
def with_scalar(m: Maker) -> Node:
    name = m.rng.choice(("add", "sub", "mul", "rsub"))
    x = m.pick(lambda t: t.dtype.kind != "bool")
    other = m.rng.choice((0, 1, 0.0, -0.0, 1.0, 2, 0.5, -1))
    return m.b.node(f"aten.{name}.Scalar", x, other=other)


@recipe()
def divided_by_scalar(m: Maker) -> Node:
    return m.b.node("aten.div.Scalar", m.float(), other=m.rng.choice((1, 1.0, 2, 0.5)))


@recipe()
def power(m: Maker) -> Node:
    return m.b.node("aten.pow.Tensor_Scalar", m.float(), exponent=m.rng.choice((1, 2, 3)))


@recipe()
def clamp(m: Maker) -> Node:
    return m.b.node(f"aten.{m.rng.choice(('clamp', 'clip'))}.default", m.float(), min=-1, max=1)


@recipe()
def comparison(m: Maker) -> Node:
    x = m.pick(lambda t: t.dtype.kind != "bool")
    name = m.rng.choice(("eq", "lt", "ge", "less", "greater"))
    return m.b.node(f"aten.{name}.Tensor", x, m.like(x))


@recipe()
def logic(m: Maker) -> Node:
    x = m.pick(lambda t: t.dtype.kind == "bool")
    return m.b.node(f"aten.{m.rng.choice(('logical_not', 'bitwise_not'))}.default", x)


@recipe()
def choice(m: Maker) -> Node:
    x = m.float()
    condition = m.b("aten.gt.Scalar", x, other=0)
    return m.b.node("aten.where.self", condition, x, m.like(x))


@recipe()
def masked(m: Maker) -> Node:
    x = m.float()
    mask = m.b("aten.lt.Scalar", x, other=0.5)
    return m.b.node("aten.masked_fill.Scalar", x, mask, value=-1.0)


@recipe(3)
def cast(m: Maker) -> Node:
    x = m.pick()
    wide = ("f32", "f64", "f16") if x.tensor_type.dtype.is_float else ("f32", "i64", "i32", "f64")
    return m.b.node("aten._to_copy.default", x, dtype=DTYPES[m.rng.choice(wide)])


@recipe(4)
def noop(m: Maker) -> Node:
    x = m.pick()
    name = m.rng.choice(("clone", "detach", "alias", "contiguous"))
    return m.b.node(f"aten.{name}.default", x)


@recipe(3)
def same_view(m: Maker) -> Node:
    x = m.pick()
    shape = x.tensor_type.shape
    if m.rng.random() < 0.5:
        return m.b.node("aten.view.default", x, size=shape)
    return m.b.node("aten.expand.default", x, size=shape)


@recipe(4)
def flat(m: Maker) -> Node:
    x = m.pick()
    if m.rng.random() < 0.5:
        return m.b.node("aten.flatten.using_ints", x, start_dim=0, end_dim=-1)
    if 0 in x.tensor_type.shape:
        raise DfcError("V020", "-1 is ambiguous")
    return m.b.node("aten.view.default", x, size=(-1,))


@recipe(3)
def split_view(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1 and 0 not in t.shape)
    first, *rest = x.tensor_type.shape
    if m.rng.random() < 0.5:
        return m.b.node("aten.reshape.default", x, shape=(-1, *rest))
    return m.b.node("aten.view.default", x, size=(1, first, *rest))


@recipe(4)
def transposed(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 2)
    return m.b.node("aten.transpose.int", x, dim0=m.dim(x), dim1=m.dim(x))


@recipe(3)
def permuted(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    dims = list(range(x.tensor_type.rank))
    m.rng.shuffle(dims)
    signed = [d - len(dims) if m.rng.random() < 0.3 else d for d in dims]
    return m.b.node("aten.permute.default", x, dims=tuple(signed))


@recipe()
def matrix_transposed(m: Maker) -> Node:
    return m.b.node("aten.t.default", m.pick(lambda t: t.rank <= 2))


@recipe(3)
def unsqueezed(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank < 4)
    return m.b.node("aten.unsqueeze.default", x, dim=m.dim(x, 1))


@recipe(3)
def squeezed(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    return m.b.node("aten.squeeze.dim", x, dim=m.dim(x))


@recipe(3)
def sliced(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    dim = m.dim(x)
    size = x.tensor_type.shape[dim]
    if isinstance(size, Expr):
        return m.b.node("aten.slice.Tensor", x, dim=dim, start=0, end=2**63 - 1)
    ends = ((0, size), (0, 2**63 - 1), (1, size), (0, max(size - 1, 0)), (-1, size))
    start, end = m.rng.choice(ends)
    step = m.rng.choice((1, 1, 1, 2))
    return m.b.node("aten.slice.Tensor", x, dim=dim, start=start, end=end, step=step)


@recipe()
def selected(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    return m.b.node("aten.select.int", x, dim=m.dim(x), index=m.rng.choice((0, -1)))


@recipe()
def expanded(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank < 4 and is_small(t))
    return m.b.node("aten.expand.default", x, size=(2, *([-1] * x.tensor_type.rank)))


@recipe(3)
def joined(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1 and is_small(t))
    parts = [x] * m.rng.randrange(1, 3)
    same = [v for v in m.values if v.type == x.type]
    parts = [m.rng.choice(same) for _ in parts]
    return m.b.node("aten.cat.default", parts, dim=m.dim(x))


@recipe()
def stacked(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank < 4 and is_small(t))
    return m.b.node("aten.stack.default", [x, x], dim=m.dim(x, 1))


@recipe(2)
def pieces(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1 and isinstance(t.shape[-1], int) and t.shape[-1] >= 2)
    if m.rng.random() < 0.5:
        return m.b.node("aten.split.Tensor", x, split_size=2, dim=-1)
    return m.b.node("aten.unbind.int", x, dim=-1)


@recipe()
def repeated(m: Maker) -> Node:
    x = m.pick(is_small)
    repeats = tuple(m.rng.choice((1, 1, 2)) for _ in x.tensor_type.shape)
    return m.b.node("aten.repeat.default", x, repeats=repeats)


@recipe()
def padded(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1 and is_small(t))
    pad = m.rng.choice(((0, 0), (1, 0), (0, 2)))
    return m.b.node("aten.constant_pad_nd.default", x, pad=pad, value=0)


@recipe()
def turned(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    if m.rng.random() < 0.5:
        return m.b.node("aten.flip.default", x, dims=(m.dim(x),))
    return m.b.node("aten.roll.default", x, shifts=(1,), dims=(m.dim(x),))


@recipe()
def triangle(m: Maker) -> Node:
    return m.b.node(f"aten.{m.rng.choice(('tril', 'triu'))}.default", m.float(2))


@recipe(4)
def reduced(m: Maker) -> Node:
    x = m.float(1)
    keep = m.rng.random() < 0.5
    name = m.rng.choice(("sum.dim_IntList", "mean.dim", "amax.default", "amin.default"))
    return m.b.node(f"aten.{name}", x, dim=(m.dim(x),), keepdim=keep)


@recipe()
def spread(m: Maker) -> Node:
    x = m.float(1)
    return m.b.node("aten.var.correction", x, dim=(m.dim(x),), correction=0)


@recipe(2)
def largest(m: Maker) -> Node:
    x = m.pick(not_empty)
    if m.rng.random() < 0.5:
        return m.b.node("aten.max.dim", x, dim=m.dim(x))
    return m.b.node("aten.argmax.default", x, dim=m.dim(x))


@recipe()
def truth(m: Maker) -> Node:
    x = m.pick(lambda t: t.rank >= 1)
    return m.b.node(f"aten.{m.rng.choice(('any', 'all'))}.dim", x, dim=m.dim(x))


@recipe(3)
def along(m: Maker) -> Node:
    x = m.float(1)
    name = m.rng.choice(("softmax.int", "log_softmax.int", "cumsum.default"))
    return m.b.node(f"aten.{name}", x, dim=m.dim(x))


@recipe()
def ordered(m: Maker) -> Node:
    x = m.float(1)
    if m.rng.random() < 0.5 or 0 in x.tensor_type.shape:
        return m.b.node("aten.sort.stable", x, stable=True, dim=m.dim(x))
    return m.b.node("aten.topk.default", x, k=1, dim=m.dim(x))


@recipe(2)
def matrix_product(m: Maker) -> Node:
    x = m.float(2)
    return m.b.node("aten.matmul.default", x, m.b("aten.transpose.int", x, dim0=-1, dim1=-2))


def width(v: Value) -> int:
    size = v.tensor_type.shape[-1]
    if not isinstance(size, int) or not 0 < size <= 64:
        raise DfcError("V020", "no weights of this width")
    return size


@recipe(3)
def linear(m: Maker) -> Node:
    x = m.pick(lambda t: t.dtype.name == "f32" and t.rank >= 1)
    w = m.parameter(m.fresh("w"), TensorType(DTYPES["f32"], (3, width(x))))
    op = m.rng.choice(("aten.linear.default", "dfc.linear_gelu"))
    return m.b.node(op, x, w, None)


@recipe(2)
def normalised(m: Maker) -> Node:
    x = m.pick(lambda t: t.dtype.name == "f32" and t.rank >= 1)
    t = TensorType(DTYPES["f32"], (width(x),))
    gamma = m.parameter(m.fresh("gamma"), t)
    if m.rng.random() < 0.5:
        return m.b.node("dfc.skip_layer_norm", x, x, gamma, None, None)
    return m.b.node("aten.layer_norm.default", x, gamma, None, normalized_shape=t.shape)


@recipe(3)
def batch_norm(m: Maker) -> Node:
    x = m.pick(lambda t: t.dtype.name == "f32" and t.rank in (2, 3))
    f32 = DTYPES["f32"]
    if x.tensor_type.rank == 2:
        w = m.parameter(m.fresh("w"), TensorType(f32, (3, width(x))))
        y = m.b("aten.linear.default", x, w, None)
    else:
        channels = x.tensor_type.shape[1]
        if not isinstance(channels, int) or not 0 < channels <= 16:
            raise DfcError("V020", "no channels")
        w = m.parameter(m.fresh("w"), TensorType(f32, (3, channels, 1)))
        one = {"stride": (1,), "padding": (0,), "dilation": (1,)}
        y = m.b("aten.conv1d.default", x, w, None, groups=1, **one)
    t = TensorType(f32, (3,))
    stats = [m.parameter(m.fresh("s") + k, t, "buffer") for k in ("mean", "var")]
    training = m.rng.random() < 0.2
    given = {"training": training, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
    return m.b.node("aten.batch_norm.default", y, None, None, *stats, **given)


@recipe()
def looked_up(m: Maker) -> Node:
    table = m.parameter(m.fresh("table"), TensorType(DTYPES["f32"], (3, 2)))
    index = m.parameter(m.fresh("index"), TensorType(DTYPES["i64"], (4,)), "constant")
    if m.rng.random() < 0.5:
        return m.b.node("aten.embedding.default", table, index)
    return m.b.node("aten.index_select.default", table, index, dim=-2)


@recipe()
def gathered(m: Maker) -> Node:
    x = m.pick(not_empty)
    index = m.b("aten.argmax.default", x, dim=-1, keepdim=True)
    return m.b.node("aten.gather.default", x, index, dim=-1)


@recipe(2)
def created(m: Maker) -> Node:
    kind = m.rng.randrange(4)
    shape = tuple(m.rng.choice(SIZES[1:]) for _ in range(m.rng.randrange(3)))
    if kind == 0:
        return m.b.node("aten.full.default", size=shape, fill_value=0.5, dtype=DTYPES["f32"])
    if kind == 1:
        return m.b.node("aten.arange.default", end=m.rng.choice(SIZES), dtype=DTYPES["i64"])
    if kind == 2 and m.symbolic and m.made.ranges:
        return m.b.node("aten.ones.default", size=(symbol("B"), 2), dtype=DTYPES["f32"])
    return m.b.node("aten.zeros_like.default", m.float())


@recipe(3)
def dropped_out(m: Maker) -> Node:
    train = m.rng.random() < 0.4
    return m.b.node("aten.dropout.default", m.float(), p=m.rng.choice((0.5, 0.0)), train=train)


@recipe()
def drawn(m: Maker) -> Node:
    if m.rng.random() < 0.5:
        return m.b.node("aten.rand.default", size=(3,), dtype=DTYPES["f32"])
    return m.b.node("aten.rand_like.default", m.float())


@recipe(6)
def twin(m: Maker) -> Node | None:
    """A node that is there already, once more."""
    nodes = [n for n in m.made.nodes if not n.graphs]
    if not nodes:
        return None
    old = m.rng.choice(nodes)
    return m.made.add(old.op, old.inputs, old.attributes)


@recipe()
def branch(m: Maker) -> Node:
    x = m.float()
    t = x.tensor_type
    if t.symbols:
        raise DfcError("V020", "sizes of its own are for other tests")
    zero = m.b("aten.sum.default", m.b("aten.zeros_like.default", x))
    predicate = m.b("aten.ge.Scalar", zero, other=m.rng.choice((0, 1)))  # no or yes
    bodies = []
    for name in ("yes", "no"):
        inner = Graph(f"{name}{len(m.made)}")
        v = inner.add_input("x", t)
        inner.arguments = (Argument("x", LEAF),)
        b = Builder(inner)
        y = b("aten.neg.default", v)
        y = b("aten.clone.default", y) if m.rng.random() < 0.5 else y
        b("aten.exp.default", v)
        total = b("aten.add.Tensor", y, b("aten.neg.default", v))
        inner.set_outputs([total], Seq("tuple", (LEAF,)))
        bodies.append(inner)
    return m.made.add("torch.cond", [(predicate, x)], {}, graphs=bodies, types=[t])
