"""Answer quickly; think to the end only where that was doubtful: `graph` for `langgraph dev`, or to copy from.

Nothing is loaded at import; the weights come with the first question, off the event loop.
"""

from langchain_earlyexit import DEER, ChatEarlyExit, FirstOf
from langchain_earlyexit.graph import create_cascade
from langchain_earlyexit.policies import GiveUp

llm = ChatEarlyExit(model="pocket")
quick = llm.bind(exit_policy=FirstOf(DEER(threshold=0.9), GiveUp(threshold=0.5)), include_checks=True)
# A larger model would stand here; the small one with all the thinking it wants shows the same.
graph = create_cascade(quick, llm, budget=900)
