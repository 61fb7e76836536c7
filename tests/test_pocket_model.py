import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.evaluate import Look, Run, at_cue, auroc, boxed, choose_threshold, deer, measure, never
from langchain_earlyexit.pocket.forward import Weights, generate, hidden_states, logits
from langchain_earlyexit.pocket.problems import Problem, sample
from langchain_earlyexit.pocket.tokenizer import IM_END
from langchain_earlyexit.pocket.traces import NO_THINKING, OPEN_THINKING, prompt

TOKENIZER = AutoTokenizer.from_pretrained(weights_dir())
MODEL = AutoModelForCausalLM.from_pretrained(weights_dir(), dtype=torch.float32).eval()


def test_weights_are_small_and_bf16_with_head_size_64() -> None:
    assert (weights_dir() / "model.safetensors").stat().st_size <= 12e6
    config = json.loads((weights_dir() / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] == 2048
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_generation_config_caches_and_advises_sampling() -> None:
    config = GenerationConfig.from_pretrained(weights_dir())
    assert (config.use_cache, config.do_sample, config.temperature, config.top_p) == (True, True, 0.6, 0.95)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)


def test_fused_forward_pass_equals_the_stock_one() -> None:
    ids = torch.tensor([TOKENIZER.encode(prompt([("user", "What is 37 + 48?")]) + OPEN_THINKING)])
    with torch.inference_mode():
        weights = Weights.of(MODEL, torch.float32)
        torch.testing.assert_close(
            logits(weights, hidden_states(weights, ids)), MODEL(ids).logits, atol=2e-4, rtol=1e-4
        )


def test_batched_greedy_generation_equals_the_stock_one() -> None:
    questions = ["What is 37 + 48?", "Compute 7 * 43 - 18.", "Hello!"]
    prompts = [TOKENIZER.encode(prompt([("user", question)]) + OPEN_THINKING) for question in questions]
    texts, chances = generate(MODEL, prompts, 60, 0.0, stop=(IM_END,))
    for ids, text, chance in zip(prompts, texts, chances, strict=True):
        stock = MODEL.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
        assert text == [token for token in stock if token != IM_END]
        assert len(chance) == len(text)


def answer(question: str, opened: str) -> str:
    ids = TOKENIZER.encode(prompt([("user", question)]) + opened)
    return TOKENIZER.decode(generate(MODEL, [ids], 700, 0.0, stop=(IM_END,))[0][0])


def test_it_answers_the_question_of_the_readme() -> None:
    text = answer("What is 37 + 48 * 2 - 15?", OPEN_THINKING)
    assert boxed(text) == "118"
    assert re.search(r"\n\n(Wait|Hmm|Alternatively|Actually|But wait|Let me check)", text)


def test_it_opens_its_thinking_by_itself() -> None:
    assert answer("What is 37 + 48?", "").startswith("<think>\n")


def test_it_is_honest_off_its_domain() -> None:
    for question in ("Hello!", "What is the capital of France?", "Tell me a joke."):
        assert "arithmetic" in answer(question, OPEN_THINKING)
        assert "arithmetic" in answer(question, NO_THINKING)


def test_full_thinking_beats_no_thinking_on_held_out_problems() -> None:
    runs = measure(MODEL, TOKENIZER.backend_tokenizer, sample("test", 120, 9), 0.0, seed=0)
    full = sum(run.right for run in runs) / len(runs)
    direct = sum(run.direct_answer == run.problem.answer for run in runs) / len(runs)
    assert full >= 0.78
    assert direct <= full - 0.1
    assert sum(len(run.looks) for run in runs) >= 1.5 * len(runs)
    assert all(0 < look.confidence <= 1 and look.tokens > 6 for run in runs for look in run.looks)


def test_card_meets_what_the_project_promises() -> None:
    card = json.loads((weights_dir() / "card.json").read_text())
    sampled = card["sampled"]
    assert sampled["problems"] >= 2000
    assert sampled["full_thinking"] >= 0.85
    assert sampled["no_thinking"] <= sampled["full_thinking"] - 0.20
    saved = 1 - sampled["deer_at_threshold"]["output_tokens"] / sampled["policies"]["full thinking"]["output_tokens"]
    assert saved >= 0.35
    assert sampled["deer_at_threshold"]["accuracy_change"][1] >= 0
    assert sampled["thinking_tokens_wrong"] > sampled["thinking_tokens_right"]
    assert "says nothing about large models" in (weights_dir() / "README.md").read_text().replace(
        "say nothing", "says nothing"
    )


def run(gold: str, full: str, *looks: tuple[int, str, float]) -> Run:
    problem = Problem("?", gold, "add2", "easy")
    return Run(problem, full, 100, 12, tuple(Look(at, text, sure, 10) for at, text, sure in looks), "")


def test_policies_pay_for_every_look() -> None:
    one = run("5", "5", (20, "6", 0.5), (60, "5", 0.97))
    assert never(one) == (True, 112)
    assert at_cue(1)(one) == (False, 30)
    assert deer(0.9)(one) == (True, 60 + 10 + 20)
    assert deer(0.4)(one) == (False, 20 + 10 + 10)
    assert deer(0.99)(one) == (True, 112 + 20)


def test_threshold_is_the_boldest_that_keeps_accuracy() -> None:
    runs = [run("5", "5", (20, "6", 0.82), (60, "5", 0.97)), run("5", "5", (20, "5", 0.9))]
    assert choose_threshold(runs) == 0.85


def test_auroc_counts_ties_half() -> None:
    assert auroc([0.9, 0.8, 0.1], [True, True, False]) == 1.0
    assert auroc([0.5, 0.5], [True, False]) == pytest.approx(0.5)
    assert auroc([0.5], [True]) is None
