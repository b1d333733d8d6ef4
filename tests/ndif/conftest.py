"""Fixtures of the remote path: a real NDIF on loopback, models it can serve, executors over both sides."""

from __future__ import annotations

import os
from pathlib import Path

import environment
import pytest
import servers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and "ndif_full" not in item.keywords:
            item.add_marker("ndif")


@pytest.fixture(scope="session")
def built():
    """The environment of the server, built where it is absent; a skip that says why where it can not be."""
    try:
        return environment.build()
    except (environment.Unbuilt, OSError) as error:
        pytest.skip(f"NO NDIF SERVER, THE REMOTE PATH IS NOT TESTED: {error}")


@pytest.fixture(scope="session")
def hub(tinies, tmp_path_factory):
    """A hub of one model in two revisions."""
    import tiny

    [other] = tiny.make(tmp_path_factory.mktemp("other"), seed=1, families=["llama"]).values()
    repos = {"org/tiny-llama": tinies["llama"], "org/tiny-llama@other": other}
    with servers.Hub(tmp_path_factory.mktemp("hub"), repos) as running:
        yield running


@pytest.fixture(scope="session")
def server(built, hub, tmp_path_factory):
    """The light form, without keys, whose hub is the one on loopback. Nearly all tests share it: its start is dear."""
    folder = tmp_path_factory.mktemp("ndif")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "NDIF_SANDBOX_POOL_SIZE": "1"}
    with servers.Light(folder, settings) as running:
        yield running


@pytest.fixture(scope="session")
def tinies(tmp_path_factory):
    """Folders of six architectures with random weights, by name."""
    import tiny  # not above: transformers reads HF_HUB_OFFLINE when it is imported

    return tiny.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="module")
def shared(shared_skeletons):
    """All clients of a model share it without weights: building it is half of what most tests here would take."""


@pytest.fixture
def open_remote(server):
    """Makes executors over a server (the session's, where none is given) and closes them."""
    from nsteer.executors.ndif import Ndif

    opened = []

    def make(model, **settings):
        settings.setdefault("host", server.url)
        opened.append(Ndif(str(model), **settings))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


@pytest.fixture(scope="session")
def open_local():
    """Local executors, each model loaded once."""
    from nsteer.executors.local import Local

    loaded = {}

    def make(model):
        if str(model) not in loaded:
            loaded[str(model)] = Local(str(model), device="cpu", threads=1)
        return loaded[str(model)]

    return make
