"""Who does what: every task once whoever dies, nobody idle beside a queue, nothing on a node that can not hold it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsteer.cluster.scheduler import DEATHS, Need, Scheduler

GIB = 2**30
BOX = Need(8, 2, 64 * GIB)
SMALL = Need(1, 0, 4 * GIB)


def scheduler_of(max_workers: int = 4, nodes: dict | None = None, models: dict | None = None) -> Scheduler:
    scheduler = Scheduler(max_workers)
    for name, room in (nodes or {"a": BOX}).items():
        scheduler.node(name, room)
    for model, need in (models or {"m": SMALL}).items():
        scheduler.open(model, need)
    return scheduler


def tasks(scheduler: Scheduler, count: int, model: str = "m", cells: int = 1) -> list:
    return [scheduler.add(model, [(model, n, c) for c in range(cells)]) for n in range(count)]


def started(scheduler: Scheduler) -> list[int]:
    workers = [start.worker for start in scheduler.starts()]
    for worker in workers:
        scheduler.ready(worker)
    return workers


# ---- the queue of a model ---------------------------------------------------------------------------------------


def test_workers_take_the_next_task_of_their_model_in_order():
    scheduler = scheduler_of(2)
    first_task, second_task, *rest = tasks(scheduler, 5)
    slow, quick = started(scheduler)
    assert scheduler.next(slow) == first_task and scheduler.next(quick) == second_task
    for task in rest:
        scheduler.done(quick)
        assert scheduler.next(quick) == task, "whoever is through takes the next, and waits for nobody"
    scheduler.done(quick)
    assert scheduler.next(quick) is None and scheduler.busy() == 1 and scheduler.left["m"] == 1


def test_workers_load_for_tasks_that_are_only_expected_once_there_is_one():
    scheduler = scheduler_of(3, models={"m": SMALL, "other": SMALL})
    scheduler.expect("m", 9)
    assert not list(scheduler.starts()), "nothing is to be done yet: perhaps nothing will be"
    tasks(scheduler, 1)
    assert [start.model for start in scheduler.starts()] == ["m", "m"], "a place is kept for the other model"
    tasks(scheduler, 1, "other")
    assert [start.model for start in scheduler.starts()] == ["other"]
    scheduler.expect("gone", 3)
    assert "gone" not in scheduler.ahead
    scheduler.close("m")
    assert "m" not in scheduler.ahead and [scheduler.workers[w].model for w in scheduler.spare()] == ["m", "m"]


def test_nobody_takes_another_models_tasks():
    scheduler = scheduler_of(2, models={"m": SMALL, "other": SMALL})
    tasks(scheduler, 5)
    tasks(scheduler, 1, "other")
    workers = {scheduler.workers[w].model: w for w in started(scheduler)}
    assert scheduler.next(workers["other"]) is not None
    scheduler.done(workers["other"])
    assert scheduler.next(workers["other"]) is None and scheduler.queued() == 5


def test_a_worker_that_is_loading_or_busy_gets_nothing():
    scheduler = scheduler_of(1)
    tasks(scheduler, 2)
    (start,) = scheduler.starts()
    assert scheduler.next(start.worker) is None
    scheduler.ready(start.worker)
    assert scheduler.next(start.worker) is not None and scheduler.next(start.worker) is None


# ---- placement ------------------------------------------------------------------------------------------------


def test_a_model_goes_where_its_memory_is_and_leaves_gpus_to_others():
    nodes = {"large": Need(8, 0, 64 * GIB), "small": Need(8, 0, 16 * GIB), "gpu": Need(8, 1, 64 * GIB)}
    models = {"tiny": Need(1, 0, 8 * GIB), "wide": Need(1, 0, 40 * GIB), "fast": Need(1, 0.5, 8 * GIB)}
    scheduler = scheduler_of(9, nodes, models)
    for model in models:
        tasks(scheduler, 1, model)
    assert {start.model: start.node for start in scheduler.starts()} == {
        "tiny": "small",
        "wide": "large",
        "fast": "gpu",
    }


def test_two_halves_share_a_gpu_and_a_third_waits():
    scheduler = scheduler_of(9, {"gpu": Need(8, 1, 64 * GIB)}, {"m": Need(1, 0.5, GIB)})
    tasks(scheduler, 5)
    first, second = started(scheduler)
    assert not list(scheduler.starts())
    scheduler.stopped(first)
    assert len(started(scheduler)) == 1 and second in scheduler.workers


def test_every_model_gets_a_worker_before_any_gets_a_second():
    scheduler = scheduler_of(3, models={"m": SMALL, "late": SMALL, "later": SMALL})
    tasks(scheduler, 100)
    assert [start.model for start in scheduler.starts()] == ["m"], "places are kept for those still thinking"
    tasks(scheduler, 1, "late")
    tasks(scheduler, 1, "later")
    assert sorted(start.model for start in scheduler.starts()) == ["late", "later"]


def test_workers_of_a_closed_model_make_room():
    scheduler = scheduler_of(1, models={"m": SMALL, "next": SMALL})
    tasks(scheduler, 1)
    (worker,) = started(scheduler)
    scheduler.next(worker)
    tasks(scheduler, 1, "next")
    scheduler.done(worker)
    scheduler.close("m")
    assert scheduler.spare() == [worker] and not list(scheduler.starts())
    scheduler.stopped(worker)
    assert [start.model for start in scheduler.starts()] == ["next"]
    assert scheduler.free["a"] == BOX - SMALL


def test_no_more_workers_than_tasks_and_none_for_what_no_node_holds():
    scheduler = scheduler_of(9, models={"m": SMALL, "huge": Need(1, 0, 999 * GIB)})
    tasks(scheduler, 2)
    tasks(scheduler, 2, "huge")
    assert [start.model for start in scheduler.starts()] == ["m", "m"] and scheduler.impossible("huge")
    scheduler.node("b", Need(1, 0, 1000 * GIB))
    assert not scheduler.impossible("huge") and [start.model for start in scheduler.starts()] == ["huge"]


# ---- deaths ---------------------------------------------------------------------------------------------------


def test_what_the_dead_had_is_done_next_by_another():
    scheduler = scheduler_of(2)
    tasks(scheduler, 6)
    first, second = started(scheduler)
    lost = scheduler.next(first)
    assert lost is not None and scheduler.died(first) == []
    seen = []
    while (task := scheduler.next(second)) is not None:
        seen.append(task)
        scheduler.done(second)
    assert [task.number for task in seen] == [1, 2, 3, 4, 5, 6] and seen[0].deaths == 1


def test_a_cell_that_kills_is_alone_given_up_after_three_deaths():
    scheduler = scheduler_of(2)
    scheduler.add("m", [("m", n) for n in range(5)])
    given_up, finished, deaths = [], [], 0
    while scheduler.left["m"]:
        started(scheduler)
        worker = next(iter(scheduler.workers))
        task = scheduler.next(worker)
        if ("m", 3) in task.cells:
            deaths += 1
            given_up += scheduler.died(worker)
        else:
            finished += scheduler.done(worker).cells
    assert deaths == DEATHS and [task.cells for task in given_up] == [(("m", 3),)]
    assert sorted(finished) == [("m", n) for n in (0, 1, 2, 4)]


def test_a_node_that_goes_down_blames_no_task():
    scheduler = scheduler_of(1, {"a": BOX, "b": BOX})
    tasks(scheduler, 1)
    for _ in range(2 * DEATHS):
        (worker,) = started(scheduler)
        scheduler.next(worker)
        assert scheduler.died(worker, blame=False) == []
    assert scheduler.left["m"] == 1
    (worker,) = started(scheduler)
    node = scheduler.workers[worker].node
    scheduler.forget(node)
    scheduler.died(worker, blame=False)
    assert {start.node for start in scheduler.starts()} == {"a", "b"} - {node}


def test_a_model_that_kills_its_loaders_is_given_up():
    scheduler = scheduler_of(9)
    tasks(scheduler, 20)
    for _ in range(DEATHS):
        assert not scheduler.unloadable("m")
        start = next(iter(scheduler.starts()))
        scheduler.died(start.worker)
    assert (
        scheduler.unloadable("m")
        and not list(scheduler.starts())
        and len(scheduler.drop("m")) == 20
        and scheduler.left["m"] == 0
    )


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 60), st.floats(0, 0.4))
def test_every_task_is_settled_once_whatever_dies(seed, workers, count, deadly):
    """A walk of random events: rooms are never overdrawn, and nothing is lost or done twice."""
    chance = random.Random(seed)
    models = {"m": SMALL, "n": Need(2, 0.5, 8 * GIB), "o": Need(1, 1, 30 * GIB)}
    scheduler = scheduler_of(workers, {"a": BOX, "b": Need(4, 1, 40 * GIB)}, models)
    wanted = [cell for model in models for task in tasks(scheduler, count, model, 3) for cell in task.cells]
    settled: list = []
    for _ in range(100 * len(wanted) + 1000):
        if not any(scheduler.left.values()):
            break
        for model in models:
            if model in scheduler.needs and scheduler.unloadable(model) and not scheduler.of[model]:
                settled += [cell for task in scheduler.drop(model) for cell in task.cells]
        for _start in scheduler.starts():
            pass
        assert len(scheduler.workers) <= workers
        assert all(room.cpus >= 0 and room.gpus >= -1e-9 and room.memory >= 0 for room in scheduler.free.values())
        for model in models:
            if scheduler.left[model] == 0 and model in scheduler.needs:
                scheduler.close(model)
        for worker in scheduler.spare():
            scheduler.stopped(worker)
        if not scheduler.workers:
            continue
        worker = chance.choice(list(scheduler.workers))
        if chance.random() < deadly:
            settled += [cell for task in scheduler.died(worker, blame=chance.random() < 0.5) for cell in task.cells]
        elif not scheduler.workers[worker].ready:
            scheduler.ready(worker)
        elif scheduler.workers[worker].task is None:
            scheduler.next(worker)
        else:
            settled += scheduler.done(worker).cells
    assert sorted(settled) == sorted(wanted)
    for worker in list(scheduler.workers):
        scheduler.stopped(worker)
    assert scheduler.free == scheduler.rooms


def test_a_worker_that_is_not_there_can_not_die():
    with pytest.raises(KeyError):
        scheduler_of().died(7)
