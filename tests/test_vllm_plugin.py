"""The plugin beside a stand-in for vLLM's runner: batches that come, move and go, prompts in pieces, and errors."""

import dataclasses
import enum
import importlib
import json
import math
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reasoners_for_tests import BYTES
from test_lynx import CODEC, some_probe
from torch import nn

from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.policies import LYNX, ThinkBrake
from langchain_earlyexit.sentry import ARGUMENT, HELLO, Orders, greeted, heard, rounded

WIDTH, LAYERS, EOS, CARRIER, SECOND = 32, 3, 2, 1, 0
PROBE = some_probe("before")


class Move(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class Params:
    extra_args: dict | None = None


class Context:
    """What vLLM's forward context tells."""

    starts = None
    broken = False

    @property
    def attn_metadata(self):
        if self.broken:
            return {"layer": object()}
        return (
            None if self.starts is None else {"layer": types.SimpleNamespace(query_start_loc=torch.tensor(self.starts))}
        )


CONTEXT = Context()


@pytest.fixture(scope="module")
def plugin():
    """The plugin's module, imported as beside vLLM."""
    stand_ins = {
        "vllm": {},
        "vllm.forward_context": {
            "get_forward_context": lambda: CONTEXT, "is_forward_context_available": lambda: True,
        },
        "vllm.v1": {}, "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {
            "LogitsProcessor": object, "BatchUpdate": BatchUpdate, "MoveDirectionality": Move,
        },
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, members in stand_ins.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        for name in ("vllm_plugin", "vllm_sentries"):
            patch.delitem(sys.modules, f"langchain_earlyexit.{name}", raising=False)
        yield importlib.import_module("langchain_earlyexit.vllm_plugin")
        for name in ("vllm_plugin", "vllm_sentries"):
            patch.delitem(sys.modules, f"langchain_earlyexit.{name}")


class Block(nn.Module):
    """As vLLM's: returns what it adds, and what that is to be added to; and writes into the latter later on."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else residual.add_(hidden)
        return torch.roll(residual, self.number + 1, -1) * torch.cos(positions)[:, None], residual


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.randn(WIDTH, len(BYTES))

    def forward(self, _head, hidden):
        return hidden @ self.weight


class Model(nn.Module):
    """State depends on a token and its place alone: so it can be told what any sequence's states are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.randn(len(BYTES), WIDTH)
        self.layers = nn.ModuleList(Block(i) for i in range(LAYERS))
        self.logits_processor = Head()

    def forward(self, input_ids, positions, **_):
        hidden, residual = self.embedding[input_ids].clone(), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual


def states_of(ids):
    """[tokens, probed layers, width], computed without the plugin: outputs of blocks 1 and 2."""
    positions = torch.arange(len(ids))
    hidden, residual = Model().embedding[torch.tensor(ids)].clone(), None
    found = []
    for layer in Model().layers:
        hidden, residual = layer(positions, hidden, residual)
        found.append((hidden + residual).numpy())
    return np.stack(found[:2], axis=1)


class Sequence:
    """A request whose next tokens are written beforehand."""

    def __init__(self, name, prompt, script, orders=None):
        self.name, self.prompt, self.script, self.output = name, list(prompt), list(script), []
        text = orders.to_json() if isinstance(orders, Orders) else orders
        self.params = Params({ARGUMENT: text} if text else None)
        self.done, self.heard, self.forced, self.rows = 0, {}, None, []

    @property
    def ids(self):
        return self.prompt + self.output


class Runner:
    """The order of calls is that of vLLM's V1 runner."""

    def __init__(self, plugin, probe=PROBE, piece=100, codec=CODEC):
        self.plugin, self.piece = plugin, piece
        plugin.sentries.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugin, "served_probe", lambda: probe)
            self.sentries = plugin.sentries()
        config = types.SimpleNamespace(
            model_config=types.SimpleNamespace(
                hf_text_config=types.SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH), enforce_eager=True,
                model="nowhere", tokenizer="nowhere", tokenizer_revision=None, trust_remote_code=False,
                dtype=torch.float32, get_vocab_size=lambda: len(BYTES), hf_config=None,
            )
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugin, "_codec", lambda _: codec)
            self.processor = plugin.EarlyExitProcessor(config, torch.device("cpu"), False)
        self.model = Model()
        self.sentries.hook(self.model, config)
        self.batch = []

    def step(self, add=(), remove=(), swap=None):
        removed, moved, added = [], [], []
        for sequence in remove:
            at = self.batch.index(sequence)
            removed.append(at)
            last = self.batch.pop()
            if last is not sequence:  # the last takes its place
                self.batch[at] = last
                moved.append((len(self.batch), at, Move.UNIDIRECTIONAL))
        for sequence in add:
            added.append((len(self.batch), sequence.params, sequence.prompt, sequence.output))
            self.batch.append(sequence)
        if swap:
            i, j = swap
            self.batch[i], self.batch[j] = self.batch[j], self.batch[i]
            moved.append((i, j, Move.SWAP))
        changed = removed or added or moved
        self.processor.update_state(BatchUpdate(len(self.batch), removed, added, moved) if changed else None)
        counts = [min(self.piece, len(s.ids) - s.done) for s in self.batch]
        CONTEXT.starts = [0, *np.cumsum(counts).tolist()]
        flat = [s.ids[s.done : s.done + n] for s, n in zip(self.batch, counts, strict=True)]
        places = [range(s.done, s.done + n) for s, n in zip(self.batch, counts, strict=True)]
        hidden = self.model(
            input_ids=torch.tensor([i for ids in flat for i in ids]),
            positions=torch.tensor([p for place in places for p in place]),
        )
        logits = self.model.logits_processor(None, hidden[torch.tensor(CONTEXT.starts[1:]) - 1])
        raw = torch.log_softmax(logits.float(), -1)
        logits = self.processor.apply(logits.float().clone())
        for i, (s, n) in enumerate(zip(self.batch, counts, strict=True)):
            s.done += n
            if s.done < len(s.ids):
                continue
            s.rows.append(raw[i])
            reports = {
                name: heard(name, float(raw[i, at])) for name, at in (("p_safe", CARRIER), ("end_margin", SECOND))
            }
            s.heard[len(s.output)] = {name: report for name, report in reports.items() if report}
            finite = torch.isfinite(logits[i]).nonzero().flatten().tolist()
            forced = finite[0] if len(finite) == 1 else None
            s.output.append(s.script[len(s.output)] if forced is None else forced)
            s.forced = forced


