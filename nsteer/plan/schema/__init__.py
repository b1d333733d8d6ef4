"""The plan: its fields, their types, defaults and meaning, and nothing else.

The schema is strict: an unknown key or a wrong type is an error. Field descriptions are the reference in
`docs/plan.md` and the JSON Schema of `nsteer schema`, so they are written once, in this folder: `values` has the types
of fields, `methods` what makes vectors, `steering` what they do, `judges` who reads what comes of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag

from nsteer.plan.schema.contrasts import SIDES, Contrast, Filter, Mean, Responses
from nsteer.plan.schema.datasets import Dataset, OrDataset, Prompts, Rows, either
from nsteer.plan.schema.judges import JUDGE_KINDS, Choices, Judge, Llm, Python, Reader, Rule, Scores, Signed
from nsteer.plan.schema.methods import PARAMETERS, Estimator, Generate, Method, Pooling, ProjectOut, Span
from nsteer.plan.schema.steering import (
    Also,
    Calibrated,
    Continuing,
    Edit,
    Editing,
    Prompted,
    Schedule,
    Steer,
    Vectors,
    When,
    labels_of_strengths,
)
from nsteer.plan.schema.values import (
    SITE,
    Filled,
    Label,
    Layers,
    Positions,
    RatingTable,
    Section,
    Site,
    Where,
    Which,
    Window,
    one_or_many,
    shorthand,
)
from nsteer.science import axis
from nsteer.science.presets import EMOTION_SETS, RATINGS

__all__ = [
    "DIRECTION_SOURCES",
    "JUDGE_KINDS",
    "PARAMETERS",
    "SIDES",
    "Also",
    "Batch",
    "Calibrated",
    "Choices",
    "Continuing",
    "Contrast",
    "Dataset",
    "Direction",
    "Edit",
    "Editing",
    "Estimator",
    "Filter",
    "Generate",
    "HeldOut",
    "Judge",
    "Llm",
    "Mean",
    "Measure",
    "Method",
    "Model",
    "Plan",
    "Pooling",
    "ProjectOut",
    "Prompted",
    "Python",
    "Read",
    "Reader",
    "Remote",
    "Resources",
    "Responses",
    "Rows",
    "Rule",
    "Schedule",
    "Scores",
    "Signed",
    "Span",
    "Steer",
    "Stored",
    "Thresholds",
    "Tune",
    "Vectors",
    "Vllm",
    "When",
    "Where",
    "Which",
    "Window",
    "labels_of_strengths",
]


class Resources(Section):
    """What a worker with a model takes of its node, under `run --on ray`; elsewhere nothing looks at it."""

    cpus: int | None = Field(None, ge=1, description="CPU cores; `threads` of the plan, else 1, when left out")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs; a share such as 0.5 puts two workers on one; 1 when left out where nodes have GPUs and "
        "`device` is not `cpu`",
    )
    memory_gib: float | None = Field(None, gt=0, description="host memory in GiB; what `check` estimates when left out")


class Model(Section):
    """A causal language model: a hub id, a local directory, a GGUF file, or `zoo/NAME`."""

    id: str = Field(
        min_length=1, description="hub id, path of a local directory or of a GGUF file (`.gguf`), or `zoo/NAME`"
    )
    gguf: str | None = Field(
        None, min_length=1, description="the GGUF file of a hub id or a directory that has several; none when left out"
    )
    peft: str | None = Field(
        None, min_length=1, description="directory of an adapter (PEFT) that is merged into the model once it is loaded"
    )
    label: str | None = Field(
        None, min_length=1, description="label on the `model` axis; the id when left out (of a directory, its name)"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; the commit found is recorded")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights in memory")
    device: str = Field("auto", description="`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = Field(
        None,
        description="spreads a model that one device can not hold over several, by accelerate (`nsteer[large]`): "
        "`auto`, or a map from modules to a GPU's number, `cpu` or `disk`; `device` stays `auto`; none when left out",
    )
    max_memory: dict[str, str] | None = Field(
        None,
        description="what `device_map: auto` may fill of each GPU (by number) and of `cpu`: `{0: 20GiB, cpu: 60GiB}`",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="attention implementation; transformers' own choice when left out"
    )
    quantization: Literal["int8"] | None = Field(
        None, description="`int8`: linear layers by LLM.int8 (bitsandbytes; extra `nsteer[int8]`); none when left out"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model repository brings")
    resources: Resources = Field(Resources(), description="what a worker with this model takes (`run --on ray`)")


class HeldOut(Section):
    """What the setting that is found is scored on besides: prompts, seeds or both that no search has seen."""

    prompts: Prompts | None = Field(None, description="other prompts; the entry's own when left out")
    seeds: Annotated[list[int], Filled] | None = Field(
        None, description="other seeds (sampling only); the entry's own when left out"
    )


class Tune(Section):
    """The layer set and strength of a steer entry that score best for each vector (`nsteer tune`).

    The entry's own layer sets and strengths are the coarse grid; each round adds strengths near the best ones.
    """

    steer: str | None = Field(None, description="label of the steer entry; the only one when left out")
    judge: str | None = Field(None, description="label of the judge; the first one when left out")
    objective: Literal["score", "named", "success"] = Field(
        "score",
        description="mean over continuations of: `score` of the target's class under the judge; `named`: the judge "
        "says that it is that class; `success`: its score is above the unsteered continuation's. Empty ones count as 0",
    )
    perplexity_ratio: float = Field(
        3.0, gt=0, description="settings whose perplexity ratio (geometric mean) is above this are not chosen"
    )
    cells: int | None = Field(
        None,
        ge=1,
        description="maximum number of settings tried for each vector, the coarse grid included; its controls are "
        "extra",
    )
    generations: int | None = Field(None, ge=1, description="the same limit, as a number of continuations")
    rounds: int = Field(3, ge=0, description="maximum number of rounds after the coarse grid")
    held_out: HeldOut = Field(description="the held-out prompts or seeds on which the setting that was found is scored")


class Thresholds(Section):
    """Thresholds of regimes and turning points, all chosen by this project: the paper's are not public."""

    repetition: float = Field(0.5, ge=0, le=1, description="a continuation is repetitive from this repetition score on")
    perplexity_ratio: float = Field(10.0, gt=0, description="a continuation is explosive from this perplexity ratio on")
    ngram: int = Field(4, ge=1, description="length of the token n-grams that may repeat")
    surgical: float = Field(0.8, ge=0, le=1, description="minimum share of surgical continuations at a sweet spot")
    collapse: float = Field(0.5, ge=0, le=1, description="a smaller share of surgical ones is past the collapse point")
    flip: float = Field(0.5, ge=0, le=1, description="minimum share judged as the target's class at the flip point")


