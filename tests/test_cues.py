import json
import re
import time
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from langchain_earlyexit.cues import CueMatcher, CueSpec, Hit

WORDS = ("wait", "hmm", "but wait", "let me check", "alternatively", "等等", "不对")
REFLECTION = frozenset({"reflection"})


def feed(matcher, pieces):
    """All hits of these tokens, each token with id 0."""
    return [hit for piece in pieces if (hit := matcher.push(0, piece))]


def hits(pieces, kinds="reflection", **spec):
    return feed(CueMatcher(CueSpec(**{"words": WORDS, **spec}), frozenset(kinds.split())), pieces)


def cuts(pieces, **spec):
    """What is kept of the text at each hit."""
    return ["".join(pieces[: hit.position]) for hit in hits(pieces, **spec)]


# reflection words


@pytest.mark.parametrize(
    "pieces",
    [
        ["so 5", ".", " Wait", ","],
        ["so 5", ".", " ", "Wait", ","],
        ["so 5", ".", " W", "ai", "t", ","],
        ["so 5", ".", " w", "a", "i", "t,"],
        ["so 5", ".", "\nWAIT", " no"],
        ["so 5", ".", " wait, what"],
        ["so 5", ".", " wait", "'s"],
    ],
)
def test_the_whole_cue_is_dropped_however_it_is_split(pieces):
    assert [cut.rstrip() for cut in cuts(pieces)] == ["so 5."]
    assert [hit.cue for hit in hits(pieces)] == ["wait"]


def test_a_token_that_brings_text_before_the_cue_goes_with_it():
    # tokens are kept whole or not at all: half a word before the end of thinking is what the codes leave
    assert hits(["5", ". W", "ait", "!"]) == [Hit(1, "wait", "reflection")]


@pytest.mark.parametrize("word", ["waiting", "awaiting", "waiter", "await", "wait_", "wait2", "swait", "hmmm", "waité"])
def test_a_cue_inside_a_longer_word_does_not_fire(word):
    assert hits(["I am ", word, " here."]) == []
    assert hits(["I am ", *word, " here."]) == []


def test_a_cue_fires_when_its_right_edge_comes_and_cuts_before_itself():
    matcher = CueMatcher(CueSpec(WORDS), REFLECTION)
    assert [matcher.push(0, piece) for piece in ("5", " Wait")] == [None, None]
    assert matcher.push(0, ",") == Hit(1, "wait", "reflection")


def test_a_cue_with_nothing_before_it_is_no_check():
    assert hits(["Wait", ", no. ", "Wait", ","]) == [Hit(2, "wait", "reflection")]


def test_the_earliest_start_wins_and_takes_the_whole_cue():
    assert hits(["5", " but", " wait", ","]) == [Hit(1, "but wait", "reflection")]
    assert hits(["5", " but", " so", " wait", ","]) == [Hit(3, "wait", "reflection")]


def test_a_longer_cue_that_may_yet_come_goes_before_a_shorter_one():
    spec = {"words": ("let me", "let me check", "me")}
    assert hits(["5", " let", " me", " check", "!"], **spec) == [Hit(1, "let me check", "reflection")]
    assert hits(["5", " let", " me", " see", "!"], **spec) == [Hit(1, "let me", "reflection")]


def test_a_cue_inside_a_longer_one_that_fails_is_found():
    assert hits(["5", " let me", " wait", "!"]) == [Hit(2, "wait", "reflection")]


def test_words_of_a_cue_are_one_space_apart():
    assert hits(["5", " but  waits."]) == []
    assert hits(["5", " let", " me", "\ncheck."]) == []


def test_a_cue_without_an_ascii_edge_needs_no_boundary_and_fires_at_once():
    matcher = CueMatcher(CueSpec(WORDS), REFLECTION)
    assert feed(matcher, ["答案是五"]) == []
    assert matcher.push(0, "等等") == Hit(1, "等等", "reflection")
    assert hits(["五", "我等等看"]) == [Hit(1, "等等", "reflection")]


def test_a_letter_split_over_byte_tokens_is_dropped_whole():
    matcher = CueMatcher(CueSpec(WORDS), REFLECTION)
    assert feed(matcher, ["答", "", ""]) == []
    assert matcher.held == 2
    assert feed(matcher, ["等", "", "", "等"]) == [Hit(1, "等等", "reflection")]


