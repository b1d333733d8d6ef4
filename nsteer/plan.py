"""The plan: its fields, their types, defaults and meaning, and nothing else.

The schema is strict: an unknown key or a wrong type is an error. Field descriptions are the reference in
`docs/plan.md` and the JSON Schema of `nsteer schema`, so they are written once, here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from nsteer import layers
from nsteer.presets import EMOTION_SETS, PRESETS, RATINGS
from nsteer.reader import kind


class Part(BaseModel):
    """A part of a plan: frozen, strict, closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)


def wrong(found: str, expected: str, hint: str = "") -> PydanticCustomError:
    """A validation error in nsteer's own words."""
    context = {"found": found, "expected": expected, "hint": hint}
    return PydanticCustomError("nsteer", "expected {expected}, found {found}", context)


def _layers(value: Any) -> Any:
    if why := layers.problem_of(value):
        raise wrong(why, layers.FORMS)
    return value


def _shorthand(field: str):
    """`zoo/llama` for `{id: zoo/llama}`: text stands for the one field that matters most."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _filled(value: Any) -> Any:
    if isinstance(value, (list, dict)) and not value:
        raise wrong("an empty list" if isinstance(value, list) else "an empty mapping", "at least one entry")
    return value


def _distinct(value: list) -> list:
    twice = [item for i, item in enumerate(value) if item in value[:i]]
    if twice:
        raise wrong(f"{twice[0]!r} twice", "each label once")
    return value


Filled = BeforeValidator(_filled)
Distinct = PlainValidator(_distinct)
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


def _prompts(value: Any) -> Any:
    if isinstance(value, dict):
        _filled(value)
        bad = [text for text in value.values() if not isinstance(text, str) or not text]
        if bad:
            raise wrong(kind(bad[0]), "label: prompt, both text")
        return value
    if isinstance(value, list):
        _filled(value)
        bad = [text for text in value if not isinstance(text, str) or not text]
        if bad:
            raise wrong(kind(bad[0]), "a list of prompts")
        return _distinct(value)
    if isinstance(value, str):
        return value
    raise wrong(kind(value), "the name of a prompt set, a list of prompts, or label: prompt")


def _ratings(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, dict) or not value:
        raise wrong(kind(value), RATINGS_FORM)
    for scale in value.values():
        if not isinstance(scale, dict):
            raise wrong(kind(scale), RATINGS_FORM)
        bad = [one for one in scale.values() if isinstance(one, bool) or not isinstance(one, (int, float))]
        if bad:
            raise wrong(kind(bad[0]), "a number for every emotion")
        if len(scale) < 3:
            raise wrong(f"{len(scale)} emotions", "at least 3 rated emotions on a scale")
    return value


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
PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "additionalProperties": {"type": "string"}},
    ]
}
Prompts = Annotated[Any, PlainValidator(_prompts), WithJsonSchema(PROMPTS)]
Op = Literal["add", "project_out", "clamp", "set_mean", "affine", "rotate"]
Scale = Literal["raw", "unit", "stream_norm", "reference_norm"]
Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
SITE = (
    "`resid_post`, the output of a block; `resid_pre`, its input; `attn_out`, `mlp_out`: what its attention and its "
    "MLP add to the stream"
)
Fraction = Annotated[float, Field(gt=0, le=1)]
Tolerance = Annotated[float, Field(gt=0, lt=1)]
MOST_SAMPLES = 100_000
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


class Window(Part):
    """Which generated tokens, the first of them 0: what any of its fields names."""

    index: Ids | None = Field(None, description="one, or a list")
    from_: int | None = Field(None, ge=0, alias="from", description="from this one on")
    to: int | None = Field(None, ge=0, description="up to this one, and not it")


Written = Annotated[
    Annotated[Literal["all"], Tag("a word")] | Annotated[Window, Tag("a mapping")],
    Discriminator(lambda value: "a word" if isinstance(value, str) else "a mapping"),
]


class Which(Part):
    """Positions: what any of its fields names. Those of a prompt count its tokens, BOS and template among them."""

    index: Integers | None = Field(None, description="of the prompt: one, or a list; below 0 from its end")
    from_: int | None = Field(None, alias="from", description="of the prompt: from here on; below 0 from its end")
    to: int | None = Field(None, description="of the prompt: up to here, and not here; below 0 from its end")
    ids: Ids | None = Field(None, description="tokens of the prompt with these ids")
    text: Texts | None = Field(
        None, description="tokens that hold a character of any occurrence of this text, or of these, in the prompt"
    )
    role: Literal["user", "assistant"] | None = Field(
        None,
        description="with a chat template: what the prompt says (`user`), what the model writes (`assistant`)",
    )
    prompt: Literal["all"] | None = Field(None, description="every token of the prompt")
    generated: Written | None = Field(None, description="generated tokens: `all`, or a window of them")


Excepted = Annotated[
    Annotated[Literal["all", "prompt", "generated", "last"], Tag("a word")]
    | Annotated[int, Tag("an index")]
    | Annotated[list[int], Filled, Tag("indices")]
    | Annotated[Which, Tag("a mapping")],
    Discriminator(_form),
]


class Where(Which):
    """As `Which`; `except` takes positions away. A mapping of `except` alone starts from all."""

    except_: Excepted | None = Field(None, alias="except", description="positions left out: in any of these forms")


Positions = Annotated[
    Annotated[Literal["all", "prompt", "generated", "last"], Tag("a word")]
    | Annotated[int, Tag("an index")]
    | Annotated[list[int], Filled, Tag("indices")]
    | Annotated[Where, Tag("a mapping")],
    Discriminator(_form),
]


class Resources(Part):
    """What a worker with a model takes of its node, under `run --on ray`; elsewhere nothing looks at it."""

    cpus: int | None = Field(None, ge=1, description="CPU cores; `threads` of the plan, else 1, when left out")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs; a share such as 0.5 puts two workers on one; 1 when left out where nodes have GPUs and "
        "`device` is not `cpu`",
    )
    memory_gib: float | None = Field(None, gt=0, description="host memory in GiB; what `check` estimates when left out")


class Model(Part):
    """A causal language model: a hub id, a local directory, or `zoo/NAME`."""

    id: str = Field(min_length=1, description="hub id, path of a local directory, or `zoo/NAME`")
    label: str | None = Field(
        None, min_length=1, description="label on the `model` axis; the id when left out (of a directory, its name)"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; the commit found is recorded")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights in memory")
    device: str = Field("auto", description="`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="attention implementation; transformers' own choice when left out"
    )
    quantization: Literal["int8"] | None = Field(
        None, description="`int8`: linear layers by LLM.int8 (bitsandbytes; extra `nsteer[int8]`); none when left out"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model repository brings")
    resources: Resources = Field(Resources(), description="what a worker with this model takes (`run --on ray`)")


class Generate(Part):
    """How text is generated. Greedy unless `sample`; a row's draw depends on its own seed, never on its batch."""

    max_new_tokens: int = Field(50, ge=1, description="most tokens to generate")
    sample: bool = Field(False, description="sample instead of greedy decoding")
    temperature: float = Field(1.0, gt=0, description="softmax temperature (sampling only)")
    top_p: Fraction = Field(1.0, description="nucleus: least share of probability kept, of all tokens (sampling only)")
    top_k: int = Field(0, ge=0, description="most likely tokens kept, 0 for all (sampling only)")


