"""Live runs: they pair with collections, replays give their very counts, and they go on where they were stopped."""

import json
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
from reasoners_for_tests import tiny_reasoner
from test_lynx import some_probe

from langchain_earlyexit import ChatEarlyExit
from langchain_earlyexit.beside import probe_beside
from langchain_earlyexit.engines.function import FunctionEngine, byte_tokenizer
from langchain_earlyexit.lab.collect import collect
from langchain_earlyexit.lab.live import DRAFT_PROMPT, FULL, NO_THINKING, Arm, answer, arm_of, capped, read_live
from langchain_earlyexit.lab.replays import Collection, agreement
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.policies import (
    DEER,
    EAT,
    LYNX,
    AnswerConvergence,
    CoDEStop,
    FirstOf,
    GiveUp,
    ProbeThenTrial,
    ThinkBrake,
)


@dataclass(frozen=True)
class Asked:
    id: str
    question: str
    answer: str | None = "1"


WORDS = ["pears", "plums", "figs", "nuts", "dates", "limes", "beans", "leeks"]
QUESTIONS = [Asked(f"q{i}", f"How many {word}?") for i, word in enumerate(WORDS)]
HOW = {"temperature": 1.0, "thinking_budget": 150, "max_tokens": 300, "answer_reserve": 16, "answer_form": "boxed"}


def babbler():
    """A model that writes what a checksum of the last tokens says: mostly full stops, blank lines, ones and braces."""
    tokenizer = byte_tokenizer()
    lean = np.zeros(len(tokenizer), dtype=np.float32)
    lean[tokenizer("w12}. \n\n", add_special_tokens=False)["input_ids"]] = 4.5
    lean[[0, 1, 3]] = -50.0  # no padding, no turn and no thinking begins
    lean[[2, 4]] = 1.8  # turns and thinking end now and then
    lean[tokenizer("\n", add_special_tokens=False)["input_ids"]] = 6.5

    def logits(ids):
        noise = np.random.default_rng(zlib.crc32(bytes(i % 256 for i in ids[-6:])))
        return lean + noise.normal(0, 1.5, len(lean)).astype(np.float32)

    return FunctionEngine(logits, tokenizer)


@pytest.fixture(scope="module")
def llm():
    made = babbler()
    yield ChatEarlyExit(engine=made, **HOW)
    made.close()


