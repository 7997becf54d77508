"""Functions instead of operators' objects: the same overload, with the same arguments."""

from __future__ import annotations

import copy
import re
import types
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dfc
from dfc.calling import flat_inputs
from dfc.emit.fx import to_fx
from dfc.emit.places import place_of
from dfc.runtime.direct import call_directly, functions
from dfc.runtime.engines import find_engine
from tests.zoo import Case, cases

ZOO = {"bert", "gpt2", "llama", "t5_encoder"}
X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
ROW = torch.linspace(0, 1, 4)
SQUARE = torch.linspace(-1, 1, 16).reshape(4, 4)
IMAGE = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
PIXELS = torch.ones(2, 4, 1, 1)
INDEX = torch.tensor([[[0, 1, 2, 0]]])
SAMPLES: dict[str, tuple[Any, ...]] = {
    "_log_softmax.default": (X, -1, False),
    "_log_softmax_backward_data.default": (X, X, -1, torch.float32),
    "_softmax.default": (X, -1, False),
    "_softmax_backward_data.default": (X, X, -1, torch.float32),
    "addmm_.default": (SQUARE, SQUARE, SQUARE),
    "addmm.default": (ROW, SQUARE, SQUARE),
    "amax.default": (X, [1]),
    "avg_pool2d.default": (IMAGE, [2, 2]),
    "baddbmm.default": (X[:, :, :3], X, X.transpose(1, 2)),
    "bmm.default": (X, X.transpose(1, 2)),
    "cat.default": ([X, X], 1),
    "chunk.default": (X, 2, -1),
    "clamp.default": (X, -0.5, 0.5),
    "conv1d.default": (X, torch.ones(2, 3, 1), torch.ones(2)),
    "conv2d.default": (IMAGE, PIXELS, torch.ones(2)),
    "conv3d.default": (IMAGE[None], torch.ones(2, 1, 1, 1, 1), torch.ones(2)),
    "convolution.default": (
        IMAGE,
        torch.ones(2, 4, 1, 1),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
    ),
    "cumsum.default": (X, 1),
    "dropout.default": (X, 0.5, False),
    "embedding.default": (SQUARE, INDEX),
    "expand.default": (ROW, [2, -1]),
    "flatten.using_ints": (X, 1),
    "gather.default": (X, 1, INDEX),
    "group_norm.default": (IMAGE, 2, ROW, ROW),
    "layer_norm.default": (X, [4], ROW, ROW),
    "linear.default": (X, SQUARE, ROW),
    "masked_fill.Scalar": (X, X > 0, 0.5),
    "matmul.default": (X, SQUARE),
    "max_pool2d.default": (IMAGE, [2, 2]),
    "mean.dim": (X, [1], True),
    "mm.default": (SQUARE, SQUARE),
    "native_layer_norm.default": (X, [4], ROW, ROW, 1e-5),
    "permute.default": (X, [2, 0, 1]),
    "pow.Tensor_Scalar": (X, 2),
    "reshape.default": (X, [2, -1]),
    "rms_norm.default": (X, [4], ROW),
    "scaled_dot_product_attention.default": (IMAGE, IMAGE, IMAGE),
    "select.int": (X, 1, 0),
    "softmax.int": (X, -1),
    "split_with_sizes.default": (X, [1, 2], 1),
    "squeeze.dim": (IMAGE, 0),
    "stack.default": ([X, X], 1),
    "sum.dim_IntList": (X, [1], True),
    "t.default": (SQUARE,),
    "transpose.int": (X, 1, 2),
    "unsqueeze.default": (X, 1),
    "view.default": (X, [2, -1]),
    "where.self": (X > 0, X, -X),
}


class Called(TorchDispatchMode):
    """The overloads that reached the dispatcher's end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.overloads: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.overloads.append(func)
        return func(*args, **(kwargs or {}))


def called(run: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
    with torch.no_grad(), Called() as mode:
        result = run(*args, **kwargs)
    return mode.overloads, result


def whole(overload: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as graphs give them: all of them, defaults too."""
    name = f"{overload._schema.name.removeprefix('aten::')}.{overload._overloadname}"
    arguments = overload._schema.arguments
    tensors = [a for a in arguments if a.type.kind() == "TensorType" and not a.kwarg_only]
    given = SAMPLES.get(name, (X, X / 2)[: len(tensors)])
    rest = arguments[len(given) :]
    named = {a.name: a.default_value for a in rest if a.kwarg_only}
    return [*given, *(a.default_value for a in rest if not a.kwarg_only)], named


