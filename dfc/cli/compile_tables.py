"""What `dfc compile` tells: what was gained, kept, required and tried, as data and as tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.counting import counted

if TYPE_CHECKING:
    from dfc.compiled import Compiled
    from dfc.report import Report


def facts(
    model: str, compiled: Compiled, written: dict[str, str], missed: bool = False
) -> dict[str, Any]:
    from dfc.cli.prove import largest_error
    from dfc.cli.tables import size_of

    worst = largest_error(compiled)
    return {
        "model": model,
        "engine": compiled.engine.name,
        "report": asdict(compiled.report),
        "largest_error": worst.to_data() if worst else None,
        "largest_error_text": str(worst) if worst else None,
        "written": {k: {"path": p, "bytes": size_of(p)} for k, p in written.items()},
        "next": None if missed else _next(model, written),
    }


def _next(model: str, written: dict[str, str]) -> str:
    if "package" in written:
        return f"dfc bench {written['package']}"
    if "onnx" in written and Path(written["onnx"]).is_dir():  # stages
        return f"dfc run {written['onnx']} --random"
    return f"dfc compile {json.dumps(model) if ' ' in model else model} -o model.dfcpkg"


def print_facts(model: str, compiled: Compiled, data: dict[str, Any]) -> None:
    from dfc.cli.tables import bytes_text, ms_text, print_table, print_text

    report = compiled.report
    print_text(f"{model}: {report.proof}\n")
    gain = ""
    if report.before_ms and report.after_ms:
        gain = f"{report.before_ms / report.after_ms:.2f}x on {compiled.engine.name}"
    rows = [
        ["nodes", str(report.nodes_before), str(report.nodes_after), ""],
        ["weights", bytes_text(report.bytes_before), bytes_text(report.bytes_after), ""],
        ["latency", ms_text(report.before_ms), ms_text(report.after_ms), gain],
    ]
    print_table(["", "before", "after", ""], rows, right=(1, 2))
    if data["largest_error_text"]:
        print_text(f"largest error against the original: {data['largest_error_text']}")
    _print_wishes(report)
    if report.passes:
        print_text("")
        _print_passes(report)
    for d in report.decisions:
        print_text(f"{d.step}: {d.verdict}" + (f": {d.reason}" if d.reason else ""))
    if report.engines:
        print_text("")
        print_engines(report)
    for note in report.notes:
        print_text(f"note: {note}")
    print_text("")
    for kind, file in data["written"].items():
        what = "by the recipe" if kind.startswith("emitted") else kind
        print_text(f"wrote {file['path']} ({what}, {bytes_text(file['bytes'])})")
    if data["next"]:
        print_text(f"next: {data['next']}")


def _print_wishes(report: Report) -> None:
    """Requirements, goals, and the combinations that were tried."""
    from dfc.cli.tables import print_table, print_text
    from dfc.report import goal_text, tried_text

    if report.requirements:
        print_text("")
        rows = [[r.text, r.verdict, r.numbers] for r in report.requirements]
        print_table(["requirement", "", ""], rows)
    for g in report.goals:
        print_text(goal_text(g))
    if report.tried:
        print_text(f"\ntried {counted(len(report.tried), 'combination')}")
        for t in report.tried:
            print_text(f"  {tried_text(t)}")


def _print_passes(report: Any) -> None:
    from dfc.cli.tables import ms_text, print_table

    rows = [
        [p.step, str(p.changes), f"{p.nodes_before} -> {p.nodes_after}", ms_text(p.ms),
         f"{p.verdict}: {p.reason}" if p.reason else p.verdict]
        for p in report.passes
    ]  # fmt: skip
    print_table(["pass", "changes", "nodes", "time", ""], rows, right=(1, 3))


def print_engines(report: Any) -> None:
    from dfc.cli.tables import ms_text, print_table

    rows = [
        [e.label, ms_text(e.p50_ms), f"± {ms_text(e.spread_ms)}" if e.spread_ms is not None else "",
         f"{e.verdict}: {e.reason}" if e.reason else e.verdict]
        for e in report.engines
    ]  # fmt: skip
    print_table(["engine", "p50", "spread", ""], rows, right=(1,))
