"""Reads GGUF files, the format of llama.cpp: metadata and tensors, in float32.

Source:  the GGUF specification, version 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fetching import Make

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _LIST = 8, 9


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its shape as PyTorch writes it, its encoding, its place."""

    shape: tuple[int, ...]
    encoding: int
    offset: int


class Gguf:
    """A file, mapped: `metadata` by key, `tensor(name)`."""

    def __init__(self, file: Path) -> None:
        self._bytes = np.memmap(file, mode="r")
        self._at = 0
        magic, version, tensors, pairs = self._read("4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"{file.name} is no GGUF file of version 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            self.metadata[key] = self._value(*self._read("I"))
        self.entries = dict(self._entry() for _ in range(tensors))
        alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def tensor(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        decode, block, size = _ENCODINGS[entry.encoding]
        start = self._data + entry.offset
        length = int(np.prod(entry.shape)) // block * size
        raw = np.array(self._bytes[start : start + length]).reshape(-1, size)
        return decode(raw).reshape(entry.shape)

    def _read(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _text(self) -> str:
        (size,) = self._read("Q")
        (raw,) = self._read(f"{size}s")
        return str(raw, "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            inner, count = self._read("IQ")
            return [self._value(inner) for _ in range(count)]
        return self._read(_SCALARS[kind])[0]

    def _entry(self) -> tuple[str, Entry]:
        name = self._text()
        (rank,) = self._read("I")
        sizes = self._read(f"{rank}Q")  # innermost first
        encoding, offset = self._read("IQ")
        return name, Entry(tuple(reversed(sizes)), encoding, offset)


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4")


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale, minimum, 16 bytes whose low nibbles are the first 16 weights."""
    scale, least = (raw[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return codes * scale + least


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale, 32 signed bytes."""
    scale = raw[:, :2].copy().view("<f2").astype(np.float32)
    return raw[:, 2:].view(np.int8) * scale


# encoding -> how to read it, weights in a block, bytes in a block
_ENCODINGS: Mapping[int, tuple[Callable[[np.ndarray], np.ndarray], int, int]] = {
    0: (_f32, 1, 4),
    3: (_q4_1, 32, 20),
    8: (_q8_0, 32, 34),
}


# A Llama as transformers names it

_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}


def llama_state(file: Gguf) -> dict[str, np.ndarray]:
    """The weights by the names of LlamaForCausalLM; a table that is tied stands once."""
    state = {}
    for name in file.entries:
        parts = name.removesuffix(".weight").split(".")
        key = f"layers.{parts[1]}.{_LAYER[parts[2]]}" if parts[0] == "blk" else _OUTSIDE[parts[0]]
        state[f"model.{key}.weight"] = np.ascontiguousarray(_rows_in_order(file, name))
    return state


def _rows_in_order(file: Gguf, name: str) -> np.ndarray:
    """A tensor; the rows of q and k, which GGUF has in pairs for its rotary, are put back."""
    w = file.tensor(name)
    for part, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if f".{part}." in name:
            heads = file.metadata[f"llama.attention.{key}"]
            pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, -1)
            return pairs.swapaxes(1, 2).reshape(w.shape)
    return w


def llama_config(file: Gguf) -> dict[str, Any]:
    """The options of transformers' LlamaConfig."""
    of = {k.removeprefix("llama."): v for k, v in file.metadata.items()}
    return {
        "vocab_size": len(of["tokenizer.ggml.tokens"]),
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        "rope_theta": of["rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in file.entries,
    }


def llama_as_safetensors(member: str) -> Make:
    """A GGUF file of a Llama as safetensors, configuration, and the tokenizer's words."""

    def make(unpacked: Path, target: Path) -> None:
        from safetensors.numpy import save_file

        file = Gguf(unpacked / member)
        save_file(llama_state(file), target / "model.safetensors")
        (target / "config.json").write_text(json.dumps(llama_config(file), indent=1))
        words = {k: file.metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "merges")}
        text = json.dumps({"words": words["tokens"], "merges": words["merges"]})
        (target / "tokenizer.json").write_text(text)

    return make
