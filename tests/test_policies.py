import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_earlyexit.policies import (
    DEER,
    EAT,
    LYNX,
    AnswerConvergence,
    CoDEStop,
    FirstOf,
    GiveUp,
    Never,
    Policy,
    ProbeThenTrial,
    ThinkBrake,
    needs_at,
    policy_from_name,
    replay,
    wanted_kinds,
)
from langchain_earlyexit.trace import KINDS, Check, Decision, Trace

CONFIDENCE = frozenset({"trial_confidence"})


def trace_of(*confidences, positions=None, kinds=None):
    """A trace with these trial confidences; None = no trial was possible."""
    return Trace(
        tuple(
            Check(
                positions[i] if positions else 10 * (i + 1),
                "wait",
                {} if c is None else {"trial_confidence": c},
                kinds[i] if kinds else "reflection",
            )
            for i, c in enumerate(confidences)
        )
    )


@dataclass(frozen=True)
class Patience:
    """A user's own policy: leave at the n-th sentence."""

    n: int
    needs: ClassVar[frozenset[str]] = frozenset({"end_margin"})
    looks: ClassVar[frozenset[str]] = frozenset({"sentence"})

    def decide(self, trace):
        sentences = sum(check.kind == "sentence" for check in trace.checks)
        done = sentences >= self.n
        return Decision(done, "margin" if done else "natural", float(sentences))


confidences = st.lists(
    st.none() | st.floats(0, 1) | st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95, 1.0, math.nan]), max_size=8
)
unit = st.floats(0, 1)
leaves = (
    st.builds(DEER, unit)
    | st.builds(
        lambda lo, hi, steps, delta, tau: CoDEStop(min(lo, hi), max(lo, hi), steps, delta, tau),
        unit, unit, st.integers(1, 5), st.floats(-1, 2), st.floats(0.1, 20),
    )
    | st.builds(Patience, st.integers(1, 4))
    | st.just(Never())
)  # fmt: skip
policies = st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda m: FirstOf(*m)))


@st.composite
def mixed_traces(draw):
    values = draw(confidences)
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=len(values), max_size=len(values)))
    return trace_of(*values, kinds=kinds)


# replay


@given(policies, mixed_traces())
def test_replay_of_a_prefix_exits_where_the_whole_does_or_not_at_all(policy, trace):
    whole = replay(policy, trace)
    for n in range(len(trace.checks) + 1):
        expected = whole if whole is not None and whole < n else None
        assert replay(policy, Trace(trace.checks[:n])) == expected


@given(policies, mixed_traces())
def test_replay_exits_where_a_loop_that_asks_at_each_check_it_looks_at_does(policy, trace):
    live = None
    for i, check in enumerate(trace.checks):
        if check.kind in policy.looks and policy.decide(Trace(trace.checks[: i + 1])).exit:
            live = i
            break
    assert replay(policy, trace) == live
    assert live is None or trace.checks[live].kind in policy.looks


@given(policies, mixed_traces())
def test_an_answer_or_a_count_known_only_afterwards_cannot_change_a_replay(policy, trace):
    told = Trace(trace.checks, answer="1", gold="1", thinking_tokens=5)
    assert replay(policy, told) == replay(policy, trace)


def test_never_never_exits():
    assert replay(Never(), trace_of(1.0, 1.0)) is None
    assert Never().decide(trace_of(1.0)) == Decision(exit=False, reason="natural")


# DEER


def test_deer_needs_more_than_its_threshold():
    assert replay(DEER(0.95), trace_of(0.94, 0.95, 0.951)) == 2
    assert replay(DEER(1.0), trace_of(1.0)) is None


def test_deer_scores_the_confidence_whether_it_leaves_or_not():
    assert DEER().decide(trace_of(0.2, 0.97)) == Decision(exit=True, reason="confident", score=0.97)
    assert DEER().decide(trace_of(0.97, 0.2)) == Decision(exit=False, reason="natural", score=0.2)


@pytest.mark.parametrize("policy", [DEER(0.0), CoDEStop(r_min=0, r_max=0), FirstOf(DEER(0.0))])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_no_policy_leaves_where_no_trial_was_possible(policy, value):
    assert policy.decide(trace_of(0.5, value)) == Decision(exit=False, reason="natural")


