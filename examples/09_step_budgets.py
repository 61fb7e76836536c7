"""One budget over the steps of a graph: each takes its share of what is left, and the ledger tells who spent what."""

from langgraph.graph import END, START, StateGraph

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.graph import ReasoningState, reasoning_node, route_by_confidence

QUESTIONS = {"first": "What is 86 * 7?", "second": "What is 41 + 58?"}

with ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), seed=4) as llm:
    builder = StateGraph(ReasoningState)
    for name, question in QUESTIONS.items():
        # Half of what a step may spend is kept for a second try, where the first was cut.
        node = reasoning_node(llm, name=name, share=0.5, reads=lambda state, question=question: question)
        builder.add_node(name, node)
    builder.add_edge(START, "first")
    builder.add_conditional_edges("first", route_by_confidence("second", think_more="first"), ["first", "second"])
    builder.add_conditional_edges("second", route_by_confidence(END, think_more="second"), ["second", END])
    graph = builder.compile()
    done = graph.invoke({"messages": [], "budget": {"tokens": 200, "weights": {"first": 3, "second": 1}}})

for spend in done["ledger"].values():
    print(spend["step"], f"{spend['thinking']} of {spend['cap']} thinking tokens,", spend["exit"]["reason"])
print([message.text for message in done["messages"]])
