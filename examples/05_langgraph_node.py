"""A LangGraph node that thinks, and a state that keeps what every step's thinking cost."""

import operator
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph

from langchain_earlyexit import DEER, ChatEarlyExit


class State(TypedDict):
    questions: list[str]
    answers: Annotated[list[str], operator.add]
    spent: Annotated[int, operator.add]


llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), seed=4)


async def think(state: State) -> dict[str, object]:
    question = state["questions"][len(state["answers"])]
    message = await llm.ainvoke(question)
    return {"answers": [message.text], "spent": message.usage_metadata["output_tokens"]}


def more(state: State) -> str:
    return "think" if len(state["answers"]) < len(state["questions"]) else END


builder = StateGraph(State)
builder.add_node("think", think)
builder.add_edge(START, "think")
builder.add_conditional_edges("think", more)
graph = builder.compile()

if __name__ == "__main__":
    import asyncio

    questions = ["What is 86 * 7?", "What is 41 + 58?", "What is 25 * 4 + 9?"]
    print(asyncio.run(graph.ainvoke({"questions": questions, "answers": [], "spent": 0})))
