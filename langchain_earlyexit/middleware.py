"""A reasoning budget for the agents of langchain's `create_agent`: how much each step may think, and what it spent.

The agent's loop is not touched: every model call is told its cap and confidence, and its entry goes to the ledger in
the agent's state. Knows nothing of sums and shares (`ledger`, `budgets`) nor of providers' words (`knobs`).
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal, cast, get_args

from langchain_core.messages import AIMessage
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import RunnableConfig, var_child_runnable_config
from langchain_core.runnables.retry import RunnableRetry
from langgraph.types import Command

from langchain_earlyexit.agent_steps import (
    KINDS,
    BudgetedAgentState,
    Kind,
    ReasoningBudgetState,
    ReasoningContext,
    names_of,
    part_of_run,
    share_of,
    step_kind,
)
from langchain_earlyexit.budgets import TOKEN_WEIGHTS, split
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.claims import Claim
from langchain_earlyexit.knobs import reasoning_tokens, turn
from langchain_earlyexit.ledger import (
    Budget,
    Ledger,
    Risk,
    Spend,
    check_budget,
    check_risk,
    merge_ledgers,
    opened,
    remaining,
    risk_of,
)
from langchain_earlyexit.node import claimed, closed, limits_of, tell, tell_step, told_of, turn_of, unwrapped, with_lost
from langchain_earlyexit.policies import Never
from langchain_earlyexit.record import KEY
from langchain_earlyexit.settings import as_policy

# isort: split
from langchain.agents.middleware import TracePolicy, omit_payload
from langchain.agents.middleware.types import AgentMiddleware, ExtendedModelResponse, ModelRequest, ModelResponse
from langchain.agents.structured_output import StructuredOutputError

__all__ = [
    "BudgetedAgentState",
    "Kind",
    "ReasoningBudgetExceededError",
    "ReasoningBudgetMiddleware",
    "ReasoningBudgetState",
    "ReasoningContext",
]

ExitBehavior = Literal["answer", "end", "error"]
Unsupported = Literal["ignore", "warn", "raise"]

_FRESH: Final = "__earlyexit_calls_of_this_node"
_SLACK: Final = 1e-9


class ReasoningBudgetExceededError(Exception):
    """A run or thread wants to think on, its budget is spent, and `exit_behavior` is "error"."""


class ReasoningBudgetMiddleware(AgentMiddleware[ReasoningBudgetState, Any, Any]):
    """Budgets the thinking of an agent's steps, by what kind of step it is.

    Put it last among the middleware: it must see the model that is called in the end.

    `ChatEarlyExit` is held to its caps exactly. What other models offer is used as far as it goes (`knobs.turn`), and
    their reasoning tokens, as they report them, count just the same. Every entry of `state["ledger"]` has its exit
    record; the runs of the models carry `early_exit_step` (the kind) and `early_exit_cap` in their metadata, and the
    `custom` stream has `early_exit.step` events (with `remaining`, and the `pace`: below 1, the run spends faster than
    its weights say) and `early_exit.spent` events.

    A model call that fails spends nothing here. One that succeeds and that a middleware further out throws away, to
    try again, did spend, and stays in the ledger. Only what LangGraph itself throws away with the node is lost to it:
    where a middleware further out interrupts after the call (rather than in `after_model`), the call is made again on
    resuming, and the first is told of in the `custom` stream alone.

    Example:
        >>> from langchain.agents import create_agent
        >>> from langchain_earlyexit import ChatEarlyExit
        >>> from langchain_earlyexit.middleware import ReasoningBudgetMiddleware
        >>> budget = ReasoningBudgetMiddleware(budget=600, most={"routine": 100})
        >>> agent = create_agent(ChatEarlyExit(model="pocket"), tools=[], middleware=[budget])

    Args:
        budget: thinking tokens of one run (one `invoke`, its interrupts included); None for no cap.
        thread_budget: of all the runs of a thread together; needs a checkpointer to mean anything.
        weights: shares of the run's budget by kind, over `budgets.TOKEN_WEIGHTS`: a step takes its share of what is
            left, against the kinds that have not come yet, and at least one token; one that can call no tool is the
            run's last, and takes all that is left. A kind of weight 0 waits for what the others cannot take.
        most: cap of any one step, or by kind; a kind that is not there has none.
        confidence: 1 - epsilon of any one step, or by kind; a kind that is not there is never cut by a policy. None
            leaves that to the model's own policy. Only for a `ChatEarlyExit` with a calibration.
        epsilon: risk of one run: a step whose own, 1 - confidence, is more than is left of it is never cut.
        irreversible: names of tools whose calls cannot be undone. A step that is offered one is never cut by a
            policy; caps hold all the same. A name that a step is not offered is warned of once.
        exit_behavior: what happens when a budget is spent: "answer" goes on without thinking, "end" ends the run with
            a notice, "error" raises `ReasoningBudgetExceededError`.
        unsupported_model_behavior: what to do about a model that cannot be told to think less, or that tells no
            usage: "ignore", "warn" once for each, or "raise" a ValueError.

    Raises:
        ValueError: numbers that cannot be, an unknown kind or behavior, or an epsilon without a confidence.
    """

    state_schema = ReasoningBudgetState
    # The conversation stands in the model's own run; once is enough.
    trace_policy = TracePolicy(process_inputs=omit_payload)

    def __init__(
        self,
        *,
        budget: int | None = None,
        thread_budget: int | None = None,
        weights: Mapping[str, float] | None = None,
        most: int | Mapping[str, int] | None = None,
        confidence: float | Mapping[str, float] | None = None,
        epsilon: float | None = None,
        irreversible: Collection[str] = (),
        exit_behavior: ExitBehavior = "answer",
        unsupported_model_behavior: Unsupported = "warn",
    ) -> None:
        super().__init__()
        self.tools = ()
        for what, given in (("weights", weights), ("most", most), ("confidence", confidence)):
            _check_kinds(what, given)
        for tokens in (budget, thread_budget, *_values(most)):
            if tokens is not None:
                check_budget({"tokens": tokens})
        for level in _values(confidence):
            if not 0 < level < 1:
                raise ValueError(f"confidence is 1 - epsilon, in (0, 1), not {level}; leave a kind out to never cut it")
        if epsilon is not None:
            check_risk({"epsilon": epsilon})
            if confidence is None:
                raise ValueError("epsilon is what the steps' confidence adds up to, and there is none: give confidence")
        for what, chosen, known in (
            ("exit_behavior", exit_behavior, get_args(ExitBehavior)),
            ("unsupported_model_behavior", unsupported_model_behavior, get_args(Unsupported)),
        ):
            if chosen not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}; got {chosen!r}")
        self._weights: dict[str, float] = {kind: TOKEN_WEIGHTS[kind] for kind in KINDS} | dict(weights or {})
        split(0, list(self._weights.values()))  # checks them
        self._budget, self._thread_budget, self._most = budget, thread_budget, most
        self._confidence, self._epsilon = confidence, epsilon
        self._irreversible = frozenset(irreversible)
        self._exit_behavior, self._unsupported = exit_behavior, unsupported_model_behavior
        self._told: set[str] = set()

    def check(self, model: Any) -> None:
        """Raise ValueError where `model` cannot serve the confidence that its steps will ask for."""
        for level in _values(self._confidence):
            model, *_ = unwrapped(model)
            if not isinstance(model, ChatEarlyExit):
                raise ValueError(
                    f"confidence={level} needs a ChatEarlyExit with a calibration; {type(model).__name__} never exits "
                    "early. Leave out confidence, and the budgets hold all the same"
                )
            if not model.serves(level):
                raise ValueError(
                    f"confidence={level} is stricter than all that {model.model}'s calibration has certified, so no "
                    "such step would ever be cut: give a looser one, or calibrate with more questions"
                )

    def check_tools(self, tools: Iterable[Any]) -> None:
        """Raise ValueError where none of `tools`, all that the agent will have, has a name that is irreversible."""
        known = names_of(tools)
        if missing := sorted(self._irreversible - known):
            raise ValueError(
                f"irreversible names {', '.join(missing)}, but its tools are {', '.join(sorted(known)) or 'none'}; "
                "for tools that come while it runs, give create_agent a ReasoningBudgetMiddleware of your own"
            )

    def before_agent(self, state: ReasoningBudgetState, runtime: Any) -> dict[str, Any]:
        """Begin a run: give it an id, and its part of what the graph around may spend."""
        return {"reasoning_run": uuid.uuid4().hex, "reasoning_part": part_of_run(state, _config())}

    async def abefore_agent(self, state: ReasoningBudgetState, runtime: Any) -> dict[str, Any]:
        """Begin a run."""
        return self.before_agent(state, runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> AIMessage | ExtendedModelResponse[Any]:
        """Call the model within its budget."""
        notice, asked, spend, claim = self._asked(request)
        if notice is not None:
            return notice
        with self._as_configured(request, spend), claim as held, self._refused(request, spend, held):
            return self._answered(request, handler(asked), spend, held)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> AIMessage | ExtendedModelResponse[Any]:
        """Call the model within its budget."""
        chat, *_ = unwrapped(request.model, _config())
        if isinstance(chat, ChatEarlyExit) and (chat.calibration is not None or self._risks(request)):
            await asyncio.to_thread(chat.load_calibration)  # a file: not to be read in the loop
        notice, asked, spend, claim = self._asked(request)
        if notice is not None:
            return notice
        with self._as_configured(request, spend), claim as held, self._refused(request, spend, held):
            return self._answered(request, await handler(asked), spend, held)

    def _asked(
        self, request: ModelRequest[Any]
    ) -> tuple[AIMessage | None, ModelRequest[Any], Spend, AbstractContextManager[Claim]]:
        """What ends the run instead, or None; the request as the model gets it; its entry so far; its claim to that."""
        state = cast("dict[str, Any]", request.state)
        config = _config()
        model, bound, _ = unwrapped(request.model, config)
        if isinstance(model, ChatEarlyExit) and model is not request.model:
            # What stands around it would hide that it is one, and steps that must not be cut would be.
            request = request.override(model=model, model_settings={**bound, **request.model_settings})
        ledger = with_lost(merge_ledgers(state.get("ledger", {}), _spent_in_this_node(state)), config)
        kind = step_kind(request)
        around, budget, risk = self._limits(kind, request, ledger)
        left = self._left(budget, ledger)
        caps = [one for one in (self._most_of(kind), left) if one is not None]
        if budget is not None:
            caps.append(share_of(kind, budget, ledger))
        cap = min(caps) if caps else None
        epsilon, heuristic = self._risk_of(kind, request, risk, ledger)
        if epsilon and isinstance(request.model, ChatEarlyExit):
            never = as_policy(request.model_settings.get("exit_policy")) == Never()
            if never or not request.model.serves(1 - epsilon):
                epsilon = 0.0  # so strict that nothing is certified for it: full thinking keeps to it too
        spend = opened(
            kind, budget, risk, within="|".join(around), node="model", turn=turn_of(state), model=_name(request.model),
            cap=cap, epsilon=epsilon or 0.0, heuristic=heuristic,
        )  # fmt: skip
        if risk is None:
            spend["risk"] = state.get("reasoning_run", "")
        if left == 0 and self._exit_behavior != "answer":
            return self._spent(budget, ledger), request, spend, claimed(spend, budget, risk, ledger, config)
        settings = dict(request.model_settings)
        if epsilon is not None and isinstance(request.model, ChatEarlyExit):
            cut = {"confidence": 1 - epsilon, "exit_policy": None}  # a bound policy would be a second word for it
            settings |= cut if epsilon > 0 else {"confidence": None, "exit_policy": "never"}
        elif epsilon:
            spend["epsilon"] = 0.0
            self._cannot(f"{_name(request.model)} never exits early, so its steps cannot be cut at any confidence")
        model = request.model
        turned = None if cap is None else turn(model, cap, settings, request.messages)
        if turned is not None:
            model, settings = turned.model, turned.settings
            spend["cap"] = cap if turned.cap is None else turned.cap
            if turned.thinks_on:
                self._cannot(f"{_name(model)} may think on with nothing left: its least effort is {turned.thinks_on}")
        elif cap is not None:
            self._cannot(f"{_name(request.model)} cannot be told to think less than {cap} tokens: it reports no such "
                         "setting. Set one on it (reasoning_effort, reasoning or thinking), or give it a profile with "
                         "reasoning_effort_levels")  # fmt: skip
        tell_step(spend, budget, ledger, left)
        claim = claimed(spend, budget, risk, ledger, config)
        return None, request.override(model=model, model_settings=settings), spend, claim

    def _answered(
        self, request: ModelRequest[Any], response: ModelResponse[Any], spend: Spend, claim: Claim
    ) -> ExtendedModelResponse[Any]:
        fresh: Ledger = {}
        for message in response.result:
            # A middleware further in may have answered without a model; only a model's answer has an id by now.
            if isinstance(message, AIMessage) and message.id is not None:
                fresh[f"{spend['step']}/{message.id}"] = entry = self._entry(spend, message)
                claim.spent(f"{spend['step']}/{message.id}", entry)
                tell({"event": "early_exit.spent", **entry})
        # A middleware further out may ask again, and core then drops what this call would write.
        spent = _spent_in_this_node(request.state)
        spent.update(merge_ledgers(spent, {**claim.lost, **fresh}))
        return ExtendedModelResponse(response, Command(update={"ledger": dict(spent)}))

    @contextmanager
    def _refused(self, request: ModelRequest[Any], spend: Spend, claim: Claim) -> Iterator[None]:
        """Book an answer that is refused as structured output: another try must not find the budget as it was."""
        try:
            yield
        except StructuredOutputError as error:
            message = error.ai_message
            if message.id is not None:
                key, entry = f"{spend['step']}/{message.id}", self._entry(spend, message)
                claim.spent(key, entry)
                _spent_in_this_node(request.state)[key] = entry
                tell({"event": "early_exit.spent", **entry})
            raise

    @contextmanager
    def _as_configured(self, request: ModelRequest[Any], spend: Spend) -> Iterator[None]:
        """Runs that begin inside say which step they are, and have the configuration of what `_asked` took off."""
        config = _config()
        model: Any = request.model
        under, _, bound = unwrapped(model, config)
        if isinstance(under, ChatEarlyExit):
            config = bound
            while isinstance(model, RunnableBindingBase):
                if isinstance(model, RunnableRetry):
                    self._warn("the retries of with_retry() are passed over here; give a ModelRetryMiddleware instead")
                model = model.bound
        token = var_child_runnable_config.set(told_of(spend, config))
        try:
            yield
        finally:
            var_child_runnable_config.reset(token)

    def _entry(self, spend: Spend, message: AIMessage) -> Spend:
        if KEY in message.response_metadata:
            return closed(spend, message)
        counted = reasoning_tokens(message)
        if counted is None:
            self._cannot(f"{spend['model']} reports no usage, so its thinking counts nothing against any budget")
            counted = 0
        told = {"reason": "unreported", "guarantee": None}
        return {**spend, "thinking": counted, "reasoning": counted, "exit": told}

    def _limits(
        self, kind: Kind, request: ModelRequest[Any], ledger: Ledger
    ) -> tuple[list[str], Budget | None, Risk | None]:
        """The steps around the agent, and its budget and risk: the context's, else the state's, else its own."""
        state = cast("dict[str, Any]", request.state)
        run = {"id": state.get("reasoning_run", "")}
        around, budget, risk = limits_of(kind, state, _config(), ledger)
        given = _of_context(request, "reasoning_budget")
        if given is None and budget is None:
            given = self._budget
        if given is not None:
            told = dict(given) if isinstance(given, Mapping) else {"tokens": given}
            budget = check_budget(cast("Budget", {**run, **told}))
        if budget is not None:
            named = budget.get("weights", {})
            _check_kinds("a budget", named)
            budget = {**budget, "weights": {**self._weights, **named}}
        own = _of_context(request, "reasoning_risk")
        return around, budget, risk if own is None else check_risk(cast("Risk", {**run, **own}))

    def _risks(self, request: ModelRequest[Any]) -> bool:
        """Whether a step may be asked with a confidence."""
        state = cast("dict[str, Any]", request.state)
        given = ("risk" in state, "risk" in state.get("reasoning_part", ()), _of_context(request, "reasoning_risk"))
        return self._confidence is not None or any(given)

    def _left(self, budget: Budget | None, ledger: Ledger) -> int | None:
        left = [] if budget is None else [remaining(budget, ledger)]
        if self._thread_budget is not None:
            left.append(max(0, self._thread_budget - sum(entry["thinking"] for entry in ledger.values())))
        return min(left) if left else None

    def _most_of(self, kind: Kind) -> int | None:
        return self._most.get(kind) if isinstance(self._most, Mapping) else self._most

    def _risk_of(
        self, kind: Kind, request: ModelRequest[Any], risk: Risk | None, ledger: Ledger
    ) -> tuple[float | None, bool]:
        """Risk of the step, None where the model's own policy decides; and whether that is heuristic."""
        offered = names_of(request.tools)
        if offered and (missing := sorted(self._irreversible - offered)):
            self._warn(
                f"irreversible names {', '.join(missing)}, and a step is offered {', '.join(sorted(offered))} only; "
                "mind the spelling, unless a middleware chooses the tools of a step"
            )
        if self._irreversible & offered:
            return 0.0, False
        if risk is not None:
            return risk_of(kind, risk, ledger)
        if self._confidence is None:
            return None, False
        level = self._confidence.get(kind) if isinstance(self._confidence, Mapping) else self._confidence
        wanted = 0.0 if level is None else 1 - level
        if self._epsilon is None:
            return wanted, False
        run = cast("dict[str, Any]", request.state).get("reasoning_run", "")
        taken = sum(entry["epsilon"] for entry in ledger.values() if entry["risk"] == run)
        return (wanted if taken + wanted <= self._epsilon + _SLACK else 0.0), False

    def _spent(self, budget: Budget | None, ledger: Ledger) -> AIMessage:
        counts = [] if budget is None else [f"run {budget['tokens'] - remaining(budget, ledger)} of {budget['tokens']}"]
        if self._thread_budget is not None:
            counts.append(f"thread {sum(entry['thinking'] for entry in ledger.values())} of {self._thread_budget}")
        text = f"The reasoning budget is spent: {', '.join(counts)} thinking tokens."
        if self._exit_behavior == "error":
            raise ReasoningBudgetExceededError(
                f'{text} Give a larger budget, or exit_behavior="answer" to go on without thinking'
            )
        return AIMessage(text)

    def _cannot(self, text: str) -> None:
        if self._unsupported == "raise":
            raise ValueError(f'{text}. unsupported_model_behavior="warn" or "ignore" lets it run')
        if self._unsupported == "warn":
            self._warn(text)

    def _warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)


