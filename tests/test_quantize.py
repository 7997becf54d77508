"""The verb `quantize`: which weights become codes, how large the result is, why others stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.lang.selectors import parse_selector
from dfc.ops.codes import fit_pairs
from dfc.recipe.quantities import weight_bytes
from dfc.rewrite.pass_ import Context, find_pass


class Net(nn.Module):
    """A tied table, linear layers, and products with constant matrices as GPT-2 writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(300, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.w = nn.Parameter(torch.randn(64, 96) / 8)
        self.c = nn.Parameter(torch.randn(96, 64) / 8)
        self.b = nn.Parameter(torch.randn(64) / 8)
        self.tiny = nn.Linear(64, 4)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.emb(i)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        y = torch.addmm(self.b, torch.matmul(x, self.w).reshape(-1, 96), self.c)
        return self.head(x), y @ self.w, self.tiny(x)


def graph() -> tuple[Graph, list[Any]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 7))
    return dfc.trace(Net().eval(), (ids,)), [ids]


def quantized(g: Graph, **options: Any) -> tuple[Graph, Context, int]:
    copy, ctx = g.copy(), Context(decisions=[])
    p = find_pass("quantize", options)
    changes = p.run(copy, ctx)
    dfc.parse(str(copy))
    assert p.run(copy, Context()) == 0
    return copy, ctx, changes


def ops(g: Graph) -> list[str]:
    return sorted(n.op for n in g.nodes if n.op.startswith("dfc."))


def relative(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("options", "op", "error"),
    [
        ({"scheme": "weights"}, "w8", 0.02),
        ({"scheme": "weights", "group": 32}, "w8", 0.02),
        ({}, "w8", 0.04),
        ({"to": "int4"}, "w4", 0.2),
        ({"to": "int4", "symmetric": False, "group": 64}, "w4", 0.2),
        ({"to": "int4", "scheme": "dynamic"}, "w4", 0.2),
    ],
)
def test_every_form_of_a_linear_layer_reads_codes(
    options: dict[str, Any], op: str, error: float
) -> None:
    g, inputs = graph()
    small, _, changes = quantized(g, **options)
    assert changes == 5  # the table, up, down, w (two readers), c
    assert ops(small) == [f"dfc.embedding_{op}"] + 6 * [f"dfc.linear_{op}"]
    assert [v.type for v in small.outputs] == [v.type for v in g.outputs]
    floats = [p for p in small.parameters.values() if p.tensor_type.dtype.name == "f32"]
    assert all(p.tensor_type.rank == 1 or "scale" in p.name or "tiny" in p.name for p in floats)
    for a, b in zip(interpret(small, inputs), interpret(g, inputs), strict=True):
        assert 0 < relative(a, b) < error
    share = weight_bytes(small) / weight_bytes(g)
    assert share < (0.31 if op == "w8" else 0.19)


def test_a_tied_table_is_stored_once() -> None:
    g, _ = graph()
    small, ctx, _ = quantized(g)
    codes = [p for p in small.parameters.values() if p.tensor_type.dtype.name == "i8"]
    assert sum(p.tensor_type.shape[0] == 300 for p in codes) == 1
    reasons = [d.reason for d in ctx.decisions or () if d.outcome == "quantized"]
    assert "shared by 2 layers" in reasons[0]


def test_kept_layers_have_a_reason() -> None:
    g, _ = graph()
    _, ctx, changes = quantized(g, exclude=parse_selector('"head" | "up"'))
    kept = {d.loc.module: d.reason for d in ctx.decisions or () if not d.changed and d.loc}
    assert changes == 3
    assert "less than `smallest`" in kept["tiny"]
    assert kept["up"] == "excluded by the step"
    assert kept["emb"] == kept["head"]
    assert "shares !" in kept["head"]  # the table is in the way of the head that is excluded
    _, _, changes = quantized(g, select=parse_selector('"up"'))
    assert changes == 1
    _, ctx, _ = quantized(g, embeddings=False)
    assert (
        "`embeddings` is no"
        in {d.loc.module: d.reason for d in ctx.decisions or () if d.loc}["emb"]
    )


