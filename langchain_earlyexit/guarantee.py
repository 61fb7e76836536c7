"""What a calibration promises, and for which calls: the artifact that `confidence=` is served from.

Plain data, read at run time: nothing here computes statistics (the lab does) or knows of models. With probability at
least 1 - delta over the calibration questions drawn, every level in the artifact holds: for at most a share epsilon
of new questions of the same kind does leaving early give another answer than full thinking would have given. The
promise is for calls like those it was calibrated on, which is what fingerprints are compared for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

from langchain_earlyexit.fingerprint import digest, refuse_mismatch
from langchain_earlyexit.policies import Policy
from langchain_earlyexit.policy_json import exactly, kind_of, policy_from_dict, policy_to_dict

FORMAT: Final = "earlyexit-calibration"
VERSION: Final = 1

LOSSES: Final = ("answer_changed", "lost_correct")
"""What a level bounds: the share of questions whose answer is another one, or whose right answer became wrong."""

_SLACK: Final = 1e-9
"""1 - 0.9 is not 0.1 in binary; no two levels that anyone means are this close."""

BOUND: Final = (
    *("weights", "dtype", "tokenizer", "template", "cues"),
    *("engine", "system_prompt", "tools", "answer_form", "sampling", "caps", "policy", "probe"),
)
"""What a promise is bound to: the model's own fingerprint, the call's (`call_fingerprint`) and the policy's kind."""


