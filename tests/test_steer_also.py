"""Further edits of a steer entry: what is written under them is what plain hooks write, in the order declared."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import tinies
from oracle import Push
from planside import PLAN as SMALL
from planside import problems, study
from test_calibration import changed, continued, inner, loaded
from test_calibration import plan as calibrated_plan
from test_runner import METHODS, NEW, results, run, same_texts, unit, write

from nsteer.plan.check import load
from nsteer.plan.schema import Steer
from nsteer.program.randomness import rotated
from nsteer.stages import cells, forms
from nsteer.stages.job import Job

READ = {**METHODS["read"], "unit_norm": False}
PROMPTS = {"long": "at night the old house was warm and", "walk": "tom ran to the", "one": "rain"}
ALSO = [
    {"op": "project_out", "direction": "fear"},
    {"op": "add", "direction": "joy - 0.5*rage", "layers": [1], "strength": 0.3, "positions": "generated"},
    {"op": "clamp", "direction": "rage", "layers": [3, 2], "strength": 0.5, "scale": "unit", "order": "after"},
]
ENTRY = {
    "name": "mix",
    "vectors": {"methods": ["read"], "emotions": ["joy"]},
    "layers": [3, 1],
    "strengths": [0.4],
    "prompts": PROMPTS,
    "controls": ["zero", "random"],
    "generate": {"max_new_tokens": NEW},
    "also": ALSO,
}


def plan_of(place, model, **entry):
    steer = {key: value for key, value in {**ENTRY, **entry}.items() if value is not None}
    return write(place, model, methods={"read": READ}, steer=[steer])


class Truth:
    """Hooks over a family's tiny model, with the vectors of a store."""

    def __init__(self, family: str, plan):
        self.module = tinies.model(family)
        self.blocks = tinies.blocks(family, self.module)
        self.words = tinies.tokenizer(bos=tinies.BOS[family], chat=True)
        self.vectors = results(plan.with_suffix(".zarr"), "vectors/tiny").vector.sel(
            {"model": "tiny", "method": "read"}
        )

    def vector(self, emotion: str, layer: int) -> np.ndarray:
        return self.vectors.sel({"emotion": emotion, "layer": layer}).values

    def write(self, text: str, pushes) -> oracle.Continuation:
        prompt = tuple(self.words(text)["input_ids"])
        return oracle.generate(self.module, self.blocks, prompt, pushes, new=NEW, eos=[tinies.END])

    def pushes(self, control: str) -> list[Push]:
        """The edits of BLOCK by hand; those of one layer in the order in which they are made."""
        edits = []
        turned = rotated(np.stack([self.vector("joy", layer) for layer in (1, 3)]), 0, "read", "joy")
        drawn = dict(zip((1, 3), turned, strict=True))
        for layer in range(4):
            own = unit(drawn[layer] if control == "random" and layer in drawn else self.vector("joy", layer))
            mixed = unit(self.vector("joy", layer) - 0.5 * self.vector("rage", layer))
            edits.append(Push(layer, "project_out", unit(self.vector("fear", layer)), 1.0))
            if layer == 1:
                edits.append(Push(layer, "add", mixed, 0.3, live=True, positions="generated"))
            if layer in (1, 3):
                edits.append(Push(layer, "add", own, 0.4, live=True))
            if layer in (2, 3):
                edits.append(Push(layer, "clamp", unit(self.vector("rage", layer)), 0.5))
        return edits