def test_a_token_id_is_a_cue_with_or_without_text():
    matcher = CueMatcher(CueSpec(token_ids=(7,)), REFLECTION)
    assert [matcher.push(i, p) for i, p in ((1, "5"), (7, ""), (2, "so"), (7, "<reflect>"))] == [
        None,
        Hit(1, "", "reflection"),
        None,
        Hit(3, "<reflect>", "reflection"),
    ]


def test_a_token_id_is_the_right_edge_of_a_word_before_it():
    matcher = CueMatcher(CueSpec(WORDS, token_ids=(7,)), REFLECTION)
    assert feed(matcher, ["5", " wait"]) == []
    assert matcher.push(7, "") == Hit(1, "wait", "reflection")
    assert matcher.push(0, "x") == Hit(2, "", "reflection")


def test_several_hits_of_one_token_are_returned_one_a_call():
    matcher = CueMatcher(CueSpec(WORDS, interval=3), frozenset({"reflection", "paragraph", "interval"}))
    assert feed(matcher, ["5", ".\n\n"]) == [Hit(2, "\n\n", "paragraph")]
    assert matcher.push(0, "Wait, hmm") == Hit(2, "wait", "reflection")
    assert matcher.held == 1  # "hmm" may go on, and would drop the third token
    assert matcher.push(0, "mm") == Hit(3, "3 tokens", "interval")


def test_the_same_kind_counts_once_at_a_position():
    assert hits(["5", " wait, wait, wait,", " wait,"]) == [Hit(1, "wait", "reflection"), Hit(2, "wait", "reflection")]


def test_kinds_not_asked_for_are_not_reported():
    assert hits(["5.\n\n", "Wait, "], "paragraph") == [Hit(1, "\n\n", "paragraph")]
    assert hits(["5.\n\n", "Wait, "], "") == []


# what must be held back from a stream


def test_tokens_that_may_begin_a_cue_are_held_until_it_is_decided():
    matcher = CueMatcher(CueSpec(WORDS), REFLECTION)
    held = []
    for piece in ("so", " we", " w", "a", "sh", " wait", ",", " b", "ut", " w", "e"):
        matcher.push(0, piece)
        held.append(matcher.held)
    assert held == [0, 0, 1, 2, 0, 1, 0, 1, 2, 3, 0]


def test_nothing_is_held_for_kinds_that_keep_their_delimiter():
    matcher = CueMatcher(CueSpec(WORDS), frozenset({"paragraph", "sentence", "interval"}))
    for piece in ("Wait", ".", "\n", "\n", "wait"):
        matcher.push(0, piece)
        assert matcher.held == 0


# the other kinds


@pytest.mark.parametrize(
    ("pieces", "positions"),
    [
        (["a", "\n\n", "b"], [2]),
        (["a", ".\n", "\n", "b"], [3]),
        (["a", "\n", "", "\n", "b"], [4]),
        (["a", "\n\n\n", "\n\n", "b"], [2]),
        (["a", "\n", "b", "\n", "c"], []),
        (["a\n\nb", "\n\n"], [1, 2]),
        (["\n\n", "a"], [1]),
    ],
)
def test_a_paragraph_is_kept_through_its_second_newline(pieces, positions):
    assert [hit.position for hit in hits(pieces, "paragraph")] == positions


@pytest.mark.parametrize(
    ("pieces", "positions"),
    [
        (["It is 5", ".", " So"], [2]),
        (["It is 5.", " So"], [1]),
        (["He said ", '"no', '."', " So"], [3]),
        (["He said ", '"no', ".", '")', "\n", "So"], [4]),
        (["3", ".", "5", " apples"], []),
        (["Why", "?!", " So"], [2]),
        (["Why", "...", "", " So"], [2]),
        (["It ends", "."], []),
        (["One. Two", ". "], [1, 2]),
    ],
)
def test_a_sentence_is_kept_through_its_last_punctuation(pieces, positions):
    assert [hit.position for hit in hits(pieces, "sentence")] == positions


