"""Sentries on a model that vLLM runs: what they read, write and end in one pass.

Per pass the hidden states of the sequences that are watched are read, by forward hooks on just the decoder layers that
the head reads; at a cue all sequences that have one are scored together, the score is written where the client asked
for it, and a sequence whose policy leaves is ended. See `sentry` for what travels how.

An error here never reaches the engine: it is logged once, the sentry of that sequence is stood down (of all sequences,
where the pass itself cannot be read), and its client is told. Probes: LYNX, arXiv 2512.05325. Margins: ThinkBrake,
arXiv 2510.00546.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available

from langchain_earlyexit.engines.identity import checkpoint_weights
from langchain_earlyexit.engines.model import KEPT
from langchain_earlyexit.engines.taps import block_at, decoder_blocks
from langchain_earlyexit.fingerprint import refuse_mismatch
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.sentry import Orders, Report, Sentry, greeting, rounded, told

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LOG: Final = logging.getLogger(__name__)

PROBE_VARIABLE: Final = "EARLYEXIT_PROBE"
"""Environment variable: the directory of the head to serve."""


class _State(NamedTuple):
    """Where the state of one token lies: row `row` of `rows`, [rows, layers, width]."""

    rows: Tensor
    row: int


@dataclass(eq=False)
class Watched:
    """One sequence of the batch that brought orders.

    Attributes:
        tokens: its prompt and its output, as vLLM keeps them.
        seen: how many of its tokens the sentry, or the prompt, accounts for.
        states: by index of the token, the last `KEPT`.
        margins: by number of thinking tokens before it, that of the distribution each token was drawn from.
        leaves: the next token must end the sequence.
        sentry: None when it is out of order.
    """

    orders: Orders
    sentry: Sentry | None
    tokens: tuple[list[int], list[int]]
    seen: int
    states: dict[int, _State] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)
    leaves: bool = False

    def token(self, index: int) -> int:
        """A token that no pass of ours has brought: of the prompt, or of output that vLLM computes anew."""
        prompt, output = self.tokens
        found = prompt[index] if index < len(prompt) else output[index - len(prompt)]
        if found < 0:
            raise RuntimeError(f"token {index} is not known yet")
        return found

    def stand_down(self) -> None:
        """Follow it no more."""
        self.sentry, self.leaves = None, False
        self.states.clear()
        self.margins.clear()


@dataclass(eq=False)
class Greeter:
    """A sequence that asked who is there: how many ids of the greeting it has been given."""

    given: int = 0


class _Span(NamedTuple):
    """What a pass holds of one sequence: rows `start` to `end`, the tokens `ids`, from its token `first` on."""

    watched: Watched
    sentry: Sentry
    start: int
    end: int
    first: int
    ids: list[int]


class Sentries:
    """All sentries of one worker process, and the hooks on its model.

    Args:
        probe: the head that is served, if any is.

    Attributes:
        batch: by row of the batch, who brought orders or asked who is there.
        hooked: whether the model can be followed; where it is not, nobody greets, and clients ask for nothing.
    """

    def __init__(self, probe: Probe | None) -> None:
        self.batch: dict[int, Watched | Greeter] = {}
        self.probe = probe
        self._blocks: tuple[int, ...] = ()
        self._spans: dict[int, _Span] = {}
        self._index: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        self._told = False
        self.hooked = False

    # --- the model --------------------------------------------------------------------------------------------------

    def hook(self, model: nn.Module, config: VllmConfig) -> None:
        """Put the hooks on a model that has just been loaded; log why not where it cannot be followed.

        Raises:
            ValueError: a probe for another width, or where hooks on layers would not be run.
        """
        text = config.model_config.hf_text_config
        head = next((m for name, m in model.named_children() if name == "logits_processor"), None)
        if head is None:
            _LOG.warning("%s has no logits_processor module: early exit is off", type(model).__name__)
            return
        if not config.model_config.enforce_eager:
            # A pass that is replayed from a graph runs no hooks, and a sentry would follow half of the passes.
            if self.probe is not None:
                raise ValueError(
                    f"{PROBE_VARIABLE} is set, but a compiled model runs no hooks on its layers: start the server "
                    f"with --enforce-eager, or without {PROBE_VARIABLE}"
                )
            _LOG.warning("a compiled model cannot be followed: early exit is off without --enforce-eager")
            return
        if self.probe is not None:
            self._hook_layers(model, config, int(text.num_hidden_layers), int(text.hidden_size))
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        head.register_forward_hook(self._after)
        self.hooked = True

    def _hook_layers(self, model: nn.Module, config: VllmConfig, count: int, width: int) -> None:
        probe = self.probe
        assert probe is not None  # noqa: S101 - checked by the caller
        self._refuse_other_model(probe, config)
        if probe.width != width:
            raise ValueError(f"{probe!r} reads states of width {probe.width}, but this model's are {width} wide")
        layers = decoder_blocks(model, count)
        if not layers:
            raise ValueError(f"{type(model).__name__} has no list of its {count} decoder layers to read states from")
        self._blocks = tuple(block_at(depth, count) for depth in probe.layers)
        for block in sorted(set(self._blocks)):
            layer = layers[block]
            if type(layer).__name__ == "PPMissingLayer":
                raise ValueError(
                    "the layers that the probe reads lie on several pipeline stages; use tensor parallelism"
                )
            layer.register_forward_hook(self._keeper(block))

    def _refuse_other_model(self, probe: Probe, config: VllmConfig) -> None:
        """The client cannot see which weights are served: so it is looked at here."""
        model = config.model_config
        actual = {"dtype": str(model.dtype).removeprefix("torch.")}
        folder = Path(model.model)
        weights = checkpoint_weights(folder, model.hf_config) if folder.is_dir() else None
        if weights is None:
            _LOG.warning(
                "%s is no directory with safetensors: whether the probe was made for it is not checked", model.model
            )
        else:
            actual["weights"] = weights
        refuse_mismatch(
            f"the probe in {os.environ.get(PROBE_VARIABLE)}",
            {name: value for name, value in probe.binds.items() if name in actual},
            actual,
        )

    def _keeper(self, block: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._index is not None:
                try:
                    # vLLM's layers hand on what the block adds and what it is added to; the block's output is the sum.
                    parts = output if isinstance(output, tuple) else (output,)
                    picked = [part[self._index] for part in parts[:2] if part is not None]
                    self._outputs[block] = picked[0] if len(picked) == 1 else picked[0] + picked[1]
                except Exception:  # noqa: BLE001 - an engine that serves others must not die of ours
                    self._lose_all()

        return keep

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which rows of this pass are watched."""
        self._spans, self._index, self._outputs = {}, None, {}
        watched = {i: (one, one.sentry) for i, one in self.batch.items() if isinstance(one, Watched) and one.sentry}
        if not watched or not is_forward_context_available():
            return
        try:
            starts = _query_starts()
            if starts is None:  # a warming-up pass
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
            if ids is None or positions is None:
                raise RuntimeError("the model was not called with input_ids and positions")
            rows: list[int] = []
            for i, (one, sentry) in watched.items():
                with self._alone(one):
                    start, end = starts[i], starts[i + 1]
                    first = int(positions[..., start].flatten()[0])
                    kept = max(start, end - KEPT, start + one.orders.start - first) if self._blocks else end
                    self._spans[i] = _Span(one, sentry, start, end, first, ids[start:end].tolist())
                    rows += range(min(kept, end), end)
            if rows:
                self._index = torch.tensor(rows, device=positions.device)
        except Exception:  # noqa: BLE001 - see above
            self._lose_all()

    def _after(self, _head: nn.Module, _inputs: Any, logits: Tensor | None) -> Tensor | None:
        """Follow the watched sequences through this pass, and write down what their checks have measured."""
        spans, self._spans = self._spans, {}
        watched = {i: one for i, one in self.batch.items() if isinstance(one, Watched)}
        if logits is None or not (spans or any(one.sentry is None for one in watched.values())):
            return logits
        reports: dict[int, dict[str, Report]] = {}
        try:
            self._keep_states(spans)
            checks: dict[int, dict[str, float]] = {}
            for i, span in spans.items():
                with self._alone(span.watched):
                    if (signals := self._follow(span, logits[i])) is not None:
                        checks[i] = signals
            reports = self._score(spans, checks)
        except Exception:  # noqa: BLE001 - see above
            self._lose_all()
        for i, one in watched.items():
            if one.sentry is None:
                reports[i] = dict.fromkeys(one.orders.reports, Report(math.nan, failed=True))
        if not reports:
            return logits
        logits = logits.float()  # half precision could not hold a report
        for i, said in reports.items():
            with self._alone(watched[i]):
                self._write(logits[i], watched[i], said)
        return logits

    def _write(self, row: Tensor, one: Watched, said: Mapping[str, Report]) -> None:
        ids = torch.tensor([one.orders.reports[signal] for signal in said], device=row.device)
        shares = torch.tensor([told(*pair) for pair in said.items()], device=row.device)
        row[ids] = -math.inf
        row[ids] = torch.logsumexp(row, dim=-1) + shares

    def _keep_states(self, spans: Mapping[int, _Span]) -> None:
        if self._index is None:
            return
        rows = torch.stack([self._outputs[block] for block in self._blocks], dim=1)
        at = 0
        for span in spans.values():
            one = span.watched
            last = span.first + span.end - span.start
            first = max(span.first, last - KEPT, one.orders.start)
            for index in range(first, last):
                one.states[index] = _State(rows, at)
                at += 1
            for index in [index for index in one.states if index < last - KEPT]:
                del one.states[index]

    def _follow(self, span: _Span, logits: Tensor) -> dict[str, float] | None:
        """Feed the sentry; of the check that the newest token makes, the margin. None where it makes none."""
        one, sentry = span.watched, span.sentry
        last = span.first + len(span.ids)
        while one.seen < last:
            brought = one.seen - span.first
            sentry.push(span.ids[brought] if brought >= 0 else one.token(one.seen))
            one.seen += 1
        known = sum(map(len, one.tokens))
        if last < known:  # a long prompt, bit by bit: what is sampled here is thrown away
            return None
        if "end_margin" in one.orders.reports and not sentry.over:
            ends = list(sentry.end_ids)
            one.margins[sentry.pushed] = float(logits.max() - logits[ends[0]]) if ends else math.nan
            one.margins.pop(sentry.pushed - KEPT, None)
        if sentry.hit is None:
            return None
        return {signal: one.margins.get(sentry.hit.position, math.nan) for signal in sentry.wanted}

    def _score(self, spans: Mapping[int, _Span], checks: dict[int, dict[str, float]]) -> dict[int, dict[str, Report]]:
        """Put the head on all checks of this pass, and let their policies decide."""
        asked = {i: self._state(spans[i]) for i, signals in checks.items() if "p_safe" in signals}
        present = {i: state for i, state in asked.items() if state is not None}
        if present and self.probe is not None:
            # One copy from the device for all of them.
            states = torch.stack([state.rows[state.row] for state in present.values()]).float().cpu().numpy()
            for i, state in zip(present, states, strict=True):
                with self._alone(spans[i].watched):
                    checks[i]["p_safe"] = self.probe.p_safe(state)
        for i in asked.keys() - present.keys():
            checks[i]["p_safe"] = math.nan
        found: dict[int, dict[str, Report]] = {}
        for i, signals in checks.items():
            one, sentry = spans[i].watched, spans[i].sentry
            if one.sentry is None:  # lost by its score
                continue
            with self._alone(one):
                # Decided on what the client will read, to the last bit.
                values = {signal: rounded(signal, value) for signal, value in signals.items()}
                one.leaves = sentry.measured(values)
                found[i] = {signal: Report(value, one.leaves) for signal, value in values.items()}
        return found

    def _state(self, span: _Span) -> _State | None:
        hit = span.sentry.hit
        if hit is None or self.probe is None:
            return None
        through = self.probe.reads(hit.position, hit.end)
        return span.watched.states.get(span.watched.orders.start + through - 1)

    def _lose_all(self) -> None:
        """Something is wrong with this pass: all sentries on duty stand down, and say so."""
        self.tell()
        self._spans, self._index, self._outputs = {}, None, {}
        for one in self.batch.values():
            if isinstance(one, Watched):
                one.stand_down()

    @contextmanager
    def _alone(self, one: Watched | Greeter) -> Iterator[None]:
        """What goes wrong in here costs this sequence its sentry, and no other."""
        try:
            yield
        except Exception:  # noqa: BLE001 - see above
            self.tell()
            if isinstance(one, Watched):
                one.stand_down()

    def tell(self) -> None:
        """Log the exception at hand, once per process."""
        if not self._told:
            _LOG.exception("early exit is off for some sequences, and their clients are told; said once per process")
            self._told = True

    # --- one token --------------------------------------------------------------------------------------------------

    def force(self, logits: Tensor) -> None:
        """Leave one choice to the sequences that must end, and to those that are being greeted."""
        for i, one in self.batch.items():
            with self._alone(one):
                only: int | None = None
                if isinstance(one, Greeter):
                    said = greeting(None if self.probe is None else self.probe.digest)
                    only = said[min(one.given, len(said) - 1)]
                    one.given += 1
                elif one.leaves:
                    only, one.leaves = one.orders.eos[0], False
                if only is not None:
                    forced = torch.full_like(logits[i], -math.inf)
                    forced[only] = 0.0
                    logits[i] = forced  # whole, or not at all: a row without any token left could not be sampled


def _query_starts() -> list[int] | None:
    """Where each sequence of this pass begins among its rows; None in a pass without sequences."""
    found = get_forward_context().attn_metadata
    if isinstance(found, list):
        raise RuntimeError("this pass runs as several micro-batches")
    if isinstance(found, dict):
        # Groups of layers have metadata of their own, and not all of them say it: linear attention does not.
        every = list(found.values())
        found = next((one for one in every if getattr(one, "query_start_loc", None) is not None), (every or [None])[0])
    starts = getattr(found, "query_start_loc", None)
    if found is not None and starts is None:
        raise RuntimeError(f"{type(found).__name__} does not say where sequences begin")
    return None if starts is None else [int(i) for i in starts.tolist()]
