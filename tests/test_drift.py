"""Audits: the coin, the wealth on disk, no alarm where the promise holds, and an alarm where it does not."""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from scipy.stats import binom
from traces_for_tests import BINDS, chains, losses_in, trace_of, traces

from langchain_earlyexit import DEER, Never
from langchain_earlyexit.drift import Audit, Counts, log_wealth
from langchain_earlyexit.lab.calibrate import calibrate, replay_losses

EPSILON, DELTA = 0.05, 0.05
calls = map(str, itertools.count())


def alarms(changed, epsilon=EPSILON, delta=DELTA):
    """Number of the audit with which each stream `[streams, audits]` raises the alarm; infinite for never.

    The wealth grows with the changes, so for each number of audits there is a least number of them that is too many.
    """
    audits = np.arange(1, changed.shape[1] + 1)
    most = int(changed.sum(axis=1).max()) + 1
    wealth = log_wealth(audits[:, None], np.minimum(np.arange(most), audits[:, None]), epsilon)
    ruled_out = np.where(wealth >= -math.log(delta), np.arange(most), most).min(axis=1)
    over = changed.cumsum(axis=1) >= ruled_out
    return np.where(over.any(axis=1), over.argmax(axis=1) + 1, math.inf)


class TestTheBet:
    def test_is_fair_at_the_promised_rate(self):
        # The expected wealth after any number of audits is exactly what it began with.
        for epsilon in (0.01, 0.05, 0.3):
            for n in (1, 10, 200):
                hits = np.arange(n + 1)
                wealth = log_wealth(n, hits, epsilon)
                assert np.exp(wealth + binom.logpmf(hits, n, epsilon)).sum() == pytest.approx(1)
                assert np.exp(wealth + binom.logpmf(hits, n, epsilon / 2)).sum() < 1

    def test_grows_with_every_change_and_shrinks_without(self):
        assert (np.diff(log_wealth(50, np.arange(51), 0.1)) > 0).all()
        assert (np.diff(log_wealth(np.arange(100), 0, 0.1)) < 0).all()
        assert log_wealth(0, 0, 0.1) == pytest.approx(0)

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.05, 0.05), (0.1, 0.1)])
    def test_raises_a_false_alarm_at_most_delta_of_the_time_however_long_it_runs(self, epsilon, delta):
        streams = np.random.default_rng(0).random((2000, 1000)) < epsilon
        share = np.isfinite(alarms(streams, epsilon, delta)).mean()
        assert share <= binom.ppf(0.999, 2000, delta) / 2000
        looking_each_time_at_a_plain_test = _naive_alarms(streams[:300], epsilon, delta)
        assert looking_each_time_at_a_plain_test > 2 * delta

    @pytest.mark.parametrize(("rate", "within"), [(0.3, 40), (0.15, 160), (0.1, 560)])
    def test_raises_the_alarm_as_soon_as_documented(self, rate, within):
        streams = np.random.default_rng(1).random((1000, within)) < rate
        assert np.isfinite(alarms(streams)).mean() >= 0.94


def _naive_alarms(streams, epsilon, delta):
    n = np.arange(1, streams.shape[1] + 1)
    return (binom.sf(streams.cumsum(axis=1) - 1, n, epsilon) <= delta).any(axis=1).mean()


RATE, CALLS, STREAMS = 0.2, 1000, 200


@pytest.fixture(scope="module")
def tossed():
    """Which calls are audited, by their seeds."""
    return np.array([Audit.tossed(seed, "", RATE) for seed in range(STREAMS * CALLS)]).reshape(STREAMS, CALLS)


@pytest.fixture(scope="module")
def certified_policy():
    path = (Never(), *(DEER(1 - i / 100) for i in range(1, 40)))
    rows = traces(np.random.default_rng(9), 1000)
    return calibrate(rows, path, EPSILON, DELTA, BINDS).levels[0].policy


