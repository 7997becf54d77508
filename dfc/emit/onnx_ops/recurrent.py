"""LSTM, GRU and RNN as ONNX's ops of these names: gates reordered, layers stacked."""

from __future__ import annotations

from typing import Any

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates

# Our gate that stands at each of ONNX's places: ONNX has i o f c and z r h.
_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


@translates("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(b: Builder, x: Val, params: tuple[Val, ...], call: Call) -> list[Val]:
    a = call.attributes
    if a["dropout"] and a["train"]:
        raise b.refuse("dropout between the layers draws random numbers")
    base = call.op.split(".")[1]
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(base, "RNN")
    states = call.operands[1]
    first, *others = states if isinstance(states, tuple) else (states,)
    cell = others[0] if others else None
    assert first is not None
    directions = 2 if a["bidirectional"] else 1
    per = (4 if a["has_biases"] else 2) * directions * a["num_layers"]
    if len(params) != per:
        raise NoTranslation("")  # projections
    hidden = b.type(first).shape[-1]
    assert isinstance(hidden, int)
    unbatched = b.rank(x) == 2
    if unbatched:
        raise NoTranslation("")
    if a["batch_first"]:
        x = b.transpose(x, [1, 0, 2])
    last: list[list[Val]] = [[], []]
    step = 4 if a["has_biases"] else 2
    for layer in range(a["num_layers"]):
        weights = []
        for d in range(directions):
            at = (layer * directions + d) * step
            weights.append([_reorder(b, p, kind, hidden) for p in params[at : at + step]])
        packed = [_stack(b, [w[i] for w in weights]) for i in range(2)]
        bias = None
        if a["has_biases"]:
            bias = _stack(b, [b.op("Concat", w[2], w[3], axis=0) for w in weights])
        span = (layer * directions, (layer + 1) * directions)
        h0 = _rows(b, first, span, a["num_layers"])
        inputs = [x, *packed, bias, None, h0]
        if cell is not None:
            inputs.append(_rows(b, cell, span, a["num_layers"]))
        options: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if directions == 2 else "forward",
        }
        if kind == "GRU":
            options["linear_before_reset"] = 1
        if base == "rnn_relu":
            options["activations"] = ["Relu"] * directions
        out = 3 if kind == "LSTM" else 2
        results = b.op(kind, *inputs, out=out, **options)
        for r in results:
            r.dtype = x.dtype
        y = b.transpose(results[0], [0, 2, 1, 3])  # steps, batch, directions, hidden
        x = b.op("Reshape", y, [0, 0, directions * hidden])
        for i, r in enumerate(results[1:]):
            last[i].append(r)
    finals = [p[0] if len(p) == 1 else b.op("Concat", *p, axis=0) for p in last if p]
    return [b.transpose(x, [1, 0, 2]) if a["batch_first"] else x, *finals]


def _reorder(b: Builder, x: Val, kind: str, hidden: int) -> Val:
    import numpy as np

    if kind == "RNN":
        return x
    rows = np.concatenate([np.arange(g * hidden, (g + 1) * hidden) for g in _ORDER[kind]])
    return b.op("Gather", x, b.array(rows), axis=0)


def _stack(b: Builder, parts: list[Val]) -> Val:
    wide = [b.unsqueeze(p, 0) for p in parts]
    return wide[0] if len(wide) == 1 else b.op("Concat", *wide, axis=0)


def _rows(b: Builder, x: Val, span: tuple[int, int], layers: int) -> Val:
    return x if layers == 1 else b.slice(x, 0, *span)
