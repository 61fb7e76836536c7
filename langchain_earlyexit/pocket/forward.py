"""The pocket's forward pass with fused projections: a third faster than the stock one in training on one thread.

It computes what `Qwen3ForCausalLM` computes, on the stock model's own parameters (a test compares the two), and adds
batched sampling with a preallocated cache that drops finished rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-6
_DROP_EVERY = 16


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, with query, key and value, and gate and up, each in one matrix."""

    attention_norm: Tensor
    query_key_value: Tensor
    query_norm: Tensor
    key_norm: Tensor
    output: Tensor
    feed_forward_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of a model in one dtype. Made anew for each training step, as gradients flow through the casts."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    heads: int
    head_dim: int
    rope_theta: float

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> "Weights":
        """The weights of a `Qwen3ForCausalLM` with as many key heads as query heads and tied embeddings."""
        layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
            layers.append(
                Layer(
                    layer.input_layernorm.weight,
                    qkv.to(dtype),
                    attention.q_norm.weight.to(dtype),
                    attention.k_norm.weight.to(dtype),
                    attention.o_proj.weight.to(dtype),
                    layer.post_attention_layernorm.weight,
                    torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).to(dtype),
                    mlp.down_proj.weight.to(dtype),
                )
            )
        config = model.config
        return cls(
            model.model.embed_tokens.weight.to(dtype),
            tuple(layers),
            model.model.norm.weight,
            config.num_attention_heads,
            config.head_dim,
            config.rope_parameters["rope_theta"],
        )


@dataclass
class Cache:
    """Keys and values of all layers for up to a fixed number of positions."""

    keys: Tensor
    values: Tensor
    used: int = 0

    @classmethod
    def empty(cls, weights: Weights, rows: int, positions: int) -> "Cache":
        """Room for `positions` tokens in each of `rows` sequences."""
        shape = (len(weights.layers), rows, weights.heads, positions, weights.head_dim)
        zeros = torch.zeros(shape, dtype=weights.embedding.dtype)
        return cls(zeros, torch.zeros_like(zeros))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, _EPSILON)


def hidden_states(
    weights: Weights,
    ids: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states, before the final norm, in float32. Causal unless an additive mask is given."""
    rows, length = ids.shape
    dtype, heads, width = weights.embedding.dtype, weights.heads, weights.head_dim
    if positions is None:
        positions = torch.arange(length)[None]
    if mask is None:
        mask = torch.full((length, length), -1e9).triu(1).to(dtype)
    inverse = 1.0 / (weights.rope_theta ** (torch.arange(0, width, 2) / width))
    angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    begin = cache.used if cache else 0
    end = begin + length
    x = functional.embedding(ids, weights.embedding).float()
    for number, layer in enumerate(weights.layers):
        normed = _rms_norm(x, layer.attention_norm.float()).to(dtype)
        q, k, v = functional.linear(normed, layer.query_key_value).view(rows, length, 3, heads, width).unbind(2)
        q = _rotate(_rms_norm(q, layer.query_norm).transpose(1, 2), cos, sin) * width**-0.5
        k = _rotate(_rms_norm(k, layer.key_norm).transpose(1, 2), cos, sin)
        v = v.transpose(1, 2)
        if cache is not None:
            cache.keys[number, :, :, begin:end] = k
            cache.values[number, :, :, begin:end] = v
            k, v = cache.keys[number, :, :, :end], cache.values[number, :, :, :end]
        scores = torch.matmul(q, k.transpose(-1, -2)) + mask
        mixed = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(rows, length, heads * width)
        x = x + functional.linear(mixed, layer.output)
        normed = _rms_norm(x, layer.feed_forward_norm.float()).to(dtype)
        gate, up = functional.linear(normed, layer.gate_up).chunk(2, -1)
        x = x + functional.linear(functional.silu(gate) * up, layer.down)
    if cache is not None:
        cache.used = end
    return x


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Scores over the vocabulary, in float32."""
    normed = _rms_norm(hidden, weights.norm.float())
    return functional.linear(normed.to(weights.embedding.dtype), weights.embedding).float()


def _sample(
    weights: Weights, prompts: Sequence[Sequence[int]], limit: int, temperature: float, stop: frozenset[int]
) -> tuple[list[list[int]], list[list[float]]]:
    rows, longest = len(prompts), max(map(len, prompts))
    ids = torch.zeros((rows, longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    columns = torch.arange(longest + limit)
    hidden_columns = torch.zeros((rows, longest + limit)).masked_fill(columns < padding[:, None], -1e9)
    hidden_columns = hidden_columns.to(weights.embedding.dtype)
    causal = torch.full((longest, longest), -1e9).triu(1).to(hidden_columns.dtype)
    cache = Cache.empty(weights, rows, longest + limit)
    positions = (torch.arange(longest) - padding[:, None]).clamp(min=0)
    x = hidden_states(weights, ids, positions, hidden_columns[:, None, None, :longest] + causal, cache)[:, -1:]
    texts: list[list[int]] = [[] for _ in range(rows)]
    chances: list[list[float]] = [[] for _ in range(rows)]
    alive = list(range(rows))
    done: set[int] = set()
    for written in range(limit):
        scores = logits(weights, x)[:, 0]
        if temperature > 0:
            token = torch.multinomial((scores / temperature).softmax(-1), 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        chance = scores.softmax(-1).gather(1, token)
        for row, new, p in zip(alive, token[:, 0].tolist(), chance[:, 0].tolist(), strict=True):
            if row in done:
                continue
            if new in stop:
                done.add(row)
            else:
                texts[row].append(new)
                chances[row].append(p)
        if len(done) == rows or written == limit - 1:
            break
        if written % _DROP_EVERY == _DROP_EVERY - 1 and any(row in done for row in alive):
            keep = torch.tensor([at for at, row in enumerate(alive) if row not in done])
            alive = [alive[at] for at in keep.tolist()]
            token, hidden_columns = token[keep], hidden_columns[keep]
            used = cache.used
            cache = Cache(cache.keys[:, keep], cache.values[:, keep], used)
        at = torch.tensor([[longest + written - int(padding[row])] for row in alive])
        x = hidden_states(weights, token, at, hidden_columns[:, None, None, : longest + written + 1], cache)
    return texts, chances


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    temperature: float,
    stop: Sequence[int],
    batch_size: int = 128,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continuations of token prompts without their stop token, and the probability of each token written."""
    with torch.inference_mode():
        weights = Weights.of(model, dtype)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts: list[list[int]] = [[] for _ in prompts]
        chances: list[list[float]] = [[] for _ in prompts]
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            written, p = _sample(weights, [prompts[i] for i in batch], limit, temperature, frozenset(stop))
            for i, text, chance in zip(batch, written, p, strict=True):
                texts[i], chances[i] = text, chance
    return texts, chances
