"""Between token ids and text, one token at a time, without losing a byte or a boundary."""

from __future__ import annotations

from typing import Any

_WINDOW = 16
"""Tokens decoded together: enough context for tokenizers whose pieces depend on their left neighbour."""

_INCOMPLETE = "\ufffd"
_LONGEST_CHARACTER = 4
"""UTF-8 bytes per character at most; an incomplete tail longer than this is not going to become one."""


class Codec:
    """A tokenizer as the control loop needs it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        extra_eos: further ids that end a turn (a generation config may name several).
    """

    def __init__(self, tokenizer: Any, extra_eos: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.eos: frozenset[int] = frozenset(own + extra_eos)
        self.special: frozenset[int] = frozenset(int(i) for i in tokenizer.all_special_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of trusted text: control tokens in it become control tokens."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def single(self, text: str | None) -> int | None:
        """The id of `text` where it is one token, else None."""
        if not text:
            return None
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and self.decode(list(ids)).strip() == text.strip() else None


class Pieces:
    """Incremental decoding: `push(id)` returns the text that this token completes, "" inside a character.

    The pieces joined are the text of the whole, also for byte-level tokens that split a character, and for
    tokenizers that drop or add a space at the start of a text.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._text = ""

    def push(self, token: int) -> str:
        codec = self._codec
        if token in codec.special:
            # A control token stands alone: decoders may glue spaces to it, or to its neighbour because of it.
            self._ids, self._text = [], ""
            return codec.decode([token])
        self._ids.append(token)
        text = codec.decode(self._ids)
        if text.endswith(_INCOMPLETE) and len(text) - len(self._text) <= _LONGEST_CHARACTER:
            return ""
        piece = text[len(self._text) :]
        self._text = text
        if len(self._ids) > _WINDOW:
            self._ids = self._ids[-_WINDOW // 2 :]
            self._text = codec.decode(self._ids)
        return piece
