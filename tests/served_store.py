"""A store for ranks that a test starts itself, as torchrun's agent serves one.

Why:  a port that is found free, and bound later by rank 0, may be another's by then; this one is
      held by the test, and ranks only connect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served_store() -> Iterator[dict[str, str]]:
    """What ranks need in their environment, while the store is there."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    del store
