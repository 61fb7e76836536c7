"""What is collected is what the model would do live, exit by exit."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
from reasoners_for_tests import tiny_reasoner
from test_lynx import some_probe

from langchain_earlyexit import BOXED, DEER, TEXT, ChatEarlyExit, FirstOf, replay
from langchain_earlyexit.lab.collect import collect, read_meta, read_states, read_traces, seed_of
from langchain_earlyexit.lab.datasets import Question
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.policies import EAT, LYNX, AnswerConvergence, CoDEStop
from langchain_earlyexit.probe import POSITIONS


@dataclass(frozen=True)
class Asked:
    id: str
    question: str
    answer: str | None = "1"


QUESTIONS = [Asked(f"q{i}", f"How many {word}?") for i, word in enumerate(["pears", "plums", "figs", "nuts", "dates"])]
SEED = 4
HOW = {"temperature": 1.0, "thinking_budget": 110, "max_tokens": 170, "answer_reserve": 16}


@pytest.fixture(scope="module")
def engine():
    made = tiny_reasoner("w 1}\n\n.a", sharp=12.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def llm(engine):
    return ChatEarlyExit(engine=engine, **HOW)


@pytest.fixture(scope="module")
def collected(llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected") / "traces.jsonl"
    summary = collect(llm, QUESTIONS, out, depths=(1 / 3, 2 / 3, 1.0), seed=SEED, progress=False)
    assert (summary.done, summary.before, summary.refused) == (len(QUESTIONS), 0, {})
    return out


def live(llm, traces, policy, **settings):
    """Each question again, one call each, with the policy at work and the trace's seed."""

    def one(trace):
        return llm.invoke(trace.question, exit_policy=policy, seed=trace.seed, include_checks=True, **settings)

    with ThreadPoolExecutor(len(traces)) as threads:
        return list(threads.map(one, traces))


def agrees(message, trace, policy, form):
    """The live call left where the replay leaves, and said what was collected there. Returns where."""
    at = replay(policy, trace)
    record = message.response_metadata["early_exit"]
    if at is None:
        assert record["reason"] in {"natural", "budget", "length"}
        assert form.extract(message.text) == trace.answer
        return at
    check = trace.checks[at]
    assert record["exited"]
    assert record["thinking_tokens"] == check.position
    assert record["checks"] == at + 1
    assert form.extract(message.text) == check.exit_answer
    assert record["forced_tokens"] + record["answer_tokens"] == trace.exit_tokens[at]
    return at


class TestLiveAgreesWithTheCollection:
    def test_at_every_threshold_of_deer_and_for_other_policies(self, llm, collected):
        traces = read_traces(collected)
        exits = set()
        policies = [DEER(t) for t in (0.0, 0.205, 0.212, 0.2155, 0.218, 1.0)] + [
            CoDEStop(0.212, 0.218, 2, 0.55, 2.0),
            AnswerConvergence(2),
            EAT(0.002, 0.5, 2),
            FirstOf(DEER(0.218), EAT(0.005, 0.5, 3)),
        ]
        for policy in policies:
            for message, trace in zip(live(llm, traces, policy), traces, strict=True):
                exits.add(agrees(message, trace, policy, TEXT))
        assert len(exits) > 3

    def test_where_trial_answers_are_taken_as_answers(self, llm, tmp_path):
        out = tmp_path / "reused.jsonl"
        collect(llm, QUESTIONS, out, depths=(), seed=SEED, progress=False, reuse_trial_answer=True)
        traces = read_traces(out)
        exits = [
            agrees(message, trace, DEER(0.0), TEXT)
            for message, trace in zip(live(llm, traces, DEER(0.0), reuse_trial_answer=True), traces, strict=True)
        ]
        assert any(at is not None for at in exits)
        assert all(check.exit_answer == check.answer for trace in traces for check in trace.checks)

    def test_and_the_full_answer_is_that_of_a_plain_call(self, llm, collected):
        for trace in read_traces(collected):
            message = llm.invoke(trace.question, seed=trace.seed)
            assert TEXT.extract(message.text) == trace.answer
            assert message.response_metadata["early_exit"]["thinking_tokens"] == trace.thinking_tokens

    def test_on_the_bundled_model(self, pocket, tmp_path):
        problems = [Asked(f"p{i}", p.question, p.answer) for i, p in enumerate(sample("dev", 3, 5))]
        out = tmp_path / "pocket.jsonl"
        with ChatEarlyExit(model=pocket) as model:
            collect(model, problems, out, depths=(), progress=False)
            traces = read_traces(out)
            exits = set()
            for threshold in (0.3, 0.6, 0.9, 0.99, 1.0):
                for message, trace in zip(live(model, traces, DEER(threshold)), traces, strict=True):
                    exits.add(agrees(message, trace, DEER(threshold), BOXED))
        assert len(exits) > 1
        assert {trace.gold for trace in traces} == {problem.answer for problem in problems}


