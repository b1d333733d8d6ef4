"""Fingerprints: a changed knob changes exactly the cells that rest on it, and what does not matter changes none."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache

import pytest
from planside import model_folder, study

from nsteer.science.presets import NEUTRAL
from nsteer.stages import cells
from nsteer.stages.job import Job

PLAN = """\
name: study
texts: zoo
emotions: [happy, sad, calm]
methods:
  made: {source: generation, samples: 3, pooling: mean, baseline: grand_mean}
  drawn:
    {source: generation, samples: 20, generate: {sample: true}, baseline: neutral_mean, project_out: {variance: 0.5}}
  read: {source: comprehension, samples: 2, neutral_samples: 3, baseline: none}
layers: all
steer:
  - name: plain
    vectors: {methods: [made], emotions: [happy, sad]}
    strengths: [0.1, 0.2]
    prompts: {a: one, b: two}
  - name: drawn
    vectors: {methods: [read]}
    scale: reference_norm
    project: true
    layers: {each: [1, 2]}
    strengths: [0.1]
    prompts: [p, q]
    generate: {sample: true}
    seeds: [0, 1]
judge: {classifier: zoo/judge}
measure: {lens: 5, swap: 1, embeddings: true}
prompts: {a: one, b: two}
reads: {mean: {layers: [1, 2], pooling: mean}, whole: {layers: all}}
directions:
  noise: {random: 0}
  day: {contrast: {positive: [bright], negative: [dark]}}
edits:
  push: [{op: add, direction: noise, layers: [1]}]
  clamp: [{op: clamp, direction: day, layers: [2], strength: 4.0}]
generate: {max_new_tokens: 8}
store: study.zarr
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "four", 4, chat=True)


def bare(fingerprints: dict) -> dict:
    """Keys without the model: there is one."""
    return {tuple(labels): number for (_, *labels), number in fingerprints.items()}


def of(folder, *settings: str, text: str = PLAN, judge: str = "j", day: int = 26) -> dict[str, cells.Cells]:
    """Every cell of every stage."""
    models = f"models=[{{id: {json.dumps(str(folder))}, label: m}}]"
    experiment = study(text, models, *settings)
    if experiment.plan.chat_date is None:
        experiment = replace(experiment, moment=datetime(2026, 7, day))
    (facts,) = experiment.facts
    job = Job(experiment, facts)
    steering, unsteered = cells.steering(job), cells.unsteered(job)
    over = experiment.plan.judge.over if experiment.plan.judge else ""
    return {
        "samples": bare(cells.samples(job)),
        "activations": bare(cells.activations(job)),
        "embeddings": bare(cells.embeddings(job)),
        "swapped": bare(cells.swapped(job)),
        "responses": bare(cells.responses(job)),
        "responses_judged": bare(cells.responses_judged(job)),
        "vectors": bare(cells.derived(job)),
        "directions": bare(cells.directions(job)),
        "lens": bare(cells.lens(job)),
        "anisotropy": bare(cells.anisotropy(job)),
        "unsteered": unsteered,
        "prompted": cells.prompted(job),
        "calibration": cells.calibration(job),
        "steering": steering,
        "judged": {key.of: fp for key, fp in cells.judged(steering, "j", judge, over, lambda key: ()).items()},
        "outcomes": cells.outcomes(steering),
        "reads": bare(cells.reads(job)),
        "calibration_edits": bare(cells.calibration_edits(job)),
        "edited": bare(cells.edited(job)),
        "capability": cells.capability(job),
        "capability_edited": bare(cells.capability_edited(job)),
    }


@cache
def unchanged(folder, *settings: str) -> dict[str, cells.Cells]:
    """As `of`, of a model that no test changes: what many tests compare with is computed once."""
    return of(folder, *settings)


def changed(before: dict, after: dict) -> dict[str, set]:
    """The cells in both whose fingerprint differs, by stage; stages without one left out."""
    by_stage = {s: {key for key in before[s] if key in after[s] and before[s][key] != after[s][key]} for s in before}
    return {stage: keys for stage, keys in by_stage.items() if keys}


EMOTIONS = ("happy", "sad", "calm")
Which = Callable[[tuple], bool]


def every(key: tuple) -> bool:
    return True


