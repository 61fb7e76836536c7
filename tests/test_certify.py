"""From a collection on disk to an artifact: the right answers are compared, and the wrong collections refused."""

import json
from dataclasses import asdict, replace

import pytest
from traces_for_tests import BINDS

from langchain_earlyexit import DEER, LYNX, Check, CoDEStop, FirstOf, ThinkBrake, Trace
from langchain_earlyexit.cli import main
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.guarantee import Calibration
from langchain_earlyexit.lab.certify import certify, summary
from langchain_earlyexit.lab.collect import read_traces
from langchain_earlyexit.lab.lines import note_done, note_planned
from langchain_earlyexit.probe import mark

CUES = json.dumps(asdict(CueSpec(words=("wait",))))


@pytest.fixture
def collection(tmp_path):
    """A collection on disk: n questions, left at 0.95 with the second answer, full thinking giving the first."""

    def write(name="traces", n=100, answers=("1", "1"), gold=None, kinds=("reflection",), seed=0, **binds):
        path = tmp_path / f"{name}.jsonl"
        full, early = answers
        rows = [
            Trace((Check(5, "wait", {"trial_confidence": 0.95}, exit_answer=early),), f"q{i}", answer=full, gold=gold)
            for i in range(n)
        ]
        path.write_text("".join(row.to_json() + "\n" for row in rows))
        meta = {
            "format": 1,
            "model": "some model",
            "binds": {**BINDS, "cues": CUES, **binds},
            "form": "boxed",
            "kinds": list(kinds),
            "signals": ["trial_confidence"],
            "depths": [],
            "seed": seed,
        }
        path.with_suffix(".meta.json").write_text(json.dumps(meta))
        return path

    return write


def test_a_collection_becomes_an_artifact_bound_to_how_it_was_made(collection):
    found = certify(collection(), DEER(), 0.05, progress=False)
    assert found.levels[0].setting.exits == 100
    assert found.binds["cues"] == CUES
    assert found.binds["policy"] == "DEER"
    assert Calibration.from_json(found.to_json()) == found


def test_a_collection_that_is_not_finished_is_refused(collection):
    path = collection()
    note_planned(path, [f"q{i}" for i in range(101)])
    with pytest.raises(ValueError, match=r"not finished: 101 were planned, and the longest"):
        certify(path, DEER(), 0.05, progress=False)
    note_done(path, [f"q{i}" for i in range(100)])
    with pytest.raises(ValueError, match="not finished"):
        certify(path, DEER(), 0.05, progress=False)
    note_done(path, [f"q{i}" for i in range(101)])
    assert certify(path, DEER(), 0.05, progress=False).levels


def test_questions_that_the_probe_has_learned_from_promise_nothing_for_a_policy_that_reads_it(collection):
    path = collection()
    told = path.with_suffix(".meta.json")
    meta = json.loads(told.read_text())
    rows = [replace(trace, question=f"What is {trace.question_id}?") for trace in read_traces(path)]
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    told.write_text(json.dumps({**meta, "learned": [mark("What is q7?"), mark("What is another?")]}))
    with pytest.raises(ValueError, match=r"the probe has learned from 1 of these questions \('What is q7\?', say\)"):
        certify(path, LYNX(), 0.05, progress=False)
    assert certify(path, DEER(), 0.05, progress=False).levels, "it reads no probe"


def test_a_second_collection_that_is_not_finished_is_refused_too(collection):
    first, second = collection("one"), collection("two", seed=1)
    note_planned(second, [f"q{i}" for i in range(101)])
    with pytest.raises(ValueError, match=r"two\.jsonl' is not finished"):
        certify(first, DEER(), 0.05, again=second, progress=False)


def test_calls_of_runs_that_are_not_all_there_are_refused(collection):
    path = collection("step")
    told = path.with_suffix(".meta.json")
    told.write_text(json.dumps({**json.loads(told.read_text()), "of_runs": True}))
    runs = path.with_name("runs.jsonl")
    note_planned(runs, ["a", "b"])
    with pytest.raises(ValueError, match=r"runs\.jsonl' is not finished: 2 were planned"):
        certify(path, DEER(), 0.05, progress=False)


