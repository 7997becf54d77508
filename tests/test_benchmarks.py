"""Benchmarks run rarely, so that what they import from dfc and the tests is looked up here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


def _imported(script: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each `from dfc... import` and `from tests... import`, wherever it is."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("dfc", "tests")):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    for module, name in _imported(script):
        found = import_module(module)
        if not hasattr(found, name):
            import_module(f"{module}.{name}")
