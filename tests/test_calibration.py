"""Calibrated strengths: the search on curves that are known, the measure against plain hooks, runs end to end."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
import oracle
import pytest
import tinies
import torch
from oracle import Push
from planside import PLAN, problems

from nsteer import runner, zoo
from nsteer.plan import check
from nsteer.plan.editing import CompiledEdit, row_edit
from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Editing, Steer
from nsteer.program.form import EditSite, Form, Row, assemble, halves, programs
from nsteer.runner.calibrating import forced
from nsteer.science.calibration import ROUNDS, TRIALS, Search
from nsteer.store import Store

# ---- the search ----------------------------------------------------------------------------------------------------


def searched(curve, target: float, least=0.001, max_strength=10.0, **more) -> Search:
    search = Search(target, least, max_strength, 0.02, **more)
    while points := search.propose():
        assert len(set(points)) == len(points) and not set(points) & set(search.tried)
        search.add({s: curve(s) for s in points})
    assert len(search.tried) <= TRIALS and search.rounds <= ROUNDS
    return search


def sigmoid(s: float) -> float:
    return 5 / (1 + math.exp(-40 * (math.log10(s) - 0.3)))


def bump(s: float) -> float:
    return 2 * math.exp(-((math.log(s / 0.7) / 0.6) ** 2))


CURVES = {
    "square": (lambda s: 3 * s * s, 0.3),
    "a large unit": (lambda s: 1e6 * s * s, 1.0),
    "below the least": (lambda s: 1e9 * s * s, 0.3),
    "saturating": (lambda s: 1 - math.exp(-s * s), 0.9),
    "steep": (lambda s: 1e4 * s**5, 1.99),
    "a step": (sigmoid, 0.3),
    "there and back": (bump, 1.0),
    "overflowing": (lambda s: 3 * s * s if s < 0.7 else float("nan"), 1.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_strength_found_has_the_value_asked_for(name):
    curve, target = CURVES[name]
    search = searched(curve, target)
    assert search.strength is not None, search.reason
    assert abs(curve(search.strength) / target - 1) <= 0.02
    grid = np.geomspace(1e-6, search.strength * 0.97, 2000)
    assert max(curve(s) for s in grid) < target * 1.02, "a lesser strength reaches it"
    assert search.rounds <= 6


def test_a_curve_that_falls_is_said_so():
    assert not searched(bump, 1.0).monotone
    assert searched(lambda s: s, 1.0).monotone


@pytest.mark.parametrize(
    ("curve", "target", "more", "why"),
    [
        (lambda s: 1 - math.exp(-s), 2.0, {}, "no strength up to 10 reaches it: the highest value is 1"),
        (bump, 2.5, {}, "the highest value is 2"),
        (lambda s: 0.0 if s < 0.37 else 5.0, 1.0, {}, "the value goes from 0 at 0.3"),
        (lambda s: 2.0 + s, 1.0, {"at_zero": True}, "the value is 2 at strength 0 already"),
    ],
)
def test_what_no_strength_reaches_is_said_so(curve, target, more, why):
    search = searched(curve, target, **more)
    assert search.strength is None and why in search.reason


def test_an_op_that_acts_at_zero_may_first_fall_and_then_rise():
    for target in (0.02, 1.0, 5.0):
        search = searched(lambda s: (s - 2) ** 2, target, at_zero=True)
        assert search.strength == pytest.approx(2 + math.sqrt(target), rel=0.02)


def test_a_ratio_rises_from_one():
    assert searched(lambda s: math.exp(s), 2.0, rest=1.0).strength == pytest.approx(math.log(2), rel=0.03)


# ---- the measure ---------------------------------------------------------------------------------------------------

LAYERS = (1, 3)


def pushes(entry: Steer, vectors, strength: float, mean, gate) -> list[Push]:
    more = {} if entry.when is None else {"gate": gate, "low": entry.when.above, "after": ()}
    if entry.when is not None and entry.when.after:
        more = {"after": tuple(entry.when.after)}
    pace = {} if entry.schedule is None else entry.schedule.model_dump()
    live = entry.scale == "stream_norm" and entry.op in ("add", "clamp", "affine")
    skip = {"skip": entry.norm_skip}
    return [
        Push(layer, entry.op, vectors[layer], strength, live, entry.positions, mean=mean, **skip, **more, **pace)
        for layer in (3, 1)
    ]


def changed(module, blocks, prompt, new, edits) -> tuple[float, float]:
    """KL and what the unedited row says more of its own tokens, from two plain forwards over one text: mean over new
    tokens."""
    tokens, places = [*prompt, *new], range(len(prompt) - 1, len(prompt) + len(new) - 1)
    own, base = (oracle.forward(module, blocks, tokens, e, len(prompt)).logits.double() for e in (edits, []))
    own, base = own.log_softmax(-1), base.log_softmax(-1)
    kl = [float((own[p].exp() * (own[p] - base[p])).sum()) for p in places]
    lost = [float(base[p, tokens[p + 1]] - own[p, tokens[p + 1]]) for p in places]
    return float(np.mean(kl)), float(np.mean(lost))


ENTRIES = {
    "add": {},
    "generated": {"positions": "generated"},
    "last": {"positions": "last", "norm_skip": 1},
    "prompt": {"positions": "prompt", "op": "rotate"},
    "schedule": {"schedule": {"linear": 3}},
    "first": {"schedule": {"first": 2}, "positions": "generated"},
    "gate": {"when": {"above": 0.0}},
    "project_out": {"op": "project_out", "layers": "all"},
    "after": {"when": {"after": [7, 9, 11, 20]}, "scale": "unit"},
    "clamp": {"op": "clamp"},
    "affine": {"op": "affine", "positions": "generated"},
}
STRENGTHS = {"rotate": (10.0, 40.0), "project_out": (0.5, 1.0)}


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in ENTRIES), ("add", "gpt2"), ("gate", "gpt2"), ("last", "gemma")]
)
def test_one_padded_forward_measures_what_hooks_measure_one_text_at_a_time(name, family, tiny):
    executor, entry = tiny(family), Steer(strengths=[1.0], prompts=["-"], **ENTRIES[name])
    module = tinies.model(family)
    blocks = tinies.blocks(family, module)
    rng, width = np.random.default_rng(5), executor.anatomy.d_model
    vectors = {layer: (v := rng.standard_normal(width)) / np.linalg.norm(v) for layer in LAYERS}
    mean, gate = rng.standard_normal(width), rng.standard_normal(width).astype(np.float32)
    gate /= np.linalg.norm(gate)
    after = tuple(entry.when.after) if entry.when and entry.when.after else ()
    live = entry.scale == "stream_norm" and entry.op in ("add", "clamp", "affine")
    sites = tuple(
        EditSite(layer, entry.op, live, gate="projection" if name == "gate" else "", after=bool(after))
        for layer in LAYERS
    )
    texts = {"a": ([1, 9, 11, 20, 7, 13], [7, 9, 14, 30]), "b": ([1, 8, 12], [21, 7, 11, 9, 15]), "c": ([1, 5], [6])}
    rows, wanted = [], {}
    for label, (prompt, new) in texts.items():
        given = Encoded("", tuple(prompt), 1)
        for strength in STRENGTHS.get(entry.op, (0.2, 0.6)):
            edits = tuple(
                row_edit(entry, CompiledEdit(vector, strength, float(mean @ vectors[layer]), gate), given, 8, after)
                for layer in LAYERS
                for vector in [vectors[layer].astype(np.float32)]
            )
            rows.append(forced(Row((label, strength), tuple(prompt), edits=edits), new))
            hooks = pushes(entry, vectors, strength, mean, gate)
            wanted[label, strength] = changed(module, blocks, prompt, new, hooks)
    whole = assemble(Form(edits=sites, against=True), rows)
    assert whole.arrays["input_ids"].shape == (9, 10) and whole.rows == 6, "an unedited row of each text, without a key"
    for part in (whole, *halves(whole), *halves(halves(whole)[1])):
        readouts = executor.run(part)
        assert readouts.against.shape == (part.rows, 2)
        for i, key in enumerate(part.keys):
            assert readouts.against[i] == pytest.approx(wanted[key], abs=2e-5, rel=2e-4), key
    if name not in ("generated", "first", "affine", "project_out"):
        assert max(kl for kl, _ in wanted.values()) > 1e-3
    moved = [kl for (label, _), (kl, _) in wanted.items() if label == "c"]
    if entry.positions == "generated":
        assert moved == [0, 0], "one token, from the prompt's end, where nothing is edited"


def test_a_twin_goes_where_its_rows_go():
    compiled_edit = CompiledEdit(np.ones(4, np.float32), 1.0)
    edit, short = (row_edit(Editing(), compiled_edit, Encoded("", tokens, 0), 2) for tokens in ((1, 2, 3), (1, 2)))
    rows = [forced(Row((i, "long"), (1, 2, 3), edits=(edit,)), (4, 5)) for i in range(3)]
    rows += [forced(Row((i, "short"), (1, 2), edits=(short,)), (4,)) for i in range(3)]
    form = Form(edits=(EditSite(1, "add"),), against=True)
    for program in programs(form, rows, budget=10**6, max_rows=4):
        for part in (program, *halves(program)):
            ids, mask = part.arrays["input_ids"], part.arrays["attention_mask"].astype(bool)
            for i in range(part.rows):
                unedited = part.arrays["unedited"][i]
                assert unedited >= part.rows and (ids[unedited][mask[unedited]] == ids[i][mask[i]]).all()
                assert part.arrays["prompt"][:, i].any() and not part.arrays["prompt"][:, unedited].any()
            assert len(ids) == part.rows + len(set(part.arrays["unedited"].tolist()))


# ---- runs ----------------------------------------------------------------------------------------------------------

EMOTIONS = ["happy", "sad", "calm"]
STEERED = ["happy", "sad"]
TARGETS = [0.1, 0.5]


def plan(folder, model, name="plan", **changes):
    steer = {
        "name": "push",
        "vectors": {"emotions": STEERED},
        "layers": {"sets": {"two": [3, 1]}},
        "strengths": {"kl": TARGETS, "tokens": 6},
        "prompts": {"long": "tell a story about the river and the old man", "short": "she went"},
        "generate": {"max_new_tokens": 8},
        **changes.pop("steer", {}),
    }
    whole = {
        "name": "small",
        "models": [{"id": model, "label": "m", "device": "cpu"}],
        "texts": "zoo",
        "emotions": EMOTIONS,
        "methods": {"read": {"source": "comprehension", "samples": 2, "pooling": "mean", "baseline": "grand_mean"}},
        "steer": steer,
        "threads": 1,
        "store": str(folder / f"{name}.zarr"),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder / f"{name}.yaml"


def run(file, *settings, **more) -> runner.Summary:
    return runner.run(check.load(file, settings), **more)


def read(file, group):
    return Store(file.with_suffix(".zarr")).read(group).load()


@lru_cache
def loaded(model: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = zoo.path(model.removeprefix("zoo/"))
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return module, AutoTokenizer.from_pretrained(path)


@lru_cache
def continued(model: str, text: str, new: int) -> tuple[list[int], tuple[int, ...]]:
    """A prompt and its greedy continuation."""
    module, words = loaded(model)
    prompt = words(text)["input_ids"]
    return prompt, oracle.generate(
        module, inner(module), prompt, new=new, eos=(module.generation_config.eos_token_id,)
    ).tokens


def inner(module):
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def brute(model: str, file, emotion: str, strength: float, vector=None, new=6, positions="all") -> float:
    """The mean KL of a strength under `add`, by hooks: one text at a time, in float32, logs in float64."""
    module, total = loaded(model)[0], []
    derived = read(file, "vectors/m").vector.sel({"model": "m", "method": "read", "emotion": emotion})
    edits = []
    for layer in (3, 1):
        direction = derived.sel({"layer": layer}).values.astype(np.float64) if vector is None else vector(layer)
        direction = direction / np.linalg.norm(direction)
        edits.append(Push(layer, "add", direction.astype(np.float32), strength, True, positions))
    for text in json.loads(file.read_text())["steer"]["prompts"].values():
        prompt, written = continued(model, text, new)
        total.append(changed(module, inner(module), prompt, written, edits)[0])
    return float(np.mean(total))


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """The plan that ran over a model, and what the run said; each model's once."""

    @lru_cache
    def searched_plan(model: str):
        file = plan(tmp_path_factory.mktemp("filled"), model)
        return file, run(file)

    return searched_plan


