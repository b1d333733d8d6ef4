"""Formulas over directions: read without being run, worked out as linear algebra says, refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planside import PLAN, model_folder, problems, study
from sklearn.linear_model import LinearRegression

from nsteer.plan import formulas
from nsteer.plan.check import derived_for
from nsteer.plan.formulas import FormulaError, names, parse, replaced
from nsteer.science.directions import axes, combine, orthogonal
from nsteer.stages import cells
from nsteer.stages.job import Job

LAYERS, WIDTH = 3, 6
draw = np.random.default_rng(0)
KNOWN = {name: draw.normal(size=(LAYERS, WIDTH)).astype(np.float32) for name in ("happy", "sad", "calm")}


def value(text: str) -> np.ndarray:
    return combine(replaced(parse(text), lambda parts: KNOWN[parts[-1]]))


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1)


# ---- arithmetic -------------------------------------------------------------------------------------------------

H, S, C = (KNOWN[name].astype(np.float64) for name in ("happy", "sad", "calm"))
SUMS = {
    "happy": H,
    "0.5*happy - sad": 0.5 * H - S,
    "-happy": -H,
    "+happy": H,
    "happy*2 + sad/4": 2 * H + S / 4,
    "2*3*happy": 6 * H,
    "(happy + sad) * (1/2)": (H + S) / 2,
    "-2*(happy - (sad - calm))": -2 * (H - S + C),
    "happy - sad - calm": H - S - C,
    "'happy' + made.sad": H + S,
    "'a-b'.calm": C,
    "1e-1*happy": 0.1 * H,
}


@pytest.mark.parametrize("text", SUMS)
def test_sums_of_multiples(text):
    close(value(text), SUMS[text])


@pytest.mark.parametrize("text", ["happy ⟂ sad", "happy ⊥ sad", "orthogonal(happy, sad)", "happy ⟂ (-3*sad)"])
def test_at_right_angles(text):
    vectors = value(text)
    close(dots(vectors, S), 0)
    close(vectors + (dots(H, S) / dots(S, S))[:, None] * S, H)


def test_it_binds_as_a_product_does():
    close(value("calm - happy ⟂ sad"), C - value("happy ⟂ sad"))
    close(value("0.5*happy ⟂ sad"), 0.5 * value("happy ⟂ sad"))


def test_one_after_another_is_not_the_span():
    vectors = value("orthogonal(happy, sad, calm)")
    close(dots(vectors, S), 0)
    close(dots(vectors, C), 0)
    assert np.abs(dots(value("happy ⟂ sad ⟂ calm"), S)).max() > 0.01
    close(value("orthogonal(happy, sad, 2*sad)"), value("happy ⟂ sad"))
    close(value("orthogonal(happy, sad - sad)"), H)


def test_unit_is_of_length_one_at_every_layer():
    close(np.linalg.norm(value("unit(happy + 3*sad)"), axis=-1), 1)
    assert not value("unit(happy - happy)").any()


def test_a_hole_stays_a_hole_and_spoils_no_other_layer():
    holed = H.copy()
    holed[1] = np.nan
    vectors = orthogonal(holed, S[None])
    assert np.isnan(vectors[1]).all() and np.isfinite(vectors[[0, 2]]).all()


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_it_is_linear(a, b):
    close(value(f"({a!r}*happy + {b!r}*calm) ⟂ sad"), a * value("happy ⟂ sad") + b * value("calm ⟂ sad"))


def test_names_are_found_wherever_they_stand():
    tree = parse("unit(happy) + 2*orthogonal(made.sad, calm, 'a-b'.happy) - joy ⟂ rage")
    assert list(names(tree)) == [("happy",), ("made", "sad"), ("calm",), ("a-b", "happy"), ("joy",), ("rage",)]


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED = [
    "",
    "happy +",
    "happy sad",
    "2",
    "2 + happy",
    "happy * sad",
    "happy / sad",
    "2 / happy",
    "happy / 0",
    "happy ** 2",
    "happy @ sad",
    "happy // 2",
    "2 ⟂ happy",
    "happy ⟂ 2",
    "unit()",
    "unit(happy, sad)",
    "unit(2)",
    "unit(x=happy)",
    "unit(*happy)",
    "orthogonal(happy)",
    "exec(happy)",
    "__import__('os').system('true')",
    "().__class__.__bases__",
    "(lambda: happy)()",
    "[happy][0]",
    "happy if sad else calm",
    "happy; sad",
    "f'{happy}'",
    "True * happy",
    "1j * happy",
    "1e999 * happy",
    "1e308*1e308*happy",
    "1e-320 * happy / 1e-320 / 0.0",
    "happy / 1e-320",
    "b'happy'",
    "happy := sad",
    "await happy",
    "happy == sad",
    "~happy",
    "not happy",
    "happy\0",
    "9" * 450 + "*happy",
    "(" * 240 + "happy" + ")" * 240,
    "-" * 499 + "1",
    "x" * 501,
    "a.b.c",
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(FormulaError):
        parse(text)


@given(st.text(alphabet="abh()[]{}+-*/⟂.,'\"0123456789 \n\t:=@_#\\", max_size=40))
def test_any_text_is_a_formula_or_refused(text):
    try:
        tree = parse(text)
    except FormulaError as error:
        assert error.found and error.expected
    else:
        assert list(names(tree)) and json.loads(json.dumps(tree)) == tree


# ---- in a plan --------------------------------------------------------------------------------------------------

EDITED = "prompts: [a]\nreads: {r: {pooling: last}}\nedits: {e: [{op: add, direction: d, layers: [1]}]}\n"
ONE = PLAN.replace("  read: {", "  # read: {") + EDITED


def said(*settings: str, text: str = ONE) -> list[tuple[str, str, str, str]]:
    return [(problem.path, problem.found, problem.expected, problem.hint) for problem in problems(text, *settings)]


@pytest.mark.parametrize(
    "formula",
    [
        "0.5*happy - sad",
        "happy ⟂ sad",
        "made.happy",
        "noise + happy",
        "'happy'",
    ],
)
def test_good_formulas_pass(formula):
    assert said(f"directions={{d: {json.dumps(formula, ensure_ascii=False)}, noise: {{random: 1}}}}") == []
    assert said(f"directions={{d: {{formula: {json.dumps(formula)}}}, noise: {{random: 1}}}}") == []


BAD = {
    "directions={d: happy +}": ("directions.d", "'happy +'", formulas.FORM, ""),
    "directions={d: hapy - sad}": (
        "directions.d",
        "'hapy'",
        "a direction, an emotion or a scale of ratings of this plan",
        "did you mean 'happy'?",
    ),
    "directions={d: mad.happy}": ("directions.d", "'mad'", "a method of this plan", "did you mean 'made'?"),
    "directions={d: {formula: made.noise}, noise: {random: 1}}": (
        "directions.d.formula",
        "'noise'",
        "an emotion or a scale of ratings of this plan",
        "known: happy, sad, calm",
    ),
    "directions={d: d + happy}": (
        "directions.d",
        "'d' again",
        "formulas that end",
        "give the direction a name of its own",
    ),
    "directions={d: {formula: happy, random: 1}}": (
        "directions.d",
        "random and formula",
        "exactly one of random, contrast, mean, store, formula",
        "",
    ),
    "directions={d: 5}": ("directions.d", "5", "a mapping", ""),
    "directions={d: happy * sad}": ("directions.d", "'happy * sad'", formulas.FORM, ""),
}


@pytest.mark.parametrize("setting", BAD)
def test_one_mistake_is_one_problem(setting):
    assert said(setting) == [BAD[setting]]


def test_a_cycle_is_said_once_and_of_no_other_formula():
    settings = "directions={d: 2*x, x: y - happy, y: unit(x), z: x}"
    assert {path for path, *_ in said(settings)} == {"directions.x", "directions.y"}


def test_with_several_methods_an_emotion_says_which():
    text = PLAN + EDITED
    assert said("directions={d: happy}", text=text) == [
        ("directions.d", "'happy' of 2 methods", "one method, named before it", "made.happy")
    ]
    assert said("directions={d: made.happy - read.happy}", text=text) == []


def test_vectors_are_derived_at_the_layers_that_are_edited():
    settings = ["layers=[2]", "directions={d: happy - x, x: {random: 1}}"]
    (problem,) = said(*settings)
    assert problem[0] == "edits.e[0].layers" and "layer 1 of" in problem[1]
    assert said(*settings, "edits.e[0].vector_layer=2") == []
    assert said("layers=[2]", "directions={d: 2*x, x: {random: 1}}") == []


RATED = "ratings={valence: {happy: 1, sad: -1, calm: 0.5}, arousal: {happy: 0.5, sad: -0.2, calm: -1}}"


def test_a_scale_of_the_ratings_is_an_axis():
    assert said(RATED, "directions={d: valence}") == []
    assert said("ratings=nsteer-20", "directions={d: made.arousal ⟂ valence}") == []
    (problem,) = said("ratings=nsteer-20", "emotions=[happy, sad]", "directions={d: valence}")
    assert problem[1:3] == (
        "'valence', with 2 rated emotions in the plan",
        "at least 3, whose ratings tell the 2 scales apart",
    )
    alike = "ratings={valence: {happy: 1, sad: -1, calm: 0.5}, arousal: {happy: 2, sad: -2, calm: 1}}"
    assert len(said(alike, "directions={d: valence}")) == 1


# ---- fingerprints -----------------------------------------------------------------------------------------------


def number(folder, formula: str, *settings: str) -> int:
    models = f"models=[{{id: {json.dumps(str(folder))}, label: m}}]"
    more = f"directions={{d: {json.dumps(formula)}, noise: {{random: 1}}, other: {{random: 1}}}}"
    checked_study = study(ONE, models, more, *settings)
    (fingerprint,) = (
        cell
        for key, cell in cells.reads(Job(checked_study, checked_study.facts[0])).items()
        if (key.read, key.edit) == ("r", "e")
    )
    return fingerprint


def test_a_condition_rests_on_what_its_formula_says(tmp_path):
    folder = model_folder(tmp_path / "four", 4)
    base = number(folder, "0.5*happy - sad")
    assert number(folder, " .5 * happy-  made.sad") == base
    assert number(folder, "0.6*happy - sad") != base
    assert number(folder, "0.5*happy - calm") != base
    assert number(folder, "0.5*happy - sad", "methods.made.samples=2") != base
    assert number(folder, "0.5*happy - sad", "directions.noise.random=2") == base
    assert number(folder, "noise") != number(folder, "other")  # a name is part of a random direction's seed
    assert number(folder, "happy + noise") != number(folder, "happy + noise", "directions.noise.random=2")
    rated = [RATED, "methods.made.unit_norm=false"]
    assert number(folder, "valence", *rated) != number(folder, "arousal", *rated)
    assert number(folder, "valence", *rated) != number(folder, "valence", *rated, "ratings.valence.calm=0.4")


def test_what_a_direction_rests_on():
    checked_study = study(
        ONE, "ratings=nsteer-20", "directions={d: x + calm, x: unit(sad), v: valence, n: {random: 0}}"
    )
    assert sorted(derived_for(checked_study.plan, "d")) == [("made", "calm"), ("made", "sad")]
    assert derived_for(checked_study.plan, "v") == [("made", e) for e in ("happy", "sad", "calm")]
    assert derived_for(checked_study.plan, "n") == []


# ---- axes -------------------------------------------------------------------------------------------------------


def test_planted_axes_are_found_although_the_scales_are_correlated():
    draw = np.random.default_rng(4)
    emotions = [f"e{i}" for i in range(12)]
    table = draw.normal(size=(12, 2))
    table[:, 1] += 0.8 * table[:, 0]
    true = draw.normal(size=(2, LAYERS, WIDTH))
    shared = 5 * draw.normal(size=(LAYERS, WIDTH))
    vectors = {e: shared + np.tensordot(row, true, 1) for e, row in zip(emotions, table, strict=True)}
    ratings = {name: dict(zip(emotions, table[:, i], strict=True)) for i, name in enumerate(("valence", "arousal"))}
    directions = axes({**vectors, "unrated": shared}, ratings)
    close(directions["valence"], true[0])
    close(directions["arousal"], true[1])
    alone = axes(vectors, {"valence": ratings["valence"]})["valence"]
    assert np.abs(alone - true[0]).max() > 0.1  # one scale alone takes what the other explains

    noisy = {e: v + draw.normal(size=v.shape) for e, v in vectors.items()}
    values = np.stack(list(noisy.values())).reshape(12, -1)
    oracle = LinearRegression().fit(table, values).coef_.T.reshape(2, LAYERS, WIDTH)
    close(np.stack(list(axes(noisy, ratings).values())), oracle)


def test_scales_that_the_ratings_do_not_tell_apart_have_no_axes():
    vectors = {e: KNOWN[e] for e in KNOWN}
    same = dict.fromkeys(vectors, 1.0)
    with pytest.raises(ValueError, match="3 rated emotions do not tell 1 scales apart"):
        axes(vectors, {"valence": same})
