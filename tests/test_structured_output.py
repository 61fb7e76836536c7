"""with_structured_output and response_format: thinking runs free, the answer is the value."""

import functools
import json
import operator
import re
from typing import TypedDict

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from pydantic import BaseModel, Field, RootModel, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from tokenizers_for_tests import byte_level

from langchain_earlyexit import DEER, ChatEarlyExit, FunctionEngine
from langchain_earlyexit.asks import Asks
from langchain_earlyexit.engines.function import CHAT_TEMPLATE, byte_tokenizer, scripted
from langchain_earlyexit.guide import Guide
from langchain_earlyexit.schemas import strictly
from langchain_earlyexit.toolcalls import HERMES

THINKING = "A sum is asked for.\n\nIt is 12.\n\nI say so in JSON."
VALUE = {"total": 12, "why": "5 + 7"}
METHODS = ["function_calling", "json_schema", "json_mode"]


class Sum(BaseModel):
    """The sum of two numbers."""

    total: int = Field(description="the sum")
    why: str = Field(max_length=20)


class SumV1(BaseModelV1):
    """The sum of two numbers."""

    total: int
    why: str


class SumDict(TypedDict):
    """The sum of two numbers."""

    total: int
    why: str


AS_JSON = {"title": "Sum", "description": "The sum.", **Sum.model_json_schema()}


def model(answer=None, **settings):
    """Answers with the value, as text or as a call, whichever its turn asks for."""
    tokenizer = byte_tokenizer()

    def either(ids):
        prompt = tokenizer.decode(ids)
        name = next((name for name in ("SumV1", "SumDict", "Sum") if f'"name": "{name}"' in prompt), None)
        text = json.dumps(VALUE) if name is None else HERMES.text([{"name": name, "arguments": VALUE}])
        return scripted(tokenizer, THINKING, answer or text)(ids)

    return ChatEarlyExit(engine=FunctionEngine(either, tokenizer), seed=1, **settings)


def record(message):
    return message.response_metadata["early_exit"]


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    @pytest.mark.parametrize("schema", [Sum, SumV1, SumDict, AS_JSON], ids=["pydantic", "v1", "typeddict", "json"])
    async def test_the_value_is_of_the_schema_s_kind(self, method, schema):
        wanted = schema(**VALUE) if isinstance(schema, type) and schema is not SumDict else VALUE
        chain = model().with_structured_output(schema, method=method)
        assert chain.invoke("5 + 7?") == wanted
        assert await chain.ainvoke("5 + 7?") == wanted
        assert list(chain.stream("5 + 7?"))[-1] == wanted

    def test_the_raw_message_comes_along_where_asked(self, method):
        told = model().with_structured_output(Sum, method=method, include_raw=True).invoke("5 + 7?")
        assert told["parsed"] == Sum(**VALUE)
        assert told["parsing_error"] is None
        assert record(told["raw"])["reason"] == "natural"
        assert "think>" not in told["raw"].content
        assert told["raw"].additional_kwargs["reasoning_content"] == THINKING

    def test_an_answer_that_was_cut_off_is_an_error_and_never_half_a_value(self, method):
        cap = 45 if method == "function_calling" else 25
        chain = model(max_tokens=cap, thinking_budget=4).with_structured_output(Sum, method=method)
        with pytest.raises(OutputParserException, match="cut off"):
            chain.invoke("5 + 7?")
        chain = model(max_tokens=cap, thinking_budget=4).with_structured_output(Sum, method=method, include_raw=True)
        told = chain.invoke("5 + 7?")
        assert (told["parsed"], type(told["parsing_error"])) == (None, OutputParserException)
        assert told["raw"].response_metadata["finish_reason"] == "length"

    @pytest.mark.parametrize("schema", [Sum, AS_JSON], ids=["pydantic", "json"])
    async def test_a_stream_that_was_cut_off_ends_as_invoke_does(self, method, schema):
        cap = 45 if method == "function_calling" else 25
        llm = model(max_tokens=cap, thinking_budget=4)
        chain, shown = llm.with_structured_output(schema, method=method), []
        with pytest.raises(OutputParserException, match="cut off"):
            shown += chain.stream("5 + 7?")
        with pytest.raises(OutputParserException, match="cut off"):
            shown += [value async for value in chain.astream("5 + 7?")]
        assert not any(isinstance(value, Sum) for value in shown)

        chain = llm.with_structured_output(schema, method=method, include_raw=True)
        parts = [*chain.stream("5 + 7?")], [part async for part in chain.astream("5 + 7?")]
        for told in (functools.reduce(operator.add, each) for each in parts):
            assert (told["parsed"], type(told["parsing_error"])) == (None, OutputParserException)
            assert told["raw"].response_metadata["finish_reason"] == "length"

    async def test_a_stream_with_the_raw_message_adds_up_to_what_invoke_gives(self, method):
        chain = model().with_structured_output(Sum, method=method, include_raw=True)
        parts = [*chain.stream("5 + 7?")], [part async for part in chain.astream("5 + 7?")]
        for told in (functools.reduce(operator.add, each) for each in parts):
            assert (told["parsed"], told["parsing_error"]) == (Sum(**VALUE), None)
            assert told["raw"].additional_kwargs["reasoning_content"] == THINKING

    def test_a_message_that_comes_in_one_piece_streams_its_value(self, method):
        assert list(model(disable_streaming=True).with_structured_output(Sum, method=method).stream("5 + 7?")) == [
            Sum(**VALUE)
        ]

    def test_a_policy_can_stop_the_thinking(self, method):
        llm = model(exit_policy=DEER(threshold=0.9), temperature=0, include_checks=True)
        told = llm.with_structured_output(Sum, method=method, include_raw=True).invoke("5 + 7?")
        assert told["parsed"] == Sum(**VALUE)
        assert record(told["raw"])["reason"] == "confident"
        trial = json.loads(record(told["raw"])["trace"]["checks"][0]["answer"])
        assert trial == ({"name": "Sum", "arguments": VALUE} if method == "function_calling" else VALUE)

    def test_a_validator_of_the_model_s_own_is_heard(self, method):
        class Small(Sum):
            """The sum of two numbers."""

            @field_validator("total")
            @classmethod
            def below_ten(cls, value):
                if value >= 10:
                    raise ValueError("ten or more")
                return value

        answer = HERMES.text([{"name": "Small", "arguments": VALUE}]) if method == "function_calling" else None
        with pytest.raises(OutputParserException, match="ten or more"):
            model(answer).with_structured_output(Small, method=method).invoke("5 + 7?")


