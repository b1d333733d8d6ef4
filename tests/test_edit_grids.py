"""Conditions written by hand over strengths: texts, streams, receipts, searches, compared with hooks on single
texts."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import tinies
from oracle import Push
from planside import PLAN, problems

import nsteer
from nsteer import runner
from nsteer.plan import check
from nsteer.program.randomness import uniforms, unit_vector
from nsteer.report import claims, shown
from nsteer.runner import model as running

LAYERS, NEW, DEEP = [5, 2], 5, {"num_hidden_layers": 6}
PROMPTS = {
    "walk": "tom ran to the",
    "night": "at night the old house was warm and the rain fell",
    "sun": "the sun",
}
STRENGTHS = [0.5, -0.25, 2.0]
PUSH = {"op": "add", "direction": "noise", "layers": LAYERS, "scale": "stream_norm", "strength": STRENGTHS}
EDITS = {
    "push": [PUSH],
    "both": [
        {"op": "project_out", "direction": "other", "layers": [2]},
        {**PUSH, "scale": "unit", "strength": [4.0, 2.0], "positions": "last"},
        {**PUSH, "direction": "other", "layers": [5], "scale": "unit", "strength": [4.0, 2.0]},
    ],
    "once": [{"op": "clamp", "direction": "noise", "layers": [2], "strength": 3.0}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of six blocks."""
    place = tmp_path_factory.mktemp("deep")
    tinies.model("llama", **DEEP).save_pretrained(place)
    tinies.tokenizer(bos=tinies.BOS["llama"]).save_pretrained(place)
    return place


def plan(folder, place, **changes):
    data = {
        "name": "grid",
        "models": [{"id": str(folder), "label": "deep", "device": "cpu"}],
        "prompts": PROMPTS,
        "directions": {"noise": {"random": 4}, "other": {"random": 5}},
        "reads": {"mean": {"layers": LAYERS, "pooling": "mean"}, "whole": {"layers": [2, 5]}},
        "edits": EDITS,
        "generate": {"max_new_tokens": NEW},
        "threads": 1,
        "store": str(place / "grid.zarr"),
        **changes,
    }
    (place / "grid.yaml").write_text(json.dumps(data))
    return check.load(place / "grid.yaml")


class Truth:
    """The model by hooks."""

    def __init__(self):
        self.module = tinies.model("llama", **DEEP)
        self.blocks = tinies.blocks("llama", self.module)
        words = tinies.tokenizer(bos=tinies.BOS["llama"])
        self.tokens = {label: tuple(words(text)["input_ids"]) for label, text in PROMPTS.items()}
        self.noise, self.other = (unit_vector(32, seed, name) for seed, name in ((4, "noise"), (5, "other")))

    def pushes(self, edit: str, strength: float) -> list[Push]:
        """In forward order, and at one layer in the plan's order."""
        noise, other = self.noise, self.other
        if edit == "push":
            return [Push(layer, "add", noise, strength, live=True) for layer in (2, 5)]
        if edit == "both":
            last = [Push(layer, "add", noise, strength, positions="last") for layer in (2, 5)]
            return [Push(2, "project_out", other, 1.0), *last, Push(5, "add", other, strength)]
        return [Push(2, "clamp", noise, 3.0)] if edit == "once" else []


@pytest.fixture(scope="module")
def truth():
    return Truth()


CELLS = [("push", strength) for strength in STRENGTHS] + [("both", 4.0), ("both", 2.0), ("once", 3.0), ("none", 0.0)]
ENTRIES = {"push": [(0, 2), (0, 5)], "both": [(0, 2), (1, 2), (1, 5), (2, 5)], "once": [(0, 2)], "none": []}


@pytest.fixture(scope="module", params=["left", "right"])
def filled(request, folder, tmp_path_factory):
    """The plan's store, its prompts padded on either side where nothing is generated."""
    place, padded = tmp_path_factory.mktemp("grid"), running.programs
    with pytest.MonkeyPatch.context() as patch:
        programs = lambda form, rows, **how: padded(form, rows, side="left" if form.decoding else request.param, **how)  # noqa: E731
        patch.setattr(running, "programs", programs)
        summary = runner.run(plan(folder, place, measure={"lens": 0, "anisotropy": False}, project=True))
    assert not summary.failures, summary.failures
    return nsteer.open(place / "grid.zarr")


