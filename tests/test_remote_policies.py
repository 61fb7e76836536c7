"""On a server, every policy thinks, looks, leaves and answers as it does on the local engine."""

import math

import numpy as np
import pytest
from engines_for_tests import hashed, settle
from pydantic import BaseModel
from remote_for_tests import KINDS, FakeServer
from test_lynx import some_probe

from langchain_earlyexit import DEER, EAT, LYNX, AnswerConvergence, ChatEarlyExit, CoDEStop, FirstOf, Never, ThinkBrake
from langchain_earlyexit.engines.function import FunctionEngine, byte_tokenizer, scripted
from langchain_earlyexit.engines.vllm import VLLMEngine
from langchain_earlyexit.policies import GiveUp

THINKING = (
    "37 and 48 make 75.\n\nWait, let me check. 7 and 8 are 15, so 85.\n\nWait, what of the tens? 3 and 4 and 1 are 8."
    "\n\nHmm, so it is 85.\n\nWait, once more: 85."
)
QUESTION = "What is 37 + 48?"


def answer(so_far):
    doubts = so_far.count("Wait") + so_far.count("Hmm")
    return ("\\boxed{75}" if doubts == 0 else "\\boxed{85}"), (0.6, 0.7, 0.93, 0.97, 0.99)[min(doubts, 4)]


def reasoner():
    """It comes to want the end of its thinking more and more, and its tokens are never quite sure."""
    tokenizer = byte_tokenizer()
    plain = scripted(tokenizer, THINKING, answer)
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def next_logits(ids):
        logits = plain(ids).copy()
        if start in ids and end not in ids:
            thought = len(ids) - list(ids).index(start)
            logits[end] = max(logits[end], logits.max() - max(0.5, 4.0 * 0.985**thought))
        return logits + 0.01 * hashed(ids)

    return next_logits


POLICIES = [
    Never(),
    DEER(0.9),
    DEER(0.96),
    CoDEStop(),
    CoDEStop(tau=1.0),
    AnswerConvergence(2),
    ThinkBrake(2.0),
    ThinkBrake(1.0),
    EAT(threshold=0.05, alpha=0.5, min_checks=2),
    GiveUp(),
    FirstOf(DEER(0.98), AnswerConvergence(3)),
    LYNX(0.0),
    LYNX(0.5),
    LYNX(1.0),
    GiveUp(0.6, 1, 2, "p_safe"),
    FirstOf(LYNX(0.9), DEER(0.96)),
    FirstOf(LYNX(0.9), ThinkBrake(1.0)),
]
LACKING = {"vllm": {"p_safe"}, "sglang": {"p_safe", "end_entropy"}, "llama.cpp": {"p_safe"}}
WATCHED = "vllm with the plugin"
PROBE = some_probe()


