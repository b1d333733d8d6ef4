"""The tests of tests/on_vllm, in an environment that has vLLM.

They run where that environment is built, or where NSTEER_VLLM_BUILD=1 asks for it: 3.9 GB, some four minutes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import vllm_environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def python():
    """The interpreter of the environment; a skip that says why where there is none."""
    try:
        if not vllm_environment.there() and not os.environ.get("NSTEER_VLLM_BUILD"):
            raise vllm_environment.Unbuilt("not built: NSTEER_VLLM_BUILD=1, or python tests/vllm_environment.py")
        return vllm_environment.python(vllm_environment.build())
    except (vllm_environment.Unbuilt, OSError) as error:
        pytest.skip(f"NO VLLM, ITS EXECUTOR IS NOT TESTED: {error}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", ["test_vllm_equal.py", "test_vllm_runs.py"])
def test_on_vllm(python, file):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    words = [python, "-m", "pytest", "-p", "no:cacheprovider", "-n0", "-q", "-m", "", f"tests/on_vllm/{file}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
