"""A model's own settings: no KV cache, penalties, beams, prompts read in parts. Texts are those of the oracle.

The oracle runs a model without these settings, with plain hooks, one text at a time.
"""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import tinies
import torch
from oracle import Push
from test_oracle import NEW, agrees, direction, form_of, greedy, parts, row_edit, texts

import nsteer
from nsteer.errors import ExecutionError
from nsteer.executors.common import pin
from nsteer.executors.local import Local
from nsteer.executors.rehearse import Rehearse
from nsteer.program.form import Form, ReadSite, Row, assemble

GENERATION = [
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": list(range(8, 200)),
        "sequence_bias": [[[9], 100.0]],
        "exponential_decay_length_penalty": [1, 9.0],
        "guidance_scale": 3.0,
    },
    {
        "encoder_no_repeat_ngram_size": 1,
        "encoder_repetition_penalty": 3.0,
        "begin_suppress_tokens": list(range(8, 300)),
        "bad_words_ids": [[token] for token in range(8, 200)],
        "forced_bos_token_id": 9,
        "min_new_tokens": 3,
        "min_length": 30,
    },
    {"max_length": 8, "max_new_tokens": 2, "max_time": 0.001, "stop_strings": ["a", "e"], "forced_eos_token_id": 9},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 2},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, "token_healing": True},
    {"renormalize_logits": True, "remove_invalid_values": True},
]
"""Settings beside each other where each alone would change the texts."""
CONFIG = [{"use_cache": False}, {"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]


@pytest.fixture(scope="module")
def clean() -> Local:
    return Local(tinies.model("llama", num_hidden_layers=6), tokenizer=tinies.tokenizer(), device="cpu")


def edits(d: int) -> list[Push]:
    """At layers [5, 2], a live one and one of generated positions alone."""
    return [Push(5, "add", 8 * direction(d, 1), 1.0, positions="generated"), Push(2, "add", direction(d, 2), 0.9, True)]


def written(executor: Local, **more) -> list[dict]:
    pushes = sorted(edits(executor.anatomy.d_model), key=lambda push: push.layer)
    rows = [Row(i, t, edits=tuple(row_edit(e, t) for e in pushes)) for i, t in enumerate(texts(executor))]
    form = form_of(pushes, decoding=greedy(executor), top=executor.anatomy.vocab, **more)
    readouts = executor.run(assemble(form, rows))
    return [readouts.row(i) for i in range(len(rows))]


@pytest.fixture(scope="module")
def truths(clean) -> list[oracle.Continuation]:
    pushes = sorted(edits(clean.anatomy.d_model), key=lambda push: push.layer)
    return [oracle.generate(*parts(clean), tokens, pushes, new=NEW) for tokens in texts(clean)]


def saved(folder, config=None, generation=None) -> str:
    """The clean model, saved with settings in its config.json and its generation_config.json."""
    tinies.model("llama", num_hidden_layers=6).save_pretrained(folder)
    tinies.tokenizer().save_pretrained(folder)
    for name, more in (("config.json", config), ("generation_config.json", generation)):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | (more or {})))
    return str(folder)


@pytest.mark.parametrize("settings", GENERATION, ids=lambda options: "-".join(options))
def test_a_generation_config_changes_nothing(tmp_path, truths, settings):
    executor = Local(saved(tmp_path / "m", generation=settings), device="cpu")
    told = " ".join(executor.describe()["settings"]["model_settings_not_followed"])
    assert all(f"{name}=" in told for name in settings), "each by its name"
    for row, truth in zip(written(executor), truths, strict=True):
        agrees(row, truth)


@pytest.mark.parametrize(
    ("settings", "alone"),
    [*((settings, False) for settings in CONFIG), (CONFIG[0], True)],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else ("", "no generation_config.json")[value],
)
def test_a_config_changes_nothing(tmp_path, truths, settings, alone):
    folder = saved(tmp_path / "m", config=settings)
    if alone:
        (tmp_path / "m" / "generation_config.json").unlink()
    executor = Local(folder, device="cpu", attn_implementation="eager")
    for row, truth in zip(written(executor), truths, strict=True):
        agrees(row, truth)


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"repetition_penalty": 3.0}, {"num_beams": 3}])
def test_a_program_says_it_itself_where_the_model_is_on_a_server(truths, settings):
    module = tinies.model("llama", num_hidden_layers=6)
    executor = Rehearse(module, tokenizer=tinies.tokenizer(), device="cpu")
    for name, value in settings.items():  # a server's model, which nobody here has pinned
        setattr(module.generation_config, name, value)
        module.config.use_cache = name != "use_cache"
    for row, truth in zip(written(executor), truths, strict=True):
        agrees(row, truth)


def test_what_is_not_followed_is_said():
    module = tinies.model("llama")
    module.generation_config.repetition_penalty = 1.3
    module.generation_config.do_sample = True
    module.config.use_cache = False
    module.generate = lambda **given: None
    assert pin(module) == ["config.use_cache=False", "do_sample=True", "generate", "repetition_penalty=1.3"]
    assert pin(module) == []


