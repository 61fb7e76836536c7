"""Which weights are in memory: a short digest of their values, whatever file or revision they came from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

_SAMPLE = 256
"""Numbers read of each parameter, evenly spaced: training on, merging an adapter or quantising changes them."""


def identity(model: Any) -> dict[str, str]:
    """`weights`: 16 hexadecimal digits that stand for the values, names and shapes of all parameters; `dtype`.

    Equal weights have equal digests whatever dtype they were loaded in, as long as it holds them exactly.
    """
    state = hashlib.sha256()
    with torch.inference_mode():
        for name, parameter in sorted(model.named_parameters()):
            state.update(f"{name} {tuple(parameter.shape)} ".encode())
            if parameter.device.type == "meta":  # offloaded to disk: its values are not here to be read
                continue
            flat = parameter.detach().reshape(-1)
            state.update(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu().numpy().tobytes())
    return {"weights": state.hexdigest()[:16], "dtype": str(model.dtype).removeprefix("torch.")}
