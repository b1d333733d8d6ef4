"""Vectors go to the hub and come back with all that is known of them: its own client against a loopback hub."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_exchange import HOLE, make, planted
from test_runner import invoke

import nsteer
from nsteer.errors import ExchangeError
from nsteer.store import Store
from nsteer.vectors import exchange

TOKEN = "hf_a-secret-of-this-test"
REPO = "me/feelings"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with planted vectors of two models, a missing value, and a run with its plan."""
    path = make(tmp_path_factory.mktemp("store") / "s.zarr", "zoo/llama", "zoo/gpt2")
    Store(path).add_run(plan="name: planted\nmodels: [zoo/llama]\n", environment={}, started="now", argv=[])
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that takes commits, at the address where the client looks; the folder in which it keeps them."""
    spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).parent / "ndif" / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home = tmp_path / "hub"
    home.mkdir()
    monkeypatch.setenv("HUB_HOME", str(home))
    monkeypatch.setenv("HUB_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(module.Handler, "log_message", lambda *words: None)
    module.Handler.hub = module.Hub([])
    server = ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield home
    server.shutdown()
    server.server_close()


def test_a_repository_is_read_as_a_data_set_by_others(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    repository = exchange.push(store, REPO, variants=["raw", "unit"], folder=tmp_path / "out")
    assert {"README.md", "nsteer.json", "plan.yaml"} <= set(repository.files) and not repository.url
    names = datasets.get_dataset_config_names(str(tmp_path / "out"))
    assert set(names) == {f"zoo--{m}__{by}" for m in ("llama", "gpt2") for by in ("generation", "reading")}
    rows = datasets.load_dataset(str(tmp_path / "out"), "zoo--llama__reading", cache_dir=str(tmp_path / "cache"))
    assert set(rows) == {"raw", "unit"}
    by_emotion = {row["emotion"]: row for row in rows["raw"]}
    true = planted("zoo/llama", "reading", "happy")
    np.testing.assert_array_equal(np.array(by_emotion["happy"]["vector"], np.float32), true)
    assert by_emotion["happy"]["layers"] == list(range(len(true)))
    assert by_emotion["sad"]["layers"] == [i for i in range(len(true)) if i != HOLE], (
        "a missing layer is left out by its number"
    )
    unit = {row["emotion"]: np.array(row["vector"]) for row in rows["unit"]}["happy"]
    np.testing.assert_allclose(unit, true / np.linalg.norm(true, axis=-1, keepdims=True), rtol=1e-5)


def test_the_card_says_what_a_reader_needs(store, tmp_path):
    exchange.push(store, REPO, models=["zoo/llama"], folder=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = text.split("---\n")[1]
    assert '"config_name": "zoo--llama__reading"' in front and "gpt2" not in text
    for word in ("block-index", "resid_post", "Noise ceiling", "Receipts", "Protocols", "nsteer import hub:"):
        assert word in text
    assert (tmp_path / "out" / "plan.yaml").read_text().startswith("name: planted")


def test_there_and_back_again(store, hub, tmp_path):
    said = invoke("push", store, REPO)
    assert said.exit_code == 0 and "/datasets/me/feelings" in said.output, said.output
    back = tmp_path / "back.zarr"
    said = invoke("import", f"hub:{REPO}", "--into", back)
    assert said.exit_code == 0, said.output
    for model in ("zoo/llama", "zoo/gpt2"):
        for method, emotion in (("generation", "happy"), ("reading", "happy"), ("reading", "sad")):
            vectors = nsteer.open(back).sel("vectors", **{"model": model, "method": method, "emotion": emotion}).values
            np.testing.assert_array_equal(vectors, planted(model, method, emotion))
    assert ("zoo/llama", "generation", "sad") not in Store(back).committed("vectors/zoo--llama"), "it was never derived"
    kept = (
        nsteer.open(back)["imports"]
        .provenance.sel({"model": "zoo/llama", "method": "reading", "emotion": "happy"})
        .item()
    )
    origin = json.loads(kept)
    assert origin["hub"] == REPO and len(origin["commit"]) == 40 and origin["layers_are"] == "block-index"
    about = origin["about"]["vectors"]["reading/happy"]
    record = Store(store).committed("vectors/zoo--llama")["zoo/llama", "reading", "happy"]
    assert about["store"]["fingerprint"] == f"{record.fingerprint:013x}" and about["model"]["id"] == "zoo/llama"


def test_a_repository_is_private_unless_it_is_said_and_no_token_is_kept(store, hub, tmp_path):
    for repo, more in ((REPO, ()), ("me/open", ("--public",))):
        assert TOKEN not in invoke("push", store, repo, *more).output
    lines = map(json.loads, (hub / "log").read_text().splitlines())
    bodies = {request["said"]["name"]: request["said"] for request in lines if request["path"] == "/api/repos/create"}
    private = {name: body.get("private", body.get("visibility") == "private") for name, body in bodies.items()}
    assert private == {"feelings": True, "open": False}, bodies  # older clients say `private`, newer ones `visibility`
    everywhere = [*hub.rglob("*"), *store.rglob("*")]
    assert everywhere and not any(TOKEN.encode() in file.read_bytes() for file in everywhere if file.is_file())


def test_a_branch_of_its_own(store, hub, tmp_path):
    exchange.push(store, REPO, methods=["reading"], revision="v2")
    assert not (hub / "me--feelings@main" / "README.md").exists()
    assert (hub / "me--feelings@v2" / "README.md").exists()
    with pytest.raises(ExchangeError, match="hub answered 404"):
        exchange.pull(f"hub:{REPO}", tmp_path / "b.zarr")
    imported = exchange.pull(f"hub:{REPO}@v2", tmp_path / "b.zarr", model="zoo/llama")
    assert {cell[:2] for cell in imported.cells} == {("zoo/llama", "reading")}


def test_what_the_hub_refuses_is_told_in_a_line(store, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = invoke("push", store, REPO)
    assert said.exit_code == 1 and "401" in said.stderr and "hf auth login" in said.stderr
    assert "hf_wrong" not in said.output + said.stderr and len(said.stderr.splitlines()) == 1
    said = invoke("import", "hub:me/nothing", "--into", tmp_path / "b.zarr")
    assert said.exit_code == 1 and "404" in said.stderr and not (tmp_path / "b.zarr").exists()


def test_a_file_that_is_not_the_one_its_manifest_names_is_refused(store, hub, tmp_path):
    exchange.push(store, REPO)
    (file,) = (hub / "me--feelings@main").glob("vectors/zoo--llama__reading.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ExchangeError, match="is not the file that its"):
        exchange.pull(f"hub:{REPO}", tmp_path / "b.zarr")


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{", '{"layout": 1, "vectors": {"../x": {}}}', '{"layout": 2, "vectors": {}}']
    + ['{"layout": 1, "vectors": {"vectors/a.safetensors": {"model": {"id": 5}}}}'],
)
def test_a_strangers_manifest(store, hub, tmp_path, manifest):
    exchange.push(store, REPO)
    (hub / "me--feelings@main" / "nsteer.json").write_text(manifest)
    with pytest.raises(ExchangeError, match=r"nsteer\.json is not as"):
        exchange.pull(f"hub:{REPO}", tmp_path / "b.zarr")


def test_what_is_asked_for_is_looked_at_before_anything_is_sent(store, hub, tmp_path):
    for words, expected in (
        (("push", store, "feelings"), "OWNER/NAME"),
        (("push", store, REPO, "--model", "zoo/qwen"), "no vectors of the model"),
        (("import", "hub:feelings", "--into", tmp_path / "b.zarr"), "hub:OWNER/NAME"),
        (("import", f"hub:{REPO}", "--into", tmp_path / "b.zarr", "--layer", "3"), "--layers"),
        (("import", tmp_path / "x.npy", "--into", tmp_path / "b.zarr"), "--model"),
    ):
        said = invoke(*words)
        assert said.exit_code and expected in said.stderr, (words, said.stderr)
    assert not (hub / "log").exists()


def test_offline_it_says_so(store, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExchangeError, match="HF_HUB_OFFLINE"):
        exchange.push(store, REPO)


def test_without_pyarrow_it_says_what_to_install(store, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExchangeError, match=r"pip install 'nsteer\[hub\]'"):
        exchange.push(store, REPO, folder=tmp_path / "out")
