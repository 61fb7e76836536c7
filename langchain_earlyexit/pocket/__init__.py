"""The pocket reasoner: a tiny reasoning model, its data, its training recipe and its bundled weights."""

from pathlib import Path

__all__ = ["CONTEXT_LENGTH", "weights_dir"]

CONTEXT_LENGTH = 2048
"""Tokens that its context holds, prompt and reply together: known without reading its files."""


def weights_dir() -> Path:
    """Directory with the bundled model and tokenizer, in the form `from_pretrained` reads."""
    return Path(__file__).parent / "weights"
