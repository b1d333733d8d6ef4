"""A plan of `concepts:` is the same study as one of `emotions:`, under another name of one axis, everywhere."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.errors import LabelError, PlanError, StoreError
from nsteer.science import analysis, axis, outcomes, separation
from nsteer.store import Store
from nsteer.upkeep import diff, merge

TEXTS = """
name: honesty
emotions: {honest: positive, dishonest: negative}
passages:
  honest: [tom told the truth ., anna told it all to tom ., he said so .]
  dishonest: [tom told a lie ., anna hid it .]
"""
PLAN = """
name: honesty
models: [zoo/llama]
texts: texts.yaml
concepts: [honest, dishonest]
methods: {caa: {source: comprehension, samples: 2, baseline: rest, pooling: last, chat: never}}
steer:
  layers: [4, 2]
  strengths: [0.1]
  controls: [zero, random, shuffled]
  project: true
  prompts: {walk: tom walked to the market and, anna: anna saw}
  generate: {max_new_tokens: 3}
measure: {perplexity: true, lens: 2, anisotropy: false}
judge: {classifier: zoo/judge, map: {honest: happy, dishonest: sad}}
store: STORE
threads: 1
"""


def plan(folder, store, text=PLAN, said="concepts"):
    """A plan file, which says `concepts:` or `emotions:`."""
    (folder / "texts.yaml").write_text(TEXTS)
    file = folder / f"{said}.yaml"
    file.write_text(text.replace("concepts:", f"{said}:").replace("STORE", str(folder / store)))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two stores of the same study: `c.zarr` of concepts, `e.zarr` of emotions."""
    place = tmp_path_factory.mktemp("concepts")
    for said in ("concepts", "emotions"):
        assert not nsteer.run(nsteer.load(plan(place, f"{said[0]}.zarr", said=said))).failures
    return place


@pytest.fixture(scope="module")
def concepts(folder):
    return nsteer.open(folder / "c.zarr")


@pytest.fixture(scope="module")
def emotions(folder):
    return nsteer.open(folder / "e.zarr")


def vector(opened, **labels):
    """A vector of a store, [layer, d_model]."""
    return opened["vectors", "zoo/llama"].vector.nsteer.sel(model="zoo/llama", **labels).values


