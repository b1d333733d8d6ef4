"""Many workers fill the store that one process fills, whoever dies; only missing cells are done again."""

from __future__ import annotations

import io
import threading
import time

import pytest
import test_runner
import test_two_runs
import workers_here
import xarray as xr
from test_runner import METHODS, STEER, records, results, run, write

import nsteer
from nsteer import cluster
from nsteer.cluster import showing
from nsteer.cluster.cutting import cut
from nsteer.cluster.pool import Death
from nsteer.cluster.scheduler import Need
from nsteer.cluster.worker import Work
from nsteer.errors import ClusterError
from nsteer.plan import check
from nsteer.runner.progress import Progress
from nsteer.runner.runs import Run
from nsteer.runner.stopping import Interrupted, Stop
from nsteer.store import Store
from nsteer.store.leases import Leases
from nsteer.upkeep.verify import verify

judge = test_runner.judge
NEW = {"max_new_tokens": 3}
GRID = [{**STEER[0], "strengths": [0.1, 0.3], "layers": {"each": [3, 1]}, "generate": NEW}]
"""16 cells: two of each strength, layer, emotion and control."""
FEW = [
    {**GRID[0], "strengths": [0.3], "vectors": {"methods": ["made"], "emotions": ["joy"]}},
    {**STEER[1], "generate": {**STEER[1]["generate"], **NEW}},
]
"""4 and 2 cells: enough tasks for every worker of the study that several tests fill again, for two models."""
SHORT = {"made": {**METHODS["made"], "generate": NEW}, "read": METHODS["read"]}
GENERAL = {
    "prompts": {"walk": "tom ran to the", "night": "at night the old house was"},
    "reads": {"end": {"layers": [3, 1], "pooling": "last"}, "whole": {"layers": [2]}},
    "directions": {"d": {"contrast": {"positive": ["the warm sun"], "negative": ["the cold rain"]}}},
    "edits": {"away": [{"op": "project_out", "direction": "d", "layers": [3, 1]}]},
    "generate": {"max_new_tokens": 4},
    "measure": {"perplexity": True, "lens": 3, "anisotropy": True},
}
KILLER = ("tiny", "push", "3", "made", "joy", 0.3, "none")
SMALL_BATCHES = {"batch": {"rows": 4}}


def fill(plan, *settings, workers: int = 2, **more):
    study = check.load(plan, settings)
    pool = {name: more.pop(name) for name in ("fate", "nodes", "executor") if name in more}
    return cluster.fill(study, lambda setup: workers_here.Here(setup, **pool), workers=workers, **more)


def same(first, second, without: str = "") -> None:
    """Two stores hold the same cells with the same values, found by label; or all but the cells of one model that the
    second has beside."""
    left, right = ({key: cell.fingerprint for key, cell in records(path).items()} for path in (first, second))
    aside = ("runs", "failures", "programs") if without else ("runs", "failures")
    right = {k: v for k, v in right.items() if not without or without not in (*k[0].split("/"), *k[1:])}
    assert {k: v for k, v in left.items() if k[0] not in aside} == {k: v for k, v in right.items() if k[0] not in aside}
    stores = Store(first), Store(second)
    for group in {key[0] for key in left} - {*aside, "models", "programs"}:
        a, b = (store.read(group).load().drop_vars("cell") for store in stores)
        b = b.reindex({dim: a[dim] for dim in a.dims if dim in a.coords})
        xr.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def alone(folder, judge, tmp_path_factory):
    """The study by one process: its store, and how to write its plan elsewhere."""
    place = tmp_path_factory.mktemp("alone")
    changes = {"methods": SHORT, "emotions": ["joy", "rage"], "steer": FEW, **GENERAL, **SMALL_BATCHES}
    changes["judge"] = {"classifier": str(judge), "device": "cpu"}
    models = [{"id": str(folder(name)), "label": name, "device": "cpu"} for name in ("llama", "gpt2")]

    def plan(where, count: int = 2):
        return write(where, folder("llama"), models=models[:count], **changes)

    assert not run(plan(place)).failures
    return place / "plan.zarr", plan


