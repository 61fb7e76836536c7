"""When to stop thinking: frozen dataclasses that read a `Trace` and return a `Decision`.

A policy is pure: the same trace gives the same decision, live or replayed, so every threshold can be tried on
recorded traces with no model. To write your own, give a frozen dataclass the three members of `Policy`.

Two rules hold for every policy here. It looks only at checks whose kind is in its `looks`, counting no other. And
it never exits at a check where a float it needs is missing or not finite (no trial was possible, say).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import ClassVar, Final, Protocol, runtime_checkable

from langchain_earlyexit.trace import KINDS, Check, Decision, Trace

DECISION_POINTS: Final = frozenset({"reflection", "paragraph", "interval"})
"""The kinds a cue spec may take for its main decision points, thus the default `looks`."""

_PROMISE: Final = ("trial_confidence", "p_safe")
"""Signals that say how likely leaving here is to give the full answer: low ones, a chain without promise."""

_GO_ON: Final = Decision(exit=False, reason="natural")


@runtime_checkable
class Policy(Protocol):
    """What the loop asks of a policy. `repr(policy)` is its record form: `DEER(threshold=0.95)`."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals it reads."""

    @property
    def looks(self) -> frozenset[str]:
        """Kinds of checks it looks at, of `KINDS`."""

    def decide(self, trace: Trace) -> Decision:
        """What to do at the trace's last check. Must not depend on anything but `trace` and the fields."""


def replay(policy: Policy, trace: Trace) -> int | None:
    """Index into `trace.checks` at which `policy` first exits, None if it never does.

    At check i the policy sees the checks up to i alone, as it would live. Checks whose kind it does not look at are
    passed over.
    """
    for i, check in enumerate(trace.checks):
        if check.kind in policy.looks and policy.decide(Trace(trace.checks[: i + 1])).exit:
            return i
    return None


def needs_at(policy: Policy, kind: str) -> frozenset[str]:
    """Signals that `policy` reads at a check of `kind`; empty where it does not look."""
    leaves = [leaf for leaf in _leaves(policy) if kind in leaf.looks]
    return frozenset().union(*(leaf.needs for leaf in leaves))


def wanted_kinds(policy: Policy, primary: frozenset[str], offered: frozenset[str]) -> frozenset[str]:
    """Kinds of checks a cue matcher must report for `policy`.

    Args:
        policy: any policy.
        primary: the model's main decision points (`CueSpec.primary`).
        offered: every kind the matcher can report (`CueSpec.offered`).

    Returns:
        For each policy within: its kinds among the primary ones, or, if there are none, among those offered. Thus a
        policy that could use paragraphs stays with the cue words of a model that has them.
    """
    return frozenset().union(*((leaf.looks & primary) or (leaf.looks & offered) for leaf in _leaves(policy)))


def policy_from_name(name: str) -> Policy:
    """The policy called `name`, with its default fields. Raises ValueError naming the known ones."""
    if name not in _BY_NAME:
        raise ValueError(f"unknown exit policy {name!r}; known are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]()


@dataclass(frozen=True)
class Never:
    """Think to the end."""

    needs: ClassVar[frozenset[str]] = frozenset()
    looks: ClassVar[frozenset[str]] = frozenset()

    def decide(self, trace: Trace) -> Decision:
        """Go on."""
        return _GO_ON


@dataclass(frozen=True, repr=False)
class _Looking:
    """Base of the policies below: which checks they look at, and how they print."""

    looks: frozenset[str] = field(default=DECISION_POINTS, kw_only=True)

    def __post_init__(self) -> None:
        looks = frozenset(self.looks)
        if not looks or not looks <= set(KINDS):
            raise ValueError(f"looks must name kinds of checks, of {', '.join(KINDS)}; got {self.looks!r}")
        object.__setattr__(self, "looks", looks)

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "looks"]
        parts = [f"{name}={_shown(value)}" for name, value in given if value is not None]
        if self.looks != next(f.default for f in fields(self) if f.name == "looks"):
            parts.append(f"looks={{{', '.join(map(repr, sorted(self.looks)))}}}")  # sorted: a stable record
        return f"{type(self).__name__}({', '.join(parts)})"

    def _looks_now(self, trace: Trace) -> bool:
        return bool(trace.checks) and trace.checks[-1].kind in self.looks


