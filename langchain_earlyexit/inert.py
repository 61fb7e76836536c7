"""Text that is never a control token, whoever wrote it: what it says of `<|im_start|>` or `</think>` stays text.

That is kept by splitting, not by censoring. An invisible mark is set inside every dangerous string, and the text is
encoded piece by piece between the marks: no added token can form across a cut.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

_UNHEARD_OF = "\U0010fffd"
"""A private character that no vocabulary holds."""


def is_control(name: str) -> bool:
    """Whether the added token of this name must never come from text: all but blank and one-character ones."""
    return len(name.replace("▁", " ").strip()) > 1  # ▁ is how SentencePiece writes a space


def strings(value: Any) -> Iterator[str]:
    """Walk the strings of a nested structure, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


@dataclass(frozen=True)
class Controls:
    """The added tokens of a tokenizer that must never come from text, as `is_control` tells them.

    A closed vocabulary spells with its unknown token whatever it cannot spell. There that token is watched as
    a string only, for its id proves nothing.
    """

    firsts: frozenset[str]
    ids: frozenset[int]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> "Controls":
        """Those of `tokenizer`: read once, and again when it has grown."""
        size = len(tokenizer)
        known = _known.get(tokenizer)
        if known is None or known[0] != size:
            known = _known[tokenizer] = size, cls._read(tokenizer)
        return known[1]

    @classmethod
    def _read(cls, tokenizer: Any) -> "Controls":
        added = {
            int(index): str(token) for index, token in tokenizer.added_tokens_decoder.items() if is_control(str(token))
        }
        unknown = getattr(tokenizer, "unk_token_id", None)
        unspelled = {unknown}.intersection(_encode(tokenizer, _UNHEARD_OF))
        firsts = frozenset(name.lstrip()[0] for name in added.values())
        pattern = re.compile("|".join(map(re.escape, added.values())) or "(?!)")
        return cls(firsts, frozenset(added) - unspelled, pattern)

    def among(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(index for index in ids if index in self.ids)

    def spans(self, tokenizer: Any, text: str) -> list[tuple[int, int]]:
        """Where a control token would come out of `text`, by the tokenizer's own account if it gives one."""
        spans = [match.span() for match in self.pattern.finditer(text)]
        if getattr(tokenizer, "is_fast", False):  # sees what a normalizer makes of the text, too
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for index, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                token = text[start:end]
                if index in self.ids and len(token.strip()) > 1:
                    spans.append((start + len(token) - len(token.lstrip()), end))
        return spans

    def cut(self, tokenizer: Any, text: str, mark: str) -> str:
        """Set `mark` inside everything in `text` that would become a control token."""
        pieces, cut = text.split(mark), True
        while cut:
            cut, before = False, pieces
            pieces = []
            for piece in before:
                places = sorted({start + 1 for start, _ in self.spans(tokenizer, piece)})
                cut |= bool(places)
                bounds = [0, *places, len(piece)]
                pieces += [piece[start:end] for start, end in pairwise(bounds)]
        return mark.join(pieces)

    def cut_openers(self, tokenizer: Any, text: str, mark: str) -> str:
        """Set `mark` after every character with which a control token can begin, as written or normalized."""
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

        def opens(char: str) -> bool:
            forms = char
            if normalizer is not None:  # behind a neutral letter, for some put a space before any text
                forms += normalizer.normalize_str("a" + char)[len(normalizer.normalize_str("a")) :]
            return not self.firsts.isdisjoint(forms)

        opening = {char for char in set(text) if opens(char)}
        return "".join(char + mark if char in opening else char for char in text)


_known: WeakKeyDictionary[Any, tuple[int, Controls]] = WeakKeyDictionary()
"""Size and control tokens of each tokenizer: with hundreds of them, to read them takes longer than to encode."""


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> list[int]:
    """Encode pieces of one text, each as the continuation of the piece before it.

    Tokenizers of the SentencePiece kind put a space before whatever they are given. Behind an anchor they do
    not, if the anchor's own ids stand unchanged in front; else the piece is encoded as it is.
    """
    ids = _encode(tokenizer, pieces[0])
    for piece in pieces[1:]:
        if not piece:
            continue
        for anchor in ("\n", "."):
            lead, both = _encode(tokenizer, anchor), _encode(tokenizer, anchor + piece)
            if lead and both[: len(lead)] == lead:
                ids += both[len(lead) :]
                break
        else:
            ids += _encode(tokenizer, piece)
    return ids


def unused_mark(text: str) -> str:
    """Find a private character that stands nowhere in `text`, not even spelled out as JSON escapes it."""
    marks = (chr(code) for code in range(0xE000, 0xF900))
    return next(mark for mark in marks if mark not in text and json.dumps(mark)[1:-1] not in text)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode text that others wrote, so that no control token can come out of it.

    Text that holds none is encoded as the tokenizer would.

    Raises:
        ValueError: a tokenizer that makes a control token of anything, however it is cut.

    """
    controls = Controls.of(tokenizer)
    mark = unused_mark(text)
    for cut in (controls.cut, controls.cut_openers):
        ids = encode_pieces(tokenizer, cut(tokenizer, text, mark).split(mark))
        if not controls.among(ids):
            return ids
    raise ValueError("This tokenizer turns plain text into control tokens, however the text is split.")
