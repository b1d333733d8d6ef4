"""A server is a stranger: what it answers runs nothing, fills no memory, and is what programs return, or refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import zstandard
from strangers import Ndif as Server
from strangers import Stranger

from nsteer import zoo
from nsteer.errors import RemoteError, RemoteLostError, RemoteVersionError
from nsteer.executors import answers
from nsteer.executors.ndif import Ndif
from nsteer.executors.payload import compress
from nsteer.executors.wire import Wire
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, Row, RowEdit, assemble, lens

# clients of a model share it without weights, and its outline: half of each test
pytestmark = pytest.mark.usefixtures("shared_skeletons")
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def local(zoo_model):
    return zoo_model("llama")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)


def programs(local):
    """One of each kind of form, on texts of unequal length."""
    rng, width = np.random.default_rng(0), local.anatomy.d_model
    texts = [(1, 2, 3, 4, 5), (6, 7, 8), (9, 10)]

    def rows(edits):
        for key, tokens in enumerate(texts):
            even = np.full(len(tokens), 1 / len(tokens), np.float32)
            vector = rng.normal(size=width).astype(np.float32)
            edit = RowEdit(vector, 0.1, np.ones(len(tokens), bool), True, even)
            weights = {"text": even, "score": even, "later": even}
            yield Row(key, tokens, weights, (edit,) * edits, rng.random(6))

    reads = tuple(ReadSite(layer) for layer in LAYERS)
    edits = tuple(EditSite(layer, "add") for layer in LAYERS)
    decoding = Decoding(6, local.eos, local.pad, sample=True)
    decoded = tuple(ReadSite(layer, what="decoded") for layer in LAYERS)
    whole = (ReadSite(1, what="norm"), ReadSite(3, what="tokens"))
    return {
        "pooled": assemble(Form(reads=reads, edits=edits), list(rows(2))),
        "right": assemble(Form(reads=reads, score=True), list(rows(0)), "right"),
        "tokens": assemble(Form(reads=whole), list(rows(0))),
        "generated": assemble(Form(reads=decoded, edits=edits, decoding=decoding, top=3), list(rows(2))),
        "against": assemble(Form(edits=edits, against=True), list(rows(2))),
        "lens": lens(4, rng.normal(size=(5, width))),
    }


KINDS = ("pooled", "right", "tokens", "generated", "against", "lens")


def remote(server, **settings):
    return Ndif(str(zoo.path("llama")), host=server.url, retries=0, deadline=20, **settings)


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_allclose(np.asarray(b[name]), np.asarray(value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_program_returns_has_the_shapes_that_are_expected(local, kind):
    program = programs(local)[kind]
    with Server(local) as server:
        there = remote(server)
        answer, here = there.run(program), local.run(program)
        there.close()
    for i in range(program.rows):
        same(here.row(i), answer.row(i))


# ---- answers that are not what the programs return ----------------------------------------------------------------


def spoilt(change):
    """A server's answer in which `change` has altered the results of the only program."""

    def spoil(content):
        plain = zstandard.ZstdDecompressor().decompress(content, max_output_size=2**26)
        answer = torch.load(io.BytesIO(plain), weights_only=True)
        change(answer)
        return packed(answer)

    return spoil


def packed(answer):
    stream = io.BytesIO()
    torch.save(answer, stream)
    return compress(stream.getvalue())


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def deflated(content):
    plain = zstandard.ZstdDecompressor().decompress(content, max_output_size=2**26)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return compress(out.getvalue())


def put(name, value):
    return spoilt(lambda answer: answer["results"][0].__setitem__(name, value(answer["results"][0][name])))


