"""A hub on this machine: the part of the Hugging Face hub's HTTP API that huggingface_hub uses."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, and what it was asked.

    Attributes:
        files: by repository, then by path.
        revisions: names of the one commit.
        gated: repositories that ask for a token.
        token: the one that opens them.
        cut: bytes after which the next download of a file breaks off.
        requests: (method, path, Range header) of all requests.
        status: answer everything with it.
    """

    files: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    gated: tuple[str, ...] = ()
    token: str = "hf_good"
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    status: int = 0

    def __post_init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloaded(self) -> list[str]:
        """The files that were fetched, in order."""
        return [unquote(path).partition(f"/{COMMIT}/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if hub.status:
            return self.send({}, {}, hub.status)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        else:
            name, rest, revision = "/".join(parts[:2]), parts[2:], parts[3]
        files = hub.files.get(name)
        if files is None:
            return self.error(401, "RepoNotFound")
        if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.error(401, "GatedRepo")
        if revision not in hub.revisions:
            return self.error(404, "RevisionNotFound")
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self.send(entries, {}, 200)
        if rest[:1] != ["resolve"]:
            siblings = [{"rfilename": path} for path in files]
            return self.send({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}, {}, 200)
        return self.send_file("/".join(rest[2:]), files, body=body)

    def send_file(self, path: str, files: dict[str, bytes], *, body: bool) -> None:
        data = files.get(path)
        if data is None:
            return self.error(404, "EntryNotFound")
        self.hub.requests[-1] = (*self.hub.requests[-1][:2], self.headers.get("Range"))
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        cut = self.hub.cut.pop(path, None)
        self.wfile.write(data[begin : None if cut is None else begin + cut])
        if cut is not None:
            self.close_connection = True

    def error(self, status: int, code: str) -> None:
        self.send({"error": code}, {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send(self, document: object, headers: dict[str, str], status: int) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