def command(*arguments):
    done = CliRunner().invoke(cli.main, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


# ---- the store ------------------------------------------------------------------------------------------------------

TOLD = {"runs", "models", "programs"}
"""Groups of when and by what plan a store was filled."""


def test_only_the_name_of_the_axis_differs(concepts, emotions):
    assert list(concepts) == list(emotions) and (concepts.axis, emotions.axis) == ("concept", "emotion")
    for path in set(concepts) - TOLD:
        marks = [of[path].cell.sel(cell_field="fingerprint").values for of in (concepts, emotions)]
        np.testing.assert_array_equal(*marks, err_msg=path)
        by_concept, by_emotion = concepts[path].drop_vars("cell"), emotions[path].drop_vars("cell")
        for name in by_emotion.variables:
            same, own = by_concept[name.replace("emotion", "concept")], by_emotion[name]
            assert same.dims == tuple(dim.replace("emotion", "concept") for dim in own.dims), (path, name)
            if name != "settings":
                np.testing.assert_array_equal(same.values, own.values, err_msg=f"{path}/{name}")
    dims = {dim for path in concepts for dim in concepts[path].dims}
    assert "concept" in dims and not [dim for dim in dims if "emotion" in dim]


def test_nothing_of_its_arrays_speaks_of_emotions(concepts):
    for path in concepts:
        for name, variable in concepts[path].variables.items():
            assert "emotion" not in f"{name} {variable.attrs.get('long_name')}", (path, name)


def test_plain_xarray_selects_by_concept(folder, concepts):
    plain = xr.open_zarr(folder / "c.zarr" / "vectors" / "zoo--llama", chunks=None)
    direction = plain.vector.sel(concept="honest").sel({"method": "caa", "layer": 2})
    assert np.array_equal(direction.values.squeeze(), vector(concepts, concept="honest", method="caa", layer=2))
    assert concepts["steering"].nsteer.sel(concept=["honest"]).sizes["concept"] == 1
    with pytest.raises(LabelError, match="vectors/zoo--llama has no dim 'emotion'"):
        concepts.sel(emotion="honest")
    assert "concept" in concepts.to_dataframe("judged").columns
    assert "concept" in concepts.tree["steering"].dims


def test_a_finished_study_is_not_done_again(folder):
    done = nsteer.run(nsteer.load(plan(folder, "c.zarr")))
    assert not sum(done.done.values()) and sum(done.skipped.values())


ALONE = {"name": "alone", "models": ["zoo/llama"], "store": "alone.zarr", "directions": {"d": {"random": 1}}}
STORED = {"d": {"store": {"path": "theirs.zarr", "method": "m", "emotion": "e"}}}
GRID = {"layers": [2], "strengths": [1.0], "scale": "raw", "prompts": {"a": "tom"}, "generate": {"max_new_tokens": 2}}


@pytest.mark.parametrize(
    ("more", "axis"),
    [
        ({}, "concept"),
        ({"steer": GRID}, "concept"),
        ({"emotions": ["happy"]}, "emotion"),
        ({"methods": {"m": {"source": "comprehension", "samples": 2}}, "texts": "zoo"}, "emotion"),
        ({"steer": GRID | {"vectors": {"emotions": [], "formulas": {"twice": "2*d"}}}}, "emotion"),
        ({"steer": GRID | {"vectors": {"concepts": [], "formulas": {"twice": "2*d"}}}}, "concept"),
        ({"directions": {}, "reads": {"all": {}}, "prompts": ["tom"]}, "emotion"),
    ],
)
def test_directions_alone_are_of_concepts(more, axis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nsteer.load({**ALONE, **more}).plan.axis == axis


def test_directions_alone_follow_the_store_that_they_go_into(folder, tmp_path):
    for name, axis_there in (("c.zarr", "concept"), ("e.zarr", "emotion")):
        assert nsteer.load({**ALONE, "store": str(folder / name)}, allow_outside=True).plan.axis == axis_there
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{")
    assert nsteer.load({**ALONE, "store": str(tmp_path / "broken.zarr")}, allow_outside=True).plan.axis == "concept"


def test_a_borrowed_emotion_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError) as error:
        nsteer.load({**ALONE, "directions": STORED, "steer": GRID | {"vectors": {"concepts": []}}})
    assert "`concepts` in a plan of emotions" in str(error.value)


def test_the_other_axis_is_refused_in_a_line(folder, tmp_path):
    other = nsteer.load(plan(tmp_path, "x.zarr", said="emotions"), [f"store={folder / 'c.zarr'}"])
    with pytest.raises(StoreError, match=r"c\.zarr has the axis 'concept', what is to go into it the axis 'emotion'"):
        nsteer.run(other)
    stores = [Store(folder / "c.zarr"), Store(folder / "e.zarr")]
    for refused in (lambda: merge.merge(stores, Store(tmp_path / "m.zarr")), lambda: diff.stores(*stores)):
        with pytest.raises(StoreError, match=r"c\.zarr has the axis 'concept', .*e\.zarr the axis 'emotion'"):
            refused()
    assert not (tmp_path / "m.zarr").exists()


def test_stores_of_concepts_are_merged_and_compared(folder, tmp_path, concepts):
    out = Store(tmp_path / "m.zarr")
    assert not merge.merge([Store(folder / "c.zarr")], out).conflicts
    assert out.axis == "concept" and diff.stores(Store(folder / "c.zarr"), out).equal
    assert command("verify", out.path).exit_code == 0


# ---- analysis -------------------------------------------------------------------------------------------------------


def test_functions_over_arrays_take_and_give_concepts(concepts, emotions):
    def both(function, **more):
        actual, expected = (function(of, **more) for of in (concepts, emotions))
        assert "concept" in actual.dims and "emotion" not in actual.dims
        xr.testing.assert_equal(axis.inward(actual), expected)
        return actual

    both(lambda of: separation.cosine_similarity(of["vectors", "zoo/llama"].vector))
    how = {"baseline": "grand_mean", "shuffles": 9}

    def measure(of):
        return separation.measure(of["activations", "zoo/llama"].pooled, text=of["samples", "zoo/llama"].text, **how)

    measured = both(measure)
    assert measured.accuracy.notnull().all() and "n_concepts" in measured
    classes = {"honest": "happy", "dishonest": "sad"}
    both(
        lambda of: outcomes.success(
            *(of[group].score.sel({"judge": "judge"}) for group in ("judged", "judged_unsteered")), classes
        )
    )
    rates = [analysis.target_rate(of["judged"].score.sel({"judge": "judge"}), classes) for of in (concepts, emotions)]
    xr.testing.assert_equal(*rates)
    text, plain = concepts["generations"].text, concepts["unsteered"].text
    table = outcomes.changed_table(text, plain, by=("model", "concept"))
    assert "concept" in table.columns


# ---- classes of unequal size ----------------------------------------------------------------------------------------


def test_two_concepts_without_neutral_texts_keep_every_passage(folder, tmp_path):
    """Held against plain arithmetic on the activations of each class: three honest passages, two dishonest ones."""
    text = PLAN.split("steer:")[0].replace("samples: 2", "samples: all") + "store: STORE\nthreads: 1\n"
    study = nsteer.load(plan(tmp_path, "u.zarr", text))
    assert not nsteer.run(study).failures
    opened = nsteer.open(tmp_path / "u.zarr")
    pooled = opened["activations", "zoo/llama"].pooled.nsteer.sel(model="zoo/llama", method="caa").load()
    there = pooled.notnull().all(("layer", "d_model")).sum("sample")
    assert {c: int(n) for c, n in zip(there.concept.values, there.values, strict=True)} == {
        "honest": 3,
        "dishonest": 2,
        "neutral": 0,
    }
    mean = pooled.mean("sample")
    wanted = mean.sel(concept="honest") - mean.sel(concept="dishonest")
    wanted = wanted / np.sqrt((wanted**2).sum("d_model"))
    np.testing.assert_allclose(vector(opened, concept="honest", method="caa"), wanted.values, atol=2e-6)
    counted = opened["vectors", "zoo/llama"].n_samples
    assert counted.sel(concept=["honest", "dishonest"]).values.ravel().tolist() == [3, 2]
    told = command("show", tmp_path / "u.zarr").stdout
    assert "held-out accuracy" in told and re.search(r"caa +5 ", told)


def test_all_passages_are_of_comprehension_alone(tmp_path):
    method = "{source: generation, samples: all, neutral_samples: 0, baseline: rest, templates: ['be {concept} .']}"
    with pytest.raises(PlanError) as raised:
        nsteer.load(plan(tmp_path, "u.zarr"), [f"methods={{g: {method}}}", "steer=[]"])
    assert ("methods.g.samples", "'all'", "a number") in [(p.path, p.found, p.expected) for p in raised.value.problems]


# ---- what is wrong --------------------------------------------------------------------------------------------------

WRONG = {
    "concepts=[honest, dishonst]": ("concepts[1]", "a concept of the text set 'honesty'"),
    "concepts=[honest, honest]": ("concepts[1]", "each label once"),
    "concepts=[]": ("concepts", "at least one concept"),
    "emotions=[honest]": ("concepts", "one of the two"),
    "steer.vectors.concepts=[honst]": ("steer.vectors.concepts[0]", "a concept of this plan"),
    "steer.vectors.emotions=[honest]": ("steer.vectors.emotions", "`concepts`"),
    "steer.vectors.formulas={x: honst}": ("steer.vectors.formulas.x", "a concept or a scale of ratings of this plan"),
    "steer.when={direction: honst, above: 0}": ("steer.when.direction", "a concept of this plan"),
    "judge.map={honst: sad}": ("judge.map.honst", "a concept of the text set 'honesty'"),
    "methods={g: {source: generation, templates: [go on]}}": (
        "methods.g.templates[0]",
        "a template that holds {concept}",
    ),
    "directions={d: {store: {path: e.zarr, method: caa}}}": ("directions.d.store.emotion", "a value"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_messages_speak_of_concepts(folder, setting, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(PlanError) as raised:
        nsteer.load(plan(folder, "c.zarr"), [setting])
    assert WRONG[setting] in [(problem.path, problem.expected) for problem in raised.value.problems]


def test_concepts_in_a_plan_of_emotions_are_refused(folder):
    with pytest.raises(PlanError) as raised:
        nsteer.load(plan(folder, "e.zarr", said="emotions"), ["steer.vectors.concepts=[honest]"])
    [problem] = raised.value.problems
    assert (problem.path, problem.expected) == ("steer.vectors.concepts", "`emotions`")


def test_a_plan_that_extends_another_may_speak_of_concepts(folder, tmp_path):
    base = plan(tmp_path, "e.zarr", said="emotions")
    top = tmp_path / "top.yaml"
    top.write_text(f"extends: {base.name}\nconcepts: [honest, dishonest]\n")
    study = nsteer.load(top)
    assert study.plan.axis == "concept" and study.plan.emotion_labels() == ["honest", "dishonest"]


def test_a_template_may_say_concept_where_the_plan_does(tmp_path):
    from nsteer.plan.prompts import sample_text

    method = "{source: generation, samples: 1, neutral_samples: 0, baseline: rest, templates: ['be {concept} .']}"
    study = nsteer.load(plan(tmp_path, "c.zarr"), [f"methods={{g: {method}}}"])
    assert sample_text(study.plan.methods["g"], study.texts, "honest", 0) == "be honest ."


def test_words_of_the_package_alone_are_turned():
    with axis.named("concept"):
        assert axis.word("an emotion; Emotions; every emotion's") == "a concept; Concepts; every concept's"
        assert axis.word("METHOD/EMOTION and {emotion}") == "METHOD/CONCEPT and {concept}"
    assert axis.word("an emotion") == "an emotion"


def test_json_of_the_store_names_the_axis(folder):
    listed = json.loads(command("ls", folder / "c.zarr", "--json").stdout)
    assert "concept" in json.dumps(listed) and "emotion" not in json.dumps(listed)


# ---- what commands say ----------------------------------------------------------------------------------------------


def test_show_speaks_of_concepts_and_takes_them(folder):
    store = folder / "c.zarr"
    told = command("show", store, "--concept", "honest").stdout
    assert "concept" in told and "emotion" not in told and "dishonest" not in told
    data = json.loads(command("show", store, "--json").stdout)
    assert {dose["concept"] for dose in data["dose"]} == {"honest", "dishonest"}
    assert {text["concept"] for text in data["texts"]} <= {"honest", "dishonest"}
    assert "concept 'honst' is not there; did you mean 'honest'?" in command("show", store, "--concept", "honst").output


def test_a_run_says_what_was_steered_to(folder):
    assert "judged as the concept steered to" in command("run", plan(folder, "c.zarr"), "--quiet").stdout


def test_a_report_makes_no_claim_of_a_paper_about_emotions(folder):
    store, page = folder / "c.zarr", folder / "c.html"
    done = command("report", store, "--claims", "-o", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert ">Concept<" in text and "Similarity of concept vectors" in text
    assert nsteer.open(store).axis == "concept"
    for name in ("dose_response", "turning_points", "regimes"):
        assert "concept" in nsteer.open(store)[f"summary/{name}"].dims
    measured = nsteer.open(store)["summary/separation/zoo--llama"]
    assert "n_concepts" in measured and "emotion" not in " ".join(map(str, measured.variables))


def test_figures_speak_of_concepts(concepts, emotions):
    from nsteer import figures

    vector = concepts["vectors", "zoo/llama"].vector.sel({"model": "zoo/llama", "method": "caa", "layer": 2}).load()
    texts = [
        artist.get_text() for artist in figures.similarity(vector).findobj(lambda artist: hasattr(artist, "get_text"))
    ]
    assert "cosine of two concept vectors" in texts and not [text for text in texts if "emotion" in text]
    for picture in figures.pictures(concepts):
        assert "emotion" not in f"{picture.title} {picture.caption} {picture.alt}"
    assert axis.current() == "emotion"


def test_vectors_leave_and_come_back_under_their_axis(folder, tmp_path):
    files = [tmp_path / "caa-honest.npz", tmp_path / "caa-dishonest.npz"]
    done = command("export", folder / "c.zarr", "-o", tmp_path / "{method}-{concept}.npz")
    assert done.exit_code == 0 and all(file.exists() for file in files), done.output
    into = tmp_path / "v.zarr"
    given = ("import", files[0], "--into", into, "--model", "zoo/llama")
    assert command(*given).exit_code == 0
    results = nsteer.open(into)
    assert results.axis == "concept" and results["vectors", "zoo/llama"].concept.values.tolist() == ["honest"]
    assert command(*given, "--concept", "truthful").exit_code == 0
    refused = command(*given, "--emotion", "truthful").output
    assert refused == f"error: {into} has the axis 'concept': say --concept, not --emotion\n"
    copy, original = (vector(of, concept="honest", method="caa") for of in (results, nsteer.open(folder / "c.zarr")))
    np.testing.assert_array_equal(copy, original)
    [kept] = results["imports"].provenance.sel(concept=["honest"]).values.ravel()
    assert json.loads(kept)["about"]["vectors"]["caa/honest"]["concept"] == "honest"
    assert "name --method and --concept" in command("export", folder / "c.zarr", "-o", tmp_path / "x.gguf").output


def test_a_plan_takes_a_vector_of_a_store_of_concepts(folder, tmp_path):
    store = f"{{path: {folder / 'c.zarr'}, method: caa, concept: honest}}"
    text = PLAN.split("concepts:")[0] + f"directions: {{d: {{store: {store}}}}}\n" + PLAN[PLAN.index("steer:") :]
    text = text.replace("controls: [zero, random, shuffled]", "controls: [zero]").split("measure:")[0]
    file = plan(tmp_path, "d.zarr", text + f"store: {tmp_path / 'd.zarr'}\nthreads: 1\n")
    study = nsteer.load(file, allow_outside=True)
    assert not nsteer.run(study).failures
    direction = vector(nsteer.open(tmp_path / "d.zarr"), method="store", concept="d")
    np.testing.assert_array_equal(direction, vector(nsteer.open(folder / "c.zarr"), concept="honest", method="caa"))


def test_steering_and_chat_take_a_vector_of_a_store_of_concepts(folder):
    from nsteer.vectors.chat import start

    talk = start("zoo/llama", vector=f"{folder / 'c.zarr'}:caa/honest", new_tokens=4)
    assert talk.known() == {"caa": ["honest", "dishonest"]}
    reply = talk.reply("tom walked to")
    assert reply.steered is not None and sum(receipt["touched"] for receipt in reply.receipts.values())
    with pytest.raises(LabelError, match="concept 'honst' is not there"):
        talk.use("caa/honst")
