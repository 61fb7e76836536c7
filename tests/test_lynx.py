"""A probe on the hidden states, live: it measures what it says, leaves no mark, and decides as on paper."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reasoners_for_tests import BYTES, LAYERS, WIDTH, tiny, tiny_reasoner

from langchain_earlyexit import ChatEarlyExit
from langchain_earlyexit.answers import BOXED, TEXT
from langchain_earlyexit.codec import Codec
from langchain_earlyexit.controller import program
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.function import FunctionEngine, scripted
from langchain_earlyexit.engines.identity import identity
from langchain_earlyexit.engines.program import TRUNK, Answer, Checked, Done, Open, Sample, Thought
from langchain_earlyexit.policies import DEER, LYNX, CoDEStop, FirstOf, GiveUp, Never, replay
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.request import Request
from langchain_earlyexit.sampling import Sampling

CODEC = Codec(BYTES)
PROMPT = CODEC.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>")
BASE = Request(
    prompt=PROMPT, codec=CODEC, thinking=True, tags=("<think>", "</think>"), policy=Never(),
    cues=CueSpec(words=("w", "w 1", "a")), form=TEXT, reserve=8, budget=90, limit=160, sampling=Sampling(1.0),
)  # fmt: skip


def some_probe(position="cue", layers=(1 / 3, 2 / 3), width=WIDTH, binds=None):
    """Random weights: its numbers mean nothing, but they differ from check to check."""
    rng = np.random.default_rng(3)
    inputs = len(layers) * width
    return Probe(
        layers, position, np.zeros(inputs), np.full(inputs, 0.1),
        (rng.normal(0, 2.0, (inputs, 8)), rng.normal(0, 0.6, (8, 1))), (np.zeros(8), np.full(1, -1.5)), binds or {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    made = tiny_reasoner()
    yield made
    made.close()


def ids_kept(inner, out):
    """The program, noting the ids of its trunk."""
    step = next(inner)
    while True:
        out += [i for op in step.ops if isinstance(op, Open) for i in op.ids]
        inbox = yield step
        on_trunk = [isinstance(op, Sample) and op.branch == TRUNK for op in step.ops]
        out += [result.id for result, mine in zip(inbox.results, on_trunk, strict=True) if mine]
        try:
            step = inner.send(inbox)
        except StopIteration:
            return


def run(engine, request):
    return run_all(engine, [request])[0]


def alike(checks, others):
    """The same but for rounding, which depends on what shares a pass."""
    told = [(c.position, c.cue, c.kind, pytest.approx(c.signals["p_safe"], abs=1e-5)) for c in checks]
    return told == [(c.position, c.cue, c.kind, c.signals["p_safe"]) for c in others]


def run_all(engine, requests):
    """Side by side: for each how it was done, what was thought and said, and its checks."""
    found = []
    for stream in [engine.submit(program(request)) for request in requests]:
        events = list(stream)
        assert isinstance(events[-1], Done)
        text = ["".join(e.text for e in events if isinstance(e, kind)) for kind in (Thought, Answer)]
        found.append((events[-1], text, [e for e in events if isinstance(e, Checked)]))
    return found


@pytest.mark.parametrize("position", ["cue", "before"])
@pytest.mark.parametrize("packed", [True, False])
def test_it_reads_the_layers_it_names_at_the_token_it_names(position, packed):
    probe = some_probe(position)
    engine = tiny_reasoner(packed=packed)
    ids = []
    request = replace(BASE, policy=LYNX(1.0), probe=probe, seed=5)
    try:
        events = list(engine.submit(ids_kept(program(request), ids)))
    finally:
        engine.close()
    with torch.inference_mode():
        states = tiny()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    checks = [event.check for event in events if isinstance(event, Checked)]
    assert len(checks) >= 3
    text = [BYTES.decode([i]) for i in ids]
    for check in checks:
        start = len(PROMPT) + check.position
        cue = next(n for n in range(1, 5) if "".join(text[start : start + n]) == check.cue)
        at = start + cue - 1 if position == "cue" else start - 1
        expected = np.stack([states[1][0, at].numpy(), states[2][0, at].numpy()])  # outputs of blocks 1 and 2 of 3
        assert check.signals["p_safe"] == pytest.approx(probe.p_safe(expected), abs=2e-3)
    spread = [check.signals["p_safe"] for check in checks]
    assert max(spread) - min(spread) > 0.05


@pytest.mark.parametrize("look", ["wait", "parallel"])
@pytest.mark.parametrize("seed", [0, 1])
def test_measuring_it_leaves_no_mark_and_costs_no_token(engine, look, seed):
    plain, said, _ = run(engine, replace(BASE, seed=seed))
    probed, also_said, checked = run(
        engine, replace(BASE, seed=seed, look=look, policy=LYNX(0.5), probe=some_probe(), shadow=True)
    )
    assert also_said == said
    assert checked
    assert probed.trial_tokens == 0
    assert probed.speculated_tokens == plain.speculated_tokens


THRESHOLDS = (0.0, 0.25, 0.3, 0.5, 0.87, 0.9, 1.0)


@pytest.mark.parametrize("look", ["wait", "parallel"])
def test_live_it_leaves_where_replay_does(engine, look):
    policies = [LYNX(t) for t in THRESHOLDS] + [LYNX(q_safe=0.5, q_unsafe=0.4)]
    policies += [GiveUp(t, patience=2, min_checks=2, signal="p_safe") for t in (0.4, 0.89)]
    exits = set()
    for seed in range(4):
        base = replace(BASE, seed=seed, look=look, probe=some_probe())
        watched, *lived = run_all(engine, [replace(base, policy=policy) for policy in (LYNX(1.0), *policies)])
        trace = watched[0].trace
        for policy, (done, _, _) in zip(policies, lived, strict=True):
            at = replay(policy, trace)
            exits.add((at, done.reason))
            if at is None:
                assert alike(done.trace.checks, trace.checks)
                assert not done.exited or done.reason == "budget"
            else:
                assert done.exited
                assert alike(done.trace.checks, trace.checks[: at + 1])
                assert done.thinking_tokens == trace.checks[at].position
    assert {reason for _, reason in exits} >= {"sufficient", "unpromising"}
    assert len({at for at, _ in exits}) > 3


def test_beside_long_trials_its_states_are_still_there():
    """A trunk that thinks on while trials run must not run away from the states of the cues it has yet to read."""
    engine = tiny_reasoner("w 1a ")  # never a brace: every trial runs to its cap
    close = replace(
        BASE, cues=CueSpec(words=("w", "a", "1")), policy=FirstOf(LYNX(1.0), DEER(1.0)), probe=some_probe(), seed=2,
        form=replace(BOXED, trial_cap=30), budget=120, limit=300,
    )  # fmt: skip
    try:
        waiting, parallel = (run(engine, replace(close, look=look))[0] for look in ("wait", "parallel"))
    finally:
        engine.close()
    assert len(parallel.trace.checks) > 8
    assert parallel.trial_tokens > 30 * len(parallel.trace.checks)
    assert alike(waiting.trace.checks, parallel.trace.checks)


def test_where_it_cannot_be_measured_a_request_is_refused():
    for policy in (LYNX(), FirstOf(CoDEStop(), LYNX()), GiveUp(signal="p_safe")):
        with pytest.raises(ValueError, match=r"needs p_safe, which a probe measures, and no probe is given"):
            replace(BASE, policy=policy)


def test_weights_are_known_by_their_values_whatever_they_are_called():
    model = tiny()
    known = identity(model)
    assert known == identity(tiny())
    assert known["dtype"] == "float32"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    assert identity(model)["weights"] != known["weights"]


def test_weights_whose_positions_are_scaled_are_others():
    model = tiny()
    plain = identity(model)["weights"]
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}
    yarn = identity(model)["weights"]
    model.config.rope_parameters["type"] = "yarn"  # as older configurations call it
    assert identity(model)["weights"] == yarn
    model.config.rope_parameters["factor"] = 2.0
    assert len({plain, yarn, identity(model)["weights"]}) == 3


class TestTheChatModel:
    def test_a_policy_without_its_probe_is_refused_when_the_model_is_made(self):
        with pytest.raises(ValueError, match=r"LYNX\(threshold=0.95\) needs p_safe.*earlyexit train"):
            ChatEarlyExit(model="somewhere", exit_policy="lynx")

    def test_a_policy_of_one_call_without_its_probe_is_refused_at_the_call(self, engine):
        with pytest.raises(ValueError, match="no probe is given"):
            ChatEarlyExit(engine=engine).invoke("hi", exit_policy=LYNX(), max_tokens=40)

    def test_a_probe_of_another_model_is_refused_with_both_sides(self, engine, tmp_path):
        folder = some_probe(binds={"weights": "others", "dtype": "float32"}).save(tmp_path)
        llm = ChatEarlyExit(engine=engine, probe=str(folder))
        with pytest.raises(ValueError, match="weights: made for others, loaded is tiny"):
            llm.invoke("hi", max_tokens=40)

    def test_a_probe_that_is_not_there_is_told_before_weights_are_loaded(self, tmp_path):
        llm = ChatEarlyExit(model="/no/such/model", probe=str(tmp_path / "nothing"))
        with pytest.raises(FileNotFoundError, match="no such directory with a probe"):
            llm.invoke("hi")

    def test_it_leaves_by_a_probe_from_a_directory(self, engine, tmp_path):
        binds = ChatEarlyExit(engine=engine).load().fingerprint
        folder = some_probe(binds=binds).save(tmp_path)
        llm = ChatEarlyExit(
            engine=engine, probe=str(folder), temperature=1.0, seed=4, max_tokens=120, thinking_budget=80,
            include_checks=True,
        )  # fmt: skip
        message = llm.invoke("hi", exit_policy=LYNX(0.0))
        record = message.response_metadata["early_exit"]
        assert (record["exited"], record["reason"]) == (True, "sufficient")
        assert record["trial_tokens"] == 0
        assert 0 < record["trace"]["checks"][0]["signals"]["p_safe"] == record["score"] < 1

    def test_a_model_without_hidden_states_says_so(self):
        engine = FunctionEngine(scripted(BYTES, "One. Two.\n\nThree.\n\nFour.", "The answer."))
        llm = ChatEarlyExit(engine=engine, probe=some_probe(layers=(1.0,)), exit_policy=LYNX())
        with pytest.raises(KeyError, match="no hidden states"):
            llm.invoke("hi")
        llm.close()

    def test_depths_are_read_relative_to_the_number_of_layers(self, engine):
        """0.5 of 3 layers is the second block's output, so a probe can name depths that do not divide them."""
        probe = some_probe(layers=(0.5,))
        done = run(engine, replace(BASE, policy=LYNX(1.0), probe=probe, seed=5))[0]
        thirds = run(engine, replace(BASE, policy=LYNX(1.0), probe=some_probe(layers=(2 / LAYERS,)), seed=5))[0]
        assert [c.signals for c in done.trace.checks] == [c.signals for c in thirds.trace.checks]
