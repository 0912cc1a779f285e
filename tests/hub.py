"""A hub on this machine: repositories in a directory, served as `huggingface_hub` asks for them; it can break off."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: Asking for it ends the hub.
END = "/end"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `directory/OWNER/NAME` as the model OWNER/NAME.

    Args:
        directory: with the repositories.

    Attributes:
        cut: files, as OWNER/NAME/FILE, of which it sends the first half and then closes the connection.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.directory, self.cut = directory, set[str]()

    def end(self) -> None:
        """Nobody can reach it any more."""
        self.shutdown()
        self.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub  # HTTP/1.0: a connection an answer, so that none outlives the hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path == END:
            self._headers(200, 0, {})
            threading.Thread(target=self.server.end).start()
            return
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if about and (self.server.directory / about[1]).is_dir():
            self._tell(about[1], (about[2] or "").startswith("/tree"), body)
        elif file and (self.server.directory / file[1] / file[2]).is_file():
            self._send(self.server.directory / file[1] / file[2], body)
        else:
            self._headers(404, 0, {"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

    def _tell(self, name: str, tree: bool, body: bool) -> None:
        files = sorted((self.server.directory / name).iterdir())
        if tree:
            told: object = [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": _etag(one)} for one in files
            ]
        else:
            siblings = [{"rfilename": one.name} for one in files]
            told = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        text = json.dumps(told).encode()
        self._headers(200, len(text), {"Content-Type": "application/json"})
        if body:
            self.wfile.write(text)

    def _send(self, file: Path, body: bool) -> None:
        content = file.read_bytes()
        begin = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        about = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if begin:
            about["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._headers(206 if begin else 200, len(content) - begin, about)
        if not body:
            return
        breaks = str(file.relative_to(self.server.directory)) in self.server.cut
        self.wfile.write(content[begin : max(begin, len(content) // 2) if breaks else len(content)])

    def _headers(self, status: int, length: int, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def served(directory: Path) -> Iterator[Hub]:
    """A hub that serves `directory` while the block runs."""
    hub = Hub(directory)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.end()
        thread.join()
