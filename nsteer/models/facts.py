"""Turns a model's name into facts read from its JSON files, before any weights are loaded.

Imports neither torch nor transformers: depth, width, chat template and identity are all in small files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nsteer import zoo
from nsteer.errors import ModelError, did_you_mean
from nsteer.models import contexts, folders, gguf, templates
from nsteer.program import budget
from nsteer.system import hub

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
"""Labels of the `model` axis: they name groups of the store."""

DEPTH_KEYS = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
LARGEST = 2**31
"""No depth and no width of a model is this large."""
BLOCK_KEYS = ("layers_block_type", "layer_types")
"""Lists of a config with an entry a block: some hybrid models say their depth in no other way (Nemotron-H)."""
TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a checkpoint of several modalities keeps the config of its text decoder."""
OF_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|added_tokens|special_tokens|chat_template|additional_chat_templates/|tekken|spiece"
    r"|sentencepiece|preprocessor_config|processor_config|bpe)(?!.*\.py$).*|.*\.(model|spm|tiktoken|jinja)"
)
"""Files of a local directory that decide which tokens a model reads; all others decide what it makes of them."""

WEIGHTS = (".safetensors", ".bin")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Facts:
    """What is known of a model without its weights.

    `identity` names the model exactly: the commit on the hub, or a hash of all files of a local directory that loading
    it may read, but those of the tokenizer: own code, adapters and shards in subfolders too.
    `tokenizer` is a hash of the tokenizer's files, chat templates included.
    """

    label: str
    id: str
    name_or_path: str  # what from_pretrained gets: an id or a directory; of a GGUF file, that which it is converted to
    revision: str | None
    identity: str
    tokenizer: str
    n_layers: int
    d_model: int
    model_type: str
    bytes: int = 0  # size of the weight files, 0 where unknown
    is_classifier: bool = False
    classes: tuple[str, ...] = ()  # of a classifier
    shape: budget.Shape | None = None
    context: contexts.Context | None = None
    template: templates.Template | None = None  # of chats
    head: str = "softmax"  # of a classifier: what its logits are
    gguf: str = ""  # the file, where the model is one; of a model on the hub its name there
    weights: str = ""  # how a GGUF file keeps them
    adapter: str = ""  # directory of what is merged into it

    @property
    def base(self) -> str:
        """Identity of the model without its adapter."""
        return self.identity.partition(MERGED)[0]

    @property
    def judging(self) -> str:
        """What a judge's verdicts depend on: all its files, those of the tokenizer too."""
        return f"{self.identity} {self.tokenizer}"

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None


def facts(spec: Any) -> Facts:
    """The facts of a `nsteer.plan.schema.Model`.

    Raises ModelError when it or its adapter can not be found, or its config does not tell depth and width.
    """
    base_facts = _of_base(spec)
    if not spec.peft:
        return base_facts
    folder = Path(os.path.expanduser(spec.peft))
    if not os.path.isfile(folder / "adapter_config.json"):
        raise ModelError(f"the adapter {spec.peft!r}, which is no directory with an adapter_config.json")
    if not any(os.path.isfile(folder / name) for name in ADAPTERS):
        raise ModelError(f"the adapter {spec.peft!r}, without {' or '.join(ADAPTERS)}")
    return replace(
        base_facts, identity=f"{base_facts.identity}{MERGED}{_adapter(folder)}", adapter=str(folder.resolve())
    )


ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
MERGED = " + adapter sha256:"
"""Between the identity of a model and the hash of the adapter that is merged into it."""


def _adapter(folder: Path) -> str:
    """One hash of an adapter's files. Raises ModelError."""
    return _hash_folder(tuple((stamp.name, folders.content(stamp)) for stamp in folders.stamps(folder)))


