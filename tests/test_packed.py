"""Which families run packed, and that both paths compute what the plain model computes."""

import logging
import shutil

import numpy as np
import pytest
import torch
import transformers as tf

from langchain_earlyexit import ChatEarlyExit
from langchain_earlyexit.engines import local, matrices
from langchain_earlyexit.engines.attention import Pass
from langchain_earlyexit.engines.function import byte_tokenizer
from langchain_earlyexit.engines.lean import Lean
from langchain_earlyexit.engines.matrices import Matrix
from langchain_earlyexit.engines.model import Row
from langchain_earlyexit.engines.packed import PackedModel
from langchain_earlyexit.engines.pages import PAGE
from langchain_earlyexit.engines.separate import SeparateModel
from langchain_earlyexit.pocket import weights_dir

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
    "DeepseekV3": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
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
    step((two, b, [58]), (fork, c, [63]), (one, a, [18]))
    core.rewind(one, 7)
    del a[7:]
    step((one, a, [70]), (fork, c, [62]), (two, b, [53, 54, 55, 56, 57]))
    return out


def off_by(core, plain, over=max):
    gaps = []
    for ids, row in walk(core):
        with torch.inference_mode():
            gaps.append(np.abs(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].float().numpy() - row).max())
    return over(gaps)


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


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_rows_read_across_their_pages(family, monkeypatch):
    for module in ("attention", "memory", "packed", "pages"):
        monkeypatch.setattr(f"langchain_earlyexit.engines.{module}.PAGE", 4)
    model, plain = (tiny(family, PACKABLE[family]) for _ in range(2))
    assert off_by(PackedModel(model), plain) < 1e-3


def test_a_pass_that_fails_before_it_computes_leaves_every_cache_as_it_was(monkeypatch):
    for module in ("attention", "memory", "packed", "pages"):
        monkeypatch.setattr(f"langchain_earlyexit.engines.{module}.PAGE", 4)
    core = PackedModel(tiny("Llama", {}))
    trunk = core.new()
    core.forward([Row(trunk, [5, 6, 7, 8, 9, 10])])
    twins = [core.fork(trunk, 6) for _ in range(3)]
    work = [Row(trunk, [11]), *(Row(twin, [12, 13, 14, 15 + i]) for i, twin in enumerate(twins))]
    real, held = core._memory.prepare, core.held_pages

    def failing(growths):
        monkeypatch.setattr(core._memory, "prepare", real)
        raise MemoryError("no room for the copies")

    monkeypatch.setattr(core._memory, "prepare", failing)
    with pytest.raises(MemoryError):
        core.forward(work)
    assert core.held_pages == held
    plain = tiny("Llama", {})
    for row, logits in zip(work, core.forward(work), strict=True):
        with torch.inference_mode():
            wanted = plain(torch.tensor([[5, 6, 7, 8, 9, 10, *row.ids]]), use_cache=False).logits[0, -1].numpy()
        assert np.abs(wanted - logits).max() < 1e-3


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_family_of_the_common_shape_runs_lean_and_its_modules_still_work(family):
    model, plain = (tiny(family, PACKABLE[family] | {"attention_bias": True, "mlp_bias": True}) for _ in range(2))
    with torch.no_grad():
        for parameter in (*model.parameters(), *plain.parameters()):
            if parameter.ndim == 1:  # biases that are not 0, and norms that are not 1
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    core, _ = local._choose(model)
    assert core.lean
    assert off_by(core, plain) < 1e-3
    model.set_attn_implementation("eager")
    assert off_by(SeparateModel(model), plain) < 1e-3


def laid_out(model):
    """Projections of the stock model that multiply by blocks."""
    return [module for module in model.modules() if type(module) is torch.nn.Linear and "forward" in vars(module)]


def served(dtype):
    if not matrices._has_blocks(torch.empty(2, 2, dtype=dtype)):
        pytest.skip(f"this processor multiplies {dtype} by no blocks")


@pytest.mark.parametrize("small", [0, matrices._SMALL])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*PACKABLE, *RECURRENT])
def test_weights_laid_out_for_the_processor_compute_the_same(family, dtype, tied, small, caplog, monkeypatch):
    served(dtype)
    monkeypatch.setattr(matrices, "_SMALL", small)
    options = {"attention_bias": True, "mlp_bias": True, "hidden_size": 640, "tie_word_embeddings": tied}
    given = (PACKABLE | RECURRENT)[family]
    if family == "Mamba2":
        options["hidden_size"] = 32  # its heads fill its width
    model, plain = (tiny(family, given | options).to(dtype) for _ in range(2))
    core, _ = local._choose(model)
    over = max if dtype == torch.float32 else np.median  # rounding sends a token to another expert here and there
    before = off_by(core, plain, over)
    local._lay_out(core, model)
    assert "stay as they were" not in caplog.text
    assert off_by(core, plain, over) <= max(1e-3, 1.5 * before)
    if not getattr(core, "lean", False):
        assert laid_out(model)
    emptied = [m for m in model.modules() if type(m) is torch.nn.Linear and not m.weight.numel()]
    assert bool(emptied) == (small == 0)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 11, 17, 23, 33, 70])
