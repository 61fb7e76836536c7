"""`calibration=`, `confidence=`, `audit_rate=` and efforts on a chat model: what runs, and what is promised."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
from blockbuster import blockbuster_ctx
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage
from reasoners_for_tests import tiny_reasoner

from langchain_earlyexit import DEER, TEXT, ChatEarlyExit, FunctionEngine, Never, loading, replay
from langchain_earlyexit.asks import FREE, Asks
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.guarantee import Calibration, Level, Setting, with_policy
from langchain_earlyexit.lab.certify import certify
from langchain_earlyexit.lab.collect import collect, read_traces
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.policies import LYNX
from langchain_earlyexit.promises import Promises

BYTES = byte_tokenizer()
CHAIN = "First 40 + 1.\n\nNo, it is 40 + 2, so 42.\n\nChecked: it is 42. Done.\n"
QUESTION = "What is 40 + 2?"
ASKED = [HumanMessage(QUESTION)]
PATH = (Setting(Never(), 0, 0), Setting(DEER(0.99), 40, 1), Setting(DEER(0.85), 90, 9))
LEVELS = (Level(0.02, PATH[0], 1.0), Level(0.05, PATH[1], 0.2), Level(0.1, PATH[2], 0.25))


@dataclass(frozen=True)
class Asked:
    id: str
    question: str
    answer: str | None = None


@pytest.fixture(autouse=True)
def audits(tmp_path, monkeypatch):
    monkeypatch.setenv("EARLYEXIT_AUDITS", str(tmp_path / "audits"))
    return tmp_path / "audits"


def engine(sure=0.9, early="41", chain=CHAIN):
    """It answers 42 once it has thought so, `early` before, and is `sure` of every token of an answer."""

    def answer(done):
        return f"The final answer is \\boxed{{{'42' if '42' in done else early}}}.", sure

    return FunctionEngine(scripted(BYTES, chain, answer), BYTES)


def chat(calibration=None, **settings):
    given = {"engine": engine(), "answer_form": "boxed", "seed": 7, "max_tokens": 400}
    return ChatEarlyExit(calibration=calibration, **{**given, **settings})


def calibrated(llm, messages=None, path=PATH, levels=LEVELS, asks=FREE, **changes):
    """A calibration for calls like this one."""
    bound, settings = llm.load(), llm.call_settings(exit_policy="never")
    messages = messages or ASKED
    actual = bound.call_fingerprint(messages, settings, bound.request(messages, settings, asks), asks)
    made = Calibration("answer_changed", 0.1, 200, path, levels, with_policy(actual, path[-1].policy))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def artifact():
    return calibrated(chat())


@pytest.fixture
def endless():
    """A calibrated model whose thinking takes longer than any reader lets it."""
    how = {"engine": engine(chain=CHAIN + "So it goes. " * 400), "max_tokens": None}
    return chat(calibrated(chat(**how)), **how)


def record(message):
    return message.response_metadata["early_exit"]


def audit(message):
    return message.response_metadata.get("early_exit_audit")


class TestConfidence:
    @pytest.mark.parametrize(
        ("asked", "policy", "reason", "epsilon"),
        [
            (0.9, "DEER(threshold=0.85)", "confident", 0.1),
            (0.93, "DEER(threshold=0.99)", "natural", 0.05),
            (0.97, "Never()", "natural", 0.02),
        ],
    )
    def test_runs_the_policy_of_the_next_stricter_level_and_the_record_tells_the_promise(
        self, artifact, asked, policy, reason, epsilon
    ):
        told = record(chat(artifact).invoke(QUESTION, confidence=asked))
        assert (told["policy"], told["reason"], told["confidence"]) == (policy, reason, asked)
        assert told["guarantee"] == {"kind": "answer_changed", "epsilon": epsilon, "delta": 0.1, "n": 200}

    def test_is_a_setting_of_the_model_too(self, artifact):
        assert record(chat(artifact, confidence=0.9).invoke(QUESTION))["confidence"] == 0.9

    def test_beyond_what_was_certified_is_refused_with_what_there_is(self, artifact):
        with pytest.raises(ValueError, match=r"confidence=0\.99 asks for more .*0\.98, 0\.95, 0\.9.*calibrate again"):
            chat(artifact).invoke(QUESTION, confidence=0.99)

    @pytest.mark.parametrize("asked", [0.0, 1.0, 1.5])
    def test_outside_the_open_unit_interval_is_refused(self, artifact, asked):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            chat(artifact, confidence=asked)

    def test_without_a_calibration_is_refused_with_the_way_to_one(self):
        for refused in (lambda: chat(confidence=0.9), lambda: chat().invoke(QUESTION, confidence=0.9)):
            with pytest.raises(ValueError, match=r"needs a calibration .* `earlyexit calibrate`"):
                refused()
        with pytest.raises(ValueError, match=r"audit_rate=0\.1 audits what a calibration promises, and none is given"):
            chat(audit_rate=0.1)

    def test_and_a_policy_together_are_refused(self, artifact):
        with pytest.raises(ValueError, match=r"exit_policy=DEER.* and confidence=0\.9 both tell when to leave"):
            chat(artifact, exit_policy="deer", confidence=0.9)
        with pytest.raises(ValueError, match=r"exit_policy=DEER.* and confidence=0\.9 both tell when to leave"):
            chat(artifact).invoke(QUESTION, exit_policy="deer", confidence=0.9)

    def test_or_a_policy_the_nearer_to_the_call_counts(self, artifact):
        told = record(chat(artifact, exit_policy=DEER(0.5)).invoke(QUESTION, confidence=0.9))
        assert (told["policy"], told["confidence"]) == ("DEER(threshold=0.85)", 0.9)
        promised = chat(artifact, confidence=0.9)
        for given, policy in ((DEER(0.5), "DEER(threshold=0.5)"), (None, "Never()")):
            told = record(promised.invoke(QUESTION, exit_policy=given))
            assert (told["policy"], told["confidence"], told["guarantee"]) == (policy, None, None)


def test_first_calls_that_come_together_are_served_by_one_calibration(artifact, tmp_path, monkeypatch):
    (tmp_path / "earlyexit").mkdir()
    artifact.save(tmp_path / "earlyexit" / "calibration.json")
    together, served, ours = threading.Barrier(3), [], engine()

    def slow(*args, **kwargs):
        time.sleep(0.3)  # the others come meanwhile
        served.append(Promises(*args, **kwargs))
        return served[-1]

    monkeypatch.setattr(loading, "acquire", lambda **_: ours)
    monkeypatch.setattr(loading, "release", lambda _: None)
    monkeypatch.setattr(loading, "Promises", slow)
    llm = chat(engine="transformers", model=str(tmp_path), confidence=0.9)

    def ask(_):
        together.wait()
        return record(llm.invoke(QUESTION))["guarantee"]["epsilon"]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, range(3))) == [0.1] * 3
    assert len(served) == 1


class TestEffort:
    @pytest.mark.parametrize(
        ("effort", "policy", "confidence"),
        [
            ("minimal", "DEER(threshold=0.85)", 0.8),
            ("low", "DEER(threshold=0.85)", 0.9),
            ("medium", "DEER(threshold=0.99)", 0.95),
            ("high", "Never()", 0.98),
            ("xhigh", "Never()", None),
            ("max", "Never()", None),
        ],
    )
    def test_is_a_confidence_where_there_is_a_calibration(self, artifact, effort, policy, confidence):
        for llm in (chat(artifact, reasoning_effort=effort), chat(artifact, exit_policy=DEER(0.5))):
            told = record(llm.invoke(QUESTION, reasoning_effort=effort))
            assert (told["policy"], told["confidence"]) == (policy, confidence)

    def test_beside_a_policy_or_a_confidence_is_a_cap_only(self, artifact):
        llm = chat(artifact, reasoning_effort="low")
        assert record(llm.invoke(QUESTION, exit_policy="never"))["policy"] == "Never()"
        told = record(llm.invoke(QUESTION, confidence=0.95))
        assert (told["policy"], told["budget"]) == ("DEER(threshold=0.99)", 1024)
        assert record(chat(reasoning_effort="low").invoke(QUESTION))["policy"] == "Never()"


class TestTheGuarantee:
    def test_is_none_where_the_cap_ended_the_thinking(self, artifact):
        told = record(chat(artifact).invoke(QUESTION, confidence=0.93, thinking_budget=20))
        assert (told["reason"], told["guarantee"]) == ("budget", None)
        assert record(chat(artifact).invoke(QUESTION, confidence=0.93, thinking_budget=0))["guarantee"] is None

    def test_holds_under_a_tighter_cap_where_the_policy_left_before_it(self, artifact):
        told = record(chat(artifact).invoke(QUESTION, confidence=0.9, thinking_budget=30))
        assert (told["reason"], told["guarantee"]["epsilon"]) == ("confident", 0.1)

    def test_does_not_hold_under_a_looser_cap_than_the_calibrated_one(self):
        capped = calibrated(chat(thinking_budget=30))
        with pytest.warns(UserWarning, match=r"promised nothing: .*caps: made for .*30.*loaded is .*null"):
            assert record(chat(capped).invoke(QUESTION, confidence=0.9))["guarantee"] is None

    def test_under_a_cap_is_for_what_is_said_there(self):
        capped = calibrated(chat(thinking_budget=30))
        said = chat(capped, thinking_budget=30)
        assert record(said.invoke(QUESTION, confidence=0.97))["budget"] == 30
        with pytest.warns(UserWarning, match=r"promised nothing: .*caps: made for .* loaded is .*message"):
            told = record(said.invoke(QUESTION, confidence=0.9, thinking_budget_message="Time is up."))
        assert told["guarantee"] is None

    def test_is_named_by_the_calibration_it_is_of(self, artifact):
        promised, free = (chat(artifact).invoke(QUESTION, **given) for given in ({"confidence": 0.9}, {}))
        assert promised.response_metadata["early_exit_calibration"] == artifact.digest
        assert "early_exit_calibration" not in free.response_metadata

    def test_is_none_where_the_caller_ended_the_thinking(self, endless):
        chunks = []
        for chunk in endless.stream(QUESTION, confidence=0.97):
            chunks.append(chunk)
            endless.answer_now()
        told = record(chunks[-1])
        assert (told["reason"], told["confidence"], told["guarantee"]) == ("answer_now", 0.97, None)

    @pytest.mark.parametrize(
        ("prompt", "settings", "differs"),
        [
            ([SystemMessage("Be brief."), *ASKED], {}, "system_prompt: made for none, loaded is [0-9a-f]+"),
            (
                [ChatMessage("Be brief.", role="system"), *ASKED],
                {},
                "system_prompt: made for none, loaded is [0-9a-f]+",
            ),
            ([*ASKED, AIMessage("3."), *ASKED], {}, "loaded is none, and a conversation before the question"),
            ([*ASKED, *ASKED], {}, "loaded is none, and a conversation before the question"),
            (ASKED, {"temperature": 0.5}, 'sampling: made for .*"temperature": 0.0.* loaded is .*0.5'),
            (ASKED, {"reuse_trial_answer": True}, "answer_form: made for .*false.* loaded is .*true"),
            (ASKED, {"tools": [{"name": "f", "description": "", "parameters": {}}]}, "tools: made for none"),
        ],
    )
    def test_is_none_for_calls_it_was_not_made_for_and_that_is_said_once_with_both_sides(
        self, artifact, prompt, settings, differs
    ):
        llm = chat(artifact, confidence=0.9)
        with pytest.warns(UserWarning, match=f"such calls are promised nothing: .*{differs}.*Calibrate again"):
            told = record(llm.invoke(prompt, **settings))
        assert (told["policy"], told["confidence"], told["guarantee"]) == ("DEER(threshold=0.85)", 0.9, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llm.invoke(prompt, **settings)

    def test_holds_for_the_tools_choice_and_schema_it_was_made_with_and_for_no_others(self):
        def answer(name):
            return {"type": "json_schema", "json_schema": {"schema": {"properties": {name: {"type": "integer"}}}}}

        def tool(name):
            return {"type": "function", "function": {"name": name, "parameters": {"properties": {}}}}

        tools = [tool("f"), tool("g")]
        made = [
            {"response_format": answer("a")},
            {"tools": tools},
            {"tools": tools, "tool_choice": "any"},
            {"tools": tools, "tool_choice": "f"},
        ]
        others = [{}, {"response_format": answer("b")}, {"tools": tools[:1]}, {"tools": tools, "tool_choice": "g"}]
        calls = [{**call, "max_tokens": 400} for call in (*made, *others)]
        for at in range(len(made)):
            llm = chat(calibrated(chat(), asks=Asks.of(calls[at])))
            bound, settings = llm.load(), llm.call_settings(confidence=0.9)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                promised = [
                    llm._loaded.promises.request(bound, ASKED, settings, Asks.of(call))[1].guarantee is not None
                    for call in calls
                ]
            assert promised == [other == at for other in range(len(calls))]


class TestTheArtifact:
    def test_of_another_model_is_refused_when_the_model_is_loaded(self, artifact):
        other = replace(artifact, binds={**artifact.binds, "weights": "theirs"})
        with pytest.raises(
            ValueError, match=r"the calibration .*weights: made for theirs, loaded is function.*Calibrate on this model"
        ):
            chat(other).invoke(QUESTION)

    def test_for_a_probe_is_refused_without_it(self, artifact):
        path = (Setting(Never(), 0, 0), Setting(LYNX(0.9), 5, 0))
        lynx = replace(
            artifact,
            path=path,
            levels=(Level(0.1, path[1], 0.5),),
            binds={**artifact.binds, "policy": "LYNX", "probe": "0123"},
        )
        with pytest.raises(ValueError, match="probe: made for 0123, loaded is none"):
            chat(lynx).load()

    def test_is_read_from_a_file_a_directory_or_the_hub(self, artifact, tmp_path, monkeypatch):
        import huggingface_hub

        artifact.save(tmp_path / "calibration.json")
        asked = []

        def downloaded(name, file, token):
            asked.append((name, file, token))
            return str(tmp_path / file)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
        for where in (tmp_path / "calibration.json", str(tmp_path), "me/calibration"):
            assert record(chat(where, api_key="t").invoke(QUESTION, confidence=0.9))["guarantee"] is not None
        assert asked == [("me/calibration", "calibration.json", "t")]

    def test_that_is_not_there_or_is_none_is_told_before_any_weights_are_loaded(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no calibration at .*nowhere.*give its file"):
            ChatEarlyExit(calibration=tmp_path / "nowhere").load()
        (tmp_path / "c.json").write_text("{}")
        with pytest.raises(ValueError, match=r"c\.json: this is no calibration"):
            ChatEarlyExit(calibration=tmp_path / "c.json").load()
        with pytest.raises(TypeError, match="not int"):
            ChatEarlyExit(calibration=3).load()

    def test_is_part_of_the_cache_key(self, artifact, tmp_path):
        given = (None, artifact, replace(artifact, delta=0.2), tmp_path)
        keys = {chat(one)._get_llm_string(stop=None) for one in given}
        assert len(keys) == 4


class TestAnAudit:
    def test_thinks_to_the_end_and_tells_what_leaving_would_have_changed(self, artifact):
        llm = chat(artifact, confidence=0.9)
        left, kept = llm.invoke(QUESTION), llm.invoke(QUESTION, audit_rate=1.0, include_checks=True)
        assert ("41" in left.text, "42" in kept.text) == (True, True)
        told = record(kept)
        assert (told["exited"], told["reason"], told["guarantee"]["epsilon"]) == (False, "natural", 0.1)
        spared = told["thinking_tokens"] - record(left)["thinking_tokens"]
        assert audit(kept) == {"would_exit": 0, "changed": True, "spared": spared}
        assert told["trace"]["checks"][0]["exit_answer"] == "41"
        assert told["trace"]["answer"] == "42"

    def test_has_the_keys_of_any_record_and_counts_what_it_cost(self, artifact):
        llm = chat(artifact, confidence=0.9)
        left, shadowed = llm.invoke(QUESTION), llm.invoke(QUESTION, shadow=True)
        kept = llm.invoke(QUESTION, audit_rate=1.0)
        assert audit(left) is None
        assert set(record(kept)) == set(record(left))
        exit_tokens = record(left)["forced_tokens"] + record(left)["answer_tokens"]
        assert record(kept)["trial_tokens"] == record(shadowed)["trial_tokens"] + exit_tokens
        assert kept.usage_metadata["output_tokens"] == shadowed.usage_metadata["output_tokens"] + exit_tokens

    def test_is_no_change_where_the_early_answer_is_the_same_or_nothing_would_have_left(self, artifact):
        same = chat(artifact, engine=engine(early="42.0"), audit_rate=1.0).invoke(QUESTION, confidence=0.9)
        assert (audit(same)["would_exit"], audit(same)["changed"]) == (0, False)
        stayed = chat(artifact, audit_rate=1.0).invoke(QUESTION, confidence=0.93)
        assert audit(stayed) == {"would_exit": None, "changed": False, "spared": 0}

    def test_counts_a_trial_that_would_have_been_the_answer_once(self):
        llm = chat(reuse_trial_answer=True)
        llm = chat(calibrated(llm), reuse_trial_answer=True, confidence=0.9)
        kept, shadowed = llm.invoke(QUESTION, audit_rate=1.0), llm.invoke(QUESTION, shadow=True)
        assert audit(kept)["changed"] is True
        assert record(kept)["trial_tokens"] == record(shadowed)["trial_tokens"]

    def test_is_the_same_however_the_call_is_made(self, artifact):
        llm = chat(artifact, confidence=0.9, audit_rate=1.0)
        whole = None
        for chunk in llm.stream(QUESTION):
            whole = chunk if whole is None else whole + chunk
        message = llm.invoke(QUESTION)
        assert (whole.text, whole.usage_metadata) == (message.text, message.usage_metadata)
        assert whole.additional_kwargs == message.additional_kwargs
        assert whole.response_metadata == message.response_metadata

    def test_changes_nothing_of_a_seeded_call_that_does_not_leave(self):
        made = tiny_reasoner("w 1}\n\n.a")
        path = (Setting(Never(), 0, 0), Setting(DEER(1.0), 0, 0))
        how = {"engine": made, "temperature": 1.0, "max_tokens": 120, "thinking_budget": 80}
        llm = chat(calibrated(chat(**how), path=path, levels=(Level(0.1, path[1], 1.0),)), **how)
        for seed in range(3):
            plain = llm.invoke(QUESTION, confidence=0.9, seed=seed)
            audited = llm.invoke(QUESTION, confidence=0.9, seed=seed, audit_rate=1.0)
            assert audit(audited) == {"would_exit": None, "changed": False, "spared": 0}
            assert audited.text == plain.text
            assert audited.additional_kwargs["reasoning_content"] == plain.additional_kwargs["reasoning_content"]
        made.close()

    def test_of_an_exit_answers_as_the_exit_does_with_sampling(self):
        path = (Setting(Never(), 0, 0), Setting(DEER(0.0), 0, 0))
        how = {"engine": engine(sure=0.5), "temperature": 1.0, "answer_form": "text", "max_tokens": 140}
        llm = chat(calibrated(chat(**how), path=path, levels=(Level(0.9, path[1], 1.0),)), confidence=0.1, **how)
        answers = set()
        for seed in range(5):
            left = llm.invoke(QUESTION, seed=seed)
            kept = llm.invoke(QUESTION, seed=seed, audit_rate=1.0, include_checks=True)
            assert (record(left)["reason"], audit(kept)["would_exit"]) == ("confident", 0)
            assert record(kept)["trace"]["checks"][0]["exit_answer"] == TEXT.extract(left.text)
            answers.add(left.text)
        assert len(answers) == 5

    def test_is_of_calls_that_the_promise_covers_as_they_are_and_of_no_others(self, artifact, audits):
        llm = chat(artifact, audit_rate=1.0)
        others = [{"confidence": 0.9, "thinking_budget": 30}, {"exit_policy": DEER(0.85)}, {"confidence": 0.97}, {}]
        assert [audit(llm.invoke(QUESTION, **settings)) for settings in others] == [None] * 4
        with pytest.warns(UserWarning, match="promised nothing"):
            assert audit(llm.invoke(QUESTION, confidence=0.9, temperature=0.5)) is None
        assert not list(audits.glob("*.json"))

    def test_is_tossed_by_seed_and_prompt_so_equal_calls_come_out_equal(self, artifact):
        llm = chat(artifact, engine=engine(early="42"), confidence=0.9)

        def tossed(seed):
            return audit(llm.invoke(QUESTION, audit_rate=0.5, seed=seed)) is not None

        first = [tossed(seed) for seed in range(12)]
        assert set(first) == {True, False}
        assert [tossed(seed) for seed in range(12)] == first

    def test_that_could_not_be_written_down_is_refused_before_the_call(self, artifact, monkeypatch):
        monkeypatch.setattr("os.access", lambda *_: False)
        llm = chat(artifact, confidence=0.9)
        with pytest.raises(PermissionError, match=r"audits are counted in .*cannot be written.*EARLYEXIT_AUDITS"):
            llm.invoke(QUESTION, audit_rate=1e-9)
        assert record(llm.invoke(QUESTION))["guarantee"] is not None

    def test_of_right_answers_is_refused(self, artifact):
        right = replace(artifact, loss="lost_correct")
        assert record(chat(right).invoke(QUESTION, confidence=0.9))["guarantee"]["kind"] == "lost_correct"
        with pytest.raises(ValueError, match=r"audit_rate=0\.1 cannot audit a calibration for 'lost_correct'"):
            chat(right).invoke(QUESTION, confidence=0.9, audit_rate=0.1)


class TestDrift:
    def test_audits_that_belie_the_promise_end_early_exit_here_and_in_other_processes(self, artifact):
        llm = chat(artifact, confidence=0.9)
        with pytest.warns(UserWarning, match=r"early exit is off: of \d+ audited calls, \d+ would have got another"):
            for calls in range(1, 40):
                if record(llm.invoke(f"{QUESTION} Ask {calls}.", audit_rate=1.0))["policy"] == "Never()":
                    break
        assert calls < 10
        told = record(llm.invoke(QUESTION))
        assert (told["policy"], told["reason"], told["confidence"]) == ("Never()", "natural", 0.9)
        assert told["guarantee"] is None
        with pytest.warns(UserWarning, match="early exit is off"):  # a second model reads the same file
            assert record(chat(artifact, confidence=0.9).invoke(QUESTION))["policy"] == "Never()"
        assert record(llm.invoke(QUESTION, confidence=0.93))["guarantee"]["epsilon"] == 0.05

    def test_audits_that_bear_the_promise_out_leave_it_standing(self, artifact, audits):
        llm = chat(artifact, engine=engine(early="42"), confidence=0.9, audit_rate=1.0)
        for i in range(12):
            for _ in range(2):  # what is asked twice is counted once
                llm.invoke(f"{QUESTION} Ask {i}.", seed=i)
        assert Promises(artifact, audits)._audits[0.1].counts.audits == 12
        assert record(llm.invoke(QUESTION, audit_rate=0.0))["reason"] == "confident"

    def test_a_call_that_the_caller_cuts_is_not_counted(self, endless, audits):
        chunks = []
        for chunk in endless.stream(QUESTION, confidence=0.9, audit_rate=1.0):
            chunks.append(chunk)
            endless.answer_now()
        assert record(chunks[-1])["reason"] == "answer_now"
        assert audit(chunks[-1])["changed"] is None
        assert not list(audits.glob("*.json"))

    async def test_counting_never_blocks_the_event_loop(self, artifact, audits):
        llm = chat(artifact, confidence=0.9, audit_rate=1.0)
        with blockbuster_ctx():
            assert audit(await llm.ainvoke(QUESTION))["changed"] is True
            chunks = [chunk async for chunk in llm.astream(QUESTION)]
        assert audit(chunks[-1])["changed"] is True
        assert len(list(audits.glob("*.json"))) == 1


def test_a_collection_s_calibration_covers_live_calls_and_audits_find_what_it_found(pocket, tmp_path):
    problems = [Asked(f"q{i}", problem.question) for i, problem in enumerate(sample("dev", 8, 5))]
    with ChatEarlyExit(model=pocket) as llm:
        collect(llm, problems, tmp_path / "traces.jsonl", depths=(), progress=False)
        traces = read_traces(tmp_path / "traces.jsonl")
        certify(tmp_path / "traces.jsonl", DEER(), 0.4, 0.2, progress=False).save(tmp_path / "deer.json")
        promised = ChatEarlyExit(model=pocket, calibration=tmp_path / "deer.json", confidence=0.6, audit_rate=1.0)
        policy = Calibration.load(tmp_path / "deer.json").levels[0].policy
        for trace in traces:
            message = promised.invoke(trace.question, seed=trace.seed)
            assert (record(message)["policy"], record(message)["guarantee"]["n"]) == (repr(policy), 8)
            at = replay(policy, trace)
            changed = at is not None and trace.checks[at].exit_answer != trace.answer
            assert (audit(message)["would_exit"], audit(message)["changed"]) == (at, changed)
        promised.close()
    assert any(replay(policy, trace) is not None for trace in traces)
