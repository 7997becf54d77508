"""Packed weights are kept in files: written once, checked, and the oldest goes first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfc.runtime.kernels import memory, packed
from tests.kernel_layers import Layer, needs_kernels


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    needs_kernels()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed._held.clear()
    yield tmp_path / "cache" / "dfc" / "packed"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)


def keep(layer: Layer, digests: tuple[str, ...] = ("a",)) -> Tensor:
    group = layer.group or 0
    sizes = layer.bits, layer.n, layer.x.shape[1], group
    return packed.packed_weight(digests, *sizes, layer.pack)


def test_packed_weights_lie_on_pages_of_their_own_size() -> None:
    """A small one shares a chunk with others, a large one has its own; none overlaps another."""
    sizes = (1, 63, 64, 65, 5 << 20, 40 << 20)
    parts = [memory.huge(size) for size in sizes]
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert part.numel() == size and part.data_ptr() % memory.LINE == 0
        part.fill_(i + 1)
    assert all(bool((part == i + 1).all()) for i, part in enumerate(parts))


@pytest.mark.usefixtures("small")
def test_a_packed_weight_is_written_once_and_read(own_cache: Path) -> None:
    layer = Layer(4, 32, (3, 20, 64))
    want = keep(layer)
    assert keep(layer) is want
    (file,) = own_cache.iterdir()
    packed._held.clear()
    layer.pack = None  # type: ignore[assignment,method-assign]  # a second time there is no need
    assert torch.equal(keep(layer), want)
    assert file.stat().st_mode & 0o077 == 0 or own_cache.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("small")
def test_a_file_that_is_not_whole_is_written_anew(own_cache: Path) -> None:
    layer = Layer(8, None, (3, 20, 64))
    want = keep(layer).clone()
    (file,) = own_cache.iterdir()
    for broken in (b"", b"x" * 100, file.read_bytes()[:-1]):
        packed._held.clear()
        file.write_bytes(broken)
        assert torch.equal(keep(layer), want)
        assert file.read_bytes() == bytes(want.numpy())


@pytest.mark.usefixtures("small")
def test_a_folder_that_others_can_write_to_is_passed_by(own_cache: Path) -> None:
    layer = Layer(8, None, (3, 20, 64))
    want = keep(layer).clone()
    (file,) = own_cache.iterdir()
    file.write_bytes(bytes(len(file.read_bytes())))
    own_cache.chmod(0o777)
    packed._held.clear()
    assert torch.equal(keep(layer), want)
    assert file.read_bytes()[:4] == bytes(4)


@pytest.mark.usefixtures("small")
def test_what_was_not_used_for_longest_goes_first(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(8, None, (3, 20, 64))
    size = keep(layer).numel()
    (old,) = own_cache.iterdir()
    os.utime(old, (1, 1))
    monkeypatch.setattr(packed, "MOST_BYTES", size)
    keep(layer, ("b",))
    assert not old.exists() and len(list(own_cache.iterdir())) == 1
