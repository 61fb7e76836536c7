"""Stream thinking and answer apart, and close the thinking by hand after fifty characters of it."""

from langchain_earlyexit import ChatEarlyExit

with ChatEarlyExit(model="pocket", seed=1) as llm:
    thought = ""
    for chunk in llm.stream("What is 86 * 7?"):
        thinking = chunk.additional_kwargs.get("reasoning_content", "")
        thought += thinking
        print(f"[thinking] {thinking!r}" if thinking else f"[answer]   {chunk.content!r}")
        if len(thought) > 50:
            llm.answer_now(chunk.id)
        if record := chunk.response_metadata.get("early_exit"):
            print(record["reason"], record["thinking_tokens"])