class Measure(Section):
    """What else is measured, while the model is loaded."""

    perplexity: bool = Field(
        True, description="perplexity of every continuation under the unsteered model, given its prompt"
    )
    lens: int = Field(
        10, ge=0, description="tokens that each vector promotes most through the unembedding (logit lens), per layer"
    )
    anisotropy: bool = Field(
        True, description="last-token streams of the text set's neutral sentences, with and without BOS"
    )
    swap: int = Field(
        0,
        ge=0,
        description="each generated text is read again behind the instructions of so many other emotions: whether "
        "vectors follow the text or its instruction (methods with `context: with_prompt`)",
    )
    embeddings: bool = Field(
        False,
        description="mean of what enters the first block over each sample's own text: what a bag of token embeddings "
        "tells apart without any block",
    )
    capability: bool = Field(
        False,
        description="what each steered condition, and each of `edits`, costs the model: NLL of capability passages, "
        "log-likelihood of the answers to capability questions, our own, under the same edits (docs/science.md)",
    )
    thresholds: Thresholds = Field(Thresholds(), description="of regimes and turning points; used by `nsteer report`")


class Read(Section):
    """A residual stream to record."""

    site: Site = Field("resid_post", description=f"what is read: {SITE} (docs/howto/where.md)")
    layers: Layers = Field("all", description="layers recorded")
    pooling: Annotated[Pooling, shorthand("kind")] | None = Field(
        None, description="one vector a prompt; every position is kept when left out"
    )
    positions: Positions = Field(
        "all", description="without `pooling`: the positions of the prompt that are kept; NaN stands at the others"
    )


class Stored(Section):
    """A vector of the same model from the `vectors` of a store."""

    path: str
    method: str
    emotion: str | None = Field(None, description="its label in a store with the axis `emotion`")
    concept: str | None = Field(None, description="its label in a store with the axis `concept`")

    @property
    def label(self) -> str:
        """The label of the vector on its axis."""
        return (self.emotion if self.concept is None else self.concept) or ""


