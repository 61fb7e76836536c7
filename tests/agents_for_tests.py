"""A model for graphs: a Python function reads the last turn and says what to think and what to answer."""

import re

import numpy as np
from langchain_core.messages import HumanMessage

from langchain_earlyexit import ChatEarlyExit, FunctionEngine, Never
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.guarantee import Calibration, Level, Setting, with_policy

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def talker(says, **settings):
    """A `ChatEarlyExit` whose `says(turns)` gives (thinking, answer) for a prompt's list of (role, text)."""
    tokenizer, known = byte_tokenizer(), {}

    def next_logits(ids):
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        prompt, opened, _ = text.rpartition("<|im_start|>assistant\n")
        if not opened:  # a piece of a long prompt: nothing is drawn from what follows it
            return np.zeros(len(tokenizer), dtype=np.float32)
        if prompt not in known:
            known[prompt] = scripted(tokenizer, *says(_TURN.findall(prompt)))
        return known[prompt](ids)

    return ChatEarlyExit(engine=FunctionEngine(next_logits, tokenizer), **{"seed": 1, **settings})


class Noting(ChatEarlyExit):
    """Notes with what confidence or policy it is asked."""

    def _start(self, messages, stop, kwargs):
        self.metadata["asked"].append({key: kwargs.get(key) for key in ("confidence", "exit_policy")})
        return super()._start(messages, stop, kwargs)


def promising(says, strictest=0.001, **settings):
    """A model with a calibration whose strictest level is `strictest`, and whose levels never leave early."""
    plain = talker(says)
    bound, asked = plain.load(), [HumanMessage("?")]
    how = plain.call_settings(exit_policy="never")
    never = Setting(Never(), 0, 0)
    binds = with_policy(bound.call_fingerprint(asked, how, bound.request(asked, how)), Never())
    made = Calibration("answer_changed", 0.1, 5000, (never,), (Level(strictest, never, 1.0),), binds)
    return Noting(engine=plain.engine, calibration=made, metadata={"asked": []}, **{"seed": 1, **settings})


PROBLEM = "Ann has 3 boxes of 4 pens. She gets 2 and then 2 more. How many pens?"
PLAN = ["What is 3 * 4?", "What is 2 + 2?", "What is #1 + #2?"]


def arithmetician(turns):
    """Plans PROBLEM, does the sums of the steps, and composes the last step's result."""
    [*_, (_, asked)] = turns
    if turns[0] == ("system", "Split the problem into numbered steps."):
        return "A plan.\n" * 4, "\n".join(f"{i}. {step}" for i, step in enumerate(PLAN, 1))
    if found := re.fullmatch(r"What is (\d+) ([+*]) (\d+)\?", asked):
        left, sign, right = found.groups()
        result = int(left) * int(right) if sign == "*" else int(left) + int(right)
        return f"It is {result}.\n" * 4, rf"The final answer is \boxed{{{result}}}."
    last = re.findall(r"= (\S+)", asked)
    return "So.\n", rf"The final answer is \boxed{{{last[-1] if last else '?'}}}."


def chatterer(length):
    """Thinks `length` tokens, the end tag included, and answers with the question in capitals."""

    def says(turns):
        return ("thought " * (length // 8 + 1))[: length - 2] + "\n", turns[-1][1].upper()

    return says
