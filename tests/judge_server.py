"""An OpenAI-compatible server on loopback, as much of one as a judge needs, whose faults are arranged."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]]


def completion(text: str, top: dict[str, float] | None = None, model: str = "toy") -> dict[str, Any]:
    """A chat completion; `top`: probability of each first token, the first of them what was written."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top:
        told = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {
            "content": [{"token": next(iter(top)), "logprob": told[0]["logprob"], "top_logprobs": told}]
        }
    return {"id": "x", "object": "chat.completion", "model": model, "choices": [choice]}


class Judge:
    """A server that answers what `answer(body, number of the request)` says: status, headers, and JSON, text or None.

    None hangs up without an answer; a float in place of a status waits so long first. Use it in a `with`.
    """

    def __init__(self, answer: Answer, port: int = 0):
        self.answer, self.bodies, self.keys, self.paths = answer, list[dict](), list[str](), list[str]()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization", ""))
                    outer.paths.append(self.path)
                    number = len(outer.bodies)
                status, headers, said = outer.answer(body, number)
                if said is None:
                    self.close_connection = True
                    return
                raw = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                try:
                    if headers.get("X-Drip"):
                        for i in range(len(raw)):
                            self.wfile.write(raw[i : i + 1])
                            self.wfile.flush()
                            time.sleep(0.05)
                    else:
                        self.wfile.write(raw)
                except OSError:
                    return  # whoever asked is gone

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.base = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Judge:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
