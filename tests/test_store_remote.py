"""The store on object storage, against a server on loopback: the same promises, by whole PUTs and a lease."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.pool
import os
import random
import signal
import time

import numpy as np
import pytest
import xarray as xr
from test_store import PATH, assert_true, commit, vector_data, vectors
from test_store_violence import KILLS, TEXTS, VECTORS, check_group, noted, write_remotely
from test_upkeep import run

import nsteer
from nsteer.errors import StoreError
from nsteer.store import Store, records, remote
from nsteer.upkeep import diff
from nsteer.upkeep.merge import merge
from nsteer.upkeep.verify import verify

server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
SECRET = "loopback-secret"


@pytest.fixture(scope="module")
def endpoint():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "loopback-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # one of another module's server is no use
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # buckets outlive their server
    yield given["AWS_ENDPOINT_URL"]
    running.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def url(endpoint, request) -> str:
    return f"s3://bucket/{abs(hash(request.node.name))}/s.zarr"


@pytest.fixture(scope="module")
def prepared(endpoint) -> dict[str, bytes]:
    """The objects of a store that was prepared there: a copy takes a fifth of what preparing takes."""
    store = Store("s3://bucket/prepared/s.zarr")
    store.prepare([vectors()])
    return store.place.read_all(name for name, _ in store.place.walk())


@pytest.fixture
def store(url, prepared) -> Store:
    import s3fs

    s3fs.S3FileSystem().pipe({f"{url}/{name}": content for name, content in prepared.items()})
    return Store(url)


def objects(url: str) -> dict[str, int]:
    return dict(Store(url).place.walk())


def test_cells_come_back_under_their_labels_and_resume_knows_them(store, url):
    commit(store, "dm", "joy", number=1)
    store.prepare([vectors(layers=[9], emotions=["awe"])])
    commit(store, "pca", "awe", layers=[9, 2, 5], number=2)
    again = Store(url)
    assert again.missing(PATH, {("dm", "joy"): 1, ("pca", "awe"): 9, ("dm", "fear"): 1}) == [
        ("pca", "awe"),
        ("dm", "fear"),
    ]
    assert_true(again.read(PATH), "dm", "joy", [5, 2])
    results = nsteer.open(url)
    assert_true(results[PATH].load(), "pca", "awe", [5, 2, 9])
    assert np.isnan(results[PATH].norm.sel({"method": "dm", "emotion": "awe"})).all()
    assert results.sel(model="zoo/llama", method="dm", emotion="joy", layer=5).dims == ("d_model",)
    code, said = run("ls", url)
    assert code == 0 and "2/6" in said.replace(" ", "")
    report = verify(again)
    assert report.clean and not report.leftovers
    assert_true(xr.open_zarr(f"{url}/{PATH}", chunks=None), "dm", "joy", [5, 2])  # plain xarray, too


def test_a_cell_computed_anew_raises_for_who_holds_the_old_view(store, url):
    commit(store, "dm", "joy")
    held = nsteer.open(url)[PATH]
    assert_true(held, "dm", "joy", [5, 2])
    commit(store, "dm", "joy", number=8)
    with pytest.raises(StoreError, match="was computed again after this was opened"):
        nsteer.open(url)[PATH].load() and held.norm.load()
    with pytest.raises(StoreError, match="computed again"):
        held.vector.sel({"method": "dm", "emotion": "joy"}).load()


def test_a_removed_object_is_found_and_the_cell_dropped(store, url):
    commit(store, "dm", "joy")
    commit(store, "dm", "fear")
    assert store.place.delete(f"{PATH}/vector/c.0.1.1.0.0")
    code, said = run("verify", url, "--repair")
    assert code == 0 and "next run computes this cell again" in said
    assert list(Store(url).committed(PATH)) == [("dm", "joy")]


def test_kept_records_spare_the_storage_all_gets_but_of_what_changed(store, url, monkeypatch):
    monkeypatch.setattr(records, "WORTH", 1)
    for number, emotion in enumerate(["joy", "fear"]):
        commit(store, "dm", emotion, number=number)
    store.keep_records()
    commit(store, "dm", "joy", number=8)
    commit(store, "pca", "fear", number=9)
    asked: list[str] = []
    plain = remote.Remote.read_all
    monkeypatch.setattr(remote.Remote, "read_all", lambda self, names: plain(self, asked.extend(names) or names))
    fingerprints = {cell: record.fingerprint for cell, record in Store(url).committed(PATH).items()}
    assert fingerprints == {("dm", "joy"): 8, ("dm", "fear"): 1, ("pca", "fear"): 9}
    cells = [name for name in asked if name.startswith(f"{PATH}/cell/")]  # labels are read as ever
    assert sorted(cells) == [f"{PATH}/cell/c.0.1.0", f"{PATH}/cell/c.1.0.0"]
    report = verify(Store(url))
    assert report.clean and not report.leftovers


def test_a_local_store_is_published_by_a_merge(tmp_path, url):
    local = Store(tmp_path / "s.zarr")
    local.prepare([vectors()])
    commit(local, "dm", "joy", run=local.add_run(plan="x", environment={}, started="2026-11-23T00:00:00Z"))
    assert merge([local], Store(url)).copied == {PATH: 1}
    assert verify(Store(url)).clean and Store(url).committed(PATH) == local.committed(PATH)


# ---- the lease


def test_the_lease_of_a_dead_holder_is_taken_over_and_a_sleeper_publishes_nothing(store, url, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 0.5)
    sleeper = Store(url)
    lock = sleeper.place.lock()
    lock.__enter__()  # and never renewed: as if it had been killed
    start = time.monotonic()
    store.prepare([vectors(emotions=["awe"])])
    assert time.monotonic() - start >= 0.5
    before = objects(url)
    with pytest.raises(StoreError, match=r"slept longer than .* and another took over; run again"):
        sleeper.place.write("x", b"late")
    assert objects(url) == before
    lock.__exit__(None, None, None)


def test_a_lease_that_is_renewed_is_not_taken_over(store, url, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 0.6)
    monkeypatch.setattr(remote, "LOCK_SECONDS", 1.5)
    other = Store(url)
    with store.place.lock():
        waiting = multiprocessing.pool.ThreadPool(1).apply_async(lambda: other.place.lock().__enter__())
        for _ in range(20):
            store.place.write("probe", b"x")
            time.sleep(0.1)
        with pytest.raises(StoreError, match=r"another process has held s3://.*lock for 1.5 s"):
            waiting.get(5)
    store.place.delete("probe")
    assert not any(name.endswith(".lock") for name in objects("s3://bucket/" + url.split("/")[3]))


def test_a_document_is_not_put_over_one_that_came_in_since(store):
    raw, version = store.place.versioned("zarr.json")
    store.place.write("zarr.json", raw, over=version)
    changed = json.loads(raw)
    store.place.write("zarr.json", json.dumps(changed, indent=3).encode())
    with pytest.raises(remote.Changed):
        store.place.write("zarr.json", raw, over=version)
    with pytest.raises(remote.Changed):
        store.place.write("zarr.json", raw, over="")


# ---- kills and several writers


@pytest.fixture(scope="module")
def forkserver(endpoint):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsteer.store", "s3fs"])
    return context


def assert_whole(url, logs) -> int:
    data, seen = {name: Store(url).read(name).load() for name in (VECTORS, TEXTS)}, 0
    known = {emotion: layers for log in logs for emotion, layers in noted(log).items()}
    for name, group in data.items():
        seen += check_group(name, group, known)
    report = verify(Store(url))
    assert {finding.kind for finding in report.findings} <= {"provenance"}, report  # these writers record no runs
    return seen


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def kill_loop(forkserver, tmp_path, url, kills, names="a") -> None:
    chance, logs = random.Random(3), [tmp_path / f"{name}.log" for name in names]
    for _ in range(kills):
        ready = [forkserver.Event() for _ in logs]
        writers = [
            forkserver.Process(target=write_remotely, args=(environment(), url, str(log), log.stem, 10**6, event))
            for log, event in zip(logs, ready, strict=True)
        ]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in ready)
        time.sleep(chance.uniform(0.5, 3))
        for writer in writers:
            writer.kill()
            writer.join()
            assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself"
        if any(map(noted, logs)):
            assert_whole(url, logs)
    seen = len(noted(logs[0]))
    last = forkserver.Process(target=write_remotely, args=(environment(), url, str(logs[0]), names[0], 2))
    last.start()
    last.join()
    assert last.exitcode == 0 and len(noted(logs[0])) == seen + 2  # goes on as if nothing had happened
    assert assert_whole(url, logs) >= 4


@pytest.mark.slow
def test_many_kills_of_two_writers_lose_nothing(forkserver, tmp_path, url):
    kill_loop(forkserver, tmp_path, url, kills=KILLS // 2, names="ab")


@pytest.mark.slow
def test_two_writers_that_grow_at_once_lose_nothing(forkserver, tmp_path, url):
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    writers = [
        forkserver.Process(target=write_remotely, args=(environment(), url, str(log), log.stem, 2)) for log in logs
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert assert_whole(url, logs) == 8


def test_gc_deletes_nothing_there_before_somebody_says_that_no_run_is_at_work(store, url, tmp_path):
    commit(store, "dm", "joy")
    plan = {"name": "other", "models": ["zoo/gpt2"], "texts": "zoo", "emotions": ["happy"], "threads": 1, "store": url}
    plan["methods"] = {"read": {"source": "comprehension", "samples": 2}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    before = objects(url)
    code, said = run("gc", url, tmp_path / "plan.yaml", "--delete", "--older-than", 0)
    assert code == 1 and "--alone" in said and "Traceback" not in said and objects(url) == before
    assert run("gc", url, tmp_path / "plan.yaml")[0] == 0 and objects(url) == before
    code, said = run("gc", url, tmp_path / "plan.yaml", "--delete", "--alone", "--older-than", 0)
    assert code == 0 and "1 cells" in said and not Store(url).committed(PATH) and verify(Store(url)).clean


@pytest.mark.slow
def test_a_plan_runs_into_a_bucket_and_goes_on_there(url, folder, tmp_path, monkeypatch):
    from test_runner import METHODS, write
    from test_runner import run as conduct

    few = {"emotions": ["joy", "fear"], "methods": {"read": METHODS["read"]}, "steer": None}
    plan = write(tmp_path, folder("llama"), store=url, **few)
    local = write(tmp_path, folder("llama"), "local", **few)
    first, second = conduct(plan), conduct(plan)
    assert first.done and not second.done and not first.failures
    conduct(local)
    difference = diff.stores(Store(tmp_path / "local.zarr"), Store(url))
    assert difference.equal and sum(variable.cells for variable in difference.variables) > 20
    assert verify(Store(url)).clean and run("gc", url, plan)[0] == 0


# ---- what goes wrong is said, and no secret is


def test_urls_with_credentials_are_refused_without_repeating_them():
    for bad in ("s3://key:hunter2@bucket/s.zarr", "abfs://box/s.zarr?sig=hunter2"):
        with pytest.raises(StoreError, match="must not hold credentials") as caught:
            Store(bad)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError, match="names no store"):
        Store("s3://")


def test_what_a_server_refuses_is_said_in_a_line(endpoint, url, monkeypatch):
    code, said = run("ls", "s3://no-such-bucket/s.zarr")
    assert code == 1 and said.startswith("error: ") and SECRET not in said and len(said.splitlines()) == 1
    with pytest.raises(StoreError, match=r"can not prepare: .*bucket"):
        Store("s3://no-such-bucket/s.zarr").prepare([vectors()])
    code, said = run("ls", url + "x")
    assert code == 1 and f"no store at {url}x" in said
    Store(url).place.write("thesis.txt", b"mine")
    with pytest.raises(StoreError, match="is not an nsteer store; nothing was written"):
        Store(url).prepare([vectors()])
    with pytest.raises(StoreError, match="nosuchscheme"):
        Store("nosuchscheme://bucket/s.zarr").prepare([vectors()])


def test_nothing_of_the_credentials_is_in_the_store(store, url):
    commit(store, "dm", "joy")
    for name in objects(url):
        content = store.place.read(name)
        assert SECRET.encode() not in content and b"loopback-key" not in content and b"127.0.0.1" not in content


# ---- faults


@pytest.fixture
def behind(endpoint, monkeypatch):
    """The server behind a proxy that fails as it is told."""
    import s3fs
    from faulty_proxy import FaultyProxy

    @contextlib.contextmanager
    def start(**how):
        with FaultyProxy(endpoint, **how) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            s3fs.S3FileSystem.clear_instance_cache()
            yield proxy
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()

    return start


def test_a_conditional_put_whose_answer_was_lost_is_a_success(behind, url):
    """The answer to the first PUT of lease, labels, document and record is lost: the client asks again, and is
    refused by its own."""
    seen: set[str] = set()

    def first(method: str, path: str) -> str:
        conditional = path.endswith((".lock", "emotion/c.0", "llama/zarr.json")) or "/cell/c." in path
        if method != "PUT" or path in seen or not conditional:
            return ""
        seen.add(path)
        return "lost"

    with behind(choose=first) as proxy:
        store = Store(url)
        store.prepare([vectors()])
        commit(store, "dm", "joy")
        assert proxy.count["lost"] == 4
    assert_true(nsteer.open(url)[PATH].load(), "dm", "joy", [5, 2])
    assert verify(Store(url)).clean
    assert not any(name.endswith(".lock") for name in objects(url))


@pytest.mark.slow
def test_work_goes_on_where_a_fifth_of_the_requests_fail(behind, url):
    with behind(share=0.2, delay=0.05, seed=5) as proxy:
        store = Store(url)
        store.prepare([vectors()])
        for method in ("pca", "dm"):
            commit(store, method, "joy")
        store.prepare([vectors(emotions=("awe",))])
        commit(store, "dm", "awe")
        assert sum(proxy.count[kind] for kind in ("error", "reset", "lost")) > 10
    assert set(Store(url).committed(PATH)) == {("pca", "joy"), ("dm", "joy"), ("dm", "awe")}
    assert_true(nsteer.open(url)[PATH].load(), "dm", "awe", [5, 2])
    assert verify(Store(url)).clean


def test_a_holder_that_slept_puts_no_labels_over_anothers(store, url, monkeypatch):
    """It sleeps right before its first write; meanwhile another takes the lease over, grows the axis and commits."""
    monkeypatch.setattr(remote, "LEASE", 0.5)
    first, slept = remote.Remote.write, []

    def late(self, name, content, over=None):
        if not slept and self is sleeper.place:
            slept.append(name)
            other = Store(url)
            other.prepare([vectors(emotions=("angry",))])
            commit(other, "dm", "angry")
        remote.Remote._put(self, self._path(name), content, over)  # it does not even look at its lease

    sleeper = Store(url)
    monkeypatch.setattr(remote.Remote, "write", late)
    with pytest.raises(StoreError, match="run again"):
        sleeper.prepare([vectors(emotions=("calm",))])
    monkeypatch.setattr(remote.Remote, "write", first)
    assert slept
    assert Store(url).leaf(PATH).along("emotion") == ["joy", "fear", "angry"]
    assert_true(Store(url).read(PATH).load(), "dm", "angry", [5, 2])
    assert verify(Store(url)).clean
    sleeper.prepare([vectors(emotions=("calm",))])
    assert Store(url).leaf(PATH).along("emotion") == ["joy", "fear", "angry", "calm"]


def test_two_that_commit_one_cell_do_not_leave_one_under_the_others_record(store, url, monkeypatch):
    """The second commits it whole between the first one's data and its record."""
    first, met = remote.Remote.seal, []
    other = Store(url)
    data = vector_data("dm", "joy")

    def late(self, name, content):
        if not met:
            met.append(name)
            other.commit(PATH, ("dm", "joy"), data * 2, fingerprint=8)
        first(self, name, content)

    monkeypatch.setattr(remote.Remote, "seal", late)
    store.commit(PATH, ("dm", "joy"), data, fingerprint=7)
    assert Store(url).committed(PATH)["dm", "joy"].fingerprint == 7
    assert_true(nsteer.open(url)[PATH].load(), "dm", "joy", [5, 2])
    assert verify(Store(url)).clean
