"""A web server of a folder with ranges, latency and faults: in a test (`serving`), or by itself for a benchmark:
`python tests/data/http_server.py FOLDER [SECONDS]` prints its address and ends with its standard input.

SECONDS pass before each answer. A fault befalls one request each, in the order of `Server.faults`:
`cut` (the connection ends after half of the body), `short` (half of the body, called the whole), a status such as `500`, `slow`
(1.5 s) and `silent` (no answer at all).
"""

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, latency: float = 0.0, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency, self.ranges = folder, latency, ranges
        self.faults: deque[str] = deque()
        self.asked: list[tuple[str, int, int]] = []  # path, first byte and bytes of every request that was answered

    def handle_error(self, request, client_address) -> None:
        pass  # a client has gone

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        fault = self.server.faults.popleft() if self.server.faults else ""
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if fault == "silent":
            time.sleep(60)
        if fault == "slow":
            time.sleep(1.5)
        if fault.isdecimal() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        with path.open("rb") as file:
            self._send(file, os.fstat(file.fileno()), fault)

    def _send(self, file, stat: os.stat_result, fault: str) -> None:
        start, end = 0, stat.st_size
        limits = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        if limits:
            start, end = int(limits[1]), min(int(limits[2] or end) + 1, end)
        length = end - start
        self.server.asked.append((self.path, start, length))
        self.send_response(206 if limits else 200)
        if limits:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{stat.st_size}")
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
        sent = length // 2 if fault in ("cut", "short") else length
        self.send_header("Content-Length", str(sent if fault == "short" else length))
        self.end_headers()
        if sent:
            self.wfile.flush()
            self.connection.sendfile(file, start, sent)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path, latency: float = 0.0, ranges: bool = True) -> Iterator[Server]:
    """A server in a thread of this process."""
    with Server(folder, latency, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0) as running:
        print(running.address, flush=True)
        sys.stdin.read()
