"""The README is true: its two commands are the real ones, and its Python runs as printed on the quickstart store."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which the README's first command has been run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "plans", folder / "plans")
    command = blocks("bash")[0].splitlines()[0].split("#")[0].split("&&")[1].split()
    assert command == ["nsteer", "run", "plans/quickstart.yaml"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'nsteer.open("store/quickstart.zarr")' in done.stdout
    return folder


def test_first_screen_holds_both_commands():
    first = README.splitlines()[:12]
    assert any('pip install ".[test]" && scripts/check' in line for line in first)
    assert any("pip install . && nsteer run plans/quickstart.yaml" in line for line in first)


@pytest.mark.parametrize("place", range(len(blocks("python"))))
def test_python_runs_as_printed(quickstart, place):
    code = blocks("python")[place]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=quickstart, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_second_run_does_nothing_and_loads_no_torch(quickstart):
    code = (
        "import sys; from nsteer.cli import main\n"
        "try: main(['run', 'plans/quickstart.yaml'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=quickstart, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 cells done" in done.stdout


def test_the_plan_in_the_readme_checks_but_for_its_hub_model(tmp_path):
    from nsteer import check, reader

    text = blocks("yaml")[0].replace(", {id: Qwen/Qwen2.5-1.5B-Instruct, dtype: bfloat16}", "")
    assert text != blocks("yaml")[0]
    assert check.study(reader.parse(text, "readme.yaml")).plan.name == "mine"


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
