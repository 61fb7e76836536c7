"""A server is asked what it is before anything depends on it; what cannot work is refused, with the way out."""

import json

import pytest
from engines_for_tests import hashed, talk
from remote_for_tests import KINDS, FakeServer
from transformers import AutoTokenizer

from langchain_earlyexit import DEER, EAT, LYNX, ChatEarlyExit, ThinkBrake
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.engines.program import Hidden, Open, Sample, Step
from langchain_earlyexit.engines.vllm import VLLMEngine
from langchain_earlyexit.engines.wire import Patience
from langchain_earlyexit.pocket import weights_dir

AT_ONCE = Patience(retries=0)


@pytest.fixture
def serve():
    made = []

    def start(kind="vllm", **given):
        made.append(FakeServer(hashed, kind=kind, **given))
        return made[-1]

    yield start
    for server in made:
        server.close()


def connect(server, model="served", **given):
    return VLLMEngine(server.url, model, **{"tokenizer": byte_tokenizer(), "patience": AT_ONCE, **given})


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_server_and_its_context_are_found_out(serve, kind):
    engine = connect(serve(kind, context=1234))
    assert engine.name == kind
    assert engine.context_length == 1234
    engine.close()


def test_an_address_may_end_as_openai_clients_are_given_it(serve):
    server = serve()
    engine = VLLMEngine(server.url + "/v1/", "served", tokenizer=byte_tokenizer())
    assert len(list(engine.submit(talk(3)))) == 3
    engine.close()
    with pytest.raises(ValueError, match="must begin with http"):
        VLLMEngine("localhost:8000", "served", tokenizer=byte_tokenizer())


def test_an_unknown_server_is_refused_unless_its_kind_is_said(serve, monkeypatch):
    monkeypatch.setitem(__import__("remote_for_tests").OWNERS, "vllm", "somebody")
    server = serve()
    with pytest.raises(ValueError, match=r"none of the servers known here.*\['somebody'\]"):
        connect(server)
    connect(server, kind="vllm").close()


@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer_is_refused_and_both_readings_shown(serve, kind):
    server = serve(kind)
    with pytest.raises(ValueError, match=r"read the same text as different ids: \[.*\] here, \[.*\] there, from token"):
        connect(server, tokenizer=AutoTokenizer.from_pretrained(weights_dir()))


def test_a_renamed_control_token_is_another_tokenizer(serve):
    from tokenizers import Tokenizer

    theirs = byte_tokenizer()
    renamed = json.loads(theirs.backend_tokenizer.to_str().replace("</think>", "</thunk>"))
    theirs._tokenizer = Tokenizer.from_str(json.dumps(renamed))
    with pytest.raises(ValueError, match="different ids"):
        connect(serve(tokenizer=theirs))


def test_a_name_that_the_server_does_not_know_is_fine_where_it_serves_one_model(serve):
    engine = connect(serve(), model="/some/directory")
    list(engine.submit(talk(1)))
    assert engine.identity["weights"] == "vllm:served"
    engine.close()


def test_a_key_is_sent_and_a_wrong_one_is_told(serve):
    server = serve(api_key="right")
    connect(server, api_key="right").close()
    with pytest.raises(PermissionError, match="api_key"):
        connect(server, api_key="wrong")


def test_a_server_that_ignores_what_masks_tokens_is_refused(serve):
    with pytest.raises(ValueError, match="ignores allowed_token_ids"):
        connect(serve(ignores=frozenset({"allowed_token_ids"})))


def test_signals_that_a_server_does_not_tell_are_refused_when_the_model_is_built(serve):
    old = connect(serve(ignores=frozenset({"logprob_token_ids"}), whole=False))
    with pytest.raises(ValueError, match=r"ThinkBrake.*needs end_margin.*'vllm'.*upgrade vLLM"):
        ChatEarlyExit(engine=old, exit_policy=ThinkBrake())
    with pytest.raises(ValueError, match=r"EAT.*needs end_entropy.*--max-logprobs -1"):
        ChatEarlyExit(engine=old, exit_policy=EAT())
    llm = ChatEarlyExit(engine=old, exit_policy=DEER())
    with pytest.raises(ValueError, match="needs end_entropy"):
        llm.invoke("1 + 1?", exit_policy=EAT())
    old.close()


def test_by_address_it_is_the_same_and_a_server_that_is_not_there_yet_is_asked_at_the_first_call(serve):
    tokenizer = AutoTokenizer.from_pretrained(weights_dir())
    server = serve(tokenizer=tokenizer, whole=False)
    server.function = scripted(tokenizer, "2\n", "\\boxed{2}")
    with pytest.raises(ValueError, match=r"needs end_entropy.*--max-logprobs -1"):
        ChatEarlyExit(engine="vllm", base_url=server.url, exit_policy=EAT(), max_retries=0)
    server.kill()
    llm = ChatEarlyExit(engine="vllm", base_url=server.url, exit_policy=EAT(), max_retries=0)
    with pytest.raises(ConnectionError, match="no server answers"):
        llm.invoke("1 + 1?")
    server.start()
    with pytest.raises(ValueError, match="needs end_entropy"):
        llm.invoke("1 + 1?")
    with ChatEarlyExit(engine="vllm", base_url=[server.url], exit_policy=DEER(), max_retries=0) as other:
        assert other.invoke("1 + 1?").content == "\\boxed{2}"
        assert other.load().engine is llm.load().engine  # one engine for equal settings
    llm.close()


def test_fields_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match="needs base_url"):
        ChatEarlyExit(engine="vllm")
    with pytest.raises(ValueError, match=r"dtype='float32'.*the server"):
        ChatEarlyExit(engine="vllm", base_url="http://127.0.0.1:1", dtype="float32")
    with pytest.raises(ValueError, match="give engine='vllm'"):
        ChatEarlyExit(base_url="http://127.0.0.1:1")


def test_a_seed_that_would_be_ignored_is_refused(serve):
    engine = connect(serve("sglang", seeds=False))
    with pytest.raises(ValueError, match=r"seed=3 would be ignored.*--enable-deterministic-inference"):
        ChatEarlyExit(engine=engine, temperature=1.0).invoke("1 + 1?", seed=3)
    engine.close()


def test_hidden_states_are_not_told_and_that_is_said(serve):
    engine = connect(serve())

    def walk():
        yield Step((Open(0, (1, 2), 0, (0.5,)), Sample(0)))
        yield Step((Hidden(0, 1),))

    with pytest.raises(KeyError, match="tells no hidden states"):
        list(engine.submit(walk()))
    assert "p_safe" in engine.lacks
    with pytest.raises(ValueError, match="p_safe"):
        ChatEarlyExit(engine=engine, exit_policy=LYNX(threshold=0.9))
    engine.close()


def test_no_request_is_longer_than_the_context(serve):
    server = serve(context=64)
    engine = connect(server)
    out = []
    list(engine.submit(talk(54, tuple(range(5, 15)), out=out)))
    assert len(out) == 54
    with pytest.raises(ValueError, match="64 tokens fill the context of 64"):
        list(engine.submit(talk(55, tuple(range(5, 15)))))
    engine.close()
