"""What steering costs a model: capability texts under the same edits, against hooks one text at a time."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
import oracle
import pytest
import torch
import xarray as xr
from kit import assert_equal
from oracle import Push
from planside import PLAN, STEER, problems

import nsteer
from nsteer import runner, zoo
from nsteer.plan import capability, check, reader
from nsteer.plan.capability import shipped
from nsteer.plan.editing import CompiledEdit, row_edit
from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Editing
from nsteer.program.form import EditSite, Form, Row, assemble
from nsteer.report import claims, overview
from nsteer.report.claims.evidence import Evidence, Rules
from nsteer.runner.calibrating import forced
from nsteer.science import costing

LAYERS = [5, 2]
EMOTIONS = ["happy", "sad"]
LABELS = {"model": "m", "layer_set": "two", "method": "read"}


def plan(folder, name="plan", **changes):
    push = {
        "layers": {"sets": {"two": LAYERS}},
        "strengths": [0.05, 0.4],
        "prompts": {"short": "she went", "long": "tom walked to the market and"},
        "generate": {"max_new_tokens": 3},
        "controls": [{"random": 2}],
    }
    up = {"direction": "up", "layers": LAYERS}
    whole = {
        "name": "small",
        "models": [{"id": "zoo/gpt2", "label": "m", "device": "cpu"}],
        "texts": "zoo",
        "emotions": EMOTIONS,
        "methods": {"read": {"source": "comprehension", "samples": 2, "pooling": "mean", "baseline": "grand_mean"}},
        "steer": [
            {**push, "name": "push"},
            {**push, "name": "turn", "op": "rotate", "positions": "last", "strengths": [60.0], "controls": ["zero"]},
            {**push, "name": "fade", "positions": "generated", "schedule": {"half_life": 2}, "controls": ["zero"]},
        ],
        "directions": {"up": "happy - sad"},
        "edits": {"hand": [{**up, "op": "add", "scale": "stream_norm", "strength": 0.3}]},
        "prompts": ["tom walked"],
        "generate": {"max_new_tokens": 2},
        "measure": {"perplexity": False, "lens": 0, "anisotropy": False, "capability": True},
        "threads": 1,
        "store": str(folder / f"{name}.zarr"),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder / f"{name}.yaml"


WHOLE = capability.FILE


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Six of the passages and eight of the questions that the package brings stand for all."""
    text = WHOLE.read_text(encoding="utf-8")
    data = reader.parse(text, WHOLE.name).data
    part = {"passages": dict(list(data["passages"].items())[:6]), "items": dict(list(data["items"].items())[-8:])}
    file = tmp_path_factory.mktemp("few") / WHOLE.name
    file.write_text(json.dumps({**data, **part}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capability, "FILE", file)
        shipped.cache_clear()
        yield
    shipped.cache_clear()


@pytest.fixture(scope="module")
def results(few, tmp_path_factory):
    file = plan(tmp_path_factory.mktemp("capability"))
    summary = runner.run(check.load(file))
    assert not summary.failures and summary.done["capability"] == 12 + 2 + 4 and summary.done["capability_edited"] == 1
    return nsteer.open(file.with_suffix(".zarr"))


@lru_cache
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = zoo.path("gpt2")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def by_hooks(before: str, text: str, pushes) -> tuple[float, float, int]:
    """log P (sum), KL against the unedited (mean) and the number of a text's tokens, alone and without padding."""
    module, words = loaded()
    prompt = words(before)["input_ids"]
    tokens = words(f"{before} {text}")["input_ids"]
    assert tokens[: len(prompt)] == prompt
    own, base = (
        oracle.forward(module, module.transformer.h, tokens, e, len(prompt)).logits.double().log_softmax(-1)
        for e in (pushes, [])
    )
    places = range(len(prompt) - 1, len(tokens) - 1)
    total = sum(float(own[p, tokens[p + 1]]) for p in places)
    kl = np.mean([float((own[p].exp() * (own[p] - base[p])).sum()) for p in places])
    return total, float(kl), len(places)


def matches(cell: xr.Dataset, pushes, passages: int = 4, items: int = 4) -> None:
    """A cell's figures are those of plain hooks: of some passages and all answers to some questions."""
    given = shipped()
    for label in list(given.passages)[:passages]:
        total, kl, n = by_hooks(*given.passages[label], pushes)
        scores = cell.sel({"passage": label})
        assert float(scores.nll) == pytest.approx(-total / n, rel=1e-4)
        if "kl" in cell:
            assert float(scores.kl) == pytest.approx(kl, rel=1e-3, abs=1e-5)
    for label in list(given.items)[-items:]:
        question, answers = given.items[label]
        for choice, answer in answers.items():
            total, _, _ = by_hooks(question, answer, pushes)
            log_likelihood = float(cell.log_likelihood.sel({"item": label, "choice": choice}))
            assert log_likelihood == pytest.approx(total, rel=1e-4), (label, choice)


def vectors(results, emotion: str) -> dict[int, np.ndarray]:
    vector = results["vectors/m"].vector.sel({"model": "m", "method": "read", "emotion": emotion}).load()
    directions = {layer: vector.sel({"layer": layer}).values for layer in LAYERS}
    return {layer: direction / np.linalg.norm(direction) for layer, direction in directions.items()}


@pytest.mark.parametrize(
    ("op", "strength", "how"),
    [
        ("push", 0.4, {"live": True}),
        ("turn", 60.0, {"op": "rotate", "positions": "last"}),
        ("fade", 0.05, {"live": True, "positions": "generated", "half_life": 2}),
    ],
)
def test_each_condition_is_what_hooks_give_one_text_at_a_time(results, op, strength, how):
    units = vectors(results, "sad")
    pushes = [Push(layer, how.get("op", "add"), units[layer], strength, **{k: v for k, v in how.items() if k != "op"})
              for layer in LAYERS]  # fmt: skip
    where = {**LABELS, "op": op, "emotion": "sad", "strength": strength, "control": "none"}
    matches(results["capability"].sel(where).load(), pushes)


def test_the_unsteered_and_what_is_edited_by_hand_too(results):
    matches(results["capability_unsteered"].sel({"model": "m"}).load(), [])
    up = results["vectors/m"].vector.sel({"model": "m", "method": "formula", "emotion": "up"}).load()
    units = {layer: up.sel({"layer": layer}).values for layer in LAYERS}
    pushes = [Push(layer, "add", vector / np.linalg.norm(vector), 0.3, True) for layer, vector in units.items()]
    matches(results["capability_edited"].sel({"model": "m", "edit": "hand", "strength": 0.3}).load(), pushes)


def test_an_answer_of_one_token_is_not_touched_by_edits_of_generated_ones(results):
    """It is read at the question's end, where such an edit does not act."""
    module_tokens = loaded()[1]
    steered = results["capability"].sel({**LABELS, "op": "fade", "emotion": "sad", "strength": 0.4, "control": "none"})
    plain = results["capability_unsteered"].sel({"model": "m"})
    moved = abs(steered.log_likelihood - plain.log_likelihood).load()
    single = [len(module_tokens(f" {answer}")["input_ids"]) == 1 for answer in results["capability"].answer.values.flat]
    assert any(single) and float(moved.values.reshape(-1)[single].max()) < 1e-5
    assert float(moved.values.reshape(-1)[~np.array(single)].max()) > 1e-3


def test_scores_under_edits_do_not_depend_on_the_side_of_padding(tiny):
    executor = tiny("gpt2")
    rng, width = np.random.default_rng(3), executor.anatomy.d_model
    texts = [([1, 9, 11, 20, 7, 13], [7, 9, 14, 30]), ([1, 8, 12], [21, 7, 11, 9, 15]), ([1, 5], [6])]
    edit, unit = Editing(norm_skip=1), rng.standard_normal((2, width)).astype(np.float32)
    rows = []
    for i, (prompt, new) in enumerate(texts):
        both = tuple(row_edit(edit, CompiledEdit(vector, 0.3), Encoded("", tuple(prompt), 1), 8) for vector in unit)
        rows.append(forced(Row(i, tuple(prompt), edits=both), new))
    form = Form(edits=(EditSite(1, "add", True), EditSite(3, "add", True)), score=True, against=True)
    left, right = (executor.run(assemble(form, rows, side)) for side in ("left", "right"))
    for i in range(len(rows)):
        for name in ("score", "against"):
            np.testing.assert_allclose(right.row(i)[name], left.row(i)[name], rtol=1e-4, atol=1e-5)
    alone = [executor.run(assemble(form, [row])) for row in rows]
    for i, readouts in enumerate(alone):
        assert readouts.score[0] == pytest.approx(left.score[i], rel=1e-4)
    assert_equal(executor.run(assemble(form, rows)), left)


def test_other_prompts_leave_it_and_another_strength_is_a_cell_of_its_own(results, tmp_path):
    file = plan(tmp_path, steer=[{
        "name": "push", "layers": {"sets": {"two": LAYERS}}, "strengths": [0.05], "prompts": ["she went"],
        "generate": {"max_new_tokens": 3}, "vectors": {"emotions": ["sad"]}, "controls": ["zero"],
    }], edits={}, directions={}, generate=None, prompts=None)  # fmt: skip
    first = runner.run(check.load(file))
    assert first.done["capability"] == 1 and first.done["capability_unsteered"] == 1
    changed = check.load(file, ["steer[0].prompts=[he went home]"])
    again = runner.run(changed)
    assert again.done["steering"] == 1 and "capability" not in again.done and again.skipped["capability"] == 1
    more = runner.run(check.load(file, ["steer[0].prompts=[he went home]", "steer[0].strengths=[0.05, 0.1]"]))
    assert more.done["capability"] == 1 and "capability_unsteered" not in more.done
    mine, other = (
        store["capability"].nll.sel({**LABELS, "op": "push", "emotion": "sad", "strength": 0.05, "control": "none"})
        for store in (nsteer.open(file.with_suffix(".zarr")), results)
    )
    np.testing.assert_allclose(mine.values, other.values, rtol=1e-5)


def test_a_strength_that_is_sought_is_the_one_found(few, tmp_path):
    steer = {
        "name": "push", "layers": {"sets": {"two": LAYERS}}, "strengths": {"kl": [0.2], "tokens": 3},
        "prompts": ["tom walked to the market and"], "generate": {"max_new_tokens": 3},
        "vectors": {"emotions": ["sad"]}, "controls": ["zero", "random"],
    }  # fmt: skip
    file = plan(tmp_path, steer=[steer], edits={}, directions={}, generate=None, prompts=None)
    assert runner.run(check.load(file)).done["capability"] == 2
    results = nsteer.open(file.with_suffix(".zarr"))
    where = {**LABELS, "op": "push", "emotion": "sad", "strength": 0.2, "control": "none"}
    strength = float(results["calibration"].found.sel(where))
    pushes = [Push(layer, "add", vector, strength, True) for layer, vector in vectors(results, "sad").items()]
    matches(results["capability"].sel(where).load(), pushes, 2, 1)


# ---- what is said of it ---------------------------------------------------------------------------------------------


def planted(right: list[list[float]], nll: list[float]) -> xr.Dataset:
    return xr.Dataset(
        {"nll": ("passage", nll), "log_likelihood": (("item", "choice"), right)},
        coords={"passage": ["a", "b"], "item": ["p", "q", "r"], "choice": ["right", "wrong-1", "wrong-2"]},
    )


def test_the_cost_is_paired_by_passage_and_by_item():
    plain = planted([[-1, -2, -3], [-1, -2, -3], [-3, -1, -2]], [2.0, 4.0])
    steered = planted([[-1, -0.5, -3], [-1, -2, -3], [np.nan, -1, -2]], [2.5, 3.0])
    costs = costing.cost(steered, plain)
    assert costs.nll_rise.values.tolist() == [0.5, -1.0]
    assert costs.right_change.values[:2].tolist() == [-1, 0] and np.isnan(costs.right_change.values[2])
    level = planted([[-1, -1, -3]] * 3, [2.0, 4.0])
    assert costing.right(level.log_likelihood).values.tolist() == [0, 0, 0], "as likely as another is not the likeliest"


def test_claims_say_what_it_costs_with_units_interval_and_controls(results):
    findings = claims.claims(results)
    table = claims.table(findings)
    mine = table[table.claim == "capability"]
    assert len(mine) == 2 * (2 + 1 + 2 + 1) and set(mine.verdict) == {"cannot be compared"}
    rise = mine[mine.what.str.startswith("rise") & mine.scope.str.contains("push, two, read, strength 0.4")].iloc[0]
    steered, plain = results["capability"].load(), results["capability_unsteered"].load()
    part = (steered.nll - plain.nll).sel({**LABELS, "op": "push", "strength": 0.4})
    own = part.sel({"control": "none"}).mean("emotion").values
    assert rise.n == 6 and rise.value == pytest.approx(own.mean(), rel=1e-5)
    reach = 2.5705818 * own.std(ddof=1) / 6**0.5  # Student's t of 5 degrees of freedom
    assert (rise.low, rise.high) == pytest.approx((own.mean() - reach, own.mean() + reach), rel=1e-5)
    turned = part.sel({"control": ["random", "random-2"]}).mean(["control", "emotion", "passage"])
    assert f"2 x random rotation {float(turned):+.3f}" in rise.control and "unsteered" in rise.ours
    for row in mine.index:
        assert claims.follow(results, findings, row) and any(claims.cells(results, findings, row).values())


def test_the_first_screen_has_it_by_dose(results):
    screen = overview.overview_of(Evidence(results, Rules(shuffles=0), None))
    told = {(dose.setup, dose.concept, dose.strength): dose for dose in screen.doses}
    rise = (results["capability"].nll - results["capability_unsteered"].nll).sel(
        {**LABELS, "op": "push", "control": "none"}
    )
    dose = told["m, push, two, read", "sad", 0.4]
    assert dose.nll == pytest.approx(float(rise.sel({"emotion": "sad", "strength": 0.4}).mean()), rel=1e-5)
    assert not math.isnan(dose.answers)


def test_a_plan_that_steers_nothing_has_no_cost():
    (problem,) = problems(PLAN + "measure: {capability: true}\n")
    assert (problem.path, problem.found) == ("measure.capability", "capability, and nothing is steered")
    assert not problems(PLAN + STEER + "\nmeasure: {capability: true}\n")


def test_the_questions_are_whole_and_each_has_one_right_answer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capability, "FILE", WHOLE)
        given = shipped.__wrapped__()
    assert len(given.passages) >= 12 and 20 <= len(given.items) <= 40
    for label, (question, answers) in given.items.items():
        assert list(answers) == given.choices and len(set(answers.values())) == len(answers), label
        assert question == question.strip() and all(
            isinstance(answer, str) and answer for answer in answers.values()
        ), label
