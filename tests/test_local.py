import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.engines.local import LocalSettings, load
from langchain_earlyexit.engines.program import Open, Sample, Step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=2, bos_token_id=None, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return where, model


def test_a_saved_model_generates_what_generate_does(saved):
    where, model = saved
    engine = load(LocalSettings(str(where)))
    assert engine.name == "transformers/packed"
    assert engine.context_length == 512
    assert engine.tokenizer.chat_template
    prompt = engine.tokenizer("hello there")["input_ids"]
    got = []

    def walk():
        yield Step((Open(0, tuple(prompt)),))
        for _ in range(24):
            inbox = yield Step((Sample(0),))
            got.append(inbox.results[0].id)

    list(engine.submit(walk()))
    engine.close()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1)
    assert got == expected[0, len(prompt) :].tolist()


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load(LocalSettings(str(tmp_path / "gone")))


def test_an_empty_directory_is_told_what_to_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"0 \.gguf files and no config\.json"):
        load(LocalSettings(str(tmp_path)))


@pytest.mark.parametrize("file", [None, "pytorch_model.bin"])
def test_no_weights_or_pickled_ones_alone_are_refused(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    if file:
        (tmp_path / file).write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load(LocalSettings(str(tmp_path)))


def test_two_gguf_files_are_one_too_many(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"2 \.gguf files"):
        load(LocalSettings(str(tmp_path)))