def test_a_block_with_further_edits_writes_what_hooks_write(folder, tmp_path):
    plan = plan_of(tmp_path, folder("llama"))
    summary = run(plan)
    assert not summary.failures, summary.failures
    truth, path = Truth("llama", plan), plan.with_suffix(".zarr")
    groups = (results(path, "generations"), results(path, "steering"))
    further, plain = results(path, "steering_also"), results(path, "unsteered")
    moved = 0
    unedited = {label: truth.write(text, []).tokens for label, text in PROMPTS.items()}
    for control in ("none", "random"):
        pushes = truth.pushes(control)
        own = [i for i, push in enumerate(pushes) if push.strength == 0.4]
        entries = [[i for i, p in enumerate(pushes) if p.op == op and p.strength == s] for op, s in
                   (("project_out", 1.0), ("add", 0.3), ("clamp", 0.5))]  # fmt: skip
        for label, text in PROMPTS.items():
            true = truth.write(text, pushes)
            where = {"model": "tiny", "op": "mix", "layer_set": "1,3", "method": "read", "emotion": "joy"}
            where |= {"strength": 0.4, "control": control, "prompt": label, "seed": 0}
            mine = oracle.Continuation(true.tokens, true.logprobs, true.receipts[own])
            same_texts(*groups, where, mine, [1, 3])
            for entry, places in enumerate(entries):
                receipt, total = further.sel({**where, "entry": entry}), true.receipts[places].sum(0)
                assert receipt.touched == total[0]
                if total[0]:
                    assert receipt.injected.item() == pytest.approx(total[3] / total[0], rel=2e-3)
            off = {"model": "tiny", "op": "mix", "prompt": label, "seed": 0}
            tokens = plain.sel(off).token_id.values
            untouched = unedited[label]
            assert tokens[: len(untouched)].tolist() == list(untouched), "the control `zero` has no edit at all"
            moved += true.tokens != untouched
    assert moved
    assert not any(run(plan).done.values())


def test_before_and_after_are_not_the_same(folder, tmp_path):
    """Removed before, the own vector's part along `fear` stays; removed after, nothing along `fear` is left."""
    own = {"layers": [2], "scale": "unit", "strengths": [30.0], "controls": []}
    steer, out = {**ENTRY, **own}, {"op": "project_out", "direction": "fear", "layers": [2]}
    entries = [{**steer, "name": order, "also": [{**out, "order": order}]} for order in ("before", "after")]
    plan = write(tmp_path, folder("llama"), methods={"read": READ}, steer=entries)
    assert not run(plan).failures
    truth, path = Truth("llama", plan), plan.with_suffix(".zarr")
    add = Push(2, "add", unit(truth.vector("joy", 2)), 30.0)
    remove = Push(2, "project_out", unit(truth.vector("fear", 2)), 1.0)
    assert abs(add.vector @ remove.vector) > 0.05, "else the order is nothing"
    prompt = truth.words(PROMPTS["long"])["input_ids"]
    stream = oracle.forward(truth.module, truth.blocks, prompt).streams[2]
    ends = {}
    for order, pushes in (("before", [remove, add]), ("after", [add, remove])):
        ends[order] = oracle.forward(truth.module, truth.blocks, prompt, pushes).streams[2].numpy() @ remove.vector
        for label, text in PROMPTS.items():
            true = truth.write(text, pushes)
            where = {"op": order, "layer_set": "2", "method": "read", "emotion": "joy", "strength": 30.0}
            where |= {"model": "tiny", "control": "none", "prompt": label, "seed": 0}
            mine = oracle.Continuation(true.tokens, true.logprobs, true.receipts[[pushes.index(add)]])
            same_texts(results(path, "generations"), results(path, "steering"), where, mine, [2])
            taken = results(path, "steering_also").injected.sel({**where, "entry": 0}).item()
            total = true.receipts[pushes.index(remove)]
            assert taken == pytest.approx(total[3] / total[0], rel=1e-3)
    np.testing.assert_allclose(ends["before"], 30.0 * add.vector @ remove.vector, atol=1e-3)
    np.testing.assert_allclose(ends["after"], 0, atol=1e-3)
    assert float(np.abs(stream.numpy() @ remove.vector).max()) > 1e-3


