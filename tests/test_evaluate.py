"""Evaluation by replay: numbers worked out by hand, and intervals that cover."""

import json
from dataclasses import replace

import numpy as np
import pytest

from langchain_earlyexit.lab.evaluate import evaluate
from langchain_earlyexit.lab.judge import Judge
from langchain_earlyexit.lab.live import Live
from langchain_earlyexit.lab.outcomes import Closing, Outcome, ended, read_outcomes, replayed
from langchain_earlyexit.lab.replays import Collection, agreement, choose, curve, oracle, oracle_curve, reliability
from langchain_earlyexit.lab.table import Evaluation, Table
from langchain_earlyexit.policies import DEER, LYNX, CoDEStop, FirstOf, Never, ProbeThenTrial, ThinkBrake
from langchain_earlyexit.trace import Check, Trace

CUES = json.dumps({"words": ["wait"], "min_gap": 8})
META = {
    "model": "made by hand",
    "form": "boxed",
    "kinds": ["reflection"],
    "signals": ["trial_confidence", "p_safe"],
    "closing": {"full": 7, "bare": 2},
    "binds": {
        "engine": "transformers/packed",
        "cues": CUES,
        "sampling": json.dumps({"temperature": 0.6, "top_k": None}),
    },
}


def check(position, confidence, exit_answer, p_safe=0.5):
    signals = {"trial_confidence": confidence, "p_safe": p_safe}
    return Check(position, "wait", signals, answer=exit_answer, exit_answer=exit_answer)


def question(name, *checks, answer, gold, thinking=100):
    """Every trial takes 7 + 3 tokens, every exit 7 + 5, and a cue is one token and read one token late."""
    return Trace(
        checks,
        question_id=name,
        answer=answer,
        gold=gold,
        thinking_tokens=thinking,
        answer_tokens=6,
        forced_tokens=0,
        trial_tokens=(10,) * len(checks),
        exit_tokens=(12,) * len(checks),
        read_tokens=tuple(c.position + 2 for c in checks),
        seed=1,
        reason="natural",
    )


EASY = question("easy", check(20, 0.9, "7"), check(50, 0.99, "7"), answer="7", gold="7")
REPAIRED = question("repaired", check(20, 0.8, "3"), check(60, 0.97, "4"), answer="4", gold="4", thinking=120)
SPOILT = question("spoilt", check(30, 0.95, "9"), check(70, 0.6, "9"), answer="8", gold="9", thinking=140)
HOPELESS = question("hopeless", check(40, 0.3, "1"), answer="2", gold="5", thinking=160)
ALL = (EASY, REPAIRED, SPOILT, HOPELESS)


def collection(*traces, look="parallel", **meta):
    return Collection(traces, {**META, **meta}, Judge("boxed"), look)


class TestReplay:
    def test_it_counts_what_a_live_run_would_pay(self):
        left = replayed(DEER(0.95), EASY, 1, Closing(7, 2))
        assert (left.answer, left.reason, left.thinking_tokens) == ("7", "confident", 50)
        assert (left.forced_tokens, left.answer_tokens) == (7, 5)
        assert left.trial_tokens == 20  # both trials, the one that did not lead out as well
        assert left.speculated_tokens == 2 + 3  # the cue and the token after it, and three beside the trial

    def test_waiting_throws_away_only_the_cue(self):
        assert replayed(DEER(0.95), EASY, 1, Closing(7, 2), "wait").speculated_tokens == 2

    def test_looking_to_the_end_costs_its_trials_and_nothing_else(self):
        thought = replayed(DEER(0.999), EASY, None, Closing(7, 2))
        assert (thought.answer, thought.reason, thought.output_tokens) == ("7", "natural", 100 + 6 + 20)

    def test_a_policy_without_trials_pays_for_none(self):
        left = replayed(LYNX(0.4), EASY, 0, Closing(7, 2))
        assert (left.reason, left.trial_tokens, left.speculated_tokens) == ("sufficient", 0, 2)

    def test_the_trunk_runs_no_further_beside_a_trial_than_to_its_own_end(self):
        short = question("short", check(95, 0.99, "7"), answer="7", gold="7", thinking=98)
        assert replayed(DEER(0.95), short, 0, Closing(7, 2)).speculated_tokens == 3

    def test_entropy_measured_beside_a_trial_is_not_charged_to_who_does_not_read_it(self):
        both = Check(20, "wait", {"trial_confidence": 0.99, "end_entropy": 0.1}, exit_answer="7")
        trace = question("both", both, answer="7", gold="7")
        trace = Trace.from_dict({**trace.to_dict(), "trial_tokens": [13]})
        assert replayed(DEER(0.95), trace, 0, Closing(7, 2)).trial_tokens == 10

    def test_a_margin_that_a_server_draws_aside_is_a_token_of_who_reads_it_and_of_nobody_else(self):
        aside = Closing(7, 2, margin=1)
        told = Check(20, "wait", {"trial_confidence": 0.99, "end_margin": 0.1}, exit_answer="7", kind="sentence")
        trace = question("margin", told, answer="7", gold="7")
        trace = Trace.from_dict({**trace.to_dict(), "trial_tokens": [11]})
        assert replayed(ThinkBrake(0.2), trace, 0, aside).trial_tokens == 1
        looks = frozenset({"sentence"})
        assert replayed(DEER(0.95, looks=looks), trace, 0, aside).trial_tokens == 10
        assert replayed(FirstOf(DEER(0.95, looks=looks), ThinkBrake(0.2)), trace, 0, aside).trial_tokens == 11

    def test_a_natural_end_before_a_call_that_is_fed_is_not_one_that_was_dropped(self):
        fed = replace(EASY, forced_tokens=3)
        assert ended(fed, Closing(7, 2)).speculated_tokens == 0
        assert ended(replace(EASY, forced_tokens=7), Closing(7, 2)).speculated_tokens == 1

    def test_traces_that_do_not_count_are_refused(self):
        bare = Trace(EASY.checks, question_id="bare", answer="7", reason="natural")
        with pytest.raises(ValueError, match="'bare' has no trial_tokens"):
            replayed(DEER(0.95), bare, None, Closing(7, 2))


