"""How much a chat model may think in one call, in its own words: exact for this package's, as near as others allow.

Other providers' models are known by what they report (`_llm_type`, profile, fields): none of their packages is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.record import from_cache
from langchain_earlyexit.settings import BUDGET_NAMES, EFFORT_BUDGETS

_LEAST_OF_ANTHROPIC: Final = 1024
"""Anthropic's API takes no thinking budget below it."""

_USUAL_LEVELS: Final = ("low", "medium", "high")
"""What every model with an effort has, where its profile lists none."""

_EFFORT_NAMES: Final = frozenset({"effort", "reasoning_effort"})
"""Two words for one keyword."""

_THOUGHTS: Final = frozenset({"thinking", "redacted_thinking", "reasoning"})


@dataclass(frozen=True)
class Turned:
    """A model that was told how much to think.

    Attributes:
        model: it, or a copy with another constructor setting where that would win over the call's.
        settings: keywords of the call.
        cap: thinking tokens that this holds it to, exactly; None where the provider's words are only an effort.
        thinks_on: at a cap of 0, the least that the model offers, where that is not nothing.
    """

    model: BaseChatModel
    settings: dict[str, Any]
    cap: int | None = None
    thinks_on: str | None = None


def turn(
    model: BaseChatModel, cap: int, settings: Mapping[str, Any], messages: Sequence[AnyMessage] = ()
) -> Turned | None:
    """Tell `model` to think at most `cap` tokens, or less where it was already told so.

    Exact: `ChatEarlyExit` (`thinking_budget`), ChatQwen (`thinking_budget`), ChatAnthropic with
    `thinking={"type": "enabled", "budget_tokens": ...}`; caps below 1024 turn that off. An effort, the most of the
    model's levels that `EFFORT_BUDGETS` puts within the cap, and its least where none is: ChatAnthropic (whose thinking
    that never turns on), ChatOpenAI, and any model whose profile lists `reasoning_effort_levels` or that has a
    `reasoning_effort` set. Off at 0 only: ChatOllama with `reasoning=True` (levels where it is a level).

    Args:
        model: any chat model.
        cap: thinking tokens, at least 0.
        settings: keywords the call already has.
        messages: the conversation.

    Returns:
        None where the model has no such knob, or none that can be seen.
    """
    if isinstance(model, ChatEarlyExit):
        own = model.call_settings(**settings).budget
        if own is not None and own <= cap:
            return Turned(model, dict(settings), own)
        kept = {name: value for name, value in settings.items() if name not in BUDGET_NAMES}
        return Turned(model, {**kept, **model.capped(cap, **settings)}, cap)
    kind = getattr(model, "_llm_type", None)
    thinking = settings.get("thinking") or getattr(model, "thinking", None)
    if kind == "anthropic-chat":
        return _anthropic(model, cap, settings, thinking if isinstance(thinking, Mapping) else {}, messages)
    if kind == "chat-ollama":
        return _ollama(model, cap, settings)
    if kind == "chat-qwen":
        return _qwen(model, cap, settings)
    return _effort(model, cap, settings)


def reasoning_tokens(message: AIMessage) -> int | None:
    """Tokens that a call of any model spent on reasoning.

    Where the provider counts all output in one, and there is reasoning in it, all of it: a budget may then seem spent
    too early, and never too late. An answer out of a LangChain cache cost nothing. None where no usage is told.
    """
    usage = message.usage_metadata
    if usage is None:
        return None
    if from_cache(message):
        return 0
    counted = usage.get("output_token_details", {}).get("reasoning")
    if counted is not None:
        return counted
    return usage["output_tokens"] if _thought(message) else 0


def _effort(model: BaseChatModel, cap: int, settings: Mapping[str, Any]) -> Turned | None:
    """The keyword that core's profiles are about. OpenAI's Responses API wraps it in `reasoning`."""
    wrapped = settings.get("reasoning") or getattr(model, "reasoning", None)
    wrapped = wrapped if isinstance(wrapped, Mapping) else None
    own = settings.get("reasoning_effort") or settings.get("effort") or getattr(model, "reasoning_effort", None)
    own = (wrapped or {}).get("effort") or own
    profile = getattr(model, "profile", None) or {}
    # Its older reasoning models take an effort, and their profiles list no levels.
    openai = getattr(model, "_llm_type", "").endswith("openai-chat") and profile.get("reasoning_output")
    listed = profile.get("reasoning_effort_levels") or (_USUAL_LEVELS if own or openai else ())
    level = _level(cap, listed, own or profile.get("reasoning_effort_default"))
    if level is None or not hasattr(model, "reasoning_effort"):
        return None
    kept = {name: value for name, value in settings.items() if name not in _EFFORT_NAMES}
    if wrapped is not None:
        return Turned(model, {**kept, "reasoning": {**wrapped, "effort": level}}, thinks_on=_thinks_on(cap, level))
    return Turned(model, {**kept, "reasoning_effort": level}, thinks_on=_thinks_on(cap, level))


