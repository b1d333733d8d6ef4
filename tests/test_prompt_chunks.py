"""Prompts kept in chunks: what a stop leaves, what resumes, what is done again, and that numbers stay right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import nsteer
from nsteer import zoo
from nsteer.runner import model as running
from nsteer.runner import prompting
from nsteer.runner.progress import Progress
from nsteer.runner.stopping import Interrupted, Stop
from nsteer.stages import cells, counting, sizing
from nsteer.stages.job import IN_A_CHUNK, jobs
from nsteer.store import Store
from nsteer.upkeep import gc

WORDS = "tom anna paul lena walked to the market and sat beside the old house . she smiled".split()
PLAN = """
name: many
models: [zoo/llama]
prompts: {file: many.jsonl, columns: [kind]}
directions: {push: {random: 1}}
reads: {mean: {pooling: mean, layers: [4, 2]}, end: {pooling: last, layers: [1]}, whole: {layers: [2]}}
edits: {pushed: [{op: add, direction: push, layers: [1], strength: [2.0]}]}
generate: {max_new_tokens: 2}
store: many.zarr
threads: 1
"""
POOLED = PLAN.replace(", whole: {layers: [2]}", "")
"""The plan without whole streams."""
CONDITIONS = 2
"""Unedited, and edited."""
SIZES = {"reads": 8, "streams": 4, "edited": 8}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few prompts in a chunk."""
    for product, size in SIZES.items():
        monkeypatch.setitem(IN_A_CHUNK, product, size)


def texts(count: int) -> list[str]:
    pick = random.Random(0)
    return [" ".join(pick.choices(WORDS, k=pick.randint(1, 14))) for _ in range(count)]


def write(lines: list[str]) -> None:
    Path("many.jsonl").write_text("".join(json.dumps({"text": t, "kind": len(t)}) + "\n" for t in lines))


def study(plan: str = PLAN, **prompts: str):
    if prompts:
        plan = plan.replace("{file: many.jsonl, columns: [kind]}", json.dumps(prompts))
    Path("many.yaml").write_text(plan)
    return nsteer.load("many.yaml")


class Told(Progress):
    """Asks to stop once so many cells of a stage are there."""

    def __init__(self, stop: Stop, stage: str, cells: int):
        super().__init__()
        self.stop, self.wanted, self.most = stop, stage, cells

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        super().advance(stage, cells, tokens)
        if stage == self.wanted and self.done[stage] >= self.most:
            self.stop.ask()


