"""MiniLM in eight and four bits: file size, nearness, decisions kept, and times in ONNX Runtime.

    python benchmarks/minilm_int8.py [movies=3000] [bbc=1000] [rounds=20] [quality|times]

Against float32 and ONNX Runtime's own dynamic quantization (per channel) of the float32 file, each
written as plain ONNX for ONNX Runtime. A regression is fitted on float32 embeddings; `agree` says
how many of the test texts get the same class from a variant's; `drop` is of accuracy, paired, with
its one-sided 95 % bound. Times alternate between all variants, two threads that do not spin. Static
ranges come from texts that are neither fitted nor judged; such files run in OpenVINO too.
"""

from __future__ import annotations

import logging
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dfc
from tests import minilm

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TABLE = "quantize {} with scheme=weights, select=op(embedding)"
VARIANTS = {
    "float32": "",
    "int8, rows": "quantize int8",
    "int8, pairs": "quantize int8 with codes=pairs",  # signed weights that never saturate
    "int8, static": "smooth using calib with alpha=0.8, multiply=yes\n"
    " quantize int8 using calib with scheme=static",
    "int8, groups of 64": "quantize int8 with group=64",
    "int8 weights": "quantize int8 with scheme=weights",
    "int4 g32": "quantize int4 with group=32",
    "int4 g64": "quantize int4 with group=64",
    "int4 g32 table, int8 g64": f"{TABLE.format('int4')}, group=32\n quantize int8 with group=64",
    "int8 table, int4 g64": f"{TABLE.format('int8')}\n quantize int4 with group=64",
}
PEER = "ORT dynamic per channel"
IN_OPENVINO = ("float32", "int8, static")
CALIBRATION = 256  # texts


def written(folder: Path) -> dict[str, Path]:
    """Each variant as an ONNX file, the peer's made from the float32 one."""
    model, args, _, dynamic = minilm.build()
    graph = dfc.trace(model, args, None, dynamic)
    calib = calibration()
    files = {}
    for name, steps in VARIANTS.items():
        start = time.monotonic()
        data = {"calib": calib} if "calib" in steps else {}
        named = "data calib\n" if data else ""
        recipe = f"dfc 1\n{named}recipe small {{\n apply simplify\n {steps}\n}}"
        compiled = dfc.compile(
            graph, args, recipe=recipe, data=data or None, engine="eager", verify="none"
        )
        files[name] = folder / f"{len(files)}.onnx"
        compiled.probes.clear()  # the files are judged below, on real texts
        compiled.export(files[name], contrib=True)
        print(f"# {name}: written in {time.monotonic() - start:.0f} s", flush=True)
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)
    files[PEER], folded = folder / "peer.onnx", folder / "folded.onnx"
    options = onnxruntime.SessionOptions()  # the tool sees constants alone, not what folds to one
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(files["float32"], options, providers=["CPUExecutionProvider"])
    quantize_dynamic(
        folded, files[PEER], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # its form of `Attention` does not load
    )  # fmt: skip
    return files


def calibration() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of texts behind those that are fitted and judged."""
    task = minilm.movies(train=5500, test=CALIBRATION)
    return [(ids, mask) for _, ids, mask in minilm.batches(task.test[0], task.tokens)]


def size(file: Path) -> int:
    return sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))


def session(file: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in run.get_inputs()]

    def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (found,) = run.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        return torch.from_numpy(found)

    return embed


def in_openvino(file: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import openvino as ov

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}
    request = ov.Core().compile_model(str(file), "CPU", hints).create_infer_request()

    def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(request.infer([ids.numpy(), mask.numpy()])[0])

    return embed


def runs_of(files: dict[str, Path]) -> dict[str, tuple[Path, Embed]]:
    """Every file in ONNX Runtime, and some in OpenVINO."""
    found = {name: (file, session(file)) for name, file in files.items()}
    if find_spec("openvino"):
        found |= {f"{n}, OpenVINO": (files[n], in_openvino(files[n])) for n in IN_OPENVINO}
    return found


def quality(runs: dict[str, tuple[Path, Embed]], tasks: list[minilm.Task]) -> None:
    for task in tasks:
        exact = runs["float32"][1]
        train = minilm.embed_all(exact, task.train[0], task.tokens)
        classify = minilm.regression(train, task.train[1])
        wanted = minilm.embed_all(exact, task.test[0], task.tokens)
        right = classify(wanted) == task.test[1]
        n = len(right)
        print(f"\n{task.name}, n={n}: float32 is right in {100 * right.mean():.2f} %")
        print(f"{'':24} {'MB':>6} {'cosine':>8} {'1 %':>7} {'agree':>7} {'drop':>8} {'bound':>7}")
        for name, (file, run) in runs.items():
            if name == "float32":
                print(f"{name:24} {size(file) / 1e6:6.2f}")
                continue
            found = minilm.embed_all(run, task.test[0], task.tokens)
            cosine = (found * wanted).sum(1)
            its = classify(found) == task.test[1]
            b, c = int((right & ~its).sum()), int((~right & its).sum())
            drop = (b - c) / n
            bound = drop + 1.645 * math.sqrt(max(b + c - (b - c) ** 2 / n, 1)) / n
            agree = (classify(found) == classify(wanted)).mean()
            print(
                f"{name:24} {size(file) / 1e6:6.2f} {cosine.mean():8.4f} "
                f"{np.quantile(cosine, 0.01):7.4f} {100 * agree:6.2f}% {100 * drop:+6.2f}pp "
                f"{100 * bound:+5.2f}pp",
                flush=True,
            )


def times(runs: dict[str, Embed], rounds: int) -> None:
    for batch, tokens in ((1, 32), (32, 64)):
        inputs = minilm.example(batch, tokens)
        inputs[1][:] = 1
        for run in runs.values():
            run(*inputs)
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run(*inputs)
                spent[name].append(time.perf_counter() - start)
        base = np.array(spent["float32"])
        print(f"\nbatch {batch}, {tokens} tokens, {rounds} alternating rounds")
        for name, took in spent.items():
            ratio = base / np.array(took)
            low, high = np.quantile(ratio, [0.25, 0.75])
            print(
                f"{name:24} {1e3 * np.median(took):8.2f} ms   "
                f"{np.median(ratio):5.2f}x float32 ({low:.2f}-{high:.2f})",
                flush=True,
            )


def main(words: list[str]) -> None:
    given: dict[str, Any] = {"movies": 3000, "bbc": 1000, "rounds": 20}
    given |= {k: int(v) for k, _, v in (w.partition("=") for w in words) if v}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((x.split(":")[1].strip() for x in flags.splitlines() if "model name" in x), "")
    vnni = "VNNI" if "vnni" in flags else "no VNNI"
    print(f"{model or platform.processor()}, {vnni}; other work was on the machine")
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(written(Path(folder)))
        if "times" not in words:
            quality(runs, [minilm.movies(test=given["movies"]), minilm.bbc(test=given["bbc"])])
        if "quality" not in words:
            times({name: run for name, (_, run) in runs.items()}, given["rounds"])


if __name__ == "__main__":
    main(sys.argv[1:])
