"""A conversation in, the token ids of a prompt out.

Two promises. A benign conversation gets exactly the ids its chat template gives. And no text of a user, a
tool, a document, a system prompt or an earlier answer can become a control token.

The second is kept by the marks of `inert`, set before the template sees the text: so the template cannot mistake a
string for one of its own either. Since templates also rewrite what they are given (`replace("/think", "")` makes
`<think>` out of `<t/thinkhink>`), the result is checked against a rendering in which no text of others can open an
added token at all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage

from langchain_earlyexit.families import Family, ThinkTags, thinking_state
from langchain_earlyexit.inert import Controls, encode_pieces, strings, unused_mark
from langchain_earlyexit.messages import Message, to_template
from langchain_earlyexit.toolturns import ToolTurns
from langchain_earlyexit.turnshapes import (
    CALLED,
    GIVEN,
    OFFERED,
    SPOKEN,
    Shape,
    calls_apart,
    calls_bare,
    merged,
    no_system,
    one_system,
    probe,
    with_json_arguments,
    with_system_line,
)


class PromptTooLong(ContextOverflowError, ValueError):
    """A prompt that leaves no room in the model's context. LangChain's middleware cuts the conversation on it."""


class RefusedByTemplate(ValueError):
    """A conversation that the model's chat template takes in no form."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be continued, and whether the model's thinking is open in it."""

    ids: tuple[int, ...]
    text: str
    thinking: Literal["open", "closed", "none"]


_STRUCTURE = {
    "role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "id", "type", "function",
    "arguments", "description", "parameters", "properties", "required", "items", "enum", "title", "text",
    "user", "assistant", "system", "tool",
    "object", "array", "string", "integer", "number", "boolean", "null",
}  # fmt: skip
"""Words of ours that templates read: as a key, as a role or as a type they are never cut."""


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in a nested structure, keys included, but for the structure's own."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if key in _STRUCTURE else _map_strings(key, change): inner
            if key in ("role", "type") and isinstance(inner, str) and inner in _STRUCTURE
            else _map_strings(inner, change)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(inner, change) for inner in value]
    return value


_call_shapes: WeakKeyDictionary[Any, dict[str, Shape | None]] = WeakKeyDictionary()
"""What was found out about the templates of each tokenizer: to ask again for every call would take longer than it."""


@dataclass(frozen=True)
class _Chat:
    """One conversation, as all that its template is given."""

    tokenizer: Any
    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]

    def strings(self) -> list[str]:
        return list(strings([self.messages, self.tools]))

    def changed(self, change: Callable[[str], str]) -> "_Chat":
        """Apply `change` to all text that is not the template's own."""
        return replace(self, messages=_map_strings(self.messages, change), tools=_map_strings(self.tools, change))

    def render(self, *, prompt: bool) -> str:
        text: str
        if any(message["content"] is None for message in self.messages):
            from transformers.utils.chat_template_utils import render_jinja_template

            # The tokenizer would leave out a key that holds None, but a template may ask for just that.
            (text,), _ = render_jinja_template(
                [self.messages],
                tools=self.tools,
                chat_template=_template_of(self.tokenizer, self.tools),
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **self.kwargs},
            )
            return text
        text = self.tokenizer.apply_chat_template(
            self.messages,
            tools=self.tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **self.kwargs,
        )
        return text

    def accepted(self) -> "_Chat":
        """Find the form of the messages that the template takes, and takes whole.

        A template that refuses the messages as they are may take them with neighbours of one role joined,
        with one system message or none, or with the arguments of calls as text. One that silently renders
        only one of several system messages gets one.
        """
        refusal: Exception | None = None
        partial: _Chat | None = None
        for shape in (list, merged, one_system, no_system):
            for arguments in (list, with_json_arguments):
                form = replace(self, messages=arguments(shape(self.messages)))
                try:
                    text = form.render(prompt=True)
                except (TemplateError, TypeError) as error:
                    refusal = refusal or error
                    continue
                systems = [m["content"].strip() for m in form.messages if m["role"] == "system"]
                if len(systems) < 2 or all(system in text for system in systems):
                    return form
                partial = partial or form
        if partial is not None:
            return partial
        raise RefusedByTemplate(f"The model's chat template refuses these messages: {refusal}") from refusal

    def with_calls_shown(self, turns: ToolTurns) -> "_Chat":
        """Give earlier calls the form in which the template shows them; where none does, tell them as `turns` does."""
        known = _call_shapes.setdefault(self.tokenizer, {})
        key = repr((_template_of(self.tokenizer, self.tools), bool(self.tools), self.kwargs))
        if key not in known:
            tools = [OFFERED] if self.tools else None
            known[key] = replace(self, tools=tools)._call_shape()
        return replace(self, messages=(known[key] or turns.told)(self.messages))

    def _call_shape(self) -> Shape | None:
        """Find the form of calls that the template shows, by what it makes of a probe.

        Best is one that shows the call behind what was said with it, and writes nothing else: no empty turn, no `None`.
        """
        shapes: list[Shape] = [list, calls_apart, calls_bare]
        sizes = [self._probed(shape, "") for shape in shapes]
        showing = [(shape, size) for shape, size in zip(shapes, sizes, strict=True) if size is not None]
        if not showing:
            return None
        return max(showing, key=lambda each: (self._probed(each[0], SPOKEN) is not None, -each[1]))[0]

    def _probed(self, shape: Shape, content: str) -> int | None:
        """Length of a probe's rendering; None where something is not in it, or not in its place."""
        try:
            text = replace(self, messages=shape(probe(content))).accepted().render(prompt=True)
        except ValueError:  # refused
            return None
        at = 0
        for part in (content, CALLED, GIVEN):
            at = text.find(part, at)
            if at < 0:
                return None
        return len(text)

    def generation_prompt(self, text: str, mark: str) -> str:
        """Return what the template wrote into `text` for the model's turn, and nothing before it.

        That is the difference to rendering without it. A template that differs earlier, or writes the header
        always, is asked where the last message ends.
        """
        without = self.render(prompt=False)
        if text != without and text.startswith(without):
            return text[len(without) :]
        last = {**self.messages[-1], "content": (self.messages[-1]["content"] or "") + mark}
        marked = replace(self, messages=[*self.messages[:-1], last]).render(prompt=True)
        return marked.rpartition(mark)[2] if mark in marked else ""


