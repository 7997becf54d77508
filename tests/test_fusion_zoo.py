"""Architectures of the zoo: how many ops of a kind there are after the passes."""

from __future__ import annotations

from collections import Counter

import pytest

import dfc
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import find_pass
from tests.zoo import cases
from tests.zoo.fusion import PASSES, base

# attention, norms, rotary embeddings
MODELS = {
    "nano_gpt": (2, 4, 0),
    "bert_eager_attention": (2, 5, 0),
    "llama": (2, 5, 4),
    "t5": (6, 12, 0),
    "bloom": (2, 6, 0),
    "gpt2_reordered_attention": (2, 5, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_attention_norms_and_rotary_embeddings_are_one_op_each(name: str) -> None:
    built = next(c for c in cases() if c.name == name).build()
    graph = dfc.trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    after = run_passes(graph, [find_pass(p) for p in PASSES], mode="none").graph
    ops = Counter(base(n) for n in after.walk())
    norms = sum(count for op, count in ops.items() if op.endswith("_norm"))
    rotary = ops["rotary_embedding"]
    assert (ops["scaled_dot_product_attention"], norms, rotary) == MODELS[name]
    assert not ops["softmax"]
