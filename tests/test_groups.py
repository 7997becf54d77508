"""Dependency groups: axes that split and meet, and pruning whatever the zoo has."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc
from dfc.calling import flat_inputs
from dfc.compress.axes import (
    cut,
    factors,
    find,
    freeze,
    kept_mask,
    leaf,
    leaves,
    new_size,
    product,
    refine,
    segments,
    total,
    unite,
)
from dfc.compress.groups import Group, Groups, find_groups
from dfc.compress.shrink import shrink
from dfc.compress.work import work_of
from dfc.ir.expr import symbol
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from tests.zoo import Case, cases
from tests.zoo.coverage import recorded

# Axes


def test_a_reshape_into_heads_lets_whole_heads_go() -> None:
    width = leaf(12)
    heads, size = refine(width, (3, 4))
    mask = kept_mask(width, lambda x: [True, False, True] if x is find(heads) else [True] * 4)
    assert mask == [True] * 4 + [False] * 4 + [True] * 4
    assert new_size(width, lambda x: 2 if x is find(heads) else x.size) == 8
    assert find(size).size == 4


def test_two_reshapes_of_one_axis_are_refined_together() -> None:
    a, b = leaf(24), leaf(24)
    refine(a, (6, 4))
    refine(b, (2, 12))
    unite(a, b)
    assert [x.size for x in factors(a)] == [2, 3, 4] == [x.size for x in factors(b)]
    assert list(leaves(a)) == list(leaves(b))


def test_reshapes_that_do_not_fit_each_other_freeze_both() -> None:
    a, b = leaf(36), leaf(36)
    refine(a, (4, 9))
    refine(b, (6, 6))
    unite(a, b, "add in `m`")
    assert all(x.frozen for axis in (a, b) for x in leaves(axis))
    assert "arranged in two ways at add in `m`" in next(iter(next(leaves(a)).frozen))


def test_parts_side_by_side_meet_where_both_are_cut() -> None:
    a, b = total([leaf(4), leaf(8)]), total([leaf(6), leaf(6)])
    unite(a, b)
    assert [x.size for x in segments(a)] == [4, 2, 6]
    assert list(leaves(a)) == list(leaves(b))


def test_equal_parts_seen_as_a_factor_shrink_alike() -> None:
    q, k, v = parts = [leaf(8) for _ in range(3)]
    packed = total(parts)
    three, each = refine(packed, (3, 8))
    assert find(q) is find(k) is find(v) is find(each)
    assert find(three).frozen


def test_a_cut_between_the_rows_of_a_product_cuts_its_outer_factor() -> None:
    heads, size = leaf(6), leaf(4)
    first, rest = cut(product([heads, size]), (8, 16))
    assert [find(x).size for x in factors(first)] == [2, 4]
    assert [find(x).size for x in factors(rest)] == [4, 4]


def test_a_cut_through_a_row_freezes() -> None:
    heads, size = leaf(6), leaf(4)
    cut(product([heads, size]), (6, 18))
    assert find(heads).frozen and find(size).frozen


def test_open_sizes_split_where_they_divide() -> None:
    batch = symbol("B")
    merged = leaf(batch * 12)
    outer, heads = refine(merged, (batch, 12))
    assert find(outer).size == batch and find(heads).size == 12
    assert new_size(merged, lambda x: 8 if x is find(heads) else x.size) == batch * 8


def test_reasons_follow_what_is_refined_and_united_later() -> None:
    a, b = leaf(12), leaf(12)
    freeze(a, "why")
    unite(a, b)
    assert all("why" in x.frozen for x in map(find, refine(b, (3, 4))))


# Groups of small models


def trace(model: nn.Module, *args: Tensor, **options: Any) -> Graph:
    return dfc.trace(model.eval(), args, **options)


def names(graph: Graph) -> dict[str, tuple[str, int]]:
    return {g.name: (g.kind, g.size) for g in find_groups(graph).prunable}


def test_hidden_units_are_a_group_and_inputs_and_outputs_are_not() -> None:
    groups = find_groups(
        trace(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.ones(2, 8))
    )
    (hidden,) = groups.prunable
    assert (hidden.name, hidden.kind, hidden.size) == ("0", "ffn", 32)
    assert {(p.name, d) for p, d in hidden.members} == {
        ("0.weight", 0),
        ("0.bias", 0),
        ("2.weight", 1),
    }
    reasons = {r for g in groups.groups for r in g.frozen}
    assert any("size of the input %input" in r for r in reasons), reasons
    assert any("size of the output" in r for r in reasons), reasons


class GroupedQueries(nn.Module):
    """Grouped heads and rotary embedding, as decoders write them."""

    def __init__(self, repeat: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)
        self.repeat = repeat

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = (f(x).view(b, s, 2, 8).transpose(1, 2) for f in (self.k, self.v))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if self.repeat == "expand":
            k, v = (t[:, :, None].expand(b, 2, 2, s, 8).reshape(b, 4, s, 8) for t in (k, v))
        elif self.repeat == "interleave":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        elif self.repeat == "sized":
            k, v = (t.repeat_interleave(2, 1, output_size=4) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeat)
        return self.o(y.transpose(1, 2).reshape(b, s, 32))  # type: ignore[no-any-return]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@pytest.mark.parametrize("repeat", ["", "expand", "interleave", "sized"])
def test_a_key_head_takes_its_query_heads_along(repeat: str) -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 5, 32), torch.randn(5, 8), torch.randn(5, 8))
    graph = trace(GroupedQueries(repeat), *args)
    (heads,) = [g for g in find_groups(graph).prunable if g.kind == "heads"]
    assert heads.size == 2
    assert {p.name for p, _ in heads.members} == {
        "q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "o.weight",
    }  # fmt: skip
    small, _ = pruned(graph, {heads.name: [True, False]}, "heads")
    assert small.parameters["q.weight"].tensor_type.shape == (16, 32)
    assert small.parameters["k.weight"].tensor_type.shape == (8, 32)
    assert_equals_zeroed(graph, args, "heads")


class OneKeyHead(nn.Module):
    """Query heads that share the only key head, as rows beside the tokens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, n) for n in (32, 8, 8, 32))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "einsum":
            scores = torch.einsum("bthd,bsd->bhts", q.view(b, s, 4, 8), k).softmax(-1)
            y = torch.einsum("bhts,bsd->bthd", scores, v)
        else:
            y = torch.bmm(torch.bmm(q.view(b, s * 4, 8), k.transpose(1, 2)).softmax(-1), v)
        return self.o(y.reshape(b, s, 32))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["rows", "einsum"])
