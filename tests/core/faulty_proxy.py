"""A proxy that stands between a client and a server and breaks what passes through it, as a schedule says."""

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

FAULTS = ("429", "503", "disconnect", "cut", "drip", "garbage", "half")


class FaultyProxy:
    """Passes requests on to `upstream`; `fault()` says for each what happens to it, None for nothing. `restart` goes away and comes back."""

    def __init__(self, upstream: str, fault: Callable[[], str | None]) -> None:
        self.upstream, self.fault = upstream.removesuffix("/v1"), fault
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))  # making one takes 20 ms of CPU
        self._start(0)

    def _start(self, port: int) -> None:
        outer = self
        self._connections: list[socket.socket] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def do_GET(self) -> None:
                self.send(outer._client.get(outer.upstream + self.path).content)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with outer._lock:
                    fault = outer.fault()
                    outer.done[fault or "passed"] += 1
                if fault in ("429", "503"):
                    return self.send(b'{"error": {"message": "busy"}}', int(fault))
                if fault == "disconnect":
                    return self.leave()
                content = outer._client.post(outer.upstream + self.path, content=body).content
                if fault == "garbage":
                    content = b"<html>gateway</html>"
                elif fault == "half":
                    content = json.dumps(json.loads(content)).encode()[:-10]
                return self.send(content, fault=fault)

            def send(self, content: bytes, status: int = 200, fault: str | None = None) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                if fault == "cut":
                    self.wfile.write(content[:20])
                    return self.leave()
                if fault == "drip":  # a byte now and then, for longer than anybody waits
                    for place in range(len(content)):
                        self.wfile.write(content[place : place + 1])
                        time.sleep(0.05)
                    return None
                self.wfile.write(content)
                return None

            def leave(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:  # the client has gone
                pass

        self._http = Quiet(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go away: connections to the address are refused."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        """Come back at the same address."""
        self._start(self.port)


def storm(share: float, seed: int, faults: tuple[str, ...] = FAULTS) -> Callable[[], str | None]:
    """Return a schedule by which this share of the requests meets one of the faults."""
    chance = random.Random(seed)
    return lambda: chance.choice(faults) if chance.random() < share else None
