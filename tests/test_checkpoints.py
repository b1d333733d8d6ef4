"""Files of a model that are not what they should be, texts that it has no positions for: told before it is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import tinies
from click.testing import CliRunner
from test_runner import run, write

from nsteer import cli
from nsteer.errors import PlanError
from nsteer.models import checkpoints, contexts
from nsteer.stages import sizing
from nsteer.stages.sizing import size

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
READS = {
    "methods": {},
    "emotions": None,
    "steer": None,
    "prompts": {"w": "tom walked to"},
    "reads": {"last": {"layers": [2], "pooling": "last"}},
}


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def whole(folder, tmp_path):
    """A model directory of one's own."""
    return shutil.copytree(folder("llama"), tmp_path / "model")


def sharded(path):
    """The same, in two shards with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil(path, how: str) -> None:
    weights = path / "model.safetensors"
    if how == "pointer":
        weights.write_text(POINTER)
    elif how == "tokenizer pointer":
        (path / "tokenizer.json").write_text(POINTER)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "foreign":
        weights.write_bytes(b"PK\x03\x04" + b"x" * 5000)
    elif how in ("tokenizer.json", "generation_config.json"):
        (path / how).write_text('{"eos_token_id": [2,')
    elif how == "header":
        weights.write_bytes((6).to_bytes(8, "little") + b"{nope}" + b"x" * 50)
    else:
        sharded(path)
        if how == "shard":
            (path / "model-00002-of-00002.safetensors").unlink()
        elif how == "cut shard":
            (path / "model-00002-of-00002.safetensors").write_text(POINTER)
        else:
            (path / "model.safetensors.index.json").write_text("[]")


FAULTS = {
    "pointer": "model.safetensors, a git-lfs pointer in place of the file (git lfs pull)",
    "tokenizer pointer": "tokenizer.json, a git-lfs pointer in place of the file (git lfs pull)",
    "empty": "model.safetensors, an empty file (copy or download it again)",
    "foreign": "model.safetensors, which is no safetensors file (copy or download it again)",
    "header": "model.safetensors, which is no safetensors file (copy or download it again)",
    "tokenizer.json": "tokenizer.json, which can not be read (copy or download it again)",
    "generation_config.json": "generation_config.json, which can not be read (copy or download it again)",
    "shard": "no model-00002-of-00002.safetensors, which model.safetensors.index.json names (copy the whole directory)",
    "cut shard": "model-00002-of-00002.safetensors, a git-lfs pointer in place of the file (git lfs pull)",
    "index": "model.safetensors.index.json, which is no index of weights (copy the whole directory)",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_faulty_file_is_one_located_line(whole, tmp_path, how):
    spoil(whole, how)
    done = invoke("check", write(tmp_path, whole, **READS))
    assert done.exit_code == 2
    (line, count) = done.stderr.strip().splitlines()
    assert "models[0].id: expected a model directory that is whole, found" in line and line.endswith(FAULTS[how])
    assert count == "1 problem; no model was loaded"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", ["llama"], "whose model_type is ['llama'], no text"),
        ("architectures", 7, "whose architectures is 7, no list"),
        ("num_hidden_layers", 2**70, "that has none of decoder_layers, num_hidden_layers"),
    ],
)
def test_a_config_of_other_types_is_one_located_line(whole, tmp_path, field, value, words):
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, field: value}))
    done = invoke("check", write(tmp_path, whole, **READS))
    (line, _) = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and "models[0].id: " in line and words in line


def test_a_chat_says_of_a_faulty_file_what_a_plan_says(whole, tmp_path):
    spoil(whole, "shard")
    done = invoke("chat", whole, "--vector", "none.zarr:a/b")
    assert done.exit_code == 1 and FAULTS["shard"].split(", which")[0] in done.stderr
    assert "expected a model directory that is whole" in done.stderr


def test_a_whole_directory_has_no_fault_and_is_counted(whole):
    numbers = checkpoints.parameters(whole)
    assert numbers > 0 and checkpoints.faults(whole) == [] and checkpoints.lacks(whole) == ""
    sharded(whole)
    assert checkpoints.faults(whole) == [] and checkpoints.parameters(whole) == numbers


@pytest.mark.parametrize("left", [4, 1000, -16])
def test_a_file_that_may_be_on_its_way_is_a_note(whole, tmp_path, left):
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    done = invoke("check", write(tmp_path, whole, **READS))
    if left == 4:  # not even the length of its header
        assert done.exit_code == 2 and "no safetensors file" in done.stderr
        return
    assert done.exit_code == 0
    assert "found " in done.stdout and "model.safetensors, which is cut short (copy or" in done.stdout


@pytest.mark.parametrize(("names", "what"), [("*.safetensors", "weights"), ("tokenizer*", "a tokenizer")])
def test_what_is_not_there_is_a_note(whole, tmp_path, names, what):
    for file in whole.glob(names):
        file.unlink()
    done = invoke("check", write(tmp_path, whole, **READS))
    assert done.exit_code == 0 and f"', without {what}\n" in done.stdout


def test_a_tokenizer_file_that_is_none_breaks_no_check(whole, tmp_path):
    (whole / "tokenizer.json").write_text("{}")
    assert invoke("check", write(tmp_path, whole, **READS)).exit_code == 0


# ---- positions ---------------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "max_position_embeddings": 512}
PHI = {"model_type": "phi3", "max_position_embeddings": 128, "original_max_position_embeddings": 32}
LONG_ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "gpt2", "n_positions": 512}, contexts.Context(512, True)),
        ({"model_type": "opt", "max_position_embeddings": 64}, contexts.Context(64, True)),
        ({"model_type": "llama", "max_position_embeddings": 512}, contexts.Context(512, False)),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, contexts.Context(512, True)),
        ({"text_config": {"model_type": "gemma3_text", "max_position_embeddings": 9}}, contexts.Context(9, False)),
        ({"model_type": "falcon", "max_position_embeddings": 2048, "alibi": True}, None),
        (PHI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, contexts.Context(128, False, 32)),
        (PHI | {"rope_scaling": {"type": "su"}}, contexts.Context(128, False, 32)),
        (LLAMA | {"rope_parameters": LONG_ROPE}, contexts.Context(512, False, 64)),
        (
            LLAMA | {"rope_parameters": {"full_attention": LONG_ROPE, "sliding_attention": {"rope_type": "default"}}},
            contexts.Context(512, False, 64),
        ),
        (LLAMA | {"attn_temperature_tuning": 4, "floor_scale": 128}, contexts.Context(512, False, 127)),
        (LLAMA | {"attn_temperature_tuning": False, "floor_scale": 128}, contexts.Context(512, False)),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, contexts.Context(512, True)),
        (
            LLAMA | {"rope_scaling": None, "rope_parameters": LONG_ROPE | {"rope_type": "yarn"}},
            contexts.Context(512, False),
        ),
        ({"model_type": "bloom"}, None),
        (LLAMA | {"rope_scaling": {"type": 3}}, contexts.Context(512, False)),
        (LLAMA | {"rope_scaling": LONG_ROPE | {"original_max_position_embeddings": "x"}}, contexts.Context(512, False)),
    ],
)
def test_positions_are_in_the_config(config, context):
    assert contexts.context(config) == context


LONG = "tom walked to the market and . " * 30


def told(tmp_path, model, **fields) -> list[str]:
    """Problems and notes of a plan, by `check`."""
    done = invoke("check", write(tmp_path, model, **{**READS, **fields}))
    assert done.exit_code == 0 or "positions" in done.stderr, done.stderr
    return [line for line in (done.stderr + done.stdout).splitlines() if "positions" in line]


MADE = {"source": "generation", "samples": 1, "neutral_samples": 0, "baseline": "grand_mean"}
PLACES = {
    "prompts": {"prompts": {"short": "tom", "long": LONG}},
    "directions.d.contrast.negative": {
        "directions": {"d": {"contrast": {"positive": ["tom"], "negative": ["a", LONG]}}},
        "edits": {"e": [{"op": "add", "direction": "d", "layers": [2], "strength": 1.0}]},
    },
    "methods.read": {
        "methods": {"read": {"source": "comprehension", "samples": 2, "neutral_samples": 0, "baseline": "rest"}},
        "emotions": ["joy", "fear"],
        "texts": "long.yaml",
    },
    "methods.made": {
        "methods": {"made": {**MADE, "generate": {"max_new_tokens": 300}}},
        "emotions": ["joy", "fear"],
        "texts": "long.yaml",
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_text_that_does_not_fit_is_told_where_it_is_named(folder, tmp_path, place, model):
    texts = {"name": "long", "emotions": {"joy": "positive", "fear": "negative"}, "story_templates": ["{emotion} tom"]}
    texts["passages"] = {"joy": ["tom", "rain"], "fear": ["tom", LONG]}
    (tmp_path / "long.yaml").write_text(json.dumps(texts))
    (line, *more) = told(tmp_path, folder(model), **PLACES[place])
    assert not more
    has = "has" if model == "gpt2" else "was made for"
    assert f"{place}: expected at most the 128 positions that tiny {has}, found" in line
    assert line.startswith("note: ") == (model == "llama")


def test_new_tokens_count_and_the_last_is_never_read(folder, tmp_path):
    model = folder("gpt2")
    count = checkpoints.counter(str(model), None)
    tokens = count("tom walked to")
    fits = {"generate": {"max_new_tokens": 129 - tokens}, "reads": {}}
    assert told(tmp_path, model, **fits) == []
    (line,) = told(tmp_path, model, **{**fits, "generate": {"max_new_tokens": 130 - tokens}})
    assert (
        f"found 'w', of {tokens} tokens and {130 - tokens} new ones (a shorter text, or fewer max_new_tokens)" in line
    )
    summary = run(write(tmp_path, model, **{**READS, **fits}))
    assert not summary.failures and summary.done


def test_what_no_check_could_count_fails_by_name_and_no_other_text(folder, tmp_path):
    """Without a `tokenizer.json` that can be read here nothing is counted before the run."""
    from nsteer.plan.check import given

    plan = write(tmp_path, folder("gpt2"), **READS, generate={"max_new_tokens": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(given.checkpoints, "counter", lambda *a: None)
        summary = run(plan, f"prompts.long={LONG}")
    assert summary.failures and {failure.kind for failure in summary.failures} == {"permanent"}
    for failure in summary.failures:
        assert failure.reason.startswith("a text of ") and "tiny has 128 positions" in failure.reason
    with pytest.raises(PlanError, match="at most the 128 positions"):
        run(plan, f"prompts.long={LONG}")


def test_a_model_that_goes_on_says_so_in_the_run(folder, tmp_path):
    summary = run(write(tmp_path, folder("llama"), **READS), f"prompts.long={LONG}")
    assert not summary.failures
    (said,) = [text for text in summary.warnings if "positions" in text]
    assert "at most the 128 positions that tiny was made for" in said


def test_a_token_without_an_embedding_fails_its_text_by_name(whole, tmp_path):
    """Added to the tokenizer, as for a chat, and not to the weights; a padding token is passed over."""
    tokenizer = tinies.tokenizer(bos=True)
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(whole)
    summary = run(write(tmp_path, whole, **READS), "prompts.odd='tom <later> ran'")
    (failure,) = summary.failures
    assert failure.reason == f"a text with the token '<later>' ({tinies.VOCAB}), and the embedding of tiny has 320 rows"


def test_sizes_need_no_whole_file(whole, tmp_path):
    from nsteer.plan import check

    weights = whole / "model.safetensors"
    plan = write(tmp_path, whole, **READS)
    full = size(check.load(plan)).memory["tiny"]
    weights.write_bytes(weights.read_bytes()[:1000])
    assert size(check.load(plan)).memory["tiny"] > sizing.BASELINE and full > sizing.BASELINE