def call_fingerprint(
    *,
    engine: str,
    system_prompt: str | None,
    tools: Sequence[Mapping[str, Any]],
    answer_form: Mapping[str, Any],
    sampling: Mapping[str, Any],
    caps: Mapping[str, int | str | None],
    probe: str | None = None,
    choice: str = "auto",
    parallel: bool = True,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What of a call a promise depends on, beside the model's own fingerprint and the policy.

    Prompts, tools and schemas are kept as digests only. What is asked of the tools stands beside their digest, and the
    schema's in the answer form.

    Args:
        engine: engine and path.
        system_prompt: its text; none and an empty one are the same.
        tools: their schemas, in the order in which the model is shown them.
        answer_form: name and fields of the form, and whether a trial answer is taken as the answer.
        sampling: temperature, filters, and what else changes the tokens that are drawn, the seed aside.
        caps: the cap on thinking tokens, and others that may cut a call short, None for none; and a digest of what is
            said at the cap, where that is not the family's own.
        probe: digest of the hidden-state head, where one is loaded.
        choice: which of the tools an answer may or must call, as `Asks` has it.
        parallel: whether it may hold several calls.
        schema: of an answer that must be JSON, as the model is shown it; the order of its properties counts.
    """
    asked = f"{_digest_as_shown(tools)} {choice}{'' if parallel else ', one call'}"
    form = dict(answer_form) if schema is None else {**answer_form, "schema": _digest_as_shown(schema)}
    return {
        "engine": engine,
        "system_prompt": digest(system_prompt) if system_prompt else "none",
        "tools": asked if tools else "none",
        "answer_form": _canonical(form),
        "sampling": _canonical(sampling),
        "caps": _canonical(caps),
        "probe": "none" if probe is None else probe,
    }


def with_policy(fingerprint: Mapping[str, str], policy: Policy) -> dict[str, str]:
    """`fingerprint` for `policy`, or any other setting of its path; the probe counts only where the policy reads it."""
    probe = {} if "p_safe" in policy.needs else {"probe": "none"}
    return {**fingerprint, **probe, "policy": kind_of(policy)}


@dataclass(frozen=True)
class Setting:
    """One policy of a path, and what it did on the calibration questions.

    Attributes:
        policy: with all its fields.
        exits: questions in which it left early.
        losses: of those, how many at a loss.
    """

    policy: Policy
    exits: int
    losses: int

    def __post_init__(self) -> None:
        if not 0 <= self.losses <= self.exits:
            raise ValueError(f"a loss needs an exit, but there are {self.losses} losses in {self.exits} exits")


@dataclass(frozen=True)
class Level:
    """One certified level.

    Attributes:
        epsilon: bound on the share of questions at a loss, in (0, 1).
        setting: the boldest that was certified. `Never()` where none that leaves early was.
        bound_when_left: upper bound on the share of losses among the questions that it leaves early. Epsilon is a
            share of all questions, and says little about the early answers where few questions are left early. It
            holds with probability 1 - delta for all settings of the path together, beside the levels. 1 where the
            setting never left.
    """

    epsilon: float
    setting: Setting
    bound_when_left: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must lie in (0, 1), got {self.epsilon}")
        if not 0 <= self.bound_when_left <= 1:
            raise ValueError(f"a bound on a share lies in [0, 1], got {self.bound_when_left}")

    @property
    def policy(self) -> Policy:
        """The policy to run."""
        return self.setting.policy


@dataclass(frozen=True)
class Calibration:
    """The artifact: levels, how they were found, and what they hold for.

    Attributes:
        loss: one of `LOSSES`.
        delta: chance that some level does not hold, all levels together; in (0, 1).
        questions: how many it was calibrated on.
        path: every setting that was tried, from never leaving to bold.
        levels: from the strictest epsilon to the loosest.
        binds: the fingerprint of the calls that the questions were asked with: a text for each name of `BOUND`.
        full_again: questions answered a second time by full thinking with another seed, and how many of them got
            another answer than the first time; None where that was not tried. What full thinking itself changes is
            the yardstick for epsilon.

    Raises:
        ValueError: levels out of order, none at all, or numbers that cannot be.
    """

    loss: str
    delta: float
    questions: int
    path: tuple[Setting, ...]
    levels: tuple[Level, ...]
    binds: Mapping[str, str]
    full_again: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")
        if not self.levels:
            raise ValueError("a calibration without a level serves nothing")
        if any(a.epsilon >= b.epsilon for a, b in pairwise(self.levels)):
            raise ValueError("levels must come from the strictest epsilon to the loosest, each once")
        if any(setting.exits > self.questions for setting in self.path):
            raise ValueError(f"a setting cannot leave more often than there are questions, {self.questions}")
        if any(level.setting not in self.path for level in self.levels):
            raise ValueError("a level's setting is not on the calibration's path")
        exactly("fingerprint of a calibration", self.binds, BOUND)
        odd = sorted({kind_of(setting.policy) for setting in self.path} - {"Never", self.binds["policy"]})
        if odd:
            raise ValueError(f"the path holds {', '.join(odd)}, but the fingerprint is of {self.binds['policy']}")

    @property
    def digest(self) -> str:
        """Stands for the whole artifact: what else is kept for it on disk names it by this."""
        return digest(self.to_json())

    def covers(self, actual: Mapping[str, str]) -> bool:
        """Whether the promise is for calls with this fingerprint."""
        return all(actual.get(name) == value for name, value in self.binds.items())

    def refuse_mismatch(self, actual: Mapping[str, str]) -> None:
        """Raise ValueError, naming all that differs with both values, unless the promise is for such calls."""
        try:
            refuse_mismatch("the calibration", self.binds, actual)
        except ValueError as error:
            raise ValueError(
                f"{error}. Calibrate again with these settings, go back to those, or leave out confidence"
            ) from None

    def serves(self, confidence: float) -> bool:
        """Whether some level here is at least as strict as `confidence`."""
        return self.levels[0].epsilon <= 1 - confidence + _SLACK

    def level(self, confidence: float) -> Level:
        """The level that serves `confidence`, 1 - epsilon: the loosest that is at least as strict.

        Raises:
            ValueError: confidence outside (0, 1), or stricter than every level here.
        """
        if not 0 < confidence < 1:
            raise ValueError(
                f"confidence must lie in (0, 1), got {confidence}: it is 1 - epsilon, and no finite number of "
                "questions shows that early exits never change an answer"
            )
        epsilon = 1 - confidence
        serving = [level for level in self.levels if level.epsilon <= epsilon + _SLACK]
        if not serving:
            held = ", ".join(f"{1 - level.epsilon:g}" for level in self.levels)
            raise ValueError(
                f"confidence={confidence:g} asks for more than this calibration has certified ({held}). Ask for one "
                f"of these, or calibrate again with epsilon={epsilon:.3g} among the levels"
            )
        return serving[-1]

    def guarantee(self, level: Level) -> dict[str, Any]:
        """`level` as the exit record carries it."""
        return {"kind": self.loss, "epsilon": level.epsilon, "delta": self.delta, "n": self.questions}

    def to_json(self) -> str:
        """Strict JSON, the same for equal calibrations."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "loss": self.loss,
                "delta": self.delta,
                "questions": self.questions,
                "full_again": None if self.full_again is None else list(self.full_again),
                "levels": [
                    {
                        "epsilon": level.epsilon,
                        "setting": self.path.index(level.setting),
                        "bound_when_left": level.bound_when_left,
                    }
                    for level in self.levels
                ],
                "path": [
                    {"policy": policy_to_dict(setting.policy), "exits": setting.exits, "losses": setting.losses}
                    for setting in self.path
                ],
                "binds": dict(self.binds),
            },
            ensure_ascii=False,
            allow_nan=False,
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, own: Sequence[type[Policy]] = ()) -> Self:
        """The inverse of `to_json`.

        Args:
            text: the artifact.
            own: policy classes of your own that it may hold.

        Raises:
            ValueError: not a calibration, one of another version, or one that contradicts itself.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"this is no calibration: its format is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ValueError(
                f"this calibration is of version {data.get('version')!r}, but version {VERSION} is read here; "
                "calibrate again, or install the release that wrote it"
            )
        try:
            return cls._from_dict(data, own)
        except TypeError as error:
            raise ValueError(f"this calibration holds values of wrong types: {error}") from error

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], own: Sequence[type[Policy]]) -> Self:
        names = ("format", "version", "loss", "delta", "questions", "full_again", "levels", "path", "binds")
        exactly("calibration", data, names)
        path = []
        for row in data["path"]:
            exactly("setting", row, ("policy", "exits", "losses"))
            path.append(Setting(policy_from_dict(row["policy"], own), row["exits"], row["losses"]))
        levels = []
        for row in data["levels"]:
            exactly("level", row, ("epsilon", "setting", "bound_when_left"))
            if row["setting"] not in range(len(path)):
                raise ValueError(f"a level is of setting {row['setting']!r}, but the path has {len(path)}")
            levels.append(Level(row["epsilon"], path[row["setting"]], row["bound_when_left"]))
        again = data["full_again"]
        if again is not None and len(again) != 2:
            raise ValueError(f"full_again is two counts, got {again!r}")
        return cls(
            loss=data["loss"],
            delta=data["delta"],
            questions=data["questions"],
            path=tuple(path),
            levels=tuple(levels),
            binds=data["binds"],
            full_again=None if again is None else (again[0], again[1]),
        )

    def save(self, path: str | Path) -> None:
        """Write the artifact to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, own: Sequence[type[Policy]] = ()) -> Self:
        """Read an artifact. Errors as `from_json`, naming the file; FileNotFoundError where there is none."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), own)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _digest_as_shown(value: Any) -> str:
    """A digest that tells two orders of keys apart: a model reads, and a grammar asks for, the one that was given."""
    return digest(json.dumps(value, ensure_ascii=False))


def _canonical(value: Any) -> str:
    """JSON that does not depend on the order in which keys were given."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(", ", ": "))
