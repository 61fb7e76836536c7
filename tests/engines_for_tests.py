"""What the tests of engines share: a tiny model, a function as a model, programs that talk."""

import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from langchain_earlyexit.engines.program import Answer, Open, Sample, Step
from langchain_earlyexit.sampling import Sampling

SIZE = 261
SEEDED = Sampling(1.0)


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def hashed(ids):
    return np.random.default_rng([len(ids), *ids[-4:]]).normal(0, 2, SIZE).astype(np.float32)


def results(engine, *steps):
    """The results of each of these sets of ops."""
    got = []

    def walk():
        for ops in steps:
            inbox = yield Step(tuple(ops))
            got.append(inbox.results)

    assert list(engine.submit(walk(), timeout=120)) == []
    return got


def talk(n=10**9, prompt=(5, 6, 7), sampling=SEEDED, seed=1, out=None):
    yield Step((Open(0, tuple(prompt), seed),))
    for _ in range(n):
        inbox = yield Step((Sample(0, sampling),))
        token = inbox.results[0].id
        if out is not None:
            out.append(token)
        yield Step((), (Answer(str(token)),))


def settle(check, seconds=60.0):
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "it did not settle"
        time.sleep(0.005)
