"""A process that has every library loaded and forks one for each command: importing them takes 5 s of CPU each time.

    subprocess.run(prefork.nsteer("run", "plan.yaml"))          as the installed command, in a process of its own
    subprocess.run(prefork.python("print(1)", "argument"))      as `python -c`

What is returned are words of a small client, which hands its streams, folder and environment to the forked process,
ends with its exit code, and passes signals on. It is for commands whose point is what they do. Whose point is what they
import, how they are installed, what the environment of their start does, or when they are killed: start them truly.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

CLIENT = """
import array, json, os, signal, socket, sys
path, code, *words = sys.argv[1:]
link = socket.socket(socket.AF_UNIX)
link.connect(path)
asked = json.dumps([code, words, os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
link.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
link.sendall(asked)
pid = int.from_bytes(link.recv(8, socket.MSG_WAITALL), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int.from_bytes(link.recv(8, socket.MSG_WAITALL), "big", signed=True)
if code < 0 and -code != signal.SIGKILL:
    signal.signal(-code, signal.SIG_DFL)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
LOADED = """
torch transformers nnsight xarray zarr pandas numpy scipy.stats rich.console rich.progress jinja2 matplotlib.figure
ruamel.yaml httpx nsteer.cli nsteer.runner nsteer.runner.stages nsteer.executors.local nsteer.executors.classifier
nsteer.report nsteer.zoo
""".split()
SHARED = "NSTEER_TESTS_PREFORK"
"""The variable by which workers find the process that the one which started them has started."""

COMMAND = "import sys; from nsteer.cli import main; main(sys.argv[1:])"


def nsteer(*words: object, executable: str = "") -> list[str]:
    """The command line of the installed command."""
    return python(COMMAND, *words, executable=executable)


def python(code: str, *words: object, executable: str = "") -> list[str]:
    """The command line of `python -c code words`, of this interpreter or that of another environment."""
    address = _other(executable) if executable else _address()
    return [sys.executable, "-I", "-S", "-c", CLIENT, address, code, *map(str, words)]


def file(path: Path, *words: object) -> list[str]:
    """The command line of `python path words`; the file may import those beside it."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(path.parent)!r}); runpy.run_path({str(path)!r}, None, '__main__')"
    )
    return python(code, *words)


def script(folder: Path, executable: str = "") -> None:
    """Writes a script named `nsteer` into a folder, for the PATH of a shell.

    Where modules are to come from elsewhere, it is the true command.
    """
    file, truly = folder / "nsteer", shlex.join([executable or sys.executable, "-m", "nsteer"])
    ours = shlex.join(nsteer(executable=executable))
    file.write_text(f'#!/bin/sh\n[ -n "$PYTHONPATH" ] && exec {truly} "$@"\nexec {ours} "$@"\n')
    file.chmod(0o755)


def share() -> None:
    """Starts the process that forks, for this process and for those that it starts: all workers have one."""
    os.environ[SHARED] = _started()


@cache
def _address() -> str:
    """Where the process listens that forks. Unless it is shared it is started at the first use."""
    return _there(os.environ.get(SHARED) or _started())


@cache
def _other(executable: str) -> str:
    """Where a process of another environment listens, which has its modules loaded, and one model's."""
    return _there(_started(executable, "bare"))


def _there(address: str) -> str:
    """The address, once somebody listens."""
    waited = 0.0
    while not os.path.exists(address):
        time.sleep(0.05)
        waited += 0.05
        assert waited < 300, "the process that forks did not come about; what it says is above"
    return address


def _started(executable: str = sys.executable, *how: str) -> str:
    """Starts the process that forks, which ends with this one; the address at which it will listen."""
    folder = tempfile.mkdtemp(prefix="prefork-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    process = subprocess.Popen([executable, __file__, f"{folder}/socket", *how], stdin=subprocess.DEVNULL)
    atexit.register(process.wait)
    atexit.register(process.kill)
    return f"{folder}/socket"


def serve(address: str, bare: bool = False) -> None:
    """Loads all, then forks a process for each client, for ever. `bare`: of the models one alone."""
    import gc
    import importlib

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with who started it
    for name in LOADED:
        importlib.import_module(name)
    families = sys.modules["nsteer.zoo"].FAMILIES
    for family in list(families)[: 1 if bare else None]:  # what transformers loads with the first model of a kind
        sys.modules["nsteer.executors.local"].Local(str(sys.modules["nsteer.zoo"].path(family)), device="cpu")
    sys.modules["nsteer.executors.classifier"].Classifier(str(sys.modules["nsteer.zoo"].path("judge")), device="cpu")
    threads = {Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")}
    assert len(threads - {"jemalloc_bg_thd\n"}) == 1, f"a fork would lose one of {threads}"  # that one comes again
    gc.collect()
    gc.freeze()
    sys.path.pop(0)  # this folder
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(f"{address}.new")
        here.listen(64)
        os.rename(f"{address}.new", address)  # who finds it is served
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
        while True:
            link, _ = here.accept()
            if os.fork() == 0:
                here.close()
                watch(link)
            link.close()


def watch(link: socket.socket) -> None:
    """Forks the process of a client, tells its end, and ends it where the client ends first."""
    import select

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(link, 8, 3, socket.MSG_WAITALL)
    asked = json.loads(link.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        link.close()
        become(streams, *asked)
    for stream in streams:
        os.close(stream)
    link.sendall(pid.to_bytes(8, "big"))
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, link], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # the client is gone
        link.sendall(code.to_bytes(8, "big", signed=True))
    os._exit(0)


def become(streams: list[int], code: str, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """This process as a fresh interpreter of the client would be. Ends."""
    import traceback

    status = 1
    try:
        for at, stream in enumerate(streams):
            os.dup2(stream, at)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(at, mode, encoding="utf-8", errors=errors, buffering=1, closefd=False)
            for at, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
        )
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["-c", *words]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def leave(status: int) -> None:
    """As an interpreter ends: exit functions, threads that are no daemons, streams."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1], bool(sys.argv[2:]))
