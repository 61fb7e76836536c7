"""From traces to a calibration: what counts as a loss, which paths there are, and what is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces_for_tests import BINDS, trace_of

from langchain_earlyexit import (
    DEER,
    EAT,
    AnswerConvergence,
    Check,
    CoDEStop,
    FirstOf,
    Never,
    ProbeThenTrial,
    ThinkBrake,
    Trace,
    replay,
)
from langchain_earlyexit.lab.calibrate import LEVELS, calibrate, disagreement, first_exits, replay_losses, servable
from langchain_earlyexit.lab.conformal import conformal_quantile, lynx_by_cue
from langchain_earlyexit.lab.learn_then_test import questions_needed
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.lab.transfer import transfer_tau
from langchain_earlyexit.policies import LYNX, GiveUp

KNOBS = [
    DEER(),
    CoDEStop(),
    LYNX(),
    EAT(min_checks=2, looks=frozenset({"reflection", "paragraph"})),
    ThinkBrake(),
    ProbeThenTrial(),
    AnswerConvergence(),
    GiveUp(),
    FirstOf(CoDEStop(), GiveUp()),
    FirstOf(ThinkBrake(), AnswerConvergence()),
]
PATH = (Never(), DEER(0.9), DEER(0.5))


@st.composite
def any_trace(draw):
    checks = []
    for i in range(draw(st.integers(0, 8))):
        signals = {
            "trial_confidence": draw(st.floats(0, 1)),
            "p_safe": draw(st.floats(0, 1)),
            "end_margin": draw(st.floats(0, 30)),
            "end_entropy": draw(st.floats(0, 3)),
        }
        kind = draw(st.sampled_from(["reflection", "paragraph", "sentence"]))
        checks.append(Check(7 * (i + 1), "x", signals, kind, answer=draw(st.sampled_from(["1", "2"]))))
    return Trace(tuple(checks))


class TestPaths:
    @pytest.mark.parametrize("policy", KNOBS, ids=repr)
    @settings(max_examples=40)
    @given(trace=any_trace())
    def test_go_from_never_leaving_to_bold_and_never_leave_later_again(self, policy, trace):
        path = path_of(policy)
        assert path[0] == Never()
        exits = [len(trace.checks) if at is None else at for at in first_exits(path, trace)]
        assert exits == sorted(exits, reverse=True)
        assert len(set(path)) == len(path)

    @pytest.mark.parametrize(
        ("policy", "floats"),
        [
            (DEER(), {"trial_confidence": 0.01}),
            (CoDEStop(), {"trial_confidence": 0.01}),
            (LYNX(), {"p_safe": 0.01}),
            (ThinkBrake(), {"end_margin": 15.0}),
            (GiveUp(patience=1, min_checks=1), {"trial_confidence": 0.99}),
        ],
        ids=repr,
    )
    def test_end_at_a_setting_that_leaves_at_nearly_anything(self, policy, floats):
        trace = Trace((Check(5, "x", floats, next(iter(policy.looks))),))
        assert replay(path_of(policy)[-1], trace) == 0

    @pytest.mark.parametrize(
        ("policy", "floats"),
        [(DEER(), {"trial_confidence": 0.999995}), (LYNX(), {"p_safe": 0.999995})],
        ids=repr,
    )
    def test_begin_finer_than_confidences_that_crowd_near_one(self, policy, floats):
        trace = Trace((Check(5, "x", floats),))
        assert first_exits(path_of(policy)[:2], trace) == [None, None]

    def test_pass_through_the_papers_setting_of_code_stop(self):
        near = min(path_of(CoDEStop())[1:], key=lambda setting: abs(setting.tau - 3.5))
        assert near.tau == pytest.approx(3.5, rel=0.2)
        assert near.r_min == pytest.approx(0.9, abs=0.02)
        assert near.r_max == pytest.approx(0.95, abs=0.01)

    def test_keep_what_is_not_on_them(self):
        path = path_of(FirstOf(EAT(alpha=0.3, min_checks=7), DEER(looks=frozenset({"sentence"}))))
        for setting in path[1:]:
            eat, deer = setting.policies
            assert isinstance(eat, Never) or (eat.alpha, eat.min_checks) == (0.3, 7)
            assert isinstance(deer, Never) or deer.looks == {"sentence"}

    def test_are_not_made_up_for_policies_they_are_not_known_for(self):
        class Mine:
            needs = frozenset()
            looks = frozenset({"sentence"})

            def decide(self, trace):
                raise NotImplementedError

        with pytest.raises(TypeError, match="begins with Never"):
            path_of(Mine())
        with pytest.raises(ValueError, match=r"LYNX\(threshold"):
            path_of(LYNX(q_safe=0.1, q_unsafe=0.1))
        with pytest.raises(ValueError, match="lower r_min"):
            path_of(CoDEStop(r_min=1.0, r_max=1.0))

    @settings(max_examples=40)
    @given(trace=any_trace())
    def test_are_replayed_as_each_setting_alone_would_be(self, trace):
        path = (*path_of(DEER())[::12], *path_of(FirstOf(ThinkBrake(), CoDEStop()))[::12])
        assert first_exits(path, trace) == [replay(policy, trace) for policy in path]


class TestALoss:
    def test_is_one_for_a_question_however_many_checks_it_has(self):
        exits, losses = replay_losses([trace_of([0.95] * 9, [True] * 9)], PATH)
        assert exits.tolist() == losses.tolist() == [[False, True, True]]

    def test_is_judged_where_the_setting_leaves_first(self):
        rows = [trace_of([0.6, 0.95], [True, False]), trace_of([0.6, 0.95], [False, True])]
        assert replay_losses(rows, PATH)[1].tolist() == [[False, False, True], [False, True, False]]

    def test_is_none_where_it_does_not_leave(self):
        assert not replay_losses([trace_of([0.1, 0.2], [True, True])], PATH)[0].any()

    def test_is_an_answer_that_is_missing_or_that_full_thinking_did_not_give(self):
        checks = (Check(5, "x", {"trial_confidence": 0.99}), Check(9, "x", {"trial_confidence": 0.1}, exit_answer="a"))
        assert replay_losses([Trace(checks, answer="a")], PATH)[1].any()
        assert replay_losses([trace_of([0.99], [False])], PATH)[1].sum() == 0
        none = Trace((Check(5, "x", {"trial_confidence": 0.99}, exit_answer="a"),))
        assert replay_losses([none], PATH)[1].any()

    def test_compares_answers_as_it_is_told_to(self):
        rows = [Trace((Check(5, "x", {"trial_confidence": 0.99}, exit_answer="0.50"),), answer="1/2", gold="0.5")]
        equal = lambda a, b: Fraction(a) == Fraction(b)  # noqa: E731
        assert replay_losses(rows, PATH)[1].any()
        assert not replay_losses(rows, PATH, same=equal)[1].any()
        assert not replay_losses(rows, PATH, "lost_correct", equal)[1].any()

    @pytest.mark.parametrize(
        ("early", "full", "lost"), [("4", "4", False), ("5", "4", True), ("5", "5", False), ("4", "5", False)]
    )
    def test_of_a_right_answer_needs_full_thinking_to_have_been_right(self, early, full, lost):
        row = Trace((Check(5, "x", {"trial_confidence": 0.99}, exit_answer=early),), answer=full, gold="4")
        assert replay_losses([row], PATH, "lost_correct")[1].any() == lost

    def test_of_a_right_answer_needs_gold(self):
        with pytest.raises(ValueError, match="needs gold answers, and question q7"):
            replay_losses([trace_of([0.99], [False], "q7")], PATH, "lost_correct")

    def test_cannot_be_told_from_traces_without_exit_answers(self):
        bare = Trace((Check(5, "x", {"trial_confidence": 0.99}, answer="a"),), question_id="q3", answer="a")
        with pytest.raises(ValueError, match="question q3 holds no exit_answer"):
            replay_losses([bare], PATH)

    def test_of_unknown_kind_is_refused(self):
        with pytest.raises(ValueError, match="answer_changed, lost_correct; got 'mse'"):
            replay_losses([], PATH, "mse")


class TestASignalThatWasNotMeasured:
    """It makes no exits, so no losses: the boldest setting would be certified, and let loose on live signals."""

    def test_is_refused(self):
        rows = [trace_of([0.9], [False], "q1")]
        with pytest.raises(ValueError, match="LYNX reads p_safe, but no check of question q1"):
            replay_losses(rows, path_of(LYNX()))

    def test_is_refused_also_in_one_of_several_files(self):
        with_it = Trace((Check(5, "x", {"p_safe": 0.9}, exit_answer="a"),), "q1", answer="a")
        with pytest.raises(ValueError, match="question q2"):
            replay_losses([with_it, trace_of([0.9], [False], "q2")], path_of(LYNX()))

    def test_is_refused_also_when_another_member_reads_something_else(self):
        with pytest.raises(ValueError, match=r"ThinkBrake looks at checks of kind sentence, but none of the 1 traces"):
            replay_losses([trace_of([0.9], [False])], path_of(FirstOf(DEER(), ThinkBrake())))

    def test_is_no_matter_where_a_chain_has_no_check_at_all(self):
        assert not replay_losses([Trace((), "q1", answer="a"), trace_of([0.1], [False])], PATH)[0][0].any()


class TestCalibrate:
    def rows(self, n, changed=0, **more):
        """n questions left at 0.95, of which some change; then at 0.6, where all the others change."""
        return [trace_of([0.6, 0.95], [True, i < changed], f"q{i}", **more) for i in range(n)]

    def test_certifies_the_boldest_setting_that_the_tests_allow(self):
        [level] = calibrate(self.rows(100, 1), PATH, 0.05, 0.1, BINDS).levels
        assert level.policy == DEER(0.9)
        assert (level.setting.exits, level.setting.losses) == (100, 1)

    def test_promises_with_never_leaving_where_nothing_else_holds(self):
        found = calibrate(self.rows(100, 30), PATH, 0.05, 0.1, BINDS)
        assert found.levels[0].policy == Never()
        assert found.levels[0].bound_when_left == 1

    def test_tells_the_risk_among_early_exits_apart(self):
        rows = self.rows(20, 2) + [trace_of([0.1], [False], f"easy{i}") for i in range(380)]
        [level] = calibrate(rows, PATH, 0.05, 0.1, BINDS).levels
        assert level.policy == DEER(0.9)
        assert level.setting.losses / level.setting.exits == 0.1
        assert 0.1 < level.bound_when_left < 0.5

    @pytest.mark.parametrize(("epsilon", "needed"), [(0.01, 230), ([0.01], 230), ([0.01, 0.1], 299)])
    def test_refuses_too_few_questions_and_names_how_many_it_takes(self, epsilon, needed):
        with pytest.raises(ValueError, match=f"100 questions cannot certify epsilon=0.01.*at least {needed}"):
            calibrate(self.rows(100), PATH, epsilon, 0.1, BINDS)
        assert calibrate(self.rows(needed), PATH, epsilon, 0.1, BINDS).levels[0].policy == DEER(0.9)
        with pytest.raises(ValueError, match="0 questions cannot certify"):
            calibrate([], PATH, epsilon, 0.1, BINDS)

    def test_names_an_epsilon_that_would_do(self):
        with pytest.raises(ValueError, match=r"no epsilon below 0\.045") as error:
            calibrate(self.rows(50), PATH, 0.01, 0.1, BINDS)
        assert "delta=0.1" in str(error.value)
        assert questions_needed(0.046, 0.1) <= 50 < questions_needed(0.044, 0.1)

    def test_refuses_a_question_that_counts_twice(self):
        with pytest.raises(ValueError, match="q0 among them"):
            calibrate(self.rows(50) * 2, PATH, 0.1, 0.1, BINDS)

    def test_refuses_a_path_without_a_careful_beginning(self):
        with pytest.raises(ValueError, match=r"put Never\(\) first"):
            calibrate(self.rows(50), PATH[1:], 0.1, 0.1, BINDS)

    @pytest.mark.parametrize(("epsilon", "delta"), [(0, 0.1), (1, 0.1), ([], 0.1), (0.1, 0), (0.1, 1), (math.nan, 0.1)])
    def test_refuses_levels_that_mean_nothing(self, epsilon, delta):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            calibrate(self.rows(50), PATH, epsilon, delta, BINDS)

    def test_is_bound_to_how_the_questions_were_asked_and_to_the_policy(self):
        binds = calibrate(self.rows(50), PATH, 0.1, 0.1, {**BINDS, "probe": "abc"}).binds
        assert binds == {**BINDS, "policy": "DEER", "probe": "none"}

    def test_refuses_a_probes_signal_without_a_probe(self):
        rows = [Trace((Check(5, "x", {"p_safe": 0.9}, exit_answer="a"),), f"q{i}", answer="a") for i in range(50)]
        with pytest.raises(ValueError, match="asked without one"):
            calibrate(rows, path_of(LYNX()), 0.1, 0.1, BINDS)
        assert calibrate(rows, path_of(LYNX()), 0.1, 0.1, {**BINDS, "probe": "abc"}).binds["probe"] == "abc"

    def test_reports_how_often_full_thinking_changes_its_own_answer(self):
        first = self.rows(50, seed=1)
        again = [Trace(question_id=f"q{i}", answer="full" if i % 5 else None, seed=2) for i in range(40)]
        assert calibrate(first, PATH, 0.1, 0.1, BINDS).full_again is None
        assert calibrate(first, PATH, 0.1, 0.1, BINDS, again=again).full_again == (40, 8)

    def test_refuses_a_second_time_that_is_the_first(self):
        first = self.rows(3, seed=1)
        with pytest.raises(ValueError, match="same seed, 1"):
            disagreement(first, first)
        with pytest.raises(ValueError, match="no question_id in common"):
            disagreement(first, [Trace(question_id="z", answer="full")])

    def test_is_the_same_for_the_same_traces(self):
        once, twice = (calibrate(self.rows(80, 1), path_of(DEER()), 0.1, 0.1, BINDS) for _ in range(2))
        assert once.to_json() == twice.to_json()


@pytest.mark.parametrize("n", [5, 20, 40, 100, 300, 400, 1000])
def test_the_levels_served_by_default_are_all_that_so_many_questions_can_certify_together(n):
    served = servable(n, 0.1)
    assert all(questions_needed(epsilon, 0.1 / len(served)) <= n for epsilon in served)
    one_more = sorted(LEVELS)[-len(served) - 1 :]
    assert len(served) == len(LEVELS) or questions_needed(one_more[0], 0.1 / len(one_more)) > n


class TestLynxByCue:
    @given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 99))
    def test_the_quantile_is_the_papers_and_infinite_where_there_are_too_few(self, scores, percent):
        delta = Fraction(percent, 100)
        rank = math.ceil((len(scores) + 1) * (1 - delta))
        wanted = math.inf if rank > len(scores) else sorted(scores)[rank - 1]
        assert conformal_quantile(scores, float(delta)) == wanted

    @pytest.mark.parametrize(("delta", "least"), [(0.01, 99), (0.03, 33), (0.05, 19), (0.10, 9)])
    def test_it_takes_so_many_scores(self, delta, least):
        assert conformal_quantile([0.5] * least, delta) == 0.5
        assert conformal_quantile([0.5] * (least - 1), delta) == math.inf

    def traces(self, safe, unsafe):
        rows = [(p, "a") for p in safe] + [(p, "b") for p in unsafe]
        checks = (Check(i + 1, "x", {"p_safe": p}, exit_answer=a) for i, (p, a) in enumerate(rows))
        return [Trace(tuple(checks), answer="a", gold="b")]

    def test_the_policy_leaves_exactly_where_the_prediction_set_is_safe_alone(self):
        safe, unsafe, delta = [0.7, 0.8, 0.9, 0.95, 0.99], [0.05, 0.1, 0.2, 0.4, 0.75], 0.25
        policy = lynx_by_cue(self.traces(safe, unsafe), delta)
        q_safe, q_unsafe = sorted(1 - p for p in safe)[4], sorted(unsafe)[4]
        for p in [i / 200 for i in range(201)]:
            prediction = set()
            prediction |= {"safe"} if 1 - p <= q_safe else set()
            prediction |= {"unsafe"} if p <= q_unsafe else set()
            left = replay(policy, Trace((Check(1, "x", {"p_safe": p}),))) == 0
            assert left == (prediction == {"safe"})

    def test_with_too_few_unsafe_cues_it_never_leaves(self):
        policy = lynx_by_cue(self.traces([0.9] * 50, [0.1] * 8), 0.1)
        assert policy.q_unsafe == math.inf
        assert replay(policy, Trace((Check(1, "x", {"p_safe": 1.0}),))) is None

    def test_cues_can_be_labelled_by_gold(self):
        rows = self.traces([0.9] * 20, [0.1] * 30)
        assert lynx_by_cue(rows, 0.1).q_unsafe == 0.1
        assert lynx_by_cue(rows, 0.1, gold=True).q_unsafe == 0.9

    def test_traces_without_the_probe_are_refused(self):
        with pytest.raises(ValueError, match="no check of these traces has p_safe"):
            lynx_by_cue([trace_of([0.5], [False])], 0.1)


class TestTransferOfTau:
    def test_goes_by_the_mean_number_of_steps(self):
        source = [trace_of([0.5] * n, [False] * n) for n in (2, 4)]
        target = [trace_of([0.5] * n, [False] * n) for n in (5, 10, 9)]
        assert transfer_tau(CoDEStop(tau=2.0, r_min=0.8), source, target) == CoDEStop(tau=2.0 * 8 / 3, r_min=0.8)

    def test_counts_only_checks_at_which_a_confidence_was_measured(self):
        odd = (Check(1, "x", {}), Check(2, "x", {"trial_confidence": 0.5}, "sentence"))
        usual = trace_of([0.5] * 2, [False] * 2)
        mixed = Trace((*odd, *(Check(c.position + 10, "x", c.signals) for c in usual.checks)))
        assert transfer_tau(CoDEStop(), [usual], [mixed]) == CoDEStop()

    def test_needs_steps_on_both_sides(self):
        usual = trace_of([0.5], [False])
        for source, target, side in (([usual], [], "target"), ([Trace()], [usual], "source")):
            with pytest.raises(ValueError, match=side):
                transfer_tau(CoDEStop(), source, target)
