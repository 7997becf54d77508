"""The paired statistics against scipy, against themselves by simulation, and their bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dfc.compress import statistics as st
from dfc.errors import DfcError


def binary(n: int, right: int, lost: int, won: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which `right` stay 1, `lost` fall to 0, `won` rise to 1."""
    before = np.r_[np.ones(right + lost), np.zeros(n - right - lost)]
    after = np.r_[np.ones(right), np.zeros(n - right)]
    after[right + lost : right + lost + won] = 1
    return before, after


def test_the_drop_of_decisions_is_the_formula() -> None:
    p = st.paired(*binary(1000, 800, 40, 25))
    assert (p.n, p.lost, p.won, p.method) == (1000, 40, 25, "normal")
    se = math.sqrt(40 + 25 - 15**2 / 1000) / 1000
    assert p.drop == pytest.approx(0.015) and p.se == pytest.approx(se)
    assert p.upper == pytest.approx(0.015 + stats.norm.ppf(0.95) * se)
    assert p.lower == pytest.approx(0.015 - stats.norm.ppf(0.95) * se)
    assert p.agreement == pytest.approx(0.935)
    assert "drop 1.50 pp, 95 % bound 2.8" in str(p) and "n=1 000, agree 93.5 %" in str(p)


def test_lower_is_better_turns_the_sign() -> None:
    before, after = binary(1000, 800, 40, 25)
    assert st.paired(before, after, higher_is_better=False).drop == pytest.approx(-0.015)


@pytest.mark.parametrize("n", [20, 300, 10_000])
def test_no_change_at_all_is_bounded_by_the_rule_of_three(n: int) -> None:
    p = st.paired(*binary(n, n // 2, 0, 0))
    assert p.method == "exact" and p.drop == 0
    assert p.upper == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-5)
    assert p.upper == pytest.approx(3 / n, rel=0.08)
    assert p.lower == pytest.approx(-p.upper)


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (4, 0), (5, 0), (6, 1), (7, 1), (8, 1)])
def test_the_exact_bound_says_what_mcnemars_test_says(lost: int, won: int) -> None:
    """The drop is surely above 0 just where the one-sided exact test rejects 0."""
    p = st.paired(*binary(500, 300, lost, won))
    one_sided = stats.binomtest(lost, lost + won, alternative="greater").pvalue if lost else 1.0
    assert (p.lower > 0) == (one_sided < 0.05), (p.lower, one_sided)


@pytest.mark.parametrize("lost, won", [(3, 0), (2, 5), (0, 6), (4, 4)])
def test_the_exact_bound_is_a_quantile_of_both_beta_distributions(lost: int, won: int) -> None:
    random, some, n = np.random.default_rng(0), lost + won, 400
    worse = random.beta(lost + 1, won, 400_000) if won else np.ones(400_000)
    more = random.beta(some + 1, n - some, 400_000)
    less = random.beta(some, n - some + 1, 400_000)
    made = np.where(worse > 0.5, more, less) * (2 * worse - 1)
    assert st.exact_bound(lost, won, n) == pytest.approx(np.quantile(made, 0.95), abs=2e-4)


@pytest.mark.parametrize("lost, won", [(0.01, 0.0), (0.01, 0.01), (0.03, 0.015), (0.002, 0.02)])
def test_bounds_hold_as_often_as_they_say(lost: float, won: float) -> None:
    """In at least 93 % of 400 samples of 300 items the true drop lies below the bound."""
    random, n = np.random.default_rng(1), 300
    counts = random.multinomial(n, [lost, won, 1 - lost - won], 400)
    held = [st.paired(*binary(n, 100, b, c)).upper >= lost - won for b, c, _ in counts]
    assert np.mean(held) >= 0.93


def test_numbers_are_compared_by_student() -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=40)
    y = x - 0.1 + 0.2 * random.normal(size=40)
    p = st.paired(x, y)
    bounds = stats.ttest_rel(x, y, alternative="less").confidence_interval(0.95)
    assert p.upper == pytest.approx(bounds.high)
    bounds = stats.ttest_rel(x, y, alternative="greater").confidence_interval(0.95)
    assert p.lower == pytest.approx(bounds.low)
    assert p.method == "student" and p.lost is None


def test_equal_numbers_are_not_certain() -> None:
    x = np.array([0.25, 0.75, 0.5])
    p = st.paired(x, x)
    assert p.drop == 0 and p.upper == pytest.approx(0.5 * (1 - 0.05 ** (1 / 3)))


