"""Plan, solve the steps with budgets of their own, answer: `graph` for `langgraph dev`, or to copy from.

Nothing is loaded at import; the weights come with the first question, off the event loop. The bundled model
plans short stories about things that are bought, given and shared, and answers anything else without steps.
With another model write budgets of tens of times the size: the bundled one thinks some 200 tokens a call.
"""

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.graph import create_plan_and_solve

llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), reuse_trial_answer=True)
# A trial of a plan is its first line alone, which tells little of the rest: the plan is thought to its end.
graph = create_plan_and_solve(llm, planner=llm.bind(exit_policy="never"), budget=900)
