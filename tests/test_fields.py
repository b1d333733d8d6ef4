"""Every field of the plan has its say in the fingerprints, or none: a field without an entry here is a failure."""

from __future__ import annotations

import json
import types
import typing

import pytest
import test_cells
from planside import model_folder, study
from pydantic import BaseModel
from test_cells import of, unchanged

from nsteer.plan import schema

PLAN = test_cells.PLAN
model = test_cells.model

ALL = {
    "samples",
    "activations",
    "vectors",
    "directions",
    "lens",
    "anisotropy",
    "unsteered",
    "steering",
    "judged",
    "outcomes",
}
ALL |= {"reads", "edited", "embeddings", "swapped"}
WRITTEN = {"samples", "activations", "embeddings"}
MADE = WRITTEN | {"swapped", "vectors", "lens", "unsteered", "steering", "judged", "outcomes"}
READ = MADE - {"samples", "embeddings", "swapped"}
DERIVED = READ - {"activations"}
GRID = {"steering", "judged", "outcomes"}
CONTINUED = GRID | {"unsteered"}
SOUGHT = GRID | {"calibration"}
SAMPLED = WRITTEN | {"swapped", "vectors", "lens"}
BY_KL = " & steer[0].strengths={kl: [0.7, 0.3]}"
TUNED = " & tune={steer: plain, cells: 20, held_out: {prompts: [y]}}"
PROMPTED = {"reads", "edited"}
EDIT_SOUGHT = PROMPTED | {"calibration_edits"}
EDIT_BY_KL = " & edits.push[0].strength={kl: [0.7, 0.3]}"
DIRECTED = PROMPTED | {"directions", "lens"}
KEPT = {"responses_judged", "directions", "lens"}
ANSWERED = {"responses"} | KEPT
JUDGING = "judges={v: {rule: {words: {told: [b]}}}, w: {rule: {words: {told: [a], other: [b]}}}}"
ASKING = "generate: {questions: [a, b], samples: 2, sample: true, max_new_tokens: 6}, filter: {judge: w}"
TOLD = f" & directions.told={{contrast: {{positive: [be], negative: [not], chat: always, {ASKING}}}}} & {JUDGING}"
NOTHING: set[str] = set()

