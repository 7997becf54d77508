"""Directed links between processes of one host: Unix sockets in the pipeline's private folder.

A link is a stream. Both ends post in the order of the sender's program, so that what comes next is
what was asked for first; a frame repeats the message's tag and length, and anything else is an
error. Large messages lie in memory that both ends see (`shared_blocks`): the frame says in which
block, and the receiver answers a byte when it has read that. Nothing outlives a process that is
killed: the system closes its ends, and whoever waits at the other one is told at once.

Why:  gloo takes three packets and four changes of thread for a message: a hundred microseconds and
      more, where a stream takes ten (benchmarks/processes.py).
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dfc.runtime.pipeline.messages import Message, memory_of
from dfc.runtime.pipeline.shared_blocks import LARGE, Reader, Shelf
from dfc.runtime.pipeline.waiting import is_set, ready

if TYPE_CHECKING:
    import torch

    from dfc.runtime.pipeline.device_links import DeviceLinks

Pair = tuple[int, int]
_FRAME = struct.Struct("<QQq")  # tag, bytes, and the block that they are in or that they follow
_FOLLOW = -1
_TAKEN = b"!"  # what the receiver answers
# What the file of a block takes beside a frame; some systems have no such thing, nor these links.
_FILE = socket.CMSG_SPACE(4) if hasattr(socket, "CMSG_SPACE") else 0
_ROOM = 1 << 18  # bytes that the system is asked to keep of a link: small messages, and few others
_AGAIN = 0.002  # seconds until an end that is not there yet is looked for again


class LocalLinks:
    """The links of one member on this host.

    Needs:   every member makes those it has part in, of the same pairs under the same name.
    Raises:  RuntimeError when the other end does not come in time.
    """

    def __init__(
        self, me: int, pairs: Sequence[Pair], folder: Path, name: str, seconds: float
    ) -> None:
        self.me = me
        self.fast: dict[Pair, DeviceLinks] = {}
        until = time.monotonic() + seconds
        mine = folder / f"{name}.{me}"
        incoming = [a for a, b in pairs if b == me]
        self._in: dict[int, _Incoming] = {}
        self._out: dict[int, _Outgoing] = {}
        with ExitStack() as failing, socket.socket(socket.AF_UNIX) as listener:
            failing.callback(self.close)
            listener.bind(str(mine))
            listener.listen(max(1, len(incoming)))
            for a, b in pairs:
                if a == me:
                    self._out[b] = _Outgoing(_found(folder / f"{name}.{b}", me, until))
            for _ in incoming:
                who, end = _accepted(listener, until)
                self._in[who] = _Incoming(end)
            failing.pop_all()
        mine.unlink(missing_ok=True)

    def post(self, pair: Pair, block: torch.Tensor, tag: int) -> _Work:
        """Begin to send or to receive a block; what is returned is waited for.

        Raises:  RuntimeError when the other end is gone.
        """
        if pair[0] == self.me:
            return self._out[pair[1]].post(Message([memory_of(block)], block.nbytes, [block]), tag)
        return self._in[pair[0]].post(block.nbytes, tag, block)

    def receive(self, pair: Pair, nbytes: int, tag: int) -> _Coming:
        """Begin to receive a message; what is returned is waited for, and has it as its block."""
        return self._in[pair[0]].post(nbytes, tag)

    def send(self, pair: Pair, message: Message, tag: int) -> _Work:
        """Begin to send what `post` receives as a block.

        Raises:  RuntimeError when the other end is gone.
        """
        return self._out[pair[1]].post(message, tag)

    def interrupt(self) -> None:
        """Whoever waits in a link is told that it is over; from any thread."""
        for end in self._ends():
            with suppress(OSError):  # the other end was first
                end.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let the links go; whoever waits at their other ends is told by that.

        Needs:   no other thread waits in one of them.
        """
        self.interrupt()
        for end in self._ends():
            end.close()

    def _ends(self) -> list[_Incoming | _Outgoing]:
        return [*self._in.values(), *self._out.values()]


