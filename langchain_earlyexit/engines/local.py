"""Local weights through `transformers`: loading, and the choice between the packed and the separate path."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from langchain_earlyexit.engines.identity import identity
from langchain_earlyexit.engines.matrices import stand_ins
from langchain_earlyexit.engines.model import Model, Row
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.pages import PAGE
from langchain_earlyexit.engines.scheduler import ScheduledEngine
from langchain_earlyexit.engines.separate import SeparateModel
from langchain_earlyexit.engines.threads import FEW, Threads, apart, timed

_log = logging.getLogger(__name__)

_PROBE_LENGTH = 12
_PROBE_WINDOW = 6
_UNKNOWN_MEMORY = 8 << 30
"""Where the system does not tell."""

_TOLERANCE = 1e-3
"""Largest difference of log-probabilities in float32, root mean square. A wrong path is off by whole units."""

_HALF_TOLERANCE = 0.06
"""In half precision, that difference as a share of the log-probabilities' own spread. Tiny models of nine families are
off by 0.01 to 0.02 on the right path, and by about half or more where a window or sinks are ignored. What the plain
path is off by with a cache bounds it no better: it is 0 where both run the same operations."""


@dataclass(frozen=True)
class LocalSettings:
    """What decides which weights are in memory: equal settings share one engine within a process.

    `model` is a hub id, a directory in the Hugging Face layout, or a directory with one `.gguf` file; the rest is
    passed to `from_pretrained` under the same names, up to `token`.

    Attributes:
        cache_bytes: most bytes that keys and values of all requests may take; None for half of the memory. What does
            not fit waits in line.
        max_running: requests that share a pass.
        reuse_prompts: keep the keys and values of prompts, in a quarter of that memory, for requests that begin alike.
    """

    model: str
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization_config: Any = field(default=None, compare=False)
    token: str | None = field(default=None, compare=False, repr=False)
    cache_bytes: int | None = None
    max_running: int = 64
    reuse_prompts: bool = True
    quantization: str = field(default="", init=False)

    def __post_init__(self) -> None:
        # Quantization configs compare by identity; what they say is what makes settings equal.
        object.__setattr__(self, "quantization", repr(self.quantization_config))
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise ValueError(f"cache_bytes must be at least 1, not {self.cache_bytes}")
        if self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, not {self.max_running}")


def load(settings: LocalSettings) -> ScheduledEngine:
    """Load weights and tokenizer, and build the engine that fits them.

    Raises:
        FileNotFoundError: when a local directory holds no weights, or more than one GGUF file.
        ValueError: when neither a directory nor a hub model of this name can be loaded.
    """
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def load_there() -> tuple[ScheduledEngine, PackedModel | SeparateModel, int]:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # each thread has a current one
        return _load(settings)

    # What computes on the way would keep threads for the rest of the caller's life: see `threads`.
    engine, core, limit = apart(load_there)
    if isinstance(core, PackedModel):
        core.threads = _threads_for(core)
        core.bound(limit, reuse=settings.reuse_prompts)  # last: what is timed may take more than it allows
    else:
        core.bound(limit)
    return engine


def _load(settings: LocalSettings) -> tuple[ScheduledEngine, PackedModel | SeparateModel, int]:
    """The engine, its model, and the bytes that keys and values may take: it is not bounded yet."""
    from transformers import AutoTokenizer

    where, gguf = _locate(settings.model)
    options: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "token": settings.token,
    }
    if gguf is not None:
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            raise ImportError(f"{gguf} needs {' and '.join(missing)}: pip install 'langchain-earlyexit[gguf]'")
        options["gguf_file"] = gguf
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = _load_model(where, settings, options)
    except (ConnectionError, TimeoutError):
        raise  # for the caller to try again
    except OSError as error:
        raise ValueError(
            f"cannot load {settings.model!r}: {error}. Give a Hugging Face model id (with network or a filled cache), "
            "a directory with config.json, weights and tokenizer, a directory with one .gguf file, or 'pocket'"
        ) from error
    model.eval()
    config = model.config.get_text_config()
    generation = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    core, path = _choose(model)
    weights = identity(model)  # before they are packed
    _lay_out(core, model)
    limit = settings.cache_bytes or _share_of_memory(model.device)
    engine = ScheduledEngine(
        core,
        tokenizer,
        name=f"transformers/{path}",
        context_length=getattr(config, "max_position_embeddings", None),
        family_hints=(settings.model, str(config.model_type), *(model.config.architectures or ())),
        generation_defaults=generation,
        identity=weights,
        max_running=settings.max_running,
    )
    return engine, core, limit


def _threads_for(core: PackedModel) -> Threads | None:
    """What its passes do best with, one row's and many rows'."""
    if core.device.type != "cpu":
        return None
    rows = [Row(core.new(), [1]) for _ in range(2 * FEW)]

    def run(some: Sequence[Row]) -> None:
        core.forward(some)
        for row in some:
            core.rewind(row.cache, 0)

    return timed(lambda: run(rows[:1]), lambda: run(rows))


@torch.inference_mode()
def _lay_out(core: PackedModel | SeparateModel, model: Any) -> None:
    """Pack the weights, and undo it where that changes what the model says by more than rounding."""
    if model.device.type != "cpu":
        return
    size = int(model.config.get_text_config().vocab_size)

    def said() -> Work:
        one, two = core.new(), core.new()
        found: Work = []
        # Several rows and one, tokens onto nothing and onto a cache, numbers of tokens that are rounded up.
        for work in ([(one, 1), (two, 10)], [(one, 1)], [(two, 2), (one, 1)], [(two, 1)]):
            rows = [Row(cache, tuple((7 * i) % size for i in range(1, 1 + n))) for cache, n in work]
            logits = core.forward(rows)
            found += [(tuple(row.ids), x - np.logaddexp.reduce(x)) for row, x in zip(rows, logits, strict=True)]
        return found

    before = [row for _, row in said()]
    lean = core.matrices if isinstance(core, PackedModel) else None
    matrices = stand_ins(model, model.get_input_embeddings().weight, said) if lean is None else lean
    try:
        for matrix in matrices:
            matrix.pack(model.get_input_embeddings().weight)
        off = _gap(model, said(), before)
        if off <= _tolerance(model, before):
            return
        reason, failure = f"log-probabilities change by {off:.2g}", None
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights serve as they were
        reason, failure = "they cannot be laid out anew", error
    for matrix in matrices:
        matrix.unpack()
    _log.warning("the weights of %s stay as they were: %s", type(model).__name__, reason, exc_info=failure)


def _tolerance(model: Any, expected: Sequence[NDArray[np.float32]]) -> float:
    """How far log-probabilities may be off: root mean square."""
    if model.dtype == torch.float32:
        return _TOLERANCE
    return max(_TOLERANCE, _HALF_TOLERANCE * float(np.mean([row.std() for row in expected])))


def _load_model(where: str, settings: LocalSettings, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    dtype: Any = settings.dtype or ("float32" if "gguf_file" in options else "auto")
    extra: dict[str, Any] = {"dtype": dtype, "device_map": settings.device_map}
    if settings.quantization_config is not None:
        extra["quantization_config"] = settings.quantization_config
    if "gguf_file" not in options:
        extra["use_safetensors"] = True  # never a pickle
    model = AutoModelForCausalLM.from_pretrained(where, **options, **extra)
    if settings.device_map is None:
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(device)
    return model


def _locate(model: str) -> tuple[str, str | None]:
    """Where to load from, and the name of the GGUF file if that is what the directory holds."""
    path = Path(os.path.expanduser(model))
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")):
            raise FileNotFoundError(f"no such model directory: {model!r}")
        return model, None
    if (path / "config.json").exists():
        if not any(path.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{model!r} has a config.json but no .safetensors weights; convert them (save_pretrained writes them), "
                "pickled weights are not loaded"
            )
        return str(path), None
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return str(path), found[0].name
    raise FileNotFoundError(
        f"{model!r} holds {len(found)} .gguf files and no config.json; one model directory has either config.json with "
        ".safetensors weights, or exactly one .gguf file"
    )


def _share_of_memory(device: torch.device) -> int:
    """Half of what there is, of the machine or its control group, and not more than is free now that weights are there.

    On an accelerator half of what is free.
    """
    if device.type == "cuda":
        # What loading has freed is held by PyTorch, in pieces of sizes that may never be asked for again.
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    found = [_UNKNOWN_MEMORY]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        found.append(int(text))
    share = min(found) // 2
    told = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", told.read_text(), re.MULTILINE) if told.is_file() else None
    return share if available is None else min(share, 1024 * int(available[1]))


# --- which path ---------------------------------------------------------------------------------------------------


def _choose(model: Any) -> tuple[PackedModel | SeparateModel, str]:
    """The packed path if this model proves to compute the same on it, else the separate one.

    The judge is the plain model without a cache.
    """
    reason = _unpackable(model)
    one_by_one = False
    before = model.config._attn_implementation
    with _short_window(model):
        try:
            work = _rehearse(SeparateModel(model), model)
            expected = _alone(model, work)
            rounding = _gap(model, work, expected)
        except Exception as error:  # noqa: BLE001 - whatever it is, the plain path is what is left
            _log.warning("the plain path failed on %s", type(model).__name__, exc_info=True)
            reason = reason or f"there is nothing to compare with ({type(error).__name__}: {error})"
        else:
            if model.dtype == torch.float32 and not rounding <= _TOLERANCE:
                one_by_one = True
                reason = reason or f"its cache is off by {rounding:.2g} when it goes on by several tokens"
            tolerance = _tolerance(model, expected)
            if model.dtype != torch.float32:
                # A state that starts anew shows in the few rows that go on by several tokens, and a median hides them.
                # (A token that is sent to another expert looks the same, and is only fed more slowly for it.)
                one_by_one = not max(_gaps(work, expected)) <= tolerance
                tolerance = max(tolerance, 3 * rounding)
            for lean in (True, False) if reason is None else ():
                try:
                    packed = PackedModel(model, lean=lean)
                    if lean > packed.lean:
                        continue
                    reason = _fault(packed, model, expected, tolerance)
                except Exception as error:  # noqa: BLE001 - whatever it is, another path is left
                    _log.warning("packed attention failed on %s", type(model).__name__, exc_info=True)
                    reason = f"packed attention failed on it ({type(error).__name__}: {error})"
                if reason is None:
                    return packed, "packed"
                if lean:
                    _log.info("%s runs without its lean form: %s", type(model).__name__, reason)
    if model.config._attn_implementation != before:
        model.set_attn_implementation(before)
    _log.info("%s runs one branch at a time: %s", type(model).__name__, reason)
    return SeparateModel(model, one_by_one=one_by_one), "separate"


def _fault(packed: PackedModel, model: Any, expected: Sequence[NDArray[np.float32]], tolerance: float) -> str | None:
    """What is wrong with the packed path for this model, or None."""
    gap = _gap(model, _rehearse(packed, model), expected)
    if packed.calls != packed.layers * packed.passes:
        return f"{packed.calls} of {packed.layers * packed.passes} attentions were packed"
    return None if gap <= tolerance else f"packed and plain log-probabilities differ by {gap:.2g}"


@contextlib.contextmanager
def _short_window(model: Any) -> Iterator[None]:
    """Sliding windows of a few tokens: else no rehearsal would ever reach their edge."""
    config = model.config.get_text_config()
    holders = [h for h in (config, *model.modules()) if _whole(getattr(h, "sliding_window", None))]
    saved = [(holder, holder.sliding_window) for holder in holders]
    try:
        for holder in holders:
            holder.sliding_window = _PROBE_WINDOW
        yield
    finally:
        for holder, window in saved:
            holder.sliding_window = window


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unpackable(model: Any) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of the kinds {sorted(kinds)}"
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    if any(part.get("rope_type") in {"dynamic", "longrope"} for part in scaled):
        return "its rotary embedding depends on the length of the whole pass"
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced"
    return None


Work = list[tuple[tuple[int, ...], NDArray[np.float32]]]
"""All ids of a branch, and the log-probabilities after them."""


def _rehearse(core: Model, model: Any) -> Work:
    """What a branch meets: prefill, a pass shared with another, going on by several tokens, a fork, a rewind."""
    size = int(model.config.get_text_config().vocab_size)
    done: Work = []

    def step(*work: tuple[Any, list[int], Sequence[int]]) -> None:
        work = tuple((cache, ids, [i % size for i in new]) for cache, ids, new in work)
        logits = core.forward([Row(cache, new) for cache, _, new in work])
        for (_, ids, new), row in zip(work, logits, strict=True):
            ids.extend(new)
            done.append((tuple(ids), row - np.logaddexp.reduce(row)))

    one, two = core.new(), core.new()
    first, second = list[int](), list[int]()
    prompt = [(7 * i) % 89 + 3 for i in range(_PROBE_LENGTH)]
    step((one, first, prompt))
    step((one, first, [11]), (two, second, prompt[:0:-1]))
    fork, third = core.fork(one, _PROBE_LENGTH), first[:_PROBE_LENGTH]
    step((fork, third, [17, 23, 5]), (one, first, [29]), (two, second, [31]))
    # More rows than are attended one by one.
    step((fork, third, [5]), (one, first, [3]), (two, second, [2]))
    core.rewind(one, _PROBE_LENGTH - 2)
    del first[_PROBE_LENGTH - 2 :]
    step((one, first, [37, 41]), (fork, third, [43]))
    # One row alone that reads more than one page.
    step((one, first, prompt * (PAGE // _PROBE_LENGTH)))
    step((one, first, [47]))
    # A few tokens onto what is there: a state that starts anew has not yet forgotten that it did.
    step((one, first, [53, 7, 61]))
    return done


def _alone(model: Any, work: Work) -> list[NDArray[np.float32]]:
    """The same by the plain model without a cache."""
    plain = SeparateModel(model)
    rows = [plain.forward([Row(plain.new(), ids)])[0] for ids, _ in work]
    return [row - np.logaddexp.reduce(row) for row in rows]


def _gap(model: Any, work: Work, expected: Sequence[NDArray[np.float32]]) -> float:
    """Largest over the rows of their root mean square difference: one odd token of 150,000 says little.

    In half precision their median: rounding sends a token to another expert here and there.
    """
    gaps = _gaps(work, expected)
    return max(gaps) if model.dtype == torch.float32 else float(np.median(gaps))


def _gaps(work: Work, expected: Sequence[NDArray[np.float32]]) -> list[float]:
    return [
        float(np.sqrt(np.mean(np.square(a - b, dtype=np.float64)))) for (_, a), b in zip(work, expected, strict=True)
    ]
