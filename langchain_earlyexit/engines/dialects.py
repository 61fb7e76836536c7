"""How each kind of server is asked for tokens by ids, and how what it streams is read: a table of three dialects.

| | vLLM | SGLang | llama.cpp server |
|---|---|---|---|
| token ids | `/v1/completions`, `return_token_ids` | `/generate`, `input_ids` | `/completion`, `return_tokens` |
| trial answers (`trial_confidence`) | yes | yes | yes |
| `end_margin`, greedy | on the trunk: `logprob_token_ids` | on the trunk: `token_ids_logprob` | one token on a fork |
| `end_margin`, sampled | one token on a fork | one token on a fork | one token on a fork |
| `end_entropy` | with `--max-logprobs -1` | no | yes: `n_probs` of the whole vocabulary |
| `p_safe` | with this package's plugin | no | no |
| grammars (`Sample.allow`) | `allowed_token_ids` | no | `logit_bias` |
| seeds | yes | with `--enable-deterministic-inference` | yes |

Log-probabilities are those of the model itself: temperature 1, nothing masked. vLLM gives these unless it was started
with another `--logprobs-mode`, which is found out when the engine connects; llama.cpp does; SGLang does for greedy
requests, so nothing that is read from a sampled one is used. An entropy is taken from the whole vocabulary or not at
all: the tail beyond a server's top 20 weighs tenths of a nat, as much as the changes that EAT (arXiv 2509.26522) reads.
"""

from __future__ import annotations

import logging
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_earlyexit.sampling import Sampling, Token
from langchain_earlyexit.sentry import ARGUMENT

_LOG = logging.getLogger(__name__)

_BAN = -100.0
"""What is added to a logit that may not win: as low as the OpenAI API goes. The engine checks that it was enough."""

_LEAST_MASS = 0.99
"""Probability that a whole vocabulary must hold; less means that the server has told a part of it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How tokens are to be drawn, and what is to be read beside each; see `program.Sample`.

    Attributes:
        sampling: how.
        forbid: ids that may not be drawn.
        allow: the only ids that may be drawn, None for all.
        watch: ids whose log-probability is wanted.
        entropy: whether that of the whole distribution is wanted.
        orders: of the server's sentry, as JSON; what it reports comes as log-probabilities of watched ids.
    """

    sampling: Sampling
    forbid: frozenset[int] = frozenset()
    allow: tuple[int, ...] | None = None
    watch: tuple[int, ...] = ()
    entropy: bool = False
    orders: str | None = None

    @property
    def bound(self) -> bool:
        """Whether some ids may not be drawn."""
        return bool(self.forbid) or self.allow is not None


@dataclass(frozen=True, slots=True)
class Draw:
    """One request: at most `most` tokens that go on from `ids`."""

    ids: Sequence[int]
    most: int
    seed: int
    wish: Wish
    anew: bool = False
    """Compute all of `ids` again, cached or not: the sentry reads states, and caches hold none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream brings. `end` is "" while it goes on, "stop" at an end of turn, "length" at `most`,
    else the server's own word for why it gave the request up.
    """

    tokens: tuple[Token, ...] = ()
    end: str = ""


class Unreadable(ValueError):
    """A server answered, but not with what was asked for."""


