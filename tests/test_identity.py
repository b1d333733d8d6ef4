"""Identity: every file that loading a model may read, at every use; nothing is stored under another's name."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

import nsteer
from nsteer import zoo
from nsteer.errors import ModelError
from nsteer.models import facts as models
from nsteer.models import folders
from nsteer.plan import texts
from nsteer.plan.schema import Model
from nsteer.store import Store


@pytest.fixture
def llama(tmp_path) -> Path:
    return Path(shutil.copytree(zoo.path("llama"), tmp_path / "llama"))


def seen(folder: Path) -> tuple[str, str]:
    facts = models.facts(Model(id=str(folder), label="m"))
    return facts.identity, facts.tokenizer


OTHERS = ("own.py", "pkg/code.py", "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json")
OTHERS += ("shards/model-1.safetensors", "pytorch_model.bin", "model.pth", "generation_config.json", "config.json")
WORDS = (
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "tokenizer.model.v3",
)
WORDS += (
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "additional_chat_templates/tools.jinja",
    "qwen.tiktoken",
)
WORDS += (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.mark.parametrize("name", [*OTHERS, *WORDS])
def test_every_file_that_loading_may_read_is_seen(llama, name):
    """As it comes, and as it changes: of the tokenizer there, of all else in the identity."""
    before, file = seen(llama), llama / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((file.read_bytes() if file.is_file() else b"{}") + b" ")
    after = seen(llama)
    assert (before[0] != after[0], before[1] != after[1]) == (name in OTHERS, name in WORDS)
    file.write_bytes(file.read_bytes()[:-1] + b"\n")
    assert seen(llama) not in (before, after)


@pytest.mark.parametrize(
    "name",
    ["README.md", ".git/config", "__pycache__/a.pyc", "runs.zarr/x", "plan.yaml", "a.png", "checkpoint-10/model.bin"],
)
def test_what_loading_never_reads_is_not(llama, name):
    before = seen(llama)
    (llama / name).parent.mkdir(exist_ok=True)
    (llama / name).write_text("x")
    assert seen(llama) == before


def test_a_file_changed_in_place_with_its_time_set_back_is_seen(llama):
    file = llama / "model.safetensors"
    before, times = seen(llama), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    with file.open("r+b") as stream:
        stream.write(whole)
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1] and seen(llama)[0] != before[0]


def test_a_hash_is_remembered_by_the_file_and_only_once_it_has_settled(llama, monkeypatch):
    (stamp,) = (file_stamp for file_stamp in folders.stamps(llama) if file_stamp.name == "model.safetensors")
    monkeypatch.setattr(folders, "_REMEMBERED", {})
    folders.content(stamp)
    assert stamp not in folders._REMEMBERED, "written a moment ago: a clock may not tell the next change"
    monkeypatch.setattr(folders, "SETTLED", -(10**18))
    held = folders.content(stamp)
    (llama / "model.safetensors").rename(llama / "other.bin")
    assert folders.content(stamp) == held
    with pytest.raises(ModelError, match=r"a file 'model\.safetensors' that can not be read: No such file"):
        monkeypatch.setattr(folders, "_REMEMBERED", {})
        folders.content(stamp)


def test_a_large_file_is_hashed_once_for_all_processes_and_again_when_it_changed(llama, monkeypatch, tmp_path):
    """Also one that was changed in place and whose time was set back: its change time (ctime) no one can set."""
    monkeypatch.setenv("NSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "LARGE", 1000)
    monkeypatch.setattr(folders, "SETTLED", -(10**18))
    file = llama / "model.safetensors"
    own, read = folders.hashlib.file_digest, []
    monkeypatch.setattr(folders.hashlib, "file_digest", lambda *given: read.append(1) or own(*given))

    def again() -> str:
        """As another process would."""
        monkeypatch.setattr(folders, "_REMEMBERED", {})
        return folders.content(folders.stamp(file))

    first = again()
    assert (again(), len(read)) == (first, 1)
    for kept in (tmp_path / "cache" / "hashes").iterdir():
        kept.write_text("nonsense")
    assert (again(), len(read)) == (first, 2), "what is no hash is not believed"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    os.utime(file, ns=times)
    second = again()
    assert second != first and len(read) == 3 and folders.stamp(file).modified == times[1]
    shutil.copy2(file, llama / "copy")
    os.replace(llama / "copy", file)
    assert (again(), len(read)) == (second, 4), "another file of the same name, size and time"


def test_a_link_that_is_switched_switches_nothing_that_was_checked(llama, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(llama)
    facts = models.facts(Model(id=str(link), label="m"))
    link.unlink()
    link.symlink_to(zoo.path("gpt2"))
    assert Path(facts.name_or_path) == llama.resolve()
    with models.unchanged(facts):
        pass
    assert seen(link) == seen(Path(zoo.path("gpt2")))


def test_what_changes_before_or_while_it_is_loaded_is_not_loaded(llama):
    facts = models.facts(Model(id=str(llama), label="m"))
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    with pytest.raises(ModelError, match="changed while it was being loaded: run again"), models.unchanged(facts):
        weights.write_bytes(whole[:-1] + b"\7")
        weights.write_bytes(whole)  # and back again
    with models.unchanged(facts):
        pass
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="changed since it was checked: run again"), models.unchanged(facts):
        raise AssertionError("loaded")
    shutil.rmtree(llama)
    with pytest.raises(ModelError, match="is gone since it was checked"), models.unchanged(facts):
        raise AssertionError("loaded")


def test_links_in_a_circle_and_pipes_end_no_hash(llama):
    before = seen(llama)
    (llama / "sub").mkdir()
    (llama / "sub" / "up").symlink_to(llama)
    os.mkfifo(llama / "pipe")
    (llama / "broken").symlink_to("nowhere")
    assert seen(llama) == before


def test_texts_that_change_in_one_process_are_read_anew(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nemotions: {glad: positive}\ntopics: [one]\n")
    times = file.stat().st_mtime_ns
    assert texts.load(file).topics == ["one"]
    file.write_text("name: own\nemotions: {glad: positive}\ntopics: [two]\n")
    os.utime(file, ns=(times, times))
    assert texts.load(file).topics == ["two"]


PLAN = """\
name: p
models: [{{id: {model}, label: m}}]
texts: zoo
emotions: [happy, sad]
methods: {{r: {{source: comprehension, samples: 2, baseline: rest, chat: always, pooling: mean}}}}
layers: [4, 2]
store: {store}
threads: 1
"""


def loaded(tmp_path: Path, model: Path, name: str = "s.zarr") -> nsteer.Study:
    (tmp_path / "p.yaml").write_text(PLAN.format(model=model, store=tmp_path / name))
    return nsteer.load(str(tmp_path / "p.yaml"), allow_outside=True)


def pooled(store: Path):
    return nsteer.open(store)["activations/m"].pooled.load()


def test_one_process_gives_changed_weights_and_a_changed_template_their_own_cells(llama, tmp_path):
    """What a notebook does: run, change weights and template, run again: all again, as in a store of its own."""
    assert not nsteer.run(loaded(tmp_path, llama)).failures
    first = pooled(tmp_path / "s.zarr")
    shutil.copy(Path(zoo.path("llama")) / "model.safetensors", llama / "model.safetensors")
    assert nsteer.run(loaded(tmp_path, llama)).done == {}, "the same bytes are the same model"
    weights = bytearray((llama / "model.safetensors").read_bytes())
    weights[-4000:] = weights[-8000:-4000]
    (llama / "model.safetensors").write_bytes(weights)
    (llama / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    again = nsteer.run(loaded(tmp_path, llama))
    assert not again.failures and again.done["activations"] == again.done["samples"] == 3
    nsteer.run(loaded(tmp_path, llama, "alone.zarr"))
    assert pooled(tmp_path / "s.zarr").equals(pooled(tmp_path / "alone.zarr")) and not pooled(
        tmp_path / "s.zarr"
    ).equals(first)


def test_weights_replaced_between_check_and_load_store_nothing(llama, tmp_path):
    study = loaded(tmp_path, llama)
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:-4] + b"\1\2\3\4")
    summary = nsteer.run(study)
    (failure,) = summary.failures
    assert failure.kind == "transient" and failure.reason == f"{str(llama)!r} changed since it was checked: run again"
    assert "\n" not in failure.reason and not Store(tmp_path / "s.zarr").committed("models")
    assert not nsteer.run(loaded(tmp_path, llama)).failures


def test_weights_replaced_while_they_are_loaded_store_nothing(llama, tmp_path, monkeypatch):
    from nsteer.runner import model

    create = model.create

    def slowly(*given, **named):
        executor = create(*given, **named)
        time.sleep(0.01)
        (llama / "model.safetensors").write_bytes(Path(zoo.path("llama"), "model.safetensors").read_bytes())
        return executor

    study = loaded(tmp_path, llama)
    with monkeypatch.context() as patched:
        patched.setattr(model, "create", slowly)
        (failure,) = nsteer.run(study).failures
    assert failure.kind == "transient" and "changed while it was being loaded: run again" in failure.reason
    assert not Store(tmp_path / "s.zarr").committed("models")
    assert not nsteer.run(loaded(tmp_path, llama)).failures


def test_verify_reads_the_files_of_models_again_whatever_is_remembered(llama, tmp_path, monkeypatch):
    """A disk that changes a file and leaves its size and times: nothing but its content can tell."""
    from click.testing import CliRunner

    from nsteer import cli
    from nsteer.upkeep.verify import verify

    (tmp_path / "p.yaml").write_text(
        "name: p\nmodels: [{id: llama, label: m}]\nprompts: [hello]\nreads: {x: {}}\nstore: p.zarr\n"
    )
    run = lambda *words: CliRunner().invoke(cli.main, list(words), catch_exceptions=False)  # noqa: E731
    assert run("run", "p.yaml").exit_code == 0
    assert not verify(Store("p.zarr")).notes
    old = folders.stamp(llama / "model.safetensors", "model.safetensors")
    before, was = folders.content(old), (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    stamp = folders.stamp(llama / "model.safetensors", "model.safetensors")
    monkeypatch.setitem(folders._REMEMBERED, stamp, before)
    assert folders.content(stamp) == before, "remembered, and wrong"
    (note,) = verify(Store("p.zarr")).notes
    assert note == "model m: llama holds other files than those that its cells were made from"
    result = run("verify", "p.zarr")
    assert result.exit_code == 0 and f"note: {note}" in " ".join(result.output.split())
    shutil.rmtree(llama)
    assert not verify(Store("p.zarr")).notes, "no files here: nothing to say"
