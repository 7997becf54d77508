"""Every launch of the kernels for CUDA devices compiles for Hopper, on machines with no device too.

Triton makes integers that are 1, or divisible by 16, part of what it compiles, so that sizes of one
row, one output or one group make other programs than those of many.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
F8 = torch.float8_e4m3fn
SHARED = 227 * 1024  # bytes that a block may have


class Hopper:
    """What Triton asks of a device while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that launches compiled; nothing runs, but what they need is there."""
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    from dfc.runtime.kernels import launch

    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(self, *args, grid=grid, warmup=True, **options)
        assert ".target sm_90" in made.asm["ptx"]
        if made.metadata.shared > SHARED:
            raise OutOfResources(made.metadata.shared, SHARED, "shared memory")
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(launch, "_cores", lambda device: 132)
    monkeypatch.setattr(launch, "_fitting", {})
    launch.tiles.cache_clear()
    yield names
    launch.tiles.cache_clear()


def layer(kind: torch.dtype, bits: int, group: int, x: torch.dtype, n: int, k: int) -> Any:
    from dfc.runtime.kernels.launch import Layer

    groups = -(-k // group) if group else 1
    held = groups * group // 2 if bits == 4 else k
    scale = torch.empty(n, groups, dtype=x) if group else torch.empty(n, dtype=x)
    zero = torch.empty(n, (groups + 1) // 2, dtype=torch.uint8) if bits == 4 and n > 1 else None
    bias = torch.empty(n, dtype=x) if n > 1 else None
    return Layer(torch.empty(n, held, dtype=kind), scale, zero, bias, bits, group, n, k)


def launch_all(made: Any, m: int, x: torch.dtype, *, rounded: bool) -> None:
    rows, y = torch.empty(m, made.k, dtype=x), torch.empty(m, made.n, dtype=x)
    if rounded:
        made.rounded(rows, y)
    else:
        made.few(rows, y)
        made.many(rows, None, y)
        made.floats(x)


def test_tiles_that_need_too_much_memory_become_smaller(compiled: list[str]) -> None:
    """Three stages of 128 rows and groups of 256 take 240 KiB, of 227."""
    from dfc.runtime.kernels import launch

    launch_all(layer(*WEIGHTS["int4 g256"], torch.bfloat16, 2560, 2048), 256, torch.bfloat16,
               rounded=False)  # fmt: skip
    (held,) = launch._fitting.values()
    assert (held.bm, held.stages) == (128, 2) and "many_rows" in compiled


def test_a_kernel_that_the_device_refuses_is_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    import dfc
    from dfc.runtime.kernels.cuda import linear

    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setitem(globals(), "SHARED", -1)
    weight, scale = torch.empty(8, 64, dtype=torch.int8), torch.empty(8)
    for rows in (1, 17):
        with pytest.raises(dfc.DfcError, match="out of resource: shared memory") as e:
            linear(torch.empty(rows, 64), weight, scale, None, None, 8, 0, 0)
        assert e.value.code == "K003" and "eager:floats" in str(e.value)


WEIGHTS = {
    "int4 g32": (torch.uint8, 4, 32), "int4 g256": (torch.uint8, 4, 256),
    "int8": (torch.int8, 8, 0), "int8 g64": (torch.int8, 8, 64), "f8": (F8, 8, 0),
}  # fmt: skip


@pytest.mark.parametrize("weight", ["int4 g32", "int8", "int8 g64", "f8"])
@pytest.mark.parametrize("rounded", [False, True])
def test_sizes_of_one_compile(weight: str, rounded: bool, compiled: list[str]) -> None:
    made = layer(*WEIGHTS[weight], torch.bfloat16, 1, 1)
    launch_all(made, 1, torch.bfloat16, rounded=rounded)
    long = layer(*WEIGHTS[weight], torch.bfloat16, 1, 8192)  # in parts along K
    launch_all(long, 1, torch.bfloat16, rounded=rounded)
    assert set(compiled) == (
        {"round_rows", "many_rows", "finish"} if rounded
        else {"few_rows", "many_rows", "finish", "unpack"}
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("rounded", [False, True])
def test_every_tile_compiles(weight: str, x: str, rounded: bool, compiled: list[str]) -> None:
    for m in (33, 256):
        launch_all(layer(*WEIGHTS[weight], FLOATS[x], 2560, 2048), m, FLOATS[x], rounded=rounded)
    assert {"many_rows", "finish"} <= set(compiled)
