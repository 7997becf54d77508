"""Architectures of the zoo: how many ops of a kind there are after the passes, and the record."""

from __future__ import annotations

from collections import Counter

import pytest

import dfc
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import find_pass
from tests.zoo import cases
from tests.zoo.fusion import DOCUMENT, KINDS, PASSES, examine, recorded
from tests.zoo.fusion_sites import base

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


def test_nearly_all_attention_and_all_norms_of_the_record_are_fused() -> None:
    rows = recorded()
    assert len(rows) > 300
    for kind, share in (("attention", 0.95), ("norm", 0.95)):
        counts = [r.counts[kind] for r in rows.values()]
        done = sum(c.whole + c.fused for c in counts)
        assert done >= share * sum(c.sites for c in counts), kind


def test_what_is_left_is_listed_with_its_surroundings() -> None:
    for row in recorded().values():
        for kind in KINDS:
            listed = sum(x.count for x in row.left if x.kind == kind)
            assert listed == row.counts[kind].left, (row.name, kind)
            assert all(x.reason for x in row.left)


@pytest.mark.parametrize("name", ["nano_gpt", "multihead_attention", "mpt", "gpt_oss", "siglip"])
def test_the_record_is_what_is_found(name: str) -> None:
    assert DOCUMENT.exists()
    case = next(c for c in cases() if c.name == name)
    row = examine(case)
    assert row is not None
    assert row.counts == recorded()[name].counts


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_record_is_what_is_found(case: object) -> None:
    row = examine(case)  # type: ignore[arg-type]
    known = recorded().get(case.name)  # type: ignore[attr-defined]
    assert (row is None) == (known is None)
    assert row is None or known is None or row.counts == known.counts
