import dataclasses
import re
import subprocess
import sys

import pytest

from langchain_earlyexit.families import (
    FAMILIES,
    UNKNOWN,
    Family,
    ThinkTags,
    find_family,
    thinking_state,
    thinking_tags,
)

THINK = ThinkTags("<think>", "</think>")
HARMONY = find_family("gpt-oss-20b").think
assert HARMONY is not None


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


class TestFindingAFamily:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("Qwen/Qwen3-8B", "qwen3"),
            ("Qwen/Qwen3-0.6B-GGUF", "qwen3"),
            ("Qwen/Qwen3-4B-Thinking-2507", "qwen3-thinking"),
            ("Qwen/Qwen3-Next-80B-A3B-Thinking", "qwen3-thinking"),
            ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-instruct"),
            ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-instruct"),
            ("Qwen/QwQ-32B", "qwq"),
            ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1"),
            ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "deepseek-r1"),
            ("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "nemotron-nano-v1"),
            ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nemotron-nano-v2"),
            ("openai/gpt-oss-20b", "gpt-oss"),
            ("mistralai/Magistral-Small-2509", "magistral"),
            ("HuggingFaceTB/SmolLM3-3B", "smollm3"),
            ("microsoft/Phi-4-reasoning-plus", "phi-4-reasoning"),
            ("microsoft/Phi-4-mini-reasoning", "phi-4-reasoning"),
            ("pocket", "pocket"),
            ("models/pocket", "pocket"),
            ("C:\\models\\pocket-v2", "pocket"),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "unknown"),
            ("microsoft/phi-4", "unknown"),
            ("Qwen/Qwen3.5-4B", "unknown"),
            ("meta-llama/Llama-3.1-8B-Instruct", "unknown"),
            ("someone/my-pocketbook-model", "unknown"),
        ],
    )
    def test_a_model_id_names_its_family(self, model, name):
        assert find_family(model).name == name

    def test_an_earlier_hint_weighs_more_than_a_later_one(self):
        assert find_family("pocket", "qwen3", "Qwen3ForCausalLM").name == "pocket"
        assert find_family("my-finetune", "qwen3", "Qwen3ForCausalLM").name == "qwen3"

    def test_no_hint_and_empty_hints_are_unknown(self):
        assert find_family() is UNKNOWN
        assert find_family("", "") is UNKNOWN


