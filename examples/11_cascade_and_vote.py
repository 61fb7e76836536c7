"""Two ways to spend more only where it helps: a cascade that escalates, and a vote that stops when it is settled."""

from langchain_earlyexit import DEER, ChatEarlyExit, FirstOf
from langchain_earlyexit.graph import create_cascade, create_self_consistency
from langchain_earlyexit.policies import GiveUp

with ChatEarlyExit(model="pocket", seed=6) as llm:
    quick = llm.bind(exit_policy=FirstOf(DEER(threshold=0.9), GiveUp(threshold=0.5)), include_checks=True)
    cascade = create_cascade(quick, llm, budget=600)
    for question in ("What is 41 + 58?", "What is 78 * 96?"):
        done = cascade.invoke({"messages": [("user", question)]})
        asked = [f"{spend['node']} ({spend['exit']['reason']})" for spend in done["ledger"].values()]
        print(question, "->", done["messages"][-1].text, "by way of", ", ".join(asked))

    vote = create_self_consistency(llm.bind(exit_policy=DEER(threshold=0.95)), 5, seed=100)
    done = vote.invoke({"messages": [("user", "What is 58 * 43?")]})
    print(done["messages"][-1].text, done["votes"], f"{len(done['ledger'])} of 5 chains were run")
