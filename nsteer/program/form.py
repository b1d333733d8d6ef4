"""Turns rows into programs: one batch each, of one form and of like length, under a token budget.

A Row is one text with what is read from it and what edits it. A Program is one trace as JSON data: a Form, of
which the compiler makes text, and numpy arrays, one entry a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np

from nsteer.errors import ExecutionError, ProgramError
from nsteer.program.ops import REFERENCED

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""What of a block is read and edited, in the order in which a forward comes to it."""


@dataclass(frozen=True)
class ReadSite:
    """A stream to read: at `site` of block `layer`, pooled by the rows' weights called `weights`.

    `what`: "pooled" gives [row, d_model], "norm" the mean norm [row], "tokens" every position; "decoded" (while
    generating) the stream at the prompt's last token, and its mean over the generated tokens that were fed back.
    """

    layer: int
    weights: str = "text"
    what: str = "pooled"
    site: str = "resid_post"


@dataclass(frozen=True)
class EditSite:
    """An edit at `site` of block `layer`; `live`: its amount is multiplied by the live mean norm of what is edited.

    paced: the rows' `steps` and `factor` say which generated tokens are edited, and how much; gate: "projection" or
    "cosine" of the stream on the rows' gates decides; after: generated tokens are edited where the token before is
    among the rows' `after`.
    """

    layer: int
    op: str
    live: bool = False
    paced: bool = False
    gate: str = ""
    after: bool = False
    site: str = "resid_post"


def place(site: ReadSite | EditSite) -> tuple[int, int]:
    """Where a forward comes to a site: sites are sorted by this."""
    return site.layer, SITES.index(site.site)


