"""GGUF files: facts of the header alone, converted once to what they say, refused in a line where not whole."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ggufs
import numpy as np
import pytest
import tinies
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.errors import ModelError
from nsteer.models import facts as models
from nsteer.models import gguf
from nsteer.models.gguf import converting, header
from nsteer.plan.schema import Model

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

PLAN = """
name: g
models: [{{id: {id}, label: m}}]
prompts: {{a: the cat sat on the mat, b: tom}}
reads: {{whole: {{layers: [3, 1]}}}}
store: out.zarr
"""


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def tiny(tmp_path):
    """Writes the file of the tiny llama; (file, model)."""

    def make(name="tiny.gguf", **settings):
        return tmp_path / name, ggufs.write(tmp_path / name, **settings)

    return make


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NSTEER_CACHE", str(tmp_path / "cache"))


def facts(file: Path, **more):
    return models.facts(Model(id=str(file), **more))


def tokenizer_and_model(file: Path):
    """The tokenizer and the model that a file is converted to."""
    import transformers

    model_facts = facts(file)
    with models.unchanged(model_facts):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_facts.name_or_path)
        return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(model_facts.name_or_path).eval()


def test_the_header_tells_what_a_config_would(tiny):
    file, model = tiny()
    model_facts = facts(file)
    assert (model_facts.n_layers, model_facts.d_model, model_facts.model_type, model_facts.label) == (
        4,
        32,
        "llama",
        "tiny",
    )
    assert (
        model_facts.shape.vocab == tinies.VOCAB
        and model_facts.context.positions == 128
        and model_facts.has_chat_template
    )
    assert model_facts.template.bos == "<s>" and model_facts.weights == "GGUF, dequantised: 39 F32"
    assert header.read(file).parameters == sum(p.numel() for p in model.parameters())
    assert not Path(model_facts.name_or_path).exists(), "nothing is converted before the model is loaded"


def test_logits_are_those_of_the_model_that_was_written(tiny):
    """Query and key rows, which llama.cpp keeps in another order, come back in ours."""
    import torch

    file, model = tiny()
    ids = torch.arange(24).reshape(2, 12) + 7
    with torch.no_grad():
        assert torch.equal(tokenizer_and_model(file)[1](ids).logits, model(ids).logits)


def test_quantised_tensors_are_what_the_library_of_the_format_makes_of_them(tiny):
    import gguf as library

    file, _ = tiny(quantised=True)
    model = tokenizer_and_model(file)[1]
    assert "Q8_0" in facts(file).weights
    read = {tensor.name: tensor for tensor in library.GGUFReader(file).tensors}
    for name in ("ffn_gate", "attn_v", "ffn_up"):
        theirs = library.dequantize(read[f"blk.2.{name}.weight"].data, read[f"blk.2.{name}.weight"].tensor_type)
        parts = {"attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
        ours = model.get_submodule(f"model.layers.2.{parts[name]}").weight
        assert np.array_equal(ours.detach().numpy(), theirs)


@pytest.mark.parametrize("added", [True, False])
def test_a_text_begins_with_bos_where_the_file_says_so(tiny, added):
    file, _ = tiny(values=[("tokenizer.ggml.add_bos_token", added)])
    tokenizer, _ = tokenizer_and_model(file)
    for text in ("the cat sat", "tom"):
        assert tokenizer(text).input_ids == tinies.tokenizer(bos=added)(text).input_ids


def test_a_kind_of_tokenizer_that_always_has_bos_has_it_where_the_file_says_nothing(tiny):
    file, _ = tiny(values=[("tokenizer.ggml.pre", "llama-bpe")])
    assert tokenizer_and_model(file)[0]("tom").input_ids[0] == tinies.BOS_ID


def test_a_text_ends_at_the_end_of_a_turn_too(tiny):
    from nsteer.executors.common import ends

    file, _ = tiny(values=[("tokenizer.ggml.eot_token_id", 4)])
    tokenizer, model = tokenizer_and_model(file)
    assert ends(model, tokenizer) == ((tinies.END, 4), tinies.PAD)


def test_a_file_is_converted_once_and_again_when_what_was_made_is_spoilt(tiny, monkeypatch):
    file, _ = tiny()
    said: list[str] = []
    model_facts = facts(file)
    for _ in range(2):
        with models.unchanged(model_facts, said.append):
            pass
    assert len(said) == 1 and "tiny.gguf is converted, once" in said[0]
    (Path(model_facts.name_or_path) / "model.safetensors").write_bytes(b"")
    with models.unchanged(model_facts, said.append):
        pass
    assert len(said) == 2 and converting.is_there(Path(model_facts.name_or_path))
    assert [path.name for path in Path(model_facts.name_or_path).parent.iterdir() if path.name.startswith(".")] == []


def test_another_file_under_the_name_is_another_model(tiny):
    file, _ = tiny()
    before = facts(file)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert facts(file).identity != before.identity
    with pytest.raises(ModelError, match="changed since it was checked"), models.unchanged(before):
        pass


def test_a_plan_reads_a_file_and_the_store_says_so(tiny, tmp_path, monkeypatch):
    import torch

    file, model = tiny()
    (tmp_path / "p.yaml").write_text(PLAN.format(id="tiny.gguf"))
    result = invoke("run", "p.yaml")
    assert result.exit_code == 0, result.output
    assert list(Path(os.environ["NSTEER_CACHE"]).glob("gguf/*/converted.json"))
    store = nsteer.open("out.zarr")
    assert store["models"].weights.sel(model="m").item() == "GGUF, dequantised: 39 F32"
    assert store["models"].gguf.sel(model="m").item() == str(file)
    ids = tinies.tokenizer(bos=False)("the cat sat on the mat", return_tensors="pt").input_ids
    with torch.no_grad():
        true = model(ids, output_hidden_states=True).hidden_states[2][0]  # after block 1
    seen = store["streams", "m"].stream.sel(model="m", read="whole", layer=1, prompt="a", edit="none", strength=0)
    assert np.allclose(seen.transpose("position", "d_model").values[: ids.shape[1]], true.numpy(), atol=1e-4)


def spoilt(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "cut":
        file.write_bytes(whole[:-5000])
    elif how == "cut in its header":
        file.write_bytes(whole[:3000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    elif how == "other":
        file.write_bytes(b"PK\x03\x04" + whole)
    elif how == "count":
        file.write_bytes(whole[:8] + (2**60).to_bytes(8, "little") + whole[16:])
    elif how == "length":
        at = whole.index(b"general.architecture") - 8
        file.write_bytes(whole[:at] + (2**60).to_bytes(8, "little") + whole[at + 8 :])


SPOILT = {
    "cut": "tiny.gguf, which is cut short; copy or download it again",
    "cut in its header": "tiny.gguf, which is cut short",
    "empty": "tiny.gguf, which is no GGUF file",
    "pointer": "tiny.gguf, a git-lfs pointer in place of the file: git lfs pull",
    "other": "tiny.gguf, which is no GGUF file",
    "count": "tiny.gguf, whose header is damaged",
    "length": "tiny.gguf, which is cut short",
}
STRANGE = {
    "of the architecture 'rwkv7'": dict(values=[("general.architecture", "rwkv7")]),
    "of a vision model (clip)": dict(values=[("general.architecture", "clip")]),
    "of a vision model (llama)": dict(values=[("general.type", "mmproj")]),
    "which holds no model but adapter": dict(values=[("general.type", "adapter")]),
    "one of 3 files of a model; join them": dict(values=[("split.count", 3)]),
    "whose embedding has 320 rows, fewer than its 330 tokens": dict(tokens=330),
    "one of three files of a model": dict(values=[("split.count", "three")]),
    "header says llama.block_count: 'four', not a whole number above 0": dict(values=[("llama.block_count", "four")]),
    "header says llama.block_count: 3, and its tensors are of 4 blocks": dict(values=[("llama.block_count", 3)]),
    "header says llama.embedding_length: 64, and its tensor token_embd.weight is of shape [32, 320]": dict(
        values=[("llama.embedding_length", 64)]
    ),
    "llama.feed_forward_length: 96, and its tensor blk.0.ffn_down.weight is of shape [48, 32]": dict(
        values=[("llama.feed_forward_length", 96)]
    ),
    "llama.attention.head_count: 3, and its tensor blk.0.attn_output.weight is of shape [32, 32]": dict(
        values=[("llama.attention.head_count", 3)]
    ),
    "header says tokenizer.ggml.eos_token_id: 100000, none of its 320 tokens": dict(
        values=[("tokenizer.ggml.eos_token_id", 100_000)]
    ),
    "header says tokenizer.ggml.bos_token_id: '<s>', none of its": dict(
        values=[("tokenizer.ggml.bos_token_id", "<s>")]
    ),
    "header says tokenizer.ggml.model: 'rwkv': transformers reads": dict(values=[("tokenizer.ggml.model", "rwkv")]),
    "header says tokenizer.chat_template, which is no text": dict(values=[("tokenizer.chat_template", 7)]),
    "whose header is damaged": dict(values=[("general.alignment", 7)]),
}


def one_line(file: Path, words: str) -> None:
    """`check` and `run` refuse a file in one located line, and write nothing."""
    Path("p.yaml").write_text(PLAN.format(id=file.name))
    before = set(os.listdir())
    for command in ("check", "run"):
        result = invoke(command, "p.yaml")
        lines = [line for line in result.output.splitlines() if "p.yaml:3" in line]
        assert result.exit_code != 0 and len(lines) == 1, result.output
        assert words in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output
    assert set(os.listdir()) - {"cache"} == before - {"cache"}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_is_not_whole_is_refused_in_a_line(tiny, how):
    file, _ = tiny()
    spoilt(file, how)
    one_line(file, SPOILT[how])


@pytest.mark.parametrize("words", STRANGE)
def test_a_file_of_another_kind_is_refused_in_a_line(tiny, words):
    file, _ = tiny(**STRANGE[words])
    one_line(file, words)


def test_a_file_that_is_not_there_is_refused_in_a_line(tmp_path):
    one_line(tmp_path / "none.gguf", "a file that does not exist")


def test_a_file_without_one_of_its_tensors_is_not_loaded(tiny):
    file, _ = tiny(without="blk.2.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.2\.mlp\.up_proj"), models.unchanged(facts(file)):
        pass
    assert not list((Path(os.environ["NSTEER_CACHE"]) / "gguf").glob("*/")), "nothing is left of it"


def test_a_header_without_what_it_must_say_is_refused_in_a_line(tiny):
    file, _ = tiny()
    file.write_bytes(file.read_bytes().replace(b"llama.block_count", b"llama.block_c0unt"))
    one_line(file, "whose header does not say llama.block_count; another file, or one converted again")


def test_whatever_is_damaged_in_a_header_is_one_line(tiny):
    """Bytes at random places, among them lengths beyond any file."""
    file, _ = tiny()
    whole, draw = file.read_bytes(), random.Random(0)
    end, seen = header.read(file).data, set()
    for _ in range(300):
        at = draw.randrange(end)
        spoiled = draw.choice([b"\xff" * 64, b"\x00" * 8, (2**40).to_bytes(8, "little"), draw.randbytes(2)])
        file.write_bytes(whole[:at] + spoiled + whole[at + len(spoiled) :])
        try:
            facts(file)
        except ModelError as error:
            assert "\n" not in str(error) and "tiny.gguf" in str(error)
            seen.add(str(error))
    assert len(seen) > 3


def test_a_file_of_joined_parts_is_whole(tiny):
    file, _ = tiny(values=[("split.count", 0), ("split.no", 0)])
    assert facts(file).n_layers == 4


def test_tensors_of_another_shape_are_not_converted(tiny):
    """What `check` can not tell from a header: transformers takes such tensors as they are."""
    file, _ = tiny(values=[("llama.attention.head_count_kv", 4)])
    words = r"k_proj.weight has the shape \[16, 32\], and \[32, 32\] by the config"
    with pytest.raises(ModelError, match=words), models.unchanged(facts(file)):
        pass
    assert not list((Path(os.environ["NSTEER_CACHE"]) / "gguf").glob("*/")), "nothing is left of it"


def test_what_is_no_file_of_a_model_says_what_would_be(tiny, tmp_path):
    file, _ = tiny()
    (tmp_path / "tiny.bin").write_bytes(file.read_bytes())
    (tmp_path / "folder.gguf").mkdir()
    for given, words in (
        (dict(id="tiny.bin"), "a file: a model is a directory, or a file whose name ends in .gguf"),
        (dict(id="folder.gguf"), "a directory where a file was meant"),
        (dict(id=str(tmp_path)), "without a config.json; beside it `gguf: folder.gguf` (and 1 more) would be read"),
        (dict(id=str(tmp_path), gguf="other.gguf"), "does not exist; beside it `gguf: folder.gguf`"),
        (dict(id="tiny.gguf", gguf="tiny.gguf"), "the file 'tiny.gguf' and a `gguf` in it: give one of the two"),
        (dict(id="org/na me", gguf="tiny.gguf"), "Repo id must use"),
    ):
        with pytest.raises(ModelError, match=re.escape(words)):
            models.facts(Model(**given))


def test_what_a_run_says_to_try_can_be_typed(tiny, tmp_path):
    """A label that is not the id, of a file in a folder of several: the command names all that makes the model."""
    (tmp_path / "many files").mkdir()
    tiny("many files/tiny.gguf")
    (tmp_path / "p.yaml").write_text(
        """
