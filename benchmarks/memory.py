"""Peak memory of compiling a 1 B-parameter decoder whose weights lie in a file.

    python benchmarks/memory.py [layers]        default 20 layers: 1.0 B parameters, 2.0 GB in bf16

The model is built on the meta device, traced, given its weights from a safetensors file, rewritten
and saved as a package. Goal: peak resident memory at most 1.3 x weights + 1 GiB.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def config(layers: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=32000,
        num_attention_heads=32, num_key_value_heads=4, use_cache=False, dtype="bfloat16",
    )  # fmt: skip


def build(layers: int):
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config(layers)).to(torch.bfloat16).eval()


def write_weights(layers: int, path: Path) -> int:
    """Random weights, written tensor by tensor; returns their bytes."""
    import torch

    from dfc.ir.types import TensorType
    from dfc.ir.weights import write_safetensors

    model = build(layers)
    names = {n: p for n, p in model.named_parameters()}
    names |= {n: b for n, b in model.named_buffers()}
    types = {n: TensorType.of(x) for n, x in names.items()}
    generator = torch.Generator().manual_seed(0)

    def numbers():
        for x in names.values():
            yield (torch.randn(x.shape, generator=generator) * 0.02).to(x.dtype)

    write_safetensors(path, types, numbers())
    return path.stat().st_size


def compile_and_save(layers: int, weights: Path, out: Path) -> None:
    import torch

    import dfc

    model = build(layers)
    ids = torch.zeros(1, 16, dtype=torch.long)
    batch, seq = torch.export.Dim("B", max=16), torch.export.Dim("S", max=2048)
    start = time.perf_counter()
    compiled = dfc.compile(
        model, (ids,), None, ({0: batch, 1: seq},), weights=weights, engine="eager", verify="end"
    )
    compiled.save(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{peak} {time.perf_counter() - start:.1f} {compiled.report.proof}")


def main(layers: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dfc-memory-"))
    try:
        path = folder / "weights.safetensors"
        weights, out = f"Path({str(path)!r})", f"Path({str(folder / 'm.dfcpkg')!r})"
        code = "import memory,sys;from pathlib import Path;"
        here = Path(__file__).parent
        env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
        total = int(
            subprocess.run(
                [sys.executable, "-c", f"{code}print(memory.write_weights({layers}, {weights}))"],
                check=True, env=env, capture_output=True, text=True,
            ).stdout.split()[-1]
        )  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", f"{code}memory.compile_and_save({layers}, {weights}, {out})"],
            check=True, env=env, capture_output=True, text=True,
        )  # fmt: skip
        peak, seconds, proof = ran.stdout.strip().splitlines()[-1].split(" ", 2)
        limit = 1.3 * total + 2**30
        print(f"weights {total / 1e9:.2f} GB, peak {int(peak) / 1e9:.2f} GB")
        print(f"ratio to the limit {int(peak) / limit:.2f}, {seconds} s, {proof}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
