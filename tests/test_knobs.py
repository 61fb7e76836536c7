"""Every provider is told how much to think in its own words, and never more than it was told before."""

import pytest
from agents_for_tests import chatterer, talker
from fleet_for_tests import AnthropicLike, Noting, OllamaLike, OpenAILike, QwenLike, usage
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from langchain_earlyexit.knobs import reasoning_tokens, turn
from langchain_earlyexit.settings import EFFORT_BUDGETS

THINKING = {"type": "enabled", "budget_tokens": 4000}
LEVELS = {"reasoning_output": True, "reasoning_effort_levels": ["none", "low", "medium", "high", "xhigh", "max"]}


def settings(model, cap, **given):
    turned = turn(model, cap, given)
    return None if turned is None else turned.settings


class TestAnEffort:
    @pytest.mark.parametrize(
        ("cap", "level"), [(0, "none"), (1023, "none"), (1024, "low"), (5000, "medium"), (10**6, "xhigh")]
    )
    def test_is_the_most_that_stays_within_the_cap(self, cap, level):
        assert settings(OpenAILike(profile=LEVELS), cap) == {"reasoning_effort": level}
        # Anthropic's keyword would turn thinking on where nobody did; this never does.
        assert settings(AnthropicLike(profile=LEVELS), cap) == {"output_config": {"effort": level}}

    def test_is_the_model_s_least_where_none_stays_within_the_cap(self):
        assert settings(OpenAILike(profile={"reasoning_effort_levels": ["high", "low"]}), 0) == {
            "reasoning_effort": "low"
        }

    @given(cap=st.integers(0, 30000), own=st.sampled_from([None, *EFFORT_BUDGETS]))
    def test_is_never_more_than_the_cap_or_the_model_s_own(self, cap, own):
        order = list(EFFORT_BUDGETS)
        level = settings(OpenAILike(profile=LEVELS, reasoning_effort=own), cap)["reasoning_effort"]
        assert 0 <= EFFORT_BUDGETS[level] <= cap
        assert own is None or order.index(level) <= order.index(own)

    @pytest.mark.parametrize(("default", "level"), [("none", "none"), ("medium", "medium")])
    def test_is_never_more_than_the_model_s_default(self, default, level):
        profile = {**LEVELS, "reasoning_effort_default": default}
        assert settings(OpenAILike(profile=profile), 10**6) == {"reasoning_effort": level}

    def test_of_anthropic_keeps_what_else_its_output_is_to_be(self):
        model = AnthropicLike(profile=LEVELS, output_config={"effort": "high", "format": "f"})
        assert settings(model, 2000) == {"output_config": {"effort": "low", "format": "f"}}
        assert settings(model, 2000, effort="medium") == {"reasoning_effort": "low"}
        assert settings(AnthropicLike(profile=LEVELS, reasoning_effort="low"), 9000) == {
            "output_config": {"effort": "low"}
        }

    def test_is_not_said_to_anthropic_where_thinking_is_off(self):
        turned = turn(AnthropicLike(profile=LEVELS, thinking={"type": "disabled"}), 5000, {})
        assert (turned.settings, turned.cap, turned.thinks_on) == ({}, 0, None)

    @pytest.mark.parametrize(("cap", "levels", "thinks_on"), [
        (0, ["low", "high"], "low"), (0, ["none", "low"], None), (1, ["low", "high"], None),
    ])  # fmt: skip
    @pytest.mark.parametrize("model", [OpenAILike, AnthropicLike])
    def test_that_is_not_nothing_at_a_cap_of_nothing_is_told(self, model, cap, levels, thinks_on):
        assert turn(model(profile={"reasoning_effort_levels": levels}), cap, {}).thinks_on == thinks_on

    def test_of_the_call_counts_before_the_constructor_s(self):
        model = OpenAILike(profile=LEVELS, reasoning_effort="high")
        assert settings(model, 9000, reasoning_effort="low") == {"reasoning_effort": "low"}

    def test_goes_into_reasoning_where_the_responses_api_is_used(self):
        model = OpenAILike(profile=LEVELS, reasoning={"effort": "medium", "summary": "auto"})
        assert settings(model, 2000) == {"reasoning": {"effort": "low", "summary": "auto"}}

    def test_is_known_of_openai_s_older_reasoning_models_too(self):
        assert settings(OpenAILike(profile={"reasoning_output": True}), 5000) == {"reasoning_effort": "medium"}

    def test_is_not_said_to_a_model_that_shows_no_sign_of_one(self):
        assert turn(OpenAILike(), 500, {}) is None
        assert turn(OpenAILike(profile={"reasoning_output": False}), 500, {}) is None
        assert turn(AnthropicLike(profile={"reasoning_output": True}), 500, {}) is None
        assert turn(Noting(), 500, {}) is None