def test_every_cell_is_there_under_its_labels_and_no_other(filled):
    there = filled["edited"].n_tokens.load() >= 0
    assert there.dims == ("model", "edit", "strength", "prompt", "seed")
    conditions = {
        (e, s) for e in there.edit.values for s in there.strength.values if there.sel({"edit": e, "strength": s}).any()
    }
    assert conditions == set(CELLS)
    table = filled.to_dataframe("edited")
    assert len(table) == len(CELLS) * len(PROMPTS) and set(zip(table.edit, table.strength)) == set(CELLS)
    assert set(filled.to_dataframe("edited_receipts").strength) == {s for e, s in CELLS if e != "none"}


def test_texts_and_receipts_are_those_of_hooks(filled, truth):
    texts, receipts = filled["edited"].load(), filled["edited_receipts"].load()
    for edit, strength in CELLS:
        for label, tokens in truth.tokens.items():
            true = oracle.generate(
                truth.module, truth.blocks, tokens, truth.pushes(edit, strength), new=NEW, eos=[tinies.END]
            )
            at = {"model": "deep", "edit": edit, "strength": strength, "prompt": label, "seed": 0}
            text = texts.sel(at)
            assert text.token_id.values[: int(text.n_tokens)].tolist() == list(true.tokens), at
            for i, (entry, layer) in enumerate(ENTRIES[edit]):
                receipt = receipts.sel({**at, "entry": entry, "layer": layer})
                assert receipt.touched == true.receipts[i, 0]
                assert receipt.injected.item() == pytest.approx(true.receipts[i, 3] / true.receipts[i, 0], rel=1e-3)


def test_streams_are_those_of_hooks(filled, truth):
    reads, streams = filled["reads", "deep"].stream.load(), filled["streams", "deep"].stream.load()
    for edit, strength in CELLS:
        for label, tokens in truth.tokens.items():
            true = oracle.forward(truth.module, truth.blocks, tokens, truth.pushes(edit, strength)).streams
            at = {"model": "deep", "edit": edit, "strength": strength, "prompt": label}
            for layer in LAYERS:
                mean = reads.sel({**at, "read": "mean", "layer": layer}).values
                np.testing.assert_allclose(mean, true[layer][1:].mean(0), atol=2e-4)
                whole = streams.sel({**at, "read": "whole", "layer": layer}).values
                np.testing.assert_allclose(whole[: len(tokens)], true[layer], atol=2e-4)
                assert np.isnan(whole[len(tokens) :]).all()


def test_conditions_say_what_they_are_beside_the_prompts_texts(filled):
    edits = filled["edits"].load()
    assert json.loads(edits.settings.sel({"edit": "push"}).item())[0]["strength"] == STRENGTHS
    assert edits.settings.sel({"edit": "none"}).item() == "[]"
    for edit in ("none", *EDITS):
        shown = edits.prompt_text.sel({"edit": edit})
        assert {label: shown.sel({"prompt": label}).item() for label in PROMPTS} == PROMPTS


def test_perplexities_and_projections_of_edited_texts_are_those_of_hooks(filled, truth):
    texts, measured = filled["edited"].load(), filled["outcomes_edited"].load()
    projected = filled["projections_edited"].projection.load()
    for edit, strength in CELLS:
        for label, tokens in truth.tokens.items():
            at = {"model": "deep", "edit": edit, "strength": strength, "prompt": label, "seed": 0}
            text = texts.sel(at)
            new = tuple(int(t) for t in text.token_id.values[: int(text.n_tokens)])
            out = oracle.forward(truth.module, truth.blocks, tokens + new).logits.log_softmax(-1)
            log_p = sum(float(out[len(tokens) - 1 + i, t]) for i, t in enumerate(new))
            assert measured.log_probability.sel(at).item() == pytest.approx(log_p, rel=1e-3)
            seen = oracle.forward(truth.module, truth.blocks, tokens + new, truth.pushes(edit, strength), len(tokens))
            for layer in LAYERS:
                stream = seen.streams[layer].numpy()
                for name, vector in (("noise", truth.noise), ("other", truth.other)):
                    here = projected.sel({**at, "method": "random", "layer": layer, "target": name})
                    end, written = (here.sel({"where": where}).item() for where in ("prompt_end", "written"))
                    assert end == pytest.approx(float(stream[len(tokens) - 1] @ vector), abs=2e-3)
                    if len(new) > 1:
                        true = float((stream[len(tokens) : len(tokens) + len(new) - 1] @ vector).mean())
                        assert written == pytest.approx(true, abs=2e-3)


