"""Trains the pocket reasoner from nothing on a CPU: `python -m langchain_earlyexit.pocket.train --out runs/pocket`.

Data-parallel over single-thread processes, resumable, with fixed seeds. With `--minutes` the learning rate follows the
clock as well as the token count, whichever is further, so that a run on a busy machine still ends on a settled model.
"""

# ruff: noqa: S311

import argparse
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from tqdm import tqdm

from langchain_earlyexit.pocket import CONTEXT_LENGTH, checkpoints
from langchain_earlyexit.pocket import tokenizer as pocket_tokenizer
from langchain_earlyexit.pocket.curriculum import EARLY_SHARE, FAMILIES, REFRESH_AT, TOKENS, draw_lesson, early_guesser
from langchain_earlyexit.pocket.evaluate import quick_ability_scores, quick_scores
from langchain_earlyexit.pocket.forward import Weights, generate, hidden_states, logits
from langchain_earlyexit.pocket.problems import Problem, draw, sample
from langchain_earlyexit.pocket.traces import Guesser, Text, opening, prompt

CHUNK = 768
"""Texts that are drawn at once and sorted by length."""
LONGEST = 1800
"""Tokens of the longest text that is trained on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    tokens: int = TOKENS
    minutes: float | None = None
    processes: int = 2
    seed: int = 0
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    feed_forward: int = 512
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup_steps: int = 60
    padded_tokens_per_step: int = 3600
    digit_weight: float = 3.0
    refresh_problems: int = 2500
    checkpoint_minutes: float = 12.0
    check_problems: int = 80


def new_model(recipe: Recipe, vocabulary: int) -> Any:
    """A freshly initialised Qwen3 of the recipe's size."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=pocket_tokenizer.IM_END,
        pad_token_id=pocket_tokenizer.PAD,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        use_cache=True,
        eos_token_id=pocket_tokenizer.IM_END,
        pad_token_id=pocket_tokenizer.PAD,
    )
    return model


def encode_text(tokenizer: Any, text: Text) -> tuple[list[int], list[bool]]:
    """Token ids of a training text, and for each whether it carries loss."""
    ids: list[int] = []
    mask: list[bool] = []
    prompt_length = 0
    for pieces in (text.segments, text.tail):
        encoding = tokenizer.encode("".join(piece.text for piece in pieces))
        carries = [piece.loss for piece in pieces for _ in piece.text]
        part = list(encoding.ids)
        part_mask = [all(carries[start:end]) for start, end in encoding.offsets]
        if pieces is text.segments and text.cut_share is not None:
            prompt_length = len(tokenizer.encode(text.segments[0].text).ids) + 2
            keep = prompt_length + round(text.cut_share * (len(part) - prompt_length))
            part, part_mask = part[:keep], part_mask[:keep]
        ids += part
        mask += part_mask
    return ids, mask


Batch = list[tuple[list[int], list[bool]]]


def batches(tokenizer: Any, rng: random.Random, guesser: Guesser, early: bool, recipe: Recipe) -> list[Batch]:
    """One chunk of random texts in batches of similar length, shortest texts first."""
    texts = [encode_text(tokenizer, draw_lesson(rng, guesser, early)) for _ in range(CHUNK)]
    texts = sorted((text for text in texts if len(text[0]) <= LONGEST), key=lambda text: len(text[0]))
    groups: list[Batch] = [[]]
    for text in texts:
        if (len(groups[-1]) + 1) * len(text[0]) > recipe.padded_tokens_per_step:
            groups.append([])
        groups[-1].append(text)
    return groups