class Numbers(RootModel[list[int]]):
    """Numbers."""


NUMBERS = {"title": "Numbers", "type": "array", "items": {"type": "integer"}}


class TestValuesThatAreNoObjects:
    @pytest.mark.parametrize(
        ("schema", "wanted"), [(Numbers, Numbers([1, 2])), (NUMBERS, [1, 2])], ids=["pydantic", "json"]
    )
    def test_are_the_answer_s_text(self, schema, wanted):
        chain = model("[1, 2]").with_structured_output(schema, method="json_schema")
        assert chain.invoke("?") == wanted
        assert list(chain.stream("?"))[-1] == wanted

    @pytest.mark.parametrize("method", ["function_calling", "json_mode"])
    @pytest.mark.parametrize("schema", [Numbers, NUMBERS], ids=["pydantic", "json"])
    def test_are_refused_where_only_an_object_can_be_written(self, schema, method):
        with pytest.raises(
            ValueError, match=r"writes a JSON object, but .* of type 'array'; take method='json_schema'"
        ):
            model().with_structured_output(schema, method=method)

    @pytest.mark.parametrize("tool", [Numbers, NUMBERS], ids=["pydantic", "json"])
    def test_are_no_arguments_of_a_tool(self, tool):
        with pytest.raises(ValueError, match=r"tool 'Numbers' takes a value of type 'array'.*always an object"):
            model().bind_tools([tool])

    def test_are_not_guessed_from_half_a_number(self):
        chain = model("123456", max_tokens=3, thinking_budget=0).with_structured_output(
            {"title": "Number", "type": "integer"}, method="json_schema"
        )
        with pytest.raises(OutputParserException, match="cut off"):
            chain.invoke("?")
        with pytest.raises(OutputParserException, match="cut off"):
            list(chain.stream("?"))


@pytest.mark.parametrize("method", METHODS)
def test_an_object_with_keys_of_any_name_holds_them(method):
    schema = {"title": "Sum", "type": "object", "additionalProperties": {"type": "integer"}}
    text = json.dumps({"a": 1, "b": 2})
    answer = HERMES.text([{"name": "Sum", "arguments": text}]) if method == "function_calling" else text
    assert model(answer).with_structured_output(schema, method=method).invoke("?") == {"a": 1, "b": 2}


