"""Test a chain without a model: a Python function thinks and answers, the rest is the real thing."""

from langchain_core.output_parsers import StrOutputParser

from langchain_earlyexit import DEER, ChatEarlyExit, FunctionEngine
from langchain_earlyexit.engines.function import byte_tokenizer, scripted

tokenizer = byte_tokenizer()
function = scripted(
    tokenizer,
    thinking="Two and two is four.\n\nLet me see again. Four.\n\nAnd once more: four.\n",
    # Unsure until it has looked twice: so the exit comes after the second paragraph.
    answer=lambda chain: ("The final answer is \\boxed{4}.", 0.99 if "again" in chain else 0.6),
)
llm = ChatEarlyExit(engine=FunctionEngine(function, tokenizer), exit_policy=DEER(0.9), answer_form="boxed")
message = llm.invoke("What is 2 + 2?")
assert (llm | StrOutputParser()).invoke("What is 2 + 2?") == message.text
print(message.text, message.response_metadata["early_exit"]["reason"])