def _of_base(spec: Any) -> Facts:
    if spec.gguf or spec.id.endswith(gguf.SUFFIX):
        return _of_gguf(spec)
    folder = local_folder(spec.id)
    if folder is None:
        folder, commit = _hub_folder(spec.id, spec.revision)
        files = [(name, folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()]
        tokenizer = _hash_folder(tuple((name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in files))
        return _facts(spec, folder, spec.id, commit, commit, tokenizer, 0)
    name_or_path = _unlinked(folder)
    for _ in range(3):
        before = folders.stamps(folder)
        size = sum(stamp.size for stamp in before if stamp.name.endswith(WEIGHTS))
        base_facts = _facts(spec, folder, name_or_path, None, *_hashes(before), size)
        if folders.stamps(folder) == before:
            return base_facts
    raise ModelError(f"{spec.id!r}, whose files change while they are read: run again")


def _facts(
    spec: Any, folder: Path, name_or_path: str, revision: str | None, identity: str, tokenizer: str, size: int
) -> Facts:
    config = _config(folder)
    text = _text(config)
    n_layers, d_model = _depth(text, folder), _first(text, WIDTH_KEYS, folder)
    return Facts(
        label_of(spec),
        spec.id,
        name_or_path,
        revision,
        identity,
        tokenizer,
        n_layers,
        d_model,
        config.get("model_type", ""),
        size,
        is_classifier(folder),
        _classes(config),
        budget.shape(config, n_layers, d_model),
        context=contexts.context(config),
        template=templates.of_folder(folder),
        head=head_of(folder)[0],
    )


def _of_gguf(spec: Any) -> Facts:
    """The facts of a model in a GGUF file: of its header alone. Raises ModelError."""
    file = gguf_file(spec)
    if file is None:
        name, commit, (size, digest), header = _hub_gguf(spec.id, spec.gguf, spec.revision)
    else:
        name, commit, size, digest = str(file), None, file.stat().st_size, folders.content(folders.stamp(file))
        header = gguf.read(file)
    for fault in gguf.faults(header, Path(name).name, size):
        raise ModelError(f"{fault.found}; {fault.hint}")
    config = gguf.config(header)
    n_layers, d_model = (_first(config, keys, Path(name)) for keys in (DEPTH_KEYS, WIDTH_KEYS))
    template = gguf.template(header)
    return Facts(
        label_of(spec),
        spec.id,
        str(gguf.folder(digest)),
        commit,
        HASHED + digest,
        digest[:16],
        n_layers,
        d_model,
        config["model_type"],
        size,
        shape=budget.shape(config, n_layers, d_model),
        context=contexts.context(config),
        template=templates.Template(template, tuple(gguf.special(header).items())) if template else None,
        gguf=name,
        weights=f"GGUF, dequantised: {header.types}",
    )


def converted(known: Facts) -> Path:
    """Where this machine has, or will have, what a GGUF file is converted to."""
    return gguf.folder(known.base.removeprefix(HASHED))


def gguf_file(spec: Any) -> Path | None:
    """The GGUF file of a model's entry; None where it lies on the hub. Raises ModelError when it is not there."""
    path = Path(os.path.expanduser(spec.id))
    if spec.gguf:
        if os.path.isfile(path):
            raise ModelError(f"the file {spec.id!r} and a `gguf` in it: give one of the two")
        if local_folder(spec.id, config=False) is None:
            return None
        path /= spec.gguf
    if os.path.isdir(path):
        raise ModelError(f"{str(path)!r}, a directory where a file was meant{_ggufs(path)}")
    if not os.path.isfile(path):
        raise ModelError(f"{str(path)!r}, a file that does not exist{_ggufs(path.parent) if spec.gguf else ''}")
    return path.resolve()


def _ggufs(folder: Path) -> str:
    """What to say of the GGUF files that lie in a directory."""
    names = sorted(file.name for file in folder.glob(f"*{gguf.SUFFIX}"))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"; beside it `gguf: {names[0]}`{more} would be read" if names else ""


def _hub_gguf(name: str, file: str, revision: str | None) -> tuple[str, str, tuple[int, str], gguf.Header]:
    """Of a GGUF file on the hub: its name, the commit, size and SHA-256, and its header, of which alone it is read."""
    from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not hub.reachable():
        try:
            cached = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError as error:
            raise ModelError(f"{name!r}: {str(error).splitlines()[0]}") from error
        if not isinstance(cached, str):
            raise ModelError(f"{file!r} of {name!r}, not in the local cache, and the hub can not be reached")
        path, commit = Path(cached), Path(cached).parents[file.count("/")].name
        return file, commit, (path.stat().st_size, folders.content(folders.stamp(path))), gguf.read(path)
    try:
        told = get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
        with HfFileSystem().open(f"{name}@{told.commit_hash}/{file}", "rb", block_size=2**22) as stream:
            header = gguf.grown(stream, told.size or 0, file)
    except ModelError:
        raise
    except Exception as error:  # no such repository, file or revision, a gate: the hub's own words say which
        raise ModelError(f"{file!r} of {name!r}: {str(error).splitlines()[0]}") from error
    return file, str(told.commit_hash), (told.size or 0, str(told.etag)), header


def _unlinked(folder: Path) -> str:
    """The directory itself where a link leads to it, so that a link which is switched later switches nothing here."""
    real = folder.resolve()
    return str(folder if real == Path(os.path.abspath(folder)) else real)


@contextmanager
def unchanged(known: Facts, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Around the loading of a model: what is loaded is what `known` says, and it is there to be loaded.

    tell : is told, in a line, that a GGUF file is being converted
    Raises ModelError for a local directory or a file that changed since, before anything is loaded or after.
    """
    with _unchanged_base(known, tell):
        yield
    if known.adapter and _adapter(Path(known.adapter)) != known.identity.partition(MERGED)[2]:
        raise ModelError(f"the adapter of {known.id!r} changed since it was checked: run again")


@contextmanager
def _unchanged_base(known: Facts, tell: Callable[[str], None]) -> Iterator[None]:
    if known.gguf:
        _convert(known, tell)
        yield
        return
    if not os.path.isdir(known.name_or_path):
        if known.base.startswith(HASHED):
            raise ModelError(f"{known.id!r} is gone since it was checked: run again")
        yield  # a commit on the hub: another one has another name
        return
    before = folders.stamps(Path(known.name_or_path))
    if _hashes(before) != (known.base, known.tokenizer):
        raise ModelError(f"{known.id!r} changed since it was checked: run again")
    yield
    if folders.stamps(Path(known.name_or_path)) != before:
        raise ModelError(f"{known.id!r} changed while it was being loaded: run again")


def _convert(known: Facts, tell: Callable[[str], None]) -> None:
    """Has the folder that a GGUF file is converted to. Raises ModelError for a file that changed since."""
    digest = known.base.removeprefix(HASHED)
    if gguf.is_there(Path(known.name_or_path)):
        return  # made of that very file, whatever became of it
    file = Path(known.gguf)
    if known.revision is not None:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(known.id, known.gguf, revision=known.revision))
        except Exception as error:  # as for its header
            raise ModelError(f"{known.gguf!r} of {known.id!r}: {str(error).splitlines()[0]}") from error
    if folders.content(folders.stamp(file)) != digest:
        raise ModelError(f"{known.id!r} changed since it was checked: run again")
    gguf.converted(file, digest, tell)


def _hashes(files: Iterable[folders.Stamp]) -> tuple[str, str]:
    """Identity and tokenizer of a local directory, by its files."""
    hashed = [(file.name, folders.content(file)) for file in files]
    own = [pair for pair in hashed if OF_TOKENIZER.fullmatch(pair[0])]
    return HASHED + _hash_folder(tuple(pair for pair in hashed if pair not in own)), _hash_folder(tuple(own))


HASHED = "sha256:"
"""Before the identity of a local directory."""


@lru_cache(maxsize=64)
def _hash_folder(files: tuple[tuple[str, str], ...]) -> str:
    """One hash of files, each a name and the hash of its content."""
    digest = hashlib.sha256("".join(f"{name}\0{content}\n" for name, content in files).encode())
    return digest.hexdigest()[:16]


def is_classifier(folder: Path) -> bool:
    """Whether a model directory says that it classifies texts. Raises ModelError when it can not be read."""
    named = _config(folder).get("architectures") or []
    return any("ForSequenceClassification" in str(name) for name in named)


def head(config: dict[str, Any], classes: int) -> str:
    """What a classifier's logits are, by its config: logits of a `softmax`, of a `sigmoid` each, or of a `regression`.

    classes : how many it has; one alone is a sigmoid, as in transformers' text-classification pipeline
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return "regression"
    return "sigmoid" if kind == "multi_label_classification" or classes == 1 else "softmax"


def head_of(folder: Path) -> tuple[str, int]:
    """The head of the classifier in a directory, and how many classes it has. Raises ModelError."""
    config = _config(folder)
    classes = len(_classes(config)) or 2  # transformers' own number where a config has none
    return head(config, classes), classes


def _classes(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's classes in the order of its logits; () where its config has none."""
    names = config.get("id2label")
    if isinstance(names, dict) and all(str(place).isdigit() for place in names):
        return tuple(str(names[place]) for place in sorted(names, key=int))
    return ()


def label_of(spec: Any) -> str:
    """A model's label on the `model` axis: the plan's, else its id, of a local directory its name."""
    if spec.label:
        return spec.label
    if spec.id.endswith(gguf.SUFFIX):
        return Path(spec.id).stem
    return Path(spec.id).name if spec.id.startswith((".", "/", "~")) or os.path.isdir(spec.id) else spec.id


def local_folder(name: str, config: bool = True) -> Path | None:
    """The directory of a zoo model or a local one; None for a hub id. Raises ModelError when it is not there.

    config : whether one without a config.json is refused
    """
    if name.startswith("zoo/"):
        short = name.removeprefix("zoo/")
        known = zoo.names()
        if short not in known:
            raise ModelError(f"{name!r}, which the zoo does not have ({did_you_mean(short, known)})")
        return _with_config(Path(zoo.path(short)), name)
    path = Path(os.path.expanduser(name))  # leaves a user who does not exist as it is
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long, or a folder that may not be looked into
        return _with_config(path, name) if config else path
    if os.path.isfile(path):
        raise ModelError(f"{name!r}, a file: a model is a directory, or a file whose name ends in {gguf.SUFFIX}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name!r}, a directory that does not exist")
    return None


def _with_config(path: Path, name: str) -> Path:
    adapter = path / "adapter_config.json"
    base = _json(adapter).get("base_model_name_or_path") if os.path.isfile(adapter) else None
    if base:  # it would be loaded from elsewhere
        raise ModelError(
            f"the directory {name!r}, an adapter (PEFT) of {str(base)!r}: give that model's id, and this directory as "
            "its `peft`"
        )
    if not os.path.isfile(path / "config.json"):
        raise ModelError(f"the directory {name!r} without a config.json{_ggufs(path)}")
    return path


def _hub_folder(name: str, revision: str | None) -> tuple[Path, str]:
    """The cached snapshot folder of a hub model's small files, and the commit it belongs to."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    away = not hub.reachable()
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=away))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{name!r}, not in the local cache, and the hub can not be reached") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name!r}, which is neither a directory here nor a model on the hub") from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{name!r}, a hub repository without a config.json (an adapter? give its model's id, and a directory with "
            "the adapter as `peft`)"
        ) from error
    except Exception as error:  # bad revision, bad id, gated repository: the hub's own words say which
        raise ModelError(f"{name!r}: {str(error).splitlines()[0]}") from error
    commit = config.parent.name
    for file in TOKENIZER_FILES:
        if try_to_load_from_cache(name, file, revision=commit) is not None:
            continue  # there, or known not to be
        try:
            hf_hub_download(name, file, revision=commit, local_files_only=away)
        except LocalEntryNotFoundError:
            break  # the hub can not be reached: asking for the others would only take its time
        except EntryNotFoundError:
            continue  # no model has all of them
    return config.parent, commit


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"a {path.name} that can not be read: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"a {path.name} that holds no JSON object")
    return fields


TYPES = {"model_type": str, "architectures": list}
"""Fields of a config.json that decide how the rest is read -> their types; null counts as left out."""


def _config(folder: Path) -> dict[str, Any]:
    """What a config.json holds. Raises ModelError where it can not be read, or a field of TYPES is of another type."""
    config = _json(folder / "config.json")
    for part in (config, _text(config)):
        for name, kind in TYPES.items():
            if part.get(name) is not None and not isinstance(part[name], kind):
                what = "text" if kind is str else "list"
                raise ModelError(f"a config.json in {folder.name!r} whose {name} is {part[name]!r}, no {what}")
    return config


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the text decoder."""
    inner = next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), dict)), None)
    return config if inner is None else _text(inner)


def _depth(config: dict[str, Any], folder: Path) -> int:
    kinds: list[Any] = next(
        (config[key] for key in BLOCK_KEYS if isinstance(config.get(key), list) and config[key]), []
    )
    if kinds and not any(key in config for key in DEPTH_KEYS):
        return len(kinds)
    return _first(config, DEPTH_KEYS, folder)


def _first(config: dict[str, Any], keys: tuple[str, ...], folder: Path) -> int:
    for key in keys:
        if 0 < (value := budget.count(config.get(key))) < LARGEST:
            return value
    raise ModelError(f"a config.json in {folder.name!r} that has none of {', '.join(keys)}")
