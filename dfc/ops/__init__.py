"""Which ops exist: importing this package makes `aten.*`, `torch.*` and `dfc.*` known."""

from dfc.ops import (  # noqa: F401
    aten,
    attention,
    control_flow,
    embedding_quantized,
    grouped_quantized,
    linear,
    linear_f8,
    linear_quantized,
    norm,
    quantized,
    rotary,
)