class TestRows:
    def test_a_row_is_what_one_counts_by_hand(self):
        test = collection(*ALL)
        row = Table(test.full(), test.judge).row("deer", test.run(DEER(0.9)), policy="DEER(0.9)", how="replayed")
        # easy leaves at 50 (7, right), repaired at 60 (4, right), spoilt at 30 (9, right: full says 8), hopeless stays
        assert (row.accuracy, row.gap.mean, row.same) == (0.75, 0.25, 0.75)
        assert (row.helped, row.harmed) == (1, 0)
        assert row.reasons == {"confident": 3, "natural": 1}
        assert row.tokens["thinking_tokens"] == (50 + 60 + 30 + 160) / 4
        assert row.tokens["trial_tokens"] == (20 + 20 + 10 + 10) / 4
        assert row.output_tokens == pytest.approx(75 + 15 + (7 * 3) / 4 + (5 * 3 + 6) / 4 + (5 * 3) / 4)
        assert row.saved.mean == pytest.approx(1 - row.output_tokens / ((106 + 126 + 146 + 166) / 4))

    def test_harm_is_a_right_answer_lost(self):
        test = collection(*ALL)
        row = Table(test.full(), test.judge).row("bold", test.run(DEER(0.2)), policy="", how="replayed")
        assert (row.helped, row.harmed, row.accuracy) == (1, 1, 0.5)

    def test_a_budget_of_the_same_cost_is_the_line_between_two_budgets(self):
        def ran(*right_and_tokens):
            return [
                Outcome(trace.question_id, trace.gold if right else "0", trace.gold, "budget", tokens, 0, 0)
                for trace, (right, tokens) in zip(ALL, right_and_tokens, strict=True)
            ]

        test = collection(*ALL)
        low, high = ran(*[(False, 40)] * 4), ran((True, 80), (True, 80), (False, 80), (False, 80))
        table = Table(test.full(), test.judge, [high, low])
        mine = ran((True, 60), (True, 60), (True, 60), (False, 60))
        row = table.row("mine", mine, policy="")
        assert row.over_budgets.mean == pytest.approx(0.75 - (0.0 + 0.5) / 2)
        at_low = table.row("low", low, policy="")
        assert at_low.over_budgets.mean == 0

    def test_outcomes_of_other_questions_are_refused(self):
        test = collection(*ALL)
        with pytest.raises(ValueError, match=r"3 outcomes cannot be paired with the 4 questions.*hopeless"):
            Table(test.full(), test.judge).row("some", test.full()[:3], policy="")

    def test_without_gold_full_thinking_is_the_measure(self):
        bare = [Trace.from_dict({**trace.to_dict(), "gold": None}) for trace in ALL]
        test = collection(*bare)
        row = Table(test.full(), test.judge).row("deer", test.run(DEER(0.9)), policy="", how="replayed")
        assert row.accuracy == row.same == 0.75
        assert row.gap.mean == -0.25

    def test_the_interval_of_a_saving_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(3)
        covered = 0
        for _ in range(100):
            full = rng.integers(50, 150, 120)
            share = rng.random(120)
            outcomes = [
                (
                    Outcome(str(i), "1", "1", "natural", int(n), 0, 0),
                    Outcome(str(i), "1", "1", "confident", int(k), 0, 0),
                )
                for i, (n, k) in enumerate(zip(full, (full * share).round(), strict=True))
            ]
            table = Table([one for one, _ in outcomes], Judge("boxed"))
            row = table.row("half", [other for _, other in outcomes], policy="")
            covered += row.saved.low <= 0.5 <= row.saved.high
        assert 0.88 <= covered / 100 <= 0.99