@dataclass(frozen=True)
class Decoding:
    """How a program generates. `eos` ends a row; `sample` draws with the rows' own uniform numbers."""

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Form:
    """What decides a program's text: sites by layer, decoding, and how many log-probs to keep a step.

    `promote`: no forward at all: the so many tokens that each row's vector promotes most through the unembedding.
    `score`: a forward pass also gives the log-probability of each row's own tokens, by its weights called `score`.
    `against`: rows are prompts with a continuation, edited as when it was written (its tokens have weight 1 in
    `later`); comes back what steering changed in their next-token distributions, by the weights called `score`.
    """

    reads: tuple[ReadSite, ...] = ()
    edits: tuple[EditSite, ...] = ()
    decoding: Decoding | None = None
    top: int = 0
    score: bool = False
    promote: int = 0
    against: bool = False

    @property
    def steps(self) -> bool:
        """Whether anything happens at the steps of a generation."""
        return bool(self.decoding and (self.edits or self.reads or self.top or self.decoding.sample))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it reads and edits."""
        sites = {SITES[at] for _, at in (*map(place, self.reads), *map(place, self.edits))}
        return tuple(site for site in SITES if site in sites)


@dataclass(frozen=True)
class RowEdit:
    """What one row puts into an EditSite.

    vector [d_model]; amount, in the unit the site expects; prompt [token] bool, the prompt positions touched;
    generated, whether generated positions are touched; norm [token] float, weights of the live norm (sum 1);
    reference, the projection of the reference mean on the vector, for ops that have one; steps [step] bool and factor
    [step], which generated tokens are touched and what the amount is multiplied by; gate [d_model] of length 1 and the
    least and largest value on it, both included; after, ids of which one must stand before a touched generated token;
    pace [token], what the amount is multiplied by at each position, where a form is `against` the unsteered.
    """

    vector: np.ndarray
    amount: float
    prompt: np.ndarray
    generated: bool
    norm: np.ndarray
    reference: float = 0.0
    steps: np.ndarray | None = None
    factor: np.ndarray | None = None
    gate: np.ndarray | None = None
    low: float = -np.inf
    high: float = np.inf
    after: tuple[int, ...] = ()
    pace: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """One text: its token ids, pooling weights by name, one RowEdit per EditSite, numbers for sampling."""

    key: Any
    tokens: tuple[int, ...]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    edits: tuple[RowEdit, ...] = ()
    uniform: np.ndarray | None = None


@dataclass(frozen=True)
class Program:
    """One trace as JSON data.

    arrays : input_ids, attention_mask, position_ids [row, position] int64; weights.<name> [row, position];
        and with edits: vectors [vector, d_model], which [edit, row], amount [edit, row],
        prompt [edit, row, position] bool, generated [edit, row], norm [edit, row, position];
        reference [edit, row] with ops that have a reference mean; steps and factor [edit, row, step] where paced;
        gate [edit, row] (a place in vectors), low and high [edit, row] where gated; after [edit, row, any], -1: none;
        uniform [row, step] where it samples; where `against`: pace [edit, row, position], unedited [row], the place of
        a row of the same tokens that nothing edits; such rows stand behind the others and have no key
    """

    form: Form
    keys: tuple[Any, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def rows(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Readouts:
    """What came back, as CPU arrays whose first axis is `row`; None where the form did not ask.

    pooled [row, read, d_model]; norms [row, read]; streams [row, read, position, d_model], NaN beyond a text;
    tokens: generated ids of each row, up to and with its end-of-text token; receipts [row, edit, 4];
    top_logprobs, top_tokens [row, step, top], NaN and -1 after a row's end; score [row], against [row, 2], in nats;
    prompt_end, written [row, read, d_model], NaN in `written` where nothing generated was fed back;
    promoted [row, rank] and its ids promoted_tokens.
    """

    pooled: np.ndarray | None = None
    norms: np.ndarray | None = None
    streams: list[np.ndarray] | None = None
    tokens: list[tuple[int, ...]] | None = None
    receipts: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    score: np.ndarray | None = None
    against: np.ndarray | None = None
    prompt_end: np.ndarray | None = None
    written: np.ndarray | None = None
    promoted: np.ndarray | None = None
    promoted_tokens: np.ndarray | None = None

    def row(self, i: int) -> dict[str, Any]:
        """What belongs to row `i`, by name."""
        return {name: value[i] for name, value in vars(self).items() if value is not None}


OVERHEAD = 128
"""What a batch costs besides its tokens, in tokens, on a CPU: setting up a trace, and its small operations."""

STEPS = 8
"""Steps of decoding that cost, besides their rows, as much as setting up a batch."""


Mates = Literal["any", "equal", "none"]
"""Which rows may share a batch: any, with padding; those of equal length, without; or none."""


NO_STEPS = "nothing can be edited or read while this model generates"


@dataclass(frozen=True)
class Batching:
    """What batches of one model may be.

    mates : which rows may share one; because : why not any
    stepless : why nothing can be edited or read while it generates; empty where it can
    """

    mates: Mates = "any"
    because: str = ""
    stepless: str = ""

    @property
    def notes(self) -> list[str]:
        """What a user should know, a sentence each; none where batches are as usual."""
        rule = {"any": "", "equal": "only texts of equal length share a batch", "none": "no two texts share a batch"}
        shared = [f"{rule[self.mates]}: {self.because}"] if self.because else []
        return shared + ([f"{NO_STEPS}: {self.stepless}"] if self.stepless else [])

    def check(self, form: Form) -> None:
        """Raises ExecutionError for a form that this model can not run rightly."""
        if self.stepless and form.steps:
            raise ExecutionError(f"{NO_STEPS}: {self.stepless}")
        if self.mates == "none" and form.against:
            raise ExecutionError(f"no steered text can be compared with its unsteered one in a batch: {self.because}")


def programs(
    form: Form,
    rows: Iterable[Row],
    *,
    budget: int,
    max_rows: int,
    overhead: int = OVERHEAD,
    side: str = "left",
    mates: Mates = "any",
    turn: int = 0,
) -> Iterator[Program]:
    """Programs of at most `most` rows and `budget` padded tokens (new ones counted), longest texts first.

    overhead : what a batch costs besides its tokens, in tokens; see `cuts`
    mates : which rows may share one
    turn : positions beyond which texts change with what else is in their batch: rows that come to it, while they are
        written too, share one with rows of equal length alone; 0 where there are none
    Longest first: a batch that does not fit memory fails at once, not at the end.
    """
    new = form.decoding.max_new_tokens if form.decoding else 0
    max_rows = 1 if mates == "none" else max_rows

    def company(row: Row) -> int:
        """Rows that may share a batch have it in common."""
        last = len(row.tokens) + max(new - 1, 0)
        return len(row.tokens) if mates != "any" or 0 < turn < last else 0

    ordered = sorted(rows, key=lambda row: -len(row.tokens))
    for _, group in groupby(ordered, key=company):
        together = list(group)
        sizes = [len(row.tokens) + new for row in together]
        for batch in cuts(sizes, budget=budget, max_rows=max_rows, overhead=overhead * (1 + new / STEPS)):
            yield assemble(form, together[batch], side)


def cuts(sizes: Sequence[int], *, budget: int, max_rows: int, overhead: float) -> list[slice]:
    """Where to cut texts, longest first, into batches: the cut that costs least, in tokens.

    A batch costs what its longest text takes, for every row, and `overhead`. None has more than `most` rows, nor more
    than `budget` tokens unless it is one row. Dynamic programming over the batch that ends at each text.
    """
    if not sizes:
        return []
    width = np.asarray(sizes, np.float64)
    cost, begins = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, np.int64)
    for end in range(1, len(sizes) + 1):
        first = np.arange(max(0, end - max_rows), end)
        tokens = (end - first) * width[first]
        total = np.where((tokens <= budget) | (first == end - 1), cost[first] + tokens + overhead, np.inf)
        best = int(total.argmin())
        cost[end], begins[end] = total[best], first[best]
    slices: list[slice] = []
    end = len(sizes)
    while end:
        slices.append(slice(int(begins[end]), end))
        end = int(begins[end])
    return slices[::-1]


READ_PAD = 0
"""What stands in the padding of a program that generates nothing."""


def assemble(form: Form, rows: Sequence[Row], side: str = "left") -> Program:
    """The program of one batch, padded on `side` ("left", or "right" where nothing is generated)."""
    if form.decoding and side != "left":
        raise ProgramError("a program that generates must be padded on the left: a text goes on at its right end")
    keys = tuple(row.key for row in rows)
    unedited: list[int] = []
    if form.against:
        rows, unedited = _with_unedited(rows)
    width = max(len(row.tokens) for row in rows)
    pad = form.decoding.pad if form.decoding else READ_PAD

    def padded(values: Sequence[Any], fill: Any, dtype: Any) -> np.ndarray:
        out = np.full((len(values), width), fill, dtype)
        for i, value in enumerate(values):
            span = slice(width - len(value), None) if side == "left" else slice(len(value))
            out[i, span] = value
        return out

    mask = padded([np.ones(len(row.tokens)) for row in rows], 0, np.int64)
    arrays = {
        "input_ids": padded([row.tokens for row in rows], pad, np.int64),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    weighted = {site.weights for site in form.reads if site.what in ("pooled", "norm")}
    weighted |= {"score"} if form.score or form.against else set()
    weighted |= {"later"} if form.against else set()
    for name in sorted(weighted):
        arrays[f"weights.{name}"] = padded([row.weights[name] for row in rows], 0, np.float32)
    if form.edits:
        arrays |= _edit_arrays(form, rows, padded)
    if form.decoding and form.decoding.sample:
        arrays["uniform"] = np.stack([row.uniform for row in rows if row.uniform is not None]).astype(np.float64)
    if form.against:
        paces = [
            padded([np.ones(len(r.tokens)) if (p := r.edits[e].pace) is None else p for r in rows], 0, np.float32)
            for e in range(len(form.edits))
        ]
        arrays |= {"pace": np.stack(paces), "unedited": np.array(unedited, np.int64)}
    return Program(form, keys, arrays)


def _with_unedited(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows, behind them one of each text that nothing edits, and for each row the place of its text's."""
    all_rows, places = list(rows), dict[tuple[int, ...], int]()
    for row in rows:
        if row.tokens not in places:
            places[row.tokens] = len(all_rows)
            all_rows.append(replace(row, key=None, edits=tuple(map(_idle, row.edits))))
    return all_rows, [places[row.tokens] for row in rows]


