"""Measures the pocket reasoner on held-out problems and writes its card.

Run as `python -m langchain_earlyexit.pocket.evaluate`.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.forward import generate
from langchain_earlyexit.pocket.problems import Problem, sample
from langchain_earlyexit.pocket.tokenizer import CLOSE, IM_END
from langchain_earlyexit.pocket.traces import (
    CLOSE_THINKING,
    CUES,
    INDUCER,
    MAX_CHECKS,
    NO_THINKING,
    OPEN_THINKING,
    SLIP_ODDS,
    STOP_ODDS,
    prompt,
)

_BOXED = re.compile(r"\\boxed\{(\d+)\}")
CHAIN_LIMIT = 700
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.993, 0.996, 0.998, 0.999)


def boxed(text: str) -> str:
    """The number in the last box of a text, or nothing."""
    found = _BOXED.findall(text)
    return found[-1] if found else ""


@dataclass(frozen=True)
class Look:
    """A trial answer just before a cue: tokens thought until then, the answer, how sure, and the cost of asking."""

    position: int
    answer: str
    confidence: float
    tokens: int


@dataclass(frozen=True)
class Run:
    """One problem with its full chain, the looks along the chain, and the answer without thinking."""

    problem: Problem
    answer: str
    thinking_tokens: int
    answer_tokens: int
    looks: tuple[Look, ...]
    direct_answer: str

    @property
    def right(self) -> bool:
        """Whether full thinking got it right."""
        return self.answer == self.problem.answer

    def leave(self, look: Look | None, looked: int) -> tuple[bool, int]:
        """Whether the answer is right and all tokens spent, leaving at a look (None: never) after so many looks."""
        trials = sum(each.tokens for each in self.looks[:looked])
        if look is None:
            return self.right, self.thinking_tokens + self.answer_tokens + trials
        return look.answer == self.problem.answer, look.position + look.tokens + trials


def measure(
    model: Any, tokenizer: Any, problems: Sequence[Problem], temperature: float, seed: int, batch_size: int = 96
) -> list[Run]:
    """Full chains, a greedy trial answer before every cue, and greedy answers without thinking."""
    torch.manual_seed(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    starts = [encode(prompt([("user", problem.question)])) for problem in problems]
    opened = [start + encode(OPEN_THINKING) for start in starts]
    chains, _ = generate(model, opened, CHAIN_LIMIT, temperature, stop=(IM_END,), batch_size=batch_size)
    first_ids = {encode(cue)[0] for cue in CUES}
    paragraph = encode("\n\n")[0]
    inducer, brace = encode(CLOSE_THINKING + INDUCER), encode("}")[0]
    forks: list[list[int]] = []
    places: list[tuple[int, int]] = []
    lengths: list[int] = []
    for number, chain in enumerate(chains):
        end = chain.index(CLOSE) if CLOSE in chain else len(chain)
        lengths.append(end)
        for at in range(1, end):
            if chain[at] in first_ids and chain[at - 1] == paragraph:
                forks.append(opened[number] + chain[:at] + inducer)
                places.append((number, at))
    trials, chances = generate(model, forks, 8, 0.0, stop=(brace,), batch_size=batch_size)
    looks: list[list[Look]] = [[] for _ in problems]
    for (number, at), trial, chance in zip(places, trials, chances, strict=True):
        confidence = float(np.exp(np.mean(np.log(chance)))) if chance else 0.0
        looks[number].append(Look(at, tokenizer.decode(trial), confidence, len(inducer) + len(trial) + 1))
    directs, _ = generate(model, [start + encode(NO_THINKING) for start in starts], 14, 0.0, stop=(IM_END,))
    return [
        Run(
            problem,
            boxed(tokenizer.decode(chain[length:])),
            length,
            len(chain) - length,
            tuple(found),
            boxed(tokenizer.decode(direct)),
        )
        for problem, chain, length, found, direct in zip(problems, chains, lengths, looks, directs, strict=True)
    ]


Policy = Callable[[Run], tuple[bool, int]]


def never(run: Run) -> tuple[bool, int]:
    """Full thinking, no looks."""
    return run.leave(None, 0)


def at_cue(number: int) -> Policy:
    """Leave before the cue of that number, from 1, without looking before."""

    def policy(run: Run) -> tuple[bool, int]:
        return run.leave(run.looks[number - 1], 0) if len(run.looks) >= number else never(run)

    return policy


def deer(threshold: float) -> Policy:
    """Leave at the first look whose trial confidence exceeds the threshold; each look is paid for."""

    def policy(run: Run) -> tuple[bool, int]:
        for number, look in enumerate(run.looks):
            if look.confidence > threshold:
                return run.leave(look, number + 1)
        return run.leave(None, len(run.looks))

    return policy


def outcome(runs: Sequence[Run], policy: Policy) -> dict[str, float]:
    """Accuracy and mean output tokens of a policy, trials counted."""
    results = [policy(run) for run in runs]
    return {
        "accuracy": round(float(np.mean([right for right, _ in results])), 4),
        "output_tokens": round(float(np.mean([tokens for _, tokens in results])), 1),
    }


def choose_threshold(runs: Sequence[Run]) -> float:
    """The DEER threshold with the fewest tokens among those that cost no accuracy on the given runs."""
    full = outcome(runs, never)["accuracy"]
    kept = [threshold for threshold in THRESHOLDS if outcome(runs, deer(threshold))["accuracy"] >= full]
    return kept[0] if kept else THRESHOLDS[-1]


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Area under the ROC curve, ties counted half."""
    positive = np.array([score for score, label in zip(scores, labels, strict=True) if label])
    negative = np.sort([score for score, label in zip(scores, labels, strict=True) if not label])
    if not len(positive) or not len(negative):
        return None
    below, up_to = np.searchsorted(negative, positive, "left"), np.searchsorted(negative, positive, "right")
    return round(float((below + up_to).sum() / (2 * len(positive) * len(negative))), 4)


