"""Files of JSON lines that grow as questions are done, each with how it was made beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

RUNS: Final = "runs.jsonl"
"""The runs of a folder of them; beside it is a file for the calls of each node."""


def read_lines(path: str | os.PathLike[str], parse: Callable[[str], T]) -> list[T]:
    """What `parse` makes of each line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of `parse`'s, naming it.
    """
    found = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found.append(parse(line))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
    return found


def mended(path: Path, parse: Callable[[str], T]) -> list[T]:
    """The lines that are there already. A last one that a crash cut short is taken away."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_lines(path, parse)


def note_planned(path: Path, ids: Collection[str]) -> None:
    """Note that these ids are to come into a file: see `refuse_unfinished`."""
    noted = _planned_path(path)
    whole = {*json.loads(noted.read_text(encoding="utf-8")), *ids} if noted.exists() else set(ids)
    noted.parent.mkdir(parents=True, exist_ok=True)
    part = noted.with_suffix(".part")
    part.write_text(json.dumps(sorted(whole)), encoding="utf-8")
    os.replace(part, noted)


def note_done(path: Path, ids: Collection[str]) -> None:
    """Note that these ids are in the file, or can never be: once all are that were planned, it is finished."""
    noted = _planned_path(path)
    if noted.exists() and set(json.loads(noted.read_text(encoding="utf-8"))) <= set(ids):
        noted.unlink()


def refuse_unfinished(path: Path) -> None:
    """Refuse a file that was planned to hold more.

    Raises:
        ValueError: it lacks what takes longest, so what is there is no fair sample.
    """
    noted = _planned_path(path)
    if noted.exists():
        planned = len(json.loads(noted.read_text(encoding="utf-8")))
        raise ValueError(
            f"{os.fspath(path)!r} is not finished: {planned} were planned, and the longest come last, so what is there "
            f"is no fair sample. Run the same collection again to its end; or, where the plan was "
            f"another, delete {os.fspath(noted)!r} and answer for it yourself"
        )


def _planned_path(path: Path) -> Path:
    return path.with_suffix(".planned.json")


def meta_path(path: Path) -> Path:
    """Where it is told how these lines were made."""
    return path.with_suffix(".meta.json")