@pytest.mark.parametrize("policy", [Never(), DEER(0.0), CoDEStop(), FirstOf(DEER(0.0), Never())])
def test_an_empty_trace_gives_no_reason_to_leave(policy):
    assert policy.decide(Trace()) == Decision(exit=False, reason="natural")


# CoDE-Stop


def test_codestop_agrees_with_a_table_worked_by_hand():
    # positions T = 100, 200, 400, 800, 1600; c = .70, .50, .60, .30, .40; delta .55, tau 5
    # ramp r_k: min(.95, .9 + .025 k) = .925, .95, .95, .95, .95: no c reaches it
    # unstable where 2 c_i - c_{i-1} < .55, i from 2:
    #   i=2: 1.00 - .70 = .30 yes | i=3: 1.20 - .50 = .70 no | i=4: .60 - .60 = .00 yes | i=5: .80 - .30 = .50 yes
    # D_2 = ln(200/200) + 1                                              = 1
    # D_3 = ln(400/200) + 1                                              = 1.6931
    # D_4 = (ln(800/200) + 1) + (ln 1 + 1)           = 2.3863 + 1        = 3.3863
    # D_5 = (ln(1600/200)+1) + (ln(1600/800)+1) + 1  = 3.0794 + 1.6931 + 1 = 5.7726
    trace = trace_of(0.7, 0.5, 0.6, 0.3, 0.4, positions=(100, 200, 400, 800, 1600))
    assert replay(CoDEStop(tau=5), trace) == 4
    decision = CoDEStop(tau=5).decide(trace)
    assert (decision.exit, decision.reason) == (True, "degenerate")
    assert decision.score == pytest.approx(5.7726, abs=1e-4)
    for tau, first in [(1.0, 1), (1.6931, 2), (1.6932, 3), (3.3862, 3), (3.3864, 4), (5.7725, 4), (5.7727, None)]:
        assert replay(CoDEStop(tau=tau), trace) == first, tau


def test_codestops_ramp_counts_checks_from_one():
    # r_1 = .925, r_2 = .95 and stays: counted from 0, .90 would pass at the first check
    for confidence, leaves in [(0.9, False), (0.924, False), (0.926, True)]:
        assert CoDEStop().decide(trace_of(confidence)).exit is leaves
    assert not CoDEStop().decide(trace_of(0.9, 0.949)).exit
    assert CoDEStop().decide(trace_of(0.9, 0.9, 0.951)) == Decision(exit=True, reason="confident", score=0.951)


def test_codestop_leaves_at_equality_in_both_tests():
    assert CoDEStop(r_min=0.5, r_max=0.5).decide(trace_of(0.5)).reason == "confident"
    assert CoDEStop(tau=1.0).decide(trace_of(0.5, 0.5, positions=(5, 5))).reason == "degenerate"  # D_2 = 1 exactly


def test_codestop_is_confident_before_it_is_degenerate():
    assert CoDEStop(r_min=0.3, r_max=0.3, tau=1.0).decide(trace_of(0.1, 0.3)).reason == "confident"


def test_codestop_has_no_instability_at_the_first_check():
    assert not CoDEStop(tau=1e-9).decide(trace_of(0.0)).exit


def test_codestop_counts_a_low_confidence_that_does_not_drop():
    # the released code counts strict drops only; the paper counts low and not improving
    assert replay(CoDEStop(tau=2.0), trace_of(0.2, 0.2, 0.2)) == 2


def test_codestop_is_unstable_below_delta_only():
    at_delta = trace_of(0.5, 0.5, positions=(5, 5))  # 2 * .5 - .5 = .5
    assert not CoDEStop(delta=0.5, tau=1.0).decide(at_delta).exit
    assert CoDEStop(delta=0.51, tau=1.0).decide(at_delta).exit


def test_codestop_without_a_ramp_floor_leaves_at_the_first_check_unsure_as_it_may_be():
    unsure = trace_of(0.5, 0.9, 0.99)
    assert replay(CoDEStop(r_min=0.0), unsure) == 0
    assert replay(CoDEStop(), unsure) == 2