@pytest.mark.parametrize("model", ["zoo/llama", "zoo/gpt2", pytest.param("zoo/gemma", marks=pytest.mark.slow)])
def test_the_strengths_found_have_the_kl_asked_for(model, searches):
    file, summary = searches(model)
    assert not summary.failures and summary.done["calibration"] == 4
    calibration = read(file, "calibration").sel({"model": "m", "op": "push", "layer_set": "two", "method": "read"})
    mine = calibration.sel({"control": "none"})
    assert mine.met.values.all() and int(mine.batches.max()) <= 12
    for emotion in STEERED:
        for target in TARGETS:
            search = mine.sel({"emotion": emotion, "strength": target})
            assert abs(float(search.value) / target - 1) <= 0.02
            assert abs(brute(model, file, emotion, float(search.found)) / target - 1) <= 0.05
            there = search.measured.values[np.isclose(search.tried.values, float(search.found), rtol=1e-6)]
            assert there == pytest.approx(float(search.value))
    again = run(file)
    assert not again.done and again.skipped["calibration"] == 4


@pytest.fixture
def filled(searches):
    return searches("zoo/llama")[0]


def test_what_is_steered_has_the_strength_found_and_the_random_control_too(filled):
    steered = read(filled, "steering").sel({"model": "m", "op": "push", "layer_set": "two", "method": "read"})
    calibration = read(filled, "calibration").found.sel(
        {"model": "m", "op": "push", "layer_set": "two", "method": "read"}
    )
    assert calibration.sel({"control": "random"}).isnull().all()
    share = steered.injected.sel({"prompt": "short", "seed": 0})
    for emotion in STEERED:
        for control in ("none", "random"):
            condition = share.sel({"emotion": emotion, "control": control})
            for layer in (1, 3):
                lengths = condition.sel({"layer": layer}).sel({"strength": TARGETS}).values
                strengths = calibration.sel({"emotion": emotion, "control": "none"}).sel({"strength": TARGETS}).values
                assert (lengths / strengths)[0] > 0
        low, high = (calibration.sel({"emotion": emotion, "control": "none", "strength": t}).item() for t in TARGETS)
        first = [share.sel({"emotion": emotion, "control": "none", "layer": 1, "strength": t}).item() for t in TARGETS]
        assert 0 < low < high and first[0] < first[1]
    listed = [
        float(f"{calibration.sel({'emotion': 'sad', 'control': 'none', 'strength': t}).item():.9g}") for t in TARGETS
    ]
    again = plan(filled.parent, "zoo/llama", "listed", steer={"strengths": listed, "vectors": {"emotions": ["sad"]}})
    run(again)
    by_label = read(filled, "generations").text.sel({"emotion": "sad", "strength": TARGETS}).values
    by_number = read(again, "generations").text.sel({"emotion": "sad", "strength": listed}).values
    assert by_label.tolist() == by_number.tolist()


