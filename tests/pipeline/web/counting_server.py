"""A web server on all loopback addresses that counts the requests it is answering, by host."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType


class CountingServer:
    """Answers every GET with a body after delay_s. most: requests at the same time, by the name in `Host`.

    held: a host gets no answer before that many requests to it are active, by the name of the host.
    """

    def __init__(self, delay_s: float, body: bytes = b"body", held: Mapping[str, int] = MappingProxyType({})) -> None:
        self.active: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._delay_s, self._body = delay_s, body
        self._held = held
        self._lock = threading.Condition()
        self._server = ThreadingHTTPServer(("", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, host: str, number: int) -> str:
        """A URL of a host, which is an address such as 127.0.0.2."""
        return f"http://{host}:{self._server.server_port}/{number}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request, and count it."""
        host = handler.headers["Host"].partition(":")[0]
        with self._lock:
            self.requests[host] += 1
            self.active[host] += 1
            self.most[host] = max(self.most[host], self.active[host])
            self._lock.notify_all()
            self._lock.wait_for(lambda: self.most[host] >= self._held.get(host, 0), timeout=60)
        time.sleep(self._delay_s)
        with self._lock:
            self.active[host] -= 1  # before the client can send its next request
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(self._body)))
        handler.end_headers()
        handler.wfile.write(self._body)

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
