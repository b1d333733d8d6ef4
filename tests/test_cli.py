"""The command line: light, with exit codes that mean something and help that shows an example."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from planside import PLAN, ROOT, STEER

import nsteer
from nsteer import cli
from nsteer.errors import EditError, StoreError

COMMANDS = sorted(cli.main.commands)


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN + STEER)
    return "plan.yaml"


def run(*arguments: str):
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


# ---- light ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["import nsteer", "import nsteer.cli; nsteer.cli.main(['--help'])"], ids=["import", "help"]
)
def test_help_and_import_are_light(code):
    """Process CPU time, so that a busy machine is no failure: median of five, or the least where it is very busy."""
    code = f"import atexit, time; atexit.register(lambda: print('CPU', time.process_time()))\n{code}"
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.split("CPU")[-1]))
    assert statistics.median(seconds) < 0.3 or min(seconds) < 0.2, seconds


@pytest.mark.parametrize("command", [[sys.executable, "-m", "nsteer"], [str(Path(sys.executable).parent / "nsteer")]])
def test_the_two_ways_to_call_it(command):
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"nsteer, version {nsteer.__version__}\n"


# ---- help -------------------------------------------------------------------------------------------------------


def test_help_lists_every_command():
    invocation = run("--help")
    assert invocation.exit_code == 0 and all(f"\n  {name} " in invocation.output for name in COMMANDS)
    assert run("-h").output == invocation.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_shows_an_example_that_parses(name):
    command = cli.main.commands[name]
    text = command.help or ""
    assert text.split("\n")[0].endswith("."), "it opens with a sentence"
    example = text.split("Example:\n")[-1].strip().splitlines()
    assert len(example) == 1 and example[0].strip().startswith(f"nsteer {name}"), "it ends with an example"
    words = shlex.split(re.split(r"[>|]", example[0])[0])[2:]
    with click.Context(command) as context:
        command.parse_args(context, words)
    for word in words:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name


@pytest.mark.parametrize("name", ["check", "derive", "run", "show"])
def test_the_overrides_of_examples_fit_their_plans(name):
    from nsteer.plan import check

    example = (cli.main.commands[name].help or "").split("Example:\n")[-1].strip()
    words = shlex.split(example)[2:]
    settings = [value for key, value in pairwise(words) if key == "--set"]
    check.load(ROOT / next(word for word in words if word.endswith(".yaml")), settings)


# ---- exit codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "derive", "check", "show"])
def test_a_bad_plan_is_code_2_and_nothing_is_written(plan, command, tmp_path):
    invocation = run(command, plan, "--set", "layers=99", "--set", "steer.op=ad")
    assert invocation.exit_code == 2
    assert invocation.stderr.splitlines()[-1] == "2 problems; no model was loaded"
    assert "--set layers=99: layers: expected layers that zoo/llama has" in invocation.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"] and not invocation.stdout
    assert run(command, plan, "--set", "layers=99").stderr.endswith("\n1 problem; no model was loaded\n")


def test_a_plan_that_is_not_there_is_code_2():
    invocation = run("check", "none.yaml")
    assert invocation.exit_code == 2 and "none.yaml: expected a readable file" in invocation.stderr


def test_a_bad_call_is_code_2():
    assert run("chek").exit_code == 2 and run("check").exit_code == 2


def test_a_store_that_is_not_there_is_code_1(tmp_path):
    invocation = run("ls", "none.zarr")
    assert invocation.exit_code == 1 and invocation.stderr.startswith("error: ") and "none.zarr" in invocation.stderr
    assert "Traceback" not in invocation.output


@pytest.mark.parametrize("error", [StoreError("the store is full"), EditError("it touched nothing")])
def test_a_failed_run_is_code_1_and_a_message(plan, monkeypatch, error):
    def fails(*arguments, **named):
        raise error

    monkeypatch.setattr("nsteer.runner.run", fails)
    invocation = run("run", plan, "--quiet")
    assert invocation.exit_code == 1 and invocation.stderr == f"error: {error}\n" and not invocation.stdout


@pytest.mark.parametrize("command", ["run", "derive"])
def test_cells_that_failed_are_code_1(plan, monkeypatch, command):
    from nsteer.runner import Summary
    from nsteer.runner.failing import Failure

    summary = Summary("study.zarr", {}, {"samples": 2}, [Failure("steering", ("m", "add"), "it touched nothing")])
    monkeypatch.setattr("nsteer.runner.run", lambda *arguments, **named: summary)
    invocation = run(command, plan, "--quiet")
    assert invocation.exit_code == 1 and "failed: steering m / add: it touched nothing" in invocation.stdout
    assert 'results = nsteer.open("study.zarr")' in invocation.stdout


def test_a_run_says_what_it_did_as_json(plan, monkeypatch):
    from nsteer.runner import Summary

    asked = {}

    def done(study, **named):
        asked.update(named, store=study.plan.store)
        return Summary(study.plan.store, {"samples": 4}, {"vectors": 1}, tokens=10)

    monkeypatch.setattr("nsteer.runner.run", done)
    invocation = run("run", plan, "--json", "--verify-rows", "3", "--set", "store=other.zarr")
    assert invocation.exit_code == 0
    said = json.loads(invocation.stdout)
    assert (said["store"], said["done"], said["skipped"], said["failures"]) == (
        "other.zarr",
        {"samples": 4},
        {"vectors": 1},
        [],
    )
    assert asked["verify_rows"] == 3 and asked["store"] == "other.zarr"


def test_an_interrupted_run_says_that_nothing_is_lost(plan, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("nsteer.runner.run", interrupted)
    invocation = run("run", plan, "--quiet")
    assert invocation.exit_code == 130
    assert invocation.stderr == "interrupted; what was committed is kept: the same command goes on from there\n"


# ---- what is printed --------------------------------------------------------------------------------------------


def test_check_tells_the_size(plan):
    invocation = run("check", plan)
    assert invocation.exit_code == 0 and invocation.stdout.endswith("plan.yaml: no problems\n")
    size = json.loads(run("check", plan, "--json").stdout)
    stages = {stage["stage"]: stage for stage in size["stages"]}
    # 2 methods x (3 emotions + neutral) cells; made: 3 samples, read: 2
    assert stages["samples"]["cells"] == stages["activations"]["cells"] == 8
    assert stages["samples"]["rows"] == 4 * 3, "no model reads a text that is given, here"
    assert stages["activations"]["rows"] == 4 * 3 + 4 * 2
    assert stages["vectors"]["cells"] == 6
    assert stages["steering"]["cells"] == 2 * 3 * 1 * 2  # methods, emotions, strengths, controls
    assert all(stage["done"] == 0 for stage in size["stages"]) and size["memory"]["zoo/llama"] > 0
    assert size["max_tokens_in_flight"]["zoo/llama"] == 8192


def test_show_tells_the_resolved_plan(plan):
    from ruamel.yaml import YAML

    shown = json.loads(run("show", plan, "--json", "--set", "layers=[-1, 0.5]", "--set", "steer.layers=-1").stdout)
    assert shown["models"][0]["layers"] == [2, 4] and shown["models"][0]["n_layers"] == 5
    assert shown["plan"]["methods"]["made"]["generate"]["max_new_tokens"] == 256, "defaults are spelled out"
    text = run("show", plan).stdout
    assert YAML(typ="safe").load(text)["plan"]["steer"][0]["strengths"] == [0.1]


def test_schema_is_json():
    from nsteer.cli.reference import DOCUMENTS

    invocation = run("schema")
    assert json.loads(invocation.stdout)["title"] == "nsteer plan"
    assert invocation.stdout == DOCUMENTS["nsteer.schema.json"]()


# ---- what a shell does to it ------------------------------------------------------------------------------------


def unquoted(line: str) -> bool:
    """Whether a shell may take a word of a command for a pattern: where nothing matches, zsh refuses the command."""
    return re.search(r"[\[\]{}*?]", re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)) is not None


def test_every_command_that_is_shown_can_be_typed_into_any_shell():
    assert unquoted("nsteer run p.yaml --set a=[1]") and not unquoted("nsteer run p.yaml --set 'a=[1]' --set b=1")
    shown = [
        line
        for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "nsteer").rglob("*.py")]
        for line in re.findall(r"^\s*(?:\$ )?(nsteer [a-z]+ .*?)\\?$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if "[OPTIONS]" not in line
    ]
    assert len(shown) > 60 and [line for line in shown if unquoted(line)] == []
    said = [(ROOT / "README.md").read_text(), *(f.read_text() for f in (ROOT / "nsteer").rglob("*.py"))]
    said += [file.read_text() for file in (ROOT / "docs").rglob("*.md")]
    words = [word for text in said for word in re.findall(r"--set (?!PATH)([a-z'\"][^\s`)]*)", text)]
    assert len(words) > 15 and [word for word in words if unquoted(word) and word[-1] != ":"] == []


# ---- without a network ------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_is_one_line_at_once(tmp_path):
    """A hub that refuses connections; its client would try six times, for 26 seconds."""
    (tmp_path / "p.yaml").write_text(PLAN.replace("zoo/llama", "nobody/of-that-name"))
    place = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    code = "import sys, time\nfrom nsteer.models import facts as models\n"
    code += "from nsteer.plan.schema import Model\nbegan = time.monotonic()\n"
    code += "try: models.facts(Model(id='nobody/of-that-name'))\nexcept Exception as error: print(error)\n"
    code += "print(time.monotonic() - began < 5)"
    told = "'nobody/of-that-name', not in the local cache, and the hub can not be reached"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=place)
    assert done.stdout.splitlines() == [told, "True"] and done.stderr == ""
    checked = [sys.executable, "-m", "nsteer", "check", "p.yaml"]
    done = subprocess.run(checked, capture_output=True, text=True, env=place, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and told in done.stderr
