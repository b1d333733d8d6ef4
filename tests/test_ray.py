"""A plan on a Ray cluster of two workers gives the store of one process, whatever was stopped or killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_cluster import same
from test_runner import records, results, run
from test_store_remote import endpoint

from nsteer.cluster import looking
from nsteer.store import Store

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

__all__ = ["endpoint"]  # a fixture: object storage on loopback

FAMILIES = Path(__file__).parent.parent / "plans" / "families.yaml"
GENERATION = "generation: {source: generation, samples: 3, generate: {max_new_tokens: 12}, baseline: grand_mean}"
READING = "comprehension: {source: comprehension, samples: 2, pooling: last, baseline: neutral_mean}"
SHORT = ("emotions=[happy,sad]", "steer.controls=[random]", "steer.generate.max_new_tokens=16", "threads=1")
CUT = (
    "models=[zoo/llama,zoo/gpt2]",
    f"methods={{{GENERATION}, {READING}}}",
    "steer.vectors.emotions=[happy,sad]",
    "steer.strengths=[0.1,0.15]",
    *SHORT,
)
CODE = "import sys; from nsteer.cli import main; main(sys.argv[1:])"


def start(*words, cut=CUT, address: str = "", workers: int = 2, **more) -> subprocess.Popen:
    settings = [word for setting in cut for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"RAY_ADDRESS": address} if address else {})}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "run", str(FAMILIES), *settings, "--on", "ray", "--workers", str(workers), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        **more,
    )


def actors(process) -> list[int]:
    """The processes of a driver's workers."""
    children = psutil.Process(process.pid).children(recursive=True)
    pids = []
    for child in children:
        try:
            if "Worker" in " ".join(child.cmdline()) and "ray::" in " ".join(child.cmdline()):
                pids.append(child.pid)
        except psutil.Error:
            continue
    return pids


def until(enough: Callable[[], bool], process, seconds: float = 400.0, pause: float = 0.5) -> None:
    """Waits until a run has got so far, looking every `pause` seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if enough():
            return
        time.sleep(pause)
    raise AssertionError(f"the run ended, or did not get so far: {process.communicate()[1].decode()[-2000:]}")


def has(store: Path, group: str) -> bool:
    """Whether a group of a store has cells."""
    return (store / group).is_dir() and bool(Store(store).committed(group))


def ended(process, code: int = 0, said: str = "") -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err.decode()[-3000:]
    assert "Traceback" not in err.decode() and said in err.decode(), err.decode()[-3000:]
    return out.decode()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The store of one process."""
    store = tmp_path_factory.mktemp("alone") / "alone.zarr"
    assert not run(FAMILIES, *CUT, f"store={store}").failures
    return store


def computed(store: Path) -> dict:
    """The commit record, its time included, of every cell that a worker or the driver computed."""
    return {key: cell for key, cell in records(store).items() if key[0] not in ("runs", "models", "failures")}


def test_stopped_then_the_driver_killed_then_a_worker_killed_is_the_store_of_one_process(alone, tmp_path):
    """Ctrl-C on the whole terminal; then SIGKILL of the driver: no worker is left, and only missing cells are done.

    Then SIGKILL of a worker of two: another begins for it, and the run ends as if nothing had been. The runs before
    have one worker: it takes long to start.
    """
    store = tmp_path / "store" / "families.zarr"
    process = start("--quiet", workers=1)
    until(lambda: has(store, "samples/zoo--llama"), process)
    os.killpg(process.pid, signal.SIGINT)
    ended(process, 130)
    assert results(store, "runs").status.values.tolist() == ["interrupted"]
    stopped = computed(store)
    process = start("--quiet", workers=1)
    # one of the models may be ahead of the other by whole stages, so what is new is looked for in all groups
    # ... and the driver may commit what needs no model before its workers are there
    until(lambda: len(computed(store)) > len(stopped) and bool(actors(process)), process)
    working = [psutil.Process(pid) for pid in actors(process)]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(working, timeout=60)
    assert working and not alive, "workers end with their driver; agents of Ray's own go a minute later"
    killed = computed(store)
    assert len(killed) > len(stopped), "some of the second run is there"
    process = start("--json")
    until(lambda: len(computed(store)) > len(killed) and bool(actors(process)), process)
    os.kill(actors(process)[0], signal.SIGKILL)
    summary = json.loads(ended(process))
    assert not summary["failures"] and summary["skipped"]["samples"] > 0 and summary["done"]["steering"] > 0
    last = max((tmp_path / "store" / "families.zarr.logs").iterdir())  # runs are named by when they began
    logs = sorted(last.rglob("worker-*.log"))
    assert len(logs) >= 3 and all("process" in log.read_text() for log in logs), "one more began for the one killed"
    whole = computed(store)
    for before in (stopped, killed):
        assert {key: whole[key] for key in before} == before, "the same records: none of those cells was done again"
    same(alone, store)


@pytest.fixture
def nodes(endpoint, monkeypatch):
    """A cluster of a head that works nothing and two nodes, on this machine; its workers can reach the storage."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    few = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **few})
    yield cluster, [cluster.add_node(num_cpus=1, **few) for _ in range(2)]
    cluster.shutdown()


def test_a_node_goes_down_and_the_store_lies_on_object_storage(nodes, tmp_path):
    """The cluster is reached by its address, and the store is all that its nodes share."""
    cluster, (first, _) = nodes
    cut = ("models=[zoo/llama]", "steer.vectors.emotions=[happy]", "judge=null", f"methods={{{GENERATION}}}", *SHORT)
    cut += ("batch={rows: 8}", "steer.strengths=[0.1,0.15,0.2,0.25]")  # many small tasks: both nodes have some
    assert not run(FAMILIES, *cut, f"store={tmp_path / 'alone.zarr'}").failures
    url = "s3://bucket/nodes/families.zarr"
    process = start(cut=(*cut, f"store={url}"), address=cluster.address)
    until(lambda: Store(url).exists and bool(Store(url).committed("generations")), process, pause=1.0)
    cluster.remove_node(first, allow_graceful=False)
    ended(process, said="its node went down; its current task is done again")
    same(tmp_path / "alone.zarr", url)


def test_the_doctor_looks_at_a_cluster():
    findings = {finding.name: finding for finding in looking.findings()}
    assert findings["ray"].state == findings["node 1"].state == "ok" and "CPU" in findings["node 1"].value
    assert findings["node 1's versions"].state == "ok" and findings["node 1's folder"].state == "ok"