class TestReplayGivesTheCountsOfALiveRun:
    @pytest.mark.parametrize("look", ["parallel", "wait"])
    @pytest.mark.parametrize("kind", ["paragraph", "sentence", "interval"])
    def test_for_every_policy_at_the_kind_of_check_it_looks_at(self, llm, tmp_path, look, kind):
        out = tmp_path / "traces.jsonl"
        collect(llm, QUESTIONS, out, kinds=(kind,), depths=(), seed=3, progress=False)
        test = Collection.read(out, look)
        policies = [
            *(DEER(t, looks={kind}) for t in (0.1, 0.3, 1.0)),
            CoDEStop(0.3, 0.4, 2, 0.55, 2.0, looks={kind}),
            AnswerConvergence(2, looks={kind}),
            EAT(0.5, 0.5, 2, looks={kind}),
            ThinkBrake(1.5, looks={kind}),
            FirstOf(EAT(0.01, 0.5, 3, looks={kind}), DEER(0.25, looks={kind})),
        ]
        reasons = set()
        for number, policy in enumerate(policies):
            arm = Arm("arm", policy, budget=HOW["thinking_budget"])
            run = answer(llm, QUESTIONS, arm, tmp_path / f"{number}.jsonl", seed=3, progress=False, look=look)
            assert agreement(run.outcomes, test.run(policy)) == (len(QUESTIONS), len(QUESTIONS)), policy
            reasons |= {outcome.reason for outcome in run.outcomes}
        assert len(reasons) >= 4

    def test_for_a_probe(self, tmp_path):
        short = {**HOW, "thinking_budget": 90, "max_tokens": 190}
        with ChatEarlyExit(engine=tiny_reasoner("w 1}\n\n.a"), probe=some_probe(), **short) as model:
            collect(model, QUESTIONS[:3], tmp_path / "traces.jsonl", depths=(), progress=False)
            test = Collection.read(tmp_path / "traces.jsonl")
            reasons = set()
            for threshold in (0.0, 0.2, 0.3, 0.6, 1.0):
                arm, out = Arm("arm", LYNX(threshold), budget=90), tmp_path / f"{threshold}.jsonl"
                run = answer(model, QUESTIONS[:3], arm, out, progress=False)
                assert agreement(run.outcomes, test.run(LYNX(threshold))) == (3, 3)
                reasons |= {(outcome.trial_tokens, outcome.reason) for outcome in run.outcomes}
        assert (0, "sufficient") in reasons

    @pytest.mark.parametrize("look", ["parallel", "wait"])
    def test_for_a_probe_that_asks_for_a_trial_where_it_is_not_sure(self, tmp_path, look):
        short = {**HOW, "thinking_budget": 90, "max_tokens": 190}
        with ChatEarlyExit(engine=tiny_reasoner("w 1}\n\n.a"), probe=some_probe(), **short) as model:
            collect(model, QUESTIONS[:3], tmp_path / "traces.jsonl", depths=(), progress=False)
            test = Collection.read(tmp_path / "traces.jsonl", look)
            ended = set()
            for number, fields in enumerate(((0.0, 0.0, 1), (0.57, 0.5, 1), (1, 1, 1), (1, 0.2, 1))):
                policy = ProbeThenTrial(*fields)
                out = tmp_path / f"{number}.jsonl"
                run = answer(model, QUESTIONS[:3], Arm("arm", policy, budget=90), out, progress=False, look=look)
                assert agreement(run.outcomes, test.run(policy)) == (3, 3), policy
                ended |= {(outcome.reason, outcome.trial_tokens > 0) for outcome in run.outcomes}
        assert {("sufficient", False), ("budget", True), ("budget", False)} <= ended

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["paragraph", "sentence", "interval"])
    def test_for_every_policy_at_five_settings_or_more(self, llm, tmp_path, kind):
        out = tmp_path / "traces.jsonl"
        collect(llm, QUESTIONS, out, kinds=(kind,), depths=(), seed=3, progress=False)
        test = Collection.read(out)
        at = {"looks": {kind}}
        settings = {
            "DEER": [DEER(t, **at) for t in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)],
            "CoDEStop": [CoDEStop(r, r + 0.1, 2, 0.55, tau, **at) for r in (0.2, 0.4, 0.7) for tau in (1.0, 4.0)],
            "EAT": [EAT(t, 0.5, 2, **at) for t in (1e-4, 0.01, 0.1, 0.5, 1.0, 5.0)],
            "ThinkBrake": [ThinkBrake(margin, **at) for margin in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)],
            "AnswerConvergence": [AnswerConvergence(k, **at) for k in (2, 3, 4, 5, 8)],
            "GiveUp": [GiveUp(t, 1 + n % 3, 2, **at) for n, t in enumerate((0.05, 0.1, 0.2, 0.3, 0.5, 1.0))],
            "FirstOf": [FirstOf(DEER(t, **at), GiveUp(t / 2, 2, 2, **at)) for t in (0.1, 0.2, 0.3, 0.5, 0.9)],
        }
        for name, policies in settings.items():
            left = set()
            for number, policy in enumerate(policies):
                arm = Arm("arm", policy, budget=HOW["thinking_budget"])
                run = answer(llm, QUESTIONS, arm, tmp_path / f"{name}-{number}.jsonl", seed=3, progress=False)
                assert agreement(run.outcomes, test.run(policy)) == (len(QUESTIONS), len(QUESTIONS)), policy
                left.add(tuple(outcome.thinking_tokens for outcome in run.outcomes))
            assert len(left) > 1, name  # the settings are not all one

    def test_on_the_bundled_model(self, pocket, tmp_path):
        problems = [Asked(f"p{i}", p.question, p.answer) for i, p in enumerate(sample("dev", 12, 5))]
        with ChatEarlyExit(model=pocket, probe=probe_beside("pocket"), thinking_budget=120) as model:
            collect(model, problems, tmp_path / "traces.jsonl", depths=(), progress=False)
            test = Collection.read(tmp_path / "traces.jsonl")
            left = set()
            for policy in (DEER(0.7), DEER(0.99), CoDEStop(tau=1.0), ProbeThenTrial(sure=0.99, ask=0.3, threshold=0.9)):
                arm = Arm("arm", policy, budget=120)
                run = answer(model, problems, arm, tmp_path / f"{policy}.jsonl", progress=False)
                assert agreement(run.outcomes, test.run(policy)) == (12, 12)
                left |= {outcome.thinking_tokens for outcome in run.outcomes}
        assert len(left) > 6
        assert {"sufficient", "confident"} <= {outcome.reason for outcome in run.outcomes}


