"""Turns the environment into servers that run: processes on loopback, each ended by its id.

`Light` is NDIF without Ray (see light.py), `Full` the whole of it, `Hub` a model hub. All are context managers; a
server's processes die with the one that started them, and its folder of logs stays where the caller put it.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import environment

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a GET of the address gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Processes:
    """Processes under one folder, started by name and ended by id."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = dict(settings or {})
        self.running: dict[str, subprocess.Popen] = {}

    def spawn(self, name: str, command: list[str], **extra: str) -> subprocess.Popen:
        # Tests of nsteer may be told to stay offline, or to go to a hub of their own: neither is the server's.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "NDIF_", "RAY_"))}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=inherited | self.settings | extra,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return self.running[name]

    def await_url(self, name: str, url: str, seconds: float) -> None:
        """Waits until the address answers. Raises RuntimeError with the log's end if it does not."""
        end = time.monotonic() + seconds
        while not answers(url):
            if self.running[name].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not serve {url}: {self.log(name)[-1500:]}")
            time.sleep(0.1)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def end(self, *names: str, how: int = signal.SIGTERM) -> None:
        """Ends the processes of these names (all, where none is given), with SIGKILL where they do not heed."""
        ending = [self.running.pop(name) for name in (names or tuple(self.running))]
        family = [pid for process in ending for pid in _family(process.pid)]
        for process in ending:
            process.send_signal(how)  # does nothing where it has ended already
        for process in ending:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(8)
        for pid in family:  # a sandbox's runners, Ray's workers: they outlive who started them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()


