"""What an artifact was made for, as plain data: a few words or a short digest for each thing that must be the same.

A probe or a calibration is worth nothing on another model, tokenizer, template or set of cues. So it carries its
fingerprint, and is refused where that differs, with both sides named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(data: Any) -> str:
    """16 hexadecimal digits that stand for `data`: bytes, or anything JSON can hold, whatever the order of its keys."""
    if not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def refuse_mismatch(artifact: str, made_for: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Refuse an artifact whose fingerprint is not that of what it is to be used with.

    Args:
        artifact: what it is and where it came from, for the message.
        made_for: name to value, as stored in it. Only these names are compared.
        actual: the same of what is loaded; it may hold more.

    Raises:
        ValueError: naming everything that differs, with both values.
    """
    odd = [
        f"{name}: made for {value}, loaded is {actual.get(name, 'unknown')}"
        for name, value in made_for.items()
        if actual.get(name) != value
    ]
    if odd:
        raise ValueError(f"{artifact} was made for something else than what is loaded ({'; '.join(odd)})")
