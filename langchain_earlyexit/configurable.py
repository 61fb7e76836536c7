"""Chat models that a run's configuration sets or chooses, whatever was done to them before the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

from langchain_core.messages import AIMessage
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.runnables.configurable import DynamicRunnable, RunnableConfigurableFields
from langchain_core.runnables.utils import AnyConfigurableField, ConfigurableFieldMultiOption


class Configurable(DynamicRunnable[Any, Any]):
    """A chat model that is only known when a run begins. `bind_tools` and the like wait for it.

    Attributes:
        default: stands in for the run's model where there is no run: whose attributes these are.
        operations: what is done to the run's model before it is asked: names of methods, and their arguments.
    """

    default: Any = None
    operations: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = ()

    @property
    def InputType(self) -> Any:
        """That of the default."""
        return Any if self.default is None else self.default.InputType

    @property
    def OutputType(self) -> Any:
        """That of the default, as long as nothing is done to it."""
        return Any if self.default is None or self.operations else self.default.OutputType

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("default") is None:
            raise AttributeError(f"{name!r} is an attribute of models, and which one is meant only a run tells")
        return super().__getattr__(name)

    @abstractmethod
    def chosen(self, config: RunnableConfig) -> Any:
        """The model of a run with this configuration."""

    @abstractmethod
    def models(self) -> Iterable[Any]:
        """Those of our models that runs come to, for `close` and `answer_now`."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """As the `bind_tools` of the run's model."""
        return self._later("bind_tools", tools, **kwargs)

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[Any, Any]:
        """As the `with_structured_output` of the run's model."""
        return self._later("with_structured_output", schema, **kwargs)

    def _later(self, name: str, *args: Any, **kwargs: Any) -> Self:
        return self.model_copy(update={"operations": (*self.operations, (name, args, kwargs))})

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Self:
        """With a configuration beneath that of the runs."""
        return self.model_copy(update={"config": merge_configs(self.config, config, RunnableConfig(**kwargs))})  # type: ignore[typeddict-item]

    def prepare(self, config: RunnableConfig | None = None) -> tuple[Runnable[Any, Any], RunnableConfig]:
        """The run's model, and the configuration that it is called with."""
        # In a graph the run's configuration comes from around the call: it must be known when ours is put beneath it.
        return super().prepare(ensure_config(config))

    def _prepare(self, config: RunnableConfig | None = None) -> tuple[Runnable[Any, Any], RunnableConfig]:
        config = ensure_config(config)
        model = self.chosen(config)
        for name, args, kwargs in self.operations:
            model = getattr(model, name)(*args, **kwargs)
        return model, config

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """As every runnable's; with one configuration for all it is the model's own, however wide that is."""
        if isinstance(config, list):
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        model, config = self.prepare(config)
        return model.batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As the `stream_events` of the run's model."""
        model, config = self.prepare(config)
        return model.stream_events(input, config, **kwargs)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As the `astream_events` of the run's model."""
        model, config = self.prepare(config)
        return model.astream_events(input, config, **kwargs)

    def close(self) -> None:
        """`ChatEarlyExit.close` for the models of all runs."""
        for model in self.models():
            model.close()

    def answer_now(self, message_id: str | None = None) -> int:
        """`ChatEarlyExit.answer_now` for the calls of all runs."""
        return sum(model.answer_now(message_id) for model in self.models())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False, as for the model itself."""
        return False


class ConfiguredFields(Configurable, RunnableConfigurableFields[Any, Any]):
    """What `ChatEarlyExit.configurable_fields` makes: the model of a run is the default with other fields."""

    default: Any

    def chosen(self, config: RunnableConfig) -> Any:
        """The default, with the fields that the configuration sets."""
        given = config.get("configurable", {})
        changed: dict[str, Any] = {}
        for name, field in self.fields.items():
            if isinstance(field, ConfigurableField):
                if field.id in given:
                    changed[name] = given[field.id]
            elif isinstance(field, ConfigurableFieldMultiOption):
                keys = given.get(field.id)  # none of the options is a choice too
                changed[name] = [field.options[key] for key in (field.default if keys is None else keys)]
            else:
                changed[name] = field.options[given.get(field.id) or field.default]
        return self.default.configured(**changed) if changed else self.default

    def models(self) -> Iterable[Any]:
        """The default, which those of the runs share everything with."""
        return (self.default,)

    def configurable_fields(self, **kwargs: AnyConfigurableField) -> Self:
        """With more fields."""
        more = self.default.configurable_fields(**{**self.fields, **kwargs})
        return self.model_copy(update={"fields": more.fields})

    def _later(self, name: str, *args: Any, **kwargs: Any) -> Self:
        getattr(self.default, name)(*args, **kwargs)  # what can be refused is refused here, before any run
        return super()._later(name, *args, **kwargs)
