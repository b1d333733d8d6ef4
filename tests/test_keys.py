"""The API key goes where its user sends it, and nowhere else; no output shows what lets others in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from planside import PLAN, problems
from strangers import Stranger

import nsteer
from nsteer import cli
from nsteer.errors import PlanError, RemoteAccessError, RemoteError, StoreError, masked
from nsteer.executors import doctor
from nsteer.executors.wire import Wire
from nsteer.plan import check
from nsteer.store import Store
from nsteer.system import hosts

KEY = "11111111-2222-SECRET"
REMOTE = f"{PLAN}executor: ndif\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A user with a key, who names no server and has no configuration of nnsight's."""
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.delenv("NDIF_HOST", raising=False)
    monkeypatch.setattr(hosts, "_nnsight", dict)


@pytest.fixture
def stranger():
    with Stranger() as running:
        yield running


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


def written(folder: Path, text: str) -> Path:
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml"


# ---- who names the server ---------------------------------------------------------------------------------------


def test_a_host_that_the_plan_alone_names_is_refused_and_never_asked(stranger, tmp_path):
    plan = written(tmp_path, f"{REMOTE}remote: {{host: '{stranger.url}'}}\n")
    for command in (["check", plan], ["run", plan], ["show", plan, "--source"], ["run", plan, "--remote"]):
        done = invoke(*command)
        assert done.exit_code == 2 and not stranger.asked
        assert "plan.yaml:10:16: remote.host: expected a server that you name as well" in done.output
        assert f"found '{stranger.url}', which the plan alone names (--host {stranger.url}, or NDIF_HOST" in done.output


def test_a_base_or_an_override_is_the_plan_too(stranger, tmp_path):
    (tmp_path / "base.yaml").write_text(f"{REMOTE}remote: {{host: '{stranger.url}'}}\n")
    with pytest.raises(PlanError, match=r"base\.yaml:10:16: remote\.host"):
        check.load(written(tmp_path, "extends: base.yaml\nname: other\n"))
    assert [problem.path for problem in problems(REMOTE, f"remote.host={stranger.url}")] == ["remote.host"]


def test_a_server_that_its_user_names_is_taken(stranger, tmp_path, monkeypatch):
    plan = written(tmp_path, f"{REMOTE}remote: {{host: '{stranger.url}'}}\n")
    assert check.load(plan, host=stranger.url).plan.remote.host == stranger.url
    assert check.load(plan, host="https://mine.example").plan.remote.host == "https://mine.example"
    monkeypatch.setenv("NDIF_HOST", f"{stranger.url}/")
    check.load(plan)
    monkeypatch.delenv("NDIF_HOST")
    monkeypatch.setattr(hosts, "_nnsight", lambda: {"HOST": stranger.url})
    check.load(plan)


def test_a_plan_that_runs_here_may_name_any_server(tmp_path):
    assert not problems(PLAN, "remote.host=https://elsewhere.example")


