"""The checks of a collection as rows to learn from, and which of them may be learned from.

Questions, not checks, are split: the checks of one chain are alike, and on both sides of a split they would flatter
whatever is trained on them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from langchain_earlyexit.answers import graded_form
from langchain_earlyexit.fingerprint import digest
from langchain_earlyexit.lab.collect import read_meta, read_states, read_traces, subjects
from langchain_earlyexit.probe import mark
from langchain_earlyexit.trace import Trace

LABELS: Final = ("full", "gold")
"""What the answer of an exit is held against: the model's own full answer, or the right one."""

PARTS: Final = {"train": 0.7, "choose": 0.15, "test": 0.15}
"""Shares of the questions: to train on, to stop and choose by, and to report on."""

_BOUND: Final = ("weights", "dtype", "tokenizer", "template", "cues")

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Examples:
    """The checks of a collection, one row each.

    Attributes:
        states: float32 [rows, positions, layers, width].
        depths: of the layers.
        safe: whether leaving there gives the answer that is wanted, [rows].
        confidence: of the trial answer there, NaN where there was none, [rows].
        first: whether it is the first check of its chain, [rows].
        ids: of the question, [rows].
        part: "train", "choose" or "test", by question, [rows].
        questions: how many there are.
        learned: marks (`probe.mark`) of what those are about that are not in the part "test", see `collect.subjects`.
        binds: the model's fingerprint.
        model: its name.
    """

    states: NDArray[np.float32]
    depths: tuple[float, ...]
    safe: Bools
    confidence: NDArray[np.float64]
    first: Bools
    ids: NDArray[np.str_]
    part: NDArray[np.str_]
    questions: int
    learned: tuple[str, ...]
    binds: Mapping[str, str]
    model: str


def examples(
    out: str | os.PathLike[str], label: str = "full", *, kinds: Collection[str] | None = None, seed: int = 0
) -> Examples:
    """The checks of a collection as rows to learn from.

    Args:
        out: the file of traces, see `collect`.
        label: one of `LABELS`. "gold" is judged by `lab.grade`.
        kinds: only checks of these; all when None.
        seed: of the split. A question falls in the same part in every collection that is split with it.

    Raises:
        ValueError: an unknown label, no hidden states, or no gold answer where one is needed.
    """
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}; got {label!r}")
    meta, states = read_meta(out), read_states(out)
    traces = [trace for trace in read_traces(out) if trace.question_id in states]
    if not traces:
        raise ValueError(f"{os.fspath(out)!r} holds no hidden states; collect with depths")
    verdicts = _verdicts(traces, label, meta["form"])
    about = subjects(out, traces)
    parts = {str(trace.question_id): part_of(trace.question or str(trace.question_id), seed) for trace in traces}
    rows, safe, confidence, first, ids, part = [], [], [], [], [], []
    for trace, right in zip(traces, verdicts, strict=True):
        assert trace.question_id is not None  # noqa: S101 - only such have states
        found = states[trace.question_id]
        if len(found) != len(trace.checks):
            raise ValueError(f"question {trace.question_id} has {len(trace.checks)} checks, but {len(found)} states")
        wanted = [i for i, check in enumerate(trace.checks) if kinds is None or check.kind in kinds]
        rows += [found[i] for i in wanted]
        safe += [right[i] for i in wanted]
        confidence += [trace.checks[i].signals.get("trial_confidence", float("nan")) for i in wanted]
        first += [i == wanted[0] for i in wanted]
        ids += [trace.question_id] * len(wanted)
        part += [parts[trace.question_id]] * len(wanted)
    if not rows:
        raise ValueError(f"{os.fspath(out)!r} holds no checks of the kinds {sorted(kinds or meta['kinds'])}")
    return Examples(
        np.stack(rows),
        tuple(meta["depths"]),
        np.array(safe, dtype=bool),
        np.array(confidence, dtype=np.float64),
        np.array(first, dtype=bool),
        np.array(ids),
        np.array(part),
        len(traces),
        tuple(sorted({mark(about[name]) for name, chosen in parts.items() if chosen != "test"})),
        {name: meta["binds"][name] for name in _BOUND},
        meta["model"],
    )


def part_of(question: str, seed: int = 0) -> str:
    """The part a question falls in, by nothing but its text and the seed: asked twice, it is still on one side."""
    at = int(digest(["split", seed, question])[:8], 16) / 16**8
    for part, share in PARTS.items():
        at -= share
        if at < 0:
            return part
    return "test"


def _verdicts(traces: Sequence[Trace], label: str, form: str) -> list[list[bool]]:
    """Per trace, whether each check's exit answer is the one that is wanted."""
    if label == "full":
        same = graded_form(form).same
        return [[same(check.exit_answer, trace.answer) for check in trace.checks] for trace in traces]
    from langchain_earlyexit.lab.grade import grade_all

    pairs: list[tuple[str | None, str]] = []
    for trace in traces:
        if trace.gold is None:
            raise ValueError(
                f"label='gold' needs gold answers, and question {trace.question_id} has none; take label='full'"
            )
        pairs += [(check.exit_answer, trace.gold) for check in trace.checks]
    flat = iter(grade_all(pairs, form))
    return [[next(flat) for _ in trace.checks] for trace in traces]
