"""How fast the control loop is, against `transformers`' own `generate()` on the same model and prompts.

Both decode greedily, one request at a time, the same number of tokens; runs are interleaved and the median of the
ratios is what counts, because small machines are noisy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from langchain_earlyexit.chat_models import ChatEarlyExit

PROMPTS = (
    "What is 37 + 48 * 2 - 15?",
    "What is 86 * 7?",
    "A shop has 3 boxes with 24 pens each. It sells 15 pens. How many pens are left?",
    "What is 712 + 189?",
)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of both sides over the rounds, and the ratio of each round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of ours / theirs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def against_generate(model: str = "pocket", *, rounds: int = 9, progress: bool = True) -> Speed:
    """Time `ChatEarlyExit(exit_policy="never").invoke` against `generate()`.

    Args:
        model: as for `ChatEarlyExit`; a directory or hub id that `AutoModelForCausalLM` loads by itself.
        rounds: interleaved rounds over all prompts.
        progress: show a progress bar.
    """
    from transformers import AutoModelForCausalLM

    from langchain_earlyexit.pocket import weights_dir

    llm = ChatEarlyExit(model=model, exit_policy="never", temperature=0, seed=0)
    where = str(weights_dir()) if model == "pocket" else model
    plain = AutoModelForCausalLM.from_pretrained(where, dtype="auto").eval()
    cases = []
    for prompt in PROMPTS:
        message = llm.invoke(prompt)
        record = message.response_metadata["early_exit"]
        length = record["thinking_tokens"] + record["answer_tokens"]
        tokenizer = llm._bind().engine.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text + "<think>\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        cases.append((prompt, ids, length))
    total = sum(length for _, _, length in cases)

    def ours() -> None:
        for prompt, _, _ in cases:
            llm.invoke(prompt)

    @torch.inference_mode()
    def theirs() -> None:
        for _, ids, length in cases:
            plain.generate(ids, do_sample=False, max_new_tokens=length, min_new_tokens=length)

    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    ours()  # warm up
    theirs()
    timed: list[tuple[float, float]] = []
    for i in tqdm(range(rounds), desc="rounds", disable=not progress):
        first, second = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        a, b = seconds(first), seconds(second)
        timed.append((a, b) if i % 2 == 0 else (b, a))
    llm.close()
    return Speed(tuple(total / a for a, _ in timed), tuple(total / b for _, b in timed))
