"""`steer` of a plan: a grid of steered generations, and what an edit is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from nsteer.plan.schema.datasets import Prompts
from nsteer.plan.schema.methods import Generate
from nsteer.plan.schema.values import (
    SITE,
    Controls,
    Filled,
    Label,
    Layers,
    LayerSets,
    Op,
    Positions,
    Scale,
    Section,
    Site,
    Tolerance,
    VectorLayer,
)


class Vectors(Section):
    """Which vectors steer."""

    methods: Annotated[list[str], Filled] | None = Field(None, description="methods of the plan; all when left out")
    emotions: list[str] | None = Field(
        None, description="emotions steered to; all when left out, none when empty (beside `formulas`)"
    )
    concepts: list[str] | None = Field(None, description="the same in a plan of `concepts`")
    formulas: dict[Label, str] = Field(
        {},
        description="label: formula, e.g. `joy_not_gloom: 0.5*happy - gloomy`: what else steers, labelled so on the "
        "`emotion` axis. Arithmetic (as in `directions`) over emotion vectors and axes of the plan's `ratings`, of the "
        "current method or `method.happy`; in a plan without `methods` over its `directions`. Its class for the judge: "
        "`judge.map`",
    )
    directions: Annotated[list[str], Filled] | None = Field(
        None,
        description="names in `directions` that steer, each under its own kind on the `method` axis (`contrast`, "
        "`mean`, `store`, `formula`, `random`) and its name on the `emotion` axis; when left out all of them in a plan "
        "without `methods`, else none",
    )
    layer: VectorLayer = Field(
        "same", description="the layer a vector comes from: `same` (each steered layer has its own) or one layer"
    )

    @property
    def labels(self) -> list[str] | None:
        """The emotions, or concepts, steered to; None for all of them."""
        return self.emotions if self.concepts is None else self.concepts


class When(Section):
    """A condition of an edit, decided at every position on its own, by what stands there before the edit."""

    direction: str | None = Field(
        None,
        description="the gate: an emotion, whose vector of the same method is meant (`steer`), or a name in "
        "`directions` (`edits`); the edit's own vector when left out (under a random control too)",
    )
    above: float | None = Field(None, description="the edit acts where the stream on the gate is at least this")
    below: float | None = Field(None, description="the edit acts where the stream on the gate is at most this")
    of: Literal["projection", "cosine"] = Field(
        "projection", description="what is compared: the projection on the gate at length 1, or the cosine with it"
    )
    after: Annotated[list[int | str], Filled] | None = Field(
        None,
        description="the edit acts where the token one place before is among these: ids, or texts of one token each",
    )


class Schedule(Section):
    """How an edit goes on over the tokens that the model writes, the first of them 0; the prompt has full strength."""

    first: int | None = Field(None, ge=1, description="only this many generated tokens are edited")
    linear: int | None = Field(None, ge=1, description="tokens until strength 0: strength x max(0, 1 - token / linear)")
    half_life: float | None = Field(
        None, gt=0, description="tokens until half the strength: strength x 0.5 ** (token / half_life)"
    )


class Calibrated(Section):
    """Strengths by what they do: for each vector the smallest strength that changes the model's distributions by this
    much.

    Measured over the unsteered greedy continuation of every prompt (docs/science.md).
    """

    kl: Annotated[list[Annotated[float, Field(gt=0)]], Filled] | None = Field(
        None, description="targets: KL(steered ‖ unsteered) of the next-token distributions, mean over tokens, in nats"
    )
    perplexity_ratio: Annotated[list[Annotated[float, Field(gt=1)]], Filled] | None = Field(
        None,
        description="targets: perplexity of the unsteered continuation under the steered model, over that under the "
        "unsteered one",
    )
    tolerance: Tolerance = Field(0.02, description="relative error allowed for the value at the strength that is found")
    tokens: int = Field(
        16,
        ge=1,
        description="how many tokens of the unsteered continuation are measured for each prompt; at most what is "
        "generated",
    )
    prompts: Prompts | None = Field(None, description="prompts to measure on; the entry's own when left out")
    max_strength: float | None = Field(
        None,
        gt=0,
        description="the largest strength tried; when left out 10 (`stream_norm`, `reference_norm`), 100000 (`raw`, "
        "`unit`), 1 (`project_out`, `set_mean`) or 180 degrees (`rotate`)",
    )
    random: Literal["same", "own"] = Field(
        "same", description="the random control: at the strength found for the vector, or at its own"
    )

    @property
    def measure(self) -> str:
        """The field that has the targets."""
        return "perplexity_ratio" if self.kl is None else "kl"

    @property
    def targets(self) -> list[float]:
        return [float(target) for target in self.kl or self.perplexity_ratio or []]


def _form_of_strengths(value: Any) -> str:
    return "mapping" if isinstance(value, (dict, Calibrated)) else "list"


Strengths = Annotated[
    Annotated[Calibrated, Tag("mapping")] | Annotated[list[float], Filled, Tag("list")],
    Discriminator(_form_of_strengths),
]


OneOrMoreStrengths = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[Calibrated, Tag("mapping")]
    | Annotated[list[float], Filled, Tag("list")],
    Discriminator(lambda value: _form_of_strengths(value) if isinstance(value, dict | list | Calibrated) else "number"),
]


class Editing(Section):
    """What every edit of a stream has: what is done, in which unit, where and when; with what and how much, each kind
    of edit says itself. A field that stands here is one of `steer`, of its `also` and of `edits`."""

    op: Op = Field(
        "add",
        description="`add` the vector; `project_out` its direction; `clamp` the projection on it to a value; "
        "`set_mean`: to that of the mean of the method's neutral samples (in `edits`: of `reference`); `affine`: to "
        "that plus a value; `rotate` the stream towards it at constant length (docs/ops.md)",
    )
    layers: Layers = Field("all", description="edited layers")
    scale: Scale = Field(
        "stream_norm",
        description="unit of strength: `raw` x the vector as its method left it; `unit` x the vector at length 1; "
        "`stream_norm` x the live mean norm of the row's residual stream at that layer; `reference_norm` x the "
        "mean norm of the neutral samples' streams at that layer. Not for `project_out` and `set_mean`, whose strength "
        "is a fraction, nor for `rotate`, whose strength is an angle in degrees",
    )
    norm_skip: int = Field(0, ge=0, description="leading positions left out of the live norm (1 leaves out BOS)")
    site: Site = Field("resid_post", description=f"what is edited: {SITE} (docs/howto/where.md)")
    positions: Positions = Field(
        "all",
        description="edited positions: `prompt`, `generated` (tokens the model wrote), `all` (both), `last` "
        "(the prompt's last token), an index, a list of them, or a mapping (docs/howto/where.md)",
    )
    when: When | None = Field(None, description="edit only where this holds")
    schedule: Schedule | None = Field(None, description="how the edit goes on while the model writes")


class Continuing(Section):
    """Prompts that are continued, and how."""

    prompts: Prompts = Field(description="a prompt set of the text set, a list of prompts, label: prompt, or a Dataset")
    chat: Literal["auto", "always", "never"] = Field("never", description="put prompts through the chat template")
    project: bool = Field(
        False,
        description="also keep the projections of the stream, steered and unsteered, on every emotion's vector of the "
        "method, at the prompt's last token and over the generated ones",
    )
    generate: Generate = Field(Generate(), description="decoding of the continuation")
    seeds: Annotated[list[int], Filled] = Field([0], description="one continuation a seed (sampling only)")


class Also(Editing):
    """One more edit of every steered cell of an entry, the same whatever emotion, strength and control the cell has."""

    op: Op = Field(description="what is done to the stream: docs/ops.md, as in steer.op")
    direction: str = Field(
        description="an emotion, or a formula over emotions and axes as in `vectors.formulas`: of the method whose "
        "vectors steer, or `method.happy`"
    )
    order: Literal["before", "after"] = Field(
        "before",
        description="at a layer and site that the entry's own op edits too: before it or after it; among themselves in "
        "the list's order",
    )
    strength: float = Field(1.0, description="as in edits.strength, in units of `scale`")


class Prompted(Section):
    """What stands before a prompt, and an empty line, where an emotion is asked for in words instead of steered."""

    towards: str = Field("Let all that you write be full of this: {emotion}.", description="beside strengths above 0")
    away: str = Field(
        "Let nothing that you write have anything of this: {emotion}.", description="beside strengths below 0"
    )


class Edit(Editing):
    """One edit of the residual stream, at the same sites for every prompt."""

    op: Op = Field(description="what is done to the stream: docs/ops.md, as in steer.op")
    direction: str = Field(description="a name in `directions`")
    vector_layer: VectorLayer = Field("same", description="the layer whose direction is used")
    reference: str | None = Field(
        None, description="a name in `directions` with `mean`: the reference mean (`set_mean` and `affine` only)"
    )
    strength: OneOrMoreStrengths = Field(
        1.0,
        description="`add`: multiples of the scaled direction; `project_out`: fraction removed; `clamp`: the "
        "projection it is set to; `set_mean`: fraction of the way to the reference; `affine`: distance from it; "
        "`rotate`: degrees. A list: the condition once with each, labelled so on the axis `strength`; or what they are "
        "to do, as in steer.strengths: `{kl: [0.3, 1.0]}`. Of a condition with several edits those that have a list "
        "have the same one; where none has, the label is the strength of the first",
    )
    scale: Literal["raw", "unit", "stream_norm"] = Field("raw", description="unit of strength; see steer.scale")


class Steer(Editing, Continuing):
    """A grid of steered generations: method x emotion x layer set x strength x control x prompt x seed."""

    name: Label | None = Field(None, description="label on the `op` axis; the op's name when left out")
    vectors: Vectors = Field(Vectors(), description="the vectors that steer")
    layers: LayerSets = Field(
        "all", description="steered layers: one set, {each: layers} for each alone, or {sets: {label: layers}}"
    )
    strengths: Strengths = Field(
        description="strengths, in units of `scale`; or what they are to do, {kl: [0.3, 1.0]}: the axis `strength` "
        "then has the targets, the group `calibration` the strengths found"
    )
    also: list[Also] = Field(
        [],
        description="further edits, made in every steered cell beside the entry's own op (docs/howto/where.md). The "
        "grid does not grow: strengths are of the own op alone, which a calibration searches with these in place, "
        "against the model without any edit",
    )
    controls: Controls = Field(
        ["zero", "random"],
        description="`zero`: the same prompts unsteered, without the edits of `also` too; the others take the place of "
        "the entry's own vector alone, and the edits of `also` stay. `random`: the cell's vectors under one random "
        "rotation, the same at every layer; `{random: 20}`: under so many, labelled `random`, `random-2` and so on; "
        "`shuffled`: at equal norm, what the same method makes of samples whose labels are shuffled (as "
        "`labels: shuffled` of a method, by the plan's seed), of a contrast, of its texts with their sides shuffled "
        "(the i-th texts change places or not, where there are as many on both); `{shuffled: 20}`: shuffled so often, "
        "labelled likewise. "
        "Of K draws p is 1 / (K + 1) at least in the claims table: 199 can agree. `prompted`: no edit at all, the "
        "emotion asked for in words",
    )
    prompted: Prompted = Field(Prompted(), description="what the control `prompted` asks for")

    @property
    def label(self) -> str:
        """The label on the `op` axis."""
        return self.name or self.op

    def labels(self) -> list[float]:
        """The labels of the `strength` axis: strengths, or the targets of their calibration."""
        return labels_of_strengths(self.strengths)


def labels_of_strengths(strengths: Calibrated | list[float]) -> list[float]:
    """Strengths as labels, or the targets of their calibration."""
    return strengths.targets if isinstance(strengths, Calibrated) else [float(strength) for strength in strengths]