def _anthropic(
    model: BaseChatModel,
    cap: int,
    settings: Mapping[str, Any],
    thinking: Mapping[str, Any],
    messages: Sequence[AnyMessage],
) -> Turned | None:
    if thinking.get("type") == "disabled":
        return Turned(model, dict(settings), 0)
    if thinking.get("type") != "enabled":
        return _anthropic_effort(model, cap, settings)
    least = min(thinking["budget_tokens"], cap)
    off = least < _LEAST_OF_ANTHROPIC or _began_without(messages)
    told = {"type": "disabled"} if off else {**thinking, "budget_tokens": least}
    held = 0 if off else least
    # The constructor's word wins over a call's there.
    if getattr(model, "thinking", None) is not None:
        kept = {name: value for name, value in settings.items() if name != "thinking"}
        return Turned(model.model_copy(update={"thinking": told}), kept, held)
    return Turned(model, {**settings, "thinking": told}, held)


def _anthropic_effort(model: BaseChatModel, cap: int, settings: Mapping[str, Any]) -> Turned | None:
    """Its keyword turns thinking on where nobody else did: an effort in `output_config` only lowers what there is."""
    config = {**(getattr(model, "output_config", None) or {}), **(settings.get("output_config") or {})}
    asked = settings.get("effort") or settings.get("reasoning_effort")
    own = asked or config.get("effort") or getattr(model, "reasoning_effort", None)
    profile = getattr(model, "profile", None) or {}
    listed = profile.get("reasoning_effort_levels") or (_USUAL_LEVELS if own else ())
    level = _level(cap, listed, own or profile.get("reasoning_effort_default"))
    if level is None:
        return None
    kept = {name: value for name, value in settings.items() if name not in _EFFORT_NAMES}
    told = {"reasoning_effort": level} if asked else {"output_config": {**config, "effort": level}}
    return Turned(model, {**kept, **told}, thinks_on=_thinks_on(cap, level))


def _ollama(model: BaseChatModel, cap: int, settings: Mapping[str, Any]) -> Turned | None:
    own = settings.get("reasoning", getattr(model, "reasoning", None))
    if own is None:
        return None  # whether it thinks is then the server's choice, and not seen here
    if isinstance(own, str):
        level = _level(cap, _USUAL_LEVELS, own)
        return Turned(model, {**settings, "reasoning": level}, thinks_on=_thinks_on(cap, level))
    return Turned(model, {**settings, "reasoning": own and cap > 0})


def _qwen(model: BaseChatModel, cap: int, settings: Mapping[str, Any]) -> Turned:
    body = {**(getattr(model, "extra_body", None) or {}), **(settings.get("extra_body") or {})}
    for name in ("enable_thinking", "thinking_budget"):
        own = getattr(model, name, None)
        if own is not None:
            body.setdefault(name, own)
    least = min(cap, body.get("thinking_budget", cap))
    if least > 0:
        return Turned(model, {**settings, "extra_body": {**body, "thinking_budget": least}}, least)
    body.pop("thinking_budget", None)
    return Turned(model, {**settings, "extra_body": {**body, "enable_thinking": False}}, 0)


def _level(cap: int, levels: Sequence[str], own: str | None) -> str | None:
    """The most of `levels` within a cap and no more than what it would be without, the least where there is none."""
    order = list(EFFORT_BUDGETS)
    known = [level for level in order if level in levels]
    most = order.index(own) if own in order else len(order)
    fits = [level for level in known if 0 <= EFFORT_BUDGETS[level] <= cap and order.index(level) <= most]
    return next(iter([*reversed(fits), *known]), None)


def _thinks_on(cap: int, level: str | None) -> str | None:
    return None if cap > 0 or level is None or EFFORT_BUDGETS[level] == 0 else level


def _began_without(messages: Sequence[AnyMessage]) -> bool:
    """Whether this turn's tool calls began without thinking: Anthropic's API then refuses any until it is over."""
    since = max((at for at, message in enumerate(messages) if isinstance(message, HumanMessage)), default=-1)
    answers = [message for message in messages[since + 1 :] if isinstance(message, AIMessage)]
    return bool(answers) and not _thought(answers[0])


def _thought(message: AIMessage) -> bool:
    """Whether any reasoning stands in the message, in its provider's words or core's."""
    blocks = message.content if isinstance(message.content, list) else []
    kinds = {block.get("type") for block in blocks if isinstance(block, dict)}
    return bool(kinds & _THOUGHTS) or bool(message.additional_kwargs.get("reasoning_content"))
