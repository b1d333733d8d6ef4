"""The types of a plan's fields: layers, prompts, ratings, labels, and positions in a text."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from nsteer.errors import did_you_mean
from nsteer.plan import layers
from nsteer.plan.reader import kind
from nsteer.science.axis import word


class Section(BaseModel):
    """A section of a plan: frozen, strict, closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)


def wrong(actual: str, expected: str, hint: str = "") -> PydanticCustomError:
    """A validation error in nsteer's own words."""
    context = {"found": actual, "expected": expected, "hint": hint}
    return PydanticCustomError("nsteer", "expected {expected}, found {found}", context)


def _layers(value: Any) -> Any:
    if why := layers.problem_of(value):
        raise wrong(why, layers.FORMS)
    return value


def shorthand(field: str) -> BeforeValidator:
    """`zoo/llama` for `{id: zoo/llama}`: text stands for the one field that matters most."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


def one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _filled(value: Any) -> Any:
    if isinstance(value, (list, dict)) and not value:
        raise wrong("an empty list" if isinstance(value, list) else "an empty mapping", "at least one entry")
    return value


def distinct(value: list) -> list:
    """The list, of which no item stands in it twice."""
    seen: set[Any] = set()
    for item in value:
        known = item if isinstance(item, str | int | float) else repr(item)
        if known in seen:
            raise wrong(f"{kind(item)} twice", "each label once")
        seen.add(known)
    return value


Filled = BeforeValidator(_filled)
SINGLE_LAYER = {"anyOf": [{"type": "integer"}, {"type": "number", "minimum": 0, "maximum": 1}]}
LAYERS = {"anyOf": [*SINGLE_LAYER["anyOf"], {"type": "string"}, {"type": "array"}], "description": layers.FORMS}
Layers = Annotated[Any, PlainValidator(_layers), WithJsonSchema(LAYERS)]


def _vector_layer(value: Any) -> Any:
    if value == "same" or (not isinstance(value, (str, list)) and not layers.problem_of(value)):
        return value
    raise wrong(kind(value), 'one layer (an index or a depth fraction) or "same"')


def _layer_sets(value: Any) -> Any:
    if not isinstance(value, dict):
        return _layers(value)
    if set(value) == {"each"}:
        return {"each": _layers(value["each"])}
    if set(value) == {"sets"} and isinstance(value["sets"], dict) and value["sets"]:
        return {"sets": {label: _layers(spec) for label, spec in value["sets"].items()}}
    raise wrong(kind(value), "layers, {each: layers} or {sets: {label: layers}}")


def _ratings(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, dict) or not value:
        raise wrong(kind(value), RATINGS_FORM)
    for scale in value.values():
        if not isinstance(scale, dict):
            raise wrong(kind(scale), RATINGS_FORM)
        bad = [rating for rating in scale.values() if isinstance(rating, bool) or not isinstance(rating, (int, float))]
        if bad:
            raise wrong(kind(bad[0]), word("a number for every emotion"))
        if len(scale) < 3:
            raise wrong(f"{len(scale)} {word('emotions')}", word("at least 3 rated emotions on a scale"))
    return value


CONTROLS = ("zero", "random", "shuffled", "prompted")
DRAWN = ("random", "shuffled")
"""Controls that may be drawn several times."""
MAX_DRAWS = 1000
CONTROL_FORM = f"one of {', '.join(CONTROLS)}, or {{random: 20}}, {{shuffled: 20}}"


def _control(value: Any) -> list[str]:
    """The labels of one control on the axis `control`: `{random: 3}` is random, random-2 and random-3."""
    if isinstance(value, str) and (value in CONTROLS or re.fullmatch(rf"({'|'.join(DRAWN)})-([2-9]|[1-9]\d+)", value)):
        return [value]
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= set(DRAWN):
        hint = did_you_mean(value, CONTROLS) if isinstance(value, str) else ""
        raise wrong(repr(value) if isinstance(value, str) else kind(value), CONTROL_FORM, hint)
    ((name, times),) = value.items()
    if type(times) is not int or not 1 <= times <= MAX_DRAWS:
        raise wrong(repr(times), f"a number of draws, 1 to {MAX_DRAWS}")
    return [name, *(f"{name}-{number}" for number in range(2, times + 1))]


def _joined(value: list[list[str]]) -> list[str]:
    return [label for labels in value for label in labels]


RATINGS_FORM = "the name of a table of ratings, or scale: {emotion: number}"
VectorLayer = Annotated[
    Any,
    PlainValidator(_vector_layer),
    WithJsonSchema({"anyOf": [*SINGLE_LAYER["anyOf"], {"const": "same"}]}),
]
LayerSets = Annotated[
    Any,
    PlainValidator(_layer_sets),
    WithJsonSchema({"anyOf": [*LAYERS["anyOf"], {"type": "object"}], "description": "layers, each, or sets"}),
]
RatingTable = Annotated[
    Any,
    PlainValidator(_ratings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "object",
                    "additionalProperties": {"type": "object", "additionalProperties": {"type": "number"}},
                },
            ]
        }
    ),
]
Controls = Annotated[
    list[Annotated[Any, PlainValidator(_control)]],
    AfterValidator(_joined),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"enum": list(CONTROLS)},
                    {"type": "string", "pattern": f"^({'|'.join(DRAWN)})-([2-9]|[1-9][0-9]+)$"},
                    *(
                        {
                            "type": "object",
                            "properties": {name: {"type": "integer", "minimum": 1, "maximum": MAX_DRAWS}},
                            "required": [name],
                            "additionalProperties": False,
                        }
                        for name in DRAWN
                    ),
                ]
            },
        }
    ),
]
Op = Literal["add", "project_out", "clamp", "set_mean", "affine", "rotate"]
Scale = Literal["raw", "unit", "stream_norm", "reference_norm"]
Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
SITE = (
    "`resid_post`, the output of a block; `resid_pre`, its input; `attn_out`, `mlp_out`: what its attention and its "
    "MLP add to the stream"
)
Fraction = Annotated[float, Field(gt=0, le=1)]
Tolerance = Annotated[float, Field(gt=0, lt=1)]
MAX_SAMPLES = 100_000
"""Texts of one emotion, far beyond any study: a slip of the keyboard is said at once, not after minutes of counting."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