def test_nnsights_configuration_is_read_without_nnsight(tmp_path):
    file = tmp_path / "nnsight.yaml"
    file.write_text("API: {HOST: 'https://lab.example', APIKEY: abc}\n")
    words = (
        "import sys; from nsteer.system import hosts as h; print(h.own_host(), h.own_key(), 'nnsight' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", words], env={"NNSIGHT_CONFIG": str(file)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["https://lab.example", "abc", "False"]


# ---- what an address may be -------------------------------------------------------------------------------------

CLEAR = ["http://ndif.example", "http://10.0.0.7:8000", "http://localhost.evil.example", "http://127.0.0.1.example"]
WRONG = [
    "https://me:SECRET@ndif.example",
    "https://SECRET@ndif.example",
    "http://127.0.0.1\\@evil.example",
    "https://ndif.example/?token=SECRET",
    "https://ndif.example/#SECRET",
    "ftp://ndif.example",
    "https://",
    "https://a b.example",
    "https://ndif.example:99999",
]


@pytest.mark.parametrize("host", CLEAR)
def test_a_key_does_not_travel_in_clear(host):
    with pytest.raises(RemoteAccessError, match=f"{host}.*in clear"):
        Wire(host)
    [problem] = problems(REMOTE + f"remote: {{host: '{host}'}}")
    assert "which the plan alone names" in str(problem)
    done = invoke("doctor", "--remote", "--host", host)
    assert "in clear" in done.output.replace("\n", " ") or "clear" in done.output


def test_without_a_key_there_is_nothing_to_leak(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY")
    Wire("http://ndif.example").close()


@pytest.mark.parametrize("host", ["https://ndif.example", "http://127.0.0.1:9", "http://[::1]:9", "http://localhost:9"])
def test_a_key_travels_by_https_and_within_this_machine(host):
    Wire(host).close()


@pytest.mark.parametrize("host", WRONG)
@pytest.mark.parametrize("by", ["argument", "environment", "plan", "flag", "doctor"])
def test_a_wrong_address_is_refused_without_its_secrets(host, by, monkeypatch, tmp_path):
    if by == "environment":
        monkeypatch.setenv("NDIF_HOST", host)
    if by in ("argument", "environment"):
        with pytest.raises(RemoteError) as caught:
            Wire(host if by == "argument" else None)
        told = f"{caught.value!r} {caught.value}"
    elif by == "doctor":
        told = invoke("doctor", "--remote", "--host", host, "--json").output
        assert json.loads(told)[-1]["state"] == "bad"
    else:
        plan = written(tmp_path, REMOTE + (f"remote: {{host: '{host}'}}\n" if by == "plan" else ""))
        done = invoke("check", plan, *(["--host", host] if by == "flag" else []))
        assert done.exit_code == 2
        told = done.output
    assert "SECRET" not in told and KEY not in told
    if by == "environment":
        done = invoke("check", written(tmp_path, REMOTE))
        assert done.exit_code == 2 and "NDIF_HOST" in done.output and "SECRET" not in done.output


# ---- where the key goes -----------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_not_where_it_sends_us(stranger):
    def elsewhere(method, path):
        return 302, b"", {"location": f"{stranger.url}/caught"}

    with Stranger(elsewhere) as server:
        wire = Wire(server.url, retries=0)
        until = time.monotonic() + 5
        with pytest.raises(RemoteError):
            wire.json("/status")
        with pytest.raises(RemoteError):
            wire.status("job-1", until, print)
        with pytest.raises(RemoteError):
            wire.fetch(f"{server.url}/result", 100, until, print)
        wire.close()
        assert server.keys() == [KEY, KEY, None] and not stranger.asked


def test_no_proxy_sees_what_goes_to_this_machine(stranger, monkeypatch):
    with Stranger() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(RemoteAccessError):
            Wire(stranger.url).json("/status")
        assert stranger.keys() == [KEY] and not proxy.asked


def test_the_wire_alone_speaks_to_servers():
    words = (
        "httpx.Client(",
        "httpx.get(",
        "httpx.stream(",
        "ndif-api-key",
        "RemoteBackend(",
        "urlopen",
        "import socketio",
    )
    package = Path(nsteer.__file__).parent
    assert {f.name for f in package.rglob("*.py") if any(word in f.read_text() for word in words)} == {
        "wire.py",
        "completions.py",  # a judge's server: hosts, keys and proxies by test_judge_llm
    }


# ---- credentials in addresses -----------------------------------------------------------------------------------

ADDRESSES = [
    "s3://AKIA:SE/CR+ET@bucket/study.zarr",
    "https://me:SE@CR@ET@host/x",
    "https://SECRET@host/x",
    "https://host/x.zarr?X-Amz-Signature=SECRET&X-Amz-Expires=3",
    "https://host/x?a=1&sig=SECRET",
    "https://host/x?AWSAccessKeyId=SECRET",
    "https://host/x#access_token=SECRET",
    "https://host/x?X-Amz-Security-Token=SECRET",
    "https://host/x?X-Amz-Credential=SECRET",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_lets_others_in_is_masked(address):
    secret = "CR" if "CR" in address else "SECRET"
    assert secret not in masked(f"see '{address}', and go on")
    told = [str(StoreError(f"{address} is gone")), repr(StoreError(address))]
    told.append(str(problems(PLAN, f"store={address}")[0]))
    told.append(doctor.Finding("x", address, hint=address).value)
    for command in (
        ["ls", address],
        ["show", address],
        ["verify", address],
        ["report", address],
        ["report", "x.zarr", "-o", address],
        ["merge", address, "-o", "out.zarr"],
        ["check", "plan.yaml", "--set", f"store={address}"],
        ["doctor", "--on", address],
        [address],
    ):
        done = CliRunner().invoke(cli.main, command)
        assert done.exit_code not in (0, None) and not isinstance(done.exception, StoreError)
        told.append(done.output)
    assert secret not in "".join(told)


def test_addresses_that_hold_none_are_left_alone():
    text = "https://host:8080/a?b=c, s3://bucket/study.zarr and me@host"
    assert masked(text) == text


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_record_of_a_run_holds_no_credentials(address, tmp_path):
    store = Store(tmp_path / "x.zarr")
    store.add_run(plan=f"about: {address}", environment={"e": address}, started="now", argv=["nsteer", address])
    raw = b"".join(file.read_bytes() for file in (tmp_path / "x.zarr").rglob("*") if file.is_file())
    told = "".join(str(value.values) for value in store.read("runs").load().data_vars.values())
    assert "SECRET" not in told and "CR" not in told and b"SECRET" not in raw


# ---- check touches no network -----------------------------------------------------------------------------------


def test_check_asks_no_server(stranger, tmp_path, monkeypatch):
    url = f"{stranger.url}/x"
    monkeypatch.setenv("AWS_ENDPOINT_URL", stranger.url)
    monkeypatch.setenv("NDIF_HOST", stranger.url)
    steer = "steer: {strengths: [0.1], prompts: {a: one}}\n"
    more = "prompts: {a: one}\nreads: {r: {pooling: last}}\nedits: {e: [{op: add, direction: d}]}\n"
    for text, settings in {
        PLAN: (
            f"texts={url}.yaml",
            f"texts={url}",
            f"store={url}.zarr",
            "store=s3://bucket/x.zarr",
            f"models=['{url}']",
        ),
        PLAN + steer: (f"judge={url}", f"steer.prompts={url}", f"steer.prompts={url}.yaml"),
        PLAN + more: (
            f"directions={{d: {{store: {{path: '{url}.zarr', method: m, emotion: e}}}}}}",
            "directions={d: {store: {path: 's3://bucket/x.zarr', method: m, emotion: e}}}",
        ),
        REMOTE: ("about=x", f"extends={url}"),
    }.items():
        for setting in settings:
            invoke("check", written(tmp_path, text), "--set", setting)
    written(tmp_path, f"extends: {url}\nname: other\n")
    invoke("check", tmp_path / "plan.yaml")
    assert not stranger.asked
