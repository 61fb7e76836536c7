"""Who is fed in the next pass, and with how much: first come first served, within a bound on tokens and on memory.

A program that does not fit now waits. The memory it waits for is taken from programs whose readers are behind, then
from those that came later; what these had in their caches is fed again when their turn comes. So the first in line
always goes on, and one that cannot go on alone never will: it gets an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from langchain_earlyexit.engines.model import KEPT, Model, Row
from langchain_earlyexit.engines.runs import Branch, Run, drop

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
    hungry: list[tuple[Run, Branch]] = []
    for run in ready:
        try:
            hungry += [(run, branch) for branch in run.hungry(model)]
        except Exception as error:  # noqa: BLE001 - a cache that cannot be cut takes down its own program only
            run.end(error)
    portions = _portions([branch for _, branch in hungry])
    fed: list[Fed] = []
    promised = 0
    for run, branch in hungry:
        if run.channel.done or not portions[id(branch)]:  # its other branch could not go on, or others read first
            continue
        starts = not branch.cached
        if starts:
            whole = model.need(branch.cache, len(branch.ids))
            if whole > model.limit:
                run.end(_too_large(model, whole))
                continue
            branch.cached = model.adopt(branch.cache, branch.ids[: _adoptable(branch)])
            if _waits_for_kin(model, run, branch):
                drop(model, branch, 0)  # what it adopted, too: it starts when the other has read
                continue
        missing = len(branch.ids) - branch.cached
        tokens = min(missing, portions[id(branch)])
        need = model.need(branch.cache, tokens)
        # Whoever starts beside others must have room to go on as well: it would be the first to lose it again.
        wanted = model.need(branch.cache, missing + MIXED) if starts and fed else need
        if wanted > model.left() - promised and not _make_room(model, wanted + promised, run, ready, live):
            if fed:
                if starts:
                    drop(model, branch, 0)  # what it adopted or shares may be what the others were promised
                continue
            # Nobody before it can go on, and nobody else holds any memory: it has all there is.
            run.end(_too_large(model, need + model.limit - model.left()))
            return []
        promised += need
        ids = branch.ids[branch.cached : branch.cached + tokens]
        fed.append(Fed(run, branch, Row(branch.cache, ids, branch.layers)))
    return [one for one in fed if not one.run.channel.done]


def _adoptable(branch: Branch) -> int:
    """How much of a branch may come from elsewhere: one token must be fed, and states that may be read be computed."""
    return len(branch.ids) - (KEPT if branch.layers else 1)


def _portions(hungry: Sequence[Branch]) -> dict[int, int]:
    """How many tokens each branch is fed, by its `id`.

    After a prompt come single tokens and forced phrases: these are never held back. Of the room for prompts, half is
    the first one's, so that it is never passed over; then the shortest go first, which wait the least for it.
    """
    missing = {id(branch): len(branch.ids) - branch.cached for branch in hungry}
    reading = [branch for branch in hungry if not branch.cached or missing[id(branch)] > MIXED or branch.prompt]
    if not reading:
        return missing
    room = ALONE if len(reading) == len(hungry) else MIXED
    first, *others = map(id, reading)
    told = dict.fromkeys(map(id, reading), 0)
    told[first] = min(missing[first], room // 2)
    room -= told[first]
    for one in (*sorted(others, key=missing.__getitem__), first):
        more = min(missing[one] - told[one], room)
        told[one] += more
        room -= more
    return missing | told


def _waits_for_kin(model: Model, run: Run, branch: Branch) -> bool:
    """Let a branch that starts share what another of its program holds of the same beginning, as it did when it forked.

    A program that had to give its memory back would take more of it than before, were each of its branches read alone.

    Returns:
        Whether another is about to read that beginning: the branch starts when it has.
    """
    ahead = True
    for other in run.branches.values():
        if other is branch:
            ahead = False
            continue
        shared = min(_adoptable(branch), _alike(branch.ids, other.ids))
        if shared <= branch.cached:
            continue
        if other.cached >= shared:
            branch.cache, branch.cached = model.fork(other.cache, shared), shared
        elif ahead and any(op.branch in run.branches and run.branches[op.branch] is other for _, op in run.waiting):
            return True
    return False


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _make_room(model: Model, wanted: int, run: Run, ready: Sequence[Run], live: Sequence[Run]) -> bool:
    """Take memory from programs that are paused or must end, then from those after `run`, the latest first."""
    among = {id(one) for one in ready}
    idle = [other for other in live if id(other) not in among]
    later = ready[next(i for i, one in enumerate(ready) if one is run) + 1 :]
    return any(other.evict(model) and wanted <= model.left() for other in (*reversed(idle), *reversed(later)))


def _too_large(model: Model, need: int) -> MemoryError:
    return MemoryError(
        f"this request needs {need:,} bytes of keys and values, and the engine's limit is {model.limit:,}; shorten the "
        "prompt, set max_tokens or thinking_budget, or load the model with a higher cache_bytes"
    )