class TestFormats:
    def test_a_model_that_would_not_is_held_to_the_schema(self):
        chain = model("I would rather talk about the weather.", max_tokens=600)
        message = chain.invoke("5 + 7?", response_format={"type": "json_schema", "json_schema": {"schema": AS_JSON}})
        assert message.content.startswith('{"total": ')

    def test_a_model_that_refers_to_itself_is_kept_at_every_depth(self):
        class Node(BaseModel):
            name: str
            inner: "Node | None"

        wanted = json.dumps({"name": "a", "inner": {"name": "b", "inner": {"nonsense": 1}}})
        message = model(wanted, max_tokens=400).invoke("?", response_format=Node)
        assert "nonsense" not in message.content
        assert message.content.startswith('{"name": "a", "inner": {"name": "b", "inner": {"name": ')

    def test_as_a_tool_it_is_kept_too(self):
        class Leaf(BaseModel):
            """A leaf."""

            name: str
            inner: "Leaf | None"

        wanted = json.dumps({"name": "a", "inner": {"name": "b", "inner": {"nonsense": 1}}})
        call = f'<tool_call>\n{{"name": "Leaf", "arguments": {wanted}}}\n</tool_call>'
        message = model(call, max_tokens=400).bind_tools([Leaf], tool_choice="Leaf").invoke("?")
        told = "".join([*map(str, message.tool_calls), *map(str, message.invalid_tool_calls)])
        assert "nonsense" not in told
        assert "'name': 'b'" in told or '"name": "b"' in told

    def test_json_mode_gives_any_object(self):
        wanted = {"a": [1, {"b": None}], "c": "\n"}
        message = model(json.dumps(wanted)).invoke("?", response_format={"type": "json_object"})
        assert json.loads(message.content) == wanted
        assert model().with_structured_output(method="json_mode").invoke("?") == VALUE

    def test_streaming_shows_values_that_grow(self):
        seen = list(model().with_structured_output(AS_JSON, method="json_schema").stream("5 + 7?"))
        assert len(seen) > 3
        assert all(set(value) <= set(VALUE) for value in seen)

    def test_stop_strings_do_not_break_json(self):
        message = model(stop=['"why"']).invoke(
            "?", response_format={"type": "json_schema", "json_schema": {"schema": AS_JSON}}
        )
        assert json.loads(message.content) == VALUE

    def test_tools_and_a_format_give_a_call_or_the_json(self):
        tool = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
        bound = {"tools": [tool], "response_format": {"type": "json_schema", "json_schema": {"schema": AS_JSON}}}
        call = model(HERMES.text([{"name": "ping", "arguments": {}}])).invoke("?", **bound)
        assert [call["name"] for call in call.tool_calls] == ["ping"]
        value = model(json.dumps(VALUE)).invoke("?", **bound)
        assert (value.tool_calls, json.loads(value.content)) == ([], VALUE)

    def test_the_schema_is_shown_to_the_model(self):
        seen = []

        def spy(ids):
            seen.append(byte_tokenizer().decode(ids))
            return scripted(byte_tokenizer(), THINKING, json.dumps(VALUE))(ids)

        ChatEarlyExit(engine=FunctionEngine(spy)).with_structured_output(Sum, method="json_schema").invoke("?")
        assert "the sum" in seen[0]

    @pytest.mark.parametrize(
        ("format_", "says"),
        [
            ({"type": "xml"}, "response_format must be"),
            ({"type": "json_schema"}, "response_format must be"),
            ({"type": "json_schema", "json_schema": {"name": "S", "schema": {"not": {}}}}, "'S'.*'not'"),
        ],
    )
    def test_what_cannot_be_kept_is_refused_when_it_is_bound(self, format_, says):
        with pytest.raises(ValueError, match=says):
            model().bind_tools([], response_format=format_)

    def test_an_unknown_method_or_a_missing_schema_is_refused(self):
        with pytest.raises(ValueError, match="unknown method 'xml'"):
            model().with_structured_output(Sum, method="xml")
        with pytest.raises(ValueError, match="needs a schema"):
            model().with_structured_output(None, method="json_schema")

    def test_traces_hear_the_schema(self):
        from langchain_core.callbacks import BaseCallbackHandler

        class Listener(BaseCallbackHandler):
            options = None

            def on_chat_model_start(self, *args, **kwargs):
                self.options = kwargs["options"]

        listener = Listener()
        model().with_structured_output(Sum).invoke([HumanMessage("?")], config={"callbacks": [listener]})
        told = listener.options["ls_structured_output_format"]
        assert told["kwargs"]["method"] == "function_calling"
        assert set(told["schema"]["properties"]) == {"total", "why"}


