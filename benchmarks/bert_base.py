"""BERT-base, sequence 128: dfc's own compile time and its ONNX export beside torch.onnx.export.

    python benchmarks/bert_base.py [rounds]         default 3

Both sides alternate in one process. Goals: capture + simplify + print takes at most 3 s beyond
torch.export itself; ONNX export takes no longer than `torch.onnx.export(dynamo=True)`, better half.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def main(rounds: int) -> None:
    import torch
    from transformers import BertConfig, BertModel

    import dfc
    from dfc.emit.onnx import build_onnx
    from dfc.emit.onnx_export import export_onnx
    from dfc.rewrite.driver import run_passes
    from dfc.rewrite.pass_ import DEFAULT, find_pass

    model = BertModel(BertConfig()).eval()
    ids = torch.randint(0, 1000, (1, 128))
    mask = torch.ones(1, 128, dtype=torch.long)
    batch, seq = torch.export.Dim("B", max=64), torch.export.Dim("S", max=512)
    shapes = {"input_ids": {0: batch, 1: seq}, "attention_mask": {0: batch, 1: seq}}
    inner = {"s": 0.0}
    original = torch.export.export

    def timed_export(*args, **kwargs):
        start = time.perf_counter()
        program = original(*args, **kwargs)
        inner["s"] += time.perf_counter() - start
        return program

    times: dict[str, list[float]] = {k: [] for k in ("own", "export", "dfc onnx", "torch onnx")}
    for i in range(rounds + 1):  # the first round warms both sides up and is not counted
        inner["s"] = 0.0
        torch.export.export = timed_export
        start = time.perf_counter()
        graph = dfc.trace(model, (ids,), {"attention_mask": mask}, shapes)
        outcome = run_passes(graph, [find_pass(p) for p in DEFAULT], mode="none")
        str(outcome.graph)
        total = time.perf_counter() - start
        torch.export.export = original
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            graph = dfc.trace(model, (ids,), {"attention_mask": mask}, shapes)
            export_onnx(graph, Path(folder) / "m.onnx", probes=[])
            ours = time.perf_counter() - start
            start = time.perf_counter()
            torch.onnx.export(
                model, (ids,), str(Path(folder) / "t.onnx"), kwargs={"attention_mask": mask},
                dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=True,
            )  # fmt: skip
            theirs = time.perf_counter() - start
        if i:
            for k, v in zip(times, (total - inner["s"], inner["s"], ours, theirs), strict=True):
                times[k].append(v)
    print(f"{len(graph)} nodes traced, {len(outcome.graph)} after the passes, {rounds} rounds")
    count = sum(1 for _ in build_onnx(outcome.graph).graph)
    print(f"{count} ONNX nodes")
    for k, v in times.items():
        print(f"{k:>11}: median {median(v):6.2f} s, spread {max(v) - min(v):5.2f} s")
    ratio = [a / b for a, b in zip(times["dfc onnx"], times["torch onnx"], strict=True)]
    print(
        f"dfc / torch.onnx.export: median {median(ratio):.2f}, {min(ratio):.2f}..{max(ratio):.2f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