def test_query_heads_of_one_key_head_are_heads(how: str) -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 5, 32),)
    graph = trace(OneKeyHead(how), *args)
    found = {g.kind: g for g in find_groups(graph).prunable}
    assert found["heads"].size == 4 and found["heads"].exact
    assert {p.name for p, _ in found["heads"].members} == {"q.weight", "q.bias", "o.weight"}
    assert_equals_zeroed(graph, args, "heads")


def test_rotary_embedding_ties_the_halves_of_a_head() -> None:
    args = (torch.randn(2, 5, 32), torch.randn(5, 8), torch.randn(5, 8))
    sizes = [
        g.size for g in find_groups(trace(GroupedQueries(""), *args)).groups if g.kind == "head_dim"
    ]
    assert 4 in sizes, "channel j and j + 4 of a head go together"


class Sampled(nn.Module):
    """Each head samples its values at places of its own, as deformable attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.where = nn.Conv2d(3, 24, 1), nn.Linear(6, 4 * 5 * 2)
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        b, _, h, w = x.shape
        images = self.value(x).reshape(b * 4, 6, h, w)
        places = self.where(queries).view(b, 5, 4, 2).transpose(1, 2).reshape(b * 4, 5, 1, 2)
        y = F.grid_sample(images, places.tanh(), align_corners=False)
        return self.out(y.reshape(b, 24, 5).transpose(1, 2))  # type: ignore[no-any-return]


def test_a_head_takes_the_places_that_it_samples_along() -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 3, 4, 4), torch.randn(2, 1, 6))
    graph = trace(Sampled(), *args)
    assert assert_equals_zeroed(graph, args)


class Experts(nn.Module):
    """Rows in runs, each with an expert's matrices, as mixtures of experts compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 2 * 16, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401 - makes the operator known

        product = torch.ops.transformers.grouped_mm_fallback
        gate, up = product(x, self.up.transpose(1, 2), ends).chunk(2, -1)
        return product(F.silu(gate) * up, self.down.transpose(1, 2), ends)  # type: ignore[no-any-return]