class TestWhatTheGrammarLeavesNoChoiceAbout:
    def counted(self, answer, tokenizer=None, **settings):
        """A model, and the ids that it was asked to go on from, each time."""
        tokenizer, seen = tokenizer or byte_tokenizer(), []
        says = scripted(tokenizer, THINKING, answer)

        def spy(ids):
            seen.append(list(ids))
            return says(ids)

        return ChatEarlyExit(engine=FunctionEngine(spy, tokenizer), seed=1, **settings), seen

    @pytest.mark.parametrize(
        "asked",
        [
            {"response_format": Sum},
            {"tools": [Sum], "tool_choice": "any"},
            {"tools": [Sum]},
            {"response_format": Sum, "max_tokens": 110},
        ],
        ids=["format", "forced call", "own call", "cut"],
    )
    def test_is_fed_not_sampled_and_the_message_is_the_same(self, asked, monkeypatch):
        answer = HERMES.text([{"name": "Sum", "arguments": VALUE}]) if "tools" in asked else json.dumps(VALUE)
        fast, few = self.counted(answer)
        message = fast.invoke("5 + 7?", **asked)
        monkeypatch.setattr(Guide, "forced", lambda self: ())
        slow, many = self.counted(answer)
        same = slow.invoke("5 + 7?", **asked)
        assert (message.content, message.usage_metadata) == (same.content, same.usage_metadata)
        assert message.response_metadata == same.response_metadata
        assert [call["args"] for call in message.tool_calls] == [call["args"] for call in same.tool_calls]
        assert [call["args"] for call in message.invalid_tool_calls] == [c["args"] for c in same.invalid_tool_calls]
        assert len(few) < len(many) - 15

    def test_is_spelled_as_the_tokenizer_spells_it(self):
        tokenizer = byte_level(CHAT_TEMPLATE, eos_token="<|im_end|>")  # noqa: S106
        llm, seen = self.counted(json.dumps(VALUE), tokenizer)
        message = llm.invoke("5 + 7?", response_format=Sum)
        written = tokenizer(message.content, add_special_tokens=False)["input_ids"]
        assert json.loads(message.content) == VALUE
        sizes = range(len(written) - 4, len(written))  # the last ids are nowhere gone on from
        assert any(seen[-1][-size:] == written[:size] for size in sizes)


class TestControlTokens:
    @pytest.mark.parametrize("token", ["</think>", "<|im_end|>"])
    def test_that_a_schema_would_have_written_are_refused_by_name(self, token):
        evil = f"a{token}b"
        for schema in ({"const": evil}, {"properties": {"x": {"enum": [1, [evil]]}}}, {"properties": {evil: {}}}):
            with pytest.raises(ValueError, match=f"{re.escape(repr(token))} is a control token"):
                model().invoke("?", response_format={"type": "json_schema", "json_schema": {"schema": schema}})

    @pytest.mark.parametrize("pattern", ["^<[/]think>$", "^<[|]im_end[|]>$", "^a(</)think>b$"])
    def test_that_only_a_pattern_would_have_written_end_nothing(self, pattern):
        schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}, "required": ["x"]}
        asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        with pytest.raises(RuntimeError, match=r"a pattern of the schema leaves nothing to write but .*control"):
            model(max_tokens=400).invoke("?", **asked)

    def test_are_passed_by_where_a_pattern_leaves_other_text(self):
        schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(<[/]think>|no)$"}}}
        message = model('{"x": "</think>"}', max_tokens=400).invoke(
            "?", response_format={"type": "json_schema", "json_schema": {"schema": {**schema, "required": ["x"]}}}
        )
        assert json.loads(message.content)["x"] in {"</think>", "no"}
        assert message.additional_kwargs["reasoning_content"] == THINKING

    def test_in_its_descriptions_do_no_harm(self):
        schema = {**AS_JSON, "description": "What follows </think>."}
        message = model().invoke("?", response_format={"type": "json_schema", "json_schema": {"schema": schema}})
        assert json.loads(message.content) == VALUE


@pytest.mark.parametrize("strict", [True, False])
def test_strict_leaves_no_field_of_the_answer_out(strict):
    class Rated(BaseModel):
        """A rated answer."""

        answer: str
        score: float = 0.0

    chain = model().with_structured_output(Rated, method="json_schema", strict=strict)
    asks = Asks.of({**chain.first.kwargs, "max_tokens": 100})
    assert set(asks.schema["required"]) == ({"answer", "score"} if strict else {"answer"})


def test_strict_is_refused_where_there_is_no_schema_to_keep_to():
    with pytest.raises(ValueError, match=r"strict=True is about a schema, .* method='json_schema'"):
        model().with_structured_output(None, method="json_mode", strict=True)


def test_strict_reaches_every_object_and_takes_no_name_for_a_keyword():
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    whole = {"type": "object", "properties": {"properties": inner, "default": inner}, "$defs": {"D": inner}}
    strict = strictly(whole)
    assert strict["required"] == ["properties", "default"]
    assert [part["required"] for part in (*strict["properties"].values(), strict["$defs"]["D"])] == [["a"]] * 3
    assert "required" not in inner
