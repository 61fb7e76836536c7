"""Against a real vLLM server on loopback, run by `make test-vllm`: it is the local engine, further away."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from engines_for_tests import results, settle, talk
from live_server import ENVIRONMENT, LiveServer, smollm2

from langchain_earlyexit import ChatEarlyExit
from langchain_earlyexit.controller import program
from langchain_earlyexit.engines.program import Close, Done, Feed, Fork, Open, Rewind, Sample
from langchain_earlyexit.engines.vllm import VLLMEngine
from langchain_earlyexit.engines.wire import Patience
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.policies import (
    DEER,
    EAT,
    LYNX,
    AnswerConvergence,
    CoDEStop,
    FirstOf,
    GiveUp,
    Never,
    ThinkBrake,
    replay,
)
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.sampling import Sampling
from langchain_earlyexit.sentry import ARGUMENT, Orders

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

POCKET = weights_dir()
QUESTIONS = [problem.question for problem in sample("dev", 30, seed=8)]
LIMITS = {"temperature": 0, "seed": 0, "thinking_budget": 160, "max_tokens": 260, "answer_form": "boxed"}

TRIALS = [
    DEER(0.95),
    CoDEStop(tau=20.0),
    AnswerConvergence(2),
    EAT(0.05, 0.5, 2),
    FirstOf(GiveUp(0.4, 2, 2), DEER(0.99)),
]
SEEN = [LYNX(0.5), GiveUp(0.4, 2, 2, "p_safe"), ThinkBrake(17.0), FirstOf(LYNX(0.7), ThinkBrake(16.0))]
MIXED = [FirstOf(LYNX(0.8), DEER(0.95))]


def some_probe(position="before"):
    """Random weights whose scores mean nothing, but are spread over the checks of the bundled model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    found = []
    for question in QUESTIONS[:12]:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "<think>\n"
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            made = model.generate(ids, do_sample=False, max_new_tokens=120)
            states = model(made, output_hidden_states=True).hidden_states
        pieces = [tokenizer.decode([i]).strip().lower() for i in made[0].tolist()]
        at = [i - 1 for i, piece in enumerate(pieces) if piece == "wait" and i > ids.shape[1]]
        found += [torch.cat([states[2][0, i], states[3][0, i]]).numpy() for i in at]  # outputs of blocks 2 and 3
    rows = np.stack(found)
    mean, scale = rows.mean(0), np.full(rows.shape[1], rows.std())
    inner = np.random.default_rng(3).normal(0, rows.shape[1] ** -0.5, (rows.shape[1], 8))
    outer = np.random.default_rng(4).normal(0, 1.0, (8, 1))
    raw = np.maximum((rows - mean) / scale @ inner, 0) @ outer
    outer, bias = outer * 2 / raw.std(), -raw.mean() * 2 / raw.std()
    return Probe((0.5, 0.75), position, mean, scale, (inner, outer), (np.zeros(8), np.full(1, bias)))


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    made = some_probe()
    made.save(tmp_path_factory.mktemp("probe"))
    return made


@pytest.fixture(scope="session")
def server(probe, tmp_path_factory):
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.fail(f"no environment for the server in {ENVIRONMENT}; `make test-vllm` makes it")
    folder = tmp_path_factory.mktemp("server")
    probe.save(folder / "probe")
    made = LiveServer(POCKET, "pocket", folder / "log", probe=folder / "probe")
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def engine(server):
    made = VLLMEngine(server.url, str(POCKET))
    yield made
    made.close()


def remote(engine, **fields):
    return ChatEarlyExit(model="pocket", engine=engine, **{**LIMITS, **fields})


def local(**fields):
    return ChatEarlyExit(model="pocket", **{**LIMITS, **fields})


def answers(llm, questions=QUESTIONS):
    return llm.batch(questions, config={"max_concurrency": 16})


def told(message):
    return message.response_metadata["early_exit"]


def said(message):
    """All that does not depend on how long a request takes to close."""
    record = {
        key: value
        for key, value in told(message).items()
        if key not in {"engine", "speculated_tokens", "trace", "score"}
    }
    return message.content, message.additional_kwargs.get("reasoning_content"), record