def test_hidden_units_of_experts_go_from_every_expert_at_once() -> None:
    torch.manual_seed(0)
    args = (torch.randn(7, 8), torch.tensor([2, 3, 7], dtype=torch.int32))
    graph = trace(Experts(), *args)
    (hidden,) = find_groups(graph).prunable
    assert (hidden.kind, hidden.size) == ("ffn", 16)
    assert assert_equals_zeroed(graph, args) == 1
    assert work_of(graph).macs == 7 * 8 * 32 + 7 * 16 * 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        )
        self.wide = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.body(x)
        return self.last(torch.cat([x, self.wide(x)], 1))  # type: ignore[no-any-return]


def test_channels_go_together_through_residuals_depthwise_convolutions_and_concats() -> None:
    graph = trace(Residual(), torch.randn(1, 3, 8, 8))
    groups = {g.size: g for g in find_groups(graph).prunable}
    assert {(p.name, d) for p, d in groups[16].members} >= {
        ("first.weight", 0), ("body.0.weight", 0), ("body.2.weight", 0), ("body.2.weight", 1),
        ("wide.weight", 1), ("last.weight", 1),
    }  # fmt: skip
    assert {(p.name, d) for p, d in groups[8].members} == {
        ("wide.weight", 0), ("wide.bias", 0), ("last.weight", 1),
    }  # fmt: skip
    small, _ = pruned(graph, {g.name: [i % 2 == 0 for i in range(g.size)] for g in groups.values()})
    (depthwise,) = [n for n in small.nodes if n.attributes.get("groups") == 8]
    assert depthwise.result.tensor_type.shape == (1, 8, 8, 8)
    assert small.parameters["last.weight"].tensor_type.shape == (5, 12, 1, 1)


