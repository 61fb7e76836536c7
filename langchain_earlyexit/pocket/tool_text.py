"""Tools as text in the system turn, and the calls that stand in an assistant's turn. Needs no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_earlyexit.toolcalls import HERMES, read_calls

Call = dict[str, Any]
"""`{"name": str, "arguments": dict}`"""


def _type_of(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("anyOf") or [schema]
    kind = next((kind for kind in kinds if kind.get("type") != "null"), kinds[0])
    if "enum" in kind:
        return "|".join(str(value) for value in kind["enum"])
    return kind["type"] if isinstance(kind.get("type"), str) else "any"


def purpose(tool: Mapping[str, Any]) -> str:
    """What a tool is for, in the first line of its description, without the full stop."""
    return (tool["function"].get("description") or "").strip().split("\n")[0].strip().rstrip(".")


def tool_line(tool: Mapping[str, Any]) -> str:
    """One line about a tool: `- Add two numbers: add(a: integer, note?: string)`.

    What it is for comes first: a small model that has written that finds the name behind it in the list, while a name
    that comes first must be picked before what it is for was read.
    """
    function = tool["function"]
    parameters = function.get("parameters") or {}
    required = parameters.get("required", [])
    written = ", ".join(
        f"{name}{'' if name in required else '?'}: {_type_of(schema)}"
        for name, schema in parameters.get("properties", {}).items()
    )
    what = purpose(tool)
    return f"- {f'{what}: ' if what else ''}{function['name']}({written})"


def system_with_tools(system: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """The system turn's text: the system text, if any, a blank line, and the tools, one a line."""
    listed = "# Tools\n" + "\n".join(tool_line(tool) for tool in tools)
    return f"{system}\n\n{listed}" if system else listed


def final_part(text: str) -> str:
    """What stands after the thinking, without the end of the turn."""
    return text.rsplit("</think>", 1)[-1].replace("<|im_end|>", "").strip()


def parse_calls(text: str) -> tuple[Call, ...] | None:
    """The calls after the thinking; none in a text without calls; None where they are not written as taught."""
    final = final_part(text)
    if "tool_call>" not in final:
        return ()
    calls = read_calls(HERMES, final)
    return calls if calls and HERMES.text(calls) == final else None
