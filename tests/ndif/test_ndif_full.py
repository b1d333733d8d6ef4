"""The whole NDIF, with Ray, queues and controller: what the light form stands in for."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from kit import assert_equal, rows

from nsteer.executors import doctor
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, assemble, programs

pytestmark = [pytest.mark.ndif_full, pytest.mark.slow]


@pytest.fixture(scope="module")
def full(built, tmp_path_factory):
    with servers.Full(tmp_path_factory.mktemp("full")) as running:
        yield running


def test_equal(full, open_remote, open_local, tinies):
    here, there = open_local(tinies["gpt2"]), open_remote(tinies["gpt2"], host=full.url)
    reads = tuple(ReadSite(layer) for layer in range(here.anatomy.n_layers))
    decoding = Decoding(12, here.eos, here.pad, sample=True)
    capture = list(programs(Form(reads=reads), rows(here, 8, edits=0), budget=10_000, max_rows=2))
    steer = assemble(Form(edits=(EditSite(1, "add", live=True),), decoding=decoding, top=3), rows(here))
    for program, readouts in there.map([*capture, steer]):
        assert_equal(readouts, here.run(program))
    assert there.jobs == 2


def test_queue_positions_are_told(full, open_remote, tinies):
    news = []
    there = open_remote(tinies["gpt2"], host=full.url, together=1, in_flight=6, note=lambda *n: news.append(n))
    form = Form(decoding=Decoding(150, (), there.pad))
    list(there.map(list(programs(form, rows(there, 6, edits=0, new=150), budget=10_000, max_rows=1))))
    assert any(status == "QUEUED" and "osition" in words for _, status, words in news), news


def test_the_doctor_sees_versions_and_models(full, open_remote, tinies):
    there = open_remote(tinies["gpt2"], host=full.url)
    there.run(assemble(Form(reads=(ReadSite(0),)), rows(there, 2, edits=0)))
    told = list(doctor.server(full.url))
    by_name = {finding.name: finding for finding in told}
    assert by_name["NDIF"].state == "ok"
    assert any(finding.name == "model running" and "gpt2" in finding.value for finding in told)
    assert by_name["server's nnsight"].value.startswith("0.8.0")
    assert by_name["server's transformers"].state == "ok"


def test_an_api_that_is_killed_comes_back(full, open_remote, open_local, tinies):
    """Ray and its jobs live on: what was in flight is fetched once the API answers again."""
    here, news = open_local(tinies["gpt2"]), []
    there = open_remote(tinies["gpt2"], host=full.url, note=lambda *n: news.append(n[1]))
    program = assemble(Form(decoding=Decoding(150, (), there.pad)), rows(there, 3, edits=0, new=150))
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(there.run, program)
        while "RUNNING" not in news and not going.done():
            time.sleep(0.01)
        full.end("api", how=signal.SIGKILL)
        full.start_api()
        readouts = going.result()
    assert_equal(readouts, here.run(program))