def test_what_stays_large_is_told_with_its_reason() -> None:
    """A file that hardly shrinks says why, and nothing is told of what the user left out."""

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(64, 64)
            self.up = nn.ConvTranspose1d(64, 64, 2)
            self.rnn = nn.LSTM(64, 96, batch_first=True)
            self.both, self.out = nn.Bilinear(8, 8, 64), nn.Linear(96, 32)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.bag(ids)[..., None]).mT + self.both(x, x)[:, None]
            return self.out(self.rnn(y)[0])

    torch.manual_seed(0)
    args = (torch.arange(8).reshape(2, 4), torch.randn(2, 8))
    g = dfc.trace(Others().eval(), args)
    _, ctx, changes = quantized(g)
    kept = {d.loc.module: d.reason for d in ctx.decisions or () if not d.changed and d.loc}
    assert changes == 1 and {*kept} == {"bag", "up", "rnn", "both"}
    (told,) = ctx.products["notes"]
    assert "stay floats: layer %lstm of `rnn`: recurrent layers" in told and "and 3 more" in told
    assert int(told.split("%")[0].split()[-1]) > 90
    _, ctx, _ = quantized(g, exclude=parse_selector('"rnn" | "up" | "bag" | "both"'))
    assert "notes" not in ctx.products


def test_rows_that_do_not_fill_their_last_group() -> None:
    """The codes that fill it up are not read."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(72, 48), nn.Linear(48, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(3, 72)
    g = dfc.trace(Odd().eval(), (x,))
    small, ctx, changes = quantized(g, to="int4", group=64, smallest=0)
    assert changes == 1
    assert [d.reason for d in ctx.decisions or () if not d.changed] == [
        "its rows of 48 are shorter than a group of 64"
    ]
    (codes,) = [p for p in small.parameters.values() if p.tensor_type.dtype.name == "u8"]
    assert codes.tensor_type.shape == (48, 64)
    assert relative(interpret(small, [x])[0], interpret(g, [x])[0]) < 0.2


def test_zero_channels_get_the_scale_one_and_stay_zero() -> None:
    net = nn.Linear(64, 32).eval()
    with torch.no_grad():
        net.weight[3] = 0
    x = torch.randn(2, 64)
    g = dfc.trace(net, (x,))
    for options in ({}, {"to": "int4"}, {"to": "int4", "symmetric": False}):
        small, _, _ = quantized(g, **options)
        (scale,) = [p for p in small.parameters.values() if "scale" in p.name]
        assert scale.data is not None and bool((scale.data.tensor()[3] == 1).all())
        y = interpret(small, [x])[0]
        assert torch.allclose(y[:, 3], net.bias[3].expand(2))


def test_convolutions_are_stored_in_eight_bits() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(8, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(x)

    x = torch.randn(1, 8, 6, 6)
    g = dfc.trace(Conv().eval(), (x,))
    small, _, _ = quantized(g, scheme="weights")
    assert ops(small) == ["dfc.dequantize"]
    assert relative(interpret(small, [x])[0], interpret(g, [x])[0]) < 0.02
    with pytest.raises(DfcError) as refused:
        quantized(g, to="int4")
    assert "no engine has convolutions" in str(refused.value.diagnostics[0].notes)


@pytest.mark.parametrize("group", [None, 32])
def test_pairs_of_codes_fit_sums_of_16_bits_where_they_are_asked_for(group: int | None) -> None:
    g, ids = graph()
    found = []
    for codes in ("full", "pairs"):
        small, _, _ = quantized(g, codes=codes, group=group, embeddings=False)
        held = [p.data for p in small.parameters.values() if p.name.endswith(".codes")]
        found.append([fit_pairs(d.tensor()) for d in held if d is not None])
        assert relative(interpret(small, ids)[0], interpret(g, ids)[0]) < 0.05
    assert not any(found[0]) and found[1] and all(found[1])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"group": 24}, "D097", "power of two, at least 16: got 24"),
        ({"group": 8}, "D097", "at least 16: got 8"),
        ({"smallest": 10**9}, "D096", "nothing is left to quantize"),
        (
            {"exclude": parse_selector('not "nowhere.**"')},
            "D096",
            "nothing is left to quantize but",
        ),
        ({"method": "gptq", "to": "int4"}, "D080", "needs calibration data"),
        ({"scheme": "static"}, "D080", "needs calibration data"),
        ({"symmetric": False}, "D097", "no zero point"),
        ({"codes": "seven"}, "D097", "`codes=seven` is for `scheme=static`"),
        ({"to": "int4", "codes": "pairs"}, "D097", "not for int4"),
        ({"to": "int4", "scheme": "static", "data": "d"}, "D097", "int4 has `weights` and"),
        ({"method": "gptq", "scheme": "static", "data": "d"}, "D097", "not for `static`"),
        ({"group": 32, "scheme": "static", "data": "d"}, "D097", "a scale for each `per`"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], code: str, said: str) -> None:
    g, _ = graph()
    with pytest.raises(DfcError) as refused:
        find_pass("quantize", options).run(g, Context())
    assert refused.value.code == code and said in refused.value.message


def test_what_makes_no_difference_is_told() -> None:
    g, _ = graph()
    _, ctx, _ = quantized(g, scheme="weights", per="tensor", range="mse", activations="int8")
    (told,) = ctx.products["notes"]
    assert "`weights` int8 does not read `range`, `per`" in told
    _, ctx, _ = quantized(g, to="fp8", scheme="weights", per="tensor", correct=False)
    (told,) = ctx.products["notes"]
    assert "`weights` fp8 does not read `correct`" in told


def test_what_multiplies_floats_has_all_codes() -> None:
    """Pairs of codes are for 16-bit sums: elsewhere they would only cost accuracy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(32, 64, 1), nn.Flatten(), nn.Linear(256, 64)).eval()
    convs = dfc.trace(net, (torch.randn(8, 32, 4),))
    table, _ = graph()
    kept = {"0.weight.codes", "emb.weight.codes"}
    for g, tied in ((convs, False), (table, True)):
        full, pairs = (quantized(g, codes=c)[0] for c in ("full", "pairs"))
        for name, p in full.parameters.items():
            if name.endswith(".codes"):
                same = torch.equal(p.data.tensor(), pairs.parameters[name].data.tensor())
                assert same == (name in kept and not tied), name
    floats, _, _ = quantized(convs, scheme="weights")
    same, ctx, _ = quantized(convs, scheme="weights", codes="pairs")
    assert str(floats) == str(same)
    assert "`weights` int8 does not read `codes`" in ctx.products["notes"][0]