def _interval(runs: Sequence[Run], policy: Policy, draws: int = 2000) -> dict[str, list[float]]:
    """Paired bootstrap, 95 %, of the policy's accuracy and token share against full thinking."""
    pairs = np.array([[*policy(run), *never(run)] for run in runs], dtype=float)
    rng = np.random.default_rng(0)
    means = np.array([pairs[rng.integers(0, len(pairs), len(pairs))].mean(0) for _ in range(draws)])
    percent = (2.5, 97.5)
    return {
        "accuracy_change": [round(float(v), 4) for v in np.percentile(means[:, 0] - means[:, 2], percent)],
        "token_share": [round(float(v), 4) for v in np.percentile(means[:, 1] / means[:, 3], percent)],
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


def figures(dev: Sequence[Run], test: Sequence[Run]) -> dict[str, Any]:
    """The figures of the card; every setting is chosen on `dev`."""
    threshold = choose_threshold(dev)
    looks = [(look, run) for run in test for look in run.looks]
    firsts = [(run.looks[0], run) for run in test if run.looks]

    def aurocs(pairs: Sequence[tuple[Look, Run]]) -> dict[str, float | None]:
        scores = [look.confidence for look, _ in pairs]
        return {
            "against_full_answer": auroc(scores, [look.answer == run.answer for look, run in pairs]),
            "against_gold": auroc(scores, [look.answer == run.problem.answer for look, run in pairs]),
        }

    def switches(right: bool) -> float | None:
        steps = [
            a.answer != b.answer
            for run in test
            if run.right == right
            for a, b in zip(run.looks, run.looks[1:], strict=False)
        ]
        return _mean(steps)

    def group(runs: Sequence[Run]) -> dict[str, float | None]:
        return {
            "problems": len(runs),
            "full_thinking": _mean([run.right for run in runs]),
            "no_thinking": _mean([run.direct_answer == run.problem.answer for run in runs]),
            "exit_at_cue_1": outcome(runs, at_cue(1))["accuracy"],
            "deer": outcome(runs, deer(threshold))["accuracy"],
            "thinking_tokens": _mean([run.thinking_tokens for run in runs]),
        }

    by_family: dict[str, list[Run]] = defaultdict(list)
    by_level: dict[str, list[Run]] = defaultdict(list)
    for run in test:
        by_family[run.problem.family].append(run)
        by_level[run.problem.level].append(run)
    full = outcome(test, never)
    policies = {"full thinking": full}
    policies |= {f"exit at cue {number}": outcome(test, at_cue(number)) for number in (1, 2, 3)}
    policies |= {f"DEER({t})": outcome(test, deer(t)) for t in THRESHOLDS}
    return {
        **group(test),
        "thinking_tokens_right": _mean([run.thinking_tokens for run in test if run.right]),
        "thinking_tokens_wrong": _mean([run.thinking_tokens for run in test if not run.right]),
        "cues_right": _mean([len(run.looks) for run in test if run.right]),
        "cues_wrong": _mean([len(run.looks) for run in test if not run.right]),
        "unfinished": sum(not run.answer for run in test),
        "trial_switch_rate_right": switches(True),
        "trial_switch_rate_wrong": switches(False),
        "auroc_all_cues": aurocs(looks),
        "auroc_first_cue": aurocs(firsts),
        "deer_threshold_from_dev": threshold,
        "deer_at_threshold": {**outcome(test, deer(threshold)), **_interval(test, deer(threshold))},
        "policies": policies,
        "by_level": {name: group(by_level[name]) for name in ("easy", "medium", "hard") if name in by_level},
        "by_family": {name: group(runs) for name, runs in sorted(by_family.items())},
    }


def quick_scores(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> dict[str, tuple[float, int]]:
    """Sums and counts of a short measurement during training."""
    scores: dict[str, list[float]] = defaultdict(list)
    starts = [prompt([("user", problem.question)]) for problem in problems]
    for name, opened, temperature, limit in (
        ("full", OPEN_THINKING, 0.6, 420),
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


def _table(rows: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[str]) -> str:
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [f"| {name} | " + " | ".join(str(row.get(column)) for column in columns) + " |" for name, row in rows]
    return "\n".join(lines)


def _saved(part: dict[str, Any]) -> float:
    full = part["policies"]["full thinking"]["output_tokens"]
    return float(100 * (1 - part["deer_at_threshold"]["output_tokens"] / full))


def card(results: dict[str, Any], training: dict[str, Any]) -> str:
    """The model card in Markdown, from measured results and the facts of the training run."""
    sampled, greedy, recipe = results["sampled"], results["greedy"], training["recipe"]
    groups = ("problems", "full_thinking", "no_thinking", "exit_at_cue_1", "deer", "thinking_tokens")
    rows = [("all", sampled), *sampled["by_level"].items(), *sampled["by_family"].items()]
    low, high = sampled["deer_at_threshold"]["accuracy_change"]
    template = (Path(__file__).parent / "card_template.md").read_text()
    return template.format(
        **{name: recipe[name] for name in ("layers", "hidden_size", "heads", "head_dim", "processes")},
        parameters=results["parameters"] / 1e6,
        tokens=training["tokens"] / 1e6,
        minutes=training["minutes"],
        stop_odds=", ".join(map(str, STOP_ODDS)),
        max_checks=MAX_CHECKS,
        slips=100 * SLIP_ODDS,
        problems=sampled["problems"],
        temperature=results["temperature"],
        dev_problems=results["dev_problems"],
        groups_table=_table(rows, groups),
        policies_table=_table(list(sampled["policies"].items()), ("accuracy", "output_tokens")),
        threshold=sampled["deer_threshold_from_dev"],
        deer_accuracy=100 * sampled["deer_at_threshold"]["accuracy"],
        low=100 * low,
        high=100 * high,
        saved=_saved(sampled),
        tokens_right=sampled["thinking_tokens_right"],
        tokens_wrong=sampled["thinking_tokens_wrong"],
        switch_right=100 * sampled["trial_switch_rate_right"],
        switch_wrong=100 * sampled["trial_switch_rate_wrong"],
        auroc_full=sampled["auroc_all_cues"]["against_full_answer"],
        auroc_gold=sampled["auroc_all_cues"]["against_gold"],
        auroc_first_full=sampled["auroc_first_cue"]["against_full_answer"],
        auroc_first_gold=sampled["auroc_first_cue"]["against_gold"],
        greedy_full=100 * greedy["full_thinking"],
        greedy_direct=100 * greedy["no_thinking"],
        greedy_threshold=greedy["deer_threshold_from_dev"],
        greedy_deer=100 * greedy["deer_at_threshold"]["accuracy"],
        greedy_saved=_saved(greedy),
    )


def evaluate(weights: Path, problems: int, dev_problems: int, temperature: float, seed: int = 0) -> dict[str, Any]:
    """Measures the weights in a directory: sampled and greedy, thresholds from the development split."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights).backend_tokenizer
    dev, test = sample("dev", dev_problems, seed), sample("test", problems, seed)
    results: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "temperature": temperature,
        "seed": seed,
        "dev_problems": dev_problems,
    }
    for name, heat in (("sampled", temperature), ("greedy", 0.0)):
        results[name] = figures(*(measure(model, tokenizer, split, heat, seed) for split in (dev, test)))
    return results


def main(arguments: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Measure the pocket reasoner and print its figures.")
    parser.add_argument("--weights", type=Path, default=weights_dir(), help="directory (default: the bundled weights)")
    parser.add_argument("--problems", type=int, default=2000, help="test problems (default: %(default)s)")
    parser.add_argument("--dev-problems", type=int, default=1000, help="to choose settings (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the sampled run (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write card.json and README.md beside the weights")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = evaluate(given.weights, given.problems, given.dev_problems, given.temperature)
    if given.write:
        path = given.weights / "card.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        training = known.get("training") or json.loads((given.weights / "training.json").read_text())
        path.write_text(json.dumps({"training": training, **results}, indent=2) + "\n")
        (given.weights / "README.md").write_text(card(results, training))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