def _spent_in_this_node(state: Any) -> Ledger:
    """What the calls of the node that runs have spent, to be added to: whatever state a middleware hands each of them.

    It lies in the node's own configuration, which is all that those calls are sure to share.
    """
    shared = _config().setdefault("configurable", {})
    spent: Ledger = shared.setdefault(f"{_FRESH}:{state.get('reasoning_run', '')}", {})
    return spent


def _config() -> RunnableConfig:
    """That of the node that runs."""
    return var_child_runnable_config.get() or {}


def _of_context(request: ModelRequest[Any], name: str) -> Any:
    context = getattr(request.runtime, "context", None)
    return context.get(name) if isinstance(context, Mapping) else getattr(context, name, None)


def _name(model: Any) -> str:
    named = getattr(model, "model_name", None) or getattr(model, "model", None)
    return named if isinstance(named, str) else type(model).__name__


def _values(given: Any) -> Iterator[Any]:
    if given is not None:
        yield from given.values() if isinstance(given, Mapping) else (given,)


def _check_kinds(what: str, given: Any) -> None:
    odd = sorted(set(given) - set(KINDS)) if isinstance(given, Mapping) else []
    if odd:
        raise ValueError(f"{what} names {', '.join(odd)}, but the kinds of an agent's steps are {', '.join(KINDS)}")