def without_cache(module):
    """The model as one whose code keeps no cache: every step reads the whole text."""

    def prepare(input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}

    module.prepare_inputs_for_generation = prepare
    return module


def test_a_model_that_keeps_no_cache_is_read_and_continued_but_not_steered():
    executor = Local(without_cache(tinies.model("llama")), tokenizer=tinies.tokenizer(), device="cpu")
    why = "its steps read 4, 5 positions of a text of 4: it keeps no KV cache"
    assert executor.health["no_edits_while_generating_because"] == why
    assert executor.describe()["warnings"] == [f"nothing can be edited or read while this model generates: {why}"]
    with pytest.raises(ExecutionError, match=f"^nothing can be edited or read while this model generates: {why}$"):
        written_by(executor)
    rows = [Row(i, t, {"all": np.ones(len(t)) / len(t)}) for i, t in enumerate(texts(executor))]
    usual = Local(tinies.model("llama"), tokenizer=tinies.tokenizer(), device="cpu")
    plain = Form(decoding=greedy(executor))
    assert executor.run(assemble(plain, rows)).tokens == usual.run(assemble(plain, rows)).tokens
    reads = Form(reads=(ReadSite(2, "all"),))
    np.testing.assert_array_equal(executor.run(assemble(reads, rows)).pooled, usual.run(assemble(reads, rows)).pooled)


def written_by(executor: Local):
    push = Push(1, "add", direction(executor.anatomy.d_model, 1), 1.0)
    rows = [Row(i, t, edits=(row_edit(push, t),)) for i, t in enumerate(texts(executor))]
    return executor.run(assemble(form_of([push], decoding=greedy(executor)), rows))


def test_a_program_refuses_a_step_that_reads_more_than_one_position():
    """On a server nothing was proved at load: the program's own text looks."""
    executor = Rehearse(tinies.model("llama"), tokenizer=tinies.tokenizer(), device="cpu")
    without_cache(executor.module)
    with pytest.raises(ExecutionError, match="step 1 reads 12 positions, not 1: no KV cache"):
        written_by(executor)


def test_a_padding_token_without_an_embedding_is_passed_over():
    """A tokenizer that got one later than the model: its id is beyond the embedding."""
    words = tinies.tokenizer()
    words.add_special_tokens({"pad_token": "<later>"})
    module = tinies.model("llama")
    assert words.pad_token_id == module.get_input_embeddings().weight.shape[0]
    executor = Local(module, tokenizer=words, device="cpu")
    assert executor.pad == tinies.END
    usual = Local(tinies.model("llama"), tokenizer=tinies.tokenizer(), device="cpu")
    assert written_by(executor).tokens == written_by(usual).tokens


def test_a_whole_plan_gives_the_same_texts_with_and_without_the_setting(tmp_path):
    models = [
        {"id": saved(tmp_path / "on"), "label": "on"},
        {"id": saved(tmp_path / "off", {"use_cache": False}, {"use_cache": False}), "label": "off"},
    ]
    few = {"max_new_tokens": 6}
    prompts = {"short": "the cat sat", "long": "rain fell on the garden wall while tom read a book by the fire"}
    blocks = [
        {
            "name": where,
            "layers": [5, 2],
            "strengths": [0.4],
            "positions": where,
            "prompts": prompts,
            "generate": few,
            "controls": ["zero"],
        }
        for where in ("all", "generated")
    ]
    plan = {"name": "n", "models": models, "texts": "zoo", "emotions": ["happy", "sad"], "steer": blocks}
    plan |= {"methods": {"r": {"source": "comprehension", "samples": 2}}, "store": str(tmp_path / "s.zarr")}
    (tmp_path / "p.yaml").write_text(json.dumps(plan))
    summary = nsteer.run(nsteer.load(tmp_path / "p.yaml", allow_outside=True))
    assert not summary.failures and not summary.warnings
    results = nsteer.open(tmp_path / "s.zarr")
    for name in ("generations", "unsteered"):
        ids_on, ids_off = (results[name].token_id.sel({"model": label}).values for label in ("on", "off"))
        np.testing.assert_array_equal(ids_on, ids_off)
    on, off = (results["steering"].sel({"model": label}) for label in ("on", "off"))
    np.testing.assert_array_equal(on.touched.values, off.touched.values)
    np.testing.assert_allclose(on.relative_change.values, off.relative_change.values, rtol=1e-5)


def test_mpt_which_keeps_no_cache_by_default():
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=6, vocab_size=320, max_seq_len=64, initializer_range=0.2)
    assert config.use_cache is False
    executor = Local(MptForCausalLM(config).eval(), tokenizer=tinies.tokenizer(), device="cpu")
    assert executor.batching.stepless == ""
    pushes = sorted(edits(32), key=lambda push: push.layer)
    blocks = list(executor.module.transformer.blocks)
    for row, tokens in zip(written(executor), texts(executor), strict=True):
        agrees(row, oracle.generate(executor.module, blocks, tokens, pushes, new=NEW))