SPOILT = {
    "more rows": ("pooled", put("pooled", lambda t: torch.cat([t, t], 1)), r"'pooled' has shape \(2, 6, \d+\)"),
    "fewer rows": ("pooled", put("pooled", lambda t: t[:, :2]), "'pooled' has shape"),
    "another width": ("pooled", put("pooled", lambda t: t[..., :-1]), "'pooled' has shape"),
    "one number": ("pooled", put("pooled", lambda t: t[0, 0, 0]), r"'pooled' has shape \(\)"),
    "whole numbers": ("pooled", put("pooled", lambda t: t.long()), r"'pooled' is of torch\.int64, not of floats"),
    "complex": ("pooled", put("pooled", lambda t: t.to(torch.complex64)), "'pooled' is a tensor of torch.complex64"),
    "meta": ("pooled", put("pooled", lambda t: torch.empty(2, 3, 10**9, device="meta")), "'pooled' is a tensor"),
    "sparse": ("pooled", put("pooled", lambda t: t.to_sparse()), "'pooled' is no dense tensor"),
    "huge by strides": (
        "tokens",
        put("streams", lambda t: torch.zeros(1).expand(10**6, 10**6)),
        r"'streams' has shape \(1000000, 1000000\)",
    ),
    "no tensor": ("pooled", put("receipts", lambda t: "many"), "'receipts' is no dense tensor"),
    "missing": ("pooled", spoilt(lambda answer: answer["results"][0].pop("receipts")), "'receipts' is missing"),
    "too many tokens": ("generated", put("tokens", lambda t: torch.cat([t, t], 1)), "'tokens' has shape"),
    "no tokens": ("generated", put("tokens", lambda t: t[:, :5]), "'tokens' has shape"),
    "unknown tokens": ("generated", put("tokens", lambda t: t + 10**6), "'tokens' holds ids that are none"),
    "negative tokens": ("generated", put("tokens", lambda t: t - 10**6), "'tokens' holds ids that are none"),
    "unknown candidates": ("generated", put("candidates", lambda t: t - 9), "'candidates' holds ids"),
    "float tokens": ("generated", put("tokens", lambda t: t.float()), "not of whole numbers"),
    "uncounted": ("generated", put("counted", lambda t: t - torch.inf), "'counted' holds what is no count"),
    "NaN score": ("right", put("score", lambda t: t * torch.nan), "'score' holds what is no number"),
    "NaN lens": ("lens", put("promoted", lambda t: t * torch.nan), "'promoted' holds what is no number"),
    "no results": ("pooled", spoilt(lambda answer: answer.update(results=[])), "holds no results of 1 programs"),
    "results no list": ("pooled", spoilt(lambda answer: answer.update(results=3)), "holds no results"),
    "result no mapping": ("pooled", spoilt(lambda answer: answer.update(results=[3])), "no mapping of names"),
    "no mapping": ("pooled", lambda content: packed([1, 2]), "no mapping of names"),
    "empty": ("pooled", lambda content: b"", "not data alone|decompressed"),
    "no zstd": ("pooled", lambda content: b"<html>" * 99, "can not be decompressed"),
    "cut": ("pooled", lambda content: content[: len(content) // 2], "not data alone|decompressed"),
    "no zip": ("pooled", lambda content: compress(b"x" * 999), "not data alone"),
    "a pickle": ("pooled", lambda content: compress(pickle.dumps({"results": []})), "not data alone"),
    "packed twice": ("pooled", deflated, "compressed once more"),
    "a bomb": ("pooled", lambda content: compress(bytes(2**29)), "is larger than the"),
    "an encoded one": ("pooled", lambda content: (200, content, {"content-encoding": "gzip"}), "it is encoded"),
    "an endless one": ("pooled", lambda content: (200, (bytes(2**20) for _ in iter(int, 1))), "is longer than"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_answer_that_programs_do_not_give_is_refused_by_name(local, name):
    kind, spoil, words = SPOILT[name]
    with Server(local, spoil) as server:
        there = remote(server)
        with pytest.raises(RemoteVersionError, match=words) as caught:
            there.run(programs(local)[kind])
        there.close()
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_an_answer_runs_no_code(local, tmp_path):
    mark = tmp_path / "ran"
    out = io.BytesIO()
    torch.save({"results": [Bomb(mark)]}, out)
    with Server(local, lambda content: compress(out.getvalue())) as server:
        there = remote(server)
        with pytest.raises(RemoteVersionError, match="not data alone"):
            there.run(programs(local)["pooled"])
        there.close()
    assert not mark.exists()


def test_a_frame_that_declares_what_it_has_not_takes_no_memory():
    frame = bytearray(zstandard.ZstdCompressor().compress(b"x" * 300))
    declared = zstandard.ZstdCompressor(write_content_size=True).compress(b"y" * 70000)
    assert zstandard.frame_content_size(declared) == 70000
    forged = bytes(frame[:4]) + b"\xe0" + (2**50).to_bytes(8, "little") + bytes(frame[7:])
    with pytest.raises(ValueError, match=r"decompressed|larger|not data alone"):
        answers.unpack(forged)


# ---- words --------------------------------------------------------------------------------------------------------

SAID = [
    [],
    3,
    None,
    {"id": 3},
    {"id": "../../etc", "status": "RECEIVED"},
    {"id": "a?b=c", "status": "RECEIVED"},
    {"id": "", "status": "RECEIVED"},
    {"id": {"a": 1}, "status": "RECEIVED"},
    {"id": "x" * 500, "status": "RECEIVED"},
    {"status": "RECEIVED"},
]


@pytest.mark.parametrize("said", SAID, ids=repr)
def test_a_status_that_is_none_is_refused(said, local):
    with Stranger(lambda method, path: (200, json.dumps(said).encode())) as server:
        there = remote(server)
        with pytest.raises(RemoteVersionError, match="no job's status"):
            there.run(programs(local)["pooled"])
        there.close()


@pytest.mark.parametrize("status", [["COMPLETED"], 7, None, "\x1b[31mDONE", "[/red]"])
@pytest.mark.parametrize("data", [None, 3, ["x"], "file:///etc/passwd", "http://[", "gopher://x", ""])
def test_a_job_that_ends_strangely_ends_in_our_words(status, data, local):
    said = {"status": status, "data": data, "description": {"a": "\x1b[31m"}}
    for change in ({}, {"status": "COMPLETED"}):
        heard = []
        with Server(local, said={**said, **change}) as server:
            there = remote(server, note=lambda *news, heard=heard: heard.extend(news))
            there.deadline = 0.2
            with pytest.raises(RemoteError):
                there.run(programs(local)["lens"])
            there.close()
        assert all(isinstance(line, str) and "\x1b" not in line for line in heard)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 422, 500])
@pytest.mark.parametrize(
    "content",
    [
        b"\x1b[31mPWNED\x1b]0;title\x07",
        b'{"detail": "API key \\u001b[31mPWNED"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff",
    ],
    ids=["escapes", "detail", "lists", "mappings", "bytes"],
)
def test_words_of_a_server_reach_no_terminal_raw(status, content):
    with Stranger(lambda method, path: (status, content)) as server:
        wire = Wire(server.url, retries=0)
        if (status, content[:9]) == (200, b'{"detail"'):
            assert "\x1b" not in str(wire.json("/status"))
            return
        with pytest.raises(RemoteError) as caught:
            wire.json("/status")
        with pytest.raises(RemoteError) as other:
            wire.submit(b"x", {}, 1e12, print)
        wire.close()
    assert "\x1b" not in f"{caught.value}{other.value}" and "\x07" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_words_without_end_are_cut():
    with Stranger(lambda method, path: (200, (b" " * 2**20 for _ in iter(int, 1)))) as server:
        wire = Wire(server.url, retries=0)
        with pytest.raises((RemoteVersionError, RemoteLostError), match="longer than"):
            wire.json("/status")
        wire.close()


SHOWN = [
    {"deployments": []},
    {"deployments": {"a": 3}},
    {"deployments": {"a": {"application_state": "RUNNING", "repo_id": ["\x1b[31m"], "revision": {"x": 1}}}},
    {"packages": [], "python_version": ""},
    {"packages": {"torch": {"a": 1}}, "python_version": None, "email": 3, "tags": 4},
    {"tags": [1, None, "\x1b[31m"], "email": ["a"]},
    [],
    3,
]


@pytest.mark.parametrize("said", SHOWN, ids=repr)
def test_doctor_bears_what_a_server_says(said, monkeypatch):
    from nsteer.executors import doctor

    monkeypatch.setenv("NDIF_API_KEY", "k-e-y")
    with Stranger(lambda method, path: (200, json.dumps(said).encode())) as server:
        findings = list(doctor.server(server.url))
    assert len(findings) >= 4 and "\x1b" not in repr(findings)
