"""gc and diff over the store of a real run: what a plan wants stays, what differs is named by its labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_runner import EMOTIONS, METHODS, STEER, TEXTS, write
from test_runner import run as conduct
from test_upkeep import run

from nsteer.plan import check
from nsteer.store import Store
from nsteer.store.places import Local
from nsteer.upkeep import diff, gc
from nsteer.upkeep.collect import collect
from nsteer.upkeep.verify import verify

READS = {
    "emotions": None,
    "methods": None,
    "steer": None,
    "measure": None,
    "prompts": {"walk": "tom ran to the", "night": "at night the old house was"},
    "directions": {"up": {"random": 3}},
    "edits": {"push": [{"direction": "up", "op": "add", "scale": "stream_norm", "strength": 0.3, "layers": [3, 1]}]},
    "reads": {"last": {"layers": [3, 1], "pooling": "last"}, "all": {"layers": [2]}},
    "generate": {"max_new_tokens": 4},
}
MEASURED = {"measure": {"perplexity": True, "lens": 3, "anisotropy": True}}


@pytest.fixture(scope="module")
def studied(folder, tmp_path_factory) -> Path:
    """A store in which two plans of all kinds ran: plan.yaml and reads.yaml, both into plan.zarr."""
    place = tmp_path_factory.mktemp("studied")
    steer = [{**STEER[0], "project": True, "controls": ["zero", "random"]}, STEER[1]]
    plan = write(place, folder("llama"), steer=steer, judge="zoo/judge", **MEASURED)
    more = write(place, folder("llama"), "reads", store=str(place / "plan.zarr"), **READS)
    texts = {**TEXTS, "neutral_sentences": ["the cat sat on the mat", "tom read a book"]}
    (place / "texts.yaml").write_text(json.dumps(texts))
    conduct(plan)
    conduct(more)
    return place


@pytest.fixture
def place(studied, tmp_path) -> Path:
    shutil.copytree(studied, tmp_path / "work")
    for name in ("plan", "reads"):
        file = tmp_path / "work" / f"{name}.yaml"
        file.write_text(file.read_text().replace(str(studied), str(tmp_path / "work")))
    return tmp_path / "work"


def changed(place: Path, name: str, **changes) -> Path:
    plan = {**json.loads((place / "plan.yaml").read_text()), **changes}
    (place / f"{name}.yaml").write_text(json.dumps({key: value for key, value in plan.items() if value is not None}))
    return place / f"{name}.yaml"


def every(store: Store) -> dict[tuple, int]:
    fingerprints = {
        (path, *key): cell.fingerprint for path in store.groups() for key, cell in store.committed(path).items()
    }
    return {key: number for key, number in fingerprints.items() if key[0] != "runs"}


def sizes(store: Store) -> dict[str, int]:
    return dict(store.place.walk())


# ---- gc


def test_nothing_that_the_plans_of_a_store_want_may_go(place):
    store = Store(place / "plan.zarr")
    assert {path.split("/")[0] for path in store.groups()} >= {
        *("samples", "activations", "vectors", "lens", "anisotropy", "generations", "unsteered", "steering"),
        *("projections", "projections_unsteered", "outcomes", "outcomes_unsteered", "judged", "judged_unsteered"),
        *(
            "reads",
            "streams",
            "read_receipts",
            "stream_receipts",
            "edited",
            "edited_receipts",
            "methods",
            "ops",
            "judges",
            "judge_passages",
            "programs",
        ),
    }
    gc_plan = gc.plan(store, [check.load(place / name) for name in ("plan.yaml", "reads.yaml")], older=0)
    assert not gc_plan.cells and not gc_plan.groups and not gc_plan.leftovers and not gc_plan.bytes
    assert gc_plan.kept == len(every(store)) + len(store.committed("runs"))


def test_what_only_another_plan_wanted_goes_and_nothing_else(place):
    store = Store(place / "plan.zarr")
    before, files = every(store), sizes(store)
    less = changed(
        place, "less", methods={"made": METHODS["made"]}, steer=[{**STEER[0], "strengths": [0.4]}], judge=None
    )
    code, said = run("gc", store.path, less)
    assert code == 0 and "nothing was deleted; --delete does it" in said and sizes(store) == files
    assert "no plan names this method" in said and "made with other settings than any plan's" in said
    told = json.loads(run("gc", store.path, less, "--json")[1])
    code, said = run("gc", store.path, less, "--delete")
    assert code == 0 and " deleted; " in said
    after, left = every(Store(store.path)), sizes(store)
    gone = {(cell["group"], *cell["cell"]) for cell in told["cells"]}
    assert set(before) - set(after) == gone and all(before[key] == after[key] for key in after)
    assert sum(files.values()) - sum(left.values()) >= told["bytes"] * 0.98  # the root shrank, too
    assert {"read"} == {key[1] for key in gone if key[0] == "methods"}
    assert not any(key[0].startswith(("judged", "reads", "edited", "streams")) for key in after)
    assert not set(Store(store.path).groups()) & {"judged", "edited", "reads/tiny", "streams/tiny"}
    assert {key for key in after if key[0].startswith("activations")} == {
        key for key in before if key[0].startswith("activations") and key[2] == "made"
    }
    assert len(store.committed("runs")) == 2
    report = verify(Store(store.path))
    assert report.clean and not report.leftovers, report
    summary = conduct(less)  # the plan finds all of its own, but for what its changed entry asks again
    assert not {"samples", "activations", "vectors", "lens", "anisotropy"} & set(summary.done)


def test_a_gc_that_was_killed_breaks_nothing_and_goes_on(place, monkeypatch):
    store, delete, left = Store(place / "plan.zarr"), Local.delete, 0
    less = changed(place, "less", methods={"made": METHODS["made"]}, steer=None, judge=None, measure=None)

    def dying(self, name):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return delete(self, name)

    monkeypatch.setattr(Local, "delete", dying)
    study, kills = [check.load(less)], 0
    while True:
        left = 40 + 60 * kills
        try:
            collect(store, gc.plan(store, study, older=0))
            break
        except KeyboardInterrupt:
            kills += 1
            assert verify(Store(store.path)).clean
    assert kills > 1
    monkeypatch.undo()
    assert verify(Store(store.path)).clean and not gc.plan(Store(store.path), study, older=0).bytes
    assert not conduct(less).done


def test_young_leftovers_stay_and_foreign_files_for_ever(place):
    store = Store(place / "plan.zarr")
    (store.path / "vectors/tiny/vector/c.9.partial").write_bytes(b"x")
    (store.path / "notes.txt").write_text("mine")
    plans = [place / "plan.yaml", place / "reads.yaml"]
    code, said = run("gc", store.path, *plans, "--delete")
    assert code == 0 and "1 leftover files are young and stay" in said
    code, said = run("gc", store.path, *plans, "--delete", "--older-than", 0)
    assert code == 0 and "0 cells, 0 groups, 1 files" in said
    assert not list(store.path.rglob("*.partial")) and (store.path / "notes.txt").exists()


def test_a_bad_plan_deletes_nothing(place):
    (place / "bad.yaml").write_text("models: 3")
    before = sizes(Store(place / "plan.zarr"))
    code, said = run("gc", place / "plan.zarr", place / "plan.yaml", place / "bad.yaml", "--delete")
    assert code == 2 and "bad.yaml" in said and sizes(Store(place / "plan.zarr")) == before


# ---- diff


def test_a_store_equals_its_copy(place, tmp_path):
    shutil.copytree(place / "plan.zarr", tmp_path / "copy.zarr")
    code, said = run("diff", place / "plan.zarr", tmp_path / "copy.zarr")
    assert code == 0 and said.endswith("equal\n")
    data = json.loads(run("diff", place / "plan.zarr", tmp_path / "copy.zarr", "--json")[1])
    assert data["equal"] and all(variable["cells"] == variable["equal"] for variable in data["variables"])


def test_a_changed_number_is_named_by_its_labels(place, tmp_path):
    shutil.copytree(place / "plan.zarr", tmp_path / "copy.zarr")
    a, b = Store(place / "plan.zarr"), Store(tmp_path / "copy.zarr")
    pick = {"model": "tiny", "method": "made", "emotion": "fear"}
    data = b.read("vectors/tiny").sel(pick).drop_vars([*pick, "cell", "cell_field"]).load()
    norm = data.norm.sel(layer=2).item()
    data.norm.loc[{"layer": 2}] = 2 * norm
    record = b.committed("vectors/tiny")["tiny", "made", "fear"]
    b.commit("vectors/tiny", ("tiny", "made", "fear"), data, fingerprint=record.fingerprint)
    difference = diff.stores(a, b)
    assert not difference.equal and not (
        difference.knobs or difference.only_a or difference.only_b or difference.settings
    )
    [variable] = [variable for variable in difference.variables if variable.equal < variable.cells]
    assert (variable.group, variable.variable, variable.cells, variable.equal) == ("vectors/tiny", "norm", 7, 6)
    assert variable.max_abs == pytest.approx(norm) and variable.max_rel == 0.5 and variable.missing == 0
    assert {key: variable.worst[key] for key in ("method", "emotion", "layer")} == {
        "method": "made",
        "emotion": "fear",
        "layer": 2,
    }
    code, said = run("diff", a.path, b.path)
    assert code == 1 and "vectors/tiny · norm" in said and "they differ" in said and "emotion fear, layer 2" in said


def test_texts_knobs_and_cells_of_one_side(place, folder):
    other = write(
        place, folder("llama"), "other", steer=None, emotions=EMOTIONS[:2],
        methods={"made": {**METHODS["made"], "generate": {"max_new_tokens": 5}}},
    )  # fmt: skip
    conduct(other)
    difference = diff.stores(Store(place / "plan.zarr"), Store(place / "other.zarr"))
    assert difference.protocols["made.generate.max_new_tokens"] == (6, 5)
    assert difference.settings["samples/tiny"] == 3  # joy, fear and neutral: made with other settings
    assert {key["emotion"] for key in difference.only_a["vectors/tiny"]} == {
        "joy",
        "fear",
        "rage",
        "up",
    }  # `read`, a direction
    [text] = [
        variable for variable in difference.variables if (variable.group, variable.variable) == ("samples/tiny", "text")
    ]
    assert text.equal < text.cells and text.first["a"].startswith(text.first["b"][:10]) and "emotion" in text.first
    assert not difference.equal and difference.only_b == {}


def test_two_runs_of_one_store(place):
    store = place / "plan.zarr"
    code, said = run("diff", store, "--runs", 0, 1)
    assert code == 1 and "methods.made.samples" in said and "only in a: vectors/tiny: 6 cells" in said
    assert "only in b: edited: 2 cells" in said
    assert run("diff", store, "--runs", 1, 1)[0] == 1  # its cells, on both sides
    code, said = run("diff", store, "--runs", 0, 7)
    assert code == 2 and "run 7 is not in" in said
    assert run("diff", store)[0] == 2 and run("diff", store, place / "none.zarr")[0] == 2