FIELDS: dict[str, tuple[str, set[str]]] = {
    # field -> (a setting that changes it, the stages whose cells change)
    "name": ("name=other", NOTHING),
    "extends": ("", NOTHING),  # a matter of reading: the document has none
    "about": ("about=another", NOTHING),
    "chat_date": ("chat_date='2026-01-02'", NOTHING),  # its template writes no date: test_cells has one that does
    "models.id": ("models[0].id=OTHER", ALL),
    "models.label": ("models[0].label=n", NOTHING),  # other cells, the same numbers
    "models.peft": ("", ALL),  # its files are part of the identity: see test_peft
    "models.gguf": ("", ALL),  # its hash is the identity: see test_gguf
    "models.revision": ("", ALL),  # the commit it leads to is the identity: see below
    "models.dtype": ("models[0].dtype=float16", ALL),
    "models.device": ("models[0].device=cpu", NOTHING),
    "models.device_map": ("models[0].device_map={'': cpu}", NOTHING),
    "models.max_memory": ("models[0].max_memory={cpu: 20GiB} & models[0].device_map=auto", NOTHING),
    "models.attn_implementation": ("models[0].attn_implementation=eager", ALL),
    "models.quantization": ("models[0].quantization=int8", ALL),
    "models.resources.cpus": ("models[0].resources.cpus=2", NOTHING),
    "models.resources.gpus": ("models[0].resources.gpus=0.5", NOTHING),
    "models.resources.memory_gib": ("models[0].resources.memory_gib=1.0", NOTHING),
    "models.trust_remote_code": ("models[0].trust_remote_code=true", NOTHING),
    "texts": ("texts=TEXTS", ALL - PROMPTED - {"directions"}),
    "ratings": ("ratings=nsteer-20", NOTHING),
    "emotions": ("emotions=[happy, sad]", DERIVED | {"vectors", "swapped"}),
    "concepts": (
        "",
        NOTHING,
    ),  # another name of the axis: see test_concepts
    "methods.preset": ("", NOTHING),  # spelled out by its fields
    "methods.source": ("methods.drawn={source: comprehension, samples: 2}", SAMPLED - {"swapped"}),
    "methods.samples": ("methods.read.samples=1", MADE - {"swapped"}),
    "methods.neutral_samples": ("methods.drawn.neutral_samples=19", SAMPLED - {"swapped"}),
    "methods.templates": ('methods.made.templates=["tell {emotion}"]', MADE - {"unsteered"}),
    "methods.chat": ("methods.made.chat=never", MADE - {"unsteered"}),
    "methods.system_prompt": ("methods.made.system_prompt=brief", MADE - {"unsteered"}),
    "methods.generate.max_new_tokens": ("methods.made.generate.max_new_tokens=9", MADE - {"unsteered"}),
    "methods.generate.sample": ("methods.made.generate.sample=true", MADE - {"unsteered"}),
    "methods.generate.temperature": (
        "methods.drawn.generate.temperature=0.5",
        SAMPLED,
    ),
    "methods.generate.top_p": ("methods.drawn.generate.top_p=0.5", SAMPLED),
    "methods.generate.top_k": ("methods.drawn.generate.top_k=5", SAMPLED),
    "methods.draws_of": ("methods.drawn.draws_of=made", SAMPLED),
    "methods.context": ("methods.made.context=text", READ - {"unsteered"} | {"embeddings"}),
    "methods.pooling.kind": ("methods.read.pooling={kind: mean}", READ),
    "methods.pooling.k": ("methods.read.pooling={kind: mean_from, k: 1}", READ),
    "methods.pooling.over": ("methods.read.pooling={kind: last, over: all}", READ),
    "methods.pooling.bos": ("methods.read.pooling={kind: last, bos: true}", READ),
    "methods.baseline": ("methods.read.baseline=grand_mean", DERIVED),
    "methods.estimator.kind": ("methods.read.estimator=lda & methods.read.baseline=rest", DERIVED),
    "methods.estimator.centre": (
        "methods.made.estimator={kind: pca_difference, centre: true} & methods.made.baseline=rest",
        DERIVED - {"unsteered"},
    ),
    "methods.estimator.penalty": (
        "methods.read.estimator={kind: ridge, penalty: 1.0} & methods.read.baseline=rest",
        DERIVED,
    ),
    "methods.estimator.shrinkage": (
        "methods.read.estimator={kind: lda, shrinkage: 0.5} & methods.read.baseline=rest",
        DERIVED,
    ),
    "methods.labels": ("methods.read.labels=shuffled", DERIVED),
    "methods.project_out.variance": ("methods.drawn.project_out.variance=0.9", {"vectors", "lens"}),
    "methods.unit_norm": ("methods.read.unit_norm=false", DERIVED),
    "layers": ("layers=[1, 2] & steer[0].layers=1", READ | {"swapped"}),  # the second setting in both plans
    "steer.name": ("steer[0].name=other", NOTHING),  # other cells, the same numbers
    "steer.vectors.methods": ("steer[0].vectors.methods=[made, read]", NOTHING),  # more cells
    "steer.vectors.emotions": ("steer[0].vectors.emotions=[happy]", NOTHING),  # fewer cells
    "steer.vectors.concepts": ("", NOTHING),  # see concepts
    "steer.vectors.formulas": ("steer[0].vectors.formulas={mixed: happy - sad}", NOTHING),  # more cells
    "steer.vectors.directions": ("steer[0].vectors.directions=[noise]", NOTHING),  # more cells, no other ones
    "steer.vectors.layer": ("steer[0].vectors.layer=2", GRID),
    "steer.op": ("steer[0].op=clamp", GRID),
    "steer.scale": ("steer[0].scale=unit", GRID),
    "steer.norm_skip": ("steer[0].norm_skip=1", GRID),
    "steer.layers": ("steer[1].layers={each: [1]}", NOTHING),  # fewer cells
    "steer.when.direction": ("steer[0].when={direction: sad, above: 0.5} & steer[0].when={above: 0.5}", GRID),
    "steer.when.above": ("steer[0].when.above=1.0 & steer[0].when={above: 0.5}", GRID),
    "steer.when.below": ("steer[0].when.below=1.0 & steer[0].when={above: 0.5}", GRID),
    "steer.when.of": ("steer[0].when.of=cosine & steer[0].when={above: 0.5}", GRID),
    "steer.when.after": ("steer[0].when={after: [5]}", GRID),
    "steer.schedule.first": ("steer[0].schedule={first: 2}", GRID),
    "steer.schedule.linear": ("steer[0].schedule={linear: 2}", GRID),
    "steer.schedule.half_life": ("steer[0].schedule={half_life: 2.0}", GRID),
    "steer.strengths.kl": (f"steer[0].strengths.kl=[0.7]{BY_KL}", NOTHING),  # fewer cells
    "steer.strengths.perplexity_ratio": (
        "steer[0].strengths={perplexity_ratio: [1.5]} & steer[0].strengths={kl: [1.5]}",
        SOUGHT,
    ),
    "steer.strengths.tolerance": (f"steer[0].strengths.tolerance=0.1{BY_KL}", SOUGHT),
    "steer.strengths.tokens": (f"steer[0].strengths.tokens=3{BY_KL}", SOUGHT),
    "steer.strengths.prompts": (f"steer[0].strengths.prompts=[c]{BY_KL}", SOUGHT),
    "steer.strengths.max_strength": (f"steer[0].strengths.max_strength=2.0{BY_KL}", SOUGHT),
    "steer.strengths.random": (f"steer[0].strengths.random=own{BY_KL}", GRID),  # of the random cells
    "steer.prompts": ("steer[0].prompts={a: one}", CONTINUED),  # a cell holds all its prompts
    "steer.chat": ("steer[0].chat=always", CONTINUED),
    "steer.prompted.towards": (
        'steer[0].prompted={"towards": "be {emotion}"} & steer[0].controls=[prompted]',
        {"prompted"},
    ),
    "steer.prompted.away": (
        'steer[0].prompted={"away": "not {emotion}"} & steer[0].controls=[prompted] & steer[0].strengths=[-0.1, 0.1]',
        {"prompted"},
    ),
    "steer.controls": ("steer[0].controls=[zero]", NOTHING),  # fewer cells
    "steer.project": ("steer[1].project=false", CONTINUED),
    "steer.generate.max_new_tokens": ("steer[0].generate.max_new_tokens=7", CONTINUED),
    "steer.generate.sample": ("steer[0].generate.sample=true", CONTINUED),
    "steer.generate.temperature": ("steer[1].generate.temperature=0.5", CONTINUED),
    "steer.generate.top_p": ("steer[1].generate.top_p=0.5", CONTINUED),
    "steer.generate.top_k": ("steer[1].generate.top_k=5", CONTINUED),
    "steer.seeds": ("steer[1].seeds=[0]", CONTINUED),  # a cell holds all its seeds
    **{
        f"tune.{name}": (f"tune.{name}={value}{TUNED}", NOTHING)  # more cells
        for name, value in {
            "steer": "plain",
            "objective": "named",
            "perplexity_ratio": "2.0",
            "cells": "12",
            "rounds": "1",
            "held_out.prompts": "[z]",
        }.items()
    },
    "tune.generations": ("tune={steer: plain, generations: 99, held_out: {prompts: [y]}}", NOTHING),
    "tune.held_out.seeds": (f"tune={{steer: drawn, cells: 20, held_out: {{seeds: [4]}}}}{TUNED}", NOTHING),
    "judge.classifier": ("", {"judged"}),  # by its identity: see test_cells
    "judge.revision": ("", {"judged"}),  # the commit it leads to is the identity
    "judge.device": ("judge.device=cpu", NOTHING),
    "judge.map.rises": ("judge.map={happy: joy}", NOTHING),  # read afterwards, from the probabilities
    "judge.map.falls": ("judge.map={happy: {falls: [sad, angry]}}", NOTHING),
    "judge.over": ("judge.over=all", {"judged"}),
    "measure.perplexity": ("measure.perplexity=false", NOTHING),
    "measure.swap": ("measure.swap=2", {"swapped"}),
    "measure.embeddings": ("measure.embeddings=false", NOTHING),
    "measure.lens": ("measure.lens=6", {"lens"}),
    "measure.capability": ("measure.capability=true", NOTHING),  # more cells: see below
    "measure.anisotropy": ("measure.anisotropy=false", NOTHING),
    "prompts": ("prompts={a: one}", PROMPTED),
    "chat": ("chat=always", PROMPTED),
    "reads.site": ("reads.mean.site=attn_out", {"reads"}),
    "reads.layers": ("reads.mean.layers=[1]", {"reads"}),
    "reads.pooling.kind": ("reads.mean.pooling={kind: last}", {"reads"}),
    "reads.pooling.k": ("reads.mean.pooling={kind: mean_from, k: 1}", {"reads"}),
    "reads.pooling.over": ("reads.mean.pooling={kind: mean, over: all}", {"reads"}),
    "reads.pooling.bos": ("reads.mean.pooling={kind: mean, bos: true}", {"reads"}),
    "directions.random": ("directions.noise.random=1", DIRECTED),
    "directions.formula": ("directions.noise=made.happy", PROMPTED),
    "directions.contrast.positive": ("directions.day.contrast.positive=[dawn]", DIRECTED),
    "directions.contrast.negative": ("directions.day.contrast.negative=[dusk]", DIRECTED),
    "directions.contrast.pooling.kind": ("directions.day.contrast.pooling={kind: mean}", DIRECTED),
    "directions.contrast.pooling.k": ("directions.day.contrast.pooling={kind: mean_from, k: 1}", DIRECTED),
    "directions.contrast.pooling.over": ("directions.day.contrast.pooling={kind: last, over: all}", DIRECTED),
    "directions.contrast.pooling.bos": ("directions.day.contrast.pooling={kind: last, bos: true}", DIRECTED),
    "directions.contrast.chat": ("directions.day.contrast.chat=always", DIRECTED),
    **{
        f"directions.contrast.{name}": (f"directions.told.contrast.{set_to}{TOLD}", stages)
        for name, set_to, stages in (
            ("generate.questions", "generate.questions=[a, c]", ANSWERED),
            ("generate.samples", "generate.samples=3", ANSWERED),
            ("generate.max_new_tokens", "generate.max_new_tokens=7", ANSWERED),
            ("generate.sample", "generate={questions: [a, b], max_new_tokens: 6}", ANSWERED),
            ("generate.temperature", "generate.temperature=0.5", ANSWERED),
            ("generate.top_p", "generate.top_p=0.5", ANSWERED),
            ("generate.top_k", "generate.top_k=5", ANSWERED),
            ("filter.judge", "filter.judge=v", KEPT),
            ("filter.class_", "filter={judge: w, class: other}", KEPT),
            ("filter.above", "filter.above=0.5", KEPT),
            ("filter.below", "filter.below=0.5", KEPT),
            ("filter.min_answers", "filter.min_answers=2", KEPT - {"responses_judged"}),
        )
    },
    "directions.contrast.filter.coherence": ("", KEPT),  # of judges that rate it: test_responses
    "directions.contrast.preset": ("", NOTHING),  # spelled out by its fields
    "directions.mean.texts": (
        "directions.noise.mean.texts=[dusk] & directions.noise={mean: {texts: [dawn]}}",
        DIRECTED,
    ),
    "directions.mean.pooling.kind": (
        "directions.noise.mean.pooling={kind: mean} & directions.noise={mean: {texts: [dawn]}}",
        DIRECTED,
    ),
    "directions.mean.pooling.k": (
        "directions.noise.mean.pooling={kind: mean_from, k: 1} & directions.noise={mean: {texts: [dawn]}}",
        DIRECTED,
    ),
    "directions.mean.pooling.over": (
        "directions.noise.mean.pooling={kind: last, over: all} & directions.noise={mean: {texts: [dawn]}}",
        DIRECTED,
    ),
    "directions.mean.pooling.bos": (
        "directions.noise.mean.pooling={kind: last, bos: true} & directions.noise={mean: {texts: [dawn]}}",
        DIRECTED,
    ),
    "directions.mean.chat": ("directions.noise.mean.chat=always & directions.noise={mean: {texts: [dawn]}}", DIRECTED),
    "directions.store.path": ("", PROMPTED),  # by the vector that stands there: see below
    "directions.store.method": ("", PROMPTED),
    "directions.store.emotion": ("", PROMPTED),
    "directions.store.concept": ("", PROMPTED),
    "edits.op": ("edits.push[0].op=clamp", PROMPTED),
    "edits.direction": ("edits.push[0].direction=day", PROMPTED),
    "edits.layers": ("edits.push[0].layers=[2]", PROMPTED),
    "edits.vector_layer": ("edits.push[0].vector_layer=2", PROMPTED),
    "edits.reference": (
        "edits.clamp[0].reference=other & directions.usual={mean: {texts: [dawn]}} & directions.other={mean: {texts: "
        "[dusk]}} & edits.clamp=[{op: affine, direction: day, reference: usual}]",
        PROMPTED,
    ),
    "edits.when.direction": (
        "edits.push[0].when={direction: day, above: 0.5} & edits.push[0].when={above: 0.5}",
        PROMPTED,
    ),
    "edits.when.above": ("edits.push[0].when.above=1.0 & edits.push[0].when={above: 0.5}", PROMPTED),
    "edits.when.below": ("edits.push[0].when.below=1.0 & edits.push[0].when={above: 0.5}", PROMPTED),
    "edits.when.of": ("edits.push[0].when.of=cosine & edits.push[0].when={above: 0.5}", PROMPTED),
    "edits.when.after": ("edits.push[0].when={after: [5]}", PROMPTED),
    "edits.schedule.first": ("edits.push[0].schedule={first: 2}", PROMPTED),
    "edits.schedule.linear": ("edits.push[0].schedule={linear: 2}", PROMPTED),
    "edits.schedule.half_life": ("edits.push[0].schedule={half_life: 2.0}", PROMPTED),
    "edits.strength.kl": (f"edits.push[0].strength.kl=[0.7]{EDIT_BY_KL}", NOTHING),  # fewer cells
    "edits.strength.perplexity_ratio": (
        "edits.push[0].strength={perplexity_ratio: [1.5]} & edits.push[0].strength={kl: [1.5]}",
        EDIT_SOUGHT,
    ),
    "edits.strength.tolerance": (f"edits.push[0].strength.tolerance=0.1{EDIT_BY_KL}", EDIT_SOUGHT),
    "edits.strength.tokens": (f"edits.push[0].strength.tokens=3{EDIT_BY_KL}", EDIT_SOUGHT),
    "edits.strength.prompts": (f"edits.push[0].strength.prompts=[c]{EDIT_BY_KL}", EDIT_SOUGHT),
    "edits.strength.max_strength": (f"edits.push[0].strength.max_strength=2.0{EDIT_BY_KL}", EDIT_SOUGHT),
    "edits.strength.random": ("", NOTHING),  # refused: conditions have no random control
    "edits.scale": ("edits.push[0].scale=unit", PROMPTED),
    "edits.norm_skip": (
        "edits.push=[{op: add, direction: noise, layers: [1], scale: stream_norm, norm_skip: 1}]",
        PROMPTED,
    ),
    "generate.max_new_tokens": ("generate.max_new_tokens=9", {"edited"}),
    "generate.sample": ("generate.sample=true", {"edited"}),
    "generate.temperature": ("generate={max_new_tokens: 8, sample: true, temperature: 0.5}", {"edited"}),
    "generate.top_p": ("generate={max_new_tokens: 8, sample: true, top_p: 0.5}", {"edited"}),
    "generate.top_k": ("generate={max_new_tokens: 8, sample: true, top_k: 5}", {"edited"}),
    "seeds": ("seeds=[0, 1] & generate={max_new_tokens: 8, sample: true}", {"edited"}),
    "project": ("project=true", {"edited"}),
    "store": ("store=other.zarr", NOTHING),
    "executor": ("executor=ndif", NOTHING),
    "remote.host": ("remote.host=http://other", NOTHING),
    "remote.in_flight": ("remote.in_flight=1", NOTHING),
    "remote.deadline": ("remote.deadline=5.0", NOTHING),
    "remote.retries": ("remote.retries=1", NOTHING),
    "vllm.tensor_parallel": ("vllm.tensor_parallel=2", NOTHING),
    "vllm.memory": ("vllm.memory=0.5", NOTHING),
    "vllm.max_length": ("vllm.max_length=99", NOTHING),
    "vllm.reference": ("vllm.reference=false", NOTHING),  # it matters under `executor: vllm`: see test_cells
    "batch.max_tokens_in_flight": ("batch.max_tokens_in_flight=64", NOTHING),
    "batch.rows": ("batch.rows=1", NOTHING),
    "seed": ("seed=1", SAMPLED | CONTINUED),
    "threads": ("threads=2", NOTHING),
}
for threshold in schema.Thresholds.model_fields:  # regimes are told afterwards, from what is measured
    value = "5" if threshold == "ngram" else "0.25"
    FIELDS[f"measure.thresholds.{threshold}"] = (f"measure.thresholds.{threshold}={value}", NOTHING)

