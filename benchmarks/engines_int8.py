"""Eight bits beside peers: dfc, ONNX Runtime's own tools, and OpenVINO with NNCF.

    python benchmarks/engines_int8.py [--models NAMES] [--rounds N] [--threads N]

The same float32 model in each tool's own eight bits: every variant runs in this process in turns,
each timed run begins when the threads of the others sleep. `error` is the distance of a variant's
first output from float32, relative to the norm. NNCF runs in `.venv-peers` (`make bench-peers`) and
is left out without it. Goal: at least 1.1 times as fast as the fastest peer, and no further from
float32 than that. `auto` measures all engines but Inductor, which `dfc tune` adds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from engines import has_bf16, models, times  # noqa: E402

import dfc  # noqa: E402

PEERS = ROOT / ".venv-peers" / "bin" / "python"
RESULTS = ROOT / "benchmarks" / "results" / "engines-int8.txt"
HALF = "\n autocast bf16" if has_bf16() else ""  # attention, beside what is quantized
# By a part of the model's name: what is quantized, and the engine.
RECIPES = {
    "bert": [
        # The kernels of this are dfc's own, which eager calls.
        ("quantize int8 using calib with scheme=dynamic, method=gptq" + HALF, "auto"),
        ("quantize int8 using calib with scheme=static" + HALF, "auto")
        if HALF
        else ("quantize int8 with codes=pairs", "auto"),  # ONNX Runtime is a third faster then
    ],
    "resnet": [("quantize int8 using calib with scheme=static", "auto")],
}
Call = Callable[[], Any]


def data_for(name: str, args: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Sixteen batches like the one that is timed."""
    generator = torch.Generator().manual_seed(1)
    if "bert" in name:
        ids, mask = args
        return [
            (torch.randint(0, 30000, tuple(ids.shape), generator=generator), mask)
            for _ in range(16)
        ]
    return [(torch.randn(tuple(args[0].shape), generator=generator),) for _ in range(16)]


def session(path: Path, args: tuple[torch.Tensor, ...]) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    run = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(run.get_inputs(), args, strict=True)}
    return lambda: run.run(None, feeds)


def openvino(path: Path, args: tuple[torch.Tensor, ...]) -> Call:
    import openvino as ov

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(str(path), "CPU", hints).create_infer_request()
    feeds = [x.numpy() for x in args]
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def peers(folder: Path, name: str, model: Any, args: Any, data: Any) -> dict[str, Call]:
    path = folder / "float.onnx"
    with torch.no_grad():
        torch.onnx.export(model, args, str(path), dynamo=True, verbose=False)
    found = {"ONNX Runtime dynamic": _ort_dynamic(path, args)} if "bert" in name else {}
    if not PEERS.exists():
        print("  NNCF: left out, there is no .venv-peers (make bench-peers)")
        return found
    import onnx

    names = [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]
    held = {
        f"{n}/{i}": x.numpy() for i, row in enumerate(data) for n, x in zip(names, row, strict=True)
    }
    np.savez(folder / "calibration.npz", **held)
    for how, title in ("ptq", "OpenVINO, NNCF PTQ"), ("weights", "OpenVINO, int8 weights"):
        out = folder / f"{how}.xml"
        command = [
            PEERS,
            ROOT / "benchmarks" / "_nncf.py",
            how,
            path,
            folder / "calibration.npz",
            out,
        ]
        subprocess.run(command, check=True, capture_output=True)
        found[title] = openvino(out, args)
    return found


def _ort_dynamic(path: Path, args: Any) -> Call:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_name("dynamic.onnx")
    quantize_dynamic(
        path, out, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True
    )
    return session(out, args)


def ours(name: str, model: Any, args: Any, data: Any) -> dict[str, Call]:
    """By engine and scheme: what a user would compile."""
    found: dict[str, Call] = {}
    for steps, engine in next(r for part, r in RECIPES.items() if part in name):
        named = "data calib\n" if "calib" in steps else ""
        recipe = f"dfc 1\n{named}recipe small {{\n apply simplify\n fuse\n {steps}\n}}"
        compiled = dfc.compile(
            model, args, recipe=recipe, engine=engine, verify="none",
            data={"calib": data} if named else None,
        )  # fmt: skip
        title = f"dfc {'static' if 'static' in steps else 'dynamic'}, {compiled.engine.name}"
        print(f"  {title}: `{steps}`")
        found[title] = lambda compiled=compiled: compiled(*args)  # type: ignore[misc]
    return found


def first(x: Any) -> torch.Tensor:
    """The first output, whatever it came in."""
    if isinstance(x, torch.Tensor):
        return x
    if hasattr(x, "to_tuple"):
        return first(x.to_tuple())
    if isinstance(x, (list, tuple)):
        return first(x[0])
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    return first(next(iter(x.values())))


def table(found: dict[str, list[float]], errors: dict[str, float]) -> list[str]:
    mid = {n: median(t) for n, t in found.items()}
    rivals = [n for n in mid if not n.startswith("dfc") and n != "PyTorch float32"]
    best = min(rivals, key=lambda n: mid[n])
    lines = [f"  {'':<26}{'median':>9}  {'quartiles':>17}    error  x {best}"]
    for n in sorted(mid, key=lambda n: mid[n]):
        low, _, high = quantiles(found[n], n=4)
        ratio = median(b / a for a, b in zip(found[n], found[best], strict=True))
        spread = f"{low:>6.1f} ..{high:>6.1f} ms"
        lines.append(f"  {n:<26}{mid[n]:>6.1f} ms  {spread}  {errors[n]:7.4f}  {ratio:.2f}")
    ours = [n for n in mid if n.startswith("dfc")]
    near = [n for n in ours if errors[n] <= errors[best]] or ours
    n = min(near, key=lambda n: mid[n])
    ratio = median(b / a for a, b in zip(found[n], found[best], strict=True))
    met = ratio >= 1.1 and errors[n] <= errors[best]
    lines.append(
        f"  goal, {n}: 1.1 times as fast as the fastest peer at no more of its error: "
        f"{ratio:.2f}, {errors[n] / errors[best]:.2f}: {'met' if met else 'NOT met'}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="b1", help="parts of names, separated by commas")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=90, help="for each model, at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    from dfc.planning.host import machine_text, this_machine

    torch.set_num_threads(options.threads)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    say(f"{machine_text(this_machine())}; load {os.getloadavg()[0]:.1f} as it began")
    for name, build in models().items():
        if not any(w in name for w in options.models.split(",")):
            continue
        model, args = build()
        data = data_for(name, args)
        with tempfile.TemporaryDirectory() as folder:
            calls = ours(name, model, args, data)
            calls |= peers(Path(folder), name, model, args, data)
            calls["PyTorch float32"] = lambda model=model, args=args: model(*args)
            with torch.inference_mode():
                exact = first(model(*args)).double()
                errors = {
                    n: float((first(c()).double() - exact).norm() / exact.norm())
                    for n, c in calls.items()
                }
            found = times(calls, options.rounds, options.seconds)
        say(f"\n{name}, int8; {len(found['PyTorch float32'])} rounds")
        say("\n".join(table(found, errors)))
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
