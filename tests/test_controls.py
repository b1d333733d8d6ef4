"""Controls of steering: many rotations, and emotions asked for in words, from a plan to the rows of the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_claims
import torch
import xarray as xr
from kit import zoo_llama
from test_runner import run

import nsteer
from nsteer.errors import PlanError
from nsteer.plan.check import load
from nsteer.plan.schema import Steer
from nsteer.program.randomness import rotated
from nsteer.report import claims, terminal
from nsteer.stages import notes
from nsteer.store import Store

PROMPTS = {"house": "the old house was", "run": "tom ran to", "night": "at night the garden was"}
NEW = 5
PLAN = {
    "name": "controls",
    "models": ["zoo/llama"],
    "texts": "zoo",
    "emotions": ["happy", "angry"],
    "methods": {"read": {"source": "comprehension", "samples": 3, "pooling": "mean", "chat": "never"}},
    "layers": [3, 2],
    "steer": {
        "vectors": {"emotions": ["happy"]},
        "layers": [3, 2],
        "strengths": [-0.3, 0.3],
        "prompts": PROMPTS,
        "controls": ["zero", {"random": 3}, "prompted"],
        "generate": {"max_new_tokens": NEW},
    },
    "judge": "zoo/judge",
    "measure": {"lens": 0, "anisotropy": False},
    "threads": 1,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    (folder / "controls.yaml").write_text(json.dumps({**PLAN, "store": str(folder / "controls.zarr")}))
    summary = run(folder / "controls.yaml")
    assert not summary.failures, summary.failures
    return folder / "controls.zarr"


def test_the_end_of_a_run_counts_all_rotations_together(done, capsys):
    study = load(done.parent / "controls.yaml")
    terminal.outcome(study, terminal.console())
    line = next(line for line in capsys.readouterr().out.splitlines() if "/ 3 x random " in line)
    score = Store(done).read("judged").load().score.sel({"judge": "judge"})
    part = score.sel({"control": ["random", "random-2", "random-3"], "emotion": "happy"})
    won = part.fillna(-1).argmax("class") == part["class"].values.tolist().index("happy")
    share, n = won.sum(["control", "prompt", "seed"]), part.notnull().all("class").sum(["control", "prompt", "seed"])
    expected = [f"{float(share.sel(strength=s).sum() / n.sel(strength=s).sum()):.0%}" for s in (-0.3, 0.3)]
    assert line.split()[-3:] == [*expected, str(3 * len(PROMPTS))]


@pytest.fixture(scope="module")
def model():
    return zoo_llama()


def group(store, name: str) -> xr.Dataset:
    return Store(store).read(name).load().sel({"model": "zoo/llama"})


def test_a_number_of_rotations_is_so_many_labels():
    steer = Steer(strengths=[0.1], prompts=["x"], controls=["zero", {"random": 3}, {"shuffled": 2}])
    assert steer.controls == ["zero", "random", "random-2", "random-3", "shuffled", "shuffled-2"]
    assert Steer(**steer.model_dump()).controls == steer.controls, "a plan that is written out is the same plan"


def test_rotations_differ_and_the_first_is_that_of_random_alone():
    vectors = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    first, again, second = (
        rotated(vectors, 0, "read", "happy"),
        rotated(vectors, 0, "read", "happy"),
        rotated(vectors, 0, "read", "happy", "2"),
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    for rotation in (first, second):
        np.testing.assert_allclose(rotation @ rotation.T, vectors @ vectors.T, rtol=1e-4, atol=1e-4)


def test_each_rotation_is_steered_as_far_and_writes_a_text_of_its_own(done):
    steering, texts = group(done, "steering"), group(done, "generations")
    labels = ["random", "random-2", "random-3"]
    assert set(labels) <= set(steering.control.values.tolist()) and "prompted" not in steering.control.values.tolist()
    pushed = steering.injected.sel({"control": ["none", *labels], "strength": 0.3, "layer": 2})
    own = pushed.sel({"control": "none"})
    np.testing.assert_allclose(pushed, own.broadcast_like(pushed), rtol=0.2)  # of texts of their own
    written = texts.text.sel({"strength": 0.3, "emotion": "happy"}).squeeze()
    assert len({tuple(written.sel({"control": label}).values.tolist()) for label in labels}) > 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("towards", "Let all that you write be full of this: happy."),
        ("away", "Let nothing that you write have anything of this: happy."),
    ],
)
def test_what_is_asked_for_is_written_without_any_edit(done, model, asked, words):
    module, tokenizer = model
    texts = group(done, "prompted").sel({"op": "add", "emotion": "happy", "asked": asked, "seed": 0})
    lengths = set()
    for label, prompt in PROMPTS.items():
        text = texts.sel({"prompt": label})
        ids = tokenizer(f"{words}\n\n{prompt}", return_tensors="pt")
        lengths.add(ids["input_ids"].shape[1])
        whole = module.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text.token_id.values[: int(text.n_tokens)].tolist() == whole.tolist()
    assert len(lengths) > 1, "prompts of unequal length"


def test_its_perplexity_is_given_the_prompt_without_the_words(done, model):
    module, tokenizer = model
    where = {"op": "add", "emotion": "happy", "asked": "towards", "seed": 0, "prompt": "run"}
    text = group(done, "prompted").sel(where)
    prompt = tokenizer(PROMPTS["run"])["input_ids"]
    new = text.token_id.values[: int(text.n_tokens)].tolist()
    with torch.no_grad():
        logp = module(torch.tensor([[*prompt, *new]])).logits.log_softmax(-1)[0]
    total = sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(new))
    assert float(group(done, "outcomes_prompted").sel(where).perplexity) == pytest.approx(
        np.exp(-total / len(new)), rel=1e-3
    )


def test_the_rows_are_what_the_judge_said(done):
    opened = nsteer.open(done)
    table = claims.table(claims.claims(opened, claims.Rules(shuffles=9)))
    rows = {row["what"]: row for row in table[table.claim == "effects"].to_dict("records")}
    against = next(row for what, row in rows.items() if "asking for it in words" in what)
    plain = group(done, "judged_unsteered").score.sel({"judge": "judge", "class": "happy", "seed": 0, "op": "add"})
    at = {"judge": "judge", "class": "happy", "seed": 0, "op": "add", "emotion": "happy"}
    words = group(done, "judged_prompted").score.sel({**at, "asked": "towards"}) - plain
    steered = group(done, "judged").score.sel({**at, "strength": 0.3, "control": "none"}).squeeze(drop=True)
    want = (steered - plain - words).values
    assert against["n"] == 3 and against["value"] == pytest.approx(float(want.mean()), abs=1e-6)
    assert "asked for in words alone" in against["control"] and "perplexity ratio" in against["control"]
    effect = next(row for what, row in rows.items() if "minus controls" in what)
    assert "3 x random rotation" in effect["control"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"controls": ["zero", {"random": 0}]}, "1 to 1000"),
        ({"controls": ["zero", {"shuffled": 0}]}, "1 to 1000"),
        ({"controls": ["zero", {"prompted": 2}]}, "{shuffled: 20}"),
        ({"controls": ["zero", {"random": 2, "shuffled": 2}]}, "{shuffled: 20}"),
        ({"controls": ["zero", "shuffled", {"shuffled": 3}]}, "each label once"),
        ({"controls": ["zero", "prompted"], "prompted": {"towards": "be glad"}}, "holds {emotion}"),
        ({"controls": ["zero", "prompted"], "prompted": {"towards": "{emotion} {topic}"}}, "no placeholder but"),
        ({"controls": ["zero"], "prompted": {"towards": "be {emotion}"}}, "the control `prompted`"),
        ({"controls": ["random", "zero", "random"]}, "each label once"),
    ],
)
def test_controls_that_can_be_none_are_refused(tmp_path, change, words):
    file = tmp_path / "controls.yaml"
    file.write_text(json.dumps({**PLAN, "steer": {**PLAN["steer"], **change}, "store": "s.zarr"}))
    with pytest.raises(PlanError) as caught:
        load(file)
    assert len(caught.value.problems) == 1 and words in str(caught.value), str(caught.value)


def test_several_shuffles_need_labels_to_shuffle(tmp_path):
    method = {**PLAN["methods"]["read"], "baseline": "grand_mean"}
    steer = {**PLAN["steer"], "controls": ["zero", {"shuffled": 3}]}
    file = tmp_path / "controls.yaml"
    told = {**PLAN, "emotions": ["happy"], "methods": {"read": method}, "steer": steer, "store": "s.zarr"}
    file.write_text(json.dumps(told))
    with pytest.raises(PlanError) as caught:
        load(file)
    assert [(problem.path, problem.expected) for problem in caught.value.problems] == [
        ("steer.controls[1]", "at least two labels")
    ]


@pytest.mark.parametrize(("drawn", "as_much"), [(20, 0), (20, 3), (799, 0)])
def test_the_effect_has_the_p_that_its_draws_allow(tmp_path, monkeypatch, drawn, as_much):
    """So many shuffles push as far as the vector: p is the share of draws that do, the vector's own among them."""
    labels = ["shuffled", *(f"shuffled-{k}" for k in range(2, drawn + 1))]
    monkeypatch.setitem(test_claims.AXES, "control", ["none", *labels])
    store = Store(tmp_path / "s.zarr")
    test_claims.facts(store, ["zoo/gemma"])
    test_claims.steered(store, ["zoo/gemma"])
    put = test_claims.put

    def changed(store, path, coords, variables, *rest):
        if path == "judged":
            score = variables["score"][-1]
            score[..., 1 : 1 + as_much, :, :, :, :] = score[..., :1, :, :, :, :]
        return put(store, path, coords, variables, *rest)

    monkeypatch.setattr(test_claims, "put", changed)
    test_claims.judged(store, ["zoo/gemma"])
    findings = claims.claims(nsteer.open(store.path), test_claims.QUICK, test_claims.TARGETS)
    row = test_claims.only(findings, "effects", "vector minus controls", "zoo/gemma")
    assert f"{drawn} x vector of shuffled labels" in row.control
    assert f"{as_much} of {drawn} vectors of shuffled labels do as much" in row.control
    assert f"allow {1 / (1 + drawn):.2g} at least" in row.control
    assert row.p == pytest.approx((1 + as_much) / (1 + drawn))
    limited = "of so few draws of a control p is 0.048 at least, and to agree it takes 0.005: 199 draws of each"
    assert (row.verdict, limited in row.why) == (("agrees", False) if drawn > 199 else ("inconclusive", True))


def test_check_says_what_draws_can_not_show(tmp_path):
    def told(*controls):
        file = tmp_path / "controls.yaml"
        file.write_text(
            json.dumps({**PLAN, "steer": {**PLAN["steer"], "controls": ["zero", *controls]}, "store": "s.zarr"})
        )
        return [note for note in notes.notes(load(file)) if "draws" in note]

    (said,) = told({"random": 20}, "shuffled")
    assert "random: 20" in said and "p is 0.048 at least" in said and "199 draws" in said
    assert told("random", {"shuffled": 199}) == []