def test_a_method_or_a_group_is_not_left_out_where_ranges_could_be_calibrated() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(32, 64, 1), nn.Flatten(), nn.Linear(256, 64)).eval()
    x = torch.randn(8, 32, 4)
    found = {}
    for options in ("", " with method=gptq", " with group=32"):
        recipe = f"dfc 1\ndata d\nrecipe q {{ quantize int8 using d{options} }}"
        c = dfc.compile(net, (x,), recipe=recipe, data={"d": [(x,)] * 4}, engine="eager")
        found[options] = ops(c.graph), c.report.notes
    assert "dfc.quantize" in found[""][0]  # calibrated
    for options in (" with method=gptq", " with group=32"):
        assert "dfc.linear_w8" in found[options][0] and "dfc.quantize" not in found[options][0]
    assert any("convolutions are rounded to nearest" in n for n in found[" with method=gptq"][1])


def test_a_model_without_weights_is_refused_by_layer_and_module() -> None:
    with torch.device("meta"):
        net = Net()
    g = dfc.trace(net.eval(), (torch.randint(0, 300, (2, 7)),))
    with pytest.raises(DfcError) as refused:
        find_pass("quantize").run(g, Context())
    assert refused.value.code == "D002"
    assert "of `emb`: the parameter !emb.weight has no numbers" in refused.value.message


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
def test_weights_that_are_no_numbers_are_refused_by_layer(to: str, number: float) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        net[2].weight[3, 5] = number
    g = dfc.trace(net, (torch.randn(4, 64),))
    with pytest.raises(DfcError, match=r"of `2`: 1 of 2048 weights in !2\.weight are NaN") as e:
        find_pass("quantize", {"to": to}).run(g, Context())
    assert e.value.code == "D090"
    assert quantized(g, to=to, exclude=parse_selector('"2"'))[2] == 1


