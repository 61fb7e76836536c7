"""The artifact that `confidence=` is served from: which level, for which calls, and what it refuses."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from traces_for_tests import BINDS

from langchain_earlyexit import (
    DEER,
    EAT,
    AnswerConvergence,
    CoDEStop,
    FirstOf,
    Never,
    Policy,
    ProbeThenTrial,
    ThinkBrake,
)
from langchain_earlyexit.guarantee import Calibration, Level, Setting, call_fingerprint, with_policy
from langchain_earlyexit.policies import LYNX, GiveUp
from langchain_earlyexit.policy_json import kind_of, policy_from_dict, policy_to_dict
from langchain_earlyexit.trace import Decision

PATH = (
    Setting(Never(), 0, 0),
    Setting(DEER(0.99), 40, 1),
    Setting(DEER(0.9), 90, 9),
    Setting(DEER(0.5), 180, 60),
)


def calibration(**changes):
    usual = {
        "loss": "answer_changed",
        "delta": 0.1,
        "questions": 200,
        "path": PATH,
        "levels": (Level(0.02, PATH[0], 1.0), Level(0.05, PATH[1], 0.2), Level(0.1, PATH[2], 0.25)),
        "binds": with_policy(BINDS, DEER()),
        "full_again": (150, 7),
    }
    return Calibration(**{**usual, **changes})


@dataclass(frozen=True)
class Patience:
    """A user's own policy."""

    n: int = 4
    needs: ClassVar[frozenset[str]] = frozenset()
    looks: ClassVar[frozenset[str]] = frozenset({"sentence"})

    def decide(self, trace):
        return Decision(exit=len(trace.checks) >= self.n, reason="converged")


class TestConfidence:
    @pytest.mark.parametrize(
        ("asked", "served"), [(0.9, 0.1), (0.85, 0.1), (0.92, 0.05), (0.95, 0.05), (0.96, 0.02), (0.98, 0.02)]
    )
    def test_is_served_by_the_loosest_level_that_is_strict_enough(self, asked, served):
        level = calibration().level(asked)
        assert level.epsilon == served
        assert level.policy == {0.02: Never(), 0.05: DEER(0.99), 0.1: DEER(0.9)}[served]

    def test_beyond_what_was_certified_is_refused_with_what_there_is_and_what_to_do(self):
        with pytest.raises(
            ValueError, match=r"confidence=0\.99 .*0\.98, 0\.95, 0\.9.*calibrate again with epsilon=0\.01"
        ):
            calibration().level(0.99)

    @pytest.mark.parametrize("asked", [0, 1, 1.5, -0.1, math.nan])
    def test_outside_the_open_unit_interval_is_refused(self, asked):
        with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
            calibration().level(asked)

    def test_the_record_tells_level_delta_and_number_of_questions(self):
        found = calibration()
        told = found.guarantee(found.level(0.93))
        assert told == {"kind": "answer_changed", "epsilon": 0.05, "delta": 0.1, "n": 200}


