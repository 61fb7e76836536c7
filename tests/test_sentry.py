"""The eye inside a server: it sees what the loop at home sees, and what it says arrives to the last bit."""

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reasoners_for_tests import tiny_reasoner
from test_lynx import BASE, CODEC, ids_kept, some_probe

from langchain_earlyexit.binding import Binding
from langchain_earlyexit.controller import program
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.function import FunctionEngine
from langchain_earlyexit.engines.program import Checked, Done
from langchain_earlyexit.policies import DEER, LYNX, FirstOf, GiveUp, ThinkBrake, wanted_kinds
from langchain_earlyexit.sentry import Orders, Report, Sentry, greeted, greeting, heard, rounded, told

PROBE = some_probe()


def orders_of(request, **changes):
    given = {
        "cues": request.cues, "kinds": wanted_kinds(request.policy, request.cues.primary, request.cues.offered),
        "end": request.tags[1], "eos": tuple(sorted(CODEC.eos)), "start": len(request.prompt),
        "reports": {"p_safe": 1}, "policy": request.policy, "probe": PROBE.digest,
    }  # fmt: skip
    return Orders(**(given | changes))


@pytest.fixture(scope="module")
def engine():
    made = tiny_reasoner()
    yield made
    made.close()


def lived(engine, request):
    """The thinking tokens that were read, cue included, the checks and the end of a live run."""
    ids = []
    events = list(engine.submit(ids_kept(program(request), ids)))
    done = events[-1]
    assert isinstance(done, Done)
    read = max(done.thinking_tokens, *done.trace.read_tokens)
    return ids[len(request.prompt) :][:read], [e for e in events if isinstance(e, Checked)], done


def watched(sentry, ids, measured):
    """What a sentry makes of a chain: (position, cue, kind) of each check, and where it left."""
    found, left = [], None
    for token in ids:
        sentry.push(token)
        if sentry.hit is not None:
            found.append((sentry.hit.position, sentry.hit.cue, sentry.hit.kind))
            if sentry.measured({name: measured[len(found) - 1][name] for name in sentry.wanted}):
                left = len(found) - 1
                assert sentry.over
                break
    return found, left


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "policy",
    [
        *(LYNX(threshold) for threshold in (0.0, 0.3, 0.5, 1.0)),
        GiveUp(0.9, 2, 2, "p_safe"),
        FirstOf(LYNX(0.7), GiveUp(0.2, 2, 3, "p_safe")),
    ],
)
def test_it_leaves_at_the_check_at_which_the_loop_at_home_leaves(engine, policy, seed):
    request = replace(BASE, policy=policy, probe=PROBE, seed=seed, look="wait")
    ids, checked, done = lived(engine, request)
    sentry = Sentry(Orders.from_json(orders_of(request).to_json()), CODEC)
    found, left = watched(sentry, ids, [event.check.signals for event in checked])
    assert found == [(e.check.position, e.check.cue, e.check.kind) for e in checked]
    assert (left is not None) == (done.reason in {"sufficient", "unpromising"})
    assert left in {None, len(checked) - 1}


def test_it_sees_nothing_after_the_end_of_thinking_and_never_leaves_a_chain_it_has_not_seen_begin(engine):
    sentry = Sentry(orders_of(replace(BASE, policy=LYNX(0.0), probe=PROBE)), CODEC)
    for token in CODEC.encode("2 + 2 </think> w 1 w 1 a."):
        sentry.push(token)
        assert sentry.hit is None
    assert sentry.over
    late = Sentry(orders_of(replace(BASE, policy=LYNX(0.0), probe=PROBE)), CODEC, watching=True)
    found, left = watched(late, CODEC.encode("2 w 3 w 4"), [{"p_safe": 1.0}] * 9)
    assert found
    assert left is None


def test_a_policy_that_reads_margins_is_asked_for_margins_at_its_own_checks_only():
    policy = FirstOf(LYNX(0.9), ThinkBrake(0.5))
    request = replace(BASE, policy=policy, probe=PROBE, cues=CueSpec(words=("w",)))
    sentry = Sentry(orders_of(request, reports={"p_safe": 1, "end_margin": 0}), CODEC)
    wanted = {}
    for token in CODEC.encode("so. w 1"):
        sentry.push(token)
        if sentry.hit is not None:
            wanted[sentry.hit.kind] = sentry.wanted
            sentry.measured(dict.fromkeys(sentry.wanted, 0.6))
    assert wanted == {"sentence": {"end_margin"}, "reflection": {"p_safe"}}