def test_a_pass_of_any_number_of_rows_says_the_same_and_keeps_the_same_states(family, count, monkeypatch):
    served(torch.float32)
    monkeypatch.setattr(matrices, "_SMALL", 0)
    cores = [local._choose(tiny(family, PACKABLE[family] | {"hidden_size": 640}))[0] for _ in range(2)]
    local._lay_out(cores[1], cores[1]._model)
    said, states = [], []
    for core in cores:
        caches = [core.new() for _ in range(count)]
        # Some bring one token, some several: not all tokens' logits are wanted then.
        for ids in ([[3 + i, 5 + i, 7][: 1 + i % 3] for i in range(count)], [[11 + i] for i in range(count)]):
            rows = [Row(cache, new, (1, 3)) for cache, new in zip(caches, ids, strict=True)]
            said.append(core.forward(rows))
        states.append([core.hidden(cache, i % 3 + 1) for i, cache in enumerate(caches)])
    for plain, packed in zip(said[:2], said[2:], strict=True):
        assert packed.shape == plain.shape
        assert np.abs(packed - plain).max() < 1e-3
    assert all(np.abs(a - b).max() < 1e-3 for a, b in zip(*states, strict=True))


def test_a_model_whose_pages_are_large_loads_within_little_memory(tmp_path):
    # What is timed at loading takes more pages than it may hold later.
    shape = {
        "vocab_size": 1312,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 512,
    }
    model = tiny("Llama", shape)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(weights_dir() / file, tmp_path)
    page = 8 * 2 * 8 * 512 * 4 * PAGE
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # else nothing is timed
    try:
        engine = local.load(local.LocalSettings(str(tmp_path), cache_bytes=3 * page))
    finally:
        torch.set_num_threads(threads)
    assert engine._model.threads is not None
    assert engine._model.left() == 3 * page
    engine.close()


def refusing(matrix, embedding):
    raise RuntimeError("could not create a primitive")


def doubling(matrix, embedding):
    dense = matrix._dense
    matrix._blocks, matrix._rows = torch.ops.mkldnn._reorder_linear_weight(dense.t() * 2, 16), 1


def losing(matrix, embedding):
    """As it should be, and then not."""
    _pack(matrix, embedding)
    if matrix._blocks is not None and matrix._dense is None:
        raise MemoryError("no room")


_pack = Matrix.pack


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Qwen3Next"])
@pytest.mark.parametrize(("pack", "told"), [(refusing, "primitive"), (doubling, "change by"), (losing, "no room")])
def test_weights_that_cannot_be_laid_out_stay_as_they_were_and_the_log_says_why(
    family, pack, told, monkeypatch, caplog
):
    served(torch.float32)
    options = (PACKABLE | RECURRENT)[family] | {"hidden_size": 64}
    model, plain = (tiny(family, options) for _ in range(2))
    core, _ = local._choose(model)
    monkeypatch.setattr(matrices, "_SMALL", 0)
    monkeypatch.setattr(Matrix, "pack", pack)
    local._lay_out(core, model)
    assert "stay as they were" in caplog.text
    assert told in caplog.text
    assert off_by(core, plain) < 1e-3


def test_projections_that_others_changed_are_left_alone():
    model = tiny("Gemma2", {})
    hooked, patched, shared, other = (model.model.layers[i].mlp.up_proj for i in range(4))
    hooked.register_forward_hook(lambda module, args, out: out * 0.5)
    patched.forward = lambda x: x.new_ones(*x.shape[:-1], patched.out_features)
    other.weight.data = shared.weight.data
    changed = patched.forward
    given = torch.tensor([[3, 4]])
    matrices.stand_ins(model, model.get_input_embeddings().weight, lambda: model(given))
    kept = [hooked, shared, other]
    assert all("forward" not in vars(one) for one in kept)
    assert patched.forward is changed
    assert laid_out(model)


@pytest.mark.parametrize("broken", ["hook", "linear", "activation"])
def test_a_model_that_was_changed_does_not_run_lean_and_computes_the_same(broken):
    model, plain = (tiny("Llama", {"hidden_act": "gelu"} if broken == "activation" else {}) for _ in range(2))
    for one in (model, plain):
        block = one.model.layers[1]
        if broken == "hook":
            block.mlp.register_forward_hook(lambda module, args, out: out * 0.5)
        elif broken == "linear":
            block.mlp.up_proj.__class__ = type("Doubled", (torch.nn.Linear,), {"forward": doubled})
    core, path = local._choose(model)
    assert path == "packed"
    assert not core.lean
    assert off_by(core, plain) < 1e-3


