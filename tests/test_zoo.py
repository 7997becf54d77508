"""Every model of the zoo: captured, proved, run on all its calls, exported; never wrong."""

from __future__ import annotations

import pytest

from tests.zoo import cases
from tests.zoo.coverage import examine, recorded

CASES = cases()


def _table() -> dict[str, tuple[bool, bool]]:
    """What docs/coverage.md says of each model: whether it runs, whether it exports."""
    return {r.name: (not r.capture, not r.onnx) for r in recorded()}


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
    assert sum(exports for _, exports in table.values()) >= 0.95 * len(table)


def test_the_zoo_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, tests.zoo; tests.zoo.cases(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
