"""Decoders with a cache: what is passed and returned, here and where a package is loaded anew."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import dfc
from dfc.cli.inputs import input_names
from dfc.emit.onnx_values import output_names
from dfc.ir.caches import cache_context
from tests.zoo.huggingface import TINY, ids, model_of

GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
PAST = Dim("past", max=30)


def llama() -> Any:
    torch.manual_seed(0)
    return model_of("LlamaForCausalLM", "LlamaConfig", **GROUPED)


def windowed() -> Any:
    torch.manual_seed(0)
    return model_of("MistralForCausalLM", "MistralConfig", sliding_window=4, **GROUPED)


def filled(model: Any, tokens: int, cache: DynamicCache | None = None) -> DynamicCache:
    with torch.no_grad():
        return model(ids(1, tokens), past_key_values=cache, use_cache=True).past_key_values  # type: ignore[no-any-return]


def step(cache: Any, past: int) -> dict[str, Any]:
    mask = torch.ones(1, past + 1, dtype=torch.int64)
    positions = torch.tensor([[past]])
    return {"input_ids": ids(1, 1), "attention_mask": mask, "position_ids": positions,
            "past_key_values": cache, "use_cache": True}  # fmt: skip


STEP_SIZES = {
    "input_ids": None, "attention_mask": {1: PAST + 1}, "position_ids": None,
    "past_key_values": [[{2: PAST}]] * 2, "use_cache": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def stepping() -> dfc.Compiled:
    model = llama()
    return dfc.compile(
        model, (), step(filled(model, 6), 6), STEP_SIZES, engine="eager", passes=["cse"]
    )


def test_tensors_of_a_cache_have_the_names_that_runtimes_of_decoders_look_for(
    stepping: dfc.Compiled,
) -> None:
    assert input_names(stepping.graph)[3:] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert output_names(stepping.graph) == ["logits", "present.0.key", "present.0.value"]


def test_a_cache_may_be_a_dict_of_its_tensors(stepping: dfc.Compiled) -> None:
    cache = filled(llama(), 9)
    given = {"key_cache": [cache.layers[0].keys], "value_cache": [cache.layers[0].values]}
    call = step(cache, 9)
    expected = stepping(**call).logits
    assert torch.equal(stepping(**call | {"past_key_values": given}).logits, expected)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (((torch.ones(1), torch.ones(1)),), "got a tuple of 1"),
        ({"key_cache": []}, "got a dict of key_cache"),
        (DynamicCache(), r"\['key_cache'\]` must be a list of 1, got a list of 0"),
    ],
)
def test_another_structure_says_what_is_wanted(
    stepping: dfc.Compiled, given: Any, shown: str
) -> None:
    with pytest.raises(dfc.DfcError, match=shown) as error:
        stepping(**step(given, 9))
    assert "DynamicCache" in str(error.value) or "list of 1" in str(error.value)


ELSEWHERE = """
import sys, torch
import dfc
here = dfc.load(sys.argv[1], engine="eager")
past = {"key_cache": [torch.ones(1, 2, 5, 8)], "value_cache": [torch.ones(1, 2, 5, 8)]}
def call(past):
    out = here(input_ids=torch.tensor([[7]]), attention_mask=torch.ones(1, 6, dtype=torch.int64),
               position_ids=torch.tensor([[5]]), past_key_values=past, use_cache=True)
    return type(out.past_key_values).__name__, out.logits, out
