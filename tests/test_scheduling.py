"""Who runs when, and within how much memory."""

import random
import threading

import numpy as np
import pytest
from engines_for_tests import SEEDED, SIZE, hashed, settle, talk, tiny

from langchain_earlyexit.engines.function import FunctionEngine, byte_tokenizer
from langchain_earlyexit.engines.model import Row
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.pages import PAGE
from langchain_earlyexit.engines.passes import ALONE, MIXED, collect
from langchain_earlyexit.engines.program import Answer, Close, Feed, Fork, Hidden, Open, Sample, Step
from langchain_earlyexit.engines.runs import Run
from langchain_earlyexit.engines.scheduler import ScheduledEngine
from langchain_earlyexit.engines.separate import SeparateModel
from langchain_earlyexit.engines.streams import STREAM_BOUND, Channel
from langchain_earlyexit.sampling import Sampling

SETTINGS = [Sampling(), SEEDED, Sampling(0.7, 0.9), Sampling(1.2, top_k=5), Sampling(1.0, min_p=0.1)]


def engine_of(kind=PackedModel, *, pages=None, reuse=False, **given):
    """A small engine, with room for so many pages."""
    model = kind(tiny())
    if pages is not None:
        cache = model.new()
        model.forward([Row(cache, [1, 2, 3])])
        del cache
        if kind is PackedModel:
            model.bound(pages * model._memory.page_bytes, reuse=reuse)
        else:
            model.bound(pages * PAGE * model._token_bytes)
    return ScheduledEngine(model, byte_tokenizer(), name="x", **given)


def mixed(i, out, prompt=None):
    """A request of its own kind: prompt, sampling, a trial beside the trunk, forced text."""
    rng = random.Random(i)
    prompt = tuple(rng.randrange(5, SIZE) for _ in range(rng.choice([3, 20, 70, 150]))) if prompt is None else prompt
    sampling, length = SETTINGS[i % len(SETTINGS)], rng.choice([4, 12, 24])
    yield Step((Open(0, prompt, i),))
    for step in range(length):
        ops = [Sample(0, sampling)]
        if step == 3 and i % 3 == 0:
            yield Step((Fork(0, 1, len(prompt) + 2), Feed(1, (7, 8, 9))))
        if step >= 3 and i % 3 == 0:
            ops.append(Sample(1, SEEDED))
        inbox = yield Step(tuple(ops), (Answer(str(step)),))
        out.extend(token.id for token in inbox.results)
    if i % 3 == 0:
        yield Step((Close(1),))


@pytest.mark.parametrize("room", [{}, {"pages": 400, "reuse": True}, {"pages": 30, "reuse": True}], ids=str)
def test_64_mixed_requests_in_any_order_of_arrival_say_what_each_says_alone(room):
    plain, engine = engine_of(), engine_of(**room)
    alone, together = [[] for _ in range(64)], [[] for _ in range(64)]
    for i in range(64):
        list(plain.submit(mixed(i, alone[i])))
    plain.close()
    rng = random.Random(str(room))
    order = rng.sample(range(64), 64)
    streams = []
    while order:
        for i in [order.pop() for _ in range(min(len(order), rng.randint(1, 12)))]:
            streams.append(engine.submit(mixed(i, together[i])))
        if streams and rng.random() < 0.5:
            list(streams.pop(0))
    for stream in streams:
        list(stream)
    engine.close()
    assert together == alone


@pytest.mark.parametrize("kind", [PackedModel, SeparateModel])
def test_in_little_memory_requests_take_turns_and_say_the_same(kind):
    free, tight = engine_of(kind), engine_of(kind, pages=9)
    expected, found = [[] for _ in range(12)], [[] for _ in range(12)]
    for engine, outs in ((free, expected), (tight, found)):
        for stream in [engine.submit(mixed(i, outs[i])) for i in range(12)]:
            list(stream)
    assert found == expected
    if kind is PackedModel:
        assert tight._model._book.size <= 9
        assert tight._model._memory.capacity <= 9
        assert free._model._book.used == tight._model._book.used == 0
    free.close()
    tight.close()