@dataclass(frozen=True, repr=False)
class DEER(_Looking):
    """Leave when the trial answer is confident: `trial_confidence > threshold`, strictly (arXiv 2504.15895).

    The confidence is the geometric mean probability of the trial answer's tokens (the paper's v3), not the
    arithmetic mean of the first released code.

    Args:
        threshold: in [0, 1]; the paper uses 0.95 for every model.
        looks: kinds of checks to look at.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trial_confidence"})
    threshold: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        _within_unit("threshold", self.threshold)

    def decide(self, trace: Trace) -> Decision:
        """Exit as `confident`; the score is the trial confidence."""
        confidence = _finite(trace.checks[-1], "trial_confidence") if self._looks_now(trace) else None
        if confidence is None:
            return _GO_ON
        if confidence > self.threshold:
            return Decision(exit=True, reason="confident", score=confidence)
        return Decision(exit=False, reason="natural", score=confidence)


@dataclass(frozen=True, repr=False)
class CoDEStop(_Looking):
    """Leave when confident, or when confidence stays low without improving (arXiv 2604.04930, v2 formulas).

    With c_k the trial confidence at the k-th check (k from 1) and T_k its position in tokens, it leaves

    - as `confident` if `c_k >= min(r_max, r_min + (r_max - r_min) / ramp_steps * k)`, else
    - as `degenerate` if `D_k >= tau`, where `D_k = sum of (log(T_k / T_i) + 1)` over those i in 2..k with
      `2 c_i - c_{i-1} < delta`: unsure and not on the way up, early steps weighing more.

    The paper does not say what c_0 is, so the sum starts at the second check. Checks without a finite confidence
    are skipped: they take no k. The released code differs (confidence in the log domain, drops only, `>`); this
    is the paper's text.

    Args:
        r_min: where the confidence ramp starts, in [0, 1]. Near 0 it leaves at the first check, whatever it is.
        r_max: where it ends, in [r_min, 1].
        ramp_steps: checks from `r_min` to `r_max`, at least 1.
        delta: instability bound; the paper uses 0.55 throughout.
        tau: degeneration bound, above 0. 3.5 is one cell of the paper's table, which spans 0.9 to 90: calibrate it
            for your model and questions.
        looks: kinds of checks to look at.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trial_confidence"})
    r_min: float = 0.9
    r_max: float = 0.95
    ramp_steps: int = 2
    delta: float = 0.55
    tau: float = 3.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _within_unit("r_min", self.r_min)
        _within_unit("r_max", self.r_max)
        if self.r_min > self.r_max:
            raise ValueError(f"r_min must not be above r_max, got {self.r_min} > {self.r_max}")
        _whole("ramp_steps", self.ramp_steps, least=1)
        if not math.isfinite(self.delta):
            raise ValueError(f"delta must be finite, got {self.delta}")
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")

    def decide(self, trace: Trace) -> Decision:
        """Exit as `confident` (score: c_k) or `degenerate` (score: D_k); going on scores c_k."""
        if not self._looks_now(trace) or _finite(trace.checks[-1], "trial_confidence") is None:
            return _GO_ON
        steps = [
            (check.position, confidence)
            for check in trace.checks
            if check.kind in self.looks and (confidence := _finite(check, "trial_confidence")) is not None
        ]
        tokens, confidence = steps[-1]
        ramp = min(self.r_max, self.r_min + (self.r_max - self.r_min) / self.ramp_steps * len(steps))
        if confidence >= ramp:
            return Decision(exit=True, reason="confident", score=confidence)
        degeneration = sum(
            math.log(tokens / position) + 1
            for (_, before), (position, now) in pairwise(steps)
            if 2 * now - before < self.delta
        )
        if degeneration >= self.tau:
            return Decision(exit=True, reason="degenerate", score=degeneration)
        return Decision(exit=False, reason="natural", score=confidence)


