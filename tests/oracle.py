"""A model that knows the answers to LangChain's standard tests: for plumbing, where no small model has the knowledge.

It thinks one line, then types an answer byte by byte, whatever of it the prompt holds already.
"""

import json

import numpy as np

from langchain_earlyexit import FunctionEngine
from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.toolcalls import HERMES

THINKING = "I know this one."
JOKE = {"setup": "Why do cats win?", "punchline": "They have nine lives."}

ASKED = (
    ("magic_function_no_args()", "magic_function_no_args", {}),
    ("magic_function(3)", "magic_function", {"input": 3}),
    ("Hello!", "magic_function", {"input": 3}),
    ("Pirate greeting", "greeting_generator", {"answer_style": "pirate"}),
    ("weather in San Francisco", "get_weather", {"location": "San Francisco, CA"}),
    ("What is 3 + 4", "my_adder_tool", {"a": 3, "b": 4}),
    ("你好啊集团", "unicode_customer", {"customer_name": "你好啊集团", "description": "Hello Group"}),
    ("こんにちは", "unicode_customer", {"customer_name": "こんにちは株式会社", "description": "Hello Corporation"}),
)


def answer_to(prompt):
    """What to say after this prompt."""
    asked = prompt.rpartition("<|im_start|>user\n")[2]
    if "<tool_response>" not in asked:
        for text, name, arguments in ASKED:
            if text in asked and f'"name": "{name}"' in prompt:
                return HERMES.text([{"name": name, "arguments": arguments}])
    if "joke about cats" in asked:
        names = [name for name in ("JokeDict", "Joke") if f'"name": "{name}"' in prompt]
        return HERMES.text([{"name": names[0], "arguments": JOKE}]) if names else json.dumps(JOKE)
    return "hi there, you."


def oracle():
    """The engine."""
    tokenizer = byte_tokenizer()
    size = len(tokenizer)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    turn = ids_of("<|im_start|>assistant\n")

    def next_logits(ids):
        logits = np.zeros(size, dtype=np.float32)
        starts = (at for at in range(len(ids) - len(turn), -1, -1) if list(ids[at : at + len(turn)]) == turn)
        start = next(starts, None)
        if start is None:  # a long prompt comes in parts
            return logits
        prompt = tokenizer.decode(ids[:start])
        script = [*ids_of(f"<think>\n{THINKING}</think>\n\n{answer_to(prompt)}"), tokenizer.eos_token_id]
        written = list(ids[start + len(turn) :])
        done = next(
            n for n in range(min(len(script), len(written)), -1, -1) if written[len(written) - n :] == script[:n]
        )
        logits[script[min(done, len(script) - 1)]] = 30.0
        return logits

    return FunctionEngine(next_logits, tokenizer)