def test_edits_stand_in_forward_order_and_in_that_declared():
    also = [
        {"op": "rotate", "direction": "b", "layers": [2], "order": "after"},
        {"op": "clamp", "direction": "a", "layers": [2, 5]},
        {"op": "add", "direction": "c", "layers": [2], "site": "attn_out", "order": "after"},
        {"op": "project_out", "direction": "a", "layers": [2]},
    ]
    entry = Steer.model_validate({"strengths": [1.0], "prompts": ["-"], "also": also})
    order = [(layer, number) for layer, _, number in forms.together(entry, [2, 5], 6)]
    assert order == [(2, 2), (2, 1), (2, 3), (2, forms.OWN), (2, 0), (5, 1), (5, forms.OWN)]


def test_an_edit_that_touches_nothing_fails_its_cells_by_name(folder, tmp_path):
    lost = [{"op": "project_out", "direction": "fear", "positions": 40}]
    summary = run(plan_of(tmp_path, folder("llama"), also=lost))
    assert {failure.cell[6] for failure in summary.failures} == {"none", "random"}
    assert all("also[0] (project_out fear): no prompt has any of the positions" in f.reason for f in summary.failures)


# ---- fingerprints --------------------------------------------------------------------------------------------------

STEERED = "steer={strengths: [0.1, 0.2], prompts: {a: one}, vectors: {methods: [read]}, layers: [3, 1], %s}"
ONE = {"op": "add", "direction": "sad", "layers": [3, 1], "strength": 0.5}


def cells_of(also: list | None, *settings: str) -> dict[str, cells.Cells]:
    checked_plan = study(SMALL, STEERED % ("" if also is None else f"also: {json.dumps(also)}"), *settings)
    facts = checked_plan.facts[0]
    return {
        "steering": cells.steering(Job(checked_plan, facts)),
        "unsteered": cells.unsteered(Job(checked_plan, facts)),
    }


def test_no_further_edits_and_an_empty_list_of_them_are_the_same_cells():
    assert cells_of(None) == cells_of([])


CHANGES = [
    {"op": "clamp"},
    {"direction": "calm"},
    {"direction": "sad - calm"},
    {"layers": [3]},
    {"strength": 0.6},
    {"scale": "unit"},
    {"norm_skip": 1},
    {"site": "mlp_out"},
    {"positions": "last"},
    {"order": "after"},
    {"when": {"above": 0.0}},
    {"when": {"above": 0.0, "direction": "calm"}},
    {"schedule": {"first": 3}},
]


def test_every_field_of_a_further_edit_is_another_cell():
    every = [cells_of(None), cells_of([ONE]), *(cells_of([{**ONE, **change}]) for change in CHANGES)]
    for key in every[0]["steering"]:
        assert len({fingerprints["steering"][key] for fingerprints in every}) == len(every)
    assert all(fingerprints["unsteered"] == every[0]["unsteered"] for fingerprints in every)
    assert all(set(fingerprints["steering"]) == set(every[0]["steering"]) for fingerprints in every), (
        "the grid does not grow"
    )


def test_the_vectors_of_a_further_edit_are_what_its_cells_rest_on():
    """Those of a method that is named beside the one that steers, and of it alone."""
    named = [{**ONE, "direction": "made.sad"}]
    change = "methods.made.samples=4"
    assert cells_of([ONE])["steering"] == cells_of([ONE], change)["steering"]
    own, other = cells_of(named)["steering"], cells_of(named, change)["steering"]
    assert all(own[key] != other[key] for key in own)


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_a_strength_is_searched_with_the_further_edits_in_place(tmp_path):
    """The KL of the own op and of what is removed besides, together, against the model without any edit."""
    also = [{"op": "project_out", "direction": "calm", "layers": [3, 1]}]
    steer = {"strengths": {"kl": [0.5, 1e-7], "tokens": 6}, "vectors": {"emotions": ["sad"]}, "also": also}
    file = calibrated_plan(tmp_path, "zoo/llama", steer=steer)
    summary = run(file)
    path = file.with_suffix(".zarr")
    calibration = results(path, "calibration").sel({"control": "none"}).squeeze()
    vectors = results(path, "vectors/m").vector.sel({"model": "m", "method": "read"})
    module = loaded("zoo/llama")[0]

    def measured(strength: float) -> float:
        edits = []
        for layer in (3, 1):
            calm, sad = (unit(vectors.sel({"emotion": e, "layer": layer}).values) for e in ("calm", "sad"))
            edits += [Push(layer, "project_out", calm, 1.0), Push(layer, "add", sad, strength, True)]
        total = []
        for text in json.loads(file.read_text())["steer"]["prompts"].values():
            prompt, new = continued("zoo/llama", text, 6)
            total.append(changed(module, inner(module), prompt, new, edits)[0])
        return float(np.mean(total))

    search = calibration.sel({"strength": 0.5})
    assert bool(search.met) and measured(float(search.found)) == pytest.approx(0.5, rel=0.05)
    none = calibration.sel({"strength": 1e-7})
    assert measured(0.0) > 1e-6 and not bool(none.met)
    assert "at strength 0 already" in none.reason.item()
    assert {failure.cell[5] for failure in summary.failures} == {1e-7}


