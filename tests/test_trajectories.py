"""Whole runs of a graph: collected with full thinking, replayed under a rule for its nodes, certified as wholes."""

import json
import re
from dataclasses import dataclass, replace

import pytest
from agents_for_tests import PLAN, PROBLEM, talker
from hypothesis import given
from hypothesis import strategies as st
from langgraph.graph import START, StateGraph
from reasoners_for_tests import tiny_reasoner
from scipy.stats import binom
from test_lynx import some_probe

from langchain_earlyexit import DEER, LYNX, AnswerConvergence, ChatEarlyExit, Check, Never, Trace
from langchain_earlyexit.graph import ReasoningState, create_plan_and_solve, reasoning_node
from langchain_earlyexit.lab.collect import read_meta, read_traces, seed_of, subjects
from langchain_earlyexit.lab.node_rules import CertifiedRule, Runs, certify_rule, rule_path
from langchain_earlyexit.lab.rule_choice import bolder_and_bolder, cheapest, judge_rules
from langchain_earlyexit.lab.trajectories import CallTrace, Trajectory, collect_runs, graph_maker, node_path, read_runs
from langchain_earlyexit.probe import mark


@dataclass(frozen=True)
class Asked:
    id: str
    question: str
    answer: str | None = "16"


def waverer(turns):
    """Guesses wrong and unsure at first, is right and surer with each paragraph, and plans PROBLEM at once."""
    [*_, (_, asked)] = turns
    if turns[0] == ("system", "Split the problem into numbered steps."):
        plan = "\n".join(f"{i}. {step}" for i, step in enumerate(PLAN, 1))
        return "A plan.\n\nOf steps.\n\nThree of them.\n", (lambda chain: (plan, 0.96))
    if found := re.fullmatch(r"What is (\d+) ([+*]) (\d+)\?", asked):
        left, sign, right = found.groups()
        result = int(left) * int(right) if sign == "*" else int(left) + int(right)
    else:
        result = int((re.findall(r"= (\d+)", asked) or ["0"])[-1])

    def said(chain):
        done = chain.count("\n\n")
        return rf"The final answer is \boxed{{{result if done > 1 else result + 1}}}.", (0.5, 0.6, 0.9, 0.97)[
            min(done, 3)
        ]

    return "A guess it is.\n\nThen a check.\n\nAnd one more check.\n\nSo it is then.\n", said


def graph_of(model):
    return create_plan_and_solve(model, max_steps=3)


QUESTIONS = [Asked("a", PROBLEM), Asked("b", f"{PROBLEM} Please.")]
SEED = 7


@pytest.fixture(scope="module")
def llm():
    with talker(waverer) as model:
        yield model


