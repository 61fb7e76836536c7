"""The plan of the comparison: what is chosen, on which questions, and that it can be run."""

from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.lab.headline import Plan, _fixed, _kinds_apart, _replays, candidates
from langchain_earlyexit.lab.live import Arm
from langchain_earlyexit.pocket.card import _SEEDS as CARD_SEEDS
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


def test_every_policy_may_stay_and_has_many_ways_to_leave():
    for path in candidates().values():
        assert Never() in path
        assert len(set(path)) >= 30


def test_policies_that_look_elsewhere_get_a_collection_of_their_own():
    assert _kinds_apart(CUES) == [frozenset({"paragraph"}), frozenset({"sentence"})]
    assert _replays(Arm("deer", DEER()), CUES)
    assert not _replays(Arm("brake", ThinkBrake()), CUES)
    assert not _replays(Arm("eat", EAT()), CUES)
    assert not _replays(Arm("cap", budget=64), CUES)


def test_chain_of_draft_runs_only_where_it_is_asked_for():
    assert not any(arm.system for arm in _fixed(SMALL))
    drafting = [arm for arm in _fixed(Plan(draft=True)) if arm.system]
    assert [arm.policy == Never() for arm in drafting] == [True, False]


def test_arms_have_names_of_their_own():
    names = [arm.name for arm in _fixed(Plan(draft=True))]
    assert len(set(names)) == len(names)