class TestTheTable:
    def test_names_are_unique_and_every_row_says_where_it_comes_from(self):
        names = [family.name for family in FAMILIES]
        assert len(set(names)) == len(names)
        assert all(family.source and family.patterns for family in FAMILIES)

    def test_patterns_match_lower_case_text(self):
        for row in FAMILIES:
            for pattern in row.patterns:
                re.compile(pattern)
                assert not re.search(r"(?<!\\)[A-Z]", pattern)

    def test_cues_are_lower_case_words(self):
        assert all(cue == cue.strip().lower() and cue for family in FAMILIES for cue in family.cues)

    def test_advised_sampling_is_in_range_and_uses_known_names(self):
        for row in FAMILIES:
            assert set(row.sampling) <= {"temperature", "top_p", "top_k", "min_p"}
            assert 0 < row.sampling.get("temperature", 1) <= 1.5
            assert 0 < row.sampling.get("top_p", 1) <= 1
            assert 0 <= row.sampling.get("min_p", 0) < 1

    def test_probe_depths_rise_to_the_last_layer(self):
        for row in FAMILIES:
            assert list(row.probe_layers) == sorted(row.probe_layers)
            assert not row.probe_layers or (row.probe_layers[-1] == 1.0 and row.probe_layers[0] > 0)

    def test_probe_depths_land_on_the_layers_lynx_read(self):
        def layers(name, count):
            return [round(depth * count) for depth in family(name).probe_layers]

        assert layers("qwq", 64) == [16, 32, 48, 64]
        assert layers("qwen3", 36) == [12, 18, 24, 36]
        assert layers("nemotron-nano-v1", 32) == [8, 16, 24, 32]
        assert layers("deepseek-r1", 28) == [9, 16, 28]

    def test_tau_holds_the_cells_of_codestop_table_7(self):
        assert family("qwen3").tau["qwen3-4b"]["aime"] == 5.3
        assert family("qwen3").tau["qwen3-14b"]["gpqa-d"] == 5.5
        assert family("deepseek-r1").tau["r1-distill-llama-8b"]["aime"] == 90.7
        assert family("nemotron-nano-v1").tau["nemotron-nano-8b-v1"]["math500"] == 4.6
        cells = [cell for row in FAMILIES for model in row.tau.values() for cell in model.values()]
        assert len(cells) == 20
        assert all(0.9 <= cell <= 90.7 for cell in cells)

    def test_none_but_the_bundled_model_boxes_what_does_not_ask_for_a_box(self):
        assert [row.name for row in FAMILIES if row.habit == "boxed"] == ["pocket"]

    def test_every_boxed_inducer_ends_in_an_open_box(self):
        assert all(family.boxed_inducer.endswith("\\boxed{") for family in (*FAMILIES, UNKNOWN))

    def test_a_budget_message_does_not_close_the_thinking_itself(self):
        for row in FAMILIES:
            assert row.think is None or row.think.end not in row.budget_message

    def test_rows_are_frozen_and_hashable(self):
        assert len(set(FAMILIES)) == len(FAMILIES)
        with pytest.raises(dataclasses.FrozenInstanceError):
            FAMILIES[0].name = "other"

    def test_reading_the_table_loads_neither_torch_nor_transformers_nor_langchain(self):
        code = (
            "import sys, langchain_earlyexit.families; "
            "print([m for m in ('torch', 'transformers', 'langchain_core') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestReadingTheTags:
    @pytest.mark.parametrize(
        ("start", "end"),
        [
            ("<think>", "</think>"),
            ("[THINK]", "[/THINK]"),
            ("<seed:think>", "</seed:think>"),
            ("◁think▷", "◁/think▷"),
            ("<|START_THINKING|>", "<|END_THINKING|>"),
            ("<|begin_of_thought|>", "<|end_of_thought|>"),
            ("<thinking>", "</thinking>"),
        ],
    )
    def test_an_unknown_model_is_read_from_its_added_tokens_or_its_template(self, start, end):
        assert thinking_tags(None, {start, end, "<s>"}, UNKNOWN) == ThinkTags(start, end)
        assert thinking_tags(f"{{{{ '{start}' }}}} x {end}", {"<s>"}, UNKNOWN) == ThinkTags(start, end)

    def test_harmony_is_known_by_its_channel_tokens(self):
        tokens = {"<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"}
        assert thinking_tags(None, tokens, UNKNOWN) == HARMONY
        assert thinking_tags(None, tokens - {"<|channel|>"}, UNKNOWN) is None

    def test_a_model_that_shows_no_tags_and_is_not_known_does_not_think(self):
        assert thinking_tags("{{ messages }}", {"<|im_start|>", "<|im_end|>"}, UNKNOWN) is None
        assert thinking_tags(None, (), UNKNOWN) is None

    def test_one_tag_of_a_pair_is_not_enough(self):
        assert thinking_tags("{{ content.split('</think>') }}", (), UNKNOWN) is None

    def test_a_known_family_without_tags_does_not_think_whatever_its_tokenizer_inherited(self):
        assert thinking_tags("<think></think>", {"<think>", "</think>"}, family("qwen3-instruct")) is None

    def test_the_familys_tags_come_before_others_that_are_shown_too(self):
        shown = {"[THINK]", "[/THINK]", "<think>", "</think>"}
        assert thinking_tags(None, shown, family("magistral")) == ThinkTags("[THINK]", "[/THINK]")
        assert thinking_tags(None, shown, family("qwen3")) == THINK

    def test_a_finetune_with_other_tags_is_believed(self):
        assert thinking_tags(None, {"[THINK]", "[/THINK]"}, family("qwen3")) == ThinkTags("[THINK]", "[/THINK]")

    def test_a_family_that_writes_its_tags_as_plain_text_keeps_them_unseen(self):
        assert thinking_tags("{{ messages }}", {"<|eot_id|>"}, family("nemotron-nano-v1")) == THINK


class TestReadingTheGenerationPrompt:
    @pytest.mark.parametrize(
        ("tail", "state"),
        [
            ("<|im_start|>assistant\n", "absent"),
            ("", "absent"),
            ("<|im_start|>assistant\n<think>\n", "open"),
            ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "closed"),
            ("<｜Assistant｜></think>", "closed"),
            ("<think></think><think>", "open"),
        ],
    )
    def test_the_last_tag_decides(self, tail, state):
        assert thinking_state(tail, THINK) == state

    def test_a_model_without_tags_has_no_thinking_to_open(self):
        assert thinking_state("<|im_start|>assistant\n<think>\n", None) == "none"

    def test_harmony_channels_are_tags_like_others(self):
        assert thinking_state("<|start|>assistant", HARMONY) == "absent"
        assert thinking_state("<|start|>assistant" + HARMONY.start, HARMONY) == "open"
        assert thinking_state("<|start|>assistant" + HARMONY.start + HARMONY.end, HARMONY) == "closed"

    def test_the_markers_of_a_tag_are_what_a_tokenizer_keeps_whole(self):
        assert THINK.markers == ("<think>", "</think>")
        assert set(HARMONY.markers) == {"<|channel|>", "<|message|>", "<|end|>", "<|start|>"}