@pytest.mark.parametrize("overload", functions(), ids=str)
def test_a_function_is_its_operator(overload: Any) -> None:
    args, kwargs = whole(overload)
    function = functions()[overload]
    assert not isinstance(function, types.FunctionType), "Python's own would take longer"
    # Each its own: some write into their first.
    want, result = called(overload, *copy.deepcopy(args), **kwargs)
    seen, same = called(function, *copy.deepcopy(args), **kwargs)
    assert seen == want
    torch.testing.assert_close(same, result, rtol=0, atol=0, equal_nan=True)


AWAY = "cuda:0"  # a place that PyTorch simulates here: nothing is computed


def away(values: Any) -> Any:
    """Tensors of these sizes and strides on another device."""
    return tree_map_only(
        torch.Tensor,
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=AWAY),
        values,
    )


def places(result: Any) -> list[Any]:
    tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    return [(str(x.device), x.dtype, x.shape, x.stride()) for x in tensors]


@pytest.mark.parametrize("overload", functions(), ids=str)
def test_a_function_leaves_values_on_a_gpu_as_its_operator_does(overload: Any) -> None:
    args, kwargs = whole(overload)
    with FakeTensorMode():
        want, result = called(overload, *away(args), **kwargs)
        seen, same = called(functions()[overload], *away(args), **kwargs)
    assert seen == want
    assert places(same) == places(result)
    assert {place for place, *_ in places(same)} == {AWAY}


class OnHost(TorchDispatchMode):
    """The tensors that are made in this machine's memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [func for place, *_ in places(result) if place == "cpu"]
        return result


@pytest.mark.parametrize("case", [c for c in cases() if c.name in ZOO], ids=str)
def test_the_eager_engine_makes_nothing_on_the_host_for_a_gpu(case: Case) -> None:
    """Neither weights nor masks, positions and numbers that the graph makes on its way."""
    built = case.build()
    graph = dfc.trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    flat = flat_inputs(graph, built.args, built.kwargs)
    # It is given what is on the host, too: weights are there as it is built.
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = find_engine("eager").build(graph, AWAY)
        with OnHost() as host:
            results = run(away(flat))
    assert not host.made
    assert results and {place for place, *_ in places(results)} == {AWAY}


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.then = (
            torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(x)))
        y: torch.Tensor = torch.cond(x.sum() > 0, self.then, lambda x: x[:, :4] * 2, (x,))
        return y


def test_a_model_calls_the_same_in_all_its_parts() -> None:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    graph = dfc.trace(Branches().eval(), (x,))
    plain, module = to_fx(graph), to_fx(graph)
    call_directly(module)
    parts = [p for p in module.modules() if isinstance(p, fx.GraphModule)]
    targets = {n.target for p in parts for n in p.graph.nodes}
    assert len(parts) == 3
    assert {torch._C._nn.linear, torch.relu, torch.layer_norm} < targets
    assert not targets & set(functions())
    assert all(p.__dict__[n] is x for p in parts for n, x in p.named_buffers(recurse=False))
    want, (result,) = called(plain, x)
    seen, (same,) = called(module, x)
    assert seen == want
    torch.testing.assert_close(same, result, rtol=0, atol=0)


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).sum()


def test_what_fails_is_told_by_its_line_and_by_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """fx's own report takes a second of imports, in which a rank of a pipeline seems to hang."""
    graph = dfc.trace(Looked(), (torch.tensor([1]),))
    run = find_engine("eager").build(graph)
    with pytest.raises(IndexError, match="out of range") as e:
        run([torch.tensor([7])])
    assert re.search(r"test_direct\.py:\d+$", place_of(e.value) or "")
    assert not capfd.readouterr().err
