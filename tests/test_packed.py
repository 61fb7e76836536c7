"""Which families run packed, and that both paths compute what the plain model computes."""

import logging

import numpy as np
import pytest
import torch
import transformers as tf

from langchain_earlyexit.engines import local
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.scheduler import Row
from langchain_earlyexit.engines.separate import SeparateModel

SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKABLE = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5},
    "Gemma3Text": {"sliding_window": 5},
    "GptOss": {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": MOE,
}
RECURRENT = {
    "Qwen3Next": MOE
    | {
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
}  # fmt: skip


def tiny(family, options):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | options)
    name = family.replace("Text", "") + "ForCausalLM"
    with torch.no_grad():
        model = getattr(tf, name)(config).eval().float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that attention matters
    return model


def walk(core):
    """All ids of a branch with the logits after them: chunks, company, forks, rewinds, past every window."""
    out = []

    def step(*work):
        for (_, ids, new), row in zip(work, core.forward([Row(c, new) for c, _, new in work]), strict=True):
            ids.extend(new)
            out.append((list(ids), row))

    one, two, a, b = core.new(), core.new(), [], []
    step((one, a, [5, 6, 7]))
    step((one, a, [8, 9, 10, 11, 12, 13, 14, 15, 16]), (two, b, [50, 51]))
    fork, c = core.fork(one, 9), a[:9]
    step((two, b, [52]), (fork, c, [60, 61]), (one, a, [17]))
    core.rewind(one, 7)
    del a[7:]
    step((one, a, [70]), (fork, c, [62]), (two, b, [53, 54, 55, 56, 57]))
    return out


def off_by(core, plain):
    gaps = []
    for ids, row in walk(core):
        with torch.inference_mode():
            gaps.append(np.abs(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy() - row).max())
    return max(gaps)


@pytest.mark.parametrize("family", PACKABLE)
def test_a_packable_family_is_packed_and_computes_the_same(family):
    model, plain = (tiny(family, PACKABLE[family]) for _ in range(2))
    window = getattr(model.config, "sliding_window", None)
    core, path = local._choose(model)
    assert path == "packed"
    assert isinstance(core, PackedModel)
    assert getattr(model.config, "sliding_window", None) == window
    assert [getattr(m, "sliding_window", None) for m in model.modules()] == [
        getattr(m, "sliding_window", None) for m in plain.modules()
    ]
    assert off_by(core, plain) < 1e-3


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_family_runs_separately_and_computes_the_same(family, caplog):
    model, plain = (tiny(family, RECURRENT[family]) for _ in range(2))
    with caplog.at_level(logging.INFO):
        core, path = local._choose(model)
    assert path == "separate"
    assert "one branch at a time" in caplog.text
    assert off_by(core, plain) < 1e-3


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_the_separate_path_is_right_for_packable_families_too(family):
    model = tiny(family, PACKABLE[family])
    assert off_by(SeparateModel(model), model) < 1e-3


@pytest.mark.parametrize("broken", ["window", "crash", "bypass"])
def test_a_family_that_fails_the_self_check_falls_back_and_is_left_as_it_was(broken, monkeypatch):
    model, plain = (tiny("Mistral", {"sliding_window": 4000}) for _ in range(2))
    before = model.config._attn_implementation
    attend = "langchain_earlyexit.engines.packed._attend"
    from langchain_earlyexit.engines import packed

    real = packed._attend
    if broken == "window":  # ignored, and far longer than any rehearsal
        monkeypatch.setattr(attend, lambda q, k, v, scale, window, cap, sinks: real(q, k, v, scale, None, cap, sinks))
    elif broken == "crash":
        monkeypatch.setattr(attend, lambda *a: {}["no such thing"])
    else:
        model.model.layers[1].self_attn.forward = lambda hidden_states, **k: (hidden_states, None)
    core, path = local._choose(model)
    assert path == "separate"
    assert model.config._attn_implementation == before
    assert model.config.sliding_window == 4000
    if broken != "bypass":
        assert off_by(core, plain) < 1e-3


def test_a_tiny_vocabulary_is_no_reason_to_crash():
    assert local._choose(tiny("Llama", {"vocab_size": 20}))[1] == "packed"


def test_half_precision_is_packed_too():
    assert local._choose(tiny("Llama", {}).bfloat16())[1] == "packed"
