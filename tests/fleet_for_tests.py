"""Chat models as other providers' packages make them: their fields and types, no network; they note each call."""

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field


class Noting(BaseChatModel):
    """Answers with `replies` in turn and notes the keywords of every call, and its own `thinking`."""

    kind: str = "some-chat"
    model: str = "foreign-1"
    replies: list[Any] = Field(default_factory=lambda: [AIMessage("Done.", usage_metadata=usage(5, 3))])
    calls: list[dict[str, Any]] = Field(default_factory=list)

    @property
    def _llm_type(self):
        return self.kind

    def bind_tools(self, tools, *, tool_choice=None, **kwargs):
        return self.bind(**kwargs)

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        reply = self.replies[min(len(self.calls), len(self.replies) - 1)]
        self.calls.append({**kwargs, **self.said()})
        return ChatResult(generations=[ChatGeneration(message=reply.model_copy())])

    def said(self):
        return {}


class OpenAILike(Noting):
    kind: str = "openai-chat"
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | None = None


class AnthropicLike(Noting):
    kind: str = "anthropic-chat"
    reasoning_effort: str | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def said(self):
        return {} if self.thinking is None else {"own thinking": self.thinking}


class OllamaLike(Noting):
    kind: str = "chat-ollama"
    reasoning: bool | str | None = None


class QwenLike(Noting):
    kind: str = "chat-qwen"
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    extra_body: dict[str, Any] | None = None


def usage(output, reasoning=None):
    told = {"input_tokens": 1, "output_tokens": output, "total_tokens": output + 1}
    return told if reasoning is None else {**told, "output_token_details": {"reasoning": reasoning}}