WHERE = {
    "index": "{index: -1}",
    "from_": "{from: -1}",
    "to": "{to: 1}",
    "ids": "{ids: [5]}",
    "text": "{text: o}",
    "role": "{role: user}",
    "prompt": "{prompt: all}",
    "generated.index": "{generated: {index: 0}}",
    "generated.from_": "{generated: {from: 1}}",
    "generated.to": "{generated: {to: 1}}",
}
for field, setting, chat, stages in (
    ("steer", "steer[0]", "steer[0].chat=always", GRID),
    ("steer.also", "steer[0].also[0]", "steer[0].chat=always", GRID),
    ("edits", "edits.push[0]", "chat=always", PROMPTED),
    ("reads", "reads.whole", "chat=always", {"reads"}),
):
    for name, value in WHERE.items():
        more = f" & {chat}" * (name == "role") + " & steer[0].also=[{op: add, direction: sad}]" * (
            field == "steer.also"
        )
        taken = f"{{{'prompt: all, ' * (field == 'reads')}except: {value}}}"
        never = field == "reads" and (name == "prompt" or name.startswith("generated"))  # all it has, or has not
        FIELDS[f"{field}.positions.{name}"] = ("" if never else f"{setting}.positions={value}{more}", stages)
        FIELDS[f"{field}.positions.except_.{name}"] = ("" if never else f"{setting}.positions={taken}{more}", stages)