def test_verdicts() -> None:
    p = st.paired(*binary(10_000, 8000, 150, 130))
    assert p.drop == pytest.approx(0.002) and 0.004 < p.upper < 0.005
    assert [p.verdict(x) for x in (0.005, 0.003, -0.01)] == ["accept", "undecided", "reject"]


def test_how_many_items_are_needed() -> None:
    """7 400 items for 3 % of changes and half a point, as the power of the test has it."""
    p = st.paired(*binary(1000, 800, 15, 15))
    needed = p.needed(0.005)
    assert needed is not None and 7350 < needed < 7450
    assert p.needed(0.0) is None
    some = math.sqrt(0.03 / needed)
    power = stats.norm.cdf(0.005 / some - stats.norm.ppf(0.95))
    assert power == pytest.approx(0.8, abs=0.001)
    same = st.paired(*binary(100, 50, 0, 0)).needed(0.005)
    assert same is not None and 1 - 0.05 ** (1 / same) <= 0.005 < 1 - 0.05 ** (1 / (same - 1))


def test_word_errors_are_drawn_by_clips() -> None:
    random = np.random.default_rng(3)
    words = random.integers(5, 20, 60).astype(float)
    before = np.c_[random.binomial(words.astype(int), 0.1), words]
    after = before.copy()
    after[:20, 0] += 1
    p = st.pooled(before, after)
    assert p.drop == pytest.approx(20 / words.sum()) and p.method == "bootstrap"
    drops = (after[:, 0] - before[:, 0], words)
    ratio = lambda a, b, axis=-1: a.sum(axis) / b.sum(axis)  # noqa: E731
    found = stats.bootstrap(
        drops, ratio, paired=True, vectorized=True, confidence_level=0.9, method="percentile",
        n_resamples=4000, random_state=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert p.lower == pytest.approx(found.low, rel=0.05)
    assert p.upper == pytest.approx(found.high, rel=0.05)
    assert st.pooled(before, after) == p  # the same seed, the same bounds
    assert p.agreement == pytest.approx(40 / 60)


def test_clips_without_a_difference_are_not_certain() -> None:
    rows = np.array([[0.0, 10.0]] * 20)
    p = st.pooled(rows, rows)
    assert str(p).startswith("drop 0, ") and p.upper == -p.lower
    assert p.upper == pytest.approx(0.1 * (1 - 0.05 ** (1 / 20)))


def test_perplexities_are_a_ratio() -> None:
    tokens = np.full(8, 512.0)
    nll = tokens * np.linspace(2, 3, 8)
    ratio, low, high = st.perplexity_ratio(np.c_[nll, tokens], np.c_[nll + 0.1 * tokens, tokens])
    assert ratio == pytest.approx(math.exp(0.1)) == pytest.approx(low) == pytest.approx(high)


def test_closeness_of_embeddings() -> None:
    random = np.random.default_rng(5)
    x = random.normal(size=(200, 16))
    y = x + 0.05 * random.normal(size=x.shape)
    c = st.closeness(x, y)
    each = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]
    assert c.mean == pytest.approx(np.mean(each)) and c.low == pytest.approx(
        np.quantile(each, 0.01)
    )
    assert c.same == np.mean(x.argmax(1) == y.argmax(1)) and 0.8 < c.same < 1
    zero = np.zeros((2, 3))
    assert st.closeness(zero, zero).mean == 1 and st.closeness(zero, zero + 1).mean == 0
    assert st.agreement([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: st.paired([1.0, 0.0], [1.0]), "scores of 2 items before and 1 after"),
        (lambda: st.paired([], []), "one score for each item is wanted, got [0]"),
        (lambda: st.paired([1.0], [1.0]), "one item says nothing"),
        (lambda: st.paired([1.0, math.nan], [1.0, 0.0]), "scores before: item 1 is nan"),
        (lambda: st.paired([[1.0]], [[1.0]]), "got [1, 1]"),
        (lambda: st.pooled([[1, 0], [0, 0]], [[1, 0], [0, 0]]), "weights of scores"),
        (lambda: st.agreement([1], [1, 2]), "do not fit together"),
    ],
)
def test_scores_that_say_nothing_are_refused(call: object, words: str) -> None:
    with pytest.raises(DfcError) as caught:
        call()  # type: ignore[operator]
    assert words in str(caught.value) and caught.value.status == 2