class TestWhatIsWritten:
    def test_every_signal_is_measured_at_every_check_and_every_check_is_answered(self, collected):
        traces = read_traces(collected)
        assert sum(len(trace.checks) for trace in traces) > 10
        for trace in traces:
            assert len(trace.exit_tokens) == len(trace.trial_tokens) == len(trace.checks)
            for check in trace.checks:
                assert set(check.signals) == {"trial_confidence", "end_margin", "end_entropy"}
                assert check.exit_answer
            assert (trace.question_id, trace.seed) == (trace.question_id, seed_of(SEED, trace.question_id))

    def test_states_come_with_the_ids_of_their_questions(self, collected):
        states = read_states(collected)
        for trace in read_traces(collected):
            if trace.checks:
                assert states[trace.question_id].shape == (len(trace.checks), len(POSITIONS), 3, 32)
                assert states[trace.question_id].dtype == np.float32

    def test_states_are_what_a_live_probe_reads(self, engine, tmp_path):
        probe = some_probe("before", layers=(2 / 3, 1 / 3))
        probed = ChatEarlyExit(engine=engine, probe=probe, **HOW)
        out = tmp_path / "probed.jsonl"
        collect(probed, QUESTIONS[:3], out, depths=(1 / 3, 2 / 3), progress=False)
        states = read_states(out)
        traces = read_traces(out)
        for trace in traces:
            for i, check in enumerate(trace.checks):
                read = states[trace.question_id][i, POSITIONS.index("before")][[1, 0]]
                assert check.signals["p_safe"] == pytest.approx(probe.p_safe(read), abs=1e-5)
        for message, trace in zip(live(probed, traces, LYNX(0.5)), traces, strict=True):
            agrees(message, trace, LYNX(0.5), TEXT)

    def test_it_says_how_it_was_made(self, collected, llm):
        meta = read_meta(collected)
        assert meta["binds"].items() >= llm.load().fingerprint.items()
        assert json.loads(meta["binds"]["sampling"])["temperature"] == 1.0
        assert (meta["form"], meta["kinds"], meta["depths"]) == ("text", ["paragraph"], [1 / 3, 2 / 3, 1.0])

    def test_other_kinds_of_checks_are_collected_where_asked_for(self, llm, tmp_path):
        out = tmp_path / "intervals.jsonl"
        collect(llm, QUESTIONS, out, kinds={"interval"}, depths=(), seed=SEED, progress=False)
        assert {check.kind for trace in read_traces(out) for check in trace.checks} == {"interval"}


