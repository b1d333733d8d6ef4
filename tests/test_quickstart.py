"""The shipped plans, run by the installed command: what they must show, read from the store with plain xarray."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import prefork
import pytest
import xarray as xr

from nsteer import zoo
from nsteer.store import Store

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import zoo_corpus

ROOT = Path(__file__).parent.parent
NSTEER = str(Path(sys.executable).parent / "nsteer")


def enough(shares: dict[str, float]) -> bool:
    return shares["none"] >= 0.6 and shares["random"] <= 0.15


def read(store: Path, group: str) -> xr.Dataset:
    return Store(store).read(group).load()


def kin_auc(vectors: xr.DataArray) -> float:
    """P(two kin emotions' vectors are more alike than two others'), from [emotion, d_model]; the kin are planted."""
    values = vectors.transpose("emotion", "d_model").values.astype(np.float64)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    names = vectors.emotion.values.tolist()
    cosine = {(a, b): unit[i] @ unit[j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
    kin = {frozenset(pair) for pair in zoo_corpus.kin_pairs()}
    near = np.array([c for pair, c in cosine.items() if frozenset(pair) in kin])
    far = np.array([c for pair, c in cosine.items() if frozenset(pair) not in kin])
    assert len(near) > 5 and len(far) > 50
    wins = (near[:, None] > far[None, :]).mean() + 0.5 * (near[:, None] == far[None, :]).mean()
    return float(wins)


def best_auc(store: Path, model: str) -> float:
    vectors = read(store, f"vectors/{model.replace('/', '--')}").vector.sel({"model": model, "method": "generation"})
    return max(kin_auc(vectors.sel({"layer": layer})) for layer in vectors.layer.values)


def rates(store: Path, model: str) -> dict[str, float]:
    """Share of continuations that the judge gives to the emotion steered to: best strength, and its random control."""
    probability = read(store, "judged").score.sel(
        {"model": model, "op": "add", "layer_set": "all", "method": "generation", "judge": "judge"}
    )
    classes = probability["class"].values
    emotions = probability.dropna("emotion", how="all").emotion
    named = xr.apply_ufunc(
        lambda p: classes[p.argmax(-1)], probability.sel({"emotion": emotions}), input_core_dims=[["class"]]
    )
    hits = (named == emotions).mean(["emotion", "prompt", "seed"])
    best = hits.sel({"control": "none"}).idxmax("strength")
    return {control: float(hits.sel({"control": control, "strength": best})) for control in ("none", "random")}


def test_the_quickstart_runs_in_time_and_says_how_to_read_it(quickstart):
    _, said, seconds = quickstart
    assert seconds < 180, "90 s on two idle cores; twice that on a busy machine"
    assert 'nsteer.open("store/quickstart.zarr")' in said


def test_plain_xarray_opens_it_without_nsteer_and_without_a_warning(quickstart):
    code = """
import sys
import xarray as xr
tree = xr.open_datatree("store/quickstart.zarr", engine="zarr")
vectors = tree["vectors/zoo--llama"].vector
assert {"method", "emotion", "layer", "d_model"} <= set(vectors.dims), vectors.dims
assert "happy" in vectors.emotion.values.tolist() and "generation" in vectors.method.values.tolist()
one = vectors.sel({"model": "zoo/llama", "method": "generation", "emotion": "happy", "layer": 3}).load()
assert one.dims == ("d_model",) and abs(float((one**2).sum()) - 1) < 1e-4
assert "nsteer" not in sys.modules
print("opened")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=quickstart[0], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "opened"


def test_every_cell_of_the_quickstart_is_there(quickstart):
    store = Store(quickstart[0] / "store/quickstart.zarr")
    assert len(store.committed("vectors/zoo--llama")) == 40
    assert len(store.committed("generations")) == len(store.committed("judged")) == 30
    assert read(store.path, "runs").status.values.tolist()[0] == "complete"


def test_kin_emotions_have_kin_vectors(quickstart):
    assert best_auc(quickstart[0] / "store/quickstart.zarr", "zoo/llama") >= 0.9


