"""Turns a GGUF file into a folder of safetensors that `from_pretrained` reads: once, kept by the hash of the file.

transformers dequantises the tensors and makes the tokenizer. What it drops of the file's own words is put back:
whether a text begins with BOS and ends with EOS, and every id that ends a text.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from nsteer.errors import ModelError
from nsteer.models.gguf import header
from nsteer.system import files

VERSION = 1
"""Raised when the same file comes to be converted to something else."""

NEEDED = ("gguf", "accelerate")
"""What transformers needs to read such files."""

RECORD = "converted.json"
"""Of a folder that is whole: the sizes of its files, and what it was made of."""


def folder(digest: str) -> Path:
    """Where the model of a file lies, or will lie. `digest` is the SHA-256 of the file.

    Another version of transformers may read a file otherwise, so it makes a folder of its own.
    """
    return files.cache() / "gguf" / f"{digest[:32]}-{version('transformers')}-{VERSION}"


def is_there(model_folder: Path) -> bool:
    """Whether a folder holds all that was written into it."""
    try:
        kept = json.loads((model_folder / RECORD).read_text(encoding="utf-8"))["sizes"]
        return all((model_folder / name).stat().st_size == size for name, size in kept.items())
    except (OSError, ValueError, LookupError, AttributeError):
        return False


def converted(file: Path, digest: str, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of a file's model, made if it is not there; another process may wait for this one.

    tell : is told, in a line, that something takes a while
    Raises ModelError for a file that transformers can not read, and where there is no room.
    """
    model_folder = folder(digest)
    if is_there(model_folder):
        return model_folder
    if lacks := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModelError(f"{file.name}: reading GGUF needs {' and '.join(lacks)}: pip install 'nsteer[gguf]'")
    gguf_header = header.read(file)
    model_folder.parent.mkdir(parents=True, exist_ok=True)
    room, need = shutil.disk_usage(model_folder.parent).free, 4 * gguf_header.parameters
    if room < need:
        raise ModelError(
            f"{file.name}: {need:,} bytes are needed in {model_folder.parent} (NSTEER_CACHE), {room:,} are free"
        )
    with FileLock(model_folder.with_name(f"{model_folder.name}.lock")):
        if is_there(model_folder):
            return model_folder
        tell(f"{file.name} is converted, once: {need / 1e9:.1f} GB of float32 in the cache ({model_folder.parent})")
        temporary = model_folder.with_name(f".{secrets.token_hex(8)}.part")
        try:
            _write(file, gguf_header, temporary)
            _record(temporary, file, digest, gguf_header)
            shutil.rmtree(model_folder, ignore_errors=True)
            os.replace(temporary, model_folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return model_folder


def _write(file: Path, gguf_header: header.Header, temporary: Path) -> None:
    from nsteer.models import loading

    try:
        with loading.quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bars know no switch
            tokenizer = _tokenizer(file, gguf_header)
            model, told = _model(file)
            loading.has_all_weights(file.name, told)
            _fits(file.name, model)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            _check(temporary, gguf_header)
    except ModelError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a file it can not read; its words say which
        raise ModelError(f"{file.name} can not be converted: {type(error).__name__}: {error}") from error
    ends = header.ends(gguf_header)
    settings = json.loads((temporary / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    (temporary / "generation_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _model(file: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32, which every type of tensor fits, and what was said of its loading."""
    import torch
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    model, told = loaded
    vars(model.config).pop("quantization_config", None)  # it is quantised no more, and would not be saved
    model.hf_quantizer = None
    return model, told


def _fits(name: str, model: Any) -> None:
    """Raises ModelError for tensors of other shapes than the config's, which transformers takes from such a file."""
    import torch
    import transformers

    from nsteer.models import loading

    with torch.device("meta"):
        empty: Any = transformers.AutoModelForCausalLM.from_config(model.config)
    wanted = {key: value.shape for key, value in empty.state_dict().items()}
    for key, value in model.state_dict().items():
        if wanted.get(key, value.shape) != value.shape:
            loading.other_shape(name, key, value.shape, wanted[key])


def _tokenizer(file: Path, gguf_header: header.Header) -> Any:
    """The tokenizer, which begins and ends a text as the file says."""
    import transformers
    from tokenizers import processors

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if _marks(tokenizer) != _wanted(tokenizer, gguf_header):
        bos, eos = (
            token if on else "" for token, on in zip(_ids(tokenizer), _wanted(tokenizer, gguf_header), strict=True)
        )
        words = " ".join(filter(None, (bos, "$A", eos)))
        pairs = " ".join(filter(None, (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0", "$B:1", eos and f"{eos}:1")))
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys((bos, eos)) if token]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=words, pair=pairs, special_tokens=special
        )
    return tokenizer


def _ids(tokenizer: Any) -> tuple[str, str]:
    return tokenizer.bos_token or "", tokenizer.eos_token or ""


def _wanted(tokenizer: Any, gguf_header: header.Header) -> tuple[bool, bool]:
    """Whether a text begins with BOS and ends with EOS, of those that there are."""
    bos, eos = header.adds(gguf_header)
    return bos and bool(tokenizer.bos_token), eos and bool(tokenizer.eos_token)


def _marks(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer begins a text with BOS, and ends it with EOS."""
    given = tokenizer("a b").input_ids
    return given[:1] == [tokenizer.bos_token_id], given[-1:] == [tokenizer.eos_token_id]


def _check(temporary: Path, gguf_header: header.Header) -> None:
    """Raises ModelError where the tokenizer that was written does not do as the file says."""
    import transformers

    kept = transformers.AutoTokenizer.from_pretrained(str(temporary))
    if _marks(kept) != _wanted(kept, gguf_header):
        raise ModelError("its tokenizer, once converted, does not add BOS and EOS as the file says")


def _record(temporary: Path, file: Path, digest: str, gguf_header: header.Header) -> None:
    said = {"file": file.name, "sha256": digest, "types": gguf_header.types, "transformers": version("transformers")}
    sizes = {written.name: written.stat().st_size for written in temporary.iterdir()}
    (temporary / RECORD).write_text(json.dumps({**said, "sizes": sizes}, indent=2), encoding="utf-8")
