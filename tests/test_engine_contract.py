"""What every engine promises, on a Python function, packed, and one branch at a time."""

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from engines_for_tests import SEEDED, SIZE, hashed, results, settle, talk, tiny

from langchain_earlyexit.engines.function import FunctionEngine, byte_tokenizer
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.program import Answer, Close, Feed, Fork, Hidden, Open, Rewind, Sample, Step
from langchain_earlyexit.engines.scheduler import ScheduledEngine
from langchain_earlyexit.engines.separate import SeparateModel
from langchain_earlyexit.engines.streams import STREAM_BOUND
from langchain_earlyexit.sampling import Sampling

KINDS = ["function", "packed", "separate"]


@pytest.fixture(params=KINDS)
def engine(request):
    if request.param == "function":
        made = FunctionEngine(hashed)
    else:
        model = (PackedModel if request.param == "packed" else SeparateModel)(tiny())
        made = ScheduledEngine(model, byte_tokenizer(), name=request.param)
    passes = []
    inner = made._model.forward

    def forward(rows):
        passes.append(len(rows))
        return inner(rows)

    made._model.forward = forward
    made.passes = passes
    yield made
    made.close()


def chain(n, *, branch=0, sampling=SEEDED):
    return [(Sample(branch, sampling),)] * n


@pytest.mark.parametrize("kind", [PackedModel, SeparateModel])
def test_of_a_long_branch_only_the_newest_hidden_states_are_kept(kind):
    model = kind(tiny())
    engine = ScheduledEngine(model, byte_tokenizer(), name="x")
    caches = []
    inner = model.new
    model.new = lambda *given: caches.append(inner(*given)) or caches[-1]

    def walk():
        yield Step((Open(0, tuple(5 + i % 200 for i in range(1300)), 0, (0.5, 1.0)), Sample(0)))
        for _ in range(70):
            yield Step((Sample(0),))
            assert all(len(cache.states) <= 64 for cache in caches)
        inbox = yield Step((Hidden(0, 1369), Hidden(0, 1370 - 64)))
        assert all(states.shape == (2, 32) for states in inbox.results)
        yield Step((Hidden(0, 1369 - 64),))

    with pytest.raises(KeyError, match="no hidden state is kept for token 1305"):
        list(engine.submit(walk()))
    engine.close()
    assert caches


def test_a_fork_and_its_parent_leave_each_other_alone(engine):
    opened = (Open(0, (9, 8, 7, 6)),)
    alone = results(engine, opened, *chain(6))[1:]
    both = results(
        engine,
        opened,
        *chain(3),
        (Fork(0, 1, 5), Feed(1, (40, 41)), Sample(1), Sample(0, SEEDED)),
        (Sample(1), Sample(0, SEEDED)),
        (Close(1), Sample(0, SEEDED)),
    )
    trunk = [both[i + 1][0].id for i in range(3)] + [both[4][-1].id, both[5][-1].id, both[6][-1].id]
    assert trunk == [r[0].id for r in alone]
    first = both[1][0].id
    forked = results(engine, (Open(0, (9, 8, 7, 6, first, 40, 41)),), (Sample(0),), (Sample(0),))
    assert [both[4][2].id, both[5][0].id] == [forked[1][0].id, forked[2][0].id]


def test_a_twin_draws_what_its_parent_would_and_any_other_fork_does_not(engine):
    opened = (Open(0, (9, 8, 7, 6), 3),)
    rewound = results(engine, opened, *chain(4), (Rewind(0, 5), Feed(0, (40, 41)), Sample(0, SEEDED)), *chain(6))[5:]
    for twin in (True, False):
        apart = (Fork(0, -1, 5, twin=twin), Feed(-1, (40, 41)), Sample(-1, SEEDED), Sample(0, SEEDED))
        forked = results(engine, opened, *chain(4), apart, *chain(6, branch=-1))[5:]
        drawn = [forked[0][2].id] + [step[0].id for step in forked[1:]]
        assert (drawn == [rewound[0][-1].id] + [step[0].id for step in rewound[1:]]) is twin


def test_a_rewind_and_the_same_tokens_again_give_the_same_logits(engine):
    opened = (Open(0, (1, 2, 3)), Feed(0, (50, 51, 52)))
    watch = tuple(range(0, SIZE, 13))
    ask = Sample(0, watch=watch)
    once, again, bare = results(
        engine, (*opened, ask), (Rewind(0, 4), Feed(0, (51, 52)), ask), (Rewind(0, 6), ask)
    )  # the last: a sample after a rewind, with nothing fed
    assert again[-1].id == once[-1].id == bare[-1].id
    assert np.allclose(again[-1].watched, once[-1].watched, atol=1e-4)
    assert np.allclose(bare[-1].watched, once[-1].watched, atol=1e-4)


