"""Early exit for local reasoning models, as a drop-in LangChain chat model."""

from langchain_earlyexit._version import __version__

__all__ = ["__version__"]
