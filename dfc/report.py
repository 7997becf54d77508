"""What was done, kept and undone, and why: the story of one compilation as data and as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dfc.rewrite.driver import PassReport


@dataclass(frozen=True)
class EngineReport:
    """One engine that was considered.

    Units:  p50_ms is the median of alternating runs on the example; None when not measured.
    """

    name: str
    verdict: str  # "chosen", "slower", "refused", "wrong"
    reason: str = ""
    p50_ms: float | None = None
    spread_ms: float | None = None
    error: float | None = None


@dataclass
class Report:
    """The facts of one compilation.

    Units:  bytes of weights; seconds; errors are absolute, against the float64 witness.
    """

    model: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    capture_s: float = 0.0
    passes_s: float = 0.0
    proved: bool = False
    proof: str = ""
    error: float | None = None
    original_error: float | None = None
    passes: list[PassReport] = field(default_factory=list)
    engines: list[EngineReport] = field(default_factory=list)
    before_ms: float | None = None
    after_ms: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        data: dict[str, Any] = json.loads(text)
        data["passes"] = [PassReport(**p) for p in data["passes"]]
        data["engines"] = [EngineReport(**e) for e in data["engines"]]
        return Report(**data)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.nodes_before} -> {self.nodes_after} nodes, {self.proof}"]
        for p in self.passes:
            tail = f": {p.reason}" if p.reason else ""
            lines.append(
                f"  {p.step:<20} {p.changes:>5} changes {p.ms:>9.1f} ms  {p.verdict}{tail}"
            )
        for e in self.engines:
            time = f"{e.p50_ms:.3f} ms" if e.p50_ms is not None else "not measured"
            tail = f": {e.reason}" if e.reason else ""
            lines.append(f"  engine {e.name:<13} {time}  {e.verdict}{tail}")
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)

    def to_html(self) -> str:
        """One self-contained page."""
        from html import escape

        def table(head: list[str], rows: list[list[object]]) -> str:
            top = "".join(f"<th>{escape(h)}</th>" for h in head)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>"
                for row in rows
            )
            return f"<table><tr>{top}</tr>{body}</table>"

        passes = [
            [
                p.step,
                p.changes,
                f"{p.nodes_before} → {p.nodes_after}",
                f"{p.ms:.1f}",
                p.verdict,
                p.reason,
            ]
            for p in self.passes
        ]
        engines: list[list[object]] = [
            [e.name, "" if e.p50_ms is None else f"{e.p50_ms:.3f}", e.verdict, e.reason]
            for e in self.engines
        ]
        notes = "".join(f"<li>{escape(n)}</li>" for n in self.notes)
        return (
            "<!doctype html><meta charset=utf-8><title>dfc report</title>"
            "<style>body{font:15px system-ui;margin:2em}"
            "table{border-collapse:collapse;margin:1em 0}"
            "td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left}</style>"
            f"<h1>{escape(self.model)}</h1><p>{escape(self.proof)}</p>"
            f"<p>{self.nodes_before} → {self.nodes_after} nodes, "
            f"{self.bytes_before / 1e6:.1f} → {self.bytes_after / 1e6:.1f} MB</p>"
            + table(["pass", "changes", "nodes", "ms", "verdict", "reason"], passes)
            + table(["engine", "p50 ms", "verdict", "reason"], engines)
            + f"<ul>{notes}</ul>"
        )
