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


def made(most: int = 4, nodes: dict | None = None, models: dict | None = None) -> Scheduler:
    found = Scheduler(most)
    for name, room in (nodes or {"a": BOX}).items():
        found.node(name, room)
    for model, need in (models or {"m": SMALL}).items():
        found.open(model, need)
    return found


def tasks(scheduler: Scheduler, count: int, model: str = "m", cells: int = 1) -> list:
    return [scheduler.add(model, [(model, n, c) for c in range(cells)]) for n in range(count)]


def started(scheduler: Scheduler) -> list[int]:
    found = [start.worker for start in scheduler.starts()]
    for worker in found:
        scheduler.ready(worker)
    return found


# ---- the queue of a model ---------------------------------------------------------------------------------------


def test_workers_take_the_next_task_of_their_model_in_order():
    one = made(2)
    first_task, second_task, *rest = tasks(one, 5)
    slow, quick = started(one)
    assert one.next(slow) == first_task and one.next(quick) == second_task
    for task in rest:
        one.done(quick)
        assert one.next(quick) == task, "whoever is through takes the next, and waits for nobody"
    one.done(quick)
    assert one.next(quick) is None and one.busy() == 1 and one.left["m"] == 1


def test_workers_load_for_tasks_that_are_only_expected_once_there_is_one():
    one = made(3, models={"m": SMALL, "other": SMALL})
    one.expect("m", 9)
    assert not list(one.starts()), "nothing is to be done yet: perhaps nothing will be"
    tasks(one, 1)
    assert [start.model for start in one.starts()] == ["m", "m"], "a place is kept for the other model"
    tasks(one, 1, "other")
    assert [start.model for start in one.starts()] == ["other"]
    one.expect("gone", 3)
    assert "gone" not in one.ahead
    one.close("m")
    assert "m" not in one.ahead and [one.workers[w].model for w in one.spare()] == ["m", "m"]


def test_nobody_takes_another_models_tasks():
    one = made(2, models={"m": SMALL, "other": SMALL})
    tasks(one, 5)
    tasks(one, 1, "other")
    workers = {one.workers[w].model: w for w in started(one)}
    assert one.next(workers["other"]) is not None
    one.done(workers["other"])
    assert one.next(workers["other"]) is None and one.queued() == 5


def test_a_worker_that_is_loading_or_busy_gets_nothing():
    one = made(1)
    tasks(one, 2)
    (start,) = one.starts()
    assert one.next(start.worker) is None
    one.ready(start.worker)
    assert one.next(start.worker) is not None and one.next(start.worker) is None


# ---- placement ------------------------------------------------------------------------------------------------


def test_a_model_goes_where_its_memory_is_and_leaves_gpus_to_others():
    nodes = {"large": Need(8, 0, 64 * GIB), "small": Need(8, 0, 16 * GIB), "gpu": Need(8, 1, 64 * GIB)}
    models = {"tiny": Need(1, 0, 8 * GIB), "wide": Need(1, 0, 40 * GIB), "fast": Need(1, 0.5, 8 * GIB)}
    one = made(9, nodes, models)
    for model in models:
        tasks(one, 1, model)
    assert {start.model: start.node for start in one.starts()} == {"tiny": "small", "wide": "large", "fast": "gpu"}


def test_two_halves_share_a_gpu_and_a_third_waits():
    one = made(9, {"gpu": Need(8, 1, 64 * GIB)}, {"m": Need(1, 0.5, GIB)})
    tasks(one, 5)
    first, second = started(one)
    assert not list(one.starts())
    one.stopped(first)
    assert len(started(one)) == 1 and second in one.workers


def test_every_model_gets_a_worker_before_any_gets_a_second():
    one = made(3, models={"m": SMALL, "late": SMALL, "later": SMALL})
    tasks(one, 100)
    assert [start.model for start in one.starts()] == ["m"], "places are kept for the models that are still thinking"
    tasks(one, 1, "late")
    tasks(one, 1, "later")
    assert sorted(start.model for start in one.starts()) == ["late", "later"]


def test_workers_of_a_closed_model_make_room():
    one = made(1, models={"m": SMALL, "next": SMALL})
    tasks(one, 1)
    (worker,) = started(one)
    one.next(worker)
    tasks(one, 1, "next")
    one.done(worker)
    one.close("m")
    assert one.spare() == [worker] and not list(one.starts())
    one.stopped(worker)
    assert [start.model for start in one.starts()] == ["next"]
    assert one.free["a"] == BOX - SMALL


