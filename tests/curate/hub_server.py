"""A small Hub for the tests: the endpoints that an upload of huggingface_hub calls, over HTTP, with faults on demand."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
LARGE = (".parquet",)  # kinds of files that a data set's .gitattributes puts into the large storage


@dataclass
class Repository:
    """A data set: its files as they are after the last commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.parquet filter=lfs\n"})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, what it was asked, and where it breaks."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    asked: list[str] = field(default_factory=list)  # METHOD PATH
    hangs_up_at: str = ""  # a part of a path: there the connection is closed without an answer
    refuses_at: tuple[str, int, str] = ("", 0, "")  # a part of a path, the status and the message

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Return the status and the JSON that answer a request."""
        path, _, _ = path.partition("?")
        if token != TOKEN and not path.startswith("/large/"):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/large/"):
            name = path.rpartition("/")[2]
            if method == "PUT":
                assert hashlib.sha256(body).hexdigest() == name
                self.large[name] = body
            return 200, {}
        name, action = self._parts(path)
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if action.startswith("tree/"):
            return 200, [
                {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for each, content in repository.files.items()
            ]
        if action.startswith("preupload/"):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if action == "info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.address}/large/{each['oid']}"}}} for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if action.startswith("commit/"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 200, {
            "id": name,
            "sha": "0" * 40,
            "private": repository.private,
            "siblings": [{"rfilename": each} for each in repository.files],
        }

    def _parts(self, path: str) -> tuple[str, str]:
        rest = path.removeprefix("/api").removeprefix("/datasets/")
        if ".git/" in rest:
            name, _, action = rest.partition(".git/")
            return name, action
        owner, _, rest = rest.partition("/")
        name, _, action = rest.partition("/")
        return f"{owner}/{name}", action

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        assert asked["type"] == "dataset"
        url = f"{self.address}/datasets/{name}"
        if name in self.repositories:
            return 409, {"error": "You already created this dataset repo", "url": url}
        self.repositories[name] = Repository(private=asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {"url": url, "name": name}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        repository, files = self.repositories[name], dict(self.repositories[name].files)
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.large[value["oid"]]
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del files[value["path"]]
        repository.files = files
        repository.commits.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        commit = f"{len(repository.commits):040x}"
        return 200, {"commitUrl": f"{self.address}/datasets/{name}/commit/{commit}", "commitOid": commit, "success": True}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a Hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if hub.hangs_up_at and hub.hangs_up_at in self.path:
                self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 100))  # in the middle of the body
                self.close_connection = True
                return
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            part, status, message = hub.refuses_at
            if part and part in self.path:
                told: Any = {"error": message, "errors": [{"message": message}]}
            else:
                status, told = hub.answer(self.command, self.path, body, (self.headers.get("Authorization") or "").removeprefix("Bearer "))
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if status >= 400:
                self.send_header("X-Error-Message", told["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
