"""Early exit for local reasoning models, as a drop-in LangChain chat model.

Importing this package loads neither torch nor transformers: names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_earlyexit._version import __version__

if TYPE_CHECKING:
    from langchain_earlyexit.answers import BOXED, CHOICE, TEXT, AnswerForm
    from langchain_earlyexit.callbacks import ExitCallbackHandler, get_exit_callback
    from langchain_earlyexit.chat_models import ChatEarlyExit
    from langchain_earlyexit.engines.function import FunctionEngine
    from langchain_earlyexit.guarantee import Calibration
    from langchain_earlyexit.init_model import init_chat_model
    from langchain_earlyexit.policies import (
        DEER,
        EAT,
        LYNX,
        AnswerConvergence,
        CoDEStop,
        FirstOf,
        GiveUp,
        Never,
        Policy,
        ProbeThenTrial,
        ThinkBrake,
        replay,
    )
    from langchain_earlyexit.probe import Probe
    from langchain_earlyexit.record import ExitRecord
    from langchain_earlyexit.trace import Check, Decision, Trace

_HOMES = {
    "answers": ("BOXED", "CHOICE", "TEXT", "AnswerForm"),
    "callbacks": ("ExitCallbackHandler", "get_exit_callback"),
    "chat_models": ("ChatEarlyExit",),
    "engines.function": ("FunctionEngine",),
    "guarantee": ("Calibration",),
    "init_model": ("init_chat_model",),
    "policies": (
        "DEER",
        "EAT",
        "LYNX",
        "AnswerConvergence",
        "CoDEStop",
        "FirstOf",
        "GiveUp",
        "Never",
        "Policy",
        "ProbeThenTrial",
        "ThinkBrake",
        "replay",
    ),
    "probe": ("Probe",),
    "record": ("ExitRecord",),
    "trace": ("Check", "Decision", "Trace"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BOXED",
    "CHOICE",
    "DEER",
    "EAT",
    "LYNX",
    "TEXT",
    "AnswerConvergence",
    "AnswerForm",
    "Calibration",
    "ChatEarlyExit",
    "Check",
    "CoDEStop",
    "Decision",
    "ExitCallbackHandler",
    "ExitRecord",
    "FirstOf",
    "FunctionEngine",
    "GiveUp",
    "Never",
    "Policy",
    "Probe",
    "ProbeThenTrial",
    "ThinkBrake",
    "Trace",
    "__version__",
    "get_exit_callback",
    "init_chat_model",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
