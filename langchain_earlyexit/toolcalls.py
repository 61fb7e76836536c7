"""How model families write tool calls: one table of data, chosen by the chat template's text, and a reader of it.

A turn's calls are laid out as

    trigger lead NAME middle ARGUMENTS tail (between NAME middle ARGUMENTS tail)* end

with ARGUMENTS a JSON object. The trigger is the text with which a call begins wherever a model writes it. The end is
not waited for: anything but another call ends the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_NAME: Final = re.compile(r'(?:[^"\\]|\\.)*')
"""The inside of a JSON string."""


@dataclass(frozen=True)
class CallFormat:
    """One row of the table.

    Args:
        name: what messages call it.
        marks: texts that all stand in a chat template of this format.
        unmarked: texts of which none does.
        trigger, lead, middle, tail, between, end: see the module. `between` is None where templates know of one call
            in a turn only.
        at_start: the trigger is text that may begin any JSON: only an answer that begins with it, and goes on with the
            name of a tool and `middle`, is a call. Such a name is written in a JSON string.
        id_length: how long the ids of calls must be in the history (letters and digits), or None for any.
    """

    name: str
    trigger: str
    lead: str
    middle: str
    tail: str
    between: str | None
    end: str = ""
    marks: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()
    at_start: bool = False
    id_length: int | None = None

    @property
    def opening(self) -> str:
        """What stands before the name of the first call."""
        return self.trigger + self.lead

    def beginning(self, name: str) -> str:
        """What a first call of this tool begins with, up to its arguments."""
        return self.opening + self.named(name) + self.middle

    def may_call(self, text: str) -> bool:
        """Whether an answer that begins with `text`, from the trigger on, may be a call of some tool."""
        if not self.at_start:
            return True
        rest = _NAME.sub("", text.removeprefix(self.opening), count=1)
        return rest.startswith(self.middle) or self.middle.startswith(rest)

    def named(self, name: str) -> str:
        """A tool's name as it is written: inside a JSON string, or bare."""
        return json.dumps(name, ensure_ascii=False)[1:-1] if self.opening.endswith('"') else name

    def unnamed(self, text: str) -> str:
        """The name that `text` writes; `text` itself, which no tool is called, where that is not how JSON has it."""
        if not self.opening.endswith('"'):
            return text
        try:
            return str(json.loads(f'"{text}"'))
        except ValueError:
            return text

    def text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls (`name`, and `arguments` as a dict or as JSON text) as a model writes them."""
        written = []
        for call in calls:
            arguments = call["arguments"]
            told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            written.append(self.named(call["name"]) + self.middle + told + self.tail)
        between = "\n" + self.opening if self.between is None else self.between
        return self.opening + between.join(written) + self.end


HERMES: Final = CallFormat(
    "hermes",
    trigger="<tool_call>",
    lead='\n{"name": "',
    middle='", "arguments": ',
    tail="}\n</tool_call>",
    between='\n<tool_call>\n{"name": "',
    marks=("<tool_call>",),
    unmarked=("<function=", "<arg_key>"),
)
"""Hermes, Qwen 2.5, QwQ, Qwen 3 and the pocket reasoner; also what a model without a format of its own is asked for."""

FORMATS: Final = (
    CallFormat(
        "deepseek",
        trigger="<｜tool▁calls▁begin｜>",
        lead="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
        between="\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        end="<｜tool▁calls▁end｜>",
        marks=("<｜tool▁calls▁begin｜>", "```json"),
    ),
    CallFormat(
        "deepseek-v3.1",
        trigger="<｜tool▁calls▁begin｜>",
        lead="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        tail="<｜tool▁call▁end｜>",
        between="<｜tool▁call▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        marks=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
        unmarked=("```json",),
    ),
    CallFormat(
        "mistral-args",
        trigger="[TOOL_CALLS]",
        lead="",
        middle="[ARGS]",
        tail="",
        between="[TOOL_CALLS]",
        marks=("[TOOL_CALLS]", "[ARGS]"),
        unmarked=("[CALL_ID]",),
        id_length=9,
    ),
    CallFormat(
        "mistral",
        trigger="[TOOL_CALLS]",
        lead='[{"name": "',
        middle='", "arguments": ',
        tail="}",
        between=', {"name": "',
        end="]",
        marks=("[TOOL_CALLS]",),
        unmarked=("[ARGS]",),
        id_length=9,
    ),
    HERMES,
    CallFormat(
        "llama3-json",
        trigger='{"name": "',
        lead="",
        middle='", "parameters": ',
        tail="}",
        between=None,
        marks=('"parameters": ', "ipython"),
        at_start=True,
    ),
)
"""Tried in this order. DeepSeek: model cards of R1, V3, V3.1; Mistral: its tokenizers v3 and v11; Llama: 3.1 to 3.3."""


UNSPOKEN: Final = (
    ("Harmony, of gpt-oss", "<|channel|>"),  # a call is another channel than the answer's, which end tags lead to
    ("the XML of Qwen3-Coder", "<function="),  # arguments are no JSON: only a schema tells a text from a number there
    ("the XML of GLM", "<arg_key>"),
)
"""Formats that templates are written in and that are not written here, by what shows them."""


def name_unspoken(template: str) -> str:
    """What to call the format of a template that `find_format` does not find."""
    return next((name for name, mark in UNSPOKEN if mark in template), "one of its own")


def find_format(template: str | None) -> CallFormat | None:
    """The format that a chat template's text shows, None if it shows none of the table's."""
    if template is None:
        return None
    for row in FORMATS:
        if all(mark in template for mark in row.marks) and not any(mark in template for mark in row.unmarked):
            return row
    return None


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of the call number `index`: its name, or arguments that add up to JSON text."""

    index: int
    name: str | None
    arguments: str = ""


