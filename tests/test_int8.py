"""INT8 weights: loaded by LLM.int8, near the full precision but not it, and never mixed with it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from planside import PLAN, problems, study

from nsteer.executors.local import Local
from nsteer.models.facts import local_folder
from nsteer.program.form import Row, assemble
from nsteer.stages import cells, forms
from nsteer.stages.job import Job

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("bitsandbytes", "accelerate"))), reason="needs the extra nsteer[int8]"
)
PAIR = "models=[{id: zoo/llama, label: whole}, {id: zoo/llama, dtype: float16, quantization: int8, label: eighth}]"


def pooled(executor: Local) -> np.ndarray:
    """Mean-pooled streams of two texts of unequal length at layers 1 and 3: [row, layer, d_model]."""
    rows = [
        Row(k, ids, {"text": np.full(len(ids), 1 / len(ids)), "norm": np.ones(len(ids))})
        for k, ids in enumerate([(1, 20, 31, 7, 90, 12), (1, 44, 8)])
    ]
    return executor.run(assemble(forms.capture((1, 3)), rows)).pooled


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_int8_is_near_the_full_precision_and_says_what_it_is(family):
    folder = str(local_folder(f"zoo/{family}"))
    whole, eighth = Local(folder, device="cpu"), Local(folder, dtype="float16", device="cpu", quantization="int8")
    assert eighth.describe()["quantization"] == "int8" and whole.describe()["quantization"] == ""
    a, b = pooled(whole), pooled(eighth)
    apart = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)
    assert ((apart > 1e-4) & (apart < 0.1)).all(), apart


def test_nothing_is_said_of_every_layer(caplog):
    pooled(Local(str(local_folder("zoo/llama")), device="cpu", quantization="int8"))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_every_cell_of_int8_has_a_fingerprint_of_its_own():
    checked_study = study(PLAN, PAIR)
    whole, eighth = (cells.samples(Job(checked_study, facts)) for facts in checked_study.facts)
    assert {key._replace(model="") for key in whole} == {key._replace(model="") for key in eighth}
    assert not set(whole.values()) & set(eighth.values())


def test_without_the_package_the_plan_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    (problem,) = problems(PLAN, PAIR)
    assert problem.path == "models[1].quantization" and "pip install 'nsteer[int8]'" in str(problem)
