"""`dfc explain`: near misses with what fails first and what would help, decisions, stories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.rewrite import rulesets
from dfc.rewrite.pass_ import KEPT, Context, Decision, find_pass
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.story import grouped

RULES = """\
dfc 1
rule norm(x, weight, eps) {
  match   y = mul(mul(x, rsqrt(add(mean(pow(x, 2), [-1], keepdim=True), eps))), weight)
  where   floating(x) and shape(weight) == [dim(x, -1)] and dtype(weight) == dtype(x)
  rewrite y = rms_norm(x, [dim(x, -1)], weight, value(eps))
  within  1e-5
  applies x: f32[2, 3, 16], weight: f32[16], eps=1e-6
  refuses x: f32[2, 3, 16], weight: f64[16], eps=1e-6
}
rule attend(q, kt, v) {
  match   y = matmul(softmax(matmul(q, kt), -1), v)
  where   rank(q) >= 3 and leading(q, 2) == leading(kt, 2) and leading(q, 2) == leading(v, 2)
  rewrite y = scaled_dot_product_attention(q, transpose(kt, -2, -1), v, scale=1.0)
  within  1e-5
  applies q: f32[2, 5, 8], kt: f32[2, 8, 7], v: f32[2, 7, 8]
  refuses q: f32[5, 8], kt: f32[8, 7], v: f32[7, 8]
}
rule merge(x, wq, wk, wv) {
  match   q = linear(x, wq)
  match   k = linear(x, wk)
  match   v = linear(x, wv)
  where   constant(wq) and constant(wk) and constant(wv)
  rewrite q, k, v = split_with_sizes(linear(x, cat!([wq, wk, wv], dim=0)), [dim(wq, 0), dim(wk, 0), dim(wv, 0)], dim=-1)
  within  1e-5
  applies x: f32[2, 16], wq: f32[8, 16], wk: f32[8, 16], wv: f32[8, 16]
  refuses x: f32[2, 16], wq: f32[8, 16], wk: f32[8, 16], wv: f32[8, 8]
}
"""  # noqa: E501


@pytest.fixture(autouse=True, scope="module")
def _own_rules() -> Iterator[None]:
    with rulesets.instead(rules_of(Source(RULES, "explained.dfc"), "explained")):
        yield


class Norm(nn.Module):
    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        dtype = torch.float64 if odd == "dtype" else torch.float32
        self.weight = nn.Parameter(torch.ones(16, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2)
        if self.odd == "abs":
            square = torch.abs(square)
        return x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.norm = Norm(odd)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x).to(x.dtype)
        q, k, v = self.q(h), self.k(h), self.v(h.clone() if self.odd == "clone" else h)
        weights = torch.softmax(q @ k.transpose(-2, -1), -1)
        out = weights @ v
        return x + out + weights.sum() if self.odd == "reader" else x + out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.other, self.bn2 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        odd = ("", "", "dtype", "reader", "clone", "abs", "abs")
        self.blocks = nn.ModuleList(map(Block, odd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        for block in self.blocks:
            x = block(x)
        y = self.other(x)
        return self.bn2(y) + y


@cache
def graph() -> dfc.Graph:
    return dfc.trace(Net().eval(), (torch.randn(2, 4, 16),))


@cache
def told(rule: str, *passes: str) -> str:
    return str(dfc.explain(graph(), rule=rule, passes=passes or None))


# Rules


def line_of(text: str) -> int:
    """The number of a line of this file."""
    return Path(__file__).read_text().splitlines().index(text) + 1


def test_a_condition_that_fails_is_told_with_its_values_and_a_fix_that_was_tried() -> None:
    line = line_of(
        "        return x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * self.weight"
    )
    text = told("explained.norm")
    assert text.startswith("explained.norm: matched 4 of 7\n")
    assert "  matched    blocks.0..1,3..4.norm (4)\n" in text
    assert (
        f"near miss  blocks.2.norm: %mul_5 (aten.mul.Tensor at tests/test_explain.py:{line})"
        in text
    )
    assert (
        "6 of 6 ops stand, then `dtype(weight) == dtype(x)` fails: "
        "dtype(weight) is f64, dtype(x) is f32\n" in text
    )
    assert "weight = !blocks.2.norm.weight: f64[16]" in text
    assert (
        "the nearest fix: make !blocks.2.norm.weight f32: it is f64 (tried: it then matches)"
        in text
    )
    assert "as it reaches `fuse`, behind canonicalize, remove_noops, fold_constants" in text


def test_another_reader_is_named_with_its_line() -> None:
    line = line_of('        return x + out + weights.sum() if self.odd == "reader" else x + out')
    text = told("explained.attend")
    assert text.startswith("explained.attend: matched 6 of 7\n")
    assert (
        f"3 of 3 ops stand, then %softmax_3 is read by %sum (aten.sum.default) at "
        f"tests/test_explain.py:{line} (blocks.3) as well\n" in text
    )
    assert (
        f"the nearest fix: let %sum (aten.sum.default at tests/test_explain.py:{line}) read "
        "something else; or say `where shared(...)` in the rule (tried: it then matches)" in text
    )


def test_an_op_in_the_way_is_named_and_layers_are_told_together() -> None:
    line = line_of("            square = torch.abs(square)")
    text = told("explained.norm")
    assert "near miss  blocks.5..6.norm (2): %mul_" in text
    place = f"tests/test_explain.py:{line}"
    assert f"5 of 6 ops stand, then %abs (abs) is no pow (at {place})" in text
    fix = f"leave out %abs (aten.abs.default at {place}), which alone stands in the way; or write"
    assert f"the nearest fix: {fix} `abs?(...)` there in the rule (tried: it then matches)" in text


def test_a_pass_that_clears_the_way_is_found_by_running_it() -> None:
    line = line_of(
        '        q, k, v = self.q(h), self.k(h), self.v(h.clone() if self.odd == "clone" else h)'
    )
    text = told("explained.merge", "fuse")
    assert "explained.merge: matched 6 of 7\n" in text
    assert (
        "blocks.4" in text and "%clone (clone) is not %mul_9 (mul), which is `x` elsewhere" in text
    )
    assert f"at tests/test_explain.py:{line}" in text
    assert "the nearest fix: run `remove_noops` before `fuse`: it clears away %clone" in text
    assert "matched 7 of 7" in told("explained.merge")


def test_before_chooses_the_graph() -> None:
    found = dfc.explain(graph(), rule="explained.merge", before="canonicalize")
    assert "as it reaches `canonicalize`, behind no pass" in str(found)
    assert found.data["rules"][0]["near_misses"][0]["fix"].startswith("run `remove_noops`")
    with pytest.raises(DfcError, match="no pass called `canonicalise` runs") as error:
        dfc.explain(graph(), rule="explained.merge", before="canonicalise")
    assert error.value.code == "Q050" and "did you mean `canonicalize`?" in str(error.value)


def test_the_graph_stays_as_it_is() -> None:
    before = str(graph())
    dfc.explain(graph(), rule="explained.attend")
    dfc.explain(graph(), node="softmax")
    assert str(graph()) == before


def test_what_another_rule_takes_first_is_said() -> None:
    text = told("fuse_plain_rms_norm")
    assert "norms.fuse_plain_rms_norm: matched 5 of 7" in text
    assert "but first  `norms.fuse_rms_norm` takes 4: blocks.0..1,3..4.norm (4)" in text


def test_an_unknown_rule_is_told_with_the_nearest() -> None:
    with pytest.raises(DfcError, match="did you mean") as error:
        dfc.explain(graph(), rule="fuse_rms_nrom")
    assert error.value.code == "R008"


# Passes


def decisions(name: str, text: str, **options: object) -> list[Decision]:
    ctx = Context(decisions=[])
    find_pass(name, options).run(dfc.parse(text), ctx)
    assert ctx.decisions is not None
    return ctx.decisions


def test_fold_batch_norm_says_why_not() -> None:
    found = dfc.explain(graph(), pass_="fold_batch_norm")
    text = str(found)
    assert text.startswith("fold_batch_norm: 1 change, behind canonicalize, remove_noops, fold")
    assert "into %conv1d: scales the weights of the layer before it" in text
    line = line_of("        return self.bn2(y) + y")
    assert f"at tests/test_explain.py:{line}): %conv1d_1 is read by others as well: %add" in text
    outcomes = [d["outcome"] for d in found.data["decisions"]]
    assert outcomes == ["folded", "kept"]


def test_every_pass_tells_what_it_did_and_what_it_left() -> None:
    text = """dfc 1