def test_every_worker_loads_before_the_first_task_is_done(folder, tmp_path):
    """The first stage is one task; the grid will be many. A run in which nothing is missing starts nobody."""
    seen: list[str] = []

    class Watched(workers_here.Here):
        def start(self, start) -> None:
            seen.append("start")
            super().start(start)

        def give(self, worker, work, again) -> None:
            seen.append(work.stage)
            super().give(worker, work, again)

    plan = write(tmp_path, folder("llama"), steer=GRID, batch={"rows": 8})
    assert not cluster.fill(check.load(plan), Watched, workers=3).failures
    assert seen[:4] == ["start"] * 3 + ["samples"] and seen.count("start") == 3 and "steering" in seen
    seen.clear()
    cluster.fill(check.load(plan), Watched, workers=3)
    assert not seen


def test_searched_strengths_and_shared_texts_come_out_as_in_one_process(folder, tmp_path):
    """Two methods that differ in their baseline alone hold the same texts: written and read once, copied. Steering at
    strengths that are searched for rests on `calibration`, whose cells are shared out as any."""
    first = {**SHORT["made"], "neutral_samples": 3}
    methods = {"made": first, "other": {**first, "baseline": "neutral_mean"}}
    push = {
        **GRID[0],
        "vectors": {"methods": ["made", "other"], "emotions": ["joy"]},
        "strengths": {"kl": [0.4], "tokens": 2},
    }
    more = {"methods": methods, "steer": [push], "emotions": ["joy", "fear"], **SMALL_BATCHES}
    assert not run(write(tmp_path, folder("llama"), name="alone", **more)).failures
    plan = write(tmp_path, folder("llama"), name="workers", **more)
    texts = {path: [] for path in ("samples/tiny", "activations/tiny")}

    def fate(worker: int, work: Work) -> None:
        if work.paths[-1] in texts:
            texts[work.paths[-1]].append(work.fingerprints)

    summary = fill(plan, workers=3, fate=fate)
    assert not summary.failures and summary.done["calibration"] == 2 * 2, "layer sets, methods"
    assert summary.done["steering"] == 2 * 4, "each with its random control, at the strength found for the vector"
    same(tmp_path / "alone.zarr", tmp_path / "workers.zarr")
    for tasks in texts.values():
        wanted = [number for task in tasks for number in set(task.values())]
        assert wanted and len(wanted) == len(set(wanted)), "cells of one fingerprint are in one task"
        assert len(wanted) < sum(map(len, tasks)), "and some are shared"
    again = fill(plan, workers=3)
    assert not again.done and again.skipped["calibration"] == 4


def test_cells_that_hold_the_same_stay_in_one_task():
    """Copies count no rows, so a task that is full already takes them too."""
    sizes = {("a",): 40, ("a, again",): 0, ("b",): 3, ("b, again",): 0}
    assert list(cut(sizes, 4, 100)) == [[("a",), ("a, again",)], [("b",), ("b, again",)]]


