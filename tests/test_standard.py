"""LangChain's own standard tests on the pocket reasoner: the unit suite, and the integration suite without tools."""

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_earlyexit import DEER, ChatEarlyExit


class _Standard:
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
    def has_tool_calling(self):
        return False

    @property
    def has_tool_choice(self):
        return False

    @property
    def has_structured_output(self):
        return False

    @property
    def supports_model_override(self):
        return False

    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["reasoning_output"], "stream": ["reasoning_output"]}


class TestUnit(_Standard, ChatModelUnitTests):
    pass


class TestIntegration(_Standard, ChatModelIntegrationTests):
    def invoke_with_reasoning_output(self, *, stream=False):
        llm = self.chat_model_class(**self.chat_model_params)
        question = "What is 37 + 48 * 2 - 15?"
        if not stream:
            return llm.invoke(question)
        whole = None
        for chunk in llm.stream(question):
            whole = chunk if whole is None else whole + chunk
        return whole
