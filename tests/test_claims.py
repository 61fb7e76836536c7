"""Calls that run at once are told apart from those that follow each other, and together take no more than is left."""

import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_earlyexit.claims import Claims, Place, holds
from langchain_earlyexit.ledger import allowance, merge_ledgers, opened, remaining
from langchain_earlyexit.parts import branches, part_of


def place(*levels, began=1.0, attempt=1):
    return Place(tuple(levels), began, attempt)


def entry(step, thinking, **more):
    return {**opened(step, None, None), "thinking": thinking, "exit": {"reason": "natural", "guarantee": None}, **more}


def spend(claims, where, budget, ledger, step, cap, thinking=None):
    """One call from its beginning to its end; its part of the ledger."""
    with claims.claimed(step, where, holds(step, budget, cap, None, 0.0, ledger), ledger) as claim:
        key = f"{step}/{where.levels}/{where.began}/{where.attempt}"
        told = entry(step, cap if thinking is None else thinking, budget=budget.get("id", ""))
        claim.spent(key, told)
        return {**claim.lost, key: told}


class TestBesideEachOther:
    @given(st.integers(0, 200), st.lists(st.integers(0, 100), min_size=1, max_size=6))
    def test_what_is_not_refused_fits_into_what_is_left(self, tokens, caps):
        claims, budget, taken = Claims(), {"tokens": tokens}, 0
        for i, cap in enumerate(min(cap, tokens) for cap in caps):
            try:
                spend(claims, place(("c", f"n:{i}")), budget, {}, f"s{i}", cap)
                taken += cap
            except ValueError:
                assert taken + cap > tokens
        assert taken <= tokens

    @given(st.integers(0, 500), st.lists(st.integers(0, 9), min_size=1, max_size=6))
    def test_the_shares_of_weights_and_those_of_branches_are_never_refused(self, tokens, weights):
        steps = [f"s{i}" for i in range(len(weights))]
        budget = {"tokens": tokens, "weights": dict(zip(steps, weights, strict=True))}
        alone, sent = Claims(), Claims()
        for i, step in enumerate(steps):
            spend(alone, place(("c", f"n:{i}")), budget, {}, step, allowance(step, budget, {}))
        for i, one in enumerate(branches(steps, budget, None, {})):
            spend(sent, place(("c", f"n:{i}")), one["budget"], {}, one["step"], one["budget"]["tokens"])

    def test_two_fans_out_of_one_budget_are_refused(self):
        claims, budget = Claims(), {"tokens": 30}
        for i, one in enumerate(branches(["a", "b"], budget, None, {})):
            spend(claims, place(("c", f"n:{i}")), one["budget"], {}, one["step"], 15)
        [other] = branches(["d"], budget, None, {})
        with pytest.raises(ValueError, match=r"'d' runs at once with 'a', 'b'.*`branches`"):
            spend(claims, place(("c", "n:7")), other["budget"], {}, "d", 30)

    def test_graphs_within_graphs_are_told_from_their_parents_steps(self):
        claims, budget = Claims(), {"tokens": 40, "weights": {"in": 1, "beside": 1}}
        inner = part_of("in", budget, {})
        assert inner["tokens"] == 20
        ledger = spend(claims, place(("c", "in:1"), ("c1", "x:1")), inner, {}, "x", 20, 5)
        ledger |= spend(claims, place(("c", "in:1"), ("c2", "y:1")), inner, ledger, "y", 15)
        spend(claims, place(("c", "beside:1")), budget, {}, "beside", 20)
        with pytest.raises(ValueError, match="'late' runs at once with 'x', 'y', 'beside'"):
            spend(claims, place(("c", "late:1")), budget, {}, "late", 1)
        assert remaining(inner, ledger) == 0

    def test_calls_that_are_still_running_count_with_all_they_may_take(self):
        claims, budget, begun, over = Claims(), {"tokens": 30}, threading.Event(), threading.Event()

        def long():
            with claims.claimed("a", place(("c", "a:1")), holds("a", budget, 20, None, 0.0, {}), {}):
                begun.set()
                over.wait(5)

        thread = threading.Thread(target=long)
        thread.start()
        begun.wait(5)
        with pytest.raises(ValueError, match="They may take 20 thinking tokens, but beside what 'b'"):
            spend(claims, place(("c", "b:1")), budget, {}, "b", 11)
        over.set()
        thread.join()
        spend(claims, place(("c", "b:1")), budget, {}, "b", 30)  # the other one spent nothing after all

    def test_risk_is_held_like_tokens(self):
        for risk, fits in (
            ({"shares": {"a": 0.05, "b": 0.05}}, True),
            ({"weights": {"a": 1, "b": 1}}, True),
            ({}, False),
        ):
            claims, whole = Claims(), {"epsilon": 0.1, **risk}
            for i, step in enumerate("ab"):
                held = holds(step, None, None, whole, 0.05, {})
                try:
                    with claims.claimed(step, place(("c", f"n:{i}")), held, {}) as claim:
                        claim.spent(step, entry(step, 3))
                except ValueError:
                    assert (step, fits) == ("b", False)
                else:
                    assert step == "a" or fits

    def test_a_share_of_risk_is_for_one_call(self):
        claims, risk = Claims(), {"epsilon": 0.1, "shares": {"a": 0.05}}
        held = holds("a", None, None, risk, 0.05, {})
        with claims.claimed("a", place(("c", "n:1")), held, {}) as claim:
            claim.spent("a/1", entry("a", 3))
        with (
            pytest.raises(ValueError, match=r"0\.05 risk.*spread_risk"),
            claims.claimed("a", place(("c", "n:2")), held, {}),
        ):
            pass