class Tied(nn.Module):
    """One table that is looked up and that makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, i: Tensor) -> Tensor:
        x = self.table(i)
        x = x + self.down(F.gelu(self.up(x)))
        return F.linear(x, self.table.weight)


def test_a_tied_table_shrinks_once_for_both_of_its_uses() -> None:
    graph = trace(Tied(), torch.arange(6)[None])
    assert {g.size for g in find_groups(graph).prunable} == {16, 64}
    small, _ = pruned(
        graph,
        {g.name: [i < g.size // 2 for i in range(g.size)] for g in find_groups(graph).prunable},
    )
    assert small.parameters["table.weight"].tensor_type.shape == (20, 8)
    assert_equals_zeroed(graph, (torch.arange(6)[None],), "ffn")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sort(self.a(x)).values)  # type: ignore[no-any-return]


def test_what_no_rule_knows_is_frozen_with_its_op_and_module() -> None:
    groups = find_groups(trace(Unknown(), torch.ones(2, 8)))
    assert not groups.prunable
    assert any("no rule says how `sort`" in r for g in groups.groups for r in g.frozen)


# The oracle: units whose results nothing reads can go


def pruned(
    graph: Graph, keep: Mapping[str, list[bool]], kind: str = ""
) -> tuple[Graph, dict[Group, list[bool]]]:
    small = graph.copy()
    groups = find_groups(small)
    kept = {g: keep[g.name] for g in groups.prunable if g.name in keep and kind in ("", g.kind)}
    assert len(kept) == len(keep)
    shrink(groups, kept)
    verify(small)
    return small, kept


def zeroed(groups: Groups, kept: Mapping[Group, list[bool]]) -> dict[str, Tensor] | None:
    """The weights with zeros where a unit that goes is read; None when something else reads it."""
    masks = {g.axis: mask for g, mask in kept.items()}
    changed: dict[str, Tensor] = {}
    for g in kept:
        if not g.readers or any(u.parameter is None for u in g.readers):
            return None
        for u in g.readers:
            assert u.parameter is not None and u.parameter.data is not None
            w = changed.get(u.parameter.name, u.parameter.data.tensor())
            axis = groups.analysis.dims[u.parameter][u.dim]
            mask = kept_mask(axis, lambda x: masks.get(x) or [True] * int(x.size))  # type: ignore[arg-type]
            changed[u.parameter.name] = w * torch.tensor(mask).reshape(
                [-1 if d == u.dim else 1 for d in range(w.dim())]
            )
    return changed


def random_keep(g: Group, seed: int) -> list[bool]:
    count = max(1, round(0.7 * g.size))
    order = torch.randperm(g.size, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [i in order for i in range(g.size)]


def assert_equals_zeroed(graph: Graph, inputs: Sequence[Any], *kinds: str) -> int:
    """Prune all groups of these kinds, and compare with the original with zeroed weights."""
    small = graph.copy()
    groups = find_groups(small)
    chosen = [g for g in groups.prunable if not kinds or g.kind in kinds]
    kept = {g: random_keep(g, i) for i, g in enumerate(chosen)}
    weights = zeroed(groups, kept) if all(g.exact for g in chosen) else None
    sizes = sum(p.tensor_type.nbytes for p in small.parameters.values())  # type: ignore[misc]
    shrink(groups, kept)
    verify(small)
    assert not kept or sum(p.tensor_type.nbytes for p in small.parameters.values()) < sizes  # type: ignore[misc,operator]
    torch.manual_seed(0)
    found = interpret(small, copy.deepcopy(inputs))
    if weights is None:
        return 0
    torch.manual_seed(0)
    wanted = interpret(graph, copy.deepcopy(inputs), parameters=weights)
    for x, y in zip(found, wanted, strict=True):
        if isinstance(y, Tensor) and y.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, equal_nan=True)
    return len(kept)


# Nothing in these depends on which model it is: `prune` has no code for any of them.
_LIGHT = ("cnn", "attention")
_HEAVY = ("recurrent", "awkward", "numerics", *(f"huggingface_{x}" for x in (
    "text", "vision", "seq2seq", "audio", "moe", "ssm")))  # fmt: skip
_NOT_TRACED = {r.name for r in recorded() if r.capture}  # as docs/coverage.md says


def _of(families: Sequence[str]) -> list[Case]:
    return [c for f in families for c in cases(f) if c.name not in _NOT_TRACED]


def _traced(case: Case) -> tuple[Graph, list[Any]]:
    b = case.build()
    graph = dfc.trace(b.model, b.args, b.kwargs, b.dynamic_shapes)
    return graph, flat_inputs(graph, b.args, b.kwargs)


# So that a rule that freezes all does not pass for one that is right.
_PRUNABLE = {
    "resnet18": {"channels": 12}, "mobilenet_v2": {"channels": 5}, "densenet": {"channels": 7},
    "shufflenet": {"channels": 4}, "unet": {"channels": 12},
    "transformer_encoder": {"heads": 2, "ffn": 2, "head_dim": 2},
    "nano_gpt": {"heads": 2, "ffn": 2, "head_dim": 4, "width": 1},
}  # fmt: skip


def _check(case: Case) -> None:
    graph, inputs = _traced(case)
    assert_equals_zeroed(graph, inputs)  # every kind: valid, smaller, runs
    assert_equals_zeroed(graph, inputs, "heads", "ffn", "channels")
    if case.name in _PRUNABLE:
        found = Counter(g.kind for g in find_groups(graph).prunable)
        assert dict(found) == _PRUNABLE[case.name]


@pytest.mark.parametrize("case", _of(_LIGHT), ids=str)
def test_the_zoo_is_pruned(case: Case) -> None:
    _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", _of(_HEAVY), ids=str)
def test_the_transformers_zoo_is_pruned(case: Case) -> None:
    _check(case)


def test_the_zoo_has_the_well_known_architectures() -> None:
    assert {c.name for c in _of(_LIGHT)} >= set(_PRUNABLE)
