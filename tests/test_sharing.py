"""Methods that differ only in what is made of their texts share them: written and read once, copied bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from planside import PLAN as SMALL
from planside import problems, study
from test_runner import EMOTIONS, METHODS, NEUTRAL, run, write

from nsteer import cli
from nsteer.executors.local import Local
from nsteer.plan.check import load
from nsteer.stages import cells, sizing
from nsteer.stages.job import Job
from nsteer.store import Store

MADE = {**METHODS["made"], "baseline": "neutral_mean", "neutral_samples": 3}
DRAWN = {**MADE, "generate": {"max_new_tokens": 6, "sample": True}}
SHARING = {
    "means": MADE,
    "pairs": {**MADE, "estimator": "pca_difference"},
    "null": {**MADE, "labels": "shuffled"},
    "last": {**MADE, "pooling": "last"},
    "drawn": DRAWN,
    "again": {**DRAWN, "baseline": "grand_mean", "draws_of": "drawn"},
    "apart": {**DRAWN, "baseline": "grand_mean"},
}
LABELS = [*EMOTIONS, NEUTRAL]


@pytest.fixture
def counted(monkeypatch):
    """How many rows went through the model, by whether they generate."""
    rows = {"written": 0, "read": 0}
    first = Local.run

    def watched(self, program):
        rows["written" if program.form.decoding is not None else "read"] += len(program.keys)
        return first(self, program)

    monkeypatch.setattr(Local, "run", watched)
    return rows


def of(store: Store, product: str, method: str) -> xr.Dataset:
    return store.read(f"{product}/tiny").sel({"model": "tiny", "method": method}, drop=True).load()


def test_each_text_is_written_and_read_once_and_the_copies_are_equal_to_the_bit(folder, tmp_path, counted):
    plan = write(tmp_path, folder("llama"), methods=SHARING, steer=None)
    summary = run(plan)
    assert not summary.failures and summary.done["samples"] == summary.done["activations"] == 7 * 4
    texts = 2 * 4  # two templates; the greedy rows that are alike are one
    assert counted == {"written": texts + 2 * 12, "read": 4 * 12}, "greedy, last, drawn and apart are read"
    store = Store(tmp_path / "plan.zarr")
    for method, other in (("means", "pairs"), ("means", "null"), ("drawn", "again")):
        for product in ("samples", "activations"):
            a, b = of(store, product, method), of(store, product, other)
            for name in store.leaf(f"{product}/tiny").variables:
                np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=f"{other} {name}")
            marks = {key[1:]: record for key, record in store.committed(f"{product}/tiny").items()}
            for emotion in LABELS:
                a, b = marks[method, emotion, 0], marks[other, emotion, 0]
                assert (a.fingerprint, a.content) == (b.fingerprint, b.content)
    assert (of(store, "samples", "drawn").text != of(store, "samples", "apart").text).any()
    vectors = store.read("vectors/tiny").vector.sel({"model": "tiny", "layer": [3, 1]})
    for other in ("pairs", "null"):
        assert not np.allclose(vectors.sel({"method": "means"}), vectors.sel({"method": other}))
    assert not any(run(plan).done.values()), "nothing is done twice"


def test_a_method_added_later_takes_its_texts_from_the_store(folder, tmp_path, counted):
    run(write(tmp_path, folder("llama"), methods={"means": MADE}, steer=None))
    before = dict(counted)
    later = {"twenty": {**MADE, "samples": 20, "neutral_samples": 3}, "pairs": SHARING["pairs"]}
    plan = write(tmp_path, folder("llama"), methods=later, steer=None)
    sizes = {(stage.stage, stage.cells, stage.shared, stage.rows) for stage in sizing.size(load(plan)).stages}
    # 16 + 4 of twenty: its last four begin the templates again; neutral of both, and all of pairs, are in the store
    assert sizes == {("samples", 3 + 3 + 4, 1, 60), ("activations", 3 + 3 + 4, 1, 60), ("vectors", 6, 0, 0)}
    shown = CliRunner().invoke(cli.main, ["check", str(plan)], catch_exceptions=False).stdout
    assert "10 (+1 shared)" in shown
    summary = run(plan)
    assert not summary.failures and summary.done["samples"] == 4 + 3 + 4
    assert counted["read"] - before["read"] == 60
    store = Store(tmp_path / "plan.zarr")
    assert (of(store, "samples", "pairs").text == of(store, "samples", "means").text).all()


def test_a_copy_fails_and_has_holes_as_its_twin_does(folder, tmp_path, monkeypatch):
    first, tries = Local.run, []

    def spoiled(self, program):
        readouts = first(self, program)
        for i, key in enumerate(program.keys):
            if isinstance(key[0], tuple) and key[0][2] == "fear" and key[1] == 1 and program.form.decoding is None:
                tries.append(key)
                readouts.pooled[i, 2] = np.inf
        return readouts

    monkeypatch.setattr(Local, "run", spoiled)
    plan = write(tmp_path, folder("llama"), methods={"a": MADE, "b": {**MADE, "labels": "shuffled"}}, steer=None)
    summary = run(plan)
    assert [key[0][1] for key in tries] == ["a"]
    failed = {failure.cell[1:3]: failure.reason for failure in summary.failures}
    assert set(failed) == {("a", "fear"), ("b", "fear")} and len(set(failed.values())) == 1
    positions = of(Store(tmp_path / "plan.zarr"), "activations", "b").positions.sel({"emotion": "fear"})
    assert positions.values.tolist()[1] == 0


def test_fingerprints_of_methods_with_draws_of_their_own_are_as_they_were():
    """`draws_of` left out, or the name itself written by hand into another's place, decides the draws alone."""
    sampled = "methods.made.generate={sample: true}"
    base, same = (
        cells.samples(Job(checked_plan := study(SMALL, *s), checked_plan.facts[0]))
        for s in ([sampled], [sampled, "about=x"])
    )
    assert base == same
    more = "{source: generation, samples: 3, generate: {sample: true}, draws_of: made}"
    checked_plan = study(SMALL, sampled, f"methods.other={more}")
    fingerprints = cells.samples(Job(checked_plan, checked_plan.facts[0]))
    assert {key: fp for key, fp in fingerprints.items() if key[0] == "made"} == {
        k: v for k, v in base.items() if k[0] == "made"
    }
    assert [fp for key, fp in fingerprints.items() if key[0] == "other"] == [
        fp for key, fp in base.items() if key[0] == "made"
    ]


@pytest.mark.parametrize(
    ("draws", "said"),
    [
        ("mad", "expected a method of this plan, found 'mad' (did you mean 'made'?)"),
        ("other", "expected another method, found 'other', the method itself"),
        ("read", None),
        ("third", "expected a method with its own draws, found 'third', which uses those of 'made'"),
    ],
)
def test_bad_draws_are_said(draws, said):
    sampled = {"source": "generation", "samples": 3, "generate": {"sample": True}}
    methods = [f"methods.other={json.dumps({**sampled, 'draws_of': draws})}"]
    methods += [f"methods.third={json.dumps({**sampled, 'draws_of': 'made'})}"]
    mistakes = [str(mistake) for mistake in problems(SMALL, *methods)]
    assert (mistakes == []) if said is None else (len(mistakes) == 1 and said in mistakes[0]), mistakes


def test_draws_need_sampling():
    (mistake,) = problems(SMALL, "methods.read.draws_of=made")
    assert mistake.path == "methods.read.draws_of" and mistake.expected == "it only with `sample: true`"