ALSO = {
    "op": "project_out",
    "direction": "calm",
    "layers": "[2]",
    "order": "after",
    "strength": "2.0",
    "scale": "unit",
    "norm_skip": "1",
    "site": "mlp_out",
    "when.direction": "calm",
    "when.above": "1.0",
    "when.below": "1.0",
    "when.of": "cosine",
    "when.after": "[5]",
    "schedule.first": "2",
    "schedule.linear": "2",
    "schedule.half_life": "2.0",
}
for name, value in ALSO.items():
    part, _, inner = name.partition(".")
    had = {"when": ", when: {above: 0.5}", "schedule": ", schedule: {first: 3}"}.get(part, "")
    value = f"{{first: 3, {inner}: {value}}}" if part == "schedule" and inner != "first" else value
    place = part if part == "schedule" and inner != "first" else name
    FIELDS[f"steer.also.{name}"] = (
        f"steer[0].also[0].{place}={value} & steer[0].also=[{{op: add, direction: sad{had}}}]",
        GRID,
    )
for field, setting, stages in (("steer", "steer[0]", GRID), ("edits", "edits.push[0]", PROMPTED)):
    FIELDS[f"{field}.site"] = (f"{setting}.site=attn_out", stages)

FIELDS["tune.judge"] = ("", NOTHING)
FIELDS["chat_arguments"] = ("", ALL)  # what the template makes of them counts, as text: test_conversations
for name in "file hub config revision split text label where limit columns separator".split():
    FIELDS[f"directions.contrast.{name}"] = ("", DIRECTED)  # where texts come from; the texts count: test_rows