class TestOneAfterTheOther:
    def test_later_supersteps_and_other_runs_are_not_beside(self):
        claims, budget = Claims(), {"tokens": 30}
        spend(claims, place(("c", "a:1")), budget, {}, "a", 30)
        for later in (place(("d", "b:1")), place(("e", "a:1"))):
            spend(claims, later, budget, {}, "b", 30)

    def test_a_checkpoint_that_is_run_again_starts_afresh(self):
        claims, budget = Claims(), {"tokens": 30}
        for began in (1.0, 2.0, 3.0):
            spend(claims, place(("c", "a:1"), began=began), budget, {}, "a", 30)

    def test_a_superstep_that_is_run_again_has_discarded_what_it_had_done(self):
        claims, budget = Claims(), {"tokens": 30}
        one, other = place(("c", "a:1"), began=1.0), place(("c", "b:1"), began=1.0)
        spend(claims, one, budget, {}, "a", 15)
        held = holds("b", budget, 15, None, 0.0, {})
        with pytest.raises(OSError, match="lost"), claims.claimed("b", other, held, {}):
            raise OSError("lost")
        for again in (2.0, 3.0):
            spend(claims, place(("c", "a:1"), began=again), budget, {}, "a", 15)
        spend(claims, place(("c", "b:1"), began=3.0), budget, {}, "b", 15)

    def test_what_a_failed_attempt_spent_is_the_next_one_s_to_write(self):
        claims, budget, ledger = Claims(), {"tokens": 30}, {}
        first = place(("c", "a:1"))
        with (
            contextlib.suppress(RuntimeError),
            claims.claimed("a", first, holds("a", budget, 30, None, 0.0, {}), {}) as claim,
        ):
            claim.spent("a/1", entry("a", 20))
            raise RuntimeError("no parse")
        for again in (place(("c", "a:1"), attempt=2), place(("c", "a:1"), began=9.0)):
            seen = merge_ledgers(ledger, claims.lost(again))
            assert remaining(budget, seen) == 10
        assert claims.lost(place(("d", "a:1"))) == {}
        written = spend(claims, again, budget, seen, "a", 10)
        assert sum(one["thinking"] for one in written.values()) == 30
        assert claims.lost(place(("c", "a:1"), began=10.0)) == {}

    def test_a_call_that_failed_took_nothing(self):
        claims, budget = Claims(), {"tokens": 30}
        held = holds("a", budget, 30, None, 0.0, {})
        with pytest.raises(ConnectionError), claims.claimed("a", place(("c", "a:1")), held, {}):
            raise ConnectionError
        spend(claims, place(("c", "b:1")), budget, {}, "b", 30)

    def test_outside_of_a_graph_nothing_runs_beside(self):
        claims = Claims()
        for _ in range(2):
            with claims.claimed("a", None, holds("a", {"tokens": 5}, 5, None, 0.0, {}), {}) as claim:
                claim.spent("a/1", entry("a", 5))
                assert claim.lost == {}