class Light(Processes):
    """NDIF without Ray. `url` is its address; `settings` go to its environment (see light.py)."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None, *, store: bool = True):
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        super().__init__(folder, quiet | dict(settings or {}))
        if "HF_ENDPOINT" in self.settings:
            self.settings["HF_HUB_OFFLINE"] = "0"
        self.home = environment.build()
        self.port, self.redis_port, self.store_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = store
        self.settings["NSTEER_NDIF_KNOBS"] = str(self.folder / "knobs.json")

    def start(self) -> Light:
        self.start_redis()
        self.start_store()
        self.start_api()
        return self

    def start_redis(self) -> None:
        binary, needs = environment.redis(self.home)
        where = ["--bind", "127.0.0.1", "--port", str(self.redis_port), "--dir", str(self.folder)]
        self.spawn("redis", [binary, *where, "--save", "", "--appendonly", "no"], **needs)

    def start_store(self) -> None:
        if self.store:
            moto = str(self.home / "venv" / "bin" / "moto_server")
            self.spawn("store", [moto, "-H", "127.0.0.1", "-p", str(self.store_port)])

    def start_api(self) -> None:
        ports = [str(port) for port in (self.port, self.redis_port, self.store_port)]
        self.spawn("api", [environment.python(self.home), str(HERE / "light.py"), *ports])
        self.await_url("api", f"{self.url}/connected", 90)

    def ran(self, model: str = "") -> int:
        """How many jobs the server has run to their end; of the models whose id has this in it."""
        return sum(line.startswith("ran ") and model in line for line in self.log("api").splitlines())

    @contextmanager
    def turned(self, **knobs: object) -> Iterator[None]:
        """While in it, jobs meet these knobs (see light.py)."""
        file = self.folder / "knobs.json"
        file.write_text(json.dumps(knobs))
        try:
            yield
        finally:
            file.unlink()

    def kill(self) -> None:
        """Everything at once, as a machine that loses power."""
        self.end(how=signal.SIGKILL)

    def __enter__(self) -> Light:
        return self.start()


class Full(Processes):
    """The whole NDIF: Ray with a pretended GPU, controller, queues, API, object store. Serves models by their path.

    Ray's unix sockets want a short path: its files lie in a folder of their own, and only logs in `folder`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None, *, sandbox: bool = False):
        self.home = environment.build()
        self.run = Path(tempfile.mkdtemp(prefix="ndif-"))
        ports = {name: free_port() for name in ("api", "redis", "store", "gcs", "client", "board", "agent")}
        self.ports, self.url = ports, f"http://127.0.0.1:{ports['api']}"
        self.bin = self.home / "venv" / "bin"
        token = self.run / "token"  # of this run alone: nobody else on the machine submits code to its Ray
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (self.run / "api.yaml").write_text("APP:\n  PYMOUNT: false\n")  # its object.save breaks uploads above 1 MiB
        actor = "SandboxActor" if sandbox else "Actor"
        super().__init__(
            folder,
            {
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "PYTHONPATH": str(HERE),
                "NSTEER_NDIF_MARK": str(self.run),
                "NDIF_HOME": str(self.run / "home"),
                "NDIF_API_PORT": str(ports["api"]),
                "NDIF_API_URL": self.url,
                "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
                "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
                "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
                "NDIF_DEFAULT_DTYPE": "float32",
                "NDIF_DEFAULT_PADDING_BIAS": "0",
                "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
                "NDIF_SANDBOX_POOL_SIZE": "1",
                "NDIF_DEFAULT_MODEL_ACTOR_CLASS": f"cpu_actors.{actor}",
                "HF_HOME": str(self.run / "hf"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "AWS_EC2_METADATA_DISABLED": "true",
                "GRPC_ENABLE_FORK_SUPPORT": "0",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the one switch that leaves the node at 127.0.0.1
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                **(settings or {}),
            },
        )

    def __enter__(self) -> Full:
        ports, here = self.ports, "127.0.0.1"
        binary, needs = environment.redis(self.home)
        nothing_kept = ["--save", "", "--appendonly", "no", "--dir", str(self.run)]
        self.spawn("redis", [binary, "--bind", here, "--port", str(ports["redis"]), *nothing_kept], **needs)
        self.spawn("store", [str(self.bin / "moto_server"), "-H", here, "-p", str(ports["store"])])
        first = 20_000 + secrets.randbelow(10_000)
        resources = {"head": 10, "cuda_memory_bytes": 8_000_000_000, "cpu_memory_bytes": 8_000_000_000}
        ray = {
            "node-ip-address": here,
            "port": ports["gcs"],
            "ray-client-server-port": ports["client"],
            "min-worker-port": first,
            "max-worker-port": first + 300,
            "include-dashboard": "true",
            "dashboard-host": here,
            "dashboard-port": ports["board"],
            "dashboard-agent-listen-port": ports["agent"],
            "num-cpus": 16,
            "num-gpus": 1,
            "resources": json.dumps(resources),
            "object-store-memory": 200_000_000,
            "temp-dir": self.run / "ray",
        }
        words = [f"--{name}={value}" for name, value in ray.items()]
        command = [str(self.bin / "ray"), "start", "--head", "--block", "--disable-usage-stats", *words]
        self.spawn("ray", command, NDIF_SERVICE="ray")
        self.launch_controller()
        self.start_api()
        return self

    def start_api(self) -> None:
        where = ["--bind", f"127.0.0.1:{self.ports['api']}", "--no-control-socket", "ndif.services.api.app:app"]
        command = [str(self.bin / "gunicorn"), "--config", "python:ndif.services.api.gunicorn_conf", *where]
        self.spawn("api", command, NDIF_SERVICE="api", NNSIGHT_CONFIG=str(self.run / "api.yaml"))
        self.await_url("api", f"{self.url}/connected", 180)

    def launch_controller(self) -> None:
        """Puts NDIF's controller on Ray, once Ray takes it. Raises RuntimeError with the logs' ends."""
        command = [environment.python(self.home), "-m", "ndif.services.ray.deployments.controller.controller"]
        end = time.monotonic() + 180
        while time.monotonic() < end:
            self.spawn("controller", command, RAY_ADDRESS=f"127.0.0.1:{self.ports['gcs']}")
            if self.running["controller"].wait() == 0:
                return
            time.sleep(2)
        raise RuntimeError(f"no controller: {self.log('controller')[-1500:]} {self.log('ray')[-1500:]}")

    def __exit__(self, *error):
        self.end()
        for pid in _marked(f"NSTEER_NDIF_MARK={self.run}"):  # some of Ray's processes leave their family
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run, ignore_errors=True)


TRUSTED, PLAIN = "00000000-0000-4000-8000-00000000aaaa", "00000000-0000-4000-8000-00000000bbbb"
"""Keys that Keys knows: the first may run in the model's own process, the second in the sandbox only."""

