"""The README is true: its two commands are the real ones, and its Python runs as printed on the quickstart store."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_first_command_is_what_the_quickstart_fixture_ran(quickstart):
    command = blocks("bash")[0].splitlines()[0].split("#")[0].split("&&")[1].split()
    assert command == ["nsteer", "run", "plans/quickstart.yaml"]
    assert 'nsteer.open("store/quickstart.zarr")' in quickstart[1]


def test_first_screen_holds_both_commands():
    first = README.splitlines()[:12]
    assert any('pip install ".[test]" && scripts/check' in line for line in first)
    assert any("pip install . && nsteer run plans/quickstart.yaml" in line for line in first)


@pytest.mark.parametrize("place", range(len(blocks("python"))))
def test_python_runs_as_printed(quickstart, place):
    folder, _, _ = quickstart
    code = blocks("python")[place]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_second_run_does_nothing_and_loads_no_torch(quickstart):
    folder, _, _ = quickstart
    code = (
        "import sys; from nsteer.cli import main\n"
        "try: main(['run', 'plans/quickstart.yaml'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
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
