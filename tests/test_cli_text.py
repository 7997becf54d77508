"""`dfc check` and `dfc fmt`: graphs and recipes as text, all errors at once, one layout."""

from __future__ import annotations

from pathlib import Path

import dfc
from dfc.lang.graph_comments import with_comments
from tests.command import NET, Run

TEXT = """dfc 1
graph @main(%x: f32[2, 3]) -> f32[2, 3] {
  %a: f32[2, 3] = aten.exp.default(%x)
  return %a
}
"""


def test_check_accepts_and_refuses(run: Run, tmp_path: Path) -> None:
    good, bad, worse = tmp_path / "g.dfc", tmp_path / "b.dfc", tmp_path / "w.dfc"
    good.write_text(TEXT)
    bad.write_text(TEXT.replace("exp.default", "expp.default"))
    worse.write_text(TEXT.replace("aten.exp", "aten exp"))
    assert run("check", good).status == 0
    done = run("check", good, bad, worse)
    assert done.status == 2
    assert f"{good}: valid" in done.out and f"{bad}: 1 error" in done.out
    assert f"{worse}:3:" in done.err and "expp" in done.err
    data = run("check", bad, worse, "--json").data
    assert data[str(worse)][0]["line"] == 3


def test_check_reports_every_error(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "two.dfc"
    wrong = "  %b: f32[9] = aten.exp.default(%a)\n  %c: i64[2] = aten.neg.default(%x)\n"
    file.write_text(TEXT.replace("  return", wrong + "  return"))
    done = run("check", file)
    assert done.status == 2 and done.err.count("error[") == 2


def test_fmt_is_canonical_and_keeps_comments(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.dfc"
    messy = (
        TEXT.replace("dfc 1\n", "# what it is for\ndfc 1\n\n")
        .replace("  %a:", "  # why\n     %a  :")
        .replace("(%x)\n", "(%x)   # how\n")
    )
    file.write_text(messy)
    checked = run("fmt", "--check", file)
    assert (checked.status, checked.out) == (9, f"{file} would change\n")
    assert file.read_text() == messy
    assert run("fmt", file).status == 0
    once = file.read_text()
    assert once == "# what it is for\n" + TEXT.replace("  %a", "  # why\n  # how\n  %a", 1)
    assert run("fmt", "--check", file).status == 0
    assert with_comments(once, TEXT) == once


def test_fmt_keeps_comments_in_nested_graphs_apart() -> None:
    text = """dfc 1
graph @main(%c: bool[], %x: f32[2]) -> f32[2] {
  %y: f32[2] = torch.cond(@a, @b, %c, [%x])
  return %y

  # the first
  graph @a(%x: f32[2]) -> (f32[2],) {
    %s: f32[2] = aten.sin.default(%x)
    return (%s,)
  }

  graph @b(%x: f32[2]) -> (f32[2],) {
    %s: f32[2] = aten.cos.default(%x)
    # the last
    return (%s,)
  }
}
# after all
"""
    assert with_comments(text, str(dfc.parse(text))) == text


def test_fmt_changes_nothing_when_one_file_is_wrong(run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "g.dfc", tmp_path / "b.dfc"
    good.write_text("\n" + TEXT)
    bad.write_text(TEXT + "}")
    assert run("fmt", good, bad).status == 2
    assert good.read_text() == "\n" + TEXT


RECIPE = """dfc 1

data calib

recipe small {
  apply simplify
  q: fuse on "fc" | op(relu) with limit=3
}
"""


def test_check_reads_recipes_and_their_imports(run: Run, tmp_path: Path) -> None:
    good, bad, inner = tmp_path / "g.dfc", tmp_path / "b.dfc", tmp_path / "inner.dfc"
    good.write_text(RECIPE)
    inner.write_text("dfc 1\nrecipe inner { cse with limt=3 }\n")
    bad.write_text('dfc 1\nimport "inner.dfc"\nrecipe r { appply inner }\n')
    done = run("check", good)
    assert done.status == 0 and f"{good}:3:6: warning[Q019]: data `calib` is not used" in done.err
    done = run("check", good, bad)
    assert done.status == 2 and f"{bad}: 2 errors" in done.out
    assert f"{inner}:2:25: error[Q002]" in done.err and "did you mean `limit`" in done.err
    assert f"{bad}:3:12: error[Q001]" in done.err and "did you mean `apply`" in done.err
    data = run("check", good, bad, "--json").data
    assert [d["severity"] for d in data[str(good)]] == ["warning"]
    assert {(d["code"], Path(d["file"]).name) for d in data[str(bad)]} == {
        ("Q002", "inner.dfc"), ("Q001", "b.dfc"),
    }  # fmt: skip


def test_check_tries_selectors_on_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    file = tmp_path / "r.dfc"
    file.write_text(RECIPE)
    model = f"{tmp_path}/net.py:build"
    assert run("check", file, "--model", model).status == 0
    file.write_text(RECIPE.replace('"fc"', '"fcc"'))
    done = run("check", file, "--model", model)
    assert done.status == 2 and f"{file}:7:14: error[Q021]: no module matches `fcc`" in done.err
    assert "did you mean `fc`" in done.err


def test_fmt_writes_recipes_in_layout(run: Run, tmp_path: Path) -> None:
    file, link = tmp_path / "r.dfc", tmp_path / "link.dfc"
    file.write_bytes(RECIPE.replace("  ", "\t").replace("\n", "\r\n").encode())
    link.symlink_to(file)
    assert run("fmt", "--check", link).status == 9
    shown = run("fmt", "--diff", link)
    assert shown.status == 9 and "+  apply simplify" in shown.out
    file.write_text(RECIPE[:-1])
    assert "-}\n\\ No newline at end of file\n+}\n" in run("fmt", "--diff", link).out
    assert run("fmt", link).status == 0
    assert link.is_symlink() and file.read_bytes() == RECIPE.encode()
    assert run("fmt", "--check", link).status == 0


def test_fmt_refuses_what_does_not_parse(run: Run, tmp_path: Path) -> None:
    file, good = tmp_path / "r.dfc", tmp_path / "g.dfc"
    file.write_text(RECIPE.replace("}", ")"))
    good.write_text("\n" + RECIPE)
    done = run("fmt", good, file)
    assert done.status == 2 and f"{file}:8:1: error[P002]" in done.err
    assert good.read_text() == "\n" + RECIPE
    assert run("fmt", tmp_path).status == 2
