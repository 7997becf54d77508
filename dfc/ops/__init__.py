"""Which ops exist: importing this package makes `aten.*`, `torch.*` and `dfc.*` known."""

from dfc.ops import aten, attention, control_flow, linear, norm, rotary  # noqa: F401
