"""The local executor: a transformers model in this process, traced by nnsight."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import ERROR, getLogger
from typing import Any

import nnsight
import torch
import transformers
from nnsight import TransformersModel

from nsteer.errors import AnatomyError, ExecutionError, ModelError, OutOfMemoryError, did_you_mean, in_a_line
from nsteer.executors import batching, each, health, leaving
from nsteer.executors.common import (
    ends,
    free,
    free_memory,
    need,
    pin,
    quiet,
    readouts,
    tensors,
    torch_settings,
    with_pad,
)
from nsteer.models import contexts, loading
from nsteer.program import anatomy, budget, code
from nsteer.program.form import Form, Program, Readouts
from nsteer.system import machine


class Local:
    """One model, loaded on one device, or spread over several by accelerate.

    peft : directory of an adapter that is merged into it
    device_map, max_memory : how it is spread, as `from_pretrained` takes them; then `device` is where its tokens go in
    leave : rows that have ended leave their batch while others go on, where a trial shows that the model bears it

    Raises ModelError when it can not be loaded, AnatomyError when its residual stream can not be found or proved.
    """

    def __init__(
        self,
        model: Any,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        attn_implementation: str | None = None,
        quantization: str | None = None,
        peft: str | None = None,
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        tokenizer: Any = None,
        threads: int | None = None,
        leave: bool = True,
    ):
        torch.set_num_threads(threads or min(torch.get_num_threads(), machine.cores()))
        self.device = torch.device(pick_device(device))
        if isinstance(model, str):
            settings = {"revision": revision, "trust_remote_code": trust_remote_code}
            extra = {**_attention(attn_implementation), **_quantized(quantization, self.device)}
            if device_map is not None:
                spill = tempfile.mkdtemp(prefix="nsteer-offload-")
                weakref.finalize(self, shutil.rmtree, spill, ignore_errors=True)
                extra |= _spread(device_map, max_memory, spill)
            model, tokenizer = load(model, dtype, extra, settings)
            if device_map is not None:
                _has_modules(model, device_map)
            model = _merged(model, peft) if peft else model
        self.quantization = quantization
        self.placed = dict(getattr(model, "hf_device_map", None) or {})
        if set(map(str, self.placed.values())) == {"disk"}:
            raise ModelError("the whole model would lie on disk, and no part of it where it runs: more max_memory")
        self.module = (model if quantization or self.placed else model.to(self.device)).eval()
        if self.placed:
            self.device = torch.device(anatomy.entry(self.module))
        self.tokenizer = tokenizer
        self.eos, self.pad = ends(self.module, tokenizer)
        self.pinned = pin(self.module)
        self.anatomy, self.batching = batching.prove(self.module, anatomy.prove(self.module), self.pad)
        self.health = health.look(self.module, tokenizer, _positions(self.module), self.anatomy, self.batching)
        self.stays = leaving.objection(self.module, self.pad) if leave else "transformers' own generate is asked for"
        with quiet():
            self.model = TransformersModel(self.module, tokenizer=with_pad(tokenizer, self.pad), task="text-generation")
        config = self.module.config
        self.shape = budget.shape(config.to_dict(), self.anatomy.n_layers, self.anatomy.d_model)
        self.attention = getattr(config, "_attn_implementation", None) or ""
        self.free = free_memory(self.device)
        self._tell: Callable[[int], None] = lambda tokens: None
        self.module.get_input_embeddings().register_forward_hook(
            lambda module, given, out: self._tell(int(given[0].numel()) if given else 0)
        )
        self.overhead = budget.OVERHEADS.get(self.device.type, budget.OVERHEADS["cpu"])

    def code(self, program: Program) -> str:
        return code.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises ExecutionError with the program's name and what failed in it.

        Raises OutOfMemoryError for a program that does not fit; the memory that it took is free again.
        """
        text = self.code(program)
        self.batching.check(program.form)
        with quiet():
            try:
                return readouts(program, self._saved(text, program))
            except Exception as error:
                failure = failed(program, code.digest(text), error)
        if isinstance(failure, OutOfMemoryError):
            free(self.device)
        raise failure  # here, where the traceback with the program's tensors is gone

    def _saved(self, text: str, program: Program) -> dict[str, Any]:
        loop = {"custom_generate": leaving.decode} if program.form.decoding and not self.stays else {}
        return code.load(text)(self.model, tensors(program, self.anatomy, self.device), **loop)

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        return each(self.run, programs)

    def watch(self, tell: Callable[[int], None]) -> None:
        """`tell` is called with the tokens of every forward pass from now on, padding with them: a step of a batch."""
        self._tell = tell

    def settle(self) -> None:
        """Nothing to forget: no job outlives a call."""

    def afford(self, form: Form, rows: int) -> int:
        """From what was free when the model was loaded; see `nsteer.program.budget`."""
        width, ceiling = self.module.dtype.itemsize, budget.CEILINGS.get(self.device.type, budget.CEILINGS["cpu"])
        return budget.tokens(self.free, self.shape, need(form), width, rows, ceiling, self.attention == "eager")

    def describe(self) -> dict[str, Any]:
        dtype = str(self.module.dtype).removeprefix("torch.")
        return {
            "executor": "local",
            "dtype": dtype,
            "quantization": self.quantization or "",
            "device": _devices(self.placed) or self.device.type,
            "attn_implementation": self.attention,
            "health": self.health,
            "warnings": health.warnings(self.health, dtype),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
            "settings": {
                **torch_settings(self.device),
                "rows_leave": not self.stays,
                "rows_stay_because": self.stays,
                "model_settings_not_followed": self.pinned,
                "site_factors": anatomy.factors(self.anatomy),
            },
        }

    def close(self) -> None:
        del self.model, self.module
        free(self.device)


