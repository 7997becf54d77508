"""What came out of a run: each output in a few numbers, and all of them in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dfc.errors import DfcError

FORMATS = (".npz", ".safetensors")


def describe(name: str, x: Any) -> dict[str, Any]:
    """A result in a few numbers."""
    import torch

    from dfc.ir.types import TensorType

    if not isinstance(x, torch.Tensor):
        return {"name": name, "type": type(x).__name__, "min": x, "max": x, "mean": x,
                "values": str(x), "not_finite": 0}  # fmt: skip
    found: dict[str, Any] = {"name": name, "type": str(TensorType.of(x))}
    x = x.detach().cpu()
    flat = torch.view_as_real(x.resolve_conj()).reshape(-1) if x.is_complex() else x.reshape(-1)
    wide = flat.double()
    finite = wide[wide.isfinite()]
    some = finite.numel() > 0
    found["min"] = float(finite.min()) if some else None
    found["max"] = float(finite.max()) if some else None
    found["mean"] = float(finite.mean()) if some else None
    found["not_finite"] = int((~wide.isfinite()).sum())
    shown = [_short(v) for v in x.reshape(-1)[:4].tolist()]
    found["values"] = ", ".join(shown) + (" ..." if x.numel() > 4 else "")
    return found


def print_results(rows: Iterable[Mapping[str, Any]]) -> None:
    from dfc.cli.tables import print_table

    print_table(
        ["output", "type", "min", "max", "mean", "first values"],
        [
            [r["name"], r["type"], *(_short(r[k]) for k in ("min", "max", "mean")), r["values"]]
            for r in rows
        ],
        right=(2, 3, 4),
    )


def _short(x: Any) -> str:
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, (float, complex)) else str(x)


def write_tensors(path: str, tensors: dict[str, Any], force: bool) -> None:
    """Outputs by name as `.npz` or `.safetensors`, all or nothing.

    Raises:  DfcError D056 for a type that the format cannot hold, D010..D013 for the file.
    """
    import numpy as np
    import torch

    from dfc.publish import publish_file

    kept = {n: torch.as_tensor(x).detach().cpu().resolve_conj().resolve_neg().contiguous()
            for n, x in tensors.items()}  # fmt: skip
    size = sum(x.nbytes for x in kept.values())
    with publish_file(path, force=force, expect_bytes=size) as temp:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({n: x.clone() for n, x in kept.items()}, temp)
            return
        try:
            arrays = {n: x.numpy() for n, x in kept.items()}
        except TypeError:
            raise DfcError(
                "D056", "numpy has no type for these outputs", help="write a .safetensors file"
            ) from None
        with temp.open("wb") as f:
            np.savez(f, **arrays)  # type: ignore[arg-type]