def test_codestop_passes_over_checks_without_a_trial_as_if_they_were_not_there():
    gaps = trace_of(0.7, None, 0.5, math.nan, 0.6, positions=(100, 150, 200, 300, 400))
    none = trace_of(0.7, 0.5, 0.6, positions=(100, 200, 400))
    policy = CoDEStop(tau=1.69)
    assert policy.decide(gaps) == policy.decide(none)
    assert replay(policy, gaps) == 4


def test_codestop_counts_only_checks_of_kinds_it_looks_at():
    # .93 passes the ramp at k = 1 (.925) but not at k = 2 (.95), which the sentence would make it
    assert CoDEStop().decide(trace_of(0.1, 0.93, kinds=("sentence", "reflection"))).exit
    assert not CoDEStop().decide(trace_of(0.1, 0.93, kinds=("reflection", "reflection"))).exit
    # and the sentences between would add to D
    kinds = ("reflection", "sentence", "sentence", "reflection")
    assert not CoDEStop(tau=2.0).decide(trace_of(0.7, 0.1, 0.1, 0.6, kinds=kinds)).exit
    assert not CoDEStop().decide(trace_of(0.99, kinds=("sentence",))).exit


# FirstOf


def test_the_first_named_member_that_leaves_wins():
    trace = trace_of(0.97)
    assert FirstOf(DEER(0.9), CoDEStop(r_min=0.1, r_max=0.1)).decide(trace) == DEER(0.9).decide(trace)
    low = trace_of(0.2, 0.2)
    assert FirstOf(DEER(), CoDEStop(tau=1.0)).decide(low).reason == "degenerate"
    assert FirstOf(CoDEStop(tau=1.0, r_min=0, r_max=0), CoDEStop(tau=1.0)).decide(low).reason == "confident"


def test_members_are_asked_only_at_kinds_they_look_at():
    policy = FirstOf(DEER(), Patience(2))
    kinds = ("sentence", "reflection", "sentence")
    assert replay(policy, trace_of(0.99, 0.5, 0.99, kinds=kinds)) == 2
    assert policy.decide(trace_of(0.99, kinds=("sentence",))) == Decision(exit=False, reason="natural", score=1.0)


def test_going_on_keeps_the_first_score_there_is():
    assert FirstOf(Never(), DEER(0.9), DEER(0.99)).decide(trace_of(0.4)).score == 0.4


@given(policies, policies, mixed_traces())
def test_first_of_two_exits_at_the_earlier_of_their_exits(a, b, trace):
    exits = [i for i in (replay(a, trace), replay(b, trace)) if i is not None]
    assert replay(FirstOf(a, b), trace) == min(exits, default=None)


@given(policies, mixed_traces())
def test_nesting_changes_nothing(policy, trace):
    nested = FirstOf(FirstOf(policy))
    assert replay(nested, trace) == replay(policy, trace)


def test_first_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        FirstOf()


# needs, looks and wanted kinds


def test_needs_at_a_kind_are_those_of_the_members_that_look_there():
    policy = FirstOf(DEER(), FirstOf(Patience(1), Never()))
    assert needs_at(policy, "reflection") == CONFIDENCE
    assert needs_at(policy, "sentence") == {"end_margin"}
    assert needs_at(DEER(), "sentence") == frozenset()
    assert needs_at(Never(), "reflection") == frozenset()
    assert policy.needs == CONFIDENCE | {"end_margin"}
    assert policy.looks == {"reflection", "paragraph", "interval", "sentence"}


def test_a_policy_stays_with_the_models_main_decision_points_when_it_can():
    primary, offered = frozenset({"reflection"}), frozenset(KINDS)
    assert wanted_kinds(DEER(), primary, offered) == {"reflection"}
    assert wanted_kinds(DEER(looks={"paragraph"}), primary, offered) == {"paragraph"}
    assert wanted_kinds(Patience(1), primary, offered) == {"sentence"}
    assert wanted_kinds(FirstOf(DEER(), Patience(1)), primary, offered) == {"reflection", "sentence"}
    assert wanted_kinds(Never(), primary, offered) == frozenset()
    assert wanted_kinds(DEER(looks={"reflection"}), frozenset({"interval"}), frozenset({"interval"})) == frozenset()


