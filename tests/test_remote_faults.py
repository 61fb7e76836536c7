"""A server that fails, comes back, is slow, or is one of several: nothing is lost, nothing counted twice."""

import asyncio
import gc
import socket
import threading
import time

import pytest
from engines_for_tests import SEEDED, hashed, settle, talk
from remote_for_tests import FakeServer

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.engines.fleet import Fleet
from langchain_earlyexit.engines.function import FunctionEngine, byte_tokenizer, scripted
from langchain_earlyexit.engines.lines import CHUNK
from langchain_earlyexit.engines.vllm import VLLMEngine
from langchain_earlyexit.engines.wire import Circuit, Fault, Patience, Server, _event
from langchain_earlyexit.sampling import GREEDY

QUICK = Patience(retries=3, first=0.01, longest=0.05, rest=0.05)


@pytest.fixture
def server():
    made = FakeServer(hashed)
    yield made
    made.close()


def connect(*servers, patience=QUICK, **given):
    return VLLMEngine([s.url for s in servers], "served", tokenizer=byte_tokenizer(), patience=patience, **given)


def undisturbed(n, prompt=(5, 6, 7)):
    local, out = FunctionEngine(hashed), []
    list(local.submit(talk(n, prompt, GREEDY, out=out)))
    local.close()
    return out


def test_a_stream_that_breaks_off_goes_on_from_what_came(server):
    engine = connect(server)
    server.breaks.extend([3, 0, 11, 0, 0, 1])
    out = []
    list(engine.submit(talk(40, sampling=GREEDY, out=out)))
    assert out == undisturbed(40)
    asked = [(len(body["prompt"]) - 3, body["max_tokens"]) for body in streams(server)]
    ended = out.index(server.eos) + 1  # the server stops there, and the program goes on all the same
    assert asked == [*((start, CHUNK - start) for start in (0, 3, 3, 14, 14, 14, 15)), (ended, CHUNK)]
    engine.close()


def test_a_server_killed_amid_20_streams_and_started_again_completes_them_all(server):
    engine = connect(server, patience=Patience(retries=50, first=0.01, longest=0.05, rest=0.05, failures=5))
    server.pace = 0.002
    outs = [[] for _ in range(20)]
    streams = [engine.submit(talk(60, (5, 6, i), GREEDY, out=outs[i])) for i in range(20)]
    settle(lambda: all(len(out) > 5 for out in outs))
    server.kill()
    assert any(len(out) < 55 for out in outs)
    time.sleep(0.3)
    server.start()
    for i, stream in enumerate(streams):
        assert len(list(stream)) == 60
        assert outs[i] == undisturbed(60, (5, 6, i))
    engine.close()


def test_a_break_changes_neither_text_nor_record(server):
    tokenizer = byte_tokenizer()
    server.function = scripted(
        tokenizer, "It is 4.\n\nWait, is it? Yes.\n\nWait, 4.", lambda so: ("\\boxed{4}", 0.5 + 0.2 * so.count("Wait"))
    )
    engine = connect(server)
    llm = ChatEarlyExit(engine=engine, exit_policy=DEER(0.85), answer_form="boxed")
    whole = llm.invoke("2 + 2?")
    server.breaks.extend([4, 2, 3, 1, 5] * 3)
    broken = llm.invoke("2 + 2?")
    assert not server.breaks or len(server.breaks) < 15
    assert broken.content == whole.content
    kept, found = (m.response_metadata["early_exit"] for m in (whole, broken))
    assert {**kept, "speculated_tokens": 0} == {**found, "speculated_tokens": 0}
    engine.close()


def test_sampled_streams_that_break_off_still_have_no_gap(server):
    engine = connect(server)
    server.breaks.extend([5, 5, 5])
    out = []
    list(engine.submit(talk(30, sampling=SEEDED, out=out)))
    assert len(out) == 30
    told = [body["prompt"] for _, body in server.requests if body.get("stream")]
    assert told == [[5, 6, 7, *out[: 5 * i]] for i in range(4)]
    assert len({body["seed"] for _, body in server.requests if body.get("stream")}) == 4
    engine.close()


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_time_is_given_it(server, status):
    engine = connect(server)
    server.failures.append((status, {"Retry-After": "1"}, "overloaded"))
    start, out = time.monotonic(), []
    list(engine.submit(talk(3, sampling=GREEDY, out=out)))
    assert time.monotonic() - start >= 1.0
    assert out == undisturbed(3)
    engine.close()


def test_a_server_that_asks_for_too_much_time_has_failed(server):
    engine = connect(server)
    server.failures.append((503, {"Retry-After": "86400"}, "down for the day"))
    with pytest.raises(ConnectionError, match="503: down for the day"):
        list(engine.submit(talk(3)))
    engine.close()


