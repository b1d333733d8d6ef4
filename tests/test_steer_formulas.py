"""Formulas that steer, and shuffled labels as a control: what is added is worked out by hand from the store."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_runner
from planside import PLAN as SMALL
from planside import problems
from test_runner import EMOTIONS, METHODS, NEUTRAL, STEER, results, run, write

import nsteer
from nsteer.plan.check import load
from nsteer.program.randomness import generator, rotated
from nsteer.report import claims
from nsteer.runner import sources
from nsteer.runner.model import ModelRun
from nsteer.science.directions import axes, permutation
from nsteer.science.targets import Target
from nsteer.stages import cells
from nsteer.stages.job import Job
from nsteer.store import Store

judge = test_runner.judge
READ = {**METHODS["read"], "unit_norm": False}
FORMULAS = {
    "joy_not_fear": "0.5*joy - fear",
    "clean": "joy ⟂ fear",
    "up": "valence",
    "made_joy": "made.joy + rage",
}
RATINGS = {"valence": {"joy": 0.9, "fear": -0.6, "rage": -0.7}}
ENTRY = {
    **STEER[0],
    "name": "mix",
    "scale": "unit",
    "vectors": {"methods": ["read"], "emotions": ["joy"], "formulas": FORMULAS},
    "layers": [3, 1],
    "strengths": [2.5],
    "controls": ["zero", {"shuffled": 2}, "random"],
}
LAYERS = (3, 1)


def plan_of(place, folder, **changes):
    methods = {"made": METHODS["made"], "read": READ}
    steer = {**ENTRY, **changes.pop("entry", {})}
    return write(place, folder("llama"), methods=methods, ratings=RATINGS, steer=[steer], **changes)


def watched(patch) -> dict[tuple, tuple]:
    """(label, control, layer) -> the vector and the amount of the rows that a run then puts through the model."""
    seen: dict[tuple, tuple] = {}
    first = ModelRun.execute

    def execute(self, stage, form, rows):
        rows = list(rows)
        for row in rows:
            for site, edit in zip(form.edits, row.edits, strict=True):
                seen[row.key.cell.emotion, row.key.cell.control, site.layer] = edit.vector, edit.amount
        return first(self, stage, form, rows)

    patch.setattr(ModelRun, "execute", execute)
    return seen


@pytest.fixture(scope="module")
def done(folder, judge, tmp_path_factory):
    """A finished run, and the vector, amount of every steered row by (emotion, control, layer)."""
    place = tmp_path_factory.mktemp("formulas")
    spec = {"classifier": str(judge), "device": "cpu", "map": {"up": "joy"}}
    plan = plan_of(place, folder, judge=spec, measure={"lens": 0, "anisotropy": False})
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        first, read = sources.samples_of, []
        patch.setattr(sources, "samples_of", lambda model, job, *what: read.append(what[0]) or first(model, job, *what))
        summary = run(plan)
    assert not summary.failures, summary.failures
    assert sorted(read) == ["made", "read"], "the samples of each method are read once for both draws"
    return plan, summary, seen


def stored(plan, method: str, layer: int) -> dict[str, np.ndarray]:
    vectors = results(plan.with_suffix(".zarr"), "vectors/tiny").vector
    vectors = vectors.sel({"model": "tiny", "method": method, "layer": layer})
    return {e: vectors.sel({"emotion": e}).values.astype(np.float64) for e in EMOTIONS}


def worked_out(read: dict, generation: dict) -> dict[str, np.ndarray]:
    """The formulas by hand, from vectors [d_model]."""
    joy, fear = read["joy"], read["fear"]
    known = {e: vector[None] for e, vector in read.items()}
    return {
        "joy": joy,
        "joy_not_fear": 0.5 * joy - fear,
        "clean": joy - (joy @ fear) / (fear @ fear) * fear,
        "up": axes(known, RATINGS)["valence"][0],
        "made_joy": generation["joy"] + read["rage"],
    }


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_added_is_the_formula_over_the_methods_own_vectors(done, layer):
    plan, _, seen = done
    for label, true in worked_out(stored(plan, "read", layer), stored(plan, "made", layer)).items():
        vector, amount = seen[label, "none", layer]
        np.testing.assert_allclose(vector, unit(true), atol=2e-6, err_msg=label)
        assert amount == 2.5


@pytest.mark.parametrize("layer", LAYERS)
def test_random_controls_go_by_the_label(done, layer):
    """Each has a rotation of its own, one for both layers."""
    plan, _, seen = done
    true = {at: worked_out(stored(plan, "read", at), stored(plan, "made", at)) for at in LAYERS}
    for label in ("joy", *FORMULAS):
        own = {at: seen[label, "none", at][0] if label == "joy" else true[at][label] for at in sorted(LAYERS)}
        turned = dict(zip(own, rotated(np.stack(list(own.values())), 0, "read", label), strict=True))
        np.testing.assert_allclose(seen[label, "random", layer][0], unit(turned[layer]), atol=2e-6)


def shuffled_means(
    plan, method: str, layer: int, count: dict[str, int], baseline: str, draw: int
) -> dict[str, np.ndarray]:
    """What a method would make of shuffled labels, from the stored activations."""
    pooled = results(plan.with_suffix(".zarr"), "activations/tiny").pooled
    pooled = pooled.sel({"model": "tiny", "method": method, "layer": layer})
    places = permutation(count, generator("shuffled", 0, method, *([draw] if draw > 1 else [])))

    def mean(hand):
        return np.mean([pooled.sel({"emotion": e, "sample": k}).values.astype(np.float64) for e, k in hand], 0)

    means = {label: mean(hand) for label, hand in places.items()}
    base = means[NEUTRAL] if baseline == "neutral" else np.mean([means[e] for e in EMOTIONS], 0)
    return {e: means[e] - base for e in EMOTIONS}


@pytest.mark.parametrize("draw", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_shuffled_control_is_the_same_method_on_shuffled_labels(done, layer, draw):
    plan, _, seen = done
    read = shuffled_means(plan, "read", layer, dict.fromkeys([*EMOTIONS, NEUTRAL], 2), "neutral", draw)
    generation = shuffled_means(plan, "made", layer, dict.fromkeys(EMOTIONS, 3), "grand", draw)
    generation = {e: unit(vector) for e, vector in generation.items()}  # as the method leaves them
    for label, true in worked_out(read, generation).items():
        vector, amount = seen[label, "shuffled" if draw == 1 else "shuffled-2", layer]
        np.testing.assert_allclose(vector, unit(true), atol=5e-6, err_msg=label)
        assert amount == 2.5
        assert abs(unit(true) @ seen[label, "none", layer][0]) < 0.9999


def test_controls_have_the_length_of_the_vector_that_they_stand_for(folder, tmp_path, monkeypatch):
    """Under `raw` the vector is as the method left it: each control has that length at every layer."""
    rows = watched(monkeypatch)
    assert not run(plan_of(tmp_path, folder, entry={"scale": "raw", "strengths": [1.0]})).failures
    seen = {key: float(np.linalg.norm(vector)) for key, (vector, _) in rows.items()}
    for label in ("joy", *FORMULAS):
        for layer in LAYERS:
            own = seen[label, "none", layer]
            assert [seen[label, control, layer] for control in ("shuffled", "shuffled-2", "random")] == pytest.approx(
                [own] * 3
            )
    assert seen["joy", "none", 3] != pytest.approx(seen["joy_not_fear", "none", 3])


def test_the_store_the_judge_and_the_table_know_the_labels(done):
    plan, summary, _ = done
    opened = nsteer.open(plan.with_suffix(".zarr"))
    generations = opened["generations"].sel({"model": "tiny", "op": "mix", "method": "read", "strength": 2.5})
    assert generations.emotion.values.tolist() == ["joy", *FORMULAS]
    assert generations.control.values.tolist() == ["none", "shuffled", "shuffled-2", "random"]
    assert (generations.n_tokens > 0).all()
    kept = json.loads(opened["ops"].settings.sel({"op": "mix"}).item())
    assert kept["vectors"]["formulas"] == FORMULAS
    assert not any("no class" in text for text in summary.warnings), "a formula without a class is no mistake"
    evidence = claims.Evidence(opened, claims.Rules(shuffles=3), None)
    joy = Target(("joy",))
    assert evidence.classes == {"joy": joy, "up": joy, "joy_not_fear": None, "clean": None, "made_joy": None}
    table = claims.table(claims.table_of(evidence))
    (works,) = table[(table.claim == "4") & table.scope.str.startswith("tiny, mix, 1,3, read, strength")].itertuples()
    assert works.n == 2, "joy and up, two prompts: prompts are the units"
    assert "2 x vector of shuffled labels" in works.control and "random rotation" in works.control
    shares = table[(table.claim == "5") & table.what.str.contains("largest strength")]
    assert shares.control.str.contains("vector of shuffled labels: surgical").all()


def test_figures_are_drawn_of_formulas_shuffled_controls_and_layer_sets_of_any_label(done):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    from nsteer.report.figures import gather

    plan, _, _ = done
    names = [picture.name for picture in gather.pictures(nsteer.open(plan.with_suffix(".zarr")))]
    pyplot.close("all")
    assert len(set(names)) == len(names) and "scripts-mix-1_3-read" in names
    assert len({gather.named(label) for label in ("1,3", "1-3", "0.25:0.75", "0.25")}) == 4


def test_nothing_is_done_twice_and_only_what_rests_on_a_formula_is_done_again(done, folder):
    plan, _, _ = done
    assert not any(run(plan).done.values())
    again = run(plan, "steer[0].vectors.formulas.clean=fear ⟂ joy").done
    assert {stage: n for stage, n in again.items() if n} == {"steering": 4, "outcomes": 4, "judged": 4}


def test_the_labels_alone_may_steer(folder, tmp_path):
    vectors = {"methods": ["read"], "emotions": [], "formulas": {"mixed": "joy - fear"}}
    plan = plan_of(tmp_path, folder, entry={"vectors": vectors, "controls": []})
    study = load(plan)
    assert {key[4] for key in cells.steering(Job(study, study.facts[0]))} == {"mixed"}
    assert not run(plan).failures
    assert set(Store(tmp_path / "plan.zarr").committed("generations")) == set(
        cells.steering(Job(study, study.facts[0]))
    )


def test_a_formula_waits_for_a_vector_that_is_not_there(folder, tmp_path):
    short = {**READ, "pooling": {"kind": "mean_from", "k": 15}}  # one passage of fear alone is long enough
    steer = {**ENTRY, "vectors": {"methods": ["read"], "emotions": ["fear"], "formulas": {"mixed": "joy - fear"}}}
    steer = {**steer, "controls": ["shuffled"]}
    summary = run(write(tmp_path, folder("llama"), methods={"read": {**short, "baseline": "none"}}, steer=[steer]))
    waited = {
        (failure.cell[4], failure.cell[6]): failure.reason
        for failure in summary.failures
        if failure.stage == "steering"
    }
    assert ("mixed", "none") in waited and ("fear", "shuffled") in waited
    assert all("rests on vectors/tiny" in reason for reason in waited.values())
    assert ("fear", "none") not in waited


# ---- plans with mistakes -----------------------------------------------------------------------------------------

STEERED = "steer={strengths: [0.1], prompts: {a: one}, %s}"


@pytest.mark.parametrize(
    ("settings", "path", "said"),
    [
        ("vectors: {formulas: {a: happy - }}", "steer.vectors.formulas.a", "a sum of multiples of directions"),
        ("vectors: {formulas: {a: hapy}}", "steer.vectors.formulas.a", "did you mean 'happy'?"),
        ("vectors: {formulas: {a: made.sad + mad.sad}}", "steer.vectors.formulas.a", "did you mean 'made'?"),
        ("vectors: {formulas: {a: b, b: happy}}", "steer.vectors.formulas.a", "an emotion or a scale of ratings"),
        ("vectors: {formulas: {a: valence}}", "steer.vectors.formulas.a", "found 'valence'"),
        ("vectors: {formulas: {happy: sad}}", "steer.vectors.formulas.happy", "an emotion of this plan"),
        ("vectors: {formulas: {neutral: sad}}", "steer.vectors.formulas.neutral", "the label of the baseline"),
        ("vectors: {formulas: {a b: sad}}", "steer.vectors.formulas.a b", "letters, digits"),
        ("vectors: {emotions: []}", "steer.vectors.emotions", "at least one emotion"),
        ("vectors: {formulas: [happy]}", "steer.vectors.formulas", "a mapping"),
        ("controls: [zero, shuffle]", "steer.controls[1]", "did you mean 'shuffled'?"),
    ],
)
def test_a_mistake_is_one_problem_at_its_place(settings, path, said):
    mistakes = problems(SMALL, STEERED % settings)
    assert [mistake.path for mistake in mistakes] == [path] and said in str(mistakes[0]), list(map(str, mistakes))


def test_an_axis_needs_ratings_that_tell_it():
    settings = [STEERED % "vectors: {formulas: {a: valence}}", "ratings={valence: {happy: 1, sad: 1, calm: 1}}"]
    (mistake,) = problems(SMALL, *settings)
    assert mistake.path == "steer.vectors.formulas.a" and "'valence', with 3 rated emotions" in mistake.found


def test_labels_are_not_shuffled_twice():
    (mistake,) = problems(SMALL, "methods.read.labels=shuffled", STEERED % "controls: [zero, shuffled]")
    assert mistake.path == "steer.controls[1]" and "'read', whose labels are shuffled already" in mistake.found
    assert not problems(
        SMALL, "methods.read.labels=shuffled", STEERED % "controls: [shuffled], vectors: {methods: [made]}"
    )


def test_one_label_can_not_be_shuffled():
    (mistake,) = problems(SMALL, "emotions=[happy]", STEERED % "controls: [shuffled]")
    assert mistake.path == "steer.controls[0]" and "one label under baseline grand_mean of 'made'" in mistake.found
    assert not problems(SMALL, "emotions=[happy]", STEERED % "controls: [shuffled], vectors: {methods: [read]}")


def test_the_judges_map_knows_the_formulas():
    settings = [
        STEERED % "vectors: {formulas: {mixed: happy - sad}}",
        "judge={classifier: zoo/judge, map: {%s: happy}}",
    ]
    assert not problems(SMALL, settings[0], settings[1] % "mixed")
    (mistake,) = problems(SMALL, settings[0], settings[1] % "mixd")
    assert "did you mean 'mixed'?" in str(mistake)
