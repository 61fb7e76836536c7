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


@dataclass(frozen=True)
class Abilities:
    """Shares, by count of texts, of what is taught."""

    arithmetic: float
    tools: float
    plans: float
    doubt: float


TOKENS = 60_000_000
"""Of a whole run."""
EARLY_SHARE = 0.10
"""How much of a run its first part is: small sums, short chains, nothing beyond the model."""
EARLY = Abilities(arithmetic=0.80, tools=0.15, plans=0.05, doubt=0.0)
MAIN = Abilities(arithmetic=0.55, tools=0.32, plans=0.08, doubt=0.05)
FAMILIES: Mapping[str, float] = MappingProxyType({**MIX.shares, "small": 0.06})
"""Shares of arithmetic problems in the main part."""
REFRESH_AT = (0.10, 0.2, 0.35, 0.5, 0.65, 0.8)
"""Where in a run first guesses are sampled anew from the model."""

DOUBT_MODES = Modes(full=0.45, cut=0.40, guess=0.05, direct=0.10, off_domain=0.0)

early_guesser = synthetic_guesser(right=0.6, shares=WARMUP_SHARES)
"""Guesses while the model cannot make its own."""
_doubtful = synthetic_guesser(right=0.05, shares=DOUBT_SHARES)


def draw_lesson(rng: random.Random, guesser: Guesser, early: bool) -> Text:
    """One random training text of the early or of the main part of the run.

    Args:
        rng: decides all.
        guesser: draws arithmetic problems with a guess for each.
        early: which part of the run.
    """
    shares = vars(EARLY if early else MAIN)
    ability = rng.choices(list(shares), list(shares.values()))[0]
    if ability == "tools":
        return draw_tool_text(rng)
    if ability == "plans":
        return draw_plan_text(rng)
    if ability == "doubt":
        return draw_text(rng, _doubtful, DOUBT_MODES, DOUBT_SHARES, DOUBT_MAX_CHECKS)
    if early:
        return draw_text(rng, guesser, WARMUP_MODES, WARMUP_SHARES, WARMUP_MAX_CHECKS)
    return draw_text(rng, guesser, MODES, FAMILIES, MAX_CHECKS)