class _Work:
    """A message that has been sent."""

    def wait(self, timeout: timedelta) -> None:
        """
        Raises:  RuntimeError when the link is lost, or after that time.
        """


_SENT = _Work()


@dataclass
class _Going(_Work):
    """A message, or the rest of one, that another thread sends."""

    message: Message  # whose memory the parts are
    parts: list[memoryview]
    file: int | None = None  # of a new block, which goes with the first byte
    error: str = ""
    done: threading.Event | None = None  # only of one that the system did not take at once

    def put_away(self) -> None:
        """The other end has the file, or never will."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def wait(self, timeout: timedelta) -> None:
        assert self.done is not None
        if not is_set(self.done, time.monotonic() + timeout.total_seconds()):
            raise RuntimeError(f"not taken in {timeout.total_seconds():.3g} s")
        if self.error:
            raise RuntimeError(self.error)


@dataclass
class _Lying(_Work):
    """A message in a block, which has arrived when the receiver has taken so many."""

    outgoing: _Outgoing
    count: int

    def wait(self, timeout: timedelta) -> None:
        self.outgoing.wait_taken(self.count, timeout.total_seconds())


class _Outgoing:
    """The sending end. What the system does not take at once is sent by a thread."""

    def __init__(self, end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        self.socket = end
        self._queue: SimpleQueue[_Going | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: _Going | None = None
        self._shelf = Shelf()
        self._lying = self._taken = 0  # messages in blocks, and those that the receiver has
        self._answers = select.poll()
        self._answers.register(end, select.POLLIN)

    def post(self, message: Message, tag: int) -> _Work:
        if message.nbytes >= LARGE:
            placed = self._shelf.put(message.parts, message.nbytes)
            if placed is not None:
                number, file = placed
                frame = memoryview(_FRAME.pack(tag, message.nbytes, number))
                self._send(_Going(message, [frame], file))
                self._lying += 1
                return _Lying(self, self._lying)
        frame = memoryview(_FRAME.pack(tag, message.nbytes, _FOLLOW))
        return self._send(_Going(message, [frame, *message.parts]))

    def _send(self, work: _Going) -> _Work:
        last = self._last
        if last is None or last.done is None or last.done.is_set():
            if last is not None and last.error:
                raise RuntimeError(last.error)
            try:
                self._some(work, socket.MSG_DONTWAIT)
            except OSError as e:
                raise RuntimeError(_why(e)) from e
            if not work.parts:
                return _SENT
        work.done = threading.Event()
        self._last = work
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="dfc-link", daemon=True)
            self._thread.start()
        return work

    def _some(self, work: _Going, how: int = 0) -> None:
        """Send what the system takes; the file goes with the first byte of it."""
        files = array.array("i", [] if work.file is None else [work.file])
        with_it = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)] if files else ()
        try:
            count = self.socket.sendmsg(work.parts, with_it, how)
        except BlockingIOError:
            return
        except OSError:
            work.put_away()
            raise
        work.put_away()
        work.parts = _rest(work.parts, count)

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                while work.parts:
                    self._some(work)
            except OSError as e:
                work.error = _why(e)
            assert work.done is not None
            work.done.set()

    def wait_taken(self, count: int, seconds: float) -> None:
        """
        Raises:  RuntimeError when the receiver is gone, or has not taken so many in that time.
        """
        until = time.monotonic() + seconds
        while self._taken < count:
            if not ready(self._answers, until):
                raise RuntimeError(f"not taken in {seconds:.3g} s")
            try:
                answers = len(self.socket.recv(64))
            except OSError as e:
                raise RuntimeError(_why(e)) from e
            if not answers:
                raise RuntimeError("the other end is gone")
            self._taken += answers

    def close(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self.socket.close()


@dataclass
class _Coming(_Work):
    """A message that is to be read: into a block, else into one that it comes with or that is
    made for it."""

    incoming: _Incoming
    nbytes: int
    tag: int
    block: torch.Tensor | None = None
    done: bool = False

    def wait(self, timeout: timedelta) -> None:
        self.incoming.read_until(self, timeout.total_seconds())


class _Incoming:
    """The receiving end; messages are read when somebody waits for one."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._wanted: deque[_Coming] = deque()
        self._ready = select.poll()
        self._ready.register(end, select.POLLIN)
        self._reader = Reader()

    def post(self, nbytes: int, tag: int, block: torch.Tensor | None = None) -> _Coming:
        work = _Coming(self, nbytes, tag, block)
        self._wanted.append(work)
        return work

    def read_until(self, work: _Coming, seconds: float) -> None:
        """Read what was asked for, in that order, until this message is there."""
        until = time.monotonic() + seconds
        while not work.done:
            first = self._wanted[0]
            self._read(first, until)
            first.done = True
            self._wanted.popleft()

    def _read(self, work: _Coming, until: float) -> None:
        frame = bytearray(_FRAME.size)
        parts = [memoryview(frame)]
        small = work.nbytes < LARGE
        if small:  # in one go: no such message is in a block
            parts.append(memory_of(_block(work)))
        while parts:
            parts = _rest(parts, self._some(parts, until))
        tag, nbytes, number = _FRAME.unpack(frame)
        if (tag, nbytes) != (work.tag, work.nbytes):
            raise RuntimeError(f"message {tag, nbytes} came where {work.tag} was awaited")
        if number != _FOLLOW:
            self._take(work, self._reader.tensor(number, nbytes))
        elif not small:
            parts = [memory_of(_block(work))]
            while parts:
                parts = _rest(parts, self._some(parts, until))

    def _take(self, work: _Coming, block: torch.Tensor) -> None:
        """Have a message that lies in a block, and say so."""
        import torch

        if work.block is None:
            work.block = block
        else:
            work.block.reshape(-1).view(torch.uint8).copy_(block)
        try:
            self.socket.send(_TAKEN)
        except OSError as e:
            raise RuntimeError(_why(e)) from e

    def _some(self, parts: Sequence[memoryview], until: float) -> int:
        """Read what there is; wait where there is nothing."""
        while True:
            try:
                count, with_it, *_ = self.socket.recvmsg_into(parts, _FILE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not ready(self._ready, until):
                    raise RuntimeError("nothing came in time") from None
                continue
            except OSError as e:
                raise RuntimeError(_why(e)) from e
            for _, _, files in with_it:
                self._reader.add(*array.array("i", files))
            if not count:
                raise RuntimeError("the other end is gone")
            return count

    def close(self) -> None:
        self.socket.close()


def _block(work: _Coming) -> torch.Tensor:
    """Where a message that comes by the socket is to go."""
    import torch

    if work.block is None:
        work.block = torch.empty(work.nbytes, dtype=torch.uint8)
    return work.block


def _rest(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of parts when so many of their bytes are done."""
    for i, part in enumerate(parts):
        if done < part.nbytes:
            return [part[done:], *parts[i + 1 :]]
        done -= part.nbytes
    return []


def _found(path: Path, me: int, until: float) -> socket.socket:
    """A connection to who listens there, or will."""
    while True:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(str(path))
            end.sendall(struct.pack("<q", me))
        except OSError as e:
            end.close()
            if time.monotonic() > until:
                raise RuntimeError(f"{path.name} does not come: {_why(e)}") from e
            time.sleep(_AGAIN)
        else:
            return end


def _accepted(listener: socket.socket, until: float) -> tuple[int, socket.socket]:
    """Who connects next, and the connection."""
    come = select.poll()
    come.register(listener, select.POLLIN)
    if not ready(come, until):
        raise RuntimeError("a link's other end does not come: timed out")
    try:
        end, _ = listener.accept()
        end.settimeout(max(_AGAIN, until - time.monotonic()))
        (who,) = struct.unpack("<q", end.recv(8, socket.MSG_WAITALL))
    except (OSError, struct.error) as e:
        raise RuntimeError(f"a link's other end does not come: {_why(e)}") from e
    end.settimeout(None)
    return who, end


def _why(e: Any) -> str:
    return getattr(e, "strerror", None) or str(e) or type(e).__name__
