"""A server whose every answer the test writes itself."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Answer = Callable[[BaseHTTPRequestHandler], None]


class Origin:
    """Answers GET by path; `asked` lists the requests as (path, headers)."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                origin.connections += 1
                super().setup()

            def do_GET(self) -> None:
                origin.asked.append((self.path, dict(self.headers)))
                origin.answers[self.path](self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def on(self, path: str, answer: Answer) -> str:
        """Answer a path so; its URL."""
        self.answers[path] = answer
        return self.url + path

    def sends(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Answer a path with this body, status and headers (underscores for hyphens); its URL."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                for line in value.split("\n"):
                    handler.send_header(name.replace("_", "-"), line)
            handler.end_headers()
            handler.wfile.write(body)

        return self.on(path, answer)


@pytest.fixture
def origin() -> Iterator[Origin]:
    origin = Origin()
    origin._server.handle_error = lambda *_: None  # type: ignore[method-assign]
    yield origin
    origin.close()