for place in ("methods", "reads", "directions.contrast", "directions.mean"):
    FIELDS[f"{place}.pooling.over.text"] = FIELDS.pop(f"{place}.pooling.over")
    FIELDS[f"{place}.pooling.over.turn"] = ("", FIELDS[f"{place}.pooling.over.text"][1])
JUDGES = {
    "rule": "words regex case whole_word score",
    "choices": "question answers target ask chat model.id model.revision model.dtype",
    "llm": "rubric coherence model system ask logprobs max_tokens options chat local.id local.revision local.dtype",
    "python": "function classes",
    "scores": "tables key",
}
"""What a judge's numbers rest on, which is its identity: see test_judge_kinds, _llm, _python and _scores."""
BESIDE = {
    "choices": "model.device",
    "llm": "endpoint workers deadline retries local.device",
    "python": "threshold",
    "scores": "threshold",
}
for named, stages in ((JUDGES, {"judged"}), (BESIDE, NOTHING)):
    for kind, names in named.items():
        for name in names.split():
            FIELDS[f"judge.{kind}.{name}"] = FIELDS[f"judges.{kind}.{name}"] = ("", stages)
for name in ("classifier", "revision", "device", "map.rises", "map.falls", "over"):
    FIELDS[f"judges.{name}"] = ("", FIELDS[f"judge.{name}"][1])