name: g
models: [{id: many files, gguf: tiny.gguf, label: m}]
directions: {up: {random: 1}}
steer: {vectors: {directions: [up]}, layers: [3, 1], strengths: [0.2], prompts: {a: tom}, generate: {max_new_tokens: 3}}
store: out.zarr
"""
    )
    said = invoke("run", "p.yaml", "--quiet").output
    (line,) = [line.strip() for line in said.splitlines() if "nsteer chat" in line]
    assert line == "nsteer chat 'many files' --label m --gguf tiny.gguf --vector out.zarr:random/up"
    words = [*shlex.split(line)[1:], "--max-new-tokens", "3"]
    talked = CliRunner().invoke(cli.main, words, input="tom\n/quit\n", catch_exceptions=False)
    assert talked.exit_code == 0 and "random/up × 0.1" in talked.output


def test_a_text_beyond_the_positions_is_told_where_none_could_count_before(tiny, tmp_path):
    """The first run of a file: its tokenizer is there once it is converted."""
    tiny(values=[("llama.context_length", 5)])
    (tmp_path / "p.yaml").write_text(PLAN.format(id="tiny.gguf"))
    told = "m: a text of 8 tokens goes beyond the 5 positions that it was made for"
    assert told in invoke("run", "p.yaml").output
    (tmp_path / "p.yaml").write_text(PLAN.format(id="tiny.gguf").replace("out", "out2"))
    again = " ".join(invoke("run", "p.yaml").output.split())
    assert told not in again and "at most the 5 positions that m was made for" in again


def test_a_file_in_a_folder_of_several(tiny, tmp_path):
    file, _ = tiny()
    assert facts(tmp_path, gguf="tiny.gguf").identity == facts(file).identity
    with pytest.raises(ModelError, match="a file that does not exist"):
        facts(tmp_path, gguf="other.gguf")


def test_a_file_on_the_hub_is_known_by_its_first_bytes(tiny, monkeypatch):
    """The header, the commit and the hash come from the hub; the file itself is fetched to be loaded."""
    import huggingface_hub

    file, _ = tiny()
    digest = facts(file).identity.removeprefix("sha256:")
    told = SimpleNamespace(commit_hash="c0ffee", size=file.stat().st_size, etag=digest)
    opened: list[str] = []
    monkeypatch.setattr(models.hub, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: told)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, filename, revision: str(file))
    system = SimpleNamespace(open=lambda path, mode, block_size: opened.append(path) or file.open("rb"))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: system)
    model_facts = models.facts(Model(id="org/tiny-GGUF", gguf="tiny.gguf"))
    assert opened == ["org/tiny-GGUF@c0ffee/tiny.gguf"] and model_facts.revision == "c0ffee"
    assert (model_facts.label, model_facts.identity) == ("org/tiny-GGUF", f"sha256:{digest}")
    with models.unchanged(model_facts):
        assert converting.is_there(Path(model_facts.name_or_path))


def test_the_sizes_of_tensors_are_those_of_the_format():
    from gguf.constants import GGML_QUANT_SIZES

    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    ours = {kind: known for kind, known in header.TYPES.items() if kind in theirs}
    assert ours == {kind: theirs[kind] for kind in ours} and len(ours) >= 28


def test_architectures_are_those_that_transformers_reads():
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as theirs

    ours = {*header.DECODERS, *header.DECODERS.values()}
    assert {name for name in header.DECODERS if name not in theirs and header.DECODERS[name] not in theirs} == set()
    assert not ours & header.IMAGES
    assert set(header.SPECIAL.values()) == {"bos", "eos", "unk", "pad", "sep", "mask"}


def test_a_vocabulary_of_262_thousand_tokens_is_stepped_over(tmp_path):
    """And none of its tokens is made into a text of Python, whose making is what costs."""
    file, _ = tmp_path / "tiny.gguf", ggufs.write(tmp_path / "tiny.gguf", tokens=262_144)
    file_header = header.read(file)
    listed = file_header.values["tokenizer.ggml.tokens"]
    assert file_header.tokens == 262_144 and not isinstance(listed, (list, tuple))
    assert listed[262_143] == f"<more{262_143 - tinies.VOCAB}>" and listed[tinies.BOS_ID] == "<s>"


def test_checking_a_file_imports_neither_torch_nor_transformers(tiny, tmp_path):
    tiny()
    (tmp_path / "p.yaml").write_text(PLAN.format(id="tiny.gguf"))
    heavy = "{'torch', 'transformers', 'gguf'}"
    code = f"import sys, nsteer.plan.check as c; c.load('p.yaml'); print({heavy} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert said.stdout.strip() == "set()"


def test_folders_lie_apart_by_the_version_that_made_them(monkeypatch):
    before = gguf.folder("0" * 64)
    monkeypatch.setattr(converting, "version", lambda name: "9.9")
    assert gguf.folder("0" * 64) != before