def test_when_retries_are_used_up_the_server_is_named(server):
    engine = connect(server)
    server.failures.extend([(500, {}, "broken")] * 4)
    with pytest.raises(ConnectionError, match=r"http://127.*answers 500: broken"):
        list(engine.submit(talk(3)))
    assert len(list(engine.submit(talk(3)))) == 3
    engine.close()


def test_what_a_server_refuses_is_told_in_its_own_words_and_not_tried_again(server):
    engine = connect(server)
    server.failures.append((400, {}, "no such thing"))
    before = len(server.requests)
    with pytest.raises(ValueError, match="refuses the request \\(400\\): no such thing"):
        list(engine.submit(talk(3)))
    assert len(server.requests) == before + 1
    engine.close()


def test_after_failures_in_a_row_new_requests_fail_at_once_until_the_server_had_its_rest(server):
    engine = connect(server, patience=Patience(retries=0, first=0.01, failures=2, rest=0.5))
    server.failures.extend([(500, {}, "broken")] * 2)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="500"):
            list(engine.submit(talk(3)))
    before = len(server.requests)
    with pytest.raises(ConnectionError, match=r"failed 2 times in a row; not asked again for 0\.\d s"):
        list(engine.submit(talk(3)))
    assert len(server.requests) == before
    time.sleep(0.5)
    assert len(list(engine.submit(talk(3)))) == 3
    engine.close()


def test_a_deadline_ends_the_request_here_and_on_the_server(server):
    engine = connect(server)
    server.pace = 0.02
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="ran past its timeout"):
        list(engine.submit(talk(), timeout=0.3))
    assert time.monotonic() - start < 5
    settle(lambda: server.active == 0 and engine.running == 0)
    engine.close()


def test_a_deadline_holds_while_a_server_is_waited_for(server):
    engine = connect(server, patience=Patience(retries=100, first=0.05, longest=0.05))
    server.kill()
    with pytest.raises(TimeoutError):
        list(engine.submit(talk(3), timeout=0.3))
    server.start()
    engine.close()


def test_a_server_that_says_nothing_counts_as_broken(server):
    engine = connect(server, patience=Patience(retries=0, silence=0.2))
    server.deaf = True
    with pytest.raises(ConnectionError, match="ReadTimeout"):
        list(engine.submit(talk(3)))
    engine.close()


# --- several servers --------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet():
    made = [FakeServer(hashed) for _ in range(3)]
    yield made
    for server in made:
        server.close()


def streams(server):
    return [body for _, body in server.requests if body.get("stream")]


def test_trunk_and_trials_of_a_request_and_equal_prompts_have_one_server(fleet):
    function = scripted(byte_tokenizer(), "It is 4.\n\nWait, is it? Yes.\n\nWait, 4.", lambda so: ("\\boxed{4}", 0.5))
    for server in fleet:
        server.function = function
    engine = connect(*fleet)
    llm = ChatEarlyExit(engine=engine, exit_policy=DEER(), answer_form="boxed")
    for _ in range(3):
        llm.invoke("2 + 2?")
    used = [len(streams(server)) for server in fleet]
    assert sorted(used)[:2] == [0, 0]
    assert sum(used) > 6
    for i in range(12):
        llm.invoke(f"{i} + {i}?")
    assert all(streams(server) for server in fleet)
    engine.close()


def test_equal_prompts_are_shared_out_when_one_server_would_have_them_all(fleet):
    engine = connect(*fleet)
    for server in fleet:
        server.pace = 0.01
    running = [engine.submit(talk()) for _ in range(9)]
    settle(lambda: all(server.active for server in fleet))
    assert max(server.load for server in engine._fleet.servers) <= 4
    for stream in running:
        stream.cancel()
    settle(lambda: all(server.load == 0 for server in engine._fleet.servers))
    engine.close()


def test_a_request_whose_server_dies_goes_on_at_another(fleet):
    engine = connect(*fleet)
    for server in fleet:
        server.pace = 0.005
    out = []
    stream = engine.submit(talk(40, sampling=GREEDY, out=out))
    settle(lambda: len(out) > 4)
    (victim,) = [server for server in fleet if server.active]
    victim.kill()
    list(stream)
    assert out == undisturbed(40)
    assert sum(bool(streams(server)) for server in fleet) == 2
    settle(lambda: all(server.load == 0 for server in engine._fleet.servers))
    victim.start()
    engine.close()