def test_a_sentence_names_its_mark_also_when_quotes_follow_it():
    assert [hit.cue for hit in hits(["Why?", " So"], "sentence")] == ["?"]
    assert [hit.cue for hit in hits(['"No!', '"', ")", " So. So"], "sentence")] == ["!"]


def test_intervals_are_exact_multiples():
    assert [hit.position for hit in hits(["x"] * 10, "interval", interval=3)] == [3, 6, 9]


def test_an_interval_inside_a_word_that_may_be_a_cue_waits_for_it():
    kinds = "reflection interval"
    cue = ["5", " let", " me", " check", "!", "x"]
    assert hits(cue, kinds, interval=3) == [Hit(1, "let me check", "reflection"), Hit(3, "3 tokens", "interval")]
    no_cue = ["5", " let", " me", " see", "!"]
    assert hits(no_cue, kinds, interval=3) == [Hit(3, "3 tokens", "interval")]


def test_checks_keep_their_minimum_gap_whatever_their_kind():
    pieces = ["a", " wait", ",\n\n", "b", " wait", ", ", "wait", ","]
    assert [hit.position for hit in hits(pieces, "reflection paragraph")] == [1, 3, 4, 6]
    assert [hit.position for hit in hits(pieces, "reflection paragraph", min_gap=3)] == [1, 4]


# whatever the split, the same cues


BITS_OF_CUES = ["wait", "Wait", "awaiting", "but ", "But wait", "let me ", "let me check", "hmm", "m", "等等", "等"]
BITS_BETWEEN = [" ", ",", ".", '."', "?", "3.5", "\n", "\n\n", "_", "x", "é"]
fragments = st.sampled_from(BITS_OF_CUES) | st.sampled_from(BITS_BETWEEN)


@st.composite
def tokenised(draw):
    """Pieces of a text cut anywhere; before a letter that is not ASCII, tokens that bring no text."""
    text = "".join(draw(st.lists(fragments, max_size=14))) + "\x01"  # the last character decides every edge
    pieces = []
    while text:
        n = draw(st.integers(1, 9))
        silent = draw(st.integers(0, 2)) if not text[0].isascii() else 0
        pieces += [""] * silent + [text[:n]]
        text = text[n:]
    return pieces


def expected(pieces, words, interval):
    """The same by the book: the whole text at once, every kind, as (position, kind, cue)."""
    text = "".join(pieces)
    first, last, silent = [], [], 0  # per character: tokens before the one it begins in, tokens through it
    for i, piece in enumerate(pieces):
        for j, char in enumerate(piece):
            first.append(i - silent if j == 0 and not char.isascii() else i)
            last.append(i + 1)
        silent = 0 if piece else silent + 1

    def word_char(i):
        return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")

    def stands_at(word, i):
        ascii_left, ascii_right = word[0].isascii(), word[-1].isascii()
        return (
            text[i : i + len(word)].lower() == word
            and not (ascii_left and word_char(i - 1))
            and not (ascii_right and word_char(i + len(word)))
        )

    found, i = [], 0
    while i < len(text):
        here = max((word for word in words if stands_at(word, i)), key=len, default=None)
        if here:
            found.append((first[i], "reflection", here))
        i += len(here) if here else 1
    for i, char in enumerate(text):
        if text[max(0, i - 1) : i + 1] == "\n\n" and text[max(0, i - 2) : i] != "\n\n":
            found.append((last[i], "paragraph", "\n\n"))
        before = text[:i].rstrip("\"'”’»)]}*")
        if char.isspace() and before and before[-1] in ".!?":
            found.append((last[i - 1], "sentence", before[-1]))
    found += [(n, "interval", f"{interval} tokens") for n in range(interval, len(pieces) + 1, interval)]
    unique = {}
    for position, kind, cue in sorted(found, key=lambda hit: hit[0]):
        if position >= 1:
            unique.setdefault((position, kind), cue)
    return unique


