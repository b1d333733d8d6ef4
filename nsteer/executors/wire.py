"""Turns a job's payload into its result over HTTP: one server, its words, and our own errors for its failures.

nnsight's RemoteBackend speaks the same protocol but holds no connection (47 ms a request), hides the status codes
that decide whether to try again, has no deadline, and may repeat the key in an error.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import nnsight

from nsteer.errors import (
    RemoteAccessError,
    RemoteCancelError,
    RemoteDeadlineError,
    RemoteError,
    RemoteLostError,
    RemoteModelError,
    RemoteProgramError,
    RemoteTimeoutError,
    RemoteVersionError,
    printable,
)
from nsteer.system import hosts

T = TypeVar("T")

TRANSIENT = (
    "Replica was evicted",
    "Error submitting request to model deployment",
    "Critical server error",
    "cancelled or preempted by the server",
    "Error provisioning",
    "try again later",
)
"""Words of a job's end that blame the server's state, not the job: the same job may be sent again."""


MAX_WORDS = 2**24
"""Bytes of an answer that is words: a job's status, a server's models, a traceback."""

JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
"""What the id of a job may be: it becomes part of an address and a label of the store."""


@dataclass(frozen=True)
class Status:
    """What the server last said of a job. `result`: where a completed job's result lies."""

    name: str
    description: str
    result: str | None = None

    @property
    def transient(self) -> bool:
        return self.name == "ERROR" and any(words in self.description for words in TRANSIENT)


class _Again(Exception):
    """A failure that may pass: connection lost, or the server says 429 or 5xx."""