@pytest.mark.parametrize("kind", [PackedModel, SeparateModel])
def test_a_request_that_can_never_fit_is_told_what_it_needs_and_the_others_go_on(kind):
    engine = engine_of(kind, pages=4)
    at_once = engine.submit(talk(3, tuple(range(5, 255)) * 2))
    grows = engine.submit(talk(10**6, (5, 6), out=(said := [])))
    with pytest.raises(MemoryError, match=r"needs [\d,]+ bytes .* limit is [\d,]+.*cache_bytes"):
        list(at_once)
    assert len(list(engine.submit(talk(5)))) == 5
    with pytest.raises(MemoryError, match="cache_bytes"):
        list(grows)
    assert 3 * PAGE < len(said) <= 4 * PAGE
    assert len(list(engine.submit(talk(5)))) == 5
    engine.close()


def test_a_step_that_draws_two_tokens_of_one_branch_is_refused():
    def doubled():
        yield Step((Open(0, (5, 6)), Sample(0), Sample(0)))

    engine = FunctionEngine(hashed)
    with pytest.raises(ValueError, match="more than one token of a branch"):
        list(engine.submit(doubled()))
    assert len(list(engine.submit(talk(5)))) == 5
    engine.close()


def test_a_limit_below_one_page_is_refused():
    with pytest.raises(ValueError, match="holds not one page"):
        engine_of(pages=0.5)


def test_unread_streams_keep_nobody_waiting_and_lose_nothing():
    engine = engine_of(pages=24, max_running=2)
    many = STREAM_BOUND + 30
    unread = [engine.submit(talk(many, (5, 6, i), seed=i)) for i in range(4)]
    settle(lambda: all(len(stream._channel.events) >= STREAM_BOUND for stream in unread))
    assert len(list(engine.submit(talk(10 * PAGE, (9, 9))))) == 10 * PAGE  # takes the memory of two of them
    fresh = engine_of()
    for i, stream in enumerate(unread):
        assert [e.text for e in stream] == [e.text for e in fresh.submit(talk(many, (5, 6, i), seed=i))]
    engine.close()
    fresh.close()


def test_a_prompt_is_read_in_pieces_while_others_speak():
    engine = engine_of()
    widths = []
    inner = engine._model.forward
    engine._model.forward = lambda rows: (widths.append([len(row.ids) for row in rows]), inner(rows))[1]
    speaking = engine.submit(talk())
    next(iter(speaking := iter(speaking)))
    widths.clear()
    list(engine.submit(talk(2, tuple(range(5, 255)) * 3)))
    del speaking
    shared = [rows for rows in widths if len(rows) == 2 and max(rows) > 1]
    assert sum(max(rows) for rows in shared) == 750
    assert all(min(rows) == 1 and max(rows) <= MIXED for rows in shared)
    engine.close()


def held_until(engine, ready):
    """The ids of the rows of every pass; the first pass waits for `ready`."""
    passes = []
    inner = engine._model.forward

    def forward(rows):
        ready.wait(30)
        passes.append([len(row.ids) for row in rows])
        return inner(rows)

    engine._model.forward = forward
    return passes


def test_a_prompt_that_nobody_waits_beside_is_read_in_large_pieces():
    engine, ready = engine_of(), threading.Event()
    ready.set()
    passes = held_until(engine, ready)
    list(engine.submit(talk(1, tuple(range(5, 255)) * 6)))
    assert passes[:3] == [[ALONE], [ALONE], [1500 - 2 * ALONE]]
    engine.close()