@given(tokenised(), st.integers(1, 6), st.sets(st.sampled_from(["reflection", "paragraph", "sentence", "interval"])))
@example(["等等", "\n", "\n等", "", "等", "\x01"], 2, {"reflection", "paragraph"})
def test_a_stream_cut_anywhere_has_the_cues_of_the_whole_text(pieces, interval, kinds):
    matcher = CueMatcher(CueSpec(WORDS, interval=interval), frozenset(kinds))
    got, released = [], 0
    for n, piece in enumerate(pieces + [""] * 40):  # the last, without text, bring out what is still to return
        hit = matcher.push(0, piece)
        if hit:
            assert hit.position >= released, "a hit drops a token that may have been streamed"
            assert not got or hit.position >= got[-1].position, "positions go down"
            got.append(hit)
        assert 0 <= matcher.held <= n + 1
        released = max(released, n + 1 - matcher.held)
    want = {key: cue for key, cue in expected(pieces, WORDS, interval).items() if key[1] in kinds}
    assert {(h.position, h.kind): h.cue for h in got if h.position <= len(pieces)} == want


@given(tokenised(), st.integers(0, 6))
def test_a_minimum_gap_only_leaves_hits_out(pieces, gap):
    every, kept = hits(pieces), hits(pieces, min_gap=gap)
    for hit in every:
        assert hit in kept or any(0 <= hit.position - k.position < gap for k in kept)
    assert all(b.position - a.position >= gap for a, b in pairwise(kept))


@given(tokenised(), st.sets(st.sampled_from(["reflection", "paragraph", "sentence", "interval"]), min_size=1))
@example(["w", "ait", "aitwait w", "ait\x01"], {"reflection"})
@example(["   But ", "waitBut w", "ait", "\x01"], {"reflection"})
def test_a_hit_ends_with_the_first_token_by_which_the_whole_cue_is_there(pieces, kinds):
    matcher = CueMatcher(CueSpec(WORDS, interval=5), frozenset(kinds))
    for hit in feed(matcher, pieces + [""] * 40):
        if hit.kind == "reflection":
            # Within a word it is no cue, and the last of several there is this one: those before it were others' part.
            cue = re.compile(rf"(?<!\w){hit.cue}(?!\w)" if hit.cue.isascii() else hit.cue)
            begin, before = (len("".join(pieces[:n]).casefold()) for n in (hit.position, hit.end - 1))
            found = list(cue.finditer("".join(pieces[: hit.end]).casefold(), begin))
            assert found
            assert found[-1].end() > before
        else:
            assert hit.end == hit.position


def test_a_cue_that_is_one_token_by_itself_ends_with_it():
    matcher = CueMatcher(CueSpec(token_ids=(7,)), REFLECTION)
    matcher.push(0, "5")
    hit = matcher.push(7, "")
    assert (hit.position, hit.end) == (1, 2)


# the spec


def test_a_spec_survives_json():
    spec = CueSpec(("wait", "等等"), "interval", 32, 8, (5, 6))
    assert CueSpec(**json.loads(json.dumps(asdict(spec)))) == spec


def test_words_or_token_ids_are_the_main_decision_points_else_the_fallback():
    assert CueSpec(("wait",)).primary == CueSpec(token_ids=(7,)).primary == {"reflection"}
    assert CueSpec().primary == {"paragraph"}
    assert CueSpec(fallback="interval").primary == {"interval"}
    assert CueSpec().offered == {"paragraph", "sentence", "interval"}
    assert CueSpec(("wait",)).offered == {"reflection", "paragraph", "sentence", "interval"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("",)}, "outer whitespace"),
        ({"words": (" wait",)}, "outer whitespace"),
        ({"words": "wait"}, "sequence of strings"),
        ({"fallback": "sentence"}, "fallback must be one of paragraph, interval"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"min_gap": -1}, "min_gap must not be negative"),
    ],
)
def test_a_bad_spec_is_a_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        CueSpec(**fields)


def test_a_kind_the_spec_does_not_offer_is_a_clear_error():
    with pytest.raises(ValueError, match=r"cannot find \['reflection'\]"):
        CueMatcher(CueSpec(), REFLECTION)


def test_a_long_chain_costs_the_same_per_token_throughout():
    # a matcher that searched all the text again would take minutes for this
    matcher = CueMatcher(CueSpec(WORDS), frozenset({"reflection", "paragraph", "sentence", "interval"}))
    start = time.perf_counter()
    feed(matcher, ["so", " we", " take", " 37", "."] * 40_000)
    assert time.perf_counter() - start < 20