class TestChoosing:
    PATH = tuple(DEER(threshold) for threshold in (0.99, 0.96, 0.9, 0.7, 0.2))

    def test_the_cheapest_setting_that_keeps_accuracy_is_chosen(self):
        # full: 2 of 4 right; 0.9: 3 of 4; 0.7: repaired leaves at 20 with a wrong answer, 2 of 4; 0.2: hopeless too
        assert choose(collection(*ALL), self.PATH, 0.0) == DEER(0.2)
        assert choose(collection(EASY, REPAIRED), self.PATH, 0.0) == DEER(0.96)  # the first of those that do the same

    def test_tolerance_buys_boldness(self):
        assert choose(collection(EASY, REPAIRED), self.PATH, 0.5) == DEER(0.7)

    def test_settings_that_leave_at_one_check_differ_in_the_trials_before_it(self):
        checks = check(20, 0.5, "7", p_safe=0.8), check(50, 0.5, "7", p_safe=0.995)
        doubtful = question("doubtful", *checks, answer="7", gold="7")
        asking, silent = ProbeThenTrial(0.99, 0.6, 0.9), ProbeThenTrial(0.99, 0.9, 0.9)
        tokens, _ = collection(doubtful).tallies([asking, silent])
        assert tokens[0, 0] > tokens[1, 0]
        assert choose(collection(doubtful), [asking, silent], 0.0) == silent

    def test_never_where_nothing_keeps_it(self):
        lost = question("lost", check(20, 1.0, "3"), answer="4", gold="4")
        assert choose(collection(lost), [DEER(0.5)], 0.0) == Never()

    def test_chosen_and_reported_questions_must_differ(self):
        with pytest.raises(ValueError, match="1 questions, easy among them, are in both"):
            collection(EASY, SPOILT).refuse_shared(collection(EASY, REPAIRED))

    def test_a_policy_that_would_look_elsewhere_is_refused(self):
        with pytest.raises(ValueError, match=r"ThinkBrake.*looks at sentence checks.*holds reflection checks"):
            choose(collection(*ALL), [Never(), ThinkBrake(0.1)], 0.0)

    def test_a_signal_that_was_not_measured_is_refused(self):
        with pytest.raises(ValueError, match=r"LYNX.*reads p_safe.*measured trial_confidence"):
            collection(*ALL, signals=["trial_confidence"]).run(LYNX(0.9))


class TestCurves:
    def test_a_curve_has_one_point_for_settings_that_do_the_same(self):
        drawn = curve(collection(*ALL), "DEER", [DEER(0.9), DEER(0.91), DEER(0.2)])
        assert [point.label for point in drawn.points] == ["DEER(threshold=0.9)", "DEER(threshold=0.2)"]
        assert [point.accuracy for point in drawn.points] == [0.75, 0.5]

    def test_the_oracle_leaves_where_the_answer_is_first_right(self):
        left = {outcome.question_id: outcome for outcome in oracle(collection(*ALL))}
        assert {name: found.thinking_tokens for name, found in left.items()} == {
            "easy": 20,
            "repaired": 60,
            "spoilt": 30,
            "hopeless": 160,
        }
        assert all(found.trial_tokens == 0 for found in left.values())

    def test_the_oracle_that_wants_the_full_answer_does_not_mend_it(self):
        left = {outcome.question_id: outcome for outcome in oracle(collection(*ALL), "same")}
        assert left["spoilt"].thinking_tokens == 140

    def test_the_oracle_curve_begins_at_the_cheapest_and_buys_what_is_right(self):
        points = oracle_curve(collection(*ALL)).points
        assert points[0][:2] == ((32 + 32 + 42 + 52) / 4, 0.5)
        assert points[-1][:2] == ((32 + 72 + 42 + 52) / 4, 0.75)

    def test_no_policy_is_above_the_oracle_curve(self):
        rng = np.random.default_rng(0)
        made = []
        for i in range(60):
            checks = [check(20 * (k + 1), rng.random(), str(rng.integers(3))) for k in range(4)]
            made.append(question(f"q{i}", *checks, answer=str(rng.integers(3)), gold="1"))
        test = collection(*made)
        ceiling = oracle_curve(test).points
        for point in curve(test, "DEER", [DEER(t) for t in np.linspace(0, 1, 30).tolist()]).points:
            reach = np.interp(point.tokens, [p.tokens for p in ceiling], [p.accuracy for p in ceiling])
            assert point.accuracy <= reach + 1e-9


