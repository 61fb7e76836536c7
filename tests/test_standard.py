"""LangChain's own standard tests: on the pocket reasoner, and, for plumbing, on a function that knows the answers."""

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from oracle import oracle

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.pocket import weights_dir


class _Standard:
    has_tool_calling = True
    has_tool_choice = True
    has_structured_output = True
    supports_json_mode = True
    supports_model_override = False

    @property
    def chat_model_class(self):
        return ChatEarlyExit

    @property
    def chat_model_params(self):
        return {"model": self.weights, "exit_policy": DEER(threshold=0.95), "seed": 7}

    @pytest.fixture(autouse=True)
    def _weights(self, pocket):
        self.weights = pocket

    # The base class reads these without fixtures while it collects.
    weights = "pocket"

    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["reasoning_output"], "stream": ["reasoning_output"]}

    def invoke_with_reasoning_output(self, *, stream=False):
        llm = self.chat_model_class(**self.chat_model_params)
        question = "What is 37 + 48 * 2 - 15?"
        if not stream:
            return llm.invoke(question)
        whole = None
        for chunk in llm.stream(question):
            whole = chunk if whole is None else whole + chunk
        return whole


class TestUnit(_Standard, ChatModelUnitTests):
    pass


class TestIntegration(_Standard, ChatModelIntegrationTests):
    # Weights that were never taught tools have a chat template that does not show them.
    has_tool_calling = has_tool_choice = has_structured_output = supports_json_mode = (
        "<tool_call>" in (weights_dir() / "chat_template.jinja").read_text()
    )


class TestPlumbing(_Standard, ChatModelIntegrationTests):
    @property
    def chat_model_params(self):
        return {"engine": oracle(), "exit_policy": DEER(threshold=0.95), "seed": 7, "temperature": 0}
