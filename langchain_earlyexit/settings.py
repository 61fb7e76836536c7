"""The settings a call may change: the constructor's, with the call's over them, checked before anything is loaded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from langchain_earlyexit import asks
from langchain_earlyexit.answers import FORMS, AnswerForm
from langchain_earlyexit.policies import CoDEStop, Never, Policy, leaves_of, policy_from_name
from langchain_earlyexit.sampling import Sampling

EFFORT_BUDGETS: Mapping[str, int] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": 12288,
    "xhigh": 24576,
    "max": -1,
}
"""`reasoning_effort` as a cap on thinking tokens (-1: no cap)."""

EFFORT_CONFIDENCES: Mapping[str, float] = {
    "minimal": 0.8,
    "low": 0.9,
    "medium": 0.95,
    "high": 0.98,
    "xhigh": 0.99,
}
"""`reasoning_effort` as a confidence too, where there is a calibration. The other two never leave early."""

BUDGET_NAMES = ("thinking_budget", "thinking_token_budget", "reasoning_budget")

_LOOKS = ("parallel", "wait")
_FROM_CORE = frozenset({"stream", "ls_structured_output_format", "structured_output_format"})
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Settings:
    """See the fields of `ChatEarlyExit`, which have the same names and meanings."""

    exit_policy: Policy | None = None
    confidence: float | None = None
    thinking_budget: int | None = None
    thinking_budget_message: str | None = None
    reasoning_effort: str | None = None
    answer_form: str | AnswerForm = "auto"
    answer_reserve: int | None = None
    max_tokens: int | None = None
    reuse_trial_answer: bool = False
    look: str = "parallel"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    audit_rate: float = 0.0
    shadow: bool = False
    include_checks: bool = False
    include_history_reasoning: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def budget(self) -> int | None:
        """Cap on thinking tokens, however it was said; None: no cap, 0: no thinking."""
        named = None if self.reasoning_effort is None else EFFORT_BUDGETS[self.reasoning_effort]
        cap = self.thinking_budget if named is None else named
        return None if cap == -1 else cap

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """What was asked for, over `defaults`."""
        chosen = {name: value for name, value in defaults.items() if name in _SAMPLING and value is not None}
        chosen.update({name: value for name in _SAMPLING if (value := getattr(self, name)) is not None})
        if "top_k" in chosen:
            chosen["top_k"] = int(chosen["top_k"])
        return Sampling(**chosen)

    def over(
        self, stop: Sequence[str] | None, keywords: Mapping[str, Any], model: str, *, calibrated: bool = False
    ) -> Settings:
        """These settings with a call's over them.

        Args:
            stop: the call's own stop strings.
            keywords: the call's keywords, core's own among them.
            model: the model's name, which a call may repeat but not change.
            calibrated: whether an effort is a confidence too.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value, or two together, that cannot be meant.
        """
        given = {name: value for name, value in keywords.items() if name not in _FROM_CORE and name not in asks.NAMES}
        only_one(given, BUDGET_NAMES)
        for name in BUDGET_NAMES[1:]:
            if name in given:
                given["thinking_budget"] = given.pop(name)
        if given.pop("model", model) != model:
            raise ValueError(f"model={keywords['model']!r} cannot be swapped in per call; this one is {model!r}")
        unknown = sorted(set(given) - set(NAMES))
        if unknown:
            known = ", ".join((*NAMES, *asks.NAMES))
            raise TypeError(f"unknown keyword(s) for ChatEarlyExit: {', '.join(unknown)}; known are {known}")
        if stop is not None:
            given["stop"] = stop
        given = {name: _read(name, value) for name, value in given.items()}
        if "stop" in given:
            given["stop"] = as_stop(given["stop"])
        if "exit_policy" in given:
            given["exit_policy"] = as_policy(given["exit_policy"])
        # A policy and a confidence: as with a budget and a name for one, below.
        if "exit_policy" in given and given.get("confidence") is None:
            given |= {"exit_policy": given["exit_policy"] or Never(), "confidence": None}
        elif given.get("confidence") is not None or (calibrated and given.get("reasoning_effort") is not None):
            given = {"exit_policy": None, "confidence": None} | given
        # A budget and a name for one: the nearer to the call counts. Both in the same call are refused as a pair.
        if "thinking_budget" in given and "reasoning_effort" not in given:
            given["reasoning_effort"] = None
        if "reasoning_effort" in given and "thinking_budget" not in given:
            given["thinking_budget"] = None
        return replace(self, **given)


NAMES = tuple(f.name for f in fields(Settings))

_OF_OTHER_CHECKS = ("exit_policy", "answer_form")


@cache
def _readers() -> Mapping[str, TypeAdapter[Any]]:
    """By setting. Made at the first call that gives one: they take longer than this module."""
    kinds = {**get_type_hints(Settings), "stop": str | Sequence[str] | None}
    return {name: TypeAdapter(kind) for name, kind in kinds.items() if name not in _OF_OTHER_CHECKS}


def _read(name: str, value: Any) -> Any:
    """A setting of a call, read as the constructor reads it: numbers may come as text, as in a web form's JSON."""
    if name in _OF_OTHER_CHECKS:
        return value
    try:
        return _readers()[name].validate_python(value)
    except ValidationError as error:
        said = dict.fromkeys(told["msg"] for told in error.errors())
        raise ValueError(f"{name}={value!r} cannot be meant: {'; '.join(said)}") from None