class TestTheArtifact:
    def test_survives_its_file(self, tmp_path):
        found = calibration()
        found.save(tmp_path / "calibration.json")
        again = Calibration.load(tmp_path / "calibration.json")
        assert again == found
        assert again.digest == found.digest

    def test_another_number_is_another_artifact(self):
        assert calibration().digest != calibration(questions=201).digest

    def test_holds_a_policy_of_ones_own_when_told_its_class(self):
        path = (Setting(Never(), 0, 0), Setting(Patience(6), 5, 0))
        found = calibration(path=path, levels=(Level(0.1, path[1], 0.4),), binds=with_policy(BINDS, Patience()))
        assert Calibration.from_json(found.to_json(), own=[Patience]) == found
        with pytest.raises(ValueError, match=r"unknown policy 'Patience'.*named when the artifact is loaded"):
            Calibration.from_json(found.to_json())

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            ({"format": "something"}, "no calibration"),
            ({"version": 2}, "version 2, but version 1"),
            ({"loss": "vibes"}, "loss must be one of"),
            ({"delta": 0}, "delta must lie"),
            ({"delta": "0.1"}, "wrong types"),
            ({"levels": []}, "without a level"),
            ({"levels": [{"epsilon": 0.1, "setting": 9, "bound_when_left": 1}]}, "setting 9, but the path has 4"),
            ({"questions": 10}, "more often than there are questions"),
            ({"extra": 1}, "has exactly"),
            ({"binds": {"weights": "x"}}, "has exactly"),
            ({"full_again": [1]}, "two counts"),
            ({"path": 5}, "wrong types"),
        ],
    )
    def test_is_refused_when_damaged(self, tmp_path, damage, said):
        file = tmp_path / "calibration.json"
        file.write_text(json.dumps({**json.loads(calibration().to_json()), **damage}))
        with pytest.raises(ValueError, match=said) as error:
            Calibration.load(file)
        assert str(file) in str(error.value)

    def test_is_refused_when_it_is_no_json(self, tmp_path):
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(ValueError, match=r"x\.json"):
            Calibration.load(tmp_path / "x.json")

    def test_cannot_hold_levels_out_of_order_or_off_the_path(self):
        strict, loose = Level(0.05, PATH[1], 0.2), Level(0.1, PATH[2], 0.25)
        with pytest.raises(ValueError, match="strictest epsilon to the loosest"):
            calibration(levels=(loose, strict))
        with pytest.raises(ValueError, match="not on the calibration's path"):
            calibration(levels=(Level(0.1, Setting(DEER(0.7), 90, 9), 0.5),))

    def test_cannot_hold_a_path_of_another_policy_than_it_is_bound_to(self):
        with pytest.raises(ValueError, match=r"path holds DEER, but the fingerprint is of CoDEStop"):
            calibration(binds=with_policy(BINDS, CoDEStop()))

    def test_cannot_hold_more_losses_than_exits(self):
        with pytest.raises(ValueError, match="3 losses in 2 exits"):
            Setting(DEER(), 2, 3)


