"""Turns a model directory into what is wrong with its files, before anything is loaded, and into its parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsteer.models.facts import Facts

POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that git-lfs has left in place of the true one."""

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
LONGEST_HEADER = 100_000_000
"""Bytes of the longest header of a safetensors file that its library reads."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a model, and what to do.

    transient : whether the file may still be on its way: a copy or a download that has not ended
    expected : in its place
    """

    found: str
    hint: str
    transient: bool = False
    expected: str = "a model directory that is whole"


def faults(folder: Path, weights: bool = True) -> list[Fault]:
    """What is wrong with the files of a model directory.

    weights : whether the weights are looked at as well
    """
    pointer_faults = list(_pointers(folder, weights))
    if pointer_faults or not weights:
        return pointer_faults
    names, missing = _shards(folder)
    if missing:
        return [Fault(missing, "copy the whole directory")]
    return [fault for name in names if (fault := _fault(folder / name)) is not None]


def of_model(facts: Facts, weights: bool = True) -> Iterator[Fault]:
    """The first of what is wrong with the files of a model directory; none of a model on the hub, or in a GGUF file.

    weights : whether the weights are looked at as well
    """
    folder = Path(facts.name_or_path)
    if facts.gguf or not folder.is_dir():
        return
    for fault in faults(folder, weights):
        yield replace(fault, found=f"{facts.id!r}: {fault.found}")
        return
    file = "tokenizer.json"
    try:
        rows, tokens = facts.shape.vocab if facts.shape else 0, vocabulary(folder)
        file = "generation_config.json"  # of which transformers takes nothing, without a word, where it can not be read
        json.loads((folder / file).read_bytes() if (folder / file).is_file() else b"{}")
    except (OSError, ValueError):
        yield Fault(f"{facts.id!r}: {file}, which can not be read", "copy or download it again")
        return
    if weights and 0 < rows < tokens:
        actual = f"{facts.id!r}, with {tokens:,} tokens in its tokenizer.json and {rows:,} rows of its embedding"
        yield Fault(actual, "is it another model's?", expected="a tokenizer of this model")
    if weights and (lost := lacks(folder)):
        yield Fault(f"{facts.id!r}, without {lost}", "", transient=True)


def of_adapter(facts: Facts) -> Iterator[Fault]:
    """The first of what is wrong with the files of a model's adapter; and whether it names another model."""
    if not facts.adapter:
        return
    folder, expected = Path(facts.adapter), f"an adapter of {facts.id!r}"
    for fault in adapter_faults(folder, facts.n_layers, facts.d_model):
        yield replace(fault, found=f"{folder.name!r}: {fault.found}", expected=expected)
        return
    base = adapted(folder)
    if base and Path(base).name != Path(facts.id).name:
        yield Fault(f"{folder.name!r}, of {base!r} by its config", "is it a copy of that model?", True, expected)


def adapter_faults(folder: Path, n_layers: int, d_model: int) -> list[Fault]:
    """What is wrong with the files of an adapter for a model of so many blocks and such a width.

    Told of tensors in safetensors alone. What it has of blocks that the model lacks would be left out without a word.
    """
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return [Fault("adapter_config.json, which can not be read", "copy or download it again")]
    if any(word in str(kind) for word in UNMERGED):
        return [Fault(f"adapter_config.json, of the kind {kind}", "what adds to weights, as LoRA does, can be merged")]
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return []
    if _begins(file, len(POINTER)) == POINTER:
        return [Fault(f"{file.name}, a git-lfs pointer in place of the file", "git lfs pull")]
    if (fault := _fault(file)) is not None:
        return [fault]
    shapes = {name: entry["shape"] for name, entry in _header(file).items() if name != "__metadata__"}
    blocks = 1 + max((int(match[1]) for name in shapes if (match := BLOCK.search(name))), default=-1)
    if blocks > n_layers:
        return [Fault(f"{file.name}, of a model of at least {blocks} blocks", f"this one has {n_layers}")]
    for name, shape in shapes.items():
        if READS_STREAM.search(name) and len(shape) == 2 and shape[1] != d_model:
            return [Fault(f"{file.name}, of a model of width {shape[1]} ({name})", f"this one's is {d_model}")]
    return []


UNMERGED = ("PROMPT", "PREFIX", "P_TUNING")
"""In the names of kinds of adapters that put something before a text, and change no weight."""

