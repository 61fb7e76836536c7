"""The state of a training run between two sittings: a safetensors file, with the counts in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save(path: Path, model: Any, optimizers: Sequence[torch.optim.Optimizer], counts: Mapping[str, float]) -> None:
    """Write it, in place of an older one only when it is whole.

    Args:
        path: of the file.
        model: whose parameters are trained.
        optimizers: that have each seen a step, or none.
        counts: how far the run has come.
    """
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{place}/{name}": value for name, value in state.items()}
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, {"counts": json.dumps(dict(counts))})
    part.replace(path)


def load(path: Path, model: Any, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
    """Put it back into a model and optimizers built as those that were saved; return the counts."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        counts: dict[str, float] = json.loads(file.metadata()["counts"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer" and rest.startswith(f"{number}/"):
                _, place, name = rest.split("/")
                state.setdefault(int(place), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return counts