def truth(lines: list[str], layers: list[int]) -> dict[int, np.ndarray]:
    """Means over a text's tokens but BOS, by plain hooks, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(zoo.path("llama"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    kept: dict[int, torch.Tensor] = {}
    for layer in layers:
        model.model.layers[layer].register_forward_hook(
            lambda _, __, out, layer=layer: kept.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
    means: dict[int, list] = {layer: [] for layer in layers}
    for line in lines:
        with torch.no_grad():
            model(**tokenizer(line, return_tensors="pt"))
        for layer in layers:
            means[layer].append(kept[layer].reshape(-1, kept[layer].shape[-1])[1:].mean(0).numpy())
    return {layer: np.stack(vectors) for layer, vectors in means.items()}


WANTED = {"reads": 3 * 2 * CONDITIONS, "streams": 5 * CONDITIONS, "edited": 3 * CONDITIONS}
"""Cells of 20 prompts."""
OTHERS = {
    "reads": (", whole: {layers: [2]}", "generate: {max_new_tokens: 2}"),
    "streams": (PLAN[PLAN.index("mean: ") : PLAN.index("whole: ")], "generate: {max_new_tokens: 2}"),
    "edited": (PLAN[PLAN.index("reads: ") : PLAN.index("edits: ")],),
}
"""Product -> the parts of the plan that make only cells of others."""


@pytest.mark.parametrize("stage", WANTED)
def test_a_stop_keeps_the_chunks_that_are_done_and_the_rest_resumes(monkeypatch, tmp_path, stage):
    monkeypatch.setattr("nsteer.runner.runs.WAVE", 16)
    monkeypatch.setattr("nsteer.runner.recording.WAVE", 16)
    write(texts(20))
    stop, plan = Stop(), PLAN
    for part in OTHERS[stage]:
        plan = plan.replace(part, "")
    with pytest.raises(Interrupted):
        nsteer.run(study(plan), progress=Told(stop, stage, 1), stop=stop)
    path = "edited" if stage == "edited" else f"{stage}/zoo--llama"
    before = Store("many.zarr").committed(path)
    assert 0 < len(before) < WANTED[stage]
    done = nsteer.run(study(plan))
    assert done.skipped[stage] == len(before) and done.done[stage] == WANTED[stage] - len(before) and not done.failures
    after = Store("many.zarr").committed(path)
    assert all(after[key].finished == record.finished for key, record in before.items()) and len(after) == WANTED[stage]


@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_of_chunks_are_those_of_prompts_read_one_by_one(tmp_path, monkeypatch, side):
    original = running.programs
    padded = lambda form, rows, **how: original(form, rows, side="left" if form.decoding else side, **how)  # noqa: E731
    monkeypatch.setattr(running, "programs", padded)
    lines = texts(20)
    write(lines)
    assert not nsteer.run(study()).failures
    results, labels = nsteer.open("many.zarr"), [str(i + 1) for i in range(20)]
    for layer, right in truth(lines, [4, 2]).items():
        streams = results.sel("reads", "stream", model="zoo/llama", read="mean", edit="none", strength=0.0, layer=layer)
        np.testing.assert_allclose(streams.sel(prompt=labels).values, right, atol=2e-5, rtol=2e-5)
    whole = results.sel("streams", "stream", model="zoo/llama", read="whole", layer=2)
    plain, pushed = (whole.sel({"edit": edit, "strength": s}) for edit, s in (("none", 0.0), ("pushed", 2.0)))
    assert (np.abs(pushed - plain).max("d_model").max("position") > 0.1).all()
    table = results.to_dataframe("edited")
    assert len(table) == 20 * CONDITIONS and (table.prompt.value_counts() == CONDITIONS).all()


def test_more_prompts_do_the_new_chunks_and_the_one_that_grew(tmp_path):
    lines = texts(30)
    write(lines[:20])
    nsteer.run(study())
    write(lines)
    done = nsteer.run(study())
    assert (done.skipped["reads"], done.done["reads"]) == (4 * CONDITIONS, 4 * CONDITIONS)  # of 4, 1 grew and 1 is new
    assert (done.skipped["edited"], done.done["edited"]) == (2 * CONDITIONS, 2 * CONDITIONS)
    assert (done.skipped["streams"], done.done["streams"]) == (5 * CONDITIONS, 3 * CONDITIONS)


MEASURED = "measure: {perplexity: true, lens: 0, anisotropy: false}\njudge: {rule: {words: {said: [a, the]}}}\n"


def test_prompts_of_another_plan_in_another_order_share_the_store_and_all_is_right(tmp_path):
    """What is measured of texts is kept in the chunks of the texts, though its group came into the store later; and
    nothing that the two plans want may go."""
    named = {f"p{i}": line for i, line in enumerate(texts(24))}
    first = study(POOLED, **dict(list(named.items())[:15]))
    nsteer.run(first)
    mixed = dict(random.Random(1).sample(list(named.items())[4:], 20))
    assert not nsteer.run(study(POOLED + MEASURED, **mixed)).failures
    second = study(POOLED + MEASURED, **mixed)
    assert nsteer.run(second).done == {}
    kept = gc.plan(Store("many.zarr"), [second, first], older=0)
    assert not kept.cells and gc.plan(Store("many.zarr"), [first], older=0).cells
    alone = POOLED.replace("many.zarr", "alone.zarr") + MEASURED
    assert not nsteer.run(study(alone, **named)).failures
    shared, own = nsteer.open("many.zarr"), nsteer.open("alone.zarr")
    at = {"prompt": list(mixed)}
    streams = shared.sel("reads", "stream", model="zoo/llama", read="mean", edit="none", strength=0.0, layer=2)
    right = truth(list(mixed.values()), [2])[2]
    np.testing.assert_allclose(streams.sel(at).values, right, atol=2e-5, rtol=2e-5)
    assert (shared["edited"].text.sel(at).values == own["edited"].text.sel(at).values).all()
    for group, variable in (("outcomes_edited", "perplexity"), ("judged_edited", "score")):
        values, wanted = (results[group][variable].sel(at).load() for results in (shared, own))
        assert np.isfinite(values.sel({"edit": "pushed", "strength": 2.0})).all()
        np.testing.assert_allclose(values.values, wanted.transpose(*values.dims).values, rtol=1e-4)


def test_a_run_that_finds_other_prompts_come_in_meanwhile_says_so(tmp_path):
    named = {f"p{i}": line for i, line in enumerate(texts(20))}
    alone = POOLED[: POOLED.index("edits:")] + "store: many.zarr\nthreads: 1\n"

    class Meanwhile(Progress):
        def stage(self, name: str, cells: int, skipped: int) -> None:
            if name == "reads":
                nsteer.run(study(alone, **{f"q{i}": line for i, line in enumerate(texts(3))}))

    done = nsteer.run(study(alone, **named), progress=Meanwhile())
    (failed,) = [failure for failure in done.failures if failure.stage == "reads"]
    assert "other prompts into reads: run again" in failed.reason and failed.kind == "transient"
    done = nsteer.run(study(alone, **named))
    assert not done.failures and sum(done.done.values())


def test_no_more_prompts_are_held_encoded_than_those_of_a_few_chunks(tmp_path, monkeypatch):
    held, encoded = [], prompting.encoded

    def watched(model, *rest):
        prompts = encoded(model, *rest)
        held.append(sum(map(len, model.encoded.values())))
        return prompts

    for module in ("prompting", "recording", "measuring"):
        monkeypatch.setattr(f"nsteer.runner.{module}.encoded", watched)
    monkeypatch.setattr(prompting, "KEPT", 2)
    write(texts(30))
    nsteer.run(study(POOLED + "measure: {perplexity: true, lens: 0, anisotropy: false}\n"))
    assert len(held) > 20 and max(held) == 2 * 8


def test_a_size_counts_every_prompt_once_a_condition(tmp_path, monkeypatch):
    write(texts(23))
    plan_study = study()
    (job,) = jobs(plan_study)
    exact = {stage.stage: (stage.rows, stage.tokens) for stage in sizing.size(plan_study).stages}
    assert exact["reads"][0] == 2 * 23 * CONDITIONS and exact["edited"][0] == exact["streams"][0] == 23 * CONDITIONS
    assert exact["edited"][1] == exact["streams"][1] + 2 * exact["edited"][0]
    monkeypatch.setattr(counting, "MAX_COUNTED", 10)
    rough = {stage.stage: (stage.rows, stage.tokens) for stage in sizing.size(study()).stages}
    assert all(
        rough[name][0] == rows and abs(rough[name][1] / tokens - 1) < 0.25
        for name, (rows, tokens) in exact.items()
        if rows
    )
    assert {key.prompt_chunk for key in job.wanted(cells.edited)} == {0, 1, 2}


def test_positions_that_some_prompts_lack_are_said_once_for_all_chunks(tmp_path):
    plan = POOLED[: POOLED.index("edits:")] + "store: many.zarr\nthreads: 1\n"
    plan = plan.replace("{pooling: last, layers: [1]}", "{pooling: {kind: mean, over: {text: zebra}}, layers: [1]}")
    named = {f"p{i}": line for i, line in enumerate(texts(20))} | {"z": "the zebra sat"}
    done = nsteer.run(study(plan, **named))
    (said,) = [warning for warning in done.warnings if "none of its positions" in warning]
    assert "end: 20 prompts have none" in said and not done.failures