def test_tokens_do_not_depend_on_company(engine):
    def company(sampling):
        prompts = [tuple(range(5 + i, 30 + 7 * i)) for i in range(6)]
        alone, together = [[] for _ in prompts], [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            list(engine.submit(talk(8, prompt, sampling, i, alone[i])))
        streams = [engine.submit(talk(8, p, sampling, i, together[i])) for i, p in enumerate(prompts)]
        for stream in streams:
            list(stream)
        return alone, together

    for sampling in (Sampling(), SEEDED):
        alone, together = company(sampling)
        assert alone == together
    assert max(engine.passes) > 1


def test_a_prompt_longer_than_a_prefill_chunk_gives_what_feeding_it_bit_by_bit_gives(engine):
    prompt = tuple(5 + (i * 31) % 250 for i in range(1100))
    whole = results(engine, (Open(0, prompt),), (Sample(0),))[1][0]
    parts = [
        (
            Feed(0, prompt[i : i + 100]),
            Sample(0),
        )
        for i in range(100, 1100, 100)
    ]
    steps = [(Open(0, prompt[:100]),)]
    for i, ops in enumerate(parts):
        steps += [ops[:1], (Sample(0),), (Rewind(0, 200 + 100 * i),)]
    assert results(engine, *steps)[-2][0].id == whole.id
    assert results(engine, *steps)[-2][0].logprob == pytest.approx(whole.logprob, abs=1e-4)


def test_cancelling_stops_within_one_step_and_frees_everything(engine):
    stream = engine.submit(talk())
    iterator = iter(stream)
    next(iterator)
    stream.cancel()
    before = len(engine.passes)
    settle(lambda: engine.running == 0)
    assert len(engine.passes) <= before + 1
    stream.cancel()
    for _ in iterator:
        pass  # reading on ends, without an error


def test_breaking_out_of_an_iteration_cancels(engine):
    stream = engine.submit(talk())
    for _ in stream:
        break
    settle(lambda: engine.running == 0)


def test_dropping_the_stream_cancels(engine):
    stream = engine.submit(talk())
    settle(lambda: engine.running == 1)
    del stream
    gc.collect()
    settle(lambda: engine.running == 0)


def test_an_unread_stream_pauses_its_program_and_goes_on_when_read(engine):
    stream = engine.submit(talk(STREAM_BOUND + 20))
    settle(lambda: len(stream._channel.events) >= STREAM_BOUND)
    time.sleep(0.05)
    before = len(engine.passes)
    time.sleep(0.1)
    assert len(engine.passes) <= before + 1
    assert len(stream._channel.events) <= STREAM_BOUND + 1
    assert len(list(stream)) == STREAM_BOUND + 20


def test_a_program_that_only_talks_is_bounded_and_cancelled_too(engine):
    def chatter():
        while True:
            yield Step((), (Answer("x"),))

    stream = engine.submit(chatter())
    settle(lambda: len(stream._channel.events) >= STREAM_BOUND)
    time.sleep(0.05)
    assert len(stream._channel.events) == STREAM_BOUND
    stream.cancel()
    settle(lambda: engine.running == 0)


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), asyncio.CancelledError()])
def test_a_failing_program_takes_down_itself_alone(engine, error):
    def failing():
        yield Step((Open(0, (1, 2)), Sample(0)))
        raise error

    good = []
    other = engine.submit(talk(5, out=good))
    with pytest.raises(ValueError if isinstance(error, ValueError) else RuntimeError):
        list(engine.submit(failing()))
    assert len(list(other)) == len(good) == 5
    assert len(list(engine.submit(talk(2)))) == 2


@pytest.mark.parametrize(
    "ops",
    [
        (Open(0, ()),),
        (Sample(3),),
        (Open(0, (1, 2)), Sample(0), Close(0)),
        (Open(0, (1, 2)), Rewind(0, 3)),
        (Open(0, (1, 2)), Fork(0, 1, 3)),
        (Open(0, (1, 2), 0, (0.5,)), Hidden(0, 2)),
    ],
)
def test_impossible_ops_are_errors_of_their_own_program_and_never_a_hang(engine, ops):
    other = engine.submit(talk())
    read = iter(other)
    with pytest.raises((ValueError, KeyError)):
        results(engine, ops)
    for _ in range(3):
        next(read)
    other.cancel()


def test_a_program_without_a_step_is_over(engine):
    def nothing():
        return
        yield

    assert list(engine.submit(nothing())) == []


def test_a_failing_model_is_told_to_the_reader_and_the_engine_lives_on():
    broken = threading.Event()

    def function(ids):
        if broken.is_set():
            raise SystemExit("broken")
        return hashed(ids)

    engine = FunctionEngine(function)
    broken.set()
    with pytest.raises(RuntimeError, match="broken"):
        list(engine.submit(talk(3)))
    broken.clear()
    assert len(list(engine.submit(talk(3)))) == 3
    engine.close()


def test_a_closed_engine_ends_what_runs_and_refuses_more(engine):
    streams = [engine.submit(talk()) for _ in range(3)]
    next(iter(streams[0]))
    engine.close()
    for stream in streams[1:]:
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(talk())
    engine.close()


