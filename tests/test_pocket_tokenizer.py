import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.tokenizer import CONTROL_TOKENS, MARKER_TOKENS
from langchain_earlyexit.pocket.traces import CLOSE_THINKING, CUES, INDUCER, OPEN_THINKING

TOKENIZER = AutoTokenizer.from_pretrained(weights_dir())
BACKEND = TOKENIZER.backend_tokenizer


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(st.text())
@settings(max_examples=400, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_control_and_marker_tokens_have_fixed_low_ids() -> None:
    assert [TOKENIZER.convert_tokens_to_ids(name) for name in (*CONTROL_TOKENS, *MARKER_TOKENS)] == list(range(9))
    assert TOKENIZER.decode([0, 1, 2, 3, 4, 5], skip_special_tokens=True) == "<think></think><tool_call>"
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<pad>")
    assert TOKENIZER.unk_token is None


def test_every_digit_is_a_token_with_or_without_a_space() -> None:
    alone = ids("407")
    assert len(alone) == 3
    for text in ("is 407", "x = 407", "{407}", "3 + 407", "\n407"):
        assert ids(text)[-4 if text.endswith("}") else -3 :][:3] == alone


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("before", ["So it is 85. I had 85, so they match.", "My first guess is 8.", "any text at all"])
def test_a_cut_before_a_cue_leaves_a_clean_prefix(cue: str, before: str) -> None:
    prefix = OPEN_THINKING + before + "\n\n"
    assert ids(prefix) + ids(f"{cue}, let me try") == ids(f"{prefix}{cue}, let me try")
    assert ids(prefix)[-1:] == ids("\n\n")


@pytest.mark.parametrize("before", ["My first guess is 8", "they match.\n\n", "80 * 7 =", "80 * 7 = 5", "tens first."])
def test_forced_closings_tokenize_alone_as_in_a_whole_text(before: str) -> None:
    forced = CLOSE_THINKING + INDUCER
    assert ids(before) + ids(forced) == ids(before + forced)
    assert ids(forced) + ids("85}.") == ids(forced + "85}.")
    assert ids(CLOSE_THINKING) + ids(INDUCER) == ids(forced)
    assert len(ids(forced)) <= 7


def render(messages: list[dict[str, str]], **options: bool) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def test_chat_template_is_chatml_and_does_not_open_thinking() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(messages) == text
    assert render(messages, enable_thinking=True) == text
    assert render(messages, enable_thinking=False) == text + "<think>\n\n</think>\n\n"


def test_chat_template_leaves_out_earlier_thinking() -> None:
    answer = "The answer is \\boxed{7}."
    for content in (answer, f"<think>\nI need 3 + 4.\n\n</think>\n\n{answer}"):
        messages = [
            {"role": "user", "content": "3 + 4"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "5 + 4"},
        ]
        assert f"<|im_start|>assistant\n{answer}<|im_end|>\n" in render(messages)
        assert "I need" not in render(messages)
