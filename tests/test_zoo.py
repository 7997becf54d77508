"""Every model of the zoo: captured, proved, run on all its calls, exported; never wrong."""

from __future__ import annotations

import pytest

from tests.zoo import cases
from tests.zoo.coverage import examine, recorded

CASES = cases()
# Those that took 10 to 53 s each of the fast suite's 20 minutes, and whose kin stay in it: other
# mixtures of experts, T5, Mamba, window attention, caches and convolutions.
_LONG = {
    "switch_transformers",
    "qwen3_next",
    "encodec",
    "longformer",
    "deformable_detr",
    "deberta",
    "umt5",
    "mamba2_dynamic",
    "mobilevit",
    "mixtral_loop",
    "t5_gated",
    "gpt_oss",
    "funnel",
    "deepseek_v3",
    "llama_static_cache",
    "convbert",
    "recurrent_gemma",
    "rwkv",
    "mobilenet_v2_hf",
    "swinv2",
    "wavlm",
    "levit",
    "pegasus_with_loss",
    "wav2vec2_masked",
    "wav2vec2_bert",
    "audio_spectrogram_transformer",
    "sew",
    "hubert",
    "unet_dynamic_image",
    "inner_optimiser",
    "gemma3n",
    "falcon_h1",
}


def _table() -> dict[str, tuple[bool, bool]]:
    """What docs/coverage.md says of each model: whether it runs, whether it exports."""
    return {r.name: (not r.capture, not r.onnx) for r in recorded()}


def _check(case):
    row = examine(case)
    runs, exports = _table().get(case.name, (True, True))
    assert not (runs and row.capture), row.capture
    assert not (exports and row.onnx), row.onnx


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in _LONG], ids=str)
def test_model_is_right_or_refused_as_documented(case):
    _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name in _LONG], ids=str)
def test_a_model_that_takes_long_is_right_or_refused_as_documented(case):
    _check(case)


def test_the_table_lists_every_model():
    assert {c.name for c in CASES} >= _LONG
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