class Wire:
    """One server, as its user names it. The key stays in here: it is in no repr and is struck from every text that
    leaves; it goes to that address alone, whatever redirections and results name.

    host : its address; NDIF_HOST, else nnsight's configuration, when left out
    key : as a rule not given: NDIF_API_KEY, else nnsight's configuration

    Raises RemoteAccessError for an address that holds credentials, and for one that the key would reach in clear.
    """

    def __init__(
        self,
        host: str | None = None,
        key: str | None = None,
        *,
        retries: int = 8,
        patience: float = 30.0,
        timeout: float = 60.0,
    ):
        self.host = hosts.own_host(host).rstrip("/")
        try:
            self._key = hosts.key_for(self.host, key)
        except ValueError as error:
            raise RemoteAccessError(f"NDIF server {hosts.shown(self.host)!r}: {error}") from None
        self.retries, self.patience = retries, patience
        self.cancelled = threading.Event()
        self.sent = self.received = 0  # bytes of payloads and of results
        headers = {"ndif-api-key": self._key} if self._key else {}
        limits = httpx.Timeout(timeout, connect=10.0)
        proxies = not hosts.loopback(self.host)  # a proxy would read what goes to this machine in clear
        self._client = httpx.Client(headers=headers, timeout=limits, follow_redirects=False, trust_env=proxies)
        # results lie elsewhere: the key is not sent there
        self._store = httpx.Client(timeout=limits, follow_redirects=False)

    def __repr__(self) -> str:
        return f"Wire({self.host!r})"

    def close(self) -> None:
        self._client.close()
        self._store.close()

    def submit(self, blob: bytes, envelope: dict[str, Any], until: float, note: Callable[[str], None]) -> str:
        """Sends a job and gives its id. Raises RemoteError."""

        def post() -> str:
            headers = {
                "ndif-timestamp": repr(time.time()),
                "nnsight-version": nnsight.__version__,
                "python-version": sys.version,
            }
            files = {"blob": ("request", blob, "application/octet-stream")}
            answer = self._ask("POST", "/request", data={"data": json.dumps(envelope)}, files=files, headers=headers)
            if answer.status_code != 200:
                raise self._refusal(answer)
            self.sent += len(blob)
            return self._said(answer)["id"]

        return self._again(post, until, note)

    def status(self, job: str, until: float, note: Callable[[str], None]) -> Status | None:
        """What the server says of a job; None where it does not know it (or not yet). Raises RemoteError."""

        def get() -> Status | None:
            answer = self._ask("GET", f"/response/{job}")
            if answer.status_code == 404:
                return None
            if answer.status_code != 200:
                raise self._refusal(answer)
            said = self._said(answer)
            result = said.get("data")
            words = str(said.get("description") or "")
            return Status(str(said["status"]), words, result if isinstance(result, str) else None)

        return self._again(get, until, note)

    def fetch(self, address: str, limit: int, until: float, note: Callable[[str], None]) -> bytes | None:
        """At most `limit` bytes at a result's address; None where the server keeps them no longer.

        The address is the server's word: the key is not sent there. Raises RemoteError.
        """
        if not address.startswith(("http://", "https://")):
            raise RemoteVersionError(f"{self.host}: a result lies at no http address: is it an NDIF server?")

        def get() -> bytes | None:
            try:
                answer, content = _read(self._store, limit, "GET", address)
            except httpx.TransportError as error:
                raise _Again(f"result not to be had: {type(error).__name__}") from None
            except (httpx.InvalidURL, ValueError) as error:
                raise RemoteVersionError(f"{self.host}: a result can not be read: {self.clean(str(error))}") from None
            if answer.status_code in (403, 404):
                return None
            if answer.status_code != 200:
                raise _Again(f"the result's store answers {answer.status_code}")
            self.received += len(content)
            return content

        return self._again(get, until, note)

    def json(self, path: str) -> Any:
        """One GET without retries, for looking around. Raises RemoteError."""
        try:
            answer = self._ask("GET", path)
        except _Again as error:
            raise RemoteLostError(f"{self.host}: {error}") from None
        if answer.status_code != 200:
            raise self._refusal(answer)
        try:
            return self._cleaned(answer.json())
        except (ValueError, RecursionError):
            raise RemoteVersionError(f"{self.host}{path} gives no JSON: is it an NDIF server?") from None

    def pause(self, seconds: float) -> None:
        """Waits, but not past a cancel. Raises RemoteCancelError."""
        if self.cancelled.wait(max(0.0, seconds)):
            raise RemoteCancelError("cancelled here while jobs were in flight: their ids are kept where a journal is")

    def clean(self, text: str) -> str:
        """A server's words without the key, since it repeats a malformed one, and without control characters."""
        return printable(text.replace(self._key, "<key>") if self._key else text)

    def _cleaned(self, said: Any) -> Any:
        """What a server says, every text in it clean."""
        if isinstance(said, dict):
            return {self.clean(name): self._cleaned(value) for name, value in said.items()}
        if isinstance(said, list):
            return [self._cleaned(value) for value in said]
        return self.clean(said) if isinstance(said, str) else said

    def _ask(self, method: str, path: str, **what: Any) -> httpx.Response:
        """The answer to one request, read whole; the key goes along."""
        try:
            answer, content = _read(self._client, MAX_WORDS, method, f"{self.host}{path}", **what)
        except httpx.TransportError as error:
            raise _Again(f"no connection ({type(error).__name__})") from None
        except ValueError as error:
            raise RemoteVersionError(f"{self.host}{path} can not be read: {error}: is it an NDIF server?") from None
        answer = httpx.Response(answer.status_code, content=content)
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _Again(f"it answers {answer.status_code}: {self._detail(answer)}")
        return answer

    def _again(self, call: Callable[[], T], until: float, note: Callable[[str], None]) -> T:
        """`call`, until it passes: waits double from half a second to `patience`. Raises RemoteLostError."""
        for attempt in range(self.retries + 1):
            try:
                return call()
            except _Again as error:
                last = error
                wait = min(0.5 * 2**attempt, self.patience)
                if attempt == self.retries:
                    break
                if time.monotonic() + wait > until:
                    raise RemoteDeadlineError(f"{self.host}: the deadline passed while it failed: {error}") from None
                note(f"{error}; again in {wait:.1f} s ({attempt + 1} of {self.retries})")
                self.pause(wait)
        raise RemoteLostError(
            f"{self.host}: {last}; tried {self.retries + 1} times. Is the server up, and has it an object store? "
            "`nsteer doctor --remote` looks. What was committed is kept: run the plan again to go on."
        )

    def _said(self, answer: httpx.Response) -> dict[str, Any]:
        """A server's response to a job, as it must be. Raises RemoteVersionError."""
        try:
            said = self._cleaned(answer.json())
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or not {"id", "status"} <= said.keys() or not JOB.fullmatch(str(said["id"])):
            raise RemoteVersionError(f"{self.host} gives no job's status: is it an NDIF server?")
        return said

    def _refusal(self, answer: httpx.Response) -> RemoteError:
        detail = self._detail(answer)
        if answer.status_code in (401, 403) or "API key" in detail:
            return RemoteAccessError(
                f"{self.host} refuses the API key ({answer.status_code}: {detail}). Set NDIF_API_KEY to a valid one."
            )
        if answer.status_code == 400 and "version" in detail:
            return RemoteVersionError(f"{self.host} refuses this client: {detail}")
        if answer.status_code in (404, 405, 422):
            return RemoteVersionError(
                f"{self.host} does not understand the request ({answer.status_code}: {detail}). "
                "Is it an NDIF server, of a version that goes with this nnsight?"
            )
        return RemoteError(f"{self.host} refuses the request ({answer.status_code}): {detail}")

    def _detail(self, answer: httpx.Response) -> str:
        try:
            said = answer.json()
            said = said.get("detail", said) if isinstance(said, dict) else said
        except (ValueError, RecursionError):
            said = answer.text
        return self.clean(str(said))[:500]


def _read(client: httpx.Client, limit: int, method: str, url: str, **what: Any) -> tuple[httpx.Response, bytes]:
    """An answer and its bytes. Raises ValueError for more than `limit`, and for packed ones: those may swell."""
    headers = {**what.pop("headers", {}), "accept-encoding": "identity"}
    with client.stream(method, url, headers=headers, **what) as answer:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("it is encoded, which nobody asked for")
        pieces, size = [], 0
        for piece in answer.iter_raw():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"it is longer than {limit:,} bytes")
    return answer, b"".join(pieces)


def failure(status: Status, host: str, model: str, program: str) -> RemoteError:
    """Our error for a job that ended in one."""
    words = status.description
    if "Could not deploy this model" in words:
        reason = words.partition("Could not deploy this model.")[2].strip()
        return RemoteModelError(f"{host} does not serve {model}: {reason[:600]}")
    if "exceeded the execution timeout" in words:
        return RemoteTimeoutError(
            f"{host}: {words.strip()} Make its programs smaller: fewer rows a batch, fewer new tokens."
        )
    if "doesn't match the one your code was traced against" in words or "payload could not be read" in words:
        return RemoteVersionError(f"{host}: {' '.join(words.split())[:700]}")
    if "cancelled by operator" in words:
        return RemoteError(f"{host}: the server's operator cancelled the job")
    lines = [line for line in words.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no reason given"
    return RemoteProgramError(f"program {program} failed on {host}: {last}", words)
