"""docs/errors.md names every code that dfc raises, and every variable that it reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from dfc.errors import _STATUS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
INSIDE = {"DFC_RANK_KEY", "DFC_FAULT"}  # between dfc's own processes, and for its tests


def _constants() -> Iterator[str]:
    files = [f for folder in ("dfc", "passes", "runtime") for f in (ROOT / folder).rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_page_has_every_code_once_in_its_family() -> None:
    raised = {c for c in _constants() if re.fullmatch(r"[PQRDTXVKN]\d{3}", c)}
    listed = re.findall(r"^\| ([A-Z]\d{3}) \|", PAGE, re.MULTILINE)
    assert {*listed} == raised and len(listed) == len(raised)
    for family, status, text in re.findall(
        r"^## (\w): [^\n]*\((\d)\)\n(.*?)(?=^## )", PAGE, re.M | re.S
    ):
        codes = re.findall(r"^\| ([A-Z]\d{3}) \|", text, re.MULTILINE)
        assert codes == sorted(codes) and {c[0] for c in codes} == {family}
        assert _STATUS[family] == int(status)


def test_the_page_has_every_variable() -> None:
    read = {c for c in _constants() if re.fullmatch(r"DFC_[A-Z_]+", c)}
    assert read - INSIDE <= {*re.findall(r"`(DFC_[A-Z_]+)`", PAGE)}
