"""Fixtures that every test may use: tiny random models of the five families, executors over them, a folder of one."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NSTEER_CACHE"] = os.path.join(tempfile.gettempdir(), f"nsteer-tests-{os.getuid()}-{os.getpid()}")

import hypothesis
import pytest

atexit.register(shutil.rmtree, os.environ["NSTEER_CACHE"], ignore_errors=True)

hypothesis.settings.register_profile("house", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("house")


LONGEST = """
test_real test_ray test_vllm quickstart ndif families test_fuzz test_host_memory test_damaged_stores test_races
test_upkeep_groups study test_runner test_cluster test_store_remote test_calibration test_tuning test_shards
test_two_runs test_memory test_security test_docs test_oracle test_store_violence test_chat test_exchange test_leaving
test_methods_run test_steer_formulas test_failures test_stopping test_sharing test_packaging test_evals read-edit
""".split()
"""Groups of more than half a minute. They begin first: one that began last would keep the other workers waiting."""


def pytest_configure(config):
    """Workers share one process that forks commands."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        import prefork

        prefork.share()


@pytest.hookimpl(tryfirst=True)  # before xdist looks which group a test is of
def pytest_collection_modifyitems(items):
    """Workers get whole groups: the server's tests, those on the quickstart's store, those marked, else a file each."""
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        group = item.path.stem
        if "ndif" in item.path.parts:
            group = "ndif"
        elif "quickstart" in item.fixturenames:
            group = "quickstart"
        item.add_marker(pytest.mark.xdist_group(group))
    place = {group: at for at, group in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.get_closest_marker("xdist_group").args[0], len(place)))


def pytest_collection_finish(session):
    """Groups that xdist does not see would make every costly fixture once a worker (pytest 9.2 with xdist 3.8)."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist sees no groups: tests of one file go to several workers; pytest < 9.2?")


def pytest_terminal_summary(terminalreporter):
    """What was not tested for want of a model, an environment or a server is said at the end, where it is read."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = {
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)
    }
    for reason in sorted(reason for reason in reasons if "TESTED: " in reason):
        terminalreporter.write_line(reason, yellow=True, bold=True)


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What is there before a file's tests stays: a run collects garbage, and need not look at libraries again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def out_of_the_repository(monkeypatch, tmp_path_factory, request):
    """Plans name their stores relative to where one stands: tests stand in an empty folder."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))


@pytest.fixture(scope="session")
def words():
    """The tiny tokenizer."""
    import tinies

    return tinies.tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """Makes the Local executor of a tiny random model by the name of its family, each once."""
    import tinies
    import torch

    from nsteer.executors.local import Local

    torch.set_num_threads(1)
    executors = {}

    def executor(name: str) -> Local:
        if name not in executors:
            executors[name] = Local(tinies.model(name), tokenizer=tinies.tokenizer(bos=tinies.BOS[name]), device="cpu")
        return executors[name]

    return executor


@pytest.fixture(scope="session")
def zoo_model():
    """Makes the Local executor of an embedded model, each once; skips where it is not there (yet)."""
    import torch

    from nsteer import zoo
    from nsteer.executors.local import Local

    torch.set_num_threads(1)
    executors = {}

    def executor(name: str) -> Local:
        if not (zoo.path(name) / "model.safetensors").is_file():
            pytest.skip(f"zoo/{name} is not there")
        if name not in executors:
            executors[name] = Local(str(zoo.path(name)), device="cpu")
        return executors[name]

    return executor


@pytest.fixture(scope="session")
def skeletons():
    """What builds a model without weights, and what outlines it, each once for every model."""
    from nsteer.executors import skeleton

    build, models = skeleton.build, {}

    def built(*how):
        if repr(how) not in models:
            models[repr(how)] = build(*how)
        return models[repr(how)]

    return {"build": built, "outline": cache(skeleton.outline)}


@pytest.fixture(scope="module")
def shared_skeletons(skeletons):
    """Clients of a model share it without weights, and its outline."""
    from nsteer.executors import skeleton

    with pytest.MonkeyPatch.context() as at:
        for name, shared in skeletons.items():
            at.setattr(skeleton, name, shared)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Saves a tiny random model with its tokenizer to a folder, each once; its path."""
    import tinies

    folders = {}

    def save(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("tiny") / name
            tinies.model(name).save_pretrained(folders[name])
            tinies.tokenizer(bos=tinies.BOS[name], chat=True).save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A folder in which the installed command has run plans/quickstart.yaml, what it printed, and its seconds."""
    import shutil
    import subprocess
    import sys
    import time
    from pathlib import Path

    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(Path(__file__).parent.parent / "plans", folder / "plans")
    command = [str(Path(sys.executable).parent / "nsteer"), "run", "plans/quickstart.yaml"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, time.monotonic() - started


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that keeps its console."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium, chromedriver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on the path")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()