class Pooling(Part):
    """Which positions stand for a text, and how they become one vector per layer."""

    kind: Literal["last", "mean", "mean_from", "mid_generation"] = Field(
        description="`last` token; `mean` over positions; `mean_from` position k on; `mid_generation`: the one token "
        "at `prompt_len + gen_len // 2`, or the last prompt token when at most 10 tokens were generated (Jeong 2026)"
    )
    k: int | None = Field(None, ge=0, description="first position that counts (`mean_from` only), 0-based")
    over: Literal["auto", "all", "generated"] = Field(
        "auto",
        description="where positions are counted: the whole text or its generated part; `auto`: the "
        "generated part if the model wrote it, else the whole text",
    )
    bos: bool = Field(False, description="count a leading BOS token in means (its stream norm is 10-100 x others')")


class ProjectOut(Part):
    """Denoising: principal components of the neutral samples are projected out of every vector."""

    variance: Fraction = Field(0.5, description="least share of the neutral samples' variance to remove")


class Estimator(Part):
    """How an emotion's samples and what they are set against become a direction (docs/methods.md)."""

    kind: Literal["mean_difference", "pca_difference", "ridge", "logistic", "lda"] = Field(
        "mean_difference",
        description="`mean_difference`; `pca_difference`: first principal component of paired differences, its sign "
        "towards the mean difference; `ridge`, `logistic`: weights of a linear probe; `lda`: the mean difference "
        "whitened. All but the first need baseline neutral_mean or rest",
    )
    centre: bool = Field(False, description="take the differences' mean away first (`pca_difference` only)")
    penalty: float = Field(
        0.1, gt=0, description="weight of the L2 penalty, at total variance 1 (`ridge`, `logistic` only)"
    )
    shrinkage: float | None = Field(
        None, gt=0, le=1, description="of the covariance, 1 for no whitening; Ledoit-Wolf's when left out (`lda` only)"
    )

    def parameters(self) -> dict[str, Any]:
        """The fields that the estimator of this kind has."""
        return {name: getattr(self, name) for name in PARAMETERS.get(self.kind, ())}


