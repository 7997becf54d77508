"""dfc's own ONNX translations of ops, by subject; `REAL` and `COMPLEX` find them by op name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dfc.emit.onnx_ops.registry import COMPLEX, REAL, REFUSED, translates

Translation = Callable[..., Any]


def load() -> None:
    """Import every subject, so that its translations are known."""
    from dfc.emit.onnx_ops import (  # noqa: F401
        arithmetic,
        attention,
        bits,
        complex_,
        control,
        conv,
        creation,
        float8,
        indexing,
        linalg,
        logic,
        nn,
        norms,
        ordering,
        padding,
        pool,
        quantized,
        recurrent,
        reduction,
        resampling,
        shapes,
        special,
    )


__all__ = ["COMPLEX", "REAL", "REFUSED", "Translation", "load", "translates"]