graph @f(%x: f32[2, 3]) -> (f32[2, 3], f32[2, 3]) {
  %a: f32[2, 3] = aten.exp.default(%x)
  %b: f32[2, 3] = aten.exp.default(%x)
  %c: f32[2, 3] = aten.dropout.default(%a, p=0.5, train=False)
  %d: f32[2, 3] = aten.dropout.default(%b, p=0.5, train=True)
  %dead: f32[2, 3] = aten.neg.default(%x)
  return (%c, %d)
}"""
    assert [(d.value, d.outcome, d.into) for d in decisions("cse", text)] == [
        ("%b", "merged", "%a")
    ]
    assert [d.reason for d in decisions("cse", text, limit=0)] == [
        "is like %a; the limit of 0 is reached"
    ]
    assert [(d.value, d.outcome) for d in decisions("dce", text)] == [("%dead", "dropped")]
    assert [(d.value, d.outcome, d.reason) for d in decisions("remove_noops", text)] == [
        ("%c", "removed", "changes nothing"),
        ("%d", KEPT, "it drops out: the model is in training mode"),
    ]
    big = """dfc 1
graph @f() -> (f32[200, 200], f32[2]) {
  %a: f32[200, 200] = aten.ones.default(size=[200, 200], dtype=f32, layout=None, device=None, pin_memory=None)
  %b: f32[2] = aten.rand.default(size=[2], dtype=f32, layout=None, device=None, pin_memory=None)
  return (%a, %b)
}"""  # noqa: E501
    assert [(d.value, d.outcome, d.reason) for d in decisions("fold_constants", big)] == [
        ("%a", KEPT, "it would add 160000 bytes to the model, more than `growth` (65536)"),
        ("%b", KEPT, "it is random, or has an effect"),
    ]
    shaped = """dfc 1
