"""Synthetic traces whose risk is known: a chain of checks, each as likely right as it is confident."""

import numpy as np

from langchain_earlyexit import Check, Trace
from langchain_earlyexit.guarantee import BOUND

CHECKS = 4
BINDS = {name: f"some {name}" for name in BOUND if name != "policy"} | {"probe": "none"}


def chains(rng, *shape, surer=0.0):
    """Confidence of every check, and whether leaving there changes the answer; both of shape [*shape, CHECKS].

    The chance of another answer is 1 - confidence. `surer` moves confidences up without that chance: a shift.
    """
    confidence = rng.random((*shape, CHECKS))
    changes = rng.random((*shape, CHECKS)) < 1 - confidence
    return confidence ** (1 - surer), changes


def risk(threshold):
    """Share of questions that DEER(threshold) gives another answer: it leaves at the first check above, if any."""
    return (1 - threshold**CHECKS) * (1 - threshold) / 2


def losses_in(confidence, changes, thresholds):
    """Of `[sets, questions, CHECKS]`: in how many questions of a set leaving at the first confidence above each of the
    falling `thresholds` changes the answer, [sets, thresholds].

    A check is left at for the thresholds between its confidence and the highest one before it: where it changes the
    answer, that range counts one more.
    """
    steps = -np.asarray(thresholds)
    reaches = np.searchsorted(steps, -confidence, side="right")
    before = np.minimum.accumulate(reaches, axis=-1)
    before = np.concatenate([np.full_like(before[..., :1], len(steps)), before[..., :-1]], axis=-1)
    sets, width = len(confidence), len(steps) + 1
    row = np.broadcast_to(np.arange(sets)[:, None, None] * width, reaches.shape)
    counts = changes & (reaches < before)
    starts = np.bincount((row + reaches)[counts], minlength=sets * width)
    ends = np.bincount((row + before)[counts], minlength=sets * width)
    return (starts - ends).reshape(sets, width).cumsum(axis=1)[:, :-1]


def trace_of(confidences, changes, name=None, **more):
    return Trace(
        tuple(
            Check(10 * (i + 1), "wait", {"trial_confidence": float(c)}, exit_answer="other" if changed else "full")
            for i, (c, changed) in enumerate(zip(confidences, changes, strict=True))
        ),
        question_id=name,
        answer="full",
        **more,
    )


def traces(rng, n, **shift):
    confidence, changes = chains(rng, n, **shift)
    return [trace_of(c, x, f"q{i}") for i, (c, x) in enumerate(zip(confidence, changes, strict=True))]
