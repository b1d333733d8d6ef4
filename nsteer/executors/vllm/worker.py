"""Turns vLLM's CPU worker into one that nnsight's traces run in, and whose attention takes heads of any size.

nnsight 0.8 swaps the model runner of vLLM's GPU worker and refuses the CPU's, which is a subclass of the same. vLLM
imports this module by name, in whichever process the worker lives.
"""

from __future__ import annotations

from typing import Any

import torch
from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers.base import Base
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class Runner(NNsightGPUModelRunner, CPUModelRunner):
    """vLLM's CPU runner with nnsight's steps around its own."""


class Worker(CPUWorker):
    """A CPU worker with that runner; what nnsight calls in a worker is its own code."""

    def init_device(self) -> None:
        super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise NotImplementedError(f"a CPU runner is expected, this vLLM made {type(self.model_runner).__name__}")
        self.model_runner.__class__ = Runner

    collect_nnsight = NNsightGPUWorker.collect_nnsight
    nnsight_request_count = NNsightGPUWorker.nnsight_request_count
    nnsight_register = NNsightGPUWorker.nnsight_register
    nnsight_clear_registered = NNsightGPUWorker.nnsight_clear_registered


class PaddedAttention(Attention):
    """Attention whose heads are widened with zeros to the next size that the CPU's kernel has.

    Zeros change no product of a query and a key; what stands there in the output is cut off. The scale is the model's.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float, **settings: Any):
        self.own = head_size
        fit = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_size]
        super().__init__(num_heads, min(fit, default=head_size), scale, **settings)

    def forward(self, query: Any, key: Any, value: Any, *more: Any, **named: Any) -> Any:
        if self.own == self.head_size:
            return super().forward(query, key, value, *more, **named)
        wide = super().forward(self._widened(query), self._widened(key), self._widened(value), *more, **named)
        return wide.unflatten(-1, (self.num_heads, self.head_size))[..., : self.own].flatten(-2)

    def _widened(self, heads: torch.Tensor) -> torch.Tensor:
        split = heads.reshape(len(heads), -1, self.own)
        return torch.nn.functional.pad(split, (0, self.head_size - self.own)).flatten(1)


def attention_class(model: Base) -> Any:
    """What vLLM's transformers models take for attention: as before, but where it is causal attention alone."""
    attention = chosen(model)
    return PaddedAttention if attention is Attention else attention


chosen = Base._get_attn_cls
Base._get_attn_cls = attention_class  # type: ignore[method-assign]
