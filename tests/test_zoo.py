"""Every model of the zoo: captured, proved, run on all its calls, exported; never wrong."""

from __future__ import annotations

import re

import pytest

from tests.zoo import cases
from tests.zoo.coverage import DOCUMENT, examine

CASES = cases()


def _table() -> dict[str, tuple[bool, bool]]:
    """What docs/coverage.md says of each model: whether it runs, whether it exports."""
    found = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 6 and cells[0] not in ("model", "---"):
            found[cells[0]] = (cells[3] == "yes", cells[4] == "yes")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_model_is_right_or_refused_as_documented(case):
    row = examine(case)
    runs, exports = _table().get(case.name, (True, True))
    assert not (runs and row.capture), row.capture
    assert not (exports and row.onnx), row.onnx


def test_the_table_lists_every_model():
    assert set(_table()) == {c.name for c in CASES}


def test_coverage_meets_its_goals():
    table = _table()
    assert sum(runs for runs, _ in table.values()) >= 0.97 * len(table)
    assert sum(exports for _, exports in table.values()) >= 0.90 * len(table)


def test_the_zoo_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, tests.zoo; tests.zoo.cases(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
