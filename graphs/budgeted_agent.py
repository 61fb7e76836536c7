"""An agent with tools whose every step thinks within its budget: `graph` for `langgraph dev`, or to copy from.

Nothing is loaded at import; the weights come with the first question, off the event loop. The bundled model
calls tools whose arguments stand in the question, such as "What is 41 plus 58? Use the tool." With another model
write budgets of tens of times the size: the bundled one thinks some 200 tokens a call.
"""

from langchain.agents.middleware import ModelCallLimitMiddleware

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.graph import create_budgeted_agent


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    return a * b


llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95))
# No run thinks more than 400 tokens in all, nor more than 100 over a tool's result, nor calls the model a ninth time.
graph = create_budgeted_agent(
    llm,
    [add, multiply],
    budget=400,
    most={"routine": 100},
    middleware=[ModelCallLimitMiddleware(run_limit=8)],
)
