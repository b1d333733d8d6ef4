"""Executors: where programs run. An executor turns a Program into Readouts, and knows its model's anatomy.

A new one is one file here and one row in EXECUTORS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol

from nsteer.errors import ExecutionError, did_you_mean
from nsteer.program.anatomy import Anatomy
from nsteer.program.form import Batching, Form, Program, Readouts


class Executor(Protocol):
    """One model, somewhere, that runs programs."""

    anatomy: Anatomy
    tokenizer: Any  # a transformers tokenizer
    eos: tuple[int, ...]  # ids that end a text
    pad: int
    overhead: int  # what a batch costs besides its tokens, in tokens
    batching: Batching  # which rows may share a batch

    def run(self, program: Program) -> Readouts:
        """The readouts of a program, rows in its order. Raises ExecutionError."""
        ...

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        """Each program with its readouts, or the error it failed with, as they come back.

        Draws `programs` lazily: an executor may have several in flight, and never holds more than those. Raises
        only what ends all of them, such as a server that is gone.
        """
        ...

    def code(self, program: Program) -> str:
        """The text that `run` executes for this program."""
        ...

    def settle(self) -> None:
        """What `map` handed out so far is committed: a journal of jobs may forget it."""
        ...

    def afford(self, form: Form, rows: int) -> int:
        """The most padded tokens that a program of the form, of at most `rows` rows, should have here."""
        ...

    def describe(self) -> dict[str, Any]:
        """Provenance as JSON data: dtype, device, attention implementation, versions; `settings` that computed."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


EXECUTORS = {
    "local": "nsteer.executors.local:Local",
    "ndif": "nsteer.executors.ndif:Ndif",
    "vllm": "nsteer.executors.vllm:Vllm",
    "rehearse": "nsteer.executors.rehearse:Rehearse",
    "fake": "nsteer.executors.fake:Fake",
}


def each(
    run: Callable[[Program], Readouts], programs: Iterable[Program]
) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
    """`map` of an executor that runs one program at a time."""
    for program in programs:
        answer: Readouts | ExecutionError
        try:
            answer = run(program)
        except ExecutionError as error:
            answer = error.with_traceback(None)  # its frames would keep the program's tensors alive
        yield program, answer


def create(name: str, *args: Any, **settings: Any) -> Executor:
    """The executor called `name` over one model. Raises ExecutionError for an unknown name."""
    if name not in EXECUTORS:
        raise ExecutionError(f"no executor {name!r} ({did_you_mean(name, list(EXECUTORS))})")
    module, _, attribute = EXECUTORS[name].partition(":")
    return getattr(import_module(module), attribute)(*args, **settings)
