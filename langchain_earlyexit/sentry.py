"""The control loop's eye inside a server: it follows one chain there, measures its checks, and may end it.

A remote client sees tokens, not hidden states. So it sends `Orders` with its request, and the server's plugin keeps a
`Sentry` beside the sequence: the same cue matcher, the same head, the same policy as at home, fed the same tokens. What
it measures at a check goes home as the log-probability of a token that is never drawn (`told`, `heard`): no token, no
extra request. Where the policy leaves, the server may end the sequence at once instead of running on until the client
hangs up. The client decides again from the same floats, and its word counts: so live equals replay here too.

Nothing in this module knows vLLM, torch or HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple, Self

from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.cues import CueMatcher, CueSpec, Hit
from langchain_earlyexit.policies import Policy, needs_at
from langchain_earlyexit.policy_json import policy_from_dict, policy_to_dict
from langchain_earlyexit.strain import TagFinder
from langchain_earlyexit.trace import Check, Trace

MEASURED: Final = ("p_safe", "end_margin")
"""What a sentry can measure: both from what the server's own forward pass computes."""

ARGUMENT: Final = "earlyexit"
"""The name under which orders travel, in the request's extra arguments."""

HELLO: Final = "hello"
"""Sent instead of orders, it makes the plugin spell `greeting` in token ids."""

_FORMAT: Final = 1
_MAGIC: Final = "ea51"
_NO_PROBE: Final = "0" * 16


@dataclass(frozen=True)
class Orders:
    """What a sentry is told. Plain data: `Orders.from_json(orders.to_json()) == orders`.

    Args:
        cues: what counts as a cue.
        kinds: kinds of checks to find.
        end: the string that ends thinking, or None for a model without.
        eos: ids that end a turn; the first is the one to end the sequence with.
        start: tokens before the first of the thinking. Where it is less than the prompt, the thinking goes on from an
            earlier request, and the sentry measures but never ends it: it has not seen the earlier checks' signals.
        reports: signal to the id whose log-probability carries it home; its keys are of `MEASURED`.
        policy: what decides, or None to measure only.
        probe: digest of the head that `p_safe` must come from, or None.

    Raises:
        ValueError: signals that no sentry measures, ids that carry two or are no ids, or `p_safe` without a probe.
    """

    cues: CueSpec
    kinds: frozenset[str]
    end: str | None
    eos: tuple[int, ...]
    start: int
    reports: Mapping[str, int] = field(default_factory=dict)
    policy: Policy | None = None
    probe: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.reports) - set(MEASURED)):
            raise ValueError(f"a sentry measures {', '.join(MEASURED)}, not {', '.join(unknown)}")
        for name, found in (("eos", self.eos), ("start", (self.start,)), ("reports", tuple(self.reports.values()))):
            if wrong := [i for i in found if type(i) is not int or i < 0]:
                raise ValueError(f"{name} takes whole numbers from 0 on, not {wrong[0]!r}")
        if len(set(self.reports.values())) < len(self.reports) or set(self.reports.values()) & set(self.eos):
            raise ValueError(f"each report needs an id of its own that ends no turn; got {dict(self.reports)}")
        if "p_safe" in self.reports and self.probe is None:
            raise ValueError("p_safe is asked for without the digest of the probe that measures it")
        if not self.eos:
            raise ValueError("orders need an id that ends a turn")
        if self.start < 1:
            raise ValueError(f"thinking starts after at least one token of prompt, not after {self.start}")

    def to_json(self) -> str:
        """One line of JSON."""
        data = {
            "format": _FORMAT,
            "cues": asdict(self.cues),
            "kinds": sorted(self.kinds),
            "end": self.end,
            "eos": list(self.eos),
            "start": self.start,
            "reports": dict(self.reports),
            "policy": None if self.policy is None else policy_to_dict(self.policy),
            "probe": self.probe,
        }
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: text that is no orders of this format, naming what is wrong.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError(f"this version reads orders of format {_FORMAT}")
            policy = data.pop("policy")
            return cls(
                cues=CueSpec(**data.pop("cues")),
                kinds=frozenset(data.pop("kinds")),
                eos=tuple(data.pop("eos")),
                policy=None if policy is None else policy_from_dict(policy),
                **data,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"these are no orders for a sentry: {error}") from error