class TestAThinkingBudget:
    def test_of_anthropic_s_constructor_is_lowered_in_a_copy(self):
        model = AnthropicLike(thinking=THINKING, profile=LEVELS)
        turned = turn(model, 3000, {})
        assert turned.model.thinking == {"type": "enabled", "budget_tokens": 3000}
        assert (turned.settings, turned.cap) == ({}, 3000)
        assert model.thinking == THINKING

    def test_of_anthropic_s_call_is_lowered_in_the_call(self):
        turned = turn(AnthropicLike(), 9000, {"thinking": THINKING})
        assert (turned.settings, turned.cap) == ({"thinking": THINKING}, 4000)

    def test_below_anthropic_s_least_is_none_at_all(self):
        turned = turn(AnthropicLike(thinking=THINKING), 1023, {})
        assert (turned.model.thinking, turned.cap) == ({"type": "disabled"}, 0)

    @pytest.mark.parametrize(("began", "type_"), [("Let me see.", "disabled"), ([{"type": "thinking"}], "enabled")])
    def test_of_anthropic_stays_off_in_a_turn_of_tools_that_began_without(self, began, type_):
        turn_so_far = [
            HumanMessage("go"),
            AIMessage(began, tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
            ToolMessage("ok", tool_call_id="1"),
        ]
        assert turn(AnthropicLike(thinking=THINKING), 3000, {}, turn_so_far).model.thinking["type"] == type_
        after = [*turn_so_far, HumanMessage("again")]
        assert turn(AnthropicLike(thinking=THINKING), 3000, {}, after).model.thinking["type"] == "enabled"

    def test_of_qwen_joins_what_else_its_body_says(self):
        model = QwenLike(enable_thinking=True, thinking_budget=1000, extra_body={"top_k": 20})
        assert settings(model, 300) == {"extra_body": {"top_k": 20, "enable_thinking": True, "thinking_budget": 300}}
        assert settings(model, 3000)["extra_body"]["thinking_budget"] == 1000
        assert settings(model, 0) == {"extra_body": {"top_k": 20, "enable_thinking": False}}

    def test_of_this_package_s_model_stands_over_an_effort_and_under_its_own_cap(self):
        model = talker(chatterer(9), thinking_budget=50)
        assert settings(model, 70) == {}, "its own is tighter"
        assert turn(model, 70, {}).cap == 50
        assert settings(model, 70, reasoning_budget=20, seed=3) == {"reasoning_budget": 20, "seed": 3}
        assert settings(model, 10, reasoning_budget=20, seed=3) == {
            "seed": 3, "thinking_budget": 10, "reasoning_effort": None,
        }  # fmt: skip
        assert settings(model, 70, reasoning_effort="minimal") == {"thinking_budget": 70, "reasoning_effort": None}


class TestOllama:
    @pytest.mark.parametrize(
        ("own", "cap", "told"),
        [(True, 0, False), (True, 1, True), (False, 9, False), ("high", 2000, "low"), ("low", 9000, "low")],
    )
    def test_is_switched_off_at_nothing_or_given_a_level(self, own, cap, told):
        assert settings(OllamaLike(reasoning=own), cap) == {"reasoning": told}

    def test_has_no_knob_where_nobody_said_whether_it_thinks(self):
        assert turn(OllamaLike(), 0, {}) is None


class TestWhatACallSpent:
    @pytest.mark.parametrize(
        ("message", "spent"),
        [
            (AIMessage("a", usage_metadata=usage(9, 4)), 4),
            (AIMessage("a", usage_metadata=usage(9)), 0),
            (AIMessage("a", usage_metadata=usage(9), additional_kwargs={"reasoning_content": "hm"}), 9),
            (AIMessage([{"type": "thinking", "thinking": "hm"}], usage_metadata=usage(9)), 9),
            (AIMessage("a", usage_metadata={**usage(9, 4), "total_cost": 0}), 0),
            (AIMessage("a"), None),
        ],
    )
    def test_is_what_is_reported_and_all_output_where_reasoning_is_not_told_apart(self, message, spent):
        assert reasoning_tokens(message) == spent
