"""Tokens and risk are handed out exactly: nothing is overspent, nothing is lost, and nothing is below zero."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_earlyexit.budgets import (
    SCHEDULES,
    adaptive_risk,
    decay,
    endless_risk,
    next_share,
    pace,
    split,
    spread_risk,
)

TOTALS = st.integers(0, 100_000)
WEIGHT = st.floats(0, 1e6, allow_subnormal=False)
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)
EPSILON = st.floats(0, 0.99)


class TestPace:
    @given(st.integers(1, 10**6), st.lists(st.integers(1, 9), min_size=2, max_size=8), st.data())
    def test_is_one_while_every_step_takes_just_its_share(self, unit, weights, data):
        done = data.draw(st.integers(0, len(weights) - 1))
        left = unit * sum(weights[done:])
        assert pace(unit * sum(weights), left, weights, weights[done:]) == 1

    def test_is_below_one_for_a_run_that_overspends_and_above_for_one_that_saves(self):
        assert pace(100, 25, [1, 1], [1]) == 0.5
        assert pace(100, 75, [1, 1], [1]) == 1.5

    def test_is_not_told_where_nothing_is_to_be_had_or_to_come(self):
        assert pace(0, 0, [1, 1], [1]) is None
        assert pace(100, 75, [1, 0], [0]) is None


class TestTokens:
    @given(TOTALS, WEIGHTS)
    def test_the_parts_add_up_to_the_whole_and_each_is_its_share_rounded(self, total, weights):
        parts = split(total, weights)
        assert sum(parts) == total
        weight = sum(map(Fraction, weights))
        for part, own in zip(parts, weights, strict=True):
            exact = total * Fraction(own) / weight if weight else Fraction(total, len(weights))
            assert math.floor(exact) <= part <= math.ceil(exact)

    @given(TOTALS, st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True), st.randoms())
    def test_a_step_s_part_does_not_depend_on_where_it_stands_unless_claims_are_equal(self, total, weights, rng):
        claims = [Fraction(total * w, sum(weights)) % 1 for w in weights]
        assume(len(set(claims)) == len(claims))
        order = rng.sample(range(len(weights)), len(weights))
        moved = split(total, [weights[i] for i in order])
        assert [moved[order.index(i)] for i in range(len(weights))] == list(split(total, weights))

    @given(TOTALS, st.lists(st.tuples(WEIGHT, st.floats(0, 1)), min_size=1, max_size=12))
    def test_steps_that_take_their_next_share_never_overspend_and_the_last_may_take_all_that_is_left(
        self, total, steps
    ):
        left = total
        for i, (weight, greed) in enumerate(steps):
            later = [later for later, _ in steps[i + 1 :]]
            share = next_share(left, weight, later)
            assert 0 <= share <= left
            if not later:
                assert share == left
            left -= int(share * greed)
        assert 0 <= left <= total

    @given(TOTALS, st.integers(1, 100), st.lists(st.integers(1, 100), max_size=8))
    def test_the_next_share_is_the_step_s_weight_against_those_to_come(self, left, weight, later):
        assert next_share(left, weight, later) == left * weight // (weight + sum(later))

    @given(st.integers(1, 40), st.sampled_from(SCHEDULES))
    def test_every_schedule_falls_and_stays_above_zero(self, steps, schedule):
        weights = decay(steps, schedule)
        assert len(weights) == steps
        assert all(a >= b > 0 for a, b in zip(weights, (*weights[1:], weights[-1]), strict=True))

    def test_the_schedules_are_those_of_plan_and_budget(self):
        assert decay(3, "even") == (1, 1, 1)
        assert decay(3, "linear") == (3, 2, 1)
        assert decay(3, "polynomial") == (9, 4, 1)
        assert decay(3, "exponential") == pytest.approx((1, 0.9, 0.81))
        assert decay(3, "cosine") == pytest.approx((1.1, 0.6, 0.1))

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: split(-1, [1]), "at least 0"),
            (lambda: split(5, []), "no step"),
            (lambda: split(5, [1, -1]), "got -1"),
            (lambda: split(5, [1, math.nan]), "got nan"),
            (lambda: decay(0), "at least one step"),
            (lambda: decay(3, "steep"), "known are even, linear"),
            (lambda: next_share(-5, 1, []), "cannot be more than the budget"),
        ],
    )
    def test_what_cannot_be_is_an_error_that_says_why(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()


class TestRisk:
    @given(EPSILON, st.dictionaries(st.text(max_size=3), WEIGHT, max_size=12))
    def test_fixed_shares_never_add_up_to_more_than_the_run_s_risk(self, epsilon, weights):
        shares = spread_risk(epsilon, weights)
        assert shares.keys() == weights.keys()
        assert sum(map(Fraction, shares.values())) <= Fraction(epsilon)
        assert all(share >= 0 and (share == 0 or weights[step] > 0) for step, share in shares.items())
        if any(weights.values()):
            assert sum(shares.values()) == pytest.approx(epsilon)

    @given(EPSILON, st.dictionaries(st.text(max_size=3), WEIGHT, min_size=1, max_size=8), st.randoms())
    def test_the_order_of_the_steps_does_not_matter(self, epsilon, weights, rng):
        order = rng.sample(list(weights), len(weights))
        assert spread_risk(epsilon, {step: weights[step] for step in order}) == spread_risk(epsilon, weights)

    @given(EPSILON, st.integers(0, 300))
    def test_a_run_without_end_stays_below_its_risk(self, epsilon, steps):
        shares = [endless_risk(epsilon, step) for step in range(steps)]
        assert all(share >= 0 for share in shares)
        assert sum(map(Fraction, shares)) <= Fraction(epsilon)

    @given(EPSILON, st.lists(st.tuples(WEIGHT, st.booleans()), min_size=1, max_size=10))
    def test_the_adaptive_rule_never_takes_more_than_is_left(self, epsilon, steps):
        spent = 0.0
        for i, (weight, takes) in enumerate(steps):
            share = adaptive_risk(epsilon, spent, weight, [later for later, _ in steps[i + 1 :]])
            assert share >= 0
            assert share == 0 or weight > 0
            spent += share if takes else 0.0
        assert spent <= epsilon + 1e-12

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: spread_risk(1.0, {"a": 1}), r"in \[0, 1\), got 1.0"),
            (lambda: spread_risk(0.1, {"a": -1}), "got -1"),
            (lambda: endless_risk(-0.1, 0), "got -0.1"),
            (lambda: endless_risk(0.1, -1), "counted from 0"),
            (lambda: adaptive_risk(0.1, -0.1, 1, []), "at least 0"),
        ],
    )
    def test_what_cannot_be_is_an_error_that_says_why(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()
