"""Turns the header of a GGUF file (llama.cpp's format of a model) into facts: config, tensors, what is wrong with it.

The header alone is read, and of its vocabulary no more than where each token stands: no tensor, no list of tokens.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nsteer.errors import ModelError, printable
from nsteer.models.checkpoints import POINTER, Fault

MAGIC, VERSIONS = b"GGUF", (2, 3)
FIRST = 1 << 24
"""Bytes that are read at first: the headers of most files with a vocabulary of 262,000 tokens."""
SUFFIX = ".gguf"
AGAIN = "copy or download it again"

TEXT, LIST = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> how it is packed."""

MAX_LENGTH = 1 << 26
"""Entries of the longest list, and bytes of the longest text, that are believed."""

KEPT = 4096
"""Numbers of the longest list whose values are kept: settings by layer are, scores by token are not."""

TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22)},
    **{7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    **{29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    39: ("MXFP4", 32, 17),
}
"""Type of a tensor -> its name, and how many numbers are kept in how many bytes."""

DECODERS = {
    **{name: name for name in "llama mistral qwen2 qwen3 falcon phi3 bloom stablelm gpt2 starcoder2 mamba".split()},
    **{name: name for name in "nemotron gemma2 lfm2".split()},
    **{"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"},
}
"""Architecture of a file -> transformers' model type: those language models that its oldest version we take reads."""

IMAGES = {"clip", "qwen2vl", "qwen3vl", "qwen3vlmoe", "mllama", "cogvlm", "chameleon", "paligemma"}

TOKENIZERS = ("gpt2", "llama", "t5", "gemma4")
"""Kinds of tokenizer (`tokenizer.ggml.model`) that transformers makes of a file."""

SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
"""Special tokens as files name them (one of them misspelt) -> as transformers does."""

ENDS = ("eos", "eot", "eom")
"""Tokens at which a text ends: the end of a text, of a turn, of a message."""

BLOCK = re.compile(r"blk\.([0-9]{1,6})\.")
READS = "token_embd output output_norm attn_norm ffn_norm attn_q attn_k attn_v attn_qkv ffn_gate ffn_up".split()
WRITES = ("attn_output", "ffn_down")
"""Tensors whose first, or last, dimension is the width of the stream, in every architecture that has them."""

READS_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"}
"""Kinds of BPE (`tokenizer.ggml.pre`) whose models get a BOS where the file says nothing of it, as by llama.cpp."""


@dataclass(frozen=True)
class Texts:
    """A list of texts in the header, decoded one by one when they are asked for."""

    buffer: bytes
    starts: list[int]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: int) -> str:
        start = self.starts[place] + 8
        return self.buffer[start : start + _LENGTH(self.buffer, start - 8)[0]].decode(errors="replace")


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header names it; `start` and `size` in bytes, `start` from where the data begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def size(self) -> int | None:
        """None for a type that is not known."""
        if self.kind not in TYPES:
            return None
        _, numbers, size = TYPES[self.kind]
        return prod(self.shape) // numbers * size


@dataclass(frozen=True)
class Header:
    """What stands before the tensors. `data`: where they begin, in bytes from the file's start."""

    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data: int

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def of(self, name: str) -> Any:
        """A setting of the architecture, such as `block_count`; None where it has none."""
        return self.values.get(f"{self.architecture}.{name}")

    @property
    def tokens(self) -> int:
        """Tokens of the vocabulary; 0 where the file has none."""
        texts = self.values.get("tokenizer.ggml.tokens")
        return len(texts) if isinstance(texts, Texts) else 0

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def types(self) -> str:
        """How its tensors are kept, the most frequent first: `210 Q4_1, 61 F32, 1 Q8_0`."""
        counted = Counter(
            TYPES[tensor.kind][0] if tensor.kind in TYPES else f"type {tensor.kind}" for tensor in self.tensors
        )
        return ", ".join(f"{count} {name}" for name, count in counted.most_common())


