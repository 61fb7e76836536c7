"""Content-block events: the thinking is a block of its own, and finishes at the moment of the exit, with the reason."""

from langchain_earlyexit import DEER, ChatEarlyExit

with ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), seed=4) as llm:
    stream = llm.stream_events("What is 37 + 48 * 2 - 15?", version="v3")
    for event in stream:
        if event["event"] == "content-block-finish":
            block = event["content"]
            print(block["type"], block.get("extras", {}).get("exit", block.get("text")))
    print(stream.output.usage_metadata["output_token_details"])