PARAMETERS = {
    "pca_difference": ("centre",),
    "ridge": ("penalty",),
    "logistic": ("penalty",),
    "lda": ("shrinkage",),
}
"""Estimator -> its own fields."""


class Method(Part):
    """How texts become one vector per emotion and layer."""

    preset: str | None = Field(None, description=f"a protocol: {', '.join(PRESETS)}; fields given here override it")
    source: Literal["generation", "comprehension"] = Field(
        description="`generation`: the model writes a text and is then read; `comprehension`: it reads a given passage"
    )
    samples: int = Field(10, ge=1, le=MOST_SAMPLES, description="texts per emotion")
    neutral_samples: int | None = Field(
        None, ge=0, le=MOST_SAMPLES, description="neutral texts; as many as `samples` when left out"
    )
    templates: str | Annotated[list[str], Filled] = Field(
        "story_templates", description="instructions: a field of the text set, or a list with {emotion} (generation)"
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto", description="chat template: `auto` uses it where the model has one, `always` requires it"
    )
    system_prompt: str | None = Field(None, description="system turn before the instruction (chat only)")
    generate: Generate = Field(Generate(max_new_tokens=256), description="decoding of the texts (generation only)")
    draws_of: str | None = Field(
        None,
        description="a method whose random draws it uses: where all else is equal their texts are the same, and "
        "written once (sampling only; greedy texts are shared anyway)",
    )
    pooling: Annotated[Pooling, _shorthand("kind")] = Field(Pooling(kind="last"), description="positions read")
    baseline: Literal["neutral_mean", "grand_mean", "rest", "none"] = Field(
        "neutral_mean",
        description="what an emotion is set against: the neutral mean, the mean over the emotions, the mean over the "
        "other emotions, or nothing",
    )
    estimator: Annotated[Estimator, _shorthand("kind")] = Field(
        Estimator(), description="how an emotion and what it is set against become a direction"
    )
    labels: Literal["given", "shuffled"] = Field(
        "given",
        description="`shuffled`: a control; labels change places among the samples of one number before vectors are "
        "derived, by the plan's seed (the neutral ones too, where the baseline is their mean)",
    )
    project_out: ProjectOut | None = Field(None, description="remove neutral principal components from the vectors")
    unit_norm: bool = Field(True, description="scale every vector to length 1 (its raw length is kept as `norm`)")


class Vectors(Part):
    """Which emotion vectors steer."""

    methods: Annotated[list[str], Filled] | None = Field(None, description="methods of the plan; all when left out")
    emotions: list[str] | None = Field(
        None, description="emotions steered to; all when left out, none when empty (beside `formulas`)"
    )
    formulas: dict[Label, str] = Field(
        {},
        description="label: formula, e.g. `joy_not_gloom: 0.5*happy - gloomy`: what else steers, labelled so on the "
        "`emotion` axis. Arithmetic (as in `directions`) over emotion vectors and axes of the plan's `ratings`, of the "
        "method at hand or `method.happy`. Its class for the judge: `judge.map`",
    )
    layer: VectorLayer = Field(
        "same", description="the layer a vector comes from: `same` (each steered layer has its own) or one layer"
    )


