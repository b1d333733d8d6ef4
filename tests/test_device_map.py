"""A model over several devices by accelerate: the numbers of plain hooks on the whole model, parts on disk included."""

from __future__ import annotations

import importlib.util

import numpy as np
import oracle
import pytest
import tinies
from click.testing import CliRunner
from test_oracle import NEW, agrees, close, direction, form_of, greedy, row_edit, run, texts

import nsteer
from nsteer import cli
from nsteer.errors import ModelError
from nsteer.executors.local import Local
from nsteer.program.form import ReadSite, Row, lens

SPLIT = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.layers.2": "disk",
        "model.layers.3": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    },
    "gpt2": {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
        "transformer.h.2": "disk",
        "transformer.h.3": "cpu",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",  # tied to wte
    },
}
PLAN = """
name: p
models:
  - {id: FOLDER, label: m, device_map: {MAP}}
directions: {up: {contrast: {positive: [the cat sat on the warm mat], negative: [rain fell on the garden]}}}
steer:
  prompts: {a: the cat sat on the mat, b: tom}
  vectors: {directions: [up]}
  layers: [3, 1]
  strengths: [0, 2]
  generate: {max_new_tokens: 5}
store: p.zarr
"""


@pytest.fixture(params=SPLIT)
def spread(request, folder):
    """The name of a family and its executor, parts of which lie on disk."""
    executor = Local(str(folder(request.param)), device_map=SPLIT[request.param])
    yield request.param, executor
    executor.close()


@pytest.mark.parametrize("side", ["left", "right"])
def test_streams_edits_and_scores_are_those_of_the_whole_model(spread, side):
    name, executor = spread
    assert {parameter.device.type for parameter in executor.module.parameters()} == {"cpu", "meta"}
    module = tinies.model(name)
    edits = [oracle.Push(1, "add", 5 * direction(executor.anatomy.d_model, 1), 0.7)]
    form = form_of(edits, reads=tuple(ReadSite(layer, "text", "tokens") for layer in (1, 3)), score=True)
    rows = [
        Row(
            i,
            t,
            {"text": np.ones(len(t)), "score": (np.arange(len(t)) >= 2).astype(np.float32)},
            (row_edit(edits[0], t),),
        )
        for i, t in enumerate(texts(executor))
    ]
    for row, readouts in zip(rows, run(executor, form, rows, side), strict=True):
        truth = oracle.forward(module, tinies.blocks(name, module), row.tokens, edits)
        for place, layer in enumerate((1, 3)):
            close(readouts["streams"][place], truth.streams[layer])
        np.testing.assert_allclose(readouts["receipts"], truth.receipts, rtol=1e-4, atol=1e-4)
        logprobs = truth.logits.log_softmax(-1)
        said = sum(float(logprobs[p - 1, row.tokens[p]]) for p in range(2, len(row.tokens)))
        assert readouts["score"] == pytest.approx(said, abs=1e-3)


def test_steered_texts_are_those_of_the_whole_model(spread):
    name, executor = spread
    module = tinies.model(name)
    rows, pushes = [], []
    for i, tokens in enumerate(texts(executor)):
        pushes.append([oracle.Push(2, "add", direction(executor.anatomy.d_model, 10 + i), 1.5 * i)])
        rows.append(Row(i, tokens, {}, (row_edit(pushes[-1][0], tokens),)))
    form = form_of(pushes[0], decoding=greedy(executor), top=executor.anatomy.vocab)
    for row, push, readouts in zip(rows, pushes, run(executor, form, rows), strict=True):
        agrees(readouts, oracle.generate(module, tinies.blocks(name, module), row.tokens, push, new=NEW))


def test_the_lens_goes_through_a_head_on_disk(spread):
    name, executor = spread
    vectors = np.stack([direction(executor.anatomy.d_model, i) for i in range(3)])
    readouts = executor.run(lens(4, vectors))
    logits = vectors @ tinies.model(name).get_output_embeddings().weight.detach().numpy().T
    for i in range(3):
        order = np.argsort(-logits[i], kind="stable")[:4]
        assert readouts.promoted_tokens[i].tolist() == order.tolist()
        np.testing.assert_allclose(readouts.promoted[i], logits[i][order], atol=1e-4)


def test_a_plan_runs_and_says_where_the_model_lay(folder, tmp_path):
    import json

    text = PLAN.replace("FOLDER", str(folder("llama")))
    for store, placed in (("p.zarr", json.dumps(SPLIT["llama"])[1:-1]), ("q.zarr", "'': cpu")):
        (tmp_path / "p.yaml").write_text(text.replace("MAP", placed).replace("p.zarr", store))
        result = CliRunner().invoke(cli.main, ["run", "p.yaml"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    spread, whole = nsteer.open("p.zarr"), nsteer.open("q.zarr")
    assert spread["models"].device.sel(model="m").item() == "cpu+disk"
    assert whole["models"].device.sel(model="m").item() == "cpu"
    assert (spread["generations"].text == whole["generations"].text).all()


@pytest.mark.parametrize(
    "setting, where, words",
    [
        ("models[0].device=cpu", "models[0].device", "auto, beside a `device_map`"),
        ("models[0].device_map={'': gpu}", "models[0].device_map", "a GPU's number, cuda:N, cpu or disk"),
        ("models[0].device_map={'': disk}", "models[0].device_map", "leave some of it on cpu or a GPU"),
        ("models[0].max_memory={cpu: lots}", "models[0].max_memory", "a GPU's number or `cpu`, and a size"),
        ("executor=ndif", "models[0].device_map", "nothing under executor: ndif"),
        ("models[0].peft=adapter", "models[0].device_map", "not both"),
    ],
)
def test_what_accelerate_would_not_take_is_a_problem_of_the_plan(folder, tmp_path, setting, where, words):
    (tmp_path / "p.yaml").write_text(PLAN.replace("FOLDER", str(folder("llama"))).replace("MAP", "'': cpu"))
    result = CliRunner().invoke(cli.main, ["check", "p.yaml", "--set", setting], catch_exceptions=False)
    said = " ".join(result.output.split())
    assert result.exit_code and where in said and words in said, result.output


def test_a_gpu_that_this_machine_lacks_is_a_note(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("nsteer.system.machine.lacks", lambda device: "there is none" if device == "cuda" else "")
    (tmp_path / "p.yaml").write_text(
        PLAN.replace("FOLDER", str(folder("llama"))).replace("MAP", "model: cpu, lm_head: 0")
    )
    result = CliRunner().invoke(cli.main, ["check", "p.yaml"], catch_exceptions=False)
    assert result.exit_code == 0 and "device_map.lm_head: expected a device of this machine, found 0" in result.output


def test_a_map_that_leaves_the_model_nowhere_to_run_is_refused(folder):
    with pytest.raises(ModelError, match="'modle', which is no module of the model"):
        Local(str(folder("llama")), device_map={"modle": "disk", "": "cpu"})
    with pytest.raises(ModelError, match="the whole model would lie on disk"):
        Local(str(folder("llama")), device_map="auto", max_memory={"cpu": "1KB"})


def test_without_accelerate_the_plan_says_so(folder, tmp_path, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "accelerate" else own(name, *more)
    )
    (tmp_path / "p.yaml").write_text(PLAN.replace("FOLDER", str(folder("llama"))).replace("{MAP}", "auto"))
    result = CliRunner().invoke(cli.main, ["check", "p.yaml"], catch_exceptions=False)
    assert result.exit_code and "nsteer[large]" in result.output
