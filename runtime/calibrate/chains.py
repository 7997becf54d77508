"""Small graphs whose time tells a device's facts: operators one after the other, or one large one.

They run on the eager engine, so that what is measured is what a stage of a model pays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dfc.ops  # noqa: F401  # makes operators known to whoever reads graphs
from dfc.ir.graph import Graph
from dfc.lang.graph_parser import parse_graph

if TYPE_CHECKING:
    import torch

# How each operator is written; `%p` is the result before it, in the shape that it keeps.
_TEXT = {
    "relu": "aten.relu.default({p})",
    "exp": "aten.exp.default({p})",
    "add": "aten.add.Tensor({p}, %a, alpha=1)",
    "transpose": "aten.transpose.int({p}, dim0=1, dim1=2)",
    "view": "aten.view.default({p}, size={shape})",
    "linear": "aten.linear.default({p}, %a, %b)",
    "mm": "aten.mm.default({p}, %a)",
    "bmm": "aten.bmm.default({p}, %a)",
    "conv": (
        "aten.conv2d.default({p}, %a, None, stride=[1, 1], padding=[{half}, {half}], "
        "dilation=[1, 1], groups=1)"
    ),
    "softmax": "aten.softmax.int({p}, dim=-1, dtype=None)",
    "layer_norm": (
        "aten.layer_norm.default({p}, %a, %a, normalized_shape=[{n}], eps=1e-05, "
        "cudnn_enable=False)"
    ),
    "attention": (
        "aten.scaled_dot_product_attention.default({p}, {p}, {p}, None, dropout_p=0.0, "
        "is_causal=False, scale=None, enable_gqa=False)"
    ),
}


@dataclass(frozen=True)
class Chain:
    """Operators one after the other on one shape; `others` are the shapes of what they all read."""

    ops: tuple[str, ...]
    shape: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()
    length: int = 1
    dtype: str = "f32"

    def text(self) -> str:
        """The graph."""
        kind = f"{self.dtype}{list(self.shape)}"
        other = "".join(
            f", %{name}: {self.dtype}{list(shape)}"
            for name, shape in zip("ab", self.others, strict=False)
        )
        facts = {"n": self.shape[-1], "shape": list(self.shape)}
        facts["half"] = self.others[0][-1] // 2 if self.others else 0
        lines, last = [], "%x"
        for i in range(self.length):
            for op in self.ops:
                name = f"%{op}_{i}"
                call = _TEXT[op].format(p=last, **facts)
                lines.append(f"  {name}: {kind} = {call}\n")
                last = name
        body = "".join(lines)
        return f"dfc 1\ngraph @chain(%x: {kind}{other}) -> ({kind}) {{\n{body}  return {last}\n}}\n"

    def graph(self) -> Graph:
        return parse_graph(self.text(), "chain")

    @property
    def operators(self) -> int:
        return self.length * len(self.ops)

    def runner(self, device: str) -> Callable[[], None]:
        """Runs the chain once on a device; a GPU is not waited for, as between a model's operators.

        Raises:  DfcError or RuntimeError where the device does not take the dtype.
        """
        from dfc.runtime.engines import find_engine

        run = find_engine("eager").build(self.graph(), device)
        inputs = [_values(s, self.dtype, device) for s in (self.shape, *self.others)]

        def once() -> None:
            run(inputs)

        return once


def _values(shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    """Numbers that stay small in a chain: no time is spent on overflow or denormals."""
    import torch

    from dfc.ir.types import DTYPES

    made = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * (2 / shape[-1])
    return made.to(DTYPES[dtype].to_torch()).to(device)
