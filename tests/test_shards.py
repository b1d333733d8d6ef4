"""Shards fill, in one store or in several that are merged, the store that one run fills."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import prefork
import pytest
from test_cluster import GENERAL, NEW, SHORT, SMALL_BATCHES, same
from test_runner import METHODS, STEER, invoke, judge, records, run, write

from nsteer.errors import ArgumentsError
from nsteer.plan import check
from nsteer.runner.shards import Shard, shard_of
from nsteer.stages.job import jobs
from nsteer.stages.table import BY_NAME, STAGES
from nsteer.store import Store
from nsteer.system import locks
from nsteer.upkeep.merge import merge
from nsteer.upkeep.verify import verify

judge = judge
TWIN = {**SHORT, "twin": {**SHORT["made"], "pooling": {"kind": "mean_from", "k": 1}}}
"""`twin` has the samples of `made`, which are copied, and streams of its own."""

CALIBRATED = {"name": "found", "strengths": {"kl": [0.05], "tokens": 4}, "layers": [2], "prompts": {"walk": "tom ran"}}
STUDY = {
    **GENERAL,
    **SMALL_BATCHES,
    "methods": TWIN,
    "steer": [
        {**STEER[1], "generate": {**STEER[1]["generate"], **NEW}},
        {**CALIBRATED, "generate": NEW, "controls": ["random"]},
    ],
}

NO_FLOCK = """
import errno, fcntl, sys
def refused(file, how):
    raise OSError(errno.{error}, "no such locks")
fcntl.flock = refused
from nsteer.system import locks
from nsteer.runner import shards
shards.LOOK = 0.5
assert not locks.reaches(sys.argv[1])
from nsteer.cli import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def alone(folder, judge, tmp_path_factory):
    """The study of one model by one process: its store, and how to write its plan elsewhere, for one model or two."""
    place = tmp_path_factory.mktemp("alone")
    models = [{"id": str(folder(name)), "label": name, "device": "cpu"} for name in ("llama", "gpt2")]
    more = {**STUDY, "judge": {"classifier": str(judge), "device": "cpu"}}

    def plan(where, count: int = 1):
        return write(where, folder("llama"), models=models[:count], **more)

    assert not run(plan(place)).failures
    return place / "plan.zarr", plan


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """One model, two stages of vectors and a grid of a few cells: for what is done again and again."""
    place = tmp_path_factory.mktemp("small")
    joy = {"vectors": {"methods": ["made"], "emotions": ["joy"]}, "generate": {"max_new_tokens": 2}}
    steer = [{**STEER[0], **joy, "strengths": [0.3, 0.4], "layers": {"each": [3, 1]}}]
    methods = {"made": SHORT["made"]}

    def plan(where):
        return write(where, folder("llama"), methods=methods, steer=steer, directions=GENERAL["directions"])

    assert not run(plan(place)).failures
    return place / "plan.zarr", plan


def passes(plan: Path, count: int, *settings: str) -> int:
    """Runs all shards one after the other, until none of them leaves anything: how often."""
    for number in range(1, 10):
        summaries = [run(plan, *settings, shard=Shard(i, count)) for i in range(1, count + 1)]
        assert not any(summary.failures for summary in summaries), [s.failures for s in summaries]
        if not any(summary.left for summary in summaries):
            return number
    raise AssertionError("shards never come to an end")


def test_shards_one_after_the_other_fill_the_store_of_one_run(alone, tmp_path):
    store, plan = alone
    file = plan(tmp_path)
    assert passes(file, 2) <= 5
    same(store, tmp_path / "plan.zarr")
    assert not verify(Store(tmp_path / "plan.zarr")).findings
    again = run(file)
    assert not again.done and not again.failures
    by = {key: cell.run for key, cell in records(tmp_path / "plan.zarr").items() if key[0] == "steering"}
    assert len({number % 2 for number in by.values()}) == 2, "each of the shards had its part"


def test_parts_are_disjoint_whole_and_about_as_large(alone, tmp_path):
    study = check.load(alone[1](tmp_path, 2))
    for stage in STAGES:
        wanted = {key: job for job in jobs(study) for key in job.wanted(stage.cells)}
        if stage.reads or not wanted:
            continue
        for count in (1, 2, 3, 7, 1000):
            shards = shard_of(jobs(study), stage, count)
            assert set(shards) == set(wanted) and set(shards.values()) <= set(range(1, count + 1))
            if stage.name == "steering" and count <= 3:
                rows = Counter()
                for key, part in shards.items():
                    rows[part] += stage.rows(wanted[key], key)
                assert max(rows.values()) <= 1.5 * sum(rows.values()) / count, rows


def test_what_is_computed_from_cells_of_the_same_keys_is_in_their_shard(alone, tmp_path):
    """`twin` copies the samples of `made` and reads streams of its own: all three cells of a chunk go together."""
    study = check.load(alone[1](tmp_path, 2))
    shards = shard_of(jobs(study), BY_NAME["samples"], 5)
    assert all(shards[key] == shards[key._replace(method="made")] for key in shards if key.method == "twin")
    assert len({shards[key] for key in shards if key.method == "twin"}) > 1


