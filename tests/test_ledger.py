"""The ledger loses no spend and counts none twice, in whatever order branches come home."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_earlyexit.budgets import spread_risk
from langchain_earlyexit.ledger import (
    allowance,
    check_budget,
    check_risk,
    merge_ledgers,
    remaining,
    risk_of,
    run_guarantee,
)
from langchain_earlyexit.parts import below, branches, known_as, part_of


def spend(step="a", thinking=10, *, epsilon=0.0, reason="natural", guarantee=None, **more):
    return {
        "step": step, "node": "think", "turn": "", "model": "small", "cap": None, "thinking": thinking,
        "reasoning": thinking + 2, "epsilon": epsilon, "heuristic": False, "confidence": None, "budget": "",
        "risk": "", "exit": {"reason": reason, "guarantee": guarantee}, **more,
    }  # fmt: skip


def promise(epsilon, kind="answer_changed", delta=0.05, n=500):
    return {"kind": kind, "epsilon": epsilon, "delta": delta, "n": n}


ENTRIES = st.builds(spend, st.sampled_from("abc"), st.integers(0, 50))
LEDGERS = st.dictionaries(st.sampled_from(["a/1", "a/2", "b/3", "c/4", "c/5"]), ENTRIES)


class TestMerging:
    @given(LEDGERS, LEDGERS, LEDGERS)
    def test_is_a_union_whatever_the_order_and_however_often(self, one, two, three):
        merged = merge_ledgers(merge_ledgers(one, two), three)
        assert merged == merge_ledgers(one, merge_ledgers(two, three)) == merge_ledgers(three, merge_ledgers(two, one))
        assert merged == merge_ledgers(merged, two)
        assert merged.keys() == one.keys() | two.keys() | three.keys()

    @given(LEDGERS, LEDGERS)
    def test_changes_neither_side(self, one, two):
        before = json.dumps([one, two])
        merge_ledgers(one, two)
        assert json.dumps([one, two]) == before

    def test_an_answer_out_of_a_cache_does_not_hide_what_it_once_cost(self):
        paid, cached = spend(thinking=30), spend(thinking=0, reasoning=0)
        for one, two in ((paid, cached), (cached, paid)):
            assert merge_ledgers({"a/1": one}, {"a/1": two}) == {"a/1": paid}


class TestAllowance:
    @given(
        st.integers(0, 5000), st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1), st.randoms()
    )
    def test_steps_in_any_order_each_taking_all_they_may_never_overspend(self, tokens, weights, rng):
        budget, ledger = {"tokens": tokens, "weights": weights}, {}
        order = rng.sample(list(weights), len(weights))
        for step in order:
            cap = allowance(step, budget, ledger)
            assert 0 <= cap <= remaining(budget, ledger)
            ledger[f"{step}/1"] = spend(step, cap)
        assert sum(entry["thinking"] for entry in ledger.values()) <= tokens
        if weights[order[-1]]:
            assert remaining(budget, ledger) == 0

    def test_what_a_step_leaves_is_there_for_the_others(self):
        budget = {"tokens": 90, "weights": {"a": 1, "b": 1, "c": 1}}
        assert allowance("b", budget, {"a/1": spend("a", 0)}) == 45

    def test_a_second_try_shares_what_is_left_with_the_steps_to_come(self):
        budget = {"tokens": 90, "weights": {"a": 1, "b": 1, "c": 1}}
        assert allowance("a", budget, {"a/1": spend("a", 30)}) == 20

    def test_without_weights_a_step_may_take_all_that_remains(self):
        assert allowance("any", {"tokens": 50}, {"a/1": spend("a", 20)}) == 30

    def test_a_new_budget_starts_from_nothing_spent(self):
        ledger = {"a/1": spend("a", 20, budget="monday")}
        assert remaining({"tokens": 50, "id": "monday"}, ledger) == 30
        assert remaining({"tokens": 50, "id": "tuesday"}, ledger) == 50

    @pytest.mark.parametrize(
        ("budget", "says"),
        [
            ({"tokens": -1}, "at least 0, got -1"),
            ({"tokens": 1.5}, "whole number"),
            ({"token": 5}, "a dict with 'tokens'"),
            ({"tokens": 5, "weight": {}}, "weights"),
            (200, r"such as \{'tokens': 200\}.*got 200"),
            ({"tokens": 5, "weights": {"a": -1}}, "at least 0 by step"),
            ({"tokens": 5, "weights": {"a": float("nan")}}, "finite"),
            ({"tokens": 5, "weights": {"a": "much"}}, "numbers"),
            ({"tokens": 5, "weights": {}}, "leave them out"),
            ({"tokens": 5, "id": 7}, "id is a str, got 7"),
        ],
    )
    def test_a_dict_that_is_no_budget_is_an_error(self, budget, says):
        with pytest.raises(ValueError, match=says):
            check_budget(budget)

    def test_a_step_without_a_weight_is_an_error_that_names_it(self):
        with pytest.raises(ValueError, match="weights for a, b, and none for step 'c'"):
            allowance("c", {"tokens": 5, "weights": {"a": 1, "b": 1}}, {})


class TestBranches:
    @given(st.integers(0, 5000), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9), st.booleans())
    def test_side_by_side_they_cannot_spend_more_than_remains(self, tokens, weights, later, weighted):
        steps = [f"step {i}" for i in range(len(weights))]
        budget = {"tokens": tokens}
        if weighted:
            budget["weights"] = {**dict(zip(steps, weights, strict=True)), "later": later}
        ledger = {"before/1": spend("before", tokens // 3)}
        told = branches(steps, budget, None, ledger)
        assert [one["step"] for one in told] == steps
        handed = sum(one["budget"]["tokens"] for one in told)
        assert handed <= remaining(budget, ledger)
        if not weighted or (any(weights) and not later):
            assert handed == remaining(budget, ledger)

    @pytest.mark.parametrize(
        "risk", [{"shares": {"a": 0.02, "b": 0.03}}, {"weights": {"a": 1, "b": 1, "c": 2}}, {}], ids=str
    )
    def test_each_has_a_risk_of_its_own_and_together_no_more_than_the_run(self, risk):
        told = branches(["a", "b"], None, {"epsilon": 0.1, "id": "run", **risk}, {})
        given_out = [risk_of(one["step"], check_risk(one["risk"]), one["ledger"]) for one in told]
        assert all(0 < epsilon < 0.1 for epsilon, _ in given_out)
        assert sum(epsilon for epsilon, _ in given_out) <= 0.1
        assert [heuristic for _, heuristic in given_out] == ["weights" in risk] * 2
        assert {one["risk"]["id"] for one in told} == {"run|a", "run|b"}

    def test_two_of_one_name_are_an_error(self):
        with pytest.raises(ValueError, match="names of their own"):
            branches(["a", "a"], None, None, {})


class TestParts:
    def test_what_is_spent_of_a_part_is_spent_of_the_whole_by_the_step_whose_part_it_is(self):
        budget = {"tokens": 100, "id": "run", "weights": {"in": 3, "tell": 1}}
        inner = part_of("in", budget, {})
        assert (inner["tokens"], inner["id"]) == (75, "run|in")
        [deep] = branches(["x"], inner, None, {})
        ledger = {"x/1": spend("x", 40, budget=deep["budget"]["id"])}
        assert (remaining(inner, ledger), remaining(budget, ledger)) == (35, 60)
        assert allowance("tell", budget, ledger) == 60, "the step in has come: nobody else waits"

    @given(st.lists(st.integers(0, 60), max_size=6))
    def test_a_graph_that_is_a_step_keeps_to_one_share_however_often_it_calls(self, greed):
        budget, ledger = {"tokens": 100, "weights": {"in": 3, "tell": 1}}, {}
        for i, tokens in enumerate(greed):
            inner = part_of("in", budget, ledger)
            ledger[f"x/{i}"] = spend("x", min(tokens, remaining(inner, ledger)), budget=inner["id"])
        assert sum(entry["thinking"] for entry in ledger.values()) <= 75
        assert allowance("tell", budget, {**ledger, "y": spend("in", 0)}) >= 25

    def test_a_new_turn_s_steps_have_not_come_yet(self):
        budget = {"tokens": 90, "weights": {"a": 1, "b": 1, "c": 1}}
        ledger = {f"{step}/1": spend(step, 10, budget="|monday") for step in "abc"}
        assert allowance("a", below(budget, "monday", ledger), ledger) == 60
        assert allowance("a", below(budget, "tuesday", ledger), ledger) == 20

    def test_a_step_is_known_by_its_own_name_or_that_of_the_nearest_graph_around_it(self):
        budget = {"tokens": 9, "weights": {"outer": 1, "inner": 1, "x": 1}}
        assert known_as("x", ["outer", "inner"], budget) == "x"
        assert known_as("y", ["outer", "inner"], budget) == "inner"
        assert known_as("y", ["outer", "other"], budget) == "outer"
        assert known_as("y", ["other"], budget) == known_as("y", ["inner"], {"tokens": 9}) == "y"

    def test_a_name_that_would_read_as_several_is_an_error(self):
        with pytest.raises(ValueError, match=r"'a\|b' cannot have a part"):
            branches(["a|b"], {"tokens": 9}, None, {})


class TestRisk:
    def test_a_share_is_spent_once_and_a_step_that_is_not_named_gets_none(self):
        risk = {"epsilon": 0.1, "shares": spread_risk(0.1, {"a": 1, "b": 1})}
        assert risk_of("a", risk, {}) == (0.05, False)
        assert risk_of("a", risk, {"a/1": spend("a", epsilon=0.05)}) == (0.0, False)
        assert risk_of("send the letter", risk, {}) == (0.0, False)

    def test_of_a_run_without_a_plan_falls_call_by_call(self):
        risk, ledger = {"epsilon": 0.1}, {}
        for i in range(20):
            epsilon, heuristic = risk_of("think", risk, ledger)
            assert not heuristic
            ledger[f"think/{i}"] = spend("think", epsilon=epsilon)
        given_out = [entry["epsilon"] for entry in ledger.values()]
        assert all(a > b > 0 for a, b in pairwise(given_out))
        assert sum(given_out) < 0.1

    def test_weights_are_heuristic_and_never_take_more_than_is_left(self):
        risk, ledger = {"epsilon": 0.1, "weights": {"a": 1, "b": 3}}, {}
        for step in "ab":
            epsilon, heuristic = risk_of(step, risk, ledger)
            assert heuristic
            ledger[f"{step}/1"] = spend(step, epsilon=epsilon)
        assert sum(entry["epsilon"] for entry in ledger.values()) == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("risk", "says"),
        [
            ({"epsilon": 1.0}, r"in \[0, 1\), got 1.0"),
            ({"epsilon": 0.1, "shares": {"a": 0.2}}, "at most epsilon=0.1"),
            ({"epsilon": 0.1, "shares": {"a": -0.1}}, "at least 0"),
            ({"epsilon": 0.1, "shares": {}, "weights": {}}, "not both"),
            ({"risk": 0.1}, "a dict with 'epsilon'"),
            (0.1, r"such as \{'epsilon': 0.05\}.*got 0.1"),
            ({"epsilon": "low"}, "got 'low'"),
            ({"epsilon": 0.1, "shares": {"a": float("nan")}}, "at least 0 and add up"),
            ({"epsilon": 0.1, "shares": [0.1]}, "at least 0 and add up"),
            ({"epsilon": 0.1, "weights": {"a": float("inf")}}, "finite"),
        ],
    )
    def test_a_dict_that_is_no_risk_is_an_error(self, risk, says):
        with pytest.raises(ValueError, match=says):
            check_risk(risk)


class TestTheRunSGuarantee:
    def told(self, *entries):
        return run_guarantee({"epsilon": 0.1}, {f"{e['step']}/{i}": e for i, e in enumerate(entries)})

    def test_adds_up_what_the_calls_were_promised(self):
        told = self.told(
            spend("a", epsilon=0.02, reason="confident", guarantee=promise(0.02)),
            spend("b", epsilon=0.03, reason="confident", guarantee=promise(0.03, n=300)),
            spend("c"),
        )
        assert told == {"kind": "answer_changed", "epsilon": pytest.approx(0.05), "delta": 0.1, "n": 300}

    def test_adds_the_deltas_of_different_calibrations_of_one_model_once_each(self):
        cut = {"epsilon": 0.02, "reason": "confident", "guarantee": promise(0.02)}
        entries = [{**spend(step, **cut), "calibration": name} for step, name in zip("abc", "xyx", strict=True)]
        assert self.told(*entries)["delta"] == pytest.approx(0.1)

    def test_adds_the_deltas_of_different_models(self):
        cut = {"epsilon": 0.02, "reason": "confident", "guarantee": promise(0.02)}
        assert self.told(spend("a", **cut), spend("b", **cut, model="large"))["delta"] == pytest.approx(0.1)

    @pytest.mark.parametrize("reason", ["budget", "confident", "no_thinking"])
    def test_is_none_where_a_call_was_cut_that_nothing_covers(self, reason):
        assert self.told(spend("a", reason=reason)) is None

    def test_forgives_a_cut_that_the_same_model_made_good_when_it_was_asked_again(self):
        cut, again = spend("a", reason="budget"), {"retry_of": "a/0"}
        assert self.told(cut, spend("a", **again)) is not None
        assert self.told(cut, spend("a", reason="budget", **again), spend("a", retry_of="a/1")) is not None
        assert self.told(cut, spend("a", reason="budget", **again)) is None
        assert self.told(cut, spend("a", model="large", **again)) is None

    @pytest.mark.parametrize("turn", ["", "the next"])
    def test_never_forgives_a_cut_for_another_call_of_the_same_step(self, turn):
        assert self.told(spend("routine", reason="budget"), spend("routine", turn=turn)) is None
        assert self.told(spend("routine"), spend("routine", reason="budget")) is None

    def test_is_none_where_calls_promise_different_things(self):
        one = spend("a", epsilon=0.02, reason="confident", guarantee=promise(0.02))
        two = spend("b", epsilon=0.02, reason="confident", guarantee=promise(0.02, kind="lost_correct"))
        assert self.told(one, two) is None

    def test_says_that_an_adaptive_rule_is_heuristic(self):
        cut = spend("a", epsilon=0.02, reason="confident", guarantee=promise(0.02), heuristic=True)
        assert self.told(cut)["kind"] == "heuristic"
