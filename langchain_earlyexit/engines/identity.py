"""Which weights are in memory: a short digest of their values, whatever file or revision they came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 256
"""Numbers read of each parameter, evenly spaced: training on, merging an adapter or quantising changes them."""


def identity(model: Any) -> dict[str, str]:
    """`weights`: 16 hexadecimal digits that stand for the values, names and shapes of all parameters; `dtype`.

    Equal weights have equal digests whatever dtype they were loaded in, as long as it holds them exactly. Positions
    that are scaled (YaRN, say) make another model of them.
    """
    state = hashlib.sha256(_scaling(model.config))
    with torch.inference_mode():
        saved = model.state_dict(keep_vars=True)
        # Quantised weights may be buffers; those that are not saved hang on the configuration alone.
        values = [*model.named_parameters(), *((name, one) for name, one in model.named_buffers() if name in saved)]
        for name, parameter in sorted(values, key=lambda named: named[0]):
            offloaded = parameter.device.type == "meta"  # to disk: its values are not here to be read
            _add(state, name, tuple(parameter.shape), None if offloaded else parameter)
    return {"weights": state.hexdigest()[:16], "dtype": str(model.dtype).removeprefix("torch.")}


def checkpoint_weights(folder: Path, config: Any) -> str | None:
    """`weights` of a model as it would be loaded from the safetensors files in `folder`; None where there are none.

    Args:
        folder: of the checkpoint.
        config: as `transformers` has read it there.
    """
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if not found:
        return None
    state = hashlib.sha256(_scaling(config))
    for name, file in sorted(found.items()):
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
            _add(state, name, tuple(tensor.shape), tensor)
    return state.hexdigest()[:16]


def _scaling(config: Any) -> bytes:
    """How positions are scaled; nothing where they are not."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [one for one in (rope, *rope.values()) if isinstance(one, dict)]  # one for all layers, or by kind of layer
    scaled = any(one.get("rope_type", "default") != "default" for one in kinds)
    return json.dumps(_without_old_names(rope), sort_keys=True).encode() if scaled else b""


def _without_old_names(rope: dict[str, Any]) -> dict[str, Any]:
    """Whoever reads an old configuration may leave `type` beside the `rope_type` made of it."""
    kept = {name: value for name, value in rope.items() if name != "type"}
    return {name: _without_old_names(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _add(state: Any, name: str, shape: tuple[int, ...], values: Tensor | None) -> None:
    state.update(f"{name} {shape} ".encode())
    if values is not None:
        flat = values.detach().reshape(-1)
        state.update(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu().numpy().tobytes())
