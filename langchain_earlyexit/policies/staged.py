"""A policy whose dear signal is measured only where its cheap one leaves the question open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from langchain_earlyexit.policies.looking import Looking, leave_if, within_unit
from langchain_earlyexit.policies.policy import GO_ON
from langchain_earlyexit.trace import Decision, Trace

_PROBE: Final = frozenset({"p_safe"})


@dataclass(frozen=True, repr=False)
class ProbeThenTrial(Looking):
    """Leave when a probe is sure, or when it is fairly sure and a trial answer is confident.

    The probe of LYNX (arXiv 2512.05325) costs no token, the trial answer of DEER (arXiv 2504.15895) costs some, and
    each errs where the other does not. So the probe decides alone where it is sure either way, and a trial answer is
    decoded only in between.

    Args:
        sure: in [0, 1]: with `p_safe > sure` it leaves, without a trial.
        ask: in [0, sure]: with `p_safe <= ask` it goes on, without a trial.
        threshold: in [0, 1]: in between it leaves with `trial_confidence > threshold`.
        looks: kinds of checks to look at.

    Raises:
        ValueError: a field out of its range. The defaults are not calibrated for any model.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_safe", "trial_confidence"})
    sure: float = 0.99
    ask: float = 0.9
    threshold: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sure", "ask", "threshold"):
            within_unit(name, getattr(self, name))
        if self.ask > self.sure:
            raise ValueError(
                f"ask={self.ask} is above sure={self.sure}: no check would be left to a trial; take LYNX({self.sure})"
            )

    def asks(self, signals: Mapping[str, float]) -> frozenset[str]:
        """Signals that are to be measured at a check where those of `signals` have been."""
        p = signals.get("p_safe")
        return self.needs if p is not None and self.ask < p <= self.sure else _PROBE

    def decide(self, trace: Trace) -> Decision:
        """Exit as `sufficient` (the score is `p_safe`) or `confident` (the confidence of the trial answer)."""
        p = self._now(trace, "p_safe")
        if p is None:
            return GO_ON
        if not self.ask < p <= self.sure:
            return leave_if(p > self.sure, "sufficient", p)
        confidence = self._now(trace, "trial_confidence")
        return GO_ON if confidence is None else leave_if(confidence > self.threshold, "confident", confidence)
