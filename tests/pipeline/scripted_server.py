"""A web server on loopback with a scripted response for each path."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Respond = Callable[[BaseHTTPRequestHandler], None]


def not_found(handler: BaseHTTPRequestHandler) -> None:
    """Answer with 404."""
    handler.send_response(404)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


class ScriptedServer:
    """Answers GET by path, unknown paths with 404. requests: (path, headers) of each request, in order."""

    def __init__(self) -> None:
        self.responses: dict[str, Respond] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                server.connections += 1
                super().setup()

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers)))
                server.responses.get(self.path, not_found)(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    @property
    def paths(self) -> list[str]:
        """The path of each request, in order."""
        return [path for path, _ in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def on(self, path: str, respond: Respond) -> str:
        """Answer a path with a function. Returns its URL."""
        self.responses[path] = respond
        return self.url + path

    def send(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Answer a path with a body, a status and headers (underscores for hyphens). Returns its URL."""

        def respond(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                for line in value.split("\n"):
                    handler.send_header(name.replace("_", "-"), line)
            handler.end_headers()
            handler.wfile.write(body)

        return self.on(path, respond)
