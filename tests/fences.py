"""Fenced blocks of the documents: finding them, running those of one session in order, comparing what they print.

A block's info string says what is done with it; GitHub and the site show only its first word, the language.

    bash, python        run in the session's folder; python blocks of a session share one interpreter
    yaml file=PATH      written there; other blocks use it
    diff                applied to a copy of the package, which the session's later blocks use
    yaml plan           compared with the JSON Schema of plans
    text                after a bash or python block, under the same heading: what it prints (see `agrees`)
    session=NAME        the blocks it belongs to; those of one page when left out
    after=quickstart    not run again where the `quickstart` fixture has run this very command
    fails=CODE          the exit code expected of a bash block
    skip="why"          not run, and why

Sybil and pytest-examples were looked at: they have no info strings, no sessions over languages, no commands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefork
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "sh", "python", "diff")
KNOWN = {"session", "after", "fails", "skip", "file", "plan"}
PRINTS = {"text", "json"}
MINUTES = 300  # seconds that one block may take


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, what its info string says, its text."""

    page: str
    line: int
    language: str
    says: dict[str, str]
    text: str
    section: int = 0  # headings before it

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def session(self) -> str:
        return self.says.get("session", self.page)


def parse(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    fences, section = [], 0
    for token in MarkdownIt().parse(text):
        section += token.type == "heading_open"
        if token.type == "fence":
            language, *rest = shlex.split(token.info) or [""]
            says = dict(part.split("=", 1) if "=" in part else (part, "") for part in rest)
            fences.append(Block(page, (token.map or [0])[0] + 1, language, says, token.content, section))
    return fences


def blocks() -> list[Block]:
    """The fenced blocks of every page."""
    return [
        block for page in PAGES for block in parse(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]


def problem(block: Block) -> str:
    """What is wrong with a block's info string; '' when nothing is."""
    if unknown := set(block.says) - KNOWN:
        return f"unknown words {sorted(unknown)}"
    if "skip" in block.says:
        return "" if len(block.says["skip"].split()) > 1 else "skip without a reason"
    if block.language == "yaml":
        return "" if {"file", "plan"} & set(block.says) else "yaml that is neither written (file=), a plan, nor skipped"
    return "" if block.language in (*RUN, *PRINTS) else f"language {block.language!r} can not be run: skip it, say why"


NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?%?")


def plain(text: str) -> str:
    """Text with numbers masked and every run of spaces and line ends made one space."""
    return " ".join(NUMBER.sub("#", text).split())


def agrees(expected: str, printed: str) -> bool:
    """Whether a page's output block is found in what was printed: words in their order, `...` for anything between.

    Digits are not compared: they differ between versions and machines, and other tests hold them.
    """
    pattern = ".*?".join(re.escape(part.strip()) for part in plain(expected).split("..."))
    return re.search(pattern, plain(printed)) is not None


INTERPRETER = """
import ast, contextlib, io, json, os, sys, traceback
answers = os.dup(1)
os.dup2(2, 1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    said, failed = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            tree = ast.parse(json.loads(line))
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "block", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "block", "eval"), names) if last else None
            if value is not None:
                print(repr(value))
        except BaseException:
            failed = traceback.format_exc()
    os.write(answers, (json.dumps([said.getvalue(), failed]) + "\\n").encode())
"""
"""Runs blocks in one namespace; the value of a block's last line is shown, as in a notebook."""

STRICT = """
import sys, warnings
sys.warnoptions[:] = ["error", "ignore::DeprecationWarning", "ignore::FutureWarning"]
warnings.resetwarnings()
warnings._processoptions(sys.warnoptions)
"""


class Session:
    """A folder in which blocks run one after another."""

    def __init__(self, folder: Path, ran: dict[str, str], executable: str = ""):
        """`ran`: commands that need not run again -> what they printed. `executable`: the Python of its environment;
        this one when left out. Its processes are forked from one that has all loaded."""
        self.folder, self.ran, self.executable = folder, ran, executable
        self.python: subprocess.Popen | None = None
        places = [str(Path(executable or sys.executable).parent), os.environ["PATH"]]
        own = folder / ".bin"
        own.mkdir(parents=True, exist_ok=True)
        prefork.script(own, executable)
        places.insert(0, str(own))
        self.environment = {**os.environ, "PATH": os.pathsep.join(places)}

    def do(self, block: Block) -> str:
        """Runs or writes a block; what it printed. Raises AssertionError with its place when it fails."""
        if "file" in block.says:
            path = self.folder / block.says["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "yaml":
            check_plan(block)
            return ""
        how = {"python": self._python, "diff": self._patch}
        return how.get(block.language, self._command)(block)

    def _patch(self, block: Block) -> str:
        package = self.folder / "nsteer"
        if not package.is_dir():
            # with its bytecode, which holds for files that are not changed
            shutil.copytree(ROOT / "nsteer", package, ignore=shutil.ignore_patterns("*.pyc.*"))
            self.environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), self.environment.get("PYTHONPATH", "")])
        command = ["patch", "--strip=1", "--batch", "--fuzz=0"]
        done = subprocess.run(command, cwd=self.folder, input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}: {done.stdout}{done.stderr}"
        return ""

    def _command(self, block: Block) -> str:
        if "after" in block.says and block.text.strip() in self.ran:
            return self.ran[block.text.strip()]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=MINUTES,
        )
        wanted = int(block.says.get("fails", 0))
        assert done.returncode == wanted, f"{block.place}: exit {done.returncode}, not {wanted}\n{done.stderr}"
        return done.stdout + (done.stderr if wanted else "")

    def _python(self, block: Block) -> str:
        if self.python is None:
            truly, how = [self.executable or sys.executable, "-c"], STRICT + INTERPRETER
            patched = "PYTHONPATH" in self.environment
            self.python = subprocess.Popen(
                [*truly, how] if patched else prefork.python(how, executable=self.executable),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        streams: Any = self.python
        streams.stdin.write(json.dumps(block.text) + "\n")
        streams.stdin.flush()
        answer = streams.stdout.readline()
        assert answer, f"{block.place}: the interpreter died"
        printed, failed = json.loads(answer)
        assert not failed, f"{block.place}:\n{failed}"
        return printed

    def close(self) -> None:
        if self.python is not None:
            self.python.communicate()


def check_plan(block: Block) -> None:
    """Holds a block against the schema of plans."""
    import jsonschema
    from ruamel.yaml import YAML

    from nsteer.cli.reference import json_schema

    data = YAML(typ="safe", pure=True).load(block.text)
    problems = [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(data)]
    assert not problems, f"{block.place}: {problems}"


def run(sequence: list[Block], session: Session) -> None:
    """Runs the blocks of a session in order; a `text` block after one, under its heading, is what it printed."""
    printed, place, section = None, "", 0
    for block in sequence:
        if block.section != section:
            printed, section = None, block.section
        if "skip" in block.says:
            printed = None
        elif block.language in PRINTS:
            if printed is not None:
                assert agrees(block.text, printed), f"{block.place}: {place} printed\n{printed}\nnot\n{block.text}"
            printed = None
        else:
            printed, place = session.do(block), block.place
