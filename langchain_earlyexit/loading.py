"""What a chat model loads and when: the engine at its first call, and the probe and the calibration that go with it."""

from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from langchain_earlyexit.beside import calibration_beside, probe_beside
from langchain_earlyexit.binding import Binding
from langchain_earlyexit.engines.program import Engine
from langchain_earlyexit.engines.shared import acquire, connect, release
from langchain_earlyexit.guarantee import Calibration
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.policies import Policy
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.promises import Promises, load_calibration, refuse_unserved
from langchain_earlyexit.settings import Settings
from langchain_earlyexit.signals import require


@dataclass(frozen=True)
class Source:
    """What is to be loaded: see the fields of `ChatEarlyExit`, which have the same names and meanings.

    Raises:
        ValueError: an unknown engine, or a field that the engine would ignore.
    """

    model: str
    engine: Any
    base_url: str | list[str] | None
    api_key: SecretStr | None
    device: str | None
    device_map: str | None
    dtype: str | None
    revision: str | None
    quantization_config: Any
    cache_bytes: int | None
    reuse_prompts: bool
    max_running: int | None
    trust_remote_code: bool
    probe: Any
    calibration: Any
    max_retries: int

    def __post_init__(self) -> None:
        if self.own:
            _check_own(self)
        elif self.engine == "transformers":
            if self.base_url is not None:
                raise ValueError(
                    "base_url is the address of a remote engine, but engine is 'transformers', which is local; "
                    "give engine='vllm'"
                )
        elif self.engine == "vllm":
            _check_remote(self)
        else:
            raise ValueError(
                f"unknown engine {self.engine!r}; known are 'transformers', 'vllm', or an Engine of your own"
            )

    @property
    def own(self) -> bool:
        """Whether the engine is one of the user's own, which is there already."""
        return not isinstance(self.engine, str)

    @property
    def told(self) -> dict[str, Any]:
        """What of it changes the text that is written, for cache keys and traces."""
        told: dict[str, Any] = {"model": self.model, "engine": _which(self.engine) if self.own else self.engine}
        for name in ("dtype", "device", "device_map", "revision"):
            told[name] = getattr(self, name)
        if self.probe is not None:
            told["probe"] = str(self.probe)
        if self.calibration is not None:
            known = isinstance(self.calibration, Calibration)
            told["calibration"] = self.calibration.digest if known else str(self.calibration)
        if self.quantization_config is not None:
            told["quantization_config"] = str(self.quantization_config)
        return told

    def load_engine(self, holder: object) -> Engine:
        """The engine, shared with all that want an equal one, until `holder` releases it. One's own as it is."""
        if self.own:
            own: Engine = self.engine
            return own
        model = str(weights_dir()) if self.model == "pocket" else self.model
        given = {} if self.max_running is None else {"max_running": self.max_running}
        if self.engine == "vllm":
            return connect(
                holder=holder,
                base_url=(self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ()),
                model=model,
                api_key=None if self.api_key is None else self.api_key.get_secret_value(),
                max_retries=self.max_retries,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                **given,
            )
        return acquire(
            holder=holder,
            model=model,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            quantization_config=self.quantization_config,
            cache_bytes=self.cache_bytes,
            reuse_prompts=self.reuse_prompts,
            **given,
            token=self._token,
            max_retries=self.max_retries,
        )

    def load_probe(self) -> Probe | None:
        """The probe that was named, if any was."""
        if self.probe is None or isinstance(self.probe, Probe):
            return self.probe
        return Probe.load(self.probe, token=self._token)

    def load_calibration(self) -> Calibration | None:
        """The calibration that was named, or that lies beside the weights; None where there is none."""
        where = self.calibration_beside() if self.calibration is None else self.calibration
        return None if where is None else load_calibration(where, token=self._token)

    def probe_beside(self) -> Path | None:
        """Where a probe lies beside the weights, if none was named."""
        return probe_beside(self.model) if self.probe is None and self.engine == "transformers" else None

    def calibration_beside(self) -> Path | None:
        """Where a calibration lies beside the weights, if none was named."""
        return calibration_beside(self.model) if self.calibration is None and self.engine == "transformers" else None

    def refuse_unserved(self, settings: Settings) -> None:
        """Refuse a confidence, or audits, where there is no calibration: see `promises.refuse_unserved`."""
        if settings.confidence is not None or settings.audit_rate:  # else there is no need to look on the disk
            refuse_unserved(settings, self.calibration_beside() if self.calibration is None else self.calibration)

    def refuse_unprobed(self, policy: Policy) -> None:
        """Refuse a policy that reads a probe where there can be none: see `signals.require`."""
        if self.probe is None and not ("p_safe" in policy.needs and self.probe_beside()):
            # Of a server that is yet to be met, the probe may be there.
            served = "unknown" if self.engine == "vllm" else getattr(self.engine, "sentry", None)
            require(policy, None, served)

    @property
    def _token(self) -> str | None:
        """For the hub; a server's own key is nobody else's business."""
        return None if self.api_key is None or self.engine == "vllm" else self.api_key.get_secret_value()


SOURCE_NAMES = tuple(field.name for field in fields(Source))


class _Hold:
    """What a shared engine is held by; gone or released, it holds nothing."""

    __slots__ = ("__weakref__",)