def test_files_shrink(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 300, (2, 7))
    recipe = "dfc 1\nrecipe small { quantize int4 with group=64 }"
    compiled = dfc.compile(net, (ids,), recipe=recipe, engine="eager")
    plain = dfc.compile(net, (ids,), recipe="dfc 1\nrecipe same { dce }", engine="eager")
    sizes = []
    for which, model in (("small", compiled), ("plain", plain)):
        model.save(tmp_path / f"{which}.dfcpkg")
        model.export(tmp_path / f"{which}.onnx")
        model.export(tmp_path / f"{which}.contrib.onnx", contrib=True)
        sizes.append([
            (tmp_path / f"{which}.dfcpkg" / "weights.safetensors").stat().st_size,
            *(sum(f.stat().st_size for f in tmp_path.glob(f"{which}{end}*"))
              for end in (".onnx", ".contrib.onnx")),
        ])  # fmt: skip
    for small, large in zip(*sizes, strict=True):
        assert small < 0.45 * large  # a graph this small is a third of its file
    again = dfc.load(tmp_path / "small.dfcpkg")
    for a, b in zip(again(ids), compiled(ids), strict=True):
        assert torch.equal(a, b)


def test_merged_layers_leave_nothing_of_what_they_were() -> None:
    """What merging read last was stored beside it, in floats that no later step could quantize."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    recipe = "dfc 1\nrecipe r {\n  fuse merging\n  quantize int8\n}\n"
    made = dfc.compile(Heads().eval(), (torch.randn(3, 64),), recipe=recipe, engine="eager").graph
    assert ops(made) == ["dfc.linear_w8"] and all(p.use_count for p in made.parameters.values())
    assert sum(int(p.tensor_type.nbytes) for p in made.parameters.values()) == 192 * (64 + 2)


def test_a_layer_that_codes_would_make_larger_stays(tmp_path: Path) -> None:
    """Rows of one weight: a code and a scale take more bytes than it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 2048), nn.ReLU(), nn.Linear(2048, 4)).eval()
    for steps in ("quantize int8", "quantize fp8 with scheme=weights"):
        made = dfc.compile(
            net, (torch.randn(3, 1),), recipe=f"dfc 1\nrecipe q {{ {steps} }}", engine="eager"
        )
        assert "0.weight" in made.graph.parameters and "2.weight" not in made.graph.parameters
    with pytest.raises(DfcError, match="nothing is left") as caught:
        text = 'dfc 1\nrecipe q { quantize int8 except "2" }'
        dfc.compile(net, (torch.randn(3, 1),), recipe=text, engine="eager")
    assert "rows are 1 wide" in str(caught.value)


def test_a_part_of_the_model_is_named_by_on() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    text = 'dfc 1\nrecipe q {\n  quantize int4 on "2" with group=64\n  quantize int8\n}\n'
    made = dfc.compile(net, (torch.randn(3, 64),), recipe=text, engine="eager")
    assert [n.op for n in made.graph.nodes if n.op.startswith("dfc.")] == [
        "dfc.linear_w8", "dfc.linear_w4",
    ]  # fmt: skip
    assert 'on "2"' in made.report.recipe or 'select="2"' in made.report.recipe


