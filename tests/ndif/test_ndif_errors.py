"""Every failure of the table in docs/ndif.md, produced on a real server, ends in our own error or in none."""

from __future__ import annotations

import http.server
import re
import threading
import time
import traceback
from pathlib import Path

import environment
import nnsight
import numpy as np
import pytest
import servers
from kit import assert_equal, rows
from nnsight.schema.config import CONFIG

from nsteer import errors
from nsteer.executors import ndif
from nsteer.executors.journal import Notebook
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, assemble

DOCS = Path(__file__).parents[2] / "docs" / "ndif.md"
ROWS: dict[str, str] = {}


def row(name, outcome):
    """Marks a test as the proof of a row of the table: what happens -> the error's name, or `none`."""
    ROWS[name] = outcome if isinstance(outcome, str) else outcome.__name__
    return lambda function: function


def capture(executor, count=3):
    reads = tuple(ReadSite(layer) for layer in range(executor.anatomy.n_layers))
    return assemble(Form(reads=reads), rows(executor, count, edits=0))


def long_generation(executor):
    """Some seconds of work for a tiny model: more than a time-out of a tenth of a second."""
    decoding = Decoding(120, (), executor.pad)
    return assemble(Form(edits=(EditSite(1, "add"),), decoding=decoding), rows(executor, 3, new=120))


def once(wanted, act, news=None):
    """A note-taker that acts at the first news of a status: what a test does in the middle hangs on no clock."""
    news, waiting = [] if news is None else news, [act]

    def note(job, status, words):
        news.append((job, status, words))
        if status == wanted and waiting:
            waiting.pop()()

    return note


@pytest.fixture
def model(tinies):
    return tinies["llama"]


@pytest.fixture(scope="module")
def strict(built, tmp_path_factory):
    """A server that asks for keys, and for a client newer than there is; it has no object store."""
    folder = tmp_path_factory.mktemp("strict")
    try:
        keys = servers.Keys(folder)
    except environment.Unbuilt as error:
        pytest.skip(f"API KEYS ARE NOT TESTED: {error}")
    with keys:
        settings = {"NDIF_POSTGRES_URL": keys.url, "NDIF_MIN_NNSIGHT_VERSION": "99.0"}
        with servers.Light(folder, settings, store=False) as running:
            yield running


@row("the server is down", errors.RemoteLostError)
def test_server_down(open_remote, model):
    news = []
    nowhere = f"http://127.0.0.1:{servers.free_port()}"
    there = open_remote(model, host=nowhere, retries=2, note=lambda *n: news.append(n))
    with pytest.raises(errors.RemoteLostError, match=r"no connection \(ConnectError\); tried 3 times.*object store"):
        there.run(capture(there))
    assert [status for _, status, _ in news] == ["WAITING"] * 2