def test_a_shuffled_geometry_does_not_pass(quickstart):
    """The measure itself can fail: vectors of other emotions' labels are not near their kin."""
    vectors = read(quickstart[0] / "store/quickstart.zarr", "vectors/zoo--llama").vector
    layer_vectors = vectors.sel({"model": "zoo/llama", "method": "generation", "layer": 3})
    order = np.random.default_rng(0).permutation(layer_vectors.sizes["emotion"])
    assert kin_auc(layer_vectors.copy(data=layer_vectors.values[order])) < 0.75


def test_steering_makes_the_judge_name_the_emotion_and_a_random_direction_does_not(quickstart):
    shares = rates(quickstart[0] / "store/quickstart.zarr", "zoo/llama")
    assert enough(shares), shares


OTHERS = [name for name in zoo.FAMILIES if name != "llama"]
"""Families that the quickstart has not shown already: its methods and steering are those of plans/families.yaml."""
CUT = [
    # vectors are of all twenty emotions; five of them steer: 40 texts behind each rate, as in the quickstart
    "steer.vectors.emotions=[happy, sad, calm, afraid, hostile]",
    "steer.strengths=[0.1, 0.15]",
    # of the paper's protocols nothing is measured here
    "methods.generation-jeong2026.samples=1",
    "methods.comprehension-jeong2026.samples=1",
]


@pytest.mark.slow
@pytest.mark.xdist_group("families")  # it shares nothing with the others here
def test_the_same_for_the_other_four_families(tmp_path):
    shutil.copytree(ROOT / "plans", tmp_path / "plans")
    for name in OTHERS:
        if not (zoo.path(name) / "model.safetensors").is_file():
            pytest.skip(f"zoo/{name} is not there yet")
    settings = [*CUT, f"models=[{', '.join(f'zoo/{name}' for name in OTHERS)}]"]
    command = prefork.nsteer(
        "run", "plans/families.yaml", *(part for setting in settings for part in ("--set", setting))
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = tmp_path / "store/families.zarr"
    scores = {name: (best_auc(store, f"zoo/{name}"), rates(store, f"zoo/{name}")) for name in OTHERS}
    wrong = {n: f for n, f in scores.items() if f[0] < 0.9 or not enough(f[1])}
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.xdist_group("read-edit")  # it shares nothing with the others here
def test_read_edit_runs(tmp_path):
    shutil.copytree(ROOT / "plans", tmp_path / "plans")
    command = prefork.nsteer("run", "plans/read-edit.yaml", "--set", "generate.max_new_tokens=4")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Store(tmp_path / "store/read-edit.zarr").committed("edited")


SMALL = [
    "emotions=[happy, calm, loving, sad, hostile, gloomy]",
    "models=[zoo/qwen, zoo/llama]",
    "methods.generation.samples=4",
    "methods.generation.generate.max_new_tokens=16",
    "steer.strengths=[0.05, 0.15]",
    "steer.vectors.emotions=[happy, hostile]",
    "steer.prompts=scenarios-8",
    "steer.generate.max_new_tokens=8",
]

TWICE = """
import sys
from nsteer.cli import main
at = sys.argv.index("report")
for words in (sys.argv[1:at], sys.argv[at:]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
"""
"""`nsteer run` and `nsteer report` in a process."""


@pytest.mark.slow
@pytest.mark.xdist_group("study")  # it shares nothing with the others here
def test_the_study_is_reproducible_to_the_digit(tmp_path):
    """plans/jeong2026-zoo.yaml, cut small: two runs from nothing give the same table, every claim in it."""
    tables = []
    # one is a process of its own: it has other hash seeds
    for name, command in (("a", prefork.python(TWICE)), ("b", [sys.executable, "-c", TWICE])):
        store = str(tmp_path / f"{name}.zarr")
        settings = [part for setting in [*SMALL, f"store={store}"] for part in ("--set", setting)]
        words = ["run", "plans/jeong2026-zoo.yaml", *settings, "--quiet", "report", store, "-o", f"{store}.csv"]
        subprocess.run([*command, *words], check=True, cwd=ROOT, capture_output=True)
        tables.append(Path(f"{store}.csv").read_bytes())
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(io.StringIO(tables[0].decode())))
    assert {row["claim"] for row in rows} == {"1", "2", "3", "4", "5", "6", "effects", "audit", "rsa", "geometry"}
    lens_texts = {row["scope"]: row["ours"] for row in rows if "logit lens" in row["what"]}
    assert "Han" in lens_texts["zoo/qwen"] and "Han" not in lens_texts["zoo/llama"]