class TestReliability:
    def test_a_signal_that_says_its_own_chance_lies_on_the_diagonal(self):
        rng = np.random.default_rng(0)
        made = []
        for i in range(4000):
            c = rng.random()
            made.append(question(f"q{i}", check(20, c, "1" if rng.random() < c else "0"), answer="1", gold="1"))
        found = reliability(collection(*made), "trial_confidence", "right")
        assert [entry.checks for entry in found.bins] == [400] * 10
        assert all(abs(entry.signal - entry.share) < 0.1 for entry in found.bins)

    def test_equal_signals_share_a_bin(self):
        made = [question(f"q{i}", check(20, 1.0, "1"), answer="1", gold="1") for i in range(30)]
        assert [entry.checks for entry in reliability(collection(*made), "p_safe", "right").bins] == [30]


class TestEvaluation:
    def found(self):
        test = collection(*ALL)
        none = [Outcome(t.question_id, "0", t.gold, "no_thinking", 0, 0, 5) for t in ALL]
        half = [Outcome(t.question_id, t.gold, t.gold, "budget", 60, 7, 5) for t in ALL]
        runs = [Live("no thinking", "0", 0, tuple(none), 9.0), Live("budget of 60", "60", 60, tuple(half), 50.0)]
        deer = [curve(test, "DEER", [Never(), DEER(0.9)])]
        return evaluate(test, {"DEER": DEER(0.9), "CoDE-Stop": CoDEStop()}, runs, deer, remarks=["So it is."])

    def test_it_holds_every_row_and_the_curves_of_budgets_and_oracle(self):
        found = self.found()
        names = ["full thinking", "no thinking", "budget of 60", "DEER", "CoDE-Stop", "oracle", "oracle, same as full"]
        assert [row.name for row in found.rows] == names
        assert [c.name for c in found.curves] == ["fixed budgets", "oracle", "DEER"]
        assert [p.label for p in found.curves[0].points] == ["no thinking", "budget of 60", "full thinking"]
        assert found.rows[2].seconds == 50

    def test_only_runs_that_are_cut_and_nothing_else_are_the_curve_of_budgets(self):
        test = collection(*ALL)
        half = tuple(Outcome(t.question_id, t.gold, t.gold, "budget", 60, 7, 5) for t in ALL)
        names = {"budget of 60": 60, "DEER(threshold=0.95), budget of 60": 60, "budget of -1": -1}
        found = evaluate(test, {}, [Live(name, "", budget, half, 50.0) for name, budget in names.items()])
        assert [point.label for point in found.curves[0].points] == ["budget of 60", "full thinking"]

    def test_of_a_server_s_collection_says_what_replays_cannot_know(self):
        on_vllm = {**META["binds"], "engine": "vllm"}
        assert "on servers live runs take a little more" in evaluate(collection(*ALL, binds=on_vllm), {}).remarks[0]
        assert not evaluate(collection(*ALL), {}).remarks

    def test_it_survives_its_file(self, tmp_path):
        found = self.found()
        found.save(tmp_path / "x" / "evaluation.json")
        assert Evaluation.load(tmp_path / "x" / "evaluation.json") == found

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "odd.json").write_text("{}")
        with pytest.raises(ValueError, match=r"odd\.json is no evaluation"):
            Evaluation.load(tmp_path / "odd.json")


def test_agreement_counts_questions_that_are_equal_in_everything():
    test = collection(*ALL)
    live = test.run(DEER(0.9))
    assert agreement(live, live) == (4, 4)
    assert agreement(live, test.run(DEER(0.97))) == (4, 2)


def test_outcomes_survive_their_file_and_a_broken_line_is_named(tmp_path):
    outcomes = collection(*ALL).run(DEER(0.9))
    outcomes[0] = replace(outcomes[0], answer="one\u2028two")  # JSON leaves it as it is, and it ends no line
    path = tmp_path / "run.jsonl"
    path.write_text("".join(outcome.to_json() + "\n" for outcome in outcomes))
    assert read_outcomes(path) == outcomes
    path.write_text(path.read_text() + '{"answer": 1}\n')
    with pytest.raises(ValueError, match="line 5: this is no outcome"):
        read_outcomes(path)
