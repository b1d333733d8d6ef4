"""What a cell of each group is called by: a named tuple whose fields are the dims of the group's cells, in order.

To the store a key is a tuple like any other, so labels of a store become one again by `Condition(*labels)`. All begin
with the model, for all groups do. Nobody takes a label of a key by its number.
"""

from __future__ import annotations

from typing import NamedTuple


class OfModel(NamedTuple):
    """What there is once a model."""

    model: str


class SampleChunk(NamedTuple):
    """A chunk of samples, and of their activations."""

    model: str
    method: str
    emotion: str
    sample_chunk: int


class Vector(NamedTuple):
    """A vector at all layers, and what is computed of it alone."""

    model: str
    method: str
    emotion: str


class ResponseChunk(NamedTuple):
    """A chunk of the answers that a model writes for one side of a contrast, and what a judge says of them."""

    model: str
    direction: str
    side: str
    response_chunk: int


class Condition(NamedTuple):
    """A cell of the steering cubes: every continuation of an entry's prompts under one vector, strength and control."""

    model: str
    op: str
    layer_set: str
    method: str
    emotion: str
    strength: float
    control: str


class Unsteered(NamedTuple):
    """The continuations of an entry's prompts without any edit."""

    model: str
    op: str


class Judged(NamedTuple):
    """What a judge says of the continuations of a cell of the steering cubes."""

    model: str
    op: str
    layer_set: str
    method: str
    emotion: str
    strength: float
    control: str
    judge: str

    @property
    def of(self) -> Condition:
        """The cell that is judged."""
        return Condition(*self[:-1])


class JudgedUnsteered(NamedTuple):
    """What a judge says of the continuations without any edit."""

    model: str
    op: str
    judge: str

    @property
    def of(self) -> Unsteered:
        """The cell that is judged."""
        return Unsteered(*self[:-1])


class Prompted(NamedTuple):
    """The continuations of an entry's prompts where an emotion is asked for in words: `towards` it or `away`."""

    model: str
    op: str
    emotion: str
    asked: str


class JudgedPrompted(NamedTuple):
    """What a judge says of the continuations that were asked for in words."""

    model: str
    op: str
    emotion: str
    asked: str
    judge: str

    @property
    def of(self) -> Prompted:
        """The cell that is judged."""
        return Prompted(*self[:-1])


class Read(NamedTuple):
    """What a read of a plan records under a condition of `edits:`, at one of its strengths: of a chunk of prompts."""

    model: str
    read: str
    edit: str
    strength: float
    prompt_chunk: int


class Edited(NamedTuple):
    """The continuations of a chunk of a plan's prompts under a condition of `edits:`, at one of its strengths."""

    model: str
    edit: str
    strength: float
    prompt_chunk: int


class EditSearch(NamedTuple):
    """What there is once for a condition of `edits:` at one of its strengths, whatever the chunk of prompts: the search
    for a strength, what the edits cost."""

    model: str
    edit: str
    strength: float


class JudgedEdited(NamedTuple):
    """What a judge says of the continuations under a condition of `edits:`."""

    model: str
    edit: str
    strength: float
    prompt_chunk: int
    judge: str

    @property
    def of(self) -> Edited:
        """The cell that is judged."""
        return Edited(*self[:-1])


class Sentences(NamedTuple):
    """The streams of the neutral sentences, `with` BOS or `without`."""

    model: str
    bos: str


class SampleRow(NamedTuple):
    """A row that is a sample: of which cell, and its number."""

    cell: SampleChunk
    sample: int


class ResponseRow(NamedTuple):
    """A row that is an answer for a contrast: of which cell, and its number."""

    cell: ResponseChunk
    response: int


class TextRow(NamedTuple):
    """A row that is a prompt with its continuation: of which cell."""

    cell: Condition | Unsteered | Prompted | Edited | EditSearch | Read
    prompt: str
    seed: int
