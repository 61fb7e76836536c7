"""Which page of the key/value memory belongs to whom: counts, no tensors.

A branch's tokens lie in pages of `PAGE` tokens. Branches that share a beginning share its pages; whoever writes into
a shared page gets a copy of it first. A page is free when its last owner is gone.
"""

from __future__ import annotations

import heapq
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PAGE = 64

_GAPS = 4
"""Free pages between those in use that are not worth being filled."""


class Table:
    """The pages of one branch, in order, and how many tokens they hold. Its pages are given back when it goes."""

    __slots__ = ("__weakref__", "_gone", "length", "pages")

    def __init__(self, gone: deque[list[int]]) -> None:
        self.length = 0
        self.pages: list[int] = []
        self._gone = gone

    def __del__(self) -> None:
        # It may go in any thread (an exception's frames may have held it): the book reads the deque in its own.
        self._gone.append(self.pages)


@dataclass(frozen=True, slots=True)
class Growth:
    """What must be done to the tensors before new tokens are written."""

    fresh: list[int]
    copies: list[tuple[int, int]]


class Book:
    """The owners of every page, and the beginnings of prompts that are kept for others.

    Args:
        most: pages there may be, or None while that is not known.
        remembered: most pages that beginnings may keep when nobody else uses them; 0 keeps none.
    """

    def __init__(self, most: int | None = None, remembered: int = 0) -> None:
        self.most = most
        self.remembered = remembered
        self._owners: list[int] = []
        self._free: list[int] = []  # a heap: the lowest first, so that pages in use lie close together
        self._gone: deque[list[int]] = deque()
        self._tables: weakref.WeakSet[Table] = weakref.WeakSet()
        # A page of a beginning is known by the serial number of the page before it and by its own ids. The latest used
        # are last, and each before the one it follows, so that the end of a beginning is forgotten first.
        self._known: OrderedDict[tuple[int, tuple[int, ...]], tuple[int, int]] = OrderedDict()
        self._known_pages: set[int] = set()
        self._idle = 0  # of those, how many nobody else owns
        self._serial = 0

    def new(self) -> Table:
        table = Table(self._gone)
        self._tables.add(table)
        return table

    @property
    def used(self) -> int:
        """Pages with an owner, those kept for nobody in particular included."""
        self._collect()
        return len(self._owners) - len(self._free)

    @property
    def known(self) -> int:
        """Pages of beginnings that are kept."""
        return len(self._known)

    @property
    def size(self) -> int:
        """Pages there are, with an owner or free."""
        return len(self._owners)

    @property
    def gaps(self) -> bool:
        """Whether so many free pages lie between those in use that filling them pays."""
        free = len(self._owners) - self.used
        return free > _GAPS and free > self.used // 8

    def fill(self, move: Callable[[Sequence[tuple[int, int]]], None]) -> None:
        """Number the last pages in use anew, as the free ones before them, so that none is free.

        Args:
            move: copies what is in pages, from old numbers to new ones. Where it fails, no page has a new number.
        """
        tables = list(self._tables)  # held: none can go now
        self._collect()
        used = len(self._owners) - len(self._free)
        last = [page for page in range(used, len(self._owners)) if self._owners[page]]
        moves = list(zip(last, sorted(page for page in self._free if page < used), strict=True))
        move(moves)
        new = dict(moves)
        for table in tables:
            table.pages[:] = [new.get(page, page) for page in table.pages]
        for key, (serial, page) in self._known.items():
            self._known[key] = (serial, new.get(page, page))
        self._known_pages = {new.get(page, page) for page in self._known_pages}
        for source, target in moves:
            self._owners[target] = self._owners[source]
        del self._owners[used:]
        self._free = []

    def left(self) -> int:
        """Pages that can still be had, those included that are only kept for others that begin alike."""
        assert self.most is not None  # noqa: S101 - asked only once it is known
        return self.most - self.used + self._idle

    def need(self, table: Table, tokens: int) -> int:
        """Pages it takes to append `tokens`."""
        end = -(-(table.length + tokens) // PAGE)
        return max(0, end - len(table.pages)) + self._writes_into_shared(table)

    def size_after(self, growing: Sequence[tuple[Table, int]]) -> int:
        """Pages there will be, at most, when all these tables have grown by so many tokens."""
        needed = sum(self.need(table, tokens) for table, tokens in growing)
        most = self.used + needed if self.most is None else min(self.used + needed, self.most)
        return max(self.size, most)

    def grow(self, table: Table, tokens: int) -> Growth:
        """Make room for `tokens` more; the caller has asked `need`."""
        copies = []
        if self._writes_into_shared(table):
            at = table.length // PAGE
            shared = table.pages[at]
            table.pages[at] = self._take()
            copies.append((shared, table.pages[at]))
            self._drop([shared])
        fresh = [self._take() for _ in range(-(-(table.length + tokens) // PAGE) - len(table.pages))]
        table.pages.extend(fresh)
        return Growth(fresh, copies)

    def undo(self, table: Table, growth: Growth) -> None:
        """Take back what `grow` gave; of several, the last first."""
        kept = len(table.pages) - len(growth.fresh)
        self._drop(table.pages[kept:])
        del table.pages[kept:]
        for shared, copy in growth.copies:
            table.pages[table.pages.index(copy)] = shared
            self._keep([shared])
            self._drop([copy])

    def fork(self, table: Table, length: int) -> Table:
        """A table of the first `length` tokens."""
        child = self.new()
        child.length = length
        child.pages = table.pages[: -(-length // PAGE)]
        self._keep(child.pages)
        return child

    def rewind(self, table: Table, length: int) -> None:
        """Drop all but the first `length` tokens."""
        table.length = length
        kept = -(-length // PAGE)
        self._drop(table.pages[kept:])
        del table.pages[kept:]

    # --- beginnings -------------------------------------------------------------------------------------------------

    def adopt(self, table: Table, ids: Sequence[int]) -> int:
        """Fill an empty table with the longest known beginning of `ids`; how many tokens that is."""
        keys, pages, before = [], [], 0
        for start in range(0, len(ids) - PAGE + 1, PAGE):
            key = (before, tuple(ids[start : start + PAGE]))
            if key not in self._known:
                break
            before, page = self._known[key]
            keys.append(key)
            pages.append(page)
        self._touch(keys)
        self._keep(pages)
        table.pages, table.length = pages, len(pages) * PAGE
        return table.length

    def remember(self, table: Table, ids: Sequence[int]) -> None:
        """Keep the full pages of `ids`, the beginning of `table`."""
        keys, before = [], 0
        for at in range(min(len(ids), table.length) // PAGE if self.remembered else 0):
            key = (before, tuple(ids[at * PAGE : (at + 1) * PAGE]))
            if key not in self._known:
                self._serial += 1
                self._known[key] = (self._serial, table.pages[at])
                self._keep(table.pages[at : at + 1])
                self._known_pages.add(table.pages[at])
            before = self._known[key][0]
            keys.append(key)
        self._touch(keys)
        while len(self._known) > self.remembered:
            self._forget_one()

    def _touch(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        for key in reversed(keys):
            self._known.move_to_end(key)

    def _forget_one(self) -> None:
        _, (_, page) = self._known.popitem(last=False)
        self._known_pages.discard(page)
        self._idle -= self._owners[page] == 1
        self._drop([page])

    # --- pages ------------------------------------------------------------------------------------------------------

    def _writes_into_shared(self, table: Table) -> bool:
        at, filled = divmod(table.length, PAGE)
        return filled > 0 and self._owners[table.pages[at]] > 1

    def _take(self) -> int:
        self._collect()
        while not self._free and self.most is not None and len(self._owners) >= self.most and self._idle:
            self._forget_one()
        if self._free:
            page = heapq.heappop(self._free)
            self._owners[page] = 1
            return page
        self._owners.append(1)
        return len(self._owners) - 1

    def _keep(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._owners[page] += 1
            self._idle -= self._owners[page] == 2 and page in self._known_pages

    def _drop(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            self._idle += self._owners[page] == 1 and page in self._known_pages
            if not self._owners[page]:
                heapq.heappush(self._free, page)

    def _collect(self) -> None:
        while self._gone:
            self._drop(self._gone.popleft())