async def moving(servers, well=(), after=None):
    """A request that asks a seat's server again and again: what came of it, whom it asked, and how long it took."""
    patience = Patience(first=0.05, longest=0.1)
    known = [Server(f"http://s{i}", Circuit(patience)) for i in range(servers)]
    seat, asked = Fleet(known).seat(range(9)), []

    async def request():
        server = seat.server
        asked.append(seat._order.index(server))
        if asked[-1] in well:
            return "answered"
        server.circuit.broke()
        fault = Fault(f"{server.url} failed", after=after)
        seat.move(server, fault)
        raise fault

    start = time.monotonic()
    try:
        found = await patience.retrying()(request)
    except Fault as error:
        found = str(error)
    return found, asked, time.monotonic() - start


def test_servers_that_are_well_are_asked_however_many_are_not():
    found, asked, took = asyncio.run(moving(5, well=(3, 4)))
    assert (found, asked) == ("answered", [0, 1, 2, 3])
    assert took < 0.05


def test_where_all_fail_there_is_a_wait_before_each_round():
    found, asked, took = asyncio.run(moving(3))
    assert "failed" in found
    assert len(asked) == 9, "three rounds, two of them after a wait"
    assert sorted(asked[:3]) == sorted(asked[3:6]) == [0, 1, 2]
    assert took > 0.05
    found, asked, took = asyncio.run(moving(2, after=0.2))
    assert len(asked) == 6
    assert took > 0.4, "as long as they ask for"


def test_a_server_that_opens_its_streams_and_says_nothing_is_left_alone_too(server):
    engine = connect(server, patience=Patience(retries=0, silence=0.2, failures=2, rest=5))
    list(engine.submit(talk(1)))
    server.deaf = True
    for _ in range(2):
        with pytest.raises(ConnectionError, match="ReadTimeout"):
            list(engine.submit(talk(3)))
    with pytest.raises(ConnectionError, match="failed 2 times in a row"):
        list(engine.submit(talk(3)))
    engine.close()


def test_failures_of_a_server_that_works_for_others_meanwhile_do_not_add_up():
    circuit = Circuit(Patience(failures=2))
    began = time.monotonic()
    circuit.worked()
    for _ in range(9):
        circuit.broke(began)  # a burst of connections that came too late
    assert not circuit.rest
    for _ in range(2):
        circuit.broke(time.monotonic())
    assert circuit.rest


def test_an_error_amid_a_stream_may_pass_whatever_code_it_has():
    server = Server("http://s", Circuit(Patience()))
    with pytest.raises(Fault, match="http://s failed: EngineCore died"):
        _event(server, b'{"error": {"code": 400, "message": "EngineCore died"}}')
    assert server.circuit.failed == 1


def test_programs_that_wait_to_meet_a_server_fail_with_the_first_not_one_after_another():
    async def met():
        engine = VLLMEngine.__new__(VLLMEngine)
        engine._known, server, asked = {}, Server("http://s", Circuit(Patience())), []

        async def introduced(server):
            asked.append(server)
            await asyncio.sleep(0.05)
            server.circuit.broke()
            raise Fault("ConnectTimeout")

        engine._introduced = introduced
        told = await asyncio.gather(*(engine._meet(server) for _ in range(10)), return_exceptions=True)
        return asked, told

    asked, told = asyncio.run(met())
    assert len(asked) == 1
    assert all(isinstance(error, Fault) for error in told)
    assert len({id(error) for error in told}) == 10


def test_one_server_that_answers_is_enough_to_begin(fleet):
    fleet[0].kill()
    engine = connect(*fleet)
    for i in range(6):
        assert len(list(engine.submit(talk(3, (5, 6, i))))) == 3
    engine.close()
    fleet[0].start()


def test_a_server_unlike_the_others_is_refused_when_it_is_met(fleet):
    fleet[1].whole = fleet[2].whole = False
    engine = connect(*fleet)
    running = [engine.submit(talk(1, (5, 6, i))) for i in range(20)]
    with pytest.raises(ValueError, match=r"without \['end_entropy', 'p_safe'\].*is not the equal of"):
        [list(stream) for stream in running]
    engine.close()


def test_where_no_server_answers_that_is_said():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"no server answers: http://127.0.0.1:{port}"):
        VLLMEngine(f"http://127.0.0.1:{port}", "served", tokenizer=byte_tokenizer(), patience=Patience(retries=0))


def test_an_engine_that_is_dropped_ends_its_thread(server):
    before = threading.active_count()
    engine = connect(server)
    assert len(list(engine.submit(talk(3)))) == 3
    del engine

    def ended():
        gc.collect()  # again and again: its thread may still be at the end of the request, and hold it
        return threading.active_count() <= before

    settle(ended)