def states(ids):
    """Of the last id, [layers, width]."""
    return np.random.default_rng([7, len(ids), *ids[-4:]]).normal(0, 0.1, (2, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=[*KINDS, WATCHED])
def pair(request):
    function = reasoner()
    watched = {"probe": PROBE, "states": states} if request.param == WATCHED else {}
    server = FakeServer(function, kind=request.param.partition(" ")[0], **watched)
    far = VLLMEngine(server.url, "served", tokenizer=byte_tokenizer())
    near = FunctionEngine(function)
    near._model.hidden = lambda cache, position: states(cache[: position + 1])
    yield server, far, near
    far.close()
    near.close()
    server.close()


def run(engine, **settings):
    message = ChatEarlyExit(engine=engine, answer_form="boxed", include_checks=True, **{"seed": 5, **settings}).invoke(
        QUESTION
    )
    return message, message.response_metadata["early_exit"]


def same(far, near):
    """Equal but for the last digits of floats, which go over the wire as text."""
    if isinstance(near, dict):
        return far.keys() == near.keys() and all(same(far[key], near[key]) for key in near)
    if isinstance(near, list | tuple):
        return len(far) == len(near) and all(map(same, far, near))
    if isinstance(near, float):
        return math.isclose(far, near, rel_tol=1e-4, abs_tol=1e-4)
    return far == near


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_texts_checks_signals_and_exits_are_those_of_the_local_engine(pair, policy):
    server, far, near = pair
    lacking = policy.needs & LACKING[server.kind] if server.probe is None else set()
    probe = {"probe": PROBE} if "p_safe" in policy.needs else {}
    if lacking:
        with pytest.raises(ValueError, match=f"needs {min(lacking)}, which the engine '{server.kind}' does not tell"):
            ChatEarlyExit(engine=far, exit_policy=policy, **probe)
        return
    (there, told), (here, expected) = run(far, exit_policy=policy), run(near, exit_policy=policy, **probe)
    assert there.content == here.content
    assert there.additional_kwargs["reasoning_content"] == here.additional_kwargs["reasoning_content"]
    assert told["trace"]["checks"] or policy == Never()
    left_out = {"engine", "speculated_tokens", "trial_tokens", "trace"}
    if server.kind != "llama.cpp" or "end_margin" not in policy.needs:  # it reads margins on forks, a token each
        left_out -= {"trial_tokens", "trace"}
    assert same(
        {k: v for k, v in told.items() if k not in left_out}, {k: expected[k] for k in told if k not in left_out}
    )
    for check, twin in zip(told["trace"]["checks"], expected["trace"]["checks"], strict=True):
        assert same(check, twin)
    assert told["speculated_tokens"] >= expected["speculated_tokens"]


def test_the_probe_that_a_server_has_may_be_given_here_too_and_another_is_refused_with_both_named(pair):
    server, far, _ = pair
    if server.probe is None:
        pytest.skip("there is no plugin")
    (here, told), (there, twin) = run(far, exit_policy=LYNX(0.5), probe=PROBE), run(far, exit_policy=LYNX(0.5))
    assert (here.content, told["trace"]) == (there.content, twin["trace"])
    other = some_probe("before")
    with pytest.raises(ValueError, match=f"digest='{other.digest}'.* is not the probe .* digest is '{PROBE.digest}'"):
        run(far, exit_policy=LYNX(0.5), probe=other)


def test_the_policies_above_do_leave_and_not_all_at_the_same_place(pair):
    _, far, _ = pair
    places = {run(far, exit_policy=policy)[1]["thinking_tokens"] for policy in (DEER(0.9), DEER(0.98), ThinkBrake(2.0))}
    assert len(places) > 1
    assert all(run(far, exit_policy=policy)[1]["exited"] for policy in (DEER(0.9), ThinkBrake(2.0)))


def test_margins_of_a_sampled_trunk_are_the_same_and_are_read_on_forks_where_no_plugin_tells_them(pair):
    server, far, near = pair
    # Its own tokens have practically all the probability, so both engines sample the same chain.
    settings = {"exit_policy": ThinkBrake(0.0), "temperature": 0.05, "seed": 3}
    (there, told), (here, expected) = run(far, **settings), run(near, **settings)
    assert there.content == here.content
    margins = [check["signals"]["end_margin"] for check in told["trace"]["checks"]]
    assert margins == pytest.approx([check["signals"]["end_margin"] for check in expected["trace"]["checks"]], abs=1e-3)
    assert len(margins) > 1
    assert told["trial_tokens"] == (len(margins) if server.probe is None else 0)


def test_looking_leaves_no_mark_on_a_sampled_chain(pair):
    server, far, _ = pair
    if server.kind == "sglang":
        pytest.skip("scripted as deterministic; covered by the others")
    settings = {"temperature": 0.4, "seed": 11, "max_tokens": 300, "shadow": True}
    unseen, _ = run(far, exit_policy=None, **settings)
    for look in ("parallel", "wait"):
        seen, told = run(far, exit_policy=DEER(0.0), look=look, **settings)
        assert seen.additional_kwargs["reasoning_content"] == unseen.additional_kwargs["reasoning_content"]
        assert told["checks"] > 0


def test_an_exact_budget_and_an_early_answer_are_the_same(pair):
    _, far, near = pair
    for budget in (0, 1, 7, 40):
        (there, told), (here, expected) = (run(engine, thinking_budget=budget) for engine in (far, near))
        assert there.content == here.content
        assert told["thinking_tokens"] == expected["thinking_tokens"] <= max(budget, 0)


class Total(BaseModel):
    """The sum."""

    total: int


def test_a_schema_is_kept_to_also_where_the_model_would_write_something_else(pair):
    server, far, near = pair
    if server.kind == "sglang":
        with pytest.raises(ValueError, match="tool calls and response formats need vLLM"):
            ChatEarlyExit(engine=far).with_structured_output(Total).invoke(QUESTION)
        return
    found = [
        ChatEarlyExit(engine=engine, max_tokens=400).with_structured_output(Total).invoke(QUESTION)
        for engine in (far, near)
    ]
    assert isinstance(found[0], Total)
    assert found[0] == found[1]


def test_what_the_server_drew_for_nothing_is_counted(pair):
    server, far, _ = pair
    pace, server.pace, before = server.pace, 0.005, server.generated
    _, told = run(far, exit_policy=DEER(0.9))
    settle(lambda: server.active == 0)
    server.pace = pace
    trials = told["checks"]
    counted = sum(told[f"{kind}_tokens"] for kind in ("thinking", "answer", "trial", "speculated"))
    fed = trials * told["forced_tokens"]  # each trial, and the exit, close the thinking the same way
    unseen = server.generated - before - (counted - fed)
    assert 0 <= unseen <= 4 * (trials + 1)  # what was on its way when a request was closed


def test_300_random_budgets_leave_no_answer_empty():
    """A model that would rather say nothing: most of what it writes is blank, a tag, or the end of its turn."""
    eos, end = 2, 4

    def hostile(ids):
        logits = hashed(ids)
        logits[[eos, end, 37, 15]] += 4.0
        return logits

    server = FakeServer(hostile)
    engine = VLLMEngine(server.url, "served", tokenizer=byte_tokenizer(), max_running=16)
    rng = np.random.default_rng(0)
    budgets = [int(budget) for budget in rng.integers(0, 12, 300)]
    llm = ChatEarlyExit(engine=engine, temperature=1.0, answer_form="text")
    for budget in set(budgets):
        many = llm.batch(
            [f"Say something. {i}" for i, b in enumerate(budgets) if b == budget],
            thinking_budget=budget,
            max_tokens=budget + 16,
        )
        for message in many:
            assert message.content.strip()
            assert message.response_metadata["early_exit"]["thinking_tokens"] <= budget
    engine.close()
    server.close()
