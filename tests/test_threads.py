"""How many threads a pass computes with: what is quicker where it runs, and nobody else's number changes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from langchain_earlyexit.engines.threads import FEW, Threads, apart, timed


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


def taking(**milliseconds):
    """A pass that takes so many milliseconds with one thread, with two and with four."""
    by = {1: milliseconds["one"], 2: milliseconds["two"], 4: milliseconds["four"]}
    return lambda: time.sleep(by[torch.get_num_threads()] / 1000)


@pytest.mark.parametrize(
    ("few", "many", "found"),
    [
        (taking(one=1, two=2, four=3), taking(one=6, two=4, four=2), Threads(1, 4)),
        (taking(one=6, two=2, four=4), taking(one=2, two=4, four=6), Threads(2, 1)),
        (taking(one=30, two=30, four=29), taking(one=30, two=20, four=20), Threads(1, 2)),
        (taking(one=1, two=1, four=300), taking(one=1, two=1, four=300), Threads(4, 4)),  # not tried twice
    ],
)
def test_as_few_threads_are_taken_as_are_about_as_quick_as_the_quickest(four, few, many, found):
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


def test_what_runs_apart_has_ended_with_its_thread_and_its_error_is_the_callers():
    before = threading.active_count()
    names = []
    assert apart(lambda: names.append(threading.current_thread().name) or 7) == 7
    assert names != [threading.current_thread().name]
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
    assert threading.active_count() == before


def test_an_interruption_reaches_what_runs_apart():
    ended = threading.Event()

    def work():
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        apart(work)
    assert ended.is_set()


def test_loading_leaves_no_team_of_threads_to_whoever_loads():
    # In a process of its own: here other tests have computed.
    code = """
import os, time, torch
torch.set_num_threads(2)
from langchain_earlyexit.engines.local import LocalSettings, load
from langchain_earlyexit.pocket import weights_dir
count = lambda: len(os.listdir("/proc/self/task"))
engine = load(LocalSettings(str(weights_dir())))
loaded, before = count(), 0
while loaded != before:  # some that only read files are still ending
    time.sleep(0.3)
    loaded, before = count(), loaded
torch.ones(300, 300) @ torch.ones(300, 300)
print(count() - loaded)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads of other than Python are counted in /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"  # only now has this thread one of its own