graph @f(%x: f32[2, 3]) -> f32[2, 3] {
  %a: f32[6] = aten.reshape.default(%x, shape=[-1])
  %b: f32[2, 3] = aten.view.default(%a, size=[2, -1])
  return %b
}"""
    assert [(d.value, d.reason) for d in decisions("canonicalize", shaped)] == [
        ("%a", "`aten.reshape.default` is written as `aten.view.default`"),
        ("%b", "in full: size=(2, 3)"),
    ]
    gelu = """dfc 1
graph @f(%x: f32[2, 3], %w: f32[4, 3]) -> f32[2, 4] {
  %a: f32[2, 4] = dfc.linear_gelu(%x, %w, None, approximate="none")
  return %a
}"""
    assert [d.outcome for d in decisions("decompose", gelu)] == ["decomposed"]
    assert [d.reason for d in decisions("decompose", gelu, ops=("linear_w4",))] == [
        "dfc.linear_gelu is not among `ops`"
    ]


def test_nothing_is_written_down_when_nobody_asks() -> None:
    ctx = Context()
    find_pass("remove_noops").run(graph().copy(), ctx)
    assert ctx.decisions is None and not ctx.asked


def test_fuse_tells_which_rule_did_what() -> None:
    text = str(dfc.explain(graph(), pass_="fuse"))
    assert "fused" in text and "`norms.fuse_rms_norm` makes 1 op of 6 ops" in text


def test_a_pass_of_the_users_that_tells_nothing_is_told_by_what_changed() -> None:
    @dataclass(frozen=True)
    class Silent(dfc.Pass):
        name = "silent"

        def run(self, graph: dfc.Graph, ctx: dfc.Context) -> int:
            node = next(n for n in graph.nodes if n.op == "aten.softmax.int")
            graph.replace(node, [node.inputs[0]])
            return 1

    text = str(dfc.explain(graph(), pass_="silent", passes=[Silent()]))
    assert "dropped    %softmax (aten.softmax.int): the pass does not say why" in text
    assert "`ctx.decided(node, ...)`" in text


# Nodes


def attended() -> list[dfc.Pass]:
    names = ("canonicalize", "remove_noops")
    return [*map(find_pass, names), find_pass("fuse", {"rules": ("explained.attend",)})]


def test_a_nodes_whole_story() -> None:
    line = line_of("        weights = torch.softmax(q @ k.transpose(-2, -1), -1)")
    lines = str(dfc.explain(graph(), node="%softmax", passes=attended())).splitlines()
    assert lines[0] == "%softmax"
    assert lines[1].split() == (
        f"traced as aten.softmax.int at tests/test_explain.py:{line} in blocks.0".split()
    )
    assert lines[2].split() == ["canonicalize", "rewritten:", "in", "full:", "dim=2"]
    assert lines[3].endswith("fused into %matmul_1: by `explained.attend`")
    assert "at the end   there: %matmul_1 (aten.scaled_dot_product_attention.default" in lines[4]
    assert [x.split(None, 1)[1] for x in lines[5:8]] == ["takes it"] * 3


def test_a_node_that_no_rule_took_is_told_with_the_nearest_rule() -> None:
    text = str(dfc.explain(graph(), node="%softmax_3", passes=attended()))
    start = "not fused    by `explained.attend`: 3 ops stand, then "
    assert f"{start}%softmax_3 is read by" in text


def test_a_node_that_goes_is_followed_to_the_pass_that_took_it() -> None:
    text = str(dfc.explain(graph(), node="%clone"))
    assert "remove_noops removed into %" in text and "changes nothing" in text


def test_modules_and_ops_stand_for_their_nodes() -> None:
    text = str(dfc.explain(graph(), node="blocks.2.norm"))
    assert text.startswith("blocks.2.norm: 6 values, behind canonicalize")
    assert str(dfc.explain(graph(), node="softmax")).startswith("softmax: 7 values")
    assert "unchanged" in str(dfc.explain(graph(), node="abs"))
    with pytest.raises(DfcError, match="did you mean `softmax_3`") as error:
        dfc.explain(graph(), node="softmax__3")
    assert error.value.code == "Q050"


def test_an_overview_counts_passes_rules_and_what_is_left() -> None:
    passes = ["fold_batch_norm", find_pass("fuse", {"rules": ("explained",)})]
    found = dfc.explain(graph(), passes=passes)
    assert found.data["nodes_before"] == len(graph()) > found.data["nodes_after"]
    rules = {r["rule"]: r for r in found.data["rules"]}
    assert rules["explained.norm"]["applied"] == 4 and rules["explained.norm"]["near_misses"] == 3
    assert rules["explained.attend"] == {
        "rule": "explained.attend", "applied": 6, "near_misses": 1,
    }  # fmt: skip
    passes = {p["pass"]: p for p in found.data["passes"]}
    assert passes["fold_batch_norm"]["kept"] == {
        k: 1 for k in passes["fold_batch_norm"]["kept"]
    } and passes["fold_batch_norm"]["outcomes"] == {"folded": 1}
    assert "more: --rule NAME, --pass NAME, --node" in str(found)


def test_what_a_pass_tells_for_the_report_is_told_here_too() -> None:
    model, calib = torch.nn.Linear(64, 64).eval(), {"calib": [torch.ones(2, 64)]}
    passes = [find_pass("quantize", {"data": "calib"})]
    found = dfc.explain(model, (torch.ones(2, 64),), passes=passes, data=calib)
    (step,) = found.data["passes"]
    assert len(step["notes"]) == 1 and f"note: {step['notes'][0]}" in str(found)
    assert "`calib` was not read" in str(found)
    one = dfc.explain(model, (torch.ones(2, 64),), pass_="quantize", passes=passes, data=calib)
    assert one.data["notes"] == step["notes"] and f"note: {step['notes'][0]}" in str(one)


# The command line

FACTORY = """
import torch
from tests.test_explain import Net

