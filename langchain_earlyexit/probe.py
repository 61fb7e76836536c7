"""The hidden-state head of LYNX (arXiv 2512.05325): from the states at a cue to the chance that leaving is safe.

A small perceptron over the standardised states of a few layers, applied with numpy in one small matrix product per
layer. It is saved as safetensors and JSON, never as a pickle, together with the fingerprint of what it was trained
on, and is refused on anything else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.fingerprint import digest, refuse_mismatch

POSITIONS: Final = ("cue", "before")
"""The token whose states are read: the cue's last, or the last one that is kept when the thinking ends there."""

FILES: Final = ("probe.safetensors", "probe.json")
"""Names of what `Probe.save` writes into a directory."""

_WEIGHTS, _ABOUT = FILES
_FORMAT: Final = 1

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A trained head.

    Args:
        layers: depths of the decoder layers it reads, as shares of their number, in (0, 1]: 0.5 of 32 layers is the
            output of the 16th block, 1.0 that of the last, before the final norm.
        position: one of `POSITIONS`.
        mean: of each feature over the training checks, shape [features]; features = layers x width, layer by layer.
        scale: what each feature is divided by after that, shape [features], above 0.
        weights: one matrix [in, out] per layer of the perceptron; the last has one column.
        biases: one vector [out] per layer.
        binds: the fingerprint it is only good for, see `fingerprint.refuse_mismatch`.
        about: where it comes from and how well it did, as JSON data; not compared with anything.

    Raises:
        ValueError: shapes that do not fit together, an unknown position, depths out of range, numbers not finite.
    """

    layers: tuple[float, ...]
    position: str
    mean: Floats
    scale: Floats
    weights: tuple[Floats, ...]
    biases: tuple[Floats, ...]
    binds: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    _first: tuple[Floats, Floats] = field(init=False)

    def __post_init__(self) -> None:
        if not self.layers or not all(0 < depth <= 1 for depth in self.layers):
            raise ValueError(f"layers must be depths in (0, 1], at least one; got {self.layers!r}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}; got {self.position!r}")
        for name in ("mean", "scale"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        for name in ("weights", "biases"):
            object.__setattr__(self, name, tuple(np.asarray(part, dtype=np.float32) for part in getattr(self, name)))
        self._check_shapes()
        # The standardisation is one more linear map: folded into the first, a check costs one product less.
        first = self.weights[0] / self.scale[:, None]
        object.__setattr__(self, "_first", (first, self.biases[0] - self.mean @ first))

    def _check_shapes(self) -> None:
        if self.mean.shape != self.scale.shape or self.mean.ndim != 1 or self.mean.size % len(self.layers):
            raise ValueError(
                f"mean {self.mean.shape} and scale {self.scale.shape} must be [features], a multiple of the "
                f"{len(self.layers)} layers"
            )
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(f"{len(self.weights)} weights, but {len(self.biases)} biases")
        width = self.mean.size
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if weight.ndim != 2 or weight.shape[0] != width or bias.shape != weight.shape[1:]:
                raise ValueError(f"a layer of weight {weight.shape} and bias {bias.shape} does not take {width} inputs")
            width = weight.shape[1]
        if width != 1:
            raise ValueError(f"the last layer must have one output, it has {width}")
        parts = (self.mean, self.scale, *self.weights, *self.biases)
        if not all(np.isfinite(part).all() for part in parts) or not (self.scale > 0).all():
            raise ValueError("a probe's numbers must be finite, and its scale above 0")

    @property
    def width(self) -> int:
        """Width of the hidden states it was trained on."""
        return int(self.mean.size) // len(self.layers)

    def p_safe(self, states: Floats) -> float:
        """Probability that leaving here gives the answer of full thinking.

        Args:
            states: hidden states at the position, shape [layers, width].

        Returns:
            In [0, 1]; NaN where the states are not finite.

        Raises:
            ValueError: another shape.
        """
        if states.shape != (len(self.layers), self.width):
            raise ValueError(
                f"the probe reads {len(self.layers)} layers of width {self.width}, got states of shape {states.shape}"
            )
        weight, bias = self._first
        x = states.reshape(-1) @ weight + bias
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = np.maximum(x, 0.0) @ weight + bias
        logit = float(x[0])
        if math.isnan(logit):
            return math.nan
        # Both halves without overflow.
        return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))

    def reads(self, position: int, end: int) -> int:
        """Thinking tokens through the one whose states it reads, at a cue that begins and ends after so many."""
        return end if self.position == "cue" else position

    def refuse_mismatch(self, actual: Mapping[str, str]) -> None:
        """Refuse to be used with anything else than what it was trained on.

        Raises:
            ValueError: naming what differs, both sides of it.
        """
        named = self.about.get("model")
        refuse_mismatch("this probe" + (f" (trained on {named})" if named else ""), self.binds, actual)

    @property
    def learned(self) -> list[str]:
        """Marks of the questions it was made by, see `mark`; none where it does not tell."""
        return list(self.about.get("learned", ()))

    @property
    def digest(self) -> str:
        """Stands for all its numbers: equal digests, equal probes."""
        parts = (self.mean, self.scale, *self.weights, *self.biases)
        head = json.dumps([list(self.layers), self.position, [part.shape for part in parts]]).encode()
        return digest(head + b"".join(np.ascontiguousarray(part).tobytes() for part in parts))

    def __repr__(self) -> str:
        layers = ", ".join(f"{depth:.3g}" for depth in self.layers)
        return f"Probe(layers=({layers}), position={self.position!r}, width={self.width}, digest={self.digest!r})"

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `probe.safetensors` and `probe.json` into `folder` (made if need be); the folder."""
        from safetensors.numpy import save_file

        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "scale": self.scale}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tensors |= {f"weight.{i}": weight, f"bias.{i}": bias}
        about = {
            "format": _FORMAT,
            "layers": list(self.layers),
            "position": self.position,
            "digest": self.digest,
            "binds": dict(self.binds),
            "about": dict(self.about),
        }
        save_file({name: np.ascontiguousarray(part) for name, part in tensors.items()}, where / _WEIGHTS)
        (where / _ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return where

    @classmethod
    def load(cls, where: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Self:
        """Read a probe from a directory or from the Hugging Face hub.

        Args:
            where: a directory that holds `probe.safetensors` and `probe.json`, or a hub id such as "you/your-probe".
            revision: branch, tag or commit, for the hub.
            token: for private repositories.

        Raises:
            FileNotFoundError: no such directory, or one without the two files.
            ValueError: files of another format, or two that do not belong together; a hub id that cannot be read.
        """
        from safetensors.numpy import load_file

        folder = _folder(os.fspath(where), revision, token)
        missing = [name for name in (_WEIGHTS, _ABOUT) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{os.fspath(where)!r} holds no probe: {' and '.join(missing)} missing")
        data = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if data.get("format") != _FORMAT:
            raise ValueError(
                f"the probe in {os.fspath(where)!r} has format {data.get('format')!r}, this version reads {_FORMAT}; "
                "train it again, or use the version of this package that wrote it"
            )
        tensors = load_file(folder / _WEIGHTS)
        depth = sum(name.startswith("weight.") for name in tensors)
        try:
            probe = cls(
                layers=tuple(data["layers"]),
                position=data["position"],
                mean=tensors["mean"],
                scale=tensors["scale"],
                weights=tuple(tensors[f"weight.{i}"] for i in range(depth)),
                biases=tuple(tensors[f"bias.{i}"] for i in range(depth)),
                binds=data["binds"],
                about=data["about"],
            )
        except KeyError as error:
            raise ValueError(f"the probe in {os.fspath(where)!r} lacks {error}") from error
        if probe.digest != data.get("digest"):
            raise ValueError(f"{_WEIGHTS} and {_ABOUT} in {os.fspath(where)!r} are not of the same probe")
        return probe

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload it as a model repository, which is made if need be; the address of the commit.

        Args:
            repo_id: "you/your-probe".
            private: of a new repository.
            token: with the right to write.
            revision: branch to commit to.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Early-exit probe"
            )
        return str(done)


def mark(question: str) -> str:
    """Stands for the text of a question, in a probe that has learned from it."""
    return digest([question])[:12]


def _folder(where: str, revision: str | None, token: str | None) -> Path:
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or where.startswith((".", "~")) or where.count("/") != 1:
        raise FileNotFoundError(f"no such directory with a probe: {where!r}; give one, or a hub id such as 'you/probe'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, revision=revision, token=token, allow_patterns=[_WEIGHTS, _ABOUT]))
    except OSError as error:
        raise ValueError(
            f"cannot load a probe from {where!r}: {error}. Give a directory with {_WEIGHTS} and {_ABOUT}, or a hub id "
            "(with network or a filled cache)"
        ) from error