def alarmed(policy, tossed, **shift):
    """Share of streams that raise the alarm, each from its audited calls alone."""
    confidence, changes = chains(np.random.default_rng(8), tossed.size, 1, **shift)
    losses = losses_in(confidence, changes, [policy.threshold]).reshape(tossed.shape) > 0
    audited = [row[coin] for row, coin in zip(losses, tossed, strict=True)]
    shortest = min(map(len, audited))
    return np.isfinite(alarms(np.stack([row[:shortest] for row in audited]))).mean()


class TestShift:
    """Calibrated on questions of one kind; then asked others, on which it is surer without being any righter."""

    def test_trips_the_audit_within_a_thousand_calls_and_no_shift_does_not(self, certified_policy, tossed):
        assert isinstance(certified_policy, DEER)
        assert alarmed(certified_policy, tossed) <= binom.ppf(0.999, STREAMS, DELTA) / STREAMS
        assert alarmed(certified_policy, tossed, surer=0.8) >= 0.99

    def test_trips_it_also_call_by_call_through_the_file(self, certified_policy, tmp_path):
        confidence, changes = chains(np.random.default_rng(10), CALLS, surer=0.8)
        audit = Audit(tmp_path / "audit.json", EPSILON, DELTA)
        for seed, (c, x) in enumerate(zip(confidence, changes, strict=True)):
            if audit.tossed(seed, "", RATE):
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    audit.observe(bool(replay_losses([trace_of(c, x)], (certified_policy,))[1].any()), next(calls))
                if told:
                    break
        assert not audit.believable
        assert audit.counts.given_up
        assert seed < CALLS - 1
        wealth = log_wealth(audit.counts.audits, audit.counts.changed, EPSILON)
        assert wealth >= -math.log(DELTA)


class TestTheCoin:
    def test_falls_at_its_rate_and_the_same_for_the_same_call(self):
        tosses = [Audit.tossed(seed, "", 0.1) for seed in range(20_000)]
        assert np.mean(tosses) == pytest.approx(0.1, abs=0.01)
        assert tosses == [Audit.tossed(seed, "", 0.1) for seed in range(20_000)]

    def test_is_tossed_anew_for_each_prompt_where_all_calls_have_one_seed(self):
        assert np.mean([Audit.tossed(0, f"question {i}", 0.1) for i in range(20_000)]) == pytest.approx(0.1, abs=0.01)

    def test_can_be_always_or_never(self):
        assert all(Audit.tossed(seed, "", 1) for seed in range(500))
        assert not any(Audit.tossed(seed, "", 0) for seed in range(500))

    def test_takes_any_text(self):
        assert Audit.tossed(0, "\ud800 half a character", 1)


def until_given_up(audit):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        while audit.believable:
            audit.observe(True, next(calls))
    return [str(warning.message) for warning in told]