def ordered(prompt, policy=None, **changes):
    given = {
        "cues": CueSpec(words=("w",)), "kinds": frozenset({"reflection"}), "end": "</think>", "eos": (EOS,),
        "start": len(prompt), "reports": {"p_safe": CARRIER}, "policy": policy, "probe": PROBE.digest,
    }  # fmt: skip
    return Orders(**(given | changes))


def checks_of(sequence):
    """Number of tokens out when a report came, and what it said."""
    return {n: told["p_safe"].value for n, told in sequence.heard.items() if "p_safe" in told}


def expected(sequence, text):
    """What a probe at home makes of each " w " in the text: it fires with the blank after it, on the token before."""
    states = states_of(sequence.prompt + sequence.script)
    found = {}
    for at in range(1, len(text) - 1):
        if text[at - 1 : at + 2] == " w ":
            score = PROBE.p_safe(states[len(sequence.prompt) + at - 1])
            found[at + 2] = rounded("p_safe", score)
    return found


TEXT = "so 1 w then w 22 or w no."


@pytest.mark.parametrize("piece", [100, 7])
def test_each_sequence_is_scored_on_its_own_states_however_the_batch_is_packed_and_moved(plugin, piece):
    runner = Runner(plugin, piece=piece)
    a = Sequence("a", range(20, 30), CODEC.encode(TEXT), ordered(range(10)))
    b = Sequence("b", range(30, 35), CODEC.encode(TEXT))
    c = Sequence("c", range(40, 61), CODEC.encode("a" + TEXT), ordered(range(21)))
    runner.step(add=[a])
    runner.step(add=[b])
    runner.step()
    runner.step(add=[c], swap=(0, 1))
    for _ in range(6):
        runner.step()
    runner.step(remove=[b])
    runner.step(swap=(0, 1))
    while len(a.output) < len(TEXT) or len(c.output) < len(TEXT):
        full = [s for s in runner.batch if len(s.output) == len(s.script)]
        runner.step(remove=full)
    assert checks_of(a) == pytest.approx({n: p for n, p in expected(a, TEXT).items() if n < len(TEXT)}, abs=1e-5)
    assert len(checks_of(a)) == 3
    later = expected(c, "a" + TEXT)
    assert checks_of(c) == pytest.approx({n: p for n, p in later.items() if n <= max(c.heard)}, abs=1e-5)
    assert checks_of(c)
    assert not any(b.heard.values())


