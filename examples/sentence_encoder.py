"""Compile a trained sentence encoder, and show that it is the same model, only faster.

    make demo                                                     # sets everything up first
    python examples/sentence_encoder.py [--model FOLDER] [--inductor]
    dfc compile examples/sentence_encoder.py:build -o encoder.dfcpkg     # the same by hand

The model is all-MiniLM-L6-v2 (22.7 M parameters). Batch and sequence stay dynamic; the package and
the ONNX file go to build/demo. It fails unless every engine agrees with PyTorch to a cosine of
0.99999. Licences: examples/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import dfc
from dfc.cli.progress import Progress
from dfc.runtime.measure import measure

ROOT = Path(__file__).resolve().parent.parent
COSINE = 0.99999  # the least that an engine may reach
TOKENS = 256  # the published limit of the model
SENTENCES = (
    "It will rain all afternoon.",
    "Take an umbrella, the forecast says showers until the evening.",
    "Simmer the onions in butter until they are golden.",
    "A good soup starts with slowly cooked vegetables.",
    "The compiler fuses both loops into one.",
    "This optimisation removes a temporary array, and with it most of the memory traffic.",
)


class SentenceEncoder(nn.Module):
    """BERT, the mean of its states where there is a token, scaled to length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        keep = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * keep).sum(1) / keep.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def build(folder: str | None = None) -> tuple[nn.Module, tuple[Tensor, ...], None, dict[str, Any]]:
    """What `dfc compile FILE:build` asks for: the model, an example, and which sizes may vary."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, by the import that follows
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    place = model_folder(folder)
    model = SentenceEncoder(AutoModel.from_pretrained(place)).eval()
    sizes = {0: Dim("B", min=1, max=1024), 1: Dim("S", min=1, max=TOKENS)}
    example = tokens(place, SENTENCES[:2])
    return model, example, None, {"input_ids": sizes, "attention_mask": sizes}


def model_folder(folder: str | None) -> Path:
    """The folder given, or the one that `make assets` fetched."""
    if folder:
        return Path(folder)
    sys.path.insert(0, str(ROOT))
    from tests.assets import path

    return path("minilm")


def tokens(folder: Path, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded to the longest sentence only.

    Why:  the tokenizer's file pads everything to 128 tokens, which would cost ten times as much.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()  # to the longest: no length given
    found = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found])


def stock_onnxruntime(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The exported file in plain ONNX Runtime, which knows nothing of dfc."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin between calls would take the cores from whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        fed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, fed)]

    return run


def called(model: Callable[..., Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A model as `measure` wants it."""

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [model(*inputs)]

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder with all-MiniLM-L6-v2 (default: the cache)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--inductor", action="store_true", help="torch.compile too: a minute more")
    args = parser.parse_args()
    folder = model_folder(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    package, onnx = args.out / "encoder.dfcpkg", args.out / "encoder.onnx"

    model, example, _, shapes = build(args.model)
    start = time.perf_counter()
    with Progress() as say:
        compiled = dfc.compile(model, example, dynamic_shapes=shapes, progress=say)
        compiled.save(package, force=True)
        say("exporting ONNX, and proving it in ONNX Runtime")
        compiled.export(onnx, force=True)
    print(compiled.report)
    print(f"compiled, proved, packed and exported in {time.perf_counter() - start:.1f} s\n")

    runners = {"PyTorch": called(model)}
    engines = dict.fromkeys(["eager", "onnxruntime", compiled.engine.name])
    engines |= {"inductor": None} if args.inductor else {}
    for name in engines:
        runners[f"dfc, {name}"] = called(dfc.load(package, engine=name))
    runners["ONNX Runtime, stock"] = stock_onnxruntime(onnx)

    batch = tokens(folder, SENTENCES)
    embedded = {name: run(batch)[0] for name, run in runners.items()}
    reference = embedded["PyTorch"]
    lowest = show_table(runners, embedded, tokens(folder, SENTENCES[:1]), batch)
    show_similarity(reference)
    print(f"\nwrote {shown(package)} and {shown(onnx)}")
    print(f"next: dfc verify {shown(package)}")
    print(f"      dfc bench {shown(package)} --size B=8,S=64")
    print(f"      dfc show {shown(package)} --summary")
    if lowest < COSINE:
        print(f"an engine is wrong: its cosine is {lowest:.7f}, below {COSINE}", file=sys.stderr)
        return 1
    return 0


def show_table(
    runners: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]],
    embedded: dict[str, Tensor],
    one: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> float:
    """Agreement and speed, runs alternating; the lowest cosine of all."""
    reference = embedded["PyTorch"]
    alone = measure(runners, one, seconds=1.0)
    together = measure(runners, batch, seconds=1.0)
    count, length = batch[0].shape
    several = f"{count} of up to {length} tokens"
    print(f"{'':<21} {'lowest cosine':>13}   {'1 sentence':^17}   {several:^21}")
    lowest = 1.0
    for name, x in embedded.items():
        cosine = float(nn.functional.cosine_similarity(x.double(), reference.double()).min())
        lowest = min(lowest, cosine)
        a, b = alone[name].p50_ms, together[name].p50_ms
        print(
            f"{name:<21} {cosine:>13.9f}   {a:>7.2f} ms {alone['PyTorch'].p50_ms / a:>5.2f}x  "
            f"   {b:>7.2f} ms {together['PyTorch'].p50_ms / b:>5.2f}x"
        )
    print(f"medians of alternating runs on the CPU, {torch.get_num_threads()} threads")
    if os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5:
        print("note: other work keeps this machine busy, so the times say little")
    print()
    return lowest


def show_similarity(vectors: Tensor) -> None:
    """Which sentences mean something alike."""
    print("how alike the sentences are (1 is the same):")
    for i, (sentence, row) in enumerate(zip(SENTENCES, vectors @ vectors.T, strict=True)):
        text = sentence if len(sentence) <= 44 else sentence[:41] + "..."
        print(f"  {i + 1}  {text:<44} " + " ".join(f"{x:5.2f}" for x in row.tolist()))


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
