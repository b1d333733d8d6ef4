"""Turns NDIF's model actors into ones that serve from a CPU.

Configuration, not a patch: NDIF takes the actor class by its dotted path. The stock actors want CUDA in four
places only (loading, parking, unparking, cleaning up); all else here is NDIF's own code, inherited.
"""

import gc

import ray
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


class OnCPU(BaseModelDeployment):
    """An actor whose weights are in host memory and stay there."""

    CACHEABLE = False

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    async def to_cache(self):
        raise RuntimeError("weights on a CPU are not parked")

    def from_cache(self, gpu_mem_bytes_by_id):
        raise RuntimeError("weights on a CPU are not parked")

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class SandboxOnCPU(SandboxModelDeployment, OnCPU):
    """The same, with each block in a process of its own that has no weights."""


@ray.remote(num_cpus=0.1, max_restarts=-1)
class Actor(OnCPU):
    pass


@ray.remote(num_cpus=0.1, max_restarts=-1)
class SandboxActor(SandboxOnCPU):
    pass