def test_a_sequence_that_leaves_is_ended_at_once_and_the_others_rows_are_the_model_s_own_to_the_last_bit(plugin):
    runner = Runner(plugin)
    prompt = range(20, 30)
    scores = expected(Sequence("x", prompt, CODEC.encode(TEXT)), TEXT)
    bar = sorted(scores.values())[-1] - 1e-3  # only the safest check is above
    leaving = Sequence("leaving", prompt, CODEC.encode(TEXT), ordered(prompt, LYNX(bar)))
    other = Sequence("other", prompt, CODEC.encode(TEXT))
    runner.step(add=[other, leaving])
    while leaving.forced is None:
        runner.step()
    at = max(scores, key=scores.get)
    assert leaving.output == [*CODEC.encode(TEXT)[:at], EOS]
    assert leaving.heard[at]["p_safe"].left
    assert not any(told["p_safe"].left for n, told in leaving.heard.items() if told and n < at)
    alone = Runner(plugin)
    plain = Sequence("plain", prompt, CODEC.encode(TEXT))
    alone.step(add=[plain])
    while len(plain.rows) < len(other.rows):
        alone.step()
    assert all(torch.equal(x, y) for x, y in zip(other.rows, plain.rows, strict=True))
    # Beside a report, the sequence's own log-probabilities move by less than single precision tells.
    mine = [i for i in range(len(BYTES)) if i != CARRIER]
    assert all(torch.allclose(x[mine], y[mine], atol=2e-3) for x, y in zip(leaving.rows, plain.rows, strict=False))


def test_margins_are_those_of_the_logits_and_leave_without_a_probe(plugin):
    runner = Runner(plugin, probe=None)
    prompt = range(20, 30)
    orders = ordered(prompt, kinds=frozenset({"sentence"}), reports={"end_margin": SECOND}, probe=None)
    text = "no. yes! so. 1 "
    watched = Sequence("watched", prompt, CODEC.encode(text), orders)
    runner.step(add=[watched])
    while len(watched.output) < len(text):
        runner.step()
    [end] = CODEC.encode("</think>")
    margins = {n: told["end_margin"].value for n, told in watched.heard.items() if told}
    assert set(margins) == {4, 9, 13}  # with the blank after each
    for n, margin in margins.items():
        row = watched.rows[n - 1]  # of the token after the full stop
        assert margin == pytest.approx(min(32.0, float(row.max() - row[end])), abs=1e-3)
    bold = ordered(prompt, ThinkBrake(1e3), kinds=frozenset({"sentence"}), reports={"end_margin": SECOND}, probe=None)
    leaving = Sequence("leaving", prompt, CODEC.encode(text), bold)
    runner.step(add=[leaving], remove=[watched])
    for _ in range(4):
        runner.step()
    assert leaving.output == [*CODEC.encode("no. "), EOS]