class TestResuming:
    def test_what_is_there_is_not_asked_again_and_the_whole_is_the_same(self, llm, collected, tmp_path):
        out = tmp_path / "again.jsonl"
        how = {"depths": (1 / 3, 2 / 3, 1.0), "seed": SEED, "progress": False}
        collect(llm, QUESTIONS[:2], out, at_once=1, **how)
        first = out.read_text()
        with out.open("a") as file:
            file.write('{"checks": [')  # as a crash leaves it
        summary = collect(llm, QUESTIONS, out, **how)
        assert (summary.done, summary.before) == (len(QUESTIONS) - 2, 2)
        assert out.read_text().startswith(first)

        def facts(path):
            return {
                trace.question_id: (trace.answer, trace.seed, [(c.position, c.exit_answer) for c in trace.checks])
                for trace in read_traces(path)
            }

        assert facts(out) == facts(collected)
        ours, theirs = read_states(out), read_states(collected)
        assert ours.keys() == theirs.keys()
        assert all(np.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
        assert collect(llm, QUESTIONS, out, **how).done == 0

    def test_going_on_with_other_settings_is_refused_with_both_sides(self, llm, collected):
        more = [*QUESTIONS, Asked("new", "And how many grapes?")]
        with pytest.raises(ValueError, match=r'"temperature": 1.0.*"temperature": 0.5.*into another file'):
            collect(llm, more, collected, depths=(1 / 3, 2 / 3, 1.0), seed=SEED, temperature=0.5, progress=False)
        with pytest.raises(ValueError, match="seed: made for 4, loaded is 5"):
            collect(llm, more, collected, depths=(1 / 3, 2 / 3, 1.0), seed=5, progress=False)

    def test_a_finished_collection_asked_for_in_another_way_is_refused_too(self, llm, collected):
        with pytest.raises(ValueError, match="seed: made for 4, loaded is 5"):
            collect(llm, QUESTIONS, collected, depths=(1 / 3, 2 / 3, 1.0), seed=5, progress=False)

    def test_a_question_that_fails_takes_none_of_the_finished_ones_with_it(self, tmp_path):
        engine = tiny_reasoner("w 1}\n\n.a", sharp=12.0)
        inner, passes = engine._model.forward, []

        def forward(rows):
            passes.append(len(rows))
            if len(passes) > 600:
                raise RuntimeError("out of power")
            return inner(rows)

        engine._model.forward = forward
        out = tmp_path / "cut.jsonl"
        try:
            with pytest.raises(RuntimeError, match="out of power"):
                collect(ChatEarlyExit(engine=engine, **HOW), QUESTIONS, out, depths=(), at_once=1, progress=False)
        finally:
            engine.close()
        assert 0 < len(read_traces(out)) < len(QUESTIONS)


class TestWhatIsRefused:
    def test_a_question_without_room_is_left_out_and_named(self, engine, tmp_path):
        narrow = ChatEarlyExit(engine=engine, **HOW)
        narrow.load()
        engine.context_length = 600
        try:
            long = Asked("long", "why " * 300)
            summary = collect(narrow, [*QUESTIONS[:2], long], tmp_path / "x.jsonl", depths=(), progress=False)
        finally:
            engine.context_length = 4096
        assert summary.done == 2
        assert "context holds 600" in summary.refused["long"]

    def test_one_that_is_left_out_does_not_stand_in_the_way_of_the_others_or_of_going_on(self, engine, tmp_path):
        narrow = ChatEarlyExit(engine=engine, **HOW)
        narrow.load()
        engine.context_length = 600
        long, out = Asked("long", "why " * 300), tmp_path / "x.jsonl"
        try:
            for before, questions in ((0, QUESTIONS[:1]), (1, QUESTIONS[:2]), (2, QUESTIONS[:2])):
                summary = collect(narrow, [long, *questions], out, depths=(), progress=False)
                assert (summary.before, [*summary.refused]) == (before, ["long"])
            with pytest.raises(ValueError, match="context holds 600"):
                collect(narrow, [long], tmp_path / "y.jsonl", depths=(), progress=False)
        finally:
            engine.context_length = 4096
        assert len(read_traces(out)) == 2

    def test_what_an_engine_cannot_tell_is_not_measured(self, llm, engine, tmp_path):
        engine.lacks = {"end_entropy": "it tells a few log-probabilities only"}
        try:
            collect(llm, QUESTIONS[:1], tmp_path / "x.jsonl", depths=(), progress=False)
            with pytest.raises(ValueError, match="end_entropy cannot be measured here, but"):
                collect(llm, QUESTIONS[:1], tmp_path / "y.jsonl", signals=["end_entropy"], progress=False)
        finally:
            del engine.lacks
        assert "end_entropy" not in read_meta(tmp_path / "x.jsonl")["signals"]

    def test_the_form_that_a_question_says_is_that_of_its_answer(self, engine, tmp_path):
        free = ChatEarlyExit(engine=engine, **{**HOW, "answer_form": "auto"})
        for form in ("boxed", "text"):
            asked = [Question(f"q{i}", f"How many {i}?", None, form, "mine") for i in range(2)]
            collect(free, asked, tmp_path / f"{form}.jsonl", depths=(), progress=False)
            assert read_meta(tmp_path / f"{form}.jsonl")["form"] == form
        mixed = [Question("a", "How?", None, "boxed", "mine"), Question("b", "Why?", None, "text", "mine")]
        summary = collect(free, mixed, tmp_path / "mixed.jsonl", depths=(), progress=False)
        assert "its answer form is text, but that of this collection is boxed" in summary.refused["b"]

    def test_two_questions_with_one_id(self, llm, tmp_path):
        with pytest.raises(ValueError, match="two questions have the id 'q0'"):
            collect(llm, [QUESTIONS[0], replace(QUESTIONS[1], id="q0")], tmp_path / "x.jsonl")

    def test_a_file_of_another_name(self, llm, tmp_path):
        with pytest.raises(ValueError, match=r"ending in \.jsonl"):
            collect(llm, QUESTIONS, tmp_path / "x.json")

    def test_a_call_that_does_not_think(self, llm, tmp_path):
        with pytest.raises(ValueError, match="does not think"):
            collect(llm, QUESTIONS, tmp_path / "x.jsonl", thinking_budget=0)