def follow(base: dict[str, cells.Cells], **first: Which) -> dict[str, set]:
    """What must change when the cells chosen by `first` (stage -> predicate) do: the study's own logic, written out."""

    def chosen(stage: str, *also: Which) -> set:
        tests = [*also, *([first[stage]] if stage in first else [])]
        return {key for key in base[stage] if any(test(key) for test in tests)}

    samples = chosen("samples")
    activations = chosen("activations", lambda key: key in samples)
    groups = {(method, emotion) for method, emotion, _ in activations}

    def rests(key: tuple) -> bool:
        method, emotion = key
        kin = {"made": EMOTIONS, "drawn": (emotion, NEUTRAL), "read": (emotion,)}[method]
        return any((method, other) in groups for other in kin)

    vectors = chosen("vectors", rests)
    directions = chosen("directions")
    projected = any(method == "read" for method, _ in vectors)

    def steered(key: tuple) -> bool:
        _, op, _, method, emotion, _, _ = key
        return (method, emotion) in vectors or (op == "drawn" and (projected or ("read", NEUTRAL) in groups))

    steering = chosen("steering", steered)
    by_stage = {
        "samples": samples,
        "activations": activations,
        "embeddings": chosen("embeddings", lambda key: key in samples),
        "swapped": chosen("swapped", lambda key: key in activations),
        "vectors": vectors,
        "directions": directions,
        "lens": chosen("lens", lambda key: key in vectors or key in directions),
        "anisotropy": chosen("anisotropy"),
        "unsteered": chosen("unsteered", lambda key: key[1] == "drawn" and projected),
        "steering": steering,
        "judged": chosen("judged", lambda key: key in steering),
        "outcomes": chosen("outcomes", lambda key: key in steering),
        "reads": chosen("reads"),
        "edited": chosen("edited"),
    }
    return {stage: keys for stage, keys in by_stage.items() if keys}


def method(name: str) -> Which:
    return lambda key: key[0] == name


def named(name: str) -> Which:
    return lambda key: key[1] == name


def entry(name: str) -> Which:
    return lambda key: key[1] == name


def both(name: str) -> dict[str, Which]:
    return {"steering": entry(name), "unsteered": entry(name)}


def condition(name: str) -> dict[str, Which]:
    return {"reads": lambda key: key[1] == name, "edited": lambda key: key[0] == name}


ALL = dict.fromkeys(("samples", "directions", "anisotropy", "unsteered", "steering", "reads", "edited", "lens"), every)

