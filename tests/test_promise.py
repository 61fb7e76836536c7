"""The promise, tested as it is meant: over many draws of the calibration set, how often does it not hold?

Splitting one set into a calibration and a test half is the wrong test: the half's own rate is noise, and fails right
code. Here sets are drawn from a pool (with replacement) or from a law whose risk is known, and the chosen setting is
judged by the pool's or the law's own rate.
"""

import numpy as np
import pytest
from mapie.risk_control._base_controller import ltt_procedure
from scipy.stats import binom
from traces_for_tests import BINDS, chains, losses_in, risk, trace_of, traces

from langchain_earlyexit import DEER, Never
from langchain_earlyexit.lab.calibrate import calibrate, replay_losses
from langchain_earlyexit.lab.learn_then_test import (
    certified,
    certified_together,
    p_values,
    questions_needed,
    strictest,
    upper_bound,
)

THRESHOLDS = [1 - i / 100 for i in range(61)]
PATH = (Never(), *(DEER(threshold) for threshold in THRESHOLDS[1:]))
ASKED = [(0.05, 0.1), (0.1, 0.1)]
N = 200


def by_rate(losses, n, epsilon, delta):
    """Broken: the rate seen is taken for the rate."""
    fails = np.asarray(losses) / n > epsilon
    return int(np.argmax(fails)) - 1 if fails.any() else len(fails) - 1


def first_that_fails(losses, n, epsilon, delta):
    """Broken: one too far."""
    return min(certified(losses, n, epsilon, delta) + 1, len(losses) - 1)


def boldest_that_passes(losses, n, epsilon, delta):
    """Broken: tests everything, takes the best, and corrects for nothing."""
    return int(np.flatnonzero(p_values(losses, n, epsilon) <= delta).max(initial=0))


def share_broken(counts, truth, epsilon, delta, choose=certified):
    """How often the chosen setting's true risk is above epsilon. `counts`: [draws, settings]."""
    return float(np.mean([truth[choose(row, N, epsilon, delta)] > epsilon for row in counts]))


def at_most(delta, draws):
    """The largest share that chance alone lets a rate of delta reach, 999 times in 1,000."""
    return binom.ppf(0.999, draws, delta) / draws


@pytest.fixture(scope="module")
def pool():
    """Which setting changes the answer of which question, by replaying 2,000 traces: [questions, settings]."""
    _, losses = replay_losses(traces(np.random.default_rng(0), 2000), PATH)
    return losses


@pytest.fixture(scope="module")
def from_pool(pool):
    """Losses in 1,000 calibration sets drawn with replacement: [draws, settings]."""
    rng = np.random.default_rng(1)
    return np.stack([pool[rng.integers(0, len(pool), N)].sum(axis=0) for _ in range(1000)])


@pytest.fixture(scope="module")
def from_law():
    """Losses in 2,000 calibration sets drawn from the law: [draws, settings]."""
    rng = np.random.default_rng(2)
    return losses_in(*chains(rng, 2000, N), THRESHOLDS)


@pytest.mark.parametrize(("epsilon", "delta"), ASKED)
def test_over_draws_from_a_pool_the_promise_fails_at_most_delta_of_the_time(pool, from_pool, epsilon, delta):
    assert share_broken(from_pool, pool.mean(axis=0), epsilon, delta) <= at_most(delta, len(from_pool))


@pytest.mark.parametrize(("epsilon", "delta"), ASKED)
def test_over_draws_from_a_law_the_promise_fails_at_most_delta_of_the_time(from_law, epsilon, delta):
    truth = np.array([risk(threshold) for threshold in THRESHOLDS])
    assert share_broken(from_law, truth, epsilon, delta) <= at_most(delta, len(from_law))


@pytest.mark.parametrize(("epsilon", "delta"), ASKED)
@pytest.mark.parametrize(("broken", "stride"), [(by_rate, 1), (first_that_fails, 12)])
def test_a_broken_calibrator_fails_that_same_check(pool, from_pool, from_law, epsilon, delta, broken, stride):
    truth = np.array([risk(threshold) for threshold in THRESHOLDS])[::stride]
    by_pool = share_broken(from_pool[:, ::stride], pool.mean(axis=0)[::stride], epsilon, delta, broken)
    by_law = share_broken(from_law[:, ::stride], truth, epsilon, delta, broken)
    assert by_pool > at_most(delta, len(from_pool))
    assert by_law > at_most(delta, len(from_law))


