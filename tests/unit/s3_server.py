"""An S3 server on loopback (moto's), and a proxy in front of it that makes trouble."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "runs"
KEY, SECRET = "key-of-a-test", "secret-of-a-test"
START_DEADLINE_S = 60.0


def environment(port: int) -> dict[str, str]:
    """Variables by which every S3 client of a process finds a server on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def serving(free_actions: int | None = None) -> Iterator[int]:
    """The port of a server with one empty bucket.

    Args:
        free_actions: how many requests are served before keys are checked; None: they are never.
    """
    checked = {} if free_actions is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(free_actions)}
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"],
        env=os.environ | checked,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = _port(server)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        request.add_header("Authorization", f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request, timeout=30).close()
        yield port
    finally:
        server.terminate()
        server.wait(30)


def _port(server: subprocess.Popen[str]) -> int:
    """What it tells of itself; and its later lines are read away, so that it never waits for a reader."""
    assert server.stderr is not None
    until = time.monotonic() + START_DEADLINE_S
    for line in server.stderr:
        if "Running on http://127.0.0.1:" in line:
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return int(line.split("http://127.0.0.1:")[1].split()[0])
        assert time.monotonic() < until, line
    raise AssertionError("the S3 server ended")


@dataclass
class Trouble:
    """What a proxy does to requests before it passes them on."""

    spoil: Callable[[str, str], int | None] = lambda method, path: None
    """Of (method, path): a status to answer with instead of passing it on; 0 breaks the connection."""
    pause_s: float = 0.0
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def troubled(upstream: int, trouble: Trouble) -> Iterator[int]:
    """The port of a proxy in front of a server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            body = self._body()
            trouble.seen.append((self.command, self.path))
            time.sleep(trouble.pause_s)
            status = trouble.spoil(self.command, self.path)
            if status == 0:
                self.close_connection = True
                return
            if status is not None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._pass_on(body)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _pass_on(self, body: bytes) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            connection.close()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
