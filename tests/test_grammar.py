"""Grammars: what cannot be kept is refused, and what finishes under one is valid, whatever the model."""

import gc
import json
import math
import random
import re
import sys
from decimal import Decimal
from itertools import product
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import random_schemas
from llguidance.hf import from_tokenizer
from pydantic import BaseModel, SecretStr
from tokenizers_for_tests import byte_level, sentencepiece, word_level

from langchain_earlyexit import ChatEarlyExit, FunctionEngine
from langchain_earlyexit.codec import Codec, Pieces
from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.grammar import Grammars
from langchain_earlyexit.guide import Bounds, Guide
from langchain_earlyexit.schemas import checked
from langchain_earlyexit.toolcalls import FORMATS, calls_of

EXACT = jsonschema.Draft202012Validator
END_OF_TURN = 2
"""Of the byte tokenizer."""


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def rambling(tokenizer, seed=0):
    """A tiny model with random weights: an embedding of the last two tokens, and a head. It closes its thinking."""
    rng = np.random.default_rng(seed)
    size = len(tokenizer)
    embedding = rng.normal(size=(size, 16))
    head = rng.normal(size=(16, size))

    def next_logits(ids):
        return ((embedding[ids[-1]] + 0.5 * embedding[ids[-2]]) @ head).astype(np.float32)

    return next_logits


def takes_whole(grammar, text):
    """Whether `text` may be the whole answer."""
    way = grammar.start(text)
    return way is not None and (way.over or way.takes(END_OF_TURN))


class TestRefusals:
    @pytest.mark.parametrize(
        ("schema", "says"),
        [
            ({"type": "array", "uniqueItems": True}, "at #, the keyword 'uniqueItems'"),
            ({"const": 2**53 + 1}, "at #, the keyword 'const' holds 9007199254740993, an integer beyond"),
            ({"enum": [1, {"a": [-(2**53) - 1]}]}, "the keyword 'enum' holds -9007199254740993"),
            ({"type": "integer", "maximum": 2**63 - 1}, "the keyword 'maximum' holds 9223372036854775807"),
            ({"properties": {"a": {"not": {"type": "string"}}}}, "at #/properties/a, the keyword 'not'"),
            ({"anyOf": [{"type": "string"}, {"if": {}, "then": {}}]}, "at #/anyOf/1, the keyword 'if'"),
            ({"type": "array", "items": {"contains": {"type": "string"}}}, "at #/items, the keyword 'contains'"),
            ({"type": "array", "items": [{"type": "string"}]}, "use 'prefixItems'"),
            ({"properties": {"a": {"type": "string", "format": "phone"}}}, "at #/properties/a, Unknown format: phone"),
            (
                {"$defs": {"D": {"pattern": "(?!x)a", "type": "string"}}, "properties": {"a": {"$ref": "#/$defs/D"}}},
                "look-around",
            ),
            ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "at #/properties/a, oneOf"),
            ({"type": "object", "minProperties": 3}, "minProperties"),
            ({"type": "integer", "exclusiveMinimum": True}, "draft 4"),
            ({"$ref": "https://elsewhere.test/schema"}, "elsewhere.test"),
            ({"properties": {"a": {"$ref": "#/x/y"}}, "x": {"y": {}}}, "at #/properties/a, the keyword '$ref' holds"),
            ({"$ref": "#/x/y", "x": {"y": {"const": 2**53 + 1}}}, "put what it names under '$defs'"),
            ({"type": "integer", "minimum": 5, "maximum": 2}, "Unsatisfiable"),
            (
                {"required": ["a"], "patternProperties": {"^a$": {}}, "additionalProperties": False},
                "at #, the keyword 'patternProperties' allows no other names than those listed",
            ),
            (
                {"properties": {"ab": {}}, "patternProperties": {"^ab$": {}}, "additionalProperties": False},
                "put them under 'properties'",
            ),
            ([], "must be a JSON schema as a dict, not list"),
        ],
    )
    def test_a_keyword_that_cannot_be_enforced_is_named_with_its_place(self, schema, says):
        with pytest.raises(ValueError, match=re.escape(says)) as refused:
            checked(schema, "tool 'f'")
        assert "tool 'f'" in str(refused.value)

    @pytest.mark.parametrize("names", [True, {}, {"type": "string"}])
    def test_names_that_may_be_any_are_no_keyword(self, names):
        schema = {"type": "object", "additionalProperties": {"type": "integer"}}
        assert checked({**schema, "propertyNames": names}, "x") == schema
        with pytest.raises(ValueError, match="'propertyNames' is not supported"):
            checked({**schema, "propertyNames": {"enum": ["a"]}}, "x")

    def test_formats_that_any_text_has_are_let_go(self):
        class Files(BaseModel):
            where: Path
            key: SecretStr

        assert "format" not in json.dumps(checked(Files.model_json_schema(), "x"))

    def test_names_of_properties_are_not_keywords(self):
        tidy = checked({"properties": {"not": {"type": "string"}, "if": {"type": "integer"}}}, "x")
        assert set(tidy["properties"]) == {"not", "if"}

    @pytest.mark.parametrize(
        "ref", ["#", "#/$defs/D", "#/%24defs/D", "#/$defs/D/items", "#/properties/b", "#/properties/c/anyOf/1"]
    )
    def test_a_reference_to_any_schema_within_is_kept(self, ref):
        defs = {"D": {"type": "array", "items": {"type": "string"}}}
        others = {"b": {"type": "boolean"}, "c": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}
        schema = {"type": "object", "properties": {"a": {"$ref": ref}, **others}, "$defs": defs}
        assert checked(schema, "x")["properties"]["a"] == {"$ref": ref}

    @pytest.mark.parametrize("pattern", ["^a", "^(a|b)$"])
    def test_a_pattern_that_leaves_other_names_is_kept(self, pattern):
        schema = {"required": ["a"], "patternProperties": {pattern: {}}, "additionalProperties": False}
        assert checked(schema, "x") == schema

    def test_a_caller_cannot_loosen_the_grammar(self):
        assert "x-guidance" not in checked({"type": "string", "x-guidance": {"lenient": True}}, "x")

    def test_a_tokenizer_that_is_not_made_of_bytes_is_refused_by_name(self):
        tokenizer = word_level()
        with pytest.raises(ValueError, match="byte-level BPE"):
            Grammars(tokenizer, frozenset({1})).schema({"type": "string"}).start()


