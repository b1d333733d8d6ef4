"""Models by the ids and revisions that users write, from a hub on loopback, here and on the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
    import json, sys
    sys.path[:0] = [{here!r}, {root!r}, {root!r} + "/tests"]
    from kit import assert_equal, rows
    from nsteer.errors import ModelError
    from nsteer.executors.local import Local
    from nsteer.executors.ndif import Ndif
    from nsteer.program.form import Form, ReadSite, assemble

    out = {{}}
    for revision in (None, "other"):
        here = Local("org/tiny-llama", revision=revision, device="cpu", threads=1)
        there = Ndif("Org/Tiny-Llama", revision=revision, host={url!r})
        form = Form(reads=tuple(ReadSite(layer) for layer in range(4)))
        program = assemble(form, rows(here, edits=0))
        readouts = there.run(program)
        assert_equal(readouts, here.run(program))
        out[str(revision)] = [there.model_key, float(abs(readouts.pooled).sum())]
    refused = []
    for name, revision in (("org/none", None), ("org/tiny-llama", "none")):
        try:
            Ndif(name, revision=revision, host="http://127.0.0.1:9")
        except ModelError as error:
            refused.append(name in str(error))
    print(json.dumps([out, refused]))
"""


@pytest.fixture(scope="module")
def told(hub, server, tmp_path_factory):
    """What a client of its own says: huggingface_hub reads its address when it is imported."""
    home = tmp_path_factory.mktemp("client")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    script = textwrap.dedent(SCRIPT).format(here=str(Path(__file__).parent), root=str(ROOT), url=server.url)
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_ids_and_revisions_here_and_there(told, hub):
    out, _ = told
    assert '"repo_id": "org/tiny-llama"' in out["None"][0]  # as the hub spells it
    assert '"revision": "other"' in out["other"][0]
    assert out["None"][1] != out["other"][1]  # two revisions, two models
    weights = [line for line in hub.log("hub").splitlines() if line.startswith("GET") and ".safetensors" in line]
    assert len(weights) == 4  # each side loaded each revision once: the remote executor loads none


def test_ids_and_revisions_that_the_hub_does_not_have(told):
    _, refused = told
    assert refused == [True, True]
