"""The book of pages: nobody writes into what somebody else reads, and what nobody reads is free."""

import gc
import random
import threading

import pytest

from langchain_earlyexit.engines.pages import PAGE, Book


class Shelf:
    """A book, and beside it the tokens that a real memory would hold: what a table reads must be its own."""

    def __init__(self, **given):
        self.book = Book(**given)
        self.written = {}
        self.tables = []

    def append(self, table, ids):
        growth = self.book.grow(table, len(ids))
        for source, target in growth.copies:
            self.written[target] = list(self.written[source])
        for page in growth.fresh:
            self.written[page] = [None] * PAGE
        for i, token in enumerate(ids, table.length):
            self.written[table.pages[i // PAGE]][i % PAGE] = token
        table.length += len(ids)

    def fill(self):
        self.book.fill(lambda moves: self.written.update({new: list(self.written[old]) for old, new in moves}))

    def read(self, table):
        return [self.written[table.pages[i // PAGE]][i % PAGE] for i in range(table.length)]


ACTIONS = ["new", "append", "append", "append", "fork", "rewind", "drop", "fill", "remember", "adopt"]


@pytest.mark.parametrize("remembered", [0, 12])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_appended_forked_rewound_and_dropped_every_table_reads_its_own_tokens(seed, remembered):
    rng = random.Random(seed)
    shelf, held = Shelf(remembered=remembered), []
    for step in range(400):
        action = rng.choice(ACTIONS)
        if action == "new" or not held:
            held.append((shelf.book.new(), []))
        elif action == "append":
            table, ids = rng.choice(held)
            new = [step * 1000 + i for i in range(rng.choice([1, 1, 1, 5, PAGE, 3 * PAGE]))]
            before, needed = shelf.book.used, shelf.book.need(table, len(new))
            shelf.append(table, new)
            assert shelf.book.used - before <= needed
            ids.extend(new)
        elif action == "drop":
            held.pop(rng.randrange(len(held)))
        elif action == "fill":
            shelf.fill()
            assert shelf.book.size == shelf.book.used
            assert not shelf.book.gaps
        elif action == "remember":
            shelf.book.remember(*rng.choice(held))
        elif action == "adopt":
            table, ids = shelf.book.new(), rng.choice(held)[1]
            held.append((table, ids[: shelf.book.adopt(table, ids)]))
        else:
            table, ids = rng.choice(held)
            length = rng.randint(0, len(ids))
            if action == "fork":
                held.append((shelf.book.fork(table, length), ids[:length]))
            else:
                shelf.book.rewind(table, length)
                del ids[length:]
        assert all(shelf.read(table) == ids for table, ids in held)
        table = ids = None  # the loop's own references
        held_pages = {page for table, _ in held for page in table.pages}
        assert shelf.book.used == len(held_pages | shelf.book._known_pages)
        assert shelf.book._idle == len(shelf.book._known_pages - held_pages)
        table = None
    held.clear()
    gc.collect()
    assert shelf.book.used == shelf.book.known
    shelf.fill()
    assert bool(shelf.book.size) == bool(remembered)


def test_a_move_that_fails_leaves_every_page_its_number():
    shelf = Shelf()
    tables = [shelf.book.new() for _ in range(9)]
    for table in tables:
        shelf.append(table, [7] * PAGE)
    del tables[:7], table
    before = [list(table.pages) for table in tables]

    def fail(_moves):
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        shelf.book.fill(fail)
    assert [table.pages for table in tables] == before
    shelf.fill()
    assert all(shelf.read(table) == [7] * PAGE for table in tables)


def test_a_fork_takes_no_page_until_one_side_writes_and_then_one():
    shelf = Shelf()
    trunk = shelf.book.new()
    shelf.append(trunk, list(range(3 * PAGE + 5)))
    fork = shelf.book.fork(trunk, 3 * PAGE + 5)
    assert shelf.book.used == 4
    shelf.append(trunk, [1])
    shelf.append(fork, [2])
    assert shelf.book.used == 5
    assert fork.pages[:3] == trunk.pages[:3]


def test_a_known_beginning_is_shared_page_by_page_and_the_least_used_one_is_forgotten():
    shelf = Shelf(most=100, remembered=4)
    prompts = [[prompt * 1000 + i for i in range(2 * PAGE + 3)] for prompt in range(3)]
    for prompt in prompts[:2]:
        table = shelf.book.new()
        shelf.append(table, prompt)
        shelf.book.remember(table, prompt)
    del table
    first = shelf.book.new()
    assert shelf.book.adopt(first, [*prompts[0][: PAGE + 1], 7, 7]) == PAGE
    assert shelf.read(first) == prompts[0][:PAGE]
    assert shelf.book.adopt(shelf.book.new(), prompts[0]) == 2 * PAGE
    table = shelf.book.new()
    shelf.append(table, prompts[2])
    shelf.book.remember(table, prompts[2])
    assert shelf.book.adopt(shelf.book.new(), prompts[0]) == 2 * PAGE
    shelf.fill()
    again = shelf.book.new()
    assert shelf.book.adopt(again, prompts[0]) == 2 * PAGE
    assert shelf.read(again) == prompts[0][: 2 * PAGE]
    assert shelf.book.adopt(shelf.book.new(), prompts[1]) == 0
    assert shelf.book.adopt(shelf.book.new(), [5, *prompts[0]]) == 0


def test_beginnings_give_way_to_whoever_needs_their_pages():
    shelf = Shelf(most=6, remembered=4)
    table = shelf.book.new()
    prompt = list(range(4 * PAGE))
    shelf.append(table, prompt)
    shelf.book.remember(table, prompt)
    del table
    assert shelf.book.used == 4
    assert shelf.book.left() == 6
    table = shelf.book.new()
    assert shelf.book.need(table, 6 * PAGE) <= shelf.book.left()
    shelf.append(table, list(range(6 * PAGE)))
    assert shelf.book.size == 6
    assert shelf.book.left() == 0
    assert shelf.read(table) == list(range(6 * PAGE))


def test_a_table_that_goes_in_another_thread_frees_its_pages():
    shelf = Shelf()
    held = [shelf.book.new()]
    shelf.append(held[0], [1] * PAGE)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert shelf.book.used == 0