def test_a_strength_more_leaves_the_others(folder, tmp_path):
    edits = {"push": [PUSH]}
    first = runner.run(plan(folder, tmp_path, edits=edits))
    more = {"push": [{**PUSH, "strength": [*STRENGTHS, 1.5]}]}
    again = runner.run(plan(folder, tmp_path, edits=more))
    assert first.done["edited"] == 4 and again.done["edited"] == 1 and again.done["reads"] == 1
    table = nsteer.open(tmp_path / "grid.zarr").to_dataframe("edited")
    assert set(table.strength) == {0.0, *STRENGTHS, 1.5}


def test_sampled_texts_go_by_seed_and_share_their_draws(folder, tmp_path, truth):
    how = {"generate": {"max_new_tokens": NEW, "sample": True, "temperature": 0.7}, "seeds": [0, 7], "seed": 3}
    assert not runner.run(plan(folder, tmp_path, reads={}, edits={"push": [PUSH]}, **how)).failures
    texts = nsteer.open(tmp_path / "grid.zarr")["edited"].load()
    for strength, seed in ((0.5, 7), (2.0, 0), (0.0, 7)):
        edit = "push" if strength else "none"
        for label, tokens in truth.tokens.items():
            uniform = uniforms(NEW, 3, label, seed)
            true = oracle.generate(
                truth.module, truth.blocks, tokens, truth.pushes(edit, strength), new=NEW, eos=[tinies.END],
                sampling=(0.7, 0, 1.0), uniform=uniform,
            )  # fmt: skip
            text = texts.sel({"model": "deep", "edit": edit, "strength": strength, "prompt": label, "seed": seed})
            assert text.token_id.values[: int(text.n_tokens)].tolist() == list(true.tokens)


def test_a_strength_found_by_kl_is_the_one_that_hooks_measure(folder, tmp_path, truth):
    edits = {
        "kl": [{**PUSH, "strength": {"kl": [0.2, 0.8], "tokens": 4}}],
        "both": [EDITS["both"][0], {**PUSH, "strength": {"kl": [0.5], "tokens": 4}}],
    }
    assert not runner.run(plan(folder, tmp_path, edits=edits)).failures
    store = nsteer.open(tmp_path / "grid.zarr")
    searches, texts, reads = (
        store["calibration_edits"].load(),
        store["edited"].load(),
        store["reads", "deep"].stream.load(),
    )
    for edit, target in (("kl", 0.2), ("kl", 0.8), ("both", 0.5)):
        search = searches.sel({"model": "deep", "edit": edit, "strength": target})
        strength = float(search.found)
        more = [Push(2, "project_out", truth.other, 1.0)] if edit == "both" else []
        pushes = [*more, *truth.pushes("push", strength)]
        kls = []
        for tokens in truth.tokens.values():
            new = oracle.generate(truth.module, truth.blocks, tokens, new=4, eos=[tinies.END]).tokens
            out = [
                oracle.forward(truth.module, truth.blocks, tokens + new, p, len(tokens)).logits for p in (pushes, [])
            ]
            own, base = (logits[len(tokens) - 1 : -1].double().log_softmax(-1) for logits in out)
            kls.append(float((own.exp() * (own - base)).sum(-1).mean()))
        assert search.met and np.mean(kls) == pytest.approx(target, rel=0.03)
        for label, tokens in truth.tokens.items():
            at = {"model": "deep", "edit": edit, "strength": target, "prompt": label}
            true = oracle.generate(truth.module, truth.blocks, tokens, pushes, new=NEW, eos=[tinies.END])
            text = texts.sel({**at, "seed": 0})
            assert text.token_id.values[: int(text.n_tokens)].tolist() == list(true.tokens)
            stream = oracle.forward(truth.module, truth.blocks, tokens, pushes).streams[5]
            np.testing.assert_allclose(reads.sel({**at, "read": "mean", "layer": 5}), stream[1:].mean(0), atol=2e-3)