def check_alike(ours, theirs, precision=1e-3):
    """The same checks with the same answers, and the same signals but for rounding."""
    assert [(c["position"], c["cue"], c["kind"], c["answer"]) for c in ours["checks"]] == [
        (c["position"], c["cue"], c["kind"], c["answer"]) for c in theirs["checks"]
    ]
    for a, b in zip(ours["checks"], theirs["checks"], strict=True):
        assert a["signals"] == pytest.approx(b["signals"], abs=precision)


class TestItIsTheLocalEngineFurtherAway:
    def test_it_knows_the_server_and_the_server_s_probe(self, engine, probe):
        assert (engine.name, engine.sentry, engine.lacks) == ("vllm", probe.digest, {})
        assert engine.context_length == 2048

    @pytest.mark.parametrize("policy", [Never(), *TRIALS, *SEEN, *MIXED], ids=repr)
    def test_30_questions_are_thought_and_answered_alike_and_left_at_the_same_check(self, engine, probe, policy):
        here = local(exit_policy=policy, include_checks=True, **({"probe": probe} if "p_safe" in policy.needs else {}))
        there = remote(engine, exit_policy=policy, include_checks=True)
        left = 0
        for ours, theirs in zip(answers(here), answers(there), strict=True):
            assert said(theirs) == said(ours)
            check_alike(told(theirs)["trace"], told(ours)["trace"])
            left += told(ours)["reason"] not in {"natural", "budget"}
        assert left >= 3 or policy == Never()

    @pytest.mark.parametrize("policy", [DEER(0.9), LYNX(0.5)], ids=repr)
    def test_waiting_for_a_look_and_thinking_on_come_to_the_same(self, engine, policy):
        both = [answers(remote(engine, exit_policy=policy, look=look), QUESTIONS[:8]) for look in ("wait", "parallel")]
        assert [said(m) for m in both[0]] == [said(m) for m in both[1]]

    @pytest.mark.parametrize("policy", [LYNX(0.5), ThinkBrake(17.0)], ids=repr)
    def test_in_shadow_it_thinks_on_and_says_where_it_would_have_left(self, engine, policy):
        plain = answers(remote(engine, exit_policy=Never()), QUESTIONS[:8])
        shadow = answers(remote(engine, exit_policy=policy, shadow=True, include_checks=True), QUESTIONS[:8])
        live = answers(remote(engine, exit_policy=policy, include_checks=True), QUESTIONS[:8])
        assert [m.content for m in shadow] == [m.content for m in plain]
        for watched, left in zip(shadow, live, strict=True):
            at = told(watched)["would_exit"]
            assert (at is not None) == (told(left)["reason"] in {"sufficient", "margin"})
            if at is not None:
                check_alike({"checks": told(watched)["trace"]["checks"][: at + 1]}, told(left)["trace"], 1e-6)

    @pytest.mark.parametrize(
        "policy", [LYNX(0.5), LYNX(0.9), ThinkBrake(17.0), FirstOf(LYNX(0.8), DEER(0.95))], ids=repr
    )
    def test_live_agrees_with_the_replay_of_its_own_trace_when_sampled(self, engine, policy):
        from langchain_earlyexit.trace import Trace

        llm = remote(engine, exit_policy=policy, include_checks=True, temperature=0.8, seed=5)
        left = 0
        for message in answers(llm, QUESTIONS[:16]):
            trace = Trace.from_dict(told(message)["trace"])
            at = replay(policy, trace)
            exited = told(message)["reason"] in {"sufficient", "margin", "confident"}
            assert at == (len(trace.checks) - 1 if exited else None)
            left += exited
        assert left

    def test_with_every_token_a_server_has_drawn_counted_a_sentry_s_exit_costs_one_token_beyond_the_cue(
        self, engine, server
    ):
        cue_only = answers(local(exit_policy=LYNX(0.5), probe=some_probe(), look="wait"), QUESTIONS[:8])
        before = server.metric("vllm:generation_tokens_total")
        seen = answers(remote(engine, exit_policy=LYNX(0.5)), QUESTIONS[:8])
        drawn = server.metric("vllm:generation_tokens_total") - before
        for ours, theirs in zip(cue_only, seen, strict=True):
            extra = told(theirs)["speculated_tokens"] - told(ours)["speculated_tokens"]
            assert extra == (1 if told(ours)["reason"] == "sufficient" else extra)
        told_of = sum(told(m)[name] for m in seen for name in ("thinking_tokens", "answer_tokens", "speculated_tokens"))
        # What a server draws while a connection closes nobody is told of: a few tokens per request.
        assert told_of <= drawn <= told_of + 8 * len(seen)