def doubled(self, x):
    return torch.nn.functional.linear(x, self.weight) * 2


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_family_runs_separately_and_computes_the_same(family, caplog):
    model, plain = (tiny(family, RECURRENT[family]) for _ in range(2))
    with caplog.at_level(logging.INFO):
        core, path = local._choose(model)
    assert path == "separate"
    assert "failed on" not in caplog.text
    assert "one branch at a time" in caplog.text
    assert off_by(core, plain) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_starts_anew_when_several_tokens_follow_is_fed_one_by_one(dtype):
    options = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
    model, plain = (tiny("Mamba", options).to(dtype) for _ in range(2))
    core, path = local._choose(model)
    assert path == "separate"
    assert off_by(core, plain) < (1e-3 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("first", [3, 40])
def test_memory_of_a_recurrent_family_does_not_hang_on_how_long_the_first_prompt_is(first):
    core = SeparateModel(tiny("Qwen3Next", RECURRENT["Qwen3Next"]))
    core.bound(10**9)
    branch, other = core.new(), core.new()
    core.forward([Row(branch, [5] * first)])
    core.forward([Row(branch, [6] * (100 - first))])
    size = 2 * 4 * 2 * 8  # key and value, float32, heads, their size: of the one layer in four that attends
    assert core.need(branch, 1000) == pytest.approx(1000 * size, rel=0.05)
    state = core.need(other, 1000) - core.need(branch, 1000)
    assert state > 20 * size
    assert core.limit - core.left() == pytest.approx(100 * size + state, rel=0.05)


def test_the_record_names_the_separate_path(tmp_path):
    tokenizer = byte_tokenizer()
    tiny("Qwen3Next", RECURRENT["Qwen3Next"] | {"vocab_size": len(tokenizer)}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with ChatEarlyExit(model=str(tmp_path), max_tokens=300) as llm:
        messages = llm.batch(["one", "two"])
    assert [m.response_metadata["early_exit"]["engine"] for m in messages] == ["transformers/separate"] * 2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 2048,
            "factor": 2.0,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_angles_that_depend_on_the_length_of_the_pass_run_separately_and_compute_the_same(rope, caplog):
    model, plain = (tiny("Llama", {"rope_parameters": {"rope_theta": 10_000.0, **rope}}) for _ in range(2))
    with caplog.at_level(logging.INFO):
        core, path = local._choose(model)
    assert path == "separate"
    assert "depends on the length of the whole pass" in caplog.text
    assert off_by(core, plain) < 1e-3


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_the_separate_path_is_right_for_packable_families_too(family):
    model = tiny(family, PACKABLE[family])
    assert off_by(SeparateModel(model), model) < 1e-3


@pytest.mark.parametrize("broken", ["window", "crash", "bypass"])
def test_a_family_that_fails_the_self_check_falls_back_and_is_left_as_it_was(broken, monkeypatch, caplog):
    model, plain = (tiny("Mistral", {"sliding_window": 4000}) for _ in range(2))
    before = model.config._attn_implementation
    real = Pass.attend
    if broken == "window":  # ignored, and far longer than any rehearsal
        monkeypatch.setattr(Pass, "attend", lambda self, *a: real(self, *a[:5]))
    elif broken == "crash":
        monkeypatch.setattr(Pass, "attend", lambda *a: {}["no such thing"])
    else:
        model.model.layers[1].self_attn.forward = lambda hidden_states, **k: (hidden_states, None)
    core, path = local._choose(model)
    assert path == "separate"
    assert model.config._attn_implementation == before
    assert model.config.sliding_window == 4000
    assert ("no such thing" in caplog.text) == (broken == "crash")
    if broken != "bypass":
        assert off_by(core, plain) < 1e-3


def test_a_model_whose_lean_form_crashes_is_packed_without_it_and_the_reason_is_told(monkeypatch, caplog):
    monkeypatch.setattr(Lean, "run", lambda *a: {}["no such thing"])
    core, path = local._choose(tiny("Llama", {}))
    assert (path, core.lean) == ("packed", False)
    assert "no such thing" in caplog.text


def test_a_tiny_vocabulary_is_no_reason_to_crash():
    assert local._choose(tiny("Llama", {"vocab_size": 20}))[1] == "packed"


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_packed_too_and_as_close_as_the_plain_path(family, dtype):
    model, separate = (tiny(family, PACKABLE[family]).to(dtype) for _ in range(2))
    exact = tiny(family, PACKABLE[family]).to(dtype).float()
    core, path = local._choose(model)
    assert path == "packed"
    # Both round at every step, each in an order of its own; now and then a token goes to another expert.
    assert off_by(core, exact, np.median) < 2.5 * off_by(SeparateModel(separate), exact, np.median)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "GptOss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_path_is_found_out_in_half_precision_too(family, dtype, monkeypatch):
    real = Pass.attend
    monkeypatch.setattr(Pass, "attend", lambda self, *a: real(self, *a[:5]))  # no window, no sinks
    assert local._choose(tiny(family, PACKABLE[family]).to(dtype))[1] == "separate"