KNOBS: list[tuple[str | tuple[str, ...], dict[str, Which]]] = [
    # what does not matter
    ("name=other", {}),
    ("about=a study", {}),
    ("store=other.zarr", {}),
    ("threads=3", {}),
    ("batch={rows: 1, max_tokens_in_flight: 64}", {}),
    ("executor=rehearse", {}),
    ("judge.device=cpu", {}),
    ("models[0].device=cpu", {}),
    ("emotions=[calm, happy, sad]", {}),
    ("steer[0].strengths=[0.2, 0.1]", {}),
    ("steer[0].prompts={b: two, a: one}", {}),
    ("steer[0].vectors.emotions=[sad, happy]", {}),
    ("steer[0].seeds=[7]", {}),  # greedy
    ("steer[0].controls=[random, zero]", {}),
    ("steer[0].controls=[{random: 3}, zero, shuffled]", {}),  # more cells
    ("steer[1].seeds=[1, 0]", {}),
    ("steer[1].layers={each: [2, 1]}", {}),
    ('layers="0:4"', {}),
    ("layers=[3, 2, 1, 0]", {}),
    ("methods.read.generate={max_new_tokens: 7}", {}),  # it reads
    ("methods.read.templates=topic_templates", {}),
    ("measure.perplexity=false", {}),
    # the model
    ("models[0].dtype=bfloat16", ALL),
    ("models[0].attn_implementation=eager", ALL),
    # extraction
    ("methods.made.generate.max_new_tokens=9", {"samples": method("made")}),
    ("methods.made.chat=never", {"samples": method("made")}),
    ("methods.made.system_prompt=be brief", {"samples": method("made")}),
    ('methods.made.templates=["tell {emotion}"]', {"samples": lambda key: key[0] == "made" and key[1] != NEUTRAL}),
    ("methods.drawn.generate.temperature=0.7", {"samples": method("drawn")}),
    ("methods.made.pooling=last", {"activations": method("made")}),
    ("methods.made.pooling={kind: mean, bos: true}", {"activations": method("made")}),
    ("methods.read.pooling={kind: last, over: all}", {"activations": method("read")}),
    ("methods.made.baseline=none", {"vectors": method("made")}),
    ("methods.made.unit_norm=false", {"vectors": method("made")}),
    ("methods.drawn.project_out.variance=0.9", {"vectors": method("drawn")}),
    ("methods.drawn.project_out=", {"vectors": method("drawn")}),
    ("methods.drawn.samples=21", {"samples": lambda key: key[0] == "drawn" and key[2] == 1}),  # 16 + 4, then 16 + 5
    (
        "methods.drawn.neutral_samples=19",
        {"samples": lambda key: key[:2] == ("drawn", NEUTRAL) and key[2] == 1},
    ),
    ("methods.read.neutral_samples=2", {"samples": lambda key: key[:2] == ("read", NEUTRAL)}),
    # steering
    ("steer[0].op=clamp", {"steering": entry("plain")}),
    ("steer[0].scale=unit", {"steering": entry("plain")}),
    ("steer[0].positions=last", {"steering": entry("plain")}),
    ("steer[0].norm_skip=1", {"steering": entry("plain")}),
    ("steer[0].vectors.layer=2", {"steering": entry("plain")}),
    ("steer[1].vectors.layer=2", {"steering": entry("drawn")}),
    ("steer[0].prompts={a: one, b: three}", both("plain")),
    ("steer[0].prompts={a: one, b: two, c: three}", both("plain")),
    ("steer[0].chat=always", both("plain")),
    ("steer[0].generate.max_new_tokens=7", both("plain")),
    ("steer[1].generate.top_p=0.9", both("drawn")),
    ("steer[1].seeds=[0, 1, 2]", both("drawn")),
    ("steer[1].project=false", both("drawn")),
    ("judge.over=all", {"judged": every}),
    ("measure.lens=6", {"lens": every}),
    # reads and edits
    ("prompts={a: one, b: three}", {"reads": every, "edited": every}),
    ("chat=always", {"reads": every, "edited": every}),
    ("generate.max_new_tokens=9", {"edited": every}),
    ("reads.mean.pooling=last", {"reads": lambda key: key[0] == "mean"}),
    ("reads.mean.layers=[1, 3]", {"reads": lambda key: key[0] == "mean"}),
    ("directions.noise.random=1", condition("push") | {"directions": named("noise")}),
    ("directions.day.contrast.positive=[shining]", condition("clamp") | {"directions": named("day")}),
    ("edits.push[0].layers=[2]", condition("push")),
    ("edits.clamp[0].vector_layer=1", condition("clamp")),
    ("edits.clamp[0].positions=last", condition("clamp")),
    # the seed: what is drawn, and the random controls
    (
        "seed=1",
        {
            "samples": method("drawn"),
            "swapped": every,
            "unsteered": entry("drawn"),
            "steering": lambda key: key[1] == "drawn" or key[-1] == "random",
        },
    ),
]


@pytest.mark.parametrize(("settings", "first"), KNOBS, ids=[str(knob[0]) for knob in KNOBS])
def test_a_knob_changes_just_what_rests_on_it(model, settings, first):
    base = unchanged(model)
    after = of(model, settings)
    assert changed(base, after) == follow(base, **first)


def test_texts_read_alone_are_read_again_and_not_behind_other_instructions(model):
    base, after = of(model), of(model, "methods.made.context=text")
    assert not [key for key in after["swapped"] if key[0] == "made"]
    base["swapped"] = {key: number for key, number in base["swapped"].items() if key[0] != "made"}
    assert changed(base, after) == follow(base, activations=method("made"), embeddings=method("made"))


def test_capturing_at_other_layers_captures_again(model):
    base, after = of(model, "steer=[]", "judge="), of(model, "steer=[]", "judge=", "layers=[1, 2]")
    assert changed(base, after) == follow(base, activations=every)


