"""Datasets that a plan takes texts from: a file or a dataset of the Hub, and what of its rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from nsteer.plan.reader import kind
from nsteer.plan.schema.values import Section, Text, distinct, wrong

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt")
"""Files that hold rows, by the end of their names."""

ROLES = ("system", "user", "assistant")
"""Who speaks in a conversation."""

TURN = {
    "type": "object",
    "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}},
    "required": ["role", "content"],
    "additionalProperties": False,
}
TURNS = {"type": "array", "items": TURN}
SCALARS = (str, int, float)
SCALAR = {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}

RESERVED = frozenset(
    "model op layer_set method emotion concept strength control prompt seed layer d_model position sample token read "
    "edit entry depth site prompt_text text n_tokens token_id program stream cell cell_field prompt_chunk sample_chunk "
    "pooled token_norm positions instruction chat prompt_tokens generated_tokens".split()
)
"""What the store calls its own arrays beside prompts and samples."""

FORM_OF_TURN = f"turns, {{role: {' | '.join(ROLES)}, content: text}} each"


def conversation(value: Any) -> list[dict[str, str]]:
    """A list of turns, as JSON data. Raises a validation error for anything else."""
    if not isinstance(value, list) or not value:
        raise wrong(kind(value), FORM_OF_TURN)
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise wrong(kind(turn) if not isinstance(turn, dict) else f"a turn of {sorted(turn)}", FORM_OF_TURN)
        if turn["role"] not in ROLES:
            raise wrong(f"the role {kind(turn['role'])}", f"one of {', '.join(ROLES)}")
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise wrong(kind(turn["content"]), "content that is text, and not empty")
    if not any(turn["role"] == "user" for turn in value):
        raise wrong("turns without one of the user", "one of the user among them")
    if any(turn["role"] == "system" for turn in value[1:]):
        raise wrong("a system turn behind others", "it first, or not at all")
    return [dict(turn) for turn in value]


def one_text(value: Any) -> str | list[dict[str, str]]:
    """A text that is not empty, or a conversation."""
    if isinstance(value, list):
        return conversation(value)
    if not isinstance(value, str) or not value:
        raise wrong(kind(value), "text, or a conversation (a list of turns)")
    return value


def _what(value: Any) -> Any:
    """A column, a text with {columns} in it, or turns of such texts."""
    return one_text(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, SCALARS):
        return value
    raise wrong(kind(value), "a value of the column: text, a number, true or false")


def _where(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        raise wrong(kind(value), "column: value, or column: [values]")
    for column, wanted in value.items():
        values = wanted if isinstance(wanted, list) and wanted else [wanted]
        if not all(isinstance(item, SCALARS) for item in values):
            raise wrong(f"{column}: {kind(wanted)}", "column: value, or column: [values]")
    return value


def _columns(value: Any) -> dict[str, str]:
    """Names of coordinates -> columns."""
    columns = {name: name for name in value} if isinstance(value, list) and all(map(_is_text, value)) else value
    if not isinstance(columns, dict) or not all(map(_is_text, columns.values())):
        raise wrong(kind(value), "a list of columns, or name: column")
    return dict(columns)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


WHAT = {"anyOf": [{"type": "string"}, TURNS]}
What = Annotated[Any, PlainValidator(_what), WithJsonSchema(WHAT)]
"""What of a row is a text."""

Equal = {"type": "object", "additionalProperties": {"anyOf": [*SCALAR["anyOf"], {"type": "array", "items": SCALAR}]}}
COLUMNS = {
    "anyOf": [
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "additionalProperties": {"type": "string"}},
    ]
}


class Rows(Section):
    """Rows of a file or of a dataset of the Hub. Exactly one of `file` and `hub`."""

    file: Text | None = Field(
        None,
        description=f"a file whose name ends in {', '.join(ENDINGS)}: one row a record, a text a line in `.txt` "
        "(its column is `text`)",
    )
    hub: Text | None = Field(
        None,
        description="a dataset of the Hub, `owner/name`, or a folder with one (extra `nsteer[data]`)",
    )
    config: Text | None = Field(None, description="configuration of the dataset (`hub` only)")
    revision: Text | None = Field(None, description="branch, tag or commit (`hub` only)")
    split: Text | None = Field(None, description="split (`hub` only); `train` when left out")
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="what separates fields, where it is no comma (`.csv` only)"
    )
    where: Annotated[Any, PlainValidator(_where), WithJsonSchema(Equal)] = Field(
        None, description="rows taken: column: value, or column: [values]; all of them when left out"
    )
    limit: int | None = Field(
        None, ge=1, description="maximum number of rows taken, from the first on; all when left out"
    )
    columns: Annotated[Any, PlainValidator(_columns), WithJsonSchema(COLUMNS)] = Field(
        {}, description="columns kept beside the results, as coordinates: a list, or name: column"
    )

    @property
    def outside(self) -> bool:
        """Whether there is a file or a dataset at all."""
        return self.file is not None or self.hub is not None


class Dataset(Rows):
    """Texts of a file or a dataset, a row each; the name of a file alone stands for `{file: name}`."""

    text: What = Field(
        "text", description="the text of a row: a column, a text with `{column}` filled in, or turns of such texts"
    )
    label: Text | None = Field(None, description="the column of labels (`texts` only)")
    id: Text | None = Field(
        None, description="column that names each row, on the axis `prompt`; the row's number, from 1, when left out"
    )


def is_dataset(value: Any) -> bool:
    """Whether a value of a plan names a file or a dataset, not texts themselves."""
    if isinstance(value, dict):
        return bool({"file", "hub"} & set(value)) and set(value) <= set(Dataset.model_fields)
    return isinstance(value, str) and value.lower().endswith(ENDINGS)


def _of_file(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


OrDataset = Annotated[Dataset, BeforeValidator(_of_file), Tag("a dataset")]
"""A dataset, or the name of a file alone."""


def either(what: str) -> Discriminator:
    """Tells a dataset from what else may stand in its place, tagged `what`."""
    return Discriminator(lambda value: "a dataset" if isinstance(value, Dataset) or is_dataset(value) else what)


def _listed(value: Any) -> Any:
    """Texts, conversations among them."""
    if not isinstance(value, list):
        raise wrong(kind(value), "a list of texts, or a file of them")
    if not value:
        raise wrong("an empty list", "at least one entry")
    if all(isinstance(item, dict) for item in value):
        raise wrong("turns", "a list of texts: a conversation is a list of turns within it")
    return [one_text(item) for item in value]


def _side(value: Any) -> Any:
    """One side of a contrast: texts; or of rows what is its text, or the label that its rows have."""
    if isinstance(value, list):
        return conversation(value) if value and all(isinstance(item, dict) for item in value) else _listed(value)
    return _scalar(value)


def _prompts(value: Any) -> Any:
    """The name of a prompt set, prompts by label, or a list of them."""
    if isinstance(value, dict):
        if not value:
            raise wrong("an empty mapping", "at least one entry")
        bad = [text for text in value.values() if not isinstance(text, str | list) or not text]
        if bad:
            raise wrong(kind(bad[0]), "label: prompt, both text")
        return {label: one_text(text) for label, text in value.items()}
    if isinstance(value, list):
        if not value:
            raise wrong("an empty list", "at least one entry")
        bad = [text for text in value if not isinstance(text, str | list) or not text]
        if bad:
            raise wrong(kind(bad[0]), "a list of prompts")
        return distinct([one_text(text) for text in value])
    if isinstance(value, str):
        return value
    raise wrong(kind(value), "the name of a prompt set, a list of prompts, label: prompt, or a file of them")


LISTED = {"type": "array", "items": WHAT}
SIDE = {"anyOf": [*SCALAR["anyOf"], TURNS, LISTED]}
PROMPTS = {"anyOf": [{"type": "string"}, LISTED, {"type": "object", "additionalProperties": WHAT}]}

Listed = Annotated[
    Annotated[Any, PlainValidator(_listed), WithJsonSchema(LISTED), Tag("texts")] | OrDataset, either("texts")
]
"""Texts: a list of them, or where they are."""

Side = Annotated[Annotated[Any, PlainValidator(_side), WithJsonSchema(SIDE), Tag("texts")] | OrDataset, either("texts")]
Prompts = Annotated[
    Annotated[Any, PlainValidator(_prompts), WithJsonSchema(PROMPTS), Tag("prompts")] | OrDataset, either("prompts")
]
