"""The word for a device of torch's that a model runs on: known, and there."""

from __future__ import annotations

from dfc.errors import DfcError


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or does not see.

    Raises:  DfcError Q007 (status 2) for a wrong word, K004 (7) for a missing device.
    """
    kind, colon, index = str(device).partition(":")
    if kind not in ("cpu", "cuda"):
        raise DfcError("Q007", f"unknown device `{device}`: there are cpu and cuda", status=2)
    if colon and not (kind == "cuda" and index.isdecimal()):
        help = "write cpu, cuda or cuda:1"
        raise DfcError("Q007", f"`{device}` is no device", help=help, status=2)
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DfcError("K004", "torch sees no CUDA device", help="see `dfc doctor`", status=7)
        count = torch.cuda.device_count()
        if index and int(index) >= count:
            seen = "one CUDA device" if count == 1 else f"{count} CUDA devices"
            raise DfcError("K004", f"`{device}` is not there: torch sees {seen}", status=7)