def test_a_chain_that_goes_on_from_an_earlier_request_is_measured_where_states_are_there_and_never_ended(plugin):
    runner = Runner(plugin, piece=1000)
    prompt, thought = list(range(20, 30)), list(CODEC.encode("so 1 w then "))
    orders = ordered(prompt, LYNX(0.0))
    going_on = Sequence("on", prompt + thought, CODEC.encode("w 22 or w no."), orders)
    runner.step(add=[going_on])
    while len(going_on.output) < 13:
        runner.step()
    states = states_of(going_on.prompt + going_on.script)
    told = checks_of(going_on)
    assert set(told) == {2, 10}
    for n, value in told.items():
        assert value == pytest.approx(rounded("p_safe", PROBE.p_safe(states[len(going_on.prompt) + n - 3])), abs=1e-5)
    cached = Sequence("cached", prompt + thought, CODEC.encode("w 22"), orders)
    cached.done = len(cached.prompt) - 1  # the rest lies in the server's cache, which holds no states
    runner.step(add=[cached], remove=[going_on])
    for _ in range(3):
        runner.step()
    assert checks_of(cached)  # the state of the token that is always computed anew is there
    assert cached.forced is None


def test_an_error_is_logged_once_stands_the_sentries_down_tells_their_clients_and_leaves_all_tokens_alone(
    plugin, caplog
):
    runner = Runner(plugin)
    long = CODEC.encode(TEXT + 40 * ".")
    watched = [Sequence(str(i), range(20, 30), long, ordered(range(10), LYNX(0.0))) for i in range(2)]
    plain = Sequence("plain", range(20, 30), long)
    runner.step(add=[*watched, plain])
    CONTEXT.broken = True
    try:
        runner.step()
    finally:
        CONTEXT.broken = False
    for _ in range(12):
        runner.step()
    assert all(s.output == plain.output for s in watched)
    assert all(s.heard[len(s.output) - 1]["p_safe"].failed for s in watched)
    assert len([r for r in caplog.records if "early exit is off for some sequences" in r.message]) == 1
    fresh = Sequence("fresh", range(20, 30), CODEC.encode(TEXT), ordered(range(10), LYNX(0.0)))
    runner.step(add=[fresh])
    while fresh.forced is None:
        runner.step()
    assert fresh.heard[len(fresh.output) - 1]["p_safe"].left


def broken(*_):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eos": (10**6,)}, True),
        ({"reports": {"p_safe": 10**6}}, False),
        ({"reports": {}, "eos": (10**6,)}, False),
        ({"end": 5}, True),
        ({"start": 10.5}, False),
        ("push", True),
        ("measured", True),
    ],
    ids=str,
)
def test_whoever_brings_bad_orders_or_has_a_sentry_that_breaks_costs_the_others_nothing(plugin, changes, told):
    runner = Runner(plugin)
    prompt, script = range(20, 30), CODEC.encode(TEXT + 20 * ".")
    good = Sequence("good", prompt, script, ordered(prompt))
    bad = Sequence("bad", prompt, script, ordered(prompt, LYNX(0.0)))
    if isinstance(changes, dict):
        bad.params.extra_args[ARGUMENT] = json.dumps(json.loads(bad.params.extra_args[ARGUMENT]) | changes)
    runner.step(add=[bad, good])
    if isinstance(changes, str):
        setattr(runner.sentries.batch[0].sentry, changes, broken)
    while len(good.output) < len(TEXT):
        runner.step()
    assert checks_of(good) == pytest.approx({n: p for n, p in expected(good, TEXT).items() if n < len(TEXT)}, abs=1e-5)
    assert len(checks_of(good)) == 3
    assert bad.output == good.output  # nothing was forced
    last = bad.heard[len(bad.output) - 1]
    assert last["p_safe"].failed if told else not any(bad.heard.values())


def test_a_row_that_cannot_be_forced_is_left_as_it_was_and_the_others_are_forced(plugin):
    runner = Runner(plugin)
    first, second = (Sequence(name, range(20, 30), CODEC.encode(TEXT), ordered(range(10))) for name in "ab")
    runner.step(add=[first, second])
    a, b = (runner.sentries.batch[i] for i in range(2))
    a.leaves = b.leaves = True
    a.orders = dataclasses.replace(a.orders, eos=(10**6,))
    logits = torch.zeros(2, len(BYTES))
    runner.sentries.force(logits)
    assert torch.equal(logits[0], torch.zeros(len(BYTES)))
    assert torch.isfinite(logits[1]).nonzero().flatten().tolist() == [EOS]
    assert (a.sentry, b.sentry is None) == (None, False)