def test_one_more_target_leaves_the_others_alone(filled, tmp_path):
    import shutil

    shutil.copytree(filled.with_suffix(".zarr"), tmp_path / "plan.zarr")
    file = plan(tmp_path, "zoo/llama", steer={"strengths": {"kl": [*TARGETS, 1.0], "tokens": 6}})
    summary = run(file)
    assert summary.done["calibration"] == 2 and summary.skipped["calibration"] == 4
    assert summary.done["steering"] == 4 and summary.skipped["steering"] == 8
    file = plan(tmp_path, "zoo/llama", steer={"strengths": {"kl": TARGETS, "tokens": 5}})
    assert check.load(file) and run(file).done["steering"] == 8, "other tokens are another search"


def test_the_random_control_may_have_its_own_strength(tmp_path):
    from nsteer.program.randomness import rotated

    own = {"kl": [0.3], "tokens": 6, "random": "own"}
    file = plan(tmp_path, "zoo/llama", steer={"strengths": own, "vectors": {"emotions": ["sad"]}})
    run(file)
    calibration = read(file, "calibration").sel({"emotion": "sad", "strength": 0.3}).squeeze()
    vectors = read(file, "vectors/m").vector.sel({"model": "m", "method": "read", "emotion": "sad"})
    turned = dict(zip(LAYERS, rotated(vectors.sel({"layer": list(LAYERS)}).values, 0, "read", "sad"), strict=True))
    for control in ("none", "random"):
        search = calibration.sel({"control": control})
        drawn = None if control == "none" else lambda layer: turned[layer]
        assert bool(search.met) and abs(brute("zoo/llama", file, "sad", float(search.found), drawn) / 0.3 - 1) <= 0.05
    assert float(calibration.found.sel({"control": "none"})) != float(calibration.found.sel({"control": "random"}))