# the record form


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Never(), "Never()"),
        (DEER(), "DEER(threshold=0.95)"),
        (DEER(0.9, looks={"sentence", "interval"}), "DEER(threshold=0.9, looks={'interval', 'sentence'})"),
        (CoDEStop(), "CoDEStop(r_min=0.9, r_max=0.95, ramp_steps=2, delta=0.55, tau=3.5)"),
        (FirstOf(DEER(0.9), FirstOf(Never())), "FirstOf(DEER(threshold=0.9), FirstOf(Never()))"),
    ],
)
def test_the_repr_of_a_policy_makes_it_again(policy, text):
    assert repr(policy) == text
    assert eval(text) == policy  # noqa: S307


@given(policies)
def test_equal_policies_are_equal_and_hash_so(policy):
    again = eval(repr(policy))  # noqa: S307
    assert again == policy
    assert hash(again) == hash(policy)
    assert isinstance(policy, Policy)


def test_policies_of_one_kind_with_other_fields_differ():
    assert DEER(0.9) != DEER(0.95)
    assert FirstOf(DEER(), Never()) != FirstOf(Never(), DEER())
    assert DEER() != CoDEStop()


@pytest.mark.parametrize(("name", "policy"), [("never", Never()), ("deer", DEER()), ("codestop", CoDEStop())])
def test_a_policy_goes_by_its_name(name, policy):
    assert policy_from_name(name) == policy


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    known = "codestop, convergence, deer, eat, giveup, lynx, never, probethentrial, thinkbrake"
    with pytest.raises(ValueError, match=f"unknown exit policy 'dear'; known are {known}"):
        policy_from_name("dear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEER(1.1), "threshold must be in"),
        (lambda: DEER(math.nan), "threshold must be in"),
        (lambda: DEER(looks="reflection"), "looks must name kinds"),
        (lambda: DEER(looks=()), "looks must name kinds"),
        (lambda: CoDEStop(r_min=0.96), "r_min must not be above r_max"),
        (lambda: CoDEStop(r_max=1.5), "r_max must be in"),
        (lambda: CoDEStop(ramp_steps=0), "ramp_steps must be"),
        (lambda: CoDEStop(ramp_steps=1.5), "ramp_steps must be"),
        (lambda: CoDEStop(delta=math.inf), "delta must be finite"),
        (lambda: CoDEStop(tau=0), "tau must be above 0"),
        (lambda: CoDEStop(tau=math.nan), "tau must be above 0"),
    ],
)
def test_a_field_out_of_range_is_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestAnswerConvergence:
    @staticmethod
    def trace(*answers):
        return Trace(tuple(Check(i + 1, "wait", {"trial_confidence": 0.5}, answer=a) for i, a in enumerate(answers)))

    @pytest.mark.parametrize(
        ("answers", "leaves"),
        [
            (("4", "4", "4"), 2),
            (("5", "4", "4", "4"), 3),
            (("4", "4", "5", "4", "4"), None),
            (("4", "4", None, "4"), None),
            ((None, None, None), None),
        ],
    )
    def test_it_leaves_at_the_third_equal_answer_in_a_row(self, answers, leaves):
        assert replay(AnswerConvergence(k=3), self.trace(*answers)) == leaves

    def test_its_reason_is_converged_and_its_score_the_row(self):
        assert AnswerConvergence(k=2).decide(self.trace("5", "4", "4")) == Decision(True, "converged", 2.0)

    def test_one_answer_agrees_with_nothing(self):
        with pytest.raises(ValueError, match="k must be an int of at least 2"):
            AnswerConvergence(k=1)


class TestEAT:
    @staticmethod
    def trace(*entropies):
        return Trace(tuple(Check(i + 1, "\n\n", {"end_entropy": x}, kind="paragraph") for i, x in enumerate(entropies)))

    def test_the_variance_is_the_paper_s_by_hand(self):
        # a = 0.5: m1 = 2, v1 = 0; m2 = 0.5*1 + 0.5*2 = 1.5, v2 = 0.5*(1-1.5)^2 = 0.125;
        # m3 = 0.5*1 + 0.5*1.5 = 1.25, v3 = 0.5*(1-1.25)^2 + 0.5*0.125 = 0.03125 + 0.0625 = 0.09375
        policy = EAT(threshold=0.1, alpha=0.5, min_checks=2)
        assert policy.decide(self.trace(2.0, 1.0)).score == pytest.approx(0.125)
        assert policy.decide(self.trace(2.0, 1.0, 1.0)) == Decision(True, "converged", pytest.approx(0.09375))
        assert replay(policy, self.trace(2.0, 1.0, 1.0)) == 2

    def test_it_waits_for_its_first_checks_however_calm(self):
        assert replay(EAT(threshold=1.0, min_checks=4), self.trace(*[0.3] * 10)) == 3

    def test_a_restless_entropy_keeps_it_thinking(self):
        assert replay(EAT(threshold=0.01, alpha=0.5, min_checks=2), self.trace(*[0.0, 2.0] * 10)) is None

    @pytest.mark.parametrize("fields", [{"threshold": 0}, {"alpha": 0}, {"alpha": 1.5}, {"min_checks": 1}])
    def test_fields_that_cannot_be_meant_are_refused(self, fields):
        with pytest.raises(ValueError, match="must be"):
            EAT(**fields)


