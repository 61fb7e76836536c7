"""The hidden-state head: its numbers, its files, and what it refuses."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from langchain_earlyexit.probe import POSITIONS, Probe

BINDS = {"weights": "aa", "dtype": "float32", "tokenizer": "bb", "template": "cc", "cues": "wait"}


def probe(seed=0, layers=(0.5, 1.0), width=5, hidden=(4, 3), **fields):
    rng = np.random.default_rng(seed)
    sizes = [len(layers) * width, *hidden, 1]
    given = {
        "layers": layers,
        "position": "cue",
        "mean": rng.normal(0, 1, sizes[0]),
        "scale": rng.uniform(0.5, 2, sizes[0]),
        "weights": tuple(rng.normal(0, 1, shape) for shape in pairwise(sizes)),
        "biases": tuple(rng.normal(0, 1, n) for n in sizes[1:]),
        "binds": BINDS,
        "about": {"model": "pocket"},
    }
    return Probe(**{**given, **fields})


def by_hand(made, states):
    """Standardise, then the perceptron, in double precision."""
    x = (states.ravel().astype(np.float64) - made.mean) / made.scale
    for i, (weight, bias) in enumerate(zip(made.weights, made.biases, strict=True)):
        x = x @ weight.astype(np.float64) + bias
        if i < len(made.weights) - 1:
            x = np.maximum(x, 0)
    return 1 / (1 + math.exp(-x[0]))


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)])
def test_it_is_a_standardised_perceptron(hidden):
    rng = np.random.default_rng(1)
    made = probe(hidden=hidden)
    for _ in range(50):
        states = rng.normal(0, 2, (2, 5)).astype(np.float32)
        assert made.p_safe(states) == pytest.approx(by_hand(made, states), abs=1e-5)


def test_it_is_sure_without_overflow_and_knows_what_it_cannot_tell():
    sure = probe(hidden=(), weights=(np.full((10, 1), 1e4),), biases=(np.zeros(1),), mean=np.zeros(10))
    assert sure.p_safe(np.full((2, 5), 9.0, dtype=np.float32)) == 1.0
    assert sure.p_safe(np.full((2, 5), -9.0, dtype=np.float32)) == 0.0
    assert math.isnan(sure.p_safe(np.full((2, 5), np.nan, dtype=np.float32)))


def test_states_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"2 layers of width 5, got states of shape \(3, 5\)"):
        probe().p_safe(np.zeros((3, 5), dtype=np.float32))


def test_saved_and_loaded_it_says_the_same(tmp_path):
    made = probe(position="before")
    again = Probe.load(made.save(tmp_path / "probe"))
    states = np.random.default_rng(2).normal(0, 1, (2, 5)).astype(np.float32)
    assert again.p_safe(states) == made.p_safe(states)
    assert (again.layers, again.position, again.digest) == (made.layers, "before", made.digest)
    assert (again.binds, again.about) == (BINDS, {"model": "pocket"})
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {"probe.safetensors", "probe.json"}


def test_digests_tell_probes_apart():
    assert probe().digest == probe().digest
    others = [probe(1), probe(position="before"), probe(layers=(0.25, 1.0))]
    assert len({probe().digest, *(other.digest for other in others)}) == 4


def test_files_that_are_not_a_probe_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Probe.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"probe.safetensors and probe.json missing"):
        Probe.load(tmp_path / "empty")
    one = probe(0).save(tmp_path / "one")
    two = probe(1).save(tmp_path / "two")
    (one / "probe.json").write_text((two / "probe.json").read_text())
    with pytest.raises(ValueError, match="not of the same probe"):
        Probe.load(one)
    about = json.loads((two / "probe.json").read_text())
    (two / "probe.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(ValueError, match="format 9, this version reads 1"):
        Probe.load(two)


@pytest.mark.parametrize("name", sorted(BINDS))
def test_whatever_differs_from_what_it_was_trained_on_is_named_with_both_sides(name):
    probe().refuse_mismatch({**BINDS, "more": "is fine"})
    with pytest.raises(ValueError, match=f"trained on pocket.*{name}: made for {BINDS[name]}, loaded is other"):
        probe().refuse_mismatch({**BINDS, name: "other"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "layers must be depths"),
        ({"layers": (0.0, 1.0)}, "layers must be depths"),
        ({"layers": (0.5, 1.5)}, "layers must be depths"),
        ({"position": "after"}, f"position must be one of {', '.join(POSITIONS)}"),
        ({"mean": np.zeros(9), "scale": np.ones(9)}, "a multiple of the 2 layers"),
        ({"scale": np.ones(8)}, "must be .features."),
        ({"scale": np.zeros(10)}, "scale above 0"),
        ({"biases": (np.zeros(4), np.zeros(3))}, "3 weights, but 2 biases"),
        ({"biases": (np.zeros(4), np.zeros(4), np.zeros(1))}, "does not take"),
        ({"mean": np.full(10, np.nan)}, "finite"),
        ({"hidden": (4, 3), "weights": (np.zeros((10, 2)),), "biases": (np.zeros(2),)}, "one output, it has 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        probe(**fields)


def test_it_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    shelf = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (shelf / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            from pathlib import Path

            for file in Path(folder_path).iterdir():
                (shelf / repo_id / file.name).write_bytes(file.read_bytes())
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        assert set(allow_patterns) == {"probe.safetensors", "probe.json"}
        if not (shelf / repo_id).exists():
            raise OSError("404: no such repository")
        return str(shelf / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    made = probe()
    assert made.push_to_hub("me/probe") == "https://hub/me/probe/commit/1"
    assert Probe.load("me/probe").digest == made.digest
    with pytest.raises(ValueError, match="cannot load a probe from 'me/other': 404"):
        Probe.load("me/other")
