"""A real server of OpenAI's protocol in a thread, whose replies a test decides."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]


def answer(text: str = "hello", **changes: Any) -> Reply:
    """Return a complete answer; `changes` replace parts of its choice, or `usage`."""
    usage = changes.pop("usage", {"completion_tokens": 3})
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}, {"token": "c", "logprob": -3.0}]}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": logprobs, **changes}
    return 200, {}, {"choices": [choice], "usage": usage}


def fault(status: int, message: str = "no", *, headers: dict[str, str] | None = None, **details: Any) -> Reply:
    return status, headers or {}, {"error": {"message": message, **details}}


class Server:
    """A server whose replies a test decides; it counts what it is asked and how many requests are under way."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: answer(body["messages"][-1]["content"].upper())
        self.models: Reply = (200, {}, {"data": [{"id": "m", "max_model_len": 512}, {"id": "other"}]})
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send(outer.models if self.path == "/v1/models" else fault(404))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.asked.append(body)
                    outer.times.append(time.monotonic())
                    outer.headers.append(dict(self.headers))
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                reply = outer.reply(body)
                with outer._lock:
                    outer.under_way -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                status, headers, content = reply
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {"content-length": str(len(data)), "content-type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                    self.close_connection = "connection" in headers
                except (BrokenPipeError, ConnectionResetError):  # the client was stopped meanwhile
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
