"""The control channel between the host and its ranks: small JSON messages, never code.

Tensors travel elsewhere. A rank connects to the host's address, both prove that they know the key,
and from then on the rank says what it does several times a second; when either end is gone, the
other one is told at once.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

BEAT = 0.25  # seconds between two signs of life
_MEETING = 10.0  # seconds to prove who one is
_NONCE = 32  # bytes
_MOST = 1 << 28  # bytes of a message: more is not a message

Message = dict[str, Any]


class Stranger(Exception):
    """The other end does not know the key."""


class Channel:
    """One end of a connection; any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """This end's address: where the other end's machine reaches this one."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Message) -> bool:
        """Whether the other end is still there."""
        data = json.dumps(message).encode()
        with self._lock:
            try:
                self._socket.sendall(struct.pack("<I", len(data)) + data)
            except OSError:
                return False
        return True

    def receive(self) -> Message | None:
        """The next message, None when the other end is gone."""
        try:
            size = struct.unpack("<I", _exactly(self._socket, 4))[0]
            if size > _MOST:
                return None
            found: Message = json.loads(_exactly(self._socket, size))
        except (EOFError, OSError, ValueError):
            return None
        return found

    def has_message(self, seconds: float) -> bool:
        """Whether there is something to receive, the other's end included."""
        try:
            return bool(select.select([self._socket], [], [], seconds)[0])
        except (OSError, ValueError):  # it was closed on this side
            return True

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        except OSError:
            return  # the other end was first
        finally:
            self._socket.close()


class Door:
    """Where ranks come in. Each is handed to `welcome` with its first message, on its own thread.

    The address is of this machine alone, unless another is asked for.
    """

    def __init__(self, welcome: Callable[[Channel, Message], None], host: str) -> None:
        self.key = secrets.token_bytes(32)
        self._welcome = welcome
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        threading.Thread(target=self._serve, name="dfc-door", daemon=True).start()

    def close(self) -> None:
        """Nobody comes in any more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        except OSError:
            return
        finally:
            self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # the door is closed
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        """Who does not know the key is sent away."""
        try:
            _prove(connection, self.key, b"host", b"rank")
        except (Stranger, EOFError, OSError):
            connection.close()
            return
        channel = Channel(connection)
        hello = channel.receive()
        if hello is None:
            channel.close()
        else:
            self._welcome(channel, hello)


def knock(address: tuple[str, int], key: bytes) -> Channel:
    """A rank's end of the channel.

    Raises:  OSError, EOFError or Stranger when nobody is there who knows the key.
    """
    connection = socket.create_connection(address, timeout=_MEETING)
    with ExitStack() as failing:
        failing.callback(connection.close)
        _prove(connection, key, b"rank", b"host")
        failing.pop_all()
    return Channel(connection)


def _prove(connection: socket.socket, key: bytes, mine: bytes, other: bytes) -> None:
    """Each end signs what the other one made up, and its own part: an answer cannot be returned.

    Raises:  Stranger; OSError, EOFError when the other end leaves or is too slow.
    """
    connection.settimeout(_MEETING)
    asked = secrets.token_bytes(_NONCE)
    connection.sendall(asked)
    connection.sendall(hmac.digest(key, mine + _exactly(connection, _NONCE), "sha256"))
    if not hmac.compare_digest(
        _exactly(connection, 32), hmac.digest(key, other + asked, "sha256")
    ):  # fmt: skip
        raise Stranger("the other end does not know the key")
    connection.settimeout(None)


def _exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:  EOFError when the other end is gone before.
    """
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
