"""The control channel between the host and its ranks: small JSON messages, never code.

Tensors travel elsewhere. A rank connects to the host's address, both prove that they know the key,
and from then on the rank says what it does several times a second; when either end is gone, the
other one is told at once.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

BEAT = 0.25  # seconds between two signs of life

Message = dict[str, Any]


class Channel:
    """One end of a connection; any thread may send."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message) -> bool:
        """Whether the other end is still there."""
        data = json.dumps(message).encode()
        with self._lock:
            try:
                self._connection.send_bytes(data)
            except OSError:
                return False
        return True

    def receive(self) -> Message | None:
        """The next message, None when the other end is gone."""
        try:
            found: Message = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return found

    def has_message(self, seconds: float) -> bool:
        """Whether there is something to receive, the other's end included."""
        try:
            return self._connection.poll(seconds)
        except (EOFError, OSError):
            return True

    def close(self) -> None:
        self._connection.close()


class Door:
    """Where ranks come in. Each is handed to `welcome` with its first message, on its own thread.

    The address is of this machine alone, unless another is asked for.
    """

    def __init__(
        self, welcome: Callable[[Channel, Message], None], host: str = "127.0.0.1"
    ) -> None:
        self.key = secrets.token_bytes(32)
        self._welcome = welcome
        self._listener = Listener((host, 0), backlog=128)
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="dfc-door", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.address
        return str(host), int(port)

    def close(self) -> None:
        """Nobody comes in any more."""
        self._open = False
        try:
            Client(self.address).close()  # wakes the thread that accepts
        except OSError:
            return  # it is closed already
        self._thread.join(timeout=5)
        self._listener.close()

    def _serve(self) -> None:
        while self._open:
            try:
                connection = self._listener.accept()
            except OSError:
                continue
            if not self._open:
                connection.close()
                return
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: Connection) -> None:
        """Who does not know the key is sent away."""
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
        except (AuthenticationError, EOFError, OSError):
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

    Raises:  OSError, AuthenticationError when nobody is there who knows the key.
    """
    connection = Client(address)
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    return Channel(connection)
