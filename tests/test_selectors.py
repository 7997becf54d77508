"""Selectors against a model as it is captured: by module path, op, dtype, parameter and place."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.search import glob
from dfc.lang.selectors import parse_selector
from dfc.passes.fuse import Fuse


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 8)
        self.fc2 = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fc2(torch.relu(self.fc1(x))))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).softmax(-1).long()


@cache
def graph() -> Graph:
    return dfc.trace(Net().eval(), (torch.tensor([1, 2, 3]),))


def ops(text: str) -> list[str]:
    return [n.op.split(".")[1] for n in parse_selector(text).nodes(graph())]


def parameters(text: str) -> list[str]:
    return [p.name for p in parse_selector(text).parameters(graph())]


BLOCK = ["linear", "relu", "linear", "add", "layer_norm"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('"blocks.1.fc1"', ["linear"]),
        ('"blocks.1"', ["relu", "add"]),  # what the block itself does
        ('"blocks.1.*"', ["linear", "linear", "layer_norm"]),
        ('"blocks.1.**"', BLOCK),  # itself, and all below
        ('"blocks.*.fc*"', ["linear"] * 6),
        ('"**.norm"', ["layer_norm"] * 3),
        ('"**"', ["embedding", *BLOCK * 3, "linear", "softmax", "_to_copy"]),
        ("op(relu)", ["relu"] * 3),
        ("op(aten.relu)", ["relu"] * 3),
        ("op(aten.relu.default)", ["relu"] * 3),
        ('op("*norm*")', ["layer_norm"] * 3),
        ("dtype(i64)", ["_to_copy"]),
        ('param("*.bias") & op(linear)', ["linear"] * 7),
        ('param("embed.weight")', ["embedding"]),
        ("first(1)", BLOCK),
        ("last(2)", BLOCK * 2),
        ("first(99)", BLOCK * 3),
        ('between("embed", "blocks.0.fc1")', ["embedding", "linear"]),
        ('between("blocks.1.**", "blocks.1.**") & op(linear)', ["linear"] * 2),
        ("not op(linear) & not op(relu) & first(1)", ["add", "layer_norm"]),
        ("not (op(linear) | op(relu)) & first(1)", ["add", "layer_norm"]),
        ('"head" | op(embedding)', ["embedding", "linear"]),
        ("op(relu) and last(1)", ["relu"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_selector_finds_nodes(text: str, wanted: list[str]) -> None:
    assert ops(text) == wanted
    again = str(parse_selector(text))
    assert parse_selector(again) == parse_selector(text) and ops(again) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('"blocks.1.fc1"', ["blocks.1.fc1.weight", "blocks.1.fc1.bias"]),
        ('param("*.weight") & "head"', ["head.weight"]),
        ('param("*.weight") & "blocks.0.fc*"', ["blocks.0.fc1.weight", "blocks.0.fc2.weight"]),
        ('param("blocks.?.fc1.bias") | param("head.bias")', None),
        ("op(relu)", []),
        ('not param("blocks.**") & not "head"', ["embed.weight"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_a_selector_finds_parameters(text: str, wanted: list[str] | None) -> None:
    if wanted is None:  # `?` is no wildcard
        with pytest.raises(DfcError, match="no parameter matches"):
            parameters(text)
    else:
        assert parameters(text) == wanted


@pytest.mark.parametrize(
    "text, code, message",
    [
        ('"blokcs.1.fc1"', "Q021", "did you mean `blocks.1.fc1`, `blocks.2.fc1`, `blocks.1.fc2`?"),
        ('"head.**.fc"', "Q021", "no module matches `head.**.fc`"),
        ("op(linea)", "Q021", "did you mean `linear`?"),
        ('param("*.wieght")', "Q021", "did you mean `weight`?"),
        ("op(relu) & dtype(i64)", "Q021", "`op(relu)` 3, `dtype(i64)` 1"),
        ("dtype(f64)", "Q021", "nothing matches `dtype(f64)`"),
        ('between("head", "embed")', "Q021", "nothing matches"),
        ('"blocks.1.fc1" | "nope"', "Q021", "no module matches `nope`"),
        ("op(relu, add)", "Q020", "`op` takes 1 argument(s)"),
        ("first(0)", "Q020", "a whole number above 0"),
        ("first(1.5)", "Q020", "a whole number above 0"),
        ("last(2MiB)", "Q020", "a whole number above 0"),
        ("dtype(f33)", "Q020", "a dtype such as f32"),
        ("head", "Q020", 'a module path is a string: "head"'),
        ("3", "Q020", "`3` is no selector"),
        ("frist(1)", "Q020", "did you mean `first`?"),
        ("op?(relu)", "Q020", "`op` takes 1 argument(s)"),
        ('"a" | ', "P002", "unexpected end of line"),
        ('"a" "b"', "P002", 'unexpected `"b"`'),
        ("", "P002", "unexpected end of line"),
        ('"a"\n"b"', "P002", "one expression is wanted"),
        ('"a" } recipe x {', "P002", "`}` closes nothing"),
        ('"a', "P001", "not closed"),
    ],
    ids=lambda x: str(x),
)
def test_what_is_no_selector_or_finds_nothing_is_told(text: str, code: str, message: str) -> None:
    with pytest.raises(DfcError) as error:
        parse_selector(text, "SELECTOR").nodes(graph())
    assert error.value.code == code and message in str(error.value)
    assert str(error.value).startswith("SELECTOR:") and error.value.status == 2


def test_the_place_is_that_of_the_part_that_finds_nothing() -> None:
    with pytest.raises(DfcError) as error:
        parse_selector('op(relu) | "hed"', "SELECTOR").nodes(graph())
    span = error.value.diagnostics[0].span
    assert span is not None and (span.col, span.end_col) == (12, 17)


def test_a_rewritten_graph_may_hold_nothing_any_more() -> None:
    copy = graph().copy()
    for n in [n for n in copy.nodes if n.op == "aten.relu.default"]:
        copy.replace(n, [next(n.operands)])
    assert parse_selector("op(relu) & first(1)").nodes_left(copy) == []
    assert parse_selector('not op(relu) & "head"').nodes_left(copy) != []


@pytest.mark.parametrize(
    "pattern, path, fits",
    [
        ("", "", True), ("**", "", True), ("*", "", False), ("a", "", False),
        ("a.**", "a", True), ("a.**", "a.b.c", True), ("**.c", "a.b.c", True),
        ("a.*.c", "a.b.c", True), ("a.*", "a.b.c", False), ("a*c", "abbc", True),
        ("a*c*", "axcx", True), ("*a*b*", "xaxbx", True), ("*a*b*", "xbxax", False),
        ("a*a", "a", False), ("**.**", "a", True), ("a.**.a", "a", False),
        ("A", "a", False), (".", "", False),
    ],
)  # fmt: skip
def test_paths_match_part_by_part(pattern: str, path: str, fits: bool) -> None:
    assert glob(pattern)(path) is fits


def test_paths_that_make_other_matchers_hang() -> None:
    assert not glob("*a" * 5000 + "b")("a" * 10_000)
    assert not glob(".".join(["**", "a"] * 200) + ".b")(".".join("a" * 2000))
    assert glob("**." * 5000 + "b")("a.b")


def test_a_module_number_of_any_length_is_no_number() -> None:
    text = 'dfc 1 graph @f(%x: f32[2]) -> f32[2] { %a: f32[2] = aten.neg.default(%x) loc("n.py":1 "a.NUMBER") return %a }'  # noqa: E501
    deep = dfc.parse(text.replace("NUMBER", "9" * 6000))
    with pytest.raises(DfcError, match="no module has a number"):
        parse_selector("first(1)").nodes(deep)


def test_fuse_leaves_out_what_is_excluded_even_beside_what_is_selected() -> None:
    assert all(map(Fuse()._allowed(graph()), graph().walk()))
    options = {"select": parse_selector('"blocks.1.**"'), "exclude": parse_selector("op(relu)")}
    allowed = Fuse(**options)._allowed(graph())
    assert [n.op.split(".")[1] for n in graph().walk() if allowed(n)] == [
        "linear", "linear", "add", "layer_norm",
    ]  # fmt: skip