def test_workers_of_which_some_die_half_way_fill_the_store_that_one_process_fills(alone, tmp_path):
    """They die having committed some of a task's cells, and some groups of one cell: those are done again elsewhere."""
    store, plan = alone
    died, begun = [], []

    def fate(worker: int, work: Work):
        begun.append((worker, work))
        if len(died) < 4 and work.stage in ("samples", "steering", "measure", "judged") and len(begun) % 3 == 0:
            died.append(worker)
            half = dict(list(work.fingerprints.items())[: max(1, len(work.fingerprints) // 2)])
            pool[0].workers[worker].do(Work(work.stage, work.paths, half), False)
            return Death("its process was killed or crashed")
        return None

    pool: list = []
    file = plan(tmp_path)
    study = check.load(file)
    summary = cluster.fill(
        study,
        lambda setup: pool.append(workers_here.Here(setup, fate=fate)) or pool[0],
        workers=3,
        display=showing.Display(),
    )
    assert len(died) == 4 and not summary.failures
    same(store, tmp_path / "plan.zarr")
    assert not verify(Store(tmp_path / "plan.zarr")).findings
    assert set(results(tmp_path / "plan.zarr", "models").model.values) == {"llama", "gpt2"}
    assert results(tmp_path / "plan.zarr", "runs").status.values.tolist() == ["complete"]
    again = fill(file)
    assert not again.done and again.skipped["steering"] == 2 * 6


def test_a_cell_that_kills_three_workers_is_marked_and_the_others_go_on(folder, tmp_path):
    plan = write(tmp_path, folder("llama"), steer=GRID, **SMALL_BATCHES)
    deaths = []

    def fate(worker: int, work: Work):
        if KILLER in work.fingerprints:
            deaths.append(len(work.fingerprints))
            return Death("it was killed because its node ran out of memory")
        return None

    summary = fill(plan, fate=fate)
    (failure,) = summary.failures
    assert len(deaths) == 3 and deaths[-1] == 1
    assert failure.cell == KILLER and failure.kind == "permanent"
    assert failure.reason == "3 workers died while they did it: it was killed because its node ran out of memory"
    assert len(Store(tmp_path / "plan.zarr").committed("generations")) == 15
    held = fill(plan)
    assert len(held.failed_before) == 1 and not held.done, "not tried again"
    mended = fill(plan, retry_failed=True)
    assert not mended.failures and mended.done == {"steering": 1}
    assert nsteer.open(tmp_path / "plan.zarr")["failures"].resolved.values.all()


def test_a_driver_that_was_killed_goes_on_from_there(alone, tmp_path):
    """Killed: nothing of what it had in mind is written down. The store alone says what is missing."""
    store, plan = alone
    file = plan(tmp_path, 1)

    class Killed(BaseException):
        pass

    seen = []

    def fate(worker: int, work: Work):
        seen.append(work)
        if len(seen) == 9:
            raise Killed
        return None

    with pytest.raises(Killed):
        fill(file, fate=fate)
    before = {key for key in records(tmp_path / "plan.zarr") if key[0] == "samples/llama"}
    summary = fill(file)
    assert before and summary.skipped["samples"] >= len(before) and not summary.failures
    same(tmp_path / "plan.zarr", store, without="gpt2")


def test_a_run_told_to_stop_finishes_what_is_in_hand(folder, tmp_path):
    plan = write(tmp_path, folder("llama"), steer=GRID, **SMALL_BATCHES)
    stop, seen = Stop(), []

    def fate(worker: int, work: Work):
        seen.append(work)
        if work.stage == "steering" and len(work.fingerprints) > 1:
            stop.ask()
        return None

    with pytest.raises(Interrupted):
        fill(plan, fate=fate, stop=stop)
    path = tmp_path / "plan.zarr"
    done = len(Store(path).committed("generations"))
    assert 0 < done < 16 and results(path, "runs").status.values.tolist() == ["interrupted"]
    assert not (tmp_path / "plan.zarr.leases").exists()
    assert fill(plan).done["steering"] == 16 - done


def test_a_model_that_does_not_load_costs_its_own_cells(folder, tmp_path):
    from nsteer.errors import ModelError
    from nsteer.executors.local import Local

    models = [{"id": str(folder(name)), "label": name, "device": "cpu"} for name in ("llama", "gpt2")]
    plan = write(tmp_path, folder("llama"), models=models, steer=GRID)

    def executor(facts):
        if facts.label == "llama":
            raise ModelError("its weights are a poem")
        return Local(facts.name_or_path, device="cpu", threads=1)

    summary = fill(plan, executor=executor)
    assert [(failure.stage, failure.cell, failure.reason) for failure in summary.failures] == [
        ("loading", ("llama",), "its weights are a poem")
    ]
    assert summary.done["steering"] == 16 and not Store(tmp_path / "plan.zarr").committed("samples/llama")


def test_a_model_too_large_for_every_node_says_what_it_needs(folder, tmp_path):
    models = [{"id": str(folder("llama")), "label": "tiny", "device": "cpu", "resources": {"memory_gib": 99.5}}]
    plan = write(tmp_path, folder("llama"), models=models, steer=None)
    summary = fill(plan, nodes={"n": Need(4, 0, 8 * 2**30)})
    assert [failure.reason for failure in summary.failures] == [
        "it needs 1 CPU, 0 GPU, 99.5 GiB; no node has that (at most 4 CPU, 0 GPU, 8.0 GiB). Give it a smaller "
        "`resources` in the plan, or larger nodes"
    ]


def test_what_the_plan_asks_for_a_worker(folder, tmp_path):
    def asked(spec, nodes):
        plan = write(tmp_path, folder("llama"), models=[{"id": str(folder("llama")), "label": "tiny", **spec}])
        study = check.load(plan)
        run = Run(study, Store(study.plan.store), Progress())
        return cluster.need(run, workers_here.Here(cluster.WorkerSetup(study, 0, "", "", ""), nodes), "tiny")

    bare, gpus = {"n": Need(8, 0, 2**36)}, {"n": Need(8, 4, 2**36)}
    assert asked({}, bare).gpus == 0 and asked({}, gpus).gpus == 1 and asked({"device": "cpu"}, gpus).gpus == 0
    assert asked({"resources": {"gpus": 0.5, "cpus": 3, "memory_gib": 2}}, gpus) == Need(3, 0.5, 2 * 2**30)
    assert asked({}, bare).memory > 400 * 2**20


def test_a_plain_run_beside_workers_does_other_cells(folder, tmp_path):
    """What either computes the other leaves, and waits for where it needs it: no cell is done twice."""
    more = [{**GRID[0], "strengths": [0.1, 0.2, 0.3, 0.4]}]  # so that both have their part
    plan = write(tmp_path, folder("llama"), steer=more, **SMALL_BATCHES)
    beside = test_two_runs.start(plan, seconds=0.3)
    end = time.monotonic() + 120
    while time.monotonic() < end and not any(len(f.read_text()) > 2 for f in tmp_path.glob("plan.zarr.leases/*.json")):
        time.sleep(0.05)
    summary, other = fill(plan), test_two_runs.ended(beside)
    assert not summary.failures and not other["failures"]
    for stage, wanted in {"samples": 8, "activations": 8, "vectors": 6, "unsteered": 1, "steering": 32}.items():
        assert summary.done.get(stage, 0) + other["done"].get(stage, 0) == wanted, stage
    assert other["done"].get("samples") and summary.done.get("steering")
    assert not (tmp_path / "plan.zarr.leases").exists()


def test_workers_wait_for_what_another_run_computes(folder, tmp_path):
    plan = write(tmp_path, folder("llama"), steer=None)
    assert not run(plan).failures
    store = Store(tmp_path / "plan.zarr")
    key = next(iter(store.committed("samples/tiny")))
    store.drop("samples/tiny", key)
    other = Leases(store.path)
    other.open()
    other.take(lambda held, changed: [("samples/tiny", key)])
    freed = threading.Timer(2.0, other.release)
    freed.start()
    summary = fill(plan)
    assert not freed.is_alive() and summary.done["samples"] == 1, "it did not begin before"
    other.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("executor=rehearse", "executor is rehearse"),
        ("models=[{id: zoo/llama, device: 'cuda:1'}]", "Ray chooses among"),
    ],
)
def test_plans_that_can_not_be_shared_out(folder, tmp_path, settings, said):
    with pytest.raises(ClusterError, match=said):
        cluster.fit(
            check.load(
                write(
                    tmp_path,
                    folder("llama"),
                    steer=None,
                    methods=None,
                    prompts=["tom"],
                    **{"reads": {"r": {"layers": [1], "pooling": "last"}}},
                ),
                [settings],
            )
        )


def test_nothing_of_the_machine_is_in_the_store(folder, tmp_path):
    import getpass
    import socket

    plan = write(tmp_path, folder("llama"), steer=GRID)
    fill(plan)
    environment = results(tmp_path / "plan.zarr", "runs").environment.values[0]
    everything = " ".join(
        str(results(tmp_path / "plan.zarr", g).to_dict())
        for g in ("models", "failures", "programs")
        if g in Store(tmp_path / "plan.zarr").groups()
    )
    for word in (socket.gethostname(), getpass.getuser()):
        assert f'"{word}"' not in environment and f"'{word}'" not in everything


def test_tasks_are_runs_of_neighbours_large_enough_for_a_batch():
    sizes = {("c", n): 8 for n in range(100)}
    runs = list(cut(sizes, 32, 2))
    assert [cell for task in runs for cell in task] == list(sizes)
    assert {len(task) for task in runs[:-1]} == {12}, "800 rows over 4 tasks for each of 2 workers"
    assert {len(task) for task in cut(sizes, 32, 1000)} == {4}, "never less than a batch"
    assert max(len(task) for task in cut({("c", n): 8 for n in range(9999)}, 32, 1)) == 64, "nor more than a wave"
    assert list(cut({("c", 5): 9999, ("c", 2): 1}, 1, 1)) == [[("c", 5)], [("c", 2)]]


def test_one_display_of_all(folder, tmp_path):
    shown = io.StringIO()
    plan = write(tmp_path, folder("llama"), steer=GRID)
    fill(plan, display=showing.Log(shown, every=0.0))
    lines = shown.getvalue().splitlines()
    assert any(line.startswith("[1/1] tiny steering: 16 cells to do") for line in lines)
    assert any("workers (tiny" in line and "busy" in line and "queued" in line for line in lines)


# ---- what scale costs -------------------------------------------------------------------------------------------


def test_a_forecast_counts_tokens_over_measured_rates(folder, tmp_path):
    """Planted: every record says 2 s, so rates, and with them the time left, are arithmetic."""
    from nsteer.cluster import forecast
    from nsteer.stages import sizing

    plan = write(tmp_path, folder("llama"), steer=GRID, **SMALL_BATCHES)
    assert not run(plan, "steer[0].strengths=[0.1]").failures
    study = check.load(plan)
    nothing = forecast.forecast(study, sizing.size(check.load(plan, [f"store={tmp_path / 'other.zarr'}"])), 4)
    assert nothing.tokens and not nothing.cost
    store = Store(tmp_path / "plan.zarr")
    leaf = store.leaf("generations")
    for at, cell, _ in list(leaf.records()):
        store.place.write(leaf.record_file(at), cell._replace(seconds=2.0).pack())
    size = sizing.size(study)
    (steering,) = [stage for stage in size.stages if stage.stage == "steering"]
    assert steering.cells - steering.done == 8
    single, four = (forecast.forecast(study, size, workers, price=3.0) for workers in (1, 4))
    assert single.rates["tiny", "steering"] == pytest.approx(steering.tokens / 8 / 2.0)
    assert single.seconds == pytest.approx(forecast.LOADING + 8 * 2.0)
    assert four.seconds == pytest.approx(forecast.LOADING + 8 * 2.0 / 4)
    assert four.cost == pytest.approx(3.0 * 4 * four.seconds / 3600) and not four.unknown
    assert any("worker hours" in line for line in forecast.words(four))


def test_a_simulation_waits_for_stages_and_loses_nothing():
    from nsteer.cluster.simulating import simulate

    stages = [[((s, n),) for n in range(10)] for s in range(2)]
    alone = {"all": Need(5, 0, 0)}
    told = simulate({"m": stages}, alone, {"m": Need()}, 5, lambda task: 1.0, load=7.0)
    assert told.seconds == 7 + 2 * 2 and told.tasks == 20 and told.busy == 20
    deadly = simulate(
        {"m": stages}, alone, {"m": Need()}, 5, lambda task: 1.0, dies=lambda task: task.cells == ((0, 3),)
    )
    assert deadly.tasks == 19 and deadly.given_up == 1 and deadly.died == 3
