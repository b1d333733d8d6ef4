"""Server and client are killed in the middle; nothing is lost, and nothing is paid twice."""

from __future__ import annotations

import json
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import prefork
import pytest
from kit import assert_equal, rows

from nsteer import errors
from nsteer.executors import ndif
from nsteer.executors.journal import Notebook
from nsteer.program.form import Form, ReadSite, programs

ROOT = Path(__file__).parents[2]


class Page:
    """A journal in a file, for a client that is killed."""

    def __init__(self, file):
        self.file = Path(file)

    def jobs(self):
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def record(self, job, digests):
        self.file.write_text(json.dumps(self.jobs() | {job: digests}))

    def find(self, digest):
        return next(((job, held.index(digest)) for job, held in self.jobs().items() if digest in held), None)

    def forget(self, job):
        self.file.write_text(json.dumps({known: held for known, held in self.jobs().items() if known != job}))


def batches(executor, count=6):
    form = Form(reads=tuple(ReadSite(layer) for layer in range(executor.anatomy.n_layers)))
    return list(programs(form, rows(executor, 2 * count, edits=0), budget=10_000, max_rows=2))


@pytest.fixture
def aside():
    """Runs a function in another thread: servers must be killed and started from this one."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_a_server_that_loses_all_and_comes_back(server, aside, open_remote, open_local, tinies, monkeypatch):
    """Power cut: queue, results and jobs are gone. What was in flight is sent again by itself."""
    monkeypatch.setattr(ndif, "UNKNOWN", 2.0)
    here = open_local(tinies["llama"])
    news = []
    there = open_remote(tinies["llama"], together=1, in_flight=3, deadline=120, note=lambda *n: news.append(n[1]))
    wanted = batches(here)
    with server.turned(slow=0.5):
        going = aside(lambda: list(there.map(wanted)))
        while news.count("FETCHED") < 2:
            time.sleep(0.05)
        server.kill()
        time.sleep(1)
        server.start()
        pairs = going.result()
    assert sorted(p.keys for p, _ in pairs) == sorted(p.keys for p in wanted)  # none lost, none doubled
    for program, readouts in pairs:
        assert_equal(readouts, here.run(program))
    assert "WAITING" in news and "LOST" in news
    assert there.jobs > len(wanted)


def test_a_job_that_is_never_heard_of_again(server, open_remote, open_local, tinies):
    """A worker dies with a job: its status stands still. Our deadline ends it, and the next run goes on."""
    here = open_local(tinies["llama"])
    notebook = Notebook()
    there = open_remote(tinies["llama"], deadline=20, journal=notebook)
    there.run(batches(here)[0])
    there.settle()
    there.deadline = 2
    with server.turned(lose=True), pytest.raises(errors.RemoteDeadlineError, match="last word was DISPATCHED"):
        there.run(batches(here)[1])
    assert not notebook.jobs
    there.deadline = 60
    for program, readouts in there.map(batches(here)[1:]):
        assert_equal(readouts, here.run(program))


CLIENT = """
    import sys
    sys.path[:0] = [{here!r}, {root!r}, {root!r} + "/tests"]
    from test_ndif_kills import Page, batches
    from nsteer.executors.ndif import Ndif

    there = Ndif({model!r}, host={url!r}, together=1, in_flight=3, journal=Page({page!r}),
                 note=lambda job, status, words: print(status, flush=True))
    for program, found in there.map(batches(there)):
        print("got", flush=True)
"""


def test_a_client_that_is_killed_fetches_what_it_paid_for(server, open_remote, open_local, tinies, tmp_path):
    here, page = open_local(tinies["llama"]), tmp_path / "journal.json"
    words = {"here": str(Path(__file__).parent), "root": str(ROOT), "model": str(tinies["llama"]), "url": server.url}
    script = textwrap.dedent(CLIENT).format(page=str(page), **words)
    open_remote(tinies["llama"]).run(batches(here)[0])
    ran = server.ran()
    with server.turned(slow=1):
        client = subprocess.Popen(prefork.python(script), stdout=subprocess.PIPE, text=True)
        said = []
        while said.count("RECEIVED") < 3:
            said.append(client.stdout.readline().strip())
        client.kill()
        client.communicate()  # to the end of what it says: the forked process is gone then
    assert said.count("RECEIVED") == len(Page(page).jobs()) == 3
    there = open_remote(tinies["llama"], together=1, in_flight=3, journal=Page(page))
    wanted = batches(here)
    answers = {program.keys: readouts for program, readouts in there.map(wanted)}
    for program in wanted:
        assert_equal(answers[program.keys], here.run(program))
    assert there.jobs == len(wanted) - 3  # the three in flight were fetched
    assert server.ran() == ran + len(wanted)  # and every batch ran once
    assert Page(page).jobs()
    there.settle()
    assert not Page(page).jobs()


def test_a_program_found_in_a_shared_job_is_taken_from_its_place(open_remote, open_local, tinies):
    here, notebook = open_local(tinies["llama"]), Notebook()
    first = open_remote(tinies["llama"], journal=notebook)
    wanted = batches(here)
    assert len(list(first.map(wanted))) == len(wanted)
    assert first.jobs == 1
    again = open_remote(tinies["llama"], journal=notebook)
    for program, readouts in again.map(wanted[3:1:-1]):
        assert_equal(readouts, here.run(program))
    assert again.jobs == 0
