"""Links between processes of one host: order, large messages, and what is told when one ends."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.runtime.pipeline import shared_blocks
from dfc.runtime.pipeline.linking import GlooMeeting, LocalMeeting, joined, meeting
from dfc.runtime.pipeline.local_links import LocalLinks
from dfc.runtime.pipeline.shared_blocks import LARGE

SOON, FOREVER = timedelta(seconds=60), timedelta(seconds=1e6)
PAIRS = [(0, 1), (1, 0)]


def both(make: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, range(2)))


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[list[LocalLinks]]:
    made = both(lambda me: LocalLinks(me, PAIRS, tmp_path, "links1", 60))
    yield made
    for links in made:
        links.close()


def block(n: int, value: int) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.uint8)


def test_messages_come_whole_and_may_be_waited_for_in_any_order(ends: list[LocalLinks]) -> None:
    sizes = [8, 128, 1 << 23, 64, 1 << 22]
    sent = [ends[0].post((0, 1), block(n, i), i) for i, n in enumerate(sizes)]
    blocks = [block(n, 99) for n in sizes]
    works = [ends[1].post((0, 1), b, i) for i, b in enumerate(blocks)]
    for i in (1, 4, 0, 3, 2):
        works[i].wait(SOON)
        assert torch.equal(blocks[i], block(sizes[i], i))
    for work in sent:
        work.wait(SOON)


def test_both_may_send_what_nobody_reads_yet(ends: list[LocalLinks]) -> None:
    large = 1 << 24  # more than the system keeps
    for me in range(2):
        ends[me].post((me, 1 - me), block(large, me), 0)
    for me in range(2):
        got = block(large, 99)
        ends[me].post((1 - me, me), got, 0).wait(SOON)
        assert torch.equal(got, block(large, 1 - me))


def test_what_does_not_come_is_told_in_time(ends: list[LocalLinks]) -> None:
    waiting = ends[1].post((0, 1), block(8, 0), 0)
    with pytest.raises(RuntimeError, match="nothing came in time"):
        waiting.wait(timedelta(seconds=0.05))
    stuck = ends[0].post((0, 1), block(1 << 24, 0), 0)
    with pytest.raises(RuntimeError, match="not taken in"):
        stuck.wait(timedelta(seconds=0.05))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_comes_as_a_wait_begins_is_seen(ends: list[LocalLinks]) -> None:
    """The system does not end the wait then: Python has noted the signal, and waits."""
    work = ends[0].post((1, 0), block(8, 0), 1)
    noting = threading.Timer(0.1, _thread.interrupt_main)
    noting.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work.wait(timedelta(seconds=20))
    assert time.monotonic() - began < 10
    noting.join()


def test_another_message_than_the_one_awaited_is_an_error(ends: list[LocalLinks]) -> None:
    ends[0].post((0, 1), block(8, 0), 3)
    with pytest.raises(RuntimeError, match=r"\(3, 8\) came where 4 was awaited"):
        ends[1].post((0, 1), block(8, 0), 4).wait(SOON)


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_who_waits_is_told_when_the_other_end_goes(ends: list[LocalLinks], how: str) -> None:
    waiting = ends[1].post((0, 1), block(8, 0), 0)
    stuck = ends[1].post((1, 0), block(1 << 24, 0), 0)
    told: list[str] = []

    def wait(work: Any) -> None:
        with pytest.raises(RuntimeError) as caught:
            work.wait(FOREVER)
        told.append(str(caught.value))

    threads = [threading.Thread(target=wait, args=(w,), daemon=True) for w in (waiting, stuck)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    if how == "close":
        ends[0].close()
    else:
        ends[1].interrupt()  # by another thread of its own
    for thread in threads:
        thread.join(timeout=60)
    assert len(told) == 2
    with pytest.raises(RuntimeError):
        ends[1].post((1, 0), block(8, 0), 1).wait(SOON)


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"links1\.1 does not come: No such file"):
        LocalLinks(0, [(0, 1)], tmp_path, "links1", 0.05)
    with pytest.raises(RuntimeError, match="other end does not come: timed out"):
        LocalLinks(0, [(1, 0)], tmp_path, "links2", 0.05)


@pytest.mark.parametrize("kind", ["local", "gloo"])
def test_members_meet_as_they_are_told(tmp_path: Path, kind: str) -> None:
    host = meeting(kind, tmp_path, "127.0.0.1")
    assert isinstance(host, LocalMeeting if kind == "local" else GlooMeeting)
    rank = joined(host.told, tmp_path, "127.0.0.1")
    ends = both(lambda me: (host, rank)[me].links(me, PAIRS, "links1"))
    got = block(64, 0)
    receiving = ends[1].post((0, 1), got, 0)
    ends[0].post((0, 1), block(64, 7), 0).wait(SOON)
    receiving.wait(SOON)
    assert torch.equal(got, block(64, 7))
    for links in ends:
        links.close()
    assert not list(tmp_path.iterdir())


def test_links_suit_the_address_unless_they_are_chosen(tmp_path: Path) -> None:
    assert isinstance(meeting(None, tmp_path, "127.0.0.1"), LocalMeeting)
    with pytest.raises(DfcError, match="there are no links `pigeon`: local, gloo"):
        meeting("pigeon", tmp_path, "127.0.0.1")


def test_a_large_message_is_read_where_it_lies(ends: list[LocalLinks]) -> None:
    """The block is used again once nothing shares its memory, and not before."""
    n = 2 * LARGE

    def through(value: int) -> torch.Tensor:
        sent = ends[0].post((0, 1), block(n, value), value)
        work = ends[1].receive((0, 1), n, value)
        work.wait(SOON)
        sent.wait(SOON)
        assert work.block is not None
        return work.block

    first = through(1)
    part = first[8:12].view(torch.int32)  # shares the memory, and outlives the block
    where = first.data_ptr()
    assert where % 64 == 0
    del first
    second = through(2)
    assert second.data_ptr() != where
    assert part.tolist() == [0x01010101] and torch.equal(second, block(n, 2))
    del part
    assert through(3).data_ptr() == where
    assert torch.equal(second, block(n, 2))


def test_a_large_tensor_is_received_in_its_own_shape(ends: list[LocalLinks]) -> None:
    sent = torch.randn(LARGE // 128, 64)
    found = torch.empty_like(sent)
    work = ends[1].post((0, 1), found, 0)
    ends[0].post((0, 1), sent, 0)
    work.wait(SOON)
    assert torch.equal(found, sent)


def test_where_every_block_is_in_use_the_socket_takes_the_rest(
    ends: list[LocalLinks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_blocks, "_MOST", 2)
    n, held = 2 * LARGE, []
    for i in range(5):
        sent = ends[0].post((0, 1), block(n, i), i)
        work = ends[1].receive((0, 1), n, i)
        work.wait(SOON)
        sent.wait(SOON)
        held.append(work.block)
    for i, found in enumerate(held):
        assert found is not None and torch.equal(found, block(n, i))


def test_a_received_block_outlives_its_links(ends: list[LocalLinks]) -> None:
    ends[0].post((0, 1), block(2 * LARGE, 7), 0)
    work = ends[1].receive((0, 1), 2 * LARGE, 0)
    work.wait(SOON)
    for links in ends:
        links.close()
    assert work.block is not None and torch.equal(work.block, block(2 * LARGE, 7))


def test_who_sends_is_told_when_a_large_message_is_taken(ends: list[LocalLinks]) -> None:
    works = [ends[0].post((0, 1), block(2 * LARGE, i), i) for i in range(3)]
    with pytest.raises(RuntimeError, match="not taken in"):
        works[0].wait(timedelta(seconds=0.05))
    for i in range(2):
        ends[1].receive((0, 1), 2 * LARGE, i).wait(SOON)
    works[1].wait(SOON)
    with pytest.raises(RuntimeError, match="not taken in"):
        works[2].wait(timedelta(seconds=0.05))
    ends[1].close()
    with pytest.raises(RuntimeError, match=r"the other end is gone|reset by peer"):
        works[2].wait(SOON)
