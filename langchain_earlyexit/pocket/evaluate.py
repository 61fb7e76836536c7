"""A short measurement of the model in training: how far it has come, in seconds. The card is measured by `card.py`."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from langchain_earlyexit.pocket import plans, tool_turns
from langchain_earlyexit.pocket.forward import generate
from langchain_earlyexit.pocket.problems import Problem, Split
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


def quick_ability_scores(
    model: Any, tokenizer: Any, split: Split, questions: int, seed: int
) -> dict[str, tuple[float, int]]:
    """Sums and counts of right tool turns (by kind) and plans, with full thinking and without."""
    tools = tool_turns.sample_tools(split, questions, seed)
    stories = plans.sample_plans(split, questions, seed)
    starts = [tool_turns.prompt_of(problem) for problem in tools] + [plans.plan_prompt(problem) for problem in stories]
    scores: dict[str, list[float]] = defaultdict(list)
    for name, opened, temperature, limit in (
        ("full", OPEN_THINKING, 0.6, 700),
        ("direct", NO_THINKING, 0.0, 120),
    ):
        prompts = [tokenizer.encode(start + opened).ids for start in starts]
        written, _ = generate(model, prompts, limit, temperature, stop=(IM_END,), dtype=torch.bfloat16)
        texts = [tokenizer.decode(ids, skip_special_tokens=False).removesuffix("<|im_end|>") for ids in written]
        answers = [text.split("</think>")[-1].strip() for text in texts]
        for problem, text in zip(tools, answers[: len(tools)], strict=True):
            right = float(tool_turns.right(problem, text))
            scores[f"tools.{name}"].append(right)
            scores[f"tools.{name}.{problem.kind}"].append(right)
        for story, text in zip(stories, answers[len(tools) :], strict=True):
            scores[f"plans.{name}"].append(float(plans.right_plan(story, text)))
    return {name: (sum(values), len(values)) for name, values in scores.items()}
