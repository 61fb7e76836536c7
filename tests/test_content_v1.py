"""Content as v1 blocks, going out and coming back in as history, our own and other providers'."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage, message_to_dict, messages_from_dict

from langchain_earlyexit import DEER, ChatEarlyExit, FunctionEngine
from langchain_earlyexit.engines.function import byte_tokenizer, scripted

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}[thought: {{ m.reasoning_content }}]{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Asked:
    """A model that remembers the prompt of its last call."""

    def __init__(self):
        self.tokenizer = byte_tokenizer()
        self.tokenizer.chat_template = TEMPLATE
        self.prompt = ""
        self.says = scripted(self.tokenizer, "It is 4.\n\nWait, is it? Yes.\n", "The answer is 4.")

    def __call__(self, ids):
        text = self.tokenizer.decode(list(ids))
        self.prompt = text[: text.rfind("<|im_start|>assistant\n")]
        return self.says(ids)


@pytest.fixture
def asked():
    return Asked()


def chat(asked, **settings):
    return ChatEarlyExit(engine=FunctionEngine(asked, asked.tokenizer), seed=1, **settings)


def summed(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def plain(message):
    """The blocks without what only tells a stream's pieces apart, or when thinking ended."""
    return [{k: v for k, v in block.items() if k not in {"index", "extras"}} for block in message.content]


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
class TestOut:
    @pytest.mark.parametrize("settings", [{}, {"thinking_budget": 5}, {"exit_policy": DEER()}], ids=str)
    async def test_reasoning_comes_first_and_every_way_gives_the_same_blocks(self, asked, settings):
        llm = chat(asked, output_version="v1", **settings)
        message = llm.invoke("2 + 2?")
        thought = message.additional_kwargs["reasoning_content"]
        expected = [{"type": "reasoning", "reasoning": thought}, {"type": "text", "text": message.text}]
        others = [
            summed(llm.stream("2 + 2?")),
            await llm.ainvoke("2 + 2?"),
            summed([chunk async for chunk in llm.astream("2 + 2?")]),
            llm.stream_events("2 + 2?", version="v3").output,
            llm.invoke("2 + 2?", stream=True),
        ]
        for found in (message, *others):
            assert plain(found) == expected
            assert found.response_metadata["output_version"] == "v1"
            assert found.usage_metadata == message.usage_metadata
            assert found.additional_kwargs == message.additional_kwargs

    def test_the_environment_can_ask_for_it(self, asked, monkeypatch):
        monkeypatch.setenv("LC_OUTPUT_VERSION", "v1")
        assert [block["type"] for block in chat(asked).invoke("2 + 2?").content] == ["reasoning", "text"]


CALL = {"name": "add", "args": {"a": 1}, "id": "c1"}
THOUGHT = "two and two"
EARLIER = {
    "our own": AIMessage("It is 4.", additional_kwargs={"reasoning_content": THOUGHT}, tool_calls=[CALL]),
    "our own, v1": AIMessage(
        [
            {"type": "reasoning", "reasoning": THOUGHT, "index": 0, "extras": {"exit": {"reason": "confident"}}},
            {"type": "text", "text": "It is 4.", "index": 1},
            {"type": "tool_call", **CALL},
        ],
        tool_calls=[CALL],
        response_metadata={"output_version": "v1", "model_provider": "langchain-earlyexit"},
    ),
    "Anthropic": AIMessage(
        [
            {"type": "thinking", "thinking": THOUGHT, "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "c2VjcmV0"},
            {"type": "text", "text": "It is 4.", "citations": None},
            {"type": "tool_use", "name": "add", "input": {"a": 1}, "id": "c1"},
        ],
        tool_calls=[CALL],
        response_metadata={"model_provider": "anthropic"},
    ),
    "OpenAI responses": AIMessage(
        [
            {
                "type": "reasoning",
                "id": "rs_1",
                "encrypted_content": "c2VjcmV0",
                "summary": [{"type": "summary_text", "text": "two "}, {"type": "summary_text", "text": "and two"}],
            },
            {"type": "text", "text": "It is 4.", "annotations": [], "id": "msg_1"},
            {"type": "function_call", "name": "add", "arguments": '{"a": 1}', "call_id": "c1", "id": "fc_1"},
        ],
        tool_calls=[CALL],
        response_metadata={"model_provider": "openai", "output_version": "responses/v1"},
    ),
    "OpenAI responses, open weights": AIMessage(
        [
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": None,
                "content": [{"type": "reasoning_text", "text": THOUGHT}],
            },
            {"type": "output_text", "text": "It is 4."},
        ],
        tool_calls=[CALL],
    ),
    "DeepSeek": AIMessage("It is 4.", additional_kwargs={"reasoning_content": THOUGHT}, tool_calls=[CALL]),
    "OpenRouter": AIMessage("It is 4.", additional_kwargs={"reasoning": THOUGHT}, tool_calls=[CALL]),
    "OpenAI responses, before v1": AIMessage(
        "It is 4.",
        additional_kwargs={"reasoning": {"id": "rs_1", "summary": [{"type": "summary_text", "text": THOUGHT}]}},
        tool_calls=[CALL],
    ),
    "Bedrock": AIMessage(
        [
            {"type": "reasoning_content", "reasoning_content": {"text": THOUGHT, "signature": "c2ln"}},
            {"type": "text", "text": "It is 4."},
        ],
        tool_calls=[CALL],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EARLIER)
class TestIn:
    def history(self, name):
        return [HumanMessage("2 + 2?"), EARLIER[name], ToolMessage("4", tool_call_id="c1"), HumanMessage("Sure?")]

    def test_earlier_reasoning_is_dropped_whoever_thought_it(self, asked, name):
        chat(asked).invoke(self.history(name))
        assert THOUGHT not in asked.prompt
        assert asked.prompt.count("assistant\nIt is 4.") == 1
        assert asked.prompt.count('{"name": "add", "arguments": {"a": 1}}') == 1
        assert "c2" not in asked.prompt

    def test_or_passed_on_once_to_a_template_that_wants_it(self, asked, name):
        chat(asked, include_history_reasoning=True).invoke(self.history(name))
        assert asked.prompt.count(f"[thought: {THOUGHT}]It is 4.") == 1
        assert asked.prompt.count(THOUGHT) == 1


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_our_messages_go_back_in_as_they_came_out(asked, version):
    llm = chat(asked, output_version=version)
    first = llm.invoke("2 + 2?")
    prompts = set()
    for again in (first, messages_from_dict([message_to_dict(first)])[0], summed(llm.stream("2 + 2?"))):
        llm.invoke([HumanMessage("2 + 2?"), again, HumanMessage("Sure?")])
        prompts.add(asked.prompt)
    assert len(prompts) == 1
    assert "The answer is 4.<|im_end|>" in asked.prompt
