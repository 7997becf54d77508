"""What eager PyTorch and torch.export make of each model of the zoo, as a table.

    python -m tests.zoo.probe [--strict] [--full] [name or family ...]

Columns: `eager` ran the example and all calls; `export` is ok or the first line of the error;
`replay` compares the exported program with eager on all calls; then the seconds of the export
and the number of `call_function` nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.zoo import Built, Case, cases


@dataclass
class Row:
    """One line of the table."""

    name: str
    family: str
    eager: str
    export: str = "-"
    replay: str = "-"
    build_s: float = 0.0
    export_s: float = 0.0
    nodes: int = 0
    error: str = ""

    def __str__(self) -> str:
        times = f"{self.build_s:5.1f} {self.export_s:6.1f} {self.nodes:6d}"
        return (
            f"{self.name:32} {self.family:20} {self.eager:6} {times}  {self.replay:6} {self.export}"
        )


def probe(case: Case, strict: bool = False) -> Row:
    start = time.perf_counter()
    row = Row(case.name, case.family, "ok")
    try:
        expected = run_eager(case)
    except Exception as error:  # noqa: BLE001  (whatever a model raises is a finding)
        row.eager = "FAIL " + first_line(error)
        return row
    built = case.build()
    row.build_s = time.perf_counter() - start
    start = time.perf_counter()
    try:
        program = export(built, strict)
    except Exception as error:  # noqa: BLE001
        row.export = first_line(error)
        row.error = str(error)
        row.export_s = time.perf_counter() - start
        return row
    row.export = "ok"
    row.export_s = time.perf_counter() - start
    row.nodes = count_calls(program.graph_module)
    row.replay = replay(case, program, expected)
    return row


def run_eager(case: Case) -> list[Any]:
    """Outputs of the example and of each call, each on a fresh model."""
    import torch

    outputs = []
    for index in range(1 + len(case.build().calls)):
        built = case.build()
        args, kwargs = inputs(built)[index]
        torch.manual_seed(0)
        with torch.set_grad_enabled(case.training):
            outputs.append(copy_tensors(built.model(*args, **kwargs)))
    return outputs


def inputs(built: Built) -> list[Any]:
    return [(built.args, built.kwargs), *built.calls]


def export(built: Built, strict: bool = False) -> Any:
    import torch

    # torch.export prints the whole graph to stderr when it meets a data-dependent guard
    with torch.no_grad(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return torch.export.export(
            built.model,
            built.args,
            built.kwargs,
            dynamic_shapes=built.dynamic_shapes,
            strict=strict,
        )


def replay(case: Case, program: Any, expected: list[Any]) -> str:
    import torch

    for index, want in enumerate(expected):
        args, kwargs = inputs(case.build())[index]
        torch.manual_seed(0)
        try:
            module = copy.deepcopy(program).module()
            with torch.no_grad():
                got = module(*args, **kwargs)
        except Exception as error:  # noqa: BLE001
            return f"call {index}: {first_line(error)};"
        if problem := difference(got, want):
            return f"call {index}: {problem};"
    return "ok"


def difference(got: Any, want: Any) -> str | None:
    import torch
    from torch.utils import _pytree as pytree

    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    if len(got) != len(want):
        return f"{len(got)} outputs, not {len(want)}"
    try:
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-3, atol=1e-4)
    except (AssertionError, TypeError) as error:
        return first_line(error)
    return None


def copy_tensors(tree: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)


def count_calls(module: Any) -> int:
    graphs = [m.graph for m in module.modules() if hasattr(m, "graph")]
    return sum(node.op == "call_function" for graph in graphs for node in graph.nodes)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.probe", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases or families; all when none is given")
    parser.add_argument("--strict", action="store_true", help="export with strict=True")
    parser.add_argument("--full", action="store_true", help="print export errors in full")
    options = parser.parse_args(argv)
    chosen = [c for c in cases() if not options.names or {c.name, c.family} & {*options.names}]
    known = {name for c in cases() for name in (c.name, c.family)}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such case or family: {', '.join(unknown)}")

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for case in chosen:
        rows.append(probe(case, options.strict))
        print(rows[-1], flush=True)
        if options.full and rows[-1].error:
            print(rows[-1].error, flush=True)
    eager = sum(row.eager == "ok" for row in rows)
    exported = sum(row.export == "ok" for row in rows)
    same = sum(row.replay == "ok" for row in rows)
    print(f"{len(rows)} cases: eager {eager}, export {exported}, replay {same}")
    return 0 if eager == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