class TestBoundsOfNumbers:
    """Brute force: of many bounds, every number that a grammar lets through is valid as any JSON reader reads it."""

    PAIRS = (
        (-1.5, -1), (-1, -0.25), (-0.25, 0), (0, 0.001), (0, 0.5), (0, 1), (-0.5, 0.5), (1, 1.5), (1.5, 2), (2, 10),
        (0.30000000000000004, 0.75), (106.75000000000001, 111.00000000000001), (1.2345678901234567e-09, 1),
    )  # fmt: skip

    def texts(self):
        """Numbers at the bounds and next to them, to the last bit and beyond it."""
        values = {value for low, high in self.PAIRS for value in (low, (low + high) / 2, high)}
        near = {math.nextafter(value, side) for value in values for side in (-200, 200) if value} | values
        exact = {format(Decimal(repr(value)), "f") for value in near} | {"-0", "-0.0"}
        whole = set(map(str, (*range(-3, 12), 109)))
        return sorted(exact | whole | {text + ("0" if "." in text else ".") + "0" * 20 + "1" for text in exact})

    @pytest.mark.parametrize("kind", ["number", "integer"])
    def test_no_number_beyond_is_let_through(self, kind):
        texts = self.texts()
        grammars = Grammars(byte_tokenizer(), frozenset({END_OF_TURN}))
        lows, highs = ("minimum", "exclusiveMinimum", None), ("maximum", "exclusiveMaximum", None)
        for (least, most), low, high in product(self.PAIRS, lows, highs):
            bounds = {key: value for key, value in ((low, least), (high, most)) if key is not None}
            schema = {"type": kind, **bounds}
            valid = {text for text in texts if EXACT(schema).is_valid(json.loads(text))}
            if kind == "integer" and not valid:
                with pytest.raises(ValueError, match="Unsatisfiable"):
                    checked(schema, "x")
                continue
            grammar = grammars.schema(checked(schema, "x"))
            taken = {text for text in texts if takes_whole(grammar, text)}
            assert taken <= valid, schema
            assert taken or not valid, schema

    def test_numbers_in_between_can_still_be_written(self):
        grammars = Grammars(byte_tokenizer(), frozenset({END_OF_TURN}))
        grammar = grammars.schema(checked({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "x"))
        for text in ("0.5", "0.25", "0.001", "0.000000001", "0.4999999999999999"):
            assert takes_whole(grammar, text)


class TestGrammars:
    @pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
    @pytest.mark.parametrize("make", [byte_tokenizer, byte_level, sentencepiece], ids=["bytes", "bpe", "fallback"])
    def test_calls_are_allowed_as_the_format_writes_them_and_nothing_else_is(self, form, make):
        tokenizer = make()
        end = "</s>" if make is sentencepiece else "<|im_end|>"
        grammars = Grammars(tokenizer, frozenset({tokenizer.convert_tokens_to_ids(end)}))
        schema = checked({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "add")
        tools = [
            {"name": "add", "parameters": schema},
            {"name": "add_more", "parameters": checked({"properties": {}}, "x")},
        ]
        calls = [{"name": "add", "arguments": {"a": -12}}, {"name": "add_more", "arguments": {}}]
        calls = calls[: 1 if form.between is None else 2]
        text, alone = (form.text(some).removesuffix(form.end) for some in (calls, calls[:1]))
        after = text.removeprefix(form.trigger)
        grammar = grammars.calls(form, tools, parallel=True)
        assert grammar.start(after) is not None
        for wrong in (after.replace("-12", '"12"'), after.replace("add", "sub"), after.replace('"a"', '"b"'), "x"):
            assert grammar.start(wrong) is None
        single = grammars.calls(form, tools, parallel=False)
        assert single.start(alone.removeprefix(form.trigger)).over
        either = grammars.calls(form, tools, parallel=True, otherwise={"type": "boolean"})
        assert either.start("true").over
        assert either.start(text) is not None

    @pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
    def test_after_a_call_the_model_is_free_and_what_begins_no_other_ends_the_calls(self, form):
        tokenizer = byte_tokenizer()
        codec = Codec(tokenizer, (END_OF_TURN,))
        tools = [{"name": "add", "parameters": checked({"properties": {"a": {"type": "integer"}}}, "add")}]
        grammar = Grammars(tokenizer, codec.eos).calls(form, tools, parallel=True)
        call = {"name": "add", "arguments": {"a": 1}}
        one, two = (form.text([call] * number).removesuffix(form.end) for number in (1, 2))

        def told(text):
            guide, pieces = Guide(Bounds(grammar, form, said=form.lead), codec), Pieces(codec)
            calls = []
            for token in codec.encode(text.removeprefix(form.opening)):
                calls += guide.push(token, pieces.push(token))[1]
                if guide.over:
                    break
            return guide, calls_of(calls)

        for tail in (form.end or "Done.", "\n" + form.end + "\n.", "Done.", "\n<b>"):
            guide, calls = told(one + tail)
            assert (guide.over, calls) == (True, (call,))
        if form.between is not None:
            guide, calls = told(one + "\n")
            assert (guide.over, guide.allowed(), guide.forced(), calls) == (False, None, (), (call,))
            assert told(two)[1] == told(one + "\n\n" + two.removeprefix(one).lstrip())[1] == (call, call)

    def test_a_mask_holds_just_the_ids_that_can_come_next(self):
        tokenizer = byte_tokenizer()
        grammar = Grammars(tokenizer, frozenset({tokenizer.eos_token_id})).schema({"enum": ["ab", "ac"]})
        bits = np.unpackbits(np.frombuffer(grammar.start('"a').allowed(), np.uint8), bitorder="little")
        assert tokenizer.decode(np.flatnonzero(bits)) == "bc"
        assert np.flatnonzero(
            np.unpackbits(np.frombuffer(grammar.start('"ab"').allowed(), np.uint8), bitorder="little")
        ) == [tokenizer.eos_token_id]


def test_closed_models_leave_nothing_of_their_tokenizers_behind(monkeypatch):
    read = []
    monkeypatch.setattr(
        "langchain_earlyexit.grammar.from_tokenizer",
        lambda *args, **named: read.append(from_tokenizer(*args, **named)) or read[-1],
    )
    TestNumbersEnd().said({"type": "number", "minimum": 7.5, "maximum": 9.375})
    gc.collect()
    [reader] = read
    del read[:]
    assert sys.getrefcount(reader) == 2  # our name for it, and the argument


class TestControlTokens:
    """`</think>` is one of the byte tokenizer."""

    @pytest.mark.parametrize(
        "schema",
        [
            {"const": {"title": "a</think>b"}},
            {"enum": [1, {"default": ["</think>"]}]},
            {"const": {"x</think>": 1}},
            {"properties": {"</think>": {"type": "string"}}},
            {"properties": {"title": {"const": "</think>"}}},
            {"type": "object", "required": ["</think>"]},
            {"type": "object", "patternProperties": {"^</think>": {"type": "string"}}},
            {"type": "array", "items": {"pattern": "^</think>$", "type": "string"}},
            {"$ref": "#/$defs/D", "$defs": {"D": {"const": "</think>"}}},
        ],
        ids=str,
    )
    def test_that_an_answer_would_have_to_spell_are_refused_before_it_begins(self, schema):
        grammars = Grammars(byte_tokenizer(), frozenset({END_OF_TURN}))
        with pytest.raises(ValueError, match="'</think>' is a control token"):
            grammars.schema(checked(schema, "x"))

    @pytest.mark.parametrize(
        "said",
        [
            {"examples": ["a</think>b"]},
            {"default": {"x": "</think>", "y": ["</think>"]}},
            {"title": "</think>", "description": "</think>", "$comment": "</think>"},
        ],
        ids=str,
    )
    def test_that_no_answer_has_to_spell_do_no_harm(self, said):
        grammars = Grammars(byte_tokenizer(), frozenset({END_OF_TURN}))
        inner = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"], **said}
        grammar = grammars.schema(checked({"type": "array", "items": inner, **said}, "x"))
        assert takes_whole(grammar, '[{"x": "b"}]')


def fond_of_digits(tokenizer, digit="3"):
    """A model that writes a 3, or another digit, wherever it may."""
    logits = np.zeros(len(tokenizer), dtype=np.float32)
    logits[tokenizer(digit, add_special_tokens=False)["input_ids"]] = 30.0
    return lambda ids: logits


class TestNumbersEnd:
    """Bounds alone do not make a number finite: 8.333… has no last digit."""

    def said(self, schema, tokenizer=None, digit="3", **asked):
        tokenizer = tokenizer or byte_tokenizer()
        with ChatEarlyExit(
            engine=FunctionEngine(fond_of_digits(tokenizer, digit), tokenizer), thinking_budget=0
        ) as llm:
            asked = asked or {"response_format": response_format(schema)}
            message = llm.invoke("?", **asked, max_tokens=300)
        assert message.response_metadata["finish_reason"] in {"stop", "tool_calls"}
        return message

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "number", "minimum": 7.5, "maximum": 9.375},
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            {"type": "integer"},
        ],
        ids=["bounded", "two", "integer"],
    )
    @pytest.mark.parametrize("tokens", ["bytes", "words"])
    def test_once_it_tells_a_double_from_its_neighbours(self, schema, tokens):
        tokenizer = byte_tokenizer() if tokens == "bytes" else byte_level(eos_token="<|im_end|>")  # noqa: S106
        text = self.said(schema, tokenizer).content
        EXACT(schema).validate(json.loads(text))
        assert max(map(len, re.findall(r"\d+", text))) <= 17

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
            {"type": "number", "exclusiveMinimum": 1},
            {"type": "number", "minimum": -1, "exclusiveMaximum": 0},
        ],
        ids=str,
    )
    def test_beyond_an_excluded_bound_that_zeros_would_come_ever_nearer_to(self, schema):
        EXACT(schema).validate(json.loads(self.said(schema, digit="0").content))

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "string", "pattern": "^3{40}$"},
            {"type": "string", "minLength": 40, "maxLength": 40},
            {"type": "integer", "minimum": 3000000000000000000, "maximum": 3999999999999999488},
        ],
        ids=["pattern", "string", "large"],
    )
    def test_unless_the_schema_wants_more_digits_or_they_are_no_number(self, schema):
        text = self.said(schema).content
        EXACT(schema).validate(json.loads(text))
        assert len(re.search(r"\d+", text)[0]) > 17

    @pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
    def test_in_the_arguments_of_a_call_as_well(self, form):
        tokenizer = byte_tokenizer()
        added = [token for token in (form.trigger, "<｜tool▁sep｜>") if token.startswith("<")]
        tokenizer.add_tokens([token for token in added if token not in tokenizer.get_vocab()])
        digits = tokenizer("3" * 40, add_special_tokens=False)["input_ids"]
        schema = checked({"properties": {"x": {"type": "number"}, "t": {"type": "string"}}, "required": ["x"]}, "f")
        grammars = Grammars(tokenizer, frozenset({tokenizer.eos_token_id}))
        grammar = grammars.calls(form, [{"name": "f", "parameters": schema}], parallel=False)
        for begun, free in (('{"x": ', False), ('{"x": 1, "t": "', True)):
            matcher = grammar.start(form.lead + form.named("f") + form.middle + begun)
            for place, token in enumerate(digits):
                mask = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")
                assert bool(mask[token]) == (free or place < 17)
                if not mask[token]:
                    break
                matcher.push(token)


