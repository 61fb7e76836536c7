"""Training the hidden-state head: it finds what is there, does not flatter itself, and says what it found."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from reasoners_for_tests import tiny_reasoner
from safetensors.numpy import save_file
from test_collect import HOW, QUESTIONS, SEED

from langchain_earlyexit import ChatEarlyExit, Check, Trace
from langchain_earlyexit.lab.collect import collect, read_states, read_traces
from langchain_earlyexit.lab.examples import PARTS, examples, part_of
from langchain_earlyexit.lab.train import Head, _calibration, assess, search, train
from langchain_earlyexit.policies import LYNX
from langchain_earlyexit.probe import POSITIONS

BINDS = {"weights": "w", "dtype": "float32", "tokenizer": "t", "template": "c", "cues": "wait", "sampling": "0.6"}
DEPTHS, WIDTH = (0.5, 1.0), 6


def collection(folder, rows, *, binds=BINDS, gold=True, shift=0):
    """A collection by hand. `rows`: per question a list of (states [positions, layers, width], safe, confidence).

    The full answer is always "7", that of an exit "7" where it is safe and "8" elsewhere; gold is "8".
    """
    out = folder / "made.jsonl"
    lines, states, counts, ids = [], [], [], []
    for i, checks in enumerate(rows):
        told = tuple(
            Check(10 * n + 10, "wait", {"trial_confidence": c}, exit_answer="7" if safe else "8")
            for n, (_, safe, c) in enumerate(checks)
        )
        ids.append(f"q{i + shift}")
        trace = Trace(
            told, question_id=ids[-1], question=f"What is {i + shift}?", answer="7", gold="8" if gold else None
        )
        lines.append(trace.to_json())
        states += [state for state, _, _ in checks]
        counts.append(len(checks))
    out.write_text("\n".join(lines) + "\n")
    meta = {"format": 1, "model": "made", "binds": binds, "form": "boxed", "kinds": ["reflection"], "depths": DEPTHS}
    out.with_suffix(".meta.json").write_text(json.dumps(meta))
    if states:
        out.with_suffix(".features").mkdir()
        save_file(
            {"states": np.stack(states).astype(np.float32), "checks": np.array(counts)},
            out.with_suffix(".features") / "00000.safetensors",
            metadata={"question_ids": json.dumps(ids)},
        )
    return out


def noise(rng):
    return rng.normal(0, 1, (len(POSITIONS), len(DEPTHS), WIDTH))


def telling(rng, questions=400, safe_share=0.5, where=(0, 1)):
    """Chains whose states at one position and layer tell, with some noise, whether a check is safe."""
    rows = []
    for _ in range(questions):
        checks = []
        for _ in range(int(rng.integers(1, 4))):
            safe = bool(rng.random() < safe_share)
            states = noise(rng)
            states[where][0] = (1.5 if safe else -1.5) + rng.normal(0, 0.7)
            checks.append((states, safe, float(rng.random())))
        rows.append(checks)
    return rows


def test_it_finds_what_the_states_tell_and_a_trial_does_not(tmp_path):
    probe, report = train(collection(tmp_path, telling(np.random.default_rng(0))))
    assert report.probe.all_checks > 0.95
    assert report.probe.first_checks > 0.95
    assert 0.3 < report.trial_confidence.all_checks < 0.7
    assert report.log_loss[0] < 0.5 * report.log_loss[1]
    assert (probe.layers, probe.position) == (DEPTHS, "cue")
    assert probe.binds == {name: BINDS[name] for name in ("weights", "dtype", "tokenizer", "template", "cues")}
    assert "p_safe" in str(report)
    json.dumps(probe.about)


def test_its_number_is_a_probability_though_classes_weighed_alike(tmp_path):
    out = collection(tmp_path, telling(np.random.default_rng(1), questions=900, safe_share=0.9))
    probe, report = train(out, heads=[Head((0, 1), "cue", (16,))])
    data = examples(out)
    test = data.part == "test"
    said = np.array([probe.p_safe(row) for row in data.states[test][:, 0]])
    assert said.mean() == pytest.approx(data.safe[test].mean(), abs=0.04)
    assert report.safe == pytest.approx(0.9, abs=0.05)
    assert report.log_loss[0] < report.log_loss[1]


@pytest.mark.parametrize("spread", [0.5, 1.0, 30.0, 1000.0])
def test_a_head_that_is_far_too_sure_of_itself_is_brought_to_reason(spread):
    """Slope and shift are found wherever the raw logits lie, also where most are far out and many of them wrong."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0.5, 1.5, 400)
    safe = rng.random(400) < 1 / (1 + np.exp(-odds))
    raw = torch.from_numpy(spread * odds - 3 * spread)
    slope, shift = _calibration(raw, torch.from_numpy(safe.astype(np.float64)))
    said = 1 / (1 + np.exp(-(slope * raw.numpy() + shift)))
    assert said.mean() == pytest.approx(safe.mean(), abs=0.01)
    assert said[odds > 1].mean() == pytest.approx(safe[odds > 1].mean(), abs=0.06)


