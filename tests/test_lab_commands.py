"""The lab's commands, from traces on disk to a certified artifact and a report. Only a made-up model runs here."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from remote_for_tests import FakeServer
from traces_for_tests import BINDS
from transformers import AutoTokenizer

from langchain_earlyexit.cli import main
from langchain_earlyexit.guarantee import Calibration
from langchain_earlyexit.lab.commands import policy
from langchain_earlyexit.lab.lines import note_planned
from langchain_earlyexit.lab.table import Evaluation
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.policies import DEER, LYNX, CoDEStop, FirstOf, Never, ThinkBrake
from langchain_earlyexit.trace import Check, Trace

META = {
    "format": 1,
    "model": "made by hand",
    "form": "boxed",
    "kinds": ["reflection"],
    "signals": ["trial_confidence"],
    "depths": [],
    "seed": 0,
    "closing": {"full": 7, "bare": 2},
    "binds": {
        **BINDS,
        "cues": json.dumps({"words": ["wait"]}),
        "sampling": json.dumps({"temperature": 0.6}),
        "answer_form": json.dumps({"name": "boxed", "reuse": False}),
    },
}


def collected(path, n, seed):
    """Questions whose first check is as often right as it is confident, and whose second is right."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for i in range(n):
            first = rng.random()
            answers = ("1" if rng.random() < first else "2", "1")
            checks = tuple(
                Check(position, "wait", {"trial_confidence": c}, answer=said, exit_answer=said)
                for position, c, said in zip((20, 60), (first, 0.99), answers, strict=True)
            )
            trace = Trace(
                checks, question_id=f"{seed}-{i}", answer="1", gold="1", thinking_tokens=100, answer_tokens=6,
                forced_tokens=0, trial_tokens=(10, 10), exit_tokens=(12, 12), read_tokens=(22, 62), seed=i,
                reason="natural",
            )  # fmt: skip
            file.write(trace.to_json() + "\n")
    path.with_suffix(".meta.json").write_text(json.dumps(META))
    return str(path)


@pytest.fixture
def servers():
    """Two servers of the bundled model's tokenizer, whose model drawls: it thinks for as long as it may."""
    tokenizer = AutoTokenizer.from_pretrained(weights_dir())
    end = tokenizer.convert_tokens_to_ids("</think>")

    def next_logits(ids):
        logits = np.random.default_rng([len(ids), *ids[-4:]]).normal(0, 2, len(tokenizer))
        logits[[end, int(tokenizer.eos_token_id)]] = -50.0
        return logits

    made = [FakeServer(next_logits, tokenizer=tokenizer, name="pocket", context=2048) for _ in range(2)]
    yield made
    for server in made:
        server.close()


def test_questions_are_collected_and_answered_on_a_fleet(servers, tmp_path, capsys):
    asked = [
        "--base-url",
        *(server.url for server in servers),
        "--data",
        "pocket",
        "--split",
        "dev",
        "--questions",
        "6",
    ]
    asked += ["--at-once", "4", "--budget", "30", "--temperature", "0"]
    main(["collect", *asked, "--kinds", "interval", "--out", str(tmp_path / "traces.jsonl")])
    assert "6 questions done" in capsys.readouterr().out
    main(["answer", *asked, "--out", str(tmp_path / "full.jsonl")])
    assert "6 questions" in capsys.readouterr().out
    whole = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    live = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    assert {t["question_id"]: t["answer"] for t in whole} == {o["question_id"]: o["answer"] for o in live}
    assert all(server.generated for server in servers)
    assert all(server.most_active <= 8 for server in servers)  # four questions, each with a trial beside it


