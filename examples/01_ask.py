"""Ask a question: the answer, the thinking, what it cost, and why the thinking stopped."""

from langchain_earlyexit import DEER, ChatEarlyExit

with ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), seed=1) as llm:
    message = llm.invoke("What is 37 + 48 * 2 - 15?")

print(message.content)
print(message.additional_kwargs["reasoning_content"])
print(message.usage_metadata)
print(message.response_metadata["early_exit"])
