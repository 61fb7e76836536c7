"""Local weights through `transformers`: loading, and the choice between the packed and the separate path."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.scheduler import Model, Row, ScheduledEngine
from langchain_earlyexit.engines.separate import SeparateModel

_log = logging.getLogger(__name__)

_PROBE_LENGTH = 12
_TOLERANCE = 2e-3
"""Largest difference of log-probabilities in float32 between packed and plain. A wrong path is off by whole units."""


@dataclass(frozen=True)
class LocalSettings:
    """What decides which weights are in memory: equal settings share one engine within a process.

    `model` is a hub id, a directory in the Hugging Face layout, or a directory with one `.gguf` file; the rest is
    passed to `from_pretrained` under the same names.
    """

    model: str
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization_config: Any = field(default=None, compare=False)
    token: str | None = field(default=None, compare=False, repr=False)
    quantization: str = field(default="", init=False)

    def __post_init__(self) -> None:
        # Quantization configs compare by identity; what they say is what makes settings equal.
        object.__setattr__(self, "quantization", repr(self.quantization_config))


def load(settings: LocalSettings) -> ScheduledEngine:
    """Load weights and tokenizer, and build the engine that fits them.

    Raises:
        FileNotFoundError: when a local directory holds no weights, or more than one GGUF file.
        ValueError: when neither a directory nor a hub model of this name can be loaded.
    """
    from transformers import AutoTokenizer

    where, gguf = _locate(settings.model)
    options: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "token": settings.token,
    }
    if gguf is not None:
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
    return ScheduledEngine(
        core,
        tokenizer,
        name=f"transformers/{path}",
        context_length=getattr(config, "max_position_embeddings", None),
        family_hints=(settings.model, str(config.model_type), *(model.config.architectures or ())),
        generation_defaults=generation,
    )


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


# --- which path ---------------------------------------------------------------------------------------------------


def _choose(model: Any) -> tuple[Model, str]:
    """The packed path if this model proves to compute the same on it, else the separate one."""
    reason = _unpackable(model)
    if reason is None:
        plain = SeparateModel(model)
        expected = _rehearse(plain)
        before = model.config._attn_implementation
        try:
            packed = PackedModel(model)
            found = _rehearse(packed)
            gap = max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))
            # Half precision rounds differently row by row; there the likeliest tokens have to agree instead.
            tolerance = _TOLERANCE if model.dtype == torch.float32 else 0.35
            if packed.calls != packed.layers:
                reason = f"{packed.calls} of {packed.layers} layers went through packed attention"
            elif not gap <= tolerance:
                reason = f"packed and plain log-probabilities differ by {gap:.2g}"
            else:
                return packed, "packed"
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = f"packed attention failed on it ({type(error).__name__}: {error})"
        model.set_attn_implementation(before)
    _log.info("%s runs one branch at a time: %s", type(model).__name__, reason)
    return SeparateModel(model), "separate"


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


def _rehearse(core: Model) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Log-probabilities over prefill, a mixed pass, and a fork, on ids every vocabulary has."""

    def step(*work: tuple[Any, Sequence[int]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        logits = core.forward([Row(cache, ids) for cache, ids in work])
        return [row - np.logaddexp.reduce(row) for row in logits]

    one, two = core.new(), core.new()
    first = [(7 * i) % 89 + 3 for i in range(_PROBE_LENGTH)]
    out = step((one, first))
    out += step((one, [11]), (two, first[::-1]))
    fork = core.fork(one, _PROBE_LENGTH)
    out += step((fork, [17, 23]), (one, [29]), (two, [31]))
    return out