@pytest.fixture(scope="module")
def collected(llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    summary = collect_runs(llm, graph_of, QUESTIONS, out, seed=SEED, progress=False)
    assert (summary.done, summary.before, summary.refused) == (2, 0, {})
    return out


def live(llm, question, rule):
    def model(node):
        policy = rule.get(node, Never())
        return llm.bind(exit_policy=policy, seed=seed_of(SEED, question.id), look="wait")

    graph = create_plan_and_solve(model("answer"), planner=model("plan"), solver=model("step"), max_steps=3)
    return graph.invoke({"messages": [("user", question.question)]})


class TestCollecting:
    def test_a_run_is_kept_with_all_its_calls_and_its_answer(self, collected):
        for run, question in zip(sorted(read_runs(collected), key=lambda run: run.id), QUESTIONS, strict=True):
            assert (run.id, run.question, run.answer, run.gold) == (question.id, question.question, "16", "16")
            assert [call.node for call in run.calls] == ["plan", "step", "step", "step", "answer"]
            assert {call.trace.question for call in run.calls if call.node == "step"} == {
                "What is 3 * 4?", "What is 2 + 2?", "What is 12 + 4?"
            }  # fmt: skip
            assert all(call.trace.checks and call.trace.exit_tokens for call in run.calls)

    def test_each_node_has_a_collection_as_any_other(self, collected):
        assert [len(read_traces(node_path(collected, node))) for node in ("plan", "step", "answer")] == [2, 6, 2]
        meta = read_meta(node_path(collected, "step"))
        assert (meta["kinds"], meta["seed"]) == (["paragraph"], SEED)
        assert meta["binds"]["system_prompt"] == "none"
        assert read_meta(node_path(collected, "plan"))["binds"]["system_prompt"] != "none"

    def test_an_interrupted_collection_goes_on_without_the_calls_of_runs_that_never_ended(self, llm, tmp_path):
        collect_runs(llm, graph_of, QUESTIONS[:1], tmp_path, seed=SEED, progress=False)
        first = (tmp_path / "runs.jsonl").read_text()
        [plan] = read_traces(node_path(tmp_path, "plan"))
        with node_path(tmp_path, "plan").open("a") as file:
            file.write(replace(plan, question_id="b/0").to_json() + "\n")
        summary = collect_runs(llm, graph_of, QUESTIONS, tmp_path, seed=SEED, progress=False)
        assert (summary.done, summary.before) == (1, 1)
        assert (tmp_path / "runs.jsonl").read_text().startswith(first)
        assert [trace.question_id for trace in read_traces(node_path(tmp_path, "plan"))] == ["a/0", "b/0"]

    def test_going_on_in_another_way_is_refused(self, llm, collected):
        with pytest.raises(ValueError, match=r"seed: made for 7, loaded is 8.*another file"):
            collect_runs(llm, graph_of, [*QUESTIONS, Asked("c", PROBLEM)], collected, seed=8, progress=False)

    def test_a_run_that_comes_to_an_error_is_left_out_with_the_reason(self, tmp_path):
        def mute(turns):
            if "Please" in turns[-1][1]:
                raise ValueError("the prompt is too long")
            return waverer(turns)

        with talker(mute) as llm:
            summary = collect_runs(llm, graph_of, QUESTIONS, tmp_path, progress=False)
        assert (summary.done, dict(summary.refused)) == (1, {"b": "the prompt is too long"})
        assert [run.id for run in read_runs(tmp_path)] == ["a"]

    def test_a_graph_of_one_s_own_is_named_by_its_file(self, tmp_path):
        mine = tmp_path / "mine.py"
        mine.write_text("def make_graph(model):\n    return model\n")
        assert graph_maker(f"{mine}:make_graph")("a model") == "a model"
        with pytest.raises(ValueError, match="no function 'other'"):
            graph_maker(f"{mine}:other")
        with pytest.raises(ValueError, match=r"my_agent\.py:make_graph; got 'plan'"):
            graph_maker("plan")


class TestReplay:
    @pytest.mark.parametrize("threshold", [0.0, 0.55, 0.8, 0.95, 0.98])
    def test_a_rule_replays_as_the_graph_runs_live(self, llm, collected, threshold):
        rule = {"plan": DEER(0.95), "step": DEER(threshold)}
        runs = Runs.read(collected)
        for run, found in zip(runs.trajectories, runs.replay(rule), strict=True):
            [question] = [question for question in QUESTIONS if question.id == run.id]
            done = live(llm, question, rule)
            spends = done["ledger"].values()
            assert found.changed == (threshold < 0.6), "the guess is wrong, and so is the first check"
            assert found.exits == sum(spend["exit"]["exited"] for spend in spends)
            assert found.reasoning == sum(spend["reasoning"] for spend in spends)
            assert (done["messages"][-1].text == r"The final answer is \boxed{16}.") == (not found.changed)

    def test_without_a_rule_it_is_full_thinking(self, llm, collected):
        runs = Runs.read(collected)
        for found in runs.replay({}):
            spends = live(llm, QUESTIONS[0], {})["ledger"].values()
            assert (found.exits, found.changed) == (0, False)
            assert found.reasoning == sum(spend["reasoning"] for spend in spends)

    def test_what_the_runs_cannot_tell_is_refused(self, collected):
        runs = Runs.read(collected)
        with pytest.raises(ValueError, match="names the node 'solve', but the runs have answer, plan, step"):
            runs.replay({"solve": DEER()})
        with pytest.raises(ValueError, match="reads p_safe at 'step'"):
            runs.replay({"step": LYNX(0.5)})
        with pytest.raises(
            ValueError, match="looks at sentence checks of this model, but the collection of 'step' holds"
        ):
            runs.replay({"step": DEER(looks=frozenset({"sentence"}))})

    def test_runs_at_other_checks_than_a_live_policy_has_do_not_replay_it(self):
        runs = simulated([(0.9, True)], kinds=("paragraph",))
        with pytest.raises(ValueError, match=r"looks at reflection checks .* holds paragraph checks"):
            runs.replay({"step": DEER(0.5)})

    def test_a_probe_is_measured_from_the_states_that_were_kept_as_it_is_live(self, tmp_path):
        probe = some_probe("before", layers=(2 / 3, 1 / 3))
        engine = tiny_reasoner("w 1}\n\n.a", sharp=12.0)
        how = {"temperature": 1.0, "thinking_budget": 60, "max_tokens": 110, "answer_reserve": 16}

        def one_node(model):
            return (
                StateGraph(ReasoningState).add_node("think", reasoning_node(model)).add_edge(START, "think").compile()
            )

        asked = [Asked(f"q{i}", f"How many {word}?") for i, word in enumerate(["pears", "plums", "figs"])]
        plain, probed = ChatEarlyExit(engine=engine, **how), ChatEarlyExit(engine=engine, probe=probe, **how)
        collect_runs(plain, one_node, asked, tmp_path, depths=(1 / 3, 2 / 3), progress=False)
        runs = Runs.read(tmp_path, {"think": probe})
        scores = sorted(check.signals["p_safe"] for run in runs.trajectories for check in run.calls[0].trace.checks)
        middle = len(scores) // 2
        rule = {"think": LYNX((scores[middle - 1] + scores[middle]) / 2)}  # between two: rounding decides nothing
        for run, found in zip(runs.trajectories, runs.replay(rule), strict=True):
            model = probed.bind(exit_policy=rule["think"], look="wait", seed=seed_of(0, run.id))
            done = one_node(model).invoke({"messages": [("user", run.question)]})
            [spend] = done["ledger"].values()
            assert (spend["reasoning"], spend["exit"]["reason"] == "sufficient") == (found.reasoning, found.exits == 1)
        engine.close()


def simulated(scores, kinds=("reflection",), form="boxed"):
    """Runs of one call with one check each: of this confidence, and right early or not."""
    runs = []
    for i, (score, same) in enumerate(scores):
        check = Check(10, "wait", {"trial_confidence": score}, exit_answer="1" if same else "2")
        counts = {"thinking_tokens": 30, "answer_tokens": 4, "forced_tokens": 0, "reason": "natural"}
        per_check = {"trial_tokens": (5,), "exit_tokens": (6,), "read_tokens": (11,)}
        trace = Trace((check,), question_id=f"{i}/0", question="?", answer="1", **counts, **per_check)
        runs.append(Trajectory(str(i), "?", "1", None, (CallTrace("step", trace),)))
    binds = {"engine": "e", "cues": json.dumps({"words": ["wait"]})}
    meta = {"form": form, "kinds": list(kinds), "signals": ["trial_confidence"], "binds": binds}
    return Runs(tuple(runs), {"step": {**meta, "closing": {"full": 2, "bare": 1}}})


class TestCertifying:
    def test_the_boldest_rule_before_the_first_that_fails_is_certified(self):
        runs = simulated([(0.9, True)] * 100 + [(0.7, True)] * 95 + [(0.7, False)] * 5 + [(0.4, False)] * 100)
        path = [{}, {"step": DEER(0.8)}, {"step": DEER(0.6)}, {"step": DEER(0.3)}, {"step": DEER(0.95)}]
        found = certify_rule(runs, path, 0.05, 0.1)
        assert (found.rule, found.changed, found.settings) == ({"step": DEER(0.6)}, 5, (5, 2))
        assert binom.cdf(5, 300, 0.05) <= 0.1 < binom.cdf(105, 300, 0.05)
        assert 5 / 300 < found.bound < 0.05

    def test_where_the_first_that_leaves_fails_nothing_may_leave(self):
        runs = simulated([(0.9, False)] * 50)
        found = certify_rule(runs, rule_path({"step": DEER()}), 0.1)
        assert found.changed == 0
        assert not any(run.exits for run in runs.replay(found.rule))
        assert found.settings[1] < found.settings[0] - 1, "bolder ones were tried"

    def test_of_turns_with_tools_nothing_is_certified_and_the_forms_that_can_be_are_named(self):
        runs = simulated([(0.9, True)] * 50, form="tool_call")
        with pytest.raises(ValueError, match=r"'tool_call' cannot be compared.* compared are boxed, choice, text"):
            certify_rule(runs, rule_path({"step": DEER()}), 0.1)

    def test_too_few_runs_are_refused_with_how_many_it_takes(self):
        with pytest.raises(ValueError, match=r"21 runs cannot certify epsilon=0\.1 at delta=0\.1: .* at least 22"):
            certify_rule(simulated([(0.9, True)] * 21), rule_path({"step": DEER()}), 0.1)

    def test_a_path_must_begin_with_full_thinking(self):
        with pytest.raises(ValueError, match="never leaves"):
            certify_rule(simulated([(0.9, True)] * 50), [{"step": DEER(0.5)}], 0.1)

    def test_a_probe_of_a_later_step_knows_the_runs_it_learned_from(self, collected):
        path = node_path(collected, "step")
        assert set(subjects(path, read_traces(path)).values()) == {question.question for question in QUESTIONS}

    def test_runs_on_questions_that_the_probe_has_learned_from_are_refused(self):
        runs = simulated([(0.9, True)] * 50)
        meta = {**runs.metas["step"], "signals": ["p_safe"], "learned": [mark("?")]}
        with pytest.raises(ValueError, match="has learned from 1 of these questions"):
            certify_rule(replace(runs, metas={"step": meta}), rule_path({"step": LYNX()}), 0.1)

    def test_a_node_that_no_run_comes_to_is_named(self):
        with pytest.raises(ValueError, match="names the node 'solve', but the runs have step"):
            certify_rule(simulated([(0.9, True)] * 50), rule_path({"solve": DEER()}), 0.1)

    def test_a_rule_s_policy_is_handed_out_for_the_model_it_was_certified_on_and_no_other(self, collected, llm):
        binds = {"step": read_meta(node_path(collected, "step"))["binds"]}
        rule = CertifiedRule({"step": DEER(0.8)}, 0.1, 0.1, 50, 0, (2, 1), binds)
        assert rule.policy("step", llm) == DEER(0.8)
        assert rule.policy("plan", llm) == Never(), "a node it does not name thinks to the end"
        other = replace(rule, binds={"step": {**binds["step"], "weights": "others"}})
        with pytest.raises(ValueError, match=r"rule for 'step' was made for .*weights: made for others, loaded is"):
            other.policy("step", llm)

    def test_a_certificate_survives_a_file(self, tmp_path):
        found = certify_rule(simulated([(0.9, True)] * 50), [{}, {"step": AnswerConvergence(2)}], 0.1)
        found.save(tmp_path / "rule.json")
        assert CertifiedRule.load(tmp_path / "rule.json") == found
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match="no earlyexit-node-rule"):
            CertifiedRule.load(tmp_path / "other.json")


