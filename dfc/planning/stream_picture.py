"""Passes with streamed weights as pictures: a trace for Perfetto, and an SVG timeline."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from dfc.planning.streaming import Stream

_SHOWN = 2  # passes: the first ones fill slots, later ones are alike
_COLOURS = ("#4c78a8", "#f58518", "#72b7b2", "#e45756")  # computing, then hops


def chrome_trace(found: Stream) -> dict[str, Any]:
    """Events for chrome://tracing and Perfetto, in microseconds."""
    events: list[dict[str, Any]] = []
    for lane, (name, spans) in enumerate(found.lanes):
        events.append(
            {"ph": "M", "pid": 0, "tid": lane, "name": "thread_name", "args": {"name": name}}
        )
        events += [
            {"ph": "X", "pid": 0, "tid": lane, "name": what, "ts": a * 1e6, "dur": (b - a) * 1e6}
            for what, a, b in spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def svg_timeline(found: Stream, title: str) -> str:
    """The last passes; one row computes, one row a hop, idle time white."""
    n = len(found.layers)
    first = found.lanes[0][1][n * max(0, found.passes - _SHOWN)][1]
    span = float(found.lanes[0][1][-1][2]) - first or 1.0
    left, width, row = 90, 1000, 26
    parts = [f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>']
    for lane, (name, spans) in enumerate(found.lanes):
        y = 34 + lane * row
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="22" fill="#f4f4f4"/>')
        colour = _COLOURS[lane % len(_COLOURS)]
        for what, a, b in spans:
            if b <= first:
                continue
            x, w = (max(a, first) - first) / span * width, (b - max(a, first)) / span * width
            parts.append(
                f'<rect x="{left + x:.2f}" y="{y}" width="{max(w, 0.2):.2f}" height="22" '
                f'fill="{colour}" stroke="#fff" stroke-width=".5"><title>{escape(what)}</title>'
                "</rect>"
            )
    height = 34 + len(found.lanes) * row + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height}" '
        f'font-family="sans-serif" font-size="13">{"".join(parts)}</svg>\n'
    )