class TestWhichCallsItCovers:
    CALL: ClassVar = {
        "engine": "local",
        "system_prompt": "You are helpful.",
        "tools": [{"name": "add"}],
        "answer_form": {"name": "boxed"},
        "sampling": {"temperature": 0.6, "top_p": 0.95},
        "caps": {"thinking_budget": 512},
        "probe": "abc",
    }

    def fingerprint(self, policy=None, **changes):
        return with_policy({**BINDS, **call_fingerprint(**{**self.CALL, **changes})}, policy or LYNX())

    def test_calls_like_its_own(self):
        path = (Setting(Never(), 0, 0), Setting(LYNX(0.9), 5, 0))
        found = calibration(path=path, levels=(Level(0.1, path[1], 0.4),), binds=self.fingerprint())
        same = self.fingerprint(LYNX(0.5), sampling={"top_p": 0.95, "temperature": 0.6})
        assert found.covers(same)
        found.refuse_mismatch(same)

    @pytest.mark.parametrize(
        ("name", "value", "both"),
        [
            ("engine", "vllm", ("local", "vllm")),
            ("sampling", {"temperature": 1.0}, ("0.6", "1.0")),
            ("caps", {"thinking_budget": None}, ("512", "null")),
            ("answer_form", {"name": "choice"}, ("boxed", "choice")),
            ("system_prompt", "You are terse.", ()),
            ("system_prompt", None, ("none",)),
            ("tools", [], ("none",)),
            ("tools", [{"name": "subtract"}], ()),
            ("tools", [{"name": "add", "parameters": {"a": {}, "b": {}}}], ()),
            ("probe", "def", ("abc", "def")),
        ],
    )
    def test_no_others_and_names_both_sides(self, name, value, both):
        path = (Setting(Never(), 0, 0), Setting(LYNX(0.9), 5, 0))
        found = calibration(path=path, levels=(Level(0.1, path[1], 0.4),), binds=self.fingerprint())
        other = self.fingerprint(**{name: value})
        assert not found.covers(other)
        with pytest.raises(ValueError, match=name) as error:
            found.refuse_mismatch(other)
        assert all(side in str(error.value) for side in both)
        assert found.binds[name] in str(error.value)
        assert other[name] in str(error.value)

    @pytest.mark.parametrize(
        ("made", "asked", "name", "both"),
        [
            ({}, {"choice": "any"}, "tools", (" auto, loaded", " any")),
            ({"choice": "any"}, {"choice": "add"}, "tools", (" any, loaded", " add")),
            ({}, {"parallel": False}, "tools", (" auto, loaded", " auto, one call")),
            ({}, {"schema": {"type": "object"}}, "answer_form", ("boxed", "schema")),
            ({"schema": {"type": "object"}}, {"schema": {"type": "array"}}, "answer_form", ()),
            ({"schema": {"enum": [{"a": 1, "b": 2}]}}, {"schema": {"enum": [{"b": 2, "a": 1}]}}, "answer_form", ()),
        ],
    )
    def test_none_that_ask_another_answer(self, made, asked, name, both):
        path = (Setting(Never(), 0, 0), Setting(LYNX(0.9), 5, 0))
        found = calibration(path=path, levels=(Level(0.1, path[1], 0.4),), binds=self.fingerprint(**made))
        assert found.covers(self.fingerprint(**made))
        assert not found.covers(self.fingerprint(**asked))
        with pytest.raises(ValueError, match=f"{name}: made for") as error:
            found.refuse_mismatch(self.fingerprint(**asked))
        assert all(side in str(error.value) for side in both)

    def test_a_tool_choice_without_tools_is_of_no_account(self):
        assert self.fingerprint(tools=[], choice="none") == self.fingerprint(tools=[])

    @pytest.mark.parametrize("name", ["weights", "dtype", "tokenizer", "template", "cues"])
    def test_no_other_model(self, name):
        other = {**calibration().binds, name: "another"}
        with pytest.raises(ValueError, match=f"{name}.*some {name}.*another"):
            calibration().refuse_mismatch(other)

    def test_a_fingerprint_that_lacks_a_name_is_no_match(self):
        lacking = {name: value for name, value in calibration().binds.items() if name != "dtype"}
        assert not calibration().covers(lacking)

    def test_a_probe_that_the_policy_does_not_read_is_of_no_account(self):
        assert self.fingerprint(DEER(), probe="abc") == self.fingerprint(DEER(), probe=None)

    def test_prompts_and_tools_are_kept_as_digests_only(self):
        told = json.dumps(self.fingerprint())
        assert "helpful" not in told
        assert "add" not in told


POLICIES = [
    Never(),
    DEER(0.9),
    DEER(0.9, looks=frozenset({"sentence", "paragraph"})),
    CoDEStop(tau=math.inf),
    LYNX(0.7),
    LYNX(q_safe=0.2, q_unsafe=math.inf),
    EAT(alpha=0.2),
    ThinkBrake(0.5),
    ProbeThenTrial(sure=0.9, ask=0.2),
    AnswerConvergence(k=7),
    GiveUp(signal="p_safe"),
    FirstOf(CoDEStop(), FirstOf(GiveUp(), ThinkBrake())),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_policy_survives_json(policy):
    data = json.loads(json.dumps(policy_to_dict(policy), allow_nan=False))
    again = policy_from_dict(data)
    assert again == policy
    assert isinstance(again, Policy)


def test_fields_that_a_policy_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"DEER does not take these fields: margin"):
        policy_from_dict({"policy": "DEER", "margin": 0.1})


def test_what_is_no_number_or_name_cannot_be_written_down():
    @dataclass(frozen=True)
    class Odd(Patience):
        what: object = None

    with pytest.raises(TypeError, match=r"Odd\.what"):
        policy_to_dict(Odd(what=object()))


def test_the_kind_of_a_policy_is_its_name_without_numbers():
    assert kind_of(DEER(0.9)) == kind_of(replace(DEER(), threshold=0.1)) == "DEER"
    assert kind_of(FirstOf(CoDEStop(), GiveUp())) == "FirstOf(CoDEStop, GiveUp)"
    assert kind_of(DEER(looks=frozenset({"sentence"}))) != "DEER"