def test_no_more_workers_than_tasks_and_none_for_what_no_node_holds():
    one = made(9, models={"m": SMALL, "huge": Need(1, 0, 999 * GIB)})
    tasks(one, 2)
    tasks(one, 2, "huge")
    assert [start.model for start in one.starts()] == ["m", "m"] and one.impossible("huge")
    one.node("b", Need(1, 0, 1000 * GIB))
    assert not one.impossible("huge") and [start.model for start in one.starts()] == ["huge"]


# ---- deaths ---------------------------------------------------------------------------------------------------


def test_what_the_dead_had_is_done_next_by_another():
    one = made(2)
    tasks(one, 6)
    first, second = started(one)
    lost = one.next(first)
    assert lost is not None and one.died(first) == []
    seen = []
    while (task := one.next(second)) is not None:
        seen.append(task)
        one.done(second)
    assert [task.number for task in seen] == [1, 2, 3, 4, 5, 6] and seen[0].deaths == 1


def test_a_cell_that_kills_is_alone_given_up_after_three_deaths():
    one = made(2)
    one.add("m", [("m", n) for n in range(5)])
    given_up, finished, deaths = [], [], 0
    while one.left["m"]:
        started(one)
        worker = next(iter(one.workers))
        task = one.next(worker)
        if ("m", 3) in task.cells:
            deaths += 1
            given_up += one.died(worker)
        else:
            finished += one.done(worker).cells
    assert deaths == DEATHS and [task.cells for task in given_up] == [(("m", 3),)]
    assert sorted(finished) == [("m", n) for n in (0, 1, 2, 4)]


def test_a_node_that_goes_down_blames_no_task():
    one = made(1, {"a": BOX, "b": BOX})
    tasks(one, 1)
    for _ in range(2 * DEATHS):
        (worker,) = started(one)
        one.next(worker)
        assert one.died(worker, blame=False) == []
    assert one.left["m"] == 1
    (worker,) = started(one)
    node = one.workers[worker].node
    one.forget(node)
    one.died(worker, blame=False)
    assert {start.node for start in one.starts()} == {"a", "b"} - {node}


def test_a_model_that_kills_its_loaders_is_given_up():
    one = made(9)
    tasks(one, 20)
    for _ in range(DEATHS):
        assert not one.unloadable("m")
        start = next(iter(one.starts()))
        one.died(start.worker)
    assert one.unloadable("m") and not list(one.starts()) and len(one.drop("m")) == 20 and one.left["m"] == 0


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 60), st.floats(0, 0.4))
def test_every_task_is_settled_once_whatever_dies(seed, workers, count, deadly):
    """A walk of random events: rooms are never overdrawn, and nothing is lost or done twice."""
    chance = random.Random(seed)
    models = {"m": SMALL, "n": Need(2, 0.5, 8 * GIB), "o": Need(1, 1, 30 * GIB)}
    one = made(workers, {"a": BOX, "b": Need(4, 1, 40 * GIB)}, models)
    wanted = [cell for model in models for task in tasks(one, count, model, 3) for cell in task.cells]
    settled: list = []
    for _ in range(100 * len(wanted) + 1000):
        if not any(one.left.values()):
            break
        for model in models:
            if model in one.needs and one.unloadable(model) and not one.of[model]:
                settled += [cell for task in one.drop(model) for cell in task.cells]
        for _start in one.starts():
            pass
        assert len(one.workers) <= workers
        assert all(room.cpus >= 0 and room.gpus >= -1e-9 and room.memory >= 0 for room in one.free.values())
        for model in models:
            if one.left[model] == 0 and model in one.needs:
                one.close(model)
        for worker in one.spare():
            one.stopped(worker)
        if not one.workers:
            continue
        worker = chance.choice(list(one.workers))
        if chance.random() < deadly:
            settled += [cell for task in one.died(worker, blame=chance.random() < 0.5) for cell in task.cells]
        elif not one.workers[worker].ready:
            one.ready(worker)
        elif one.workers[worker].task is None:
            one.next(worker)
        else:
            settled += one.done(worker).cells
    assert sorted(settled) == sorted(wanted)
    for worker in list(one.workers):
        one.stopped(worker)
    assert one.free == one.rooms


def test_a_worker_that_is_not_there_can_not_die():
    with pytest.raises(KeyError):
        made().died(7)