class When(Part):
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


class Schedule(Part):
    """How an edit goes on over the tokens that the model writes, the first of them 0; the prompt has full strength."""

    first: int | None = Field(None, ge=1, description="only so many generated tokens are edited")
    linear: int | None = Field(None, ge=1, description="tokens until strength 0: strength x max(0, 1 - token / linear)")
    half_life: float | None = Field(
        None, gt=0, description="tokens until half the strength: strength x 0.5 ** (token / half_life)"
    )


class Calibrated(Part):
    """Strengths by what they do: for each vector the least one that changes the model's distributions so much.

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
    tolerance: Tolerance = Field(0.02, description="how far the value at the strength found may be off, relative")
    tokens: int = Field(
        16, ge=1, description="tokens of the unsteered continuation measured a prompt; at most what is generated"
    )
    prompts: Prompts | None = Field(None, description="prompts measured on; the block's own when left out")
    most: float | None = Field(
        None,
        gt=0,
        description="greatest strength tried; when left out 10 (`stream_norm`, `reference_norm`), 100000 (`raw`, "
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


class Also(Part):
    """One more edit of every steered cell of a block, the same whatever emotion, strength and control the cell has."""

    op: Op = Field(description="what is done to the stream: docs/ops.md, as in steer.op")
    direction: str = Field(
        description="an emotion, or a formula over emotions and axes as in `vectors.formulas`: of the method whose "
        "vectors steer, or `method.happy`"
    )
    layers: Layers = Field("all", description="edited layers; each has its own vector")
    order: Literal["before", "after"] = Field(
        "before",
        description="at a layer and site that the block's own op edits too: before it or after it; among themselves in "
        "the list's order",
    )
    strength: float = Field(1.0, description="as in edits.strength, in units of `scale`")
    scale: Scale = Field("stream_norm", description="unit of strength; see steer.scale")
    norm_skip: int = Field(0, ge=0, description="leading positions left out of the live norm")
    site: Site = Field("resid_post", description=f"what is edited: {SITE}")
    positions: Positions = Field("all", description="edited positions, as in steer.positions")
    when: When | None = Field(None, description="edit only where this holds; the gate is an emotion, as in `steer`")
    schedule: Schedule | None = Field(None, description="how the edit goes on while the model writes")


class Steer(Part):
    """A grid of steered generations: method x emotion x layer set x strength x control x prompt x seed."""

    name: Label | None = Field(None, description="label on the `op` axis; the op's name when left out")
    vectors: Vectors = Field(Vectors(), description="the vectors that steer")
    op: Op = Field(
        "add",
        description="`add` the vector; `project_out` its direction; `clamp` the projection on it to a value; "
        "`set_mean`: to that of the mean of the method's neutral samples; `affine`: to that plus a value; `rotate` the "
        "stream towards it at constant length (docs/ops.md)",
    )
    scale: Scale = Field(
        "stream_norm",
        description="unit of strength: `raw` x the vector as the method left it; `unit` x the vector at length 1; "
        "`stream_norm` x the live mean norm of the row's residual stream at that layer; `reference_norm` x the "
        "mean norm of the neutral samples' streams at that layer. Not for `project_out` and `set_mean`, whose strength "
        "is a fraction, nor for `rotate`, whose strength is an angle in degrees",
    )
    norm_skip: int = Field(0, ge=0, description="leading positions left out of the live norm (1 leaves out BOS)")
    layers: LayerSets = Field(
        "all", description="steered layers: one set, {each: layers} for each alone, or {sets: {label: layers}}"
    )
    site: Site = Field("resid_post", description=f"what is edited: {SITE} (docs/howto/where.md)")
    positions: Positions = Field(
        "all",
        description="steered positions: `prompt`, `generated` (tokens the model wrote), `all` (both), `last` "
        "(the prompt's last token), an index, a list of them, or a mapping (docs/howto/where.md)",
    )
    when: When | None = Field(None, description="edit only where this holds")
    schedule: Schedule | None = Field(None, description="how the edit goes on while the model writes")
    strengths: Strengths = Field(
        description="strengths, in units of `scale`; or what they are to do, {kl: [0.3, 1.0]}: the axis `strength` "
        "then has the targets, the group `calibration` the strengths found"
    )
    also: list[Also] = Field(
        [],
        description="further edits, made in every steered cell beside the block's own op (docs/howto/where.md). The "
        "grid does not grow: strengths are of the own op alone, which a calibration searches with these in place, "
        "against the model without any edit",
    )
    prompts: Prompts = Field(description="a prompt set of the text set, a list of prompts, or label: prompt")
    chat: Literal["auto", "always", "never"] = Field("never", description="put prompts through the chat template")
    controls: list[Literal["zero", "random", "shuffled"]] = Field(
        ["zero", "random"],
        description="`zero`: the same prompts unsteered, without the edits of `also` too; the others take the place "
        "of the block's own vector alone, and the edits of `also` stay. `random`: a random direction of equal norm for "
        "every cell; "
        "`shuffled`: at equal norm, what the same method makes of samples whose labels are shuffled (as "
        "`labels: shuffled` of a method, by the plan's seed)",
    )
    project: bool = Field(
        False,
        description="also keep the projections of the stream, steered and unsteered, on every emotion's vector of the "
        "method, at the prompt's last token and over the generated ones",
    )
    generate: Generate = Field(Generate(), description="decoding of the continuation")
    seeds: Annotated[list[int], Filled] = Field([0], description="one continuation a seed (sampling only)")

    def labels(self) -> list[float]:
        """The labels of the `strength` axis: strengths, or the targets of their calibration."""
        one = self.strengths
        return one.targets if isinstance(one, Calibrated) else [float(strength) for strength in one]


class Judge(Part):
    """An external text classifier that reads the continuations."""

    classifier: str = Field(min_length=1, description="hub id, local directory or `zoo/judge`")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    device: str = Field("auto", description="`auto` or a torch device")
    map: dict[str, str | None] | None = Field(
        None,
        description="emotion -> class of the judge, or null where it has none; an emotion left out is its own class",
    )
    over: Literal["continuation", "all"] = Field(
        "continuation", description="what it reads: the continuation alone, or the prompt and the continuation"
    )


class HeldOut(Part):
    """What the setting that is found is scored on besides: prompts, seeds or both that no search has seen."""

    prompts: Prompts | None = Field(None, description="other prompts; the block's own when left out")
    seeds: Annotated[list[int], Filled] | None = Field(
        None, description="other seeds (sampling only); the block's own when left out"
    )


class Tune(Part):
    """The layer set and strength of a steer block that do best, vector by vector: `nsteer tune`.

    The block's own layer sets and strengths are the coarse grid; each round adds strengths about the best ones.
    """

    steer: str | None = Field(None, description="label of the block; the only one when left out")
    objective: Literal["probability", "named", "success"] = Field(
        "probability",
        description="mean over continuations of: `probability` of the target's class under the judge; `named`: that "
        "class is the likeliest; `success`: its probability is above the unsteered twin's. Empty ones count as 0",
    )
    perplexity_ratio: float = Field(
        3.0, gt=0, description="settings whose perplexity ratio (geometric mean) is above this are not chosen"
    )
    cells: int | None = Field(
        None, ge=1, description="most settings tried a vector, the coarse grid counted; its controls come besides"
    )
    generations: int | None = Field(None, ge=1, description="the same as a number of continuations")
    rounds: int = Field(3, ge=0, description="most rounds after the coarse grid")
    held_out: HeldOut = Field(description="what the setting found is scored on besides")


class Thresholds(Part):
    """Where regimes and turning points lie. All ours: the paper's are not public (docs/science.md)."""

    repetition: float = Field(0.5, ge=0, le=1, description="least repetition score of a repetitive continuation")
    perplexity_ratio: float = Field(10.0, gt=0, description="least perplexity ratio of an explosive continuation")
    ngram: int = Field(4, ge=1, description="length of the token n-grams that may repeat")
    surgical: float = Field(0.8, ge=0, le=1, description="least share of surgical continuations at a sweet spot")
    collapse: float = Field(0.5, ge=0, le=1, description="a smaller share of surgical ones is past the collapse point")
    flip: float = Field(0.5, ge=0, le=1, description="least share judged as the target's class at the flip point")


