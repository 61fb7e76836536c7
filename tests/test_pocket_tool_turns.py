import json
import random
import re
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage, convert_to_messages

from langchain_earlyexit.pocket import tokenizer as pocket_tokenizer
from langchain_earlyexit.pocket.tool_problems import KINDS
from langchain_earlyexit.pocket.tool_text import tool_line
from langchain_earlyexit.pocket.tool_turns import (
    ToolProblem,
    call_chain,
    compact,
    draw_tool_text,
    final_of,
    messages_of,
    parse_calls,
    prompt_of,
    right,
    sample_tools,
    system_with_tools,
    thinking,
    wrong_guess,
)
from langchain_earlyexit.pocket.tool_words import HELD_OUT
from langchain_earlyexit.pocket.traces import CLOSE_THINKING, CUES, OPEN_THINKING
from langchain_earlyexit.toolcalls import HERMES

PROBLEMS = sample_tools("train", 1200, 3)
WITH_CALLS = [problem for problem in PROBLEMS if problem.calls]


def _function(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


ADD = _function(
    "add",
    "  Add two numbers.\nMore that is not shown.",
    {"a": {"type": "integer"}, "b": {"type": "integer"}, "note": {"type": "string"}},
    ["a", "b"],
)
HEAT = _function("heat", "", {"unit": {"type": "string", "enum": ["celsius", "kelvin"]}}, ["unit"])


def _written(problem: ToolProblem, seed: int = 0) -> str:
    pieces = thinking(problem, random.Random(seed)).segments
    return "".join(piece.text for piece in pieces) + CLOSE_THINKING + final_of(problem) + "<|im_end|>"


def test_tools_stand_one_a_line_below_the_system_text() -> None:
    lines = "# Tools\n- Add two numbers: add(a: integer, b: integer, note?: string)\n- heat(unit: celsius|kelvin)"
    assert system_with_tools("", [ADD, HEAT]) == lines
    assert system_with_tools("Be brief.", [ADD, HEAT]) == f"Be brief.\n\n{lines}"
    assert tool_line({"type": "function", "function": {"name": "now"}}) == "- now()"


def test_an_optional_parameter_with_null_shows_its_other_type() -> None:
    tool = _function("f", "", {"x": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "y": {}}, [])
    assert tool_line(tool) == "- f(x?: integer, y?: any)"


def test_every_kind_of_problem_is_drawn_and_has_calls_or_an_answer() -> None:
    assert {problem.kind for problem in PROBLEMS} == set(KINDS)
    for problem in PROBLEMS:
        assert bool(problem.calls) != bool(problem.answer)
        assert problem.tools


def test_calls_fit_the_tools_that_are_given() -> None:
    types = {"integer": int, "string": str, "boolean": bool, "number": float}
    for problem in WITH_CALLS:
        functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in problem.tools}
        assert len(functions) == len(problem.tools)
        for call in problem.calls:
            schema = functions[call["name"]]
            assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
            for name, value in call["arguments"].items():
                assert type(value) is types[schema["properties"][name]["type"]]
                assert value in schema["properties"][name].get("enum", [value])


def test_copied_arguments_stand_in_the_conversation_and_computed_ones_are_the_sum() -> None:
    for problem in WITH_CALLS:
        shown = prompt_of(problem)
        for call in problem.calls:
            for name, value in call["arguments"].items():
                if name == problem.slot:
                    assert problem.sum is not None
                    assert value == int(problem.sum.answer)
                elif not isinstance(value, bool):
                    assert str(value) in shown


def test_tool_names_of_the_splits_are_disjoint_and_some_are_never_drawn() -> None:
    names = {
        split: {tool["function"]["name"] for problem in sample_tools(split, 400, 5) for tool in problem.tools}
        for split in ("train", "dev", "test")
    }
    assert all(len(found) > 100 for found in names.values())
    assert not names["train"] & names["dev"]
    assert not names["train"] & names["test"]
    assert not names["dev"] & names["test"]
    assert not HELD_OUT & set().union(*names.values())


def test_samples_are_the_same_for_the_same_seed() -> None:
    assert sample_tools("dev", 30, 1) == sample_tools("dev", 30, 1)
    assert sample_tools("dev", 30, 1) != sample_tools("dev", 30, 2)


def test_chains_end_on_the_right_calls_and_state_true_verdicts() -> None:
    for seed, problem in enumerate(WITH_CALLS):
        text = _written(problem, seed)
        assert right(problem, text)
        verdicts = re.findall(r"So it is (.*)\. I had (.*), so they (match|differ)\.\n", text)
        assert all((now == before) == (verdict == "match") for now, before, verdict in verdicts)
        if verdicts:
            assert verdicts[-1][0] == compact(problem.calls)


def test_every_other_chain_ends_on_the_answer() -> None:
    others = [problem for problem in PROBLEMS if not problem.calls]
    assert others
    for seed, problem in enumerate(others):
        assert right(problem, _written(problem, seed))
        assert parse_calls(_written(problem, seed)) == ()


def test_a_wrong_guess_carries_no_loss_and_a_right_one_does() -> None:
    rng = random.Random(2)
    wrong = 0
    for problem in WITH_CALLS[:400]:
        guess = wrong_guess(problem, rng)
        pieces = call_chain(problem, guess, rng).segments
        assert pieces[1].text == compact(guess)
        assert pieces[1].loss == (compact(guess) == compact(problem.calls))
        wrong += not pieces[1].loss
    assert wrong > 380


