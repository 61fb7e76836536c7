"""One question, thought through with early exit: `graph` for `langgraph dev`, or to copy from.

Nothing is loaded at import; the weights come with the first question, off the event loop.
"""

import operator
from typing import Annotated, Any

from langchain_core.messages import AnyMessage
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from langchain_earlyexit import DEER, ChatEarlyExit


class State(TypedDict):
    """The conversation, what its thinking cost, and why each step stopped thinking."""

    messages: Annotated[list[AnyMessage], add_messages]
    output_tokens: Annotated[int, operator.add]
    exits: Annotated[list[dict[str, Any]], operator.add]


llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95))


async def think(state: State) -> dict[str, Any]:
    """Answer the conversation so far."""
    message = await llm.ainvoke(state["messages"])
    usage = message.usage_metadata or {"output_tokens": 0}
    return {
        "messages": [message],
        "output_tokens": usage["output_tokens"],
        "exits": [message.response_metadata["early_exit"]],
    }


builder = StateGraph(State)
builder.add_node("think", think)
builder.add_edge(START, "think")
graph = builder.compile()
