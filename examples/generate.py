"""A language model writes: its weights in four bits, its cache carried from token to token.

    make assets                                             # fetches the model, once
    python examples/generate.py "The history of the sea begins with" --tokens 60

SmolLM2-135M becomes two graphs: one reads a prompt, one takes a token and the cache so far. Both
are quantized by the same recipe; their packages go to build/generate and are loaded from there the
next time. The same text is then written by transformers in float32 and by dfc, in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache
from transformers.integrations.executorch import register_dynamic_cache_export_support

import dfc
from dfc.cli.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 2048  # tokens, those of the prompt among them
RECIPE = """
dfc 1
import "std/simplify.dfc"

recipe four_bits {
  apply simplify
  fuse
  quantize int4 with group=32
}
"""
Call = dict[str, Any]


def reading() -> tuple[Call, Call]:
    """An example call that reads a prompt, and which of its sizes vary."""
    return (
        {"input_ids": torch.arange(8)[None], "use_cache": True},
        {"input_ids": {1: Dim("prompt", min=2, max=LONGEST)}, "use_cache": None},
    )


def stepping(config: Any) -> tuple[Call, Call]:
    """One that takes a token and the cache of those before it."""
    cache, past = DynamicCache(config=config), Dim("past", min=1, max=LONGEST - 1)
    for layer in range(config.num_hidden_layers):
        held = torch.randn(2, 1, config.num_key_value_heads, 8, config.head_dim)
        cache.update(*held, layer)
    varies = [{2: past}] * config.num_hidden_layers  # of the keys, and of the values
    return (
        {"input_ids": torch.tensor([[1]]), "past_key_values": cache, "use_cache": True},
        {"input_ids": None, "past_key_values": [varies, varies], "use_cache": None},
    )


def made(package: Path, model: Any, call: Call, sizes: Call) -> dfc.Compiled:
    """Of the folder, or compiled into it."""
    if not package.exists():
        with Progress() as say:
            compiled = dfc.compile(
                model, (), call, sizes, recipe=RECIPE, engine="eager", progress=say
            )
        compiled.save(package)
    return dfc.load(package, engine="eager")


def written(
    read: Callable[..., Any], step: Callable[..., Any], prompt: Tensor, count: int
) -> tuple[list[int], float]:
    """The likeliest tokens after a prompt, and how many there were in a second."""
    out = read(input_ids=prompt, use_cache=True)
    tokens: list[int] = []
    began = time.perf_counter()
    for _ in range(count):
        tokens.append(int(out.logits[0, -1].argmax()))
        out = step(
            input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values,
            use_cache=True,
        )  # fmt: skip
    return tokens, count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The history of the sea begins with")
    parser.add_argument("--tokens", type=int, default=60, help="how many to write; 60")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "generate")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests import smollm2

    register_dynamic_cache_export_support()
    model, tokenizer = smollm2.model(), smollm2.tokenizer()
    prompt = torch.tensor([tokenizer.encode(given.prompt).ids])
    if not 2 <= prompt.shape[1] <= LONGEST - given.tokens:
        parser.error(f"the prompt has {prompt.shape[1]} tokens: 2 to {LONGEST - given.tokens} fit")
    given.out.mkdir(parents=True, exist_ok=True)
    read = made(given.out / "read.dfcpkg", model, *reading())
    step = made(given.out / "step.dfcpkg", model, *stepping(model.config))
    ways: dict[str, tuple[Any, Any]] = {
        "transformers, float32": (model, model), "dfc, int4": (read, step)
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, str] = {}
    with torch.no_grad():
        for _ in range(3):
            for name, way in ways.items():
                tokens, speed = written(*way, prompt, given.tokens)
                texts[name] = tokenizer.decode(tokens)
                speeds[name].append(speed)
    for name, text in texts.items():
        print(f"\n{name}, {median(speeds[name]):.1f} tokens a second:\n{given.prompt}{text}")
    first, second = (median(s) for s in speeds.values())
    print(f"\ndfc is {second / first:.2f} times as fast, in turns")


if __name__ == "__main__":
    main()
