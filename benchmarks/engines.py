"""Engines beside their peers: the same model by dfc and by plain PyTorch, ONNX Runtime, OpenVINO.

    python benchmarks/engines.py [--models NAMES] [--rounds N] [--threads N] [--no-inductor]

Everything of one model runs in one process and takes turns; each timed run begins when the threads
of the others sleep. Goal: dfc with `engine="auto"` is never more than 2 % behind the best peer.
A peer is what its own documentation says: `torch.compile(model)`; `torch.onnx.export(dynamo=True)`
in ONNX Runtime; `openvino.convert_model`; sizes fixed, as many threads, asked for the same
arithmetic (left to itself, OpenVINO computes in bfloat16 where the processor has it). In bfloat16,
where the processor has instructions for it: `model.bfloat16()` for PyTorch and torch.compile, its
precision hint for OpenVINO, `autocast bf16` for dfc, and nothing for ONNX Runtime, which lacks it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402 - after what makes it quiet

sys.path.insert(0, str(Path(__file__).resolve().parent))
GOAL = 1.02  # of the best peer's time
BF16 = "dfc 1\nrecipe half {\n  apply simplify\n  autocast bf16\n}\n"

Call = Callable[[], Any]


def models() -> dict[str, Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]]:
    return {
        "resnet50-b1": _resnet,
        "bert-base-b1-s128": lambda: _bert(1),
        "bert-base-b8-s128": lambda: _bert(8),
    }


def _bert(batch: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    ids = torch.randint(0, 30000, (batch, 128))
    return model, (ids, torch.ones(batch, 128, dtype=torch.long))


def _resnet() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    from _nets import resnet50

    torch.manual_seed(0)
    return resnet50(), (torch.randn(1, 3, 224, 224),)


# Peers


def eager(model: Any, args: Any) -> Call:
    return lambda: model(*args)


def torch_compile(model: Any, args: Any) -> Call:
    compiled = torch.compile(model)
    return lambda: compiled(*args)


def onnx_runtime(model: Any, args: Any) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "m.onnx")
        torch.onnx.export(model, args, path, dynamo=True, verbose=False)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), args, strict=True)}
    return lambda: session.run(None, feeds)


def openvino(model: Any, args: Any, precision: str = "f32") -> Call:
    import openvino as ov

    core = ov.Core()
    converted = ov.convert_model(model, example_input=args)
    for port, x in zip(converted.inputs, args, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape(list(x.shape)))
    converted.validate_nodes_and_infer_types()
    compiled = core.compile_model(
        converted, "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
         "INFERENCE_PRECISION_HINT": precision},
    )  # fmt: skip
    request = compiled.create_infer_request()
    feeds = [x.numpy() for x in args]
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def peers(inductor: bool, half: bool) -> dict[str, Callable[[Any, Any], Call]]:
    found: dict[str, Callable[[Any, Any], Call]] = {"PyTorch": eager, "OpenVINO": openvino}
    if half:
        found["OpenVINO"] = partial(openvino, precision="bf16")
    else:
        found["ONNX Runtime"] = onnx_runtime
    return found | ({"torch.compile": torch_compile} if inductor else {})


def in_bf16(model: torch.nn.Module, args: Any) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """As people cast a model of PyTorch's; its inputs with it."""
    cast = tuple(x.bfloat16() if x.is_floating_point() else x for x in args)
    return copy.deepcopy(model).bfloat16(), cast


# dfc


