"""Proving every rule that dfc ships, from nothing: no remembered proof is used.

    python benchmarks/proving.py

Goal: the whole library in at most 60 s of processor time. What is proved is remembered, by the
rule's text, the code that proves and the version of torch, so that users do not wait for it.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from dfc.rewrite.prove import prove
from dfc.rewrite.rulesets import shipped_sets


def main() -> None:
    torch.set_num_threads(1)
    sets = shipped_sets()
    print(f"torch {torch.__version__}; processor seconds")
    print(f"{'set':14} {'rules':>6} {'s':>8} {'slowest rule':38} {'s':>6} {'inputs tried':>13}")
    every: list[float] = []
    start = time.process_time()
    for name, rules in sets.items():
        times: dict[str, float] = {}
        tried = 0
        for rule in rules.rules:
            begin = time.process_time()
            proof = prove(rule)
            times[rule.name] = time.process_time() - begin
            tried += proof.tally.inputs
            assert proof.holds, proof.problems[0].render()
        slowest = max(times, key=lambda n: times[n], default="")
        every += times.values()
        print(f"{name:14} {len(times):>6} {sum(times.values()):>8.1f} {slowest:38} "
              f"{times.get(slowest, 0.0):>6.1f} {tried:>13}", flush=True)  # fmt: skip
    taken = time.process_time() - start
    print(f"{len(every)} rules, {taken:.1f} s in all, {median(every):.2f} s for the median rule")


if __name__ == "__main__":
    main()