def parts(annotation) -> list[type[BaseModel]]:
    """The parts of a plan that a field may hold; of texts from elsewhere what counts is what they say: test_rows."""
    if getattr(annotation, "__module__", "") == "nsteer.plan.schema.datasets":
        return []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, list, dict, typing.Union, types.UnionType):
        return [part for argument in typing.get_args(annotation) for part in parts(argument)]
    return []


def fields(part: type[BaseModel], above: str = "") -> list[str]:
    paths = []
    for name, field in part.model_fields.items():
        inner = parts(field.annotation)
        paths += [path for p in inner for path in fields(p, f"{above}{name}.")] or [f"{above}{name}"]
    return paths


def test_every_field_of_the_schema_has_an_entry():
    assert set(fields(schema.Plan)) == set(FIELDS)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Another model, and another text set, each of the same form."""
    from nsteer.plan import texts

    place = tmp_path_factory.mktemp("others")
    folder = model_folder(place / "other", 4, chat=True, vocab_size=7)
    zoo = (texts.HERE / "zoo.yaml").read_text()
    from ruamel.yaml import YAML

    data = YAML(typ="safe").load(zoo)
    for key in ("story_templates", "neutral_story_templates", "neutral_sentences", "neutral_passages"):
        data[key] = [f"{text} again" for text in data[key]]
    data["passages"] = {e: [f"{text} again" for text in group] for e, group in data["passages"].items()}
    (place / "texts.yaml").write_text(json.dumps(data))
    return {"OTHER": str(folder), "TEXTS": str(place / "texts.yaml")}


CHANGES = {field: entry for field, entry in FIELDS.items() if entry[0]}


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_the_stages_that_rest_on_it(model, others, field, monkeypatch):
    setting, stages = CHANGES[field]
    setting, _, both = setting.partition(" & ")
    more = both.split(" & ") if both else []
    name, _, value = setting.partition("=")
    if field == "texts":
        from pathlib import Path

        monkeypatch.chdir(Path(others["TEXTS"]).parent)
    setting = f"{name}={json.dumps(others[value]) if value in others else value}"
    changed = {
        stage
        for stage, keys in test_cells.changed(unchanged(model, *more), _cells(model, *more, setting)).items()
        if keys
    }
    assert changed == stages


def _cells(model, *settings: str):
    stages = of(model, *settings)
    if any(setting.startswith(("models[0].label", "steer[0].name")) for setting in settings):
        return {
            stage: {_renamed(key): fp for key, fp in fingerprints.items()} for stage, fingerprints in stages.items()
        }
    return stages


def _renamed(key: tuple) -> tuple:
    """A cell's labels as they are in the plan that was not changed."""
    return tuple({"n": "m", "other": "plain"}.get(label, label) for label in key)


