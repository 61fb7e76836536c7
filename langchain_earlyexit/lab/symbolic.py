r"""Computer algebra in processes of its own: math-verify can take for ever, and its timeouts break in threads.

A worker is this module run by a fresh interpreter. It reads one JSON line per question and answers with one, so a
worker that hangs or dies costs one question: it is ended and another one takes its place. Nothing is pickled.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, Any, Final

from langchain_earlyexit.lab.compare import same, unknown
from langchain_earlyexit.lab.notation import DEGREE
from langchain_earlyexit.lab.shapes import readings

try:
    import resource
except ImportError:  # not a POSIX system: no limits but the clock of the one that asks
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_PATIENCE: Final = 10
_MEMORY: Final = 4 * 2**30  # bytes a worker may take: 9^{9^{9^9}} must not take the machine's


class Algebraists:
    """A bounded set of workers, each started when it is first needed.

    Args:
        workers: most processes at once; by default as many as there are processors, up to 4.
        seconds: most processor time for one pair; a pair that takes longer counts as unequal, with a warning. So a
            verdict does not hang on what else the machine does. (Where the system keeps no such limit, and beyond
            ten times as long in any case, it is the time on the clock.)
    """

    def __init__(self, workers: int | None = None, seconds: float = 10.0) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"at least 1 worker is needed, got {workers}")
        if seconds <= 0:
            raise ValueError(f"a pair needs more than 0 seconds, got {seconds}")
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.seconds = seconds
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last one back is the first one out: few start
        for _ in range(self.workers):
            self._idle.put(_Worker())

    def same(self, gold: str, answer: str) -> bool:
        """Whether two answers are the same, by computer algebra. Safe in any thread; blocks while all workers work.

        Raises:
            ImportError: math-verify is not installed.
            RuntimeError: a worker does not start.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                f"{answer!r} and {gold!r} can only be compared by computer algebra, which needs math-verify: "
                "pip install 'langchain-earlyexit[lab]'"
            )
        worker = self._idle.get()
        try:
            return worker.ask(gold, answer, self.seconds)
        finally:
            self._idle.put(worker)

    def same_all(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """`same` of each (gold, answer), in order, all workers at once."""
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="grade")
        try:
            return list(threads.map(lambda pair: self.same(*pair), pairs))
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End the workers that are idle. They start again when needed."""
        for _ in range(self._idle.qsize()):
            worker = self._idle.get()
            worker.end()
            self._idle.put(worker)


class _Worker:
    """One process, or none yet. Used by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str, seconds: float) -> bool:
        try:
            reply = self._reply(json.dumps([gold, answer, seconds]), seconds)
        except BaseException:
            self.end()  # else its answer to this question would be read as that to the next
            raise
        if isinstance(reply, bool):
            return reply
        logger.warning("graded as unequal: %.80r and %.80r (%s)", answer, gold, reply)
        return False

    def _reply(self, question: str, seconds: float) -> bool | str:
        """The worker's verdict, or why there is none."""
        if self._process is not None and self._process.poll() is not None:
            self.end()
        process = self._process or self._started()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        alarm = threading.Timer(seconds * (_PATIENCE if resource else 1), stop)
        alarm.start()
        try:
            asked, told = _pipe(process.stdin), _pipe(process.stdout)
            asked.write(question + "\n")
            asked.flush()
            line = told.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
            alarm.join()
        if late.is_set() or not line:
            self.end()
        if line.endswith("\n"):
            reply: bool | str = json.loads(line)
            return reply
        if late.is_set() or (resource and process.returncode == -signal.SIGXCPU):
            return f"took over {seconds:g} s"
        return f"the process that compared them ended with status {process.returncode}"

    def _started(self) -> subprocess.Popen[str]:
        code = "from langchain_earlyexit.lab.symbolic import serve; serve()"
        # the worker finds the package where this process did; -P: and not by chance in the directory it runs in
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(  # noqa: S603 (this interpreter, this code)
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._process = process
        if _pipe(process.stdout).readline() != "ready\n":
            raise RuntimeError(
                f"the process for computer algebra ended before it was ready: {sys.executable} -c {code!r}"
            )
        return process

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes the pipes and waits
                pass


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process for computer algebra has no pipe")
    return stream


# In the worker. -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer lines `[gold, answer, seconds]` of JSON with `true`, `false` or why neither, until the input ends.

    Where the system can, the process is ended by it when a pair takes more than its seconds of processor time: the one
    that asked may be gone, and arithmetic on huge numbers lets no thread or signal handler run.
    """
    _limit("RLIMIT_AS", _MEMORY)
    logging.disable(logging.WARNING)  # math-verify warns that its own timeout is off
    algebra("x+x", "2x")  # loads and warms up all it needs, before the clock of the first question runs
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        _limit("RLIMIT_CPU", math.ceil(time.process_time() + seconds) + 1)
        try:
            reply: bool | str = any(same(one, other, algebra) for one in readings(gold) for other in readings(answer))
        except Exception as error:  # noqa: BLE001 (said to the caller, who warns; the next pair is another matter)
            reply = f"{type(error).__name__}: {error}"
        print(json.dumps(reply), flush=True)


def _limit(name: str, most: int) -> None:
    if resource:
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def algebra(gold: str, answer: str, *, as_equations: bool = False) -> bool:
    """Whether two expressions are equal, or two equations have the same solutions, as far as sympy can tell."""
    if (known := unknown(gold, answer)) is not None:
        return known
    one, other = _parsed(gold), _parsed(answer)
    if one is None or other is None:
        return False
    if as_equations:
        import sympy

        ratio = sympy.simplify(one.doit() / other.doit())
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    from math_verify import verify

    # Its defaults round to 6 digits. Decimals are fractions here, so what is left to round is the noise of 30 digits.
    return bool(verify(one, other, float_rounding=20, numeric_precision=30, timeout_seconds=None))


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any | None:
    """The sympy expression of cleaned LaTeX; None if it is not one."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = re.sub(r"(?<![\d.}])(\d+)(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)  # a mixed number
    text = re.sub(r"(?<![_^\d.])(\d+)\(", r"\1\\cdot(", text)  # the grammar takes 2(3) for one, too
    if r"\int" not in text:
        text = re.sub(r"(\\[A-Za-z]+)|d(?=[A-Za-z])", lambda m: m.group(1) or "{d}", text)  # no differential dx
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)", _as_fraction, text).replace(DEGREE, r"\cdot\frac{\pi}{180}")
    try:
        parsed = latex2sympy(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False),
        )
    except Exception as error:  # noqa: BLE001 (its grammar raises whatever it likes; no expression is an answer)
        logger.debug("not an expression: %r (%s)", text, error)
        return None
    if not isinstance(parsed, sympy.Expr):
        return None
    return parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})


def _as_fraction(decimal: re.Match[str]) -> str:
    whole, part = decimal.groups()
    return rf"\frac{{{int(whole + part)}}}{{{10 ** len(part)}}}"
