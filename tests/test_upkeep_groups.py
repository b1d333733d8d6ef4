"""What exists: every group that a command makes is one that is declared, and verify finds nothing wrong right after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_upkeep import run

from nsteer.stages.products import PRODUCTS, product_of
from nsteer.store import Group, Store, Variable, slug
from nsteer.upkeep.verify import verify

TEXTS = {
    "name": "few",
    "emotions": {"happy": "positive", "sad": "negative"},
    "story_templates": ["tell of {emotion} .", "a day of {emotion} and rain"],
    "neutral_story_templates": ["tell of a day .", "a day and the garden wall"],
    "neutral_passages": ["the cat sat on the mat", "tom read a book by the wall"],
    "passages": {
        "happy": ["a happy girl sang in the sun", "the dog ran to the warm fire"],
        "sad": ["a sad boy wept at night", "rain fell on the old house"],
    },
    "neutral_sentences": ["the cat sat on the mat", "tom read a book"],
}
METHODS = {
    "made": {"source": "generation", "samples": 2, "generate": {"max_new_tokens": 6}, "pooling": "mean"},
    "read": {"source": "comprehension", "samples": 2, "pooling": "mean"},
}
PROMPTS = {"walk": "tom ran to the", "rain": "the rain fell on"}
STEER = {
    "vectors": {"methods": ["read"], "emotions": ["happy", "sad"]},
    "layers": [2],
    "strengths": [0.05, 0.3],
    "controls": ["zero", "random", "prompted"],
    "prompts": PROMPTS,
    "generate": {"max_new_tokens": 6},
}
FULL = {
    "name": "full",
    "models": ["zoo/llama"],
    "texts": "texts.yaml",
    "emotions": ["happy", "sad"],
    "methods": METHODS,
    "steer": [
        {**STEER, "name": "push", "project": True, "strengths": [0.3]},
        {
            **STEER,
            "name": "held",
            "strengths": {"kl": [0.05]},
            "controls": [],
            "also": [{"op": "project_out", "direction": "sad", "layers": [1]}],
        },
    ],
    "measure": {"perplexity": True, "lens": 3, "anisotropy": True, "swap": 1, "embeddings": True, "capability": True},
    "judge": "zoo/judge",
    "threads": 1,
    "store": "full.zarr",
}
READS = {
    "name": "reads",
    "models": ["zoo/llama"],
    "prompts": PROMPTS,
    "directions": {"up": {"random": 3}},
    "edits": {
        "push": [{"direction": "up", "op": "add", "scale": "stream_norm", "strength": 0.3, "layers": [3, 1]}],
        "held": [{"direction": "up", "op": "add", "strength": {"kl": [0.05]}, "layers": [3, 1]}],
    },
    "project": True,
    "measure": {"perplexity": True, "capability": True},
    "judge": {"rule": {"words": {"push": ["tom", "rain"]}}},
    "reads": {"last": {"layers": [3, 1], "pooling": "last"}, "all": {"layers": [2]}},
    "generate": {"max_new_tokens": 4},
    "threads": 1,
    "store": "full.zarr",
}
TUNE = {
    **FULL,
    "name": "tuned",
    "methods": {"read": METHODS["read"]},
    "measure": {"perplexity": True},
    "steer": {**STEER, "name": "tuned", "layers": {"each": [3, 1]}, "strengths": [0.05, 0.4], "controls": ["zero"]},
    "tune": {"cells": 6, "held_out": {"prompts": {"night": "at night the old house was"}}},
}
FAILING = {
    **FULL,
    "name": "failing",
    "methods": {"read": METHODS["read"]},
    "measure": None,
    "judge": None,
    "steer": [{**STEER, "strengths": [1.0e-30, 0.05], "controls": ["zero"]}],
}
SMALL = {
    **FULL,
    "name": "small",
    "methods": {"read": METHODS["read"]},
    "measure": None,
    "steer": {**STEER, "strengths": [0.2], "vectors": {"emotions": ["happy"]}},
    "store": "small.zarr",
}
IMPORT = ["--model", "zoo/llama", "--layers-are", "block-index"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("commands")
    (place / "texts.yaml").write_text(json.dumps(TEXTS))
    for plan in (FULL, READS, TUNE, FAILING, SMALL):
        known = {key: value for key, value in plan.items() if value is not None}
        (place / f"{plan['name']}.yaml").write_text(json.dumps(known | {"store": str(place / plan["store"])}))
    return place


def told(place: Path, *words, code: int = 0) -> str:
    """What a command says. Right after it verify finds nothing in the stores of which it wrote a file."""
    before = stamps(place)
    exit_code, said = run(*words)
    assert exit_code == code, said
    for store in sorted({file.relative_to(place).parts[0] for file, _ in stamps(place) ^ before}):
        report = verify(Store(place / store))
        assert report.clean, (words, list(map(str, report.findings)))
    return said


def stamps(place: Path) -> set[tuple[Path, int]]:
    """Every file of the stores, with the time of its last change."""
    files = [file for store in place.glob("*.zarr") for file in store.rglob("*")]
    return {(file, file.stat().st_ctime_ns) for file in files if file.is_file()}


@pytest.mark.slow
def test_what_any_command_makes_passes_verify(place):
    full, merged, mine = (place / f"{name}.zarr" for name in ("full", "merged", "mine"))
    told(place, "run", place / "full.yaml", "--quiet", "--verify-rows", 2)
    told(place, "report", full, "--claims")
    told(place, "derive", place / "full.yaml", "--quiet")
    told(place, "run", place / "reads.yaml", "--quiet")
    told(place, "tune", place / "tuned.yaml", "--quiet")
    told(place, "run", place / "failing.yaml", "--quiet", code=1)
    told(place, "report", full, "--claims", "-o", place / "report.html")
    told(place, "export", full, "-o", place / "v.safetensors", "--method", "read", "--emotion", "happy")
    for into, method in ((full, "file"), (mine, "other")):
        told(
            place, "import", place / "v.safetensors", "--into", into, *IMPORT, "--method", method, "--emotion", "happy"
        )
    told(place, "merge", full, mine, "-o", merged)
    told(place, "gc", full, place / "full.yaml", "--delete", "--older-than", 0)
    told(place, "verify", full)
    every = {path for store in (full, merged) for path in Store(store).groups()}
    seen = {path.rpartition("/")[0] if product_of(path).by_model else path for path in every}
    assert seen <= set(PRODUCTS), "declare these in nsteer/stages/products.py"
    # of a server, a judge's server, two models, and answers that a contrast lets a model write (test_responses)
    elsewhere = {"jobs", "replies", "summary/rsa", "responses", "responses_judged"}
    assert set(PRODUCTS) - seen <= elsewhere, "no command makes these"
    for path in Store(merged).groups():
        leaf = Store(merged).leaf(path)
        if "model" in leaf.dims:
            assert product_of(path).by_model == path.endswith("/" + slug(leaf.labels["model"][0])), path


@pytest.fixture(scope="module")
def small(place) -> Path:
    """The store of a plan of one model, with its report."""
    told(place, "run", place / "small.yaml", "--quiet")
    told(place, "report", place / "small.zarr", "--claims")
    return place / "small.zarr"


def test_a_repair_after_report_takes_nothing_away(small, tmp_path):
    copy = shutil.copytree(small, tmp_path / "copy.zarr")
    assert {"summary/regimes", "summary/dose_response", "claims"} <= set(Store(copy).groups())
    code, said = run("verify", copy, "--repair")
    assert code == 0 and "no problems" in said and "repaired" not in said
    left = {file.relative_to(copy): file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    assert left == {file.relative_to(small): file.read_bytes() for file in small.rglob("*") if file.is_file()}


def test_a_group_named_otherwise_than_its_model_is_found(tmp_path):
    store, dims = Store(tmp_path / "s.zarr"), ("model", "emotion")
    variables = {"norm": Variable(dims, "float32", "norm")}
    for path, models in (("vectors/zoo--gemma", ["zoo/llama"]), ("vectors/zoo--gpt2", ["zoo/gpt2", "zoo/llama"])):
        store.prepare([Group(path, {"model": models, "emotion": ["joy"]}, variables, dims)])
    store.prepare([Group("summary/regimes", {"model": ["zoo/llama"], "emotion": ["joy"]}, variables, dims)])
    reasons = {finding.group: finding.what for finding in verify(store).findings}
    assert reasons == {
        "vectors/zoo--gemma": "the group is named otherwise than its model: 'zoo/llama'",
        "vectors/zoo--gpt2": "the group is named otherwise than its model: 'zoo/gpt2', 'zoo/llama'",
    }