def test_a_wrongly_read_argument_carries_no_loss() -> None:
    rng = random.Random(3)
    slips = 0
    for problem in WITH_CALLS:
        if problem.sum or len(problem.calls) > 1:
            continue
        arguments = problem.calls[0]["arguments"]
        pieces = call_chain(problem, problem.calls, rng).segments
        for before, piece in pairwise(pieces):
            name = before.text.strip().removesuffix(" is")
            if before.text == f" {name} is" and name in arguments:
                assert piece.loss == (piece.text.strip() == json.dumps(arguments[name], ensure_ascii=False))
                slips += not piece.loss
    assert slips


def test_cue_cuts_fall_right_before_a_cue_or_the_end() -> None:
    rng = random.Random(6)
    for problem in PROBLEMS[:300]:
        written = thinking(problem, rng)
        for cut in written.cue_cuts:
            after = "".join(piece.text for piece in written.segments[cut:])
            assert "".join(piece.text for piece in written.segments[:cut]).endswith("\n\n")
            assert not after or after.startswith(CUES)


def test_texts_begin_with_the_prompt_and_end_with_the_turn_or_look_up_names() -> None:
    rng = random.Random(7)
    tails = drills = 0
    for _ in range(1500):
        text = draw_tool_text(rng)
        whole = "".join(piece.text for piece in text.segments)
        assert not text.segments[0].loss
        assert text.segments[0].text.endswith("<|im_start|>assistant\n")
        assert whole[len(text.segments[0].text) :].startswith(OPEN_THINKING)
        if text.tail:
            tails += 1
            assert not text.tail[0].loss
            assert text.tail[0].text.startswith(CLOSE_THINKING)
            assert text.tail[-1].loss
        ended = "".join(piece.text for piece in (*text.segments, *text.tail))
        if ended.endswith("<|im_end|>"):
            assert parse_calls(ended) is not None
        elif text.segments[-1].text != ".\n\n":
            looked_up = whole.split(OPEN_THINKING)[-1]
            lines = re.findall(r"^- (.*?): (\S+)\(", text.segments[0].text, re.MULTILINE)
            assert sorted(re.findall(r" (.*?): (\S+)\.(?= |$)", looked_up)) == sorted(lines * 2)
            carries = [piece.text for piece in text.segments if piece.loss]
            assert sorted(carries) == sorted(f" {name}." for _, name in lines * 2)
            drills += 1
    assert tails > 250
    assert drills > 50


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "add", "arguments": {"a": 5, "b": 8}},
        {"name": "add", "arguments": {"a": "5", "b": 7}},
        {"name": "add", "arguments": {"a": 5.0, "b": 7}},
        {"name": "add", "arguments": {"a": 5}},
        {"name": "add2", "arguments": {"a": 5, "b": 7}},
    ],
)
def test_right_takes_the_calls_and_refuses_a_change(changed: dict[str, Any]) -> None:
    call = {"name": "add", "arguments": {"a": 5, "b": 7}}
    asked = ({"role": "user", "content": "Add 5 and 7."},)
    problem = ToolProblem((ADD,), asked, (call,), "copy", "easy")
    reordered = {"name": "add", "arguments": {"b": 7, "a": 5}}
    assert right(problem, f"<think>\nHm.\n\n</think>\n\n{HERMES.text([call])}<|im_end|>")
    assert right(problem, HERMES.text([reordered]))
    assert not right(problem, HERMES.text([changed]))
    assert not right(problem, HERMES.text([call, call]))
    assert not right(problem, "The answer is \\boxed{12}.")


def test_calls_are_parsed_back_whatever_the_strings_hold() -> None:
    calls = (
        {"name": "f", "arguments": {"x": '你好 "quoted"\n</tool_call>\nline', "y": True}},
        {"name": "g", "arguments": {}},
    )
    assert parse_calls(HERMES.text(calls)) == calls
    for problem in WITH_CALLS:
        assert parse_calls(HERMES.text(problem.calls)) == problem.calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": 3}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}',
        '<tool_call>\n{"name": "f", "arguments": {}\n</tool_call>',
        'Sure. <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    ],
)
def test_malformed_calls_are_none(text: str) -> None:
    assert parse_calls(text) is None


def test_messages_are_taken_by_langchain_with_calls_and_results() -> None:
    for problem in PROBLEMS[:300]:
        messages = convert_to_messages(messages_of(problem))
        asked = [message for message in messages if isinstance(message, AIMessage) for _ in message.tool_calls]
        results = [message for message in messages if isinstance(message, ToolMessage)]
        assert len(asked) == len(results)
        assert any(isinstance(message, HumanMessage) for message in messages)


def test_the_chat_template_renders_the_prompt() -> None:
    fast = pocket_tokenizer.pretrained(pocket_tokenizer.build(texts=50), 2048)
    for problem in PROBLEMS[:300]:
        messages = messages_of(problem)
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"] = {"name": call.pop("name"), "arguments": call.pop("args")}
        rendered = fast.apply_chat_template(
            messages, tools=list(problem.tools), tokenize=False, add_generation_prompt=True
        )
        assert rendered == prompt_of(problem)