class JsonScan:
    """Follows a JSON object or array through text that comes in pieces."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._string = self._escaped = False

    def push(self, text: str) -> int | None:
        """Index in this piece just past the end of the value; None while it goes on."""
        for at, letter in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                else:
                    self._string = letter != '"'
            elif letter == '"':
                self._string = True
            elif letter in "{[":
                self._open.append(letter)
            elif letter in "}]":
                del self._open[-1:]
                if not self._open:
                    return at + 1
        return None

    @property
    def breaker(self) -> str:
        """What to add to a value that was cut, so that readers who complete JSON (as LangChain does) cannot.

        Pieces of a stream can only be added to. So the open string is closed, and then a bracket that does not match.
        """
        quote = ("\\" if self._escaped else "") + '"' if self._string else ""
        return quote + ("}" if self._open and self._open[-1] == "[" else "]")


@dataclass(slots=True)
class CallReader:
    """Reads calls from streamed text that follows the trigger.

    Attributes:
        format: how they are written.
        whole: how many calls have all their arguments.
        spans: start and end, in all the text read, of each name and of each call's arguments.
    """

    format: CallFormat
    whole: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    _held: str = ""
    _at: int = 0  # where in the text the held part begins
    _expects: str = "lead"
    _index: int = 0
    _scan: JsonScan = field(default_factory=JsonScan)

    def push(self, text: str) -> list[CallPiece]:
        """Take the next text; return what it tells."""
        self._held += text
        pieces: list[CallPiece] = []
        while self._step(pieces):
            pass
        return pieces

    @property
    def between(self) -> bool:
        """Whether a call is complete, and the first word of what stands between two is not."""
        if self._expects != "lead" or not self._index or self.format.between is None:
            return False
        return len(self._held.lstrip()) < len(self.format.between.split()[0])

    def finish(self) -> list[CallPiece]:
        """The text is over: close a call that was broken off, so that no reader can take it for whole."""
        if self._expects == "name":
            # What may be the beginning of what follows the name is no part of it.
            sizes = range(min(len(self._held), len(self.format.middle)), 0, -1)
            begun = next((size for size in sizes if self.format.middle.startswith(self._held[-size:])), 0)
            name = self._take(len(self._held) - begun)
            return [CallPiece(self._index, name, self._scan.breaker)]
        if self._expects == "arguments":
            return [CallPiece(self._index, None, self._scan.breaker)]
        if self._expects == "lead" and self._index == 0:
            return [CallPiece(0, "", self._scan.breaker)]
        return []

    def _step(self, pieces: list[CallPiece]) -> bool:
        form = self.format
        if self._expects == "lead":
            literal = (form.lead if self._index == 0 else form.between or "").lstrip()
            blank = len(self._held) - len(self._held.lstrip())
            if not self._held.startswith(literal, blank):
                return False
            self._take(blank + len(literal))
            self._expects = "name"
        elif self._expects == "name":
            at = self._held.find(form.middle)
            if at < 0:
                return False
            self.spans.append((self._at, self._at + at))
            pieces.append(CallPiece(self._index, form.unnamed(self._take(at))))
            self._take(len(form.middle))
            self.spans.append((self._at, self._at))
            self._expects, self._scan = "arguments", JsonScan()
        elif self._expects == "arguments":
            if not self._held:
                return False
            end = self._scan.push(self._held)
            told = self._take(len(self._held) if end is None else end)
            self.spans[-1] = (self.spans[-1][0], self._at)
            pieces.append(CallPiece(self._index, None, told))
            if end is not None:
                self.whole += 1
                self._expects = "tail"
        elif self._expects == "tail":
            if not self._held.startswith(form.tail):
                return False
            self._take(len(form.tail))
            self._index += 1
            self._expects = "end" if form.between is None else "lead"
        else:
            return False
        return True

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        self._at += length
        return taken


def read_calls(form: CallFormat, text: str) -> tuple[dict[str, Any], ...] | None:
    """The calls (`name`, `arguments`) that `text`, from the trigger on, holds; None if they are not whole."""
    text = text.lstrip()
    if not text.startswith(form.trigger) or not form.may_call(text):
        return None
    reader = CallReader(form)
    pieces = reader.push(text[len(form.trigger) :])
    if not reader.whole or reader.finish():
        return None
    return calls_of(pieces)


def calls_of(pieces: Iterable[CallPiece]) -> tuple[dict[str, Any], ...] | None:
    """The calls (`name`, `arguments`) that pieces add up to; None if the arguments of one are no JSON object."""
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    for piece in pieces:
        names[piece.index] = names.get(piece.index, "") + (piece.name or "")
        texts[piece.index] = texts.get(piece.index, "") + piece.arguments
    calls = []
    for index, text in texts.items():
        try:
            arguments = json.loads(text)
        except ValueError:
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": names[index], "arguments": arguments})
    return tuple(calls)


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values: keys sorted, no spaces, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def canonical_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """One call as a canonical JSON object, several as a list of them."""
    told = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    return canonical(told[0] if len(told) == 1 else told)
