"""A report as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dfc.counting import counted

if TYPE_CHECKING:
    from dfc.report import Report

_STYLE = (
    "body{font:15px system-ui;margin:2em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "pre{background:#f6f6f6;padding:1em}"
)


def page(report: Report) -> str:
    """HTML without anything that is loaded from elsewhere."""
    size = f"{report.bytes_before / 1e6:.1f} → {report.bytes_after / 1e6:.1f} MB"
    notes = "".join(f"<li>{escape(n)}</li>" for n in report.notes)
    recipe = f"<h2>recipe</h2><pre>{escape(report.recipe)}</pre>" if report.recipe else ""
    return (
        "<!doctype html><meta charset=utf-8><title>dfc report</title>"
        f"<style>{_STYLE}</style>"
        f"<h1>{escape(report.model)}</h1><p>{escape(report.proof)}</p>"
        f"<p>{report.nodes_before} → {counted(report.nodes_after, 'node')}, {size}</p>"
        + "".join(_tables(report))
        + f"<ul>{notes}</ul>"
        + recipe
    )


def _tables(r: Report) -> list[str]:
    from dfc.lang.units import amount_text

    return [
        _table(["requirement", "", "numbers"],
               [[x.text, x.verdict, x.numbers] for x in r.requirements]),
        _table(["goal", "before", "after", ""],
               [[g.text, amount_text(g.before, g.dimension), amount_text(g.after, g.dimension),
                 g.how] for g in r.goals]),
        _table(["pass", "changes", "nodes", "ms", "verdict", "reason"],
               [[p.step, p.changes, f"{p.nodes_before} → {p.nodes_after}", f"{p.ms:.1f}",
                 p.verdict, p.reason] for p in r.passes]),
        _table(["decision", "verdict", "reason", "engine"],
               [[d.step, d.verdict, d.reason, d.engine] for d in r.decisions]),
        _table(["engine", "p50 ms", "verdict", "reason"],
               [[e.label, "" if e.p50_ms is None else f"{e.p50_ms:.3f}", e.verdict, e.reason]
                for e in r.engines]),
        _table(["tried", "goals", "misses", ""], [_tried(t) for t in r.tried]),
    ]  # fmt: skip


def _tried(t: object) -> list[object]:
    from dfc.report import TriedReport

    assert isinstance(t, TriedReport)
    choices = ", ".join(f"{k}={v}" for k, v in t.choices.items())
    values = ", ".join(f"{k} {v:.4g}" for k, v in t.values.items())
    marks = ["chosen"] * t.chosen + ["pareto"] * t.best + [t.failed] * bool(t.failed)
    return [choices, values, ", ".join(t.missed), ", ".join(marks)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