class Loaded:
    """What was loaded from one source: nothing before the first call, and nothing after it was closed.

    Attributes:
        bound: the engine and what is known of its model.
        promises: what the calibration promises; None where none is served.
    """

    def __init__(self) -> None:
        self.bound: Binding | None = None
        self.promises: Promises | None = None
        self._calibration: Calibration | None = None
        self._hold = _Hold()
        # Held for as long as weights load: nothing that an event loop runs may ever wait for it.
        self._lock = threading.Lock()

    def bind(self, source: Source, settings: Settings | None = None) -> Binding:
        """The engine, loaded if it is not; blocking.

        With the `settings` of a call, what lies beside its weights too, where they ask for it and nothing else was
        named.

        Raises:
            ValueError: a probe or a calibration that was not made on the model as it was loaded, in another dtype say.
        """
        bound = self.bound
        if bound is None:
            with self._lock:
                bound = self.bound or self._load(source)
        return bound if settings is None else self._with_beside(bound, source, settings)

    def calibration(self, source: Source) -> Calibration | None:
        """What calls with a confidence are served by; None where nothing does. Read once, without any weights."""
        found = self._calibration
        if found is None:
            found = self._calibration = source.load_calibration()
        return found

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Forget what is loaded. The block ends its calls; then a shared engine is given back.

        What is loaded meanwhile has a hold of its own.
        """
        with self._lock:
            held, self._hold = self._hold, _Hold()
            self.bound = self._calibration = None
        yield
        release(held)

    def _load(self, source: Source) -> Binding:
        probe = source.load_probe()  # first: a wrong path is told at once
        named = None if source.calibration is None else self.calibration(source)
        promises = None if named is None else Promises(named)
        engine = source.load_engine(self._hold)
        try:
            bound = Binding.of(engine, probe)
            if promises is not None:
                promises.refuse_other_model(bound)
        except BaseException:
            release(self._hold)
            raise
        self.promises, self.bound = promises, bound  # bound last: others read it without the lock
        return bound

    def _with_beside(self, bound: Binding, source: Source, settings: Settings) -> Binding:
        policy = settings.exit_policy
        if settings.confidence is None and (policy is None or "p_safe" not in policy.needs):
            return bound
        with self._lock:
            bound = self.bound or bound  # another call may just have found what this one looks for
            calibration = None
            if settings.confidence is not None and self.promises is None:
                calibration = self.calibration(source)
            if calibration is not None:
                policy = calibration.path[-1].policy
            reads = bound.probe is None and policy is not None and "p_safe" in policy.needs
            if reads and (where := source.probe_beside()) is not None:
                bound = bound.with_probe(Probe.load(where))
                self.bound = self.bound and bound
            if calibration is not None:
                promises = Promises(calibration, efforts=False)
                promises.refuse_other_model(bound)
                self.promises = promises
        return bound


class Shelf:
    """What a chat model, and those that runs configure from it, have loaded: one `Loaded` for each source."""

    def __init__(self) -> None:
        self._all: list[tuple[Source, Loaded]] = []
        self._lock = threading.Lock()

    def of(self, source: Source) -> Loaded:
        """What is loaded from `source`; loading is up to the caller."""
        with self._lock:
            found = next((loaded for known, loaded in self._all if known == source), None)
            if found is None:
                found = Loaded()
                self._all.append((source, found))
            return found

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """`Loaded.closing` of all."""
        with self._lock:
            everything = [loaded for _, loaded in self._all]
        with contextlib.ExitStack() as stack:
            for loaded in everything:
                stack.enter_context(loaded.closing())
            yield


def _check_own(source: Source) -> None:
    kind = type(source.engine).__name__
    if not isinstance(source.engine, Engine):
        raise ValueError(f"engine must be 'transformers', 'vllm' or an Engine, not {kind}")
    names = (*_OF_WEIGHTS, "base_url", "revision", "max_running")
    _refuse(source, names, f"engine is a {kind}, which is built already; set it where that is built")
    if source.trust_remote_code:
        raise ValueError(f"trust_remote_code=True is about weights to be loaded, but engine is a {kind}; leave it out")
    _check_reuse(source, f"but engine is a {kind}; turn it off where that is built")


_OF_WEIGHTS = ("device", "device_map", "dtype", "quantization_config", "cache_bytes")


def _refuse(source: Source, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(source, name) is not None:
            raise ValueError(f"{name}={getattr(source, name)!r} is for an engine that is yet to be built, but {why}")


def _check_reuse(source: Source, instead: str) -> None:
    if not source.reuse_prompts:
        raise ValueError(f"reuse_prompts=False is a setting of engine='transformers', {instead}")


def _check_remote(source: Source) -> None:
    if not source.base_url:
        raise ValueError("engine='vllm' needs base_url, the address of a server or a list of them")
    _refuse(source, _OF_WEIGHTS, "with engine='vllm' the server has loaded the weights; leave it out")
    _check_reuse(source, "but with engine='vllm' the server decides; turn it off there (--no-enable-prefix-caching)")


_own_engines: weakref.WeakKeyDictionary[Engine, str] = weakref.WeakKeyDictionary()


def _which(engine: Engine) -> str:
    """Name of an engine of the user's own. Two of one kind may say different things: a cache must not mix them."""
    return f"{engine.name} {_own_engines.setdefault(engine, uuid.uuid4().hex[:8])}"