class Sentry:
    """Follows one chain as `controller.Run` does, from the first thinking token on.

    Args:
        orders: see there.
        codec: of the server's tokenizer.
        watching: of a chain that goes on from an earlier request: never end it.

    Attributes:
        pushed: thinking tokens so far.
        over: the thinking has ended; nothing is found any more.
        hit: the cue that the newest token completes.
    """

    def __init__(self, orders: Orders, codec: Codec, *, watching: bool = False) -> None:
        self._eos = codec.eos | frozenset(orders.eos)
        self._finder = TagFinder(codec, orders.end)
        self._matcher = CueMatcher(orders.cues, orders.kinds)
        self._pieces = Pieces(codec)
        self._policy = None if watching else orders.policy
        self._signals = frozenset(orders.reports)
        self._checks: list[Check] = []
        self.pushed = 0
        self.over = False
        self.hit: Hit | None = None

    @property
    def end_ids(self) -> frozenset[int]:
        """The id that ends thinking by itself, if one does."""
        return self._finder.ids

    def push(self, token: int) -> None:
        """Take the next thinking token."""
        self.hit = None
        if self.over:
            return
        if token in self._eos:
            self.over = True
            return
        self.pushed += 1
        piece = self._pieces.push(token)
        if self._finder.push(token, piece) is not None:
            self.over = True
            return
        self.hit = self._matcher.push(token, piece)

    @property
    def wanted(self) -> frozenset[str]:
        """Signals to measure at the newest token: those the policy reads at such a check, none where there is none."""
        if self.hit is None:
            return frozenset()
        return self._signals if self._policy is None else self._signals & needs_at(self._policy, self.hit.kind)

    def measured(self, signals: Mapping[str, float]) -> bool:
        """Take what was measured at the newest token's check; whether the policy leaves here."""
        if self.hit is None:
            raise RuntimeError("the newest token completes no cue: there is nothing to measure")
        if self._policy is None:
            return False
        self._checks.append(Check(self.hit.position, self.hit.cue, signals, self.hit.kind))
        self.over = self._policy.decide(Trace(tuple(self._checks))).exit
        return self.over


# --- how a float comes home ----------------------------------------------------------------------------------------

_STEPS: Final = 1 << 19
_SPAN: Final = 1000.0
_BANDS: Final = {"measured": -1000.0, "left": -3000.0, "missing": -5000.0, "failed": -7000.0}
_RANGES: Final = {"p_safe": 1.0, "end_margin": 32.0}
_OWN_ABOVE: Final = -500.0
_OWN_BELOW: Final = -8500.0
"""Log-probabilities beyond these are the model's own: no report. vLLM tells minus infinity as -9999."""


class Report(NamedTuple):
    """What came home with one token.

    Attributes:
        value: the signal; NaN where it could not be measured.
        left: the server has ended the sequence here, and the token beside this report is not the model's.
        failed: the sentry is out of order, and measures nothing any more.
    """

    value: float
    left: bool = False
    failed: bool = False


def told(signal: str, report: Report) -> float:
    """The log-probability that says it: so low that the token it is written on can never be drawn.

    Values are rounded to a 2^19th of the signal's range, 1 for `p_safe` and 32 nats for `end_margin` (what is above
    that says 32): `heard` gives back exactly `rounded`, whatever single precision does to it on the way.
    """
    if report.failed:
        return _BANDS["failed"]
    if math.isnan(report.value):
        return _BANDS["missing"]
    share = rounded(signal, report.value) / _RANGES[signal]
    return _BANDS["left" if report.left else "measured"] - _SPAN * share


def heard(signal: str, logprob: float) -> Report | None:
    """The inverse of `told`; None for a log-probability that is the model's own."""
    if not _OWN_BELOW < logprob < _OWN_ABOVE:
        return None
    if logprob < _BANDS["failed"] + _SPAN / 2:
        return Report(math.nan, failed=True)
    if logprob < _BANDS["missing"] + _SPAN / 2:
        return Report(math.nan)
    left = logprob < _BANDS["left"] + _SPAN / 2
    share = (_BANDS["left" if left else "measured"] - logprob) / _SPAN
    return Report(round(share * _STEPS) / _STEPS * _RANGES[signal], left)


def rounded(signal: str, value: float) -> float:
    """As it comes home. NaN stays."""
    if math.isnan(value):
        return value
    share = min(1.0, max(0.0, value / _RANGES[signal]))
    return round(share * _STEPS) / _STEPS * _RANGES[signal]


# --- whether there is a sentry at all --------------------------------------------------------------------------------


def greeting(probe: str | None) -> tuple[int, ...]:
    """The ids that a plugin answers `HELLO` with: a format and the digest of its probe, a hexadecimal digit each."""
    return tuple(int(digit, 16) for digit in _MAGIC + str(_FORMAT) + (probe or _NO_PROBE))


def greeted(ids: tuple[int, ...]) -> tuple[bool, str | None]:
    """Whether these ids come from a plugin, and the digest of its probe."""
    said = "".join(f"{i:x}" if i < 16 else "?" for i in ids)
    head = _MAGIC + str(_FORMAT)
    if not said.startswith(head) or len(said) != len(head + _NO_PROBE) or "?" in said:
        return False, None
    digest = said[len(head) :]
    return True, None if digest == _NO_PROBE else digest