class TestProbeThenTrial:
    policy = ProbeThenTrial(sure=0.9, ask=0.5, threshold=0.8)

    @staticmethod
    def trace(*measured):
        names = ("p_safe", "trial_confidence")
        checks = (dict(zip(names, values, strict=False)) for values in measured)
        return Trace(tuple(Check(i + 1, "Wait", signals) for i, signals in enumerate(checks)))

    def test_where_the_probe_is_sure_it_decides_alone(self):
        assert self.policy.decide(self.trace((0.95,))) == Decision(True, "sufficient", 0.95)
        assert self.policy.decide(self.trace((0.95, 0.1))).exit
        assert self.policy.decide(self.trace((0.5, 0.99))) == Decision(False, "natural", 0.5)

    def test_in_between_a_trial_answer_decides(self):
        assert self.policy.decide(self.trace((0.9, 0.81))) == Decision(True, "confident", 0.81)
        assert self.policy.decide(self.trace((0.6, 0.8))) == Decision(False, "natural", 0.8)
        assert replay(self.policy, self.trace((0.4, 0.9), (0.6, 0.7), (0.7, 0.9), (0.99, 0.9))) == 2

    def test_what_could_not_be_measured_is_no_reason_to_leave(self):
        assert replay(self.policy, self.trace((), (math.nan, 0.99), (0.6,), (0.6, math.nan))) is None

    def test_a_trial_answer_is_asked_for_in_between_alone(self):
        for p, asked in ((0.5, False), (0.51, True), (0.9, True), (0.91, False)):
            assert ("trial_confidence" in needs_at(self.policy, "reflection", {"p_safe": p})) == asked
        assert needs_at(self.policy, "reflection") == {"p_safe", "trial_confidence"}
        assert needs_at(self.policy, "sentence", {"p_safe": 0.6}) == frozenset()
        assert needs_at(FirstOf(self.policy, DEER()), "reflection", {"p_safe": 0.1}) >= {"trial_confidence"}

    @pytest.mark.parametrize("fields", [{"sure": 1.5}, {"ask": -0.1}, {"threshold": 2}, {"sure": 0.5, "ask": 0.6}])
    def test_fields_that_cannot_be_meant_are_refused(self, fields):
        with pytest.raises(ValueError, match=r"must be|is above sure=0.5"):
            ProbeThenTrial(**fields)


class TestThinkBrake:
    @staticmethod
    def trace(*margins):
        return Trace(tuple(Check(i + 1, ".", {"end_margin": x}, kind="sentence") for i, x in enumerate(margins)))

    def test_it_leaves_when_the_end_of_thinking_is_near_the_likeliest_token(self):
        assert replay(ThinkBrake(margin=0.5), self.trace(9.0, 0.51, 0.5, 0.0)) == 2
        assert ThinkBrake(margin=0.5).decide(self.trace(0.2)) == Decision(True, "margin", 0.2)

    def test_an_unmeasured_margin_is_no_reason_to_leave(self):
        assert replay(ThinkBrake(margin=5.0), self.trace(math.nan, math.inf)) is None

    def test_it_looks_at_sentences_also_in_models_with_cue_words(self):
        offered = frozenset(KINDS)
        assert wanted_kinds(ThinkBrake(), frozenset({"reflection"}), offered) == {"sentence"}
        both = FirstOf(DEER(), ThinkBrake())
        assert wanted_kinds(both, frozenset({"reflection"}), offered) == {"reflection", "sentence"}
        assert needs_at(both, "sentence") == {"end_margin"}


