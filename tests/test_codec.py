import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level, sentencepiece

from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.engines.function import byte_tokenizer

TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece_legacy": sentencepiece(legacy=True),
}
anything = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab ,.\n😀€é漢字👩‍🔬")), max_size=80
).filter(lambda text: "\ufffd" not in text)


def joined(codec: Codec, ids: list[int]) -> str:
    pieces = Pieces(codec)
    return "".join(pieces.push(i) for i in ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=anything)
def test_the_pieces_joined_are_the_text_of_the_whole(name, text):
    codec = Codec(TOKENIZERS[name])
    ids = list(codec.encode(text))
    assert joined(codec, ids) == codec.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["wait, 😀😀😀€€ and é" * 9, "漢字" * 40, "a b  c\n\n" * 30])
def test_texts_far_longer_than_the_window_lose_nothing(name, text):
    codec = Codec(TOKENIZERS[name])
    ids = list(codec.encode(text))
    assert joined(codec, ids) == codec.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_ever_holds_half_a_character(name):
    codec = Codec(TOKENIZERS[name])
    pieces = Pieces(codec)
    got = [pieces.push(i) for i in codec.encode("a😀😀€b")]
    assert "\ufffd" not in "".join(got)
    assert "".join(got).lstrip() == "a😀😀€b"


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(5, 260), max_size=60))
def test_bytes_that_are_no_characters_hold_text_up_for_three_tokens_at_most(ids):
    codec = Codec(byte_tokenizer())
    pieces = Pieces(codec)
    got = [pieces.push(i) for i in ids]
    assert all(any(got[i : i + 4]) for i in range(len(got) - 3))
    assert "".join(pieces.push(i) for i in codec.encode("so it goes on")).endswith("so it goes on")


def test_a_control_token_stands_alone_and_an_added_tag_is_text():
    codec = Codec(byte_tokenizer())
    ids = [*codec.encode("a"), 2, *codec.encode("b</think>")]
    pieces = Pieces(codec)
    assert [pieces.push(i) for i in ids] == ["a", "<|im_end|>", "b", "</think>"]


def test_single_finds_the_tag_that_is_one_token_only():
    codec = Codec(byte_tokenizer())
    assert codec.single("</think>") == 4
    assert codec.single("</thought>") is None
    assert codec.single(None) is None
    assert codec.single("") is None


def test_all_ends_of_turn_are_known():
    assert Codec(byte_tokenizer(), (9,)).eos == {2, 9}
