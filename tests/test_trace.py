import copy
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_earlyexit.trace import KINDS, REASONS, Check, Decision, Trace

counts = st.none() | st.integers(0, 10**6)
texts = st.none() | st.text(max_size=20)
any_float = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def traces(draw):
    positions = sorted(draw(st.lists(st.integers(1, 10_000), max_size=6)))
    checks = tuple(
        Check(
            position,
            draw(st.text(max_size=8)),
            draw(st.dictionaries(st.text(max_size=8), any_float, max_size=3)),
            draw(st.sampled_from(KINDS)),
            draw(texts),
            draw(texts),
        )
        for position in positions
    )
    per_check = st.just(()) | st.lists(st.integers(0, 500), min_size=len(checks), max_size=len(checks)).map(tuple)
    return Trace(
        checks,
        *(draw(texts) for _ in range(4)),
        *(draw(counts) for _ in range(3)),
        trial_tokens=draw(per_check),
        exit_tokens=draw(per_check),
        read_tokens=draw(per_check),
        seed=draw(counts),
        reason=draw(st.none() | st.sampled_from(REASONS)),
    )


@given(traces())
def test_a_trace_survives_json_on_one_line_of_strict_json(trace):
    line = trace.to_json()
    assert "\n" not in line

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    json.loads(line, parse_constant=refuse)
    assert Trace.from_json(line) == trace
    assert hash(Trace.from_json(line)) == hash(trace)


@given(traces())
def test_a_trace_survives_copying_and_pickling(trace):
    assert copy.deepcopy(trace) == trace
    assert pickle.loads(pickle.dumps(trace)) == trace  # noqa: S301


def test_floats_that_are_not_finite_are_written_as_strings():
    trace = Trace((Check(3, "wait", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5}),))
    assert json.loads(trace.to_json())["checks"][0]["signals"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 0.5}
    assert math.isnan(Trace.from_json(trace.to_json()).checks[0].signals["a"])


def test_signals_cannot_be_changed_afterwards_from_inside_or_outside():
    measured = {"trial_confidence": 0.5}
    check = Check(1, "wait", measured)
    measured["trial_confidence"] = 0.9
    assert check.signals["trial_confidence"] == 0.5
    with pytest.raises(TypeError):
        check.signals["trial_confidence"] = 0.9


def test_signals_read_and_compare_as_a_dict():
    check = Check(1, "wait", {"a": 1, "b": 2.0})
    assert check.signals == {"b": 2.0, "a": 1.0}
    assert dict(check.signals) == {"a": 1.0, "b": 2.0}
    assert check == Check(1, "wait", {"b": 2.0, "a": 1.0})
    assert check != Check(1, "wait", {"a": 1.0})


def test_every_nan_is_the_same_nan():
    assert Check(1, "wait", {"a": float("nan")}) == Check(1, "wait", {"a": math.nan})


@pytest.mark.parametrize("position", [0, -1, 1.0, True, "3"])
def test_a_position_is_a_whole_number_from_one(position):
    with pytest.raises(ValueError, match="position"):
        Check(position, "wait")


def test_an_unknown_kind_is_refused_naming_the_known_ones():
    with pytest.raises(ValueError, match="reflection, paragraph, sentence, interval"):
        Check(1, "wait", kind="pause")


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5]])
def test_a_signal_is_a_plain_float(value):
    with pytest.raises(ValueError, match="'p_safe' must be a plain float"):
        Check(1, "wait", {"p_safe": value})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"checks": [], "colour": "red"}', "unknown key.* in a Trace: colour"),
        ('{"checks": [{"position": 1, "cue": "wait", "conf": 1}]}', "unknown key.* in a Check: conf"),
        ('{"checks": [{"cue": "wait"}]}', "lacks position"),
        ('{"checks": [{"position": 1, "cue": "wait", "signals": {"a": "high"}}]}', "plain float"),
        ("[]", "one JSON object"),
    ],
)
def test_a_foreign_line_is_a_clear_error(line, message):
    with pytest.raises(ValueError, match=message):
        Trace.from_json(line)


def test_absent_keys_take_their_defaults():
    assert Trace.from_json("{}") == Trace()
    assert Trace.from_json('{"checks": [{"position": 2, "cue": "hmm"}]}') == Trace((Check(2, "hmm"),))


def test_positions_never_go_down_but_two_kinds_may_share_one():
    Trace((Check(4, "\n\n", kind="paragraph"), Check(4, "wait")))
    with pytest.raises(ValueError, match="must not go down: 4, then 3"):
        Trace((Check(4, "wait"), Check(3, "wait")))


def test_counts_per_check_are_as_many_as_the_checks():
    Trace((Check(4, "wait"),), trial_tokens=(22,), exit_tokens=(9,))
    with pytest.raises(ValueError, match="trial_tokens counts 2 checks, the trace has 1"):
        Trace((Check(4, "wait"),), trial_tokens=(22, 22))


def test_a_decision_has_a_known_reason_and_an_exit_is_never_natural():
    for reason in REASONS:
        Decision(exit=False, reason=reason)
    with pytest.raises(ValueError, match="reason must be one of natural, confident"):
        Decision(exit=True, reason="bored")
    with pytest.raises(ValueError, match="other than 'natural'"):
        Decision(exit=True, reason="natural")
