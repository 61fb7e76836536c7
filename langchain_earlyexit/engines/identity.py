"""Which weights are in memory: a short digest of their values, whatever file or revision they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 256
"""Numbers read of each parameter, evenly spaced: training on, merging an adapter or quantising changes them."""


def identity(model: Any) -> dict[str, str]:
    """`weights`: 16 hexadecimal digits that stand for the values, names and shapes of all parameters; `dtype`.

    Equal weights have equal digests whatever dtype they were loaded in, as long as it holds them exactly.
    """
    state = hashlib.sha256()
    with torch.inference_mode():
        saved = model.state_dict(keep_vars=True)
        # Quantised weights may be buffers; those that are not saved hang on the configuration alone.
        values = [*model.named_parameters(), *((name, one) for name, one in model.named_buffers() if name in saved)]
        for name, parameter in sorted(values, key=lambda named: named[0]):
            offloaded = parameter.device.type == "meta"  # to disk: its values are not here to be read
            _add(state, name, tuple(parameter.shape), None if offloaded else parameter)
    return {"weights": state.hexdigest()[:16], "dtype": str(model.dtype).removeprefix("torch.")}


def checkpoint_weights(folder: Path) -> str | None:
    """`weights` of a model as it would be loaded from the safetensors files in `folder`; None where there are none."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    state = hashlib.sha256()
    for name, file in sorted(found.items()):
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
            _add(state, name, tuple(tensor.shape), tensor)
    return state.hexdigest()[:16] if found else None


def _add(state: Any, name: str, shape: tuple[int, ...], values: Tensor | None) -> None:
    state.update(f"{name} {shape} ".encode())
    if values is not None:
        flat = values.detach().reshape(-1)
        state.update(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu().numpy().tobytes())
