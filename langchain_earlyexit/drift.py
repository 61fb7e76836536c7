"""Whether a promise still holds on the calls that really come: audits, and a bet against the promise.

A share of the calls, tossed before the call, thinks to the end; what leaving early would have answered is held
against the answer of full thinking. Under the promise a change has a chance of at most epsilon, whatever came before.
So a gambler who starts with 1 and bets on changes at odds that are fair for epsilon has, at any time, at most 1 to
be expected: the chance that the wealth ever reaches 1 / delta is at most delta (Ville's inequality). When it does, the
promise is given up. One may look after every audit, for ever.

The gambler splits the first coin over many rates q above epsilon and with each part bets that q is the true rate:
each audit multiplies that part by q / epsilon for a change, by (1 - q) / (1 - epsilon) for none. The wealth then
depends on two counts alone, which is all that is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike, NDArray

FORMAT: Final = "earlyexit-audit"
VERSION: Final = 1

_RATES: Final = 64
_LOCK_SECONDS: Final = 30
_MARK: Final = 8
"""Bytes that stand for a call."""


def log_wealth(audits: ArrayLike, changed: ArrayLike, epsilon: float) -> NDArray[np.float64]:
    """Natural logarithm of the gambler's wealth.

    Args:
        audits: how many there were (any shape).
        changed: in how many of them the answer would have changed (a shape that goes with it).
        epsilon: the promised rate, in (0, 1).

    Returns:
        Of the common shape; 0 before the first audit.
    """
    hits, all_ = np.asarray(changed, dtype=np.float64), np.asarray(audits, dtype=np.float64)
    # Rates in equal ratios from epsilon to 1: as much of the coin on slight breaches as on gross ones.
    q = epsilon ** (1 - (np.arange(_RATES) + 0.5) / _RATES)
    parts = hits[..., None] * np.log(q / epsilon) + (all_ - hits)[..., None] * np.log((1 - q) / (1 - epsilon))
    return np.asarray(np.logaddexp.reduce(parts, axis=-1) - math.log(_RATES), dtype=np.float64)


@dataclass(frozen=True)
class Counts:
    """What is on disk: audits, how many of them changed the answer, and whether the promise was ever given up."""

    audits: int = 0
    changed: int = 0
    given_up: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.changed <= self.audits:
            raise ValueError(f"{self.changed} changed answers in {self.audits} audits cannot be")


class Audit:
    """Audits of one promise: tosses the coin, counts, and tells whether the promise is still to be believed.

    A call that was counted before says nothing new: equal calls come to equal answers, and whoever asks one twice would
    bet on what is known. So each is counted once; which have been is kept beside the file, 8 bytes each.

    The file is shared by all processes that serve the promise, and safe to share: written whole, under a lock. False
    alarms: if the true rate is at most epsilon, the chance that the promise is ever given up is at most delta over the
    whole life of the file. Serving several levels, give each its own file and a share of delta. That the calibration
    itself was unlucky (its own delta) comes on top: then an alarm is right.

    How soon an alarm comes depends on how gross the breach is. At epsilon = delta = 0.05, nineteen of twenty streams
    raise it within 40 audits when the true rate is 0.3, within 160 when it is 0.15, within 560 when it is 0.1 (half of
    them within 10, 50 and 170). Where one call in ten is audited, that is ten times as many calls.

    A promise about right answers (`lost_correct`) cannot be audited: no call comes with the right answer.

    Once given up, a promise stays so until it is calibrated again: delete the file to begin anew (what was counted is
    forgotten with it).

    Args:
        path: the file, made with the first audit.
        epsilon: the promised rate of changed answers, in (0, 1).
        delta: chance of a false alarm, in (0, 1).
        artifact: digest of the calibration; a file of another one is refused.

    Raises:
        ValueError: a number out of range, or a file that is of another promise or cannot be read.
    """

    def __init__(self, path: str | Path, epsilon: float, delta: float, *, artifact: str = "") -> None:
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        self.path = Path(path)
        self.epsilon = epsilon
        self.delta = delta
        self.artifact = artifact
        self._seen: tuple[int, int, int] | None = None
        self._counts = Counts()
        self._warned = False
        self._refresh()

    @staticmethod
    def tossed(seed: int, call: str, rate: float) -> bool:
        """Whether to audit the call with this seed: decided by the arguments alone, so equal calls come out equal.

        Args:
            seed: the call's.
            call: what else tells the call apart, such as its prompt: where every call has the same seed, the seed
                alone would audit all of them or none.
            rate: share of such calls to audit, in [0, 1].
        """
        digest = hashlib.blake2b(f"audit {seed} {call}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) < rate * 2**64

    def observe(self, changed: bool, call: str) -> None:
        """Count one audit. Blocks for the file's lock: from async code, call it in a thread.

        Args:
            changed: leaving early would have given another answer. False also where the policy would not have left.
            call: what was asked and with which randomness; one that was counted before is not counted again.

        Raises:
            filelock.Timeout: another process held the lock for half a minute.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
            # Not from memory, where a thread that asks `believable` may just be putting what it read before this lock.
            begun = self.path.exists()
            old = self._read() if begun else Counts()
            if not self._new(call, begun=begun):
                return
            audits, hits = old.audits + 1, old.changed + bool(changed)
            alarm = float(log_wealth(audits, hits, self.epsilon)) >= -math.log(self.delta)
            self._write(Counts(audits, hits, old.given_up or alarm))
        self._refresh()
        self._warn_once()

    def _new(self, call: str, *, begun: bool) -> bool:
        """Whether a call is counted for the first time. It is noted before it is counted, so that none counts twice."""
        path = self.path.with_suffix(".calls")
        mark = hashlib.blake2b(call.encode("utf-8", "surrogatepass"), digest_size=_MARK).digest()
        known = path.read_bytes() if begun and path.exists() else b""
        whole = len(known) // _MARK * _MARK
        if whole and np.any(np.frombuffer(known[:whole], dtype=np.uint64) == np.frombuffer(mark, dtype=np.uint64)):
            return False
        with path.open("r+b" if known else "wb") as file:
            file.seek(whole)  # over what a crash cut short
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        return True

    @property
    def believable(self) -> bool:
        """False once the promise was given up, by this process or another. Warns the first time it is."""
        self._refresh()
        self._warn_once()
        return not self._counts.given_up

    @property
    def counts(self) -> Counts:
        """Audits so far, of all processes."""
        self._refresh()
        return self._counts

    def _refresh(self) -> None:
        """Read the file if it is another than the one read last: one `stat` where it is not."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._counts = None, Counts()
            return
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            self._counts = self._read()
            self._seen = seen

    def _read(self) -> Counts:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("no JSON object")
            counts = Counts(**{name: data.pop(name) for name in asdict(Counts())})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is no audit file ({error}); delete it to begin anew") from error
        mine = self._promise()
        differs = [f"{name} {data.get(name)!r}, not {mine[name]!r}" for name in mine if data.get(name) != mine[name]]
        if differs:
            raise ValueError(
                f"{self.path} holds audits of another promise ({'; '.join(differs)}); give this one a path of its own, "
                "or delete the file to begin anew"
            )
        return counts

    def _promise(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "artifact": self.artifact,
        }

    def _write(self, counts: Counts) -> None:
        """Whole or not at all, also when the process dies meanwhile."""
        text = json.dumps({**self._promise(), **asdict(counts)}, allow_nan=False) + "\n"
        # Not by `tempfile`, whose files are their owner's alone: other users' processes may share the promise.
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _warn_once(self) -> None:
        if self._counts.given_up and not self._warned:
            self._warned = True
            warnings.warn(
                f"early exit is off: of {self._counts.audits} audited calls, {self._counts.changed} would have got "
                f"another answer, which is not to be believed of a rate of {self.epsilon:g} (false alarms: at most "
                f"{self.delta:g}). The questions are no longer those that were calibrated on; calibrate again. Audits: "
                f"{self.path}",
                stacklevel=3,
            )
