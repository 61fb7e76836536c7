"""What a server is: its kind, the name it knows the model by, what it can tell, and that its tokens are ours.

Nothing is taken on trust that can be asked: a knob that a server would ignore is found out here, before a request
depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_earlyexit.engines.dialects import DIALECTS, Dialect
from langchain_earlyexit.engines.wire import Server, Wire
from langchain_earlyexit.sentry import ARGUMENT, HELLO, greeted, greeting

_OWNERS: Mapping[str, str] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""`owned_by` of a model, by the kind of server that says so."""

_SAMPLE = "Wait, 37 + 48 = 85; \u00fc\u4f60\U0001f642\n\n\\boxed{x_1}"
_CONTROLS = 256
"""Added tokens that the check of the tokenizer spells out: renaming one changes no other id."""

_CERTAIN = -1e-9
"""A log-probability above this says that nothing else could have been drawn."""


@dataclass(frozen=True)
class Known:
    """What is known of a server.

    Attributes:
        dialect: how it is asked, and what it lacks.
        context: most tokens that prompt and answer can have together, or None.
        sentry: digest of the probe that its sentry has, "" for a sentry without, None for no sentry.
    """

    dialect: Dialect
    context: int | None
    sentry: str | None = None


async def meet(wire: Wire, server: Server, tokenizer: Any, model: str, kind: str | None) -> Known:
    """Ask a server what it is, and check that it reads token ids as `tokenizer` does.

    Args:
        wire: to reach it by.
        server: whom to ask.
        tokenizer: of the model that is meant.
        model: its name, or the directory of its tokenizer.
        kind: "vllm", "sglang" or "llama.cpp" where that is known; None to find out.

    Raises:
        Fault: it does not answer now.
        ValueError: it is none of the three, serves another model, or has another tokenizer.
    """
    cards = (await wire.ask(server, "/v1/models")).get("data") or []
    kind = kind or _kind(server, cards)
    card = _card(server, cards, model)
    name = str(card["id"])
    context, vocabulary = card.get("max_model_len"), len(tokenizer)
    lacks: dict[str, str] = {}
    sentry: str | None = None
    text = check_text(tokenizer)
    ids = list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))
    if kind == "vllm":
        lacks = await _ask_vllm(wire, server, name, text, ids)
        sentry = await _greeted(wire, server, name, ids)
    elif kind == "sglang":
        about = await _optional(wire, server, "/get_server_info")
        if not about.get("enable_deterministic_inference"):
            lacks["seed"] = "this SGLang ignores seeds; start it with --enable-deterministic-inference"
        told = await wire.ask(server, "/tokenize", {"model": name, "prompt": text, "add_special_tokens": False})
        _agree(server, ids, told["tokens"])
    else:
        about = await _optional(wire, server, "/props")
        context = about.get("default_generation_settings", {}).get("n_ctx", context)
        vocabulary = int((card.get("meta") or {}).get("n_vocab", vocabulary))
        told = await wire.ask(server, "/tokenize", {"content": text, "add_special": False, "parse_special": True})
        _agree(server, ids, told["tokens"])
    dialect = DIALECTS[kind](name, vocabulary, lacks)
    if sentry:
        dialect.lacks.pop("p_safe")
    elif sentry is not None:
        dialect.lacks["p_safe"] = (
            "the server's plugin has no probe: start it with EARLYEXIT_PROBE naming the probe's directory"
        )
    return Known(dialect, None if context is None else int(context), sentry)


def check_text(tokenizer: Any) -> str:
    """Text that tells tokenizers apart: digits, other scripts, and the added tokens."""
    added = sorted((int(i), str(token)) for i, token in tokenizer.added_tokens_decoder.items())
    return _SAMPLE + "".join(token for _, token in added[-_CONTROLS:])


