"""How many threads a pass computes with: what is quicker where it runs, and nobody else's number changes."""

import threading
import time

import pytest
import torch

from langchain_earlyexit.engines.threads import FEW, Threads, timed


@pytest.fixture
def four():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_a_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def taking(one, all_):
    """A pass that takes so many milliseconds with one thread, and with all."""
    return lambda: time.sleep((one if torch.get_num_threads() == 1 else all_) / 1000)


@pytest.mark.parametrize(
    ("few", "many", "found"),
    [
        (taking(1, 3), taking(6, 2), Threads(1, 4)),
        (taking(6, 2), taking(1, 3), Threads(4, 1)),
        (taking(3, 3), taking(3, 3), Threads(4, 4)),
        (taking(1, 300), taking(1, 300), Threads(4, 4)),  # large passes are not tried twice
    ],
)
def test_one_thread_is_taken_where_it_is_clearly_quicker(four, few, many, found):
    assert timed(few, many) == found
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4


def test_nothing_is_timed_where_there_is_one_thread_anyway():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert timed(lambda: 1 / 0, lambda: 1 / 0) is None
    finally:
        torch.set_num_threads(before)


def test_a_thread_changes_its_own_number_alone(four):
    def use():
        threads, seen = Threads(1, 3), []
        for rows in (1, FEW, FEW + 1, 1):
            threads.use(rows)
            seen.append((torch.get_num_threads(), in_a_thread(torch.get_num_threads)))
        return seen

    assert in_a_thread(use) == [(1, 4), (1, 4), (3, 4), (1, 4)]
    assert torch.get_num_threads() == 4