def test_a_neutral_baseline_rests_on_the_neutral_samples_without_denoising_too(model):
    fixed, more = "methods.drawn.project_out=", "methods.drawn.neutral_samples=19"
    base, after = of(model, fixed), of(model, fixed, more)
    assert changed(base, after)["vectors"] == {("drawn", emotion) for emotion in EMOTIONS}


def test_other_weights_or_another_tokenizer_are_another_model(model, tmp_path):
    base = of(model)
    for i, (name, content) in enumerate([("model.safetensors", b"\2" + bytes(7) + b"{}"), ("tokenizer.json", b"{}")]):
        other = model_folder(tmp_path / str(i), 4, chat=True)
        assert of(other) == base, "a copy is the same model, wherever it lies"
        again = model_folder(tmp_path / f"again{i}", 4, chat=True)
        (again / name).write_bytes(content)
        assert changed(base, of(again)) == follow(base, **ALL)


CLOCK = "{{ strftime_now('%d %b %Y') }}{{ messages }}"
CHAT = ["methods.read.chat=never", "steer[0].chat=always", "chat=always", "directions.day.contrast.chat=always"]


def test_what_a_template_writes_of_the_clock_is_part_of_a_cell(tmp_path):
    """And of no cell that is shown without the template, or by one that reads no clock."""
    folder = model_folder(tmp_path, 4, chat=True)
    first = of(folder, *CHAT, day=26)
    assert of(folder, *CHAT, day=27) == first
    (folder / "chat_template.jinja").write_text(CLOCK)
    first, after = of(folder, *CHAT, day=26), of(folder, *CHAT, day=27)
    expected = follow(
        first,
        samples=lambda key: key[0] != "read",
        directions=named("day"),
        steering=lambda key: key[1] == "plain",
        unsteered=lambda key: key[1] == "plain",
        reads=every,
        edited=every,
    )
    assert changed(first, after) == expected
    assert of(folder, *CHAT, "chat_date=2026-07-26", day=27) == first


def test_emotions_of_equal_passages_differ_by_what_their_system_turns_say(tmp_path):
    folder = model_folder(tmp_path, 4, chat=True)
    same = ["methods={m: {source: generation, samples: 1, templates: ['x {emotion}'], system_prompt: 'be {emotion}'}}"]
    experiment = study(PLAN, f"models=[{{id: {json.dumps(str(folder))}, label: m}}]", *same, "steer=[]", "judge=")
    texts = experiment.texts.model_copy(update={"passages": {emotion: ["the same"] for emotion in EMOTIONS}})
    method = experiment.plan.methods["m"].model_copy(update={"source": "comprehension"})
    plan = experiment.plan.model_copy(update={"methods": {"m": method}})
    fingerprints = bare(cells.samples(Job(replace(experiment, plan=plan, texts=texts), experiment.facts[0])))
    assert len({fingerprints["m", emotion, 0] for emotion in EMOTIONS}) == len(EMOTIONS)


def test_another_judge_judges_again(model):
    base = of(model)
    assert changed(base, of(model, judge="another")) == follow(base, judged=every)


def test_a_default_spelt_out_is_the_same_cell(model):
    base = of(model)
    spelt = "methods.made.estimator=mean_difference"
    assert of(model, spelt, "methods.read.labels=given") == base


NEUTRAL_ONE, ALL_THREE = "methods.read.baseline=neutral_mean", "methods.read.baseline=rest"


@pytest.mark.parametrize(
    ("settings", "emotions"),
    [
        ([NEUTRAL_ONE, "methods.read.estimator=lda"], {"happy"}),
        ([ALL_THREE], set(EMOTIONS)),
        ([ALL_THREE, "methods.read.estimator=ridge"], set(EMOTIONS)),
        ([NEUTRAL_ONE, "methods.read.labels=shuffled"], set(EMOTIONS)),
    ],
)
def test_a_vector_rests_on_the_samples_it_is_made_of(model, settings, emotions):
    read = ["methods={read: {source: generation, samples: 2}}", "steer=[]", "judge="]
    vectors = of(model, *read, *settings)["vectors"]
    experiment = study(PLAN, f"models=[{{id: {json.dumps(str(model))}, label: m}}]", *read, *settings)
    neutral = {NEUTRAL} if NEUTRAL_ONE in settings else set()
    assert set(cells.averaged(experiment.plan, "read", "happy")) == emotions | neutral
    more = of(model, *read, *settings, "emotions=[happy, sad]")["vectors"]
    assert (vectors["read", "happy"] == more["read", "happy"]) == (emotions == {"happy"})