def test_a_risk_that_does_not_grow_along_the_path_is_no_excuse():
    # Forty settings, each a little too risky and each with luck of its own: some passes nearly always.
    rng = np.random.default_rng(7)
    counts = np.concatenate([np.zeros((2000, 1), dtype=int), rng.binomial(N, 0.055, (2000, 40))], axis=1)
    truth = np.array([0.0] + [0.055] * 40)
    assert share_broken(counts, truth, 0.05, 0.1) <= at_most(0.1, 2000)
    assert share_broken(counts, truth, 0.05, 0.1, boldest_that_passes) > 0.5


def test_levels_that_share_delta_hold_all_together(from_law):
    levels, delta = [0.05, 0.1, 0.2], 0.1
    truth = np.array([risk(threshold) for threshold in THRESHOLDS])
    chosen = np.array([certified_together(row, N, levels, delta) for row in from_law])
    assert (truth[chosen] > np.array(levels)).any(axis=1).mean() <= at_most(delta, len(from_law))


def test_the_promise_is_worth_having(from_law):
    # Never leaving keeps every promise too: what is certified must leave nearly as often as the promise allows.
    truth = np.array([risk(threshold) for threshold in THRESHOLDS])
    chosen = [certified(row, N, 0.1, 0.1) for row in from_law]
    assert np.median(truth[chosen]) > 0.06


def test_replayed_losses_are_those_of_the_law():
    confidence, changes = chains(np.random.default_rng(3), 300)
    rows = [trace_of(c, x) for c, x in zip(confidence, changes, strict=True)]
    exits, losses = replay_losses(rows, PATH)
    assert (losses == losses_in(confidence[:, None], changes[:, None], THRESHOLDS)).all()
    assert (exits == losses_in(confidence[:, None], np.ones_like(changes)[:, None], THRESHOLDS)).all()
    truth = [risk(threshold) for threshold in THRESHOLDS]
    assert losses_in(*chains(np.random.default_rng(6), 1, 100_000), THRESHOLDS)[0] / 1e5 == pytest.approx(
        truth, abs=0.005
    )


def test_calibrate_chooses_what_the_tests_certify():
    rows = traces(np.random.default_rng(4), 300)
    _, losses = replay_losses(rows, PATH)
    found = calibrate(rows, PATH, [0.05, 0.1], 0.1, BINDS)
    expected = [PATH[certified(losses.sum(axis=0), 300, epsilon, 0.05)] for epsilon in (0.05, 0.1)]
    assert [level.policy for level in found.levels] == expected
    assert len({repr(policy) for policy in expected} - {"Never()"}) == 2


class TestTheTests:
    def test_what_is_chosen_is_the_last_that_passes_before_the_first_that_fails(self):
        # 0 of 100 passes at (.05, .05), so does 1; 2 does not; what comes after it must not count.
        assert certified([0, 0, 1, 2, 0], 100, 0.05, 0.05) == 2
        assert certified([0, 0, 0], 100, 0.05, 0.05) == 2
        assert certified([2, 0, 0], 100, 0.05, 0.05) == -1

    @pytest.mark.parametrize(
        ("epsilon", "delta", "needed"),
        [
            (0.01, 0.05, (299, 473, 628)),
            (0.02, 0.05, (149, 236, 313)),
            (0.02, 0.10, (114, 194, 265)),
            (0.05, 0.05, (59, 93, 124)),
            (0.10, 0.05, (29, 46, 61)),
        ],
    )
    def test_how_many_questions_it_takes(self, epsilon, delta, needed):
        for losses, n in enumerate(needed):
            assert questions_needed(epsilon, delta, losses) == n
            assert p_values([losses], n, epsilon)[0] <= delta < p_values([losses], n - 1, epsilon)[0]
        assert strictest(needed[0], delta) <= epsilon < strictest(needed[0] - 1, delta)

    def test_a_setting_passes_exactly_when_its_upper_bound_is_at_most_epsilon(self):
        for n in (60, 200):
            for losses in range(12):
                assert (p_values([losses], n, 0.05)[0] <= 0.1) == (upper_bound(losses, n, 0.1) <= 0.05)

    def test_mapie_certifies_the_same(self):
        rng = np.random.default_rng(5)
        for _ in range(200):
            n = int(rng.integers(60, 400))
            epsilon, delta = float(rng.choice([0.05, 0.1, 0.2])), float(rng.choice([0.05, 0.1]))
            losses = np.sort(rng.binomial(n, np.linspace(0, 0.3, 25)))
            # Their rate times n is rounded up: a hair below k / n keeps k / n * n from being counted as k + 1.
            rates = np.nextafter(losses / n, -1).clip(0)
            [passed], _ = ltt_procedure(
                rates[None],
                np.array([[epsilon]]),
                delta,
                np.full((1, len(losses)), float(n)),
                binary=True,
                fwer_method="fixed_sequence",
            )
            assert max(passed, default=-1) == certified(losses, n, epsilon, delta)
