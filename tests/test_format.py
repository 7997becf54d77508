"""`dfc fmt`: one layout, every word and comment kept, and nothing left to do the second time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import dfc.passes
from dfc.errors import DfcError
from dfc.lang.format import format_text
from dfc.lang.reader import Reading, read_document
from dfc.lang.source import Source
from dfc.recipe.resolve import preset
from tests.random_documents import random_document

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(Path(next(iter(dfc.passes.__path__))).glob("*/*.dfc"))
SAMPLES = [*SHIPPED, *sorted((ROOT / "tests" / "samples").glob("*.dfc"))]


def read(text: str) -> Reading:
    reading = read_document(Source(text))
    assert not reading.problems, reading.problems
    return reading


def comments(reading: Reading) -> list[str]:
    return [t.text.rstrip() for t in reading.tokens if t.type == "COMMENT"]


def check(text: str) -> str:
    once = format_text(text)
    before, after = read(text), read(once)
    assert after.document == before.document
    assert comments(after) == comments(before)
    assert format_text(once) == once
    assert not any(line != line.rstrip() for line in once.splitlines())
    return once


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_files_keep_what_they_say(path: Path) -> None:
    check(path.read_text())


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_a_layout_in_disorder_is_put_right(path: Path) -> None:
    text = path.read_text()
    wanted = check(text)
    lines = text.splitlines()
    rng = random.Random(path.name)
    messy = [" " * rng.randrange(9) + line.strip() + " " * rng.randrange(3) for line in lines]
    assert check("\n".join(messy)) == wanted  # indentation is not a matter of taste
    tight = [x if "#" in x else x.replace(", ", ",").replace(" = ", "=") for x in lines]
    assert check("\r\n".join(tight)) == wanted


@pytest.mark.parametrize("seed", range(60))
def test_random_documents_keep_what_they_say(seed: int) -> None:
    check(random_document(seed))


def test_a_plan_prints_in_layout() -> None:
    text = str(preset("simplify"))
    assert check(text) == text


def test_every_kind_of_line() -> None:
    messy = """
# of the file


dfc 1
import   "std/simplify.dfc"
data a,
   b
metric top1   on a,higher is better
target t { device h:cpu( cores = 8 ,mem=1GiB )   # big
 link h<->h : pcie(bw=1GB/s) # fast
}
# of the recipe
recipe r for t extends x,y {

  "why"
  minimize latency( p50 )
  require top1>=baseline-0.5pp


  require  -size <= - 3MiB
  q:cse on "a.*"|op( relu )&not dtype(f32) except (first(1)|last( 2 )),
     "b" keep if latency(q)*2<latency(before) with limit=tune(1,-2) , x=[ 1,2 ]
  when size(q) > 3MiB { revert q } else { # no
    # nothing
  }
}   # end
rule m(x , ...rest) { "doc"
 match y=add?( mul!(x,~=1e-5 ),[ a,...rest ] )
     | relu(x)
 where rank(x)==2 and
     not constant( x )
   # odd
     and dim(x,-1)//2 != 3
 rewrite y = split(
 x,
     [ dim(x,0),
   1]
 )
 within 1e-5
 exact
 priority -1
 applies x:f32[2,N] constant, k=3 # yes
 refuses x: f32[2] # no, this is longer
}
pattern p(x)=relu(x)
# last
"""
    messy = messy.replace(", ...rest) {", ") {")
    assert (
        check(messy)
        == """# of the file

dfc 1
import "std/simplify.dfc"
data a,
    b
metric top1 on a, higher is better

target t {
  device h : cpu(cores=8, mem=1GiB)  # big
  link h <-> h : pcie(bw=1GB/s)      # fast
}

# of the recipe
recipe r for t extends x, y {
  "why"
  minimize latency(p50)
  require top1 >= baseline - 0.5pp

  require -size <= -3MiB
  q: cse on "a.*" | op(relu) & not dtype(f32) except (first(1) | last(2)),
      "b" keep if latency(q) * 2 < latency(before) with limit=tune(1, -2), x=[1, 2]
  when size(q) > 3MiB {
    revert q
  } else {  # no
    # nothing
  }
}  # end

rule m(x) {
  "doc"
  match   y = add?(mul!(x, ~=1e-5), [a, ...rest])
          | relu(x)
  where   rank(x) == 2 and
          not constant(x)
          # odd
          and dim(x, -1) // 2 != 3
  rewrite y = split(
    x,
    [dim(x, 0),
      1]
  )
  within  1e-5
  exact
  priority -1
  applies x: f32[2, N] constant, k=3  # yes
  refuses x: f32[2]                   # no, this is longer
}

pattern p(x) = relu(x)
# last
"""
    )


def test_what_does_not_parse_is_refused() -> None:
    with pytest.raises(DfcError, match=r"t.dfc:3:7: error.P002"):
        format_text("dfc 1\nrecipe r {\n  cse )\n}", "t.dfc")