def test_a_timeout_is_raised_also_when_paused_or_in_line(monkeypatch):
    monkeypatch.setattr("langchain_earlyexit.engines.streams.STREAM_BOUND", 3)
    engine = FunctionEngine(hashed)
    engine._max_running = 1
    busy = threading.Event()
    paused = engine.submit(talk(), timeout=1.0)
    settle(lambda: len(paused._channel.events) >= 3)
    engine._model._function = lambda ids: (busy.wait(30), hashed(ids))[1]
    endless = engine.submit(talk())
    queued, cancelled = engine.submit(talk(), timeout=0.1), engine.submit(talk())
    cancelled.cancel()
    time.sleep(0.2)
    busy.set()
    with pytest.raises(TimeoutError):
        list(queued)
    endless.cancel()
    settle(lambda: engine.running == 0)
    with pytest.raises(TimeoutError):
        list(paused)
    assert list(cancelled) == []
    engine.close()


def test_paused_programs_cost_no_time_of_the_processor_and_keep_nobody_waiting():
    engine = FunctionEngine(hashed)
    engine._max_running = 1
    paused = engine.submit(talk())
    settle(lambda: len(paused._channel.events) >= STREAM_BOUND)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.15
    assert len(list(engine.submit(talk(3)))) == 3
    paused.cancel()
    engine.close()


def test_the_engine_works_again_after_its_idle_thread_has_ended(monkeypatch):
    monkeypatch.setattr("langchain_earlyexit.engines.scheduler._IDLE_SECONDS", 0.02)
    engine = FunctionEngine(hashed)
    for _ in range(3):
        assert len(list(engine.submit(talk(3)))) == 3
        settle(lambda: engine._thread is None)
    engine.close()


def test_no_reference_to_a_finished_sequence_is_held(engine):
    kept = []
    inner = engine._model.new

    class Cache(list):
        pass

    def new():
        cache = inner()
        if isinstance(cache, list):
            cache = Cache(cache)
        kept.append(weakref.ref(cache))
        return cache

    engine._model.new = new

    def failing():
        yield Step((Open(0, (1, 2)), Sample(0)))
        raise ValueError("mine")

    list(engine.submit(talk(3)))
    stream = engine.submit(talk())
    next(iter(stream))
    with pytest.raises(ValueError, match="mine") as caught:
        list(engine.submit(failing()))
    settle(lambda: engine.running == 0)
    gc.collect()
    assert len(kept) == 3
    assert [ref() for ref in kept] == [None] * 3
    assert caught.value is not None


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def test_async_reading_gives_the_same_events(engine):
    expected = [e.text for e in engine.submit(talk(20))]
    assert [e.text async for e in engine.submit(talk(20))] == expected


async def test_a_cancelled_task_cancels_its_program(engine):
    stream = engine.submit(talk())
    seen = asyncio.Event()

    async def read():
        async for _ in stream:
            seen.set()

    task = asyncio.create_task(read())
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(settle, lambda: engine.running == 0)


def test_two_event_loops_read_at_once(engine):
    out = {}

    def read(name):
        async def go():
            return [e.text async for e in engine.submit(talk(40))]

        out[name] = asyncio.run(go())

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(out[0]) == 40
    assert out[0] == out[1]


def test_a_reader_whose_loop_is_gone_harms_nobody(engine):
    stream = engine.submit(talk())
    iterator = stream.__aiter__()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(iterator))
    loop.close()
    assert len(list(engine.submit(talk(5)))) == 5
    stream.cancel()
    settle(lambda: engine.running == 0)


# --- hidden states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PackedModel, SeparateModel])
def test_hidden_states_are_those_of_the_blocks_whatever_shares_the_pass(kind):
    model = tiny()
    prompts = [tuple(5 + (i * k) % 200 for i in range(20)) for k in (3, 7)]
    expected = {}
    for prompt in prompts:
        ids = [*prompt, 99, 98]
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected[prompt] = torch.stack([states[1], states[2]])[:, 0].detach().numpy()  # after blocks 1 and 2 of 3
    engine = ScheduledEngine(kind(model), byte_tokenizer(), name="x")
    found = {}

    def walk(prompt):
        def go():
            yield Step((Open(0, prompt, 0, (1 / 3, 2 / 3)),))
            yield Step((Sample(0),))  # prefill
            yield Step((Rewind(0, 20), Feed(0, (99,)), Sample(0)))
            inbox = yield Step((Rewind(0, 21), Feed(0, (98,)), *(Hidden(0, i) for i in range(22))))
            found[prompt] = np.stack(inbox.results[2:])

        return go()

    streams = [engine.submit(walk(prompt)) for prompt in prompts]
    for stream in streams:
        assert list(stream) == []
    engine.close()
    for prompt in prompts:
        assert np.abs(found[prompt].transpose(1, 0, 2) - expected[prompt]).max() < 1e-4