kind, logits, plain = call(past)
assert "transformers" not in sys.modules and kind == "Record", kind
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
cache = DynamicCache([(past["key_cache"][0], past["value_cache"][0])])
kind, again, out = call(cache)
assert kind == "DynamicCache" and torch.equal(logits, again) and torch.equal(out[0], logits)
assert out.past_key_values.get_seq_length() == 6
assert torch.equal(out.past_key_values.layers[0].keys, plain.past_key_values.key_cache[0])
"""


def test_a_package_takes_and_gives_caches_in_a_process_that_did_not_trace_it(
    stepping: dfc.Compiled, tmp_path: Path
) -> None:
    stepping.save(tmp_path / "step.dfcpkg")
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path / "step.dfcpkg")], check=True)


def test_an_example_may_carry_the_history_of_the_model_that_made_it() -> None:
    model = llama()
    cache = model(ids(1, 6), use_cache=True).past_key_values
    assert cache.layers[0].keys.grad_fn is not None
    compiled = dfc.compile(model, (), step(cache, 6), engine="eager", passes=["cse"])
    assert compiled.report.proved


def test_a_cache_that_has_forgotten_tokens_is_refused_where_its_count_would_be_lost() -> None:
    """The graph would see 3 tokens, and place the new one fourth."""
    model = windowed()
    with pytest.raises(dfc.DfcError, match="seen 9 tokens and holds the last 3") as error:
        dfc.trace(model, (), step(filled(model, 9), 9))
    assert error.value.status == 2
    whole = dfc.compile(
        model, (), step(filled(model, 3), 3), STEP_SIZES, engine="eager", passes=["cse"]
    )
    with pytest.raises(dfc.DfcError, match="DynamicCache"):
        whole(**step(filled(model, 9), 9))


def test_layers_that_hold_all_tokens_work_under_a_window() -> None:
    """With padding on the left, where a mask that starts at the wrong token shows."""
    model = windowed()
    compiled = dfc.compile(
        model, (), step(filled(model, 9, DynamicCache()), 9), STEP_SIZES, engine="eager",
        passes=["cse"],
    )  # fmt: skip
    call = step(filled(model, 12, DynamicCache()), 12)
    call["attention_mask"][:, :10] = 0
    with torch.no_grad():
        found = compiled(**call).logits
        torch.testing.assert_close(found, model(**call).logits)


def test_a_returned_cache_with_windows_is_told() -> None:
    call = {"input_ids": ids(1, 9), "use_cache": True}
    (note,) = (n for n in dfc.trace(windowed(), (), call).notes if "returned cache" in n)
    assert "the last 3 tokens" in note
    assert not any("returned cache" in n for n in dfc.trace(llama(), (), call).notes)


def test_windows_stand_in_the_text() -> None:
    graph = dfc.trace(windowed(), (), {"input_ids": ids(1, 9), "use_cache": True})
    assert dfc.parse(str(graph)) == graph
    assert json.loads(cache_context([None, 4])) == {
        "fields": ["key_cache", "value_cache"], "windows": [None, 4]
    }  # fmt: skip


def experts(**options: Any) -> Any:
    torch.manual_seed(0)
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    own |= {"layer_types": ["sliding_attention"], "rope_parameters": {"rope_type": "default"}}
    own["rope_parameters"]["rope_theta"] = 1e4  # type: ignore[index]
    return model_of("GptOssForCausalLM", "GptOssConfig", **GROUPED | own)


@pytest.mark.parametrize("make", [experts])
def test_a_program_that_is_traced_again_keeps_the_constants_of_its_cache(
    make: Callable[[], Any],
) -> None:
    model, call = make(), {"input_ids": ids(2, 8), "use_cache": True}
    compiled = dfc.compile(model, (), call, engine="eager", passes=["cse"])
    with torch.no_grad():
        expected = model(**call)
    found = compiled(**call)
    torch.testing.assert_close(found.logits, expected.logits)
    held = expected.past_key_values.layers[0].keys
    torch.testing.assert_close(found.past_key_values.layers[0].keys, held)


def test_a_cache_goes_into_a_program_that_is_traced_again(stepping: dfc.Compiled) -> None:
    """Its parts have the names that they have in one that is traced once."""
    model = experts()
    call = step(filled(model, 9, DynamicCache()), 9)
    compiled = dfc.compile(model, (), call, STEP_SIZES, engine="eager", passes=["cse"])
    names = [[i.name for i in g.inputs] for g in (compiled.graph, stepping.graph)]
    assert names[0] == names[1]
    call = step(filled(model, 12, DynamicCache()), 12)
    with torch.no_grad():
        found = compiled(**call).logits
        torch.testing.assert_close(found, model(**call).logits)


def test_a_cache_of_another_class_says_what_to_give() -> None:
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(dfc.DfcError, match="a StaticCache cannot be an argument") as error:
        dfc.trace(model, (), {"input_ids": ids(1, 1), "past_key_values": cache})
    assert error.value.status == 2


def test_a_cache_of_states_is_refused_in_words() -> None:
    config = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    model = model_of("MambaForCausalLM", "MambaConfig", **config)
    with pytest.raises(dfc.DfcError, match="no keys and values") as error:
        dfc.trace(model, (), {"input_ids": ids(1, 4), "use_cache": True})
    assert "use_cache=False" in str(error.value)


def test_an_encoder_decoder_cache_of_fixed_sizes_goes_in_and_out() -> None:
    config = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    torch.manual_seed(0)
    model = model_of("T5ForConditionalGeneration", "T5Config", num_heads=4, **config)
    encoded = BaseModelOutput(torch.randn(1, 6, 32))
    start = {"encoder_outputs": encoded, "decoder_input_ids": ids(1, 2), "use_cache": True}
    call = {**start, "decoder_input_ids": ids(1, 1)}
    with torch.no_grad():
        call["past_key_values"] = model(**start).past_key_values
        compiled = dfc.compile(model, (), call, engine="eager", passes=["cse"])
        found, expected = compiled(**call), model(**call)
    torch.testing.assert_close(found.logits, expected.logits)
    past = [
        f"past_key_values.0.{side}.{x}" for side in ("decoder", "encoder") for x in ("key", "value")
    ]
    assert input_names(compiled.graph)[2:] == past
    assert type(found.past_key_values) is EncoderDecoderCache
