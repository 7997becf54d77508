"""Proofs that are remembered: of shipped rules in a list beside them, of others in a cache.

The list, passes/rules/proved.json, is written by `dfc test --write` and checked by the tests. The
cache is a folder of the user's own that nobody else can write to; it holds JSON under a key of
what was proved: the rule, versions, dfc's code, and the user's where a rule names ops of it. It is
passed by, never trusted, where it belongs to somebody else or cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dfc.errors import Diagnostic
from dfc.lang import syntax as s
from dfc.rewrite.code_digest import is_of_users, own_code, this_process, versions
from dfc.rewrite.rule import Rule, walk

MAX_BYTES = 1 << 16  # of one remembered proof
SHIPPED = "proved.json"
# In this process, by the digest of the rule and its own ops.
_known: dict[tuple[object, ...], tuple[Diagnostic, ...]] = {}


def problems_of(
    rules: Iterable[Rule], say: Callable[[str], None] | None = None
) -> dict[str, tuple[Diagnostic, ...]]:
    """What is wrong with each rule, by its full name; nothing where it holds.

    `say` is told of each rule that has to be proved now.

    Cost:  nothing for what was proved before; else about half a second for each rule.
    """
    return {rule.full_name: _problems(rule, say) for rule in rules}


def _problems(rule: Rule, say: Callable[[str], None] | None) -> tuple[Diagnostic, ...]:
    key = (rule.digest, *_own_ops(rule))
    found = _known.get(key)
    if found is None:
        found = () if is_shipped_proof(rule) or _remembered(rule) else _proved_now(rule, say)
        _known[key] = found
    return found


def _proved_now(rule: Rule, say: Callable[[str], None] | None) -> tuple[Diagnostic, ...]:
    from dfc.rewrite.prove import prove

    if say is not None:
        say(f"proving the rule {rule.full_name}")
    proof = prove(rule)
    if proof.holds:
        with contextlib.suppress(OSError):
            _remember(rule, proof.tally.inputs)
    return proof.problems


# What dfc ships


def rules_folder() -> Path:
    import dfc.passes

    return Path(next(iter(dfc.passes.__path__))) / "rules"


def torch_version() -> str:
    """Of the release: builds for other devices give the same numbers on the CPU."""
    import torch

    return str(torch.__version__).partition("+")[0]


@cache
def _shipped_proofs() -> Mapping[str, Any]:
    try:
        found = json.loads((rules_folder() / SHIPPED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_shipped_proof(rule: Rule) -> bool:
    """Whether dfc comes with the proof of this very rule.

    Why:  under another torch it still counts: proving all anew takes a minute and runs kernels on
          empty tensors, which end the process in some releases. What a rewrite does to a model is
          compared on probes with the torch that runs it, and `dfc test` proves anew.
    """
    rules = _shipped_proofs().get("rules")
    return isinstance(rules, dict) and rules.get(rule.full_name) == rule.digest


def shipped_text(rules: Iterable[Rule]) -> str:
    """What stands in proved.json when these rules, and no others, are proved."""
    listed = {r.full_name: r.digest for r in sorted(rules, key=lambda r: r.full_name)}
    return json.dumps({"torch": torch_version(), "rules": listed}, indent=1) + "\n"


# The user's cache


def cache_folder(kind: str = "proofs") -> Path | None:
    """The folder of what is remembered, made if it is not there; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    folder = Path(base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("dfc", kind):
            folder = folder / name
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            if not _is_ours(folder):
                return None
    except OSError:
        return None
    return folder


def _is_ours(folder: Path) -> bool:
    """A folder, no link, of this user, which nobody else can look into or write to."""
    found = os.lstat(folder)
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return stat.S_ISDIR(found.st_mode) and mine and not stat.S_IMODE(found.st_mode) & 0o077


def _remembered(rule: Rule) -> bool:
    folder = cache_folder()
    if folder is None:
        return False
    try:
        handle = os.open(folder / f"{_key(rule)}.json", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as f:
            found = json.loads(f.read(MAX_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("key") == _key(rule)


def _remember(rule: Rule, inputs: int) -> None:
    folder = cache_folder()
    if folder is None:
        return
    text = json.dumps({"key": _key(rule), "rule": rule.full_name, "inputs": inputs})
    temp = folder / f".tmp-{secrets.token_hex(8)}"
    try:
        with open(temp, "x", encoding="utf-8") as f:
            f.write(text)
        os.replace(temp, folder / f"{_key(rule)}.json")
    finally:
        temp.unlink(missing_ok=True)


def _key(rule: Rule) -> str:
    own = (own_code() or this_process(),) if _own_ops(rule) else ()
    words = (rule.digest, *versions(), *own)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def _own_ops(rule: Rule) -> tuple[object, ...]:
    """The user's own ops that a rule names: what they compute is part of what is proved."""
    from dfc.ir.op import declared_ops

    patterns = [*(m.pattern for m in rule.matches), *(r.value for r in rule.rewrites)]
    names = {x.name.name for p in patterns for x in walk(p) if isinstance(x, s.Call)}
    if not is_of_users(names):
        return ()
    return tuple(op.cls for op in declared_ops() if op.name in names) or (*sorted(names),)