def in_step(groups: list[Batch], order: random.Random) -> list[Batch]:
    """The batches in an order that all processes share, so that none waits with a short one for another's long one.

    Args:
        groups: this process's batches, by length.
        order: equal in all processes.
    """
    count = torch.tensor(len(groups))
    dist.all_reduce(count, dist.ReduceOp.MIN)
    few = int(count)
    places = list(range(few))
    order.shuffle(places)
    return [groups[i * len(groups) // few] for i in places]  # a surplus batch is left out somewhere


def summed_loss(model: Any, batch: Batch, digits: torch.Tensor, digit_weight: float) -> tuple[torch.Tensor, float, int]:
    """Weighted sum of the cross-entropy of a batch, the sum of the weights, and the number of all tokens.

    Digits weigh more: they carry the arithmetic, while much of the rest is free choice of cue, method and wording.
    """
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pocket_tokenizer.PAD)
    mask = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, (text_ids, text_mask) in enumerate(batch):
        ids[row, : len(text_ids)] = torch.tensor(text_ids)
        mask[row, : len(text_ids)] = torch.tensor(text_mask)
    trained = mask[:, 1:]
    targets = ids[:, 1:][trained]
    weights = Weights.of(model, torch.bfloat16)
    hidden = hidden_states(weights, ids[:, :-1])[trained]
    shares = torch.where(torch.isin(targets, digits), digit_weight, 1.0)
    loss = (functional.cross_entropy(logits(weights, hidden), targets, reduction="none") * shares).sum()
    return loss, float(shares.sum()), sum(len(text_ids) for text_ids, _ in batch)


class OwnGuesses:
    """First guesses sampled from the model in training, on training problems."""

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe, rng: random.Random) -> None:
        families = FAMILIES
        drawn = [draw("train", rng, families) for _ in range(recipe.refresh_problems)]
        openings = [opening(problem, rng) for problem in drawn]
        prompts = [
            tokenizer.encode(prompt([("user", problem.question)]) + start).ids
            for problem, start in zip(drawn, openings, strict=True)
        ]
        stop = tokenizer.token_to_id(".")
        written, _ = generate(model, prompts, 7, 0.8, stop=(stop,), batch_size=250, dtype=torch.bfloat16)
        guesses = [tokenizer.decode(ids).rstrip(".") for ids in written]
        self.pool = [
            (problem, start, guess)
            for problem, start, guess in zip(drawn, openings, guesses, strict=True)
            if guess.isdecimal() and guess.isascii()
        ]
        self.right = sum(problem.answer == guess for problem, _, guess in self.pool) / max(1, len(self.pool))

    def __call__(self, rng: random.Random) -> tuple[Problem, str, str]:
        """A problem, an opening and the model's guess."""
        return rng.choice(self.pool)


class Optimizers:
    """Muon for the matrices, AdamW for the embedding and the norms."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
        rate, decay = recipe.learning_rate, recipe.weight_decay
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )
        self.rate = rate
        self.clipped = others

    def step(self, factor: float) -> None:
        """One update at the given share of the learning rate."""
        torch.nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * factor
            part.step()
            part.zero_grad()


def _reduce(model: Any, numbers: list[float]) -> list[float]:
    """Sums gradients over the processes, and with them a few numbers, in one message."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters] + [torch.tensor(numbers)])
    dist.all_reduce(flat)
    totals = [float(value) for value in flat[-len(numbers) :]]
    scale = 1.0 / max(1.0, totals[1])
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad.copy_(flat[offset : offset + size].view_as(parameter.grad)).mul_(scale)
        offset += size
    return totals


def _gather_scores(scores: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(scores))
    names = sorted({name for part in gathered for name in part})
    totals: dict[str, float] = {}
    for name in names:
        parts = [part[name] for part in gathered if name in part]
        totals[name] = round(sum(total for total, _ in parts) / max(1, sum(n for _, n in parts)), 3)
    return totals