class Measure(Part):
    """What else is measured, with the model at hand."""

    perplexity: bool = Field(
        True, description="perplexity of every continuation under the unsteered model, given its prompt"
    )
    lens: int = Field(
        10, ge=0, description="tokens that each vector promotes most through the unembedding (logit lens), per layer"
    )
    anisotropy: bool = Field(
        True, description="last-token streams of the text set's neutral sentences, with and without BOS"
    )
    thresholds: Thresholds = Field(Thresholds(), description="of regimes and turning points; used by `nsteer report`")


class Read(Part):
    """A residual stream to record."""

    site: Site = Field("resid_post", description=f"what is read: {SITE} (docs/howto/where.md)")
    layers: Layers = Field("all", description="layers recorded")
    pooling: Annotated[Pooling, _shorthand("kind")] | None = Field(
        None, description="one vector a prompt; every position is kept when left out"
    )
    positions: Positions = Field(
        "all", description="without `pooling`: the positions of the prompt that are kept; NaN stands at the others"
    )


class Direction(Part):
    """A direction at every layer, for `edits:`. Exactly one of its sources; text alone is a formula."""

    random: int | None = Field(None, description="seed of a random direction of length 1")
    contrast: Contrast | None = Field(None, description="difference of the means of two groups of texts")
    mean: Mean | None = Field(None, description="mean of a group of texts: the reference of `set_mean` and `affine`")
    store: Stored | None = Field(None, description="a vector from a store")
    formula: str | None = Field(
        None,
        description="arithmetic over other directions, this plan's emotion vectors (`happy`, or `method.happy` of "
        "several methods) and axes of its `ratings` (`valence`): `0.5*happy - gloomy`, `happy ⟂ gloomy`, "
        "`orthogonal(happy, gloomy, sad)`, `unit(happy)`",
    )


