"""The control loop of one request: think, look, decide, close, answer. A generator without I/O, threads or clock.

The loop follows one token: sampled on the trunk, it is read by the finder of the end of thinking and by the cue
matcher; from the start of a possible cue on, it is held back until that is decided. At a cue, the signals that the
policy needs are measured, each on a branch of its own, and the policy decides on the trace so far. What has been
streamed is never unsaid; looking never changes what the trunk thinks.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import count

from langchain_earlyexit.answering import Answering, Ending
from langchain_earlyexit.codec import Pieces
from langchain_earlyexit.cues import CueMatcher, Hit
from langchain_earlyexit.engines.program import TRUNK, Checked, Close, Closed, Done, Inbox, Program, Step, Thought
from langchain_earlyexit.policies import needs_at
from langchain_earlyexit.request import Request
from langchain_earlyexit.sampling import Token
from langchain_earlyexit.signals import Trial, end_entropy, end_margin, p_safe, told, trial_answer
from langchain_earlyexit.strain import TagFinder, TagFound, Trimmer
from langchain_earlyexit.trace import POLICY_REASONS, Check, Trace
from langchain_earlyexit.trunk import Trunk


@dataclass(frozen=True, slots=True)
class Looked:
    """One look: what was measured and what that cost, and what leaving there would start from.

    Attributes:
        check: what the policy sees.
        hit: the cue.
        read: thinking tokens read when the cue was complete.
        kept: thinking tokens that stay when thinking ends here.
        trial: the trial answer, if one was measured.
        cost: tokens of all branches that the measuring took.
    """

    check: Check
    hit: Hit
    read: int
    kept: int
    trial: Trial | None
    cost: int


def program(request: Request) -> Program:
    """The control loop as a program for an engine."""
    return Run(request).run()


class Run:
    """The state of one running request. `run()` is its program; whoever wraps that may read the rest between steps.

    Attributes:
        request: what runs.
        trunk: the branch that thinks and answers, and what it is told.
        looked: the looks so far.
        would_exit: the first of them at which the policy decided to leave, be it in shadow.
        tokens: every thinking token read.
        thoughts: the text of each, in order; `told` of them have been streamed.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.trunk = Trunk(request)
        self.looked: list[Looked] = []
        self.would_exit: int | None = None
        self.tokens: list[Token] = []
        self.thoughts: list[str] = []
        self.told = 0
        self._matcher = CueMatcher(request.cues, request.kinds)
        self._finder = TagFinder(request.codec, request.end)
        self._pieces = Pieces(request.codec)
        self._trimmer = Trimmer()
        self._branches = count(TRUNK + 1)

    def run(self) -> Program:
        """Think, then answer, then tell what it took."""
        request, trunk = self.request, self.trunk
        trunk.open()
        ending = (yield from self.think()) if request.thinking else Ending("no_thinking", open=False)
        exited = ending.reason in POLICY_REASONS or ending.reason in {"budget", "answer_now"}
        thinking = len(self.thoughts)
        trunk.events.append(Closed(exited, ending.reason, ending.score, thinking))
        answering = Answering(trunk, ending)
        yield from answering.run()
        costs = [looked.cost for looked in self.looked]
        if answering.reused is not None:
            costs[-1] -= answering.reused.tokens
        trace = Trace(
            tuple(looked.check for looked in self.looked),
            reason=ending.reason,
            thinking_tokens=thinking,
            answer_tokens=answering.answered,
            forced_tokens=answering.forced,
            trial_tokens=tuple(costs),
            read_tokens=tuple(looked.read for looked in self.looked),
            seed=request.seed,
        )
        trunk.events.append(
            Done(
                trace=trace,
                exited=exited,
                reason=ending.reason,
                score=ending.score,
                prompt_tokens=trunk.start,
                thinking_tokens=thinking,
                forced_tokens=answering.forced,
                answer_tokens=answering.answered,
                trial_tokens=sum(costs),
                speculated_tokens=trunk.speculated,
                finish_reason=answering.finish,
                seed=request.seed,
                would_exit=self.would_exit,
            )
        )
        yield from trunk.step(Close(TRUNK))

    # --- thinking ---------------------------------------------------------------------------------------------------

    def think(self) -> Generator[Step, Inbox, Ending]:
        """Read the trunk token by token, until it ends its thinking or that is ended for it."""
        request, codec = self.request, self.request.codec
        while True:
            kept = len(self.thoughts)
            if self.trunk.answer_now:
                return self.cut("answer_now", kept)
            if request.cap is not None and kept >= request.cap:
                return self.cut("budget" if kept == request.budget else "length", kept)
            token = yield from self.trunk.read()
            self.tokens.append(token)
            if token.id in codec.eos:
                # The model ended its turn inside its thinking. The end of turn is dropped, and it is asked to answer.
                return self.cut("natural", kept)
            piece = self._pieces.push(token.id)
            self.thoughts.append("" if token.id in codec.special else piece)
            end = self._finder.push(token.id, piece)
            if end is not None:
                return self.natural(end)
            hit = self._matcher.push(token.id, piece)
            if hit is not None:
                ending = yield from self.look(hit)
                if ending is not None:
                    return ending
            self.tell(len(self.thoughts) - max(self._matcher.held, self._finder.held))

    def natural(self, found: TagFound) -> Ending:
        """The model closed its thinking itself: the tag's tokens are thinking tokens without text."""
        self.thoughts[len(self.thoughts) - found.tokens :] = [found.lead] + [""] * (found.tokens - 1)
        self.trunk.back_to(self.trunk.start + len(self.thoughts))  # a tag of several tokens may end beside a trial
        self.tell(len(self.thoughts))
        return Ending("natural", open=False, rest=found.rest)

    def cut(self, reason: str, position: int, score: float | None = None, trial: Trial | None = None) -> Ending:
        """End the thinking after its first `position` tokens."""
        position = self.keeps(position)
        self.trunk.back_to(self.trunk.start + position)
        del self.thoughts[position:]
        self.tell(position)
        return Ending(reason, open=True, score=score, trial=trial)

    def keeps(self, position: int) -> int:
        """Tokens kept by a cut at `position`: never one in the middle of an end tag."""
        return min(position, len(self.thoughts) - self._finder.held)

    def tell(self, upto: int) -> None:
        """Stream the first `upto` thoughts: they are final."""
        if upto > self.told:
            text = self._trimmer.push("".join(self.thoughts[self.told : upto]))
            self.told = upto
            if text:
                self.trunk.events.append(Thought(text))

    # --- looking ----------------------------------------------------------------------------------------------------

    def look(self, hit: Hit) -> Generator[Step, Inbox, Ending | None]:
        """Measure, and let the policy decide."""
        looked = yield from self.measure(hit)
        self.looked.append(looked)
        decision = self.request.policy.decide(Trace(tuple(looked.check for looked in self.looked)))
        leaves = decision.exit and not self.request.shadow
        self.trunk.events.append(Checked(looked.check, decision, leaves))
        if decision.exit and self.would_exit is None:
            self.would_exit = len(self.looked) - 1
        return self.cut(decision.reason, hit.position, decision.score, looked.trial) if leaves else None

    def measure(self, hit: Hit) -> Generator[Step, Inbox, Looked]:
        """Each signal that the policy reads at a check of this kind."""
        request, trunk = self.request, self.trunk
        needs = needs_at(request.policy, hit.kind)
        place = trunk.start + hit.position
        signals: dict[str, float] = {}
        trial: Trial | None = None
        cost = 0
        for signal in sorted(needs & request.reported):
            signals[signal] = yield from trunk.measure(told(trunk.start + len(self.thoughts) - 1, signal))
        needs -= request.reported
        if "end_margin" in needs and request.aside and request.end_id is not None:
            asking = end_margin(next(self._branches), place, request.end_id, trunk.beside)
            signals["end_margin"] = yield from trunk.measure(asking)
            cost += 1
        elif "end_margin" in needs:  # of the token that comes next: the cue's own first one has been read
            read = hit.position < len(self.tokens)
            token = self.tokens[hit.position] if read else (yield from trunk.peek())
            signals["end_margin"] = token.best - token.watched[0]
        if "p_safe" in needs and request.probe is not None:
            signals["p_safe"] = yield from trunk.measure(p_safe(request.probe, trunk.start, hit))
        # What costs tokens comes last: a policy may not want it, by what was measured for nothing.
        needs &= needs_at(request.policy, hit.kind, signals)
        if "end_entropy" in needs:
            closing = request.bare_closing
            asking = end_entropy(next(self._branches), place, closing, trunk.beside)
            signals["end_entropy"] = yield from trunk.measure(asking)
            cost += len(closing) + 1
        if "trial_confidence" in needs:
            closing = request.closing
            trial = yield from trunk.measure(
                trial_answer(
                    next(self._branches),
                    place,
                    closing,
                    request.form,
                    request.codec,
                    request.ends,
                    trunk.beside,
                    None if request.limit is None else request.limit - hit.position - len(closing),
                    request.bounds,
                )
            )
            signals["trial_confidence"] = trial.answer.confidence
            cost += trial.tokens
        check = Check(hit.position, hit.cue, signals, hit.kind, None if trial is None else trial.answer.answer)
        return Looked(check, hit, len(self.thoughts), self.keeps(hit.position), trial, cost)