def test_calls_of_one_run_of_a_graph_are_not_counted_one_by_one(collection):
    path = collection()
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    path.with_suffix(".meta.json").write_text(json.dumps({**meta, "of_runs": True}))
    for each, fits in ((1, True), (2, False)):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):
            line["question_id"] = f"run{i // each}/{i % each}"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if fits:
            assert certify(path, DEER(), 0.05, progress=False).levels
        else:
            with pytest.raises(ValueError, match="100 calls of 50 runs of a graph"):
                certify(path, DEER(), 0.05, progress=False)


def test_answers_are_compared_by_the_collections_answer_form(collection):
    assert certify(collection(answers=("1,000", "1000.0")), DEER(), 0.05, progress=False).levels[0].setting.losses == 0
    assert certify(collection(answers=("1", "2")), DEER(), 0.05, progress=False).levels[0].setting.exits == 0


def test_right_answers_are_judged_by_the_grader(collection):
    path = collection(answers=("0.5", "\\frac12"), gold="\\frac{1}{2}")
    assert certify(path, DEER(), 0.05, loss="lost_correct", progress=False).levels[0].setting.exits == 100
    assert certify(path, DEER(), 0.05, progress=False).levels[0].setting.exits == 0


def test_without_levels_it_serves_those_that_the_questions_can_certify(collection):
    assert [level.epsilon for level in certify(collection(), DEER(), progress=False).levels] == [0.05, 0.1, 0.2]
    with pytest.raises(ValueError, match=r"8 questions are too few to certify any .* at least 11"):
        certify(collection(n=8), DEER(), progress=False)


def test_a_second_collection_tells_how_full_thinking_changes_its_own_answer(collection):
    again = collection("again", n=40, answers=("2", "2"), seed=1)
    assert certify(collection(), DEER(), 0.05, again=again, progress=False).full_again == (40, 40)
    right = collection(gold="1")
    assert certify(right, DEER(), 0.05, loss="lost_correct", again=again, progress=False).full_again == (40, 40)
    with pytest.raises(ValueError, match=r"again.*sampling.*hotter.*the seed aside"):
        certify(collection(), DEER(), 0.05, again=collection("again", sampling="hotter"), progress=False)


@pytest.mark.parametrize(
    ("policy", "kinds", "said"),
    [
        (DEER(), ("reflection", "sentence"), "looks at reflection checks .* holds reflection, sentence checks"),
        (DEER(), ("paragraph",), "looks at reflection checks .* holds paragraph checks"),
        (
            FirstOf(CoDEStop(), ThinkBrake()),
            ("reflection",),
            "looks at reflection, sentence checks .* holds reflection checks",
        ),
    ],
)
def test_checks_of_other_kinds_than_the_policy_meets_live_are_refused(collection, policy, kinds, said):
    with pytest.raises(ValueError, match=said):
        certify(collection(kinds=kinds), policy, 0.05, progress=False)


def test_the_summary_says_it_in_words(collection):
    found = certify(collection(), DEER(), [0.05, 0.1], again=collection("again", answers=("2", "2")), progress=False)
    told = summary(found)
    assert "100 questions, 50 settings. With probability 0.9 the levels hold together, and with the same" in told
    assert "| 0.95 | 5.0% | DEER(threshold=0" in told
    assert "another answer to 100 of 100 (100.0%)" in told


def test_the_command_writes_the_artifact_and_says_what_it_promises(collection, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    status = main(["calibrate", str(collection()), "--policy", "deer", "--epsilon", "0.05", "--out", str(out)])
    assert status == 0
    assert "| 0.95 |" in capsys.readouterr().out
    assert Calibration.load(out).levels[0].epsilon == 0.05


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--policy", "deer", "--epsilon", "0.01"], "it takes at least 230"),
        (["--policy", "FirstOf(CoDEStop(), ThinkBrake())"], "looks at reflection, sentence"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(collection, given, said, capsys, tmp_path):
    assert main(["calibrate", str(collection()), *given, "--out", str(tmp_path / "c.json")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