class TestTheFile:
    def test_is_shared_by_all_who_serve_the_promise(self, tmp_path):
        one, other = (Audit(tmp_path / "deep" / "a.json", EPSILON, DELTA) for _ in range(2))
        one.observe(False, next(calls))
        other.observe(True, next(calls))
        assert one.counts == other.counts == Counts(2, 1)

    def test_counts_equal_calls_once_whoever_asks_them_again(self, tmp_path):
        one, other = (Audit(tmp_path / "a.json", EPSILON, DELTA) for _ in range(2))
        for audit in (one, other, one):
            for call in ("a", "b"):
                audit.observe(call == "a", call)
        assert one.counts == Counts(2, 1)
        one.path.unlink()
        one.observe(False, "a")
        assert one.counts == Counts(1, 0), "begun anew, nothing of before is known"

    def test_goes_on_after_a_crash_that_left_half_a_mark(self, tmp_path):
        audit = Audit(tmp_path / "a.json", EPSILON, DELTA)
        audit.observe(False, "a")
        with (tmp_path / "a.calls").open("ab") as file:
            file.write(b"half")
        for call in ("b", "a", "b"):
            audit.observe(False, call)
        assert audit.counts == Counts(2, 0)

    def test_can_be_read_and_written_by_all_who_may_write_there(self, tmp_path):
        before = os.umask(0o002)
        try:
            Audit(tmp_path / "a.json", EPSILON, DELTA).observe(False, "a")
        finally:
            os.umask(before)
        assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o664

    def test_is_not_written_before_the_first_audit(self, tmp_path):
        assert Audit(tmp_path / "a.json", EPSILON, DELTA).believable
        assert not list(tmp_path.iterdir())

    def test_turns_early_exit_off_once_everywhere_and_for_good(self, tmp_path):
        one, other = (Audit(tmp_path / "a.json", EPSILON, DELTA) for _ in range(2))
        told = until_given_up(one)
        assert len(told) == 1
        assert "early exit is off: of 2 audited calls, 2" in told[0]
        assert "calibrate again" in told[0]
        with pytest.warns(UserWarning, match="early exit is off"):
            assert not other.believable
        for _ in range(60):
            one.observe(False, next(calls))
        assert log_wealth(one.counts.audits, one.counts.changed, EPSILON) < -math.log(DELTA)
        with pytest.warns(UserWarning, match="early exit is off"):
            assert not Audit(tmp_path / "a.json", EPSILON, DELTA).believable

    def test_can_be_deleted_to_begin_anew(self, tmp_path):
        audit = Audit(tmp_path / "a.json", EPSILON, DELTA)
        until_given_up(audit)
        audit.path.unlink()
        assert audit.believable
        assert audit.counts == Counts()

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"epsilon": 0.1}, r"epsilon 0\.05, not 0\.1"),
            ({"delta": 0.2}, r"delta 0\.05, not 0\.2"),
            ({"artifact": "new"}, "artifact 'old', not 'new'"),
        ],
    )
    def test_of_another_promise_is_refused(self, tmp_path, other, said):
        mine = {"epsilon": EPSILON, "delta": DELTA, "artifact": "old"}
        Audit(tmp_path / "a.json", **mine).observe(False, next(calls))
        with pytest.raises(ValueError, match=said):
            Audit(tmp_path / "a.json", **{**mine, **other})

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"audits": 1, "changed": 2, "given_up": false}', "\x00"])
    def test_that_is_damaged_is_refused_by_name(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is no audit file"):
            Audit(tmp_path / "a.json", EPSILON, DELTA)

    def test_loses_no_audit_to_threads_or_processes(self, tmp_path):
        path = tmp_path / "a.json"
        audit = Audit(path, 0.5, 1e-9)
        threads = [threading.Thread(target=_observe, args=(audit, 10)) for _ in range(4)]
        code = (
            "from langchain_earlyexit.drift import Audit\n"
            f"audit = Audit({str(path)!r}, 0.5, 1e-9)\n"
            "import os\n"
            "for i in range(25): audit.observe(False, f'{os.getpid()} {i}')"
        )
        processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.wait() for process in processes] == [0, 0]
        assert audit.counts == Counts(90, 0)

    def test_is_whole_when_the_process_dies_while_writing(self, tmp_path, monkeypatch):
        audit = Audit(tmp_path / "a.json", EPSILON, DELTA)
        audit.observe(True, next(calls))

        def dies(*_):
            raise OSError("no space left")

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dies)
            with pytest.raises(OSError, match="no space left"):
                audit.observe(True, next(calls))
        assert audit.counts == Counts(1, 1)
        assert json.loads(audit.path.read_text())["audits"] == 1
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.calls", "a.json", "a.json.lock"]
        audit.observe(False, next(calls))
        assert audit.counts == Counts(2, 1)


def _observe(audit, times):
    for _ in range(times):
        audit.observe(False, next(calls))


@pytest.mark.parametrize("wrong", [{"epsilon": 0}, {"epsilon": 1}, {"delta": 0}, {"delta": 2}])
def test_numbers_that_mean_nothing_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Audit(tmp_path / "a", **{"epsilon": EPSILON, "delta": DELTA, **wrong})


def test_neither_torch_nor_scipy_is_needed_at_run_time():
    code = (
        "import langchain_earlyexit.drift, langchain_earlyexit.guarantee, sys\n"
        "assert not {'torch', 'scipy', 'transformers', 'langchain_core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
