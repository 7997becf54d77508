"""A trained language model: read as it was stored, and what four bits and zeros do to it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dfc
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from tests import assets, smollm2
from tests.gguf import Gguf
from tests.tiny_models import run_step

# Reading GGUF


def gguf(tensors: dict[str, tuple[tuple[int, ...], int, bytes]], metadata: bytes, n: int) -> bytes:
    """A file of these tensors (shape, encoding, bytes), each at a multiple of 32."""
    head, data = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), n) + metadata, b""
    for name, (shape, encoding, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", encoding, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def test_a_file_reads_as_the_format_says(tmp_path: Path) -> None:
    half = lambda x: np.float16(x).tobytes()  # noqa: E731
    codes = np.arange(16, dtype=np.uint8)
    four = half(0.5) + half(-1.0) + (codes | (15 - codes) << 4).tobytes()
    eight = half(0.25) + np.arange(-16, 16, dtype=np.int8).tobytes()
    tensors = {
        "a": ((2, 3), 0, np.arange(6, dtype="<f4").tobytes()),
        "b": ((2, 32), 3, four + four),
        "c": ((32,), 8, eight),
    }
    metadata = text("llama.block_count") + struct.pack("<II", 4, 30)
    metadata += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("ä") + text("")
    metadata += text("eps") + struct.pack("<If", 6, 0.5)
    (tmp_path / "x.gguf").write_bytes(gguf(tensors, metadata, 3))
    file = Gguf(tmp_path / "x.gguf")
    assert file.metadata == {"llama.block_count": 30, "words": ["ä", ""], "eps": 0.5}
    assert file.tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    row = [*(codes * 0.5 - 1), *((15 - codes) * 0.5 - 1)]  # low nibbles are the first half
    assert file.tensor("b").tolist() == [row, row]
    assert file.tensor("c").tolist() == [x / 4 for x in range(-16, 16)]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"x\.gguf is no GGUF file of version 3"):
        Gguf(tmp_path / "x.gguf")


# The model


@pytest.fixture(scope="module")
def there() -> None:
    for name in ("smollm2", "wiki100"):
        assets.path_or_skip(name)


@pytest.mark.slow
def test_it_predicts_text_as_well_as_it_was_trained_to(there: None) -> None:
    """The first two of the 8 windows whose perplexity others measured as 26.6."""
    model = smollm2.model()
    tokens = smollm2.windows(["Psychology"], 2, skip=0)
    assert smollm2.digest(tokens) == "249d21423ed0723e"
    losses = smollm2.losses(lambda row: model(row).logits, tokens)
    assert losses.tolist() == pytest.approx([3.0180, 3.3090], abs=1e-3)


def test_what_is_judged_was_never_calibrated_on() -> None:
    assert not set(smollm2.JUDGE) & set(smollm2.CALIBRATE)


@pytest.fixture(scope="module")
def graph(there: None) -> Graph:
    """The first two of its thirty blocks."""
    return dfc.trace(smollm2.model(layers=2), (smollm2.windows(["Law"], 1),))


def data() -> list[torch.Tensor]:
    return list(smollm2.windows(["Music", "Law", "Sport", "Water"], 1).split(1))


def distance(graph: Graph, other: Graph) -> float:
    """The squared distance of the logits on an article that was not calibrated on."""
    (row,) = smollm2.windows(["Moon"], 1).split(1)
    a, b = (interpret(g, [row])[0] for g in (graph, other))
    return float((a - b).square().mean())


def quantized(graph: Graph, method: str) -> Graph:
    step = (
        f"quantize int4 using calib with group=64, scheme=weights, method={method}, embeddings=no"
    )
    return run_step(graph, step, data())[0]


@pytest.mark.slow
def test_gptq_and_awq_lose_less_than_rounding_to_nearest(graph: Graph) -> None:
    found = {m: distance(graph, quantized(graph, m)) for m in ("rtn", "gptq", "awq")}
    assert found["gptq"] < 0.8 * found["rtn"] and found["awq"] < found["rtn"], found


@pytest.mark.slow
def test_packed_layers_equal_the_floats_that_benchmarks_judge(graph: Graph) -> None:
    packed = quantized(graph, "rtn")
    floats = packed.copy()
    assert smollm2.in_floats(floats) == 14
    (row,) = smollm2.windows(["Moon"], 1).split(1)
    a, b = (interpret(g, [row])[0] for g in (packed, floats))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compensated_zeros_lose_least(graph: Graph) -> None:
    def sparse(how: str) -> Any:
        step = f'sparsify "model.layers.**" using calib by {how} with pattern="2:4"'
        return run_step(graph, step, data())[0]

    found = {how: distance(graph, sparse(how)) for how in ("magnitude", "wanda", "sparsegpt")}
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"], found