class Contrast(Part):
    """mean(positive) - mean(negative) of pooled residual streams (contrastive activation addition)."""

    positive: Annotated[list[str], Filled]
    negative: Annotated[list[str], Filled]
    pooling: Annotated[Pooling, _shorthand("kind")] = Pooling(kind="last")
    chat: Literal["auto", "always", "never"] = "never"


class Mean(Part):
    """The mean of pooled residual streams over texts."""

    texts: Annotated[list[str], Filled]
    pooling: Annotated[Pooling, _shorthand("kind")] = Pooling(kind="last")
    chat: Literal["auto", "always", "never"] = "never"


class Stored(Part):
    """A vector of the same model from the `vectors` of a store."""

    path: str
    method: str
    emotion: str


class Edit(Part):
    """One edit of the residual stream, at the same sites for every prompt."""

    op: Op = Field(description="what is done to the stream: docs/ops.md, as in steer.op")
    direction: str = Field(description="a name in `directions`")
    layers: Layers = Field("all", description="edited layers")
    vector_layer: VectorLayer = Field("same", description="the layer whose direction is used")
    reference: str | None = Field(
        None, description="a name in `directions` with `mean`: the reference mean (`set_mean` and `affine` only)"
    )
    site: Site = Field("resid_post", description=f"what is edited: {SITE}")
    positions: Positions = Field("all", description="edited positions, as in steer.positions")
    when: When | None = Field(None, description="edit only where this holds")
    schedule: Schedule | None = Field(None, description="how the edit goes on while the model writes")
    strength: float = Field(
        1.0,
        description="`add`: multiples of the scaled direction; `project_out`: fraction removed; `clamp`: the "
        "projection it is set to; `set_mean`: fraction of the way to the reference; `affine`: distance from it; "
        "`rotate`: degrees",
    )
    scale: Literal["raw", "unit", "stream_norm"] = Field("raw", description="unit of strength; see steer.scale")
    norm_skip: int = Field(0, ge=0, description="leading positions left out of the live norm")


