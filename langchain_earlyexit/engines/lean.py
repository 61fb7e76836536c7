"""The forward pass of Llama-shaped decoders as plain tensor operations on the stock model's own weights.

Half the time of a small model's pass goes into module calls, projections that could be one, and rotary angles that
are computed again and again. Here query, key and value are one matrix, gate and up are one, and the angles a table.
Matrices lie in memory as products with few rows read them fastest. The stock model keeps working: its parameters become
views of these matrices, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from langchain_earlyexit.engines.attention import Pass

_KINDS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_FIRST_ANGLES = 1024
_ALIAS, _PAD = 4096, 16
"""Rows so many bytes apart fall into the same places of a processor's cache: these get so many numbers more."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer. Its matrices are [in, out]: what comes in stands at their left."""

    windowed: Any  # whose `sliding_window` holds, which may be changed; None for a layer that never has one
    first_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [heads + kv heads, size]
    out: Tensor
    out_bias: Tensor | None
    second_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

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
        self._head, self._head_bias = _matrix(model.lm_head)
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
            hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
            patched = "forward" in vars(module)
            adapted = isinstance(module, nn.Linear | nn.Embedding) and type(module) not in {nn.Linear, nn.Embedding}
            if hooks or patched or adapted:
                return None
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        for layer in model.model.layers:
            parts = [getattr(layer.self_attn, name, None) for name in projections]
            parts += [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if any(type(part) is not nn.Linear for part in parts) or type(model.lm_head) is not nn.Linear:
                return None
        return cls(model)

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
        x = functional.embedding(ids, self._embedding)
        angles = self._angles_of(positions, longest)
        cos, sin = angles[:, :1], angles[:, 1:]
        count, heads, both, size = len(ids), self._heads, self._heads + self._kv, self._size
        seen = {}
        for index, layer in enumerate(self._layers):
            qkv = _product(self._normed(x, layer.first_norm), layer.qkv, layer.qkv_bias)
            qkv = qkv.view(count, both + self._kv, size)
            qk = qkv[:, :both]
            if layer.qk_norm is not None:
                qk = self._normed(qk, layer.qk_norm)
            qk = torch.mul(qk, cos).addcmul_(qk.roll(size // 2, -1), sin)
            found = run.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, both:], self._scale, layer.window)
            x = x + _product(found.reshape(count, -1), layer.out, layer.out_bias)
            gate_up = _product(self._normed(x, layer.second_norm), layer.gate_up, layer.gate_up_bias)
            gate, up = gate_up.chunk(2, dim=-1)
            x = x + _product(functional.silu(gate).mul_(up), layer.down, layer.down_bias)
            if index in wanted:
                seen[index] = x.unsqueeze(0)
        if last is not None:
            x = x[last]
        return _product(self._normed(x, self._norm), self._head, self._head_bias), seen

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
    qkv, qkv_bias = _matrix(attention.q_proj, attention.k_proj, attention.v_proj)
    out, out_bias = _matrix(attention.o_proj)
    gate_up, gate_up_bias = _matrix(mlp.gate_proj, mlp.up_proj)
    down, down_bias = _matrix(mlp.down_proj)
    return _Layer(
        windowed=attention if hasattr(attention, "sliding_window") else windowed,
        first_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        qk_norm=norm,
        out=out,
        out_bias=out_bias,
        second_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)


def _matrix(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One matrix [in, out] for all projections of the same input, whose own weights become views of it; their bias.

    A product of one to three rows with a float32 matrix that is no taller than wide takes half to three quarters of the
    time when the matrix lies in memory row by row of [in, out]; one of many rows takes as long either way (one thread
    of MKL on AVX-512; 192 and 576 wide, vocabularies of 1,312 and 49,152).
    """
    with torch.no_grad():
        weight = parts[0].weight.data if len(parts) == 1 else torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        matrix = weight.t()
        if weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[0] >= weight.shape[1]:
            width = weight.shape[0]
            padded = width + _PAD if width * weight.element_size() % _ALIAS == 0 else width
            matrix = weight.new_empty(weight.shape[1], padded)[:, :width].copy_(matrix)
        start = 0
        for part in parts:
            end = start + part.out_features
            part.weight.data = matrix[:, start:end].t()
            if bias is not None:
                part.bias.data = bias[start:end]
            start = end
    return matrix, bias
