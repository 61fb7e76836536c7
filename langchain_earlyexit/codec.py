"""Between token ids and text, one token at a time, without losing a byte or a boundary."""

from __future__ import annotations

from typing import Any

_WINDOW = 16
"""Tokens decoded together: enough context for tokenizers whose pieces depend on their left neighbour."""

_INCOMPLETE = "\ufffd"
_LONGEST_CHARACTER = 4
"""UTF-8 bytes per character at most, so tokens too; what is incomplete for longer is not going to become one."""


class Codec:
    """A tokenizer as the control loop needs it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        extra_eos: further ids that end a turn (a generation config may name several).
    """

    def __init__(self, tokenizer: Any, extra_eos: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        # A fast tokenizer's own core decodes the same without the wrapper's checks, which take longer than decoding.
        # A tokenizer that is not transformers' own may do more than its core does.
        own_class = type(tokenizer).__module__.startswith("transformers.")
        self._core = getattr(tokenizer, "backend_tokenizer", None) if own_class else None
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.eos: frozenset[int] = frozenset(own + extra_eos)
        # Added tokens that are special need not be among the named ones: Harmony's headers are not.
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special: frozenset[int] = frozenset(map(int, (*tokenizer.all_special_ids, *added)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of trusted text: control tokens in it become control tokens."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control tokens included."""
        text: str
        if self._core is not None:
            text = self._core.decode(ids, skip_special_tokens=False)
            return text
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
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
    tokenizers that drop or add a space at the start of a text, or that spoil a whole run of bytes for one character
    that is still incomplete. Bytes that the text ends with, and that never became a character, are left out.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._text = ""  # what of the text of these has been returned
        self._waiting = 0  # tokens since then
        self._anchor = 0  # a place in the ids, at or before the last of them returned, where no character is split

    def push(self, token: int) -> str:
        codec = self._codec
        if token in codec.special:
            # A control token stands alone: decoders may glue spaces to it, or to its neighbour because of it.
            self._ids, self._text, self._waiting, self._anchor = [], "", 0, 0
            return codec.decode([token])
        self._ids.append(token)
        self._waiting += 1
        text = codec.decode(self._ids)
        goes_on = text.startswith(self._text)
        if text.endswith(_INCOMPLETE):
            whole = text.rstrip(_INCOMPLETE)
            if goes_on and len(whole) > len(self._text):  # this token ends one character and begins another
                piece, self._text, self._waiting = whole[len(self._text) :], whole, 1
                return piece
            if self._waiting < _LONGEST_CHARACTER:
                return ""
        piece = text[len(self._text) :] if goes_on else codec.decode(self._ids[-self._waiting :])
        self._text, self._waiting = text, 0
        if len(self._ids) - self._anchor >= _WINDOW // 2:
            del self._ids[: self._anchor]
            self._anchor = len(self._ids)
            self._text = codec.decode(self._ids)
        return piece
