"""One running program: its branches as lists of ids, the ops that edit them, and what it waits for.

Feeding is lazy: `Open`, `Feed`, `Fork` and `Rewind` only edit lists, and a branch meets the model when somebody
samples from it or reads its hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from langchain_earlyexit.engines.model import Model
from langchain_earlyexit.engines.program import Close, Feed, Fork, Hidden, Inbox, Op, Open, Program, Rewind, Sample
from langchain_earlyexit.engines.streams import Channel
from langchain_earlyexit.sampling import stream_key


@dataclass(slots=True, eq=False)
class Branch:
    """One sequence. The first `cached` of its `ids` are in `cache`.

    Attributes:
        seed: of its request.
        key: of its own randomness.
        layers: relative depths whose hidden states may be asked for.
        prompt: tokens it was opened with, while these are worth remembering for others; else 0.
    """

    seed: int
    key: int
    layers: tuple[float, ...]
    ids: list[int]
    cache: Any
    cached: int = 0
    prompt: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """A program, its channel to the reader, and what it holds.

    Attributes:
        waiting: ops of the current step that need the model, with their places in `results`.
    """

    program: Program
    channel: Channel
    branches: dict[int, Branch] = field(default_factory=dict)
    waiting: list[tuple[int, Sample | Hidden]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    _started: bool = False

    def go_on(self, model: Model) -> None:
        """Let the program run until it waits for the model, its reader is behind, or it is over."""
        channel = self.channel
        while not self.waiting and not channel.full and not channel.stopped:
            try:
                if self._started:
                    step = self.program.send(Inbox(tuple(self.results), channel.answer_now))
                else:
                    self._started = True
                    step = next(self.program)
            except StopIteration:
                self.end(None)
                return
            if step.events:
                channel.put(step.events)
            self.results = [None] * len(step.ops)
            for slot, op in enumerate(step.ops):
                if isinstance(op, Sample | Hidden):
                    self.waiting.append((slot, op))
                else:
                    self._edit(model, op)
            sampled = [op.branch for _, op in self.waiting if isinstance(op, Sample)]
            if len(set(sampled)) < len(sampled):
                raise ValueError(
                    f"a step draws more than one token of a branch: {sampled}; a token needs the one before it"
                )
            closed = {op.branch for _, op in self.waiting} - self.branches.keys()
            if closed:
                raise KeyError(f"a step reads branch {min(closed)}, which is not open at its end")
            self.read_hidden(model)

    def _edit(self, model: Model, op: Op) -> None:
        """Ops that need no pass of the model."""
        branches = self.branches
        if isinstance(op, Open):
            if not op.ids:
                raise ValueError("a branch must be opened with at least one token")
            key = stream_key(op.seed, op.branch)
            branches[op.branch] = Branch(op.seed, key, op.layers, list(op.ids), model.new(), prompt=len(op.ids))
        elif isinstance(op, Feed):
            branches[op.branch].ids.extend(op.ids)
        elif isinstance(op, Fork):
            parent = branches[op.parent]
            if not 0 < op.length <= len(parent.ids):
                raise ValueError(f"cannot fork {op.length} tokens of a branch that has {len(parent.ids)}")
            cached = min(parent.cached, op.length)
            key = parent.key if op.twin else stream_key(parent.seed, op.child)
            cache = model.fork(parent.cache, cached)
            branches[op.child] = Branch(parent.seed, key, parent.layers, parent.ids[: op.length], cache, cached)
        elif isinstance(op, Rewind):
            branch = branches[op.branch]
            if not 0 < op.length <= len(branch.ids):
                raise ValueError(f"cannot rewind to {op.length} tokens a branch that has {len(branch.ids)}")
            del branch.ids[op.length :]
            branch.prompt = min(branch.prompt, op.length)
            drop(model, branch, op.length)
        elif isinstance(op, Close):
            branches.pop(op.branch)

    def read_hidden(self, model: Model) -> None:
        """Read the hidden states that are there by now."""
        if all(isinstance(op, Sample) for _, op in self.waiting):
            return
        still: list[tuple[int, Sample | Hidden]] = []
        for slot, op in self.waiting:
            branch = self.branches[op.branch]
            if isinstance(op, Hidden):
                if not 0 <= op.position < len(branch.ids):
                    raise ValueError(f"no token {op.position} on a branch that has {len(branch.ids)}")
                if branch.cached > op.position:
                    self.results[slot] = model.hidden(branch.cache, op.position)
                    continue
            still.append((slot, op))
        self.waiting = still

    def hungry(self, model: Model) -> Iterator[Branch]:
        """The branches that must be fed before the program can go on."""
        wanted = {op.branch for _, op in self.waiting}
        # In the order in which they came to be: the first never waits for what another of them is about to read.
        for number, branch in self.branches.items():
            if number in wanted:
                if branch.cached == len(branch.ids):  # rewound onto tokens already fed: the last must be fed again
                    drop(model, branch, len(branch.ids) - 1)
                yield branch

    def evict(self, model: Model) -> bool:
        """Give back the memory of all branches; they are fed again when their turn comes. False if there was none."""
        held = [branch for branch in self.branches.values() if branch.cached]
        for branch in held:
            drop(model, branch, 0)
        return bool(held)

    def end(self, error: BaseException | None) -> None:
        """The program is over: nothing of it is held any more, and its reader is told."""
        self.branches.clear()
        self.waiting = []
        try:
            with contextlib.suppress(Exception):  # what fails while it is being closed has nobody left to tell
                self.program.close()
        finally:
            self.channel.finish(error)


def drop(model: Model, branch: Branch, length: int) -> None:
    """Keep at most the first `length` tokens in the cache."""
    if branch.cached > length:
        model.rewind(branch.cache, length)
        branch.cached = length