class Direction(Section):
    """A vector at every layer, for `steer` and `edits`. Exactly one of its sources; text alone is a formula.

    It is kept among the `vectors` of the store: under its source on the axis `method`, under its name on `emotion`.
    """

    random: int | None = Field(None, description="seed of a random direction of length 1, one for all layers")
    contrast: Contrast | None = Field(
        None, description="difference of the means of two groups of texts, given or written by the model"
    )
    mean: Mean | None = Field(None, description="mean of a group of texts: the reference of `set_mean` and `affine`")
    store: Stored | None = Field(None, description="a vector from a store")
    formula: str | None = Field(
        None,
        description="arithmetic over other directions, this plan's emotion vectors (`happy`, or `method.happy` of "
        "several methods) and axes of its `ratings` (`valence`): `0.5*happy - gloomy`, `happy ⟂ gloomy`, "
        "`orthogonal(happy, gloomy, sad)`, `unit(happy)`",
    )

    @property
    def source(self) -> str:
        """Which of its sources it has: its label on the axis `method`."""
        return next((name for name in DIRECTION_SOURCES if getattr(self, name) is not None), "")


DIRECTION_SOURCES = ("random", "contrast", "mean", "store", "formula")
"""What a direction may be made of."""


class Remote(Section):
    """How programs travel to an NDIF server (`executor: ndif`). The API key comes from NDIF_API_KEY, never a plan."""

    host: str | None = Field(
        None,
        description="address of the server, which its user must name too (`--host`, NDIF_HOST, nnsight's setting); "
        "the user's when left out",
    )
    in_flight: int = Field(4, ge=1, description="jobs that wait on the server at once")
    deadline: float = Field(1800.0, gt=0, description="seconds from a job's submission to its result, queue included")
    retries: int = Field(
        8, ge=0, description="how often a transient failure is tried again: lost connections, 5xx, dead replicas"
    )


class Vllm(Section):
    """The engine of `executor: vllm` (docs/vllm.md); its dtype is the model's."""

    tensor_parallel: int = Field(1, ge=1, description="GPUs over which a model's weights are spread")
    memory: float = Field(0.9, gt=0, le=1, description="share of the device's memory that the engine may take")
    max_length: int | None = Field(
        None,
        ge=2,
        description="positions of the longest text, those to be generated included; the model's own, but at most 4096, "
        "when left out",
    )
    reference: bool = Field(
        True,
        description="compare the engine with transformers on the CPU before it is used, and refuse it where they "
        "differ by more than rounding; without it cells have fingerprints of their own, and only resid_pre and "
        "resid_post are available",
    )


class Batch(Section):
    """How rows are batched; results do not depend on it."""

    max_tokens_in_flight: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="maximum number of padded tokens in one batch, those to be generated included; `auto`: from the "
        "memory that is "
        "free once the model is loaded",
    )
    rows: int = Field(128, ge=1, description="maximum number of rows in one batch")


