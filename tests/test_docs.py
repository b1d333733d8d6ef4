"""The documents are true: every command and snippet runs and prints what the page says, every link leads somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fences import MINUTES, PAGES, ROOT, Block, Session, agrees, blocks, parse, problem, run

BLOCKS = blocks()
SESSIONS: dict[str, list[Block]] = {}
for block in BLOCKS:
    SESSIONS.setdefault(block.session, []).append(block)
TUTORIAL = "docs/tutorial.md"
SLOW = {"docs/howto/ray.md", "docs/failures.md", "docs/howto/extend.md", "docs/howto/many-models.md"}
"""Sessions of more than half a minute."""


def marked(name: str):
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.timeout(3 * MINUTES)
@pytest.mark.parametrize("name", [marked(name) for name in SESSIONS if name != TUTORIAL])
def test_blocks_run_and_print_what_the_page_says(name, quickstart, tmp_path):
    folder, said, _ = quickstart
    shutil.copytree(folder, tmp_path / "here")
    shutil.copytree(ROOT / "docs/examples", tmp_path / "here/docs/examples")
    session = Session(tmp_path / "here", {"nsteer run plans/quickstart.yaml": said})
    try:
        run(SESSIONS[name], session)
    finally:
        session.close()


@pytest.mark.slow
@pytest.mark.timeout(3 * MINUTES)
def test_the_tutorial_word_by_word_in_a_fresh_environment(quickstart, tmp_path):
    """Its own environment, into which nsteer is installed from a wheel: a file that is not packaged is missed here.

    The plan that ships has been run by the installed command; test_packaging runs its text set from a wheel."""
    here = tmp_path / "here"
    shutil.copytree(quickstart[0] / "store", here / "store")
    for folder in ("plans", "docs/examples"):
        shutil.copytree(ROOT / folder, here / folder)
    python = installed(tmp_path)
    command = [str(Path(python).parent / "nsteer"), "--version"]  # itself; the page's are forked from one process
    assert "nsteer" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    session = Session(here, {"nsteer run plans/quickstart.yaml": quickstart[1]}, python)
    try:
        run(SESSIONS[TUTORIAL], session)
    finally:
        session.close()
    assert (here / "store/mine.zarr").is_dir()


def installed(folder: Path) -> str:
    """The Python of a fresh environment that holds nsteer alone; what it requires is seen where it lies already."""
    source = folder / "source"
    for name in ("nsteer", "setup.cfg", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", *offline, "-w", folder / "wheel", source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    (wheel,) = (folder / "wheel").glob("nsteer-*.whl")
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, ours = (
        Path(subprocess.run([interpreter, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
        for interpreter in (python, sys.executable)
    )
    (own / "requirements.pth").write_text(f"{ours}\n")
    where = subprocess.run([python, "-c", "import nsteer; print(nsteer.__file__)"], check=True, capture_output=True)
    assert Path(where.stdout.decode().strip()).is_relative_to(own)
    return str(python)


def test_every_block_says_what_is_done_with_it():
    assert [f"{block.place}: {why}" for block in BLOCKS if (why := problem(block))] == []


def test_what_is_not_run_says_why(capsys):
    skipped = [f"{block.place}: {block.says['skip']}" for block in BLOCKS if "skip" in block.says]
    with capsys.disabled():
        print("", *(f"not run: {line}" for line in skipped), sep="\n")
    ran = [block for block in BLOCKS if "skip" not in block.says and block.language not in ("text", "json")]
    assert len(skipped) < len(ran)


def test_the_slow_ones_are_there():
    assert set(SESSIONS) >= SLOW


# ---- the readme ----------------------------------------------------------------------------------------------------


README = PAGES[0].read_text(encoding="utf-8")


def test_the_first_command_is_what_the_quickstart_fixture_ran(quickstart):
    first = next(block for block in BLOCKS if block.page == "README.md")
    command = first.text.splitlines()[0].split("#")[0].split("&&")[1].split()
    assert command == ["nsteer", "run", "plans/quickstart.yaml"]
    assert 'nsteer.open("store/quickstart.zarr")' in quickstart[1]


def test_first_screen_holds_both_commands_and_the_report():
    first = README.splitlines()[:12]
    assert any('pip install ".[test]" && scripts/check' in line for line in first)
    assert any("pip install . && nsteer run plans/quickstart.yaml" in line for line in first)
    assert any("nsteer report store/quickstart.zarr -o report.html" in line for line in first)


def test_second_run_does_nothing_and_loads_no_torch(quickstart):
    code = (
        "import sys; from nsteer.cli import main\n"
        "try: main(['run', 'plans/quickstart.yaml'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=quickstart[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 cells done" in done.stdout


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Files only; the site's own build holds the anchors."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text)]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


# ---- the runner itself can fail ------------------------------------------------------------------------------------


def blocks_of(text: str) -> list[Block]:
    return parse(text, "page.md")


def test_blocks_are_read_with_what_they_say():
    snippets = blocks_of('a\n\n```bash fails=2 skip="needs a GPU"\nx\n```\n\n- b\n\n  ```text\n  y\n  ```\n')
    assert [(snippet.place, snippet.language, snippet.says, snippet.text) for snippet in snippets] == [
        ("page.md:3", "bash", {"fails": "2", "skip": "needs a GPU"}, "x\n"),
        ("page.md:9", "text", {}, "y\n"),
    ]


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ("bash skip=no", "skip without a reason"),
        ("yaml", "neither written"),
        ("rust", "can not be run"),
        ("", "can not be run"),
        ("bash sesion=x", "unknown words"),
    ],
)
def test_a_block_that_would_not_be_held_is_seen(info, why):
    assert why in problem(blocks_of(f"```{info}\nx\n```\n")[0])


def test_output_agrees_by_words_in_order_not_by_digits():
    printed = "stage    done\nsamples    42\nvectors 40\n\n15%  57% 1.5e-3 end"
    assert agrees("stage done\nsamples 7\nvectors 1", printed)
    assert agrees("samples 1\n...\n10% ... end", printed)
    assert not agrees("samples 1\nend", printed)
    assert not agrees("vectors 1 ... samples 1", printed)
    assert not agrees("samples many", printed)


PAGE = """
```yaml file=a/b.yaml
x: 1
```

```python
from pathlib import Path
text = Path("a/b.yaml").read_text()
```

```python
text
```

```text
'x: 1\\n'
```

```bash fails=3
echo told >&2; exit 3
```

```text
told
```
"""


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("", "", None),
        ("fails=3", "", "exit 3, not 0"),
        ("told\n```", "hold\n```", "page.md"),
        ("'x: 1", "'y: 1", "page.md:15"),
        ("text\n```", "txet\n```", "NameError"),
    ],
)
def test_a_session_runs_in_order_and_what_is_wrong_is_seen(tmp_path, old, new, why):
    session = Session(tmp_path, {})
    try:
        if why is None:
            run(blocks_of(PAGE), session)
        else:
            with pytest.raises(AssertionError, match=why):
                run(blocks_of(PAGE.replace(old, new)), session)
    finally:
        session.close()


def test_a_plan_on_a_page_is_held_to_the_schema(tmp_path):
    good = blocks_of("```yaml plan\nname: a\nsteer: {strengths: [1], prompts: [a]}\n```\n")
    run(good, Session(tmp_path, {}))
    with pytest.raises(AssertionError, match=r"page\.md:1"):
        run(blocks_of(good[0].text.join(["```yaml plan\n", "```\n"]).replace("[1]", "[high]")), Session(tmp_path, {}))