def _idle(edit: RowEdit) -> RowEdit:
    return replace(edit, prompt=np.zeros_like(edit.prompt), generated=False)


def _edit_arrays(form: Form, rows: Sequence[Row], padded: Any) -> dict[str, np.ndarray]:
    """Per-row data of the edits. Each distinct vector is kept once: a grid shares few among many rows."""
    table: dict[bytes, int] = {}
    vectors: list[np.ndarray] = []

    def places(of: Any) -> np.ndarray:
        indices = np.zeros((len(form.edits), len(rows)), np.int64)
        for r, row in enumerate(rows):
            for e, edit in enumerate(row.edits):
                vector = np.ascontiguousarray(of(edit), np.float32)
                key = vector.tobytes()
                if key not in table:
                    table[key] = len(vectors)
                    vectors.append(vector)
                indices[e, r] = table[key]
        return indices

    which = places(lambda edit: edit.vector)
    conditions = _conditions(form, rows, places)
    sites = range(len(form.edits))
    arrays = {
        "vectors": np.stack(vectors),
        "which": which,
        "amount": np.array([[row.edits[e].amount for row in rows] for e in sites], np.float32),
        "prompt": np.stack([padded([row.edits[e].prompt for row in rows], False, bool) for e in sites]),
        "generated": np.array([[row.edits[e].generated for row in rows] for e in sites], bool),
        "norm": np.stack([padded([row.edits[e].norm for row in rows], 0, np.float32) for e in sites]),
    }
    if any(site.op in REFERENCED for site in form.edits):
        arrays["reference"] = np.array([[row.edits[e].reference for row in rows] for e in sites], np.float32)
    return arrays | conditions


