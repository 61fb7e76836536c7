"""One function that makes a chat model from a name, of this package or of any provider that LangChain knows.

LangChain's own `init_chat_model` takes no providers but those it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig
from langchain_core.runnables.utils import ConfigurableFieldSpec

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.configurable import Configurable
from langchain_earlyexit.settings import NAMES

PROVIDER: Final = "earlyexit"
"""What stands before the colon."""

Named = tuple[str | None, str | None]
"""A model and its provider, as far as they are named; of ours the provider always is."""

_CHOICE = ("model", "model_provider")
_COMMON = {*BaseChatModel.model_fields, "temperature", "max_tokens", "timeout", "max_retries", "stop"} - {
    "profile", "custom_get_token_ids",
}  # fmt: skip
"""What chat models of all providers take, and what means the same to them."""


def init_chat_model(
    model: str | None = None,
    *,
    model_provider: str | None = None,
    configurable_fields: Literal["any"] | Sequence[str] | None = None,
    config_prefix: str | None = None,
    **settings: Any,
) -> BaseChatModel | Runnable[Any, Any]:
    """A chat model by name, which the configuration of a run may set, or choose.

    Example:
        >>> from langchain_earlyexit import init_chat_model
        >>> opened = ["model", "thinking_budget"]
        >>> llm = init_chat_model("earlyexit:pocket", exit_policy="deer", configurable_fields=opened)
        >>> llm.invoke("What is 12 * 7?", {"configurable": {"thinking_budget": 64}})  # doctest: +SKIP
        >>> llm.invoke("What is 12 * 7?", {"configurable": {"model": "openai:gpt-5"}})  # doctest: +SKIP

    What is done to a configurable model (`bind_tools`, `with_structured_output`, `bind`, `with_config`) leaves it
    configurable, in `create_agent` too.

    Args:
        model: `earlyexit:` and what `ChatEarlyExit(model=…)` takes; or any name that
            `langchain.chat_models.init_chat_model` takes, so that one setting of an application can name either. None
            leaves it to the runs.
        model_provider: the provider, where it does not stand before a colon.
        configurable_fields: fields that a run's `config["configurable"]` may set, or "any" for all that decide how a
            call is answered. What is loaded, from where, and with whose key is not among those: name such fields to
            open them. `model` and `model_provider` let a run choose the model; a name without a provider is of ours
            where the first model is, and else as LangChain reads it. Of a first model that is not ours, "any" is
            LangChain's: all fields, these two among them. None, without a model, is these two.
        config_prefix: stands, with `_`, before the names of these fields in `config["configurable"]`.
        settings: what the model's class takes. Where a run chooses ours instead of another provider's, or the other
            way round, those that all providers share go along (such as `temperature` and `max_tokens`), and those that
            the run sets; a key or an address never does. Models that runs choose are kept until `close()`.

    Raises:
        ImportError: the model is another provider's, and `langchain` is not installed.
        TypeError: a model that is no name.
        ValueError: a field that is none; a prefix without fields; no model, and none that a run may name.
    """
    if model is not None and not isinstance(model, str):
        raise TypeError(
            f"model must be a name such as 'earlyexit:pocket', not a {type(model).__name__}; use that as is"
        )
    if model is None and configurable_fields is None:
        configurable_fields = _CHOICE
    if config_prefix and configurable_fields is None:
        raise ValueError(
            f"config_prefix is {config_prefix!r}, but configurable_fields is None: nothing would have the prefix; "
            "name the fields, or leave the prefix out"
        )
    first = _named(model, model_provider)
    choosing = [name for name in _CHOICE if name in (configurable_fields or ())]
    opened: Literal["any"] | list[str]
    if configurable_fields == "any":
        opened, choosing = "any", [] if _ours(first) else list(_CHOICE)
    else:
        opened = [name for name in configurable_fields or () if name not in _CHOICE]
    if model is None and "model" not in choosing:
        raise ValueError(f"no model is named, and configurable_fields={configurable_fields!r} lets no run name one")
    unknown = [] if opened == "any" else [name for name in opened if name not in ChatEarlyExit.model_fields]
    if unknown and _ours(first) and not choosing:
        raise ValueError(f"configurable_fields names {unknown}, which ChatEarlyExit has not")
    prefix = config_prefix or ""
    prefix += "_" if prefix and not prefix.endswith("_") else ""

    def make(wanted: Named) -> Any:
        same = model is None or _ours(wanted) == _ours(first)
        given = {name: value for name, value in settings.items() if same or name in _COMMON}
        return _make_ours(wanted, opened, prefix, given) if _ours(wanted) else _other(wanted, opened, prefix, given)

    if not choosing:
        return make(first)  # type: ignore[no-any-return]
    made = {first: make(first)} if _ours(first) and model is not None else {}
    ids = {name: prefix + name for name in choosing}
    return ChosenModel(default=made.get(first), first=first, ids=ids, make=make, made=made)


class ChosenModel(Configurable):
    """A chat model that a run names. Each is made once, when it is first named.

    Attributes:
        first: that of a run which names none.
        ids: where in the configuration a run says "model" and "model_provider", of those that it may say.
        make: makes one.
        made: those that were made.
    """

    first: Named
    ids: dict[str, str]
    make: Callable[[Named], Any]
    made: Any

    def chosen(self, config: RunnableConfig) -> Any:
        """The model that the configuration names.

        Raises:
            ValueError: it names none, and none was named before.
        """
        given = config.get("configurable", {})
        wanted = _meant(self.first, {name: given[key] for name, key in self.ids.items() if given.get(key) is not None})
        if wanted[0] is None:
            raise ValueError(f"no model is named: name one in config['configurable'][{self.ids['model']!r}]")
        if wanted not in self.made:
            self.made.setdefault(wanted, self.make(wanted))
        return self.made[wanted]

    def models(self) -> Iterable[Any]:
        """Those of ours that were made."""
        return [model for named, model in list(self.made.items()) if _ours(named)]

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What a run may set, if it leaves the model as it is."""
        said = dict(zip(_CHOICE, self.first, strict=True))
        specs = [ConfigurableFieldSpec(id=key, annotation=str, default=said[name]) for name, key in self.ids.items()]
        return specs + (self.default.config_specs if self.default is not None else [])


