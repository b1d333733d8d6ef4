"""Turns requests into replies of an OpenAI-compatible server: our own deadline, tries again, the key where it may go.

One request is one POST to `/chat/completions`. What may pass (a lost connection, 429, 5xx, an answer that is no answer)
is tried again, later and later, or when the server says; what will not is raised at once.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from nsteer.errors import ExecutionError, ModelError, printable
from nsteer.system import hosts

AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may pass."""

REFUSED = {401: "refuses the API key (OPENAI_API_KEY)", 403: "refuses access", 404: "has no such model or address"}

FIRST_WAIT = 0.5
"""Seconds before the first try again; each further one waits twice as long."""

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most, whatever a server asks for."""

MAX_BYTES = 4 * 2**20
"""Bytes of a reply, at most."""


class LostError(ModelError):
    """A server that did not answer as often as we were ready to ask."""


class Chats:
    """One server. `close` ends what is under way.

    base : its address, up to `/chat/completions`
    deadline : seconds for one request, from the first byte sent to the last one read
    retries : tries again of what may pass
    """

    def __init__(self, base: str, *, deadline: float, retries: int, workers: int):
        self.base, self.deadline, self.retries = base.rstrip("/"), deadline, retries
        self._key = hosts.judge_key(base)
        self._quit = threading.Event()  # ends what is under way
        self._last = threading.Event()  # nothing is tried again
        self._no_logprobs = False  # the server takes no `logprobs`
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(deadline, connect=min(deadline, 10.0)),
            follow_redirects=False,
            trust_env=not hosts.loopback(base),  # no proxy sees what this machine says to itself, nor the key
        )
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")

    def close(self) -> None:
        """Ends all requests."""
        self._quit.set()
        self._last.set()
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self, requests: Mapping[str, Mapping[str, Any]], check: Callable[[], None]
    ) -> Iterator[tuple[str, dict[str, Any] | ExecutionError]]:
        """Label of each request with its reply, as they come back, or with why the server refuses this one.

        check : raises when all is to end; asked while it waits. Raises ModelError for a server that answers none.
        Whatever ends it, replies to requests that are under way are waited for first, and come back.
        """
        waiting = {self._pool.submit(self._reply, body): label for label, body in requests.items()}
        ended: BaseException | None = None
        while waiting:
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                label = waiting.pop(future)
                try:
                    yield label, future.result()
                except ExecutionError as error:
                    yield label, error
                except ModelError as error:
                    ended = ended or error
            try:
                check()
            except BaseException as error:
                ended = ended or error
            if ended is not None:
                self._last.set()
                waiting = {future: label for future, label in waiting.items() if not future.cancel()}
        if ended is not None:
            raise ended

    def _reply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises ExecutionError for one that is refused, ModelError for a server that is."""
        why = ""
        for attempt in range(self.retries + 1):
            pause = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                sent = self._without(body) if self._no_logprobs else body
                status, headers, text = self._post(sent)
            except (httpx.HTTPError, TimeoutError, OSError) as error:
                why = str(error) if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    try:
                        return reply(json.loads(text))
                    except (ValueError, KeyError, TypeError, LookupError, AttributeError):
                        why = f"an answer that is no chat completion: {self._said(text)}"
                elif status in AGAIN or status >= 500:
                    why = f"status {status}: {self._said(text)}"
                    pause = asked_for(headers, pause)
                elif status in (400, 422) and "logprobs" in sent and "logprob" in text.lower():
                    self._no_logprobs = True
                    return self._reply(body)
                elif status in (400, 413, 422):
                    raise ExecutionError(f"the judge's server refuses a text: status {status}: {self._said(text)}")
                else:
                    what = REFUSED.get(status, f"answers with status {status}")
                    raise ModelError(f"the judge's server {hosts.shown(self.base)} {what}: {self._said(text)}")
            if attempt < self.retries and self._last.wait(pause):
                break
        raise LostError(
            f"the judge's server {hosts.shown(self.base)} gave no answer in {self.retries + 1} tries: {why}"
        )

    def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, str]:
        """Status, headers and text of an answer. Raises TimeoutError at the deadline, however slowly it comes."""
        ends = time.monotonic() + self.deadline
        pieces, size = [], 0
        with self._client.stream("POST", f"{self.base}/chat/completions", json=dict(body)) as answer:
            for piece in answer.iter_bytes():
                pieces.append(piece)
                size += len(piece)
                if size > MAX_BYTES:
                    raise OSError(f"an answer of more than {MAX_BYTES // 2**20} MiB")
                if time.monotonic() > ends or self._quit.is_set():
                    raise TimeoutError(f"no whole answer within {self.deadline:g} s")
            return answer.status_code, answer.headers, b"".join(pieces).decode("utf-8", "replace")

    @staticmethod
    def _without(body: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs")}

    def _said(self, text: str) -> str:
        """What a server says, in a short line that holds no key."""
        kept = text.replace(self._key, "…") if self._key else text
        return printable(" ".join(kept.split())[:200], lines=False)


def reply(data: Any) -> dict[str, Any]:
    """What matters of a chat completion: `text`, `model`, and of its first token `first` and the `top` of them.

    Raises KeyError, TypeError, LookupError or AttributeError for what is none.
    """
    choice = data["choices"][0]
    text = choice["message"]["content"]
    completion: dict[str, Any] = {"text": "" if text is None else str(text), "model": str(data.get("model", ""))}
    told = (choice.get("logprobs") or {}).get("content") or []
    if told:
        completion["first"] = str(told[0]["token"])
        completion["top"] = [
            [str(candidate["token"]), float(candidate["logprob"])] for candidate in told[0].get("top_logprobs") or []
        ]
    return completion


def asked_for(headers: Mapping[str, str], otherwise: float) -> float:
    """Seconds that a server asks us to wait (`Retry-After`), within LONGEST_WAIT."""
    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else otherwise
