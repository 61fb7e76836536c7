"""The forward pass of Llama-shaped decoders as plain tensor operations on the stock model's own weights.

Half the time of a small model's pass goes into module calls, projections that could be one, and rotary angles that
are computed again and again. Here query, key and value are one matrix, gate and up are one, and the angles a table. The
stock model keeps working, as its parameters become views of these matrices, until these are packed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from langchain_earlyexit.engines.attention import Pass
from langchain_earlyexit.engines.matrices import Matrix, is_changed

_KINDS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_FIRST_ANGLES = 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer."""

    windowed: Any  # whose `sliding_window` holds, which may be changed; None for a layer that never has one
    first_norm: Tensor
    qkv: Matrix
    qk_norm: Tensor | None  # [heads + kv heads, size]
    out: Matrix
    second_norm: Tensor
    gate_up: Matrix
    down: Matrix

    @property
    def window(self) -> int | None:
        return None if self.windowed is None else self.windowed.sliding_window


class Lean:
    """A Llama-shaped causal LM without its modules. Made by `Lean.of`."""

    def __init__(self, model: Any) -> None:
        body = model.model
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._kv = int(config.num_key_value_heads)
        self._size = int(body.layers[0].self_attn.head_dim)
        self._scale = float(body.layers[0].self_attn.scaling)
        self._eps = torch.tensor(float(config.rms_norm_eps), device=model.device)
        # Mistral has one window for all layers, in its configuration.
        everywhere = config if type(model).__name__ == "MistralForCausalLM" else None
        self._layers = [_layer(layer, everywhere) for layer in body.layers]
        self._norm = body.norm.weight
        self._head = Matrix(model.lm_head)
        self._embedding = body.embed_tokens.weight  # a view of the head by now, where the two are tied
        self._rotary = body.rotary_emb
        self._angles: Tensor = self._embedding.new_empty(0)

    @classmethod
    def of(cls, model: Any) -> Lean | None:
        """The lean form of `model`, or None where it is not plainly of this shape."""
        if type(model).__name__ not in _KINDS or not type(model).__module__.startswith("transformers.models."):
            return None
        if getattr(model.config, "hidden_act", None) != "silu":
            return None
        parameters = list(model.parameters())
        if len({(p.device, p.dtype) for p in parameters}) != 1 or parameters[0].device.type == "meta":
            return None
        for module in model.modules():
            adapted = isinstance(module, nn.Linear | nn.Embedding) and type(module) not in {nn.Linear, nn.Embedding}
            if adapted or is_changed(module):
                return None
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        for layer in model.model.layers:
            parts = [getattr(layer.self_attn, name, None) for name in projections]
            parts += [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if any(type(part) is not nn.Linear for part in parts) or type(model.lm_head) is not nn.Linear:
                return None
        return cls(model)

    @property
    def matrices(self) -> list[Matrix]:
        """All that it multiplies by. Once one is packed, the stock model cannot compute any more."""
        return [
            *(m for layer in self._layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)),
            self._head,
        ]

    def run(
        self, ids: Tensor, positions: Tensor, longest: int, last: Tensor | None, run: Pass, wanted: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One pass.

        Args:
            ids: token ids [N].
            positions: their positions [N].
            longest: above all positions.
            last: indices of the tokens whose logits are wanted; None for all.
            run: the attention of the pass.
            wanted: layers whose output is wanted.

        Returns:
            Logits [last, vocabulary], and the wanted outputs [1, N, width].
        """
        count, heads, both, size = len(ids), self._heads, self._heads + self._kv, self._size
        rows = self._head.padded(count)  # once for all products; attention is of the real ones
        more = rows - count
        if more:
            ids, positions = functional.pad(ids, (0, more)), functional.pad(positions, (0, more))
        x = functional.embedding(ids, self._embedding)
        angles = self._angles_of(positions, longest)
        cos, sin = angles[:, :1], angles[:, 1:]
        seen = {}
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv.after(self._normed(x, layer.first_norm)).view(rows, both + self._kv, size)
            qk = qkv[:, :both]
            if layer.qk_norm is not None:
                qk = self._normed(qk, layer.qk_norm)
            qk = torch.mul(qk, cos).addcmul_(qk.roll(size // 2, -1), sin)
            real = qk[:count]
            found = run.attend(index, real[:, :heads], real[:, heads:], qkv[:count, both:], self._scale, layer.window)
            found = found.reshape(count, -1)
            x = x + layer.out.after(functional.pad(found, (0, 0, 0, more)) if more else found)
            gate, up = layer.gate_up.after(self._normed(x, layer.second_norm)).chunk(2, dim=-1)
            x = x + layer.down.after(functional.silu(gate).mul_(up))
            if index in wanted:
                seen[index] = x[:count].unsqueeze(0)
        x = x[:count] if last is None else x[last]
        return self._head.after(self._normed(x, self._norm)), seen

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square normalisation over the last axis, in float32 as the stock models do it."""
        wide = x if x.dtype == torch.float32 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scaled = wide * torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (scaled if wide is x else scaled.to(x.dtype)).mul_(weight)

    def _angles_of(self, positions: Tensor, longest: int) -> Tensor:
        """Cosine, and sine with the sign of each half, per position: [N, 2, size]."""
        if longest > len(self._angles):
            length = max(_FIRST_ANGLES, 1 << (longest - 1).bit_length())
            every = torch.arange(length, device=positions.device).unsqueeze(0)
            cos, sin = self._rotary(self._embedding, every)
            half = self._size // 2
            sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
            self._angles = torch.stack((cos[0], sin), dim=1)
        return self._angles.index_select(0, positions)


def _layer(layer: Any, windowed: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norm = None
    if hasattr(attention, "q_norm"):
        heads, kv = (
            projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
        )
        norm = torch.cat((attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv, -1)))
    return _Layer(
        windowed=attention if hasattr(attention, "sliding_window") else windowed,
        first_norm=layer.input_layernorm.weight,
        qkv=Matrix(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=norm,
        out=Matrix(attention.o_proj),
        second_norm=layer.post_attention_layernorm.weight,
        gate_up=Matrix(mlp.gate_proj, mlp.up_proj),
        down=Matrix(mlp.down_proj),
    )
