"""What a bench is made of: interleaved runs, the most memory that was held, and a table of lines."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Line:
    """One line of the table. Figures that were not measured are None, and `note` says why.

    Attributes:
        block: 1 to 5.
        what: the load, and the unit of the two figures.
        ours: figure of this package.
        beside: what it is compared with.
        theirs: its figure.
        ratio: how many times better ours is; for overheads and memory, ours over theirs.
        target: what was aimed at.
        note: anything else that must be known.
    """

    block: int
    what: str
    ours: float | None = None
    beside: str = ""
    theirs: float | None = None
    ratio: float | None = None
    target: str = ""
    note: str = ""


def table(lines: Sequence[Line]) -> str:
    """The lines as one Markdown table."""
    rows = [("block", "what", "ours", "beside", "theirs", "ratio", "target", "note")]
    rows += [
        (str(x.block), x.what, _told(x.ours), x.beside, _told(x.theirs), _told(x.ratio), x.target, _cell(x.note))
        for x in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    told = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    told.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(told)


def _cell(text: str) -> str:
    """An error's words may have lines and bars of their own."""
    return " ".join(text.split()).replace("|", "\\|")


def _told(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


Seconds = Mapping[str, list[float]]


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, title: str, *, progress: bool) -> Seconds:
    """Seconds of each side in each round; who goes first rotates. The caller has warmed them up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in tqdm(range(rounds), desc=title, disable=not progress):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as long theirs takes: the median over rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def resident_bytes() -> int:
    """What the process holds in memory now."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        raise RuntimeError("the memory block reads /proc/self/statm, which this system does not have")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Resident:
    """The most memory the process comes to hold while this is open, beyond what it held before."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        gc.collect()
        self._before = resident_bytes()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, resident_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, resident_bytes() - self._before)
        self._stop.set()
        self._thread.join()
