"""Memory that is short, and readers that are slow: nobody takes what another was promised, and nobody starves."""

import threading

import numpy as np
import pytest
import torch
from engines_for_tests import talk

from langchain_earlyexit.engines import scheduler
from langchain_earlyexit.engines.attention import _Plan
from langchain_earlyexit.engines.function import FunctionEngine
from langchain_earlyexit.engines.memory import Memory
from langchain_earlyexit.engines.model import Model
from langchain_earlyexit.engines.pages import PAGE, Book
from langchain_earlyexit.engines.program import Feed, Fork, Open, Sample, Step, Thought
from langchain_earlyexit.engines.runs import Run
from langchain_earlyexit.engines.streams import STREAM_BOUND, Channel


class Sheet:
    def __init__(self, table):
        self.table = table


class Paper(Model):
    """The packed model's accounting of pages, without any tensor behind it."""

    def __init__(self, most, remembered=0):
        self.book = Book(most, remembered)
        self.fed = 0

    def new(self):
        return Sheet(self.book.new())

    def fork(self, cache, length):
        return Sheet(self.book.fork(cache.table, length))

    def rewind(self, cache, length):
        self.book.rewind(cache.table, length)

    @property
    def limit(self):
        return self.book.most

    def left(self):
        return self.book.left()

    def need(self, cache, tokens):
        return self.book.need(cache.table, tokens)

    def adopt(self, cache, ids):
        return self.book.adopt(cache.table, ids)

    def remember(self, cache, ids):
        self.book.remember(cache.table, ids)

    def hidden(self, cache, position):
        raise NotImplementedError

    def forward(self, rows):
        for row in rows:
            self.book.grow(row.cache.table, len(row.ids))
            row.cache.table.length += len(row.ids)
            self.fed += len(row.ids)
        assert self.book.size <= self.book.most, "more pages than there are"
        return np.zeros((len(rows), 8), dtype=np.float32)

    def close(self):
        pass


def talks(ids, tokens):
    yield Step((Open(0, tuple(ids)),))
    for _ in range(tokens):
        yield Step((Sample(0),), (Thought("x"),))


def engine_of(model):
    return scheduler.ScheduledEngine(model, None, name="x")


def test_who_does_not_fit_takes_nothing_that_another_was_promised():
    model, system = Paper(10, remembered=2), list(range(100, 100 + 2 * PAGE))
    engine = engine_of(model)
    earlier = Run(talks([*system, 1], 1), Channel(None))
    while not earlier.channel.done:
        engine._advance([earlier])
    del earlier
    assert model.left() == 10
    assert model.book.used == 2, "the beginning that is remembered"
    longest = Run(talks([5] * 40, 800), Channel(None))
    longest.channel.full = False
    live = [longest]
    while len(longest.branches[0].ids if longest.branches else ()) < 8 * PAGE + 1:
        longest.channel.events.clear()
        longest.channel.full = False
        engine._advance(live)
    newcomer = Run(talks([*system, *[7] * 100], 5), Channel(None))
    live.append(newcomer)
    longest.channel.events.clear()
    longest.channel.full = False
    engine._advance(live)
    assert longest.channel.error is None
    assert newcomer.channel.error is None
    assert newcomer.branches[0].cached == 0, "it waits, and holds nothing"


def test_the_first_is_not_passed_over_where_it_lost_its_memory_amid_a_trial():
    model = Paper(100_000)
    engine = engine_of(model)

    def looks():
        yield Step((Open(0, (3,) * 2000),))
        yield Step((Sample(0),))
        yield Step((Fork(0, 1, 2001), Feed(1, (2, 2, 2)), Sample(1), Sample(0)))
        while True:
            yield Step((Sample(0),))

    oldest = Run(looks(), Channel(None))
    while 1 not in oldest.branches:
        engine._advance([oldest])
    oldest.evict(model)
    live = [oldest]
    for _ in range(60):
        live.append(Run(talks([5] * 150, 3), Channel(None)))
        engine._advance(live)
        live = [run for run in live if not run.channel.done]
    assert oldest.branches[0].cached > 2000


def test_a_slow_reader_costs_memory_and_never_the_model():
    model = Paper(50)
    engine = engine_of(model)
    slow = Run(talks([3] * 1500, 2000), Channel(None))
    while not slow.channel.full:
        engine._advance([slow])
    quick = Run(talks([4] * 1500, 900), Channel(None))
    before = model.fed
    for i in range(3000):
        engine._advance([slow, quick])
        with quick.channel.lock:
            while quick.channel.next_nowait() is not None:
                pass
        if i % 20 == 0:
            with slow.channel.lock:
                slow.channel.next_nowait()
        if quick.channel.done:
            break
    assert quick.channel.error is None
    assert model.fed - before < 10_000, "contexts of 1,500 were not read again for each event that was read"


def test_a_paused_program_goes_on_when_half_of_what_waits_is_read():
    channel = Channel(None)
    channel.put([Thought("x")] * STREAM_BOUND)
    assert channel.full
    while len(channel.events) > STREAM_BOUND // 2 + 1:
        channel.next_nowait()
    assert channel.full
    channel.next_nowait()
    assert not channel.full
    channel.put([Thought("x")])
    assert not channel.full


def test_a_row_whose_numbers_are_odd_is_alone_with_them():
    torch.manual_seed(0)
    plan = _Plan.of([[1, 2, 3], [5]], heads=2, kv=2, device=torch.device("cpu"))
    keys, values = torch.randn(6, 2, PAGE, 4), torch.randn(6, 2, PAGE, 4)
    query = torch.randn(2, 2, 4)
    hidden = plan.hidden([0, 0], [3 * PAGE, 10])
    expected = plan.attend(query, keys, values, 0.5, hidden, None, None)
    keys[1] = torch.nan
    found = plan.attend(query, keys, values, 0.5, hidden, None, None)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


def test_where_there_is_no_room_for_more_than_is_needed_that_much_is_taken():
    memory = Memory(1, torch.device("cpu"))
    memory.reserve(4, None)
    memory.write(0, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    kept = memory.keys[0].clone()
    grow, asked = memory._grow, []

    def tight(capacity):
        asked.append(capacity)
        if capacity > 5:
            raise RuntimeError("out of memory")
        grow(capacity)

    memory._grow = tight
    memory.reserve(5, None)
    assert asked[-1] == 5
    assert memory.capacity == 5
    assert torch.equal(memory.keys[0][:4], kept)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.reserve(6, None)
    memory.shrink(1)
    assert memory.capacity == 1
    assert torch.equal(memory.keys[0], kept[:1])


def test_a_thread_that_cannot_start_is_told_and_the_next_request_has_one(monkeypatch):
    engine = FunctionEngine(lambda ids: np.arange(8, dtype=np.float32))
    with monkeypatch.context() as patch:

        def refuse(_thread):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            engine.submit(talk(2))
    assert len(list(engine.submit(talk(2), timeout=20))) == 2
    engine.close()
