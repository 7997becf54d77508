"""Structured pruning of trained models: bytes, shapes and time beside what was predicted.

    python benchmarks/pruning.py [minilm] [lite0] [--rounds 30] [--threads 2]

MiniLM loses 4 of 12 heads and 30 % of the hidden units of each layer; EfficientNet-Lite0 loses 20 %
of all channels. Per model: multiply-adds and bytes before and after, the package, the ONNX file,
and the time of a call in ONNX Runtime and in eager mode, pruned and whole in alternating pairs.
Goals: package and ONNX at most 1.02 x what the kept parameters take; time falls by at least 0.7 of
what multiply-adds fall by. What pruning costs in accuracy without training is benchmarked by
`examples/prune_and_recover.py` and told by the recipe's metrics.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

RECIPES = {
    "minilm": """
  dce
  heads: prune "bert.encoder.**" using calib by {by} with what=heads, ratio=0.3333, refit={refit}
  ffn:   prune "bert.encoder.**" using calib by {by} with what=ffn, ratio=0.3, refit={refit}""",
    "lite0": """
  fold_batch_norm
  dce
  p: prune using calib by {by} with what=channels, ratio=0.2, refit={refit}""",
}


def minilm() -> tuple[Any, tuple[Any, ...], Any, list[Any]]:
    """The sentence encoder, 8 x 64 tokens; calibrated on random tokens of its vocabulary."""
    import torch
    from transformers import AutoModel

    from tests import assets

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(assets.path("minilm"))

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    batch, tokens = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=2, max=256)
    shapes = {"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}}
    args = (torch.randint(1000, 30000, (8, 64)), torch.ones(8, 64, dtype=torch.long))
    return Encoder().eval(), args, shapes, _texts() or [args]


def _texts() -> list[Any]:
    """Sentences of encyclopaedia articles, tokenized, where they are at hand."""
    from tests import assets

    try:
        folder = assets.path("wiki100")
    except assets.AssetError:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.path("minilm"))
    articles = json.loads((folder / "articles.json").read_text())
    lines = [s.strip() for text in articles.values() for s in text.split(". ") if len(s) > 80]
    random.Random(0).shuffle(lines)
    found = []
    for i in range(0, min(len(lines), 64), 16):
        t = tokenizer(
            lines[i : i + 16], padding="max_length", truncation=True, max_length=64,
            return_tensors="pt",
        )  # fmt: skip
        found.append((t["input_ids"], t["attention_mask"]))
    return found


def lite0() -> tuple[Any, tuple[Any, ...], Any, list[Any]]:
    """EfficientNet-Lite0 at 224 pixels, calibrated on twenty photographs."""
    import torch

    from tests import assets
    from tests import lite0 as net

    x = torch.randn(1, 3, 224, 224)
    pictures, _ = net.imagenet20(assets.path("imagenet20"))
    return net.lite0(assets.path("lite0")), (x,), None, list(pictures.split(1))


def run(name: str, rounds: int, by: str, refit: str, threads: int) -> None:
    import torch

    import dfc
    from dfc.compress.work import device_of, work_of

    model, args, shapes, calib = {"minilm": minilm, "lite0": lite0}[name]()
    steps = RECIPES[name].format(by=by, refit=refit)
    text = "dfc 1\n{}recipe r {{{}\n}}\n"
    options: dict[str, Any] = {"engine": "eager", "verify": "none"}
    whole = dfc.compile(
        model, args, None, shapes, recipe=text.format("", "\n  fold_batch_norm\n  dce"), **options
    )
    start = time.perf_counter()
    small = dfc.compile(
        model, args, None, shapes, recipe=text.format("data calib\n", steps),
        data={"calib": calib}, **options,
    )  # fmt: skip
    print(f"\n{name}: pruned in {time.perf_counter() - start:.1f} s by {by}, refit={refit}")
    for note in small.report.notes:
        if note.startswith("prune"):
            print(f"  {note}")
    flat, device = [[*args]], device_of(None)
    before, after = (work_of(g.graph, flat, device) for g in (whole, small))
    kept, macs = after.weight_bytes / before.weight_bytes, after.macs / before.macs
    print(
        f"  bytes {before.weight_bytes / 1e6:.2f} -> {after.weight_bytes / 1e6:.2f} MB, {kept:.3f}"
    )
    print(f"  multiply-adds {before.macs / 1e6:.0f} -> {after.macs / 1e6:.0f} M ({macs:.3f})")
    with torch.no_grad():
        y, z = whole(*args), small(*args)
        print(f"  distance without training: cosine {float(_cosine(y, z)):.4f}")
    with tempfile.TemporaryDirectory() as folder:
        _bytes(Path(folder), whole, small, kept)
        measured = _times(Path(folder), whole, small, args, rounds, macs, threads)
    predicted = after.seconds / before.seconds
    print(f"  {'time, of before':22} {'predicted':>9} {'measured':>9} {'off by':>7}")
    for engine, ratio in measured.items():
        print(f"  {engine:22} {predicted:9.3f} {ratio:9.3f} {abs(predicted / ratio - 1):7.1%}")


def _cosine(y: Any, z: Any) -> Any:
    import torch

    return torch.nn.functional.cosine_similarity(y.flatten(0, -2), z.flatten(0, -2)).mean()


def _bytes(folder: Path, whole: Any, small: Any, kept: float) -> None:
    for word, compiled in (("whole", whole), ("small", small)):
        compiled.save(folder / f"{word}.dfcpkg")
        compiled.export(folder / f"{word}.onnx")
    for form, path in (("package", "{}.dfcpkg/weights.safetensors"), ("ONNX", "{}.onnx*")):
        sizes = [
            sum(f.stat().st_size for f in folder.glob(path.format(w))) for w in ("whole", "small")
        ]
        ratio = sizes[1] / sizes[0]
        print(
            f"  {form} {sizes[0] / 1e6:.2f} -> {sizes[1] / 1e6:.2f} MB: {ratio:.3f}, "
            f"{ratio / kept:.3f} x the kept parameters (goal 1.02)"
        )


def _times(
    folder: Path, whole: Any, small: Any, args: Any, rounds: int, macs: float, threads: int
) -> dict[str, float]:
    """Prints them; what the time became of by the clock on the wall, for each engine."""
    import onnxruntime
    import torch

    torch.set_num_threads(threads)
    runs: dict[str, list[Any]] = {"eager": [whole, small], "onnxruntime": []}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for word in ("whole", "small"):
        session = onnxruntime.InferenceSession(
            str(folder / f"{word}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
        runs["onnxruntime"].append(lambda *_, s=session, f=feed: s.run(None, f))
    measured = {}
    for engine, pair in runs.items():
        for clock, ratios, before, after in _pairs(pair, args, rounds):
            n, middle = len(ratios), median(ratios)
            measured.setdefault(engine, middle)  # the clock on the wall is the first
            share = (1 - middle) / (1 - macs)
            print(
                f"  {engine}, {clock}: {before:.1f} -> {after:.1f} ms, ratio {middle:.3f} "
                f"(quartiles {ratios[n // 4]:.3f}..{ratios[3 * n // 4]:.3f}, {n} pairs): "
                f"{share:.2f} of the fall in multiply-adds (goal 0.7)"
            )
    return measured


def _pairs(pair: Any, args: Any, rounds: int) -> list[tuple[str, list[float], float, float]]:
    """Alternating runs by the clock on the wall and by the processors' time, which other work on
    the machine lengthens less."""
    import torch

    clocks = {"wall": time.perf_counter, "processor time": time.process_time}
    times: dict[str, list[list[float]]] = {name: [[], []] for name in clocks}
    with torch.no_grad():
        for i in range(rounds + 2):
            for side in (0, 1) if i % 2 else (1, 0):
                start = {name: clock() for name, clock in clocks.items()}
                pair[side](*args)
                for name, clock in clocks.items():
                    if i >= 2:
                        times[name][side].append((clock() - start[name]) * 1e3)
    return [
        (name, sorted(b / a for a, b in zip(*t, strict=True)), median(t[0]), median(t[1]))
        for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--by", default="activation")
    parser.add_argument("--refit", default="yes")
    chosen = parser.parse_args()
    print(_machine())
    for name in chosen.models or ["minilm", "lite0"]:
        run(name, chosen.rounds, chosen.by, chosen.refit, chosen.threads)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (x.partition(":")[2].strip() for x in lines if "model name" in x), platform.machine()
    )
    flags = next((x for x in lines if x.startswith("flags")), "")
    known = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "amx_tile") if f" {f}" in flags]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"{name}, {os.cpu_count()} cores, {' '.join(known)}; load {load:.1f} from other work"


if __name__ == "__main__":
    main()