class Plan(Section):
    """What is to be run: which models, which texts, what is read, what is edited, where results go."""

    name: Label = Field(description="name of the study")
    extends: str | None = Field(None, description="a plan that this one is built on (path relative to this file)")
    about: str = Field("", description="what it is for, in a sentence")
    models: Annotated[list[Annotated[Model, shorthand("id")]], Filled] = Field(description="the models")
    texts: Annotated[Annotated[str, Tag("a name")] | OrDataset, either("a name")] = Field(
        "nsteer", description="text set: `nsteer`, `zoo`, a file (see docs/texts.md), or a Dataset of labelled texts"
    )
    emotions: str | Annotated[list[str], Filled] = Field(
        "jeong-20",
        description=f"emotions: a list, or a named set: {', '.join(EMOTION_SETS)}; when left out, with other `texts` "
        "than `nsteer`, those of the text set",
    )
    concepts: list[str] | None = Field(
        None,
        description="in place of `emotions`, where the vectors stand for something else: labels of the text set "
        "(none in a plan without `methods`). The axis `emotion` is then called `concept`, in the store and wherever "
        "else this reference says `emotion`; so it is in a plan that has `directions` alone, and names no emotion, "
        "unless its store has the axis `emotion` already",
    )
    ratings: RatingTable = Field(
        None,
        description="how emotions stand on scales such as valence and arousal, beside which `nsteer report` sets their "
        f"vectors: a table ({', '.join(RATINGS)}), or scale: {{emotion: number}}",
    )
    methods: dict[Label, Annotated[Method, shorthand("preset")]] = Field(
        {}, description="extraction methods, by the label they get on the `method` axis"
    )
    layers: Layers = Field("all", description="layers at which samples are captured and vectors derived")
    steer: Annotated[list[Steer], BeforeValidator(one_or_many)] = Field([], description="steering grids")
    tune: Tune | None = Field(None, description="search of the best layer set and strength (`nsteer tune`)")
    judge: Annotated[Judge, shorthand("classifier")] | None = Field(
        None, description="who judges continuations: the one of `judges` that is called `judge`"
    )
    judges: dict[Label, Annotated[Judge, shorthand("classifier")]] = Field(
        {}, description="several judges, by the label they get on the `judge` axis; the first one is what claims read"
    )
    measure: Measure | None = Field(None, description="what else is measured")
    prompts: Prompts | None = Field(None, description="prompts of `reads` and `edits`")
    chat: Literal["auto", "always", "never"] = Field("never", description="chat template for `prompts`")
    chat_date: str | None = Field(
        None,
        description="the date that chat templates write which read the clock (Llama 3), as '2026-11-28'; today when "
        "left out, and then cells of another day are other cells",
    )
    chat_arguments: dict[str, str | bool | int | float] = Field(
        {}, description="what chat templates are told besides, such as `{enable_thinking: false}`"
    )
    reads: dict[Label, Read] = Field({}, description="streams to record on `prompts`, with and without edits")
    directions: dict[Label, Annotated[Direction, shorthand("formula")]] = Field(
        {}, description="vectors for `steer` and `edits`, by name"
    )
    edits: dict[Label, Annotated[list[Edit], Filled]] = Field(
        {}, description="conditions: each a list of edits, at one layer in the list's order; `none` is always there too"
    )
    generate: Generate | None = Field(None, description="generate from `prompts` under each condition of `edits`")
    seeds: Annotated[list[int], Filled] = Field(
        [0], description="of `generate`: one continuation a seed (sampling only)"
    )
    project: bool = Field(
        False,
        description="beside `generate`: also keep the projections of the stream on every vector of the plan, under "
        "each condition of `edits`, at the prompt's last token and over the generated ones",
    )
    store: str = Field(
        min_length=1, description="where results go: a directory, or a URL of object storage (s3://…), ending in .zarr"
    )
    executor: Literal["local", "ndif", "vllm", "rehearse"] = Field(
        "local",
        description="where programs run: in this process; on an NDIF server; in a vLLM engine; in this process, as if "
        "on a server",
    )
    remote: Remote = Field(Remote(), description="the NDIF server")
    vllm: Vllm = Field(Vllm(), description="the vLLM engine")
    batch: Batch = Field(Batch(), description="sizes of batches")
    seed: int = Field(0, ge=0, description="seed of everything random: sampling, random controls")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads for the model; when left out torch's choice, but no more than cores that may be used",
    )

    @property
    def axis(self) -> str:
        """The name of the axis of what vectors stand for: `emotion` or `concept`."""
        return axis.EMOTION if self.concepts is None else axis.CONCEPT

    def all_judges(self) -> dict[str, Judge]:
        """Every judge by its label, the one of `judge` first."""
        return {**({"judge": self.judge} if self.judge is not None else {}), **self.judges}

    def emotion_labels(self) -> list[str]:
        """The emotions, or the concepts in their place, as a list (a named set is spelled out)."""
        if self.concepts is not None:
            return list(self.concepts)
        return list(EMOTION_SETS[self.emotions]) if isinstance(self.emotions, str) else list(self.emotions)

    def scales(self) -> dict[str, dict[str, float]]:
        """The scales of `ratings`, {scale: {emotion: number}} (a named table is spelled out); none without ratings."""
        scales = RATINGS[self.ratings].scales if isinstance(self.ratings, str) else self.ratings or {}
        return {scale: {emotion: float(value) for emotion, value in table.items()} for scale, table in scales.items()}
