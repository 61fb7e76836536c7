"""LangChain messages in, token ids of a prompt out.

Two promises. A benign conversation gets exactly the ids its chat template gives. And no text of a user, a
tool, a document, a system prompt or an earlier answer can become a control token: what it writes of
`<|im_start|>` or `</think>` reaches the model as ordinary text.

The second is kept by splitting, not by censoring. An invisible mark is set inside every dangerous string
before the template sees it, and the rendered text is encoded piece by piece between the marks: no added
token can form across a cut, nor can the template mistake the string for one of its own. Since templates also
rewrite what they are given (`replace("/think", "")` makes `<think>` out of `<t/thinkhink>`), the result is
checked against a rendering in which no text of others can open an added token at all.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_earlyexit.families import Family, ThinkTags, thinking_state
from langchain_earlyexit.toolturns import ToolTurns

Message = dict[str, Any]

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}
_TEXT_BLOCKS = {"text", "text-plain", "input_text", "output_text", "refusal"}
_REASONING_BLOCKS = {"reasoning", "thinking", "reasoning_content"}
_CALL_BLOCKS = {"tool_call", "tool_use", "function_call", "invalid_tool_call"}
_MEDIA_BLOCKS = {
    "image", "image_url", "input_image", "audio", "input_audio", "video", "file", "input_file", "document",
    "media",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be continued, and whether the model's thinking is open in it."""

    ids: tuple[int, ...]
    text: str
    thinking: Literal["open", "closed", "none"]


# --- messages to dicts --------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """What the content of one message holds."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Message, ...] = ()
    results: tuple[Message, ...] = ()


def _call(name: object, arguments: object, call_id: object) -> Message:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:  # a call the model got wrong stays as it wrote it
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    call = {"type": "function", "function": {"name": str(name or ""), "arguments": arguments}}
    return call if call_id is None else {"id": str(call_id), **call}


def _reasoning_of(block: Mapping[str, Any]) -> str:
    for key in ("reasoning", "thinking", "text", "reasoning_content"):
        value = block.get(key)
        if isinstance(value, Mapping):  # Bedrock: {"reasoning_content": {"text": …}}
            return _reasoning_of(value)
        if isinstance(value, str):
            return value
    # OpenAI's items: a summary or, from open weights, the reasoning itself.
    return "".join(str(part.get("text", "")) for part in block.get("summary") or block.get("content") or ())


def _parts(content: str | Iterable[Any], speaker: str) -> _Parts:
    """Sort the blocks of a message's content; refuse, by name, what a text-only model cannot be shown."""
    if isinstance(content, str):
        return _Parts(text=content)
    parts = _Parts()
    for raw in content:
        if isinstance(raw, str):
            parts.text += raw
            continue
        block = raw["value"] if raw.get("type") == "non_standard" else raw
        kind = str(block.get("type", ""))
        if kind in _REASONING_BLOCKS:
            parts.reasoning += _reasoning_of(block)
        elif kind in _CALL_BLOCKS:
            arguments = block.get("args", block.get("input", block.get("arguments", {})))
            parts.calls += (_call(block.get("name"), arguments, block.get("call_id", block.get("id"))),)
        elif kind == "tool_result":
            inner = _parts(block.get("content") or "", speaker)
            result = {"role": "tool", "content": inner.text, "tool_call_id": str(block.get("tool_use_id"))}
            parts.results += (result,)
        elif isinstance(block.get("text"), str) and (kind in _TEXT_BLOCKS or kind not in _MEDIA_BLOCKS):
            parts.text += block["text"]
        elif speaker != "assistant" or kind in _MEDIA_BLOCKS:
            raise ValueError(
                f"The {speaker} message holds a content block of type {kind!r}, but this model reads text only. "
                "Remove the block or replace it by its text."
            )
        # What is left are a foreign provider's own notes in its answer (signatures, server-side searches).
    return parts


