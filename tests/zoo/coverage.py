"""What dfc makes of every model of the zoo, as a table: `python -m tests.zoo.coverage` writes it.

Each model is captured, printed and parsed back, rewritten and proved, run on the eager engine on
all its calls against the model itself, and exported to ONNX, which ONNX Runtime runs on probes of
several sizes. A model that dfc refuses must say why; a wrong answer is never acceptable.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.zoo import Case, cases

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
# Codes by which a compiled model may refuse a call that capture restricted, with a note saying so.
_RESTRICTED = {"K010", "K011", "K014", "K015", "K016", "K023"}


class Wrong(AssertionError):
    """dfc gave another answer than the model."""


@dataclass
class Row:
    """One model's outcome; an empty reason is success."""

    name: str
    family: str
    capture: str = ""
    onnx: str = ""
    nodes: str = ""
    notes: str = ""
    seconds: float = 0.0


def examine(case: Case, *, onnx: bool = True, engine: str = "eager") -> Row:
    """Run one case through everything.

    Raises:  Wrong when any result differs from the model's.
    """
    import dfc

    start = time.perf_counter()
    row = Row(case.name, case.family)
    built = case.build()
    try:
        compiled = dfc.compile(
            built.model, built.args, built.kwargs, built.dynamic_shapes, engine=engine
        )
    except dfc.DfcError as e:
        if e.status == 4 or e.code == "V031":
            raise Wrong(str(e)) from e
        row.capture = _reason(e)
        row.onnx = "not captured"
        return row
    text = str(compiled.graph)
    if dfc.parse(text) != compiled.graph or str(dfc.parse(text)) != text:
        raise Wrong("the text does not read back")
    reverted = [r for r in compiled.report.passes if r.verdict == "reverted"]
    if reverted:
        raise Wrong(f"a pass was reverted: {reverted[0].step}: {reverted[0].reason}")
    refused = _calls(case, compiled)
    row.nodes = f"{compiled.report.nodes_before} → {compiled.report.nodes_after}"
    row.notes = "; ".join(dict.fromkeys(compiled.report.notes))
    if refused and not compiled.report.notes:
        raise Wrong(f"a call was refused without a note: {refused}")
    if onnx:
        row.onnx = _export(compiled)
    row.seconds = time.perf_counter() - start
    return row


def _reason(e: Any) -> str:
    return f"{e.code}: {e.message.splitlines()[0][:160]}"


def _calls(case: Case, compiled: Any) -> list[str]:
    """Every call against a fresh model; the codes of those that a noted restriction refuses."""
    import torch

    import dfc

    built = case.build()
    refused: list[str] = []
    for args, kwargs in [(built.args, built.kwargs), *built.calls]:
        mine, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        torch.manual_seed(0)
        with torch.no_grad():
            expected = built.model(*theirs[0], **theirs[1])
        torch.manual_seed(0)
        try:
            got = compiled(*mine[0], **mine[1])
        except dfc.DfcError as e:
            if e.code not in _RESTRICTED:
                raise
            refused.append(e.code)
            continue
        compare(got, expected)
        compare_mutated(mine, theirs)
    return refused


def compare(got: Any, expected: Any) -> None:
    """Same structure, types, shapes and, within rounding, values."""
    import torch
    import torch.utils._pytree as pytree

    if type(got) is not type(expected):
        raise Wrong(f"got a {type(got).__name__}, expected a {type(expected).__name__}")
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    if len(a) != len(b):
        raise Wrong(f"got {len(a)} leaves, expected {len(b)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or not (x == y or x != x):
                raise Wrong(f"leaf {i}: got {x!r}, expected {y!r}")
            continue
        try:
            rtol, atol = (1e-2, 1e-2) if y.element_size() == 2 else (1e-4, 1e-5)
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as e:
            raise Wrong(f"leaf {i}: {e}") from e


def compare_mutated(mine: Any, theirs: Any) -> None:
    """Tensors that the model writes to; containers that it grows in Python are its own."""
    import torch
    import torch.utils._pytree as pytree

    a, b = pytree.tree_leaves(mine), pytree.tree_leaves(theirs)
    for x, y in zip(a, b, strict=False):
        if isinstance(y, torch.Tensor) and x.shape == y.shape:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)


