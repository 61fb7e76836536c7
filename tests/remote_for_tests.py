"""A server on loopback that speaks as vLLM, SGLang or llama.cpp's server do, its model a function of ids to logits.

What it does is counted and can be disturbed: it may be slow, refuse, break off, be killed and come back.
"""

import asyncio
import json
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from langchain_earlyexit.codec import Codec
from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.engines.program import Sample
from langchain_earlyexit.sampling import Sampling, draw, pick_all
from langchain_earlyexit.sentry import ARGUMENT, HELLO, Orders, Report, Sentry, greeting, rounded, told

KINDS = ("vllm", "sglang", "llama.cpp")
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}


@dataclass(eq=False)
class FakeServer:
    """`failures` are answers given before any real one: (status, headers, message). `breaks` are numbers of tokens
    after which a stream breaks off, one for each stream to come. With a `probe` there is a plugin, and `states(ids)`
    are the hidden states of the last id.
    """

    function: object
    kind: str = "vllm"
    tokenizer: object = field(default_factory=byte_tokenizer)
    name: str = "served"
    context: int | None = 4096
    whole: bool = True
    seeds: bool = True
    pace: float = 0.0003  # seconds between tokens: with none, a thread that draws would keep its reader waiting
    deaf: bool = False
    api_key: str | None = None
    ignores: frozenset = frozenset()
    probe: object = None
    states: object = None
    failures: deque = field(default_factory=deque)
    breaks: deque = field(default_factory=deque)
    requests: list = field(default_factory=list)
    generated: int = 0
    active: int = 0
    most_active: int = 0
    port: int = 0

    def __post_init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.writers = set()
        self.eos = int(self.tokenizer.eos_token_id)
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        async def go():
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
            self.port = self.server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(go(), self.loop).result(10)

    def kill(self):
        """As `kill -9`: nothing listens any more, and what was open is gone in the middle of a byte."""

        async def go():
            self.server.close()
            for writer in list(self.writers):
                writer.transport.abort()
            self.writers.clear()

        asyncio.run_coroutine_threadsafe(go(), self.loop).result(10)

    def close(self):
        self.kill()

        async def rest():
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(rest(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    # --- HTTP -------------------------------------------------------------------------------------------------------

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                _, path, _ = first.split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.answer(writer, reader, path, headers, json.loads(body) if body else None)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def answer(self, writer, reader, path, headers, body):
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            return self.reply(writer, 401, {"error": {"message": "Unauthorized"}})
        if body is None:
            told = self.about(path)
            return self.reply(writer, 404 if told is None else 200, {"detail": "Not Found"} if told is None else told)
        if path == "/tokenize" and self.kind != "vllm":
            text = body["content" if self.kind == "llama.cpp" else "prompt"]
            return self.reply(writer, 200, {"tokens": self.encode(text)})
        self.requests.append((path, body))
        if body.get("stream") and self.failures:
            status, extra, message = self.failures.popleft()
            return self.reply(writer, status, {"error": {"message": message}}, extra)
        wanted = {"vllm": "/v1/completions", "sglang": "/generate", "llama.cpp": "/completion"}[self.kind]
        if path != wanted:
            return self.reply(writer, 404, {"detail": "Not Found"})
        request = getattr(self, f"read_{wanted.strip('/').replace('/', '_').replace('v1_', '')}")(body)
        if isinstance(request, str):
            return self.reply(writer, 400, {"error": {"message": request, "code": 400}})
        if not body.get("stream"):
            *events, _ = [json.loads(event) async for event in self.draw(request)]
            choices = [event["choices"][0] for event in events]  # only vLLM is asked so
            choices[0]["token_ids"] = [i for choice in choices for i in choice["token_ids"]]
            return self.reply(writer, 200, events[0])
        return await self.stream(writer, reader, request)

    def reply(self, writer, status, told, extra=()):
        data = json.dumps(told).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in dict(extra).items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def stream(self, writer, reader, request):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        breaks = self.breaks.popleft() if self.breaks else None
        if self.deaf:
            await asyncio.sleep(3600)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            count = 0
            async for event in self.draw(request):
                if reader.at_eof() or writer.transport.is_closing():
                    return
                if breaks is not None and count >= breaks:
                    writer.transport.abort()
                    return
                count += 1
                data = f"data: {event}\n\n".encode()
                writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                await writer.drain()
                await asyncio.sleep(self.pace)
            done = b"data: [DONE]\n\n"
            writer.write(f"{len(done):x}\r\n".encode() + done + b"\r\n0\r\n\r\n")
        finally:
            self.active -= 1

    # --- what it is -------------------------------------------------------------------------------------------------

    def encode(self, text):
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def about(self, path):
        card = {"id": self.name, "object": "model", "owned_by": OWNERS[self.kind], "root": "/models/root"}
        if self.kind == "llama.cpp":
            card["meta"] = {"n_vocab": len(self.tokenizer)}
        else:
            card["max_model_len"] = self.context
        known = {"/v1/models": {"object": "list", "data": [card]}}
        if self.kind == "sglang":
            known["/get_server_info"] = {"enable_deterministic_inference": self.seeds}
        if self.kind == "llama.cpp":
            known["/props"] = {"default_generation_settings": {"n_ctx": self.context}}
        return known.get(path)

    # --- requests ---------------------------------------------------------------------------------------------------

    def read_completions(self, body):
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.encode(body["prompt"])
        logprobs, watch = body.get("logprobs") or 0, body.get("logprob_token_ids")
        size = len(self.tokenizer)
        if watch is None and not -1 <= logprobs <= (size if self.whole else 20):
            return f"Requested sample logprobs of {logprobs}, which is greater than max allowed: 20"
        if logprobs == -1 and not self.whole:
            return f"Requested sample logprobs of {size}, which is greater than max allowed: 20"
        if watch is not None and len(watch) != logprobs:
            return "logprobs must equal len(logprob_token_ids)"
        if body["temperature"] > 2:
            return "temperature must be in [0, 2]"
        if self.context is not None and len(ids) + body["max_tokens"] > self.context:
            return f"This model's maximum context length is {self.context} tokens"
        banned = {int(i) for i, bias in body.get("logit_bias", {}).items() if bias <= -100}
        return {
            "ids": ids,
            "most": body["max_tokens"],
            "sampling": Sampling(
                body["temperature"], body.get("top_p", 1.0), body.get("top_k", 0), body.get("min_p", 0.0)
            ),
            "seed": body.get("seed", 0),
            "forbid": banned,
            "allow": None if "allowed_token_ids" in self.ignores else body.get("allowed_token_ids"),
            "watch": [] if "logprob_token_ids" in self.ignores else watch or [],
            "top": 0 if watch else size if logprobs == -1 else logprobs,
            "orders": None if self.probe is None else body.get("vllm_xargs", {}).get(ARGUMENT),
        }

    def read_generate(self, body):
        params = body["sampling_params"]
        return {
            "ids": body["input_ids"],
            "most": params["max_new_tokens"],
            "sampling": Sampling(params["temperature"], params["top_p"], max(0, params["top_k"]), params["min_p"]),
            "seed": params.get("sampling_seed", 0),
            "forbid": {int(i) for i, bias in params.get("logit_bias", {}).items() if bias <= -100},
            "allow": None,
            "watch": body.get("token_ids_logprob") or [],
            "top": body["top_logprobs_num"],
        }

    def read_completion(self, body):
        return {
            "ids": body["prompt"],
            "most": body["n_predict"],
            "sampling": Sampling(body["temperature"], body["top_p"], body["top_k"], body["min_p"]),
            "seed": body["seed"],
            "forbid": {i for i, bias in body.get("logit_bias", []) if bias is False},
            "allow": None,
            "watch": [],
            "top": body["n_probs"],
        }

    # --- tokens -----------------------------------------------------------------------------------------------------

    async def draw(self, request):
        """The events of a request, as text; the last is the end alone where the kind has one."""
        ids, size = list(request["ids"]), len(self.tokenizer)
        allow = request["allow"]
        if allow is not None:
            bits = np.zeros(size, dtype=np.uint8)
            bits[allow] = 1
            allow = np.packbits(bits, bitorder="little").tobytes()
        drawn = []
        orders, plugin = request.get("orders"), None
        if orders not in (None, HELLO):
            plugin = Plugin(self, Orders.from_json(orders), ids)
        for n in range(request["most"]):
            logits = np.asarray(self.function(ids), dtype=np.float32)[None]
            op = Sample(0, request["sampling"], frozenset(request["forbid"]), allow=allow)
            token = pick_all(logits, [op], [draw(request["seed"], n)])[0]
            id_ = greeting(self.probe.digest)[n] if orders == HELLO else token.id
            self.generated += 1
            raw = logits[0].astype(np.float64)
            raw -= raw.max()
            raw -= np.log(np.exp(raw).sum())
            if plugin is not None and plugin.writes(ids, raw):
                id_ = self.eos
            best = np.argsort(-raw, kind="stable")[: request["top"]]
            drawn.append((id_, float(raw[id_]), [(int(i), float(raw[i])) for i in best], raw))
            ids.append(id_)
            reason = "stop" if id_ == self.eos and orders != HELLO else "length" if n + 1 == request["most"] else None
            yield json.dumps(getattr(self, "tell_" + self.kind.replace(".", "_"))(request, drawn, reason))
            await asyncio.sleep(0)
            if reason:
                break
        if self.kind == "vllm":
            yield json.dumps({"choices": [], "usage": {"completion_tokens": len(drawn)}})
        elif self.kind == "llama.cpp":
            end = "eos" if drawn[-1][0] == self.eos else "limit"
            yield json.dumps({"content": "", "tokens": [], "stop": True, "stop_type": end})
        else:
            yield json.dumps(self.tell_sglang(request, drawn, reason))

    def tell_vllm(self, request, drawn, reason):
        id_, logprob, top, raw = drawn[-1]
        told = {f"token_id:{id_}": logprob, **{f"token_id:{i}": p for i, p in top}}
        told |= {f"token_id:{i}": float(raw[i]) for i in request["watch"]}
        choice = {
            "index": 0,
            "text": "\u2028",
            "finish_reason": reason,
            "token_ids": [id_],
            "logprobs": {"token_logprobs": [logprob], "top_logprobs": [told], "tokens": [f"token_id:{id_}"]},
        }
        if len(drawn) == 1:
            choice["prompt_token_ids"] = list(request["ids"])
        return {"choices": [choice]}

    def tell_sglang(self, request, drawn, reason):
        meta = {
            "completion_tokens": len(drawn),
            "finish_reason": None if reason is None else {"type": reason},
            "output_token_logprobs": [[p, i, None] for i, p, _, _ in drawn],
            "output_top_logprobs": [[[p, i, None] for i, p in top] for _, _, top, _ in drawn],
            "output_token_ids_logprobs": [
                [[float(raw[i]), i, None] for i in request["watch"]] for _, _, _, raw in drawn
            ],
        }
        return {"text": "", "meta_info": meta}

    def tell_llama_cpp(self, request, drawn, reason):
        id_, logprob, top, _ = drawn[-1]
        told = {"id": id_, "logprob": logprob, "top_logprobs": [{"id": i, "logprob": p} for i, p in top]}
        return {"content": "", "tokens": [id_], "stop": False, "completion_probabilities": [told]}


class Plugin:
    """A real sentry beside one sequence: what `vllm_sentries` does in a batch."""

    def __init__(self, server, orders, prompt):
        self.probe, self.states, self.orders = server.probe, server.states, orders
        self.sentry = Sentry(orders, Codec(server.tokenizer), watching=orders.start < len(prompt))
        self.seen, self.margins = orders.start, {}

    def writes(self, ids, raw):
        """Put the reports among the log-probabilities of what comes after `ids`; whether the sequence ends here."""
        sentry = self.sentry
        for token in ids[self.seen :]:
            sentry.push(token)
        self.seen = len(ids)
        self.margins[sentry.pushed] = float(raw.max() - raw[list(sentry.end_ids)].max())
        signals = {}
        if "end_margin" in sentry.wanted:
            signals["end_margin"] = self.margins.get(sentry.hit.position, float("nan"))
        if "p_safe" in sentry.wanted:
            through = self.probe.reads(sentry.hit.position, sentry.hit.end)
            signals["p_safe"] = self.probe.p_safe(self.states(ids[: self.orders.start + through]))
        values = {signal: rounded(signal, value) for signal, value in signals.items()}
        left = sentry.hit is not None and sentry.measured(values)
        for signal, value in values.items():
            raw[self.orders.reports[signal]] = told(signal, Report(value, left))
        return left