def test_a_stage_that_rests_on_others_cells_waits_for_a_later_run(small, tmp_path):
    plan = small[1](tmp_path)
    first = run(plan, shard=Shard(1, 2))
    assert not first.failures and first.done["samples"] and first.done["activations"]
    assert first.left["steering"], "the vectors of the model of which the other shard has a part"
    said = invoke("run", plan, "--shard", "1/2", "--quiet")
    assert said.exit_code == 0 and "rest on cells that other shards have not done" in said.output
    rest = run(plan)  # a run that is no shard does all that is left
    assert not rest.failures and not rest.left
    same(small[0], tmp_path / "plan.zarr")


def test_a_failure_of_another_shard_is_not_waited_for(folder, tmp_path):
    """The second shard's samples fail for good: what rests on them fails as in one run, the rest is done."""
    texts = {"methods": {"read": {**METHODS["read"], "pooling": {"kind": "mean_from", "k": 1000}}}, "steer": []}
    plan = write(tmp_path, folder("llama"), **texts)
    for shard in (Shard(1, 2), Shard(2, 2), Shard(1, 2), Shard(2, 2)):
        summary = run(plan, shard=shard)
    assert not summary.left


def start(plan: Path, shard: str, error: str, wait: str) -> subprocess.Popen:
    words = [str(plan.parent), "run", str(plan), "--shard", shard, "--wait", wait, "--json"]
    code = NO_FLOCK.format(error=error)
    return subprocess.Popen(prefork.python(code, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_shards_at_once_where_no_file_can_be_locked(small, tmp_path):
    """They wait for each other's cells by looking at the store, and change its structure by marker files."""
    store, plan = small
    both = [start(plan(tmp_path), shard, "ENOSYS", "5") for shard in ("1/2", "2/2")]
    told = []
    for process in both:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err.decode()
        told.append(json.loads(out))
    assert not any(summary["failures"] or summary["left"] for summary in told)
    assert all(summary["done"]["steering"] for summary in told)
    same(store, tmp_path / "plan.zarr")
    assert not verify(Store(tmp_path / "plan.zarr")).findings
    assert not list(tmp_path.glob("*.held")) and not (tmp_path / "plan.zarr.leases").exists()


def test_stores_of_shards_are_merged(small, tmp_path):
    """Without a store in common: each pass begins with what the passes before it made."""
    store, plan = small
    file = plan(tmp_path)
    own = [tmp_path / f"{i}.zarr" for i in (1, 2)]
    for _ in range(6):
        left = {}
        for i, place in enumerate(own, 1):
            summary = run(file, f"store={place}", shard=Shard(i, 2))
            left |= summary.left
        done = merge([Store(place) for place in own], Store(tmp_path / "plan.zarr"))
        assert not done.conflicts
        if not left:
            break
        for place in own:
            merge([Store(tmp_path / "plan.zarr")], Store(place))
    assert not left
    same(store, tmp_path / "plan.zarr")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "a/b", "1", "-1/3", "1/3/5"])
def test_what_is_no_part_is_refused(text, tmp_path, folder):
    with pytest.raises(ArgumentsError, match="shard"):
        Shard.parsed(text)
    plan = write(tmp_path, folder("llama"))
    said = invoke("run", plan, f"--shard={text}")
    assert said.exit_code and "shard" in said.output and not (tmp_path / "plan.zarr").exists()


def test_options_that_do_not_go_together(tmp_path, folder):
    plan = write(tmp_path, folder("llama"))
    assert "--wait" in invoke("run", plan, "--wait", "5").output
    assert "--shard" in invoke("run", plan, "--shard", "1/2", "--on", "ray").output


# ---- locks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reach"),
    [
        ("server:/x {} nfs4 rw,relatime,vers=4.2,local_lock=none 0 0", True),
        ("server:/x {} nfs rw,vers=3,nolock,local_lock=all 0 0", False),
        ("mds@tcp:/x {} lustre rw,flock,lazystatfs 0 0", True),
        ("mds@tcp:/x {} lustre rw,localflock 0 0", False),
        ("/dev/sda1 / ext4 rw 0 0", True),
    ],
)
def test_whether_locks_reach_other_machines_is_read_from_the_mount(line, reach, tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    under = tmp_path / "with space"
    under.mkdir()
    mounts.write_text("\n".join(["overlay / overlay rw 0 0", line.format(str(under).replace(" ", "\\040"))]))
    monkeypatch.setattr(locks, "MOUNTS", mounts)
    assert locks.reaches(str(under)) == reach
    assert isinstance(locks.lock(under / "a.lock", 1), locks.filelock.SoftFileLock) != reach
    locks.reaches.cache_clear()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_that_refuses_locks(error, tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(error, "no")

    assert locks.granted(str(tmp_path))
    monkeypatch.setattr(locks.fcntl, "flock", refused)
    assert not locks.granted(str(tmp_path)) and not list(tmp_path.iterdir())


def test_the_marker_of_a_killed_process_is_told(tmp_path, monkeypatch):
    """One of another machine: nobody can see that it is dead."""
    from nsteer.errors import StoreError
    from nsteer.store import places

    monkeypatch.setattr(locks, "reaches", lambda folder: False)
    monkeypatch.setattr(places, "LOCK_SECONDS", 0.2)
    (tmp_path / "s.zarr.lock.held").write_text("")
    with (
        pytest.raises(StoreError, match=r"s\.zarr\.lock\.held .*remove that file"),
        places.Local(tmp_path / "s.zarr").lock(),
    ):
        pass
    assert os.path.exists(tmp_path / "s.zarr.lock.held")
