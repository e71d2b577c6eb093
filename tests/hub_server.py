"""A small hub at a free port of this machine: repositories are made, weights sent, commits taken and files given out.

What huggingface_hub 1.3 and 2.4 ask for: /api/repos/create, /api/models/ID, /api/validate-yaml,
/api/models/ID/preupload/main, /ID.git/info/lfs/objects/batch, a PUT for each object, and /api/models/ID/commit/main;
for downloads /api/models/ID/revision/main, /api/models/ID/tree/COMMIT and /ID/resolve/COMMIT/FILE.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "W" * 34
"""Who has it may write to repositories of `me`."""

READ_TOKEN = "hf_" + "R" * 34
"""Who has it may write nowhere."""


class Hub(ThreadingHTTPServer):
    """The server, and what it holds.

    Attributes:
        repositories: by id: `private`, and `commits`, each with its files by name.
        objects: weights by sha256.
        requests: method and path of every request.
        tokens: with which something was to be changed.
        breaks_at: a request whose path holds this is not answered, but the connection closed.
        answers_late: whether that happens after the request did its work.
        status_at: answers this status to requests whose path holds the key.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.breaks_at: str | None = None
        self.answers_late = False
        self.status_at: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What somebody sees who looks at a repository."""
        seen: dict[str, bytes] = {}
        for commit in self.repositories[repo_id]["commits"]:
            seen.update(commit)
        return seen


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that is there inside the block."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self._body()
        hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command == "POST":
            hub.tokens.add(token)
        breaks = hub.breaks_at is not None and hub.breaks_at in path
        if breaks and not hub.answers_late:
            self._hang_up()
            return
        status = next((code for part, code in hub.status_at.items() if part in path), None)
        if status is None and token not in (TOKEN, READ_TOKEN) and not path.startswith("/objects/"):
            self._answer(401, {"error": "Invalid username or password."})
            return
        if status is None and token == READ_TOKEN and self.command == "POST" and not path.endswith("validate-yaml"):
            status = 403
        if status is not None:
            self._answer(status, {"error": "no"})
            return
        if "/resolve/" in path:
            self._give_out(*path.strip("/").split("/resolve/"))
            return
        code, value = self._work(path, body)
        if breaks:
            self._hang_up()
            return
        self._answer(code, value)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self) -> None:
        self.close_connection = True

    def _answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _give_out(self, repo_id: str, place: str) -> None:
        """A file of a commit, or what a program wants to know before it asks for it."""
        oid, _, name = place.partition("/")
        content = self.server.files(repo_id).get(name) if repo_id in self.server.repositories else None
        if content is None:
            self._answer(404, {"error": "Entry not found"})
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", oid)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _work(self, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            if repo_id in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}
            is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
            hub.repositories[repo_id] = {"private": is_private, "commits": []}
            return 200, {"url": f"{hub.url}/{repo_id}", "name": repo_id}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):
            digest = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != digest:
                return 400, {"error": "other bytes than announced"}
            hub.objects[digest] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._wanted(each) for each in json.loads(body)["objects"]]}
        repo_id = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if not path.startswith("/api/models/") or repo_id not in hub.repositories:
            return 404, {"error": "Repository not found"}
        repository = hub.repositories[repo_id]
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(repo_id, each) for each in json.loads(body)["files"]]}
        if path.endswith("/commit/main"):
            repository["commits"].append(self._commit(body))
        oid = f"{len(repository['commits']):040x}"
        url = f"{hub.url}/{repo_id}/commit/{oid}"
        names = sorted(hub.files(repo_id))
        if "/tree/" in path:
            sizes = {name: len(content) for name, content in hub.files(repo_id).items()}
            return 200, [{"type": "file", "path": name, "size": sizes[name], "oid": oid} for name in names]
        siblings = [{"rfilename": name} for name in names]
        return 200, {
            **{"id": repo_id, "modelId": repo_id, "private": repository["private"], "sha": oid, "siblings": siblings},
            **{"commitUrl": url, "commitOid": oid, "tags": []},
        }

    def _wanted(self, file: dict[str, Any]) -> dict[str, Any]:
        has_it = file["oid"] in self.server.objects
        place = {"upload": {"href": f"{self.server.url}/objects/{file['oid']}"}}
        return {"oid": file["oid"], "size": file["size"], **({} if has_it else {"actions": place})}

    def _mode(self, repo_id: str, file: dict[str, Any]) -> dict[str, Any]:
        seen = self.server.files(repo_id).get(file["path"])
        is_large = file["path"].endswith(".safetensors")
        oid = None
        if seen is not None:
            git = hashlib.sha1(b"blob %d\0" % len(seen) + seen, usedforsecurity=False)
            oid = (hashlib.sha256(seen) if is_large else git).hexdigest()
        return {
            **{"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False},
            "oid": oid,
        }

    def _commit(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        return files
