"""Who is fed in the next pass, and with how much: first come first served, within a bound on tokens and on memory.

A program that does not fit now waits. The memory it waits for is taken from programs whose readers are behind, then
from those that came later; what these had in their caches is fed again when their turn comes. So the first in line
always goes on, and one that cannot go on alone never will: it gets an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from langchain_earlyexit.engines.model import KEPT, Model, Row
from langchain_earlyexit.engines.runs import Branch, Run

ALONE = 512
"""Prompt tokens per pass when nobody decodes: enough to keep the processor busy."""

MIXED = 128
"""Prompt tokens per pass beside decoding rows: a long prompt must not stall these for its whole length."""


@dataclass(frozen=True, slots=True)
class Fed:
    """One row of a pass, and whose it is."""

    run: Run
    branch: Branch
    row: Row


def collect(model: Model, live: Sequence[Run], most_running: int) -> list[Fed]:
    """The rows of the next pass, of at most `most_running` programs, which stand in `live` in order of arrival."""
    ready = [run for run in live if run.waiting and not run.channel.full and not run.channel.stopped][:most_running]
    hungry = [(run, branch) for run in ready for branch in run.hungry(model)]
    prompt_tokens = MIXED if any(branch.cached for _, branch in hungry) else ALONE
    fed: list[Fed] = []
    promised = 0
    for run, branch in hungry:
        if run.channel.done:  # its other branch could not go on
            continue
        starts = not branch.cached
        if starts:
            whole = model.need(branch.cache, len(branch.ids))
            if whole > model.limit:
                run.end(_too_large(model, whole))
                continue
            branch.cached = model.adopt(branch.cache, branch.ids[: _adoptable(branch)])
        missing = len(branch.ids) - branch.cached
        # After a prompt come single tokens and forced phrases: these are never held back.
        phrase = not starts and missing <= MIXED and not branch.prompt
        tokens = missing if phrase else min(missing, prompt_tokens)
        if not tokens:
            continue
        need = model.need(branch.cache, tokens)
        # Whoever starts beside others must have room to go on as well: it would be the first to lose it again.
        wanted = model.need(branch.cache, missing + MIXED) if starts and fed else need
        if wanted > model.left() - promised and not _make_room(model, wanted + promised, run, live):
            if fed:
                continue
            # Nobody before it can go on, and nobody after it holds any memory: it has all there is.
            run.end(_too_large(model, need + model.limit - model.left()))
            return []
        promised += need
        prompt_tokens -= 0 if phrase else tokens
        ids = branch.ids[branch.cached : branch.cached + tokens]
        fed.append(Fed(run, branch, Row(branch.cache, ids, branch.layers)))
    return [one for one in fed if not one.run.channel.done]


def _adoptable(branch: Branch) -> int:
    """How much of a branch may come from elsewhere: one token must be fed, and states that may be read be computed."""
    return len(branch.ids) - (KEPT if branch.layers else 1)


def _make_room(model: Model, wanted: int, run: Run, live: Sequence[Run]) -> bool:
    """Take memory from programs that are paused, then from those that came after `run`, the latest first."""
    paused = [other for other in live if other.channel.full and other is not run]
    later = [other for other in live[live.index(run) + 1 :] if not other.channel.full]
    return any(other.evict(model) and wanted <= model.left() for other in (*reversed(paused), *reversed(later)))


def _too_large(model: Model, need: int) -> MemoryError:
    return MemoryError(
        f"this request needs {need:,} bytes of keys and values, and the engine's limit is {model.limit:,}; shorten the "
        "prompt, set max_tokens or thinking_budget, or load the model with a higher cache_bytes"
    )