# ---- what a name leads to ---------------------------------------------------------------------------------------


def test_a_revision_is_the_commit_it_leads_to(model, monkeypatch):
    from dataclasses import replace

    from nsteer.stages import cells
    from nsteer.stages.job import Job

    checked_study = study(PLAN, f"models=[{{id: {json.dumps(str(model))}, label: m}}]")
    (facts,) = checked_study.facts
    assert cells.vectors(Job(checked_study, facts)) == cells.vectors(
        Job(checked_study, replace(facts, revision="main"))
    )
    other = cells.vectors(Job(checked_study, replace(facts, identity="another commit")))
    assert set(cells.vectors(Job(checked_study, facts)).values()).isdisjoint(other.values())


def test_a_borrowed_direction_is_its_vector_not_its_place(tmp_path):
    import numpy as np

    from nsteer.plan.schema import Direction
    from nsteer.stages import arrays, cells
    from nsteer.stages.job import Job

    folder = model_folder(tmp_path / "model", 4, chat=True)
    checked_study = study(PLAN, f"models=[{{id: {json.dumps(str(folder))}, label: m}}]", "layers=all")
    (facts,) = checked_study.facts

    def filled(name: str, value: float) -> str:
        from nsteer.store import Store

        store, group = Store(tmp_path / name), arrays.vectors_group(checked_study, facts)
        store.prepare([group])
        data = arrays.dataset(
            {"layer": range(4), "d_model": range(8)},
            {
                "vector": (("layer", "d_model"), np.full((4, 8), value, np.float32)),
                "norm": (("layer",), np.ones(4, np.float32)),
                "n_samples": ((), 1),
                "n_distinct": ((), 1),
            },
        )
        store.commit(group.path, ("m", "made", "happy"), data, fingerprint=1)
        return str(tmp_path / name)

    def number(path: str, emotion: str = "happy") -> dict:
        spec = Direction(store={"path": path, "method": "made", "emotion": emotion})
        return cells._direction(Job(checked_study, facts), spec)

    first, copy, other = filled("a.zarr", 1.0), filled("b.zarr", 1.0), filled("c.zarr", 2.0)
    assert number(first) == number(copy) != number(other)
    assert number(first, "sad") == {"vector": None} == number(str(tmp_path / "none.zarr"))