def _conditions(form: Form, rows: Sequence[Row], places: Any) -> dict[str, np.ndarray]:
    """Per-row data of what decides while a program runs whether and how much is edited."""
    table = [[row.edits[e] for row in rows] for e in range(len(form.edits))]
    arrays: dict[str, np.ndarray] = {}
    if form.decoding and any(site.paced for site in form.edits):
        new = form.decoding.max_new_tokens
        steps = [
            [np.full(new, edit.generated) if edit.steps is None else edit.steps for edit in line] for line in table
        ]
        factor = [[np.ones(new) if edit.factor is None else edit.factor for edit in line] for line in table]
        arrays |= {"steps": np.array(steps, bool), "factor": np.array(factor, np.float32)}
    if any(site.gate for site in form.edits):
        arrays["gate"] = places(lambda edit: edit.vector if edit.gate is None else edit.gate)
        for name in ("low", "high"):
            arrays[name] = np.array([[getattr(edit, name) for edit in line] for line in table], np.float32)
    if form.decoding and any(site.after for site in form.edits):
        longest = max(len(edit.after) for line in table for edit in line)
        ids = [[[*edit.after, *[-1] * (longest - len(edit.after))] for edit in line] for line in table]
        arrays["after"] = np.array(ids, np.int64)
    return arrays


def halves(program: Program) -> tuple[Program, Program]:
    """A program of two rows or more as two, each padded no wider than its own rows need.

    What comes back for a row does not depend on the others, so the halves together give what the whole would.
    """
    middle = -(-program.rows // 2)
    return of_rows(program, slice(middle)), of_rows(program, slice(middle, None))


ROW_SECOND = (
    *("which", "amount", "prompt", "generated", "norm", "reference"),
    *("steps", "factor", "gate", "low", "high", "after", "pace"),
)
"""Arrays whose first axis is the edit and whose second is the row."""


def of_rows(program: Program, rows: slice) -> Program:
    """Some of a program's rows as a program: positions and vectors that only the others need are left out."""
    arrays = dict(program.arrays)
    if program.form.promote:  # its rows are vectors: there is one text, which is not read
        return Program(program.form, program.keys[rows], {**arrays, "vectors": arrays["vectors"][rows]})
    needed = arrays["attention_mask"][rows].any(0)
    row_arrays: dict[str, np.ndarray] = {}
    every: Any = rows
    if program.form.against:  # unedited rows go where their rows go
        mine = np.arange(program.rows)[rows]
        unedited, at = np.unique(arrays.pop("unedited")[mine], return_inverse=True)
        every, row_arrays["unedited"] = np.concatenate([mine, unedited]), len(mine) + at
    for name, array in arrays.items():
        if name == "vectors":
            continue
        mine = array[:, every] if name in ROW_SECOND else array[every]
        row_arrays[name] = mine[..., needed] if mine.ndim > 1 and _by_position(name) else mine
    if program.form.edits:
        names = [name for name in ("which", "gate") if name in row_arrays]
        both = np.stack([row_arrays[name] for name in names])
        used, places = np.unique(both, return_inverse=True)
        row_arrays |= {"vectors": arrays["vectors"][used], **dict(zip(names, places.reshape(both.shape), strict=True))}
    return Program(program.form, program.keys[rows], row_arrays)


def _by_position(name: str) -> bool:
    """Whether the last axis of an array of a program counts positions."""
    by_position = ("input_ids", "attention_mask", "position_ids", "prompt", "norm", "pace")
    return name in by_position or name.startswith("weights.")


def size(program: Program) -> int:
    """Padded tokens of a program, those to be generated counted."""
    new = program.form.decoding.max_new_tokens if program.form.decoding else 0
    return program.rows * (program.arrays["input_ids"].shape[1] + new)


def lens(top: int, vectors: np.ndarray) -> Program:
    """The program of a logit lens over vectors [row, d_model]; its keys are their places."""
    zero = np.zeros((1, 1), np.int64)
    arrays: dict[str, np.ndarray] = {
        "input_ids": zero,
        "attention_mask": zero + 1,
        "position_ids": zero,
        "vectors": vectors.astype(np.float32),
    }
    return Program(Form(promote=top), tuple(range(len(vectors))), arrays)


def specimen(form: Form, d_model: int) -> Program:
    """The smallest program of a form: one row of three tokens, every weight and edit in place."""
    if form.promote:
        return lens(form.promote, np.ones((1, d_model)))
    even = np.full(3, 1 / 3, np.float32)
    edit = RowEdit(np.ones(d_model, np.float32), 1.0, np.ones(3, bool), True, even)
    weights = dict.fromkeys(("score", "later", *(site.weights for site in form.reads)), even)
    uniform = np.zeros(form.decoding.max_new_tokens) if form.decoding else None
    return assemble(form, [Row(0, (1, 2, 3), weights, (edit,) * len(form.edits), uniform)])
