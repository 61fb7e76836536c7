"""Decisions equal direct transcriptions of the papers' formulas, on 10,000 random traces each."""

import math

import numpy as np
import pytest

from langchain_earlyexit.policies import DEER, EAT, LYNX, CoDEStop, GiveUp, replay
from langchain_earlyexit.trace import Check, Trace

TRACES = 10_000


def traces(signal, draw, kind="reflection"):
    """Random traces as (positions, values): lengths 0 to 11, positions that grow, values from `draw`."""
    rng = np.random.default_rng(7)
    for _ in range(TRACES):
        n = int(rng.integers(0, 12))
        positions = np.cumsum(rng.integers(1, 60, n)).tolist()
        values = draw(rng, n).tolist()
        checks = tuple(Check(p, "wait", {signal: v}, kind) for p, v in zip(positions, values, strict=True))
        yield rng, positions, values, Trace(checks)


def unit(rng, n):
    """Probabilities; now and then one exactly at a round number, where a strict bound and an equal one differ."""
    free = rng.beta(rng.uniform(0.3, 3), rng.uniform(0.3, 3), n)
    return np.where(rng.random(n) < 0.2, rng.choice([0.0, 0.3, 0.5, 0.55, 0.9, 0.925, 0.95, 1.0], n), free)


def agree(pairs):
    """Every pair is equal, and the case was not an empty one: exits early, late and none all occur."""
    found = list(pairs)
    assert all(ours == theirs for ours, theirs in found)
    assert {None, 0, 1, 4} <= {ours for ours, _ in found}


def test_deer_leaves_where_the_paper_does():
    # arXiv 2504.15895: at each thought, C = (prod p_i)^(1/n) of the trial answer; stop thinking if C > lambda.
    def pairs():
        for rng, _, confidence, trace in traces("trial_confidence", unit):
            lam = float(rng.choice([0.5, 0.9, 0.95, rng.random()]))
            paper = next((i for i, c in enumerate(confidence) if c > lam), None)
            yield replay(DEER(lam), trace), paper

    agree(pairs())


def test_codestop_leaves_where_the_paper_does():
    # arXiv 2604.04930 v2: r_k = min(r_max, r_min + (r_max - r_min)/steps * k); v_i = 1[2 c_i - c_{i-1} < delta];
    # w_i = log(T_k / T_i) + 1; stop at k if c_k >= r_k or D_k = sum_i w_i v_i >= tau. The sum has no first term: c_0 is
    # not defined. k counts from 1.
    def paper(t, c, r_min, r_max, steps, delta, tau):
        for k in range(1, len(c) + 1):
            r = min(r_max, r_min + (r_max - r_min) / steps * k)
            d = 0.0
            for i in range(2, k + 1):
                if 2 * c[i - 1] - c[i - 2] < delta:
                    d += math.log(t[k - 1] / t[i - 1]) + 1
            if c[k - 1] >= r:
                return k - 1, "confident"
            if d >= tau:
                return k - 1, "degenerate"
        return None, None

    reasons = set()

    def pairs():
        for rng, t, c, trace in traces("trial_confidence", unit):
            low, high = sorted(rng.uniform(0.5, 1.0, 2).tolist())
            fields = (low, high, int(rng.integers(1, 5)), float(rng.uniform(0, 1)), float(rng.uniform(0.5, 12)))
            at, reason = paper(t, c, *fields)
            policy = CoDEStop(*fields)
            if at is not None:
                assert policy.decide(Trace(trace.checks[: at + 1])).reason == reason
                reasons.add(reason)
            yield replay(policy, trace), at

    agree(pairs())
    assert reasons == {"confident", "degenerate"}


def test_eat_leaves_where_the_paper_does():
    # arXiv 2509.26522: m_t = a x_t + (1-a) m_{t-1}; V_t = a (x_t - m_t)^2 + (1-a) V_{t-1}, V_0 = 0; stop at the first
    # t >= warm-up with V_t < threshold. m starts at the first entropy.
    def paper(x, threshold, a, warm_up):
        m, v = None, 0.0
        for t, x_t in enumerate(x, 1):
            m = x_t if m is None else a * x_t + (1 - a) * m
            v = a * (x_t - m) ** 2 + (1 - a) * v
            if t >= warm_up and v < threshold:
                return t - 1
        return None

    def entropies(rng, n):
        return rng.exponential(rng.choice([1e-3, 0.1, 1.0]), n)

    found = []
    for rng, _, x, trace in traces("end_entropy", entropies, kind="paragraph"):
        fields = (float(10 ** rng.uniform(-8, 0)), float(rng.uniform(0.05, 1)), int(rng.integers(2, 6)))
        found.append((replay(EAT(*fields), trace), paper(x, *fields)))
    assert all(ours == theirs for ours, theirs in found)
    assert {None, 1, 2, 4} <= {ours for ours, _ in found}


def test_lynx_s_prediction_set_leaves_where_the_paper_does():
    # arXiv 2512.05325: s+ = 1 - p, s- = p; S = {1 if 1 - p <= q+} and {0 if p <= q-}; exit iff S == {1}.
    def paper(p, q_safe, q_unsafe):
        for i, p_i in enumerate(p):
            included = set()
            if 1 - p_i <= q_safe:
                included.add(1)
            if p_i <= q_unsafe:
                included.add(0)
            if included == {1}:
                return i
        return None

    def pairs():
        for rng, _, p, trace in traces("p_safe", unit):
            q = [float(rng.choice([rng.random(), 0.5, 0.9, math.inf])) for _ in range(2)]
            yield replay(LYNX(q_safe=q[0], q_unsafe=q[1]), trace), paper(p, *q)

    agree(pairs())


def test_lynx_s_threshold_leaves_above_it():
    def pairs():
        for rng, _, p, trace in traces("p_safe", unit):
            threshold = float(rng.choice([0.5, 0.95, rng.random()]))
            yield replay(LYNX(threshold), trace), next((i for i, x in enumerate(p) if x > threshold), None)

    agree(pairs())


@pytest.mark.parametrize("signal", ["trial_confidence", "p_safe"])
def test_giving_up_takes_a_row_of_low_values(signal):
    def plain(values, threshold, patience, least):
        row = 0
        for i, value in enumerate(values):
            row = row + 1 if value < threshold else 0
            if i + 1 >= least and row >= patience:
                return i
        return None

    def pairs():
        for rng, _, values, trace in traces(signal, unit):
            fields = (float(rng.choice([0.3, 0.5, rng.random()])), int(rng.integers(1, 4)), int(rng.integers(1, 6)))
            yield replay(GiveUp(*fields, signal=signal), trace), plain(values, *fields)

    agree(pairs())