@dataclass(frozen=True, repr=False)
class AnswerConvergence(_Looking):
    """Leave when the last `k` trial answers are the same (Answer Convergence, arXiv 2506.02536; Dynasor, 2412.20993).

    Agreement of a model with itself is not correctness: on hard questions it is known to leave far too early
    (arXiv 2604.04930, Table 1). A check without an answer breaks the row.

    Args:
        k: how many in a row, at least 2.
        looks: kinds of checks to look at.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trial_confidence"})
    k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("k", self.k, least=2)

    def decide(self, trace: Trace) -> Decision:
        """Exit as `converged`; the score is the length of the row of equal answers."""
        if not self._looks_now(trace):
            return _GO_ON
        answers = [check.answer for check in reversed(trace.checks) if check.kind in self.looks]
        row = 0
        while row < len(answers) and answers[row] is not None and answers[row] == answers[0]:
            row += 1
        if row >= self.k:
            return Decision(exit=True, reason="converged", score=float(row))
        return Decision(exit=False, reason="natural", score=float(row))


@dataclass(frozen=True, repr=False)
class EAT(_Looking):
    """Leave when the entropy after a forced end of thinking has settled (arXiv 2509.26522).

    With x_t the `end_entropy` of the t-th check: `m = a x + (1 - a) m` and `v = a (x - m)^2 + (1 - a) v`, from
    m_1 = x_1 and v_1 = 0; it leaves at the first t >= `min_checks` with v < `threshold`.

    Args:
        threshold: variance in square nats, above 0. The default is the one CoDE-Stop's authors ran it with.
        alpha: weight of the newest entropy, in (0, 1].
        min_checks: checks before it may leave, at least 2.
        looks: kinds of checks to look at; the paper looks at paragraphs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"end_entropy"})
    threshold: float = 1e-5
    alpha: float = 0.1
    min_checks: int = 25
    looks: frozenset[str] = field(default=frozenset({"paragraph"}), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        _whole("min_checks", self.min_checks, least=2)

    def decide(self, trace: Trace) -> Decision:
        """Exit as `converged`; the score is the variance."""
        if not self._looks_now(trace) or _finite(trace.checks[-1], "end_entropy") is None:
            return _GO_ON
        mean = variance = 0.0
        count = 0
        for check in trace.checks:
            entropy = _finite(check, "end_entropy") if check.kind in self.looks else None
            if entropy is None:
                continue
            count += 1
            mean = entropy if count == 1 else self.alpha * entropy + (1 - self.alpha) * mean
            variance = self.alpha * (entropy - mean) ** 2 + (1 - self.alpha) * variance
        if count >= self.min_checks and variance < self.threshold:
            return Decision(exit=True, reason="converged", score=variance)
        return Decision(exit=False, reason="natural", score=variance)


@dataclass(frozen=True, repr=False)
class ThinkBrake(_Looking):
    """Leave at the end of a sentence when the end of thinking is nearly the likeliest token (arXiv 2510.00546).

    It costs no token of its own: the margin is read from logits that are computed anyway.

    Args:
        margin: in nats, at least 0: how far the end of thinking may be behind the likeliest token. The default is a
            place to start from, not calibrated for any model.
        looks: kinds of checks to look at.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"end_margin"})
    margin: float = 0.25
    looks: frozenset[str] = field(default=frozenset({"sentence"}), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin >= 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}")

    def decide(self, trace: Trace) -> Decision:
        """Exit as `margin`; the score is the margin at this check."""
        found = _finite(trace.checks[-1], "end_margin") if self._looks_now(trace) else None
        if found is None:
            return _GO_ON
        if found <= self.margin:
            return Decision(exit=True, reason="margin", score=found)
        return Decision(exit=False, reason="natural", score=found)


@dataclass(frozen=True, repr=False)
class LYNX(_Looking):
    """Leave when a probe on the hidden state at the cue says that it is safe (arXiv 2512.05325).

    Give either a threshold, `p_safe > threshold`, or the two quantiles of the paper's split conformal calibration:
    with p the `p_safe` of this check, its prediction set holds "safe" where `1 - p <= q_safe` and "unsafe" where
    `p <= q_unsafe`, and it leaves when the set is {safe}. The paper's bound is per cue, not per question: over many
    cues of one chain it does not hold for the chain. As the tolerated error grows, one quantile moves against the
    other, so these two are not a knob from careful to bold; the threshold is.

    Args:
        threshold: in [0, 1]; 0.95 when nothing is given, which is not calibrated for any model.
        q_safe: quantile of `1 - p` over safe cues, at least 0; infinite when there were too few of them.
        q_unsafe: quantile of `p` over unsafe cues, at least 0; infinite (it then never leaves) when too few.
        looks: kinds of checks to look at.

    Raises:
        ValueError: a threshold beside quantiles, one quantile without the other, or a value out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_safe"})
    threshold: float | None = None
    q_safe: float | None = None
    q_unsafe: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        quantiles = {"q_safe": self.q_safe, "q_unsafe": self.q_unsafe}
        missing = [name for name, value in quantiles.items() if value is None]
        if len(missing) == 1:
            raise ValueError(f"the prediction set needs both quantiles, {missing[0]} is missing")
        if not missing and self.threshold is not None:
            raise ValueError(f"give threshold={self.threshold} or the two quantiles, not both")
        if missing and self.threshold is None:
            object.__setattr__(self, "threshold", 0.95)
        if self.threshold is not None:
            _within_unit("threshold", self.threshold)
        for name, value in quantiles.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def decide(self, trace: Trace) -> Decision:
        """Exit as `sufficient`; the score is `p_safe`."""
        p = _finite(trace.checks[-1], "p_safe") if self._looks_now(trace) else None
        if p is None:
            return _GO_ON
        if self._is_safe(p):
            return Decision(exit=True, reason="sufficient", score=p)
        return Decision(exit=False, reason="natural", score=p)

    def _is_safe(self, p: float) -> bool:
        if self.q_safe is None or self.q_unsafe is None:
            return self.threshold is not None and p > self.threshold
        return 1 - p <= self.q_safe and p > self.q_unsafe


@dataclass(frozen=True, repr=False)
class GiveUp(_Looking):
    """Leave a chain that shows no promise: the signal stayed below `threshold` at the last `patience` checks.

    The idea of a lower threshold is Conformal Thinking's (arXiv 2602.03814), whose threshold moves with the tokens
    used; here it is fixed and must be kept. The answer of such an exit is worth little: it is for a caller who then
    asks a larger model or another way, so it goes well with `FirstOf(CoDEStop(), GiveUp())`.

    Args:
        threshold: in [0, 1].
        patience: how many checks in a row must be below it, at least 1.
        min_checks: checks before it may leave, at least 1.
        signal: "trial_confidence" or "p_safe".
        looks: kinds of checks to look at.
    """

    threshold: float = 0.3
    patience: int = 3
    min_checks: int = 5
    signal: str = "trial_confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within_unit("threshold", self.threshold)
        _whole("patience", self.patience, least=1)
        _whole("min_checks", self.min_checks, least=1)
        if self.signal not in _PROMISE:
            raise ValueError(f"signal must be one of {', '.join(_PROMISE)}; got {self.signal!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The one signal it reads."""
        return frozenset({self.signal})

    def decide(self, trace: Trace) -> Decision:
        """Exit as `unpromising`; the score is the highest value of the last `patience` checks.

        Checks at which the signal is missing or not finite are passed over, and count for nothing.
        """
        if not self._looks_now(trace) or _finite(trace.checks[-1], self.signal) is None:
            return _GO_ON
        values = [
            value
            for check in trace.checks
            if check.kind in self.looks and (value := _finite(check, self.signal)) is not None
        ]
        best = max(values[-self.patience :])
        if len(values) >= max(self.min_checks, self.patience) and best < self.threshold:
            return Decision(exit=True, reason="unpromising", score=best)
        return Decision(exit=False, reason="natural", score=best)


@dataclass(frozen=True, init=False, repr=False)
class FirstOf:
    """Leave as soon as one of `policies` does; the earlier named decides first.

    Each member sees the whole trace so far, and is asked only at checks of the kinds it looks at.

    Raises:
        ValueError: no member.
    """

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy) -> None:
        if not policies:
            raise ValueError("FirstOf needs at least one policy")
        object.__setattr__(self, "policies", policies)

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self.policies))})"

    @property
    def needs(self) -> frozenset[str]:
        """Signals of all members."""
        return frozenset().union(*(member.needs for member in self.policies))

    @property
    def looks(self) -> frozenset[str]:
        """Kinds of all members."""
        return frozenset().union(*(member.looks for member in self.policies))

    def decide(self, trace: Trace) -> Decision:
        """The first member's exit; else go on with the first score a member gave."""
        going_on = _GO_ON
        for member in self.policies:
            if trace.checks and trace.checks[-1].kind in member.looks:
                decision = member.decide(trace)
                if decision.exit:
                    return decision
                if going_on.score is None:
                    going_on = decision
        return going_on


_BY_NAME: Final[Mapping[str, Callable[[], Policy]]] = {
    "never": Never,
    "deer": DEER,
    "codestop": CoDEStop,
    "lynx": LYNX,
    "convergence": AnswerConvergence,
    "eat": EAT,
    "thinkbrake": ThinkBrake,
    "giveup": GiveUp,
}


def _leaves(policy: Policy) -> list[Policy]:
    if isinstance(policy, FirstOf):
        return [leaf for member in policy.policies for leaf in _leaves(member)]
    return [policy]


def _shown(value: object) -> str:
    """`repr`, but such that it can be read back also where it is infinite."""
    return f"float('{value}')" if isinstance(value, float) and math.isinf(value) else repr(value)


def _finite(check: Check, signal: str) -> float | None:
    value = check.signals.get(signal)
    return value if value is not None and math.isfinite(value) else None


def _whole(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _within_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
