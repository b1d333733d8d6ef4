"""A proxy on loopback in front of an HTTP server, which fails as networks and servers do, by chance or when told."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("error", "reset", "lost", "delay")
"""500 without asking the server; connection reset before it is asked; reset after it did it; an answer that is late."""


class FaultyProxy:
    """Passes requests on to `target`; `share` of them fail, each in one of `kinds`.

    choose : method, path -> a kind, or "" for none; in place of chance
    """

    def __init__(
        self,
        target: str,
        share: float = 0.0,
        kinds: tuple[str, ...] = KINDS,
        seed: int = 0,
        delay: float = 0.2,
        choose: Callable[[str, str], str] | None = None,
    ):
        self.host, self.port = urlsplit(target).hostname, urlsplit(target).port
        self.share, self.kinds, self.delay, self.choose = share, kinds, delay, choose
        self.chance, self.count = random.Random(seed), {"passed": 0, **dict.fromkeys(KINDS, 0)}
        self._mutex = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def kind(self, method: str, path: str) -> str:
        with self._mutex:
            if self.choose:
                fault = self.choose(method, path)
            else:
                fault = self.chance.choice(self.kinds) if self.chance.random() < self.share else ""
            self.count[fault or "passed"] += 1
        return fault

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kind = proxy.kind(self.command, self.path)
                if kind == "reset":
                    return self.reset()
                if kind == "error":
                    return self.answer(500, [], b"")
                asked = http.client.HTTPConnection(proxy.host, proxy.port, timeout=60)
                with contextlib.closing(asked):
                    asked.request(self.command, self.path, body, dict(self.headers.items()))
                    got = asked.getresponse()
                    content = got.read()
                if kind == "lost":
                    return self.reset()
                if kind == "delay":
                    time.sleep(proxy.delay)
                headers = [(n, v) for n, v in got.getheaders() if n.lower() not in ("connection", "transfer-encoding")]
                return self.answer(got.status, headers, content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

            def answer(self, status: int, headers: list, content: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
