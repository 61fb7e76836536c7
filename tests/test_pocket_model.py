import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.card_text import markdown
from langchain_earlyexit.pocket.evaluate import boxed, quick_ability_scores, quick_scores
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


def test_it_calls_tools_and_plans_on_held_out_problems() -> None:
    scores = quick_ability_scores(MODEL, TOKENIZER.backend_tokenizer, "test", 30, 9)
    tools, planned = (scores[name][0] / scores[name][1] for name in ("tools.full", "plans.full"))
    assert tools >= 0.7
    assert planned >= 0.65


@pytest.fixture
def card() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((weights_dir() / "card.json").read_text())
    return found


def measured(card: dict[str, Any], name: str) -> float:
    found: float = card["asked"][name]["measured"]
    return found


def test_the_card_is_of_enough_problems(card: dict[str, Any]) -> None:
    counts = card["questions"]
    assert counts["dev"] >= 2000
    assert counts["arithmetic"] >= 2000
    assert min(counts[name] for name in ("beyond", "tools", "plans")) >= 500


def test_the_tool_and_the_arguments_are_right_in_nine_of_ten_turns_with_unseen_names(card: dict[str, Any]) -> None:
    assert measured(card, "tools") >= 0.90


def test_plans_are_valid_on_unseen_templates(card: dict[str, Any]) -> None:
    assert measured(card, "plans") >= 0.85


def test_arithmetic_is_no_worse_than_that_of_the_weights_before(card: dict[str, Any]) -> None:
    assert measured(card, "arithmetic") >= 0.0  # the change's 95 % interval does not lie below nothing
    assert card["abilities"]["arithmetic"]["accuracy"]["full"] >= 0.938  # and the mean is within a point of 0.948


def test_wrong_chains_are_half_as_long_again_as_right_ones(card: dict[str, Any]) -> None:
    assert measured(card, "lengths") >= 1.5


def test_trial_confidence_tells_the_answer_of_full_thinking(card: dict[str, Any]) -> None:
    assert measured(card, "auroc") >= 0.85
    assert card["auroc"]["arithmetic"]["all_checks_same_as_full"] >= 0.85


def test_deer_keeps_accuracy_and_saves_and_a_cap_of_the_same_cost_does_not_keep_it(card: dict[str, Any]) -> None:
    def arm(name: str) -> dict[str, Any]:
        [found] = [figures for title, figures in card["arms"].items() if title.startswith(name)]
        return found

    assert arm("no thinking")["accuracy"] <= arm("full thinking")["accuracy"] - 0.20
    for name in ("DEER", "trial reused"):
        mean, _, high = arm(name)["gap"]
        assert high >= 0.0
        assert mean >= -0.01
    assert arm("trial reused")["saved"][0] >= 0.35
    assert arm("budget")["gap"][2] < 0.0
    assert arm("budget")["accuracy"] < arm("DEER")["accuracy"]


def test_replayed_exits_are_those_of_the_live_run(card: dict[str, Any]) -> None:
    # Sums of floats depend a little on what shares the forward pass: a draw on the edge may fall either way.
    assert card["replayed"]["left_alike"] >= 0.995 * card["replayed"]["questions"]


def test_the_card_s_text_holds_its_figures(card: dict[str, Any]) -> None:
    assert markdown(card) in (weights_dir() / "README.md").read_text()


def test_the_card_s_text_says_what_is_designed() -> None:
    text = (weights_dir() / "README.md").read_text()
    assert "say nothing about large models" in text
    assert "Designed by us" in text
