"""How many of a thing, in words: `1 node`, `3 nodes`, `2 batches`."""

from __future__ import annotations


def counted(count: int, thing: str, things: str = "") -> str:
    """A number with its noun; `things` are several where that is not a matter of the ending."""
    if count != 1:
        thing = things or thing + ("es" if thing.endswith(("ch", "s")) else "s")
    return f"{count} {thing}"