class Remote(Part):
    """How programs travel to an NDIF server (`executor: ndif`). The API key comes from NDIF_API_KEY, never a plan."""

    host: str | None = Field(None, description="address of the server; nnsight's own setting (NDIF_HOST) when left out")
    in_flight: int = Field(4, ge=1, description="jobs that wait on the server at once")
    deadline: float = Field(1800.0, gt=0, description="seconds from a job's submission to its result, queue included")
    retries: int = Field(8, ge=0, description="tries again of what may pass: lost connections, 5xx, dead replicas")


class Batch(Part):
    """How rows travel together; results do not depend on it."""

    max_tokens_in_flight: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="most padded tokens in one batch, those to be generated counted; `auto`: from the memory that is "
        "free once the model is loaded",
    )
    rows: int = Field(128, ge=1, description="most rows in one batch")


class Plan(Part):
    """What is to be run: which models, which texts, what is read, what is edited, where results go."""

    name: Label = Field(description="name of the study")
    extends: str | None = Field(None, description="a plan that this one is built on (path relative to this file)")
    about: str = Field("", description="what it is for, in a sentence")
    models: Annotated[list[Annotated[Model, _shorthand("id")]], Filled] = Field(description="the models")
    texts: str = Field("nsteer", description="text set: `nsteer`, `zoo`, or a file (see docs/texts.md)")
    emotions: str | Annotated[list[str], Filled] = Field(
        "jeong-20", description=f"emotions: a list, or a named set: {', '.join(EMOTION_SETS)}"
    )
    ratings: RatingTable = Field(
        None,
        description="how emotions stand on scales such as valence and arousal, beside which `nsteer report` sets their "
        f"vectors: a table ({', '.join(RATINGS)}), or scale: {{emotion: number}}",
    )
    methods: dict[Label, Annotated[Method, _shorthand("preset")]] = Field(
        {}, description="extraction methods, by the label they get on the `method` axis"
    )
    layers: Layers = Field("all", description="layers at which samples are captured and vectors derived")
    steer: Annotated[list[Steer], BeforeValidator(_one_or_many)] = Field([], description="steering grids")
    tune: Tune | None = Field(None, description="search of the best layer set and strength (`nsteer tune`)")
    judge: Annotated[Judge, _shorthand("classifier")] | None = Field(None, description="who judges continuations")
    measure: Measure | None = Field(None, description="what else is measured")
    prompts: Prompts | None = Field(None, description="prompts of `reads` and `edits`")
    chat: Literal["auto", "always", "never"] = Field("never", description="chat template for `prompts`")
    reads: dict[Label, Read] = Field({}, description="streams to record on `prompts`, with and without edits")
    directions: dict[Label, Annotated[Direction, _shorthand("formula")]] = Field(
        {}, description="directions for `edits`, by name"
    )
    edits: dict[Label, Annotated[list[Edit], Filled]] = Field(
        {}, description="conditions: each a list of edits, at one layer in the list's order; `none` is always there too"
    )
    generate: Generate | None = Field(None, description="generate from `prompts` under each condition of `edits`")
    store: str = Field(
        min_length=1, description="where results go: a directory, or a URL of object storage (s3://…), ending in .zarr"
    )
    executor: Literal["local", "ndif", "rehearse"] = Field(
        "local",
        description="where programs run: in this process; on an NDIF server; in this process, as if on a server",
    )
    remote: Remote = Field(Remote(), description="the NDIF server")
    batch: Batch = Field(Batch(), description="sizes of batches")
    seed: int = Field(0, ge=0, description="seed of everything random: sampling, random controls")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads for the model; when left out torch's choice, but no more than cores that may be used",
    )

    def emotion_labels(self) -> list[str]:
        """The emotions as a list (a named set is spelled out)."""
        return list(EMOTION_SETS[self.emotions]) if isinstance(self.emotions, str) else list(self.emotions)

    def scales(self) -> dict[str, dict[str, float]]:
        """The scales of `ratings`, {scale: {emotion: number}} (a named table is spelled out); none without ratings."""
        found = RATINGS[self.ratings].scales if isinstance(self.ratings, str) else self.ratings or {}
        return {scale: {emotion: float(value) for emotion, value in table.items()} for scale, table in found.items()}


Direction.model_rebuild()