def _assistant(message: AIMessage, *, include_reasoning: bool) -> Message:
    parts = _parts(message.content, "assistant")
    calls = [_call(call["name"], call["args"], call["id"]) for call in message.tool_calls]
    calls += [_call(call["name"], call["args"] or "", call["id"]) for call in message.invalid_tool_calls]
    known = {call.get("id") for call in calls}
    # Blocks repeat what `tool_calls` says; a history made by hand may hold calls in its blocks alone.
    calls += [call for call in parts.calls if not known or call.get("id", None) not in {None, *known}]
    result: Message = {"role": "assistant", "content": parts.text}
    beside = {key: message.additional_kwargs.get(key) for key in ("reasoning_content", "reasoning")}
    reasoning = _reasoning_of(beside) or parts.reasoning
    if include_reasoning and reasoning:
        result["reasoning_content"] = str(reasoning)
    if calls:
        result["tool_calls"] = calls
    return result


def to_template(messages: Sequence[BaseMessage], *, include_reasoning: bool) -> list[Message]:
    """Turn LangChain messages into the dicts that chat templates read.

    Content becomes one string. Tool calls take OpenAI's shape, with the arguments as a dict, wherever the
    history keeps them (attribute, v1 block, Anthropic's `tool_use`). Earlier reasoning is dropped unless it
    is asked for. A tool's error status, which no template knows, is said in the text.

    Raises:
        ValueError: no messages; a role no template knows; a block that is not text.

    """
    if not messages:
        raise ValueError("There are no messages to answer: pass at least one, such as HumanMessage('…').")
    result: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        if isinstance(message, AIMessage):
            turn = _assistant(message, include_reasoning=include_reasoning)
            names |= {str(c.get("id")): c["function"]["name"] for c in turn.get("tool_calls", ())}
            result.append(turn)
            continue
        if isinstance(message, HumanMessage):
            role = "user"
        elif isinstance(message, SystemMessage):
            role = "system"
        elif isinstance(message, ToolMessage | FunctionMessage):
            role = "tool"
        else:
            name = message.role if isinstance(message, ChatMessage) else message.type
            if name.lower() not in _ROLES:
                raise ValueError(
                    f"A message has the role {name!r}, which chat templates do not know; "
                    f"known are {', '.join(sorted(_ROLES))}."
                )
            role = _ROLES[name.lower()]
        parts = _parts(message.content, role)
        for found in parts.results:
            called = names.get(found["tool_call_id"])
            result.append({**found, "name": called} if called else found)
        if parts.results and not parts.text:
            continue
        turn = {"role": role, "content": parts.text}
        if role == "tool":
            call_id = getattr(message, "tool_call_id", None)
            name = message.name or names.get(str(call_id), "")
            turn |= {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
            if getattr(message, "status", "") == "error" and not parts.text.lower().startswith("error"):
                turn["content"] = f"Error: {parts.text}"
        result.append(turn)
    return result


# --- text that is never a control token ---------------------------------------------------------------------


_UNHEARD_OF = "\U0010fffd"
"""A private character that no vocabulary holds."""


@dataclass(frozen=True)
class _Controls:
    """The added tokens of a tokenizer that must never come from text: all but blank and one-character ones.

    A closed vocabulary spells with its unknown token whatever it cannot spell. There that token is watched as
    a string only, for its id proves nothing.
    """

    tokenizer: Any
    strings: frozenset[str]
    ids: frozenset[int]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> "_Controls":
        added = {
            int(index): str(token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if len(str(token).replace("▁", " ").strip()) > 1  # ▁ is how SentencePiece writes a space
        }
        unknown = getattr(tokenizer, "unk_token_id", None)
        unspelled = {unknown}.intersection(_encode(tokenizer, _UNHEARD_OF))
        strings = frozenset(added.values())
        pattern = re.compile("|".join(map(re.escape, strings)) or "(?!)")
        return cls(tokenizer, strings, frozenset(added) - unspelled, pattern)

    def among(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(index for index in ids if index in self.ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a control token would come out of `text`, by the tokenizer's own account if it gives one."""
        spans = [match.span() for match in self.pattern.finditer(text)]
        if getattr(self.tokenizer, "is_fast", False):  # sees what a normalizer makes of the text, too
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for index, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                token = text[start:end]
                if index in self.ids and len(token.strip()) > 1:
                    spans.append((start + len(token) - len(token.lstrip()), end))
        return spans

    def cut(self, text: str, mark: str) -> str:
        """Set `mark` inside everything in `text` that would become a control token."""
        pieces, cut = text.split(mark), True
        while cut:
            cut, before = False, pieces
            pieces = []
            for piece in before:
                places = sorted({start + 1 for start, _ in self.spans(piece)})
                cut |= bool(places)
                bounds = [0, *places, len(piece)]
                pieces += [piece[start:end] for start, end in pairwise(bounds)]
        return mark.join(pieces)

    def cut_openers(self, text: str, mark: str) -> str:
        """Set `mark` after every character with which a control token can begin, as written or normalized."""
        firsts = {string.lstrip()[0] for string in self.strings}
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)

        def opens(char: str) -> bool:
            forms = char
            if normalizer is not None:  # behind a neutral letter, for some put a space before any text
                forms += normalizer.normalize_str("a" + char)[len(normalizer.normalize_str("a")) :]
            return not firsts.isdisjoint(forms)

        opening = {char for char in set(text) if opens(char)}
        return "".join(char + mark if char in opening else char for char in text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> list[int]:
    """Encode pieces of one text, each as the continuation of the piece before it.

    Tokenizers of the SentencePiece kind put a space before whatever they are given. Behind an anchor they do
    not, if the anchor's own ids stand unchanged in front; else the piece is encoded as it is.
    """
    ids = _encode(tokenizer, pieces[0])
    for piece in pieces[1:]:
        if not piece:
            continue
        for anchor in ("\n", "."):
            lead, both = _encode(tokenizer, anchor), _encode(tokenizer, anchor + piece)
            if lead and both[: len(lead)] == lead:
                ids += both[len(lead) :]
                break
        else:
            ids += _encode(tokenizer, piece)
    return ids


def _unused_mark(text: str) -> str:
    """Find a private character that stands nowhere in `text`, not even spelled out as JSON escapes it."""
    marks = (chr(code) for code in range(0xE000, 0xF900))
    return next(mark for mark in marks if mark not in text and json.dumps(mark)[1:-1] not in text)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Encode text that others wrote, so that no control token can come out of it.

    Text that holds none is encoded as the tokenizer would.

    Raises:
        ValueError: a tokenizer that makes a control token of anything, however it is cut.

    """
    controls = _Controls.of(tokenizer)
    mark = _unused_mark(text)
    for cut in (controls.cut, controls.cut_openers):
        ids = _encode_pieces(tokenizer, cut(text, mark).split(mark))
        if not controls.among(ids):
            return ids
    raise ValueError("This tokenizer turns plain text into control tokens, however the text is split.")


# --- rendering ----------------------------------------------------------------------------------------------


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


def _strings(value: Any) -> Iterator[str]:
    """Walk the strings of a nested structure, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Join neighbours of one role: for templates that insist on taking turns, or keep one system message."""
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        if last is None or message["role"] == "tool" or last["role"] != message["role"]:
            result.append(dict(message))
            continue
        for key in ("content", "reasoning_content"):
            texts = [text for text in (last.get(key), message.get(key)) if text]
            if texts or key == "content":
                last[key] = "\n\n".join(texts)
        if message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    return result


def _one_system(messages: Sequence[Message]) -> list[Message]:
    """Let users say later system messages: for templates that read none but the first."""
    late = [{**m, "role": "user"} if i and m["role"] == "system" else m for i, m in enumerate(_merged(messages))]
    return _merged(late)


def _no_system(messages: Sequence[Message]) -> list[Message]:
    """Let users say the system prompt: for templates that know no such role."""
    return _merged([{**m, "role": "user"} if m["role"] == "system" else m for m in messages])


def _with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    """Write the arguments of tool calls as JSON text: for templates that add them to a string."""

    def written(call: Message) -> Message:
        function, arguments = call["function"], call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**m, "tool_calls": [written(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _with_system_line(messages: Sequence[Message], line: str) -> list[Message]:
    if not line:
        return list(messages)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{line}\n\n{messages[0]['content']}".rstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": line}, *messages]


@dataclass(frozen=True)
class _Chat:
    """One conversation, as all that its template is given."""

    tokenizer: Any
    messages: list[Message]
    tools: list[Any] | None
    documents: list[Any] | None
    kwargs: dict[str, Any]

    def strings(self) -> list[str]:
        return list(_strings([self.messages, self.tools, self.documents]))

    def changed(self, change: Callable[[str], str]) -> "_Chat":
        """Apply `change` to all text that is not the template's own."""
        messages, tools, documents = (
            _map_strings(part, change) for part in (self.messages, self.tools, self.documents)
        )
        return replace(self, messages=messages, tools=tools, documents=documents)

    def render(self, *, prompt: bool) -> str:
        documents = {} if self.documents is None else {"documents": self.documents}
        text: str = self.tokenizer.apply_chat_template(
            self.messages,
            tools=self.tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **documents,
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
        for arguments in (list, _with_json_arguments):
            for shape in (list, _merged, _one_system, _no_system):
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
        raise ValueError(f"The model's chat template refuses these messages: {refusal}") from refusal

    def generation_prompt(self, text: str, mark: str) -> str:
        """Return what the template wrote into `text` for the model's turn, and nothing before it.

        That is the difference to rendering without it. A template that differs earlier, or writes the header
        always, is asked where the last message ends.
        """
        without = self.render(prompt=False)
        if text != without and text.startswith(without):
            return text[len(without) :]
        last = {**self.messages[-1], "content": self.messages[-1]["content"] + mark}
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
    template_kwargs: Mapping[str, Any] | None = None,
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
        dicts = _with_system_line(dicts, choice.system_on if thinking else choice.system_off)
    kwargs = {**switch, **(template_kwargs or {})}
    documents = kwargs.pop("documents", None)
    chat = _Chat(tokenizer, dicts, listed, documents, kwargs).accepted()
    strings = chat.strings()
    mark = _unused_mark("".join([template, *strings]))
    controls = _Controls.of(tokenizer)
    newline = ""
    if tags is not None and (family.think_newline or any(tags.start + end in template for end in ("\n", "\\n"))):
        newline = "\n"

    def cut(text: str) -> str:
        for tag in tags.markers if tags else ():  # tags that are no tokens could still mislead the template
            text = text.replace(tag, tag[0] + mark + tag[1:])
        return controls.cut(text, mark)

    def cut_openers(text: str) -> str:
        return controls.cut_openers(text, mark)

    def finish(chat: _Chat) -> Prompt:
        text = chat.render(prompt=True)
        state: Literal["open", "closed", "none"] = "none"
        if tags is not None:
            tail = chat.generation_prompt(text, mark)
            ending, is_open = _ending(tail, tags, family, newline, thinking=thinking)
            text, state = text + ending, "open" if is_open else "closed"
        pieces = text.replace(json.dumps(mark)[1:-1], mark).split(mark)
        return Prompt(tuple(_encode_pieces(tokenizer, pieces)), "".join(pieces), state)

    prompt = finish(chat.changed(cut))
    if any(cut_openers(string) != string for string in strings):
        sure = finish(chat.changed(cut_openers))
        if controls.among(prompt.ids) != controls.among(sure.ids):
            return sure
    return prompt