PROMPT = tuple(range(40, 80))


class TestWhatEveryEnginePromises:
    def test_a_fork_and_its_parent_leave_each_other_alone(self, engine):
        alone = results(engine, (Open(0, PROMPT),), *[(Sample(0),)] * 6)[1:]
        both = results(
            engine,
            (Open(0, PROMPT),),
            *[(Sample(0),)] * 3,
            (Fork(0, 1, len(PROMPT) + 1), Feed(1, (90, 91)), Sample(1), Sample(0)),
            (Sample(1), Sample(0)),
            (Close(1), Sample(0)),
        )
        trunk = [both[i + 1][0].id for i in range(3)] + [both[4][-1].id, both[5][-1].id, both[6][-1].id]
        assert trunk == [r[0].id for r in alone]
        forked = results(engine, (Open(0, (*PROMPT, both[1][0].id, 90, 91)),), (Sample(0),), (Sample(0),))
        assert [both[4][2].id, both[5][0].id] == [forked[1][0].id, forked[2][0].id]

    def test_a_rewind_and_the_same_tokens_again_give_the_same_log_probabilities(self, engine):
        ask = Sample(0, watch=tuple(range(0, 600, 37)))
        opened = (Open(0, PROMPT[:30]), Feed(0, (50, 51, 52)))
        once, again, bare = results(
            engine, (*opened, ask), (Rewind(0, 31), Feed(0, (51, 52)), ask), (Rewind(0, 33), ask)
        )
        assert again[-1].id == once[-1].id == bare[-1].id
        assert np.allclose(again[-1].watched, once[-1].watched, atol=1e-4)
        assert np.allclose(bare[-1].watched, once[-1].watched, atol=1e-4)

    def test_greedy_tokens_do_not_depend_on_company(self, engine):
        prompts = [tuple(range(20 + i, 45 + 7 * i)) for i in range(8)]
        alone, together = [[] for _ in prompts], [[] for _ in prompts]
        for prompt, out in zip(prompts, alone, strict=True):
            list(engine.submit(talk(12, prompt, Sampling(), 1, out)))
        streams = [engine.submit(talk(12, p, Sampling(), 1, out)) for p, out in zip(prompts, together, strict=True)]
        for stream in streams:
            list(stream)
        assert together == alone

    def test_what_is_forbidden_or_not_allowed_is_never_drawn(self, engine):
        free = results(engine, (Open(0, PROMPT),), (Sample(0),))[1][0].id
        other = results(engine, (Open(0, PROMPT),), (Sample(0, forbid=frozenset({free})),))[1][0].id
        assert other != free
        allow = np.packbits(np.isin(np.arange(len(engine.tokenizer)), [77, 78]), bitorder="little").tobytes()
        assert results(engine, (Open(0, PROMPT),), (Sample(0, allow=allow),))[1][0].id in {77, 78}

    def test_leaving_a_stream_stops_the_server(self, engine, server):
        streams = [engine.submit(talk(prompt=PROMPT, sampling=Sampling(1.0), seed=i)) for i in range(8)]
        for stream in streams:
            next(iter(stream))
            stream.cancel()
        settle(lambda: server.metric("vllm:num_requests_running") == 0, 20)
        before = server.metric("vllm:generation_tokens_total")
        time.sleep(1.0)
        assert server.metric("vllm:generation_tokens_total") == before

    def test_an_exit_stops_the_trunk_and_only_the_answer_is_drawn_after_it(self, engine, server):
        llm = remote(engine, exit_policy=DEER(0.0), max_tokens=400, thinking_budget=300)
        before = server.metric("vllm:generation_tokens_total")
        messages = answers(llm, QUESTIONS[:8])
        assert {told(m)["reason"] for m in messages} == {"confident"}
        settle(lambda: server.metric("vllm:num_requests_running") == 0, 20)
        drawn = server.metric("vllm:generation_tokens_total") - before
        counted, trials = 0, 0
        for record in map(told, messages):
            counted += sum(record[f"{kind}_tokens"] for kind in ("thinking", "answer", "trial", "speculated"))
            counted -= record["checks"] * record["forced_tokens"]  # what closes a trial's thinking is fed, not drawn
            trials += record["checks"]
        # What a server draws while a connection closes nobody is told of: a few tokens for each trial and exit.
        assert counted <= drawn <= counted + 8 * (trials + len(messages))