def test_a_target_out_of_reach_is_a_hole_with_its_reason_and_the_rest_goes_on(tmp_path):
    steer = {"op": "project_out", "scale": None, "strengths": {"kl": [0.0005, 30.0], "tokens": 6}}
    file = plan(tmp_path, "zoo/gpt2", steer={k: v for k, v in steer.items() if v is not None})
    text = json.loads(file.read_text())
    file.write_text(json.dumps(text))
    summary = run(file)
    calibration = read(file, "calibration").sel({"control": "none"}).squeeze()
    assert (
        not calibration.met.sel({"strength": 30.0}).any() and calibration.found.sel({"strength": 30.0}).isnull().all()
    )
    reason = calibration.reason.sel({"strength": 30.0, "emotion": "sad"}).item()
    assert reason.startswith("no strength up to 1 reaches it: the highest value is")
    assert calibration.measured.sel({"strength": 30.0}).notnull().sum("trial").min() >= 9
    assert {failure.stage for failure in summary.failures} == {"steering"} and len(summary.failures) == 4
    assert all("no strength for 30: no strength up to 1" in failure.reason for failure in summary.failures)
    good = int(calibration.met.sel({"strength": 0.0005}).sum())
    assert good and summary.done["steering"] == 2 * good
    again = run(file)
    assert not again.done and not again.failures and len(again.failed_before) == len(summary.failures)