class TestRuns:
    def test_a_budget_caps_the_thinking_and_none_is_none(self, llm, tmp_path):
        run = answer(llm, QUESTIONS, capped(20), tmp_path / "20.jsonl", seed=3, progress=False)
        assert max(outcome.thinking_tokens for outcome in run.outcomes) == 20
        none = answer(llm, QUESTIONS, NO_THINKING, tmp_path / "0.jsonl", seed=3, progress=False)
        assert {(outcome.thinking_tokens, outcome.reason) for outcome in none.outcomes} == {(0, "no_thinking")}
        assert (none.budget, run.budget) == (0, 20)

    def test_it_goes_on_where_it_was_stopped_and_says_the_same(self, llm, tmp_path):
        whole = answer(llm, QUESTIONS, capped(40), tmp_path / "whole.jsonl", seed=3, progress=False)
        out = tmp_path / "parts.jsonl"
        answer(llm, QUESTIONS[:2], capped(40), out, seed=3, progress=False)
        with out.open("a") as file:
            file.write('{"question_id": "q3", "ans')  # a crash in the middle of a line
        again = answer(llm, QUESTIONS, capped(40), out, seed=3, progress=False)
        assert sorted(again.outcomes, key=lambda o: o.question_id) == sorted(
            whole.outcomes, key=lambda o: o.question_id
        )
        assert read_live(out) == again
        assert json.loads(out.with_suffix(".meta.json").read_text())["timed"] == len(QUESTIONS)

    def test_a_question_without_room_is_left_out(self, tmp_path, capsys):
        engine = babbler()
        narrow = ChatEarlyExit(engine=engine, **{**HOW, "max_tokens": None})
        narrow.load()
        engine.context_length = 400
        run = answer(narrow, [Asked("long", "why " * 300), *QUESTIONS[:2]], capped(20), tmp_path / "run.jsonl")
        engine.close()
        assert {outcome.question_id for outcome in run.outcomes} == {"q0", "q1"}
        assert "long is left out: the prompt has" in capsys.readouterr().err

    def test_a_file_of_another_arm_or_seed_is_refused(self, llm, tmp_path):
        out = tmp_path / "run.jsonl"
        answer(llm, QUESTIONS[:1], capped(40), out, seed=3, progress=False)
        with pytest.raises(ValueError, match=r"policy: made for thinking_budget=40, loaded is thinking_budget=20"):
            answer(llm, QUESTIONS, capped(20), out, seed=3, progress=False)
        with pytest.raises(ValueError, match="seed: made for 3, loaded is 4"):
            answer(llm, QUESTIONS, capped(40), out, seed=4, progress=False)

    def test_a_collection_is_no_live_run(self, llm, tmp_path):
        collect(llm, QUESTIONS[:1], tmp_path / "traces.jsonl", depths=(), progress=False)
        with pytest.raises(ValueError, match="is not of a live run"):
            read_live(tmp_path / "traces.jsonl")

    def test_a_collection_that_took_trial_answers_is_refused(self, llm, tmp_path):
        out = tmp_path / "reused.jsonl"
        collect(llm, QUESTIONS[:1], out, depths=(), progress=False, reuse_trial_answer=True)
        with pytest.raises(ValueError, match="reuse_trial_answer, which replay cannot price"):
            Collection.read(out)


class TestArms:
    def test_settings_name_their_arm(self):
        assert arm_of() == FULL
        assert arm_of(budget=0) == NO_THINKING
        assert arm_of(budget=64) == capped(64)
        assert arm_of(DEER(0.9)) == Arm("DEER(threshold=0.9)", DEER(0.9))
        assert arm_of(DEER(0.9), budget=64).name == "DEER(threshold=0.9), budget of 64"

    def test_a_draft_is_a_system_prompt_alone_or_with_a_policy(self):
        assert arm_of(draft=True) == replace(FULL, name="Chain-of-Draft", system=DRAFT_PROMPT)
        assert arm_of(CoDEStop(), draft=True).policy == CoDEStop()
        assert "system prompt" in arm_of(CoDEStop(), draft=True).told

    def test_the_prompt_reaches_the_model(self, llm, tmp_path):
        plain = answer(llm, QUESTIONS[:2], FULL, tmp_path / "plain.jsonl", progress=False)
        draft = answer(llm, QUESTIONS[:2], arm_of(draft=True), tmp_path / "draft.jsonl", progress=False)
        assert plain.outcomes != draft.outcomes