def test_parameters_that_an_estimator_has_not_are_not_in_its_fingerprint(model):
    base = of(model, NEUTRAL_ONE, "methods.read.estimator={kind: ridge, penalty: 0.1}")
    assert of(model, NEUTRAL_ONE, "methods.read.estimator=ridge") == base
    again = of(model, NEUTRAL_ONE, "methods.read.estimator=ridge", "seed=1")["vectors"]
    assert again["read", "sad"] == base["vectors"]["read", "sad"]
    shuffled = [of(model, NEUTRAL_ONE, "methods.read.labels=shuffled", f"seed={s}")["vectors"] for s in (0, 1)]
    assert shuffled[0]["read", "sad"] != shuffled[1]["read", "sad"]


# ---- more of the same -------------------------------------------------------------------------------------------


def test_another_emotion_changes_only_grand_means(model):
    base = of(model)
    after = of(
        model,
        "emotions=[happy, sad, calm, angry]",
        "steer[1].vectors.emotions=[happy, sad, calm]",
        "steer[1].project=false",
    )
    base = of(model, "steer[1].vectors.emotions=[happy, sad, calm]", "steer[1].project=false")
    new = {key for key in after["samples"] if key not in base["samples"]}
    assert {key[1] for key in new} == {"angry"} and {key[0] for key in new} == {"made", "drawn", "read"}
    expected = follow(base, vectors=method("made"))  # the only method whose baseline is the grand mean
    differences = changed(base, after)
    assert differences.pop("swapped"), "texts stand behind other instructions"
    assert differences == expected
    assert set(after["vectors"]) - set(base["vectors"]) == {(m, "angry") for m in ("made", "drawn", "read")}


def test_another_strength_changes_nothing(model):
    base, after = of(model), of(model, "steer[0].strengths=[0.1, 0.15, 0.2]")
    assert changed(base, after) == {}
    new = set(after["steering"]) - set(base["steering"])
    assert {key[5] for key in new} == {0.15} and len(new) == 4  # 2 emotions, with and without random control


def test_another_method_changes_nothing(model):
    base = of(model, "steer[1].vectors.methods=[read]")
    after = of(model, "methods.more={source: comprehension, samples: 2}")
    assert changed(base, after) == {}
    assert {key[0] for key in set(after["samples"]) - set(base["samples"])} == {"more"}


def test_another_model_changes_nothing(model, tmp_path):
    base = of(model)
    both = study(PLAN, f"models={json.dumps([str(model), str(model_folder(tmp_path / 'six', 6))])}")
    assert [facts.n_layers for facts in both.facts] == [4, 6]
    fingerprints = bare(cells.derived(Job(both, both.facts[0])))
    assert fingerprints == base["vectors"]
    assert set(fingerprints.values()).isdisjoint(cells.derived(Job(both, both.facts[1])).values())


def test_another_edit_or_read_changes_nothing(model):
    base, after = of(model), of(model, "edits.more=[{op: project_out, direction: day}]", "reads.last={pooling: last}")
    assert changed(base, after) == {}
    assert ("more", 1.0, 0) in after["edited"] and ("last", "more", 1.0, 0) in after["reads"]


def test_a_strength_of_a_condition_is_the_same_cell_alone_and_in_a_list(model):
    base, two, both = (of(model, f"edits.push[0].strength={value}") for value in ("1.0", "2.0", "[2.0, 1]"))
    for stage in ("edited", "reads"):
        assert (
            set(base[stage]) | set(two[stage]) == set(both[stage]) and changed(base, both) == changed(two, both) == {}
        )
    pair = "edits.push=[{op: add, direction: noise}, {op: add, direction: day, strength: %s}]"
    assert changed(of(model, pair % 1), of(model, pair % 3)) == {
        stage: {key for key in base[stage] if key[-3:] == ("push", 1.0, 0)} for stage in ("edited", "reads")
    }


