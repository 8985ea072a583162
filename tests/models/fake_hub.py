"""A small Hugging Face hub on localhost; the real huggingface_hub talks to it through HF_ENDPOINT."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories in memory.

    `requests` lists the requests; `cuts` counts how often a file still breaks off.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cuts: Counter[str] = Counter()
        self.requests: list[str] = []
        self.status = 0  # answers everything with this status, if set
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path.split("?")[0]
        self.requests.append(f"{handler.command} {path}")
        api = path.removeprefix("/api/models/") if path.startswith("/api/models/") else None
        repo, _, file = path[1:].partition("/resolve/main/")
        repo = api or repo
        if self.status:
            self._error(handler, self.status, "")
        elif repo not in self.repos:
            self._error(handler, 401, "RepoNotFound")  # the hub hides which repositories exist
        elif repo in self.gated and api is None:
            self._error(handler, 403, "GatedRepo")
        elif api:
            self._send(handler, json.dumps(self._info(repo)).encode(), {}, body=body)
        elif file not in self.repos[repo]:
            self._error(handler, 404, "EntryNotFound")
        else:
            self._file(handler, repo, file, body=body)

    def _info(self, repo: str) -> dict[str, Any]:
        files = [{"rfilename": name, "size": len(data)} for name, data in self.repos[repo].items()]
        return {"id": repo, "sha": COMMIT, "private": False, "siblings": files}

    def _file(self, handler: BaseHTTPRequestHandler, repo: str, file: str, *, body: bool) -> None:
        data = self.repos[repo][file]
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if body and self.cuts[file] > 0:
            self.cuts[file] -= 1
            self._send(handler, rest, headers, body=True, stop_after=len(rest) // 3)
        else:
            self._send(handler, rest, headers, body=body, status=206 if start else 200)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        data: bytes,
        headers: dict[str, str],
        *,
        body: bool,
        status: int = 200,
        stop_after: int | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if body:
            handler.wfile.write(data[:stop_after])
        if stop_after is not None:
            handler.wfile.flush()
            handler.close_connection = True

    def _error(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
