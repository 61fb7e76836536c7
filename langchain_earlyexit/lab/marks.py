"""Figures told in a page that people write: between two marks, everything else as it is."""

from __future__ import annotations

from pathlib import Path


def between(path: Path, marks: tuple[str, str], told: str) -> str:
    """The page with `told` in place of what stood between the marks; nothing is written.

    Args:
        path: of the page.
        marks: the line before and the line after.
        told: what is to stand there.

    Raises:
        FileNotFoundError: no such page.
        ValueError: a page without these marks, in this order.
    """
    begin, end = marks
    head, begun, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(end)
    if not begun or not ended:
        raise ValueError(
            f"{path} has no {begin.strip()} and {end.strip()} marks to write between; put them where figures go"
        )
    return f"{head}{begin}{told}{end}{tail}"