def test_a_named_set_and_its_words_are_the_same(model):
    named, spelt = of(model, "steer[0].prompts=scenarios-8"), study(PLAN, "models=[zoo/llama]").texts
    assert spelt is not None
    words = json.dumps(spelt.prompts["scenarios-8"])
    assert of(model, f"steer[0].prompts={words}") == named


def test_without_the_zero_control_no_entry_is_unsteered(model):
    after = of(model, "steer[0].controls=[random]", "steer[1].controls=[]")
    assert after["unsteered"] == {} and {key[-1] for key in after["steering"]} == {"none", "random"}
    assert {key[-1] for key in after["steering"] if key[1] == "drawn"} == {"none"}


def test_every_cell_of_a_stage_has_a_fingerprint_of_its_own(model):
    for stage, fingerprints in of(model).items():
        assert len(set(fingerprints.values())) == len(fingerprints), stage
        assert all(isinstance(fp, int) and 0 <= fp < 2**52 for fp in fingerprints.values())


def test_fingerprints_are_the_same_in_another_process(model):
    """A hash that depends on the process (of a set, of a str) would make every run start again."""
    import subprocess
    import sys
    from pathlib import Path

    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cells; "
    code += f"print(sorted(test_cells.of({str(model)!r})['steering'].values()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == sorted(of(model)["steering"].values())


def test_formulas_shuffled_controls_and_shared_draws_change_no_other_cell(model):
    base = of(model)
    more = of(
        model,
        "steer[0].vectors.formulas={mixed: happy - sad, up: made.sad}",
        "steer[0].controls=[zero, shuffled, random]",
        "methods.again={source: generation, samples: 20, generate: {sample: true}, draws_of: drawn}",
    )
    assert not changed(base, more)
    new = {key[4:] for key in set(more["steering"]) - set(base["steering"])}
    assert {(label, control) for label, _, control in new} == {
        *((label, control) for label in ("mixed", "up") for control in ("none", "shuffled", "random")),
        *((label, "shuffled") for label in ("happy", "sad")),
    }


def test_a_formula_and_a_shuffled_control_rest_on_what_they_name(model):
    added = ("steer[0].vectors.formulas={mixed: happy + read.sad, sads: sad}", "steer[0].controls=[shuffled]")
    base = of(model, *added)

    def steered(*settings: str) -> set:
        keys = changed(base, of(model, *added, *settings)).get("steering", set())
        return {(key[4], key[6]) for key in keys if key[1] == "plain"}

    every = {(label, control) for label in ("happy", "sad", "mixed", "sads") for control in ("none", "shuffled")}
    assert steered("methods.read.pooling=mean") == {("mixed", "none"), ("mixed", "shuffled")}
    assert steered("methods.made.pooling=last") == every
    assert steered("seed=1") == {pair for pair in every if pair[1] == "shuffled"}
    renamed = of(model, "steer[0].vectors.formulas={mixed: happy + read.sad, sorrows: sad}", added[1])
    assert not changed(base, renamed)


def test_a_random_direction_of_another_name_is_another(model):
    """Its draw depends on its name: under the old cells it would stand for other numbers."""
    differences = changed(of(model), of(model, text=PLAN.replace("noise", "hum")))
    assert set(differences) == {"reads", "edited"} and all(
        "push" in key for keys in differences.values() for key in keys
    )


@pytest.mark.parametrize(
    ("settings", "shared"),
    [((), True), (("vllm={memory: 0.5, max_length: 99}",), True), (("vllm.reference=false",), False)],
)
def test_float32_cells_of_vllm_are_those_of_every_executor_where_it_is_held_against_transformers(
    model, monkeypatch, settings, shared
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: True if name == "vllm" else find(name, *more))
    differ = changed(of(model), of(model, "executor=vllm", *settings))
    assert bool(differ) != shared
    if not shared:
        assert differ == follow(of(model), **ALL)


def test_half_precision_cells_of_vllm_are_its_own(model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: True if name == "vllm" else find(name, *more))
    half = of(model, "models[0].dtype=bfloat16")
    assert changed(half, of(model, "models[0].dtype=bfloat16", "executor=vllm")) == follow(half, **ALL)
