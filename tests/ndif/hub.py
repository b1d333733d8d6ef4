"""Turns folders into a model hub on loopback: what transformers, huggingface_hub and nnsight ask of one.

    python hub.py PORT org/name=/folder [org/name@branch=/other]     then HF_ENDPOINT=http://127.0.0.1:PORT

With HUB_HOME in the environment it takes data sets too, by commits of files, from whoever has the token HUB_TOKEN: a
folder a repository and branch. HUB_HOME/log has a line of JSON for each request, without its body.

Ids are matched without regard to case and answered in their own, as the real hub does. A revision is `main`,
a named branch, or the commit of either; all else is RepoNotFound, RevisionNotFound or EntryNotFound.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub:
    """The repositories: id -> branch -> folder."""

    def __init__(self, words: list[str]):
        self.repos: dict[str, dict[str, Path]] = {}
        for word in words:
            name, _, folder = word.partition("=")
            name, _, branch = name.partition("@")
            self.repos.setdefault(name, {})[branch or "main"] = Path(folder)

    def repo(self, name: str) -> str | None:
        return next((known for known in self.repos if known.lower() == name.lower()), None)

    def commit(self, repo: str, branch: str) -> str:
        return hashlib.sha1(f"{repo}@{branch}".encode()).hexdigest()

    def branch(self, repo: str, revision: str | None) -> str | None:
        """The branch that a revision names, itself or by its commit."""
        for branch in self.repos[repo]:
            if revision in (branch, self.commit(repo, branch)) or (revision is None and branch == "main"):
                return branch
        return None

    def files(self, repo: str, branch: str) -> dict[str, Path]:
        folder = self.repos[repo][branch]
        return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def info(self, repo: str, branch: str) -> dict:
        counts: dict[str, int] = {}
        for file in self.files(repo, branch).values():
            if file.suffix == ".safetensors":
                for dtype, count in tensor_counts(file):
                    counts[dtype] = counts.get(dtype, 0) + count
        commit = self.commit(repo, branch)
        return {
            "_id": commit[:24],
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": False,
            "tags": [],
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "siblings": [{"rfilename": name} for name in self.files(repo, branch)],
            "safetensors": {"parameters": counts, "total": sum(counts.values())},
        }


def tensor_counts(file: Path):
    """(dtype, numbers) of every tensor, from a safetensors file's header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    for name, entry in header.items():
        if name != "__metadata__":
            yield entry["dtype"], prod(entry["shape"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *words):
        print(self.command, self.path, *words[1:2], flush=True)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(/.+)?/?", path):
            self.api(*match.groups())
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            self.miss("EntryNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, home = unquote(urlparse(self.path).path), os.environ.get("HUB_HOME")
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if home is None or self.headers.get("Authorization") != f"Bearer {os.environ['HUB_TOKEN']}":
            return self.answer(401, b'{"error": "Invalid credentials"}', {"X-Error-Message": "Invalid credentials"})
        with Path(home, "log").open("a") as log:
            log.write(json.dumps({"path": path, "said": json.loads(body) if "/repos/" in path else {}}) + "\n")
        if path == "/api/repos/create":
            return self.create(Path(home), json.loads(body))
        name, what, branch = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path
        ).groups()
        if what == "branch":
            return self.branch(Path(home), name, branch)
        if branch not in self.hub.repos.get(name, {}):
            return self.miss("RevisionNotFound")
        if what == "preupload":
            files = [{"path": entry["path"], "uploadMode": "regular"} for entry in json.loads(body)["files"]]
            return self.json({"files": [{**entry, "shouldIgnore": False, "oid": None} for entry in files]})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                file = self.hub.repos[name][branch] / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.hub.commit(name, branch)
        self.json({"success": True, "commitOid": commit, "commitUrl": f"{self.base()}/datasets/{name}/commit/{commit}"})

    def base(self):
        return f"http://{self.headers['Host']}"

    def create(self, home, asked):
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repos:
            return self.answer(409, b'{"error": "You already created this repo"}', {})
        self.branch(home, name, "main", answer=False)
        self.json({"url": f"{self.base()}/datasets/{name}", "name": name})

    def branch(self, home, name, branch, answer=True):
        if branch in self.hub.repos.get(name, {}):
            return self.answer(409, b'{"error": "Reference already exists"}', {})
        folder = home / f"{name.replace('/', '--')}@{branch}"
        folder.mkdir(parents=True)
        self.hub.repos.setdefault(name, {})[branch] = folder
        if answer:
            self.json({})

    def api(self, name, what, revision, rest):
        located = self.locate(name, revision)
        if located is None:
            return
        if rest:
            self.miss("EntryNotFound")
        elif what == "tree":
            self.json(
                [
                    {"type": "file", "path": name, "oid": digest(file), "size": file.stat().st_size}
                    for name, file in self.hub.files(*located).items()
                ]
            )
        else:
            self.json(self.hub.info(*located))

    def resolve(self, name, revision, file):
        located = self.locate(name, revision)
        if located is None:
            return
        path = self.hub.files(*located).get(file)
        if path is None:
            self.miss("EntryNotFound")
            return
        headers = {"X-Repo-Commit": self.hub.commit(*located), "ETag": f'"{digest(path)}"', "Accept-Ranges": "none"}
        self.answer(200, path.read_bytes(), headers)

    def locate(self, name, revision):
        repo = self.hub.repo(name)
        if repo is None:
            return self.miss("RepoNotFound")
        branch = self.hub.branch(repo, revision)
        return (repo, branch) if branch else self.miss("RevisionNotFound")

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def miss(self, code):
        self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status, body, headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    Handler.hub = Hub(sys.argv[2:])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
