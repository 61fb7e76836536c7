"""Early exit inside a vLLM server: LYNX's head on the layers it was trained on, and ThinkBrake's margin.

Installed beside vLLM (`pip install --no-deps langchain-earlyexit`), it is found by its entry points and does nothing
until a request brings `sentry.Orders`. `EARLYEXIT_PROBE` names the directory of the head to serve. Here it meets vLLM:
the model that is loaded, the requests that come and go, the tokens that are forced. See `vllm_sentries` for what it
does in a pass.

Tested with vLLM 0.32 (V1 runner) on CPU with --enforce-eager and one process; not tested on GPUs, with tensor or
pipeline parallelism, or with CUDA graphs. Not possible beside speculative decoding, where vLLM takes no custom
processors. Probes: LYNX, arXiv 2512.05325. Margins: ThinkBrake, arXiv 2510.00546.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from langchain_earlyexit.codec import Codec
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.sentry import ARGUMENT, HELLO, Orders, Sentry
from langchain_earlyexit.vllm_sentries import PROBE_VARIABLE, Greeter, Sentries, Watched

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

_LOG: Final = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def sentries() -> Sentries:
    """Those of this process: a worker has one model."""
    return Sentries(served_probe())


@lru_cache(maxsize=1)
def served_probe() -> Probe | None:
    """The head in the directory that `EARLYEXIT_PROBE` names, or None where it is not set."""
    where = os.environ.get(PROBE_VARIABLE)
    return Probe.load(where) if where else None


def register() -> None:
    """Entry point of `vllm.general_plugins`: hook whatever model this process loads."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if getattr(BaseModelLoader.load_model, "hooks_sentries", False):
        return
    load = BaseModelLoader.load_model

    def load_model(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = load(self, vllm_config, *args, **kwargs)
        sentries().hook(model, vllm_config)
        return model

    load_model.hooks_sentries = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model


class EarlyExitProcessor(LogitsProcessor):  # type: ignore[misc]
    """Entry point of `vllm.logits_processors`: knows which row of the batch is whose, and ends sequences."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse orders that cannot be read or that need another probe: the client gets status 400."""
        text = (sampling_params.extra_args or {}).get(ARGUMENT)
        if text is None or text == HELLO:
            return
        wanted = Orders.from_json(text).probe
        served = served_probe()
        if wanted is not None and (served is None or served.digest != wanted):
            held = f"serves {served!r}" if served else f"serves none ({PROBE_VARIABLE} is not set)"
            raise ValueError(f"this request's early exit needs the probe with digest {wanted}, but this server {held}")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._sentries = sentries()
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())
        self._codec = _codec(vllm_config)  # now: within a step, everybody would wait for it

    def is_argmax_invariant(self) -> bool:
        """No: a token may be forced."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, go and move within the batch."""
        if batch_update is None:
            return
        batch = self._sentries.batch
        for i in batch_update.removed:
            batch.pop(i, None)
        for i, params, prompt, output in batch_update.added:
            batch.pop(i, None)
            text = (params.extra_args or {}).get(ARGUMENT)
            if text == HELLO:
                # Without tokenizer or hooks there is no early exit here: who asks is not greeted, and asks for no more.
                if self._codec is not None and self._sentries.hooked:
                    batch[i] = Greeter()
            elif text is not None and (watched := self._watched(text, prompt, output)) is not None:
                batch[i] = watched
        for i, j, way in batch_update.moved:
            one, other = batch.pop(i, None), batch.pop(j, None)
            if one is not None:
                batch[j] = one
            if other is not None and way is MoveDirectionality.SWAP:
                batch[i] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Force what must be forced."""
        self._sentries.force(logits)
        return logits

    def _watched(self, text: str, prompt: list[int] | None, output: list[int]) -> Watched | None:
        """None where no report can be written: this model does not have the ids that they are to be written on."""
        tokens = (prompt or [], output)
        orders: Orders | None = None
        try:
            orders = Orders.from_json(text)
            largest = max((*orders.eos, *orders.reports.values()))
            if largest >= self._vocabulary:
                raise ValueError(f"orders name token {largest}, but this model has {self._vocabulary}")
            if self._codec is None:
                raise RuntimeError("there is no tokenizer to read tokens with")
            if prompt is None:
                raise RuntimeError("the prompt came as embeddings: there are no tokens to follow")
            went_on = orders.start < len(prompt) or bool(output)
            return Watched(orders, Sentry(orders, self._codec, watching=went_on), tokens, orders.start)
        except Exception:  # noqa: BLE001 - see Sentries
            self._sentries.tell()
            if orders is None or max(orders.reports.values(), default=0) >= self._vocabulary:
                return None
            return Watched(orders, None, tokens, orders.start)


def _codec(config: VllmConfig) -> Codec | None:
    """Of the server's tokenizer; None, and a warning, where there is none to load: a server may run without one."""
    from transformers import AutoTokenizer

    model = config.model_config
    try:
        loaded = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        return Codec(loaded)
    except Exception as error:  # noqa: BLE001 - whatever it is, the server can serve those who want none of this
        _LOG.warning("no tokenizer could be loaded from %s: early exit is off (%s)", model.tokenizer, error)
        return None
