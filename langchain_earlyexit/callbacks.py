"""What early exit did over many calls: totals per model, gathered from the exit records as calls end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tracers.context import register_configure_hook

from langchain_earlyexit.record import KEY


@dataclass
class ExitTotals:
    """Sums over the calls of one model; `reasons` counts how their thinking ended."""

    calls: int = 0
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
        return (
            self.thinking_tokens + self.forced_tokens + self.answer_tokens + self.trial_tokens + self.speculated_tokens
        )

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one exit record."""
        self.calls += 1
        self.exited += bool(record["exited"])
        self.reasons[record["reason"]] += 1
        for name in (
            "checks",
            "thinking_tokens",
            "forced_tokens",
            "answer_tokens",
            "trial_tokens",
            "speculated_tokens",
        ):
            setattr(self, name, getattr(self, name) + record[name])


class ExitCallbackHandler(BaseCallbackHandler):
    """Adds up exit records, per model name, in `totals`. Safe under threads and async.

    It reads finished messages (`on_llm_end`), which every way of calling a model reports. Messages of other models,
    without an exit record, are passed over.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.totals: dict[str, ExitTotals] = {}

    def __repr__(self) -> str:
        return repr(self.totals)

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        """Take in the records of one call."""
        for generations in response.generations:
            for generation in generations:
                if not isinstance(generation, ChatGeneration):
                    continue
                metadata = generation.message.response_metadata
                record = metadata.get(KEY)
                if record is not None:
                    with self._lock:
                        self.totals.setdefault(metadata["model_name"], ExitTotals()).add(record)


_current: ContextVar[ExitCallbackHandler | None] = ContextVar("earlyexit_callback", default=None)
# Once per process: every registration stays for good and is walked at every call.
register_configure_hook(_current, inheritable=True)


@contextmanager
def get_exit_callback() -> Iterator[ExitCallbackHandler]:
    """Gather the exits of every call made inside the block.

    Example:
        >>> from langchain_earlyexit import ChatEarlyExit, get_exit_callback
        >>> with get_exit_callback() as exits:
        ...     ChatEarlyExit().invoke("What is 12 * 7?")  # doctest: +SKIP
        >>> exits.totals  # doctest: +SKIP
    """
    handler = ExitCallbackHandler()
    token = _current.set(handler)
    try:
        yield handler
    finally:
        _current.reset(token)