def only_one(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse two names for one setting."""
    both = [name for name in names if name in given]
    if len(both) > 1:
        raise ValueError(f"{' and '.join(both)} are names for the same setting; give one")


def as_stop(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; one string is one of them, not its letters."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def as_policy(value: Any) -> Policy | None:
    """A policy, or the one of that name."""
    if value is None:
        return None
    if isinstance(value, str):
        return policy_from_name(value)
    if isinstance(value, type) or not isinstance(value, Policy):
        raise ValueError(
            f"exit_policy must be a policy such as DEER(threshold=0.95), or the name of one; got {value!r}"
        )
    return value


def effort_confidence(settings: Settings) -> float | None:
    """The confidence that an effort asks for, where there is a calibration; None where another word was said."""
    if settings.confidence is not None or settings.exit_policy is not None or settings.reasoning_effort is None:
        return None
    return EFFORT_CONFIDENCES.get(settings.reasoning_effort)


_warned = threading.Event()


def warn_uncalibrated(policy: Policy | None) -> None:
    """Say once per process that a threshold was one model's in its paper, where a policy with such a one is used."""
    if policy is not None and not _warned.is_set() and any(isinstance(leaf, CoDEStop) for leaf in leaves_of(policy)):
        _warned.set()
        warnings.warn(
            "CoDEStop's tau is used uncalibrated: in its paper it ranges from 0.9 to 90 over models and tasks "
            "(arXiv 2604.04930, Table 7), and no value carries over",
            stacklevel=2,
        )


def _check(s: Settings) -> None:
    if s.confidence is not None and not 0 < s.confidence < 1:
        raise ValueError(f"confidence is 1 - epsilon, in (0, 1); got {s.confidence}")
    if s.confidence is not None and s.exit_policy is not None:
        raise ValueError(
            f"exit_policy={s.exit_policy!r} and confidence={s.confidence} both tell when to leave; give one"
        )
    if not 0 <= s.audit_rate <= 1:
        raise ValueError(f"audit_rate is a share of calls, in [0, 1]; got {s.audit_rate}")
    if s.thinking_budget is not None and s.thinking_budget < -1:
        raise ValueError(f"thinking_budget must be -1 (no cap), 0 (no thinking) or a cap, not {s.thinking_budget}")
    if s.reasoning_effort is not None:
        if s.reasoning_effort not in EFFORT_BUDGETS:
            raise ValueError(f"unknown reasoning_effort {s.reasoning_effort!r}; known are {', '.join(EFFORT_BUDGETS)}")
        if s.thinking_budget is not None:
            raise ValueError(
                f"reasoning_effort={s.reasoning_effort!r} and thinking_budget={s.thinking_budget} both cap the "
                "thinking; give one"
            )
    if s.look not in _LOOKS:
        raise ValueError(f"look must be one of {', '.join(_LOOKS)}; got {s.look!r}")
    if s.max_tokens is not None and s.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {s.max_tokens}")
    if s.answer_reserve is not None and s.answer_reserve < 1:
        raise ValueError(f"answer_reserve must be at least 1, not {s.answer_reserve}: an answer is never empty")
    if s.answer_reserve is not None and s.max_tokens is not None and s.answer_reserve > s.max_tokens:
        raise ValueError(f"answer_reserve={s.answer_reserve} is more than max_tokens={s.max_tokens}")
    if not isinstance(s.answer_form, AnswerForm) and s.answer_form not in ("auto", *FORMS):
        raise ValueError(f"unknown answer_form {s.answer_form!r}; known are auto, {', '.join(FORMS)}")
    if any(not mark for mark in s.stop):
        raise ValueError("a stop string must not be empty")
    s.sampling({})
