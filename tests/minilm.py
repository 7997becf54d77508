"""MiniLM as a sentence encoder, and the labelled texts that its embeddings are judged on.

A logistic regression is fitted on the float32 embeddings alone; a variant keeps a decision when the
same regression says the same of its embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tests import assets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Encoder(nn.Module):
    """Token ids and mask [B, S] to embeddings [B, 384] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        folder = assets.path("minilm")
        self.bert = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        keep = attention_mask.unsqueeze(-1).float()
        mean = (states * keep).sum(1) / keep.sum(1)
        return nn.functional.normalize(mean, dim=1)


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any], dict[str, Any]]:
    """What `dfc compile tests/minilm.py:build` takes."""
    ids, mask = example(4, 32)
    dim = {0: torch.export.Dim("B", min=1, max=1024), 1: torch.export.Dim("S", min=2, max=256)}
    return Encoder().eval(), (ids, mask), {}, {"input_ids": dim, "attention_mask": dim}


def example(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids that occur in text, and a mask that leaves out the ends of some rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1996, 12000, (batch, tokens), generator=generator)
    ids[:, 0], mask = 101, torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, tokens - row % max(tokens // 4, 1) :] = row % max(tokens // 4, 1) == 0
    return ids, mask


@dataclass(frozen=True)
class Task:
    """Texts to fit the regression on, and to judge on."""

    name: str
    train: tuple[list[str], np.ndarray[Any, Any]]
    test: tuple[list[str], np.ndarray[Any, Any]]
    tokens: int


def movies(train: int = 2500, test: int = 3000) -> Task:
    return _task("movies", train, test, 64, None)


def bbc(train: int = 600, test: int = 1000) -> Task:
    return _task("bbc", train, test, 128, 1500)


def _task(name: str, train: int, test: int, tokens: int, letters: int | None) -> Task:
    held = json.loads((assets.path(name) / "texts.json").read_text(encoding="utf-8"))
    order = np.random.RandomState(0).permutation(len(held["texts"]))
    classes = sorted(set(held["labels"]))
    texts = [held["texts"][i][:letters] for i in order]
    labels = np.array([classes.index(held["labels"][i]) for i in order])
    cut = slice(train, train + test)
    return Task(name, (texts[:train], labels[:train]), (texts[cut], labels[cut]), tokens)


def batches(
    texts: Sequence[str], tokens: int, batch: int = 32
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Places, ids and mask; texts of like length lie together."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets.path("minilm") / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        longest = max(len(ids[i]) for i in places)
        padded = torch.zeros(len(places), longest, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(places):
            padded[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        yield places, padded, mask


def embed_all(embed: Embed, texts: Sequence[str], tokens: int) -> np.ndarray[Any, Any]:
    found = np.zeros((len(texts), 384), np.float32)
    for places, ids, mask in batches(texts, tokens):
        found[places] = embed(ids, mask).numpy()
    return found


def regression(x: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], c: float = 10.0) -> Any:
    """Multinomial logistic regression with an L2 penalty, as scikit-learn's of the same C.

    Gives a function from embeddings to classes.
    """
    from scipy.optimize import minimize

    n, k = x.shape[1], int(labels.max()) + 1
    inputs = torch.from_numpy(x).double()
    wanted = torch.from_numpy(labels)

    def loss(flat: Any) -> tuple[float, Any]:
        w = torch.from_numpy(flat).requires_grad_()
        weight, bias = w[: n * k].reshape(k, n), w[n * k :]
        logits = inputs @ weight.T + bias
        total = nn.functional.cross_entropy(logits, wanted, reduction="sum") * c
        total = total + weight.square().sum() / 2
        (grad,) = torch.autograd.grad(total, w)
        return float(total.detach()), grad.numpy()

    found = minimize(loss, np.zeros(n * k + k), jac=True, method="L-BFGS-B").x
    weight, bias = found[: n * k].reshape(k, n), found[n * k :]
    return lambda e: (e @ weight.T + bias).argmax(1)