@pytest.mark.parametrize(
    "stage",
    [
        *("samples", "activations", "vectors", "directions", "calibration", "steering"),
        *("judged", "outcomes", "lens", "anisotropy", "reads", "edited", "embeddings", "swapped", "capability"),
        *("responses", "responses_judged"),
    ],
)
def test_a_new_version_of_a_stage_does_it_again(model, monkeypatch, stage):
    from nsteer.stages import cells

    more = {"calibration": ["steer[0].strengths={kl: [0.7]}"], "capability": ["measure.capability=true"]}.get(stage, [])
    more = TOLD.split(" & ")[1:] if stage.startswith("responses") else more
    before = unchanged(model, *more)
    monkeypatch.setitem(cells.VERSIONS, stage, cells.VERSIONS[stage] + 1)
    changed = test_cells.changed(before, of(model, *more))
    assert set(before[stage]) == changed[stage]
    assert set(cells.VERSIONS) == {
        "samples",
        "activations",
        "embeddings",
        "swapped",
        "vectors",
        "responses",
        "responses_judged",
        "directions",
        "calibration",
        "steering",
        "judged",
        "outcomes",
        "lens",
        "anisotropy",
        "reads",
        "edited",
        "capability",
    }


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("steer[0].op=clamp", {"capability"}),
        ("steer[1].scale=unit", {"capability"}),
        ("methods.read.unit_norm=false", {"capability"}),
        ("edits.push[0].op=clamp", {"capability_edited"}),
        ("directions.day.contrast.positive=[dawn]", {"capability_edited"}),
        ("models[0].dtype=float16", {"capability", "capability_edited"}),
        ("steer[0].prompts={a: one}", NOTHING),
        ("steer[0].generate.max_new_tokens=7", NOTHING),
        ("steer[0].chat=always", NOTHING),
        ("generate.max_new_tokens=9", NOTHING),
        ("prompts={a: one}", NOTHING),
    ],
)
def test_what_edits_cost_rests_on_the_edits_and_not_on_the_plan_s_prompts(model, setting, expected):
    asked = "measure.capability=true"
    before = unchanged(model, asked)
    assert before["capability"].keys() == before["steering"].keys() and before["capability_edited"]
    assert {
        stage for stage in test_cells.changed(before, of(model, asked, setting)) if stage.startswith("cap")
    } == expected