# ---- plans with mistakes -------------------------------------------------------------------------------------------

WRONG = [
    ("[{op: add, direction: sda}]", "direction", "did you mean 'sad'?"),
    ("[{op: add, direction: sad - }]", "direction", "a sum of multiples of directions"),
    ("[{op: add, direction: mad.sad}]", "direction", "did you mean"),
    ("[{op: add}]", "direction", "it is required"),
    ("[{direction: sad}]", "op", "it is required"),
    ("[{op: ad, direction: sad}]", "op", "did you mean 'add'?"),
    ("[{op: add, direction: sad, layers: [9]}]", "layers", "layer 9"),
    ("[{op: project_out, direction: sad, scale: unit}]", "scale", "no scale with project_out"),
    ("[{op: add, direction: sad, site: attn_out, scale: reference_norm}]", "site", "resid_post"),
    ("[{op: add, direction: sad, scale: unit, norm_skip: 1}]", "norm_skip", "it only with `scale: stream_norm`"),
    ("[{op: add, direction: sad, when: {direction: mad, above: 0}}]", "when.direction", "did you mean 'sad'?"),
    ("[{op: add, direction: sad, when: {}}]", "when", "a condition"),
    ("[{op: add, direction: sad, schedule: {first: 2}, positions: prompt}]", "schedule", "positions: all or generated"),
    ("[{op: add, direction: sad, positions: {text: zebra}}]", "positions.text", "which no prompt has"),
    ("[{op: add, direction: sad, order: behind}]", "order", "before"),
    ("[{op: add, direction: sad, vector: 1}]", "vector", "the unknown key"),
]


@pytest.mark.parametrize(("also", "path", "said"), WRONG)
def test_a_mistake_is_one_problem_at_its_place(also, path, said):
    mistakes = problems(SMALL, STEERED % f"also: {also}")
    assert [mistake.path for mistake in mistakes] == [f"steer.also[0].{path}"] and said in str(mistakes[0]), list(
        map(str, mistakes)
    )


def test_the_layers_of_further_edits_have_vectors_and_their_means_samples():
    (mistake,) = problems(SMALL, STEERED % "also: [{op: add, direction: sad, layers: [2]}]", "layers=[3, 1]")
    assert mistake.path == "steer.also[0].layers" and "layer 2" in mistake.found
    also = "also: [{op: set_mean, direction: sad}]"
    (mistake,) = problems(SMALL, STEERED % also, "methods.read.neutral_samples=0", "methods.read.baseline=none")
    assert mistake.path == "steer.also[0].op" and "no neutral samples" in mistake.found
    assert not problems(SMALL, STEERED % also)


def test_the_label_of_a_block_says_what_further_edits_it_has(folder, tmp_path):
    from nsteer.stages import arrays

    kept = [
        json.loads(arrays.settings_data(study, study.plan.steer[0]).settings.item())
        for also in (ALSO, None)
        for study in [load(plan_of(tmp_path, folder("llama"), also=also))]
    ]
    assert [edit["op"] for edit in kept[0]["also"]] == ["project_out", "add", "clamp"] and "also" not in kept[1]
