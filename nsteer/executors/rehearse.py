"""The rehearsal: programs make the whole way to a server and back, strictly, without leaving this process.

The payload is the one that the remote executor sends. It is loaded as a server would load it, with nothing but the
server's packages to be had, run on its own frame out of reach of the caller's objects, and only what it saved
comes back, as tensors. nnsight's `remote="local"` is kinder, and passes what a server refuses.
"""

from __future__ import annotations

import ast
import importlib.abc
import io
import linecache
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

from nsteer.errors import ExecutionError
from nsteer.executors.answers import max_bytes, unpack
from nsteer.executors.common import quiet, readouts, tensors
from nsteer.executors.local import Local, failed
from nsteer.executors.payload import compress, pack, pack_alone
from nsteer.program import code
from nsteer.program.form import Program, Readouts

SERVER = frozenset(
    {
        "torch",
        "numpy",
        "transformers",
        "accelerate",
        "einops",
        "peft",
        "nnsight",
        "cloudpickle",
        "greenlet",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "pydantic",
        "sympy",
        "mpmath",
        "regex",
        "yaml",
        "tqdm",
        "packaging",
        "filelock",
        "typing_extensions",
        "fsspec",
        "jinja2",
        "networkx",
        "zstandard",
    }
)
"""Top-level packages that every NDIF server has, the standard library apart."""

BYTECODE = {"CodeType", "_make_function", "_make_skeleton_func", "_make_skeleton_class", "_make_skeleton_enum"}
"""What a pickle calls by name when it rebuilds code of one Python version."""


class Rehearse(Local):
    """A local model whose programs go through the remote path: each as a job, and as a text sent by itself.

    copies : every value that a program reads is a copy, written back after its last use, as in NDIF's sandbox
    autocast : programs run under bfloat16 autocast, as on a server with half-precision weights

    Raises what Local raises.
    """

    def __init__(self, model: Any, *, copies: bool = False, autocast: bool = False, **settings: Any):
        super().__init__(model, leave=False, **settings)  # a server has transformers' own loop
        self.copies, self.autocast = copies, autocast
        self.payload = 0  # bytes of the last payload, compressed

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises ExecutionError with what a server would have refused."""
        text = self.code(program)
        try:
            return readouts(program, self._saved(copied(text) if self.copies else text, program))
        except Exception as error:
            failure = failed(program, code.digest(text), error, "would fail on a server")
        raise failure

    def _saved(self, text: str, program: Program) -> dict[str, Any]:
        data = tensors(program, self.anatomy)
        blob = pack(self.model, text, [data])
        self.payload = len(compress(blob))
        with quiet(), _autocast(self.device, self.autocast):
            limit = max_bytes([program], self.anatomy.d_model)
            single = unpack(perform(self.model, pack_alone(self.model, text, data)), limit)
            [saved] = unpack(perform(self.model, blob), limit)["results"]
        if missing := returned(text) - set(single):
            raise NameError(f"{', '.join(sorted(missing))} is not saved inside the trace")
        return saved

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"executor": "rehearse", "copies": self.copies, "autocast": self.autocast}


def travels(model: Any, text: str, batches: list[dict[str, Any]]) -> int:
    """Packs and loads a program strictly without running it; the model may be without weights.

    Gives the compressed payload's size in bytes. Raises ExecutionError with what a server would refuse.
    """
    try:
        blob = pack(model, text, batches)
        with without_package():
            load(model, blob)
    except Exception as error:
        raise ExecutionError(f"the program does not travel: {type(error).__name__}: {error}") from error
    return len(compress(blob))


def perform(model: Any, blob: bytes) -> bytes:
    """What a server does: loads a payload, runs it, and gives what it saved, as a server's answer.

    Raises what the block raises, and ModuleNotFoundError or TypeError for what a server would refuse.
    """
    with without_package():
        tracer = load(model, blob)
        inc()
        try:
            tracer.execute(tracer.info.code)
            kept = _saves()
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in kept}
        finally:
            dec()
    stream = io.BytesIO()
    torch.save(saved, stream)
    return compress(stream.getvalue())


def returned(text: str) -> set[str]:
    """The variables that `run` returns: a server keeps them only where they are saved."""
    [run] = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    last = run.body[-1]
    if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Dict)):
        raise SyntaxError("a program's text ends in `return {...}`")
    return {value.id for value in last.value.values if isinstance(value, ast.Name)}


def load(model: Any, blob: bytes) -> Any:
    """The tracer of a payload, rebuilt from its own words. Raises TypeError for bytecode."""
    return RequestModel.deserialize(blob, model._remoteable_persistent_objects(), unpickler=_Strict)


class _Strict(CustomCloudUnpickler):
    """Refuses what the server lacks and what is tied to one version of Python."""

    def find_class(self, module: str, name: str) -> Any:
        if name in BYTECODE:
            raise TypeError(f"bytecode travels ({module}.{name}): a server of another Python may crash on it")
        if not _allowed(module):
            raise ModuleNotFoundError(f"{module}.{name} travels by name, and the server has no {module!r}", name=module)
        return super().find_class(module, name)


class _Refuse(importlib.abc.MetaPathFinder):
    """Stands first among the finders and lets nothing by that the server lacks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if not _allowed(name):
            raise ModuleNotFoundError(f"no module {name!r} on the server", name=name)


@contextmanager
def without_package() -> Iterator[None]:
    """Hides every module that a server lacks, and undoes what loading a block writes into global caches."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if not _allowed(name)}
    caches = [(cache, dict(cache)) for cache in (linecache.cache, SOURCES, BLOCKS)]
    finder = _Refuse()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(hidden)
        for cache, before in caches:
            cache.clear()
            cache.update(before)


def _allowed(module: str) -> bool:
    root = module.partition(".")[0]
    return root in SERVER or root in sys.stdlib_module_names or root.startswith("_")


def _autocast(device: torch.device, on: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if on else nullcontext()


VALUE = r"model\.[\w.\[\]]+?\.(?:output|input)"
USE = re.compile(VALUE)
READ = re.compile(rf"(?P<indent> +)(?P<name>\w+) = (?P<value>{VALUE})(?P<first>\[0\])?$")


def copied(text: str) -> str:
    """The text with every value read from the model copied, and written back before the next is read.

    That is what NDIF's sandbox does to a block: a text that is exact here does not rest on aliasing.
    """
    lines: list[str] = []
    back: str | None = None
    for line in text.splitlines():
        read = READ.match(line)
        indent = len(line) - len(line.lstrip())
        leaves = back is not None and line.strip() and indent < len(back) - len(back.lstrip())
        if back is not None and (USE.search(line) or leaves or line.strip() == "tracer.stop()"):
            lines.append(back)
            back = None
        if read is None:
            lines.append(line)
            continue
        pad, name, value, first = read.group("indent", "name", "value", "first")
        if first:
            lines += [f"{pad}whole = {value}", f"{pad}{name} = whole[0].clone()"]
            back = f"{pad}{value} = ({name}, *whole[1:])"
        else:
            lines.append(f"{pad}{name} = {value}.clone()")
            back = f"{pad}{value} = {name}"
    return "\n".join(lines) + "\n"
