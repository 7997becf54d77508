"""What a long pass made, remembered by content: the same graph, options and code are not run twice.

For passes that say `cached = True`, and only for runs of a second or more. An entry is a folder of
the user's own cache: graph text, the constants that are new, and a manifest; no pickle. Its key is
the digest of the graph's text (weights by sha256), of the pass with its options, of all Python that
may take part, and of the versions. Where anything is uncertain, the pass runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter
from dfc.manifest import check_manifest, write_manifest
from dfc.publish import publish_folder
from dfc.rewrite.code_digest import code_of_package, own_code, versions
from dfc.rewrite.pass_ import Context, Pass
from dfc.rewrite.proofs import cache_folder

KIND = "pass-result"
LEAST_S = 1.0  # shorter runs are not worth the hashing
MAX_BYTES = 1 << 30  # of the constants of one entry
MAX_ENTRIES = 32


def run_cached(p: Pass, graph: Graph, ctx: Context, run: Callable[[], int]) -> int:
    """Run a pass, or let the graph become what it was made before; how many changes it made."""
    folder = _folder() if p.cached and _is_closed(ctx) else None
    if folder is None:
        return run()
    key = _key(p, graph)
    if key is None:
        return run()
    entry, code = folder / key, own_code()
    found = _read(entry, graph)
    if found is not None:
        after, changes = found
        graph.become(after)
        return changes
    held = {x.name: x for x in graph.parameters.values()}
    products = dict(ctx.products)
    start = time.perf_counter()
    changes = run()
    long = time.perf_counter() - start >= LEAST_S
    whole = own_code() == code  # else it imported code of which the key knows nothing
    if changes and long and whole and ctx.products == products:
        _write(entry, graph, held, changes)
        _tidy(folder)
    return changes


def _folder() -> Path | None:
    return cache_folder("passes")


def _is_closed(ctx: Context) -> bool:
    """Whether a pass can see nothing but the graph and its options, and nobody asks for reasons."""
    return ctx.target is None and not ctx.data and ctx.decisions is None


# Keys


def _key(p: Pass, graph: Graph) -> str | None:
    """None where parameters have no numbers, or code that cannot be read takes part."""
    if any(x.data is None for x in graph.parameters.values()):
        return None
    kind = type(p)
    code = own_code(), code_of_package(kind.__module__)
    if None in code:
        return None
    words = (str(graph), repr(p), kind.__module__, kind.__qualname__, *code, *versions())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


# Entries


def _read(entry: Path, graph: Graph) -> tuple[Graph, int] | None:
    """What an entry holds, None when there is none or anything about it is not right."""
    if not entry.is_dir():
        return None
    try:
        if check_manifest(entry)["kind"] != KIND:
            return None
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        after = _parsed((entry / "graph.dfc").read_text(encoding="utf-8"))
        _attach(after, graph, entry / "constants.safetensors")
    except (DfcError, OSError, ValueError, KeyError):
        return None
    after.notes += graph.notes
    after.own_gradients = graph.own_gradients
    os.utime(entry)
    return after, int(facts["changes"])


def _parsed(text: str) -> Graph:
    from dfc.lang.graph_parser import parse_graph

    return parse_graph(text, "<cache>")


def _attach(after: Graph, before: Graph, file: Path) -> None:
    """Give parameters their numbers: those of the graph at hand, else of the entry.

    Raises:  KeyError, ValueError when there are none, or not those that the text names.
    """
    from safetensors import safe_open

    from dfc.ir.weights import TensorData

    with safe_open(file, framework="pt") as f:
        for name, p in after.parameters.items():
            digest = _sha(p)
            own = before.parameters.get(name)
            if own is not None and _sha(own) == digest:
                p.data = own.data
                continue
            p.data = TensorData(name, f.get_tensor(name))
            if p.data.sha256() != digest:
                raise ValueError(name)


def _sha(p: Parameter) -> str:
    if p.data is None:
        raise KeyError(p.name)
    return p.data.sha256()


def _write(entry: Path, graph: Graph, held: dict[str, Parameter], changes: int) -> None:
    """Write an entry, unless reading it would not give the same again."""
    import safetensors.torch

    fresh = {
        n: p.data.tensor()
        for n, p in graph.parameters.items()
        if p.data is not None and (n not in held or _sha(held[n]) != _sha(p))
    }
    text = str(graph)
    whole = all(x.is_contiguous() and not x.is_complex() for x in fresh.values())
    small = sum(x.nbytes for x in fresh.values()) <= MAX_BYTES
    if not whole or not small or any(p.data is None for p in graph.parameters.values()):
        return
    if str(_parsed(text)) != text:
        return
    try:
        with publish_folder(entry, force=True) as temp:
            (temp / "graph.dfc").write_text(text, encoding="utf-8")
            (temp / "facts.json").write_text(json.dumps({"changes": changes}), encoding="utf-8")
            copies = {n: x.detach().cpu().clone() for n, x in fresh.items()}
            safetensors.torch.save_file(copies, temp / "constants.safetensors")
            write_manifest(temp, KIND)
    except (DfcError, OSError):
        return  # a full disk is no reason to fail: the result is at hand


def _tidy(folder: Path) -> None:
    """Keep the entries that were used last."""
    try:
        entries = [p for p in folder.iterdir() if p.is_dir() and len(p.name) == 64]
        for old in sorted(entries, key=lambda p: p.stat().st_mtime)[:-MAX_ENTRIES]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return
