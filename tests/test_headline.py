"""The plan of the comparison: what is chosen, on which questions, that it can be run, and what it leaves behind."""

import time
from pathlib import Path

import pytest
from test_report import FOUND

from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.lab import install
from langchain_earlyexit.lab.crew import Asking, Crew, _Counted
from langchain_earlyexit.lab.headline import GROUPS, Plan, _fixed, _kinds_apart, _replays, candidates
from langchain_earlyexit.lab.live import FULL, Arm
from langchain_earlyexit.lab.report import brief
from langchain_earlyexit.pocket.problems import MIX, sample
from langchain_earlyexit.pocket.sittings import SEEDS as CARD_SEEDS
from langchain_earlyexit.policies import DEER, EAT, Never, ThinkBrake

CUES = CueSpec(words=("wait",))
SMALL = Plan(questions=40, dev=40, chains=40)


def test_training_choosing_and_reporting_share_no_question_with_each_other_or_with_the_card():
    asked = [{question.question for question in SMALL.of(split)} for split in ("train", "dev", "test")]
    assert [len(texts) for texts in asked] == [40, 40, 40]
    assert not asked[0] & asked[1]
    assert not asked[1] & asked[2]
    assert not asked[0] & asked[2]
    ids = {question.id for split in ("train", "dev", "test") for question in SMALL.of(split)}
    assert len(ids) == 120
    assert not {f"-{seed}-" for seed in CARD_SEEDS.values()} & {f"-{name.split('-')[2]}-" for name in ids}


def test_fewer_questions_are_the_first_of_more():
    assert Asking("pocket", "dev", 15, 6).questions == Asking("pocket", "dev", 40, 6).questions[:15]


def test_every_policy_may_stay_and_has_many_ways_to_leave():
    for path in candidates().values():
        assert Never() in path
        assert len(set(path)) >= 30


def test_policies_that_look_elsewhere_get_a_collection_of_their_own_with_what_they_read():
    assert _kinds_apart(CUES) == {
        frozenset({"paragraph"}): ("end_entropy",),
        frozenset({"sentence"}): ("end_margin",),
    }
    assert _replays(Arm("deer", DEER()), CUES)
    assert not _replays(Arm("brake", ThinkBrake()), CUES)
    assert not _replays(Arm("eat", EAT()), CUES)
    assert not _replays(Arm("cap", budget=64), CUES)


def test_chain_of_draft_runs_alone_and_with_codestop():
    drafting = [arm for arm in _fixed(SMALL) if arm.system]
    assert [arm.policy == Never() for arm in drafting] == [True, False]


def test_arms_have_names_of_their_own_and_full_thinking_is_the_first():
    arms = _fixed(SMALL)
    assert len({arm.name for arm in arms}) == len(arms)
    assert arms[0] == FULL


def test_every_family_that_is_asked_belongs_to_a_group_that_can_be_left_out():
    assert {*MIX.shares} <= {*GROUPS}
    names = {GROUPS[problem.family] for problem in sample("train", 200, 5)}
    assert len(names) >= 4


def test_the_bar_counts_work_by_its_price_and_only_what_is_new(tmp_path):
    out = tmp_path / "x.jsonl"
    out.write_text("{}\n" * 4)
    counted = _Counted(out, 0.5, most=10)
    assert counted.news() == 2.0
    assert counted.news() == 0.0
    with out.open("a") as file:
        file.write("{}\n" * 9)
    assert counted.news() == 3.0  # no more than were asked for


def test_an_error_ends_the_crew_without_beginning_what_waits():
    waiting = []

    def fail():
        with Crew.at_work(10.0) as crew:
            waiting.extend(crew.pool.submit(time.sleep, 0.2) for _ in range(200))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sum(one.cancelled() for one in waiting) > 100


def test_the_short_table_has_every_way_but_the_budgets_of_the_curve():
    told = brief(FOUND, "docs/headline.svg", "docs/headline.md")
    assert "(docs/headline.svg)" in told
    assert "(docs/headline.md)" in told
    lines = [line for line in told.splitlines() if line.startswith("| ")]
    names = ["full thinking", "DEER <0.97> \\| bold", "oracle", "LYNX (replayed)"]
    assert len(lines) == 1 + len(names)
    assert all(line.startswith(f"| {name} | ") for line, name in zip(lines[1:], names, strict=True))
    assert any("confident 180" in line and "3 / 5" in line for line in lines)


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the model is 'other'"):
        install.refuse_unwritable("other")
    with pytest.raises(ValueError, match=r"README\.md between <!-- headline --> and <!-- end of headline -->"):
        install.refuse_unwritable("pocket")
    (tmp_path / "README.md").write_text("a\n" + install.MARKS[0] + "old\n" + install.MARKS[1] + "\nb\n")
    install.refuse_unwritable("pocket")
    (tmp_path / "README.md").write_text("a\n" + install.MARKS[1] + "old\n" + install.MARKS[0] + "\nb\n")
    with pytest.raises(ValueError, match="has no <!-- headline --> and"):
        install.refuse_unwritable("pocket")


def test_the_repository_s_readme_has_the_marks(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    install.refuse_unwritable("pocket")
