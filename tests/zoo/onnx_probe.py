"""Every zoo case as ONNX: exported, run in ONNX Runtime on all its calls, compared with PyTorch.

    python -m tests.zoo.onnx_probe [--jobs N] [--timeout S] [name or family ...]

A line says `ok`, `refused` with the reason, `WRONG` with the worst output, or `-` where the case
was not captured. Wrong is never acceptable; refused is, when the reason is clear.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.zoo import Case, cases


def flat_inputs(graph: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of a call in the order of the graph's inputs."""
    from dfc.ir.tree import flatten

    pending = list(args)
    found: list[Any] = []
    for a in graph.arguments:
        value = kwargs[a.name] if a.name in kwargs else pending.pop(0)
        found.extend(flatten(a.tree, value, a.name))
    return found


def fits(graph: Any, inputs: Sequence[Any]) -> bool:
    """Whether sizes that capture fixed are what the call gives."""
    return all(
        not hasattr(v.type, "shape")
        or all(not isinstance(s, int) or s == n for s, n in zip(v.type.shape, x.shape, strict=True))
        for v, x in zip(graph.inputs, inputs, strict=True)
    )


def probe(case: Case) -> tuple[str, str, str]:
    """Status, details, and the seconds of capture, build, and of checking."""
    import copy

    import torch

    import dfc.ops  # noqa: F401
    from dfc.capture.torch_export import trace
    from dfc.emit.onnx_export import export_onnx
    from dfc.errors import DfcError
    from dfc.ir.interpret import interpret

    start = time.perf_counter()
    built = case.build()
    try:
        with torch.no_grad():
            graph = trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    except DfcError as e:
        return "-", f"not captured: {e.message[:150]}", ""
    captured = time.perf_counter() - start
    probes = []
    skipped = 0
    for args, kwargs in [(built.args, built.kwargs), *built.calls]:
        try:
            inputs = flat_inputs(graph, args, kwargs)
            torch.manual_seed(0)
            expected = interpret(graph, copy.deepcopy(inputs))
        except (DfcError, KeyError, IndexError):
            skipped += 1  # the captured graph does not take this call: a restriction of capture
            continue
        if not fits(graph, inputs):
            skipped += 1
            continue
        probes.append((inputs, expected))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = export_onnx(graph, Path(folder) / "m.onnx", probes=probes)
        except DfcError as e:
            status = "WRONG" if e.status == 4 else "refused"
            notes = "; ".join(e.diagnostics[0].notes)
            return status, f"[{e.code}] {e.message[:1200]} ({notes})", ""
    took = f"{captured:5.1f} {time.perf_counter() - start:5.1f}"
    note = f" ({skipped} calls do not fit the graph)" if skipped else ""
    return "ok", f"{written.nodes} nodes, error {written.worst:.1e}{note}", took


def run(name: str) -> str:
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    (case,) = [c for c in cases() if c.name == name]
    try:
        status, details, took = probe(case)
    except Exception as e:  # noqa: BLE001 - whatever a model raises is a finding
        import traceback

        frames = traceback.extract_tb(e.__traceback__)
        place = next((f for f in reversed(frames) if "/dfc/" in f.filename), frames[-1])
        text = str(e).splitlines()[0][:200] if str(e) else ""
        status, took = "CRASH", ""
        details = f"{type(e).__name__}: {text} at {Path(place.filename).name}:{place.lineno}"
    return f"{case.name:32} {case.family:20} {status:8} {took:12} {details}"


def serve(pipe: Any) -> None:
    while True:
        pipe.send(run(pipe.recv()))


def in_parallel(names: list[str], jobs: int, show: Callable[[str], None]) -> None:
    """Worker processes that outlive a case; one that dies is a finding, and is replaced."""
    import multiprocessing
    import threading

    context = multiprocessing.get_context("spawn")
    pending = iter(names)
    lock = threading.Lock()

    def work() -> None:
        worker: Any = None
        served = 0
        while True:
            with lock:
                name = next(pending, None)
            if name is None or served >= 40:
                if worker:
                    worker.kill()
                worker, served = None, 0
                if name is None:
                    return
            if worker is None:
                pipe, other = context.Pipe()
                worker = context.Process(target=serve, args=(other,), daemon=True)
                worker.start()
                other.close()
            pipe.send(name)
            served += 1
            try:
                answered = pipe.poll(300)
                line = pipe.recv() if answered else f"{name:53} CRASH    took too long"
            except EOFError:
                answered, line = False, f"{name:53} CRASH    the process died"
            if not answered:
                worker.kill()
                worker = None
            with lock:
                show(line)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.onnx_probe", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases or families; all when none is given")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(argv)
    chosen = [c for c in cases() if not options.names or {c.name, c.family} & {*options.names}]
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    if options.jobs == 1:
        for case in chosen:
            show(run(case.name))
    else:
        in_parallel([c.name for c in chosen], options.jobs, show)
    count = {s: sum(f" {s} " in x for x in lines) for s in ("ok", "refused", "WRONG", "CRASH", "-")}
    total = len(lines) - count["-"]
    print(", ".join(f"{k} {v}" for k, v in count.items()))
    print(f"{count['ok']} of {total} captured cases: {100 * count['ok'] / max(total, 1):.1f} %")
    return 1 if count["WRONG"] + count["CRASH"] else 0


if __name__ == "__main__":
    sys.exit(main())