@row("no API key", errors.RemoteAccessError)
def test_no_key(open_remote, model, strict, monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    there = open_remote(model, host=strict.url)
    with pytest.raises(errors.RemoteAccessError, match=r"refuses the API key.*401.*NDIF_API_KEY"):
        there.run(capture(there))


@row("an API key that the server does not know", errors.RemoteAccessError)
def test_unknown_key(open_remote, model, strict):
    there = open_remote(model, host=strict.url, api_key="00000000-0000-4000-8000-00000000ffff")
    with pytest.raises(errors.RemoteAccessError, match="403"):
        there.run(capture(there))


@row("an API key of the wrong form", errors.RemoteAccessError)
def test_malformed_key_is_refused_and_not_repeated(open_remote, model, strict, caplog, capsys):
    secret = "hush-hush-1234"
    news = []
    caplog.set_level("DEBUG")
    there = open_remote(model, host=strict.url, api_key=secret, note=lambda *n: news.append(n))
    with pytest.raises(errors.RemoteAccessError, match="<key>") as caught:
        there.run(capture(there))
    told = "".join(traceback.format_exception(caught.value))
    shown = f"{told}{there!r}{there.wire!r}{there.describe()}{news}{caplog.text}{capsys.readouterr()}"
    assert secret not in shown


@row("the client is older than the server takes", errors.RemoteVersionError)
def test_client_too_old(open_remote, model, strict):
    there = open_remote(model, host=strict.url, api_key=servers.TRUSTED)
    with pytest.raises(errors.RemoteVersionError, match=r"below the minimum supported 99\.0"):
        there.run(capture(there))


@row("a model that the server can not start", errors.RemoteModelError)
def test_unknown_model(open_remote, model):
    there = open_remote(model)
    there.model_key = there.model_key.replace("llama", "unheard-of")
    with pytest.raises(errors.RemoteModelError, match=r"does not serve .*llama"):
        there.run(capture(there))


@row("a model that no hub and no folder has", errors.ModelError)
def test_no_such_model(open_remote):
    with pytest.raises(errors.ModelError, match="without weights"):
        open_remote("nobody/nothing")


@row("the model is built otherwise on the server", errors.RemoteVersionError)
def test_other_architecture(open_remote, model):
    there = open_remote(model)
    there.model_key = there.model_key.replace("llama", "gpt2")
    with pytest.raises(errors.RemoteVersionError, match=r"no module at.*transformers"):
        there.run(capture(there))


@row("the program fails on the server", errors.RemoteProgramError)
def test_exception_in_the_block(open_remote, model):
    there = open_remote(model)
    program = assemble(Form(edits=(EditSite(1, "add"),), decoding=Decoding(4, there.eos, there.pad)), rows(there, 3))
    program.arrays["vectors"] = np.ones((len(program.arrays["vectors"]), 7), np.float32)
    with pytest.raises(errors.RemoteProgramError, match=r"program [0-9a-f]{12} failed on .*: RuntimeError") as caught:
        there.run(program)
    assert "changes.append(edit(" in caught.value.remote  # the line of our text that failed


def test_a_bad_program_fails_alone_though_it_travels_with_others(open_remote, open_local, model):
    """Three programs in one job, one of them broken: they are sent again one by one, and two come back."""
    there, here = open_remote(model, together=3), open_local(model)
    form = Form(edits=(EditSite(1, "add"),), decoding=Decoding(4, there.eos, there.pad))
    batch = [assemble(form, rows(there, 3 + i)) for i in range(3)]
    batch[1].arrays["vectors"] = np.ones((len(batch[1].arrays["vectors"]), 7), np.float32)
    answers = {program.rows: back for program, back in there.map(batch)}
    assert set(answers) == {3, 4, 5} and isinstance(answers[4], errors.RemoteProgramError)
    for program in (batch[0], batch[2]):
        assert_equal(answers[program.rows], here.run(program))
    assert there.jobs == 1 + 3


@row("the server's own time-out", errors.RemoteTimeoutError)
def test_server_time_out(open_remote, model, server):
    there = open_remote(model)
    there.run(capture(there))  # the model is up now
    with server.turned(timeout=0.1), pytest.raises(errors.RemoteTimeoutError, match=r"0\.1s.*fewer rows"):
        there.run(long_generation(there))


@row("our deadline", errors.RemoteDeadlineError)
def test_our_deadline(open_remote, model, server):
    notebook = Notebook()
    there = open_remote(model, deadline=1.0, journal=notebook)
    with server.turned(slow=4), pytest.raises(errors.RemoteDeadlineError, match=r"within 1 s.*Run the plan again"):
        there.run(capture(there))
    assert not notebook.jobs  # or the next run would wait for the same job


@row("waiting is cancelled here", errors.RemoteCancelError)
def test_cancel(open_remote, model, server):
    notebook = Notebook()
    there = open_remote(
        model, journal=notebook, note=once("RECEIVED", lambda: threading.Timer(0.3, there.cancel).start())
    )
    with server.turned(slow=4):
        began = time.monotonic()
        with pytest.raises(errors.RemoteCancelError):
            there.run(capture(there))
    assert time.monotonic() - began < 3
    assert len(notebook.jobs) == 1  # to be fetched, should the plan be run again


@row("the connection is cut while a job runs", "none")
def test_connection_cut(open_remote, open_local, model, server):
    line = servers.Line(server.port)
    news = []

    def cut() -> None:
        line.cut()
        threading.Timer(2.0, line.mend).start()

    there = open_remote(model, host=line.url, note=lambda *n: news.append(n))
    there.run(capture(there))
    ran = server.ran()
    program = long_generation(there)
    there.note = once("RECEIVED", cut, news)
    with server.turned(slow=1):
        readouts = there.run(program)
    line.close()
    assert_equal(readouts, open_local(model).run(program))
    assert any(status == "WAITING" and "again in" in words for _, status, words in news)
    assert server.ran() == ran + 1


@row("the server loses a replica", "none")
def test_lost_replica_is_sent_again(open_remote, open_local, model, server):
    there = open_remote(model, note=once("LOST", lambda: (server.folder / "knobs.json").write_text("{}")))
    program = capture(there)
    with server.turned(end="Replica was evicted while processing your request. Please try again later."):
        readouts = there.run(program)
    assert there.jobs > 1
    assert_equal(readouts, open_local(model).run(program))


@row("the server loses every replica", errors.RemoteLostError)
def test_replicas_lost_again_and_again(open_remote, model, server):
    there = open_remote(model, retries=1)
    refusal = pytest.raises(errors.RemoteLostError, match=r"Replica was evicted.*sent 2 times")
    with server.turned(end="Replica was evicted while processing your request."), refusal:
        there.run(capture(there))


@row("the server does not know a job any more", "none")
def test_unknown_job_is_sent_again(open_remote, open_local, model, monkeypatch):
    monkeypatch.setattr(ndif, "UNKNOWN", 0.5)
    notebook = Notebook()
    there = open_remote(model, journal=notebook)
    program = capture(there)
    there.run(program)
    [(job, digests)] = notebook.jobs.items()
    notebook.forget(job)
    notebook.record("0" * 32, digests)
    assert_equal(there.run(program), open_local(model).run(program))
    assert there.jobs == 2


@row("a result above 8 MiB", "none")
def test_large_result(open_remote, open_local, model):
    there = open_remote(model)
    reads = tuple(ReadSite(layer, "text", "tokens") for layer in range(4))
    program = assemble(Form(reads=reads), rows(there, 160, edits=0, longest=200))
    readouts = there.run(program)
    assert there.wire.received > 8 << 20
    assert_equal(readouts, open_local(model).run(program))


@row("a server without an object store", errors.RemoteLostError)
def test_no_object_store(open_remote, model, strict, monkeypatch):
    monkeypatch.setattr(nnsight, "__version__", "99.0")  # new enough for that server
    there = open_remote(model, host=strict.url, api_key=servers.TRUSTED, retries=1)
    with pytest.raises(errors.RemoteLostError, match="has it an object store"):
        there.run(capture(there))


@row("the host is no NDIF", errors.RemoteVersionError)
def test_not_an_ndif(open_remote, model):
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    http.server.BaseHTTPRequestHandler.do_POST = lambda self: self.send_error(404)
    http.server.BaseHTTPRequestHandler.log_message = lambda *_: None
    threading.Thread(target=other.serve_forever, daemon=True).start()
    there = open_remote(model, host=f"http://127.0.0.1:{other.server_port}")
    with pytest.raises(errors.RemoteVersionError, match="Is it an NDIF server"):
        there.run(capture(there))
    other.shutdown()


def test_the_table_in_the_docs_is_what_is_tested_here():
    lines = DOCS.read_text().partition("## What can go wrong")[2].partition("\n## ")[0]
    told = re.findall(r"^\| ([^|]+?) \| `?(\w+)`? \|", lines, re.M)
    assert dict(told[1:]) == ROWS
