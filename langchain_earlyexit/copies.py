"""Copies of a chat model: settings are copied, what runs is not. A copy binds its engine itself, at its first call."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self


class Copied:
    """Mixin in front of a pydantic model whose private attributes are all resources: locks, calls, loaded weights.

    Pydantic copies private attributes with the rest. Then closing a copy would free the weights of the model it was
    made of, and a copy with other settings would run on the old engine. Here copies, deep copies, `model_copy` and
    pickles start with fresh ones. An engine of the user's own is a setting like others, but is shared, never copied.
    """

    engine: Any
    __pydantic_private__: dict[str, Any] | None
    __private_attributes__: ClassVar[dict[str, Any]]

    def _settings_state(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        fields = {name: value for name, value in state["__dict__"].items() if name != "_serialized"}  # core's cache
        set_ = set(state["__pydantic_fields_set__"])
        return {**state, "__dict__": fields, "__pydantic_fields_set__": set_, "__pydantic_private__": None}

    def _of_state(self, state: dict[Any, Any]) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(state)
        return twin

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        private = self.__private_attributes__.items()
        fresh = {name: it.default_factory() if it.default_factory else it.default for name, it in private}
        object.__setattr__(self, "__pydantic_private__", fresh)

    def sharing(self, twin: Self) -> Self:
        """`twin`, made to run on what this one has loaded, its calls among this one's."""
        object.__setattr__(twin, "__pydantic_private__", self.__pydantic_private__)
        return twin

    def __copy__(self) -> Self:
        return self._of_state(self._settings_state())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return self._of_state(copy.deepcopy(self._settings_state(), memo))

    def __getstate__(self) -> dict[Any, Any]:
        if not isinstance(self.engine, str):
            raise TypeError(
                f"a model on an engine of your own ({self.engine.name}) cannot be pickled: build it where it is needed"
            )
        return self._settings_state()