def _ours(named: Named) -> bool:
    return named[1] == PROVIDER


def _named(model: str | None, provider: str | None) -> Named:
    before, _, rest = (model or "").partition(":")
    return (rest, PROVIDER) if before == PROVIDER and rest and provider in (None, PROVIDER) else (model, provider)


def _meant(first: Named, asked: Mapping[str, str]) -> Named:
    """The model that is meant where `first` was, and then a run asked for something else."""
    model = asked.get("model", first[0])
    if "model_provider" in asked or "model" not in asked:
        return _named(model, asked.get("model_provider", first[1]))
    # Of ours, no name has a colon. Of others some do, behind which there is no model.
    speaks = asked["model"].startswith(f"{PROVIDER}:") or (_ours(first) and ":" in asked["model"])
    return _named(model, None if speaks else first[1])


def _make_ours(named: Named, opened: Literal["any"] | list[str], prefix: str, settings: dict[str, Any]) -> Any:
    made = ChatEarlyExit(**{**settings, "model": named[0]})
    names = NAMES if opened == "any" else [name for name in opened if name in ChatEarlyExit.model_fields]
    return made.configurable_fields(**{name: ConfigurableField(id=prefix + name) for name in names}) if names else made


def _other(named: Named, opened: Literal["any"] | list[str], prefix: str, settings: dict[str, Any]) -> Any:
    try:
        from langchain.chat_models import init_chat_model as langchain_init
    except ImportError as error:
        raise ImportError(
            f"{named[0]!r} is not one of ours (those begin with '{PROVIDER}:'), and to ask LangChain for it the "
            "package langchain is needed: pip install 'langchain-earlyexit[agents]'"
        ) from error
    fields: Any = opened or None
    return langchain_init(
        named[0], model_provider=named[1], configurable_fields=fields, config_prefix=prefix or None, **settings
    )
