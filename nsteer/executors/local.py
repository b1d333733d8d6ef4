"""The local executor: a transformers model in this process, traced by nnsight."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import nnsight
import numpy as np
import torch
import transformers
from nnsight import TransformersModel

from nsteer import anatomy, source
from nsteer.errors import AnatomyError, ExecutionError, ModelError
from nsteer.program import Program, Readouts


class Local:
    """One model, loaded on one device.

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
        trust_remote_code: bool = False,
        tokenizer: Any = None,
        threads: int | None = None,
    ):
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(pick_device(device))
        if isinstance(model, str):
            settings = {"revision": revision, "trust_remote_code": trust_remote_code}
            model, tokenizer = _load(model, dtype, attn_implementation, settings)
        self.module = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.anatomy = anatomy.prove(self.module)
        self.eos, self.pad = ends(self.module, tokenizer)
        self.model = TransformersModel(self.module, tokenizer=_with_pad(tokenizer, self.pad), task="text-generation")

    def source(self, program: Program) -> str:
        return source.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises ExecutionError with the program's name and what failed in it."""
        text = self.source(program)
        with warnings.catch_warnings():
            # Every row may end before max_new_tokens: then the open loop has, rightly, no next step.
            warnings.filterwarnings("ignore", message=r".*was never reached: the loop asked for a step.*")
            warnings.filterwarnings("ignore", message=r".*(iter|loop).*never.*")
            try:
                found = source.load(text)(self.model, tensors(program, self.anatomy, self.device))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ExecutionError(f"program {source.digest(text)} failed: {type(error).__name__}: {error}") from error
        return readouts(program, found, self.eos)

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts]]:
        return ((program, self.run(program)) for program in programs)

    def describe(self) -> dict[str, Any]:
        config = self.module.config
        return {
            "executor": "local",
            "dtype": str(self.module.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attn_implementation": getattr(config, "_attn_implementation", None) or "",
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
        }

    def close(self) -> None:
        del self.model, self.module
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def pick_device(device: str) -> str:
    """`auto` made definite: cuda, else mps, else cpu."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tensors(program: Program, found: anatomy.Anatomy, device: Any = "cpu") -> dict[str, Any]:
    """A program's arrays as the tensors that its text expects, `inputs` gathered, on one device."""
    moved = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in program.arrays.items()}
    inputs = {name: moved.pop(name) for name in ("input_ids", "attention_mask", "position_ids")}
    if not found.takes_positions:
        del inputs["position_ids"]
    return {"inputs": inputs, **moved}


def readouts(program: Program, found: dict[str, Any], eos: tuple[int, ...]) -> Readouts:
    """What a program's text returned, as arrays whose first axis is the row."""

    def rows_first(name: str) -> np.ndarray | None:
        return found[name].float().numpy().swapaxes(0, 1) if name in found else None

    mask = program.arrays["attention_mask"].astype(bool)
    streams = rows_first("streams")
    tokens = None
    if "tokens" in found:
        new = found["tokens"][:, mask.shape[1] :].tolist()
        tokens = [trim(row, eos) for row in new]
    top = found.get("logprobs")
    return Readouts(
        pooled=rows_first("pooled"),
        norms=rows_first("norms"),
        streams=None if streams is None else [stream[:, keep] for stream, keep in zip(streams, mask, strict=True)],
        tokens=tokens,
        receipts=rows_first("receipts"),
        top_logprobs=None if top is None else torch.stack(list(top), 1).float().numpy(),
        top_tokens=None if top is None else torch.stack(list(found["candidates"]), 1).numpy(),
    )


def trim(tokens: list[int], eos: tuple[int, ...]) -> tuple[int, ...]:
    """Generated tokens up to and with the first end-of-text; what follows in a batch is padding."""
    for i, token in enumerate(tokens):
        if token in eos:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def ends(module: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """The ids that end a text (generation config, else tokenizer) and the padding id (else the first of those)."""
    config = getattr(module, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    pad = tokenizer.pad_token_id
    return eos, int(pad if pad is not None else eos[0] if eos else 0)


def _with_pad(tokenizer: Any, pad: int) -> Any:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad
    tokenizer.padding_side = "left"
    return tokenizer


def _load(name: str, dtype: str, attention: str | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    extra = {"attn_implementation": attention} if attention else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **extra, **settings)
    except AnatomyError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a bad directory; its words say which
        raise ModelError(f"{name!r} can not be loaded: {type(error).__name__}: {error}") from error
    return model, tokenizer