class Short(ModelError):
    """A header that goes on beyond the bytes that were read."""


def read(file: Path) -> Header:
    """The header of a file. Raises ModelError for one that is none, is cut short or can not be read."""
    try:
        with file.open("rb") as stream:
            return grown(stream, file.stat().st_size, file.name)
    except OSError as error:
        raise ModelError(f"{file.name}, which can not be read: {error.strerror or error}") from error


def grown(stream: Any, size: int, name: str) -> Header:
    """The header of a stream of `size` bytes, of which no more is read than it takes. Raises ModelError."""
    many, begins = FIRST, b""
    while True:
        begins += stream.read(many - len(begins))
        if begins.startswith(POINTER):
            raise ModelError(f"{name}, a git-lfs pointer in place of the file: git lfs pull")
        if not begins.startswith(MAGIC):
            raise ModelError(f"{name}, which is no GGUF file; {AGAIN}")
        try:
            return parse(begins, name)
        except Short:
            if many >= size:
                raise
            many *= 4


def parse(buffer: bytes, name: str) -> Header:
    """The header in the first bytes of a file. Raises Short where it goes on beyond them, ModelError."""
    try:
        magic, version, tensors, values = struct.unpack_from("<4sIQQ", buffer, 0)
        if magic != MAGIC or version not in VERSIONS:
            raise ModelError(f"{name}, which is no GGUF file of version 2 or 3")
        if max(tensors, values) > MAX_LENGTH:
            raise ModelError(f"{name}, whose header is damaged; {AGAIN}")
        metadata, at = _values(buffer, 24, values, name)
        listed, at = _tensors(buffer, at, tensors)
    except (struct.error, IndexError) as error:
        raise Short(f"{name}, which is cut short; {AGAIN}") from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise ModelError(f"{name}, whose header is damaged; {AGAIN}") from error
    step = metadata.get("general.alignment", 32)
    if type(step) is not int or not 0 < step <= MAX_LENGTH or step & (step - 1):  # a power of two
        raise ModelError(f"{name}, whose header is damaged; {AGAIN}")
    return Header(metadata, tuple(listed), -(-at // step) * step)


_NUMBER, _LENGTH = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


def _text(buffer: bytes, at: int) -> tuple[str, int]:
    """A text with its length before it, and where it ends."""
    length = _LENGTH(buffer, at)[0]
    end = at + 8 + length
    if length > MAX_LENGTH or end > len(buffer):
        raise IndexError(end)
    return buffer[at + 8 : end].decode(), end


def _values(buffer: bytes, at: int, count: int, name: str) -> tuple[dict[str, Any], int]:
    metadata = {}
    for _ in range(count):
        key, at = _text(buffer, at)
        kind = _NUMBER(buffer, at)[0]
        at += 4
        if kind == TEXT:
            metadata[key], at = _text(buffer, at)
        elif kind == LIST:
            metadata[key], at = _list(buffer, at, name)
        elif kind in SCALARS:
            (metadata[key],) = struct.unpack_from(f"<{SCALARS[kind]}", buffer, at)
            at += struct.calcsize(SCALARS[kind])
        else:
            raise ModelError(f"{name}, whose header is damaged; {AGAIN}")
    return metadata, at


def _list(buffer: bytes, at: int, name: str) -> tuple[Any, int]:
    kind, count = _NUMBER(buffer, at)[0], _LENGTH(buffer, at + 4)[0]
    at += 12
    if count > MAX_LENGTH or (kind != TEXT and kind not in SCALARS):
        raise ModelError(f"{name}, whose header is damaged; {AGAIN}")
    if kind == TEXT:
        starts = []
        for _ in range(count):  # the length before a text is all that tells where the next one begins
            starts.append(at)
            at += 8 + _LENGTH(buffer, at)[0]
        return Texts(buffer, starts), at
    size = struct.calcsize(SCALARS[kind]) * count
    if at + size > len(buffer):
        raise IndexError(at + size)
    values = struct.unpack_from(f"<{count}{SCALARS[kind]}", buffer, at) if count <= KEPT else None
    return values, at + size


def _tensors(buffer: bytes, at: int, count: int) -> tuple[list[Tensor], int]:
    tensors = []
    for _ in range(count):
        name, at = _text(buffer, at)
        dims = _NUMBER(buffer, at)[0]
        shape = struct.unpack_from(f"<{dims}Q", buffer, at + 4) if dims <= 8 else ()
        at += 4 + 8 * dims
        kind, start = _NUMBER(buffer, at)[0], _LENGTH(buffer, at + 4)[0]
        tensors.append(Tensor(name, shape, kind, start))
        at += 12
    return tensors, at


def faults(header: Header, name: str, size: int) -> Iterator[Fault]:
    """What is wrong with a file of `size` bytes, by its header; each fault alone is the end of it."""
    kind, architecture = str(header.values.get("general.type", "model")), _shown(header.architecture)
    other = "the GGUF file of a language model that transformers reads"
    files = header.values.get("split.count", 1)
    if kind == "mmproj" or architecture in IMAGES:
        yield Fault(f"{name}, of a vision model ({architecture})", f"{other}: its text decoder, if it has one")
    elif kind != "model" or architecture == "controlvector":
        yield Fault(f"{name}, which holds no model but {_shown(kind) if kind != 'model' else architecture}", other)
    elif architecture not in DECODERS:
        yield Fault(
            f"{name}, of the architecture {architecture!r}", f"transformers reads {', '.join(sorted(DECODERS))}"
        )
    elif files not in (0, 1):  # 0 is what joining them leaves
        yield Fault(f"{name}, one of {_shown(str(files))} files of a model", "join them: llama-gguf-split --merge")
    elif unknown := [tensor for tensor in header.tensors if tensor.size is None]:
        first = f"type {unknown[0].kind} of {_shown(unknown[0].name)}"
        yield Fault(f"{name}, with a tensor of an unknown type ({first})", other)
    elif size < header.data + max((tensor.start + (tensor.size or 0) for tensor in header.tensors), default=0):
        yield Fault(f"{name}, which is cut short", AGAIN)
    elif not header.tensors:
        yield Fault(f"{name}, a vocabulary without weights", other)
    elif not header.tokens:
        yield Fault(f"{name}, without a vocabulary", other)
    elif (rows := _rows(header)) is not None and rows < header.tokens:
        actual = f"{name}, whose embedding has {rows:,} rows, fewer than its {header.tokens:,} tokens"
        yield Fault(actual, "another file: this one's weights and vocabulary are of two models")
    else:
        again = "another file, or one converted again"
        yield from (Fault(f"{name}, whose header {words}", again) for words in (*_unsaid(header), *_unlike(header)))


def _unsaid(header: Header) -> Iterator[str]:
    """Settings that a header lacks, or that are none of a model with its vocabulary."""
    for key in ("block_count", "embedding_length"):
        if (value := header.of(key)) is None:
            yield f"does not say {header.architecture}.{key}"
        elif type(value) is not int or value < 1:
            yield f"says {header.architecture}.{key}: {_shown(repr(value))}, not a whole number above 0"
    kind = header.values.get("tokenizer.ggml.model")
    if kind not in TOKENIZERS:
        said = (
            "does not say tokenizer.ggml.model" if kind is None else f"says tokenizer.ggml.model: {_shown(repr(kind))}"
        )
        yield f"{said}: transformers reads {', '.join(TOKENIZERS)}"
    for key in (f"tokenizer.ggml.{name}_token_id" for name in (*SPECIAL, *ENDS)):
        value = header.values.get(key, 0)
        if type(value) is not int or not 0 <= value < header.tokens:
            yield f"says {key}: {_shown(repr(value))}, none of its {header.tokens:,} tokens"
    if not isinstance(header.values.get("tokenizer.chat_template", ""), str):
        yield "says tokenizer.chat_template, which is no text"


def _unlike(header: Header) -> Iterator[str]:
    """Where its settings and its tensors are of two models: blocks, widths, heads."""
    blocks, width = header.of("block_count"), header.of("embedding_length")
    if any(type(value) is not int for value in (blocks, width)):
        return
    held = {int(match[1]) for tensor in header.tensors if (match := BLOCK.match(tensor.name))}
    if held and max(held) + 1 != blocks:
        yield f"says {header.architecture}.block_count: {blocks}, and its tensors are of {max(held) + 1} blocks"
    heads, hidden = header.of("attention.head_count"), header.of("feed_forward_length")
    of_heads = header.of("attention.value_length") or header.of("attention.key_length")
    of_heads = of_heads or (width // heads if isinstance(heads, int) and heads else None)
    sizes = dict.fromkeys(READS, (0, width)) | dict.fromkeys(WRITES, (-1, width))
    for tensor in header.tensors:
        weight = BLOCK.sub("", tensor.name).removesuffix(".weight")
        wanted = [(*sizes[weight], "embedding_length")] if weight in sizes else []
        if weight == "ffn_down" and isinstance(hidden, int):
            wanted.append((0, hidden, "feed_forward_length"))
        if weight == "attn_output" and isinstance(heads, int) and isinstance(of_heads, int):
            wanted.append((0, heads * of_heads, "attention.head_count"))
        for axis, size, key in wanted:
            if not tensor.shape or tensor.shape[axis] != size:
                yield (
                    f"says {header.architecture}.{key}: {header.of(key)}, and its tensor {_shown(tensor.name)} is of "
                    f"shape {list(tensor.shape)}"
                )
                return


def _shown(text: str) -> str:
    return printable(text, lines=False)


def _rows(header: Header) -> int | None:
    """Rows of the embedding; None where it is not found."""
    return next(
        (tensor.shape[-1] for tensor in header.tensors if tensor.name == "token_embd.weight" and tensor.shape), None
    )


def config(header: Header) -> dict[str, Any]:
    """What a file says of its model, in the words of transformers' configs."""

    def number(name: str) -> Any:
        setting = header.of(name)
        return max(setting, default=0) if isinstance(setting, tuple) else setting  # by layer

    named = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
    }
    settings = {ours: number(theirs) for ours, theirs in named.items()}
    kind = DECODERS.get(header.architecture, header.architecture)
    told = {"model_type": kind, "vocab_size": _rows(header) or header.tokens, **settings}
    return {key: value for key, value in told.items() if value is not None}


def special(header: Header) -> dict[str, str]:
    """The special tokens that a file names: `bos_token`, `eos_token`, ... and their texts."""
    tokens = header.values.get("tokenizer.ggml.tokens")
    special_tokens = {}
    for theirs, ours in SPECIAL.items():
        place = header.values.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(place, int) and isinstance(tokens, Texts) and 0 <= place < len(tokens):
            special_tokens[f"{ours}_token"] = tokens[place]
    return special_tokens


def ends(header: Header) -> list[int]:
    """The ids at which a text ends: of the end of a text, and of a turn."""
    named = (header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
    return list(dict.fromkeys(number for number in named if isinstance(number, int)))


def adds(header: Header) -> tuple[bool, bool]:
    """Whether the file's tokenizer begins a text with BOS, and ends it with EOS; as llama.cpp where it does not say."""
    kind, pre = header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre")
    bos = kind in ("llama", "bert") or (kind == "gpt2" and pre in READS_BOS)
    said = header.values.get("tokenizer.ggml.add_bos_token", bos), header.values.get("tokenizer.ggml.add_eos_token")
    return bool(said[0]), bool(said[1])


def template(header: Header) -> str:
    """The chat template of a file, as jinja text; "" where it has none."""
    text = header.values.get("tokenizer.chat_template")
    return text if isinstance(text, str) else ""