def ours(model: Any, args: Any, inductor: bool, half: bool) -> tuple[dict[str, Call], str]:
    """dfc's engines on the rewritten graph, `auto` as users call it, and what it chose."""
    import dfc
    from dfc.compiled import with_state_inputs
    from dfc.recipe.bench import has_images
    from dfc.runtime.engines import find_engine

    begin = time.perf_counter()
    auto = dfc.compile(model, args, recipe=BF16 if half else None, verify="end")
    took = time.perf_counter() - begin
    names = ["eager", "onnxruntime", "openvino"] + ["inductor"] * inductor
    if has_images(auto.graph):
        names.insert(1, "eager:channels_last")
    if half:  # with the graph's casts, and with OpenVINO's own: `auto` is one of both
        names.append("openvino:hint")
    graph = with_state_inputs(auto.graph)
    found: dict[str, Call] = {"dfc auto": lambda: auto(*args)}
    for name in names:
        if name == auto.engine.name:
            continue
        try:
            run = find_engine(name).build(graph)
        except dfc.DfcError as e:
            print(f"  {name}: {e.message}")
            continue
        found[f"dfc {name}"] = lambda run=run: run(list(args))
    return found, f"auto is {auto.engine.name}, compiled in {took:.0f} s"


# Measuring


def times(calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    from dfc.runtime.measure import wait_until_quiet

    found: dict[str, list[float]] = {n: [] for n in calls}
    with torch.inference_mode():
        for call in calls.values():
            call(), call()
        end = time.perf_counter() + seconds
        while len(found[next(iter(found))]) < rounds and time.perf_counter() < end:
            for name, call in calls.items():
                wait_until_quiet()
                call()
                begin = time.perf_counter()
                call()
                found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def table(found: Mapping[str, list[float]], digits: int = 1) -> list[str]:
    """Medians, quartiles, and the median of ratios to the best peer in the same round."""
    mid = {n: median(t) for n, t in found.items()}
    best = min((n for n in mid if not n.startswith("dfc")), key=lambda n: mid[n])
    wide = max(map(len, mid)) + 1
    lines = [f"  {'':<{wide}}{'median':>9}  {'quartiles':>17}   to {best}"]
    for n in sorted(mid, key=lambda n: mid[n]):
        low, _, high = quantiles(found[n], n=4)
        ratio = median(a / b for a, b in zip(found[n], found[best], strict=True))
        middle, low, high = (f"{t:>6.{digits}f}" for t in (mid[n], low, high))
        lines.append(f"  {n:<{wide}}{middle} ms  {low} ..{high} ms   {ratio:.3f}")
    ratio = median(a / b for a, b in zip(found["dfc auto"], found[best], strict=True))
    word = "met" if ratio <= GOAL else "NOT met"
    lines.append(f"  goal: auto at most {GOAL} of the best peer's time: {ratio:.3f}, {word}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="parts of names, separated by commas")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=120, help="for each model, at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-inductor", action="store_true")
    options = parser.parse_args()
    from dfc.planning.host import machine_text, this_machine

    torch.set_num_threads(options.threads)
    print(f"{machine_text(this_machine())}; load {os.getloadavg()[0]:.1f} as it began", flush=True)
    wanted = options.models.split(",")
    dtypes = ["float32", "bfloat16"] if has_bf16() else ["float32"]
    for name, build in models().items():
        for dtype in dtypes:
            if any(w in f"{name} {dtype}" for w in wanted):
                measured(f"{name} {dtype}", build, dtype == "bfloat16", options)
    if not has_bf16():
        print("\nbfloat16: left out, this processor has no instructions for it")


def measured(name: str, build: Callable[[], Any], half: bool, options: Any) -> None:
    model, args = build()
    inductor = not options.no_inductor
    print(f"\n{name}", flush=True)
    calls, told = ours(model, args, inductor, half)
    torchs = in_bf16(model, args) if half else (model, args)
    with torch.no_grad():
        for peer, make in peers(inductor, half).items():
            calls[peer] = make(*((model, args) if peer == "OpenVINO" else torchs))
    found = times(calls, options.rounds, options.seconds)
    print(f"  {told}; {len(found['dfc auto'])} rounds, load {os.getloadavg()[0]:.1f}")
    print("\n".join(table(found)), flush=True)


def has_bf16() -> bool:
    from dfc.planning.host import cpu_features

    return any(f in cpu_features() for f in ("avx512_bf16", "amx_bf16"))


if __name__ == "__main__":
    main()