def _worker(rank: int, recipe: Recipe, out: str, warm_start: str | None) -> None:
    os.setsid()  # kernels that share the CPU by session would count all workers as one
    torch.set_num_threads(1)
    directory = Path(out)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory.resolve()}/rendezvous", rank=rank, world_size=recipe.processes
    )
    torch.manual_seed(recipe.seed)
    vocabulary = directory / "tokenizer.json"
    if rank == 0 and not vocabulary.exists():
        pocket_tokenizer.build().save(str(vocabulary))
    dist.barrier()
    tokenizer = Tokenizer.from_file(str(vocabulary))
    model = new_model(recipe, tokenizer.get_vocab_size())
    if warm_start:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(f"{warm_start}/model.safetensors"), strict=False)
    optimizers = Optimizers(model, recipe)
    step, tokens, seconds = 0, 0.0, 0.0
    checkpoint = directory / "checkpoint.safetensors"
    if checkpoint.exists():
        counts = checkpoints.load(checkpoint, model, optimizers.parts)
        step, tokens, seconds = int(counts["step"]), counts["tokens"], counts["seconds"]
    began = time.monotonic() - seconds
    rng = random.Random(f"{recipe.seed}/{rank}/{step}")
    torch.manual_seed(recipe.seed + 1000 * step + rank)
    held_out = sample("dev", recipe.check_problems, seed=recipe.seed)[rank :: recipe.processes]

    def progress_at(elapsed: float) -> float:
        by_clock = elapsed / 60 / recipe.minutes if recipe.minutes else 0.0
        return min(1.0, max(tokens / recipe.tokens, by_clock))

    def report(**facts: Any) -> None:
        if rank == 0:
            line = {"step": step, "tokens": int(tokens), "minutes": round((time.monotonic() - began) / 60, 1), **facts}
            with (directory / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write(json.dumps(line))

    bar = tqdm(total=recipe.tokens, initial=int(tokens), unit="tok", unit_scale=True, mininterval=20, disable=rank > 0)
    progress = progress_at(seconds)
    saved_at = seconds
    recent: list[float] = []
    guesser: Guesser = early_guesser
    refreshes = 0
    digits = torch.tensor([tokenizer.token_to_id(digit) for digit in "0123456789"])
    queue: list[Batch] = []
    while progress < 1.0:  # every decision below follows from numbers that all processes share
        early = progress < EARLY_SHARE and not warm_start
        due = sum(progress >= at for at in REFRESH_AT) + bool(warm_start)
        if due > refreshes:
            refreshes = due
            started = time.monotonic()
            own = OwnGuesses(model, tokenizer, recipe, rng)
            guesser = own if own.pool else guesser  # an untrained model writes no numbers yet
            queue.clear()
            right = _gather_scores({"own_guess_right": (own.right * len(own.pool), len(own.pool))})
            report(**right, refresh_seconds=round(time.monotonic() - started, 1))
        if not queue:
            chunk = batches(tokenizer, rng, early_guesser if early else guesser, early, recipe)
            queue = in_step(chunk, random.Random(f"{recipe.seed}/{step}"))
        loss, loss_weight, all_tokens = summed_loss(model, queue.pop(), digits, recipe.digit_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        clock = time.monotonic() - began if rank == 0 else 0.0
        total_loss, total_weight, total_tokens, elapsed = _reduce(
            model, [float(loss.detach()), loss_weight, float(all_tokens), clock]
        )
        optimizers.step(min(1.0, (step + 1) / recipe.warmup_steps) * (1.0 - progress))
        step += 1
        tokens += total_tokens
        bar.update(total_tokens)
        recent.append(total_loss / total_weight)
        progress = progress_at(elapsed)
        if elapsed - saved_at > 60 * recipe.checkpoint_minutes or progress >= 1.0:
            saved_at = elapsed
            if rank == 0:
                counts = {"step": step, "tokens": tokens, "seconds": time.monotonic() - began}
                checkpoints.save(checkpoint, model, optimizers.parts, counts)
            started = time.monotonic()
            quick = quick_scores(model, tokenizer, held_out)
            quick |= quick_ability_scores(model, tokenizer, "dev", recipe.check_problems // 4, recipe.seed + rank)
            scores = _gather_scores(quick)
            report(
                progress=round(progress, 3),
                loss=round(sum(recent) / len(recent), 4),
                tok_per_s=int(tokens / elapsed),
                check_seconds=round(time.monotonic() - started, 1),
                **scores,
            )
            recent = []
    bar.close()
    if rank == 0:
        export(model, tokenizer, directory / "weights")
        facts = {"recipe": asdict(recipe), "steps": step, "tokens": int(tokens)}
        facts["minutes"] = round((time.monotonic() - began) / 60, 1)
        (directory / "weights" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps(facts), flush=True)
    dist.destroy_process_group()


def export(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes the model in bfloat16 and the tokenizer, ready for `from_pretrained`.

    The config asks for float32 all the same: the file is half as large so, and small CPUs are slow at bfloat16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = model.eval().to(torch.bfloat16)
    model.save_pretrained(directory)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (directory / "model.safetensors").chmod(0o644)
    pocket_tokenizer.pretrained(tokenizer, CONTEXT_LENGTH).save_pretrained(directory)


def train(recipe: Recipe, out: Path, warm_start: Path | None = None) -> Path:
    """Trains, or goes on training from the checkpoint in `out`, and returns the directory of the weights."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    spawn(  # type: ignore[no-untyped-call]
        _worker, args=(recipe, str(out), str(warm_start) if warm_start else None), nprocs=recipe.processes
    )
    return out / "weights"


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(description="Train the pocket reasoner from nothing, on CPU. Resumes by itself.")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="run directory (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="training tokens (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="end by this time even if the tokens are not reached")
    parser.add_argument("--processes", type=int, default=2, help="single-thread processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help="peak (default: %(default)s)")
    parser.add_argument("--warm-start", type=Path, help="directory with weights to start from instead of nothing")
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=Recipe.checkpoint_minutes, help="between checkpoints"
    )
    given = parser.parse_args(arguments)
    recipe = Recipe(
        tokens=given.tokens,
        minutes=given.minutes,
        processes=given.processes,
        seed=given.seed,
        learning_rate=given.learning_rate,
        checkpoint_minutes=given.checkpoint_minutes,
    )
    print(train(recipe, given.out, given.warm_start))


if __name__ == "__main__":
    main()
