"""A short measurement of the model in training: how far it has come, in seconds. The card is measured by `card.py`."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from langchain_earlyexit.pocket.forward import generate
from langchain_earlyexit.pocket.problems import Problem
from langchain_earlyexit.pocket.tokenizer import IM_END
from langchain_earlyexit.pocket.traces import NO_THINKING, OPEN_THINKING, prompt

_BOXED = re.compile(r"\\boxed\{(\d+)\}")


def boxed(text: str) -> str:
    """The number in the last box of a text, or nothing."""
    found = _BOXED.findall(text)
    return found[-1] if found else ""


def quick_scores(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> dict[str, tuple[float, int]]:
    """Sums and counts: right with full thinking and without, in all and by family; thinking tokens of both kinds."""
    scores: dict[str, list[float]] = defaultdict(list)
    starts = [prompt([("user", problem.question)]) for problem in problems]
    for name, opened, temperature, limit in (
        ("full", OPEN_THINKING, 0.6, 600),
        ("direct", NO_THINKING, 0.0, 14),
    ):
        prompts = [tokenizer.encode(start + opened).ids for start in starts]
        written, _ = generate(model, prompts, limit, temperature, stop=(IM_END,), dtype=torch.bfloat16)
        for problem, ids in zip(problems, written, strict=True):
            right = float(boxed(tokenizer.decode(ids)) == problem.answer)
            scores[name].append(right)
            scores[f"{name}.{problem.family}"].append(right)
            if name == "full":
                scores["tokens_right" if right else "tokens_wrong"].append(len(ids))
    return {name: (sum(values), len(values)) for name, values in scores.items()}
