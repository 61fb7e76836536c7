"""What a policy is, what the loop asks of one, and the two that read no signal: `Never` and `FirstOf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, runtime_checkable

from langchain_earlyexit.trace import Decision, Trace

GO_ON: Final = Decision(exit=False, reason="natural")


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


@runtime_checkable
class Staged(Protocol):
    """A policy that needs some of its signals only where others, which cost nothing, leave the question open."""

    def asks(self, signals: Mapping[str, float]) -> frozenset[str]:
        """Of its `needs`, those to be measured at a check where `signals` have been. Its decision rests on no other."""


def needs_at(policy: Policy, kind: str, signals: Mapping[str, float] | None = None) -> frozenset[str]:
    """Signals that `policy` reads at a check of `kind`; empty where it does not look.

    Args:
        policy: any policy.
        kind: of the check.
        signals: what has been measured there, for policies that ask for the rest by it; None for all that may be read.
    """
    leaves = [leaf for leaf in leaves_of(policy) if kind in leaf.looks]
    wanted = (leaf.asks(signals) if signals is not None and isinstance(leaf, Staged) else leaf.needs for leaf in leaves)
    return frozenset().union(*wanted)


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
    return frozenset().union(*((leaf.looks & primary) or (leaf.looks & offered) for leaf in leaves_of(policy)))


def leaves_of(policy: Policy) -> list[Policy]:
    """The policies that it is made of, however deep; itself where it is one."""
    if isinstance(policy, FirstOf):
        return [leaf for member in policy.policies for leaf in leaves_of(member)]
    return [policy]


@dataclass(frozen=True)
class Never:
    """Think to the end."""

    needs: ClassVar[frozenset[str]] = frozenset()
    looks: ClassVar[frozenset[str]] = frozenset()

    def decide(self, trace: Trace) -> Decision:
        """Go on."""
        return GO_ON


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
        going_on = GO_ON
        for member in self.policies:
            if trace.checks and trace.checks[-1].kind in member.looks:
                decision = member.decide(trace)
                if decision.exit:
                    return decision
                if going_on.score is None:
                    going_on = decision
        return going_on