BLOCK = re.compile(r"\.([0-9]{1,6})\.")
READS_STREAM = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value)\.lora_A\.weight$")


def adapted(folder: Path) -> str:
    """The model that an adapter says it was made for; "" where it does not say."""
    try:
        return str(json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def vocabulary(folder: Path) -> int:
    """Tokens of a directory's tokenizer.json, those added to it later not counted; 0 where there is none to read.

    Raises ValueError for a file that is no JSON.
    """
    try:
        model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
        return len(model["vocab"])
    except (OSError, LookupError, TypeError):
        return 0


def lacks(folder: Path) -> str:
    """What `from_pretrained` will ask for and surely not find in a model directory; "" where it may."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "weights"
    if not any((folder / name).is_file() for name in TOKENIZERS) and not any(folder.glob("*.tiktoken")):
        return "a tokenizer"
    return ""


def parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a directory, from their headers; 0 where there are none, or one is faulty."""
    if not folder.is_dir():
        return 0
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as held:
                total += sum(math.prod(held.get_slice(name).get_shape()) for name in held.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
    return total


def counter(name_or_path: str, revision: str | None) -> Callable[..., int] | None:
    """What counts the tokens of a text as a model's tokenizer does; None where no `tokenizer.json` can be read here.

    It takes the text, and whether the tokenizer adds its special tokens (a chat template brings its own).

    name_or_path : a model directory, or the id of a model on the hub, whose cached files are looked at
    """
    file = _tokenizer_file(name_or_path, revision)
    if file is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # it raises Exception itself for a file that is none; who loads the model says so
        return None

    @lru_cache(maxsize=65536)
    def length(text: str, special: bool = True) -> int:
        return len(tokenizer.encode(text, add_special_tokens=special).ids)

    return length


def countable(name_or_path: str, revision: str | None) -> bool:
    """Whether `counter` has a file to count by."""
    return _tokenizer_file(name_or_path, revision) is not None


def _tokenizer_file(name_or_path: str, revision: str | None) -> Path | None:
    """The tokenizer.json of a model directory, or of a model on the hub in its cache; None where there is none."""
    file: Path | str | None = Path(name_or_path) / "tokenizer.json"
    if not Path(name_or_path).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name_or_path, "tokenizer.json", revision=revision)
        except HFValidationError:
            return None
        file = cached if isinstance(cached, str) else None
    return Path(file) if file is not None and Path(file).is_file() else None


def _pointers(folder: Path, weights: bool) -> Iterator[Fault]:
    """One fault for all files that git-lfs has not fetched."""
    files = [folder / name for name in TEXT_FILES]
    files += [file for kind in ("*.safetensors", "*.bin") for file in sorted(folder.glob(kind))] if weights else []
    names = [file.name for file in files if file.is_file() and _begins(file, len(POINTER)) == POINTER]
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield Fault(f"{names[0]}{more}, a git-lfs pointer in place of the file", "git lfs pull")


def _begins(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


def _shards(folder: Path) -> tuple[list[str], str]:
    """The safetensors files that hold the weights, and what is missing of those that an index names."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], ""
    for index in INDICES:
        if not (folder / index).is_file():
            continue
        try:
            named = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in named if not (folder / name).is_file()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return [], f"{index}, which is no index of weights"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        words = f"no {missing[0]}{more}, which {index} names" if missing else ""
        return [name for name in named if name.endswith(".safetensors")], words
    return [file.name for file in sorted(folder.glob("*.safetensors"))], ""


def _fault(file: Path) -> Fault | None:
    """What is wrong with a safetensors file, by its header."""
    size, again = file.stat().st_size, "copy or download it again"
    if not size:
        return Fault(f"{file.name}, an empty file", again)
    length = int.from_bytes(_begins(file, 8), "little")
    if size < 8 or length > LONGEST_HEADER or not _begins(file, 9).endswith(b"{"):
        return Fault(f"{file.name}, which is no safetensors file", again)
    if 8 + length > size:
        return Fault(f"{file.name}, which is cut short", again, transient=True)
    try:
        header = _header(file)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Fault(f"{file.name}, which is no safetensors file", again)
    short = max(ends, default=0) > size - 8 - length
    return Fault(f"{file.name}, which is cut short", again, transient=True) if short else None


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, by the names of its tensors. Raises OSError, ValueError."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length))