def test_a_short_prompt_is_read_at_once_beside_a_long_one_that_came_first():
    engine, ready = engine_of(), threading.Event()
    passes = held_until(engine, ready)
    streams = [engine.submit(talk(2, tuple(range(5, 255)) * 12)), engine.submit(talk(2, (5, 6, 7)))]
    ready.set()
    for stream in streams:
        list(stream)
    begun = next(i for i, rows in enumerate(passes) if len(rows) == 2)
    assert begun <= 1
    assert 3 in passes[begun]
    assert all(max(rows) >= MIXED // 2 for rows in passes[: begun + 5])  # and the long one goes on
    engine.close()


@pytest.mark.parametrize("reuse", [False, True])
def test_a_program_that_gave_its_memory_back_shares_it_among_its_branches_again(reuse):
    def trial_beside(out):
        yield Step((Open(0, tuple(range(5, 255)) + tuple(range(5, 75))), Sample(0)))
        yield Step((Fork(0, 1, 5 * PAGE), Feed(1, (7, 8)), Sample(1), Sample(0)))
        for _ in range(100):
            inbox = yield Step((Sample(0), Sample(1)), (Answer("."),))
            out.extend(token.id for token in inbox.results)

    outs = [], []
    for engine, out in zip((engine_of(), engine_of(pages=9, reuse=reuse)), outs, strict=True):
        evicted = []
        inner = engine._model.rewind
        engine._model.rewind = lambda cache, n, inner=inner, evicted=evicted: (evicted.append(n), inner(cache, n))[1]
        first, second = engine.submit(talk(3 * PAGE, (5, 6))), engine.submit(trial_beside(out))
        list(first)
        list(second)
        engine.close()
    assert 0 in evicted
    assert outs[0] == outs[1]


def test_a_request_that_fits_is_not_refused_for_what_a_cancelled_one_still_holds():
    model = engine_of(pages=4)._model
    held, waiting = (Run(talk(3, tuple(range(5, 205))), Channel(None)) for _ in range(2))
    held.go_on(model)
    fed = collect(model, [held], 8)
    model.forward([one.row for one in fed])
    held.branches[0].cached = 200
    held.channel.cancelled = True
    waiting.go_on(model)
    assert [one.run for one in collect(model, [held, waiting], 8)] == [waiting]
    assert not waiting.channel.done


def test_room_that_cannot_be_had_changes_no_branch():
    engine = engine_of()
    expected, found = [], []
    list(engine.submit(mixed(0, expected)))
    model, failed = engine._model, []
    forward, reserve, wide = model.forward, model._memory.reserve, [False]

    def forward_and_tell(rows):
        wide[0] = len(rows) > 1
        return forward(rows)

    def fail_for_many(top, most):
        if wide[0]:
            failed.append(top)
            raise MemoryError("no room")
        reserve(top, most)

    model.forward, model._memory.reserve = forward_and_tell, fail_for_many
    list(engine.submit(mixed(0, found)))  # a fork writes into the page that it shares
    engine.close()
    assert failed
    assert found == expected


def test_an_error_that_is_kept_holds_no_memory_of_those_that_ran_beside_it():
    engine = engine_of()
    engine._model._lean = None

    def refuse(_module, given):
        if 13 in given[0]:
            raise ZeroDivisionError("thirteen")

    handle = engine._model._model.get_input_embeddings().register_forward_pre_hook(refuse)
    others = [engine.submit(talk(30, (5, 6, i), Sampling())) for i in range(20, 24)]
    with pytest.raises(ZeroDivisionError, match="thirteen") as kept:
        list(engine.submit(talk(4, (5, 13))))
    for stream in others:
        stream.cancel()
    settle(lambda: engine.running == 0)
    assert kept.value is not None
    assert engine._model._book.used == 0
    handle.remove()
    engine.close()


def test_a_beginning_that_is_known_is_not_read_again_and_changes_nothing():
    prompt = tuple(5 + (i * 31) % 250 for i in range(3 * PAGE + 10))
    plain, reusing = engine_of(pages=99), engine_of(pages=99, reuse=True)
    fed = []
    inner = reusing._model.forward
    reusing._model.forward = lambda rows: (fed.extend(len(row.ids) for row in rows), inner(rows))[1]
    expected, found = [[], []], [[], []]
    for engine, outs in ((plain, expected), (reusing, found)):
        for out, end in zip(outs, ((7,), (8, 9)), strict=True):
            list(engine.submit(mixed(1, out, prompt + end)))
    assert found == expected
    assert sum(n for n in fed if n > 1) == (3 * PAGE + 11) + 12
    plain.close()
    reusing.close()


def test_hidden_states_are_there_after_a_beginning_was_known():
    engine = engine_of(pages=99, reuse=True)
    prompt = tuple(5 + (i * 31) % 250 for i in range(3 * PAGE))
    found = []

    def walk():
        yield Step((Open(0, prompt, 0, (0.5,)), Sample(0)))
        inbox = yield Step(tuple(Hidden(0, len(prompt) - 1 - i) for i in range(40)))
        found.append(np.stack(inbox.results))

    for _ in range(2):
        list(engine.submit(walk()))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    engine.close()


def test_many_requests_with_cancels_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr("langchain_earlyexit.engines.scheduler._IDLE_SECONDS", 0.05)
    engine = engine_of(pages=200)
    rng = random.Random(0)
    streams = []
    capacities = []
    inner = engine._model.forward
    engine._model.forward = lambda rows: (inner(rows), capacities.append(engine._model._memory.capacity))[0]
    list(engine.submit(talk(1, tuple(range(5, 255)) * 18)))
    assert max(capacities) > 64
    for i in range(120):
        streams.append(engine.submit(mixed(i, [])))
        if rng.random() < 0.5:
            rng.choice(streams).cancel()
        if len(streams) > 20:
            list(streams.pop(0))
    for stream in streams:
        stream.cancel()
    settle(lambda: engine._thread is None)
    assert engine.running == engine._model._book.used == 0
    assert engine._model._memory.capacity <= 64
    engine.close()


def test_beginnings_that_are_kept_outlive_the_memory_that_is_given_back_when_idle(monkeypatch):
    monkeypatch.setattr("langchain_earlyexit.engines.scheduler._IDLE_SECONDS", 0.05)
    engine = engine_of(pages=400, reuse=True)
    model, trims = engine._model, []
    inner = model.trim
    monkeypatch.setattr(model, "trim", lambda: (inner(), trims.append(model._memory.capacity)))
    prompts = [tuple(range(5 + i, 5 + i + 140)) for i in range(3)]
    first = [[], [], []]
    list(engine.submit(talk(1, tuple(range(5, 255)) * 30)))  # long: the pages of what follows lie behind its own
    running = [engine.submit(talk(6, prompt, out=out)) for prompt, out in zip(prompts, first, strict=True)]
    [list(stream) for stream in running]
    settle(lambda: engine._thread is None)
    assert trims[-1] < 400, "given back, and without an error"
    known = model.remembered_pages
    assert known > 0
    second = [[], [], []]
    for prompt, out in zip(prompts, second, strict=True):
        list(engine.submit(talk(6, prompt, out=out)))
    assert second == first
    engine.close()


def test_a_row_that_the_model_fails_on_takes_down_its_own_request_only():
    gate = threading.Event()

    def function(ids):
        gate.wait(30)
        if 13 in ids:
            raise ZeroDivisionError("thirteen")
        return hashed(ids)

    engine = FunctionEngine(function)
    said = [[] for _ in range(6)]
    prompts = [(5, 6, 13 if i == 2 else 7, i + 20) for i in range(6)]
    streams = [engine.submit(talk(4, prompt, Sampling(), out=out)) for prompt, out in zip(prompts, said, strict=True)]
    gate.set()
    for i, stream in enumerate(streams):
        if i == 2:
            with pytest.raises(ZeroDivisionError, match="thirteen"):
                list(stream)
        elif 13 not in said[i]:
            list(stream)
            assert len(said[i]) == 4
    engine.close()


def test_a_pass_of_more_rows_than_there_is_memory_for_is_done_in_parts_and_told_once(caplog):
    engine = FunctionEngine(hashed)
    real, sizes, all_there = engine._model.forward, [], threading.Event()

    def forward(rows):
        all_there.wait(30)
        sizes.append(len(rows))
        if len(rows) > 8:
            raise MemoryError(f"{len(rows)} rows")
        return real(rows)

    engine._model.forward = forward
    said = [[] for _ in range(20)]
    prompts = [(5, 6, 7, i + 20) for i in range(20)]
    streams = [engine.submit(talk(4, prompt, Sampling(), out=out)) for prompt, out in zip(prompts, said, strict=True)]
    all_there.set()
    for stream in streams:
        list(stream)
    alone = FunctionEngine(hashed)
    for prompt, out in zip(prompts, said, strict=True):
        again = []
        list(alone.submit(talk(4, prompt, Sampling(), out=again)))
        assert out == again
    assert max(sizes) > 8
    assert caplog.text.count("rows failed (MemoryError") == 1
    assert sizes.count(1) < len(sizes) / 2
    engine.close()
    alone.close()


@pytest.mark.parametrize(
    ("fed", "sample", "error"),
    [(13, Sample(1), "finite maximum"), (12, Sample(1, forbid=frozenset({SIZE})), "out of bounds")],
)
def test_a_branch_that_cannot_be_sampled_from_takes_down_its_own_request_only(fed, sample, error):
    def two_branches():
        yield Step((Open(0, (5, 6)), Fork(0, 1, 2), Feed(1, (fed,)), sample, Sample(0)))

    engine = FunctionEngine(lambda ids: hashed(ids) * (np.nan if 13 in ids[:3] else 1))
    said = []
    company, stream = engine.submit(talk(20, out=said)), engine.submit(two_branches())
    with pytest.raises((ValueError, IndexError), match=error):
        list(stream)
    list(company)
    assert len(said) == 20
    engine.close()


def test_a_pass_that_fails_at_its_very_end_leaves_no_trace(monkeypatch):
    engine = engine_of()
    expected, found = [], []
    prompt = tuple(range(5, 45))

    def program(out):
        yield Step((Open(0, prompt, layers=(1,)),))
        for step in range(12):
            inbox = yield Step((Sample(0, SEEDED), Hidden(0, len(prompt) - 1 + step)))
            out.append((inbox.results[0].id, inbox.results[1]))

    list(engine.submit(program(expected)))
    keep, failed = engine._model._taps.keep, []

    def out_of_memory(rows, seen):
        if len(rows) > 1 and len(failed) < 3:
            failed.append(len(rows))
            raise RuntimeError("out of memory")
        keep(rows, seen)

    monkeypatch.setattr(engine._model._taps, "keep", out_of_memory)
    company = engine.submit(program([]))
    list(engine.submit(program(found)))
    list(company)
    engine.close()
    assert failed == [2, 2, 2], "and the rows were tried again by themselves"
    for (token, states), (right, theirs) in zip(found, expected, strict=True):
        assert token == right
        assert np.allclose(states, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", [PackedModel, SeparateModel])
def test_a_pass_that_breaks_off_halfway_leaves_no_trace(kind):
    engine = engine_of(kind)
    expected, found = [], []
    list(engine.submit(mixed(0, expected)))
    block = engine._model._taps._blocks[1]
    calls = []

    def break_off(*_):
        calls.append(1)
        if len(calls) in {3, 9}:
            raise FloatingPointError("halfway")

    engine._model._lean = None
    handle = block.register_forward_hook(break_off)
    company = engine.submit(mixed(3, []))
    list(engine.submit(mixed(0, found)))
    list(company)
    handle.remove()
    engine.close()
    assert found == expected