class TestWhatFinishesIsValid:
    def test_300_random_bounded_schemas_on_a_model_of_random_weights(self):
        tokenizer = byte_tokenizer()
        rng = random.Random(20)
        with ChatEarlyExit(
            engine=FunctionEngine(rambling(tokenizer), tokenizer), temperature=1.0, thinking_budget=3
        ) as llm:
            schemas = [random_schemas.schema(rng) for _ in range(300)]
            for seed, schema in enumerate(schemas):
                message = llm.invoke("?", response_format=response_format(schema), seed=seed, max_tokens=4000)
                assert message.response_metadata["finish_reason"] == "stop", schema
                EXACT(schema, format_checker=EXACT.FORMAT_CHECKER).validate(json.loads(message.content))
                assert "think>" not in message.content

    def test_unbounded_schemas_are_valid_or_honestly_cut(self):
        tokenizer = byte_tokenizer()
        rng = random.Random(21)
        ends = set()
        with ChatEarlyExit(
            engine=FunctionEngine(rambling(tokenizer), tokenizer), temperature=1.0, thinking_budget=3
        ) as llm:
            for seed in range(30):
                schema = random_schemas.schema(rng, bounded=False)
                message = llm.invoke("?", response_format=response_format(schema), seed=seed, max_tokens=150)
                ends.add(message.response_metadata["finish_reason"])
                if message.response_metadata["finish_reason"] == "stop":
                    EXACT(schema).validate(json.loads(message.content))
        assert ends == {"stop", "length"}

    def test_arguments_of_forced_calls_on_a_model_of_random_weights(self):
        tokenizer = byte_tokenizer()
        rng = random.Random(22)
        with ChatEarlyExit(
            engine=FunctionEngine(rambling(tokenizer), tokenizer), temperature=1.0, thinking_budget=3
        ) as llm:
            for seed in range(30):
                schema = random_schemas.obj(rng, 2, True)
                tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
                message = llm.invoke("?", tools=[tool], tool_choice="f", seed=seed, max_tokens=4000)
                [call] = message.tool_calls
                EXACT(schema).validate(call["args"])
                assert message.content == ""