class TestTheServer:
    def test_orders_it_cannot_follow_are_refused_with_a_reason(self, server, engine):
        ids = list(PROMPT)
        status, told_ = server.post(
            "/v1/completions", {"model": "pocket", "prompt": ids, "vllm_xargs": {ARGUMENT: "{}"}}
        )
        assert (status, "no orders for a sentry" in json.dumps(told_)) == (400, True)
        text = some_orders(reports={"p_safe": 1}, probe="0123456789abcdef").to_json()
        status, told_ = server.post(
            "/v1/completions", {"model": "pocket", "prompt": ids, "vllm_xargs": {ARGUMENT: text}}
        )
        assert (status, engine.sentry in json.dumps(told_)) == (400, True)

    def test_an_error_in_the_plugin_costs_its_own_sequence_the_sentry_and_nothing_else(self, server, engine):
        impossible = some_orders(reports={"end_margin": 10**6}).to_json()  # no such id to report on
        body = {"model": "pocket", "prompt": list(PROMPT), "max_tokens": 60, "temperature": 0, "return_token_ids": True}
        plain = server.post("/v1/completions", body)
        broken = server.post("/v1/completions", body | {"vllm_xargs": {ARGUMENT: impossible}})
        assert broken[0] == plain[0] == 200
        assert broken[1]["choices"][0]["token_ids"] == plain[1]["choices"][0]["token_ids"]
        assert "early exit is off for some sequences" in server.log.read_text(errors="replace")
        [message] = answers(remote(engine, exit_policy=LYNX(0.0)), QUESTIONS[:1])
        assert told(message)["reason"] in {"sufficient", "natural"}

    def test_another_probe_than_the_server_s_is_refused_by_name(self, engine):
        with pytest.raises(ValueError, match="is not the probe that the server has"):
            remote(engine, exit_policy=LYNX(0.5), probe=some_probe("cue")).invoke("What is 2 + 2?")


def some_orders(**changes):
    from langchain_earlyexit.cues import CueSpec

    given = {
        "cues": CueSpec(interval=4), "kinds": frozenset({"interval"}), "end": "</think>", "eos": (2,),
        "start": len(PROMPT), "reports": {"end_margin": 1},
    }  # fmt: skip
    return Orders(**(given | changes))


def noting(inner, out):
    """The program, noting the ids that are drawn on its trunk."""
    step = next(inner)
    while True:
        inbox = yield step
        mine = [isinstance(op, Sample) and op.branch == 0 for op in step.ops]
        out += [result.id for result, on_trunk in zip(inbox.results, mine, strict=True) if on_trunk]
        try:
            step = inner.send(inbox)
        except StopIteration:
            return


