# ruff: noqa: S106 -- a token of a tokenizer, not a password
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level

from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.strain import Strainer, TagFinder, TagFound, Trimmer

TAGS = ("<think>", "</think>")
CODEC = Codec(byte_level(plain=()))
mixed = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<thi", "nk>", "</th", "ink>", "<", " ", "\n", "a", "STOP", "ST", "OP", "é"]
    ),
    max_size=14,
).map("".join)
cuts = st.lists(st.integers(0, 60), max_size=12)


def split(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted({i for i in at if i < len(text)}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def strained(parts: list[str], stop: tuple[str, ...] = (), tags: tuple[str, ...] = TAGS, forced: str = "") -> str:
    strainer = Strainer(stop, tags, forced)
    return strainer.forced() + "".join(strainer.push(part) for part in parts) + strainer.finish()


@given(text=st.text(" \na", max_size=20), at=cuts)
def test_a_trimmer_says_the_stripped_text_however_it_is_split(text, at):
    trimmer = Trimmer()
    assert "".join(trimmer.push(part) for part in split(text, at)) == text.strip()


@settings(max_examples=300)
@given(text=mixed, at=cuts, stop=st.sampled_from([(), ("STOP",), ("\n",), ("STOP", "TO"), ("a", "<"), ("aa", "aSTO")]))
def test_what_passes_does_not_depend_on_the_split(text, at, stop):
    assert strained(split(text, at), stop) == strained([text], stop) == strained(list(text), stop)


@settings(max_examples=300)
@given(text=mixed, at=cuts)
def test_no_tag_passes_not_even_one_put_together_from_pieces(text, at):
    out = strained(split(text, at))
    assert not any(tag in out for tag in TAGS)


@given(text=mixed, at=cuts, stop=st.sampled_from([("STOP",), ("\n",), ("a",), (" ",), ("STOP", "a", "<", "é")]))
def test_a_stop_string_never_leaves_an_answer_empty_that_has_something_to_read(text, at, stop):
    readable = strained(split(text, at))
    assert bool(strained(split(text, at), stop).strip()) == bool(readable.strip())


@given(at=cuts)
def test_the_answer_ends_before_the_stop_string(at):
    strainer = Strainer(("STOP",), TAGS)
    out = "".join(strainer.push(part) for part in split("one two STOP three", at))
    assert out == "one two"
    assert strainer.stopped
    assert strainer.finish() == ""


def test_a_stop_string_at_the_very_start_is_passed_over():
    assert strained(["\n\nSTOP it\nmore"], ("STOP", "\n")) == "STOP it"


def test_forced_text_begins_the_answer_and_is_not_searched_for_stop_strings():
    assert (
        strained(["42} done"], ("answer", " done"), forced="\n\nThe answer is \\boxed{") == "The answer is \\boxed{42}"
    )


def test_the_beginning_of_a_stop_string_waits_and_comes_out_at_the_end():
    strainer = Strainer(("STOP",), TAGS)
    assert strainer.push("fine ST") == "fine"
    assert strainer.finish() == " ST"


@given(text=mixed, more=mixed)
def test_silent_tells_what_will_be_readable(text, more):
    strainer = Strainer((), TAGS)
    strainer.push(text)
    assert strainer.silent(more) == (not strained([text + more]).strip())


# --- the end of thinking -------------------------------------------------------------------------------------------


def test_a_tag_that_is_one_token_is_found_by_its_id_and_never_by_its_letters():
    codec = Codec(byte_tokenizer())
    finder = TagFinder(codec, "</think>")
    letters = [codec.encode(letter)[0] for letter in "</think>"]
    assert [finder.push(i, codec.decode([i])) for i in letters] == [None] * 8
    assert finder.held == 0
    assert finder.push(4, "</think>") == TagFound(1, "", "")


plain = st.text("abé <>/think", max_size=20).filter(lambda text: "</think>" not in text)


@settings(deadline=None, max_examples=150)
@given(before=plain, after=plain)
def test_a_tag_in_plain_text_is_found_once_cut_exactly_and_none_of_it_is_free_before(before, after):
    if (before + "</think>").index("</think>") != len(before):
        return
    finder, pieces = TagFinder(CODEC, "</think>"), Pieces(CODEC)
    texts: list[str] = []
    for token in CODEC.encode(before + "</think>" + after):
        piece = pieces.push(token)
        texts.append(piece)
        found = finder.push(token, piece)
        if found is not None:
            kept = texts[: len(texts) - found.tokens]
            assert "".join(kept) + found.lead == before
            assert after.startswith(found.rest)
            return
        free = "".join(texts[: len(texts) - finder.held])
        assert before.startswith(free)
    raise AssertionError("the tag was not found")


def test_a_beginning_of_the_tag_is_held_and_let_go_when_it_was_none():
    finder = TagFinder(CODEC, "</think>")
    held = []
    for letter in "a</thin b":
        finder.push(9999, letter)
        held.append(finder.held)
    assert held == [0, 1, 2, 3, 4, 5, 6, 0, 0]


def test_without_a_tag_nothing_is_found_and_nothing_held():
    finder = TagFinder(CODEC, None)
    assert finder.push(7, "</think>") is None
    assert finder.held == 0


def test_a_tag_of_several_control_tokens_is_found_whole():
    tokens = ("<|end|>", "<|start|>", "<|channel|>", "<|message|>")
    codec = Codec(byte_level(special=("<|im_end|>", *tokens), plain=(), eos_token="<|im_end|>"))
    tag = "<|end|><|start|>assistant<|channel|>final<|message|>"
    finder, pieces = TagFinder(codec, tag), Pieces(codec)
    ids = codec.encode("so 4." + tag)
    found = [finder.push(i, pieces.push(i)) for i in ids]
    assert found[:-1] == [None] * (len(ids) - 1)
    assert found[-1] == TagFound(len(codec.encode(tag)), "", "")
