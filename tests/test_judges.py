"""Judges: scores by the function of the classifier's own head, as transformers' pipeline gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from planside import PLAN, STEER, problems
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from nsteer import zoo
from nsteer.executors.classifier import Classifier
from nsteer.models import facts as models
from nsteer.plan.schema import Model

TEXTS = ["tom won the prize . he grinned and danced .", "lena wept beside the grave ."]
HEADS = {
    ("single_label_classification", 3): "softmax",
    (None, 3): "softmax",
    ("multi_label_classification", 3): "sigmoid",
    ("multi_label_classification", 1): "sigmoid",
    (None, 1): "sigmoid",
    ("regression", 1): "regression",
    ("regression", 3): "regression",
}


def judge(folder: Path, kind: str | None, classes: int) -> Path:
    source = zoo.path("judge")
    config = AutoConfig.from_pretrained(source)
    config.id2label = {i: f"c{i}" for i in range(classes)}
    config.label2id, config.problem_type = {name: i for i, name in config.id2label.items()}, kind
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "classes"), HEADS)
def test_scores_are_those_of_the_pipeline(tmp_path, kind, classes):
    from transformers import pipeline  # here: it brings half of transformers to every worker

    folder = judge(tmp_path / "judge", kind, classes)
    classifier = Classifier(str(folder))
    theirs = pipeline("text-classification", model=str(folder), top_k=None, dtype=torch.float32)
    expected = [{prediction["label"]: prediction["score"] for prediction in theirs([text])[0]} for text in TEXTS]
    told = classifier.probabilities(TEXTS)
    np.testing.assert_allclose(
        told, [[row[name] for name in classifier.classes] for row in expected], rtol=1e-3, atol=1e-3
    )
    assert classifier.head == HEADS[kind, classes] == models.facts(Model(id=str(folder))).head


@pytest.mark.parametrize(("kind", "classes"), HEADS)
def test_a_plan_takes_no_judge_that_has_nothing_to_choose_among(tmp_path, kind, classes):
    folder = judge(tmp_path / "judge", kind, classes)
    refusals = problems(PLAN + STEER + "\n", f"judge={folder}")
    if classes > 1 and kind != "regression":
        assert not refusals
    else:
        (problem,) = refusals
        assert problem.path == "judge" and problem.expected == "a classifier of two classes or more"
        assert problem.found == f"{str(folder)!r}, {'a regression' if kind == 'regression' else 'with one class'}"


def test_a_judge_is_its_tokenizer_too(tmp_path):
    folder = Path(shutil.copytree(zoo.path("judge"), tmp_path / "judge"))
    before = models.facts(Model(id=str(folder))).judging
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 5}))
    after = models.facts(Model(id=str(folder))).judging
    assert after != before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert models.facts(Model(id=str(folder))).judging not in (before, after)


def test_classes_are_in_the_order_of_the_logits(tmp_path):
    folder = Path(shutil.copytree(zoo.path("judge"), tmp_path / "judge"))
    config = json.loads((folder / "config.json").read_text())
    names = config["id2label"]
    config["id2label"] = dict(reversed(names.items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert models.facts(Model(id=str(folder))).classes == tuple(names[i] for i in sorted(names, key=int))
