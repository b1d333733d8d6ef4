"""Plans from Python: a mapping is checked as a file is; what notebooks show is text, whatever the texts hold."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsteer
from nsteer import zoo
from nsteer.errors import ExecutionError, PlanError, SteerError, StoreWarning
from nsteer.plan import reader
from nsteer.runner import Summary
from nsteer.runner.failing import Failure
from nsteer.runner.progress import Notebook
from nsteer.system import markup

HOSTILE = "<img src=x onerror=alert(1)>&\x1b[31m"

FILE = """
name: pair
models: [zoo/llama]
directions: {d: {random: 3}}
steer: {layers: [3, 1], strengths: [0.1, 0.2], prompts: {1: tom walked}, generate: {max_new_tokens: 2}}
store: pair.zarr
"""


def fields(**more):
    """The plan of FILE, as Python would write it."""
    steer = {"layers": (3, 1), "strengths": np.array([0.1, 0.2]), "prompts": {1: "tom walked"}}
    steer["generate"] = {"max_new_tokens": np.int64(2)}
    plan = {"name": "pair", "models": ("zoo/llama",), "directions": {"d": {"random": 3}}, "steer": steer}
    return {**plan, "store": Path("pair.zarr"), **more}


@pytest.fixture(autouse=True)
def stands(tmp_path):
    """In an empty folder (tests/conftest.py)."""


# ---- plans -------------------------------------------------------------------------------------------------------


def test_a_mapping_is_the_plan_that_its_file_would_be():
    Path("pair.yaml").write_text(FILE)
    from_file, from_python = nsteer.load("pair.yaml"), nsteer.plan(fields())
    assert from_python.plan == from_file.plan
    assert reader.parse(from_python.document.text).data == from_file.document.data  # what the store keeps of it
    assert nsteer.load(fields(), ["steer.strengths=[0.5]"]).plan.steer[0].strengths == [0.5]


WRONG = {
    "name": "pair",
    "models": ["zoo/lama"],
    "emotions": {"a", "b"},
    "directions": {"d": {"random": object()}},
    "steer": [{"strengths": [0.1, "high"], "prompts": ["x"]}],
    "store": 5,
    "stor": "x.zarr",
}


def test_every_problem_of_a_mapping_is_named_by_its_path():
    with pytest.raises(PlanError) as raised:
        nsteer.load(WRONG)
    paths = {problem.path for problem in raised.value.problems}
    assert {"models[0]", "emotions", "directions.d.random", "steer[0].strengths[1]", "store", "stor"} <= paths
    assert all(not problem.file and not problem.line for problem in raised.value.problems)
    assert "steer[0].strengths[1]: expected a number, found 'high'" in str(raised.value)


def test_a_mapping_extends_a_file_and_each_problem_is_where_it_stands():
    Path("base.yaml").write_text(FILE.replace("random: 3", "randam: 3"))
    with pytest.raises(PlanError) as raised:
        nsteer.load({"extends": "base.yaml", "seed": "x", "steer": {"strengths": [[]], "prompts": ["x"]}})
    places = {problem.path: (problem.file, problem.line) for problem in raised.value.problems}
    assert places["directions.d.randam"] == ("base.yaml", 4)
    assert places["seed"] == places["steer.strengths[0]"] == ("", 0)
    Path("base.yaml").write_text(FILE)
    plan = nsteer.load({"extends": "base.yaml", "seed": 4}).plan
    assert (plan.seed, plan.name) == (4, "pair")


def test_what_no_person_would_write_is_refused():
    circle: dict = {}
    circle["steer"] = circle
    with pytest.raises(PlanError, match="inside itself"):
        nsteer.load(circle)
    with pytest.raises(PlanError, match="values"):
        nsteer.load({"name": "x", "steer": {"strengths": np.zeros(300_000)}})
    with pytest.raises(PlanError, match="'1' given twice"):
        nsteer.load(fields(judge={"map": {1: None, "1": None}}))


def test_a_mapping_may_name_no_more_than_a_file():
    outside = {"d": {"store": {"path": str(Path.cwd().parent), "method": "a", "emotion": "b"}}}
    with pytest.raises(PlanError, match="outside"):
        nsteer.load(fields(directions=outside))


# ---- what notebooks show -----------------------------------------------------------------------------------------


def tags(html: str) -> set[str]:
    return set(re.findall(r"<\s*/?\s*([a-z]+)", html, re.I))


def test_no_text_becomes_markup():
    failure = Failure("steering", ("m", HOSTILE), HOSTILE)
    summary = Summary(f"{HOSTILE}.zarr", {"steering": 1}, {HOSTILE: 2}, [failure], [failure], [HOSTILE])
    study = nsteer.load(fields(about=HOSTILE, steer={"strengths": [0.1], "prompts": {HOSTILE: HOSTILE}}))
    for view in (study, summary):
        html = view._repr_html_()
        assert tags(html) <= {"table", "caption", "b", "tr", "td", "th"}
        assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in html and "\x1b" not in html and "\\x1b[31m" in html
    assert "\x1b" not in repr(study) and "zoo/llama (5 layers of width 112)" in repr(study)
    assert len(repr(study)) < 2000  # of the texts of its set nothing


def test_a_run_of_a_notebook_shows_its_bar_and_what_came_of_it():
    shown = []

    class Handle:
        def update(self, view):
            shown.append((view._repr_html_(), repr(view)))

    study = nsteer.load(fields())
    summary = nsteer.run(study, progress=Notebook(lambda view, display_id: Handle()))
    assert summary.done["steering"] == 4 and not summary.failures
    html, plain = shown[-1]
    assert "<progress max='1' value='1.000'>" in html and "4 of 4 cells done" in plain
    assert tags(html) <= {"progress", "br", "small"}
    values = [
        float(re.search(r"value='([\d.]+)'", html_text)[1])
        for html_text, _ in shown
        if "steering: " in html_text and "value" in html_text
    ]
    assert values and max(values) <= 1
    assert "<td" in summary._repr_html_() and ">4</td>" in summary._repr_html_()
    opened = nsteer.open("pair.zarr")
    assert "<td style='text-align: left; vertical-align: top; white-space: pre-wrap'>steering<" in opened._repr_html_()


def test_a_bar_of_hostile_words_is_a_bar():
    class Handle:
        def update(self, view):
            self.html = view._repr_html_()

    handle = Handle()
    bar = Notebook(lambda view, display_id: handle)
    bar.model(HOSTILE, 1, 1)
    bar.stage("steering", 2, 0)
    bar.note(HOSTILE)
    assert "<img" not in handle.html and "\x1b" not in handle.html
    assert tags(markup.bar(7.0, HOSTILE)) == {"progress", "br"}


def test_the_plan_of_a_call_and_the_room_are_one_name():
    import nsteer.plan.layers  # binds nsteer.plan to the room

    assert nsteer.plan(fields()).plan.name == "pair" and nsteer.plan.layers.resolve([2], 5)


# ---- studies as functions ----------------------------------------------------------------------------------------

MODEL = "zoo/gpt2"
TRUE = ["tom told the truth .", "anna told it all to the old man .", "he said so ."]
FALSE = ["tom told a lie .", "anna hid it in the house by the wall ."]
PROMPTS = ["tom walked to the market and", "the rain fell"]


@pytest.fixture(scope="module")
def loaded():
    folder = str(zoo.path("gpt2"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def streams(loaded, text: str) -> np.ndarray:
    """[block, position, d_model] of a text alone, by hooks."""
    model, tokenizer = loaded
    kept, hooks = {}, []
    for i, block in enumerate(model.transformer.h):
        hooks.append(block.register_forward_hook(lambda m, a, out, i=i: kept.update({i: out})))
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    block_streams = [kept[i][0] if isinstance(kept[i], tuple) else kept[i] for i in sorted(kept)]
    return torch.stack([stream.reshape(-1, stream.shape[-1]) for stream in block_streams]).numpy()


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return nsteer.contrast(MODEL, TRUE, tuple(FALSE), layers=[4, 2], name="honest")


def test_captured_streams_are_those_of_hooks(loaded):
    texts = [*TRUE, TRUE[0]]  # a text may come twice
    last = nsteer.capture(MODEL, texts, layers=[4, 2], pooling="last")
    whole = nsteer.capture(MODEL, {"a": TRUE[1], "b": TRUE[2]}, layers=[4, 2])
    assert last.dims == ("prompt", "layer", "d_model") and last.prompt.values.tolist() == [0, 1, 2, 3]
    assert last.text.values.tolist() == texts and whole.prompt.values.tolist() == ["a", "b"]
    for i, text in enumerate(texts):
        for layer in (2, 4):
            want = streams(loaded, text)[layer]
            np.testing.assert_allclose(last.sel(prompt=i, layer=layer), want[-1], atol=1e-4)
    for label, text in (("a", TRUE[1]), ("b", TRUE[2])):
        for layer in (2, 4):
            want = streams(loaded, text)[layer]
            kept = whole.sel(prompt=label, layer=layer).dropna("position")
            np.testing.assert_allclose(kept, want, atol=1e-4)


def test_a_contrast_is_the_difference_of_means_and_says_where_it_comes_from(loaded, honest):
    means = [np.mean([streams(loaded, text)[:, -1] for text in side], 0) for side in (TRUE, FALSE)]
    assert honest.dims == ("layer", "d_model") and set(honest.layer.values.tolist()) == {2, 4}
    for layer in (2, 4):
        np.testing.assert_allclose(honest.sel(layer=layer), (means[0] - means[1])[layer], atol=1e-4)
    assert honest.attrs["model"] == MODEL and len(honest.attrs["fingerprint"]) == 13
    again = nsteer.load(reader.parse(honest.attrs["plan"]).data, allow_outside=True)
    assert again.plan.directions["honest"].contrast.positive == TRUE


def test_a_sweep_steers_as_hooks_do(loaded, honest):
    model, tokenizer = loaded
    results = nsteer.sweep(
        MODEL, honest, [0.0, 0.5], PROMPTS, generate={"max_new_tokens": 6}, judge={"classifier": "zoo/judge"}
    )
    texts = results.sel("generations", "text", method="store", concept="honest", control="none", layer_set="2,4")
    for prompt in PROMPTS:
        for strength in (0.0, 0.5):
            ids = tokenizer(prompt, return_tensors="pt")
            with nsteer.steer(model, honest, strength=strength), torch.no_grad():
                out = model.generate(**ids, max_new_tokens=6, do_sample=False)
            said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert texts.sel(prompt=prompt, strength=strength).item().strip() == said.strip()
    assert results["judged"].score.notnull().all() and len(results["unsteered"].prompt) == 2
    kept = json.loads(results["imports"].provenance.item())
    assert kept["about"]["fingerprint"] == honest.attrs["fingerprint"]


def test_a_store_is_kept_and_gone_on_with(honest):
    given = dict(prompts=PROMPTS[:1], store="kept.zarr", controls=[], generate={"max_new_tokens": 2})
    first = nsteer.sweep(MODEL, {"a": honest, "b": -honest}, 0.1, **given)
    before = first.store.committed("generations")
    second = nsteer.sweep(MODEL, {"a": honest, "b": -honest}, [0.1, 0.2], **given)
    after = second.store.committed("generations")
    assert len(before) == 2 and len(after) == 4 and all(after[key] == record for key, record in before.items())


def test_a_tensor_needs_its_layers_and_other_weights_are_told(honest):
    tensor = torch.from_numpy(honest.sel(layer=2).values)
    given = dict(prompts=PROMPTS[:1], controls=[], generate={"max_new_tokens": 2})
    with pytest.raises(SteerError, match=r"name those to be steered, layers="):
        nsteer.sweep(MODEL, tensor, 0.1, **given)
    results = nsteer.sweep(MODEL, tensor, 0.1, layers=[3], **given)
    assert results["steering"].layer_set.values.tolist() == ["3"]
    with pytest.raises(SteerError, match="zoo/llama has 5 layers of width 112"):
        nsteer.sweep("zoo/llama", honest, 0.1, **given)
    with pytest.warns(StoreWarning, match="other weights"):
        nsteer.sweep(MODEL, honest.assign_attrs(identity="another"), 0.1, **given)


def test_what_is_wrong_with_a_study_is_told_before_a_model_loads(loaded, monkeypatch):
    monkeypatch.setattr("nsteer.executors.create", None)
    with pytest.raises(PlanError) as raised:
        nsteer.contrast("zoo/lama", [], FALSE, pooling="lust", bogus=1)
    assert len(raised.value.problems) == 4 and "did you mean 'llama'" in str(raised.value)
    with pytest.raises(PlanError, match="layer 9"):
        nsteer.contrast(MODEL, TRUE, FALSE, layers=[9])
    with pytest.raises(SteerError, match="GPT2LMHeadModel is no hub id"):
        nsteer.capture(loaded[0], TRUE)
    with pytest.raises(PlanError, match="prompts: expected it where"):
        nsteer.capture(MODEL, TRUE, prompts=["a"])


def test_a_model_that_does_not_load_is_an_error_of_ours(tmp_path):
    broken = shutil.copytree(zoo.path("gpt2"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-8])
    with pytest.raises((ExecutionError, PlanError)):
        nsteer.capture(broken, TRUE[:1])


def test_builders_have_signatures_that_tools_can_read():
    for function in (nsteer.contrast, nsteer.sweep, nsteer.capture):
        assert all(part.annotation is not part.empty for part in inspect.signature(function).parameters.values())
        assert function.__doc__ and inspect.signature(function).return_annotation in ("xr.DataArray", "Results")
