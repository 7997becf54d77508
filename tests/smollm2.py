"""SmolLM2-135M-Instruct, a language model that was really trained, and text to judge it on.

Its blocks come as Q4_1: the weights already lie on an asymmetric four-bit grid of group 32.
Rounding them to that grid again changes nothing, so that format proves nothing about a quantizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tests import assets

if TYPE_CHECKING:
    import torch

    from dfc.ir.graph import Graph

WINDOW = 512  # tokens that are judged together; windows do not overlap
SKIP = 2000  # characters at an article's start that are not judged: headings and lists
# Of 101 articles; none of those to calibrate on is judged.
CALIBRATE = (
    "Music", "Law", "Chemistry", "Sport", "Economics", "Evolution", "Computer", "Europe",
    "Medicine", "War", "Language", "Water", "Architecture", "Statistics", "Family", "Food",
)  # fmt: skip
JUDGE = ("Psychology", "Africa", "Moon", "Logic", "Religion", "Biology", "Education", "Energy")


def model(layers: int | None = None) -> Any:
    """transformers' LlamaForCausalLM with the trained weights, or its first layers."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = assets.path("smollm2")
    options = json.loads((folder / "config.json").read_text())
    if layers:
        options["num_hidden_layers"] = layers
    built = LlamaForCausalLM(LlamaConfig(**options, use_cache=False))
    state = load_file(folder / "model.safetensors")
    left = built.load_state_dict(state, strict=False, assign=True)
    built.tie_weights()
    assert left.missing_keys == ["lm_head.weight"], left
    assert layers or not left.unexpected_keys, left
    return built.eval()


@cache
def tokenizer() -> Any:
    """The model's own tokenizer: words and merges of its file, digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = json.loads((assets.path("smollm2") / "tokenizer.json").read_text())
    words = {word: i for i, word in enumerate(found["words"])}
    merges = [tuple(m.split(" ")) for m in found["merges"]]
    made = Tokenizer(models.BPE(vocab=words, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


@cache
def _articles() -> dict[str, str]:
    file = assets.path("wiki100") / "articles.json"
    return json.loads(file.read_text(encoding="utf-8"))


def windows(articles: Sequence[str], each: int, skip: int = SKIP) -> torch.Tensor:
    """`each` windows of 512 tokens of each article, from character `skip` on: [windows, 512]."""
    import torch

    rows = []
    for article in articles:
        text = _articles()[article][skip:]
        ids = tokenizer().encode(text[: each * WINDOW * 8]).ids[: each * WINDOW]
        assert len(ids) == each * WINDOW, f"{article} has only {len(ids)} tokens"
        rows += [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return torch.tensor(rows)


def digest(tokens: torch.Tensor) -> str:
    """What names a slice of text in a report."""
    return hashlib.sha256(tokens.numpy().astype("<i4").tobytes()).hexdigest()[:16]


def losses(run: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of each window, in float64; `run` gives logits."""
    import torch
    import torch.nn.functional as F

    def one(row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = run(row[None])[0, :-1]
        return F.cross_entropy(logits.float(), row[1:]).double()

    return torch.stack([one(row) for row in tokens])


def in_floats(graph: Graph) -> int:
    """Let every layer that reads codes read the weights they stand for; how many there were.

    The weights are asked of the op itself: what it makes of the unit vectors.
    """
    import torch

    changed = 0
    for node in list(graph.nodes):
        if node.op not in ("dfc.linear_w4", "dfc.linear_w8"):
            continue
        x, *tables, bias = node.inputs
        parts = [None if t is None else t.data.tensor() for t in tables]
        attributes = {**node.attributes, "activations": "float"}
        (columns,) = node.info.run([torch.eye(x.type.shape[-1]), *parts, None], attributes, "cpu")
        weight = graph.add_constant(f"{node.result.name}.weight", columns.T.contiguous())
        made = graph.add("aten.linear.default", [x, weight, bias], before=node, loc=node.loc)
        graph.replace(node, made)
        changed += 1
    return changed
