"""What early exit did over many calls: totals per model, gathered from the exit records as calls end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tracers.context import register_configure_hook

from langchain_earlyexit.record import COUNTS, KEY, from_cache, sum_of_counts


@dataclass
class ExitTotals:
    """Sums over the calls of one model; `reasons` counts how their thinking ended.

    `cached` counts answers that came out of a LangChain cache. They computed nothing, and are in no other number.
    """

    calls: int = 0
    cached: int = 0
    exited: int = 0
    checks: int = 0
    thinking_tokens: int = 0
    forced_tokens: int = 0
    answer_tokens: int = 0
    trial_tokens: int = 0
    speculated_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def output_tokens(self) -> int:
        """All that was computed beyond the prompts."""
        return sum_of_counts(self)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one exit record."""
        self.calls += 1
        self.exited += bool(record["exited"])
        self.reasons[record["reason"]] += 1
        for name in ("checks", *COUNTS):
            setattr(self, name, getattr(self, name) + record[name])


class ExitCallbackHandler(BaseCallbackHandler):
    """Adds up exit records, per model name. Safe under threads and async.

    It reads finished messages (`on_llm_end`), which every way of calling a model reports. Messages of other models,
    without an exit record, are passed over; so are calls that were broken off or failed, which have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._totals: dict[str, ExitTotals] = {}

    @property
    def totals(self) -> dict[str, ExitTotals]:
        """The sums so far, by model name: a copy, which later calls do not change."""
        with self._lock:
            return {name: replace(found, reasons=found.reasons.copy()) for name, found in self._totals.items()}

    def __repr__(self) -> str:
        return repr(self.totals)

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        """Take in the records of one call."""
        for generations in response.generations:
            for generation in generations:
                if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
                    self._take(generation.message)

    def _take(self, message: AIMessage) -> None:
        record = message.response_metadata.get(KEY)
        if record is None:
            return
        with self._lock:
            totals = self._totals.setdefault(message.response_metadata["model_name"], ExitTotals())
            if from_cache(message):
                totals.cached += 1
            else:
                totals.add(record)


# Core takes one handler from each variable that it was told of. So blocks inside each other have one each: the first
# depth, the second, and so on. Every registration stays for good and is walked at every call, so all blocks share them.
_depths: list[ContextVar[ExitCallbackHandler | None]] = []
_registering = threading.Lock()


def _free() -> ContextVar[ExitCallbackHandler | None]:
    """The variable of the depth below the blocks that are open here."""
    with _registering:
        for depth in _depths:
            if depth.get() is None:
                return depth
        depth = ContextVar(f"earlyexit_callback_{len(_depths)}", default=None)
        register_configure_hook(depth, inheritable=True)
        _depths.append(depth)
        return depth


@contextmanager
def get_exit_callback() -> Iterator[ExitCallbackHandler]:
    """Gather the exits of every call made inside the block; a block around it gathers them too.

    Example:
        >>> from langchain_earlyexit import ChatEarlyExit, get_exit_callback
        >>> with get_exit_callback() as exits:
        ...     ChatEarlyExit().invoke("What is 12 * 7?")  # doctest: +SKIP
        >>> exits.totals  # doctest: +SKIP
    """
    handler, depth = ExitCallbackHandler(), _free()
    token = depth.set(handler)
    try:
        yield handler
    finally:
        depth.reset(token)
