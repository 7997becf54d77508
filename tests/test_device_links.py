"""Tensors that go from device to device: the protocol over gloo, and the choice of links.

The processor stands for both devices, and gloo for nccl, which test_gpu_nccl.py has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroupGloo  # type: ignore[attr-defined]

from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.types import ScalarType, TensorType
from dfc.planning.schedules import forward_program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.device_links import DeviceLinks, MixedLinks
from dfc.runtime.pipeline.linking import device_pairs
from dfc.runtime.pipeline.links import Doing, LinkLost, Traffic, gloo_device
from dfc.runtime.pipeline.local_links import LocalLinks
from dfc.runtime.pipeline.messages import bytes_of
from dfc.runtime.pipeline.routes import Edge, routes

PAIR = (0, 1)


class Gloo:
    """What `Nccl` does, for the processor."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.aborted = 0

    def group(self, store: Any, rank: int, device: str, seconds: float) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads = [gloo_device()], 1
        options._timeout = timedelta(seconds=seconds)
        self.made.append(rank)
        return ProcessGroupGloo(store, rank, 2, options)

    def ordered(self, work: Any, timeout: timedelta) -> None:
        work.wait(timeout)

    def finished(self, work: Any, timeout: timedelta) -> None:
        if not work.is_completed():
            work.wait(timeout)

    def abort(self, group: Any) -> None:
        self.aborted += 1


def both(make: Callable[[int], Any]) -> list[Any]:
    """What both ranks make, each in a thread of its own."""
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda r=r: found.update({r: make(r)})) for r in PAIR]  # type: ignore[misc]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    return [found[r] for r in PAIR]


def mixed(folder: Path) -> tuple[list[MixedLinks], list[Gloo]]:
    store, fabrics = torch.distributed.HashStore(), [Gloo(), Gloo()]

    def make(me: int) -> MixedLinks:
        base = LocalLinks(me, [PAIR], folder, "links", 20)
        return MixedLinks(base, DeviceLinks(me, [PAIR], store, "x", "cpu", 20, fabrics[me]))

    return both(make), fabrics


def values(b: int) -> list[Any]:
    """Of every kind: a length that data decide, other memory orders, repeats, none at all."""
    torch.manual_seed(b)
    return [
        torch.randn(3 + b, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1, 4).expand(6, 4),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.empty(0, 3),
        torch.tensor(7 + b, dtype=torch.int64),
        7 + b,
    ]


def traffic(links: Any, count: int) -> Traffic:
    def tensor(dtype: str, *shape: Any) -> Any:
        return TensorType.of(torch.empty(shape, dtype=getattr(torch, dtype)))

    first = TensorType(tensor("float32", 1).dtype, (symbol("n"), 4))
    types = [first, tensor("float32", 2, 3, 4, 5), tensor("float32", 6, 4),
             tensor("complex64", 4), tensor("float32", 0, 3), tensor("int64"),
             ScalarType("int")]  # fmt: skip
    names = tuple(range(len(types)))
    made = routes(forward_program((0, 1), count), [Edge(0, 1, names)])
    every = range(count)
    return Traffic(links, made, every, {0: types}, [{}] * count, Doing(), 20)


def test_tensors_go_between_devices_and_heads_beside_them(tmp_path: Path) -> None:
    """They keep bits and layout, whatever the order in which a reader asks for them."""
    links, fabrics = mixed(tmp_path)
    sender, reader = (traffic(x, 4) for x in links)
    found: dict[int, list[Any]] = {}

    def read() -> None:
        for b in (2, 0, 1, 3):
            found[b] = reader.receive(0, b)
        reader.settle()

    thread = threading.Thread(target=read)
    thread.start()
    for b in range(4):
        sender.send(0, b, values(b))
    sender.finish()
    thread.join(timeout=60)
    for b in range(4):
        for x, y in zip(values(b), found[b], strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y) and x.stride() == y.stride()
            else:
                assert x == y
    assert sender.sent[0] > sum(x.nbytes for x in values(0)[:2])
    assert [f.made for f in fabrics] == [[0], [1]]
    for x in links:
        x.close()
    assert [f.aborted for f in fabrics] == [1, 1]


def test_who_waits_for_a_device_is_told_when_it_is_over(tmp_path: Path) -> None:
    links, _ = mixed(tmp_path)
    sender, reader = (traffic(x, 2) for x in links)
    links[0].close()
    with pytest.raises(LinkLost, match=r"RECV\(e0, mb0\): the other end is gone"):
        reader.receive(0, 0)
    with pytest.raises(LinkLost, match=r"SEND\(e0, mb0\)"):
        sender.send(0, 0, values(0))
    links[1].close()


def test_bytes_are_those_that_a_tensor_has_in_its_memory() -> None:
    x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    assert bytes_of(x).data_ptr() == x.data_ptr()
    assert bytes_of(x.permute(2, 0, 1)).data_ptr() == x.data_ptr()  # dense: no copy
    assert bytes_of(x[:1].expand(5, 3, 4)).nbytes == x[:1].nbytes


def test_nccl_is_between_ranks_on_two_gpus_alone() -> None:
    pairs = [(HOST, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, HOST)]
    places = [(0, "cpu"), (0, "a"), (0, "b"), (0, "b"), (1, "a")]
    assert device_pairs(None, pairs, places, True) == [(1, 2), (3, 4)]
    assert device_pairs("nccl", pairs, places, True) == [(1, 2), (3, 4)]
    assert device_pairs(None, pairs, places, False) == []  # where there is none
    for kind in ("local", "gloo"):  # where it is ruled out
        assert device_pairs(kind, pairs, places, True) == []
    with pytest.raises(DfcError, match=r"N059.*no nccl here") as none:
        device_pairs("nccl", pairs, places, False)
    assert none.value.status == 2
    with pytest.raises(DfcError, match=r"N059.*no two linked ranks have CUDA devices"):
        device_pairs("nccl", pairs[:2], places, True)


def test_the_command_says_that_there_is_nothing_for_nccl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dfc
    from dfc.cli import main
    from tests.test_pipeline import captured

    _, _, graph = captured("chain")
    package = str(tmp_path / "chain.dfcpkg")
    dfc.compile(graph, [torch.randn(6, 8)], engine="eager").save(package)
    given = ["run", package, "--pipeline", "2", "--on", "processes", "--links", "nccl"]
    assert main(given) == 2
    assert "N059" in capsys.readouterr().err