class TestLYNX:
    @staticmethod
    def trace(*values):
        return Trace(tuple(Check(i + 1, "wait", {"p_safe": p}) for i, p in enumerate(values)))

    def test_its_reason_is_sufficient_and_its_score_the_probability(self):
        assert LYNX(0.9).decide(self.trace(0.2, 0.93)) == Decision(True, "sufficient", 0.93)
        assert LYNX(0.9).decide(self.trace(0.93, 0.9)) == Decision(False, "natural", 0.9)

    def test_a_quantile_of_too_few_cues_is_infinite_and_never_leaves(self):
        assert replay(LYNX(q_safe=math.inf, q_unsafe=math.inf), self.trace(0.5, 1.0)) is None
        assert replay(LYNX(q_safe=math.inf, q_unsafe=0.7), self.trace(0.7, 0.71)) == 1

    def test_a_set_of_both_or_of_none_is_no_reason_to_leave(self):
        assert replay(LYNX(q_safe=0.4, q_unsafe=0.8), self.trace(0.7)) is None  # both
        assert replay(LYNX(q_safe=0.1, q_unsafe=0.4), self.trace(0.7)) is None  # neither
        assert replay(LYNX(q_safe=0.4, q_unsafe=0.4), self.trace(0.7)) == 0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_without_a_probability_it_goes_on(self, value):
        assert not LYNX(0.0).decide(self.trace(value)).exit
        assert not LYNX(0.0).decide(trace_of(1.0)).exit

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (LYNX(), "LYNX(threshold=0.95)"),
            (LYNX(q_safe=0.2, q_unsafe=math.inf), "LYNX(q_safe=0.2, q_unsafe=float('inf'))"),
        ],
    )
    def test_its_repr_makes_it_again(self, policy, text):
        assert repr(policy) == text
        assert eval(text) == policy  # noqa: S307

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"q_safe": 0.1}, "q_unsafe is missing"),
            ({"threshold": 0.5, "q_safe": 0.1, "q_unsafe": 0.1}, "not both"),
            ({"threshold": 1.5}, "threshold must be in"),
            ({"q_safe": -0.1, "q_unsafe": 0.1}, "q_safe must be at least 0"),
            ({"q_safe": 0.1, "q_unsafe": math.nan}, "q_unsafe must be at least 0"),
        ],
    )
    def test_fields_that_cannot_be_meant_are_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            LYNX(**fields)


class TestGiveUp:
    def test_its_reason_is_unpromising_and_its_score_the_best_of_the_row(self):
        decision = GiveUp(0.3, patience=2, min_checks=2).decide(trace_of(0.9, 0.1, 0.2))
        assert decision == Decision(True, "unpromising", 0.2)

    def test_one_hopeful_check_starts_the_row_again(self):
        policy = GiveUp(0.3, patience=2, min_checks=1)
        assert replay(policy, trace_of(0.1, 0.9, 0.1, 0.1)) == 3

    def test_it_waits_for_its_first_checks_however_hopeless(self):
        assert replay(GiveUp(0.3, patience=2, min_checks=4), trace_of(*[0.0] * 6)) == 3

    def test_checks_without_the_signal_count_for_nothing(self):
        policy = GiveUp(0.3, patience=2, min_checks=2)
        assert replay(policy, trace_of(0.1, None, math.nan, 0.1)) == 3
        assert replay(GiveUp(signal="p_safe", patience=1, min_checks=1), trace_of(0.0, 0.0)) is None

    def test_it_needs_the_one_signal_it_reads(self):
        assert GiveUp().needs == CONFIDENCE
        assert GiveUp(signal="p_safe").needs == {"p_safe"}

    @pytest.mark.parametrize("fields", [{"threshold": 2}, {"patience": 0}, {"min_checks": 0}, {"signal": "end_margin"}])
    def test_fields_that_cannot_be_meant_are_refused(self, fields):
        with pytest.raises(ValueError, match="must be"):
            GiveUp(**fields)


@pytest.mark.parametrize("name", ["never", "deer", "codestop", "lynx", "convergence", "eat", "thinkbrake", "giveup"])
def test_every_policy_has_a_name(name):
    assert isinstance(policy_from_name(name), Policy)