def build():
    return Net().eval(), (torch.randn(2, 4, 16),)
"""


def test_the_command_prints_text_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rulesets, "_loaded", dict(rulesets._loaded))  # what it brings goes with it
    (tmp_path / "model.py").write_text(FACTORY)
    (tmp_path / "mine.dfc").write_text(RULES.partition("rule attend")[0])
    model = f"{tmp_path / 'model.py'}:build"
    use = ["--use", str(tmp_path / "mine.dfc")]
    assert main(["explain", model, *use, "--rule", "mine.norm"]) == 0
    assert capsys.readouterr().out.startswith("mine.norm: matched 4 of 7\n")
    assert main(["explain", model, "--pass", "fold_batch_norm", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["pass"], data["changes"]) == ("fold_batch_norm", 1)
    (tmp_path / "r.dfc").write_text("dfc 1\nrecipe r {\n  remove_noops\n  fuse\n}\n")
    assert main(["explain", model, "--node", "clone", "-r", str(tmp_path / "r.dfc")]) == 0
    assert "remove_noops removed into" in capsys.readouterr().out
    assert main(["explain", model, "--rule", "norms", "--pass", "cse"]) == 2
    assert "one thing at a time" in capsys.readouterr().err


def test_a_compiled_model_explains_what_was_done_to_it(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16)
    model = Norm("").eval()
    compiled = dfc.compile(model, (x,), passes=["canonicalize", "cse"], engine="eager")
    assert compiled.passes is not None and [p.name for p in compiled.passes] == [
        "canonicalize", "cse",
    ]  # fmt: skip
    told = compiled.explain(model, (x,), rule="explained.norm")
    assert "matched 1 of 1" in str(told) and "behind canonicalize, cse" in str(told)
    assert compiled.explain(model, (x,), pass_="cse").data["behind"] == "canonicalize"
    compiled.save(tmp_path / "m.dfcpkg")
    with pytest.raises(DfcError, match="Q050"):
        dfc.load(tmp_path / "m.dfcpkg").explain(model, (x,))


def test_what_was_reverted_is_not_among_the_passes_of_a_compiled_model() -> None:
    recipe = "dfc 1\nrecipe r {\n  q: cse\n  canonicalize\n  revert q\n}\n"
    compiled = dfc.compile(Norm("").eval(), (torch.randn(2, 3, 16),), recipe=recipe, engine="eager")
    assert compiled.passes == ()


def test_decisions_that_differ_in_a_share_alone_are_told_once() -> None:
    reasons = ["int8: off by 0.9 %", "int8: off by 1.2 %", "int8: off by 0.88 %", "4 bits"]
    told = grouped([Decision(f"%l{i}", "linear", "quantized", r) for i, r in enumerate(reasons)])
    assert [(g.reason, len(g.sites)) for g in told] == [
        ("int8: off by 0.88 to 1.2 %", 3), ("4 bits", 1),
    ]  # fmt: skip
