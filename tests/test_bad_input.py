"""Bad input: each kind is said by name while the rest of the study goes on, and the claims table shows its NaN."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import test_runner
from test_runner import METHODS, STEER, run, write

import nsteer
from nsteer.executors.local import Local
from nsteer.report import claims

judge = test_runner.judge
BROKEN = (("whole", "read", "fear", 0), 1)
"""The sample whose stream is not finite: fear, of which one text is left."""


def stripped(source, place, *, chat=True, bos=True):
    """A copy of a model's folder without its chat template, or without a BOS."""
    shutil.copytree(source, place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    if not chat:
        (place / "chat_template.jinja").unlink(missing_ok=True)
        config.pop("chat_template", None)
    if not bos:
        config["bos_token"] = None
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


def muted(source, place):
    """A copy of a model that ends its text at once: equal logits, so that id 0 wins, which ends it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, place)
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    return place


@pytest.fixture(scope="module")
def bad(folder, judge, tmp_path_factory):
    """A study with every kind of bad input in it: what the run said, and the store with its report."""
    place = tmp_path_factory.mktemp("bad")
    models = {
        "whole": folder("llama"),
        "bare": stripped(folder("gpt2"), place / "bare", chat=False, bos=False),
        "mute": muted(folder("llama"), place / "mute"),
    }
    steer = {
        **STEER[0],
        "vectors": {"methods": ["made"], "layer": 2},
        "strengths": [0.4],
        "controls": ["zero", "random"],
    }
    plan = write(
        place,
        None,
        models=[{"id": str(path), "label": label, "device": "cpu"} for label, path in models.items()],
        methods={"made": {**METHODS["made"], "baseline": "neutral_mean"}, "read": METHODS["read"]},
        steer=[steer],
        judge={"classifier": str(judge), "device": "cpu", "map": {"joy": "bliss"}},
        measure={"lens": 2},
    )
    first = Local.run

    def spoiled(self, program):
        readouts = first(self, program)
        for i, key in enumerate(program.keys):
            if key == BROKEN:
                readouts.pooled[i, 2] = np.inf
        return readouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "run", spoiled)
        summary = run(plan)
    from nsteer.report import reporting

    opened = nsteer.open(place / "plan.zarr")
    reporting.report(opened)
    return summary, opened, claims.table(opened.claims)


def rows(table, claim, what, scope=""):
    chosen = table[(table.claim == claim) & table.what.str.contains(what) & table.scope.str.contains(scope)]
    assert len(chosen), (claim, what, scope)
    return chosen


def test_the_rest_of_the_study_goes_on(bad):
    summary, opened, table = bad
    assert {(failure.stage, failure.cell[:3]) for failure in summary.failures} == {
        ("activations", ("whole", "read", "fear"))
    }
    assert set(opened.models) == {"whole", "bare", "mute"}
    assert set(table.claim) == {"1", "2", "3", "4", "5", "6", "effects", "audit", "rsa", "geometry"}


def test_activations_that_are_not_numbers_and_an_emotion_with_fewer_than_two_texts(bad):
    summary, _, table = bad
    assert "sample 1 at layer 2" in summary.failures[0].reason
    assert "whole: read: the vector of fear rests on one text" in summary.warnings
    named = "read: fewer than two texts: fear 1; texts whose activations are NaN: fear 1"
    assert rows(table, "1", "separates", "^whole$").control.str.contains(named).all()
    deep = rows(table, "2", "depth at which", "whole, read")
    assert (deep.control + deep.why).str.contains(named[6:]).all()
    assert not rows(table, "1", "separates", "^bare$").control.str.contains("NaN").any()


def test_a_judge_without_the_class(bad):
    summary, _, table = bad
    assert any("has no class for joy (bliss): a missing value in its rates" in text for text in summary.warnings)
    works = rows(table, "4", "moves a scenario", "whole, push")
    assert works.assumed.str.contains("joy: its class 'bliss' is not among the judge's").all()
    assert (works.n == 2).all(), "two prompts"


def test_a_model_without_a_chat_template(bad):
    summary, _, table = bad
    said = "bare: made: its tokenizer has no chat template, so instructions go in without one"
    assert [text for text in summary.warnings if "chat template" in text] == [said]
    assert rows(table, "1", "separates", "^bare$").control.str.contains("made: .*no chat template").all()
    assert not rows(table, "1", "separates", "^whole$").control.str.contains("chat template").any()


def test_a_tokenizer_without_bos(bad):
    summary, _, table = bad
    assert "bare: its tokenizer has no BOS, so anisotropy with BOS is a missing value" in summary.warnings
    (why,) = rows(table, "3", "bos with$", "bare").why
    assert why == "no streams for bos 'with' (a tokenizer without BOS, or a missing value)"
    assert rows(table, "3", "bos with", "whole").value.notna().all()
    assert rows(table, "3", "bos without", "bare").value.notna().all()


def test_empty_continuations(bad):
    summary, opened, table = bad
    assert any("empty continuations are not judged: missing values" in text for text in summary.warnings)
    works = rows(table, "4", "moves a scenario", "mute")
    assert (works.n == 0).all() and works.why.str.contains("no continuation is judged: all are empty").all()
    for row in rows(table, "5", "largest strength", "mute").itertuples():
        assert row.n == 0 and "6 empty, in no regime" in row.ours
    assert (rows(table, "5", "largest strength", "whole").n == 2).all(), "two prompts"
    assert (opened["generations"].text.sel({"model": "mute"}) == "").all()


def test_every_figure_names_the_cells_that_it_came_from(bad):
    """From the table that the store keeps, in code: the parts hold numbers, the records are of finished cells."""
    _, opened, table = bad
    kept = opened.claims
    for row in kept.row.values.tolist():
        if np.isfinite(float(kept.value[row])):
            assert claims.inputs(kept, row), table.what[row]
            for part in claims.follow(opened, kept, row):
                assert all(part.sizes.values())
            for group, records in claims.cells(opened, kept, row).items():
                assert records and all(record.run == 0 for record in records.values()), (group, table.what[row])
    (first,) = np.flatnonzero((table.claim == "1") & (table.scope == "whole"))
    groups = claims.cells(opened, kept, int(first))
    emotions = ["joy", "fear", "rage", "neutral"]
    wanted = {("whole", m, e, 0) for m in ("made", "read") for e in emotions}
    assert {group: set(records) for group, records in groups.items()} == {
        "activations/whole": wanted,
        "samples/whole": wanted,
    }
