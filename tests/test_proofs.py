"""Proofs are remembered: in a list for what dfc ships, in a cache of the user's for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.rewrite import proofs, rulesets
from dfc.rewrite.prove import prove
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rule import Rule, RuleSet

NEGATION = """dfc 1
rule negated_twice(x) {
  match   y = neg(neg(x))
  where   floating(x)
  rewrite y = x
  exact
  applies x: f32[2, 3]
  refuses x: i64[2, 3]
}
"""
WRONG = NEGATION.replace("negated_twice", "wrong").replace("y = x\n", "y = abs(x)\n")


def rule_set(text: str, name: str = "mine") -> RuleSet:
    return rules_of(Source(text, f"{name}.dfc"), name)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proofs, "_known", {})
    monkeypatch.setattr(rulesets, "_loaded", {})


def times_proved(rules: RuleSet) -> int:
    """How many rules had to be proved now."""
    said: list[str] = []
    proofs._known.clear()
    assert not any(proofs.problems_of(rules.rules, said.append).values())
    return len(said)


def test_a_proof_is_remembered_by_the_next_process() -> None:
    rules = rule_set(NEGATION)
    assert times_proved(rules) == 1
    assert times_proved(rules) == 0
    folder = proofs.cache_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    (kept,) = folder.iterdir()
    assert json.loads(kept.read_text())["rule"] == "mine.negated_twice"


def test_a_rule_that_changes_is_proved_again() -> None:
    assert times_proved(rule_set(NEGATION)) == 1
    assert times_proved(rule_set(NEGATION.replace("f32[2, 3]", "f32[2, 4]"))) == 1
    assert times_proved(rule_set(NEGATION.replace("# ", ""))) == 0


def test_the_code_that_proves_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = rule_set(NEGATION)
    assert times_proved(rules) == 1
    monkeypatch.setattr(proofs, "versions", lambda: ["another"])
    assert times_proved(rules) == 1


OWN = """
import dfc
from dfc.lang.source import Source
from dfc.rewrite import proofs
from dfc.rewrite.read_rules import rules_of
from helper import FACTOR


@dfc.op
class Twice:
    name = "mine.twice"

    def infer(self, x):
        return x

    def reference(self, x):
        return x * FACTOR


TEXT = '''dfc 1
rule doubled(x) {
  match   y = add(x, x)
  where   floating(x)
  rewrite y = mine.twice(x)
  exact
  applies x: f32[2, 3]
  refuses x: i64[2, 3]
}
'''
found = proofs.problems_of(rules_of(Source(TEXT, "own.dfc"), "own").rules, print)
print([p.code for problems in found.values() for p in problems])
"""


def test_an_op_of_the_users_is_part_of_the_key(tmp_path: Path) -> None:
    """Through what its module imports, too: the rule's own text is the same each time."""
    (tmp_path / "own.py").write_text(OWN)

    def told(factor: float) -> list[str]:
        (tmp_path / "helper.py").write_text(f"FACTOR = {factor!r}\n")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-B", "own.py"], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    assert told(2.0) == ["proving the rule own.doubled", "[]"]
    assert told(2.0) == ["[]"]
    proving, problems = told(3.0)
    assert proving == "proving the rule own.doubled" and problems != "[]"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_cache_that_others_can_look_into_is_passed_by(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "dfc"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    rules = rule_set(NEGATION)
    assert times_proved(rules) == times_proved(rules) == 1
    assert not list(folder.iterdir())


def test_a_link_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache" / "dfc").symlink_to(tmp_path / "elsewhere")
    assert proofs.cache_folder() is None


def test_a_cache_that_cannot_be_made_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    rules = rule_set(NEGATION)
    assert times_proved(rules) == times_proved(rules) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": "another"}', "\0" * 100_000])
def test_a_damaged_entry_is_no_proof(text: str) -> None:
    rules = rule_set(NEGATION)
    times_proved(rules)
    folder = proofs.cache_folder()
    assert folder is not None
    (kept,) = folder.iterdir()
    kept.write_text(text)
    assert times_proved(rules) == 1
    assert times_proved(rules) == 0  # it was written anew


def test_a_wrong_rule_is_not_remembered_and_not_used() -> None:
    rules = rule_set(WRONG)
    rulesets.add_set(rules)
    for _ in range(2):
        with pytest.raises(DfcError) as e:
            rulesets.proved_rules(["mine"])
        assert e.value.code == "R022"
        assert e.value.status == 2
    folder = proofs.cache_folder()
    assert folder is not None
    assert not list(folder.iterdir())


def test_rules_that_undo_each_other_are_not_used() -> None:
    there = NEGATION.replace("negated_twice", "there").replace("neg(neg(x))", "neg(x)")
    there = there.replace("y = x\n", "y = mul(x, -1.0)\n")
    back = there.replace("there", "back").replace("neg(x)", "mul(x, -1.0)", 1)
    back = back.replace("rewrite y = mul(x, -1.0)", "rewrite y = neg(x)")
    rulesets.add_set(rule_set(there + back.partition("\n")[2]))
    with pytest.raises(DfcError) as e:
        rulesets.proved_rules(["mine"])
    assert e.value.code == "R030"
    assert [r.name for r in rulesets.proved_rules(["mine.there"]).rules] == ["there"]


def test_a_right_rule_is_used() -> None:
    rulesets.add_set(rule_set(NEGATION))
    found = rulesets.proved_rules(["mine.negated_twice"])
    assert [r.name for r in found.rules] == ["negated_twice"]
    assert not found.left_out


def test_rules_of_ours_that_do_not_hold_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    both = rule_set(NEGATION + WRONG.partition("\n")[2], "ours")
    monkeypatch.setattr(rulesets, "shipped_sets", lambda: {"ours": both})
    found = rulesets.proved_rules([])
    assert [r.name for r in found.rules] == ["negated_twice"]
    assert [d.code for d in found.left_out["ours.wrong"]] == ["R022"]
    with pytest.raises(DfcError, match="R022"):  # asked for by name, it is an error
        rulesets.proved_rules(["ours.wrong"])


def test_digests_are_the_same_in_every_process() -> None:
    code = (
        "from dfc.rewrite.rulesets import select_rules\n"
        "for r in select_rules([]): print(r.full_name, r.digest)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def shipped() -> list[Rule]:
    return [*rulesets.select_rules([])]


def test_what_is_listed_as_proved_is_what_dfc_ships() -> None:
    """After a change to passes/rules: `dfc test --write`."""
    listed = json.loads((proofs.rules_folder() / proofs.SHIPPED).read_text())
    if listed["torch"] != proofs.torch_version():
        pytest.skip("proved with another version of torch")
    digests = {r.full_name: r.digest for r in shipped()}
    assert listed["rules"] == digests


@pytest.mark.slow
@pytest.mark.parametrize("rule", shipped(), ids=str)
def test_every_shipped_rule_holds(rule: Rule) -> None:
    found = prove(rule)
    assert found.holds, "\n".join(d.render() for d in found.problems)