def _ending(tail: str, tags: ThinkTags, family: Family, newline: str, *, thinking: bool) -> tuple[str, bool]:
    """Return what to add to a prompt that ends in `tail`, and whether its thinking is open then."""
    state = thinking_state(tail, tags)
    if state == "open":
        gap = "\n" if tail.endswith("\n") else "\n\n"
        return ("", True) if thinking else (f"{gap}{tags.end}\n\n", False)
    if state == "closed":
        return "", False
    if thinking:
        return tags.start + newline, True
    return family.empty_thinking or f"{tags.start}\n\n{tags.end}\n\n", False


def _template_of(tokenizer: Any, tools: list[Any] | None) -> str:
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise ValueError(
            "The tokenizer has no chat template, so messages cannot be put to this model. A chat template is "
            "the file chat_template.jinja, or the entry chat_template of tokenizer_config.json, beside the "
            "weights: use the instruction-tuned model rather than its base, or add the file."
        ) from error


def render(
    tokenizer: Any,
    messages: Sequence[BaseMessage],
    *,
    tags: ThinkTags | None,
    family: Family,
    thinking: bool,
    include_reasoning: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: ToolTurns | None = None,
    schema: Mapping[str, Any] | None = None,
) -> Prompt:
    """Render a conversation to the ids of a prompt in which thinking is open, or closed, as wanted.

    The template's own switch is used where it has one. Where it leaves thinking to the model, the start tag
    is appended; where it cannot be told not to think, an empty block is (NoThinking, arXiv 2504.09858). A
    prompt stays closed although thinking was wanted if the conversation itself declines it (`/no_think`).
    `turns` says what the template cannot show of tools, so that it is shown all the same; a `schema` of the answer is
    told in the system turn.
    """
    dicts = to_template(messages, include_reasoning=include_reasoning)
    if turns is not None:
        dicts, tools = turns.shape(dicts, tools or (), schema)
    listed = [dict(tool) for tool in tools] if tools else None
    template = _template_of(tokenizer, listed)
    switch: dict[str, Any] = {}
    if tags is not None:
        choice = family.template_switch
        switch = dict(choice.on if thinking else choice.off)
        dicts = with_system_line(dicts, choice.system_on if thinking else choice.system_off)
    chat = _Chat(tokenizer, dicts, listed, switch)
    if any(message.get("tool_calls") for message in dicts):
        chat = chat.with_calls_shown(turns or ToolTurns())
    chat = chat.accepted()
    texts = chat.strings()
    mark = unused_mark("".join([template, *texts]))
    controls = Controls.of(tokenizer)
    newline = ""
    if tags is not None and (family.think_newline or any(tags.start + end in template for end in ("\n", "\\n"))):
        newline = "\n"

    def cut(text: str) -> str:
        for tag in tags.markers if tags else ():  # tags that are no tokens could still mislead the template
            text = text.replace(tag, tag[0] + mark + tag[1:])
        return controls.cut(tokenizer, text, mark)

    def cut_openers(text: str) -> str:
        return controls.cut_openers(tokenizer, text, mark)

    def finish(chat: _Chat) -> Prompt:
        text = chat.render(prompt=True)
        state: Literal["open", "closed", "none"] = "none"
        if tags is not None:
            tail = chat.generation_prompt(text, mark)
            ending, is_open = _ending(tail, tags, family, newline, thinking=thinking)
            text, state = text + ending, "open" if is_open else "closed"
        pieces = text.replace(json.dumps(mark)[1:-1], mark).split(mark)
        return Prompt(tuple(encode_pieces(tokenizer, pieces)), "".join(pieces), state)

    prompt = finish(chat.changed(cut))
    if any(cut_openers(text) != text for text in texts):
        sure = finish(chat.changed(cut_openers))
        if controls.among(prompt.ids) != controls.among(sure.ids):
            return sure
    return prompt