def _number(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


def _form(value: Any) -> str:
    kinds = ((str, "a word"), (int, "an index"), (list, "indices"))
    return next((tag for kind, tag in kinds if isinstance(value, kind)), "a mapping")


AtLeast0 = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Integers = Annotated[Annotated[int, Tag("one")] | Annotated[list[int], Filled, Tag("many")], Discriminator(_number)]
Ids = Annotated[
    Annotated[AtLeast0, Tag("one")] | Annotated[list[AtLeast0], Filled, Tag("many")], Discriminator(_number)
]
Texts = Annotated[Annotated[Text, Tag("one")] | Annotated[list[Text], Filled, Tag("many")], Discriminator(_number)]


class Window(Section):
    """Which generated tokens, the first of them 0: what any of its fields names."""

    index: Ids | None = Field(None, description="one, or a list")
    from_: int | None = Field(None, ge=0, alias="from", description="from this one on")
    to: int | None = Field(None, ge=0, description="up to this one, and not it")


Written = Annotated[
    Annotated[Literal["all"], Tag("a word")] | Annotated[Window, Tag("a mapping")],
    Discriminator(lambda value: "a word" if isinstance(value, str) else "a mapping"),
]


class Which(Section):
    """Positions: what any of its fields names. Those of a prompt count its tokens, BOS and template among them."""

    index: Integers | None = Field(None, description="of the prompt: one, or a list; below 0 from its end")
    from_: int | None = Field(None, alias="from", description="of the prompt: from here on; below 0 from its end")
    to: int | None = Field(None, description="of the prompt: up to here, and not here; below 0 from its end")
    ids: Ids | None = Field(None, description="tokens of the prompt with these ids")
    text: Texts | None = Field(
        None, description="tokens that hold a character of any occurrence of this text, or of these, in the prompt"
    )
    role: Literal["system", "user", "assistant"] | None = Field(
        None,
        description="with a chat template: turns of a prompt by who speaks; `assistant`: what the model writes, too",
    )
    prompt: Literal["all"] | None = Field(None, description="every token of the prompt")
    generated: Written | None = Field(None, description="generated tokens: `all`, or a window of them")


Named = (
    Annotated[Literal["all", "prompt", "generated", "last"], Tag("a word")]
    | Annotated[int, Tag("an index")]
    | Annotated[list[int], Filled, Tag("indices")]
)
"""Forms of positions that are no mapping."""

Excepted = Annotated[
    Named | Annotated[Which, Tag("a mapping")],
    Discriminator(_form),
]


class Where(Which):
    """As `Which`; `except` takes positions away. A mapping of `except` alone starts from all."""

    except_: Excepted | None = Field(None, alias="except", description="positions left out: in any of these forms")


Positions = Annotated[
    Named | Annotated[Where, Tag("a mapping")],
    Discriminator(_form),
]
