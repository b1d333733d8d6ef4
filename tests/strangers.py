"""Servers on loopback that do not mean well: each keeps what it was asked, and answers as a test tells it."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading


class Stranger:
    """A server on loopback. `asked`: method, path and headers of each request; `answer(request)`: what it says."""

    def __init__(self, answer=None):
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[bytes] = []
        self.answer = answer or (lambda method, path: (401, b'{"detail": "no"}'))
        stranger = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                stranger.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                stranger.bodies.append(body)
                status, content, *more = stranger.answer(self.command, self.path)
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # whoever asked may have heard enough
                    for part in [content] if isinstance(content, bytes) else content:
                        self.wfile.write(part)

            do_GET = do_POST = do_HEAD = do

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def keys(self) -> list[str | None]:
        """The API key of each request, None where it had none."""
        return [headers.get("ndif-api-key") for _, _, headers in self.asked]


class Ndif(Stranger):
    """An NDIF of one process: a job is run at once by a local executor; `spoil` may change what it answers."""

    def __init__(self, local, spoil=None, said=None):
        super().__init__(self.serve)
        self.local, self.spoil, self.said = local, spoil or (lambda content: content), said or {}
        self.results: dict[str, bytes] = {}

    def serve(self, method, path):
        from nsteer.executors.common import quiet
        from nsteer.executors.rehearse import perform

        if path == "/request":
            job = f"job-{len(self.results)}"
            blob = re.search(rb'filename="request"\r\n.*?\r\n\r\n(.*)\r\n--', self.bodies[-1], re.DOTALL)[1]
            import zstandard

            with quiet():
                self.results[job] = perform(self.local.model, zstandard.ZstdDecompressor().decompress(blob))
            return 200, json.dumps({"id": job, "status": "RECEIVED", "description": "", **self.said}).encode()
        if path.startswith("/response/"):
            job = path.rpartition("/")[2]
            said = {"id": job, "status": "COMPLETED", "description": "", "data": f"{self.url}/results/{job}"}
            return 200, json.dumps({**said, **self.said}).encode()
        if path.startswith("/results/"):
            reply = self.spoil(self.results[path.rpartition("/")[2]])
            return reply if isinstance(reply, tuple) else (200, reply)
        return 404, b"{}"
