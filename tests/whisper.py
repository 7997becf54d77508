"""Whisper tiny.en, a speech recogniser that was really trained, and spoken prompts to judge it on.

The encoder gives the keys and values that the decoder's layers look up, so that they are made once
for a clip; the decoder runs the whole text so far, and gives the scores of the next token. Its
table of tokens is the table of outputs too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import assets

WIDTH, HEADS, LAYERS, WORDS = 384, 6, 4, 51864
SECONDS, RATE, HOP, WINDOW = 30, 16000, 160, 400
PROMPT, END = (50257, 50362), 50256  # start of transcript, no timestamps; end of text
_SYMBOLS = set('"#()*+/:;<=>@[\\]^_`{|}~')
LONGEST = 120  # tokens


def _heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


class Attention(nn.Module):
    """Queries of x; keys and values of x, or those of the encoder that were made before."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None, causal: bool = False):  # type: ignore[no-untyped-def]
        k, v = kv if kv is not None else (self.key(x), self.value(x))
        y = F.scaled_dot_product_attention(
            _heads(self.query(x)), _heads(k), _heads(v), is_causal=causal
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attn, self.attn_ln = Attention(), nn.LayerNorm(WIDTH)
        if cross:
            self.cross_attn, self.cross_attn_ln = Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.mlp_ln = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), causal=kv is not None)
        if kv is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), kv)
        return x + self.mlp(self.mlp_ln(x))


class Encoder(nn.Module):
    """Mel spectrogram [B, 80, 3000] to keys and values [B, 1500, 384] for each decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.empty(1500, WIDTH))
        self.blocks = nn.ModuleList(Block(cross=False) for _ in range(LAYERS))
        self.ln_post = nn.LayerNorm(WIDTH)
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, mel: Tensor) -> tuple[Tensor, ...]:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x)
        return tuple(f(x) for pair in zip(self.keys, self.values, strict=True) for f in pair)


class Decoder(nn.Module):
    """Tokens so far, and the encoder's keys and values: scores of the next token [B, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(448, WIDTH))
        self.blocks = nn.ModuleList(Block(cross=True) for _ in range(LAYERS))
        for block in self.blocks:
            del block.cross_attn.key, block.cross_attn.value  # the encoder has them
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, (kv[2 * i], kv[2 * i + 1]))
        return F.linear(self.ln(x[:, -1]), self.token_embedding.weight)


def models() -> tuple[Encoder, Decoder]:
    """Both halves with the trained weights."""
    from safetensors.torch import load_file

    state = load_file(assets.path("whisper") / "model.safetensors")
    encoder, decoder = Encoder(), Decoder()
    mine = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    theirs = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    for i in range(LAYERS):
        for name, list_ in (("key", "keys"), ("value", "values")):
            for part in ("weight", "bias"):
                moved = theirs.pop(f"blocks.{i}.cross_attn.{name}.{part}", None)
                if moved is not None:
                    mine[f"{list_}.{i}.{part}"] = moved
    encoder.load_state_dict(mine)
    theirs.pop("mask", None)
    decoder.load_state_dict(theirs)
    return encoder.eval(), decoder.eval()


@cache
def clips(count: int) -> tuple[list[Tensor], list[str]]:
    """Spoken prompts at 16 kHz, and what is said."""
    from safetensors.torch import load_file
    from scipy.signal import resample_poly

    folder = assets.path("prompts")
    texts = json.loads((folder / "texts.json").read_text())
    sounds = load_file(folder / "clips.safetensors")
    chosen = list(texts)[:count]
    made = [
        torch.from_numpy(resample_poly(sounds[k].double().numpy() / 32768, 2, 1)).float()
        for k in chosen
    ]
    return made, [texts[k] for k in chosen]


@cache
def _filters() -> Tensor:
    from safetensors.torch import load_file

    return load_file(assets.path("whisper") / "mel.safetensors")["mel"]


def mel(sound: Tensor) -> Tensor:
    """The log-mel spectrogram [80, 3000] of a clip, padded with silence to 30 s."""
    padded = F.pad(sound, (0, SECONDS * RATE - len(sound)))
    spectrum = torch.stft(
        padded, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True
    )
    power = _filters() @ spectrum[:, :-1].abs().square()
    log = power.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8) + 4) / 4


@cache
def _tokens() -> list[bytes]:
    texts = json.loads((assets.path("whisper") / "tokens.json").read_text())
    return [t.encode("latin-1") for t in texts]


@cache
def _suppressed() -> Tensor:
    """Specials but the end, and what is no speech: symbols alone."""
    found = [
        i
        for i, text in enumerate(_tokens())
        if (s := text.decode("utf-8", "ignore").strip()) and set(s) <= _SYMBOLS
    ]
    return torch.tensor([*found, *range(END + 1, WORDS)])


Run = Callable[..., object]


def transcribe(encode: Run, decode: Run, sounds: Sequence[Tensor], batch: int = 8) -> list[str]:
    """Greedy decoding of clips."""
    texts: list[str] = []
    for at in range(0, len(sounds), batch):
        some = sounds[at : at + batch]
        with torch.no_grad():
            kv = encode(torch.stack([mel(s) for s in some]))
            texts += _decoded(decode, kv, len(some))
    return texts


def _decoded(decode: Run, kv: object, count: int) -> list[str]:
    tokens = torch.tensor([PROMPT] * count)
    for step in range(LONGEST):
        scores = decode(tokens, kv).float()  # type: ignore[attr-defined]
        scores[:, _suppressed()] = -torch.inf
        if step == 0:
            scores[:, [220, END]] = -torch.inf  # neither a blank nor nothing
        following = scores.argmax(-1)
        ended = (tokens[:, len(PROMPT) :] == END).any(1)
        tokens = torch.cat([tokens, torch.where(ended, END, following)[:, None]], 1)
        if bool((tokens[:, -1] == END).all()):
            break
    return [_text(row) for row in tokens[:, len(PROMPT) :].tolist()]


def _text(tokens: Sequence[int]) -> str:
    said = tokens[: tokens.index(END)] if END in tokens else tokens
    return b"".join(_tokens()[t] for t in said).decode("utf-8", "replace")


# Word errors


_NUMBERS = dict(
    zip(
        map(str, range(11)),
        "zero one two three four five six seven eight nine ten".split(),  # noqa: SIM905
        strict=True,
    )
)


def words(text: str) -> list[str]:
    """A text as words that can be compared: small, without punctuation, short numbers spelt out."""
    plain = re.sub(r"[^a-z0-9' ]+", " ", text.lower()).replace("'", "")
    return [_NUMBERS.get(w, w) for w in plain.split()]


def word_errors(said: Sequence[str], texts: Sequence[str]) -> Tensor:
    """Rows of (insertions, deletions and changes; words), one for each clip."""
    rows = [
        (_distance(words(a), words(b)), len(words(b))) for a, b in zip(said, texts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]
