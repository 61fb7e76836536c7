"""When to stop thinking: frozen dataclasses that read a `Trace` and return a `Decision`.

A policy is pure: the same trace gives the same decision, live or replayed, so every threshold can be tried on
recorded traces with no model. To write your own, give a frozen dataclass the three members of `Policy`.

Two rules hold for every policy here. It looks only at checks whose kind is in its `looks`, counting no other. And
it never exits at a check where a float it needs is missing or not finite (no trial was possible, say).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from langchain_earlyexit.policies.looking import DECISION_POINTS
from langchain_earlyexit.policies.policy import FirstOf, Never, Policy, leaves_of, needs_at, replay, wanted_kinds
from langchain_earlyexit.policies.staged import ProbeThenTrial
from langchain_earlyexit.policies.states import EAT, LYNX, ThinkBrake
from langchain_earlyexit.policies.trials import DEER, AnswerConvergence, CoDEStop, GiveUp

__all__ = [
    "DECISION_POINTS",
    "DEER",
    "EAT",
    "LYNX",
    "AnswerConvergence",
    "CoDEStop",
    "FirstOf",
    "GiveUp",
    "Never",
    "Policy",
    "ProbeThenTrial",
    "ThinkBrake",
    "leaves_of",
    "needs_at",
    "policy_from_name",
    "replay",
    "wanted_kinds",
]

_BY_NAME: Final[Mapping[str, Callable[[], Policy]]] = {
    "never": Never,
    "deer": DEER,
    "codestop": CoDEStop,
    "lynx": LYNX,
    "convergence": AnswerConvergence,
    "eat": EAT,
    "thinkbrake": ThinkBrake,
    "giveup": GiveUp,
    "probethentrial": ProbeThenTrial,
}


def policy_from_name(name: str) -> Policy:
    """The policy called `name`, with its default fields. Raises ValueError naming the known ones."""
    if name not in _BY_NAME:
        raise ValueError(f"unknown exit policy {name!r}; known are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]()