TABLES = f"""
CREATE TABLE users (user_id uuid PRIMARY KEY, email text, verification_status text);
CREATE TABLE user_tags (user_tag_id int PRIMARY KEY, name text UNIQUE);
CREATE TABLE keys (key_id uuid PRIMARY KEY, user_id uuid);
CREATE TABLE key_user_tag_assignments (key_id uuid, user_tag_id int);
INSERT INTO users VALUES ('00000000-0000-4000-8000-000000000001', 'dev@example.org', 'verified');
INSERT INTO user_tags VALUES (1, 'trusted'), (2, 'priority');
INSERT INTO keys SELECT k::uuid, '00000000-0000-4000-8000-000000000001' FROM unnest(ARRAY['{TRUSTED}', '{PLAIN}']) k;
INSERT INTO key_user_tag_assignments VALUES ('{TRUSTED}', 1);
"""


class Keys(Processes):
    """The table of API keys that NDIF asks: a Postgres. Raises environment.Unbuilt where there is none."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not binaries:
            raise environment.Unbuilt("no Postgres (Debian: postgresql): the tests of API keys need one")
        self.bin = binaries[-1].parent
        # Postgres does not run as root, and another user can not enter the folders that pytest makes.
        self.data = Path(tempfile.mkdtemp(prefix="nsteer-keys-"))
        self.port = free_port()
        self.url = f"postgresql://ndif@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Keys:
        drop = []
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.data, nobody.pw_uid, nobody.pw_gid)
            drop = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        where = [*drop, str(self.bin / "initdb"), "-D", str(self.data / "db"), "-U", "ndif", "-A", "trust", "--no-sync"]
        subprocess.run(where, check=True, capture_output=True, cwd=self.data)
        listen = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.data), "-c", "fsync=off"]
        self.spawn("postgres", [*drop, str(self.bin / "postgres"), "-D", str(self.data / "db"), *listen])
        for _ in range(100):
            ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
            if subprocess.run(ready).returncode == 0:
                break
            time.sleep(0.2)
        tell = [str(self.bin / "psql"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "ndif", "-d", "postgres"]
        subprocess.run(tell, input=TABLES, text=True, check=True, capture_output=True)
        return self

    def __exit__(self, *error):
        self.end(how=signal.SIGINT)
        shutil.rmtree(self.data, ignore_errors=True)


class Line:
    """A line to a server that can be cut: a TCP proxy on loopback."""

    def __init__(self, port: int):
        self.to, self.up = port, True
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.open: set[socket.socket] = set()
        self.carried = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection and lets no new one live."""
        self.up = False
        for connection in list(self.open):
            _close(connection)

    def mend(self) -> None:
        self.up = True

    def close(self) -> None:
        self.cut()
        _close(self.socket)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.socket.accept()
            except OSError:
                return
            if not self.up:
                _close(near)
                continue
            far = socket.create_connection(("127.0.0.1", self.to))
            self.open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
                self.carried += len(data)
        except OSError:
            pass
        for connection in (source, sink):
            _close(connection)
            self.open.discard(connection)


class Hub(Processes):
    """A model hub of folders: `repos` maps `org/name` or `org/name@branch` to a folder."""

    def __init__(self, folder: Path, repos: Mapping[str, Path]):
        super().__init__(folder)
        self.repos = repos
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Hub:
        words = [f"{name}={path}" for name, path in self.repos.items()]
        port = self.url.rpartition(":")[2]
        self.spawn("hub", [sys.executable, str(HERE / "hub.py"), port, *words])
        name = next(iter(self.repos)).partition("@")[0]
        self.await_url("hub", f"{self.url}/api/models/{name}", 20)
        return self


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    processes, todo = [], [pid]
    while todo:
        processes.append(todo.pop())
        todo += children.get(processes[-1], [])
    return processes


def _marked(mark: str) -> list[int]:
    """The processes that carry these words in their environment."""
    processes = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in file.read_bytes().split(b"\0"):
                processes.append(int(file.parent.name))
    return processes


def _close(connection: socket.socket) -> None:
    with suppress(OSError):  # it was closed from the other side
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: no server outlives a test run that is killed. "Parent" is the thread that started it: start
    # servers from the main one.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="nsteer-ndif-") as logs, Light(Path(logs)) as server:
        print(f"serving at {server.url}, logs in {logs}; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.running["api"].wait()