class TestFaults:
    @pytest.mark.parametrize("policy", [Never(), LYNX(0.9)], ids=repr)
    def test_a_server_killed_in_the_middle_of_20_streams_and_started_again_loses_and_repeats_no_token(
        self, server, policy
    ):
        patient = VLLMEngine(
            server.url, str(POCKET), patience=Patience(retries=10**6, first=0.2, longest=2.0, failures=10**6)
        )
        try:
            bound = ChatEarlyExit(model="pocket", engine=patient, **LIMITS).load()
            llm = ChatEarlyExit(model="pocket", engine=patient, exit_policy=policy, **LIMITS)
            settings = llm.call_settings()
            from langchain_core.messages import HumanMessage

            requests = [bound.request([HumanMessage(question)], settings) for question in QUESTIONS[:20]]
            requests = [replace(request, look="wait") for request in requests]

            def run(out, begun=None):
                with ThreadPoolExecutor(20) as threads:
                    streams = [patient.submit(noting(program(r), ids)) for r, ids in zip(requests, out, strict=True)]

                    def read(stream):
                        events = []
                        for event in stream:
                            events.append(event)
                            if begun is not None:
                                begun.release()
                        return events

                    return list(threads.map(read, streams))

            undisturbed = [[] for _ in requests]
            calm = run(undisturbed)
            disturbed = [[] for _ in requests]
            begun = threading.Semaphore(0)

            def strike():
                for _ in range(60):  # pieces of thinking, over all streams
                    begun.acquire()
                server.kill()
                server.start()

            striker = threading.Thread(target=strike)
            striker.start()
            struck = run(disturbed, begun)
            striker.join()
            assert disturbed == undisturbed
            for before, after in zip(calm, struck, strict=True):
                assert isinstance(after[-1], Done)
                same = {"speculated_tokens": 0, "trace": None, "score": None}
                assert replace(after[-1], **same) == replace(before[-1], **same)
                assert [c.position for c in after[-1].trace.checks] == [c.position for c in before[-1].trace.checks]
        finally:
            patient.close()

    def test_no_answer_is_empty_whatever_the_budget_and_the_question(self, engine):
        many = int(os.environ.get("EARLYEXIT_VLLM_MANY", "500"))
        rng = random.Random(4)
        empty, cut = [], 0
        policies = [Never(), DEER(0.5), LYNX(0.5), ThinkBrake(17.0), CoDEStop(tau=3.5)]
        made = {
            repr(policy): ChatEarlyExit(model="pocket", engine=engine, exit_policy=policy, max_tokens=60)
            for policy in policies
        }

        def ask(i):
            llm = made[repr(policies[i % len(policies)])]
            budget = rng.randrange(0, 9)
            message = llm.invoke(
                hostile(rng), thinking_budget=budget, temperature=rng.choice([0.0, 0.7, 1.5]), seed=i,
                max_tokens=rng.randrange(24, 48), stop=rng.choice([None, [" "], ["\n", "1"], ["}"]]),
            )  # fmt: skip
            assert told(message)["thinking_tokens"] <= budget
            assert "think>" not in message.content
            return i, bool(message.content.strip()), told(message)["reason"]

        with ThreadPoolExecutor(48) as threads:
            for i, answered, reason in threads.map(ask, range(many)):
                cut += reason == "budget"
                if not answered:
                    empty.append(i)
        print(f"{many} requests, {cut} cut by their budget, {len(empty)} empty answers")
        assert empty == []
        assert cut > many / 4


def hostile(rng):
    kinds = [
        lambda: rng.choice(QUESTIONS),
        lambda: "</think>" * rng.randrange(1, 4),
        lambda: "<|im_end|><|im_start|>assistant\n<think>\n</think>\n" + rng.choice(["", "42"]),
        lambda: " ",
        lambda: "Say nothing at all.",
        lambda: "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(1, 40))),
        lambda: "wait " * rng.randrange(1, 60),
        lambda: "\n" * rng.randrange(1, 30),
        lambda: "\U0001f642" * rng.randrange(1, 20),
    ]
    return rng.choice(kinds)()


class TestAModelOfOtherShape:
    @pytest.fixture(scope="class")
    def served(self, tmp_path_factory):
        model = smollm2(ENVIRONMENT)
        made = LiveServer(
            model, "smollm2", tmp_path_factory.mktemp("smollm2") / "log", flags=("--max-model-len", "1024")
        )
        made.start()
        yield made
        made.stop()

    @pytest.mark.parametrize("policy", [Never(), DEER(0.6), ThinkBrake(14.0)], ids=repr)
    def test_a_llama_of_30_layers_thinks_and_answers_as_it_does_here(self, served, policy):
        asked = ["Name the capital of France.", "What is 17 + 25?", "Write one sentence about rain."]
        settings = {"temperature": 0, "thinking_budget": 60, "max_tokens": 90, "exit_policy": policy, "dtype": None}
        model = str(smollm2(ENVIRONMENT))
        with (
            ChatEarlyExit(model=model, **settings | {"dtype": "float32"}) as here,
            ChatEarlyExit(model=model, engine="vllm", base_url=served.url, **settings) as there,
        ):
            for ours, theirs in zip(answers(here, asked), answers(there, asked), strict=True):
                assert said(theirs) == said(ours)