def test_who_asks_a_server_that_can_follow_nothing_is_not_greeted(plugin, caplog):
    runner = Runner(plugin, probe=None)
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_text_config=types.SimpleNamespace(), enforce_eager=False)
    )
    runner.sentries.hooked = False
    runner.sentries.hook(Model(), config)
    assert "early exit is off without --enforce-eager" in caplog.text
    runner.sentries.hook(nn.Sequential(), config)
    assert "has no logits_processor module: early exit is off" in caplog.text
    for one in (runner, Runner(plugin, codec=None)):
        asking = Sequence("hello", [5], [7] * 40, HELLO)
        for _ in range(25):
            one.step(add=[asking] if asking not in one.batch else [])
        assert asking.output == [7] * 25
        assert greeted(tuple(asking.output[:21])) == (False, None)


def test_who_brings_orders_to_a_server_without_a_tokenizer_is_told(plugin):
    runner = Runner(plugin, codec=None)
    watched = Sequence("watched", range(20, 30), CODEC.encode(TEXT), ordered(range(10), LYNX(0.0)))
    runner.step(add=[watched])
    runner.step()
    assert all(told["p_safe"].failed for told in watched.heard.values())


def test_the_tokenizer_is_loaded_when_the_server_starts_and_one_that_cannot_be_stops_no_server(
    plugin, caplog, tmp_path
):
    BYTES.save_pretrained(tmp_path / "there")
    model = types.SimpleNamespace(tokenizer_revision=None, trust_remote_code=False, get_vocab_size=lambda: len(BYTES))
    for name in ("there", "not there"):
        model.tokenizer = str(tmp_path / name)
        processor = plugin.EarlyExitProcessor(types.SimpleNamespace(model_config=model), torch.device("cpu"), False)
        assert (processor._codec is None) == (name == "not there")
    assert "no tokenizer could be loaded from" in caplog.text


def test_it_greets_with_the_digest_of_its_probe(plugin):
    for probe in (PROBE, None):
        runner = Runner(plugin, probe=probe)
        asking = Sequence("hello", [5], [7] * 40, HELLO)
        runner.step(add=[Sequence("other", [5, 6], [7] * 40), asking])
        for _ in range(20):
            runner.step()
        assert greeted(tuple(asking.output)) == (True, None if probe is None else probe.digest)


def test_orders_that_need_another_probe_or_cannot_be_read_are_refused_before_they_reach_the_engine(plugin, monkeypatch):
    processor = plugin.EarlyExitProcessor
    good = ordered(range(10)).to_json()
    monkeypatch.setattr(plugin, "served_probe", lambda: PROBE)
    for text in (good, HELLO, None):
        processor.validate_params(Params({ARGUMENT: text} if text else None))
    with pytest.raises(ValueError, match="no orders for a sentry"):
        processor.validate_params(Params({ARGUMENT: "{}"}))
    monkeypatch.setattr(plugin, "served_probe", lambda: None)
    with pytest.raises(ValueError, match=f"{PROBE.digest}, but this server serves none"):
        processor.validate_params(Params({ARGUMENT: good}))


def test_a_probe_of_another_width_or_a_compiled_model_is_refused_when_the_server_starts(plugin):
    with pytest.raises(ValueError, match="reads states of width 16, but this model's are 32"):
        Runner(plugin, probe=some_probe(width=16))
    runner = Runner(plugin)
    text = types.SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH)
    compiled = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_text_config=text, enforce_eager=False))
    with pytest.raises(ValueError, match="--enforce-eager"):
        runner.sentries.hook(Model(), compiled)
    assert math.isfinite(PROBE.p_safe(np.zeros((2, 32), np.float32)))
