"""What other libraries say while a model loads: nothing on the terminal, and an error where weights are missing."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import tinies
from safetensors.numpy import load_file, save_file
from test_runner import GENERAL, run, write

from nsteer import zoo
from nsteer.errors import ModelError
from nsteer.executors.classifier import Classifier
from nsteer.executors.local import Local
from nsteer.program.form import Decoding, Form, Row, programs


def without(folder, part: str) -> str:
    """Takes one array out of a checkpoint; returns its name."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if part in name)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    return name


@pytest.fixture
def saved(folder, tmp_path):
    """A model directory that makes transformers talk: flags of sampling beside greedy decoding."""
    copied = shutil.copytree(folder("llama"), tmp_path / "saved")
    file = copied / "generation_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, "do_sample": False, "temperature": 0.7, "top_p": 0.9, "max_length": 20}))
    return copied


def test_a_checkpoint_without_some_of_its_weights_is_refused(saved, tmp_path):
    lost = without(saved, "layers.1.mlp.up_proj")
    summary = run(write(tmp_path, saved, **GENERAL))
    assert summary.failures and all(
        "lacks weights, in whose place random ones would be drawn" in failure.reason and lost in failure.reason
        for failure in summary.failures
    )


def test_weights_of_another_shape_are_named(saved, tmp_path):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))
    (failure,) = {
        failed_cell.reason
        for failed_cell in run(write(tmp_path, saved, **GENERAL)).failures
        if failed_cell.stage == "loading"
    }
    assert "the weight model.layers.0.mlp.down_proj.weight has the shape [32, 48], and [32, 96] by the" in failure


def test_a_judge_without_its_head_is_refused(tmp_path):
    copied = shutil.copytree(zoo.path("judge"), tmp_path / "judge")
    lost = without(copied, "classifier")
    with pytest.raises(ModelError, match=f"lacks weights.*{lost.split('.')[0]}"):
        Classifier(str(copied))


def test_nothing_but_ours_is_on_the_terminal(saved, tmp_path):
    models = [{"id": str(path), "label": path.name, "device": "cpu"} for path in (zoo.path("llama"), saved)]
    file = write(tmp_path, saved, **GENERAL | {"models": models})
    words = [sys.executable, "-m", "nsteer", "run", str(file), "--allow-outside"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    others = [line for line in done.stderr.splitlines() if line and not line.startswith(("[1/2] ", "[2/2] "))]
    assert done.returncode == 0 and not others


def test_an_encoder_and_decoder_is_refused_in_one_line(tmp_path):
    """transformers' own words name every one of its 180 models."""
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 8, "num_layers": 2}')
    tinies.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"can not be loaded: ValueError: Unrecognized .*T5Config") as caught:
        Local(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value) and "GPT2Config" not in str(caught.value)


def test_a_mask_that_transformers_drops_itself_is_not_warned_of(caplog):
    """Rows without padding whose first token has the padding's id: GPT-2 would say that its mask is missing."""
    executor = Local(str(zoo.path("gpt2")), device="cpu", leave=False)
    executor.module.config.pad_token_id = 0
    rows = [Row(name, (0, 5, 7), {}) for name in "ab"]
    told = logging.getLogger("transformers")
    told.addHandler(caplog.handler)  # its records go no further up
    try:
        for program in programs(Form(decoding=Decoding(4, (), 0)), rows, budget=100, max_rows=2):
            executor.run(program)
    finally:
        told.removeHandler(caplog.handler)
    assert "attention_mask" not in caplog.text
