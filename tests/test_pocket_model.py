import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.card import markdown
from langchain_earlyexit.pocket.evaluate import boxed, quick_scores
from langchain_earlyexit.pocket.forward import Weights, generate, hidden_states, logits
from langchain_earlyexit.pocket.problems import sample
from langchain_earlyexit.pocket.tokenizer import IM_END
from langchain_earlyexit.pocket.traces import NO_THINKING, OPEN_THINKING, prompt

TOKENIZER = AutoTokenizer.from_pretrained(weights_dir())
MODEL = AutoModelForCausalLM.from_pretrained(weights_dir(), dtype=torch.float32).eval()


def test_weights_are_small_and_bf16_with_head_size_64() -> None:
    assert (weights_dir() / "model.safetensors").stat().st_size <= 12e6
    config = json.loads((weights_dir() / "config.json").read_text())
    assert config["dtype"] == "float32"  # what `dtype="auto"` computes in; small CPUs are slow at bfloat16
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
    scores = quick_scores(MODEL, TOKENIZER.backend_tokenizer, sample("test", 120, 9))
    full, direct = (scores[name][0] / scores[name][1] for name in ("full", "direct"))
    assert full >= 0.78
    assert direct <= full - 0.1


@pytest.fixture
def card() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((weights_dir() / "card.json").read_text())
    return found


def test_the_card_s_figures_are_what_the_project_promises(card: dict[str, Any]) -> None:
    def arm(name: str) -> dict[str, Any]:
        [found] = [figures for title, figures in card["arms"].items() if title.startswith(name)]
        return found

    assert card["questions"]["test"] >= 2000
    assert arm("full thinking")["accuracy"] >= 0.85
    assert arm("no thinking")["accuracy"] <= arm("full thinking")["accuracy"] - 0.20
    # The threshold chosen on dev keeps accuracy; a cap of the same mean cost does not.
    assert arm("trial reused")["saved"] >= 0.35
    assert arm("trial reused")["accuracy_gap"]["low"] <= 0.0 <= arm("trial reused")["accuracy_gap"]["high"]
    assert arm("trial reused")["accuracy_gap"]["mean"] >= -0.01
    assert arm("budget")["accuracy_gap"]["high"] < 0.0
    assert arm("budget")["accuracy"] < arm("DEER")["accuracy"]
    assert card["thinking_tokens"]["wrong"] > card["thinking_tokens"]["right"]


def test_the_card_s_text_holds_its_figures_and_says_what_is_designed(card: dict[str, Any]) -> None:
    text = (weights_dir() / "README.md").read_text()
    assert markdown(card) in text
    assert "say nothing about large models" in text
    assert "Designed by us" in text