def test_help_teaches_the_whole_way(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    steps = [said.index(f"\n  {step} ") for step in ("collect", "train", "calibrate", "answer", "evaluate", "report")]
    assert steps == sorted(steps)


@pytest.mark.parametrize("name", ["calibrate", "answer", "evaluate", "overhead", "headline"])
def test_each_step_shows_a_line_to_type(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"earlyexit {name} " in capsys.readouterr().out.split("options:")[1]


def test_from_traces_to_a_report(capsys, tmp_path):
    test, dev = collected(tmp_path / "test.jsonl", 100, 1), collected(tmp_path / "dev.jsonl", 100, 2)
    found = str(tmp_path / "found.json")
    assert main(["evaluate", test, "--dev", dev, "--policy", "deer", "CoDEStop(tau=1.5)", "--out", found]) == 0
    told = capsys.readouterr().out
    assert "| DEER, chosen on dev (replayed) |" in told
    assert "| CoDEStop(r_min=0.9, r_max=0.95, ramp_steps=2, delta=0.55, tau=1.5) (replayed) |" in told
    assert main(["report", found, "--out", str(tmp_path / "out" / "report")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md",
        "report.html",
        "report.svg",
        "report-close.svg",
    }


def test_a_policy_without_a_path_is_replayed_as_it_is_and_two_of_one_path_are_one_curve(capsys, tmp_path):
    test, out = collected(tmp_path / "test.jsonl", 40, 1), tmp_path / "found.json"
    steep = "CoDEStop(r_min=1, r_max=1)"
    assert main(["evaluate", test, "--policy", steep, "deer", "DEER(threshold=0.9)", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "replayed as it is, for it has no path" in told.err
    assert "| CoDEStop(r_min=1" in told.out
    assert [one.name for one in Evaluation.load(out).curves if one.role == "policy"] == ["DEER"]


def test_what_is_not_finished_is_not_evaluated(capsys, tmp_path):
    test = collected(tmp_path / "test.jsonl", 40, 1)
    note_planned(Path(test), ["one more"])
    assert main(["evaluate", test, "--policy", "deer", "--out", str(tmp_path / "found.json")]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_calibrate_writes_an_artifact_and_says_what_it_certifies(capsys, tmp_path):
    traces, out = collected(tmp_path / "traces.jsonl", 400, 3), tmp_path / "new" / "deer.json"
    line = ["calibrate", traces, "--policy", "deer", "--epsilon", "0.05", "0.1", "--delta", "0.1", "--out", str(out)]
    assert main(line) == 0
    found = Calibration.load(out)
    assert [level.epsilon for level in found.levels] == [0.05, 0.1]
    assert "| 0.95 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "{test}", "--dev", "{test}", "--policy", "deer"], "are in both collections"),
        (["evaluate", "{test}", "--policy", "thinkbrake"], "looks at sentence checks"),
        (["evaluate", "absent.jsonl"], "absent"),
        (["calibrate", "{test}", "--policy", "deer", "--epsilon", "0.001"], "40 questions cannot certify"),
        (["evaluate", "{test}", "--live", "{test}"], "is not of a live run"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(capsys, tmp_path, arguments, words):
    test = collected(tmp_path / "test.jsonl", 40, 1)
    out = ["--out", str(tmp_path / "out.json")]
    assert main([word.format(test=test) for word in arguments] + out) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert words in told
    assert told.startswith("earlyexit: ")
    assert not (tmp_path / "out.json").exists()


class TestPoliciesAsTyped:
    @pytest.mark.parametrize(
        "meant",
        [
            DEER(0.97),
            CoDEStop(tau=12.0, delta=0.5),
            ThinkBrake(0.5, looks={"sentence", "paragraph"}),
            FirstOf(DEER(0.97), CoDEStop()),
            Never(),
            LYNX(q_safe=0.1, q_unsafe=math.inf),
        ],
    )
    def test_what_a_policy_prints_is_read_back(self, meant):
        assert policy(repr(meant)) == meant

    def test_a_name_has_its_defaults(self):
        assert policy("codestop") == CoDEStop()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("soon", "unknown exit policy 'soon'"),
            ("DEER(0.9)", "name the fields of DEER"),
            ("DEER(limit=0.9)", "does not take these fields"),
            ("DEER(threshold=1.9)", r"threshold must be in \[0, 1\]"),
            ("DEER(threshold=open('x'))", "malformed node"),
            ("__import__('os').system('true')", "write a name, or a name with fields"),
            ("DEER(", "was never closed"),
        ],
    )
    def test_anything_else_is_refused_and_nothing_is_run(self, text, words):
        import argparse

        with pytest.raises(argparse.ArgumentTypeError, match=words):
            policy(text)
