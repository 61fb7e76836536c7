"""A Python function as the model: for tests of the loop, of policies, and of your own chains and graphs.

`FunctionEngine(f)` calls `f(ids)` for the logits after `ids`. `scripted(...)` makes such a function from plain text:
what the model thinks, and what it answers whenever its thinking is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.engines.model import Model, Row
from langchain_earlyexit.engines.scheduler import ScheduledEngine

NextLogits = Callable[[Sequence[int]], NDArray[np.float32]]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte, ChatML turns and think tags: it can write any text.

    Ids 0 to 4 are `<pad>`, `<|im_start|>`, `<|im_end|>` (end of turn), `<think>` and `</think>`; then the 256 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    controls = ["<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(controls + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls[:3]])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in controls[3:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 - a control token, not a password
        pad_token="<pad>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
    )


def scripted(
    tokenizer: Any,
    thinking: str,
    answer: Callable[[str], tuple[str, float]] | str,
    *,
    end_of_thinking: str = "</think>",
    start_of_thinking: str = "<think>",
) -> NextLogits:
    r"""A model that thinks `thinking`, closes it, and answers.

    Args:
        tokenizer: the engine's tokenizer.
        thinking: its chain of thought, written token by token.
        answer: the text after the closed thinking; or a function from the thinking so far (which may have been cut) to
            the text and the probability with which each of its tokens is written (the rest goes to other tokens).
            Text the caller has already forced (such as `\boxed{`) is skipped.
        end_of_thinking: the model's end tag.
        start_of_thinking: the model's start tag.
    """
    size = len(tokenizer)
    eos = int(tokenizer.eos_token_id)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def peaked(token: int, probability: float) -> NDArray[np.float32]:
        rest = max(1.0 - probability, 1e-9) / (size - 1)
        logits = np.full(size, np.log(rest), dtype=np.float32)
        logits[token] = np.log(max(probability, 1e-9))
        return logits

    def next_logits(ids: Sequence[int]) -> NDArray[np.float32]:
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        turn = text[max(0, text.rfind("<|im_start|>assistant\n")) :]
        _, opened, chain = turn.partition(start_of_thinking)
        done, closed, after = chain.partition(end_of_thinking)
        if opened and not closed:
            so_far = done.lstrip("\n")
            rest = thinking[len(so_far) :] if thinking.startswith(so_far) else ""
            if not rest:  # a tag of several tokens may have been begun
                rest = end_of_thinking[_overlap(so_far, end_of_thinking) :]
            return peaked(encode(rest)[0], 1.0)
        said, probability = (answer, 1.0) if isinstance(answer, str) else answer(done)
        written = (after if opened else turn).lstrip("\n")
        start = _overlap(written, said)
        rest = said[start:]
        return peaked(encode(rest)[0] if rest else eos, probability)

    return next_logits


def _overlap(written: str, said: str) -> int:
    """How much of `said` the end of `written` already holds."""
    for length in range(min(len(written), len(said)), 0, -1):
        if written.endswith(said[:length]):
            return length
    return 0


class _FunctionModel(Model):
    """The model of a function: its cache is the list of ids."""

    def __init__(self, function: NextLogits) -> None:
        self._function = function

    def new(self) -> list[int]:
        return []

    def fork(self, cache: list[int], length: int) -> list[int]:
        return cache[:length]

    def rewind(self, cache: list[int], length: int) -> None:
        del cache[length:]

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        out = np.stack([np.asarray(self._function([*row.cache, *row.ids]), dtype=np.float32) for row in rows])
        for row in rows:
            row.cache.extend(row.ids)
        return out

    def hidden(self, cache: list[int], position: int) -> NDArray[np.float32]:
        raise KeyError("a function has no hidden states; use a policy that needs none, or a real model")

    def close(self) -> None:
        return None


class FunctionEngine(ScheduledEngine):
    """An engine whose model is `function(ids) -> logits` (float array, one number per token of the tokenizer).

    Args:
        function: called with all ids of a branch, prompt included. It may be called from another thread.
        tokenizer: a Hugging Face tokenizer with a chat template; `byte_tokenizer()` when None.
        context_length: most tokens one branch can hold, or None.
    """

    def __init__(self, function: NextLogits, tokenizer: Any = None, *, context_length: int | None = None) -> None:
        super().__init__(
            _FunctionModel(function),
            byte_tokenizer() if tokenizer is None else tokenizer,
            name="function",
            context_length=context_length,
            family_hints=("function",),
        )
