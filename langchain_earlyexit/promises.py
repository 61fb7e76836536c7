"""What a call with `confidence` runs, what may be promised for it, and whether it is audited.

A calibration that was made on another model is refused when the model is loaded. A call that it was not made for
(another system prompt, other tools, sampling hotter) runs the same policy, but nothing is promised for it: its
record says so, and a warning names what differs. A cap on thinking that is tighter than the calibrated one leaves the
promise as it is: what a policy does before the cap it does with and without one, so at most as many answers change,
and where the cap itself ends the thinking nothing is promised.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from langchain_core.messages import BaseMessage

from langchain_earlyexit.answers import AnswerForm
from langchain_earlyexit.asks import FREE, Asks
from langchain_earlyexit.binding import Binding
from langchain_earlyexit.drift import Audit
from langchain_earlyexit.engines.program import Done
from langchain_earlyexit.fingerprint import refuse_mismatch
from langchain_earlyexit.guarantee import Calibration, Level, with_policy
from langchain_earlyexit.messages import role_of
from langchain_earlyexit.policies import Never
from langchain_earlyexit.request import Request
from langchain_earlyexit.settings import Settings, effort_confidence
from langchain_earlyexit.trace import POLICY_REASONS

AUDIT_KEY: Final = "early_exit_audit"
"""Where an audited call's message tells of it, in `response_metadata`."""

CALIBRATION_KEY: Final = "early_exit_calibration"
"""Where a message that carries a guarantee names the calibration it is of, by its digest, in `response_metadata`."""

AUDITS_VARIABLE: Final = "EARLYEXIT_AUDITS"
"""Environment variable: the folder that audits are counted in, for all processes that share it."""

FILE: Final = "calibration.json"
"""The artifact's name within a directory, or a repository of the hub."""

_OF_THE_MODEL: Final = ("weights", "dtype", "tokenizer", "template", "cues", "engine", "probe")
_KEPT: Final = POLICY_REASONS | {"natural"}
_AUDITABLE: Final = _KEPT | {"budget", "length"}