def test_generated_positions_are_measured_where_they_act(tmp_path):
    steer = {"positions": "generated", "strengths": {"kl": [0.2], "tokens": 6}, "vectors": {"emotions": ["sad"]}}
    file = plan(tmp_path, "zoo/llama", steer=steer)
    assert not run(file).failures
    strength = float(read(file, "calibration").found.sel({"control": "none"}).squeeze())
    assert abs(brute("zoo/llama", file, "sad", strength, positions="generated") / 0.2 - 1) <= 0.05


def test_a_perplexity_ratio_is_that_of_the_unsteered_continuation(tmp_path):
    steer = {"strengths": {"perplexity_ratio": [1.5], "tokens": 6}, "vectors": {"emotions": ["sad"]}}
    file = plan(tmp_path, "zoo/gpt2", steer=steer)
    assert not run(file).failures
    calibration = read(file, "calibration").sel({"control": "none"}).squeeze()
    assert float(calibration.value) == pytest.approx(1.5, rel=0.02) and calibration.measure.item() == "perplexity_ratio"


def test_batches_do_not_change_what_is_found(filled, tmp_path):
    file = plan(tmp_path, "zoo/llama", batch={"rows": 5, "max_tokens_in_flight": 100})
    run(file)
    strengths, other = (read(f, "calibration").found.sel({"control": "none"}) for f in (filled, file))
    np.testing.assert_allclose(strengths.values, other.values, rtol=1e-4)


def test_the_size_of_the_searches_is_told(tmp_path):
    from nsteer.stages import sizing

    study = check.load(plan(tmp_path, "zoo/llama"))
    stage = next(stage_size for stage_size in sizing.size(study).stages if stage_size.stage == "calibration")
    assert stage.cells == 4 and stage.rows == 4 * 2 * 13


# ---- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strengths", "more", "fault"),
    [
        ("{kl: [0.3], perplexity_ratio: [2]}", "", "both of them"),
        ("{tokens: 3}", "", "neither kl nor perplexity_ratio"),
        ("{kl: [0]}", "", "0"),
        ("{kl: [0.3, 0.3]}", "", "0.3 a second time"),
        ("{perplexity_ratio: [1.0]}", "", "1.0"),
        ("{kl: [0.3], prompts: nowhere}", "", "'nowhere'"),
        ("{kl: [0.3], max_strength: 2}", ", op: project_out", "2 with project_out"),
        ("{kl: [0.3], random: own}", ", controls: [zero]", "own, without the control `random`"),
        ("{kl: [0.3], tokens: 1}", ", positions: generated", "1, with positions generated"),
        ("{kl: [0.3], toll: 1}", "", "the unknown key 'toll'"),
    ],
)
def test_mistakes_are_told(strengths, more, fault):
    (problem,) = problems(f"{PLAN}steer: {{strengths: {strengths}, prompts: {{a: one}}{more}}}\n")
    assert problem.found == fault and problem.line == 9


def test_an_unknown_key_has_its_neighbours():
    (problem,) = problems(f"{PLAN}steer: {{strengths: {{kl: [1], tolerence: 0.1}}, prompts: {{a: one}}}}\n")
    assert "tolerance" in problem.hint
