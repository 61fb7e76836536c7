import random
import re
from typing import Any

import pytest
from tokenizers import Tokenizer

from langchain_earlyexit.pocket import tokenizer as pocket_tokenizer
from langchain_earlyexit.pocket.methods import Scratch, Segment, far_miss, methods_of, near_miss
from langchain_earlyexit.pocket.problems import DOUBT_SHARES, SMALL_SHARES, sample
from langchain_earlyexit.pocket.traces import (
    CUES,
    DOUBT_MAX_CHECKS,
    MAX_CHECKS,
    Text,
    chain,
    draw_text,
    opening,
    synthetic_guesser,
)

PROBLEMS = sample("train", 1500, 11)
SMALL = sample("train", 150, 11, SMALL_SHARES)
BEYOND = sample("train", 300, 11, DOUBT_SHARES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return pocket_tokenizer.build(texts=3000)


def _text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_every_method_is_right_without_a_slip() -> None:
    for problem in PROBLEMS + SMALL + BEYOND:
        methods = methods_of(problem)
        assert len(methods) >= 2
        for method in methods.values():
            assert str(method(Scratch(random.Random(0)), problem.numbers)) == problem.answer


def test_every_written_step_without_loss_is_wrong_and_with_loss_is_right() -> None:
    rng = random.Random(4)
    for problem in PROBLEMS[:600] + SMALL + BEYOND:
        written = chain(problem, str(near_miss(int(problem.answer), rng)), opening(problem, rng), rng)
        for before, value in zip(written.segments, written.segments[1:], strict=False):
            found = re.fullmatch(r" (\d+) ([+*-]) (\d+) = ", before.text)
            if found:
                a, sign, b = int(found[1]), found[2], int(found[3])
                right = {"+": a + b, "-": a - b, "*": a * b}[sign]
                assert (str(right) == value.text) == value.loss


def test_chains_end_on_the_right_answer_and_state_true_verdicts() -> None:
    rng = random.Random(5)
    for problem in PROBLEMS[:600]:
        guess = problem.answer if rng.random() < 0.5 else str(near_miss(int(problem.answer), rng))
        written = chain(problem, guess, opening(problem, rng), rng)
        text = _text(written.segments)
        verdicts = re.findall(r"So it is (\d+)\. I had (\d+), so they (match|differ)\.", text)
        assert all((now == before) == (verdict == "match") for now, before, verdict in verdicts)
        assert (verdicts[-1][0] if verdicts else guess) == problem.answer
        assert len(verdicts) <= MAX_CHECKS + 6


def test_chains_beyond_the_model_s_capacity_waver_and_grow_long() -> None:
    rng = random.Random(8)
    lengths, differ = [], 0
    for problem in BEYOND:
        guess = str(far_miss(int(problem.answer), rng))
        assert len(guess) == len(problem.answer)
        text = _text(chain(problem, guess, opening(problem, rng), rng, DOUBT_MAX_CHECKS).segments)
        differ += text.count("differ.")
        lengths.append(text.count("So it is"))
    assert differ / sum(lengths) > 0.4
    assert max(lengths) >= DOUBT_MAX_CHECKS


def test_a_wrong_guess_carries_no_loss() -> None:
    problem = PROBLEMS[0]
    wrong = str(int(problem.answer) + 1)
    rng = random.Random(0)
    assert not chain(problem, wrong, opening(problem, rng), rng).segments[1].loss
    assert chain(problem, problem.answer, opening(problem, rng), rng).segments[1].loss


def test_cue_cuts_fall_right_before_a_cue() -> None:
    rng = random.Random(6)
    for problem in PROBLEMS[:300]:
        written = chain(problem, problem.answer, opening(problem, rng), rng)
        for cut in written.cue_cuts:
            assert _text(written.segments[:cut]).endswith("\n\n")
            rest = _text(written.segments[cut:])
            assert not rest or rest.startswith(CUES)


def test_loss_masks_leave_out_prompts_forced_closings_and_wrong_guesses(tokenizer: Tokenizer) -> None:
    from langchain_earlyexit.pocket.train import encode_text

    rng = random.Random(7)
    guesser = synthetic_guesser(right=0.5)
    for _ in range(400):
        text = draw_text(rng, guesser)
        ids, mask = encode_text(tokenizer, text)
        assert len(ids) == len(mask)
        assert any(mask)
        assert not mask[0]
        trained = tokenizer.decode([i for i, carries in zip(ids, mask, strict=True) if carries], False)
        assert "user" not in trained.split("\n")[0]
        if text.cut_share is None:
            pieces = (*text.segments, *text.tail)
            assert trained == "".join(piece.text for piece in pieces if piece.loss)


def test_a_budget_cut_goes_on_with_the_true_answer(tokenizer: Tokenizer) -> None:
    from langchain_earlyexit.pocket.train import encode_text

    segments = (Segment("<|im_start|>assistant\n", loss=False), Segment("<think>\nI need 3 + 4. It is 7.\n\n"))
    tail = (Segment("</think>\n\nThe answer is \\boxed{", loss=False), Segment("7}.<|im_end|>"))
    ids, mask = encode_text(tokenizer, Text(segments, tail, cut_share=0.5))
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole.endswith("</think>\n\nThe answer is \\boxed{7}.<|im_end|>")
    assert "It is 7" not in whole
    assert mask[-4:] == [True] * 4


def test_a_run_that_is_taken_up_again_goes_on_with_the_very_weights_and_momenta(tmp_path) -> None:
    import torch

    from langchain_earlyexit.pocket import checkpoints
    from langchain_earlyexit.pocket.train import Optimizers, Recipe, new_model

    recipe = Recipe(hidden_size=16, layers=1, heads=2, head_dim=8, feed_forward=24)

    def built() -> tuple[Any, Optimizers]:
        model = new_model(recipe, 40)
        return model, Optimizers(model, recipe)

    def learn(model: Any, optimizers: Optimizers, seed: int) -> None:
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizers.step(0.5)

    torch.manual_seed(0)
    one, before = built()
    learn(one, before, 1)
    checkpoints.save(tmp_path / "checkpoint.safetensors", one, before.parts, {"step": 1, "tokens": 18.0})
    other, after = built()
    assert checkpoints.load(tmp_path / "checkpoint.safetensors", other, after.parts) == {"step": 1, "tokens": 18.0}
    for _ in range(2):
        learn(one, before, 2)
        learn(other, after, 2)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