class Dialect(ABC):
    """One kind of server.

    Args:
        model: the name that the server knows the model by.
        lacks: what this server cannot do, beyond what its kind cannot: the name of a signal, "seed" or "grammar", and
            why, with the way out.
    """

    kind: ClassVar[str]
    path: ClassVar[str]
    never: ClassVar[Mapping[str, str]]
    watches_with_draws: ClassVar[bool] = True
    """Whether greedy tokens can come with the log-probabilities of ids that are watched, all along a stream."""

    def __init__(self, model: str, vocabulary: int, lacks: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.lacks = {**self.never, **(lacks or {})}

    def watches(self, sampling: Sampling) -> bool:
        """Whether tokens drawn so come with what is watched; else one greedy token must be asked for."""
        return self.watches_with_draws and sampling.temperature == 0.0

    @abstractmethod
    def body(self, draw: Draw) -> dict[str, Any]:
        """The JSON of a streamed request."""

    @abstractmethod
    def read(self, data: Mapping[str, Any], draw: Draw, count: int) -> Piece:
        """What an event brings, `count` tokens having come before it."""


class VLLM(Dialect):
    """vLLM's OpenAI-compatible server, 0.10.2 or later (`return_token_ids`); `end_margin` needs `logprob_token_ids`."""

    kind = "vllm"
    path = "/v1/completions"
    never: ClassVar[Mapping[str, str]] = {
        "p_safe": "a stock vLLM server tells no hidden states: install this package beside vLLM there and name a probe "
        "in EARLYEXIT_PROBE, or take a policy that needs none, such as DEER",
    }

    def body(self, draw: Draw) -> dict[str, Any]:
        wish = draw.wish
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(draw.ids),
            "max_tokens": draw.most,
            "stream": True,
            # Whatever is left out here, a server fills in from the checkpoint's generation config.
            "temperature": wish.sampling.temperature,
            "top_p": wish.sampling.top_p,
            "top_k": wish.sampling.top_k,
            "min_p": wish.sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": draw.seed,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        if wish.entropy:
            body["logprobs"] = -1
        elif wish.watch:
            body |= {"logprobs": len(wish.watch), "logprob_token_ids": list(wish.watch)}
        if wish.orders is not None:
            body["vllm_xargs"] = {ARGUMENT: wish.orders}
        if draw.anew:
            body["cache_salt"] = secrets.token_urlsafe(16)
        if wish.allow is not None:
            body["allowed_token_ids"] = list(wish.allow)
        elif wish.forbid:
            body["logit_bias"] = {str(i): _BAN for i in sorted(wish.forbid)}
        return body

    def read(self, data: Mapping[str, Any], draw: Draw, count: int) -> Piece:
        if not data.get("choices"):  # the usage of a stream comes by itself
            return Piece()
        choice = data["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:
            raise Unreadable("the server tells no token ids; this needs vLLM 0.10.2 or later")
        told = choice.get("logprobs") or {}
        tokens = []
        for i, id_ in enumerate(ids):
            top = {int(name.rpartition(":")[2]): float(p) for name, p in told["top_logprobs"][i].items()}
            tokens.append(_token(int(id_), float(told["token_logprobs"][i]), top, draw.wish, self.vocabulary))
        return Piece(tuple(tokens), choice.get("finish_reason") or "")


class SGLang(Dialect):
    """SGLang's own `/generate`; after its documentation, not tried against a server."""

    kind = "sglang"
    path = "/generate"
    never: ClassVar[Mapping[str, str]] = {
        "p_safe": "SGLang tells no hidden states of the tokens it streams; take a policy that needs none, such as DEER",
        "end_entropy": "SGLang's log-probabilities are of its top tokens only; take ThinkBrake or DEER, or vLLM",
        "grammar": "SGLang takes no mask of ids per token, so tool calls and response formats need vLLM or llama.cpp",
    }

    def body(self, draw: Draw) -> dict[str, Any]:
        wish = draw.wish
        params: dict[str, Any] = {
            "max_new_tokens": draw.most,
            "temperature": wish.sampling.temperature,
            "top_p": wish.sampling.top_p,
            "top_k": wish.sampling.top_k or -1,
            "min_p": wish.sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "skip_special_tokens": False,
        }
        if "seed" not in self.lacks:
            params["sampling_seed"] = draw.seed
        if wish.forbid:
            params["logit_bias"] = {str(i): _BAN for i in sorted(wish.forbid)}
        body: dict[str, Any] = {
            "input_ids": list(draw.ids),
            "sampling_params": params,
            "stream": True,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 1,
        }
        if wish.watch:
            body["token_ids_logprob"] = list(wish.watch)
        return body

    def read(self, data: Mapping[str, Any], draw: Draw, count: int) -> Piece:
        meta = data.get("meta_info")
        if meta is None:
            raise Unreadable("the server's events hold no meta_info; is this SGLang's /generate?")
        drawn = meta.get("output_token_logprobs") or []
        # By default each event holds the whole so far; with --incremental-streaming-output only what is new.
        new = range(count if len(drawn) == int(meta["completion_tokens"]) else 0, len(drawn))
        tokens = []
        for i in new:
            logprob, id_ = drawn[i][:2]
            rows = [meta.get(name) or [] for name in ("output_top_logprobs", "output_token_ids_logprobs")]
            top = {int(row[1]): float(row[0]) for told in rows if i < len(told) for row in told[i] or ()}
            tokens.append(_token(int(id_), float(logprob), top, draw.wish, self.vocabulary))
        reason = meta.get("finish_reason") or {}
        return Piece(tuple(tokens), reason.get("type") or "")


class LlamaCpp(Dialect):
    """llama.cpp's server, its own `/completion`; after its documentation, not tried against a server."""

    kind = "llama.cpp"
    path = "/completion"
    watches_with_draws = False
    never: ClassVar[Mapping[str, str]] = {
        "p_safe": "llama.cpp's server tells no hidden states; take a policy that needs none, such as DEER",
    }

    def body(self, draw: Draw) -> dict[str, Any]:
        wish = draw.wish
        body: dict[str, Any] = {
            "prompt": list(draw.ids),
            "n_predict": draw.most,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "seed": draw.seed,
            "temperature": wish.sampling.temperature,
            "top_k": wish.sampling.top_k,
            "top_p": wish.sampling.top_p,
            "min_p": wish.sampling.min_p,
            "samplers": ["temperature", "top_k", "top_p", "min_p"],
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n_probs": self.vocabulary if wish.entropy or wish.watch else 1,
            "post_sampling_probs": False,
        }
        banned = set(wish.forbid)
        if wish.allow is not None:
            banned |= set(range(self.vocabulary)).difference(wish.allow)
        if banned:
            body["logit_bias"] = [[i, False] for i in sorted(banned)]
        return body

    def read(self, data: Mapping[str, Any], draw: Draw, count: int) -> Piece:
        tokens = []
        for told in data.get("completion_probabilities") or ():
            top = {int(other["id"]): float(other["logprob"]) for other in told["top_logprobs"]}
            tokens.append(_token(int(told["id"]), float(told["logprob"]), top, draw.wish, self.vocabulary))
        ends = {"eos": "stop", "word": "stop", "limit": "length"}
        return Piece(tuple(tokens), ends.get(data.get("stop_type", ""), "") if data.get("stop") else "")


DIALECTS: Mapping[str, type[Dialect]] = {dialect.kind: dialect for dialect in (VLLM, SGLang, LlamaCpp)}


def _token(id_: int, logprob: float, top: Mapping[int, float], wish: Wish, vocabulary: int) -> Token:
    """`top` holds what the server told beside the token itself: the likeliest ones, or those that are watched."""
    missing = [i for i in wish.watch if i not in top and i != id_]
    if missing:
        raise Unreadable(f"the server did not tell the log-probability of token {missing[0]}, which was asked for")
    known = {id_: logprob, **top}
    entropy = None
    if wish.entropy and 2 * len(known) < vocabulary:
        # vLLM's V1 runner tells no row of a pass more than ids that are watched as soon as any row has such.
        _LOG.warning("a server told %d of %d log-probabilities: no entropy was measured", len(known), vocabulary)
        entropy = math.nan
    elif wish.entropy:
        mass = sum(math.exp(p) for p in known.values())
        if mass < _LEAST_MASS:
            raise Unreadable(f"{len(known)} tokens hold {mass:.3f} of the probability, not the whole vocabulary")
        entropy = -sum(math.exp(p) * p for p in known.values())
    return Token(id_, logprob, max(known.values()), tuple(known[i] for i in wish.watch), entropy)
