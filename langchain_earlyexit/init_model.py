"""One function that makes a chat model from a name, of this package or of any provider that LangChain knows.

LangChain's own `init_chat_model` takes no providers but those it lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import ConfigurableField, Runnable

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.settings import Settings

PROVIDER: Final = "earlyexit"
"""What stands before the colon."""


def init_chat_model(
    model: str,
    *,
    model_provider: str | None = None,
    configurable_fields: Literal["any"] | Sequence[str] | None = None,
    config_prefix: str | None = None,
    **settings: Any,
) -> BaseChatModel | Runnable[Any, Any]:
    """A chat model by name: `init_chat_model("earlyexit:Qwen/Qwen3-8B", exit_policy="lynx", confidence=0.95)`.

    Args:
        model: `earlyexit:` and what `ChatEarlyExit(model=…)` takes; or any name that
            `langchain.chat_models.init_chat_model` takes, so that one setting of an application can name either.
        model_provider: the provider, where it does not stand before a colon.
        configurable_fields: fields that a run's `config["configurable"]` may set, or "any" for all that decide how a
            call is answered. What is loaded, from where, and with whose key is not among them: name those fields to
            open them.
        config_prefix: stands, with `_`, before the names of these fields in `config["configurable"]`.
        settings: what the model's class takes.

    Raises:
        ImportError: the model is another provider's, and `langchain` is not installed.
        ValueError: a field that is none; a prefix without fields.
    """
    named, _, rest = model.partition(":")
    if model_provider is None and named == PROVIDER and rest:
        model_provider, model = PROVIDER, rest
    if model_provider != PROVIDER:
        return _other(model, model_provider, configurable_fields, config_prefix, settings)
    made = ChatEarlyExit(model=model, **settings)
    if configurable_fields is None:
        if config_prefix is not None:
            raise ValueError(
                f"config_prefix is {config_prefix!r}, but configurable_fields is None: nothing would have the prefix; "
                "name the fields, or leave the prefix out"
            )
        return made
    of_a_call = [field.name for field in fields(Settings)]
    opened = of_a_call if configurable_fields == "any" else list(configurable_fields)
    unknown = [name for name in opened if name not in ChatEarlyExit.model_fields]
    if unknown:
        raise ValueError(f"configurable_fields names {unknown}, which ChatEarlyExit has not")
    prefix = f"{config_prefix}_" if config_prefix else ""
    return made.configurable_fields(**{name: ConfigurableField(id=prefix + name) for name in opened})


def _other(
    model: str,
    provider: str | None,
    opened: Literal["any"] | Sequence[str] | None,
    prefix: str | None,
    settings: dict[str, Any],
) -> BaseChatModel | Runnable[Any, Any]:
    try:
        from langchain.chat_models import init_chat_model as langchain_init
    except ImportError as error:
        raise ImportError(
            f"{model!r} is not one of ours (those begin with '{PROVIDER}:'), and to ask LangChain for it the package "
            "langchain is needed: pip install 'langchain-earlyexit[agents]'"
        ) from error
    chosen: Any = opened if opened is None or isinstance(opened, str) else list(opened)
    made: BaseChatModel | Runnable[Any, Any] = langchain_init(
        model, model_provider=provider, configurable_fields=chosen, config_prefix=prefix, **settings
    )
    return made
