"""What the pocket reasoner is taught, in which proportions: arithmetic, tool calls, plans, and problems beyond it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from langchain_earlyexit.pocket.plans import draw_plan_text
from langchain_earlyexit.pocket.problems import DOUBT_SHARES, MIX
from langchain_earlyexit.pocket.tool_turns import draw_tool_text
from langchain_earlyexit.pocket.traces import (
    DOUBT_MAX_CHECKS,
    MAX_CHECKS,
    MODES,
    WARMUP_MAX_CHECKS,
    WARMUP_MODES,
    WARMUP_SHARES,
    Guesser,
    Modes,
    Text,
    draw_text,
    synthetic_guesser,
)

ARITHMETIC_SHARES: Mapping[str, float] = MappingProxyType({**MIX.shares, "small": 0.06})
"""The card's mix of families, and operands below 11."""


@dataclass(frozen=True)
class Abilities:
    """Shares, by count of texts, of what is taught."""

    arithmetic: float = 0.68
    tools: float = 0.19
    plans: float = 0.08
    doubt: float = 0.05


ABILITIES = Abilities()
WARMUP_ABILITIES = Abilities(arithmetic=0.80, tools=0.15, plans=0.05, doubt=0.0)
DOUBT_MODES = Modes(full=0.45, cut=0.40, guess=0.05, direct=0.10, off_domain=0.0)

early_guesser = synthetic_guesser(right=0.6, shares=WARMUP_SHARES)
"""Guesses while the model cannot make its own."""
_doubtful = synthetic_guesser(right=0.05, shares=DOUBT_SHARES)


def draw_lesson(rng: random.Random, guesser: Guesser, early: bool) -> Text:
    """One random training text of the early or of the main part of the run.

    Args:
        rng: decides all.
        guesser: draws arithmetic problems with a guess for each.
        early: small arithmetic, short chains, nothing beyond the model.
    """
    shares = vars(WARMUP_ABILITIES if early else ABILITIES)
    ability = rng.choices(list(shares), list(shares.values()))[0]
    if ability == "tools":
        return draw_tool_text(rng)
    if ability == "plans":
        return draw_plan_text(rng)
    if ability == "doubt":
        return draw_text(rng, _doubtful, DOUBT_MODES, DOUBT_SHARES, DOUBT_MAX_CHECKS)
    if early:
        return draw_text(rng, guesser, WARMUP_MODES, WARMUP_SHARES, WARMUP_MAX_CHECKS)
    return draw_text(rng, guesser, MODES, ARITHMETIC_SHARES, MAX_CHECKS)