def test_knowing_a_question_again_is_not_taken_for_knowing_what_is_safe(tmp_path):
    """States that betray the question, not safety: checks of one question on both sides would look like skill."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(300):
        fingerprint, safe = noise(rng) * 3, bool(rng.random() < 0.5)
        rows.append([(fingerprint + noise(rng) * 0.1, safe, 0.5) for _ in range(5)])
    _, report = train(collection(tmp_path, rows))
    assert report.probe.all_checks < 0.7


def test_checks_of_one_question_are_on_one_side_and_the_shares_are_as_said(tmp_path):
    rows = telling(np.random.default_rng(3), questions=600)
    data = examples(collection(tmp_path, rows))
    counts = [len(checks) for checks in rows]
    for part in np.split(data.part, np.cumsum(counts)[:-1]):
        assert len(set(part)) == 1
    parts = [part_of(f"question {i}") for i in range(5000)]
    for part, share in PARTS.items():
        assert parts.count(part) / 5000 == pytest.approx(share, abs=0.025)
    assert part_of("one") == part_of("one")
    assert [part_of(f"question {i}", seed=1) for i in range(50)] != parts[:50]


def test_a_search_finds_the_layer_and_the_position_that_tell(tmp_path):
    rows = telling(np.random.default_rng(4), where=(POSITIONS.index("before"), 0))
    heads = [head for head in search(len(DEPTHS)) if head.hidden == () and len(head.layers) == 1]
    assert {(head.layers, head.position) for head in heads} == {((i,), p) for i in (0, 1) for p in POSITIONS}
    lines = []
    probe, report = train(collection(tmp_path, rows), heads=heads, told=lines.append)
    assert (probe.layers, probe.position) == ((0.5,), "before")
    assert report.chosen == Head((0,), "before", ())
    assert len(lines) == len(report.tried) == len(heads)
    assert [score for _, score in report.tried] == sorted((score for _, score in report.tried), reverse=True)


def test_a_search_tries_each_depth_alone_and_all_together():
    heads = search(4)
    assert {head.layers for head in heads} == {(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)}
    assert {head.hidden for head in heads} == {(), (64,), (256, 64)}
    assert len(heads) == len(set(heads))
    assert {head.layers for head in search(1)} == {(0,)}


def test_labels_are_the_full_answer_or_the_right_one(tmp_path):
    out = collection(tmp_path, telling(np.random.default_rng(5), questions=30))
    full, gold = examples(out, "full"), examples(out, "gold")
    assert (full.safe == ~gold.safe).all()  # made so: the full answer is never the right one


def test_equal_seeds_give_equal_heads(tmp_path):
    out = collection(tmp_path, telling(np.random.default_rng(6), questions=120))
    head = [Head((1,), "cue", (8,))]
    assert train(out, heads=head)[0].digest == train(out, heads=head)[0].digest
    assert train(out, heads=head)[0].digest != train(out, heads=head, seed=1)[0].digest


class TestOnOtherQuestions:
    def test_it_is_judged_on_all_of_them(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        probe, _ = train(collection(tmp_path / "a", telling(np.random.default_rng(7))))
        other = collection(tmp_path / "b", telling(np.random.default_rng(8), questions=100), shift=1000)
        report = assess(probe, other)
        assert report.checks["test"] == sum(len(trace.checks) for trace in read_traces(other))
        assert report.probe.all_checks > 0.95

    def test_those_of_another_model_are_refused(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        probe, _ = train(collection(tmp_path / "a", telling(np.random.default_rng(7), questions=120)))
        other = collection(tmp_path / "b", telling(np.random.default_rng(8), 20), binds={**BINDS, "weights": "v"})
        with pytest.raises(ValueError, match="weights: made for w, loaded is v"):
            assess(probe, other)


class TestWhatIsRefused:
    def test_no_states(self, tmp_path):
        with pytest.raises(ValueError, match="no hidden states"):
            train(collection(tmp_path, [[]]))

    def test_checks_of_one_class(self, tmp_path):
        with pytest.raises(ValueError, match="are all safe"):
            train(collection(tmp_path, telling(np.random.default_rng(9), questions=60, safe_share=1.0)))

    def test_gold_labels_without_gold(self, tmp_path):
        with pytest.raises(ValueError, match="question q0 has none"):
            train(collection(tmp_path, telling(np.random.default_rng(9), 20), gold=False), "gold")

    def test_an_unknown_label(self, tmp_path):
        with pytest.raises(ValueError, match="label must be one of full, gold"):
            train(collection(tmp_path, telling(np.random.default_rng(9), 20)), "silver")

    def test_a_kind_that_was_not_collected(self, tmp_path):
        with pytest.raises(ValueError, match="no checks of the kinds"):
            train(collection(tmp_path, telling(np.random.default_rng(9), 20)), kinds={"sentence"})


def test_from_questions_to_a_live_probe(tmp_path, monkeypatch):
    """Collected, trained, saved, loaded, and at work on the model it was trained on."""
    monkeypatch.setattr("langchain_earlyexit.lab.examples.part_of", _in_turn())  # five questions, each part has some
    engine = tiny_reasoner("w 1}\n\n.a", sharp=12.0)
    try:
        out = tmp_path / "traces.jsonl"
        collect(ChatEarlyExit(engine=engine, **HOW), QUESTIONS, out, depths=(1 / 3, 2 / 3), seed=SEED, progress=False)
        _spoil_every_other_exit(out)
        probe, _ = train(out, heads=[Head((0, 1), "cue", ())])
        llm = ChatEarlyExit(
            engine=engine, probe=str(probe.save(tmp_path / "probe")), exit_policy=LYNX(1.0), include_checks=True, **HOW
        )
        states = read_states(out)
        for trace in read_traces(out):
            message = llm.invoke(trace.question, seed=trace.seed)
            live = Trace.from_dict(message.response_metadata["early_exit"]["trace"])
            assert [check.position for check in live.checks] == [check.position for check in trace.checks]
            for check, read in zip(live.checks, states.get(trace.question_id, ()), strict=True):
                assert check.signals["p_safe"] == pytest.approx(probe.p_safe(read[0]), abs=1e-4)
    finally:
        engine.close()


def _in_turn():
    seen = {}

    def part(question, seed):
        return seen.setdefault(question, list(PARTS)[len(seen) % len(PARTS)])

    return part


def _spoil_every_other_exit(out):
    """Make every other exit answer another one, so that there are both classes to learn."""
    lines, n = [], 0
    for trace in read_traces(out):
        checks = []
        for check in trace.checks:
            n += 1
            checks.append(replace(check, exit_answer=trace.answer if n % 2 else "another"))
        lines.append(replace(trace, checks=tuple(checks)).to_json() + "\n")
    out.write_text("".join(lines))
