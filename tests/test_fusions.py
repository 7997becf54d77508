"""The shipped rules on real modules: what is left of each, and that the results stay right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.calling import flat_inputs
from dfc.emit.onnx import export_onnx
from dfc.ir.graph import Graph
from dfc.passes.fuse import Fuse
from dfc.rewrite.deciding import base_of
from dfc.rewrite.driver import Outcome, run_passes
from dfc.rewrite.pass_ import DEFAULT, find_pass
from dfc.rewrite.probe import make_probes

transformers = pytest.importorskip("transformers")
SETS = ("activations", "linear", "softmax")


def fused(
    model: nn.Module, *inputs: Any, rules: Sequence[str] = SETS, dynamic: Any = None
) -> Graph:
    """The model's graph after simplifying and these rules, each pass proved and none taken back."""
    graph = dfc.trace(model.eval(), inputs, dynamic_shapes=dynamic)
    probes = make_probes(graph, flat_inputs(graph, inputs, {}))
    last = [find_pass(p) for p in ("remove_noops", "fold_constants", "cse", "dce")]
    passes = [*map(find_pass, DEFAULT), Fuse(rules=tuple(rules)), *last]
    outcome: Outcome = run_passes(graph, passes, probes=probes, mode="each", strict=True)
    return outcome.graph


def ops(graph: Graph) -> list[str]:
    return [base_of(n.op) for n in graph.nodes]


def test_llama_mlp_is_one_product_up_and_one_down() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    )
    graph = fused(LlamaMLP(config), torch.randn(2, 5, 16), rules=(*SETS, "merging"))
    assert ops(graph) == ["linear", "split_with_sizes", "silu", "mul", "linear"]
    assert len(graph.parameters) == 2, "the weights that were merged are gone"


def test_gpt2_mlp_has_linears_for_its_conv1d_and_one_gelu() -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    config = transformers.GPT2Config(n_embd=16)
    graph = fused(GPT2MLP(64, config), torch.randn(2, 5, 16))
    assert ops(graph) == ["linear", "gelu", "linear"]


def test_clip_mlp_takes_the_factors_of_its_gelu_into_its_weights() -> None:
    from transformers.models.clip.modeling_clip import CLIPMLP

    config = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=32)
    graph = fused(CLIPMLP(config), torch.randn(2, 5, 16))
    assert ops(graph) == ["linear", "silu", "linear"]


@pytest.mark.parametrize(
    ("name", "op"),
    [("gelu_new", "gelu"), ("gelu_fast", "gelu"), ("gelu_python", "gelu"), ("mish", "mish"),
     ("gelu_accurate", "gelu"), ("silu", "silu"), ("hardswish", "hardswish")],
)  # fmt: skip
def test_each_activation_of_transformers_is_one_op(name: str, op: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        pytest.skip(f"this version of transformers has no {name}")
    batch = {0: torch.export.Dim("batch", max=16)}
    graph = fused(ACT2FN[name], torch.randn(3, 8), dynamic=(batch,))
    assert ops(graph) == [op]


def test_attention_scale_goes_into_the_queries_weights() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) * 4**-0.5).view(2, 5, 4, 4).transpose(1, 2)

    graph = fused(Scaled(), torch.randn(2, 5, 16))
    assert ops(graph) == ["linear", "view", "transpose"]


class Grouped(nn.Module):
    """Grouped heads; `tied` makes the keys' weights a part of something else as well."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.tied = tied

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = (self.q(x), self.k(x), self.v(x))
        return (*found, self.k.weight * x.mean()) if self.tied else found


@pytest.mark.parametrize("tied", [False, True])
def test_merging_leaves_weights_alone_that_something_else_reads(tied: bool) -> None:
    graph = fused(Grouped(tied), torch.randn(2, 8), rules=("merging",))
    assert ops(graph).count("linear") == (2 if tied else 1)
    sizes = sorted(int(p.tensor_type.numel) for p in graph.parameters.values())  # type: ignore[call-overload]
    assert sizes == ([4, 12, 32, 96] if tied else [16, 128])
    assert len(graph.parameters) == (4 if tied else 2)


def test_rules_hold_their_claims_with_other_dtypes() -> None:
    class Silu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert ops(fused(Silu(), torch.randn(4, 8, dtype=dtype))) == ["silu"]


class FrozenBlock(nn.Module):
    """Half of a ResNet's block, the norm followed by a scale and a shift of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(nn.functional.pad(x, (1, 1, 1, 1)))
        return torch.relu(self.norm(h) * self.scale + self.shift + x)


def test_a_residual_block_is_a_convolution_a_sum_and_a_relu() -> None:
    graph = fused(FrozenBlock(), torch.randn(2, 4, 6, 6), rules=("convolution",))
    assert ops(graph) == ["conv2d", "add", "relu"]


@pytest.mark.parametrize(("patch", "op"), [(16, "linear"), (4, "conv2d")])
def test_only_large_patches_become_a_linear(patch: int, op: str) -> None:
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

    config = transformers.ViTConfig(image_size=2 * patch, patch_size=patch, hidden_size=8)
    graph = fused(
        ViTPatchEmbeddings(config), torch.randn(2, 3, 2 * patch, 2 * patch), rules=("convolution",)
    )
    assert [o for o in ops(graph) if o in ("linear", "conv2d")] == [op]


def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config)
    ids = torch.randint(50, (2, 7))
    return model, (ids, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))


def llama() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), (torch.randint(50, (2, 7)),)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("build", [bert, llama])
def test_a_fused_model_is_standard_onnx_and_right_in_stock_onnx_runtime(
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], opset: int, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model, inputs = build()
    graph = fused(model, *inputs, rules=())  # every rule that dfc ships
    assert "softmax" not in ops(graph), "attention is one op"
    export_onnx(graph, tmp_path / "model.onnx", opset=opset, contrib=False)
    written = onnx.load(tmp_path / "model.onnx")
    assert {n.domain for n in written.graph.node} == {""}
    assert [(o.domain, o.version) for o in written.opset_import] == [("", opset)]
    assert not written.functions
    assert ("Attention" in {n.op_type for n in written.graph.node}) == (opset == 23)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    with torch.no_grad():
        expected = model(*inputs)[0]
    torch.testing.assert_close(torch.from_numpy(found[0]), expected, rtol=1e-4, atol=1e-5)
