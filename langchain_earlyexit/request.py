"""One request, resolved: all that the control loop needs, and what follows from it before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from langchain_earlyexit.answers import AnswerForm
from langchain_earlyexit.codec import Codec
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.guide import Bounds
from langchain_earlyexit.policies import Policy, wanted_kinds
from langchain_earlyexit.policy_json import can_be_written
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.sampling import GREEDY, Sampling
from langchain_earlyexit.sentry import MEASURED as SENTRY_MEASURES
from langchain_earlyexit.sentry import Orders
from langchain_earlyexit.signals import require


@dataclass(frozen=True)
class Request:
    """All that one request needs, resolved: nothing in it is optional, nothing is looked up later.

    Attributes:
        prompt: token ids, up to where the model goes on.
        codec: ids to text and back.
        thinking: whether the prompt ends inside thinking.
        tags: start and end tag of thinking, or None for a model without.
        policy, cues, form: when to look, what to measure, how to close.
        message: text fed before the end tag when a budget ends the thinking.
        budget: exact cap on thinking tokens, or None. The sampled end tag is one of them.
        limit: cap on thinking + forced + answer tokens, or None; the context window is part of it.
        reserve: tokens of `limit` kept for the answer.
        sampling, seed, stop: how the trunk is sampled, and strings that end the answer (never the thinking).
        look: "parallel" (the trunk thinks on while a trial runs) or "wait".
        shadow: decide, but never exit.
        reuse: a complete trial answer becomes the final answer.
        probe: measures `p_safe`, or None; where there is a sentry with one, the same (see `Binding.with_probe`).
        bounds: what the answer must be, or None where it is free.
        aside: the engine tells no log-probabilities of watched ids with tokens drawn by `sampling`: margins are read on
            forks, at the price of a token each.
        sentry: the engine has a sentry of its own, see `sentry`, with the probe of this digest ("" for one without):
            what it can measure is asked of it. None: it has none.

    Raises:
        ValueError: a policy whose signals cannot be measured here, or a limit that leaves no room to answer.
    """

    prompt: tuple[int, ...]
    codec: Codec
    thinking: bool
    tags: tuple[str, str] | None
    policy: Policy
    cues: CueSpec
    form: AnswerForm
    message: str = ""
    budget: int | None = None
    limit: int | None = None
    reserve: int = 256
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()
    look: str = "parallel"
    shadow: bool = False
    reuse: bool = False
    probe: Probe | None = None
    bounds: Bounds | None = None
    aside: bool = False
    sentry: str | None = None

    def __post_init__(self) -> None:
        require(self.policy, self.probe, self.sentry)
        if self.sentry and self.thinking and "p_safe" in self.policy.needs and not self.orders:
            raise ValueError(
                f"{self.policy!r} needs p_safe, which the server's plugin tells as the log-probability of a control "
                "token that is never drawn, but this tokenizer has none to spare; take a policy that needs none, such "
                "as DEER"
            )
        if "end_margin" in self.policy.needs and self.thinking and self.end_id is None:
            raise ValueError(
                f"{self.policy!r} reads the probability of the end of thinking, but this model's end tag {self.end!r} "
                "is not one token; use a policy with trial answers, such as DEER"
            )
        closings = (self.closing, self.budget_closing) if self.thinking else (self.opening,)
        least = max(map(len, closings)) + 1
        if self.limit is not None and self.limit < least:
            raise ValueError(
                f"{self.limit} tokens are left for this call, but closing the thinking and one token of answer take "
                f"{least}; raise max_tokens, shorten the prompt, or set thinking_budget=0"
            )

    # --- how thinking ends, and how an answer is begun --------------------------------------------------------------

    @property
    def end(self) -> str:
        """The end tag, "" for a model without."""
        return "" if self.tags is None else self.tags[1]

    @cached_property
    def end_id(self) -> int | None:
        """The end tag's id where it is one token, else None."""
        return self.codec.single(self.end)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end the turn, or the thinking."""
        return self.codec.eos if self.end_id is None else self.codec.eos | {self.end_id}

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """Ids that end the thinking and induce an answer."""
        return self.codec.encode(self.end + self.form.inducer)

    @cached_property
    def bare_closing(self) -> tuple[int, ...]:
        """Ids that end the thinking and induce nothing."""
        return self.codec.encode(self.end + "\n\n")

    @cached_property
    def budget_closing(self) -> tuple[int, ...]:
        """As `closing`, with the message that explains the cut to the model."""
        return self.codec.encode(self.message + self.end + self.form.inducer)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids that induce an answer where thinking ended by itself: none, but where the answer is JSON or a call."""
        if self.bounds is None or not self.bounds.at_once:
            return ()
        return self.codec.encode(self.form.inducer if self.thinking else self.form.inducer.lstrip())

    # --- what the trunk is run with ---------------------------------------------------------------------------------

    @cached_property
    def cap(self) -> int | None:
        """Most thinking tokens: the budget, or what `limit` leaves beside closing and reserve if that is less."""
        caps = [] if self.budget is None else [self.budget]
        if self.limit is not None:
            forced = max(len(self.closing), len(self.budget_closing))
            caps.append(max(0, self.limit - forced - max(1, self.reserve)))
        return min(caps, default=None)

    @cached_property
    def orders(self) -> Orders | None:
        """What the engine's own sentry is told; None where there is none, or nothing to measure for it."""
        signals = sorted(self.policy.needs & set(SENTRY_MEASURES)) if self.sentry is not None and self.thinking else []
        # What carries a report home is a control token that neither thinking nor answers hold.
        tags = {self.codec.single(tag) for tag in self.tags or ()}
        carriers = sorted(self.codec.special - self.codec.eos - tags)
        if not signals or len(carriers) < len(signals):
            return None
        alone = self.policy.needs <= set(signals) and not self.shadow
        return Orders(
            cues=self.cues,
            kinds=self.kinds,
            end=self.end or None,
            eos=tuple(sorted(self.codec.eos)),
            start=len(self.prompt),
            reports=dict(zip(signals, carriers, strict=False)),
            policy=self.policy if alone and can_be_written(self.policy) else None,
            probe=self.sentry or None,
        )

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Kinds of checks to find for the policy."""
        return wanted_kinds(self.policy, self.cues.primary, self.cues.offered)

    @cached_property
    def reported(self) -> frozenset[str]:
        """Signals that the engine's sentry measures; the others are measured here."""
        return frozenset() if self.orders is None else frozenset(self.orders.reports)

    @cached_property
    def watch(self) -> tuple[int, ...]:
        """Ids whose log-probability is wanted with every thinking token: the end tag's, or none."""
        watched = "end_margin" in self.policy.needs - self.reported and not self.aside
        return (self.end_id,) if watched and self.end_id is not None else ()

    @property
    def layers(self) -> tuple[float, ...]:
        """Relative depths of the hidden states that are wanted: the probe's, or none."""
        wanted = "p_safe" in self.policy.needs - self.reported
        return self.probe.layers if wanted and self.probe is not None else ()
