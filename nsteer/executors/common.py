"""Turns programs into tensors and what came back into readouts: what every executor does alike."""

from __future__ import annotations

import gc
import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from nsteer.program import anatomy, budget
from nsteer.program.code import GREEDY
from nsteer.program.form import Form, Program, Readouts
from nsteer.system import machine


def free(device: torch.device) -> None:
    """Gives back what a program that did not fit still holds. Call it where no traceback holds its tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: of a GPU also what torch holds of it and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return machine.free_memory()


def need(form: Form) -> budget.Need:
    """What programs of a form keep in memory."""
    if form.promote:
        return budget.Need()
    sites = [site.what for site in form.reads]
    return budget.Need(
        form.decoding.max_new_tokens if form.decoding else 0,
        sites.count("pooled") + sites.count("norm") + 2 * sites.count("decoded"),
        sites.count("tokens"),
        bool(form.edits),
        form.score or form.against,
    )


def torch_settings(device: torch.device) -> dict[str, Any]:
    """What torch computes with, as JSON data. Programs run under `no_grad`: their texts say so."""
    settings: dict[str, Any] = {
        "grad": "no_grad",
        "threads": torch.get_num_threads(),
        "cores": machine.cores(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        settings |= {
            "gpu": torch.cuda.get_device_name(device),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    return settings


def tensors(program: Program, model_anatomy: anatomy.Anatomy, device: Any = "cpu") -> dict[str, Any]:
    """A program's arrays as the tensors that its text expects, `inputs` gathered, on one device."""
    moved = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in program.arrays.items()}
    inputs = {name: moved.pop(name) for name in ("input_ids", "attention_mask", "position_ids")}
    if not model_anatomy.takes_positions:
        del inputs["position_ids"]
    return {"inputs": inputs, **moved}


def readouts(program: Program, saved: dict[str, Any]) -> Readouts:
    """What a program's text returned, as arrays whose first axis is the row."""

    def rows_first(name: str) -> np.ndarray | None:
        return saved[name].float().numpy().swapaxes(0, 1) if name in saved else None

    written = rows_first("written")
    if written is not None:
        count = saved["counted"].numpy()[:, :, None]
        written = np.where(count > 0, written / np.maximum(count, 1), np.nan).astype(np.float32)
    mask = program.arrays["attention_mask"].astype(bool)
    streams = rows_first("streams")
    tokens = None
    if "tokens" in saved and program.form.decoding:
        eos = program.form.decoding.eos
        new = saved["tokens"][:, mask.shape[1] :].tolist()
        tokens = [trim(row, eos) for row in new]
    return Readouts(
        pooled=rows_first("pooled"),
        norms=rows_first("norms"),
        streams=None if streams is None else [stream[:, keep] for stream, keep in zip(streams, mask, strict=True)],
        tokens=tokens,
        receipts=rows_first("receipts"),
        top_logprobs=saved["logprobs"].numpy() if "logprobs" in saved else None,
        top_tokens=saved["candidates"].numpy() if "logprobs" in saved else None,
        promoted=saved["promoted"].numpy() if "promoted" in saved else None,
        promoted_tokens=saved["promoted_tokens"].numpy() if "promoted" in saved else None,
        prompt_end=rows_first("ends"),
        written=written,
        score=saved["score"].float().numpy() if "score" in saved else None,
        against=saved["against"].float().numpy() if "against" in saved else None,
    )


def trim(tokens: list[int], eos: tuple[int, ...]) -> tuple[int, ...]:
    """Generated tokens up to and with the first end-of-text; what follows in a batch is padding."""
    for i, token in enumerate(tokens):
        if token in eos:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def ends(module: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """The ids that end a text (generation config, else tokenizer) and the padding id (else the first of those).

    A tokenizer's padding token that the embedding has no row for (one that was added later) is passed over.
    """
    config = getattr(module, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    known = module.get_input_embeddings().weight.shape[0]
    usable = [token for token in (tokenizer.pad_token_id, *eos) if token is not None and 0 <= token < known]
    return eos, int(usable[0] if usable else 0)


IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
"""What of a generation_config names tokens, and decides nothing that a program does not say itself."""

QUIET = {"use_cache": True, "return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""Settings of a config that change what a call gives, and what programs rest on."""


def pin(module: Any) -> list[str]:
    """Takes from a model what its own settings would do to programs. What was taken, as `name=value`.

    Its generation_config (penalties, beams, sampling, a cache of another kind or none, prompts read in chunks), a
    `generate` that it brought, and what its config says of every call. Read the ids that end a text before.
    """
    taken = ["generate"] if vars(module).pop("generate", None) else []
    own = getattr(module, "generation_config", None)
    if own is not None:
        usual = vars(transformers.GenerationConfig()) | GREEDY
        told = {name: value for name, value in own.to_dict().items() if name not in IDS and not name.startswith("_")}
        taken += [f"{k}={v}" for k, v in told.items() if v is not None and v != usual.get(k) and (v or usual.get(k))]
        module.generation_config = transformers.GenerationConfig()
    for config in (module.config, module.config.get_text_config()):
        for name, value in QUIET.items():
            if getattr(config, name, value) != value:
                setattr(config, name, value)
                taken += [f"config.{name}={not value}"]
    return sorted(set(taken))


def with_pad(tokenizer: Any, pad: int) -> Any:
    """The tokenizer as nnsight wants it: with a padding token, on the left."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad
    tokenizer.padding_side = "left"
    return tokenizer


def program_digest(text: str, program: Program, salt: str = "") -> str:
    """SHA-256 of a program's text and arrays: two programs of one digest give the same readouts.

    `salt` names what else decides them: the model and where it runs. Keys are no part of it.
    """
    digest = hashlib.sha256(f"{salt}\0{text}".encode())
    for name in sorted(program.arrays):
        array = np.ascontiguousarray(program.arrays[name])
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what nnsight and transformers warn of rightly and in vain.

    That an open loop ended: every row may end before max_new_tokens. That a module is called `output` (in BERT's
    blocks): programs mean what nnsight calls so. That there is no attention mask: every program has one, and
    transformers itself drops one that masks nothing.
    """
    told = logging.getLogger("transformers.modeling_utils")
    told.addFilter(_is_not_of_masks)
    try:
        with _warnings_dropped():
            yield
    finally:
        told.removeFilter(_is_not_of_masks)


def _is_not_of_masks(record: logging.LogRecord) -> bool:
    return "recommend passing in an `attention_mask`" not in record.getMessage()


@contextmanager
def _warnings_dropped() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*has a submodule named.*which nnsight already serves.*")
        warnings.filterwarnings("ignore", message=r".*was never reached: the loop asked for a step.*")
        warnings.filterwarnings("ignore", message=r".*(iter|loop).*never.*")
        yield