def failed(program: Program, name: str, error: Exception, what: str = "failed") -> ExecutionError:
    """What went wrong with a program, in our words."""
    if not machine.out_of_memory(error):
        return ExecutionError(f"program {name} {what}: {type(error).__name__}: {error}")
    rows, width = program.arrays["input_ids"].shape
    return OutOfMemoryError(f"program {name} ran out of memory with {rows} rows of {width} tokens")


def _positions(module: Any) -> int | None:
    """Positions that a model was made for; None where its config names none."""
    known = contexts.context(module.config.to_dict())
    return known.positions if known else None


def pick_device(device: str) -> str:
    """`auto` made definite: cuda, else mps, else cpu."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _spread(device_map: str | Mapping[str, int | str], limits: Mapping[str, str] | None, spill: str) -> dict[str, Any]:
    """What `from_pretrained` needs to spread a model: modules on `disk` stay in its own files where they can."""
    placed = device_map if isinstance(device_map, str) else dict(device_map)
    room = {int(name) if name.isdigit() else name: size for name, size in (limits or {}).items()}
    return {"device_map": placed, "offload_folder": spill, **({"max_memory": room} if room else {})}


def _devices(placed: Mapping[str, Any]) -> str:
    """The kinds of device that a model is spread over, as `cpu+disk`; empty for one that no map has placed."""
    kinds = {"cuda" if isinstance(at, int) else str(at).partition(":")[0] for at in placed.values()}
    return "+".join(sorted(kinds))


def _has_modules(model: Any, device_map: str | Mapping[str, int | str]) -> None:
    """Raises ModelError for a map that names a module which the model does not have: it would be passed over."""
    if isinstance(device_map, str):
        return
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
    if lost := [name for name in device_map if name not in known]:
        raise ModelError(
            f"device_map: {lost[0]!r}, which is no module of the model ({did_you_mean(lost[0], sorted(known))})"
        )


def _attention(name: str | None) -> dict[str, Any]:
    return {"attn_implementation": name} if name else {}


def _quantized(name: str | None, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise while it loads: such weights are not moved afterwards."""
    if name is None:
        return {}
    getLogger("bitsandbytes").setLevel(ERROR)  # of every layer at every pass it says that float32 goes in
    return {
        "quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "device_map": {"": str(device)},
    }


def _merged(model: Any, adapter: str) -> Any:
    """The model with an adapter's weights in its own: modules and paths stay as they were."""
    from peft import PeftModel

    try:
        with loading.quiet():
            return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except Exception as error:  # as in `load`
        raise ModelError(f"the adapter {adapter!r} can not be merged: {type(error).__name__}: {error}") from error


def load(name: str, dtype: str, extra: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    try:
        with loading.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys")  # `_has_modules` says so
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **settings)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **extra,
                **settings,
            )
    except AnatomyError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a bad directory; its words say which
        raise ModelError(f"{name!r} can not be loaded: {in_a_line(error)}") from error
    model, told = loaded
    loading.has_all_weights(name, told)
    return model, tokenizer
