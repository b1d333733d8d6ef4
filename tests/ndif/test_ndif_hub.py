"""Models by the ids and revisions that users write, from a hub on loopback, here and on the server."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import servers

ROOT = Path(__file__).parents[2]

SCRIPT = """
    import json, sys
    sys.path[:0] = [{here!r}, {root!r}, {root!r} + "/tests"]
    from kit import assert_equal, rows
    from nsteer.executors.local import Local
    from nsteer.executors.ndif import Ndif
    from nsteer.program.form import Decoding, EditSite, Form, ReadSite, assemble

    out = {{}}
    for revision in (None, "other"):
        here = Local("org/tiny-llama", revision=revision, device="cpu", threads=1)
        there = Ndif("Org/Tiny-Llama", revision=revision, host={url!r})
        form = Form(reads=tuple(ReadSite(layer) for layer in range(4)))
        program = assemble(form, rows(here, edits=0))
        found = there.run(program)
        assert_equal(found, here.run(program))
        out[str(revision)] = [there.model_key, float(abs(found.pooled).sum())]
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def hub(tinies, tmp_path_factory):
    import tiny

    other = tiny.make(tmp_path_factory.mktemp("other"), seed=1)
    repos = {"org/tiny-llama": tinies["llama"], "org/tiny-llama@other": other["llama"]}
    with servers.Hub(tmp_path_factory.mktemp("hub"), repos) as running:
        yield running


def run(hub, tmp_path, script):
    """A client of its own: huggingface_hub reads its address when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "client")}
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=300
    )


def test_hub_ids_and_revisions_here_and_there(built, hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "server")}
    with servers.Light(tmp_path / "ndif", settings) as running:
        words = {"here": str(Path(__file__).parent), "root": str(ROOT), "url": running.url}
        done = run(hub, tmp_path, textwrap.dedent(SCRIPT).format(**words))
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    out = json.loads(done.stdout.splitlines()[-1])
    assert '"repo_id": "org/tiny-llama"' in out["None"][0]  # as the hub spells it
    assert '"revision": "other"' in out["other"][0]
    assert out["None"][1] != out["other"][1]  # two revisions, two models
    weights = [line for line in hub.log("hub").splitlines() if line.startswith("GET") and ".safetensors" in line]
    assert len(weights) == 4  # each side loaded each revision once: the remote executor loads none


def test_ids_and_revisions_that_the_hub_does_not_have(hub, tmp_path):
    script = """
        from nsteer.errors import ModelError
        from nsteer.executors.ndif import Ndif

        for name, revision in (("org/none", None), ("org/tiny-llama", "none")):
            try:
                Ndif(name, revision=revision, host="http://127.0.0.1:9")
            except ModelError as error:
                print("ModelError", name in str(error))
    """
    done = run(hub, tmp_path, f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(script))
    assert done.stdout.split() == ["ModelError", "True"] * 2, done.stderr[-3000:]
