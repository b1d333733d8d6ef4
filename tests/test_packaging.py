"""What is released: one version, and a wheel that works where nothing else of this repository is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import nsteer

ROOT = Path(__file__).parent.parent


def test_the_version_is_written_in_one_place():
    """In nsteer/__init__.py; what must repeat it is compared with it here, and by scripts/release."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: nsteer.__version__"
    assert f"\nversion: {nsteer.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {nsteer.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    numbers = re.compile(rf"['\"]{re.escape(nsteer.__version__)}['\"]")
    assert [file.name for file in (ROOT / "nsteer").rglob("*.py") if numbers.search(file.read_text())] == [
        "__init__.py"
    ]


def test_each_extra_that_a_message_names_is_there():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    sources = [*(ROOT / "nsteer").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {name for file in sources for name in re.findall(r"nsteer\[([a-z0-9-]+)\]", file.read_text())}
    assert named <= extras and {"hub", "inspect", "lm-eval"} <= named, named - extras


@pytest.mark.slow
def test_the_release_is_built_checked_and_tried(tmp_path):
    """Wheel and sdist; the wheel in an environment of its own, in a folder where no plan and no source lies."""
    pytest.importorskip("build")
    pytest.importorskip("twine")
    place = {**os.environ, "DIST": str(tmp_path / "dist"), "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "scripts/release", "--offline"], capture_output=True, text=True, env=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{nsteer.__version__} is ready" in done.stdout and "no problems" in done.stdout
    assert done.stdout.count("PASSED") == 2