class TestChoosing:
    def right(self, node, trace, answer):
        return answer == "1"

    @given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=8))
    def test_every_rule_is_judged_as_it_replays_and_the_path_grows_bolder(self, scores):
        runs = simulated(scores)
        judged = judge_rules(runs, {"step": [DEER(t) for t in (0.9, 0.5, 0.0)]}, self.right)
        for one in judged:
            found = runs.replay(one.rule)
            assert one.tokens == pytest.approx(sum(run.reasoning for run in found) / len(found))
            assert one.changed == pytest.approx(sum(run.changed for run in found) / len(found))
        path = bolder_and_bolder(judged)
        assert path[0] == {}
        changed = [sum(run.changed for run in runs.replay(rule)) for rule in path]
        tokens = [sum(run.reasoning for run in runs.replay(rule)) for rule in path]
        assert changed == sorted(changed)
        assert tokens == sorted(tokens, reverse=True)

    def test_the_cheapest_rule_that_loses_no_more_than_is_tolerated_is_chosen(self):
        runs = simulated([(0.9, True)] * 9 + [(0.4, False)])
        judged = judge_rules(runs, {"step": [DEER(0.6), DEER(0.2)]}, self.right)
        assert cheapest(judged, 0.05).rule == {"step": DEER(0.6)}
        assert judged[-1].error == pytest.approx(0.3 / 10**0.5)
        assert cheapest(judged, 0.1).rule == {"step": DEER(0.6)}, "lost just that, but might lose more elsewhere"
        assert cheapest(judged, 0.2).rule == {"step": DEER(0.2)}
