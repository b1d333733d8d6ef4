"""Workers as Ray actors: what `Pool` asks, in Ray's words. The only module that imports Ray."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from nsteer.cluster.pool import Death, Event
from nsteer.cluster.scheduler import Need, Start
from nsteer.cluster.worker import Loaded, Report, Work, Worker, WorkerSetup
from nsteer.errors import ClusterError

STORE_MEMORY = 100 * 2**20
"""Bytes of a local cluster's object store: cells travel through nsteer's own store, so little passes here."""

DOUBT = 60.0
"""Seconds in which Ray is to say whether a worker that does not answer is dead, or its node."""

MISSING = 'Ray is not installed: pip install "nsteer[ray]"'


def module() -> Any:
    """Ray itself. Raises ClusterError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ClusterError(MISSING) from error
    return ray


@contextlib.contextmanager
def connected(address: str | None, cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address` (or RAY_ADDRESS), else to one on this machine that ends with it.

    cpus : cores of such a cluster. Raises ClusterError when there is no connection.
    """
    ray = module()
    where = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "error", "ignore_reinit_error": True}
    try:
        if where:
            ray.init(address=where, **quiet)
        else:
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=STORE_MEMORY, **quiet)
    except Exception as error:  # it raises a dozen kinds; its first line says which
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(f"no Ray cluster {f'at {where}' if where else 'on this machine'}: {first}") from error
    # Ray prints deaths of workers to stdout, whatever log_to_driver says, with addresses: we tell them ourselves
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *arguments, **named: None
    try:
        yield ray
    finally:
        ray.shutdown()


def rooms(ray: Any) -> dict[str, Need]:
    """What every node that is up has in all, by its id."""
    capacities = {}
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            capacities[node["NodeID"]] = Need(has.get("CPU", 0.0), has.get("GPU", 0.0), int(has.get("memory", 0)))
    return capacities


class Actors:
    """A pool of Ray actors, each on the node that the scheduler chose."""

    def __init__(self, ray: Any, setup: WorkerSetup):
        self.ray, self.setup = ray, ray.put(setup)
        self.actors: dict[int, Any] = {}
        self.nodes: dict[int, str] = {}
        self.pending: dict[Any, int] = {}
        self.silent: dict[int, float] = {}  # workers that do not answer, since when

    def rooms(self) -> dict[str, Need]:
        return rooms(self.ray)

    def start(self, start: Start) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": start.need.cpus,
            "num_gpus": start.need.gpus,
            "memory": start.need.memory,
            "max_restarts": 0,  # the scheduler counts deaths itself
            "max_task_retries": 0,
            "max_concurrency": 2,  # `stop` beside `do`
            "scheduling_strategy": NodeAffinitySchedulingStrategy(start.node, soft=False),
        }
        actor_class = self.ray.remote(Worker).options(**options)
        actor = actor_class.remote(self.setup, f"worker-{start.worker}", start.model)
        self.actors[start.worker], self.nodes[start.worker] = actor, start.node
        self.pending[actor.load.remote()] = start.worker

    def give(self, worker: int, work: Work, again: bool) -> None:
        self.pending[self.actors[worker].do.remote(work, again)] = worker

    def stop(self, worker: int) -> None:
        self.ray.kill(self.actors.pop(worker))

    def halt(self) -> None:
        for actor in self.actors.values():
            actor.stop.remote()

    def events(self, seconds: float) -> list[Event]:
        if not self.pending:
            time.sleep(min(seconds, 0.02))
            return []
        refs = list(self.pending)
        ready, _ = self.ray.wait(refs, num_returns=1, timeout=seconds)
        if ready and len(refs) > 1:
            ready, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        pairs = [(worker, self._news(worker, ref)) for ref in ready for worker in [self.pending.pop(ref)]]
        return [Event(worker, news) for worker, news in pairs if news is not None]

    def _news(self, worker: int, ref: Any) -> Loaded | Report | Death | None:
        """What a worker said, or what became of it; None while Ray does not know."""
        try:
            said = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:  # nsteer's own errors come as news, so this is a fault
            cause = error.cause
            return Report(ended=f"{type(cause).__name__}: {cause}")
        except self.ray.exceptions.RayError as error:
            unsure = isinstance(error, self.ray.exceptions.ActorUnavailableError)
            if unsure and worker in self.actors and self._may_be_alive(worker):
                return None
            self._bury(worker)
            return self._death(worker, error)
        if worker in self.silent:  # it answers again, but its task is lost
            self._bury(worker)
            return Death("it could not be reached for a while", blame=False)
        return said

    def _may_be_alive(self, worker: int) -> bool:
        """Asks a worker that was silent once more; False when it has been silent for too long.

        The processes of a node that goes down are missed seconds before the node is.
        """
        if time.monotonic() > self.silent.setdefault(worker, time.monotonic()) + DOUBT:
            return False
        self.pending[self.actors[worker].__ray_ready__.remote()] = worker
        return True

    def _bury(self, worker: int) -> None:
        """One that can not be reached may still be at work."""
        self.silent.pop(worker, None)
        if worker in self.actors:
            with contextlib.suppress(Exception):
                self.ray.kill(self.actors.pop(worker))

    def _death(self, worker: int, error: Any) -> Death:
        """Why a worker died, in our words: Ray's name machines, processes and paths."""
        said = str(error)
        gone = self.nodes[worker] not in rooms(self.ray)
        if gone or "its node has died" in said or getattr(error, "preempted", False):
            return Death("its node went down", blame=False)
        if "creation task" in said or "Error importing" in said or "ModuleNotFoundError" in said:
            return Death("it could not begin: is nsteer, of this version, installed on its node?")
        if isinstance(error, self.ray.exceptions.OutOfMemoryError) or "running low on memory" in said:
            return Death("it was killed because its node ran out of memory")
        return Death("its process was killed or crashed")

    def close(self) -> None:
        for worker in list(self.actors):
            with contextlib.suppress(Exception):
                self.ray.kill(self.actors.pop(worker))