async def _ask_vllm(wire: Wire, server: Server, name: str, text: str, ids: Sequence[int]) -> dict[str, str]:
    """The text's ids; then one token, bound to be its first: what comes back tells whether all knobs are there."""
    lacks: dict[str, str] = {}
    bound, watched = ids[0], ids[1]
    request = {
        "model": name,
        "prompt": text,
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0.0,
        "return_token_ids": True,
    }
    choice = (await wire.ask(server, "/v1/completions", request))["choices"][0]
    if choice.get("prompt_token_ids") is None or choice.get("token_ids") is None:
        raise ValueError(
            f"{server.url} tells no token ids; this needs vLLM 0.10.2 or later, and no proxy that drops them"
        )
    _agree(server, ids, choice["prompt_token_ids"])
    request |= {
        "logprobs": 1,
        "logprob_token_ids": [watched],
        "allowed_token_ids": [bound],
        "return_tokens_as_token_ids": True,
    }
    choice = (await wire.ask(server, "/v1/completions", request))["choices"][0]
    if choice["token_ids"] != [bound]:
        raise ValueError(f"{server.url} ignores allowed_token_ids: it drew {choice['token_ids']}, not [{bound}]")
    told = choice["logprobs"]
    if told["token_logprobs"][0] > _CERTAIN:
        raise ValueError(
            f"{server.url} tells log-probabilities after masking; start it with --logprobs-mode raw_logprobs"
        )
    if f"token_id:{watched}" not in told["top_logprobs"][0]:
        lacks["end_margin"] = "this server ignores logprob_token_ids; upgrade vLLM, or take DEER"
    try:
        await wire.ask(
            server,
            "/v1/completions",
            {"model": name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "logprobs": -1},
        )
    except ValueError as error:
        lacks["end_entropy"] = (
            "this server does not tell the log-probabilities of its whole vocabulary; start vLLM with "
            f"--max-logprobs -1, or take ThinkBrake or DEER ({error})"
        )
    return lacks


async def _greeted(wire: Wire, server: Server, name: str, ids: Sequence[int]) -> str | None:
    """Digest of the probe that the server's sentry has, see `Known.sentry`."""
    asked = {
        "model": name,
        "prompt": list(ids[:1]),
        "max_tokens": len(greeting(None)),
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {ARGUMENT: HELLO},
    }
    choice = (await wire.ask(server, "/v1/completions", asked))["choices"][0]
    there, digest = greeted(tuple(choice["token_ids"]))
    return (digest or "") if there else None


async def _optional(wire: Wire, server: Server, path: str) -> Mapping[str, Any]:
    """What stands at a path that a router in front may not pass on."""
    try:
        told = await wire.ask(server, path)
    except LookupError:
        return {}
    return told if isinstance(told, dict) else {}


def _kind(server: Server, cards: Sequence[Mapping[str, Any]]) -> str:
    owners = {str(card.get("owned_by")) for card in cards}
    kinds = {_OWNERS[owner] for owner in owners if owner in _OWNERS}
    if len(kinds) == 1:
        return kinds.pop()
    raise ValueError(
        f"{server.url} is none of the servers known here ({', '.join(DIALECTS)}): its models belong to "
        f"{sorted(owners)}. Where a proxy hides one of them, say which: VLLMEngine(..., kind='vllm')"
    )


def _card(server: Server, cards: Sequence[Mapping[str, Any]], model: str) -> Mapping[str, Any]:
    for key in ("id", "root"):
        found = next((card for card in cards if card.get(key) == model), None)
        if found is not None:
            return found
    bases = [card for card in cards if not card.get("parent")]
    if len(bases) == 1:  # one model under a name of its own: its tokenizer tells whether it is the one that is meant
        return bases[0]
    raise ValueError(f"{server.url} serves {[card.get('id') for card in cards]}, and none of them is {model!r}")


def _agree(server: Server, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) == list(theirs):
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise ValueError(
        f"the tokenizer and {server.url} read the same text as different ids: {list(ours[at : at + 4])} here, "
        f"{list(theirs[at : at + 4])} there, from token {at} on; give as model the directory or hub id that the server "
        "was started with"
    )
