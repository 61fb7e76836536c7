"""One copy of equal weights per process, loaded when first needed, freed when the last that holds them lets go.

Who holds is known by weak references. So whoever is gone without a word holds nothing; what nobody holds waits for the
next that wants it, for a program may make a model anew for every request. It goes before other weights are loaded, and
when anybody lets go of anything.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tenacity

from langchain_earlyexit.engines.program import Engine


@dataclass(slots=True)
class _Entry:
    """One engine. Its own lock lets others load meanwhile, and lets equal requests wait for one load."""

    lock: threading.Lock
    engine: Engine | None = None
    holders: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_entries: dict[Any, _Entry] = {}
_guard = threading.Lock()


def acquire(
    *, holder: object, model: str, max_retries: int, token: str | None, quantization_config: Any, **settings: Any
) -> Engine:
    """The engine for these settings: see `local.LocalSettings` for them, and `release` for giving it back.

    Args:
        holder: who holds it, for as long as it is alive and does not give it back.
        model: a hub id, a directory, or a directory with one GGUF file.
        max_retries: tries after the first, when the network fails while the hub is read.
        token: Hugging Face token; not part of what makes settings equal.
        quantization_config: passed on to `from_pretrained`.
        **settings: the other fields of `LocalSettings`.
    """
    # Only here does torch come in: importing the package, and building a chat model, stay quick.
    from langchain_earlyexit.engines.local import LocalSettings, load

    wanted = LocalSettings(model, quantization_config=quantization_config, token=token, **settings)
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(1 + max_retries),
        wait=tenacity.wait_exponential_jitter(initial=1, max=20),
        retry=tenacity.retry_if_exception_type((ConnectionError, TimeoutError)),
        reraise=True,
    )
    return _share(holder, wanted, lambda: retrying(load, wanted))


def connect(
    *,
    holder: object,
    base_url: tuple[str, ...],
    model: str,
    api_key: str | None,
    max_retries: int,
    revision: str | None,
    trust_remote_code: bool,
    max_running: int = 64,
) -> Engine:
    """The remote engine for these settings, shared and given back as `acquire`'s: see `vllm.VLLMEngine` for them.

    Raises:
        ImportError: httpx is missing.
    """
    try:
        from langchain_earlyexit.engines.vllm import VLLMEngine
        from langchain_earlyexit.engines.wire import Patience
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise ImportError("engine='vllm' needs httpx: pip install 'langchain-earlyexit[vllm]'") from error

    wanted = (base_url, model, api_key, max_retries, revision, trust_remote_code, max_running)

    def build() -> Engine:
        return VLLMEngine(
            base_url,
            model,
            api_key=api_key,
            patience=Patience(retries=max_retries),
            revision=revision,
            trust_remote_code=trust_remote_code,
            max_running=max_running,
        )

    return _share(holder, wanted, build)


def _share(holder: object, wanted: Any, build: Callable[[], Engine]) -> Engine:
    with _guard:
        entry = _entries.setdefault(wanted, _Entry(threading.Lock()))
        entry.holders.add(holder)
    try:
        with entry.lock:
            if entry.engine is None:
                _close_unheld()  # first: there may not be memory for both
                entry.engine = build()
            return entry.engine
    except BaseException:
        release(holder)
        raise


def release(holder: object) -> None:
    """Give back what `holder` holds, if anything. What nobody holds now is closed."""
    with _guard:
        for entry in _entries.values():
            entry.holders.discard(holder)
    _close_unheld()


def _close_unheld() -> None:
    with _guard:
        unheld = [(wanted, entry.engine) for wanted, entry in _entries.items() if not entry.holders]
        for wanted, _ in unheld:
            del _entries[wanted]
    for _, engine in unheld:
        if engine is not None:
            engine.close()