def test_a_judge_reads_them_too(tmp_path):
    text = PLAN.split("methods:")[0] + f"store: {tmp_path / 'judged.zarr'}\n"
    text += """\
judge: {classifier: zoo/judge, map: {push: happy}}
prompts: {a: tom walked to the, b: the rain}
directions: {d: {random: 0}}
generate: {max_new_tokens: 4}
edits: {push: [{op: add, direction: d, scale: stream_norm, strength: [0.1, 0.3]}]}
"""
    (tmp_path / "judged.yaml").write_text(text)
    assert not runner.run(check.load(tmp_path / "judged.yaml")).failures
    store = nsteer.open(tmp_path / "judged.zarr")
    texts, judged = store["edited"].text.load(), store["judged_edited"].score.isel({"judge": 0}).load()
    from nsteer.executors.classifier import Classifier
    from nsteer.zoo import path

    classifier = Classifier(str(path("judge")), None, "cpu", say=print)
    for edit, strength in (("none", 0.0), ("push", 0.1), ("push", 0.3)):
        at = {"model": "zoo/llama", "edit": edit, "strength": strength, "prompt": "b", "seed": 0}
        true = classifier.probabilities([texts.sel(at).item()])[0]
        np.testing.assert_allclose(judged.sel(at).values, true, atol=1e-5)
    view = shown.view(store, claims.Rules(), texts=9)
    doses = {(row["op"], row["emotion"], row["strength"]): row for row in view["dose"]}
    assert set(doses) == {("edits", "push", 0.1), ("edits", "push", 0.3)}
    dose = doses["edits", "push", 0.3]
    moved = sum(
        bool(
            judged.sel({**at, "edit": "push", "strength": 0.3, "prompt": p, "class": "happy"})
            > judged.sel({**at, "edit": "none", "strength": 0.0, "prompt": p, "class": "happy"})
        )
        for p in ("a", "b")
    )
    assert dose["n"] == dose["judged"] == 2 and dose["moved"] == moved
    assert len(view["texts"]) == 4 and all(
        row["unsteered"] == texts.sel({**at, "edit": "none", "strength": 0.0, "prompt": row["prompt"]}).item()
        for row in view["texts"]
    )
    assert {row["prompt_text"] for row in view["texts"]} == {"tom walked to the", "the rain"}


BAD = {
    "[{op: add, direction: d, strength: []}]": ("edits.e[0].strength", "an empty list"),
    "[{op: add, direction: d, strength: [1, 1]}]": ("edits.e[0].strength[1]", "1.0 a second time"),
    "[{op: add, direction: d, strength: much}]": ("edits.e[0].strength", "'much'"),
    "[{op: add, direction: d, strength: {kl: [0.3], perplexity_ratio: [2]}}]": ("edits.e[0].strength", "both of them"),
    "[{op: add, direction: d, strength: {}}]": ("edits.e[0].strength", "neither kl nor perplexity_ratio"),
    "[{op: add, direction: d, strength: {kl: [0.3], random: own}}]": ("edits.e[0].strength.random", "own"),
    "[{op: add, direction: d, strength: [1, 2]}, {op: add, direction: d, strength: [1, 3]}]": (
        *("edits.e[1].strength", "other strengths"),
    ),
}


@pytest.mark.parametrize("edits", BAD)
def test_strengths_that_do_not_go_together_are_refused_where_they_stand(edits):
    general = "prompts: {a: one}\ndirections: {d: {random: 0}}\ngenerate: {max_new_tokens: 4}\n"
    (problem,) = problems(f"{PLAN}{general}edits: {{e: {edits}}}\n")
    path, phrase = BAD[edits]
    assert problem.path == path and phrase in problem.found


@pytest.mark.parametrize(
    ("more", "path"),
    [("seeds: [0, 1]", "seeds"), ("seeds: [1]\nreads: {r: {}}", "seeds"), ("project: true\nreads: {r: {}}", "project")],
)
def test_seeds_and_projections_are_of_texts(more, path):
    generate = "" if "reads" in more else "generate: {max_new_tokens: 4}\n"
    (problem,) = problems(f"{PLAN}prompts: {{a: one}}\n{generate}{more}\n")
    assert problem.path == path
