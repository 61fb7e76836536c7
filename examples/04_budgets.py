"""Cap the thinking: exactly, by name, not at all. And ask many questions at once."""

import asyncio

from langchain_earlyexit import ChatEarlyExit

QUESTION = "What is 712 + 189?"


async def main() -> None:
    with ChatEarlyExit(model="pocket", seed=3) as llm:
        calls = [
            llm.ainvoke(QUESTION, thinking_budget=0),
            llm.ainvoke(QUESTION, thinking_budget=20),
            llm.ainvoke(QUESTION, reasoning_effort="minimal"),
            llm.ainvoke(QUESTION, max_tokens=40),
        ]
        for message in await asyncio.gather(*calls):
            record = message.response_metadata["early_exit"]
            print(record["reason"], record["thinking_tokens"], message.usage_metadata["output_tokens"], message.content)


asyncio.run(main())
