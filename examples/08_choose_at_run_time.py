"""One chain, many settings: a policy, a budget or a whole model is chosen by the configuration of the call."""

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField

from langchain_earlyexit import DEER, ChatEarlyExit

thinker = ChatEarlyExit(model="pocket", seed=4).configurable_fields(
    exit_policy=ConfigurableField(id="policy"),
    thinking_budget=ConfigurableField(id="budget"),
)
llm = thinker.configurable_alternatives(
    ConfigurableField(id="mode"),
    default_key="thinks",
    answers_at_once=ChatEarlyExit(model="pocket", seed=4, thinking_budget=0),
)
chain = ChatPromptTemplate.from_messages([("human", "What is {sum}?")]) | llm

for configurable in ({}, {"policy": DEER(threshold=0.95)}, {"budget": 24}, {"mode": "answers_at_once"}):
    message = chain.invoke({"sum": "25 * 4 + 9"}, config={"configurable": configurable})
    record = message.response_metadata["early_exit"]
    print(
        f"{configurable!s:40} {record['reason']:12} {record['thinking_tokens']:3} thinking tokens: {message.content!r}"
    )
