"""Puts programs through an executor so that what fails costs no more than the rows that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nsteer.errors import ExecutionError, OutOfMemoryError, RemoteTimeoutError
from nsteer.executors import Executor
from nsteer.program.form import Form, Program, Readouts, halves, size

TOO_BIG = (OutOfMemoryError, RemoteTimeoutError)
"""Errors that fewer rows at once may avoid."""

ALONE = 3
"""Rows of a form that failed one at a time, none having come back, after which the form itself is held to be broken."""


@dataclass
class Results:
    """What came of rows, by their keys. A row in neither was not run, because the run was told to stop."""

    readouts: dict[Any, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Any, ExecutionError] = field(default_factory=dict)


class Splitting:
    """Programs that fail are put through again in halves, down to the rows that fail alone.

    A program that is too big teaches how big one of its form may be; later ones are cut to that before they run.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.max_tokens: dict[Form, int] = {}  # padded tokens that a program of the form may have
        self.good: set[Form] = set()  # forms of which something came back
        self.alone: dict[Form, int] = {}  # rows that failed alone

    def budget(self, form: Form, tokens: int) -> int:
        """How many padded tokens a program of the form may have, when the plan allows `tokens`."""
        return min(tokens, self.max_tokens.get(form, tokens))

    def map(
        self, executor: Executor, programs: Iterable[Program]
    ) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        """Each program, or smaller ones of its rows, with what came back; an error only for rows that failed."""
        for program, readouts in executor.map(self.fitting(programs)):
            yield from self._settled(executor, program, readouts)

    def fitting(self, programs: Iterable[Program]) -> Iterator[Program]:
        """The programs, cut where they are known to be too big."""
        for program in programs:
            if program.rows > 1 and size(program) > self.max_tokens.get(program.form, size(program)):
                yield from self.fitting(halves(program))
            else:
                yield program

    def _settled(
        self, executor: Executor, program: Program, readouts: Readouts | ExecutionError
    ) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        if not isinstance(readouts, ExecutionError):
            self.good.add(program.form)
            yield program, readouts
            return
        if program.rows == 1:
            yield program, self._alone(program, readouts)
            return
        if self._broken(program.form):
            yield program, readouts
            return
        if isinstance(readouts, TOO_BIG):
            self._learn(program, readouts)
        for half in halves(program):
            for smaller in self.fitting([half]):
                for done, again in executor.map([smaller]):
                    yield from self._settled(executor, done, again)

    def _learn(self, program: Program, error: ExecutionError) -> None:
        larger = halves(program)[0]
        if size(larger) < self.max_tokens.get(program.form, size(program)):
            self.max_tokens[program.form] = size(larger)
            why = "out of memory" if isinstance(error, OutOfMemoryError) else "too long for the server"
            self.say(f"{why} with {program.rows} rows: halved to {larger.rows} rows")

    def _alone(self, program: Program, error: ExecutionError) -> ExecutionError:
        if not isinstance(error, TOO_BIG):
            self.alone[program.form] = self.alone.get(program.form, 0) + 1
            return error
        tokens = size(program)
        return type(error)(
            f"{error}: one row of {tokens} tokens, those to be generated counted, is too much. Lower "
            "generate.max_new_tokens, shorten the text, read fewer layers, take a smaller dtype or a larger device"
        )

    def _broken(self, form: Form) -> bool:
        return form not in self.good and self.alone.get(form, 0) >= ALONE
