"""Turns what a plan, its user and nnsight's settings say of an NDIF server into one address, and where the key may go.

A plan is somebody else's word, so it never decides where the API key goes: the server is named by who runs the plan,
on the command line, in NDIF_HOST or in nnsight's configuration. Whatever sends the key asks `key_for`. Imports nothing
heavy: `check` asks too.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nsteer.errors import masked

DEFAULT = "https://api.ndif.us"
"""nnsight's own setting where nobody changed it."""

ADDRESS = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?", re.ASCII)
"""What an address may be: so simple that no two parsers read two hosts in it."""


def own_host(told: str | None = None) -> str:
    """The server that its user names: `told`, else NDIF_HOST, else nnsight's configuration."""
    return told or os.environ.get("NDIF_HOST") or str(_nnsight().get("HOST") or DEFAULT)


def own_key(told: str | None = None) -> str:
    """The API key: `told`, else NDIF_API_KEY, else nnsight's configuration; "" for none."""
    return told or os.environ.get("NDIF_API_KEY") or str(_nnsight().get("APIKEY") or "")


def flaw(address: str) -> str:
    """What is wrong with an address, in words that hold no credentials; "" for a right one."""
    if not address.startswith(("http://", "https://")):
        return "an address that does not start with http:// or https://"
    if "@" in address:
        return "an address with a user or a password"
    if "?" in address or "#" in address:
        return "an address with a query"
    if not ADDRESS.fullmatch(address) or not _port(address):
        return "an address that names no host"
    return ""


def shown(address: str) -> str:
    """An address as messages show it: without what may be a secret, whether or not it is right."""
    return re.split(r"[?#]", masked(address))[0]


def same_host(a: str, b: str) -> bool:
    """Whether two addresses without a flaw name one server."""
    return _components(a) == _components(b)


def loopback(address: str) -> bool:
    """Whether an address without a flaw is this machine's own."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_clear(address: str) -> bool:
    """Whether what is sent to an address without a flaw can be read on the way."""
    return urlsplit(address).scheme == "http" and not loopback(address)


def key_for(address: str, told: str | None = None) -> str:
    """The key that is sent to an address that the user named. Raises ValueError for one that it must not be sent to."""
    if wrong := flaw(address):
        raise ValueError(f"{wrong}; give an address alone, as https://host")
    key = own_key(told)
    if key and in_clear(address):
        raise ValueError(CLEAR)
    return key


CLEAR = "an http:// address of another machine: the API key would travel in clear; give its https:// address"


def _nnsight() -> dict[str, Any]:
    """What nnsight's configuration says of its API, without importing nnsight, which brings torch."""
    if (loaded := sys.modules.get("nnsight.schema.config")) and hasattr(loaded, "CONFIG"):
        return {"HOST": loaded.CONFIG.API.HOST, "APIKEY": loaded.CONFIG.API.APIKEY}
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    file = Path(os.environ.get("NNSIGHT_CONFIG") or f"{folder}/nnsight/config.yaml").expanduser()
    if not file.is_file():
        return {}
    from ruamel.yaml import YAML, YAMLError

    try:
        settings = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return {}  # nnsight itself says so when it is imported
    settings = settings.get("API") if isinstance(settings, dict) else None
    return settings if isinstance(settings, dict) else {}


def _port(address: str) -> bool:
    try:
        return urlsplit(address).port != 0
    except ValueError:
        return False


def _components(address: str) -> tuple[str, str, int, str]:
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    return url.scheme, (url.hostname or "").lower(), port, url.path.rstrip("/")


# ---- servers of judges ----------------------------------------------------------------------------------------

OPENAI = "https://api.openai.com/v1"
"""Where a judge's questions go when neither a plan nor OPENAI_BASE_URL says."""


def judge_own() -> str:
    """The server of judges that its user names."""
    return os.environ.get("OPENAI_BASE_URL") or OPENAI


def judge_refusal(named: str | None) -> str:
    """Why no question may go to the server that a plan names (its user's, for None), in words; "" where it may.

    A plan alone may name a server of this machine. Texts and the key go to any other only when its user names it too.
    """
    own, key = judge_own(), os.environ.get("OPENAI_API_KEY", "")
    if named is not None and (wrong := flaw(named)):
        return wrong
    if wrong := flaw(own):
        return f"in OPENAI_BASE_URL {wrong}"
    if named is not None and not loopback(named) and not same_host(named, own):
        return f"{named!r}, which the plan alone names"
    if key and in_clear(named or own):
        return f"{shown(named or own)!r}, where the API key would travel in clear"
    return ""


def judge_key(base: str) -> str:
    """The key for a judge's server; "" for none. Raises ValueError for one that nothing may be sent to."""
    if why := judge_refusal(base):
        raise ValueError(why)
    return os.environ.get("OPENAI_API_KEY", "")
