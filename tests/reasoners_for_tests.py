"""A tiny transformer that thinks nonsense: real caches, real hidden states, and cues often enough."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.scheduler import ScheduledEngine
from langchain_earlyexit.engines.separate import SeparateModel

BYTES = byte_tokenizer()
LAYERS, WIDTH = 3, 32
END_OF_TURN, END_OF_THINKING = 2, 4


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(BYTES), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class _Leaning:
    """A model with logits `sharp` times as far apart, which lean to some tokens, by so much each."""

    def __init__(self, inner, lean, sharp):
        self._inner = inner
        self._lean = lean
        self._sharp = sharp

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def forward(self, rows):
        return self._sharp * np.asarray(self._inner.forward(rows)) + self._lean


def tiny_reasoner(
    text: str = "w 1}\n.a", *, ending: float = 0.5, sharp: float = 1.0, packed: bool = True
) -> ScheduledEngine:
    """An engine that writes mostly the characters of `text`, more so those it holds twice.

    `ending` leans to the ends of thinking and of the turn; the higher `sharp`, the more depends on what came before.
    """
    lean = np.zeros(len(BYTES), dtype=np.float32)
    for i in BYTES(text, add_special_tokens=False)["input_ids"]:
        lean[i] += 1.0 if lean[i] else 4.0
    lean[[0, 1, 3]] = -50.0
    lean[[END_OF_TURN, END_OF_THINKING]] = ending
    model = (PackedModel if packed else SeparateModel)(tiny())
    return ScheduledEngine(
        _Leaning(model, lean, sharp),
        BYTES,
        name="tiny",
        identity={"weights": "tiny", "dtype": "float32"},
        context_length=4096,
    )
