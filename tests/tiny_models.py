"""Small models with random weights, and one sentence of a recipe run on them."""

from __future__ import annotations

from typing import Any

import torch

from dfc.ir.graph import Graph
from dfc.rewrite.pass_ import Context


def tiny_llama(layers: int = 2) -> torch.nn.Module:
    """Grouped-query attention, a gated MLP, a tied embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))


CALIB = [tokens(seed=s) for s in range(1, 5)]


def run_step(graph: Graph, text: str, data: Any = CALIB, **more: Any) -> tuple[Graph, int, Context]:
    """One sentence of a recipe, run on a copy: the graph, how many changes, what was decided."""
    from dfc.errors import DfcError
    from dfc.lang.source import Source
    from dfc.recipe.resolve import check_on, resolve

    plan = resolve(Source(f"dfc 1\ndata calib\nrecipe r {{\n {text}\n}}", "t.dfc"))
    problems = check_on(plan, graph)
    if problems:
        raise DfcError.of(problems)
    (step,) = plan.passes()
    copy, ctx = graph.copy(), Context(data={"calib": data}, decisions=[], **more)
    return copy, step.build({}).run(copy, ctx), ctx