@given(st.sampled_from(["p_safe", "end_margin"]), st.floats(0, 200), st.booleans(), st.integers(0, 2**16))
def test_what_is_told_as_a_log_probability_in_single_precision_is_heard_to_the_last_bit(signal, value, left, seed):
    logits = torch.tensor(np.random.default_rng(seed).normal(0, 20, 300), dtype=torch.float32)
    logits[7] = -math.inf  # whatever the model thinks of that token
    logits[7] = torch.logsumexp(logits, -1) + told(signal, Report(value, left))
    got = heard(signal, float(torch.log_softmax(logits, -1)[7]))
    assert got == Report(rounded(signal, value), left)
    assert rounded(signal, got.value) == got.value
    assert math.exp(told(signal, Report(value, left))) == 0.0


def test_rounding_moves_a_score_by_less_than_a_hundred_thousandth():
    rng = random.Random(1)
    assert all(abs(rounded("p_safe", p) - p) < 1e-5 for p in (rng.random() for _ in range(1000)))
    assert rounded("p_safe", 0.0) == 0.0
    assert rounded("p_safe", 1.0) == 1.0


def test_what_could_not_be_measured_and_a_sentry_out_of_order_are_told_too():
    missing, failed = (heard("p_safe", told("p_safe", Report(math.nan, failed=f))) for f in (False, True))
    assert math.isnan(missing.value)
    assert not missing.failed
    assert failed.failed


@given(st.one_of(st.floats(-499, 0), st.just(-9999.0), st.just(-math.inf)))
def test_a_model_s_own_log_probability_is_no_report(logprob):
    assert heard("p_safe", logprob) is None


def test_orders_survive_their_json_and_say_what_is_wrong_with_others():
    request = replace(BASE, policy=FirstOf(LYNX(q_safe=0.1, q_unsafe=math.inf), ThinkBrake()), probe=PROBE)
    orders = orders_of(request, reports={"p_safe": 1, "end_margin": 0})
    assert Orders.from_json(orders.to_json()) == orders
    for text in ("", "[]", "{}", orders.to_json().replace('"format": 1', '"format": 2'), orders.to_json()[:-1]):
        with pytest.raises(ValueError, match="no orders for a sentry"):
            Orders.from_json(text)
    with pytest.raises(ValueError, match="measures p_safe, end_margin, not trial_confidence"):
        orders_of(request, reports={"trial_confidence": 1})
    with pytest.raises(ValueError, match="an id of its own"):
        orders_of(request, reports={"p_safe": 1, "end_margin": 1})
    with pytest.raises(ValueError, match="without the digest"):
        orders_of(request, probe=None)
    for name, wrong in (
        ("start", 10.5),
        ("start", True),
        ("eos", (2, -1)),
        ("eos", ("2",)),
        ("reports", {"p_safe": 1.0}),
    ):
        with pytest.raises(ValueError, match=f"{name} takes whole numbers from 0 on, not"):
            orders_of(request, **{name: wrong})


def test_a_policy_that_needs_a_trial_is_not_asked_to_leave_on_its_own():
    sentry = Sentry(orders_of(replace(BASE, policy=FirstOf(LYNX(0.9), DEER()), probe=PROBE), policy=None), CODEC)
    found, left = watched(sentry, CODEC.encode("2 w 3 w 4"), [{"p_safe": 1.0}] * 9)
    assert found
    assert left is None


def test_a_request_whose_score_could_not_come_home_is_refused_whether_or_not_the_probe_is_given_here():
    request = replace(BASE, policy=LYNX(0.5), sentry=PROBE.digest)
    assert set(request.orders.reports.values()) < CODEC.special - CODEC.eos
    assert request.orders.policy == LYNX(0.5)
    crowded = copy.copy(CODEC)
    crowded.special = CODEC.eos
    for probe in (None, PROBE):
        with pytest.raises(ValueError, match="has none to spare"):
            replace(request, codec=crowded, probe=probe)
    assert replace(request, shadow=True).orders.policy is None
    assert replace(request, policy=FirstOf(LYNX(0.5), DEER())).orders.policy is None


@pytest.mark.parametrize("held", ["0123456789abcdef", ""])
def test_a_probe_that_is_not_the_one_its_server_has_is_refused_with_both_named(held):
    engine = FunctionEngine(lambda ids: np.zeros(261, np.float32))
    try:
        engine.sentry = PROBE.digest
        assert Binding.of(engine, PROBE).probe is PROBE
        engine.sentry = held
        with pytest.raises(ValueError, match=f"digest='{PROBE.digest}'.* is not the probe .* digest is '{held}'"):
            Binding.of(engine, PROBE)
    finally:
        engine.close()


@given(st.lists(st.integers(0, 50000), min_size=21, max_size=21))
def test_only_a_plugin_greets(ids):
    assert greeted(greeting(PROBE.digest)) == (True, PROBE.digest)
    assert greeted(greeting(None)) == (True, None)
    assert greeted(tuple(ids)) == (False, None)
    assert greeted(greeting(None)[:-1]) == (False, None)