@dataclass(frozen=True)
class Promise:
    """What holds for one call that was asked with a confidence.

    Attributes:
        confidence: the level asked for.
        guarantee: as the exit record carries it; None where the calibration does not cover the call, or where audits
            have shown that it no longer holds.
        audit: where the call is to be counted; None where the coin fell the other way.
        call: what was asked and drawn, for the audit: equal calls are one.
        calibration: digest of the artifact that the guarantee is of.
    """

    confidence: float
    guarantee: Mapping[str, Any] | None = None
    audit: Audit | None = None
    call: str = ""
    calibration: str = ""

    def kept(self, reason: str) -> dict[str, Any] | None:
        """The guarantee of a call whose thinking ended for `reason`: none where a cap or the caller ended it."""
        return dict(self.guarantee) if self.guarantee is not None and reason in _KEPT else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an audit found.

    Attributes:
        would_exit: the check at which the policy would have left; None where it would not have.
        changed: whether the answer there is another one than that of full thinking; None where the caller ended the
            thinking, so that there is nothing to compare with.
        spared: thinking tokens that leaving would have spared.
    """

    would_exit: int | None
    changed: bool | None
    spared: int

    @classmethod
    def of(cls, done: Done, form: AnswerForm) -> Verdict:
        """Of the end of an audited program, see `lanes.audited`."""
        at, full = done.would_exit, done.trace.answer
        if at is None:
            return cls(None, False if done.reason in _AUDITABLE else None, 0)
        check = done.trace.checks[at]
        spared = done.thinking_tokens - check.position
        if done.reason not in _AUDITABLE:
            return cls(at, None, spared)
        early = check.exit_answer
        return cls(at, early is None or full is None or not form.same(early, full), spared)


class Promises:
    """A calibration in service.

    Audits are counted in files, one per level, in a folder that processes share: that named by the environment variable
    `EARLYEXIT_AUDITS`, else `langchain-earlyexit/audits` under `$XDG_STATE_HOME` or `~/.local/state`. The levels share
    the calibration's delta evenly, so the chance that audits ever call it off without cause is at most delta.

    Args:
        calibration: the artifact.
        folder: of the audits, if another than the above.
        efforts: whether the name of an effort asks for a confidence too.

    Raises:
        ValueError: files there that are of another promise or cannot be read.
    """

    def __init__(
        self, calibration: Calibration, folder: str | os.PathLike[str] | None = None, *, efforts: bool = True
    ) -> None:
        self.calibration = calibration
        self._digest = calibration.digest  # of the whole artifact: not anew for every call
        self.efforts = efforts
        self.folder = _audits_folder() if folder is None else Path(folder)
        share = calibration.delta / len(calibration.levels)
        # Full thinking is no judge of who is right, and no call comes with the right answer.
        auditable = calibration.levels if calibration.loss == "answer_changed" else ()
        self._audits = {level.epsilon: self._audit(level, share) for level in auditable}
        self._lock = threading.Lock()
        self._warned: set[frozenset[str]] = set()

    def refuse_other_model(self, bound: Binding) -> None:
        """Refuse a model that the calibration was not made on.

        Raises:
            ValueError: naming what differs, both sides of it.
        """
        refuse_other_model("the calibration", self.calibration.binds, bound, "leave out calibration")

    def request(
        self, bound: Binding, messages: Sequence[BaseMessage], settings: Settings, asks: Asks = FREE
    ) -> tuple[Request, Promise | None]:
        """The request for one call, and what is promised for it; no promise where no confidence is asked for.

        Raises:
            ValueError: a confidence that no level serves, an audit of what cannot be audited, or what
                `Binding.request` raises.
            OSError: audits that cannot be written down.
        """
        confidence = self._confidence(settings)
        if confidence is None:
            return bound.request(messages, settings, asks), None
        level = self.calibration.level(confidence)
        audit = self._audits.get(level.epsilon)
        if settings.audit_rate:
            self._refuse_uncountable(settings.audit_rate)
        if audit is not None and not audit.believable:
            thinking = replace(settings, exit_policy=Never(), confidence=None)
            return bound.request(messages, thinking, asks), Promise(confidence)
        served = replace(settings, exit_policy=level.policy, confidence=None)
        request = bound.request(messages, served, asks)
        actual = self._fingerprint(bound, messages, served, request, asks)
        if not self.calibration.covers(actual):
            loosened = replace(request, budget=self._loosest(request.budget))
            actual = self._fingerprint(bound, messages, served, loosened, asks)
            audit = None  # of the calls under a tighter cap some end before they can be judged: their rate is another
        if not self.calibration.covers(actual):
            self._warn(level, actual)
            return request, Promise(confidence)
        leaves = request.thinking and level.policy != Never()
        if audit is not None and not (leaves and audit.tossed(request.seed, str(request.prompt), settings.audit_rate)):
            audit = None
        call = "" if audit is None else f"{request.prompt} {request.seed if request.sampling.temperature else 0}"
        return request, Promise(confidence, self.calibration.guarantee(level), audit, call, self._digest)

    def _audit(self, level: Level, delta: float) -> Audit:
        path = self.folder / f"{self._digest}-{level.epsilon!r}.json"
        return Audit(path, level.epsilon, delta, artifact=self._digest)

    def _refuse_uncountable(self, rate: float) -> None:
        """At every call that may be audited, not after the few that are: their answers would be lost."""
        if not self._audits:
            raise ValueError(
                f"audit_rate={rate:g} cannot audit a calibration for {self.calibration.loss!r}: no call comes with the "
                "right answer. Leave it out, or calibrate for 'answer_changed'"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(
                f"audits are counted in {self.folder}, which cannot be written; name another folder by the environment "
                f"variable {AUDITS_VARIABLE}, or leave out audit_rate={rate:g}"
            )

    def _confidence(self, settings: Settings) -> float | None:
        """What was asked for, be it by the name of an effort; an effort beyond all levels thinks to the end."""
        preset = effort_confidence(settings) if self.efforts else None
        if preset is None:
            return settings.confidence
        return preset if self.calibration.serves(preset) else None

    def _fingerprint(
        self, bound: Binding, messages: Sequence[BaseMessage], settings: Settings, request: Request, asks: Asks
    ) -> dict[str, str]:
        # A level that certified nothing but Never() is one of its path like any other.
        told = with_policy(bound.call_fingerprint(messages, settings, request, asks), self.calibration.path[-1].policy)
        roles = [role for message in messages if (role := role_of(message)) != "system"]
        if roles != ["user"]:  # questions are collected one by one: what an answer changes in the next is not known
            told["system_prompt"] += ", and a conversation before the question"
        return told

    def _loosest(self, cap: int | None) -> int | None:
        """The calibrated cap on thinking, where `cap` is a tighter one."""
        calibrated: int | None = json.loads(self.calibration.binds["caps"])["thinking"]
        return calibrated if cap is not None and (calibrated is None or cap < calibrated) else cap

    def _warn(self, level: Level, actual: Mapping[str, str]) -> None:
        """Say that nothing is promised for such calls, and why; once for all that differ in the same things."""
        differs = frozenset(name for name, value in self.calibration.binds.items() if actual.get(name) != value)
        with self._lock:
            if differs in self._warned:
                return
            self._warned.add(differs)
        try:
            self.calibration.refuse_mismatch(actual)
        except ValueError as error:
            warnings.warn(f"{level.policy!r} runs, but such calls are promised nothing: {error}", stacklevel=2)


def refuse_other_model(artifact: str, binds: Mapping[str, str], bound: Binding, without: str) -> None:
    """Refuse a model that an artifact of whole calls was not made on.

    Args:
        artifact: what it is, for the message.
        binds: the fingerprint of its calls.
        bound: the model.
        without: what to do to go on without it, for the message.

    Raises:
        ValueError: naming what differs, both sides of it.
    """
    actual = {
        **bound.fingerprint,
        "engine": bound.engine.name,
        "probe": bound.probe_digest or "none",
    }
    named = {name: binds[name] for name in _OF_THE_MODEL if name != "probe" or binds["probe"] != "none"}
    try:
        refuse_mismatch(artifact, named, actual)
    except ValueError as error:
        raise ValueError(f"{error}. Calibrate on this model, load that one, or {without}") from None


def refuse_unserved(settings: Settings, calibration: object) -> None:
    """Refuse a confidence, or audits, where there is no calibration.

    Raises:
        ValueError: saying how to get one, and what to do without.
    """
    if calibration is not None:
        return
    if settings.confidence is not None:
        raise ValueError(
            f"confidence={settings.confidence} needs a calibration of this model and policy, and none is given: pass "
            "calibration=, a file or hub id (`earlyexit collect` and `earlyexit calibrate` make one). Or set "
            "exit_policy with a threshold of its own, for example DEER(threshold=0.95), which promises nothing"
        )
    if settings.audit_rate:
        raise ValueError(
            f"audit_rate={settings.audit_rate:g} audits what a calibration promises, and none is given: pass "
            "calibration= and confidence=, or leave it out"
        )


def load_calibration(where: Any, *, token: str | None = None) -> Calibration:
    """A calibration from a file, a directory or the Hugging Face hub; one that is loaded already is handed back.

    Args:
        where: a `Calibration`, a JSON file, a directory that holds `calibration.json`, or a hub id such as
            "you/your-calibration".
        token: for private repositories.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a calibration, or a hub id that cannot be read.
        TypeError: neither of these.
    """
    if isinstance(where, Calibration):
        return where
    if not isinstance(where, str | os.PathLike):
        raise TypeError(f"calibration must be a file, a hub id or a Calibration, not {type(where).__name__}")
    name = os.fspath(where)
    path = Path(name).expanduser()
    if path.is_file() or (path / FILE).is_file():
        return Calibration.load(path if path.is_file() else path / FILE)
    if path.is_dir() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix:
        raise FileNotFoundError(
            f"no calibration at {name!r}: give its file, a directory that holds {FILE}, or a hub id such as "
            "'you/calibration'"
        )
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(name, FILE, token=token)
    except OSError as error:
        raise ValueError(
            f"cannot load a calibration from {name!r}: {error}. Give a file, or a hub id that holds {FILE} (with "
            "network or a filled cache)"
        ) from error
    return Calibration.load(found)


def _audits_folder() -> Path:
    told = os.environ.get(AUDITS_VARIABLE)
    if told:
        return Path(told).expanduser()
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "langchain-earlyexit" / "audits"