def test_a_second_quantization_that_finds_nothing_says_so() -> None:
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 300, (2, 7))
    text = "dfc 1\nrecipe q {\n  quantize int8\n  quantize int4\n}\n"
    report = dfc.compile(net, (ids,), recipe=text, engine="eager").report
    assert any("read codes already" in n for n in report.notes)


def test_a_second_quantization_of_another_part_is_told_why_not() -> None:
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 300, (2, 7))
    steps = 'quantize int8 on "up"\n  quantize int4 on "down" with smallest=1000000'
    text = f"dfc 1\nrecipe q {{\n  {steps}\n}}\n"
    notes = dfc.compile(net, (ids,), recipe=text, engine="eager").report.notes
    why = "layer %linear_1 of `down`: it has 8192 weights, less than `smallest` (1000000)"
    assert any(n.endswith(f"read codes already: {why}") for n in notes), notes


def test_a_model_without_layers_is_told_so() -> None:
    text = "dfc 1\nrecipe q { quantize int8 }"
    with pytest.raises(DfcError, match="no linear layer, convolution or table"):
        dfc.compile(nn.Softmax(-1), (torch.randn(3, 4),), recipe=text, engine="eager")


def test_a_metric_that_nothing_asks_for_judges_nothing() -> None:
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 300, (2, 7))
    asked: list[str] = []

    def near(run: Any) -> float:
        asked.append("near")
        return float((run(ids)[0] - net(ids)[0]).abs().max())

    text = "dfc 1\nmetric near, lower is better\nrecipe q {{ quantize int8\n  {} }}"
    for line, proof in (("", "no metric judges"), ("require near <= 100", "judged by near")):
        report = dfc.compile(
            net, (ids,), recipe=text.format(line), engine="eager", metrics={"near": near}
        ).report
        told = [n for n in report.notes if n.startswith("metric `near` was given, and nothing")]
        assert report.proof.startswith(proof) and bool(told) == (not asked) == (not line)


def test_a_package_is_held_to_its_own_results(tmp_path: Path) -> None:
    """`dfc verify` does not call a quantized model wrong for differing from the original."""
    from typer.testing import CliRunner

    from dfc.cli.command import app

    torch.manual_seed(0)
    net, ids = Net().eval(), torch.randint(0, 300, (2, 7))
    compiled = dfc.compile(net, (ids,), recipe="dfc 1\nrecipe q { quantize int8 }", engine="eager")
    assert compiled.report.lossy and compiled.report.proof.startswith("no metric judges")
    compiled.save(tmp_path / "m.dfcpkg")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "m.dfcpkg")])
    assert done.exit_code == 0, done.output


MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(4, 64),)
"""


def test_from_the_shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Compile by a recipe, by a pipeline, explain: with `keep if faster` as for any step."""
    from dfc.cli import main

    def shell(*words: str) -> tuple[int, str]:
        status = main(list(words))
        out, err = capfd.readouterr()
        return status, out + err

    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "small.dfc").write_text(
        'dfc 1\nrecipe small {\n  q: quantize int8 except "down" with scheme=weights\n'
        "  f: quantize int4 with group=64\n  keep if faster\n}\n"
    )
    model, package = f"{tmp_path}/net.py:build", tmp_path / "small.dfcpkg"
    recipe = str(tmp_path / "small.dfc")
    status, said = shell("compile", model, "-r", recipe, "-o", str(package), "--engine", "eager")
    assert status == 0, said
    assert "132.4 kB" in said and "f: keep if faster: " in said
    text = (package / "graph.dfc").read_text()
    assert "!up.weight.codes: i8[256, 64]" in text and "!up.weight:" not in text
    status, said = shell(
        "explain", model, "--pass", "quantize", "-p", "quantize{to=int4, group=128}"
    )
    assert status == 0, said
    assert "int4, groups of 128, symmetric by rtn: 65536 -> 8448 bytes" in said
    assert "its rows of 64 are shorter than a group of 128" in said
    status, said = shell("compile", model, "-p", "quantize{group=48}")
    assert status == 2 and "power of two" in said
