"""Which answers are right, and which are the same, each pair graded once."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_earlyexit.answers import graded_form
from langchain_earlyexit.lab.grade import grade_all
from langchain_earlyexit.trace import Trace


class Judge:
    """Grades answers of one form, and remembers: thousands of settings give the same few answers.

    Args:
        form: name of the answer form, as a collection's meta tells it.

    Raises:
        ValueError: a form that cannot be graded.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self._same = graded_form(form).same
        self._right: dict[tuple[str | None, str], bool] = {}

    def learn(self, pairs: Iterable[tuple[str | None, str]]) -> None:
        """Grade (answer, gold) pairs together: much faster than one by one where it takes computer algebra."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._right]
        self._right.update(zip(new, grade_all(new, self.form), strict=True))

    def learn_traces(self, traces: Iterable[Trace]) -> None:
        """`learn` of all that these traces answer."""
        self.learn(
            (answer, trace.gold)
            for trace in traces
            if trace.gold is not None
            for answer in (trace.answer, *(check.exit_answer for check in trace.checks))
        )

    def right(self, answer: str | None, gold: str) -> bool:
        """Whether the answer is the gold one."""
        if (answer, gold) not in self._right:
            self.learn([(answer, gold)])
        return self._right[answer, gold]

    def same(self, one: str | None, other: str | None) -> bool:
        """Whether two answers of the model are one; no answer is the same as none."""
        return self._same(one, other)