def _export(compiled: Any) -> str:
    import dfc

    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.export(Path(folder) / "m.onnx")
        except dfc.DfcError as e:
            if e.status == 4:
                raise Wrong(f"ONNX: {e}") from e
            return _reason(e)
    return ""


def document(rows: list[Row]) -> str:
    """The table as Markdown."""
    captured = [r for r in rows if not r.capture]
    exported = [r for r in captured if not r.onnx]
    lines = [
        "# What dfc captures, runs and exports",
        "",
        "Written by `python -m tests.zoo.coverage`; do not edit.",
        "",
        f"- {len(rows)} models; {len(captured)} ({len(captured) / len(rows):.1%}) captured, "
        "printed and parsed back, rewritten, proved, and equal to the model on the `eager` engine",
        f"- {len(exported)} ({len(exported) / len(rows):.1%} of all, "
        f"{len(exported) / max(len(captured), 1):.1%} of those captured) exported to ONNX and "
        "equal in ONNX Runtime on probes of several sizes",
        "- the others are refused, with the reason given below; none is wrong",
        "",
        "| model | family | nodes | run | ONNX | restrictions |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        run = "yes" if not r.capture else f"refused: {r.capture}"
        onnx = "yes" if not r.onnx else r.onnx if r.onnx == "not captured" else f"refused: {r.onnx}"
        cells = (r.name, r.family, r.nodes, run, onnx, r.notes)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def recorded() -> list[Row]:
    """The rows of the table as it was last written."""
    rows = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 6 and cells[0] not in ("model", "---"):
            name, family, nodes, run, onnx, notes = cells
            run, onnx = (c.removeprefix("refused: ") if c != "yes" else "" for c in (run, onnx))
            rows.append(Row(name, family, run, onnx, nodes, notes))
    return rows


def _merged(rows: list[Row]) -> list[Row]:
    """The recorded table with these rows in place of the older ones."""
    new = {r.name: r for r in rows}
    old = {r.name: r for r in recorded()} if DOCUMENT.exists() else {}
    return [new.get(c.name) or old[c.name] for c in cases() if c.name in new or c.name in old]


def _worker(names: list[str], pipe: Any, onnx: bool) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    by_name = {c.name: c for c in cases()}
    for name in names:
        try:
            pipe.send((name, examine(by_name[name], onnx=onnx)))
        except Exception as e:  # noqa: BLE001 - whatever a model raises is a finding
            pipe.send((name, f"{type(e).__name__}: {str(e)[:1500]}"))
    pipe.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models or families whose name contains one")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [
        c.name
        for c in cases()
        if not options.names or any(n in c.name or n == c.family for n in options.names)
    ]
    rows, wrong = _all(chosen, options.jobs, not options.no_onnx)
    for name, text in wrong:
        print(f"WRONG {name}: {text}")
    if not options.no_onnx:
        if options.names:
            rows = _merged(rows)
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(rows), encoding="utf-8")
        print(f"wrote {DOCUMENT.name}")
    print("\n".join(document(rows).splitlines()[4:8]))
    return 1 if wrong else 0


def _all(names: list[str], jobs: int, onnx: bool) -> tuple[list[Row], list[tuple[str, str]]]:
    """Spread the cases over processes; rows come back in the zoo's order."""
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("spawn")
    pipes = {}
    for i in range(jobs):
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=_worker, args=(names[i::jobs], send, onnx))
        worker.start()
        send.close()
        pipes[receive] = worker
    found: dict[str, Row] = {}
    wrong: list[tuple[str, str]] = []
    while pipes:
        for ready in wait(list(pipes)):
            try:
                name, outcome = ready.recv()  # type: ignore[union-attr]
            except EOFError:
                pipes.pop(ready).join()  # type: ignore[call-overload]
                continue
            if isinstance(outcome, str):
                wrong.append((name, outcome))
                print(f"WRONG {name}: {outcome[:300]}", flush=True)
                continue
            found[name] = outcome
            print(
                f"{len(found):>4} {name:32} {outcome.seconds:6.1f} s  "
                f"run: {outcome.capture or 'yes'}"
                f"  onnx: {outcome.onnx or 'yes'}",
                flush=True,
            )
    return [found[n] for n in names if n in found], wrong


if __name__ == "__main__":
    sys.exit(main())
